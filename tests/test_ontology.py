"""The class tree and the class list: AudioSet's facts, and a user's files checked at the door."""

import json
from collections import Counter
from pathlib import Path

import pytest

from pipeline.errors import InputError, ManifestError, OntologyError
from pipeline.ontology import ClassList, load_class_list, load_ontology

ORIGINALS = Path(__file__).parents[2] / "shared" / "audioset"
needs_originals = pytest.mark.skipif(
    not ORIGINALS.exists(), reason="the original AudioSet files are not here"
)
ONTOLOGY, CLASSES = load_ontology(), load_class_list()


def test_the_class_tree_is_audiosets():
    """The facts in manifests/ are the whole ontology, not an excerpt."""
    parents_of = ONTOLOGY.parents_of()
    counts = len(ONTOLOGY.nodes), sum(map(len, parents_of.values())), len(CLASSES)
    assert counts == (632, 670, 527)
    assert sum(not parents for parents in parents_of.values()) == 7
    assert Counter(word for node in ONTOLOGY.nodes for word in node.restrictions) == {
        "abstract": 23,
        "blacklist": 67,
    }


@needs_originals
def test_the_facts_are_those_of_the_original_files():
    """Joining two files must not change what either says."""
    keep = ("id", "name", "child_ids", "restrictions")
    original = json.loads((ORIGINALS / "ontology.json").read_text(encoding="utf-8"))
    ours = [(node.mid, node.name, list(node.child_mids), list(node.restrictions)) for node in ONTOLOGY.nodes]
    assert ours == [tuple(node[key] for key in keep) for node in original]
    assert load_ontology(ORIGINALS / "ontology.json").digest == ONTOLOGY.digest
    assert load_class_list(ORIGINALS / "class_labels_indices.csv") == CLASSES


def facts(*nodes) -> list[dict]:
    return [{"id": mid, "name": mid.upper(), "child_ids": children} for mid, children in nodes]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            facts(("x", ["a"]), ("a", ["b"]), ("b", ["c"]), ("c", ["a"])),
            "in a circle: (a -> b -> c -> a|b -> c -> a -> b|c -> a -> b -> c);",
        ),
        (facts(("a", ["a"])), "in a circle: a -> a;"),
        (facts(("a", []), ("a", [])), "class a is defined twice"),
        (facts(("a", ["b"])), r"class a \(A\) has an undefined child b"),
        ([{"id": "a"}], "entry 0 is not an object with texts id and name and a list child_ids"),
        ([{"id": "a", "name": 1, "child_ids": []}], "entry 0 is not an object with"),
        ([{"id": "a", "name": "A", "child_ids": "a"}], "entry 0 is not an object with"),
        ([], "it has no entry"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
        ("{", "Expecting property name"),
        (5, "not iterable"),
    ],
)
def test_an_impossible_tree_is_refused(tmp_path, content, said):
    """A user's own ontology file is checked at the door, and the file is named."""
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(OntologyError, match=rf"mine\.json: .*{said}"):
        load_ontology(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mid,index,display_name\n", "line 1 is 'mid,index,display_name', expected 'index,mid,display_name'"),
        ("", "line 1 is '', expected"),
        ("index,mid,display_name\n", "a class list of 0 ids"),
        (
            "index,mid,display_name\n0,/m/1,A\n2,/m/2,B\n",
            "class row 1 is '2,/m/2,B', expected '1,mid,display_name'",
        ),
        ("index,mid,display_name\n0,/m/1\n", "class row 0 is '0,/m/1'"),
        ("index,mid,display_name\n0,/m/1,A\n1,/m/1,B\n", "class /m/1 is listed twice"),
    ],
)
def test_a_damaged_class_list_is_refused(tmp_path, text, said):
    """The order of the classes is what a model's outputs mean; a gap would shift all that follow."""
    path = tmp_path / "classes.csv"
    path.write_text(text)
    with pytest.raises(ManifestError, match=rf"classes\.csv: .*{said}"):
        load_class_list(path)


def test_a_class_list_of_ones_own_is_read(tmp_path):
    """Names hold commas, and spreadsheets begin a file with a byte order mark."""
    path = tmp_path / "classes.csv"
    path.write_text('\ufeffindex,mid,display_name\n0,/m/1,"Bee, wasp, etc."\n', encoding="utf-8")
    classes = load_class_list(path)
    assert (classes.names, classes.index_of) == (("Bee, wasp, etc.",), {"/m/1": 0})


@pytest.mark.parametrize("load", [load_ontology, load_class_list])
def test_a_file_that_cannot_be_read_is_named(tmp_path, load):
    """Absent, or not text at all."""
    with pytest.raises(InputError, match=r"absent: No such file"):
        load(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary: .*not UTF-8 text"):
        load(tmp_path / "binary")


def test_an_ontology_is_kept_as_it_was_read(tmp_path):
    """What a store keeps of a user's tree makes the same label sets later."""
    path = tmp_path / "kept.json"
    path.write_text(ONTOLOGY.to_json(), encoding="utf-8")
    assert load_ontology(path) == ONTOLOGY


def test_the_digest_of_a_class_list_is_its_order():
    """Names may be mended; another order is another list."""
    turned = ClassList(mids=CLASSES.mids[::-1], names=CLASSES.names[::-1])
    renamed = ClassList(mids=CLASSES.mids, names=CLASSES.mids)
    assert renamed.digest == CLASSES.digest != turned.digest
