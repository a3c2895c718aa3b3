"""Class trees and class lists: the bundled files, the checks of a user's files, scores mapped between lists."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from pipeline.errors import InputError, ManifestError, OntologyError
from pipeline.labels.ontology import (
    ClassList,
    ClassMap,
    audioset_strong_classes,
    describe_outside_ids,
    fsd50k_classes,
    known_class_names,
    load_class_list,
    load_ontology,
    name_with_id,
)
from pipeline.labels.propagation import propagate, rule_relation_CC

ORIGINALS = Path(__file__).parents[4] / "shared" / "audioset"

needs_originals = pytest.mark.skipif(
    not ORIGINALS.exists(), reason="the original AudioSet files are not here"
)

MANIFESTS = Path(__file__).parents[3] / "manifests"

ONTOLOGY = load_ontology()

CLASSES = load_class_list()  # AudioSet's 527

FSD50K = fsd50k_classes()

STRONG = audioset_strong_classes()

NODES = {node.mid: node for node in ONTOLOGY.nodes}


def test_the_class_tree_is_audiosets():
    """The facts in manifests/ are the whole ontology, not an excerpt."""
    parents_of = ONTOLOGY.parent_mids()
    assert len(ONTOLOGY.nodes) == 632
    assert sum(map(len, parents_of.values())) == 670
    assert len(CLASSES) == 527
    assert sum(not parents for parents in parents_of.values()) == 7
    assert Counter(word for node in ONTOLOGY.nodes for word in node.restrictions) == {
        "abstract": 23,
        "blacklist": 67,
    }


@needs_originals
def test_the_bundled_tree_and_list_are_the_original_files():
    """Joining the two files must not change the content of either."""
    keep = ("id", "name", "child_ids", "restrictions")
    original = json.loads((ORIGINALS / "ontology.json").read_text(encoding="utf-8"))
    ours = [(node.mid, node.name, list(node.child_mids), list(node.restrictions)) for node in ONTOLOGY.nodes]
    assert ours == [tuple(node[key] for key in keep) for node in original]
    assert load_ontology(ORIGINALS / "ontology.json").digest == ONTOLOGY.digest
    assert load_class_list(ORIGINALS / "class_labels_indices.csv") == CLASSES


def tree_of(*nodes) -> list[dict]:
    """A class tree in the form of AudioSet's ontology.json, from pairs of an id and its children."""
    return [{"id": mid, "name": mid.upper(), "child_ids": children} for mid, children in nodes]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            tree_of(("x", ["a"]), ("a", ["b"]), ("b", ["c"]), ("c", ["a"])),
            "form a circle: (a -> b -> c -> a|b -> c -> a -> b|c -> a -> b -> c);",
        ),
        (tree_of(("a", ["a"])), "form a circle: a -> a;"),
        (tree_of(("a", []), ("a", [])), "class a is defined twice"),
        (tree_of(("a", ["b"])), r"class a \(A\) has an undefined child b"),
        ([{"id": "a"}], "entry 0 is not an object with texts id and name and a list child_ids"),
        ([{"id": "a", "name": 1, "child_ids": []}], "entry 0 is not an object with"),
        ([{"id": "a", "name": "A", "child_ids": "a"}], "entry 0 is not an object with"),
        ([], "it has no entry"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
        ("{", "Expecting property name"),
        (5, "not iterable"),
    ],
)
def test_an_impossible_tree_is_refused(tmp_path, content, message):
    """A user's own ontology file is checked when it is read, and the error names the file."""
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(OntologyError, match=rf"mine\.json: .*{message}"):
        load_ontology(path)


