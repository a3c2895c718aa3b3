"""Vocabularies: the class lists of other sets, names of classes outside the 527, and maps from one list to another."""

import importlib.resources
import json
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.errors import OntologyError
from pipeline.ontology import ClassList, load_ontology
from pipeline.propagation import entries, lists, sorted_unique

if TYPE_CHECKING:  # stage one needs no torch, and it takes seconds to import
    from torch import Tensor

Scores = TypeVar("Scores", np.ndarray, "Tensor")
SHOWN = 5  # ids in a note


def fsd50k_classes() -> ClassList:
    """FSD50K's 200 classes in its order, under its names with blanks; 192 of them are among AudioSet's 527."""
    facts = _facts("fsd50k.json")
    return ClassList(
        mids=tuple(fact["id"] for fact in facts),
        names=tuple(fact["name"].replace("_", " ") for fact in facts),
    )


def audioset_strong_classes() -> ClassList:
    """The 456 classes of AudioSet's strong labels, sorted by id; 382 of them are among the 527."""
    facts = _facts("audioset_strong.json")
    return ClassList(mids=tuple(fact["id"] for fact in facts), names=tuple(fact["name"] for fact in facts))


@cache
def known_names() -> dict[str, str]:
    """Id -> name of every class known here: the ontology's 632, and 32 that only the strong labels have."""
    strong = audioset_strong_classes()
    names = dict(zip(strong.mids, strong.names, strict=True))
    return names | {node.mid: node.name for node in load_ontology().nodes}


def named(mid: str) -> str:
    """An id with its name, to be read: `Washing machine (/m/0174k2)`; an unknown one alone."""
    return f"{known_names()[mid]} ({mid})" if mid in known_names() else mid


def outside_note(mids: pl.Series, classes: ClassList) -> tuple[str, ...]:
    """The sentence on ids of labels that a class list has not, if there are any: how many, and the most frequent."""
    odd = mids.explode().drop_nulls()
    odd = odd.filter(~odd.is_in(list(classes.mids)))
    if odd.is_empty():
        return ()
    often = odd.value_counts(name="times").sort("times", odd.name, descending=[True, False])
    shown = ", ".join(f"{named(mid)} {times:,} times" for mid, times in often.head(SHOWN).iter_rows())
    more = f" and {often.height - SHOWN} more" if often.height > SHOWN else ""
    these = "1 class of labels is" if often.height == 1 else f"{often.height} classes of labels are"
    return (f"{these} outside the class list and kept aside: {shown}{more}",)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassMap:
    """From one class list to another by id: what a model of `source` says in the words of `target`.

    source_N, target_N  indices of the classes that both have
    """

    source: ClassList
    target: ClassList
    source_N: np.ndarray = field(init=False, repr=False, compare=False)
    target_N: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pairs = [
            (index, self.target.index_of[mid])
            for index, mid in enumerate(self.source.mids)
            if mid in self.target.index_of
        ]
        if not pairs:
            raise OntologyError(
                f"class lists of {len(self.source)} and {len(self.target)} classes share not one id, "
                f"such as {self.source.mids[0]} and {self.target.mids[0]}"
            )
        for name, indices in zip(("source_N", "target_N"), zip(*pairs, strict=True), strict=True):
            object.__setattr__(self, name, np.array(indices))

    @property
    def missing(self) -> tuple[str, ...]:
        """The names of target classes that the source lacks: no score, so to be left out of a mean."""
        there = set(self.target_N.tolist())
        return tuple(name for index, name in enumerate(self.target.names) if index not in there)

    def labels(self, labels: pl.Series) -> pl.Series:
        """Lists of source indices as lists of target indices, sorted, unique; classes without a counterpart go."""
        rows_N, indices = entries(labels)
        target_C = np.full(len(self.source), -1)
        target_C[self.source_N] = self.target_N
        class_N = indices.cast(pa.int64()).to_numpy(zero_copy_only=False)
        if (odd_N := np.flatnonzero((class_N < 0) | (class_N >= len(self.source)))).size:
            row, index = rows_N[odd_N[0]], class_N[odd_N[0]]
            raise OntologyError(f"row {row}: class index {index}, expected 0 to {len(self.source) - 1}")
        kept_N = target_C[class_N] >= 0
        keys_N = sorted_unique(rows_N[kept_N] * len(self.target) + target_C[class_N[kept_N]])
        values = pa.array((keys_N % len(self.target)).astype(np.uint16))
        return lists(keys_N // len(self.target), values, count=len(labels)).alias(labels.name)

    def scores(self, scores_BC: Scores, *, absent: float) -> Scores:
        """Scores of the target's classes; `absent` where the source has none: 0 for probabilities, -inf for logits.

        A numpy array, or a torch tensor on any device (differentiable).
        """
        if scores_BC.shape[1] != len(self.source):
            raise OntologyError(f"scores of {scores_BC.shape[1]} classes, expected {len(self.source)}")
        shape = (len(scores_BC), len(self.target))
        if isinstance(scores_BC, np.ndarray):
            mapped_BC = np.full(shape, absent, scores_BC.dtype)
        else:
            mapped_BC = scores_BC.new_full(shape, absent)
        mapped_BC[:, self.target_N] = scores_BC[:, self.source_N]
        return mapped_BC


def _facts(name: str) -> list[dict[str, Any]]:
    path = importlib.resources.files("manifests") / name
    facts: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return facts
