"""Label inputs: the rows of segments lists and Parquet tables with their labels, part by part.

Label tables: propagation without a store, from lists and tables of clips to a Parquet table of label sets.
"""

import difflib
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
    PropagationSummary,
    propagate,
    rule_relation_CC,
)
from pipeline.labels.segment_lists import check_damaged_lines, read_segment_blocks, split_from_filename
from pipeline.messages import did_you_mean

LABEL_BLOCK_ROWS = 2**17

LABEL_PARQUET_SUFFIXES = (".parquet", ".pq")

LABEL_READ_ERRORS = (OSError, pa.ArrowException)

CLIP_COLUMN_ALIASES = {  # of what a table tells -> names under which it may stand, the preferred first
    "clip_id": ("clip_id", "video_id", "ytid", "id", "fname"),
    "split": ("split",),
    "start_seconds": ("start_seconds", "start"),
    "end_seconds": ("end_seconds", "end"),
}

CLIP_COLUMN_TYPES = {
    "clip_id": pl.String(),
    "split": pl.String(),
    "start_seconds": pl.Float64(),
    "end_seconds": pl.Float64(),
}

LABEL_COLUMN_ALIASES = ("raw", "mids", "labels", "label", "positive_labels")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelInput:
    """A file of rows with labels. Its blocks have its `columns` and `labels`: lists of class ids or of indices."""

    path: Path
    splits: tuple[str, ...]
    columns: tuple[str, ...]  # of TYPES; `split` always
    read_blocks: Callable[
        [], Iterator[pl.DataFrame]
    ]  # may be called again; memory does not grow with the file


def open_label_input(path: Path, classes: ClassList) -> LabelInput:
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
        raise InputError(f"{path}: no such file{did_you_mean(path)}")
    if path.suffix.lower() in LABEL_PARQUET_SUFFIXES:
        return _open_label_table(path, classes)
    return LabelInput(
        path=path,
        splits=(split_from_filename(path),),
        columns=tuple(CLIP_COLUMN_TYPES),
        read_blocks=lambda: _segment_list_blocks(path),
    )


def _segment_list_blocks(path: Path) -> Iterator[pl.DataFrame]:
    good, damaged = 0, []
    for rows, bad in read_segment_blocks(path):
        good += rows.height
        damaged.append(bad)
        yield rows.rename({"mids": "labels"})
    check_damaged_lines(path, good, pl.concat(damaged), lenient=False)


def _open_label_table(path: Path, classes: ClassList) -> LabelInput:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
    except LABEL_READ_ERRORS as error:
        raise _damaged_table_error(path, error) from None
    labels = _find_column(schema, LABEL_COLUMN_ALIASES)
    if labels is None:
        raise ManifestError(
            f"{path}: no column of labels; expected one of {', '.join(LABEL_COLUMN_ALIASES)}, it has {', '.join(schema.names)}"
        )
    _check_label_column(path, schema.field(labels), schema, classes)
    found = {what: _find_column(schema, names) for what, names in CLIP_COLUMN_ALIASES.items()}
    named = {what: name for what, name in found.items() if name is not None}

    def read_blocks() -> Iterator[pl.DataFrame]:
        split = pl.col(named["split"]) if "split" in named else pl.lit(split_from_filename(path))
        others = [(what, name) for what, name in named.items() if what != "split"]
        for frame in _read_table_blocks(path, [*named.values(), labels]):
            try:
                read = frame.select(
                    *(pl.col(name).cast(CLIP_COLUMN_TYPES[what]).alias(what) for what, name in others),
                    split.cast(pl.String).alias("split"),
                    _label_lists_expr(frame.schema[labels], labels).alias("labels"),
                )
            except pl.exceptions.PolarsError as error:
                raise ManifestError(
                    f"{path}: {first_error_line(error, path)}; mend the column or leave it out"
                ) from None
            yield read

    return LabelInput(
        path=path,
        splits=_table_splits(path, named.get("split")),
        columns=tuple(what for what in CLIP_COLUMN_TYPES if what in named or what == "split"),
        read_blocks=read_blocks,
    )


def _find_column(schema: pa.Schema, names: Sequence[str]) -> str | None:
    there = {name.strip().lower(): name for name in schema.names}
    return next((there[name] for name in names if name in there), None)


def _check_label_column(path: Path, column: pa.Field, schema: pa.Schema, classes: ClassList) -> None:
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


def _label_lists_expr(kind: pl.DataType, name: str) -> pl.Expr:
    if isinstance(kind, pl.List):
        return pl.col(name) if kind.inner.is_integer() else pl.col(name).cast(pl.List(pl.String))
    return pl.col(name).cast(pl.String).str.extract_all(r"[^;\s](?:[^;]*[^;\s])?")


