"""ESC-50, Speech Commands and FSD50K in their official layouts, and whole or wrong copies of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sounds import write
from tones import RATE_HZ, built, halves, tones, write_seconds

from pipeline.datasets.catalogue import DATASETS, recreate_corpus
from pipeline.datasets.esc50 import esc50_corpus
from pipeline.datasets.fsd50k import fsd50k_corpus
from pipeline.datasets.speech_commands import SPEECH_COMMANDS_WORDS, speech_commands_corpus
from pipeline.errors import InputError, ManifestError, OntologyError
from pipeline.labels.label_sets import propagate_store_labels
from pipeline.labels.ontology import load_ontology
from pipeline.store.feature_store import FeatureStore


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def write_esc50(root: Path) -> Path:
    """Six clips of three classes in three folds; the sound of clip n is tone n."""
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for number in range(6):
        fold, target = 1 + number % 3, (49, 0, 11)[number // 2]
        name = f"{fold}-{100 + number}-A-{target}.wav"
        category = {0: "dog", 11: "sea_waves", 49: "hand_saw"}[target]
        lines.append(f"{name},{fold},{target},{category},{target < 12},{100 + number},A")
        touch(root / "audio" / name)
        write(root / "audio" / name, np.tile(tones(number), 5), RATE_HZ)
    touch(root / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    return root


def write_speech_commands(root: Path, version: str = "v2") -> Path:
    """One file a word, two of the first; lists as in the archive, one file of them lacking."""
    for word in SPEECH_COMMANDS_WORDS[version]:
        touch(root / word / "00000000_nohash_0.wav")
    touch(root / SPEECH_COMMANDS_WORDS[version][0] / "11111111_nohash_1.wav")
    touch(root / "_background_noise_" / "white_noise.wav")
    (root / "validation_list.txt").write_text("bed/00000000_nohash_0.wav\nbed/22222222_nohash_0.wav\n")
    (root / "testing_list.txt").write_text("cat/00000000_nohash_0.wav\n\n")
    return root


VOCABULARY = "0,Bark,/m/05tny_\n1,Chink_and_clink,/m/07q8k13\n2,Dog,/m/0bt9lr\n"


def write_fsd50k(root: Path) -> Path:
    """Three sounds for development, one for evaluation; second k of each is tone k."""
    lists = root / "FSD50K.ground_truth"
    touch(lists / "vocabulary.csv").write_text(VOCABULARY)
    (lists / "dev.csv").write_text(
        'fname,labels,mids,split\n11,"Bark,Dog","/m/05tny_,/m/0bt9lr",train\n'
        "12,Chink_and_clink,/m/07q8k13,val\n13,Dog,/m/0bt9lr,train\n"
    )
    (lists / "eval.csv").write_text('fname,labels,mids\n21,"Bark,Dog","/m/05tny_,/m/0bt9lr"\n')
    for name, seconds in {"dev_audio/11": 1.5, "dev_audio/12": 13.0, "eval_audio/21": 5.0}.items():
        write_seconds(root / f"FSD50K.{name}.wav", seconds)
    return root


WRITERS = {"esc50": write_esc50, "speech_commands": write_speech_commands, "fsd50k": write_fsd50k}


def test_esc50_becomes_five_folds_of_labelled_clips(tmp_path):
    """Row for row: its own sound, its own class, its own fold."""
    root = write_esc50(tmp_path / "ESC-50-master")
    (root / "audio" / "2-104-A-11.wav").unlink()
    corpus = esc50_corpus(root)
    assert corpus.classes.mids == ("dog", "sea_waves", "hand_saw")
    assert corpus.classes.names == ("dog", "sea waves", "hand saw")
    assert corpus.notes == (
        "1 of 6 listed files are missing, such as audio/2-104-A-11.wav",
        "6 clips, the official release has 2000",
        "3 classes, the official release has 50",
        "3 folds, the official release has 5",
    )
    store, tones_by_clip = built(corpus, tmp_path / "x.zarr")
    assert tones_by_clip == {
        "1-100-A-49": [0] * 10,
        "2-101-A-49": [1] * 10,
        "3-102-A-0": [2] * 10,
        "1-103-A-0": [3] * 10,
        "3-105-A-11": [5] * 10,
    }
    assert store.manifest["split"].to_list() == ["fold1", "fold2", "fold3", "fold1", "fold2", "fold3"]
    assert store.manifest["reason"].to_list() == [None] * 4 + ["missing"] + [None]
    assert store.labels_BC(np.arange(6)).argmax(1).tolist() == [2, 2, 0, 0, 1, 1]
    with pytest.raises(OntologyError, match="3 of 3 classes are not in the ontology, such as dog"):
        propagate_store_labels(tmp_path / "x.zarr")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1-1-A-0.wav,1,0,cat,False,1,A", "line 8: target 0 is 'cat', above 'dog'"),
        ("1-1-A-0.wav,1,dog,0,False,1,A", "line 8: target and fold must be whole numbers"),
        ("1-1-A-0.wav,1,0", "line 8: 3 cells, expected 7"),
        (
            "1-100-A-49.wav,1,49,hand_saw,False,1,A",
            "2 clips share their id with another, such as '1-100-A-49'",
        ),
    ],
)
def test_a_damaged_list_of_esc50_is_refused(tmp_path, line, message):
    """A class under two names would silently be two."""
    root = write_esc50(tmp_path)
    with (root / "meta" / "esc50.csv").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ManifestError, match=message):
        esc50_corpus(root)


def test_a_list_without_its_columns_is_refused(tmp_path):
    """Somebody else's esc50.csv."""
    root = write_esc50(tmp_path)
    (root / "meta" / "esc50.csv").write_text("name,label\n")
    with pytest.raises(
        ManifestError, match=r"no column filename, fold, target, category; found 'name, label'"
    ):
        esc50_corpus(root)


