"""What labels imply, and which label sets lack it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.errors import OntologyError
from pipeline.labels.ontology import ClassList, Ontology, flatten_label_lists, sorted_unique_keys
from pipeline.labels.propagation import PROPAGATION_RULES, all_ancestors, nearest_parents_CC

MAX_COMPARED_CLASSES = 4_096  # of an ontology's that are compared with each other: their table is square


@dataclass(frozen=True, slots=True)
class UnmetImplication:
    """A class, one that it implies, and the clips that have the former alone."""

    name: str
    implied: str
    clips: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelContradictions:
    """Where a label set lacks what raw labels imply by a rule; `why_not` where that cannot be told.

    Of `raw` the clips in use count, of a propagated set all: it is a fault there, whoever draws the clip.
    """

    label_set: str
    rule: str | None
    why_not: str | None = None
    pairs: tuple[UnmetImplication, ...] = ()  # most clips first
    pairs_in_all: int = 0
    clips: int = 0
    labels_lacking: int = 0  # raw ones included, should a propagated set have lost some
    labels_beyond: int = 0  # in a propagated set, and in neither the raw one nor implied by it

    @property
    def is_stale(self) -> bool:
        """Whether it is a propagated set that is not what its rule gives."""
        return self.label_set != "raw" and bool(self.labels_lacking or self.labels_beyond)


@dataclass(frozen=True, slots=True, eq=False)
class OntologySubset:
    """The part of an ontology that a class list knows: `parents_KK` among its classes `at_K`."""

    digest: str
    class_K: np.ndarray
    parents_KK: np.ndarray

    @classmethod
    def of_classes(cls, ontology: Ontology, classes: ClassList) -> Self:
        """Empty where the class list is of another vocabulary, or too long for a square table."""
        known = {node.mid for node in ontology.nodes}
        at_K = np.array([place for place, mid in enumerate(classes.mids) if mid in known], np.int64)
        if not 0 < len(at_K) <= MAX_COMPARED_CLASSES:
            return cls(ontology.digest, at_K[:0], np.zeros((0, 0), bool))
        some = ClassList(
            mids=tuple(classes.mids[i] for i in at_K), names=tuple(classes.names[i] for i in at_K)
        )
        return cls(ontology.digest, at_K, nearest_parents_CC(ontology, some))

    def implied_pairs(self, rule: str) -> np.ndarray:
        """Pairs [N, 2]: a class, and one that `rule` adds to it."""
        return self.class_K[np.argwhere(PROPAGATION_RULES[rule](self.parents_KK))]

    def related_pairs(self) -> np.ndarray:
        """Pairs [N, 2], smaller index first: one lies above the other, or one class is the nearest above both."""
        if not len(self.class_K):
            return np.zeros((0, 2), np.int64)
        above_KK, shared = all_ancestors(self.parents_KK), self.parents_KK.astype(np.float32)
        pairs = np.argwhere(np.triu(above_KK | above_KK.T | (shared @ shared.T > 0), 1))
        return self.class_K[pairs]


def label_keys(labels: pl.Series, classes: int) -> np.ndarray:
    """Ascending numbers row * classes + class, one for each label. OntologyError: an index that no class has."""
    row_N, values = flatten_label_lists(labels)
    class_N = values.cast(pa.int64()).to_numpy(zero_copy_only=False)
    if len(class_N) and class_N.max() >= classes:
        at = int(class_N.argmax())
        raise OntologyError(f"row {row_N[at]}: class index {class_N[at]}, expected 0 to {classes - 1}")
    return sorted_unique_keys(row_N * classes + class_N)


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
    """What of the labels `raw_N`, and of those that they imply by `adds`, is not among `held_N`; both as `keys_of`."""
    classes = len(names)
    lacking, wanted, pair = [raw_N[~_isin_sorted(raw_N, present_N)]], [raw_N], [raw_N[:0]]
    for class_N, implied_N in _implied_keys(raw_N, implied_pairs, classes):
        there_N = _isin_sorted(implied_N, present_N)
        wanted.append(implied_N)
        lacking.append(implied_N[~there_N])
        pair.append(class_N[~there_N] * classes + implied_N[~there_N] % classes)
    lacking_N = sorted_unique_keys(np.concatenate(lacking))
    pair_N, clips_N = np.unique(np.concatenate(pair), return_counts=True)
    order = np.argsort(-clips_N, kind="stable")[:top]
    told = (
        UnmetImplication(names[pair_N[i] // classes], names[pair_N[i] % classes], int(clips_N[i]))
        for i in order
    )
    beyond = 0
    if label_set != "raw":
        beyond = int((~_isin_sorted(present_N, sorted_unique_keys(np.concatenate(wanted)))).sum())
    return LabelContradictions(
        label_set=label_set,
        rule=rule,
        pairs=tuple(told),
        pairs_in_all=len(pair_N),
        clips=len(sorted_unique_keys(lacking_N // classes)),
        labels_lacking=len(lacking_N),
        labels_beyond=beyond,
    )


def _implied_keys(
    keys_N: np.ndarray, implied_pairs: np.ndarray, classes: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The class of each label that implies something, and the key of what it implies: the first, then the second ..."""
    first_C = np.searchsorted(implied_pairs[:, 0], np.arange(classes + 1))
    keys_N = keys_N[np.diff(first_C)[keys_N % classes] > 0]
    nth = 0
    while len(keys_N):
        class_N = keys_N % classes
        yield class_N, keys_N - class_N + implied_pairs[first_C[class_N] + nth, 1]
        nth += 1
        keys_N = keys_N[np.diff(first_C)[class_N] > nth]


def _isin_sorted(keys_N: np.ndarray, sorted_keys_N: np.ndarray) -> np.ndarray:
    """Which keys are among ascending others."""
    if not len(sorted_keys_N):
        return np.zeros(len(keys_N), bool)
    place_N = np.minimum(np.searchsorted(sorted_keys_N, keys_N), len(sorted_keys_N) - 1)
    return sorted_keys_N[place_N] == keys_N


def rule_to_check(
    label_set: str, provenance: Any, ontology_subset: OntologySubset
) -> tuple[str | None, str | None]:
    """The rule by which a label set is to be judged, or None and why it cannot be."""
    if not len(ontology_subset.class_K):
        return None, "the ontology knows none of its classes"
    if label_set == "raw":
        return "unambiguous", None
    if not isinstance(provenance, dict) or provenance.get("rule") not in PROPAGATION_RULES:
        return None, "it does not say by which rule it was made"
    if provenance.get("ontology") != ontology_subset.digest:
        return None, f"it was made with ontology {provenance.get('ontology')}, which is gone"
    return provenance["rule"], None
