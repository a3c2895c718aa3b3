"""The labels of a store: ids to class indices, and the label sets that propagation adds."""

import difflib
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
    load_ontology,
    sorted_unique_keys,
)
from pipeline.labels.propagation import (
    LabelCounts,
    LabelProvenance,
    PropagationSummary,
    propagate,
    rule_relation_CC,
)

PROVENANCE_KEY = b"ajepa"  # in the schema metadata of labels.parquet: JSON, label set -> where it comes from

LABEL_LIST_TYPE = pa.list_(pa.uint16())

LABEL_PARQUET_OPTIONS = {
    "compression": "zstd",
    "write_page_checksum": True,
}  # as `tables.write_table`: a flipped bit is told


def propagate_store_labels(
    store_path: Path | str,
    rule: str = "unambiguous",
    splits: Sequence[str] | None = None,
    *,
    ontology: Ontology | None = None,
    expect: ClassList | None = None,
) -> PropagationSummary:
    """Add to a store, beside its raw labels, the label set that `rule` makes of them; again changes no byte.

    The set is named as its rule and replaces an older one of that name. It covers every row: in splits that
    are not asked for it holds the raw labels. What changed is returned, and saved: `propagation-<rule>.json`;
    an ontology other than AudioSet's is kept in the store, so that `verify` can make the set again. `expect`: the
    class list that the store should have. Raises StoreError, and OntologyError for an unknown rule or a class
    that the ontology lacks.
    """
    store, ontology = Path(store_path), ontology or load_ontology()
    classes = _stored_class_list(store, ontology)
    if expect is not None:
        _check_class_list(store, classes, expect)
    adds_CC = rule_relation_CC(rule, ontology=ontology, classes=classes)
    known, split_N = _row_splits(store)
    by = LabelProvenance.for_rule(
        rule, ontology, classes, adds_CC, requested_splits(str(store), known, splits)
    )
    tally = LabelCounts(known, classes)
    with lock_store(store):
        if by.ontology != load_ontology().digest:
            with replacing_file(_ontology_path(store, by.ontology)) as scratch:
                scratch.write_text(ontology.to_json(), encoding="utf-8")
        _add_label_set(store / "labels.parquet", by, adds_CC, split_N, tally)
    done = tally.summary(by, ontology)
    done.save_json(store / f"propagation-{rule}.json")
    return done


class MissingOntologyError(StoreError):
    """A label set was made with an ontology that is no longer there: it can be made again only by whoever has it."""


def label_set_ontology(store: Path, rule: str, digest: str) -> Ontology:
    """The ontology that a label set of a store was made with: AudioSet's or one kept there; OntologyGone."""
    default = load_ontology()
    if digest == default.digest:
        return default
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


def _ontology_path(store: Path, digest: str) -> Path:
    return store / f"ontology-{digest}.json"


def _check_class_list(store: Path, classes: ClassList, expect: ClassList) -> None:
    if classes.mids != expect.mids:
        pairs = zip(classes.mids, expect.mids, strict=False)
        differ = (f"class {i} is {a}, given is {b}" for i, (a, b) in enumerate(pairs) if a != b)
        raise StoreError(
            f"{store}: its {len(classes)} classes are not the {len(expect)} given "
            f"({next(differ, 'the first are the same')}); a store keeps the list it was built with: leave --classes out"
        )


