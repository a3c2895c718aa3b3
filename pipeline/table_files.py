"""Tables for users, written as Parquet, CSV or JSON lines: the suffix of the file decides."""

from pathlib import Path

import polars as pl

from pipeline.errors import InputError
from pipeline.files import replacing_file

PARQUET_SUFFIXES = (".parquet", ".pq")
CSV_SUFFIXES = (".csv",)
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")

# In a cell of a CSV file, several texts are separated by this; a table of labels is read in the same way.
TEXT_SEPARATOR = ";"


def refuse_other_suffix(path: Path) -> Path:
    """Return the path of a table to write; InputError if its suffix names no kind of table."""
    known = (*PARQUET_SUFFIXES, *CSV_SUFFIXES, *JSON_LINES_SUFFIXES)
    if path.suffix.lower() not in known:
        raise InputError(f"{path}: expected a table, {', '.join(f'NAME{suffix}' for suffix in known)}")
    return path


def is_csv(path: Path) -> bool:
    """Whether a table at this path is CSV, in which a cell holds a single value."""
    return path.suffix.lower() in CSV_SUFFIXES


def write_table_file(path: Path, frame: pl.DataFrame) -> None:
    """Write a frame as the suffix of the path says, whole or not at all; InputError for another suffix.

    In CSV a column of texts is joined by `;`, and a column of lists of numbers becomes as many columns as the lists
    have entries, NAME_0, NAME_1 ...; InputError if their lengths differ.
    """
    refuse_other_suffix(path)
    suffix = path.suffix.lower()
    flat = flatten_lists(frame, path) if is_csv(path) else frame
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as scratch:
        if suffix in PARQUET_SUFFIXES:
            flat.write_parquet(scratch, compression="zstd")
        elif is_csv(path):
            flat.write_csv(scratch)
        else:
            flat.write_ndjson(scratch)


def flatten_lists(frame: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Return the frame with single values alone: texts of a list joined, numbers of a list in columns of their own."""
    columns: list[pl.Series] = []
    for column in frame.iter_columns():
        if not isinstance(column.dtype, pl.List | pl.Array):
            columns.append(column)
            continue
        lists = column if isinstance(column.dtype, pl.List) else column.arr.to_list()
        if lists.dtype == pl.List(pl.String):
            columns.append(lists.list.join(TEXT_SEPARATOR))
            continue

        # Rows without a list have empty cells.
        lengths = lists.list.len().drop_nulls().unique().to_list()
        if len(lengths) > 1 or not lists.dtype.inner.is_numeric():  # type: ignore[attr-defined]
            raise InputError(
                f"{path}: column {column.name} has lists of different lengths, which CSV cannot hold; "
                "choose NAME.parquet"
            )
        for place in range(lengths[0] if lengths else 0):
            columns.append(lists.list.get(place, null_on_oob=True).alias(f"{column.name}_{place}"))
    return pl.DataFrame(columns)
