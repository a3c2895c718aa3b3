"""The labels of a store: ids to class indices, propagation up the class tree, and what that changed."""

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import OntologyError, StoreError
from pipeline.files import locked, replacing
from pipeline.ontology import (
    ClassList,
    Ontology,
    entries,
    lists,
    load_ontology,
    propagate,
    relation_CC,
    sorted_unique,
)

PROVENANCE_KEY = b"ajepa"  # in the schema metadata of labels.parquet: JSON, label set -> where it comes from
LABELS = pa.list_(pa.uint16())
GAINERS_SHOWN = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What propagation did to the clips of one split, those without audio included, or of `all` splits."""

    split: str
    clips: int
    clips_changed: int
    labels_before: int
    labels_after: int
    labels_added: int
    mean_before: float  # labels per clip, rounded to six digits
    mean_after: float
    classes_gaining: int


@dataclass(frozen=True, slots=True)
class Gainer:
    """A class that stands on more clips than before."""

    mid: str
    name: str
    clips_before: int
    clips_after: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where a propagated label set comes from."""

    rule: str
    ontology: str  # its digest
    pairs: int  # (class, class added for it)
    splits: tuple[str, ...]  # those propagated; the clips of others keep their raw labels in this set
    version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Propagation:
    """A label set that was added to a store, and how it differs from `raw`."""

    provenance: Provenance
    changes: tuple[Change, ...]  # one a split, then `all`
    gainers: tuple[Gainer, ...]  # biggest gain first


class Tally:
    """Counts labels before and after, split by split, over any number of batches."""

    def __init__(self, splits: Sequence[str], classes: ClassList) -> None:
        self.splits, self.classes = tuple(splits), classes
        self.clips_N, self.changed_N = np.zeros((2, len(splits)), dtype=np.int64)
        self.before_NC, self.after_NC = np.zeros((2, len(splits), len(classes)), dtype=np.int64)

    def add(self, split_B: np.ndarray, before: pl.Series, after: pl.Series) -> None:
        """Count clips: the index of each one's split, and its classes, each once, before and after."""
        changed_B = (before.list.len() != after.list.len()).to_numpy()
        self.clips_N += np.bincount(split_B, minlength=len(self.splits))
        self.changed_N += np.bincount(split_B[changed_B], minlength=len(self.splits))
        for count_NC, labels in ((self.before_NC, before), (self.after_NC, after)):
            rows_N, class_N = entries(labels)
            cells_N = split_B[rows_N] * len(self.classes) + class_N.to_numpy(zero_copy_only=False)
            count_NC += np.bincount(cells_N, minlength=count_NC.size).reshape(count_NC.shape)

    def change(self, name: str, splits: Sequence[str]) -> Change:
        """The counts of some splits together."""
        picked = [self.splits.index(split) for split in splits]
        clips = int(self.clips_N[picked].sum())
        before_C, after_C = self.before_NC[picked].sum(0), self.after_NC[picked].sum(0)
        before, after = int(before_C.sum()), int(after_C.sum())
        return Change(
            split=name,
            clips=clips,
            clips_changed=int(self.changed_N[picked].sum()),
            labels_before=before,
            labels_after=after,
            labels_added=after - before,
            mean_before=round(before / max(clips, 1), 6),
            mean_after=round(after / max(clips, 1), 6),
            classes_gaining=int((after_C > before_C).sum()),
        )

    def gainers(self) -> tuple[Gainer, ...]:
        """The classes that stand on more clips than before, the biggest gain first."""
        before_C, after_C = self.before_NC.sum(0), self.after_NC.sum(0)
        order = [
            index
            for index in np.argsort(before_C - after_C, kind="stable")
            if after_C[index] > before_C[index]
        ]
        mids, names = self.classes.mids, self.classes.names
        return tuple(Gainer(mids[i], names[i], int(before_C[i]), int(after_C[i])) for i in order)


