"""Tally: what propagation changed, counted split by split and class by class, and told as a table."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Self

import numpy as np
import polars as pl

from pipeline.files import replacing
from pipeline.ontology import ClassList, Ontology
from pipeline.propagation import entries
from pipeline.vocabularies import known_names

GAINERS_SHOWN = 15
OUTSIDE_SHOWN = 10


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


@dataclass(frozen=True, slots=True)
class Outside:
    """A class id that labels have and the class list has not: kept aside, in no label set."""

    mid: str
    name: str | None  # where the ontology or a list of other classes knows it
    clips: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where a propagated label set comes from."""

    rule: str
    ontology: str  # its digest
    classes: str  # the digest of the class list that indices point into
    pairs: int  # (class, class added for it)
    splits: tuple[str, ...]  # those propagated; the clips of others keep their raw labels in this set
    version: str

    @classmethod
    def of(
        cls, rule: str, ontology: Ontology, classes: ClassList, adds_CC: np.ndarray, splits: tuple[str, ...]
    ) -> Self:
        """Of a label set that this version makes."""
        return cls(
            rule=rule,
            ontology=ontology.digest,
            classes=classes.digest,
            pairs=int(adds_CC.sum()),
            splits=splits,
            version=f"ajepa {version('ajepa')}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Propagation:
    """A label set that was added, and how it differs from `raw`."""

    provenance: Provenance
    changes: tuple[Change, ...]  # one a split, then `all`
    gainers: tuple[Gainer, ...]  # biggest gain first
    outside: tuple[Outside, ...]  # on most clips first

    def save(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        with replacing(path) as scratch:
            scratch.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


class Tally:
    """Counts labels before and after, split by split, over any number of batches."""

    def __init__(self, splits: Sequence[str], classes: ClassList) -> None:
        self.splits, self.classes = tuple(splits), classes
        self.clips_N, self.changed_N = np.zeros((2, len(splits)), dtype=np.int64)
        self.before_NC, self.after_NC = np.zeros((2, len(splits), len(classes)), dtype=np.int64)
        self.outside: Counter[str] = Counter()

    def add(
        self, split_B: np.ndarray, before: pl.Series, after: pl.Series, outside: pl.Series | None = None
    ) -> None:
        """Count clips: the index of each one's split, its classes, each once, before and after, and ids outside."""
        if outside is not None:
            counted = outside.explode().drop_nulls().value_counts()
            self.outside.update(dict(counted.iter_rows()))
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

    def done(self, by: Provenance, ontology: Ontology) -> Propagation:
        """What was counted, told: of each split, and of all."""
        changes = [self.change(split, [split]) for split in self.splits]
        names = known_names() | {node.mid: node.name for node in ontology.nodes}
        often = sorted(self.outside.items(), key=lambda item: (-item[1], item[0]))
        return Propagation(
            provenance=by,
            changes=(*changes, self.change("all", self.splits)),
            gainers=self.gainers(),
            outside=tuple(Outside(mid, names.get(mid), clips) for mid, clips in often),
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


def table(done: Propagation) -> str:
    """What changed, to be read: a line per split, then the biggest gainers by name."""
    by = done.provenance
    head = f"label set {by.rule!r}: {by.pairs} class pairs of ontology {by.ontology}"
    if untouched := [change.split for change in done.changes[:-1] if change.split not in by.splits]:
        head += f"; raw labels kept in: {', '.join(untouched)}"
    return "\n".join(
        [
            head,
            "",
            *_split_lines(done.changes),
            "",
            *_gainer_lines(done.gainers),
            *_outside_lines(done.outside),
        ]
    )


def _split_lines(changes: Sequence[Change]) -> Iterator[str]:
    width = max(16, *(len(change.split) + 1 for change in changes))
    yield f"{'':<{width + 32}}{'labels':>10}{'clips':>11}{'classes':>9}"
    yield f"{'split':<{width}}{'clips':>10}{'mean labels':>22}{'added':>10}{'changed':>11}{'gaining':>9}"
    for change in changes:
        means = f"{change.mean_before:.6f} -> {change.mean_after:.6f}"
        counts = f"{change.labels_added:>10,}{change.clips_changed:>11,}{change.classes_gaining:>9}"
        yield f"{change.split:<{width}}{change.clips:>10,}{means:>22}{counts}"


def _gainer_lines(gainers: Sequence[Gainer]) -> Iterator[str]:
    yield f"{'biggest gainers':<36}{'clips before':>14}{'after':>11}{'added':>11}"
    for gainer in gainers[:GAINERS_SHOWN]:
        before, after = gainer.clips_before, gainer.clips_after
        yield f"{gainer.name[:35]:<36}{before:>14,}{after:>11,}{after - before:>11,}"
    if len(gainers) > GAINERS_SHOWN:
        yield f"and {len(gainers) - GAINERS_SHOWN} more classes"


def _outside_lines(outside: Sequence[Outside]) -> Iterator[str]:
    if not outside:
        return
    yield ""
    yield f"{'outside the class list, kept aside':<50}{'clips':>11}"
    for odd in outside[:OUTSIDE_SHOWN]:
        told = f"{odd.name} ({odd.mid})" if odd.name else f"{odd.mid}, known to no list"
        yield f"{told[:49]:<50}{odd.clips:>11,}"
    if len(outside) > OUTSIDE_SHOWN:
        yield f"and {len(outside) - OUTSIDE_SHOWN} more ids"
