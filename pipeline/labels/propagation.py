"""Label propagation: the rules, their application to labels and scores, and a summary of the changes."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np
import polars as pl

from pipeline.errors import OntologyError
from pipeline.files import replacing_file
from pipeline.labels.ontology import (
    ClassList,
    Ontology,
    flatten_class_indices,
    flatten_label_lists,
    known_class_names,
    label_lists_from_keys,
    load_class_list,
    load_ontology,
    sorted_unique_keys,
)
from pipeline.messages import suggest_known

if TYPE_CHECKING:  # stage one needs no torch, which takes seconds to import
    from torch import Tensor

PropagatedScores = TypeVar("PropagatedScores", np.ndarray, "Tensor")

GAINING_CLASSES_SHOWN = 15

OUTSIDE_CLASSES_SHOWN = 10


# Rules: the classes that a label implies.


def rule_relation_CC(
    rule: str = "unambiguous", *, ontology: Ontology | None = None, classes: ClassList | None = None
) -> np.ndarray:
    """Return the relation of a rule, bool `[C, C]`: true at [c, a] if class a (never c) is added to a clip labelled c.

    The defaults are AudioSet's own tree and class list. OntologyError if the rule is unknown, or if the tree lacks a
    class.
    """
    if rule not in PROPAGATION_RULES:
        raise OntologyError(f"unknown rule {rule!r}; {suggest_known(rule, PROPAGATION_RULES)}")
    parents_CC = nearest_parents_CC(ontology or load_ontology(), classes or load_class_list())
    return PROPAGATION_RULES[rule](parents_CC)


def nearest_parents_CC(ontology: Ontology, classes: ClassList) -> np.ndarray:
    """Return a mask, true at [c, p] if p is a nearest class above c; nodes outside the class list are skipped."""
    parents_of = ontology.parent_mids()
    if missing := [mid for mid in classes.mids if mid not in parents_of]:
        raise OntologyError(
            f"{len(missing)} of {len(classes)} classes are not in the ontology, such as {missing[0]}; "
            "propagation needs the ontology that the class list was drawn from"
        )

    # From every class, walk up each path until it reaches a class of the list.
    parents_CC = np.zeros((len(classes), len(classes)), dtype=bool)
    for index, mid in enumerate(classes.mids):
        to_visit = list(parents_of[mid])
        while to_visit:
            above = to_visit.pop()
            if above in classes.index_of:
                parents_CC[index, classes.index_of[above]] = True
            else:
                to_visit.extend(parents_of[above])
    return parents_CC


def unambiguous_ancestors(parents_CC: np.ndarray) -> np.ndarray:
    """Return the ancestors up to the first class with no parent or several (arXiv 2503.21826; 731 pairs)."""
    # Remove the links of classes with several parents, then follow the other links to the end.
    return all_ancestors(parents_CC & (parents_CC.sum(1, keepdims=True) == 1))


def all_ancestors(parents_CC: np.ndarray) -> np.ndarray:
    """Return the classes on any path up, through every parent, even if only one of them is meant (835 pairs)."""
    # BLAS multiplies floats, ten times faster than booleans. Each squaring doubles the length of the paths, until no
    # longer path leads to a new class.
    reach_CC = parents_CC.astype(np.float32)
    while True:
        longer_CC = np.minimum(reach_CC + reach_CC @ reach_CC, 1)
        if np.array_equal(longer_CC, reach_CC):
            return reach_CC > 0
        reach_CC = longer_CC


def dominators(parents_CC: np.ndarray) -> np.ndarray:
    """Return the classes on every path up, which apply whichever parent is meant (739 pairs)."""
    itself_CC = np.eye(len(parents_CC), dtype=bool)
    dominators_CC = np.zeros_like(parents_CC)

    # Sorted by the number of ancestors, parents come before their children.
    for index in np.argsort(all_ancestors(parents_CC).sum(1)):
        if parents_CC[index].any():
            dominators_CC[index] = (dominators_CC | itself_CC)[parents_CC[index]].all(0)
    return dominators_CC


def direct_parents(parents_CC: np.ndarray) -> np.ndarray:
    """Return only the direct parents; applying this rule twice can add more classes (427 pairs)."""
    return parents_CC


# The names are used on the command line and in the provenance of label sets, which are named after their rules.
PROPAGATION_RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "unambiguous": unambiguous_ancestors,
    "all-ancestors": all_ancestors,
    "dominators": dominators,
    "direct-parent": direct_parents,
}


# Labels and scores completed by a rule.


def propagate(labels: pl.Series, relation_CC: np.ndarray, *, first_row: int = 0) -> pl.Series:
    """Return each row's classes and all classes that the relation adds: list<uint16>, sorted, unique, may be empty.

    Two million rows take about a second: labels become keys row * classes + class, which are sorted once.
    OntologyError for a null, or an index outside the relation; it names the row, where `first_row` is the number of
    the first row.
    """
    class_count = len(relation_CC)
    rows_N, class_N = flatten_class_indices(labels, class_count, first_row=first_row)
    keys = [rows_N * class_count + class_N]

    # Round n adds the n-th implied class of every label that implies at least n classes.
    for added_C in _nth_added_classes(relation_CC):
        implies_N = added_C[class_N] >= 0
        rows_N = rows_N[implies_N]
        class_N = class_N[implies_N]
        keys.append(rows_N * class_count + added_C[class_N])

    keys_N = sorted_unique_keys(np.concatenate(keys))
    return label_lists_from_keys(keys_N, class_count, row_count=len(labels)).alias(labels.name)


def propagate_scores(scores_BC: PropagatedScores, relation_CC: np.ndarray) -> PropagatedScores:
    """Return for each class the maximum of its own score and the scores of the classes that imply it.

    Valid for probabilities and for logits. Takes a numpy array, or a torch tensor on any device (differentiable);
    needs memory for B x (C + pairs).
    """
    if scores_BC.shape[1] != len(relation_CC):
        raise OntologyError(f"scores of {scores_BC.shape[1]} classes, expected {len(relation_CC)}")
    ancestor_N, child_N = np.nonzero(relation_CC.T)

    # numpy: the pairs of one ancestor are adjacent, so that `reduceat` takes the maximum of each group.
    if isinstance(scores_BC, np.ndarray):
        best_BC = scores_BC.copy()
        ancestors, first_N = np.unique(ancestor_N, return_index=True)
        if ancestors.size:  # reduceat refuses an empty list of groups
            implied_BN = np.maximum.reduceat(scores_BC[:, child_N], first_N, axis=1)
            best_BC[:, ancestors] = np.maximum(best_BC[:, ancestors], implied_BN)
        return best_BC

    # torch: the same maximum as one scatter.
    import torch

    index_N = torch.as_tensor(ancestor_N, device=scores_BC.device)
    return scores_BC.scatter_reduce(1, index_N.expand(len(scores_BC), -1), scores_BC[:, child_N], "amax")


def _nth_added_classes(relation_CC: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the first class that is added to each class (-1: none), then the second, and so on."""
    # In descending order each row begins with the classes that it adds; -1 fills the rest.
    added_CC = np.sort(np.where(relation_CC, np.arange(len(relation_CC)), -1), axis=1)[:, ::-1]
    yield from added_CC[:, : relation_CC.sum(1).max()].T