@pytest.mark.parametrize("name", WRITERS)
def test_the_folder_above_or_below_is_recognised(tmp_path, name):
    """Archives unpack into a folder of their own, and nobody remembers which of them to give."""
    root = WRITERS[name](tmp_path / "data" / "unpacked" / "it")
    below = next(path for path in sorted(root.iterdir()) if path.is_dir())
    for wrong in (root.parent, root.parent.parent, below):
        with pytest.raises(InputError, match=rf"these are in {root}: give that"):
            DATASETS[name](wrong)


@pytest.mark.parametrize("name", WRITERS)
def test_an_archive_must_be_unpacked_first(tmp_path, name):
    """For the file itself, and for a folder that holds nothing else, the error says so."""
    archive = touch(tmp_path / "a" / "it.tar.gz")
    with pytest.raises(InputError, match="an archive: unpack it and give the folder that holds"):
        DATASETS[name](archive)
    with pytest.raises(InputError, match=r"expected .*; found it\.tar\.gz; unpack it\.tar\.gz first"):
        DATASETS[name](archive.parent)


@pytest.mark.parametrize("name", WRITERS)
def test_a_wrong_folder_says_what_was_expected_and_found(tmp_path, name):
    """For a misspelt one the error names the nearest folder."""
    for number in range(10):
        (tmp_path / "data" / f"{number}").mkdir(parents=True)
    with pytest.raises(InputError, match=r"expected .*; found 0/, 1/, .*7/ and 2 more; give the folder"):
        DATASETS[name](tmp_path / "data")
    with pytest.raises(InputError, match=r"no such folder; did you mean .*/data\?"):
        DATASETS[name](tmp_path / "dta")


@pytest.mark.parametrize("name", ["esc50", "fsd50k"])
def test_lists_without_any_sound_are_refused(tmp_path, name):
    """The lists come in an archive of their own: easy to unpack only them."""
    root = WRITERS[name](tmp_path)
    for path in root.rglob("*.wav"):
        path.unlink()
    with pytest.raises(InputError, match=r"not one of \d listed files is there, such as"):
        DATASETS[name](root)


