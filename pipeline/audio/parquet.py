"""Sounds in a column of a Parquet table, as in Hugging Face's datasets: the list of rows, and the bytes of one row."""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import AudioError, archive_error, first_error_line

# Names of columns that contain the id of a sound; the first one that a table has is used.
SOUND_ID_COLUMNS = ("video_id", "youtube_id", "ytid", "clip_id", "id", "audio_name", "file_name", "filename")

ROW_TABLE_SCHEMA: dict[str, pl.DataType] = {
    "id": pl.String(),  # from a column of SOUND_ID_COLUMNS; null if the table has none
    "group": pl.Int32(),  # row group
    "row": pl.Int64(),  # number within the row group
    "member": pl.String(),  # displayed name: the path stored with the sound, else the id, else the row and its group
}

MAX_BATCH_BYTES = 2**28  # of sounds in memory: a larger row group is read in parts

READ_BUFFER_BYTES = 2**20

PARQUET_FAULTS = (pa.ArrowException, OSError)  # errors of a damaged file


def list_parquet_rows(path: Path) -> tuple[pl.DataFrame, str | None]:
    """The name and place of every row (ROW_TABLE_SCHEMA), and the fault of the file, or None.

    Only the columns of names are read, no sound.
    """
    no_rows = pl.DataFrame(schema=ROW_TABLE_SCHEMA)
    try:
        with pq.ParquetFile(path) as file:
            sound_column = find_sound_column(file.schema_arrow)
            if sound_column is None:
                columns = ", ".join(file.schema_arrow.names)
                return no_rows, f"has no column of sounds (there are: {columns}); its rows are not used"
            return read_row_names(file, sound_column.partition(".")[0]), None
    except PARQUET_FAULTS as error:
        reason = first_error_line(error, path)
        return no_rows, f"is no Parquet file that can be read ({reason}); fetch it again"


def read_row_names(file: pq.ParquetFile, column: str) -> pl.DataFrame:
    """The names and places of all rows; `column` contains the sounds."""
    # The columns of names that exist: a path stored with the sound, and an id.
    schema = file.schema_arrow
    sound_type = schema.field(column).type
    has_path = pa.types.is_struct(sound_type) and any(field.name == "path" for field in sound_type)
    text_columns = (
        name for name in SOUND_ID_COLUMNS if name in schema.names and is_text_type(schema.field(name).type)
    )
    id_column = next(text_columns, None)

    # Read these columns, if any: a read without columns would still read the table.
    wanted = []
    if has_path:
        wanted.append(f"{column}.path")
    if id_column:
        wanted.append(id_column)
    table = file.read(columns=wanted) if wanted else None

    # Names as text, null where a row has none.
    group_sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    paths = ids = pl.Series([None] * sum(group_sizes), dtype=pl.String)
    if table is not None and has_path:
        paths = pl.Series(pc.struct_field(table[column], "path").cast(pa.large_string()))
    if table is not None and id_column:
        ids = pl.Series(table[id_column].cast(pa.large_string()))

    # Rows are numbered within their row group.
    row_N = np.concatenate([np.zeros(0, np.int64), *(np.arange(size) for size in group_sizes)])
    group_N = np.repeat(np.arange(len(group_sizes)), group_sizes)
    rows = pl.DataFrame({"path": paths, "id": ids, "group": group_N, "row": row_N})
    place = pl.format("row {} of group {}", "row", "group")
    member = pl.coalesce("path", "id", place)
    columns = rows.with_columns(member=member)
    return columns.select(pl.col(name).cast(dtype) for name, dtype in ROW_TABLE_SCHEMA.items())


def find_sound_column(schema: pa.Schema) -> str | None:
    """The name of the column that contains the sounds, of bytes or of structs with `bytes`; None if there is none.

    A column named `audio` is preferred; then a struct is preferred to a plain column.
    """
    leaves = []
    for field in schema:
        if is_bytes_type(field.type):
            leaves.append(field.name)
        elif pa.types.is_struct(field.type) and any(
            part.name == "bytes" and is_bytes_type(part.type) for part in field.type
        ):
            leaves.append(f"{field.name}.bytes")
    return min(leaves, key=lambda leaf: (leaf.partition(".")[0] != "audio", "." not in leaf), default=None)


def is_bytes_type(arrow_type: pa.DataType) -> bool:
    """Whether a column of this type may contain sounds."""
    return pa.types.is_binary(arrow_type) or pa.types.is_large_binary(arrow_type)


def is_text_type(arrow_type: pa.DataType) -> bool:
    """Whether a column of this type may contain names."""
    return pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type)


def read_parquet_sound(path: Path, group: int, row: int) -> bytes:
    """The bytes of one row. AudioError: missing if the row is null, unreadable if the file is damaged.

    The row group of the last call stays open, so reading rows in their order reads the group once.
    """
    try:
        status = path.stat()
        version = (status.st_mtime_ns, status.st_size)  # a replaced file is read again
        content = cached_row_group(path, group, version).read_sound(row)
    except PARQUET_FAULTS as error:
        cached_row_group.cache_clear()
        raise archive_error(path, error) from None
    if content is None:
        raise AudioError("missing", f"row {row} of row group {group} of {path.name} holds no sound")
    return content


class RowGroupReader:
    """The sounds of one row group, read in their order; going back to an earlier row starts again at the first."""

    def __init__(self, path: Path, group: int) -> None:
        self._file = pq.ParquetFile(path, buffer_size=READ_BUFFER_BYTES)
        sound_column = find_sound_column(self._file.schema_arrow)
        if sound_column is None:
            raise pa.ArrowInvalid("no column of sounds")
        self._column_path = sound_column
        self._group = group

        # As many rows at a time as fit into MAX_BATCH_BYTES, by the mean size of a sound.
        metadata = self._file.metadata.row_group(group)
        columns = [metadata.column(index) for index in range(metadata.num_columns)]
        size = sum(
            column.total_uncompressed_size for column in columns if column.path_in_schema == sound_column
        )
        rows_that_fit = metadata.num_rows * MAX_BATCH_BYTES // max(size, 1)
        self._rows_per_batch = max(1, min(metadata.num_rows, rows_that_fit))
        self._restart_reading()

    def _restart_reading(self) -> None:
        self._batches: Iterator[pa.RecordBatch] = self._file.iter_batches(
            batch_size=self._rows_per_batch,
            row_groups=[self._group],
            columns=[self._column_path],
            use_threads=False,
        )
        self._first_row = 0
        self._sounds = pa.array([], pa.binary())

    def read_sound(self, row: int) -> bytes | None:
        """The bytes of one row, None if it is null."""
        if row < self._first_row:
            self._restart_reading()

        # Read batches up to the one that contains the row.
        while row >= self._first_row + len(self._sounds):
            batch = next(self._batches, None)
            if batch is None:
                raise pa.ArrowInvalid(f"row group {self._group} ends before row {row}")
            self._first_row += len(self._sounds)
            in_struct = "." in self._column_path
            (self._sounds,) = batch.column(0).flatten() if in_struct else batch.columns
        content: bytes | None = self._sounds[row - self._first_row].as_py()
        return content


@functools.lru_cache(maxsize=1)
def cached_row_group(path: Path, group: int, version: tuple[int, int]) -> RowGroupReader:
    """The reader of a row group, kept until another group is read; `version` changes when the file is replaced."""
    return RowGroupReader(path, group)
