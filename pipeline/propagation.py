"""Propagation: what a label implies about the classes above it, by rule; labels and scores so completed."""

import difflib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.errors import OntologyError
from pipeline.ontology import ClassList, Ontology, load_class_list, load_ontology

if TYPE_CHECKING:  # stage one needs no torch, and it takes seconds to import
    from torch import Tensor

Scores = TypeVar("Scores", np.ndarray, "Tensor")


def relation_CC(
    rule: str = "unambiguous", *, ontology: Ontology | None = None, classes: ClassList | None = None
) -> np.ndarray:
    """What `rule` adds: true at [c, a] where class a (never c itself) is added to a clip labelled c.

    AudioSet's own tree and class list, unless others are given. OntologyError: an unknown rule, or a class
    that the tree lacks.
    """
    if rule not in RULES:
        nearest = (difflib.get_close_matches(rule, RULES, n=1, cutoff=0.0) or [""])[0]
        raise OntologyError(f"unknown rule {rule!r}; did you mean {nearest!r}? There are: {', '.join(RULES)}")
    return RULES[rule](parents_CC(ontology or load_ontology(), classes or load_class_list()))


def parents_CC(ontology: Ontology, classes: ClassList) -> np.ndarray:
    """True at [c, p] where p is a nearest class above c; nodes that are no classes are looked through."""
    parents_of = ontology.parents_of()
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


def unambiguous(parents_CC: np.ndarray) -> np.ndarray:
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


def direct_parent(parents_CC: np.ndarray) -> np.ndarray:
    """One step up to every parent, and no further: the one rule that is not its own closure (427 pairs)."""
    return parents_CC


RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "unambiguous": unambiguous,
    "all-ancestors": all_ancestors,
    "dominators": dominators,
    "direct-parent": direct_parent,
}


def propagate(labels: pl.Series, relation_CC: np.ndarray, *, first_row: int = 0) -> pl.Series:
    """Each row's classes and what the relation adds to them: list<uint16>, sorted, unique, empty if it was.

    Two million rows take about a second: entries become numbers row * C + class, sorted once.
    OntologyError: a null, or an index outside the relation, with its row; `first_row` is the number of the first.
    """
    rows_N, indices = entries(labels, first_row=first_row)
    class_N = indices.cast(pa.int64()).to_numpy(zero_copy_only=False)
    classes = len(relation_CC)
    if (odd_N := np.flatnonzero((class_N < 0) | (class_N >= classes))).size:
        row, index = first_row + rows_N[odd_N[0]], class_N[odd_N[0]]
        raise OntologyError(f"row {row}: class index {index}, expected 0 to {classes - 1}")
    keys = [rows_N * classes + class_N]
    for added_C in _columns(relation_CC):
        more_N = added_C[class_N] >= 0
        rows_N, class_N = rows_N[more_N], class_N[more_N]
        keys.append(rows_N * classes + added_C[class_N])
    keys_N = sorted_unique(np.concatenate(keys))
    propagated = lists(keys_N // classes, pa.array((keys_N % classes).astype(np.uint16)), count=len(labels))
    return propagated.alias(labels.name)


def propagate_scores(scores_BC: Scores, relation_CC: np.ndarray) -> Scores:
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


def _columns(relation_CC: np.ndarray) -> Iterator[np.ndarray]:
    """The first class that is added to each class (-1: none), then the second, and so on."""
    added_CC = np.sort(np.where(relation_CC, np.arange(len(relation_CC)), -1), axis=1)[:, ::-1]
    yield from added_CC[:, : relation_CC.sum(1).max()].T


def entries(lists: pl.Series, *, first_row: int = 0) -> tuple[np.ndarray, pa.Array]:
    """Row number and value of every entry of a list column. OntologyError: a null, with its row."""
    array = lists.to_arrow()
    values = array.flatten()
    rows_N = np.repeat(np.arange(len(array)), np.diff(array.offsets.to_numpy()))
    if array.null_count or values.null_count:
        null_N = (array if array.null_count else values).is_null().to_numpy(zero_copy_only=False).argmax()
        row = null_N if array.null_count else rows_N[null_N]
        raise OntologyError(
            f"row {first_row + row}: a label is null; expected a list, empty where a clip has no labels"
        )
    return rows_N, values


def lists(rows_N: np.ndarray, values: pa.Array, *, count: int) -> pl.Series:
    """The list column of `count` rows with these entries, which come row after row."""
    ends_N = np.bincount(rows_N, minlength=count).cumsum()
    offsets = pa.array(np.concatenate([[0], ends_N]), pa.int64())
    return pl.Series(values=pa.LargeListArray.from_arrays(offsets, values))


def sorted_unique(keys_N: np.ndarray) -> np.ndarray:
    """The distinct of these non-negative keys in ascending order; sorts them in place."""
    keys_N.sort()
    return keys_N[np.diff(keys_N, prepend=-1) > 0]
