"""Label inputs: the rows of segments lists and Parquet tables with their labels, part by part."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.datasets.listed import meant
from pipeline.datasets.segments import segment_blocks, split_of, verdict
from pipeline.errors import InputError, ManifestError, first_line
from pipeline.labels import PROVENANCE_KEY
from pipeline.ontology import ClassList

BLOCK_ROWS = 2**17
PARQUET = (".parquet", ".pq")
DAMAGED = (OSError, pa.ArrowException)
COLUMNS = {  # of what a table tells -> names under which it may stand, the preferred first
    "clip_id": ("clip_id", "video_id", "ytid", "id", "fname"),
    "split": ("split",),
    "start_seconds": ("start_seconds", "start"),
    "end_seconds": ("end_seconds", "end"),
}
TYPES = {
    "clip_id": pl.String(),
    "split": pl.String(),
    "start_seconds": pl.Float64(),
    "end_seconds": pl.Float64(),
}
LABELS = ("raw", "mids", "labels", "label", "positive_labels")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelInput:
    """A file of rows with labels. Its blocks have its `columns` and `labels`: lists of class ids or of indices."""

    path: Path
    splits: tuple[str, ...]
    columns: tuple[str, ...]  # of TYPES; `split` always
    blocks: Callable[[], Iterator[pl.DataFrame]]  # may be called again; memory does not grow with the file


def open_input(path: Path, classes: ClassList) -> LabelInput:
    """A Parquet table if it is called so, else a segments list; InputError.

    Of a table are read: ids of classes as lists or as text with `;` between them, or lists of indices into `classes`
    (column raw, mids, labels, label or positive_labels), and where they are there clip_id (or video_id, ytid, id,
    fname), split (else the file's name), start and end. Capitals do not matter; other columns are left alone.
    """
    if path.is_dir():
        raise InputError(
            f"{path}: a folder and no store; expected a store, a segments list or a Parquet table"
        )
    if not path.exists():
        raise InputError(f"{path}: no such file{meant(path)}")
    if path.suffix.lower() in PARQUET:
        return _table(path, classes)
    return LabelInput(path=path, splits=(split_of(path),), columns=tuple(TYPES), blocks=lambda: _listed(path))


def _listed(path: Path) -> Iterator[pl.DataFrame]:
    good, damaged = 0, []
    for rows, bad in segment_blocks(path):
        good += rows.height
        damaged.append(bad)
        yield rows.rename({"mids": "labels"})
    verdict(path, good, pl.concat(damaged), lenient=False)


def _table(path: Path, classes: ClassList) -> LabelInput:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
    except DAMAGED as error:
        raise _damaged(path, error) from None
    labels = _column(schema, LABELS)
    if labels is None:
        raise ManifestError(
            f"{path}: no column of labels; expected one of {', '.join(LABELS)}, it has {', '.join(schema.names)}"
        )
    _check_type(path, schema.field(labels), schema, classes)
    found = {what: _column(schema, names) for what, names in COLUMNS.items()}
    named = {what: name for what, name in found.items() if name is not None}

    def blocks() -> Iterator[pl.DataFrame]:
        split = pl.col(named["split"]) if "split" in named else pl.lit(split_of(path))
        others = [(what, name) for what, name in named.items() if what != "split"]
        for frame in _blocks(path, [*named.values(), labels]):
            try:
                read = frame.select(
                    *(pl.col(name).cast(TYPES[what]).alias(what) for what, name in others),
                    split.cast(pl.String).alias("split"),
                    _lists(frame.schema[labels], labels).alias("labels"),
                )
            except pl.exceptions.PolarsError as error:
                raise ManifestError(
                    f"{path}: {first_line(error, path)}; mend the column or leave it out"
                ) from None
            yield read

    return LabelInput(
        path=path,
        splits=_splits(path, named.get("split")),
        columns=tuple(what for what in TYPES if what in named or what == "split"),
        blocks=blocks,
    )


def _column(schema: pa.Schema, names: Sequence[str]) -> str | None:
    there = {name.strip().lower(): name for name in schema.names}
    return next((there[name] for name in names if name in there), None)


def _check_type(path: Path, column: pa.Field, schema: pa.Schema, classes: ClassList) -> None:
    """ManifestError unless the column can hold labels, and its indices, if such, are into this class list."""
    kind = column.type
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    inner = inner.value_type if pa.types.is_dictionary(inner) else inner
    text = pa.types.is_string(inner) or pa.types.is_large_string(inner)
    if not text and (inner == kind or not pa.types.is_integer(inner)):
        raise ManifestError(
            f"{path}: column {column.name!r} holds {kind}; expected lists of class ids, lists of class indices, "
            "or ids as text with ; between them"
        )
    sources = json.loads((schema.metadata or {}).get(PROVENANCE_KEY, b"{}"))
    lists = {by["classes"] for by in sources.values() if isinstance(by, dict) and "classes" in by}
    if not text and lists - {classes.digest}:
        raise ManifestError(
            f"{path}: its indices are of another class list than the {len(classes)} classes given; "
            "give the list that it was made with as --classes"
        )


def _lists(kind: pl.DataType, name: str) -> pl.Expr:
    if isinstance(kind, pl.List):
        return pl.col(name) if kind.inner.is_integer() else pl.col(name).cast(pl.List(pl.String))
    return pl.col(name).cast(pl.String).str.extract_all(r"[^;\s](?:[^;]*[^;\s])?")


def _splits(path: Path, column: str | None) -> tuple[str, ...]:
    """The splits of a table in the order of their first rows."""
    if column is None:
        return (split_of(path),)
    splits: dict[str, None] = {}
    for frame in _blocks(path, [column]):
        if frame[column].null_count():
            raise ManifestError(f"{path}: column {column!r} is null in some rows; every clip is of a split")
        splits.update(dict.fromkeys(frame[column].cast(pl.String).unique(maintain_order=True)))
    return tuple(splits)


def _blocks(path: Path, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    with pq.ParquetFile(path) as file:
        try:
            for batch in file.iter_batches(BLOCK_ROWS, columns=list(columns)):
                frame = pl.from_arrow(pa.Table.from_batches([batch]))
                assert isinstance(frame, pl.DataFrame)
                yield frame
        except DAMAGED as error:
            raise _damaged(path, error) from None


def _damaged(path: Path, error: BaseException) -> ManifestError:
    return ManifestError(
        f"{path}: not readable as Parquet ({str(error).splitlines()[0]}); fetch or make it again"
    )
