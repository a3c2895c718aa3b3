"""The label sets of a store: class ids turned into raw labels, and the sets that propagation adds beside them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError, OntologyError, StoreError
from pipeline.files import abandoned_scratch_paths, lock_store, replacing_file
from pipeline.labels.ontology import (
    ClassList,
    Ontology,
    build_label_lists,
    flatten_label_lists,
    label_lists_from_keys,
    load_ontology,
    sorted_unique_keys,
)
from pipeline.labels.propagation import (
    LabelCounts,
    LabelProvenance,
    LabelSetMaker,
    PropagationSummary,
    rule_relation_CC,
)
from pipeline.messages import suggest_known
from pipeline.tables import DAMAGED_TABLE_ERRORS, describe_table_damage

# The key in the schema metadata of labels.parquet whose JSON maps each label set to where it comes from.
PROVENANCE_KEY = b"ajepa"

LABEL_LIST_TYPE = pa.list_(pa.uint16())

# As `tables.write_table` writes: the checksums of pages reveal a flipped bit.
LABEL_PARQUET_OPTIONS = {"compression": "zstd", "write_page_checksum": True}


class MissingOntologyError(StoreError):
    """The ontology that a label set was made with is gone, so that only its owner can make the set again."""


def propagate_store_labels(
    store_path: Path | str,
    rule: str = "unambiguous",
    splits: Sequence[str] | None = None,
    *,
    ontology: Ontology | None = None,
    expect: ClassList | None = None,
) -> PropagationSummary:
    """Add to a store, beside its raw labels, the label set that `rule` makes of them; a second call changes no byte.

    The set is named after its rule and replaces an older one of that name. It covers every row; in splits that are not
    requested it holds the raw labels. The summary of the changes is returned, and saved as `propagation-<rule>.json`.
    An ontology other than AudioSet's is kept in the store, so that `verify` can make the set again. `expect` is the
    class list that the store should have. Raises StoreError, and OntologyError for an unknown rule or a class that the
    ontology lacks.
    """
    # The store's classes, the relation of the rule over them, and the splits it is to cover.
    store = Path(store_path)
    ontology = ontology or load_ontology()
    classes = _stored_class_list(store, ontology)
    if expect is not None:
        _check_class_list(store, classes, expect)
    adds_CC = rule_relation_CC(rule, ontology=ontology, classes=classes)
    known_splits, split_N = _row_splits(store)
    propagated_splits = requested_splits(str(store), known_splits, splits)

    # The labels, under the lock that also keeps builds away.
    maker = LabelSetMaker(
        provenance=LabelProvenance.for_rule(rule, ontology, classes, adds_CC, propagated_splits),
        adds_CC=adds_CC,
        counts=LabelCounts(known_splits, classes),
    )
    with lock_store(store):
        if maker.provenance.ontology != load_ontology().digest:
            with replacing_file(_ontology_path(store, maker.provenance.ontology)) as scratch:
                scratch.write_text(ontology.to_json(), encoding="utf-8")
        _add_label_set(store / "labels.parquet", maker, split_N)

    # The summary goes beside the labels only after they are safe.
    summary = maker.counts.summary(maker.provenance, ontology)
    summary.save_json(store / f"propagation-{rule}.json")
    return summary


def label_set_ontology(store: Path, rule: str, digest: str) -> Ontology:
    """The ontology that a label set of a store was made with, AudioSet's or one kept there; MissingOntologyError."""
    default = load_ontology()
    if digest == default.digest:
        return default

    # The file kept in the store counts only if it still holds that ontology.
    path = _ontology_path(store, digest)
    try:
        kept = load_ontology(path)
    except OntologyError:
        kept = None
    if kept is not None and kept.digest == digest:
        return kept
    raise MissingOntologyError(
        f"{store}: label set {rule} is of ontology {digest}, which {path.name} does not hold; make it again with: "
        f"ajepa-data propagate-labels {store} --rule {rule} --ontology FILE"
    )


def index_class_ids(
    mids: pl.Series, classes: ClassList, *, first_row: int = 0
) -> tuple[pl.Series, pl.Series]:
    """Each row's class ids as `raw` (list<uint16>: indices into `classes`) and `outside` (ids not in the list).

    Both are sorted and unique; a row without any is an empty list. OntologyError: a null, named by its row; `first_row`
    is the number of the first.
    """
    rows_N, ids = flatten_label_lists(mids, first_row=first_row)
    index = pc.index_in(ids.cast(pa.large_string()), pa.array(classes.mids, pa.large_string()))
    is_known_N = index.is_valid().to_numpy(zero_copy_only=False)

    # Known ids become indices.
    keys_N = sorted_unique_keys(rows_N[is_known_N] * len(classes) + index.drop_null().to_numpy())
    raw = label_lists_from_keys(keys_N, len(classes), row_count=len(mids))

    # The others stay ids.
    unknown = pl.DataFrame({"row": rows_N[~is_known_N], "mid": ids.filter(pa.array(~is_known_N))})
    unknown = unknown.unique().sort("row", "mid")
    outside = build_label_lists(unknown["row"].to_numpy(), unknown["mid"].to_arrow(), row_count=len(mids))
    return raw.alias("raw"), outside.alias("outside")


def requested_splits(
    where: str, known_splits: Sequence[str], splits: Sequence[str] | None
) -> tuple[str, ...]:
    """The splits requested, each once, or all if `splits` is None; InputError for a split that does not exist."""
    for split in splits or ():
        if split not in known_splits:
            raise InputError(
                f"{where}: no split {split!r}; {suggest_known(split, known_splits, there_are='It has')}"
            )
    return tuple(known_splits if splits is None else dict.fromkeys(splits))


