"""Ontology: the class tree, and the classes of a store or model; AudioSet's own, or a user's files.

Vocabularies: the class lists of other sets, names of classes outside the 527, and maps from one list to another.
"""

import csv
import hashlib
import importlib.resources
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
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


CLASS_LIST_HEADER = ["index", "mid", "display_name"]

MAX_CLASSES = 2**16  # a label is stored as uint16


@dataclass(frozen=True, kw_only=True, slots=True)
class OntologyNode:
    """One entry of the class tree: a sound class, or a heading that groups some."""

    mid: str
    name: str
    child_mids: tuple[str, ...] = ()
    restrictions: tuple[str, ...] = ()  # "abstract": a heading only; "blacklist": not put before raters
    index: int | None = None  # place in AudioSet's class list; None outside it


@dataclass(frozen=True, kw_only=True, slots=True)
class Ontology:
    """What is a kind of what: an acyclic graph rather than a tree, since a class may have several parents."""

    nodes: tuple[OntologyNode, ...]

    def __post_init__(self) -> None:
        if twice := _first_duplicate([node.mid for node in self.nodes]):
            raise OntologyError(f"class {twice} is defined twice; every id may stand once")
        known = {node.mid for node in self.nodes}
        for node in self.nodes:
            for unknown in (mid for mid in node.child_mids if mid not in known):
                raise OntologyError(f"class {node.mid} ({node.name}) has an undefined child {unknown}")
        try:
            TopologicalSorter(self.parent_mids()).prepare()
        except CycleError as error:
            circle = " -> ".join(error.args[1])
            raise OntologyError(
                f"classes go round in a circle: {circle}; remove one of these links"
            ) from None

    def parent_mids(self) -> dict[str, list[str]]:
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

    def to_json(self) -> str:
        """What `load_ontology` reads, one node a line."""
        facts = (
            {
                "id": node.mid,
                "name": node.name,
                "index": node.index,
                "restrictions": node.restrictions,
                "child_ids": node.child_mids,
            }
            for node in self.nodes
        )
        lines = ",\n".join(json.dumps(fact, ensure_ascii=False) for fact in facts)
        return f"[\n{lines}\n]\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassList:
    """The classes of a store or a model, in the order of their indices."""

    mids: tuple[str, ...]
    names: tuple[str, ...]
    index_of: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < len(self.mids) == len(self.names) <= MAX_CLASSES:
            counts = f"{len(self.mids)} ids and {len(self.names)} names"
            raise ManifestError(f"a class list of {counts}; expected as many of both, 1 to {MAX_CLASSES}")
        if twice := _first_duplicate(self.mids):
            raise ManifestError(f"class {twice} is listed twice; every id may stand once")
        object.__setattr__(self, "index_of", {mid: index for index, mid in enumerate(self.mids)})

    def __len__(self) -> int:
        return len(self.mids)

    @property
    def digest(self) -> str:
        """12 hex digits that change with the ids or their order, which is what indices mean."""
        return hashlib.sha256(json.dumps(self.mids).encode()).hexdigest()[:12]


def load_ontology(path: Path | None = None) -> Ontology:
    """AudioSet's class tree (632 nodes), or that of a file in the form of AudioSet's `ontology.json`."""
    text = _read_utf8_text(path or importlib.resources.files("manifests") / "audioset.json", OntologyError)
    try:
        nodes = tuple(_parse_node(place, fact) for place, fact in enumerate(json.loads(text)))
        if not nodes:
            raise OntologyError("it has no entry")
        return Ontology(nodes=nodes)
    except (json.JSONDecodeError, TypeError, RecursionError, OntologyError) as error:
        raise OntologyError(
            f"{path}: no class tree in the form of AudioSet's ontology.json: {error}"
        ) from None


def load_class_list(path: Path | None = None) -> ClassList:
    """AudioSet's 527 classes, or those of a file in the form of AudioSet's `class_labels_indices.csv`."""
    if path is None:
        listed = {node.index: node for node in load_ontology().nodes if node.index is not None}
        nodes = [listed[index] for index in sorted(listed)]
        return ClassList(mids=tuple(node.mid for node in nodes), names=tuple(node.name for node in nodes))
    lines = csv.reader(io.StringIO(_read_utf8_text(path, ManifestError)))
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