def propagate_labels(
    store_path: Path | str,
    rule: str = "unambiguous",
    splits: Sequence[str] | None = None,
    *,
    ontology: Ontology | None = None,
) -> Propagation:
    """Add to a store, beside its raw labels, the label set that `rule` makes of them; again changes no byte.

    The set is named as its rule and replaces an older one of that name. It covers every row: in splits that
    are not asked for it holds the raw labels. What changed is returned, and saved: `propagation-<rule>.json`.
    Raises StoreError, and OntologyError for an unknown rule or a class that the ontology lacks.
    """
    store, ontology = Path(store_path), ontology or load_ontology()
    classes = _classes(store, ontology)
    adds_CC = relation_CC(rule, ontology=ontology, classes=classes)
    known, split_N = _splits(store)
    provenance = Provenance(
        rule=rule,
        ontology=ontology.digest,
        pairs=int(adds_CC.sum()),
        splits=_wanted(store, known, splits),
        version=f"ajepa {version('ajepa')}",
    )
    tally = Tally(known, classes)
    with locked(store):
        _add_label_set(store / "labels.parquet", provenance, adds_CC, split_N, tally)
    changes = [tally.change(split, [split]) for split in known] + [tally.change("all", known)]
    done = Propagation(provenance=provenance, changes=tuple(changes), gainers=tally.gainers())
    with replacing(store / f"propagation-{rule}.json") as scratch:
        scratch.write_text(json.dumps(asdict(done), indent=1) + "\n", encoding="utf-8")
    return done