def index_class_ids(
    mids: pl.Series, classes: ClassList, *, first_row: int = 0
) -> tuple[pl.Series, pl.Series]:
    """Each row's class ids as `raw` (list<uint16>: indices into `classes`) and `outside` (ids not in it).

    Both are sorted and unique; a row without any is an empty list. OntologyError: a null, with its row, the first
    of which is number `first_row`.
    """
    rows_N, ids = flatten_label_lists(mids, first_row=first_row)
    index = pc.index_in(ids.cast(pa.large_string()), pa.array(classes.mids, pa.large_string()))
    known_N = index.is_valid().to_numpy(zero_copy_only=False)
    keys_N = sorted_unique_keys(rows_N[known_N] * len(classes) + index.drop_null().to_numpy())
    class_N = pa.array((keys_N % len(classes)).astype(np.uint16))
    odd = pl.DataFrame({"row": rows_N[~known_N], "mid": ids.filter(pa.array(~known_N))})
    odd = odd.unique().sort("row", "mid")
    return (
        build_label_lists(keys_N // len(classes), class_N, count=len(mids)).alias("raw"),
        build_label_lists(odd["row"].to_numpy(), odd["mid"].to_arrow(), count=len(mids)).alias("outside"),
    )


def _stored_class_list(store: Path, ontology: Ontology) -> ClassList:
    """The class list in the store's header, named by the ontology."""
    try:
        header = json.loads((store / "zarr.json").read_text(encoding="utf-8"))
        mids = tuple(header["attributes"]["ajepa"]["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(f"{store}: not a feature store; make one with: ajepa-data build-audioset") from None
    name_of = {node.mid: node.name for node in ontology.nodes}
    return ClassList(mids=mids, names=tuple(name_of.get(mid, mid) for mid in mids))


def _open_parquet(path: Path, column: str) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise StoreError(f"{path}: missing; run the ajepa-data build command of this store again") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged_parquet_error(path, error) from None
    if column not in file.schema_arrow.names:
        raise StoreError(f"{path}: no column {column!r}, it has {', '.join(file.schema_arrow.names)}")
    return file


def _read_row_groups(
    path: Path, file: pq.ParquetFile, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    for group in range(file.num_row_groups):
        try:
            table = file.read_row_group(group, columns)
        except (OSError, pa.ArrowInvalid) as error:
            raise _damaged_parquet_error(path, error) from None
        yield table


def _damaged_parquet_error(path: Path, error: Exception) -> StoreError:
    reason = str(error).splitlines()[0]
    return StoreError(f"{path}: not readable as Parquet ({reason}); restore it or build the store again")


def _row_splits(store: Path) -> tuple[list[str], np.ndarray]:
    """The names of the splits, and the index among them of every row of the manifest."""
    path = store / "manifest.parquet"
    with _open_parquet(path, "split") as file:
        chunks = [
            chunk for table in _read_row_groups(path, file, ["split"]) for chunk in table["split"].chunks
        ]
        column = pa.chunked_array(chunks, file.schema_arrow.field("split").type)
    column = column.dictionary_encode().unify_dictionaries().combine_chunks()
    if column.null_count:
        raise StoreError(f"{path}: {column.null_count} rows have no split; build the store again")
    return column.dictionary.to_pylist(), column.indices.to_numpy()


def requested_splits(
    where: str, known_splits: Sequence[str], splits: Sequence[str] | None
) -> tuple[str, ...]:
    """The splits asked for, all where none are; InputError for one that is not there."""
    for split in splits or ():
        if split not in known_splits:
            nearest = difflib.get_close_matches(split, known_splits, n=1, cutoff=0.0)[0]
            raise InputError(
                f"{where}: no split {split!r}; did you mean {nearest!r}? It has: {', '.join(known_splits)}"
            )
    return tuple(known_splits if splits is None else dict.fromkeys(splits))


def _add_label_set(
    path: Path,
    provenance: LabelProvenance,
    adds_CC: np.ndarray,
    split_N: np.ndarray,
    label_counts: LabelCounts,
) -> None:
    """Rewrite labels.parquet with the column `by.rule`, one row group at a time, and count into `tally`."""
    with _open_parquet(path, "raw") as file, replacing_file(path) as scratch:
        if (rows := file.metadata.num_rows) != len(split_N):
            raise StoreError(f"{path}: {rows} rows, the manifest has {len(split_N)}; build the store again")
        for debris in abandoned_scratch_paths(path):
            debris.unlink()
        with pq.ParquetWriter(
            scratch, _label_set_schema(file.schema_arrow, provenance), **LABEL_PARQUET_OPTIONS
        ) as writer:
            first = 0
            for table in _read_row_groups(path, file):
                raw, split_B = pl.Series(values=table["raw"]), split_N[first : first + len(table)]
                asked_B = pl.Series(
                    np.isin(split_B, [label_counts.splits.index(split) for split in provenance.splits])
                )
                try:
                    labels = propagate(raw, adds_CC, first_row=first).zip_with(asked_B, raw)
                except OntologyError as error:
                    raise StoreError(f"{path}: {error}") from None
                outside = pl.Series(values=table["outside"]) if "outside" in table.column_names else None
                label_counts.count_batch(split_B, raw, labels, outside)
                column = labels.to_arrow().cast(LABEL_LIST_TYPE)
                writer.write_table(
                    _set_column(table, provenance.rule, column), row_group_size=max(len(table), 1)
                )
                first += len(table)


def _set_column(table: pa.Table, column_name: str, column: pa.Array) -> pa.Table:
    place = table.schema.get_field_index(column_name)
    if place < 0:
        return table.append_column(column_name, column)
    return table.set_column(place, column_name, column)


def _label_set_schema(old: pa.Schema, provenance: LabelProvenance) -> pa.Schema:
    """The old schema with the new label set's column, and its provenance beside that of the others."""
    metadata = old.metadata or {}
    sources = json.loads(metadata.get(PROVENANCE_KEY, b"{}")) | {provenance.rule: asdict(provenance)}
    metadata = metadata | {PROVENANCE_KEY: json.dumps(sources, separators=(",", ":")).encode()}
    return _set_column(
        old.empty_table(), provenance.rule, pa.array([], LABEL_LIST_TYPE)
    ).schema.with_metadata(metadata)
