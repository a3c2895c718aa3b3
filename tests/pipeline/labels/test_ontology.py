"""The class tree and the class list: AudioSet's facts, and a user's files checked at the door.

FSD50K's classes and AudioSet-strong's: counts, names, and what a model of the 527 says in their words.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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

ONTOLOGY, CLASSES = load_ontology(), load_class_list()


def test_the_class_tree_is_audiosets():
    """The facts in manifests/ are the whole ontology, not an excerpt."""
    parents_of = ONTOLOGY.parent_mids()
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


MANIFESTS = Path(__file__).parents[3] / "manifests"

AUDIOSET, FSD50K, STRONG = load_class_list(), fsd50k_classes(), audioset_strong_classes()

NODES = {node.mid: node for node in load_ontology().nodes}

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


def class_facts(name: str) -> list[dict]:
    return json.loads((MANIFESTS / name).read_text())


def test_fsd50k_has_200_classes_of_which_192_are_audiosets():
    """Eight are outside the 527; every one is in the ontology, so that propagation knows them all."""
    assert len(FSD50K) == 200
    assert set(FSD50K.mids) <= set(NODES)
    assert {
        name for mid, name in zip(FSD50K.mids, FSD50K.names, strict=True) if mid not in AUDIOSET.index_of
    } == {
        "Crash cymbal",
        "Domestic sounds and home sounds",
        "Gull and seagull",
        "Human group actions",
        "Human voice",
        "Packing tape and duct tape",
        "Respiratory sounds",
        "Screech",
    }


@pytest.mark.parametrize("name", ["fsd50k.json", "audioset_strong.json"])
def test_the_tables_name_the_place_among_the_527(name):
    """The number beside an id is that of AudioSet's own list, null outside it."""
    assert [fact["audioset"] for fact in class_facts(name)] == [
        AUDIOSET.index_of.get(fact["id"]) for fact in class_facts(name)
    ]


def test_fsd50ks_facts_are_its_vocabulary_to_the_byte():
    """Written back as its lines they have the md5 of the original, as PyPI's wheel soundata 0.1.1 knows it."""
    lines = "".join(f"{fact['index']},{fact['name']},{fact['id']}\n" for fact in class_facts("fsd50k.json"))
    assert hashlib.md5(lines.encode()).hexdigest() == "0caaf9955ca53e358e9ab8f1e6271ba2"


def test_fsd50ks_order_is_that_of_its_vocabulary():
    """Its own indices are what its models' outputs mean."""
    assert [fact["index"] for fact in class_facts("fsd50k.json")] == list(range(200))
    names = [fact["name"] for fact in class_facts("fsd50k.json")]
    assert names == sorted(names)
    assert not any(" " in name for name in names)


def test_fsd50ks_names_are_the_ontologys():
    """Commas and blanks are written otherwise, the words are the same: no id was mistaken for another."""

    def words(name: str) -> list[str]:
        return [word for word in name.replace("_", " ").replace(",", " ").split() if word != "and"]

    for mid, name in zip(FSD50K.mids, FSD50K.names, strict=True):
        assert words(name) == words(NODES[mid].name)


