"""Ontology: the class tree, and the classes of a store or model; AudioSet's own, or a user's files."""

import csv
import hashlib
import importlib.resources
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, ManifestError, OntologyError

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
        if not 0 < len(self.mids) == len(self.names) <= CLASSES_MAX:
            counts = f"{len(self.mids)} ids and {len(self.names)} names"
            raise ManifestError(f"a class list of {counts}; expected as many of both, 1 to {CLASSES_MAX}")
        if twice := _twice(self.mids):
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
    text = _text(path or importlib.resources.files("manifests") / "audioset.json", OntologyError)
    try:
        nodes = tuple(_node(place, fact) for place, fact in enumerate(json.loads(text)))
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


def _text(path: Path | Traversable, kind: type[InputError]) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise kind(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise kind(f"{path}: not UTF-8 text") from None


def _node(place: int, fact: Any) -> Node:
    try:
        mid, name, child_mids = fact["id"], fact["name"], fact["child_ids"]
        if not all(isinstance(text, str) for text in (mid, name, *child_mids)) or isinstance(child_mids, str):
            raise TypeError
        return Node(
            mid=mid,
            name=name,
            child_mids=tuple(child_mids),
            restrictions=tuple(fact.get("restrictions", ())),
            index=fact.get("index"),
        )
    except (KeyError, TypeError, AttributeError):
        raise OntologyError(
            f"entry {place} is not an object with texts id and name and a list child_ids"
        ) from None


def _twice(mids: Sequence[str]) -> str | None:
    return next((mid for mid, times in Counter(mids).items() if times > 1), None)
