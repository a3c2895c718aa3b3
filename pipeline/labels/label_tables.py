"""Propagation without a store: read segments lists and Parquet tables, write one table of label sets."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, ManifestError, OntologyError, first_error_line
from pipeline.files import replacing_file
from pipeline.labels.label_sets import (
    LABEL_LIST_TYPE,
    LABEL_PARQUET_OPTIONS,
    PROVENANCE_KEY,
    index_class_ids,
    propagate_store_labels,
    requested_splits,
)
from pipeline.labels.ontology import ClassList, Ontology, known_class_names, load_class_list, load_ontology
from pipeline.labels.propagation import (
    LabelCounts,
    LabelProvenance,
    LabelSetMaker,
    PropagationSummary,
    propagate,
    rule_relation_CC,
)
from pipeline.labels.segment_lists import (
    check_damaged_lines,
    check_distinct_names,
    read_segment_blocks,
    split_from_filename,
)
from pipeline.messages import closest_word, did_you_mean
from pipeline.table_files import TEXT_SEPARATOR, is_csv
from pipeline.tables import DAMAGED_TABLE_ERRORS, describe_table_damage

LABEL_BLOCK_ROWS = 2**17

LABEL_PARQUET_SUFFIXES = (".parquet", ".pq")

LABEL_TABLE_SUFFIXES = (*LABEL_PARQUET_SUFFIXES, ".csv", ".tsv", ".txt")

# The clip columns of the output, in this order.
CLIP_COLUMN_TYPES = {
    "clip_id": pl.String(),
    "split": pl.String(),
    "start_seconds": pl.Float64(),
    "end_seconds": pl.Float64(),
}

# The names under which an input may have these columns, the preferred first.
CLIP_COLUMN_ALIASES = {
    "clip_id": ("clip_id", "video_id", "ytid", "id", "fname"),
    "split": ("split",),
    "start_seconds": ("start_seconds", "start"),
    "end_seconds": ("end_seconds", "end"),
}

LABEL_COLUMN_ALIASES = ("raw", "mids", "labels", "label", "positive_labels")


def propagate_inputs(
    inputs: Sequence[Path | str],
    rule: str = "unambiguous",
    splits: Sequence[str] | None = None,
    *,
    ontology: Path | None = None,
    classes: Path | None = None,
    out: Path | None = None,
) -> PropagationSummary:
    """Propagate the labels of a store in place, or the labels of lists and tables to `out`; raises InputError.

    `ontology` and `classes` are the user's own files, in place of AudioSet's.
    """
    paths = [Path(path) for path in inputs]
    tree = load_ontology(ontology)
    class_list = None if classes is None else load_class_list(classes)

    # Lists and tables are propagated to a table.
    if any(path.suffix.lower() in LABEL_TABLE_SUFFIXES or path.is_file() for path in paths):
        if out is None:
            raise InputError(
                f"{paths[0]}: not a store, so the labels are written to a new file: add --out FILE.parquet"
            )
        return propagate_tables(paths, out, rule, splits, ontology=tree, classes=class_list)

    # A folder is a store, to which the label set is added.
    if len(paths) != 1:
        raise InputError(f"{len(paths)} stores; propagate one at a time")
    if out is not None:
        raise InputError(f"{paths[0]}: the label set is added to the store itself; leave --out {out} out")
    return propagate_store_labels(paths[0], rule, splits, ontology=tree, expect=class_list)


def propagate_tables(
    inputs: Sequence[Path],
    out: Path,
    rule: str = "unambiguous",
    splits: Sequence[str] | None = None,
    *,
    ontology: Ontology | None = None,
    classes: ClassList | None = None,
) -> PropagationSummary:
    """Write `out`: the rows of all inputs in their order, with `raw` and the label set `rule` as class indices.

    The columns are split, `raw`, the rule's name and `outside`; also clip_id, start_seconds and end_seconds if an input
    has them. `outside` has the ids that are in the ontology or another list, but not in the class list. The provenance
    is written as in a store's labels.parquet. The summary of the changes is returned, and saved as
    `<out>.propagation.json`. If `out` is a CSV file, a cell has class ids instead, separated by `;`.
    Nothing is written unless every input is right; a second call gives the same bytes; memory
    does not grow with the inputs. Raises InputError for an id that is in no list (the message names its row and the
    nearest known id), and for a split, rule or class that does not exist.
    """
    # First check everything that can be checked without reading labels.
    ontology = ontology or load_ontology()
    classes = classes or load_class_list()
    adds_CC = rule_relation_CC(rule, ontology=ontology, classes=classes)
    _check_output_path(inputs, out)
    tables = [open_label_input(path, classes) for path in inputs]
    check_distinct_names([table.splits[0] for table in tables if not _is_parquet(table.path)])
    known_splits = tuple(dict.fromkeys(split for table in tables for split in table.splits))
    propagated_splits = requested_splits(str(inputs[0]), known_splits, splits)

    maker = LabelSetMaker(
        provenance=LabelProvenance.for_rule(rule, ontology, classes, adds_CC, propagated_splits),
        adds_CC=adds_CC,
        counts=LabelCounts(known_splits, classes),
    )
    propagator = _BlockPropagator(maker, ontology, classes)
    columns = [name for name in CLIP_COLUMN_TYPES if any(name in table.columns for table in tables)]
    schema = _output_schema(columns, maker.provenance)

    # `out` gets its name only after all labels have been read; then the summary is saved.
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(out) as scratch:
        if is_csv(out):
            _write_csv_rows(scratch, schema.names, tables, propagator, classes)
        else:
            _write_rows(scratch, schema, tables, propagator)
    summary = maker.counts.summary(maker.provenance, ontology)
    summary.save_json(out.with_suffix(".propagation.json"))
    return summary


def _write_rows(
    path: Path, schema: pa.Schema, tables: Sequence["LabelInput"], propagator: "_BlockPropagator"
) -> None:
    """Write the rows of all inputs, block by block."""
    # The file is opened here, because pyarrow's own errors would not name it.
    with path.open("wb") as file, pq.ParquetWriter(file, schema, **LABEL_PARQUET_OPTIONS) as writer:
        for table in tables:
            first_row = 0
            for block in table.read_blocks():
                rows = propagator.propagate_block(table.path, block, first_row)
                writer.write_table(_conform_to_schema(schema, rows))
                first_row += block.height


def _write_csv_rows(
    path: Path,
    columns: Sequence[str],
    tables: Sequence["LabelInput"],
    propagator: "_BlockPropagator",
    classes: ClassList,
) -> None:
    """Write these columns of all inputs, block by block, with class ids in place of indices."""
    id_of = dict(enumerate(classes.mids))

    def join_ids(name: str) -> pl.Expr:
        ids = pl.element()
        if name != "outside":
            ids = pl.element().replace_strict(id_of, return_dtype=pl.String)
        return pl.col(name).list.eval(ids).list.join(TEXT_SEPARATOR)

    is_first = True
    with path.open("wb") as file:
        for table in tables:
            first_row = 0
            for block in table.read_blocks():
                rows = propagator.propagate_block(table.path, block, first_row)
                missing = [pl.lit(None).alias(name) for name in columns if name not in rows.columns]
                lists = [join_ids(name) for name, kind in rows.schema.items() if isinstance(kind, pl.List)]
                rows.with_columns(*missing, *lists).select(columns).write_csv(file, include_header=is_first)
                is_first = False
                first_row += block.height


class _BlockPropagator:
    """Turns blocks of an input into rows of the output."""

    def __init__(self, maker: LabelSetMaker, ontology: Ontology, classes: ClassList) -> None:
        self.maker = maker
        self.classes = classes
        self.class_names = known_class_names() | {node.mid: node.name for node in ontology.nodes}

    def propagate_block(self, path: Path, block: pl.DataFrame, first_row: int) -> pl.DataFrame:
        """Return the block with `raw`, the label set and `outside` in place of `labels`; raises ManifestError."""
        try:
            raw, outside = self._raw_labels(block["labels"], first_row)
        except OntologyError as error:
            raise ManifestError(f"{path}: {error}") from None
        self._check_known_ids(path, block, outside, first_row)

        # The counts need splits as indices.
        index_of_split = {split: index for index, split in enumerate(self.maker.counts.splits)}
        split_B = block["split"].replace_strict(index_of_split, return_dtype=pl.Int64)
        labels = self.maker.propagate_batch(raw, split_B.to_numpy(), outside)
        return block.drop("labels").with_columns(
            raw.alias("raw"), labels.alias(self.maker.provenance.rule), outside.alias("outside")
        )

    def _raw_labels(self, labels: pl.Series, first_row: int) -> tuple[pl.Series, pl.Series]:
        """Return class indices, sorted and unique, and the ids outside the class list."""
        if labels.dtype == pl.List(pl.String):
            return index_class_ids(labels, self.classes, first_row=first_row)

        # These labels are already indices; propagating them by an empty relation sorts and checks them.
        nothing_CC = np.zeros((len(self.classes),) * 2, dtype=bool)
        raw = propagate(labels, nothing_CC, first_row=first_row)
        return raw, pl.Series([[]], dtype=pl.List(pl.String)).new_from_index(0, len(raw))

    def _check_known_ids(self, path: Path, block: pl.DataFrame, outside: pl.Series, first_row: int) -> None:
        """Raise ManifestError for an id that is in no list: a typing error, or an id of another data set."""
        rows = pl.DataFrame({"row": range(len(outside)), "mid": outside}).explode("mid").drop_nulls()
        unknown = rows.filter(~pl.col("mid").is_in(list(self.class_names)))
        if unknown.is_empty():
            return

        # The error names only the first of them.
        row, mid = unknown.row(0)
        clip = f" (clip {block['clip_id'][row]})" if "clip_id" in block.columns else ""
        raise ManifestError(
            f"{path}: row {first_row + row}{clip}: unknown class {mid!r}; {self._suggest_class_id(mid)}"
        )

    def _suggest_class_id(self, mid: str) -> str:
        """Return the end of an error about an unknown id; it suggests only one of the more than 660 known classes."""
        # Ids with the wrong separator look like one long id.
        if any(part in self.class_names for part in re.split(r"[,|\s]+", mid)):
            return "several ids are separated by ;"

        # The user may have given the name of a class.
        mid_of_name = {name.lower(): known for known, name in self.class_names.items()}
        nearest = mid_of_name.get(mid.lower()) or closest_word(mid, self.class_names)
        return (
            f"did you mean {nearest} ({self.class_names[nearest]})? "
            "Other lists are given by --classes and --ontology"
        )


def _check_output_path(inputs: Sequence[Path], out: Path) -> None:
    """Raise InputError unless `out` names a Parquet or CSV file that is no input, and every input is given once."""
    if not (_is_parquet(out) or is_csv(out)) or out.is_dir():
        raise InputError(f"--out {out}: expected the name of a table, such as labels.parquet or labels.csv")

    # Two paths may lead to one file.
    resolved = [path.resolve() for path in inputs]
    if repeated := [path for path in inputs if resolved.count(path.resolve()) > 1]:
        raise InputError(f"{repeated[0]}: is given twice, so its clips would be written twice")
    if out.resolve() in resolved:
        raise InputError(
            f"--out {out}: is also an input, which would lose its other columns; choose another name"
        )


def _output_schema(columns: Sequence[str], provenance: LabelProvenance) -> pa.Schema:
    types = {"split": pa.string(), "clip_id": pa.string()}
    fields = [
        *((name, types.get(name, pa.float64())) for name in columns),
        ("raw", LABEL_LIST_TYPE),
        (provenance.rule, LABEL_LIST_TYPE),
        ("outside", pa.list_(pa.string())),
    ]
    sources = {"raw": "as listed", provenance.rule: asdict(provenance)}
    return pa.schema(fields, {PROVENANCE_KEY: json.dumps(sources, separators=(",", ":")).encode()})


def _conform_to_schema(schema: pa.Schema, block: pl.DataFrame) -> pa.Table:
    """Return the block with exactly the columns of a schema; columns that the block lacks are null."""
    columns = []
    for field in schema:
        if field.name in block.columns:
            columns.append(block[field.name].to_arrow().cast(field.type))
        else:
            columns.append(pa.nulls(block.height, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


# The inputs.


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelInput:
    """A file of rows with labels.

    Its blocks have the columns named in `columns`, and `labels`: lists of class ids or of class indices.
    """

    path: Path
    splits: tuple[str, ...]
    columns: tuple[str, ...]  # keys of CLIP_COLUMN_TYPES, always `split`
    read_blocks: Callable[
        [], Iterator[pl.DataFrame]
    ]  # may be called again; memory does not grow with the file


def open_label_input(path: Path, classes: ClassList) -> LabelInput:
    """Open a Parquet table if the file's suffix is .parquet or .pq, else a segments list; raises InputError.

    A table has its labels in column raw, mids, labels, label or positive_labels: class ids as lists or as text with `;`
    between them, or lists of indices into `classes`. Optional columns are clip_id (or video_id, ytid, id, fname),
    split (default: the file's name), start and end. Capitals do not matter; other columns are ignored.
    """
    if path.is_dir():
        raise InputError(
            f"{path}: is a folder but not a store; expected a store, a segments list or a Parquet table"
        )
    if not path.exists():
        raise InputError(f"{path}: no such file{did_you_mean(path)}")
    if _is_parquet(path):
        return _open_label_table(path, classes)

    # A segments list has all columns, and one split: its name.
    return LabelInput(
        path=path,
        splits=(split_from_filename(path),),
        columns=tuple(CLIP_COLUMN_TYPES),
        read_blocks=lambda: _segment_list_blocks(path),
    )


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in LABEL_PARQUET_SUFFIXES


def _segment_list_blocks(path: Path) -> Iterator[pl.DataFrame]:
    # Read the whole list before damaged lines raise an error, so that the error gives their number.
    row_count = 0
    damaged_blocks = []
    for rows, damaged in read_segment_blocks(path):
        row_count += rows.height
        damaged_blocks.append(damaged)
        yield rows.rename({"mids": "labels"})
    check_damaged_lines(path, row_count, pl.concat(damaged_blocks), lenient=False)


def _open_label_table(path: Path, classes: ClassList) -> LabelInput:
    """Find the columns of a table by their names; ManifestError if there is no column of labels."""
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
    except DAMAGED_TABLE_ERRORS as error:
        raise _damaged_input_error(path, error) from None

    label_column = _find_column(schema, LABEL_COLUMN_ALIASES)
    if label_column is None:
        raise ManifestError(
            f"{path}: no column of labels; expected one of {', '.join(LABEL_COLUMN_ALIASES)}, "
            f"it has {', '.join(schema.names)}"
        )
    _check_label_column(path, schema.field(label_column), schema, classes)

    # The other columns are optional.
    candidates = {column: _find_column(schema, names) for column, names in CLIP_COLUMN_ALIASES.items()}
    name_of = {column: name for column, name in candidates.items() if name is not None}
    return LabelInput(
        path=path,
        splits=_table_splits(path, name_of.get("split")),
        columns=tuple(column for column in CLIP_COLUMN_TYPES if column in name_of or column == "split"),
        read_blocks=lambda: _label_table_blocks(path, name_of, label_column),
    )


def _find_column(schema: pa.Schema, names: Sequence[str]) -> str | None:
    """Return the first of `names` that a schema has, as the schema spells it."""
    spelling_of = {name.strip().lower(): name for name in schema.names}
    return next((spelling_of[name] for name in names if name in spelling_of), None)


def _check_label_column(path: Path, column: pa.Field, schema: pa.Schema, classes: ClassList) -> None:
    """Raise ManifestError unless the column can contain labels, and its indices, if any, are of this class list."""
    # Ids are texts, single or in lists; indices are integers in lists.
    column_type = column.type
    is_list = pa.types.is_list(column_type) or pa.types.is_large_list(column_type)
    value_type = column_type.value_type if is_list else column_type
    if pa.types.is_dictionary(value_type):
        value_type = value_type.value_type
    is_text = pa.types.is_string(value_type) or pa.types.is_large_string(value_type)
    if not is_text and (value_type == column_type or not pa.types.is_integer(value_type)):
        raise ManifestError(
            f"{path}: column {column.name!r} holds {column_type}; expected lists of class ids, "
            "lists of class indices, or ids as text with ; between them"
        )

    # A table that this program wrote names the class list of its indices.
    sources = json.loads((schema.metadata or {}).get(PROVENANCE_KEY, b"{}"))
    digests = {
        source["classes"] for source in sources.values() if isinstance(source, dict) and "classes" in source
    }
    if not is_text and digests - {classes.digest}:
        raise ManifestError(
            f"{path}: its indices are of another class list than the {len(classes)} classes given; "
            "give the list that it was made with as --classes"
        )


def _table_splits(path: Path, column: str | None) -> tuple[str, ...]:
    """Return the splits of a table in the order of their first rows."""
    if column is None:
        return (split_from_filename(path),)
    # The keys of a dict keep the order in which they were first added.
    splits: dict[str, None] = {}
    for frame in _read_table_blocks(path, [column]):
        if frame[column].null_count():
            raise ManifestError(f"{path}: column {column!r} is null in some rows; every clip needs a split")
        splits.update(dict.fromkeys(frame[column].cast(pl.String).unique(maintain_order=True)))
    return tuple(splits)


def _label_table_blocks(path: Path, name_of: dict[str, str], label_column: str) -> Iterator[pl.DataFrame]:
    """Yield a table's rows with our column names; `name_of` maps them to the table's names."""
    split = pl.col(name_of["split"]) if "split" in name_of else pl.lit(split_from_filename(path))
    others = [
        pl.col(name).cast(CLIP_COLUMN_TYPES[column]).alias(column)
        for column, name in name_of.items()
        if column != "split"
    ]
    for frame in _read_table_blocks(path, [*name_of.values(), label_column]):
        labels = _label_lists_expr(frame.schema[label_column], label_column)
        try:
            rows = frame.select(*others, split.cast(pl.String).alias("split"), labels.alias("labels"))
        except pl.exceptions.PolarsError as error:
            raise ManifestError(
                f"{path}: {first_error_line(error, path)}; mend the column or leave it out"
            ) from None
        yield rows


def _label_lists_expr(column_type: pl.DataType, name: str) -> pl.Expr:
    # A list holds indices or ids; a text holds ids with `;` between them.
    if isinstance(column_type, pl.List):
        is_index = column_type.inner.is_integer()
        return pl.col(name) if is_index else pl.col(name).cast(pl.List(pl.String))
    return pl.col(name).cast(pl.String).str.extract_all(r"[^;\s](?:[^;]*[^;\s])?")


def _read_table_blocks(path: Path, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    with pq.ParquetFile(path) as file:
        try:
            for batch in file.iter_batches(LABEL_BLOCK_ROWS, columns=list(columns)):
                frame = pl.from_arrow(pa.Table.from_batches([batch]))
                assert isinstance(frame, pl.DataFrame)
                yield frame
        except DAMAGED_TABLE_ERRORS as error:
            raise _damaged_input_error(path, error) from None


def _damaged_input_error(path: Path, error: BaseException) -> ManifestError:
    damage = describe_table_damage(error)
    return ManifestError(f"{path}: cannot be read ({damage}); fetch or make it again")
