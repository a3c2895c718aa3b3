"""The class tree; what a label implies about the classes above it; label propagation."""

import csv
import difflib
import hashlib
import importlib.resources
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.errors import InputError, ManifestError, OntologyError

if TYPE_CHECKING:  # stage one needs no torch, and it takes seconds to import
    from torch import Tensor

Scores = TypeVar("Scores", np.ndarray, "Tensor")

CLASS_LIST_HEADER = ["index", "mid", "display_name"]
CLASSES_MAX = 2**16  # a label is stored as uint16


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One entry of the class tree: a sound class, or a heading that groups some."""

    mid: str
    name: str
    child_mids: tuple[str, ...] = ()
    restrictions: tuple[str, ...] = ()  # "abstract": a heading only; "blacklist": not put before raters
    index: int | None = None  # place in AudioSet's class list; None outside it


@dataclass(frozen=True, kw_only=True, slots=True)
class Ontology:
    """What is a kind of what: an acyclic graph rather than a tree, since a class may have several parents."""

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        if twice := _twice([node.mid for node in self.nodes]):
            raise OntologyError(f"class {twice} is defined twice; every id may stand once")
        known = {node.mid for node in self.nodes}
        for node in self.nodes:
            for unknown in (mid for mid in node.child_mids if mid not in known):
                raise OntologyError(f"class {node.mid} ({node.name}) has an undefined child {unknown}")
        try:
            TopologicalSorter(self.parents_of()).prepare()
        except CycleError as error:
            circle = " -> ".join(error.args[1])
            raise OntologyError(
                f"classes go round in a circle: {circle}; remove one of these links"
            ) from None

    def parents_of(self) -> dict[str, list[str]]:
        """The parents of every node, in the order of the nodes; roots have none."""
        parents: dict[str, list[str]] = {node.mid: [] for node in self.nodes}
        for node in self.nodes:
            for child_mid in dict.fromkeys(node.child_mids):
                parents[child_mid].append(node.mid)
        return parents

    @property
    def digest(self) -> str:
        """12 hex digits that change with the nodes or links, and not with names or the order of the file."""
        facts = sorted((node.mid, sorted(node.child_mids)) for node in self.nodes)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassList:
    """The classes of a store or a model, in the order of their indices."""

    mids: tuple[str, ...]
    names: tuple[str, ...]
    index_of: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < len(self.mids) == len(self.names) <= CLASSES_MAX:
            counts = f"{len(self.mids)} ids and {len(self.names)} names"
            raise ManifestError(f"a class list of {counts}; expected as many of both, 1 to {CLASSES_MAX}")
        if twice := _twice(self.mids):
            raise ManifestError(f"class {twice} is listed twice; every id may stand once")
        object.__setattr__(self, "index_of", {mid: index for index, mid in enumerate(self.mids)})

    def __len__(self) -> int:
        return len(self.mids)


def load_ontology(path: Path | None = None) -> Ontology:
    """AudioSet's class tree (632 nodes), or that of a file in the form of AudioSet's `ontology.json`."""
    text = _text(path or importlib.resources.files("manifests") / "audioset.json", OntologyError)
    try:
        return Ontology(nodes=tuple(_node(place, fact) for place, fact in enumerate(json.loads(text))))
    except (json.JSONDecodeError, TypeError, OntologyError) as error:
        raise OntologyError(
            f"{path}: no class tree in the form of AudioSet's ontology.json: {error}"
        ) from None


def load_class_list(path: Path | None = None) -> ClassList:
    """AudioSet's 527 classes, or those of a file in the form of AudioSet's `class_labels_indices.csv`."""
    if path is None:
        listed = {node.index: node for node in load_ontology().nodes if node.index is not None}
        nodes = [listed[index] for index in sorted(listed)]
        return ClassList(mids=tuple(node.mid for node in nodes), names=tuple(node.name for node in nodes))
    lines = csv.reader(io.StringIO(_text(path, ManifestError)))
    if (header := next(lines, [])) != CLASS_LIST_HEADER:
        raise ManifestError(
            f"{path}: line 1 is {','.join(header)!r}, expected {','.join(CLASS_LIST_HEADER)!r}"
        )
    rows = [row for row in lines if row]
    for index, row in enumerate(rows):
        if len(row) != 3 or row[0] != str(index):
            got = ",".join(row)
            raise ManifestError(f"{path}: class row {index} is {got!r}, expected '{index},mid,display_name'")
    try:
        return ClassList(mids=tuple(row[1] for row in rows), names=tuple(row[2] for row in rows))
    except ManifestError as error:
        raise ManifestError(f"{path}: {error}") from None


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


def propagate(labels: pl.Series, relation_CC: np.ndarray) -> pl.Series:
    """Each row's classes and what the relation adds to them: list<uint16>, sorted, unique, empty if it was.

    Two million rows take about a second: entries become numbers row * C + class, sorted once.
    OntologyError: a null, or an index outside the relation, with its row.
    """
    rows_N, indices = entries(labels)
    class_N = indices.cast(pa.int64()).to_numpy(zero_copy_only=False)
    classes = len(relation_CC)
    if (odd_N := np.flatnonzero((class_N < 0) | (class_N >= classes))).size:
        row, index = rows_N[odd_N[0]], class_N[odd_N[0]]
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


def _text(path: Path | Traversable, kind: type[InputError]) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise kind(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise kind(f"{path}: not UTF-8 text") from None


def _node(place: int, fact: Any) -> Node:
    try:
        return Node(
            mid=fact["id"],
            name=fact["name"],
            child_mids=tuple(fact["child_ids"]),
            restrictions=tuple(fact.get("restrictions", ())),
            index=fact.get("index"),
        )
    except (KeyError, TypeError, AttributeError):
        raise OntologyError(f"entry {place} is not an object with id, name and child_ids") from None


def _twice(mids: Sequence[str]) -> str | None:
    return next((mid for mid, times in Counter(mids).items() if times > 1), None)


def _columns(relation_CC: np.ndarray) -> Iterator[np.ndarray]:
    """The first class that is added to each class (-1: none), then the second, and so on."""
    added_CC = np.sort(np.where(relation_CC, np.arange(len(relation_CC)), -1), axis=1)[:, ::-1]
    yield from added_CC[:, : relation_CC.sum(1).max()].T


def entries(lists: pl.Series) -> tuple[np.ndarray, pa.Array]:
    """Row number and value of every entry of a list column. OntologyError: a null, with its row."""
    array = lists.to_arrow()
    values = array.flatten()
    rows_N = np.repeat(np.arange(len(array)), np.diff(array.offsets.to_numpy()))
    if array.null_count or values.null_count:
        null_N = (array if array.null_count else values).is_null().to_numpy(zero_copy_only=False).argmax()
        row = null_N if array.null_count else rows_N[null_N]
        raise OntologyError(f"row {row}: a label is null; expected a list, empty where a clip has no labels")
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
