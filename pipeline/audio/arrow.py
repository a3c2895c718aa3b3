"""Sounds in a column of an Arrow file, as `datasets.save_to_disk` writes it: its batches, and the bytes of one row.

The file is mapped into memory, so that any row is read at once, and only its pages.
"""

import functools
from pathlib import Path

import pyarrow as pa

from pipeline.audio.parquet import has_bytes_field, is_bytes_type
from pipeline.errors import AudioError, archive_error

ARROW_FAULTS = (pa.ArrowException, OSError)  # errors of a damaged file

MAPPED_FILES = 4  # kept open


def read_arrow_batches(path: Path) -> list[pa.RecordBatch]:
    """Return the batches of a file in Arrow's stream or file format, mapped; ArrowException or OSError if damaged."""
    source = pa.memory_map(str(path))
    try:
        return list(pa.ipc.open_stream(source))
    except pa.ArrowInvalid:
        source.seek(0)
        file = pa.ipc.open_file(source)
        return [file.get_batch(number) for number in range(file.num_record_batches)]


def sound_column_name(schema: pa.Schema) -> str | None:
    """Return the column of sounds: `audio`, else the first struct with `bytes`, else the first of bytes, else None."""
    structs = [
        field.name for field in schema if pa.types.is_struct(field.type) and has_bytes_field(field.type)
    ]
    plain = [field.name for field in schema if is_bytes_type(field.type)]
    names = [*structs, *plain]
    return "audio" if "audio" in names else next(iter(names), None)


def sound_bytes(column: pa.Array) -> pa.Array:
    """Return the bytes of a column of sounds, null where a row has none."""
    if not pa.types.is_struct(column.type):
        return column
    return column.flatten()[column.type.get_field_index("bytes")]


def sound_paths(column: pa.Array) -> pa.Array:
    """Return the paths stored with the sounds of a column, null where there is none."""
    index = column.type.get_field_index("path") if pa.types.is_struct(column.type) else -1
    if index < 0:
        return pa.nulls(len(column), pa.string())
    return column.flatten()[index]


def read_arrow_sound(path: Path, batch: int, row: int) -> bytes:
    """Return the bytes of one row. AudioError: missing if the row is null, unreadable if the file is damaged."""
    try:
        status = path.stat()
        columns = mapped_sounds(path, (status.st_mtime_ns, status.st_size))
        content: bytes | None = columns[batch][row].as_py()
    except (*ARROW_FAULTS, IndexError) as error:
        mapped_sounds.cache_clear()
        raise archive_error(path, error) from None
    if content is None:
        raise AudioError("missing", f"row {row} of batch {batch} of {path.name} holds no sound")
    return content


@functools.lru_cache(maxsize=MAPPED_FILES)
def mapped_sounds(path: Path, version: tuple[int, int]) -> list[pa.Array]:
    """Return the sounds of every batch of a file; `version` changes when the file is replaced."""
    batches = read_arrow_batches(path)
    name = sound_column_name(batches[0].schema) if batches else None
    if name is None:
        raise pa.ArrowInvalid("no column of sounds")
    return [sound_bytes(batch.column(name)) for batch in batches]
