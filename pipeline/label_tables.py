"""Label tables: propagation without a store, from lists and tables of clips to a Parquet table of label sets."""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, ManifestError, OntologyError
from pipeline.files import replacing
from pipeline.label_inputs import PARQUET, TYPES, LabelInput, open_input
from pipeline.labels import LABELS, PROVENANCE_KEY, WRITTEN, propagate_labels, split_mids, wanted
from pipeline.ontology import ClassList, Ontology, load_class_list, load_ontology
from pipeline.propagation import propagate, relation_CC
from pipeline.tally import Propagation, Provenance, Tally
from pipeline.vocabularies import known_names

TABLES = (*PARQUET, ".csv", ".tsv", ".txt")


def propagate_inputs(
    inputs: Sequence[Path | str],
    rule: str = "unambiguous",
    splits: Sequence[str] | None = None,
    *,
    ontology: Path | None = None,
    classes: Path | None = None,
    out: Path | None = None,
) -> Propagation:
    """Propagate in a store, or from lists and tables to `out`, with files of one's own; raises InputError."""
    paths = [Path(path) for path in inputs]
    tree = load_ontology(ontology)
    listed = None if classes is None else load_class_list(classes)
    if any(path.suffix.lower() in TABLES or path.is_file() for path in paths):
        if out is None:
            raise InputError(
                f"{paths[0]}: no store, so the labels need a file of their own: add --out FILE.parquet"
            )
        return propagate_tables(paths, out, rule, splits, ontology=tree, classes=listed)
    if len(paths) != 1:
        raise InputError(f"{len(paths)} stores; propagate one at a time")
    if out is not None:
        raise InputError(f"{paths[0]}: a store keeps its label sets itself; leave --out {out} out")
    return propagate_labels(paths[0], rule, splits, ontology=tree, expect=listed)


def propagate_tables(
    inputs: Sequence[Path],
    out: Path,
    rule: str = "unambiguous",
    splits: Sequence[str] | None = None,
    *,
    ontology: Ontology | None = None,
    classes: ClassList | None = None,
) -> Propagation:
    """Write `out`: the rows of all inputs in their order, with `raw` and the label set `rule` as class indices.

    Columns: clip_id, start_seconds, end_seconds where an input has them, split, raw, the rule's name, and `outside`:
    ids that the ontology or another list knows and the class list has not. Provenance as in a store's
    labels.parquet; what changed is returned, and saved as `<out>.propagation.json`. Nothing is written unless all
    is right; again gives the same bytes; memory does not grow with the inputs. Raises InputError: an id that no
    list knows, with its row and the nearest that one does; a split, rule or class that is not there.
    """
    ontology, classes = ontology or load_ontology(), classes or load_class_list()
    adds_CC = relation_CC(rule, ontology=ontology, classes=classes)
    _check_out(inputs, out)
    tables = [open_input(path, classes) for path in inputs]
    _check_splits(tables)
    known = tuple(dict.fromkeys(split for table in tables for split in table.splits))
    by = Provenance.of(rule, ontology, classes, adds_CC, wanted(str(inputs[0]), known, splits))
    making = _Making(by=by, adds_CC=adds_CC, ontology=ontology, classes=classes, tally=Tally(known, classes))
    columns = [name for name in TYPES if any(name in table.columns for table in tables)]
    schema = _schema(columns, by)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(out) as scratch,
        scratch.open("wb") as file,  # not pyarrow's own, whose errors do not name the file
        pq.ParquetWriter(file, schema, **WRITTEN) as writer,
    ):
        for table in tables:
            first_row = 0
            for block in table.blocks():
                writer.write_table(_as(schema, making.block(table.path, block, first_row)))
                first_row += block.height
    done = making.tally.done(by, ontology)
    done.save(out.with_suffix(".propagation.json"))
    return done