@pytest.mark.parametrize("name", WRITERS)
def test_every_dataset_can_be_made_again_from_its_settings(tmp_path, name):
    """JSON in, the same plan out."""
    root = WRITERS[name](tmp_path)
    for corpus in (DATASETS[name](root), DATASETS[name](str(root))):
        again = recreate_corpus(json.loads(json.dumps(corpus.dataset_settings)))
        assert again == replace(corpus, plan=again.plan, sources=again.sources)
        assert again.plan.equals(corpus.plan)
        assert again.sources.frame.equals(corpus.sources.frame)


def test_a_corpus_made_again_has_the_same_settings(tmp_path):
    """A corpus made again with other settings would be another store."""
    settings = {
        "dataset": "fsd50k",
        "root": str(write_fsd50k(tmp_path / "a")),
        "clip_seconds": 4.0,
        "cut": True,
    }
    assert recreate_corpus(settings).dataset_settings == settings
    root = str(write_speech_commands(tmp_path / "b", "v1"))
    settings = {"dataset": "speech_commands", "root": root, "version": "v1"}
    assert recreate_corpus(settings).dataset_settings == settings


@pytest.mark.parametrize(("version", "words"), [("v1", 30), ("v2", 35)])
def test_speech_commands_is_split_by_its_lists(tmp_path, version, words):
    """A file that no list names is for training; background noise is no word."""
    corpus = speech_commands_corpus(write_speech_commands(tmp_path, version), version)
    plan = corpus.plan
    assert len(corpus.classes) == words
    assert plan.height == words + 2
    assert plan["clip_id"].is_sorted()
    split_of = dict(plan.select("clip_id", "split").rows())
    assert {key: split for key, split in split_of.items() if split != "train"} == {
        "bed/00000000_nohash_0": "validation",
        "bed/22222222_nohash_0": "validation",
        "cat/00000000_nohash_0": "test",
    }
    assert plan["mids"].list.first().to_list() == [name.partition("/")[0] for name in plan["clip_id"]]
    assert plan["mids"].list.len().unique().to_list() == [1]
    assert plan["end_seconds"].unique().to_list() == [1.0]
    assert "1 of" in corpus.notes[0]
    assert "such as bed/22222222_nohash_0.wav" in corpus.notes[0]
    assert (
        corpus.notes[1]
        == "1 recordings of background noise left out, such as _background_noise_/white_noise.wav"
    )
    assert corpus.sources.unmatched_sources == ["_background_noise_/white_noise.wav"]


def test_the_versions_of_speech_commands_are_not_mixed_up(tmp_path):
    """Five words would be lost, or be classes without a clip."""
    with pytest.raises(InputError, match=r"holds backward, follow, .* words of v2 only; ask for version v2"):
        speech_commands_corpus(write_speech_commands(tmp_path / "2", "v2"), "v1")
    with pytest.raises(
        InputError, match=r"holds the words of v1 only, none of backward .*; ask for version v1"
    ):
        speech_commands_corpus(write_speech_commands(tmp_path / "1", "v1"), "v2")
    with pytest.raises(
        InputError, match=r"version '0\.02' is unknown; did you mean 'v2'\? There are: v1, v2"
    ):
        speech_commands_corpus(tmp_path / "2", "0.02")


def test_folders_that_are_no_words_are_noted(tmp_path):
    """People add their own; whether those were meant to count is theirs to say."""
    touch(write_speech_commands(tmp_path) / "marvni" / "00000000_nohash_0.wav")
    notes = " ".join(speech_commands_corpus(tmp_path).notes)
    assert (
        "1 files in folders that are no words of v2 left out, such as marvni/00000000_nohash_0.wav" in notes
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("00000000_nohash_0.wav", "line 3: expected word/file.wav, found '00000000_nohash_0.wav'"),
        ("bed/00000000_nohash_0.wav", "line 3: bed/00000000_nohash_0.wav is also in validation_list.txt"),
    ],
)
def test_lists_that_contradict_each_other_are_refused(tmp_path, line, message):
    """A clip to tune on and to test on would make the score a lie."""
    write_speech_commands(tmp_path)
    with (tmp_path / "testing_list.txt").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(InputError, match=message):
        speech_commands_corpus(tmp_path)


