"""The labels of a store: ids to class indices, propagation up the class tree, and what that changed."""

import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError, OntologyError, StoreError
from pipeline.files import replacing
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
    classes_gaining: int

    @property
    def labels_added(self) -> int:
        return self.labels_after - self.labels_before

    @property
    def mean_before(self) -> float:
        return self.labels_before / max(self.clips, 1)

    @property
    def mean_after(self) -> float:
        return self.labels_after / max(self.clips, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
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

    def to_json(self) -> dict[str, object]:
        derived = ("labels_added", "mean_before", "mean_after")
        return {
            **asdict(self.provenance),
            "changes": [
                asdict(change) | {name: round(getattr(change, name), 6) for name in derived}
                for change in self.changes
            ],
            "gainers": [asdict(gainer) for gainer in self.gainers],
        }


class Tally:
    """Counts labels before and after, split by split, from any number of batches."""

    def __init__(self, splits: Sequence[str], classes: int) -> None:
        self.splits = tuple(splits)
        self.clips_N, self.changed_N = np.zeros((2, len(splits)), dtype=np.int64)
        self.before_NC, self.after_NC = np.zeros((2, len(splits), classes), dtype=np.int64)

    def add(self, split_N: np.ndarray, before: pl.Series, after: pl.Series) -> None:
        """Count clips: the index of each one's split, its classes (each once) before and after."""
        changed_N = (before.list.len() != after.list.len()).to_numpy()
        self.clips_N += np.bincount(split_N, minlength=len(self.splits))
        self.changed_N += np.bincount(split_N[changed_N], minlength=len(self.splits))
        self.before_NC += self._marks_NC(split_N, before)
        self.after_NC += self._marks_NC(split_N, after)

    def _marks_NC(self, split_N: np.ndarray, labels: pl.Series) -> np.ndarray:
        rows_N, class_N = entries(labels)
        cells_N = split_N[rows_N] * self.before_NC.shape[1] + class_N.to_numpy(zero_copy_only=False)
        return np.bincount(cells_N, minlength=self.before_NC.size).reshape(self.before_NC.shape)

    def change(self, name: str, splits: Sequence[str]) -> Change:
        """The counts of some splits together."""
        picked = [self.splits.index(split) for split in splits]
        before_C, after_C = self.before_NC[picked].sum(0), self.after_NC[picked].sum(0)
        return Change(
            split=name,
            clips=int(self.clips_N[picked].sum()),
            clips_changed=int(self.changed_N[picked].sum()),
            labels_before=int(before_C.sum()),
            labels_after=int(after_C.sum()),
            classes_gaining=int((after_C > before_C).sum()),
        )

    def changes(self) -> tuple[Change, ...]:
        """One per split, then all of them together."""
        return (*(self.change(split, [split]) for split in self.splits), self.change("all", self.splits))

    def gainers(self, classes: ClassList) -> tuple[Gainer, ...]:
        """The classes that stand on more clips than before, the biggest gain first."""
        before_C, after_C = self.before_NC.sum(0), self.after_NC.sum(0)
        order_C = np.argsort(before_C - after_C, kind="stable")
        return tuple(
            Gainer(
                mid=classes.mids[index],
                name=classes.names[index],
                clips_before=int(before_C[index]),
                clips_after=int(after_C[index]),
            )
            for index in order_C[after_C[order_C] > before_C[order_C]]
        )


def propagate_labels(
    store_path: Path | str,
    rule: str = "unambiguous",
    splits: Sequence[str] | None = None,
    *,
    ontology: Ontology | None = None,
) -> Propagation:
    """Add to a store, beside its raw labels, the label set that `rule` makes of them; again changes no byte.

    The set is named as its rule and replaces an older one of that name. It covers every row: in splits that are
    not asked for it holds the raw labels. What changed is returned, and kept as `propagation-<rule>.json`.
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
    tally = Tally(known, len(classes))
    _add_label_set(store / "labels.parquet", provenance, adds_CC, split_N, tally)
    done = Propagation(provenance=provenance, changes=tally.changes(), gainers=tally.gainers(classes))
    with replacing(store / f"propagation-{rule}.json") as scratch:
        scratch.write_text(json.dumps(done.to_json(), indent=1) + "\n", encoding="utf-8")
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
    odd = pl.DataFrame({"row": rows_N[~known_N], "mid": ids.filter(pa.array(~known_N))}).unique().sort("row", "mid")
    return (
        lists(keys_N // len(classes), class_N, count=len(mids)).alias("raw"),
        lists(odd["row"].to_numpy(), odd["mid"].to_arrow(), count=len(mids)).alias("outside"),
    )


def table(done: Propagation) -> str:
    """What changed, to be read: a line per split, then the biggest gainers by name."""
    by = done.provenance
    head = f"label set {by.rule!r}: {by.pairs} class pairs, ontology {by.ontology}, splits {', '.join(by.splits)}"
    return "\n".join([head, "", *_split_lines(done.changes), "", *_gainer_lines(done.gainers)])