class _Making:
    """Makes and counts label sets, block by block."""

    def __init__(
        self, *, by: Provenance, adds_CC: np.ndarray, ontology: Ontology, classes: ClassList, tally: Tally
    ) -> None:
        self.by, self.adds_CC, self.classes, self.tally = by, adds_CC, classes, tally
        self.names = known_names() | {node.mid: node.name for node in ontology.nodes}

    def block(self, path: Path, block: pl.DataFrame, first_row: int) -> pl.DataFrame:
        """The block with `raw`, the label set and `outside` in place of `labels`."""
        try:
            raw, outside = self._raw(block["labels"], first_row)
            labels = propagate(raw, self.adds_CC)
        except OntologyError as error:
            raise ManifestError(f"{path}: {error}") from None
        self._check_known(path, block, outside, first_row)
        asked = block["split"].is_in(list(self.by.splits))
        labels = labels.zip_with(asked, raw)
        split_B = block["split"].replace_strict(
            {split: index for index, split in enumerate(self.tally.splits)}, return_dtype=pl.Int64
        )
        self.tally.add(split_B.to_numpy(), raw, labels, outside)
        return block.drop("labels").with_columns(
            raw.alias("raw"), labels.alias(self.by.rule), outside.alias("outside")
        )

    def _raw(self, labels: pl.Series, first_row: int) -> tuple[pl.Series, pl.Series]:
        if labels.dtype == pl.List(pl.String):
            return split_mids(labels, self.classes, first_row=first_row)
        nothing_CC = np.zeros((len(self.classes),) * 2, dtype=bool)
        raw = propagate(labels, nothing_CC, first_row=first_row)
        return raw, pl.Series([[]], dtype=pl.List(pl.String)).new_from_index(0, len(raw))

    def _check_known(self, path: Path, block: pl.DataFrame, outside: pl.Series, first_row: int) -> None:
        """ManifestError for an id that no list knows: a typing error, or the ids of another set."""
        rows = pl.DataFrame({"row": range(len(outside)), "mid": outside}).explode("mid").drop_nulls()
        odd = rows.filter(~pl.col("mid").is_in(list(self.names)))
        if odd.is_empty():
            return
        row, mid = odd.row(0)
        clip = f" (clip {block['clip_id'][row]})" if "clip_id" in block.columns else ""
        raise ManifestError(f"{path}: row {first_row + row}{clip}: unknown class {mid!r}; {self._meant(mid)}")

    def _meant(self, mid: str) -> str:
        if any(part in self.names for part in re.split(r"[,|\s]+", mid)):
            return "several ids are separated by ;"
        of_name = {name.lower(): known for known, name in self.names.items()}
        nearest = of_name.get(mid.lower()) or difflib.get_close_matches(mid, self.names, n=1, cutoff=0.0)[0]
        return f"did you mean {nearest} ({self.names[nearest]})? Other lists are given by --classes and --ontology"


def _check_out(inputs: Sequence[Path], out: Path) -> None:
    if out.suffix.lower() not in PARQUET or out.is_dir():
        raise InputError(f"--out {out}: expected the name of a Parquet file, such as labels.parquet")
    there = [path.resolve() for path in inputs]
    if twice := [path for path in inputs if there.count(path.resolve()) > 1]:
        raise InputError(f"{twice[0]}: is given twice; its clips would be too")
    if out.resolve() in there:
        raise InputError(
            f"--out {out}: is an input too, and would lose its other columns; choose another name"
        )


def _check_splits(tables: Sequence[LabelInput]) -> None:
    """ManifestError for two segments lists of one name, whose splits would be mixed."""
    lists = [table for table in tables if table.path.suffix.lower() not in PARQUET]
    names = [table.splits[0] for table in lists]
    if len(set(names)) < len(names):
        raise ManifestError(
            f"two segments lists share a name, which names the split: {sorted(names)}; rename one"
        )


def _schema(columns: Sequence[str], by: Provenance) -> pa.Schema:
    types = {"split": pa.string(), "clip_id": pa.string()}
    fields = [(name, types.get(name, pa.float64())) for name in columns]
    fields += [("raw", LABELS), (by.rule, LABELS), ("outside", pa.list_(pa.string()))]
    sources = {"raw": "as listed", by.rule: asdict(by)}
    return pa.schema(fields, {PROVENANCE_KEY: json.dumps(sources, separators=(",", ":")).encode()})


def _as(schema: pa.Schema, block: pl.DataFrame) -> pa.Table:
    """The block with exactly the columns of a schema; null where it has none."""
    columns = [
        block[field.name].to_arrow().cast(field.type)
        if field.name in block.columns
        else pa.nulls(block.height, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
