"""Class trees and class lists of AudioSet and other data sets; maps of scores between lists; columns of labels."""

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

if TYPE_CHECKING:  # stage one needs no torch, which takes seconds to import
    from torch import Tensor

MappedScores = TypeVar("MappedScores", np.ndarray, "Tensor")

CLASS_LIST_HEADER = ["index", "mid", "display_name"]

MAX_CLASSES = 2**16  # a label is stored as uint16

OUTSIDE_IDS_SHOWN = 5  # class ids that a note names


# A class tree and a class list.


@dataclass(frozen=True, kw_only=True, slots=True)
class OntologyNode:
    """One entry of the class tree: a sound class, or a heading that groups classes."""

    mid: str
    name: str
    child_mids: tuple[str, ...] = ()
    restrictions: tuple[str, ...] = ()  # "abstract": a heading only; "blacklist": not shown to raters
    index: int | None = None  # index in AudioSet's class list; None if it is not in the list


@dataclass(frozen=True, kw_only=True, slots=True)
class Ontology:
    """Classes and their subclasses: an acyclic graph rather than a tree, because a class may have several parents."""

    nodes: tuple[OntologyNode, ...]

    def __post_init__(self) -> None:
        # Every id is defined once, and every child is defined.
        if duplicate := _first_duplicate([node.mid for node in self.nodes]):
            raise OntologyError(f"class {duplicate} is defined twice; every id may occur once")
        known_mids = {node.mid for node in self.nodes}
        for node in self.nodes:
            for unknown in (mid for mid in node.child_mids if mid not in known_mids):
                raise OntologyError(f"class {node.mid} ({node.name}) has an undefined child {unknown}")

        # No class is its own ancestor.
        try:
            TopologicalSorter(self.parent_mids()).prepare()
        except CycleError as error:
            circle = " -> ".join(error.args[1])
            raise OntologyError(f"classes form a circle: {circle}; remove one of these links") from None

    def parent_mids(self) -> dict[str, list[str]]:
        """Return the parents of every node, in the order of the nodes; roots have none."""
        parents: dict[str, list[str]] = {node.mid: [] for node in self.nodes}
        for node in self.nodes:
            # A child that is listed twice counts as one link.
            for child_mid in dict.fromkeys(node.child_mids):
                parents[child_mid].append(node.mid)
        return parents

    @property
    def digest(self) -> str:
        """12 hex digits that change with the nodes or links, but not with names or the order of the file."""
        links = sorted((node.mid, sorted(node.child_mids)) for node in self.nodes)
        return hashlib.sha256(json.dumps(links).encode()).hexdigest()[:12]

    def to_json(self) -> str:
        """Return the ontology as JSON that `load_ontology` reads, one node per line."""
        entries = (
            {
                "id": node.mid,
                "name": node.name,
                "index": node.index,
                "restrictions": node.restrictions,
                "child_ids": node.child_mids,
            }
            for node in self.nodes
        )
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
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
        if duplicate := _first_duplicate(self.mids):
            raise ManifestError(f"class {duplicate} is listed twice; every id may occur once")
        # This is how a frozen dataclass sets a field that is computed from others.
        object.__setattr__(self, "index_of", {mid: index for index, mid in enumerate(self.mids)})

    def __len__(self) -> int:
        return len(self.mids)

    @property
    def digest(self) -> str:
        """12 hex digits that change with the ids or their order, which decide what an index means."""
        return hashlib.sha256(json.dumps(self.mids).encode()).hexdigest()[:12]


def load_ontology(path: Path | None = None) -> Ontology:
    """Read AudioSet's class tree (632 nodes), or the tree in a file with the form of AudioSet's `ontology.json`."""
    text = _read_utf8_text(path or importlib.resources.files("manifests") / "audioset.json", OntologyError)
    # Every error about the content names the file.
    try:
        nodes = tuple(_parse_node(index, entry) for index, entry in enumerate(json.loads(text)))
        if not nodes:
            raise OntologyError("it has no entry")
        return Ontology(nodes=nodes)
    except (json.JSONDecodeError, TypeError, RecursionError, OntologyError) as error:
        raise OntologyError(
            f"{path}: no class tree in the form of AudioSet's ontology.json: {error}"
        ) from None