# The store's class list, and the ontologies kept in it.


def _stored_class_list(store: Path, ontology: Ontology) -> ClassList:
    """The class list in the store's header, with the names that the ontology gives."""
    try:
        header = json.loads((store / "zarr.json").read_text(encoding="utf-8"))
        mids = tuple(header["attributes"]["ajepa"]["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(f"{store}: not a feature store; make one with: ajepa-data build-audioset") from None
    name_of = {node.mid: node.name for node in ontology.nodes}
    return ClassList(mids=mids, names=tuple(name_of.get(mid, mid) for mid in mids))


def _check_class_list(store: Path, classes: ClassList, expect: ClassList) -> None:
    """StoreError, with the first class that differs, unless a store has the classes expected."""
    if classes.mids == expect.mids:
        return
    pairs = zip(classes.mids, expect.mids, strict=False)
    difference = next(
        (
            f"class {index} is {mid}, given is {given}"
            for index, (mid, given) in enumerate(pairs)
            if mid != given
        ),
        "the first are the same",
    )
    raise StoreError(
        f"{store}: its {len(classes)} classes are not the {len(expect)} given ({difference}); "
        "a store keeps the list it was built with: leave --classes out"
    )


def _ontology_path(store: Path, digest: str) -> Path:
    return store / f"ontology-{digest}.json"


# The columns of manifest.parquet and labels.parquet.


def _row_splits(store: Path) -> tuple[list[str], np.ndarray]:
    """The names of the splits, and the index of its split for every row of the manifest."""
    path = store / "manifest.parquet"
    with _open_parquet(path, "split") as file:
        tables = _read_row_groups(path, file, ["split"])
        chunks = [chunk for table in tables for chunk in table["split"].chunks]
        column = pa.chunked_array(chunks, file.schema_arrow.field("split").type)

    # Row groups may number the splits differently; unified, an index means one split.
    column = column.dictionary_encode().unify_dictionaries().combine_chunks()
    if column.null_count:
        raise StoreError(f"{path}: {column.null_count} rows have no split; build the store again")
    return column.dictionary.to_pylist(), column.indices.to_numpy()


def _add_label_set(path: Path, maker: LabelSetMaker, split_N: np.ndarray) -> None:
    """Rewrite labels.parquet with the column that `maker` makes; `split_N` is the index of each row's split."""
    rule = maker.provenance.rule
    with _open_parquet(path, "raw") as file, replacing_file(path) as scratch:
        if (rows := file.metadata.num_rows) != len(split_N):
            raise StoreError(f"{path}: {rows} rows, the manifest has {len(split_N)}; build the store again")

        # A killed propagation may have left a file as large as the labels.
        for debris in abandoned_scratch_paths(path):
            debris.unlink()

        # One row group at a time, so that memory does not grow with the store.
        schema = _label_set_schema(file.schema_arrow, maker.provenance)
        with pq.ParquetWriter(scratch, schema, **LABEL_PARQUET_OPTIONS) as writer:
            first_row = 0
            for table in _read_row_groups(path, file):
                outside = pl.Series(values=table["outside"]) if "outside" in table.column_names else None
                try:
                    labels = maker.propagate_batch(
                        pl.Series(values=table["raw"]),
                        split_N[first_row : first_row + len(table)],
                        outside,
                        first_row=first_row,
                    )
                except OntologyError as error:
                    raise StoreError(f"{path}: {error}") from None
                table = _set_column(table, rule, labels.to_arrow().cast(LABEL_LIST_TYPE))
                writer.write_table(table, row_group_size=max(len(table), 1))
                first_row += len(table)


def _label_set_schema(schema: pa.Schema, provenance: LabelProvenance) -> pa.Schema:
    """The schema with the column of a new label set, and its provenance beside that of the others."""
    metadata = schema.metadata or {}
    sources = json.loads(metadata.get(PROVENANCE_KEY, b"{}")) | {provenance.rule: asdict(provenance)}
    metadata = metadata | {PROVENANCE_KEY: json.dumps(sources, separators=(",", ":")).encode()}
    table = _set_column(schema.empty_table(), provenance.rule, pa.array([], LABEL_LIST_TYPE))
    return table.schema.with_metadata(metadata)


def _set_column(table: pa.Table, column_name: str, column: pa.Array) -> pa.Table:
    # A set of the same name keeps its place among the columns.
    place = table.schema.get_field_index(column_name)
    if place < 0:
        return table.append_column(column_name, column)
    return table.set_column(place, column_name, column)


def _open_parquet(path: Path, column: str) -> pq.ParquetFile:
    """Open a table of the store; StoreError if it is damaged or has no such column."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except DAMAGED_TABLE_ERRORS as error:
        raise _damaged_store_error(path, error) from None
    if column not in file.schema_arrow.names:
        raise StoreError(f"{path}: no column {column!r}, it has {', '.join(file.schema_arrow.names)}")
    return file


def _read_row_groups(
    path: Path, file: pq.ParquetFile, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    for group in range(file.num_row_groups):
        try:
            table = file.read_row_group(group, columns)
        except DAMAGED_TABLE_ERRORS as error:
            raise _damaged_store_error(path, error) from None
        yield table


def _damaged_store_error(path: Path, error: BaseException) -> StoreError:
    damage = describe_table_damage(error)
    return StoreError(
        f"{path}: cannot be read ({damage}); restore it, or run the ajepa-data build command of this store again"
    )
