"""The label sets of a store: raw labels made from class ids, and the sets that propagation adds."""

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
from pipeline.messages import describe_no_store, suggest_known
from pipeline.tables import DAMAGED_TABLE_ERRORS, describe_table_damage

# The key in the schema metadata of labels.parquet whose JSON maps each label set to its provenance.
PROVENANCE_KEY = b"ajepa"

LABEL_LIST_TYPE = pa.list_(pa.uint16())

# The options of `tables.write_table`; page checksums reveal a flipped bit.
LABEL_PARQUET_OPTIONS = {"compression": "zstd", "write_page_checksum": True}

ROWS_INDEXED = 2**17  # of which `index_class_ids` turns the ids into indices at a time


class MissingOntologyError(StoreError):
    """The ontology of a label set is missing; the set can be made again only with the original file."""


def propagate_store_labels(
    store_path: Path | str,
    rule: str = "unambiguous",
    splits: Sequence[str] | None = None,
    *,
    ontology: Ontology | None = None,
    expect: ClassList | None = None,
) -> PropagationSummary:
    """Add the label set of `rule` to a store, beside its raw labels; a second call changes no byte.

    The set is named after its rule and replaces an older set of that name. It has labels for every row; in splits that
    are not requested, they are the raw labels. The summary of the changes is returned, and saved as
    `propagation-<rule>.json`. An ontology other than AudioSet's is kept in the store, so that `verify` can make the set
    again. `expect` is the class list that the store should have. Raises StoreError, and OntologyError for an unknown
    rule or a class that the ontology lacks.
    """
    # Find the store's classes, the relation of the rule over them, and the splits to propagate.
    store = Path(store_path)
    ontology = ontology or load_ontology()
    classes = _stored_class_list(store, ontology)
    if expect is not None:
        _check_class_list(store, classes, expect)
    adds_CC = rule_relation_CC(rule, ontology=ontology, classes=classes)
    known_splits, split_N = _row_splits(store)
    is_good_N = _good_rows(store)
    propagated_splits = requested_splits(str(store), known_splits, splits)

    # Write the labels under the lock that also excludes builds.
    maker = LabelSetMaker(
        provenance=LabelProvenance.for_rule(rule, ontology, classes, adds_CC, propagated_splits),
        adds_CC=adds_CC,
        counts=LabelCounts(known_splits, classes),
        good_counts=None if is_good_N is None else LabelCounts(known_splits, classes),
    )
    with lock_store(store):
        if maker.provenance.ontology != load_ontology().digest:
            with replacing_file(_ontology_path(store, maker.provenance.ontology)) as scratch:
                scratch.write_text(ontology.to_json(), encoding="utf-8")
        _add_label_set(store / "labels.parquet", maker, split_N, is_good_N)

    # Write the summary only after the labels are on the disk.
    summary = maker.summary(ontology)
    summary.save_json(store / f"propagation-{rule}.json")
    return summary


def label_set_ontology(store: Path, rule: str, digest: str) -> Ontology:
    """Return the ontology that a label set was made with, AudioSet's or one in the store; or MissingOntologyError."""
    default = load_ontology()
    if digest == default.digest:
        return default

    # The file in the store is used only if it still has the same digest.
    path = _ontology_path(store, digest)
    try:
        kept = load_ontology(path)
    except OntologyError:
        kept = None
    if kept is not None and kept.digest == digest:
        return kept
    raise MissingOntologyError(
        f"{store}: label set {rule} is of ontology {digest}, which is not in {path.name}; make it again with: "
        f"ajepa-data propagate-labels {store} --rule {rule} --ontology FILE"
    )


def index_class_ids(
    mids: pl.Series, classes: ClassList, *, first_row: int = 0
) -> tuple[pl.Series, pl.Series]:
    """Return each row's class ids as `raw` (list<uint16>: indices into `classes`) and `outside` (ids not in the list).

    Both are sorted and unique; a row without ids has an empty list. OntologyError for a null; it names the row, where
    `first_row` is the number of the first row.
    """
    # A part at a time: what is needed on the way takes many times the memory of the result.
    parts = [
        _index_class_ids(mids[begin : begin + ROWS_INDEXED], classes, first_row=first_row + begin)
        for begin in range(0, len(mids) or 1, ROWS_INDEXED)
    ]
    raw, outside = (pl.concat(column, rechunk=True) for column in zip(*parts, strict=True))
    return raw, outside


def _index_class_ids(mids: pl.Series, classes: ClassList, *, first_row: int) -> tuple[pl.Series, pl.Series]:
    rows_N, ids = flatten_label_lists(mids, first_row=first_row)
    index = pc.index_in(ids.cast(pa.large_string()), pa.array(classes.mids, pa.large_string()))
    is_known_N = index.is_valid().to_numpy(zero_copy_only=False)

    # Known ids become indices.
    keys_N = sorted_unique_keys(rows_N[is_known_N] * len(classes) + index.drop_null().to_numpy())
    raw = label_lists_from_keys(keys_N, len(classes), row_count=len(mids))

    # Other ids stay ids.
    unknown = pl.DataFrame({"row": rows_N[~is_known_N], "mid": ids.filter(pa.array(~is_known_N))})
    unknown = unknown.unique().sort("row", "mid")
    outside = build_label_lists(unknown["row"].to_numpy(), unknown["mid"].to_arrow(), row_count=len(mids))
    return raw.alias("raw"), outside.alias("outside")


