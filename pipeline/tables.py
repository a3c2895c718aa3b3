"""Parquet tables with JSON metadata: written whole, with equal bytes for equal input, and checked when read."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StoreError
from pipeline.files import replacing_file

TABLE_METADATA_KEY = b"ajepa"  # the key of our JSON in the metadata of the schema

ROW_GROUP_ROWS = 2**20  # pyarrow's default; the bytes of every table depend on it

# A text column that takes fewer bytes a row in its file is read as a dictionary: each text is in memory once, not once
# a row. Distinct texts take at least four bytes for their lengths alone.
DICTIONARY_BYTES_PER_ROW = 4

# Rows at a time that `TableRows` reads, and that are made a table of pyarrow to be written.
ROWS_CONVERTED = 2**16

ROWS_JOINED = 2**18  # texts that `frame_digest` joins at a time

FEW_TEXTS = 2**12  # which Python joins faster than polars begins to

COLUMNWISE_ROWS = 2**16  # smaller tables are read in one go

# Every error that reading a damaged Parquet file may raise.
DAMAGED_TABLE_ERRORS = (OSError, ValueError, pa.ArrowException, pl.exceptions.PanicException)


IMPORTING_PROCESS = os.getpid()  # another process with this module in memory has been forked from it


def refuse_forked_process(path: Path) -> None:
    """Raise StoreError in a forked process: polars would wait in it for ever for threads of its parent."""
    if os.getpid() != IMPORTING_PROCESS:
        raise StoreError(
            f"{path}: no table can be read in a process that was forked; make store.dataset(...) before the workers "
            "of a DataLoader start, or start them with multiprocessing_context='spawn'"
        )


def describe_table_damage(error: BaseException) -> str:
    """Return why a Parquet file cannot be read: `missing`, or the first line of the error."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_table(path: Path, frame: pl.DataFrame, metadata: dict[str, Any]) -> None:
    """Write a frame as a Parquet file with `metadata` as JSON in its schema, whole or not at all.

    Equal input gives equal bytes; every page has a checksum.
    """
    with writing_table_parts(path, [frame], metadata):
        pass  # there is nothing to do between writing the file and moving it into place


@contextmanager
def writing_table_parts(
    path: Path, parts: Iterable[pl.DataFrame], metadata: dict[str, Any]
) -> Iterator[None]:
    """Write frames, one below the other, as `write_table` writes a single frame; then run the block.

    The file is moved into place after the block. Only one row group is in memory. There must be at least one part.
    """
    text = json.dumps(metadata, separators=(",", ":"))
    with replacing_file(path) as scratch:
        with ExitStack() as stack:
            writer: pq.ParquetWriter | None = None
            for table in _row_groups(parts):
                table = table.replace_schema_metadata({TABLE_METADATA_KEY: text})
                if writer is None:
                    writer = stack.enter_context(
                        pq.ParquetWriter(scratch, table.schema, compression="zstd", write_page_checksum=True)
                    )
                writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
                del table  # or it would be in memory beside the next one
        yield


def _row_groups(parts: Iterable[pl.DataFrame]) -> Iterator[pa.Table]:
    """Yield the rows of all parts as tables of ROW_GROUP_ROWS rows and a last, shorter one; at least one table."""
    waiting: list[pa.Table] = []
    row_count = 0
    group_count = 0
    for part in _large_parts(parts):
        while row_count + part.height >= ROW_GROUP_ROWS:
            taken = ROW_GROUP_ROWS - row_count
            waiting.append(part[:taken].to_arrow(compat_level=pl.CompatLevel.oldest()))
            yield _joined_table(waiting)
            group_count += 1
            part = part[taken:]
            row_count = 0
        waiting.append(part.to_arrow(compat_level=pl.CompatLevel.oldest()))
        row_count += part.height
    if row_count or not group_count:
        yield _joined_table(waiting)


