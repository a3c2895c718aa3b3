"""Parquet tables with JSON metadata: written whole, with equal bytes for equal input, and checked when read."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StoreError
from pipeline.files import replacing_file

TABLE_METADATA_KEY = b"ajepa"  # the key of our JSON in the metadata of the schema

# Every error that reading a damaged Parquet file may raise.
DAMAGED_TABLE_ERRORS = (OSError, ValueError, pa.ArrowException, pl.exceptions.PanicException)


def describe_table_damage(error: BaseException) -> str:
    """Return why a Parquet file cannot be read: `missing`, or the first line of the error."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_table(path: Path, frame: pl.DataFrame, metadata: dict[str, Any]) -> None:
    """Write a frame as a Parquet file with `metadata` as JSON in its schema, whole or not at all.

    Equal input gives equal bytes; every page has a checksum.
    """
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    text = json.dumps(metadata, separators=(",", ":"))
    table = table.replace_schema_metadata({TABLE_METADATA_KEY: text})
    with replacing_file(path) as scratch:
        pq.write_table(table, scratch, compression="zstd", write_page_checksum=True)


def read_table(path: Path, columns: Sequence[str] | None = None) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Read a frame, or some of its columns, and the metadata that `write_table` wrote with it; raises StoreError."""
    try:
        table = pq.read_table(path, columns=columns and list(columns), page_checksum_verification=True)
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        return frame, _schema_metadata(table.schema)
    except DAMAGED_TABLE_ERRORS as error:
        raise _damaged_table_error(path, error) from None


def read_table_metadata(path: Path) -> dict[str, Any]:
    """Read only the metadata that `write_table` wrote with a frame; raises StoreError."""
    try:
        return _schema_metadata(pq.read_schema(path))
    except DAMAGED_TABLE_ERRORS as error:
        raise _damaged_table_error(path, error) from None


def frame_digest(frame: pl.DataFrame) -> str:
    """Return 32 hex digits of a frame's content: columns of texts, numbers or lists. The file does not matter."""
    digest = hashlib.sha256()
    for column in frame.iter_columns():
        digest.update(f"{column.name} {len(column)}\n".encode())

        # For a list column, digest the lengths of its lists, then all entries as one column.
        if column.dtype == pl.List:
            digest.update(column.list.len().fill_null(2**32 - 1).cast(pl.UInt32).to_numpy().tobytes())
            column = column.explode(empty_as_null=False, keep_nulls=False)

        # Digest the positions of nulls separately, so that a null differs from 0 and from an empty text.
        digest.update(column.is_null().to_numpy().tobytes())
        if column.dtype == pl.String:
            digest.update("\0".join(column.drop_nulls()).encode())
        else:
            digest.update(column.fill_null(0).to_numpy().tobytes())
    return digest.hexdigest()[:32]


def _schema_metadata(schema: pa.Schema) -> dict[str, Any]:
    return json.loads((schema.metadata or {}).get(TABLE_METADATA_KEY, b"{}"))


def _damaged_table_error(path: Path, error: BaseException) -> StoreError:
    damage = describe_table_damage(error)
    return StoreError(f"{path}: cannot be read ({damage}); delete it, if it is there, and build again")