def load_class_list(path: Path | None = None) -> ClassList:
    """Read AudioSet's 527 classes, or those in a file with the form of AudioSet's `class_labels_indices.csv`."""
    # AudioSet's own list is part of its class tree.
    if path is None:
        node_at = {node.index: node for node in load_ontology().nodes if node.index is not None}
        nodes = [node_at[index] for index in sorted(node_at)]
        return ClassList(mids=tuple(node.mid for node in nodes), names=tuple(node.name for node in nodes))

    # The header must be AudioSet's own.
    lines = csv.reader(io.StringIO(_read_utf8_text(path, ManifestError)))
    if (header := next(lines, [])) != CLASS_LIST_HEADER:
        raise ManifestError(
            f"{path}: line 1 is {','.join(header)!r}, expected {','.join(CLASS_LIST_HEADER)!r}"
        )

    # Rows must be numbered without a gap: a gap would shift the meaning of every later index.
    rows = [row for row in lines if row]
    for index, row in enumerate(rows):
        if len(row) != 3 or row[0] != str(index):
            text = ",".join(row)
            raise ManifestError(f"{path}: class row {index} is {text!r}, expected '{index},mid,display_name'")
    try:
        return ClassList(mids=tuple(row[1] for row in rows), names=tuple(row[2] for row in rows))
    except ManifestError as error:
        raise ManifestError(f"{path}: {error}") from None