def _read_utf8_text(path: Path | Traversable, error_type: type[InputError]) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise error_type(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise error_type(f"{path}: not UTF-8 text") from None


def _parse_node(entry_index: int, fact: Any) -> OntologyNode:
    try:
        mid, name, child_mids = fact["id"], fact["name"], fact["child_ids"]
        if not all(isinstance(text, str) for text in (mid, name, *child_mids)) or isinstance(child_mids, str):
            raise TypeError
        return OntologyNode(
            mid=mid,
            name=name,
            child_mids=tuple(child_mids),
            restrictions=tuple(fact.get("restrictions", ())),
            index=fact.get("index"),
        )
    except (KeyError, TypeError, AttributeError):
        raise OntologyError(
            f"entry {entry_index} is not an object with texts id and name and a list child_ids"
        ) from None


def _first_duplicate(mids: Sequence[str]) -> str | None:
    return next((mid for mid, times in Counter(mids).items() if times > 1), None)


def flatten_label_lists(label_lists: pl.Series, *, first_row: int = 0) -> tuple[np.ndarray, pa.Array]:
    """Row number and value of every entry of a list column. OntologyError: a null, with its row."""
    array = label_lists.to_arrow()
    values = array.flatten()
    rows_N = np.repeat(np.arange(len(array)), np.diff(array.offsets.to_numpy()))
    if array.null_count or values.null_count:
        null_N = (array if array.null_count else values).is_null().to_numpy(zero_copy_only=False).argmax()
        row = null_N if array.null_count else rows_N[null_N]
        raise OntologyError(
            f"row {first_row + row}: a label is null; expected a list, empty where a clip has no labels"
        )
    return rows_N, values


def build_label_lists(rows_N: np.ndarray, values: pa.Array, *, count: int) -> pl.Series:
    """The list column of `count` rows with these entries, which come row after row."""
    ends_N = np.bincount(rows_N, minlength=count).cumsum()
    offsets = pa.array(np.concatenate([[0], ends_N]), pa.int64())
    return pl.Series(values=pa.LargeListArray.from_arrays(offsets, values))


def sorted_unique_keys(keys_N: np.ndarray) -> np.ndarray:
    """The distinct of these non-negative keys in ascending order; sorts them in place."""
    keys_N.sort()
    return keys_N[np.diff(keys_N, prepend=-1) > 0]


MappedScores = TypeVar("MappedScores", np.ndarray, "Tensor")

OUTSIDE_IDS_SHOWN = 5  # ids in a note


def fsd50k_classes() -> ClassList:
    """FSD50K's 200 classes in its order, under its names with blanks; 192 of them are among AudioSet's 527."""
    facts = _read_bundled_json("fsd50k.json")
    return ClassList(
        mids=tuple(fact["id"] for fact in facts),
        names=tuple(fact["name"].replace("_", " ") for fact in facts),
    )


def audioset_strong_classes() -> ClassList:
    """The 456 classes of AudioSet's strong labels, sorted by id; 382 of them are among the 527."""
    facts = _read_bundled_json("audioset_strong.json")
    return ClassList(mids=tuple(fact["id"] for fact in facts), names=tuple(fact["name"] for fact in facts))


@cache
def known_class_names() -> dict[str, str]:
    """Id -> name of every class known here: the ontology's 632, and 32 that only the strong labels have."""
    strong = audioset_strong_classes()
    names = dict(zip(strong.mids, strong.names, strict=True))
    return names | {node.mid: node.name for node in load_ontology().nodes}


def name_with_id(mid: str) -> str:
    """An id with its name, to be read: `Washing machine (/m/0174k2)`; an unknown one alone."""
    return f"{known_class_names()[mid]} ({mid})" if mid in known_class_names() else mid


def describe_outside_ids(mids: pl.Series, classes: ClassList) -> tuple[str, ...]:
    """The sentence on ids of labels that a class list has not, if there are any: how many, and the most frequent."""
    odd = mids.explode().drop_nulls()
    odd = odd.filter(~odd.is_in(list(classes.mids)))
    if odd.is_empty():
        return ()
    often = odd.value_counts(name="times").sort("times", odd.name, descending=[True, False])
    shown = ", ".join(
        f"{name_with_id(mid)} {times:,} times" for mid, times in often.head(OUTSIDE_IDS_SHOWN).iter_rows()
    )
    more = f" and {often.height - OUTSIDE_IDS_SHOWN} more" if often.height > OUTSIDE_IDS_SHOWN else ""
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
    def missing_names(self) -> tuple[str, ...]:
        """The names of target classes that the source lacks: no score, so to be left out of a mean."""
        there = set(self.target_N.tolist())
        return tuple(name for index, name in enumerate(self.target.names) if index not in there)

    def map_labels(self, labels: pl.Series) -> pl.Series:
        """Lists of source indices as lists of target indices, sorted, unique; classes without a counterpart go."""
        rows_N, indices = flatten_label_lists(labels)
        target_C = np.full(len(self.source), -1)
        target_C[self.source_N] = self.target_N
        class_N = indices.cast(pa.int64()).to_numpy(zero_copy_only=False)
        if (odd_N := np.flatnonzero((class_N < 0) | (class_N >= len(self.source)))).size:
            row, index = rows_N[odd_N[0]], class_N[odd_N[0]]
            raise OntologyError(f"row {row}: class index {index}, expected 0 to {len(self.source) - 1}")
        kept_N = target_C[class_N] >= 0
        keys_N = sorted_unique_keys(rows_N[kept_N] * len(self.target) + target_C[class_N[kept_N]])
        values = pa.array((keys_N % len(self.target)).astype(np.uint16))
        return build_label_lists(keys_N // len(self.target), values, count=len(labels)).alias(labels.name)

    def map_scores(self, scores_BC: MappedScores, *, absent_score: float) -> MappedScores:
        """Scores of the target's classes; `absent` where the source has none: 0 for probabilities, -inf for logits.

        A numpy array, or a torch tensor on any device (differentiable).
        """
        if scores_BC.shape[1] != len(self.source):
            raise OntologyError(f"scores of {scores_BC.shape[1]} classes, expected {len(self.source)}")
        shape = (len(scores_BC), len(self.target))
        if isinstance(scores_BC, np.ndarray):
            mapped_BC = np.full(shape, absent_score, scores_BC.dtype)
        else:
            mapped_BC = scores_BC.new_full(shape, absent_score)
        mapped_BC[:, self.target_N] = scores_BC[:, self.source_N]
        return mapped_BC


def _read_bundled_json(name: str) -> list[dict[str, Any]]:
    path = importlib.resources.files("manifests") / name
    facts: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return facts