def split_mids(mids: pl.Series, classes: ClassList) -> tuple[pl.Series, pl.Series]:
    """Each row's class ids as `raw` (list<uint16>: indices into `classes`) and `outside` (ids not in it).

    Both are sorted and unique; a row without any is an empty list. OntologyError: a null, with its row.
    """
    rows_N, ids = entries(mids)
    index = pc.index_in(ids.cast(pa.large_string()), pa.array(classes.mids, pa.large_string()))
    known_N = index.is_valid().to_numpy(zero_copy_only=False)
    keys_N = sorted_unique(rows_N[known_N] * len(classes) + index.drop_null().to_numpy())
    class_N = pa.array((keys_N % len(classes)).astype(np.uint16))
    odd = pl.DataFrame({"row": rows_N[~known_N], "mid": ids.filter(pa.array(~known_N))})
    odd = odd.unique().sort("row", "mid")
    return (
        lists(keys_N // len(classes), class_N, count=len(mids)).alias("raw"),
        lists(odd["row"].to_numpy(), odd["mid"].to_arrow(), count=len(mids)).alias("outside"),
    )


def table(done: Propagation) -> str:
    """What changed, to be read: a line per split, then the biggest gainers by name."""
    by = done.provenance
    head = f"label set {by.rule!r}: {by.pairs} class pairs of ontology {by.ontology}"
    if untouched := [change.split for change in done.changes[:-1] if change.split not in by.splits]:
        head += f"; raw labels kept in: {', '.join(untouched)}"
    return "\n".join([head, "", *_split_lines(done.changes), "", *_gainer_lines(done.gainers)])


def _split_lines(changes: Sequence[Change]) -> Iterator[str]:
    head = f"{'split':<20}{'clips':>11}{'mean labels':>22}"
    yield f"{head}{'labels added':>14}{'clips changed':>15}{'classes gaining':>17}"
    for change in changes:
        means = f"{change.mean_before:.6f} -> {change.mean_after:.6f}"
        counts = f"{change.labels_added:>14,}{change.clips_changed:>15,}{change.classes_gaining:>17}"
        yield f"{change.split:<20}{change.clips:>11,}{means:>22}{counts}"


def _gainer_lines(gainers: Sequence[Gainer]) -> Iterator[str]:
    yield f"{'biggest gainers':<36}{'clips before':>14}{'after':>11}{'added':>11}"
    for gainer in gainers[:GAINERS_SHOWN]:
        before, after = gainer.clips_before, gainer.clips_after
        yield f"{gainer.name[:35]:<36}{before:>14,}{after:>11,}{after - before:>11,}"
    if len(gainers) > GAINERS_SHOWN:
        yield f"and {len(gainers) - GAINERS_SHOWN} more classes"


def _classes(store: Path, ontology: Ontology) -> ClassList:
    """The class list in the store's header, named by the ontology."""
    try:
        header = json.loads((store / "zarr.json").read_text(encoding="utf-8"))
        mids = tuple(header["attributes"]["ajepa"]["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(f"{store}: not a feature store; make one with: ajepa-data build-audioset") from None
    name_of = {node.mid: node.name for node in ontology.nodes}
    return ClassList(mids=mids, names=tuple(name_of.get(mid, mid) for mid in mids))


def _opened(path: Path, column: str) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise StoreError(f"{path}: missing; run the ajepa-data build command of this store again") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(path, error) from None
    if column not in file.schema_arrow.names:
        raise StoreError(f"{path}: no column {column!r}, it has {', '.join(file.schema_arrow.names)}")
    return file


def _row_groups(path: Path, file: pq.ParquetFile, columns: list[str] | None = None) -> Iterator[pa.Table]:
    for group in range(file.num_row_groups):
        try:
            table = file.read_row_group(group, columns)
        except (OSError, pa.ArrowInvalid) as error:
            raise _damaged(path, error) from None
        yield table


def _damaged(path: Path, error: Exception) -> StoreError:
    reason = str(error).splitlines()[0]
    return StoreError(f"{path}: not readable as Parquet ({reason}); restore it or build the store again")


def _splits(store: Path) -> tuple[list[str], np.ndarray]:
    """The names of the splits, and the index among them of every row of the manifest."""
    path = store / "manifest.parquet"
    with _opened(path, "split") as file:
        chunks = [chunk for table in _row_groups(path, file, ["split"]) for chunk in table["split"].chunks]
        column = pa.chunked_array(chunks, file.schema_arrow.field("split").type)
    column = column.dictionary_encode().unify_dictionaries().combine_chunks()
    if column.null_count:
        raise StoreError(f"{path}: {column.null_count} rows have no split; build the store again")
    return column.dictionary.to_pylist(), column.indices.to_numpy()


def _wanted(store: Path, known: Sequence[str], splits: Sequence[str] | None) -> tuple[str, ...]:
    for split in splits or ():
        if split not in known:
            nearest = difflib.get_close_matches(split, known, n=1, cutoff=0.0)[0]
            raise StoreError(
                f"{store}: no split {split!r}; did you mean {nearest!r}? It has: {', '.join(known)}"
            )
    return tuple(known if splits is None else dict.fromkeys(splits))


def _add_label_set(
    path: Path, by: Provenance, adds_CC: np.ndarray, split_N: np.ndarray, tally: Tally
) -> None:
    """Rewrite labels.parquet with the column `by.rule`, one row group at a time, and count into `tally`."""
    with _opened(path, "raw") as file, replacing(path) as scratch:
        if (rows := file.metadata.num_rows) != len(split_N):
            raise StoreError(f"{path}: {rows} rows, the manifest has {len(split_N)}; build the store again")
        with pq.ParquetWriter(scratch, _schema(file.schema_arrow, by), compression="zstd") as writer:
            first = 0
            for table in _row_groups(path, file):
                raw, split_B = pl.Series(values=table["raw"]), split_N[first : first + len(table)]
                wanted = pl.Series(np.isin(split_B, [tally.splits.index(split) for split in by.splits]))
                try:
                    labels = propagate(raw, adds_CC).zip_with(wanted, raw)
                except OntologyError as error:
                    raise StoreError(f"{path}: from row {first} on: {error}") from None
                tally.add(split_B, raw, labels)
                column = labels.to_arrow().cast(LABELS)
                writer.write_table(_with(table, by.rule, column), row_group_size=max(len(table), 1))
                first += len(table)


def _with(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    place = table.schema.get_field_index(name)
    if place < 0:
        return table.append_column(name, column)
    return table.set_column(place, name, column)


def _schema(old: pa.Schema, by: Provenance) -> pa.Schema:
    """The old schema with the new label set's column, and its provenance beside that of the others."""
    metadata = old.metadata or {}
    sources = json.loads(metadata.get(PROVENANCE_KEY, b"{}")) | {by.rule: asdict(by)}
    metadata = metadata | {PROVENANCE_KEY: json.dumps(sources, separators=(",", ":")).encode()}
    return _with(old.empty_table(), by.rule, pa.array([], LABELS)).schema.with_metadata(metadata)
