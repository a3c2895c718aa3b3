"""The labels that raw labels imply by an ontology, and the label sets that lack implied labels."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import polars as pl

from pipeline.labels.ontology import ClassList, Ontology, flatten_class_indices, sorted_unique_keys
from pipeline.labels.propagation import PROPAGATION_RULES, all_ancestors, nearest_parents_CC

# The maximum number of classes that are compared with each other, because the table is square.
MAX_COMPARED_CLASSES = 4_096


@dataclass(frozen=True, slots=True)
class UnmetImplication:
    """A class, a class that it implies, and the number of clips that have only the first of the two."""

    name: str
    implied: str
    clips: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelContradictions:
    """The labels that a label set lacks although raw labels imply them by a rule; `why_not` if this cannot be checked.

    The raw set is checked in the clips in use. A propagated set is checked in all clips, because a missing label is a
    fault of the file.
    """

    label_set: str
    rule: str | None
    why_not: str | None = None
    pairs: tuple[UnmetImplication, ...] = ()  # most clips first
    pairs_in_all: int = 0  # number of pairs, including those not in `pairs`
    clips: int = 0  # number of clips that lack a label
    labels_lacking: int = 0  # number of missing labels, including raw labels that a propagated set has lost
    labels_beyond: int = (
        0  # number of labels of a propagated set that are neither raw nor implied by a raw label
    )

    @property
    def is_stale(self) -> bool:
        """Whether this is a propagated set that differs from the result of its rule."""
        return self.label_set != "raw" and bool(self.labels_lacking or self.labels_beyond)


@dataclass(frozen=True, slots=True, eq=False)
class OntologySubset:
    """The K classes of a class list that are in an ontology.

    class_K     indices of these classes in the class list
    parents_KK  true at [k, p] if p is a nearest class above k
    """

    digest: str
    class_K: np.ndarray
    parents_KK: np.ndarray

    @classmethod
    def of_classes(cls, ontology: Ontology, classes: ClassList) -> Self:
        """Return the subset for a class list; empty if the ontology has none of its classes, or too many to compare."""
        known_mids = {node.mid for node in ontology.nodes}
        class_K = np.array([index for index, mid in enumerate(classes.mids) if mid in known_mids], np.int64)
        if not 0 < len(class_K) <= MAX_COMPARED_CLASSES:
            return cls(ontology.digest, class_K[:0], np.zeros((0, 0), bool))

        # The rules need a class list whose classes are all in the ontology.
        known_classes = ClassList(
            mids=tuple(classes.mids[index] for index in class_K),
            names=tuple(classes.names[index] for index in class_K),
        )
        return cls(ontology.digest, class_K, nearest_parents_CC(ontology, known_classes))

    def implied_pairs(self, rule: str) -> np.ndarray:
        """Return pairs [N, 2]: a class, and a class that `rule` adds to it."""
        return self.class_K[np.argwhere(PROPAGATION_RULES[rule](self.parents_KK))]

    def related_pairs(self) -> np.ndarray:
        """Return pairs [N, 2], smaller index first: one class is above the other, or both share a nearest parent."""
        if not len(self.class_K):
            return np.zeros((0, 2), np.int64)
        above_KK = all_ancestors(self.parents_KK)

        # BLAS multiplies floats, ten times faster than booleans.
        parents_KK = self.parents_KK.astype(np.float32)
        share_parent_KK = parents_KK @ parents_KK.T > 0
        return self.class_K[np.argwhere(np.triu(above_KK | above_KK.T | share_parent_KK, 1))]


def label_keys(labels: pl.Series, classes: int) -> np.ndarray:
    """Return ascending keys row * classes + class, one per label; OntologyError for an index that no class has."""
    row_N, class_N = flatten_class_indices(labels, classes)
    return sorted_unique_keys(row_N * classes + class_N)


def rule_to_check(
    label_set: str, provenance: Any, ontology_subset: OntologySubset
) -> tuple[str | None, str | None]:
    """Return the rule to check a label set by, and None; or None, and why the set cannot be checked."""
    if not len(ontology_subset.class_K):
        return None, "the ontology has none of its classes"
    # Raw labels follow no rule; the default rule shows which labels they lack.
    if label_set == "raw":
        return "unambiguous", None
    if not isinstance(provenance, dict) or provenance.get("rule") not in PROPAGATION_RULES:
        return None, "its rule is not recorded"
    if provenance.get("ontology") != ontology_subset.digest:
        return None, f"it was made with ontology {provenance.get('ontology')}, which is missing"
    return provenance["rule"], None


def find_contradictions(
    label_set: str,
    raw_N: np.ndarray,
    present_N: np.ndarray,
    implied_pairs: np.ndarray,
    names: tuple[str, ...],
    *,
    rule: str,
    top: int,
) -> LabelContradictions:
    """Return which labels of `raw_N`, and which labels that these imply, are missing from `present_N`.

    raw_N, present_N  keys of labels, as returned by `label_keys`
    implied_pairs     pairs [N, 2] of a class and a class that it implies, sorted
    top               maximum number of pairs of classes to name
    """
    classes = len(names)

    # Raw labels must be present, and so must every label that they imply.
    wanted = [raw_N]
    lacking = [raw_N[~_isin_sorted(raw_N, present_N)]]
    lacking_pairs = [raw_N[:0]]
    for class_N, implied_N in _implied_keys(raw_N, implied_pairs, classes):
        is_absent_N = ~_isin_sorted(implied_N, present_N)
        wanted.append(implied_N)
        lacking.append(implied_N[is_absent_N])
        lacking_pairs.append(class_N[is_absent_N] * classes + implied_N[is_absent_N] % classes)
    lacking_N = sorted_unique_keys(np.concatenate(lacking))

    # Name the pairs of classes with most clips.
    pair_N, clips_N = np.unique(np.concatenate(lacking_pairs), return_counts=True)
    order = np.argsort(-clips_N, kind="stable")[:top]
    pairs = tuple(
        UnmetImplication(names[pair_N[i] // classes], names[pair_N[i] % classes], int(clips_N[i]))
        for i in order
    )

    # A propagated set must not have any other labels.
    labels_beyond = 0
    if label_set != "raw":
        wanted_N = sorted_unique_keys(np.concatenate(wanted))
        labels_beyond = int((~_isin_sorted(present_N, wanted_N)).sum())
    return LabelContradictions(
        label_set=label_set,
        rule=rule,
        pairs=pairs,
        pairs_in_all=len(pair_N),
        clips=len(sorted_unique_keys(lacking_N // classes)),
        labels_lacking=len(lacking_N),
        labels_beyond=labels_beyond,
    )


def _implied_keys(
    keys_N: np.ndarray, implied_pairs: np.ndarray, classes: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the class of every label that implies another, with the key of its first implied label.

    Then yield the same for its second implied label, and so on.
    """
    # The pairs are sorted: those of class c are first_C[c] to first_C[c + 1].
    first_C = np.searchsorted(implied_pairs[:, 0], np.arange(classes + 1))
    implied_count_C = np.diff(first_C)

    # In each round, remove labels that imply no further class.
    keys_N = keys_N[implied_count_C[keys_N % classes] > 0]
    nth = 0
    while len(keys_N):
        class_N = keys_N % classes
        yield class_N, keys_N - class_N + implied_pairs[first_C[class_N] + nth, 1]
        nth += 1
        keys_N = keys_N[implied_count_C[class_N] > nth]


def _isin_sorted(keys_N: np.ndarray, sorted_keys_N: np.ndarray) -> np.ndarray:
    """Return whether each key is in `sorted_keys_N`, which ascend."""
    if not len(sorted_keys_N):
        return np.zeros(len(keys_N), bool)
    place_N = np.minimum(np.searchsorted(sorted_keys_N, keys_N), len(sorted_keys_N) - 1)
    return sorted_keys_N[place_N] == keys_N