def _read_utf8_text(path: Path | Traversable, error_type: type[InputError]) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets begin a file with a byte order mark
    except OSError as error:
        raise error_type(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise error_type(f"{path}: not UTF-8 text") from None


def _parse_node(entry_index: int, entry: Any) -> OntologyNode:
    try:
        mid, name, child_mids = entry["id"], entry["name"], entry["child_ids"]
        # A text is also a sequence of texts, so refuse a text as `child_ids`.
        if not all(isinstance(text, str) for text in (mid, name, *child_mids)) or isinstance(child_mids, str):
            raise TypeError
        return OntologyNode(
            mid=mid,
            name=name,
            child_mids=tuple(child_mids),
            restrictions=tuple(entry.get("restrictions", ())),
            index=entry.get("index"),
        )
    except (KeyError, TypeError, AttributeError):
        raise OntologyError(
            f"entry {entry_index} is not an object with texts id and name and a list child_ids"
        ) from None


def _first_duplicate(mids: Sequence[str]) -> str | None:
    return next((mid for mid, times in Counter(mids).items() if times > 1), None)


# Class lists of other data sets, and names for classes outside the 527.


def fsd50k_classes() -> ClassList:
    """Return FSD50K's 200 classes in its order, their names with blanks for `_`; 192 are among AudioSet's 527."""
    entries = _read_bundled_json("fsd50k.json")
    return ClassList(
        mids=tuple(entry["id"] for entry in entries),
        names=tuple(entry["name"].replace("_", " ") for entry in entries),
    )


def audioset_strong_classes() -> ClassList:
    """Return the 456 classes of AudioSet's strong labels, sorted by id; 382 are among AudioSet's 527."""
    entries = _read_bundled_json("audioset_strong.json")
    return ClassList(
        mids=tuple(entry["id"] for entry in entries), names=tuple(entry["name"] for entry in entries)
    )


@cache
def known_class_names() -> dict[str, str]:
    """Return id -> name of all classes: the ontology's 632, and 32 that only the strong labels have."""
    # The strong labels rename twelve classes; the ontology's names take precedence.
    strong = audioset_strong_classes()
    names = dict(zip(strong.mids, strong.names, strict=True))
    return names | {node.mid: node.name for node in load_ontology().nodes}


def name_with_id(mid: str) -> str:
    """Return a class id with its name, `Washing machine (/m/0174k2)`; only the id if it has no name."""
    return f"{known_class_names()[mid]} ({mid})" if mid in known_class_names() else mid


def describe_outside_ids(mids: pl.Series, classes: ClassList) -> tuple[str, ...]:
    """Return one sentence about label ids outside a class list: number and most frequent; empty if there are none."""
    outside = mids.explode().drop_nulls()
    outside = outside.filter(~outside.is_in(list(classes.mids)))
    if outside.is_empty():
        return ()

    # The most frequent come first; equally frequent ones in the order of their ids.
    counts = outside.value_counts(name="times").sort("times", outside.name, descending=[True, False])
    examples = ", ".join(
        f"{name_with_id(mid)} {times:,} times" for mid, times in counts.head(OUTSIDE_IDS_SHOWN).iter_rows()
    )
    if counts.height > OUTSIDE_IDS_SHOWN:
        examples += f" and {counts.height - OUTSIDE_IDS_SHOWN} more"
    subject = "1 class of labels is" if counts.height == 1 else f"{counts.height} classes of labels are"
    return (f"{subject} outside the class list and in no label set: {examples}",)


def _read_bundled_json(name: str) -> list[dict[str, Any]]:
    path = importlib.resources.files("manifests") / name
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return entries


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassMap:
    """A map by id from class list `source` to class list `target`, for the scores of a model of `source`.

    source_N, target_N  indices of the classes that both lists have
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
                f"class lists of {len(self.source)} and {len(self.target)} classes share no id, "
                f"such as {self.source.mids[0]} and {self.target.mids[0]}"
            )
        for name, indices in zip(("source_N", "target_N"), zip(*pairs, strict=True), strict=True):
            object.__setattr__(self, name, np.array(indices))

    def map_scores(self, scores_BC: MappedScores, *, absent_score: float) -> MappedScores:
        """Return the scores of the target's classes; classes that the source lacks get `absent_score`.

        Use 0 for probabilities and -inf for logits. Takes a numpy array, or a torch tensor on any
        device (differentiable).
        """
        if scores_BC.shape[1] != len(self.source):
            raise OntologyError(f"scores of {scores_BC.shape[1]} classes, expected {len(self.source)}")
        shape = (len(scores_BC), len(self.target))
        if isinstance(scores_BC, np.ndarray):
            mapped_BC = np.full(shape, absent_score, scores_BC.dtype)
        else:
            mapped_BC = scores_BC.new_full(shape, absent_score)
        # Assigning columns works for numpy and torch, and carries gradients in torch.
        mapped_BC[:, self.target_N] = scores_BC[:, self.source_N]
        return mapped_BC


# Columns of label lists, and their conversion to flat arrays and back. A label's key is row * classes + class.


def flatten_label_lists(label_lists: pl.Series, *, first_row: int = 0) -> tuple[np.ndarray, pa.Array]:
    """Return the row number and the value of every entry of a list column.

    OntologyError for a null; it names the row, where `first_row` is the number of the column's first row.
    """
    array = label_lists.to_arrow()
    values = array.flatten()
    rows_N = np.repeat(np.arange(len(array)), np.diff(array.offsets.to_numpy()))

    # A null may be a whole list or an entry of one; the error names the row in both cases.
    if array.null_count or values.null_count:
        null_N = (array if array.null_count else values).is_null().to_numpy(zero_copy_only=False).argmax()
        row = null_N if array.null_count else rows_N[null_N]
        raise OntologyError(
            f"row {first_row + row}: a label is null; expected a list, empty where a clip has no labels"
        )
    return rows_N, values


def flatten_class_indices(
    label_lists: pl.Series, class_count: int, *, first_row: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the row number and the class index, both int64, of every label of a column.

    OntologyError for a null, or for an index that no class has; it names the row as in `flatten_label_lists`.
    """
    rows_N, values = flatten_label_lists(label_lists, first_row=first_row)
    class_N = values.cast(pa.int64()).to_numpy(zero_copy_only=False)
    if (wrong_N := np.flatnonzero((class_N < 0) | (class_N >= class_count))).size:
        row = first_row + rows_N[wrong_N[0]]
        raise OntologyError(f"row {row}: class index {class_N[wrong_N[0]]}, expected 0 to {class_count - 1}")
    return rows_N, class_N


def sorted_unique_keys(keys_N: np.ndarray) -> np.ndarray:
    """Return the distinct keys in ascending order; keys are non-negative, and `keys_N` is sorted in place."""
    keys_N.sort()
    return keys_N[np.diff(keys_N, prepend=-1) > 0]


def build_label_lists(rows_N: np.ndarray, values: pa.Array, *, row_count: int) -> pl.Series:
    """Return the list column of `row_count` rows with these entries, which are sorted by row."""
    ends_N = np.bincount(rows_N, minlength=row_count).cumsum()
    offsets = pa.array(np.concatenate([[0], ends_N]), pa.int64())
    return pl.Series(values=pa.LargeListArray.from_arrays(offsets, values))


def label_lists_from_keys(keys_N: np.ndarray, class_count: int, *, row_count: int) -> pl.Series:
    """Return the column list<uint16> of `row_count` rows with the labels of these ascending keys."""
    class_N = pa.array((keys_N % class_count).astype(np.uint16))
    return build_label_lists(keys_N // class_count, class_N, row_count=row_count)


# A store needs at least one class; without labels it has this one, which is the class of no clip.
UNLABELLED_CLASSES = ClassList(mids=("unlabelled",), names=("unlabelled",))
