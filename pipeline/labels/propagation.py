"""Propagation: what a label implies about the classes above it, by rule; labels and scores so completed.

Tally: what propagation changed, counted split by split and class by class, and told as a table.
"""

import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.errors import OntologyError
from pipeline.files import replacing_file
from pipeline.labels.ontology import (
    ClassList,
    Ontology,
    build_label_lists,
    flatten_label_lists,
    known_class_names,
    load_class_list,
    load_ontology,
    sorted_unique_keys,
)

if TYPE_CHECKING:  # stage one needs no torch, and it takes seconds to import
    from torch import Tensor


PropagatedScores = TypeVar("PropagatedScores", np.ndarray, "Tensor")


def rule_relation_CC(
    rule: str = "unambiguous", *, ontology: Ontology | None = None, classes: ClassList | None = None
) -> np.ndarray:
    """What `rule` adds: true at [c, a] where class a (never c itself) is added to a clip labelled c.

    AudioSet's own tree and class list, unless others are given. OntologyError: an unknown rule, or a class
    that the tree lacks.
    """
    if rule not in PROPAGATION_RULES:
        nearest = (difflib.get_close_matches(rule, PROPAGATION_RULES, n=1, cutoff=0.0) or [""])[0]
        raise OntologyError(
            f"unknown rule {rule!r}; did you mean {nearest!r}? There are: {', '.join(PROPAGATION_RULES)}"
        )
    return PROPAGATION_RULES[rule](
        nearest_parents_CC(ontology or load_ontology(), classes or load_class_list())
    )


def nearest_parents_CC(ontology: Ontology, classes: ClassList) -> np.ndarray:
    """True at [c, p] where p is a nearest class above c; nodes that are no classes are looked through."""
    parents_of = ontology.parent_mids()
    if missing := [mid for mid in classes.mids if mid not in parents_of]:
        raise OntologyError(
            f"{len(missing)} of {len(classes)} classes are not in the ontology, such as {missing[0]}; "
            "propagation needs the ontology that the class list was drawn from"
        )
    parents_CC = np.zeros((len(classes), len(classes)), dtype=bool)
    for index, mid in enumerate(classes.mids):
        above = list(parents_of[mid])
        while above:
            nearest = above.pop()
            if nearest in classes.index_of:
                parents_CC[index, classes.index_of[nearest]] = True
            else:
                above.extend(parents_of[nearest])
    return parents_CC


def unambiguous_ancestors(parents_CC: np.ndarray) -> np.ndarray:
    """Climb while there is exactly one parent, stop at none or several (arXiv 2503.21826; 731 pairs)."""
    return all_ancestors(parents_CC & (parents_CC.sum(1, keepdims=True) == 1))


def all_ancestors(parents_CC: np.ndarray) -> np.ndarray:
    """Every class on any way up: each parent counts, even where the sound is only one of them (835 pairs)."""
    reach_CC = parents_CC.astype(np.float32)  # BLAS multiplies floats, ten times faster than booleans
    for _ in range(len(parents_CC).bit_length()):
        reach_CC = np.minimum(reach_CC + reach_CC @ reach_CC, 1)  # squaring doubles how far up we see
    return reach_CC > 0


def dominators(parents_CC: np.ndarray) -> np.ndarray:
    """The classes that every way up passes: what holds whichever of its parents is meant (739 pairs)."""
    itself_CC = np.eye(len(parents_CC), dtype=bool)
    dominators_CC = np.zeros_like(parents_CC)
    for index in np.argsort(all_ancestors(parents_CC).sum(1)):  # parents come before their children
        if parents_CC[index].any():
            dominators_CC[index] = (dominators_CC | itself_CC)[parents_CC[index]].all(0)
    return dominators_CC


def direct_parents(parents_CC: np.ndarray) -> np.ndarray:
    """One step up to every parent, and no further: the one rule that is not its own closure (427 pairs)."""
    return parents_CC


PROPAGATION_RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "unambiguous": unambiguous_ancestors,
    "all-ancestors": all_ancestors,
    "dominators": dominators,
    "direct-parent": direct_parents,
}


