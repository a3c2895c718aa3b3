"""Sounds in a column of a Parquet table, as in Hugging Face's datasets: the list of rows, and the bytes of one row."""

import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.audio.containers import recognise_container
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

PROBED_ROWS = 8  # read at a time, until one has a sound

READER_LOCK = threading.Lock()  # held while a sound is read: a reader goes from row to row

PARQUET_FAULTS = (pa.ArrowException, OSError)  # errors of a damaged file


def list_parquet_rows(path: Path) -> tuple[pl.DataFrame, str | None]:
    """The name and place of every row (ROW_TABLE_SCHEMA), and the fault of the file, or None.

    Only the columns of names are read, no sound.
    """
    no_rows = pl.DataFrame(schema=ROW_TABLE_SCHEMA)
    try:
        with pq.ParquetFile(path) as file:
            sound_column = find_sound_column(file)
            if sound_column is None:
                columns = ", ".join(file.schema_arrow.names)
                return no_rows, f"has no column of sounds (there are: {columns}); its rows are not used"
            return read_row_names(file, sound_column), None
    except PARQUET_FAULTS as error:
        reason = first_error_line(error, path)
        return no_rows, f"is no Parquet file that can be read ({reason}); fetch it again"


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundColumn:
    """A column that may contain sounds, of bytes or of structs with `bytes`.

    name  of the column; a flattened table has columns named `audio.bytes` and `audio.path`
    """

    name: str
    in_struct: bool

    @property
    def leaf(self) -> str:
        """The name of the bytes, as Parquet's metadata and readers have it."""
        return f"{self.name}.bytes" if self.in_struct else self.name

    @property
    def path_leaf(self) -> str:
        """The name of the column of paths beside the bytes, if there is one."""
        return f"{self.name}.path" if self.in_struct else f"{self.name.removesuffix('.bytes')}.path"

    def select_bytes(self, batch: pa.RecordBatch) -> pa.Array:
        """The bytes, of a batch that was read with `leaf` alone."""
        return batch.column(0).flatten()[0] if self.in_struct else batch.column(0)


def read_row_names(file: pq.ParquetFile, sound_column: SoundColumn) -> pl.DataFrame:
    """The names and places of all rows."""
    # The columns of names that exist: a path stored with the sound, and an id.
    schema = file.schema_arrow
    leaves = {file.schema.column(index).path for index in range(len(file.schema.names))}
    path_leaf = sound_column.path_leaf if sound_column.path_leaf in leaves else None
    id_column = find_id_column(schema)

    # Read these columns, if any: a read without columns would still read the table.
    wanted = [leaf for leaf in (path_leaf, id_column) if leaf is not None]
    table = file.read(columns=wanted) if wanted else None

    # Names as text, null where a row has none.
    group_sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    paths = ids = pl.Series([None] * sum(group_sizes), dtype=pl.String)
    if table is not None and path_leaf is not None:
        if sound_column.in_struct:
            paths = text_series(pc.struct_field(table[sound_column.name], "path"))
        else:
            paths = text_series(table[path_leaf])
    if table is not None and id_column is not None:
        ids = text_series(table[id_column])

    # Rows are numbered within their row group.
    row_N = np.concatenate([np.zeros(0, np.int64), *(np.arange(size) for size in group_sizes)])
    group_N = np.repeat(np.arange(len(group_sizes)), group_sizes)
    rows = pl.DataFrame({"path": paths, "id": ids, "group": group_N, "row": row_N})
    place = pl.format("row {} of group {}", "row", "group")
    member = pl.coalesce("path", "id", place)
    columns = rows.with_columns(member=member)
    return columns.select(pl.col(name).cast(dtype) for name, dtype in ROW_TABLE_SCHEMA.items())


def find_id_column(schema: pa.Schema) -> str | None:
    """The first column of SOUND_ID_COLUMNS that a table has, in whatever capitals; None if it has none."""
    columns = {field.name.casefold(): field.name for field in reversed(schema) if is_text_type(field.type)}
    return next((columns[name] for name in SOUND_ID_COLUMNS if name in columns), None)