def requested_splits(
    where: str, known_splits: Sequence[str], splits: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the requested splits, each once, or all if `splits` is None; InputError for an unknown split."""
    for split in splits or ():
        if split not in known_splits:
            raise InputError(
                f"{where}: no split {split!r}; {suggest_known(split, known_splits, there_are='It has')}"
            )
    return tuple(known_splits if splits is None else dict.fromkeys(splits))


# The store's class list, and the ontologies kept in it.


def _stored_class_list(store: Path, ontology: Ontology) -> ClassList:
    """Return the class list of the store's header, with the names of the ontology."""
    try:
        header = json.loads((store / "zarr.json").read_text(encoding="utf-8"))
        mids = tuple(header["attributes"]["ajepa"]["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(describe_no_store(store)) from None
    name_of = {node.mid: node.name for node in ontology.nodes}
    return ClassList(mids=mids, names=tuple(name_of.get(mid, mid) for mid in mids))


def _check_class_list(store: Path, classes: ClassList, expect: ClassList) -> None:
    """Raise StoreError, with the first class that differs, unless a store has the expected classes."""
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
    """Return the names of the splits, and for every row of the manifest the index of its split."""
    path = store / "manifest.parquet"
    with _open_parquet(path, "split") as file:
        tables = _read_row_groups(path, file, ["split"])
        chunks = [chunk for table in tables for chunk in table["split"].chunks]
        column = pa.chunked_array(chunks, file.schema_arrow.field("split").type)

    # Row groups may number the splits differently; after unifying, each index means one split.
    column = column.dictionary_encode().unify_dictionaries().combine_chunks()
    if column.null_count:
        raise StoreError(f"{path}: {column.null_count} rows have no split; build the store again")
    return column.dictionary.to_pylist(), column.indices.to_numpy()


def _good_rows(store: Path) -> np.ndarray | None:
    """Return which rows of the manifest are good clips, bool `N`; None before the build of the store has finished."""
    path = store / "manifest.parquet"
    with _open_parquet(path, "split") as file:
        if "status" not in file.schema_arrow.names:
            return None
        tables = list(_read_row_groups(path, file, ["status"]))
    chunks = [chunk.cast(pa.string()) for table in tables for chunk in table["status"].chunks]
    status = pa.chunked_array(chunks, pa.string())
    if pc.any(pc.equal(status, "pending")).as_py():
        return None
    return pc.fill_null(pc.equal(status, "good"), False).to_numpy()


def _add_label_set(
    path: Path, maker: LabelSetMaker, split_N: np.ndarray, is_good_N: np.ndarray | None
) -> None:
    """Rewrite labels.parquet with the column that `maker` makes; `split_N` is the index of each row's split."""
    rule = maker.provenance.rule
    with _open_parquet(path, "raw") as file, replacing_file(path) as scratch:
        if (rows := file.metadata.num_rows) != len(split_N):
            raise StoreError(f"{path}: {rows} rows, the manifest has {len(split_N)}; build the store again")

        # Remove what a killed propagation has left: a file as large as the labels.
        for debris in abandoned_scratch_paths(path):
            debris.unlink()

        # One row group at a time, so that memory does not grow with the store.
        schema = _label_set_schema(file.schema_arrow, maker.provenance)
        with pq.ParquetWriter(scratch, schema, **LABEL_PARQUET_OPTIONS) as writer:
            first_row = 0
            for table in _read_row_groups(path, file):
                outside = pl.Series(values=table["outside"]) if "outside" in table.column_names else None
                rows = slice(first_row, first_row + len(table))
                try:
                    labels = maker.propagate_batch(
                        pl.Series(values=table["raw"]),
                        split_N[rows],
                        outside,
                        is_good_B=None if is_good_N is None else is_good_N[rows],
                        first_row=first_row,
                    )
                except OntologyError as error:
                    raise StoreError(f"{path}: {error}") from None
                table = _set_column(table, rule, labels.to_arrow().cast(LABEL_LIST_TYPE))
                writer.write_table(table, row_group_size=max(len(table), 1))
                first_row += len(table)


def _label_set_schema(schema: pa.Schema, provenance: LabelProvenance) -> pa.Schema:
    """Return the schema with the column of a new label set, and with its provenance added."""
    metadata = schema.metadata or {}
    sources = json.loads(metadata.get(PROVENANCE_KEY, b"{}")) | {provenance.rule: asdict(provenance)}
    metadata = metadata | {PROVENANCE_KEY: json.dumps(sources, separators=(",", ":")).encode()}
    table = _set_column(schema.empty_table(), provenance.rule, pa.array([], LABEL_LIST_TYPE))
    return table.schema.with_metadata(metadata)


def _set_column(table: pa.Table, column_name: str, column: pa.Array) -> pa.Table:
    # A new set replaces a set of the same name at its position among the columns.
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