def propagate(labels: pl.Series, relation_CC: np.ndarray, *, first_row: int = 0) -> pl.Series:
    """Each row's classes and what the relation adds to them: list<uint16>, sorted, unique, empty if it was.

    Two million rows take about a second: entries become numbers row * C + class, sorted once.
    OntologyError: a null, or an index outside the relation, with its row; `first_row` is the number of the first.
    """
    rows_N, indices = flatten_label_lists(labels, first_row=first_row)
    class_N = indices.cast(pa.int64()).to_numpy(zero_copy_only=False)
    classes = len(relation_CC)
    if (odd_N := np.flatnonzero((class_N < 0) | (class_N >= classes))).size:
        row, index = first_row + rows_N[odd_N[0]], class_N[odd_N[0]]
        raise OntologyError(f"row {row}: class index {index}, expected 0 to {classes - 1}")
    keys = [rows_N * classes + class_N]
    for added_C in _nth_added_classes(relation_CC):
        more_N = added_C[class_N] >= 0
        rows_N, class_N = rows_N[more_N], class_N[more_N]
        keys.append(rows_N * classes + added_C[class_N])
    keys_N = sorted_unique_keys(np.concatenate(keys))
    propagated = build_label_lists(
        keys_N // classes, pa.array((keys_N % classes).astype(np.uint16)), count=len(labels)
    )
    return propagated.alias(labels.name)


def propagate_scores(scores_BC: PropagatedScores, relation_CC: np.ndarray) -> PropagatedScores:
    """Each class's score, or that of the best class that implies it: right for probabilities and logits.

    A numpy array, or a torch tensor on any device (differentiable); needs memory for B x (C + pairs).
    """
    if scores_BC.shape[1] != len(relation_CC):
        raise OntologyError(f"scores of {scores_BC.shape[1]} classes, expected {len(relation_CC)}")
    ancestor_N, child_N = np.nonzero(relation_CC.T)
    if isinstance(scores_BC, np.ndarray):
        best_BC = scores_BC.copy()
        ancestors, first_N = np.unique(ancestor_N, return_index=True)
        if ancestors.size:  # reduceat knows no empty list
            implied_BN = np.maximum.reduceat(scores_BC[:, child_N], first_N, axis=1)
            best_BC[:, ancestors] = np.maximum(best_BC[:, ancestors], implied_BN)
        return best_BC
    import torch

    index_N = torch.as_tensor(ancestor_N, device=scores_BC.device)
    return scores_BC.scatter_reduce(1, index_N.expand(len(scores_BC), -1), scores_BC[:, child_N], "amax")


def _nth_added_classes(relation_CC: np.ndarray) -> Iterator[np.ndarray]:
    """The first class that is added to each class (-1: none), then the second, and so on."""
    added_CC = np.sort(np.where(relation_CC, np.arange(len(relation_CC)), -1), axis=1)[:, ::-1]
    yield from added_CC[:, : relation_CC.sum(1).max()].T


GAINING_CLASSES_SHOWN = 15

OUTSIDE_CLASSES_SHOWN = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitChange:
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
class ClassGain:
    """A class that stands on more clips than before."""

    mid: str
    name: str
    clips_before: int
    clips_after: int


