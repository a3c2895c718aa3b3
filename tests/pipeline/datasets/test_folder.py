"""A user's own folder and table become a corpus, however people write them."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sounds import write
from tones import built, halves, tones, write_seconds

from pipeline.datasets.catalogue import recreate_corpus
from pipeline.datasets.corpus import Corpus
from pipeline.datasets.folder import folder_corpus
from pipeline.errors import InputError, ManifestError, OntologyError
from pipeline.labels.label_sets import propagate_store_labels
from pipeline.store.feature_store import FeatureStore


@pytest.fixture
def clips(tmp_path) -> Path:
    """Three empty files in nested folders: enough where only names decide."""
    for name in ("a.wav", "Zürich/b c.WAV", "Zürich/deep/d.Flac"):
        (tmp_path / "clips" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clips" / name).touch()
    return tmp_path / "clips"


def write_table(clips: Path, text: str, *, encoding: str = "utf-8", name: str = "table.csv") -> Path:
    path = clips.parent / name
    path.write_bytes(text.encode(encoding))
    return path


def plan_rows(corpus: Corpus, *columns: str) -> list[tuple]:
    return corpus.plan.select(columns).rows()


def test_every_sound_below_the_folder_is_a_clip_named_by_its_path(clips):
    """Extensions in capitals, spaces and umlauts are what people have; a name must not depend on the machine."""
    (clips / "notes.txt").touch()
    corpus = folder_corpus(clips)
    names = ["a.wav", "Zürich/b c.WAV", "Zürich/deep/d.Flac"]
    assert plan_rows(corpus, "clip_id", "split", "start_seconds", "end_seconds") == [
        (name, "train", 0.0, 10.0) for name in names
    ]
    assert corpus.sources.frame["path"].to_list() == [str(clips / name) for name in names]
    assert corpus.sources.frame["source"].to_list() == names
    assert corpus.classes.names == ("unlabelled",)
    assert corpus.plan["mids"].to_list() == [[], [], []]
    assert "not evaluated" in corpus.notes[-1]


def test_the_folder_that_a_file_lies_in_can_be_its_label(clips):
    """One folder a class is the commonest layout there is; a file outside all of them has no label."""
    corpus = folder_corpus(clips, label_from="parent", split="mine", clip_seconds=3)
    assert corpus.classes.names == ("Zürich", "deep")
    assert plan_rows(corpus, "mids", "split", "end_seconds") == [
        ([], "mine", 3.0),
        (["Zürich"], "mine", 3.0),
        (["deep"], "mine", 3.0),
    ]


def test_notes_that_macos_leaves_beside_every_file_are_no_sounds(clips):
    """A drive that has seen a Mac holds a second file for each, which no decoder reads."""
    (clips / "._a.wav").touch()
    corpus = folder_corpus(clips)
    assert corpus.plan.height == 3
    assert "1 files named ._*" in corpus.notes[0]


TABLES = {
    "plain": "path,label\na.wav,dog\nZürich/b c.WAV,cat\n",
    "windows": "\ufeffpath,label\r\na.wav,dog\r\nZürich/b c.WAV,cat\r\n",
    "semicolons": "\ufeffPath;Label;note\r\na.wav;dog;\r\nZürich/b c.WAV;cat;x\r\n",
    "tabs": "path\tlabel\na.wav\tdog\n\nZürich/b c.WAV\tcat\n",
    "own name and dot": "path,label\n./a.wav,dog\nclips/Zürich/b c.WAV,cat\n",
    "backslashes": "path,label\na.wav,dog\nZürich\\b c.WAV,cat\n",
    "another machine": "path,label\nC:\\data\\clips\\a.wav,dog\n/home/me/clips/Zürich/b c.WAV,cat\n",
    "capitals": "path,label\nA.WAV,dog\nzürich/b c.wav,cat\n",
    "other extension": "path,label\na.mp3,dog\nZürich/b c,cat\n",
    "names only": "path,label\na.wav,dog\nb c.WAV,cat\n",
    "bare names": "path,label\na,dog\nb c,cat\n",
    "decomposed": unicodedata.normalize("NFD", "path,label\na.wav,dog\nZürich/b c.WAV,cat\n"),
    "quoted": '"path","label"\n"a.wav","dog"\n"Zürich/b c.WAV", "cat"\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_as_people_write_it(clips, name):
    """Spreadsheets, other machines and macOS each spell the same two lines their own way."""
    corpus = folder_corpus(clips, write_table(clips, TABLES[name]))
    assert plan_rows(corpus, "clip_id", "mids") == [("a.wav", ["dog"]), ("Zürich/b c.WAV", ["cat"])]
    assert corpus.classes.names == ("cat", "dog")
    assert corpus.sources.unmatched_sources == ["Zürich/deep/d.Flac"]


def test_a_path_that_is_there_as_written_is_taken_before_any_other_reading(clips):
    """Two names that differ by case only are two files; a container we do not look for may still be named."""
    for name in ("A.wav", "x.wav", "x.wma"):
        (clips / name).touch()
    corpus = folder_corpus(clips, write_table(clips, "path\nA.wav\na.wav\nx.wma\n"))
    assert corpus.plan["clip_id"].to_list() == ["A.wav", "a.wav", "x.wma"]
    assert not [note for note in corpus.notes if "not there" in note or "matched" in note]
    with pytest.raises(ManifestError, match=r"line 2: 'A.WAV' may be 'A.wav' or 'a.wav'"):
        folder_corpus(clips, write_table(clips, "path\nA.WAV\n"))


def test_absolute_paths_are_allowed(clips, tmp_path):
    """A table from a search over several disks; a path inside the folder is the same clip as its relative form."""
    (tmp_path / "elsewhere.wav").touch()
    corpus = folder_corpus(clips, write_table(clips, f"path\n{clips}/a.wav\n{tmp_path}/elsewhere.wav\n"))
    assert corpus.plan["clip_id"].to_list() == ["a.wav", f"{tmp_path}/elsewhere.wav"]
    assert corpus.sources.frame["path"].to_list() == [f"{clips}/a.wav", f"{tmp_path}/elsewhere.wav"]


def test_a_table_may_give_ids_splits_labels_and_times(clips):
    """Own ids, splits, several labels, none, and several stretches of one file."""
    text = (
        "id,path,labels,split,start,end\n"
        "one,a.wav,dog; cat;,train,,\n"
        ",a.wav,,test,2.5,4\n"
        ",Zürich/b c.WAV,dog,,,3.5\n"
    )
    corpus = folder_corpus(clips, write_table(clips, text), split="rest")
    columns = ("clip_id", "mids", "split", "start_seconds", "end_seconds")
    assert plan_rows(corpus, *columns) == [
        ("one", ["dog", "cat"], "train", 0.0, 10.0),
        ("a.wav@2500", [], "test", 2.5, 4.0),
        ("Zürich/b c.WAV", ["dog"], "rest", 0.0, 3.5),
    ]


@pytest.mark.parametrize("text", ["nan", "NaN", "None", "null", "<NA>", ""])
def test_what_programs_write_for_no_value_is_no_label(clips, text):
    """pandas writes nan; a class of that name would be learnt as any other."""
    corpus = folder_corpus(clips, write_table(clips, f"path,label\na.wav,dog\nZürich/b c.WAV,{text}\n"))
    assert plan_rows(corpus, "mids") == [(["dog"],), ([],)]
    told = [note for note in corpus.notes if "taken for no label" in note]
    assert [f"{text!r} 1 times; if it is a class" in note for note in told] == [True] * bool(text)


def test_times_may_have_decimal_commas_where_commas_do_not_separate(clips):
    """A German spreadsheet; labels keep their commas."""
    corpus = folder_corpus(clips, write_table(clips, "path;start;end;label\na.wav;1,5;2,75;1,5\n"))
    assert plan_rows(corpus, "start_seconds", "end_seconds", "mids") == [(1.5, 2.75, ["1,5"])]


def test_numbers_as_labels_are_ordered_as_numbers(clips):
    """Class 10 after class 2: so that index and label agree where labels are 0, 1, 2, ..."""
    frame = pl.DataFrame({"path": ["a.wav", "b c.WAV", "d.Flac"], "label": [10.0, 2.0, None]})
    frame.write_parquet(clips.parent / "t.parquet")
    for path in (clips.parent / "t.parquet", write_table(clips, "path,label\na,10\nb c,2\nd,\n")):
        corpus = folder_corpus(clips, path)
        assert corpus.classes.names == ("2", "10")
        assert corpus.plan["mids"].to_list() == [["10"], ["2"], []]


def test_parquet_holds_lists_of_labels(clips):
    """What pandas and polars write."""
    frame = pl.DataFrame({"path": ["a.wav", "b c.WAV"], "labels": [["x;y", "z"], None], "start": [0, 3]})
    frame.write_parquet(clips.parent / "t.parquet")
    corpus = folder_corpus(clips, clips.parent / "t.parquet")
    assert plan_rows(corpus, "clip_id", "mids", "start_seconds") == [
        ("a.wav", ["x;y", "z"], 0.0),
        ("Zürich/b c.WAV@3000", [], 3.0),
    ]


def test_unknown_columns_and_labels_with_commas_are_noted(clips):
    """A column misspelt is a column lost, and a comma may have been meant to separate labels."""
    notes = " ".join(folder_corpus(clips, write_table(clips, 'path,labels,Spilt\na.wav,"dog,cat",x\n')).notes)
    assert "columns left alone: 'spilt'" in notes
    assert "'dog,cat' is taken for one label" in notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename,label\na.wav,x\n", r"no column path; found filename, label; rename 'filename' to 'path'"),
        ("", "no column path; found nothing"),
        ("path,label\n", "no rows"),
        ("path,start,end\na.wav,4,4\n", "line 2: start 4 is not before end 4"),
        ("path,start\na.wav,1:30\n", "line 2: start is '1:30', expected seconds"),
        ("path,start\na.wav,-1\n", "line 2: start is '-1'"),
        ("path,end\na.wav,nan\n", "line 2: end is 'nan'"),
        ("path,label\na.wav,x\n,y\n", "line 3: no path"),
        ("path,label\na.wav,x,y\n", "line 2: 3 cells, the first line has 2"),
        ("path,label,labels\na.wav,x,y\n", "columns label and labels"),
        ("path,path\na.wav,a.wav\n", "column path stands twice"),
        ("path,start\na.wav,0\n./a.wav,\n", "line 3: 'a.wav' from 0 s on stands already in line 2"),
        ("path,id\na.wav,x\nb c.WAV,x\n", "line 3: id 'x' stands already in line 2"),
        (
            "path,label\nnone.wav,x\nZürich/b d.WAV,x\n",
            "2 of 2 files are not there, such as line 2: 'none.wav'",
        ),
        (
            "path\nZürich/b d.WAV\n",
            r"line 2: 'Zürich/b d.WAV' \(did you mean 'Zürich/b c.WAV'\?\); paths are taken",
        ),
    ],
)
def test_a_table_that_makes_no_sense_is_refused_with_its_line(clips, text, message):
    """Twenty thousand lines, one slip: the message must lead there."""
    with pytest.raises(ManifestError, match=message) as caught:
        folder_corpus(clips, write_table(clips, text))
    assert "table.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_that_is_no_utf8_says_where_and_what_to_do(clips):
    """Excel's plain CSV: guessing its encoding would give names that no file has."""
    with pytest.raises(ManifestError, match="line 2: not UTF-8 text; save it again"):
        folder_corpus(clips, write_table(clips, "path\nZürich/b c.WAV\n", encoding="cp1252"))