def text_series(column: pa.ChunkedArray) -> pl.Series:
    """A column of names as text; a dictionary is replaced by its values."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return pl.Series(column.cast(pa.large_string()))


def find_sound_column(file: pq.ParquetFile) -> SoundColumn | None:
    """The column that contains the sounds; None if no column may contain any.

    A column named `audio` is preferred; then a struct is preferred to a plain column. Where several are left, the
    first whose bytes begin as a sound does is taken, and the first of all if none does.
    """
    columns = [
        SoundColumn(name=field.name, in_struct=pa.types.is_struct(field.type))
        for field in file.schema_arrow
        if is_bytes_type(field.type) or (pa.types.is_struct(field.type) and has_bytes_field(field.type))
    ]
    columns.sort(key=lambda column: (column.leaf not in ("audio", "audio.bytes"), not column.in_struct))
    if len(columns) < 2 or columns[0].leaf in ("audio", "audio.bytes"):
        return columns[0] if columns else None
    return next((column for column in columns if begins_with_sound(file, column)), columns[0])


def has_bytes_field(struct_type: pa.StructType) -> bool:
    """Whether a struct has a field `bytes` of bytes."""
    return any(field.name == "bytes" and is_bytes_type(field.type) for field in struct_type)


def begins_with_sound(file: pq.ParquetFile, column: SoundColumn) -> bool:
    """Whether the first value of a column begins as the content of a sound file does."""
    for batch in file.iter_batches(batch_size=PROBED_ROWS, columns=[column.leaf], use_threads=False):
        values = column.select_bytes(batch).drop_null()
        if len(values):
            try:
                recognise_container(BytesIO(values[0].as_py()))
            except AudioError:
                return False
            return True
    return False


def is_bytes_type(arrow_type: pa.DataType) -> bool:
    """Whether a column of this type may contain sounds."""
    return (
        pa.types.is_binary(arrow_type)
        or pa.types.is_large_binary(arrow_type)
        or pa.types.is_binary_view(arrow_type)
        or pa.types.is_fixed_size_binary(arrow_type)
    )


def is_text_type(arrow_type: pa.DataType) -> bool:
    """Whether a column of this type may contain names."""
    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    return (
        pa.types.is_string(arrow_type)
        or pa.types.is_large_string(arrow_type)
        or pa.types.is_string_view(arrow_type)
    )


def read_parquet_sound(path: Path, group: int, row: int) -> bytes:
    """The bytes of one row. AudioError: missing if the row is null, unreadable if the file is damaged.

    The row group of the last call stays open, so reading rows in their order reads the group once. Threads take turns.
    """
    try:
        status = path.stat()
        version = (status.st_mtime_ns, status.st_size)  # a replaced file is read again
        with READER_LOCK:
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
        sound_column = find_sound_column(self._file)
        if sound_column is None:
            raise pa.ArrowInvalid("no column of sounds")
        self._sound_column = sound_column
        self._group = group

        # As many rows at a time as fit into MAX_BATCH_BYTES, by the mean size of a sound.
        metadata = self._file.metadata.row_group(group)
        columns = [metadata.column(index) for index in range(metadata.num_columns)]
        size = sum(
            column.total_uncompressed_size for column in columns if column.path_in_schema == sound_column.leaf
        )
        rows_that_fit = metadata.num_rows * MAX_BATCH_BYTES // max(size, 1)
        self._rows_per_batch = max(1, min(metadata.num_rows, rows_that_fit))
        self._restart_reading()

    def _restart_reading(self) -> None:
        self._batches: Iterator[pa.RecordBatch] = self._file.iter_batches(
            batch_size=self._rows_per_batch,
            row_groups=[self._group],
            columns=[self._sound_column.leaf],
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
            self._sounds = self._sound_column.select_bytes(batch)
        content: bytes | None = self._sounds[row - self._first_row].as_py()
        return content


@functools.lru_cache(maxsize=1)
def cached_row_group(path: Path, group: int, version: tuple[int, int]) -> RowGroupReader:
    """The reader of a row group, kept until another group is read; `version` changes when the file is replaced."""
    return RowGroupReader(path, group)