def test_speech_commands_without_words_is_refused(tmp_path):
    """Both lists, and nothing that they list."""
    for name in ("validation_list.txt", "testing_list.txt"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="no sounds in folders of its words, such as backward/"):
        speech_commands_corpus(tmp_path)


def test_fsd50k_keeps_audiosets_ids_and_three_splits(tmp_path):
    """Labels by id: with AudioSet's tree they could be propagated, and are already."""
    corpus = fsd50k_corpus(write_fsd50k(tmp_path))
    assert corpus.classes.mids == ("/m/05tny_", "/m/07q8k13", "/m/0bt9lr")
    assert corpus.classes.names == ("Bark", "Chink and clink", "Dog")
    assert corpus.plan.select("clip_id", "split", "start_seconds", "end_seconds").rows() == [
        ("11", "train", 0.0, 10.0),
        ("12", "val", 0.0, 10.0),
        ("13", "train", 0.0, 10.0),
        ("21", "eval", 0.0, 10.0),
    ]
    assert corpus.notes[0] == "1 of 3 listed files are missing, such as FSD50K.dev_audio/13.wav"
    assert "3 dev sounds, the official release has 40966" in corpus.notes
    assert set(corpus.classes.mids) <= {node.mid for node in load_ontology().nodes}


def test_long_sounds_of_fsd50k_are_cut_if_asked_to(tmp_path):
    """Every piece holds its own seconds and the labels of the whole; a missing sound stays one row."""
    corpus = fsd50k_corpus(write_fsd50k(tmp_path / "FSD50K"), clip_seconds=5.0, cut=True)
    store, tones_by_clip = built(corpus, tmp_path / "x.zarr")
    assert tones_by_clip == {
        "11@0": [0, 0, 1],
        "12@0": halves(*range(5)),
        "12@5000": halves(*range(5, 10)),
        "12@10000": [10, 10, 11, 11, 12, 12],
        "21@0": halves(*range(5)),
    }
    labels = dict(zip(store.manifest["clip_id"], store.labels_BC(np.arange(6)).tolist(), strict=True))
    assert labels["11@0"] == labels["21@0"] == [1, 0, 1]
    assert labels["12@0"] == labels["12@10000"] == [0, 1, 0]
    failed = store.manifest.filter(pl.col("status") == "failed")
    assert failed.select("clip_id", "reason").rows() == [("13@0", "missing")]
    propagate_store_labels(tmp_path / "x.zarr")
    assert FeatureStore.open(tmp_path / "x.zarr").label_sets == ("raw", "unambiguous")


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("dev.csv", "14,Cat,/m/01yrx,train", "line 5: /m/01yrx is not in vocabulary.csv"),
        ("dev.csv", "14,Dog,/m/0bt9lr,test", "line 5: split 'test', expected train or val"),
        ("eval.csv", "22,Dog", "line 3: 2 cells, expected 3"),
        ("vocabulary.csv", "4,Cat,/m/01yrx", "line 4: '4,Cat,/m/01yrx', expected 3,name,mid"),
    ],
)
def test_damaged_lists_of_fsd50k_are_refused(tmp_path, name, line, message):
    """A label that no class stands for, or a split nobody evaluates, is a damaged copy."""
    with (write_fsd50k(tmp_path) / "FSD50K.ground_truth" / name).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ManifestError, match=rf"{name}: {message}"):
        fsd50k_corpus(tmp_path)


def test_an_unknown_dataset_is_refused_with_the_known_names():
    """A store from a newer version, or a hand-made request."""
    with pytest.raises(
        InputError, match=r"dataset 'esc10' is unknown; did you mean 'esc50'\? There are: audioset, folder"
    ):
        recreate_corpus({"dataset": "esc10"})
