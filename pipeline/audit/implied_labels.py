"""The labels that labels imply by an ontology, and the label sets that lack them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import polars as pl

from pipeline.labels.ontology import ClassList, Ontology, flatten_class_indices, sorted_unique_keys
from pipeline.labels.propagation import PROPAGATION_RULES, all_ancestors, nearest_parents_CC

# More classes are not compared with each other, because the table is square.
MAX_COMPARED_CLASSES = 4_096


@dataclass(frozen=True, slots=True)
class UnmetImplication:
    """A class, a class that it implies, and the number of clips that have the first without the second."""

    name: str
    implied: str
    clips: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelContradictions:
    """Where a label set lacks labels that raw ones imply by a rule; `why_not` if that cannot be judged.

    In the raw set the clips in use count; in a propagated set all count, because a lack is a fault of the file.
    """

    label_set: str
    rule: str | None
    why_not: str | None = None
    pairs: tuple[UnmetImplication, ...] = ()  # most clips first
    pairs_in_all: int = 0
    clips: int = 0
    labels_lacking: int = 0  # including raw labels that a propagated set has lost
    labels_beyond: int = 0  # in a propagated set, but neither raw nor implied by a raw label

    @property
    def is_stale(self) -> bool:
        """Whether this is a propagated set that differs from the result of its rule."""
        return self.label_set != "raw" and bool(self.labels_lacking or self.labels_beyond)


@dataclass(frozen=True, slots=True, eq=False)
class OntologySubset:
    """The K classes of a class list that an ontology knows.

    class_K     their indices in the class list
    parents_KK  true at [k, p] if p is a nearest class above k
    """

    digest: str
    class_K: np.ndarray
    parents_KK: np.ndarray

    @classmethod
    def of_classes(cls, ontology: Ontology, classes: ClassList) -> Self:
        """Empty if the class list is of another vocabulary, or too long for a square table."""
        known_mids = {node.mid for node in ontology.nodes}
        class_K = np.array([index for index, mid in enumerate(classes.mids) if mid in known_mids], np.int64)
        if not 0 < len(class_K) <= MAX_COMPARED_CLASSES:
            return cls(ontology.digest, class_K[:0], np.zeros((0, 0), bool))

        # The ontology's rules apply to a class list of which it knows every class.
        known_classes = ClassList(
            mids=tuple(classes.mids[index] for index in class_K),
            names=tuple(classes.names[index] for index in class_K),
        )
        return cls(ontology.digest, class_K, nearest_parents_CC(ontology, known_classes))

    def implied_pairs(self, rule: str) -> np.ndarray:
        """Pairs [N, 2]: a class, and a class that `rule` adds to it."""
        return self.class_K[np.argwhere(PROPAGATION_RULES[rule](self.parents_KK))]

    def related_pairs(self) -> np.ndarray:
        """Pairs [N, 2], smaller index first: one class lies above the other, or both share a nearest parent."""
        if not len(self.class_K):
            return np.zeros((0, 2), np.int64)
        above_KK = all_ancestors(self.parents_KK)

        # BLAS multiplies floats, ten times faster than booleans.
        parents_KK = self.parents_KK.astype(np.float32)
        share_parent_KK = parents_KK @ parents_KK.T > 0
        return self.class_K[np.argwhere(np.triu(above_KK | above_KK.T | share_parent_KK, 1))]


def label_keys(labels: pl.Series, classes: int) -> np.ndarray:
    """Ascending numbers row * classes + class, one for each label. OntologyError: an index that no class has."""
    row_N, class_N = flatten_class_indices(labels, classes)
    return sorted_unique_keys(row_N * classes + class_N)


def rule_to_check(
    label_set: str, provenance: Any, ontology_subset: OntologySubset
) -> tuple[str | None, str | None]:
    """The rule by which a label set is to be judged, or None and why there is none."""
    if not len(ontology_subset.class_K):
        return None, "the ontology knows none of its classes"
    # Raw labels follow no rule; the default one says what they leave out.
    if label_set == "raw":
        return "unambiguous", None
    if not isinstance(provenance, dict) or provenance.get("rule") not in PROPAGATION_RULES:
        return None, "it does not say by which rule it was made"
    if provenance.get("ontology") != ontology_subset.digest:
        return None, f"it was made with ontology {provenance.get('ontology')}, which is gone"
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
    """The labels among `raw_N`, and among those that they imply, that are missing from `present_N`.

    raw_N, present_N  keys of labels, as `label_keys` gives them
    implied_pairs     pairs [N, 2] of a class and a class that it implies, sorted
    top               how many pairs of classes to name
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

    # The pairs of classes with most clips get names.
    pair_N, clips_N = np.unique(np.concatenate(lacking_pairs), return_counts=True)
    order = np.argsort(-clips_N, kind="stable")[:top]
    pairs = tuple(
        UnmetImplication(names[pair_N[i] // classes], names[pair_N[i] % classes], int(clips_N[i]))
        for i in order
    )

    # A propagated set must not have more labels than wanted either.
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

    # Labels that imply no more classes drop out from round to round.
    keys_N = keys_N[implied_count_C[keys_N % classes] > 0]
    nth = 0
    while len(keys_N):
        class_N = keys_N % classes
        yield class_N, keys_N - class_N + implied_pairs[first_C[class_N] + nth, 1]
        nth += 1
        keys_N = keys_N[implied_count_C[class_N] > nth]


def _isin_sorted(keys_N: np.ndarray, sorted_keys_N: np.ndarray) -> np.ndarray:
    """Whether each key is among ascending other keys."""
    if not len(sorted_keys_N):
        return np.zeros(len(keys_N), bool)
    place_N = np.minimum(np.searchsorted(sorted_keys_N, keys_N), len(sorted_keys_N) - 1)
    return sorted_keys_N[place_N] == keys_N