# The provenance of a label set, and a summary of its changes.


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelProvenance:
    """The provenance of a propagated label set."""

    rule: str
    ontology: str  # digest of the ontology
    classes: str  # digest of the class list of the indices
    pairs: int  # number of pairs (class, class that is added for it)
    splits: tuple[str, ...]  # the propagated splits; clips of other splits have their raw labels in this set
    version: str

    @classmethod
    def for_rule(
        cls, rule: str, ontology: Ontology, classes: ClassList, adds_CC: np.ndarray, splits: tuple[str, ...]
    ) -> Self:
        """Return the provenance of a label set that this version of the program makes."""
        return cls(
            rule=rule,
            ontology=ontology.digest,
            classes=classes.digest,
            pairs=int(adds_CC.sum()),
            splits=splits,
            version=f"ajepa {version('ajepa')}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitChange:
    """The changes in the clips of one split, including clips without audio; or of all splits, named `all`."""

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
    """A class that more clips have after propagation than before."""

    mid: str
    name: str
    clips_before: int
    clips_after: int


@dataclass(frozen=True, slots=True)
class OutsideClass:
    """A class id in the labels that is not in the class list, and so in no label set."""

    mid: str
    name: str | None  # None if neither the ontology nor a list of other classes has the id
    clips: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PropagationSummary:
    """A label set that was added, and how it differs from `raw`.

    good_clips, good_gainers  the number of good clips in a store, and the classes that gain some of them; None where no
                              store tells which clips are good
    """

    provenance: LabelProvenance
    changes: tuple[SplitChange, ...]  # one per split, then `all`
    gainers: tuple[ClassGain, ...]  # biggest gain first
    outside: tuple[OutsideClass, ...]  # most clips first
    good_clips: int | None = None
    good_gainers: tuple[ClassGain, ...] | None = None

    def save_json(self, path: Path) -> None:
        """Write the summary as JSON, whole or not at all, without the good clips: a later build may find more."""
        values = asdict(self)
        del values["good_clips"], values["good_gainers"]
        with replacing_file(path) as scratch:
            scratch.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


class LabelCounts:
    """Counts clips and labels before and after propagation, split by split, over any number of batches."""

    def __init__(self, splits: Sequence[str], classes: ClassList) -> None:
        self.splits = tuple(splits)
        self.classes = classes
        self.clips_N, self.changed_clips_N = np.zeros((2, len(splits)), dtype=np.int64)
        self.labels_before_NC, self.labels_after_NC = np.zeros((2, len(splits), len(classes)), dtype=np.int64)
        self.outside_counts: Counter[str] = Counter()

    def count_batch(
        self, split_B: np.ndarray, before: pl.Series, after: pl.Series, outside: pl.Series | None = None
    ) -> None:
        """Count the clips of a batch.

        split_B        the index of each clip's split
        before, after  each clip's class indices, every class once
        outside        each clip's class ids that the class list lacks
        """
        # Ids outside the class list are counted over all splits together.
        if outside is not None:
            id_counts = outside.explode().drop_nulls().value_counts()
            self.outside_counts.update(dict(id_counts.iter_rows()))

        # Propagation only adds labels, so that a clip has changed if it has more of them.
        changed_B = (before.list.len() != after.list.len()).to_numpy()
        self.clips_N += np.bincount(split_B, minlength=len(self.splits))
        self.changed_clips_N += np.bincount(split_B[changed_B], minlength=len(self.splits))

        # Labels, split by split and class by class.
        for count_NC, labels in ((self.labels_before_NC, before), (self.labels_after_NC, after)):
            rows_N, class_N = flatten_label_lists(labels)
            cells_N = split_B[rows_N] * len(self.classes) + class_N.to_numpy(zero_copy_only=False)
            count_NC += np.bincount(cells_N, minlength=count_NC.size).reshape(count_NC.shape)

    def summary(self, provenance: LabelProvenance, ontology: Ontology) -> PropagationSummary:
        """Return all counts as one summary; `ontology` gives the names of classes outside the class list."""
        changes = [self.change_of_splits(split, [split]) for split in self.splits]
        names = known_class_names() | {node.mid: node.name for node in ontology.nodes}
        most_frequent = sorted(self.outside_counts.items(), key=lambda item: (-item[1], item[0]))
        return PropagationSummary(
            provenance=provenance,
            changes=(*changes, self.change_of_splits("all", self.splits)),
            gainers=self.gaining_classes(),
            outside=tuple(OutsideClass(mid, names.get(mid), clips) for mid, clips in most_frequent),
        )

    def change_of_splits(self, name: str, splits: Sequence[str]) -> SplitChange:
        """Return the summed counts of `splits`, as a change with the given name."""
        places = [self.splits.index(split) for split in splits]
        clips = int(self.clips_N[places].sum())
        before_C = self.labels_before_NC[places].sum(0)
        after_C = self.labels_after_NC[places].sum(0)
        labels_before, labels_after = int(before_C.sum()), int(after_C.sum())
        return SplitChange(
            split=name,
            clips=clips,
            clips_changed=int(self.changed_clips_N[places].sum()),
            labels_before=labels_before,
            labels_after=labels_after,
            labels_added=labels_after - labels_before,
            mean_before=round(labels_before / max(clips, 1), 6),
            mean_after=round(labels_after / max(clips, 1), 6),
            classes_gaining=int((after_C > before_C).sum()),
        )

    def gaining_classes(self) -> tuple[ClassGain, ...]:
        """Return the classes that more clips have than before, the biggest gain first."""
        before_C = self.labels_before_NC.sum(0)
        after_C = self.labels_after_NC.sum(0)

        # The stable sort leaves equal gains in the order of the classes.
        order = np.argsort(before_C - after_C, kind="stable")
        return tuple(
            ClassGain(
                self.classes.mids[index], self.classes.names[index], int(before_C[index]), int(after_C[index])
            )
            for index in order
            if after_C[index] > before_C[index]
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelSetMaker:
    """Makes one label set batch by batch, and counts what changes, in a store also among its good clips alone."""

    provenance: LabelProvenance
    adds_CC: np.ndarray  # the relation of the rule
    counts: LabelCounts
    good_counts: LabelCounts | None = None

    def propagate_batch(
        self,
        raw: pl.Series,
        split_B: np.ndarray,
        outside: pl.Series | None = None,
        *,
        is_good_B: np.ndarray | None = None,
        first_row: int = 0,
    ) -> pl.Series:
        """Return the labels of a batch after propagation, and count them; other splits keep their raw labels.

        The arguments and the OntologyError are those of `LabelCounts.count_batch` and `propagate`; `is_good_B` says
        which clips `good_counts` counts.
        """
        # Propagate all rows, which is fast, then restore the raw labels in the other splits.
        requested = [self.counts.splits.index(split) for split in self.provenance.splits]
        is_requested_B = pl.Series(np.isin(split_B, requested))
        labels = propagate(raw, self.adds_CC, first_row=first_row).zip_with(is_requested_B, raw)
        self.counts.count_batch(split_B, raw, labels, outside)
        if self.good_counts is not None and is_good_B is not None:
            is_good = pl.Series(is_good_B)
            self.good_counts.count_batch(split_B[is_good_B], raw.filter(is_good), labels.filter(is_good))
        return labels

    def summary(self, ontology: Ontology) -> PropagationSummary:
        """Return all counts as one summary, as `LabelCounts.summary` does."""
        summary = self.counts.summary(self.provenance, ontology)
        if self.good_counts is None:
            return summary
        return replace(
            summary,
            good_clips=int(self.good_counts.clips_N.sum()),
            good_gainers=self.good_counts.gaining_classes(),
        )


# The changes as a table.


def propagation_table(summary: PropagationSummary) -> str:
    """Return the changes as text: a line per split, then the classes that gained most, then ids outside the list.

    Where it is known which clips are good, the gains of classes are counted among these, on which models are trained.
    """
    provenance = summary.provenance
    head = f"label set {provenance.rule!r}: {provenance.pairs} class pairs of ontology {provenance.ontology}"
    if untouched := [
        change.split for change in summary.changes[:-1] if change.split not in provenance.splits
    ]:
        head += f"; raw labels kept in: {', '.join(untouched)}"

    rows = f"counts are of all {summary.changes[-1].clips:,} listed rows, with a sound or without"
    if summary.good_clips is not None:
        rows += f"; {summary.good_clips:,} are good"

    # Three tables, with a blank line between them.
    lines = [
        head,
        rows,
        "",
        *_change_lines(summary.changes),
        "",
        *_gaining_class_lines(summary),
        *_outside_class_lines(summary.outside),
    ]
    return "\n".join(lines)


def _change_lines(changes: Sequence[SplitChange]) -> Iterator[str]:
    width = max(16, *(len(change.split) + 1 for change in changes))
    yield f"{'':<{width + 32}}{'labels':>10}{'clips':>11}{'classes':>9}"
    yield f"{'split':<{width}}{'clips':>10}{'mean labels':>22}{'added':>10}{'changed':>11}{'gaining':>9}"
    for change in changes:
        means = f"{change.mean_before:.6f} -> {change.mean_after:.6f}"
        counts = f"{change.labels_added:>10,}{change.clips_changed:>11,}{change.classes_gaining:>9}"
        yield f"{change.split:<{width}}{change.clips:>10,}{means:>22}{counts}"


def _gaining_class_lines(summary: PropagationSummary) -> Iterator[str]:
    gainers, title = summary.gainers, "biggest gainers"
    if summary.good_gainers is not None:
        gainers, title = summary.good_gainers, "biggest gainers of good clips"
    yield f"{title:<36}{'clips before':>14}{'after':>11}{'added':>11}"
    for gainer in gainers[:GAINING_CLASSES_SHOWN]:
        before, after = gainer.clips_before, gainer.clips_after
        yield f"{gainer.name[:35]:<36}{before:>14,}{after:>11,}{after - before:>11,}"
    if len(gainers) > GAINING_CLASSES_SHOWN:
        yield f"and {len(gainers) - GAINING_CLASSES_SHOWN} more classes"


def _outside_class_lines(outside: Sequence[OutsideClass]) -> Iterator[str]:
    if not outside:
        return
    yield ""
    yield f"{'ids outside the class list':<50}{'clips':>11}"
    for entry in outside[:OUTSIDE_CLASSES_SHOWN]:
        label = f"{entry.name} ({entry.mid})" if entry.name else f"{entry.mid}, in no known list"
        yield f"{label[:49]:<50}{entry.clips:>11,}"
    if len(outside) > OUTSIDE_CLASSES_SHOWN:
        yield f"and {len(outside) - OUTSIDE_CLASSES_SHOWN} more ids"