@pytest.mark.parametrize("name", ["none.csv", "none.parquet"])
def test_a_table_that_is_not_there_has_a_nearest_name(clips, name):
    """A typing error in the command."""
    write_table(clips, "path\na.wav\n", name=name.replace("none", "nine"))
    with pytest.raises(ManifestError, match=r"none.* cannot be read \(No such file.*did you mean .*nine"):
        folder_corpus(clips, clips.parent / name)


def test_a_csv_named_parquet_is_refused(clips):
    """A CSV under a wrong name."""
    with pytest.raises(ManifestError, match="no Parquet file"):
        folder_corpus(clips, write_table(clips, "path\na.wav\n", name="t.parquet"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hop_seconds": 5}, "hop_seconds without clip_seconds"),
        ({"clip_seconds": 0}, "clip_seconds 0: expected 0.1"),
        ({"clip_seconds": float("nan")}, "clip_seconds nan"),
        (
            {"clip_seconds": 10, "hop_seconds": 0.5},
            "hop_seconds 0.5: expected at least 0.1 of clip_seconds, 1",
        ),
        ({"split": " "}, "the split has no name"),
        (
            {"label_from": "Parent"},
            r"label_from 'Parent' is unknown; did you mean 'parent'\? There are: none, parent",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(clips, options, message):
    """Before thousands of files are opened."""
    with pytest.raises(InputError, match=message):
        folder_corpus(clips, **options)


def test_labels_from_two_places_are_refused(clips):
    """Nobody can guess which of them counts."""
    with pytest.raises(InputError, match="choose one"):
        folder_corpus(clips, write_table(clips, "path,label\na.wav,x\n"), label_from="parent")


def test_a_wrong_folder_says_what_is_there(clips):
    """The first mistake of a newcomer."""
    with pytest.raises(InputError, match=r"no such folder; did you mean .*/clips\?"):
        folder_corpus(clips.parent / "clisp")
    with pytest.raises(InputError, match="a file; give the folder"):
        folder_corpus(clips / "a.wav")
    (clips.parent / "lists" / "x").mkdir(parents=True)
    (clips.parent / "lists" / "x" / "y.MID").touch()
    with pytest.raises(
        InputError,
        match=r"no sounds below it; looked for \.wav, \.flac.* and \d+ other suffixes of sounds; found 1 \.mid",
    ):
        folder_corpus(clips.parent / "lists")


def test_labels_and_splits_arrive_in_the_store(tmp_path):
    """From the table's cells to what training and evaluation read."""
    for number in range(4):
        (tmp_path / "clips").mkdir(exist_ok=True)
        write(tmp_path / "clips" / f"{number}.wav", np.tile(tones(number), 3), 16_000)
    text = "path,label,split\n2.wav,dog;cat,train\n0.wav,cat,test\n3.wav,,train\n1.wav,cow,train\n"
    corpus = folder_corpus(tmp_path / "clips", write_table(tmp_path / "clips", text))
    store, tones_by_clip = built(corpus, tmp_path / "x.zarr")
    assert tones_by_clip == {f"{number}.wav": [number] * 6 for number in (2, 0, 3, 1)}
    assert store.good_rows(["test"]).tolist() == [1]
    assert store.classes.names == ("cat", "cow", "dog")
    assert store.labels_BC(store.good_rows()).tolist() == [[1, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_labels_that_are_not_audiosets_cannot_be_propagated(tmp_path):
    """There is no tree above them; the message says so and the store stays as it is."""
    write_seconds(tmp_path / "clips" / "dog" / "a.wav", 2)
    built(folder_corpus(tmp_path / "clips", label_from="parent"), tmp_path / "x.zarr")
    with pytest.raises(OntologyError, match="1 of 1 classes are not in the ontology, such as dog"):
        propagate_store_labels(tmp_path / "x.zarr")
    assert FeatureStore.open(tmp_path / "x.zarr").label_sets == ("raw",)


def test_the_same_corpus_can_be_made_again(clips):
    """From the settings in a store's build.json."""
    path = write_table(clips, "path,label\na.wav,x\nb c.WAV,y\n")
    for corpus in (
        folder_corpus(clips, path, split="s"),
        folder_corpus(str(clips), clip_seconds=2.0, hop_seconds=1.0),
    ):
        again = recreate_corpus(json.loads(json.dumps(corpus.dataset_settings)))
        assert again == replace(corpus, plan=again.plan, sources=again.sources)
        assert again.plan.equals(corpus.plan)
        assert again.sources.frame.equals(corpus.sources.frame)


def test_a_file_that_arrives_later_fills_its_row(tmp_path):
    """The other rows stay as they are, and nothing has to be asked for anew."""
    write_seconds(tmp_path / "clips" / "a.wav", 3)
    path = write_table(tmp_path / "clips", "path,label\nlate.wav,x\na.wav,y\n")
    assert built(folder_corpus(tmp_path / "clips", path), tmp_path / "x.zarr")[1] == {
        "a.wav": halves(0, 1, 2)
    }
    write_seconds(tmp_path / "clips" / "late.wav", 1)
    tones_by_clip = built(folder_corpus(tmp_path / "clips", path), tmp_path / "x.zarr")[1]
    assert tones_by_clip == {"late.wav": halves(0), "a.wav": halves(0, 1, 2)}