def test_audioset_strong_has_456_classes_of_which_74_are_outside_the_527():
    """As its download page says: 456; 42 of those outside are in the ontology, 32 are new."""
    outside = [mid for mid in STRONG.mids if mid not in AUDIOSET.index_of]
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
    index_of = {fact["name"]: fact["index"] for fact in class_facts("fsd50k.json")}
    rows = [[index_of[name] for name in line.split()] for line in FSD50K_SETS.strip().splitlines()]
    done = propagate(pl.Series(rows, dtype=pl.List(pl.UInt16)), adds_CC).to_list()
    added = [
        {FSD50K.names[index] for index in set(after) - set(raw)}
        for raw, after in zip(rows, done, strict=True)
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


def test_a_model_of_audioset_is_scored_on_fsd50k():
    """192 columns change their place, eight get what is asked for and are named."""
    mapped = ClassMap(source=AUDIOSET, target=FSD50K)
    scores_BC = np.arange(2 * 527, dtype=np.float32).reshape(2, 527)
    ours_BC = mapped.map_scores(scores_BC, absent_score=-np.inf)
    assert ours_BC.shape == (2, 200)
    assert ours_BC.dtype == np.float32
    assert ours_BC[1, FSD50K.index_of["/m/05tny_"]] == scores_BC[1, AUDIOSET.names.index("Bark")]
    assert len(mapped.missing_names) == 8
    assert {FSD50K.names[index] for index in np.flatnonzero(np.isinf(ours_BC[0]))} == set(
        mapped.missing_names
    )
    assert torch.equal(
        mapped.map_scores(torch.from_numpy(scores_BC), absent_score=-np.inf), torch.from_numpy(ours_BC)
    )


def test_mapped_scores_carry_gradients():
    """A head of 527 classes can be trained on FSD50K's labels."""
    scores_BC = torch.zeros(1, 527, requires_grad=True)
    ClassMap(source=AUDIOSET, target=FSD50K).map_scores(scores_BC, absent_score=0.0).sum().backward()
    assert scores_BC.grad.sum() == 192


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 199), max_size=6), max_size=5))
def test_labels_survive_the_way_to_audioset_and_back(rows):
    """All but the eight; sorted and unique; no label stays no label."""
    there = ClassMap(source=FSD50K, target=AUDIOSET)
    back = ClassMap(source=AUDIOSET, target=FSD50K)
    mapped = there.map_labels(pl.Series("raw", rows, dtype=pl.List(pl.UInt16)))
    kept = [sorted({index for index in row if FSD50K.mids[index] in AUDIOSET.index_of}) for row in rows]
    assert back.map_labels(mapped).to_list() == kept
    assert [[AUDIOSET.mids[index] for index in row] for row in mapped] == [
        sorted((FSD50K.mids[index] for index in row), key=AUDIOSET.index_of.__getitem__) for row in kept
    ]
    assert (mapped.name, mapped.dtype) == ("raw", pl.List(pl.UInt16))


def test_what_cannot_be_mapped_is_refused():
    """Lists without a common id, scores of another number of classes, an index that is no class."""
    with pytest.raises(
        OntologyError, match=r"of 527 and 1 classes share not one id, such as /m/09x0r and dog"
    ):
        ClassMap(source=AUDIOSET, target=ClassList(mids=("dog",), names=("Dog",)))
    mapped = ClassMap(source=FSD50K, target=AUDIOSET)
    with pytest.raises(OntologyError, match="scores of 527 classes, expected 200"):
        mapped.map_scores(np.zeros((1, 527)), absent_score=0.0)
    with pytest.raises(OntologyError, match="row 1: class index 200, expected 0 to 199"):
        mapped.map_labels(pl.Series([[0], [200]], dtype=pl.List(pl.UInt16)))


def test_a_note_tells_what_is_outside_by_name():
    """The most frequent first, five by name; nothing where all ids are known."""
    rows = [["/m/0174k2", "/m/09x0r"], ["/m/0174k2"], ["/m/0"], [], ["/m/0bm0k", *"abcd"]]
    (note,) = describe_outside_ids(pl.Series(rows, dtype=pl.List(pl.String)), AUDIOSET)
    (one,) = describe_outside_ids(pl.Series([["/m/0nowhere"], []]), load_class_list())
    assert one == "1 class of labels is outside the class list and kept aside: /m/0nowhere 1 times"
    assert note.startswith("7 classes of labels are outside the class list and kept aside: ")
    assert "Washing machine (/m/0174k2) 2 times, /m/0 1 times, Crash cymbal (/m/0bm0k) 1 times, a" in note
    assert note.endswith(" and 2 more")
    assert describe_outside_ids(pl.Series([["/m/09x0r"], []], dtype=pl.List(pl.String)), AUDIOSET) == ()
    assert describe_outside_ids(pl.Series([[]], dtype=pl.List(pl.String)), AUDIOSET) == ()