def _large_parts(parts: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """Yield the rows of all parts in parts of at least ROWS_CONVERTED rows and a last, shorter one; at least one part.

    Thousands of small tables of pyarrow take twice the memory of a few large ones.
    """
    waiting: list[pl.DataFrame] = []
    row_count = 0
    is_first = True
    for part in parts:
        waiting.append(part)
        row_count += part.height
        if row_count >= ROWS_CONVERTED:
            yield waiting[0] if len(waiting) == 1 else pl.concat(waiting, rechunk=True)
            waiting.clear()
            row_count = 0
            is_first = False
    if waiting and (row_count or is_first):
        yield pl.concat(waiting, rechunk=True)


def _joined_table(tables: list[pa.Table]) -> pa.Table:
    """Return the tables, one below the other, and empty the list; a column at a time is in memory twice."""
    schema = tables[0].schema
    columns = [[table.column(index) for table in tables] for index in range(len(schema))]
    tables.clear()
    joined: list[pa.Array] = []
    while columns:
        chunks = [chunk for column in columns.pop(0) for chunk in column.chunks]
        joined.append(pa.concat_arrays(chunks) if chunks else pa.array([], schema.field(len(joined)).type))
    return pa.Table.from_arrays(joined, schema=schema)


def read_table(path: Path, columns: Sequence[str] | None = None) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Read a frame, or those of some columns that it has, and the metadata that `write_table` wrote with it.

    A large table is read column by column, so that it is never in memory twice. Raises StoreError.
    """
    refuse_forked_process(path)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            names = schema.names if columns is None else [name for name in columns if name in schema.names]
            if file.metadata.num_rows < COLUMNWISE_ROWS:
                frame = frame_from_arrow(file.read(names))
            else:
                frame = pl.DataFrame(list(_read_large_columns(path, file, names)))
        return frame, _schema_metadata(schema)
    except DAMAGED_TABLE_ERRORS as error:
        raise _damaged_table_error(path, error) from None


def read_arrow_table(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Read a small table as pyarrow has it, and the metadata that `write_table` wrote with it; raises StoreError.

    `frame_from_arrow` makes a frame of it, or of many such tables at once, which takes less time.
    """
    refuse_forked_process(path)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            # The metadata is in the file twice; what a table is read with need not be that of `file.schema_arrow`.
            return file.read(use_threads=False), _schema_metadata(file.schema_arrow)
    except DAMAGED_TABLE_ERRORS as error:
        raise _damaged_table_error(path, error) from None


def read_table_slices(path: Path, columns: Sequence[str], rows: int) -> Iterator[pl.DataFrame]:
    """Yield the rows of a table in frames of up to `rows` rows; memory does not grow with the table.

    Columns that the table lacks are left out. Raises StoreError.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=rows, columns=names, use_threads=False):
                yield frame_from_arrow(pa.Table.from_batches([batch])).select(names)
    except DAMAGED_TABLE_ERRORS as error:
        raise _damaged_table_error(path, error) from None


class TableRows:
    """The rows of a table in their order, as many at a time as are asked for; memory does not grow with the table."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._slices = read_table_slices(path, columns, ROWS_CONVERTED)
        self._waiting = pl.DataFrame()  # rows that were read and not asked for

    def next_rows(self, count: int) -> pl.DataFrame:
        """Return the next rows, fewer at the end of the table; raises StoreError."""
        while self._waiting.height < count and (rows := next(self._slices, None)) is not None:
            self._waiting = pl.concat([self._waiting, rows]) if self._waiting.height else rows
        taken = self._waiting[:count]
        self._waiting = self._waiting[count:]
        return taken


def table_digest(path: Path, columns: Sequence[str]) -> str:
    """Return the `frame_digest` of some columns of a table, of which one at a time is in memory; raises StoreError."""
    return _columns_digest(read_table(path, [name])[0].to_series() for name in columns)


def _read_large_columns(path: Path, file: pq.ParquetFile, names: Sequence[str]) -> Iterator[pl.Series]:
    """Yield columns of a table, each read by itself; repeated texts are in memory once."""
    repetitive = [name for name in names if _is_repetitive(file, name)]
    with pq.ParquetFile(path, read_dictionary=repetitive, page_checksum_verification=True) as dictionaries:
        for name in names:
            table = dictionaries.read([name])
            if name in repetitive:
                yield _texts_from_dictionary(table.column(0)).alias(name)
            else:
                yield frame_from_arrow(table).to_series()


def _texts_from_dictionary(column: pa.ChunkedArray) -> pl.Series:
    """Return a dictionary of texts as a column of texts; each row refers to its text in the dictionary."""
    array = column.unify_dictionaries().combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # of a table without rows
        return pl.Series(values=[], dtype=pl.String)
    texts = pl.Series(values=array.dictionary.to_pylist(), dtype=pl.String)
    return texts.gather(pl.Series(values=array.indices, dtype=pl.UInt32))


def _is_repetitive(file: pq.ParquetFile, name: str) -> bool:
    """Return whether a column has texts of which few are distinct, to judge by its size in the file."""
    if file.schema_arrow.field(name).type not in (pa.string(), pa.large_string()):
        return False
    metadata = file.metadata
    (index,) = (i for i in range(metadata.num_columns) if metadata.schema.column(i).path == name)
    chunks = [metadata.row_group(group).column(index) for group in range(metadata.num_row_groups)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks)
    return size < DICTIONARY_BYTES_PER_ROW * metadata.num_rows


def frame_from_arrow(table: pa.Table) -> pl.DataFrame:
    """Return a table as a frame."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def read_table_schema(path: Path) -> tuple[pl.Schema, dict[str, Any]]:
    """Read only the columns' types and the metadata that `write_table` wrote with a frame; raises StoreError."""
    try:
        schema = pq.read_schema(path)
        return frame_from_arrow(schema.empty_table()).schema, _schema_metadata(schema)
    except DAMAGED_TABLE_ERRORS as error:
        raise _damaged_table_error(path, error) from None


def frame_digest(frame: pl.DataFrame) -> str:
    """Return 32 hex digits of a frame's content: columns of texts, numbers or lists. The file does not matter."""
    return _columns_digest(frame.iter_columns())


def frame_digests(frame: pl.DataFrame, heights: Sequence[int]) -> list[str]:
    """Return the `frame_digest` of each of the frames of these heights of which `frame` consists.

    Of frames with a few hundred rows, it takes a tenth of the time.
    """
    digests = [hashlib.sha256() for _ in heights]
    offsets_N = _offsets_of_lengths(np.array(heights, np.int64))
    for column in frame.iter_columns():
        _update_digests(digests, column, offsets_N)
    return [digest.hexdigest()[:32] for digest in digests]


def _columns_digest(columns: Iterable[pl.Series]) -> str:
    digest = hashlib.sha256()
    for column in columns:
        _update_digests([digest], column, np.array([0, len(column)]))
    return digest.hexdigest()[:32]


def _update_digests(digests: Sequence["hashlib._Hash"], column: pl.Series, offsets_N: np.ndarray) -> None:
    """Add to each digest its rows of a column; the offsets are where these begin, and the end of the last."""
    slices = list(itertools.pairwise(offsets_N.tolist()))
    for digest, (begin, end) in zip(digests, slices, strict=True):
        digest.update(f"{column.name} {end - begin}\n".encode())

    # For a list column, digest the lengths of its lists, then all entries as one column.
    if column.dtype == pl.List:
        lengths = column.list.len()
        _update_with_numbers(digests, lengths.fill_null(2**32 - 1).cast(pl.UInt32).to_numpy(), slices)
        offsets_N = _offsets_of_lengths(lengths.fill_null(0).to_numpy())[offsets_N]
        slices = list(itertools.pairwise(offsets_N.tolist()))
        column = column.explode(empty_as_null=False, keep_nulls=False)

    # Digest the positions of nulls separately, so that a null differs from 0 and from an empty text.
    has_nulls = column.null_count() > 0
    null_N = column.is_null().to_numpy() if has_nulls else np.zeros(len(column), bool)
    _update_with_numbers(digests, null_N, slices)
    if column.dtype != pl.String:
        values = column.fill_null(0) if has_nulls else column
        _update_with_numbers(digests, values.to_numpy(), slices)
        return
    if has_nulls:
        offsets_N = _offsets_of_lengths(~null_N)[offsets_N]
        slices = list(itertools.pairwise(offsets_N.tolist()))
        column = column.drop_nulls()
    for digest, (begin, end) in zip(digests, slices, strict=True):
        for part in _texts_joined(column[begin:end]):
            digest.update(part)


def _update_with_numbers(
    digests: Sequence["hashlib._Hash"], values_N: np.ndarray, slices: Sequence[tuple[int, int]]
) -> None:
    for digest, (begin, end) in zip(digests, slices, strict=True):
        digest.update(values_N[begin:end].tobytes())


def _offsets_of_lengths(lengths_N: np.ndarray) -> np.ndarray:
    """Return where each of several runs of these lengths begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths_N, dtype=np.int64)])


def _texts_joined(column: pl.Series) -> Iterator[bytes]:
    """Yield the bytes of all texts, with a NUL between each two; a part of the column at a time."""
    for first in range(0, len(column), ROWS_JOINED):
        if first:
            yield b"\0"
        part = column[first : first + ROWS_JOINED]
        text = "\0".join(part.to_list()) if len(part) < FEW_TEXTS else part.str.join("\0").item()
        yield text.encode()


def _schema_metadata(schema: pa.Schema) -> dict[str, Any]:
    return json.loads((schema.metadata or {}).get(TABLE_METADATA_KEY, b"{}"))


def _damaged_table_error(path: Path, error: BaseException) -> StoreError:
    damage = describe_table_damage(error)
    return StoreError(f"{path}: cannot be read ({damage}); delete it, if it is there, and build again")