def _table_splits(path: Path, column: str | None) -> tuple[str, ...]:
    """The splits of a table in the order of their first rows."""
    if column is None:
        return (split_from_filename(path),)
    splits: dict[str, None] = {}
    for frame in _read_table_blocks(path, [column]):
        if frame[column].null_count():
            raise ManifestError(f"{path}: column {column!r} is null in some rows; every clip is of a split")
        splits.update(dict.fromkeys(frame[column].cast(pl.String).unique(maintain_order=True)))
    return tuple(splits)


def _read_table_blocks(path: Path, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    with pq.ParquetFile(path) as file:
        try:
            for batch in file.iter_batches(LABEL_BLOCK_ROWS, columns=list(columns)):
                frame = pl.from_arrow(pa.Table.from_batches([batch]))
                assert isinstance(frame, pl.DataFrame)
                yield frame
        except LABEL_READ_ERRORS as error:
            raise _damaged_table_error(path, error) from None


def _damaged_table_error(path: Path, error: BaseException) -> ManifestError:
    return ManifestError(
        f"{path}: not readable as Parquet ({str(error).splitlines()[0]}); fetch or make it again"
    )


LABEL_TABLE_SUFFIXES = (*LABEL_PARQUET_SUFFIXES, ".csv", ".tsv", ".txt")


def propagate_inputs(
    inputs: Sequence[Path | str],
    rule: str = "unambiguous",
    splits: Sequence[str] | None = None,
    *,
    ontology: Path | None = None,
    classes: Path | None = None,
    out: Path | None = None,
) -> PropagationSummary:
    """Propagate in a store, or from lists and tables to `out`, with files of one's own; raises InputError."""
    paths = [Path(path) for path in inputs]
    tree = load_ontology(ontology)
    listed = None if classes is None else load_class_list(classes)
    if any(path.suffix.lower() in LABEL_TABLE_SUFFIXES or path.is_file() for path in paths):
        if out is None:
            raise InputError(
                f"{paths[0]}: no store, so the labels need a file of their own: add --out FILE.parquet"
            )
        return propagate_tables(paths, out, rule, splits, ontology=tree, classes=listed)
    if len(paths) != 1:
        raise InputError(f"{len(paths)} stores; propagate one at a time")
    if out is not None:
        raise InputError(f"{paths[0]}: a store keeps its label sets itself; leave --out {out} out")
    return propagate_store_labels(paths[0], rule, splits, ontology=tree, expect=listed)


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

    Columns: clip_id, start_seconds, end_seconds where an input has them, split, raw, the rule's name, and `outside`:
    ids that the ontology or another list knows and the class list has not. Provenance as in a store's
    labels.parquet; what changed is returned, and saved as `<out>.propagation.json`. Nothing is written unless all
    is right; again gives the same bytes; memory does not grow with the inputs. Raises InputError: an id that no
    list knows, with its row and the nearest that one does; a split, rule or class that is not there.
    """
    ontology, classes = ontology or load_ontology(), classes or load_class_list()
    adds_CC = rule_relation_CC(rule, ontology=ontology, classes=classes)
    _check_table_path(inputs, out)
    tables = [open_label_input(path, classes) for path in inputs]
    _check_distinct_splits(tables)
    known = tuple(dict.fromkeys(split for table in tables for split in table.splits))
    by = LabelProvenance.for_rule(
        rule, ontology, classes, adds_CC, requested_splits(str(inputs[0]), known, splits)
    )
    making = _LabelSetBuilder(
        provenance=by,
        adds_CC=adds_CC,
        ontology=ontology,
        classes=classes,
        label_counts=LabelCounts(known, classes),
    )
    columns = [name for name in CLIP_COLUMN_TYPES if any(name in table.columns for table in tables)]
    schema = _label_table_schema(columns, by)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing_file(out) as scratch,
        scratch.open("wb") as file,  # not pyarrow's own, whose errors do not name the file
        pq.ParquetWriter(file, schema, **LABEL_PARQUET_OPTIONS) as writer,
    ):
        for table in tables:
            first_row = 0
            for block in table.read_blocks():
                writer.write_table(
                    _conform_to_schema(schema, making.propagate_block(table.path, block, first_row))
                )
                first_row += block.height
    done = making.label_counts.summary(by, ontology)
    done.save_json(out.with_suffix(".propagation.json"))
    return done


class _LabelSetBuilder:
    """Makes and counts label sets, block by block."""

    def __init__(
        self,
        *,
        provenance: LabelProvenance,
        adds_CC: np.ndarray,
        ontology: Ontology,
        classes: ClassList,
        label_counts: LabelCounts,
    ) -> None:
        self.provenance, self.adds_CC, self.classes, self.label_counts = (
            provenance,
            adds_CC,
            classes,
            label_counts,
        )
        self.class_names = known_class_names() | {node.mid: node.name for node in ontology.nodes}

    def propagate_block(self, path: Path, block: pl.DataFrame, first_row: int) -> pl.DataFrame:
        """The block with `raw`, the label set and `outside` in place of `labels`."""
        try:
            raw, outside = self._raw_labels(block["labels"], first_row)
            labels = propagate(raw, self.adds_CC)
        except OntologyError as error:
            raise ManifestError(f"{path}: {error}") from None
        self._check_known_ids(path, block, outside, first_row)
        asked = block["split"].is_in(list(self.provenance.splits))
        labels = labels.zip_with(asked, raw)
        split_B = block["split"].replace_strict(
            {split: index for index, split in enumerate(self.label_counts.splits)}, return_dtype=pl.Int64
        )
        self.label_counts.count_batch(split_B.to_numpy(), raw, labels, outside)
        return block.drop("labels").with_columns(
            raw.alias("raw"), labels.alias(self.provenance.rule), outside.alias("outside")
        )

    def _raw_labels(self, labels: pl.Series, first_row: int) -> tuple[pl.Series, pl.Series]:
        if labels.dtype == pl.List(pl.String):
            return index_class_ids(labels, self.classes, first_row=first_row)
        nothing_CC = np.zeros((len(self.classes),) * 2, dtype=bool)
        raw = propagate(labels, nothing_CC, first_row=first_row)
        return raw, pl.Series([[]], dtype=pl.List(pl.String)).new_from_index(0, len(raw))

    def _check_known_ids(self, path: Path, block: pl.DataFrame, outside: pl.Series, first_row: int) -> None:
        """ManifestError for an id that no list knows: a typing error, or the ids of another set."""
        rows = pl.DataFrame({"row": range(len(outside)), "mid": outside}).explode("mid").drop_nulls()
        odd = rows.filter(~pl.col("mid").is_in(list(self.class_names)))
        if odd.is_empty():
            return
        row, mid = odd.row(0)
        clip = f" (clip {block['clip_id'][row]})" if "clip_id" in block.columns else ""
        raise ManifestError(
            f"{path}: row {first_row + row}{clip}: unknown class {mid!r}; {self._suggest_class_id(mid)}"
        )

    def _suggest_class_id(self, mid: str) -> str:
        if any(part in self.class_names for part in re.split(r"[,|\s]+", mid)):
            return "several ids are separated by ;"
        of_name = {name.lower(): known for known, name in self.class_names.items()}
        nearest = (
            of_name.get(mid.lower()) or difflib.get_close_matches(mid, self.class_names, n=1, cutoff=0.0)[0]
        )
        return f"did you mean {nearest} ({self.class_names[nearest]})? Other lists are given by --classes and --ontology"


def _check_table_path(inputs: Sequence[Path], out: Path) -> None:
    if out.suffix.lower() not in LABEL_PARQUET_SUFFIXES or out.is_dir():
        raise InputError(f"--out {out}: expected the name of a Parquet file, such as labels.parquet")
    there = [path.resolve() for path in inputs]
    if twice := [path for path in inputs if there.count(path.resolve()) > 1]:
        raise InputError(f"{twice[0]}: is given twice; its clips would be too")
    if out.resolve() in there:
        raise InputError(
            f"--out {out}: is an input too, and would lose its other columns; choose another name"
        )


def _check_distinct_splits(tables: Sequence[LabelInput]) -> None:
    """ManifestError for two segments lists of one name, whose splits would be mixed."""
    lists = [table for table in tables if table.path.suffix.lower() not in LABEL_PARQUET_SUFFIXES]
    names = [table.splits[0] for table in lists]
    if len(set(names)) < len(names):
        raise ManifestError(
            f"two segments lists share a name, which names the split: {sorted(names)}; rename one"
        )


def _label_table_schema(columns: Sequence[str], provenance: LabelProvenance) -> pa.Schema:
    types = {"split": pa.string(), "clip_id": pa.string()}
    fields = [(name, types.get(name, pa.float64())) for name in columns]
    fields += [
        ("raw", LABEL_LIST_TYPE),
        (provenance.rule, LABEL_LIST_TYPE),
        ("outside", pa.list_(pa.string())),
    ]
    sources = {"raw": "as listed", provenance.rule: asdict(provenance)}
    return pa.schema(fields, {PROVENANCE_KEY: json.dumps(sources, separators=(",", ":")).encode()})


def _conform_to_schema(schema: pa.Schema, block: pl.DataFrame) -> pa.Table:
    """The block with exactly the columns of a schema; null where it has none."""
    columns = [
        block[field.name].to_arrow().cast(field.type)
        if field.name in block.columns
        else pa.nulls(block.height, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
