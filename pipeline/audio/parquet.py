"""Parquet: tables with a column of sounds, as Hugging Face's datasets have it; which rows, and the bytes of one."""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import AudioError, archive_error, first_error_line

SOUND_ID_COLUMNS = ("video_id", "youtube_id", "ytid", "clip_id", "id", "audio_name", "file_name", "filename")

MAX_BATCH_BYTES = 2**28  # of one row group's sounds; of a larger one a part at a time is read

READ_BUFFER_BYTES = 2**20

PARQUET_FAULTS = (pa.ArrowException, OSError)


def list_parquet_rows(path: Path) -> tuple[pl.DataFrame, str | None]:
    """`member` (its path, else its id, else its place), `id` (of a column, or null), `group` and `row` of every row;
    and what is wrong with the file.

    Only the columns of names are read.
    """
    try:
        with pq.ParquetFile(path) as file:
            sound = find_sound_column(file.schema_arrow)
            if sound is None:
                columns = ", ".join(file.schema_arrow.names)
                return (
                    empty_row_table(),
                    f"has no column of sounds (there are: {columns}); its rows are not used",
                )
            return read_row_names(file, sound.partition(".")[0]), None
    except PARQUET_FAULTS as error:
        return (
            empty_row_table(),
            f"is no Parquet file that can be read ({first_error_line(error, path)}); fetch it again",
        )


def empty_row_table() -> pl.DataFrame:
    """No rows."""
    return pl.DataFrame(schema={"member": pl.String, "id": pl.String, "group": pl.Int32, "row": pl.Int64})


def read_row_names(file: pq.ParquetFile, column: str) -> pl.DataFrame:
    """The names and places of all rows."""
    schema = file.schema_arrow
    within = schema.field(column).type
    has_path = pa.types.is_struct(within) and any(field.name == "path" for field in within)
    id_column = next(
        (name for name in SOUND_ID_COLUMNS if name in schema.names and is_text_type(schema.field(name).type)),
        None,
    )
    wanted = ([f"{column}.path"] if has_path else []) + ([id_column] if id_column else [])
    table = file.read(columns=wanted) if wanted else None
    counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    absent = pl.Series([None] * sum(counts), dtype=pl.String)
    path, named = absent, absent
    if table is not None and has_path:
        path = pl.Series(pc.struct_field(table[column], "path").cast(pa.large_string()))
    if table is not None and id_column:
        named = pl.Series(table[id_column].cast(pa.large_string()))
    row = np.concatenate([np.arange(count) for count in counts]) if counts else np.zeros(0, int)
    rows = pl.DataFrame(
        {
            "path": path,
            "id": named,
            "group": pl.Series(np.repeat(np.arange(len(counts)), counts), dtype=pl.Int32),
            "row": pl.Series(row, dtype=pl.Int64),
        }
    )
    place = pl.format("row {} of group {}", "row", "group")
    return rows.select("id", "group", "row", member=pl.coalesce("path", "id", place))


def find_sound_column(schema: pa.Schema) -> str | None:
    """The leaf that holds the bytes: `bytes` of a struct, else a column of bytes; one named `audio` before others."""
    found = []
    for field in schema:
        if is_bytes_type(field.type):
            found.append(field.name)
        elif pa.types.is_struct(field.type) and any(
            f.name == "bytes" and is_bytes_type(f.type) for f in field.type
        ):
            found.append(f"{field.name}.bytes")
    return min(found, key=lambda leaf: (leaf.partition(".")[0] != "audio", "." not in leaf), default=None)


def is_bytes_type(arrow_type: pa.DataType) -> bool:
    """Whether a column of this type may hold sounds."""
    return pa.types.is_binary(arrow_type) or pa.types.is_large_binary(arrow_type)


def is_text_type(arrow_type: pa.DataType) -> bool:
    """Whether a column of this type may hold names."""
    return pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type)


def read_parquet_sound(path: Path, group: int, row: int) -> bytes:
    """The bytes of one row; AudioError missing where it has none, unreadable where the file is damaged.

    The row group that was read last is kept, so rows asked for in their order are read once.
    """
    try:
        found = path.stat()
        content = cached_row_group(path, group, (found.st_mtime_ns, found.st_size)).read_sound(row)
    except PARQUET_FAULTS as error:
        cached_row_group.cache_clear()
        raise archive_error(path, error) from None
    if content is None:
        raise AudioError("missing", f"row {row} of row group {group} of {path.name} holds no sound")
    return content


class RowGroupReader:
    """The sounds of one row group in their order; to go back is to begin again."""

    def __init__(self, path: Path, group: int) -> None:
        self._file = pq.ParquetFile(path, buffer_size=READ_BUFFER_BYTES)
        leaf = find_sound_column(self._file.schema_arrow)
        if leaf is None:
            raise pa.ArrowInvalid("no column of sounds")
        self._column_path, self._group = leaf, group
        told = self._file.metadata.row_group(group)
        columns = [told.column(index) for index in range(told.num_columns)]
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == leaf)
        self._rows_per_batch = max(1, min(told.num_rows, told.num_rows * MAX_BATCH_BYTES // max(size, 1)))
        self._restart_reading()

    def _restart_reading(self) -> None:
        self._batches: Iterator[pa.RecordBatch] = self._file.iter_batches(
            batch_size=self._rows_per_batch,
            row_groups=[self._group],
            columns=[self._column_path],
            use_threads=False,
        )
        self._first_row, self._sounds = 0, pa.array([], pa.binary())

    def read_sound(self, row: int) -> bytes | None:
        """The bytes of one row, None where it is null."""
        if row < self._first_row:
            self._restart_reading()
        while row >= self._first_row + len(self._sounds):
            batch = next(self._batches, None)
            if batch is None:
                raise pa.ArrowInvalid(f"row group {self._group} ends before row {row}")
            self._first_row += len(self._sounds)
            (self._sounds,) = batch.columns if "." not in self._column_path else batch.column(0).flatten()
        value: bytes | None = self._sounds[row - self._first_row].as_py()
        return value


@functools.lru_cache(maxsize=1)
def cached_row_group(path: Path, group: int, version: tuple[int, int]) -> RowGroupReader:
    """The row group that was asked for last."""
    return RowGroupReader(path, group)