@dataclass(frozen=True, slots=True)
class OutsideClass:
    """A class id that labels have and the class list has not: kept aside, in no label set."""

    mid: str
    name: str | None  # where the ontology or a list of other classes knows it
    clips: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelProvenance:
    """Where a propagated label set comes from."""

    rule: str
    ontology: str  # its digest
    classes: str  # the digest of the class list that indices point into
    pairs: int  # (class, class added for it)
    splits: tuple[str, ...]  # those propagated; the clips of others keep their raw labels in this set
    version: str

    @classmethod
    def for_rule(
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
class PropagationSummary:
    """A label set that was added, and how it differs from `raw`."""

    provenance: LabelProvenance
    changes: tuple[SplitChange, ...]  # one a split, then `all`
    gainers: tuple[ClassGain, ...]  # biggest gain first
    outside: tuple[OutsideClass, ...]  # on most clips first

    def save_json(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        with replacing_file(path) as scratch:
            scratch.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


class LabelCounts:
    """Counts labels before and after, split by split, over any number of batches."""

    def __init__(self, splits: Sequence[str], classes: ClassList) -> None:
        self.splits, self.classes = tuple(splits), classes
        self.clips_N, self.changed_clips_N = np.zeros((2, len(splits)), dtype=np.int64)
        self.labels_before_NC, self.labels_after_NC = np.zeros((2, len(splits), len(classes)), dtype=np.int64)
        self.outside_counts: Counter[str] = Counter()

    def count_batch(
        self, split_B: np.ndarray, before: pl.Series, after: pl.Series, outside: pl.Series | None = None
    ) -> None:
        """Count clips: the index of each one's split, its classes, each once, before and after, and ids outside."""
        if outside is not None:
            counted = outside.explode().drop_nulls().value_counts()
            self.outside_counts.update(dict(counted.iter_rows()))
        changed_B = (before.list.len() != after.list.len()).to_numpy()
        self.clips_N += np.bincount(split_B, minlength=len(self.splits))
        self.changed_clips_N += np.bincount(split_B[changed_B], minlength=len(self.splits))
        for count_NC, labels in ((self.labels_before_NC, before), (self.labels_after_NC, after)):
            rows_N, class_N = flatten_label_lists(labels)
            cells_N = split_B[rows_N] * len(self.classes) + class_N.to_numpy(zero_copy_only=False)
            count_NC += np.bincount(cells_N, minlength=count_NC.size).reshape(count_NC.shape)

    def change_of_splits(self, name: str, splits: Sequence[str]) -> SplitChange:
        """The counts of some splits together."""
        picked = [self.splits.index(split) for split in splits]
        clips = int(self.clips_N[picked].sum())
        before_C, after_C = self.labels_before_NC[picked].sum(0), self.labels_after_NC[picked].sum(0)
        before, after = int(before_C.sum()), int(after_C.sum())
        return SplitChange(
            split=name,
            clips=clips,
            clips_changed=int(self.changed_clips_N[picked].sum()),
            labels_before=before,
            labels_after=after,
            labels_added=after - before,
            mean_before=round(before / max(clips, 1), 6),
            mean_after=round(after / max(clips, 1), 6),
            classes_gaining=int((after_C > before_C).sum()),
        )

    def summary(self, provenance: LabelProvenance, ontology: Ontology) -> PropagationSummary:
        """What was counted, told: of each split, and of all."""
        changes = [self.change_of_splits(split, [split]) for split in self.splits]
        names = known_class_names() | {node.mid: node.name for node in ontology.nodes}
        often = sorted(self.outside_counts.items(), key=lambda item: (-item[1], item[0]))
        return PropagationSummary(
            provenance=provenance,
            changes=(*changes, self.change_of_splits("all", self.splits)),
            gainers=self.gaining_classes(),
            outside=tuple(OutsideClass(mid, names.get(mid), clips) for mid, clips in often),
        )

    def gaining_classes(self) -> tuple[ClassGain, ...]:
        """The classes that stand on more clips than before, the biggest gain first."""
        before_C, after_C = self.labels_before_NC.sum(0), self.labels_after_NC.sum(0)
        order = [
            index
            for index in np.argsort(before_C - after_C, kind="stable")
            if after_C[index] > before_C[index]
        ]
        mids, names = self.classes.mids, self.classes.names
        return tuple(ClassGain(mids[i], names[i], int(before_C[i]), int(after_C[i])) for i in order)


def propagation_table(summary: PropagationSummary) -> str:
    """What changed, to be read: a line per split, then the biggest gainers by name."""
    by = summary.provenance
    head = f"label set {by.rule!r}: {by.pairs} class pairs of ontology {by.ontology}"
    if untouched := [change.split for change in summary.changes[:-1] if change.split not in by.splits]:
        head += f"; raw labels kept in: {', '.join(untouched)}"
    return "\n".join(
        [
            head,
            "",
            *_change_lines(summary.changes),
            "",
            *_gaining_class_lines(summary.gainers),
            *_outside_class_lines(summary.outside),
        ]
    )


def _change_lines(changes: Sequence[SplitChange]) -> Iterator[str]:
    width = max(16, *(len(change.split) + 1 for change in changes))
    yield f"{'':<{width + 32}}{'labels':>10}{'clips':>11}{'classes':>9}"
    yield f"{'split':<{width}}{'clips':>10}{'mean labels':>22}{'added':>10}{'changed':>11}{'gaining':>9}"
    for change in changes:
        means = f"{change.mean_before:.6f} -> {change.mean_after:.6f}"
        counts = f"{change.labels_added:>10,}{change.clips_changed:>11,}{change.classes_gaining:>9}"
        yield f"{change.split:<{width}}{change.clips:>10,}{means:>22}{counts}"


def _gaining_class_lines(gainers: Sequence[ClassGain]) -> Iterator[str]:
    yield f"{'biggest gainers':<36}{'clips before':>14}{'after':>11}{'added':>11}"
    for gainer in gainers[:GAINING_CLASSES_SHOWN]:
        before, after = gainer.clips_before, gainer.clips_after
        yield f"{gainer.name[:35]:<36}{before:>14,}{after:>11,}{after - before:>11,}"
    if len(gainers) > GAINING_CLASSES_SHOWN:
        yield f"and {len(gainers) - GAINING_CLASSES_SHOWN} more classes"


def _outside_class_lines(outside: Sequence[OutsideClass]) -> Iterator[str]:
    if not outside:
        return
    yield ""
    yield f"{'outside the class list, kept aside':<50}{'clips':>11}"
    for odd in outside[:OUTSIDE_CLASSES_SHOWN]:
        told = f"{odd.name} ({odd.mid})" if odd.name else f"{odd.mid}, known to no list"
        yield f"{told[:49]:<50}{odd.clips:>11,}"
    if len(outside) > OUTSIDE_CLASSES_SHOWN:
        yield f"and {len(outside) - OUTSIDE_CLASSES_SHOWN} more ids"