@pytest.mark.parametrize(
    ("text", "message"),
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
def test_a_damaged_class_list_is_refused(tmp_path, text, message):
    """The order of the classes gives a model's outputs their meaning; a gap would shift all later classes."""
    path = tmp_path / "classes.csv"
    path.write_text(text)
    with pytest.raises(ManifestError, match=rf"classes\.csv: .*{message}"):
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
    """The copy of a user's tree in a store makes the same label sets later."""
    path = tmp_path / "kept.json"
    path.write_text(ONTOLOGY.to_json(), encoding="utf-8")
    assert load_ontology(path) == ONTOLOGY


def test_the_digest_of_a_class_list_is_its_order():
    """Names may be corrected; another order is another list."""
    reversed_ = ClassList(mids=CLASSES.mids[::-1], names=CLASSES.names[::-1])
    renamed = ClassList(mids=CLASSES.mids, names=CLASSES.mids)
    assert renamed.digest == CLASSES.digest != reversed_.digest


FSD50K_ALONE = {
    "Crash cymbal",
    "Domestic sounds and home sounds",
    "Gull and seagull",
    "Human group actions",
    "Human voice",
    "Packing tape and duct tape",
    "Respiratory sounds",
    "Screech",
}  # the classes that are not among the 527

FSD50K_SETS = """
Male_speech_and_man_speaking Speech Human_voice
Male_speech_and_man_speaking Crowd Bird_vocalization_and_bird_call_and_bird_song Chicken_and_rooster Speech \
Human_voice Human_group_actions Bird Wild_animals Animal Fowl Livestock_and_farm_animals_and_working_animals
Male_speech_and_man_speaking Bark Mechanisms Bicycle Speech Human_voice Dog Domestic_animals_and_pets Animal Vehicle
Male_speech_and_man_speaking Computer_keyboard Speech Human_voice Typing Domestic_sounds_and_home_sounds
Male_speech_and_man_speaking Crash_cymbal Snare_drum Organ Speech Human_voice Cymbal Percussion Musical_instrument \
Music Drum Keyboard_(musical)
Male_speech_and_man_speaking Female_singing Finger_snapping Laughter Speech Human_voice Singing Hands
Male_speech_and_man_speaking Buzz Speech Human_voice Insect Wild_animals Animal
Male_speech_and_man_speaking Chatter Car_passing_by Race_car_and_auto_racing Engine Speech Human_voice \
Human_group_actions Car Motor_vehicle_(road) Vehicle
Male_speech_and_man_speaking Packing_tape_and_duct_tape Speech Human_voice Domestic_sounds_and_home_sounds
Male_speech_and_man_speaking Subway_and_metro_and_underground Alarm Cough Speech Human_voice Rail_transport \
Vehicle Respiratory_sounds
Chatter Accordion Siren Alarm Human_group_actions Musical_instrument Music
Whispering Siren Splash_and_splatter Alarm Human_voice Liquid
Ratchet_and_pawl Chirp_and_tweet Mechanisms Bird_vocalization_and_bird_call_and_bird_song Bird Wild_animals Animal
Trumpet Marimba_and_xylophone Brass_instrument Musical_instrument Music Mallet_percussion Percussion
Raindrop Thunder Rain Water Thunderstorm
Dishes_and_pots_and_pans Chatter Crackle Domestic_sounds_and_home_sounds Human_group_actions Fire
Electric_guitar Bass_guitar Crash_cymbal Hi-hat Bass_drum Drum Snare_drum Drum_kit Guitar Plucked_string_instrument \
Musical_instrument Music Percussion Cymbal
Male_speech_and_man_speaking Applause Chatter Clapping Shout Speech Human_voice Human_group_actions Hands
Male_speech_and_man_speaking Walk_and_footsteps Chatter Church_bell Speech Human_voice Human_group_actions Bell
Male_speech_and_man_speaking Crack Hands Speech Human_voice
Male_speech_and_man_speaking Tap Speech Human_voice
Male_speech_and_man_speaking Squeak Female_speech_and_woman_speaking Screaming Human_group_actions Shout Speech \
Human_voice
Male_speech_and_man_speaking Cutlery_and_silverware Chatter Hiss Laughter Musical_instrument Speech Human_voice \
Domestic_sounds_and_home_sounds Human_group_actions Music
"""  # distinct label sets of FSD50K's eval.csv and dev.csv (CC BY 4.0), as published


def bundled_entries(name: str) -> list[dict]:
    return json.loads((MANIFESTS / name).read_text())


def test_fsd50k_has_200_classes_of_which_192_are_audiosets():
    """Eight are outside the 527; every one is in the ontology, so that propagation knows them all."""
    assert len(FSD50K) == 200
    assert set(FSD50K.mids) <= set(NODES)
    assert {
        name for mid, name in zip(FSD50K.mids, FSD50K.names, strict=True) if mid not in CLASSES.index_of
    } == FSD50K_ALONE


@pytest.mark.parametrize("name", ["fsd50k.json", "audioset_strong.json"])
def test_the_bundled_files_name_the_index_among_the_527(name):
    """The number beside an id is that of AudioSet's own list, null outside it."""
    assert [fact["audioset"] for fact in bundled_entries(name)] == [
        CLASSES.index_of.get(fact["id"]) for fact in bundled_entries(name)
    ]


def test_fsd50ks_file_is_its_vocabulary_to_the_byte():
    """Written as lines again, they have the md5 of the original, as recorded in PyPI's wheel soundata 0.1.1."""
    lines = "".join(
        f"{fact['index']},{fact['name']},{fact['id']}\n" for fact in bundled_entries("fsd50k.json")
    )
    assert hashlib.md5(lines.encode()).hexdigest() == "0caaf9955ca53e358e9ab8f1e6271ba2"


def test_fsd50ks_order_is_that_of_its_vocabulary():
    """The outputs of FSD50K's models are in this order."""
    assert [fact["index"] for fact in bundled_entries("fsd50k.json")] == list(range(200))
    names = [fact["name"] for fact in bundled_entries("fsd50k.json")]
    assert names == sorted(names)
    assert not any(" " in name for name in names)


def test_fsd50ks_names_are_the_ontologys():
    """Commas and blanks are written otherwise, the words are the same: no id was mistaken for another."""

    def words(name: str) -> list[str]:
        return [word for word in name.replace("_", " ").replace(",", " ").split() if word != "and"]

    for mid, name in zip(FSD50K.mids, FSD50K.names, strict=True):
        assert words(name) == words(NODES[mid].name)


def test_audioset_strong_has_456_classes_of_which_74_are_outside_the_527():
    """456 is the number on its download page; of the 74, 42 are in the ontology and 32 are new."""
    outside = [mid for mid in STRONG.mids if mid not in CLASSES.index_of]
    assert (len(STRONG), len(outside)) == (456, 74)
    assert sum(mid in NODES for mid in outside) == 42
    assert list(STRONG.mids) == sorted(STRONG.mids)


def test_audioset_strong_renames_twelve_classes():
    """All other names are the ontology's: no id was mistaken for another."""
    names = dict(zip(STRONG.mids, STRONG.names, strict=True))
    renamed = {
        NODES[mid].name: name for mid, name in names.items() if mid in NODES and NODES[mid].name != name
    }
    assert len(renamed) == 12
    assert renamed["Duck"] == "Ducks, geese, waterfowl"


def test_every_class_outside_the_527_has_its_name():
    """Ids alone tell a reader nothing."""
    assert len(known_class_names()) == 664
    assert name_with_id("/m/0174k2") == "Washing machine (/m/0174k2)"
    assert name_with_id("/m/0bm0k") == "Crash cymbal (/m/0bm0k)"
    assert name_with_id("/m/0") == "/m/0"


def test_fsd50ks_labels_hold_their_ancestors_but_for_links_that_it_cuts():
    """In these 23 sets the rule adds what four links of the ontology imply; FSD50K does not follow them."""
    adds_CC = rule_relation_CC(classes=FSD50K)
    index_of = {fact["name"]: fact["index"] for fact in bundled_entries("fsd50k.json")}
    rows = [[index_of[name] for name in line.split()] for line in FSD50K_SETS.strip().splitlines()]
    propagated = propagate(pl.Series(rows, dtype=pl.List(pl.UInt16)), adds_CC).to_list()
    added = [
        {FSD50K.names[index] for index in set(after) - set(raw)}
        for raw, after in zip(rows, propagated, strict=True)
    ]
    assert len(rows) == 23
    assert added[:18] == [set()] * 18
    assert added[18:] == [
        {"Musical instrument", "Music"},  # a church bell is a bell, but no instrument
        {"Wood"},  # a crack need not be of wood
        {"Door", "Domestic sounds and home sounds"},  # a tap need not be at a door
        {"Door", "Domestic sounds and home sounds"},  # nor need a squeak be a door's
        set(),  # a hiss is ambiguous to both
    ]


def test_scores_of_audiosets_classes_become_scores_of_fsd50ks():
    """192 columns change their place, eight get the score for absent classes."""
    class_map = ClassMap(source=CLASSES, target=FSD50K)
    scores_BC = np.arange(2 * 527, dtype=np.float32).reshape(2, 527)
    mapped_BC = class_map.map_scores(scores_BC, absent_score=-np.inf)
    assert mapped_BC.shape == (2, 200)
    assert mapped_BC.dtype == np.float32
    assert mapped_BC[1, FSD50K.index_of["/m/05tny_"]] == scores_BC[1, CLASSES.names.index("Bark")]
    absent = np.flatnonzero(np.isinf(mapped_BC[0]))
    assert {FSD50K.names[index] for index in absent} == FSD50K_ALONE
    assert torch.equal(
        class_map.map_scores(torch.from_numpy(scores_BC), absent_score=-np.inf), torch.from_numpy(mapped_BC)
    )


def test_mapped_scores_carry_gradients():
    """A head of 527 classes can be trained on FSD50K's labels."""
    scores_BC = torch.zeros(1, 527, requires_grad=True)
    ClassMap(source=CLASSES, target=FSD50K).map_scores(scores_BC, absent_score=0.0).sum().backward()
    assert scores_BC.grad.sum() == 192


def test_scores_that_cannot_be_mapped_are_refused():
    """Lists without a common id, and scores of another number of classes."""
    with pytest.raises(OntologyError, match=r"of 527 and 1 classes share no id, such as /m/09x0r and dog"):
        ClassMap(source=CLASSES, target=ClassList(mids=("dog",), names=("Dog",)))
    class_map = ClassMap(source=FSD50K, target=CLASSES)
    with pytest.raises(OntologyError, match="scores of 527 classes, expected 200"):
        class_map.map_scores(np.zeros((1, 527)), absent_score=0.0)


def test_a_note_names_the_ids_outside_the_class_list():
    """The most frequent first, five by name; nothing where all ids are known."""
    rows = [["/m/0174k2", "/m/09x0r"], ["/m/0174k2"], ["/m/0"], [], ["/m/0bm0k", *"abcd"]]
    (note,) = describe_outside_ids(pl.Series(rows, dtype=pl.List(pl.String)), CLASSES)
    (one,) = describe_outside_ids(pl.Series([["/m/0nowhere"], []]), load_class_list())
    assert one == "1 class of labels is outside the class list and in no label set: /m/0nowhere 1 times"
    assert note.startswith("7 classes of labels are outside the class list and in no label set: ")
    assert "Washing machine (/m/0174k2) 2 times, /m/0 1 times, Crash cymbal (/m/0bm0k) 1 times, a" in note
    assert note.endswith(" and 2 more")
    assert describe_outside_ids(pl.Series([["/m/09x0r"], []], dtype=pl.List(pl.String)), CLASSES) == ()
    assert describe_outside_ids(pl.Series([[]], dtype=pl.List(pl.String)), CLASSES) == ()
