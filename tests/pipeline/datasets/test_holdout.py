"""Sounds are held out whole, label by label, by a rule that is told; what is left out is told too."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from sounds import write
from tones import write_seconds

from pipeline.audio.mel_spec import preset_mel_spec, with_clip_seconds
from pipeline.build.build import build_store
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.cli.build import describe_left_out, describe_nothing_to_measure
from pipeline.datasets.catalogue import recreate_corpus
from pipeline.datasets.corpus import Corpus, ListedClip
from pipeline.datasets.folder import folder_corpus
from pipeline.datasets.holdout import NO_HELD_OUT_SPLIT_NOTE, hold_out_clips
from pipeline.errors import InputError, ManifestError, StoreError
from pipeline.store.splits import deal_groups_to_folds, hold_out_groups


@pytest.fixture
def sounds(tmp_path):
    """Twenty empty sounds in two folders of ten: enough where only names decide."""
    for label in ("cat", "dog"):
        (tmp_path / "sounds" / label).mkdir(parents=True)
        for number in range(10):
            (tmp_path / "sounds" / label / f"{number}.wav").touch()
    return tmp_path / "sounds"


def write_table(sounds, header: str, *rows: str):
    path = sounds.parent / "table.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def split_of(corpus: Corpus) -> dict[str, str]:
    return dict(corpus.plan.select("clip_id", "split").rows())


def held_out(corpus: Corpus) -> set[str]:
    return {clip_id for clip_id, split in split_of(corpus).items() if split == "eval"}


def test_a_fifth_of_the_sounds_of_each_label_is_held_out(sounds):
    """Folders that are labels are not held out whole: a class that nothing is trained on cannot be measured."""
    corpus = folder_corpus(sounds, label_from="parent", holdout=0.2)
    chosen = held_out(corpus)
    assert sorted(name.partition("/")[0] for name in chosen) == ["cat", "cat", "dog", "dog"]
    assert chosen == held_out(folder_corpus(sounds, label_from="parent", holdout=0.2))
    assert "eval: 4 of 20 clips, by file, of each label alike, drawn by a hash of names" in corpus.notes
    assert chosen < held_out(folder_corpus(sounds, label_from="parent", holdout=0.5))


def test_a_store_of_another_holdout_says_what_has_changed(tmp_path):
    """Also which length of the clips: the mel spec has the same name."""
    for number in range(4):
        write_seconds(tmp_path / "one" / f"{number}.wav", 1.0)

    def store_with(seconds: float, **options):
        spec = with_clip_seconds(preset_mel_spec("a-jepa"), seconds)
        output = StoreOutput(path=tmp_path / "x.zarr", spec=spec, dtype="float16")
        return build_store(
            folder_corpus(tmp_path / "one", clip_seconds=seconds, **options), output, BuildOptions(workers=0)
        )

    store_with(1, holdout=0.25)
    with pytest.raises(StoreError, match=r"classes \(holdout 0\.25 -> 0\.5\); give the same, or choose"):
        store_with(1, holdout=0.5)
    with pytest.raises(StoreError, match=r"holds mel spec a-jepa of 1 s, not a-jepa of 2 s; choose another"):
        store_with(2, holdout=0.25)


def test_an_evaluation_split_without_a_good_clip_is_told():
    """Right after the build, and not when a model has been trained."""
    rows = {"split": ["train", "eval", "test"], "status": ["good", "failed", "failed"]}
    told = describe_nothing_to_measure(pl.DataFrame(rows))
    assert told == "no good clip in eval or test: ajepa-train evaluate has nothing to measure on"
    rows["status"] = ["good", "failed", "good"]
    assert describe_nothing_to_measure(pl.DataFrame(rows)) is None
    assert describe_nothing_to_measure(pl.DataFrame({"split": ["train"], "status": ["failed"]})) is None


def test_pieces_of_one_sound_are_never_on_both_sides(tmp_path):
    """Neighbouring seconds of a recording are nearly the same clip."""
    for number in range(4):
        write_seconds(tmp_path / "long" / f"{number}.wav", 3.0)
    corpus = folder_corpus(tmp_path / "long", clip_seconds=1, hop_seconds=1, holdout=0.25)
    splits = split_of(corpus)
    assert len(splits) == 12
    sides = {name: {split for clip, split in splits.items() if clip.startswith(name)} for name in "0123"}
    assert sorted(map(sorted, sides.values())) == [["eval"], ["train"], ["train"], ["train"]]


def clip(source: str, *mids: str, split: str = "train") -> ListedClip:
    return ListedClip(clip_id=source, path=source, source=source, split=split, mids=mids)


def test_folders_stay_together_where_no_label_is_lost_by_it(tmp_path):
    """A folder is most often a site, a day or a speaker, whose sounds resemble each other."""
    clips = [clip(f"site{number % 5}/{number}.wav", "bird" if number % 2 else "frog") for number in range(40)]
    divided, (note,) = hold_out_clips(clips, [None] * 40, 0.2, None)
    folders = {held.source.partition("/")[0] for held in divided if held.split == "eval"}
    assert len(folders) == 1
    assert sum(held.split == "eval" for held in divided) == 8
    assert "by folder" in note
    by_file, (note,) = hold_out_clips(clips, [None] * 40, 0.2, "file")
    assert len({held.source.partition("/")[0] for held in by_file if held.split == "eval"}) > 1
    assert "by file" in note


def test_a_column_of_groups_decides_if_there_is_one(sounds):
    """Only the user knows which files are of one bird."""
    rows = [f"{label}/{number}.wav,{label},{number % 5}" for label in ("cat", "dog") for number in range(10)]
    corpus = folder_corpus(sounds, write_table(sounds, "path,label,group", *rows), holdout=0.2)
    groups = {row.split(",")[2] for row in rows if row.split(",")[0] in held_out(corpus)}
    assert len(groups) == 1
    assert len(held_out(corpus)) == 4
    table = write_table(sounds, "path,label,bird", *rows)
    named = folder_corpus(sounds, table, holdout=0.2, group="bird")
    assert held_out(named) == held_out(corpus)
    assert not [note for note in named.notes if "columns left alone" in note]
    with pytest.raises(ManifestError, match="no column brid; did you mean 'bird'"):
        folder_corpus(sounds, table, holdout=0.2, group="brid")


def test_a_store_remembers_what_was_held_out(sounds):
    """A repair must find the same plan; a store without it has the record that it always had."""
    corpus = folder_corpus(sounds, label_from="parent", holdout=0.2)
    assert recreate_corpus(corpus.dataset_settings).plan.equals(corpus.plan)
    assert not {"holdout", "group", "split_column"} & set(folder_corpus(sounds).dataset_settings)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"holdout": 1.0}, "holdout 1: expected a share of the sounds above 0 and below 1"),
        ({"holdout": 0.2, "split": "test"}, "the table has clips of test already; leave it out"),
        ({"group": "folder"}, "group 'folder' without holdout"),
        ({"holdout": 0.2, "group": "site"}, "group 'site': expected file or folder, or a table"),
        ({"split_column": "part"}, "split_column 'part' without a table"),
        (
            {"holdout": 0.2, "group": "folder", "label_from": "parent"},
            "no label is in two groups by folder, so none can be held out; try --group file",
        ),
    ],
)
def test_options_that_make_no_split_are_refused(sounds, options, said):
    """Before anything is decoded."""
    with pytest.raises(InputError, match=said):
        folder_corpus(sounds, **options)


@pytest.mark.parametrize("labels", [["a"] * 10, ["a", "b"] * 10, ["a"] * 9 + ["b"], [""] * 5])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_each_label_is_on_both_sides_where_it_has_two_groups(labels, share):
    """A law of the rule, for any share."""
    labels_by_group = {f"g{number}": {label} - {""} for number, label in enumerate(labels)}
    chosen = hold_out_groups(labels_by_group, share)
    for label in set(labels):
        groups = {group for group, own in labels_by_group.items() if own == {label} - {""}}
        if len(groups) > 1:
            assert 0 < len(groups & chosen) < len(groups)
        else:
            assert not groups & chosen


def test_folds_are_dealt_label_by_label():
    """Of any label, no fold has two sounds more than another."""
    labels_by_group = {f"g{number}": {"ab"[number % 2]} for number in range(23)}
    fold_of = deal_groups_to_folds(labels_by_group, 5)
    for label in "ab":
        counts = np.bincount(
            [fold_of[g] for g, own in labels_by_group.items() if own == {label}], minlength=5
        )
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("numbers", [("1", "2"), ("0", "1")])
def test_a_split_column_of_any_name_is_read(sounds, numbers):
    """`subset`, `partition` and numbered folds are what published tables have."""
    rows = ["cat/0.wav,validation", "dog/0.wav,train"]
    corpus = folder_corpus(sounds, write_table(sounds, "path,Subset", *rows), split_column="subset")
    assert split_of(corpus) == {"cat/0.wav": "validation", "dog/0.wav": "train"}
    assert not [note for note in corpus.notes if "left alone" in note or note == NO_HELD_OUT_SPLIT_NOTE]
    rows = [f"cat/0.wav,{numbers[0]}", f"dog/0.wav,{numbers[1]}"]
    folds = folder_corpus(sounds, write_table(sounds, "path,fold", *rows), split_column="fold")
    assert split_of(folds) == {"cat/0.wav": "fold1", "dog/0.wav": "fold2"}
    with pytest.raises(ManifestError, match="no column part; did you mean 'path'"):
        folder_corpus(sounds, write_table(sounds, "path,fold", *rows), split_column="part")


def test_a_store_without_a_split_to_measure_on_says_so_at_its_build(sounds):
    """And which option mends it, before hours of decoding."""
    assert NO_HELD_OUT_SPLIT_NOTE in folder_corpus(sounds, label_from="parent").notes
    assert NO_HELD_OUT_SPLIT_NOTE not in folder_corpus(sounds, label_from="parent", holdout=0.2).notes
    assert "--holdout 0.2" in NO_HELD_OUT_SPLIT_NOTE


def test_sounds_that_no_row_of_the_table_names_are_counted(sounds):
    """A table of last year's files would leave out this year's without a word."""
    corpus = folder_corpus(sounds, write_table(sounds, "path", "cat/0.wav", "dog/1.wav"))
    assert (
        "18 sounds of the folder are in no row of the table and left out, such as cat/1.wav" in corpus.notes
    )


def test_minutes_that_no_clip_holds_are_told(tmp_path):
    """Of long sounds only the first seconds are kept unless somebody asks for all."""
    for name, seconds in (("a.wav", 100), ("b.wav", 6), ("c.wav", 5.1), ("d.wav", 3)):
        (tmp_path / "sounds").mkdir(exist_ok=True)
        wave_S = 0.1 * np.random.default_rng(0).standard_normal(round(seconds * 8_000))
        write(tmp_path / "sounds" / name, wave_S, 8_000)
    spec = replace(preset_mel_spec("a-jepa"), clip_seconds=5.0)

    def note_of(**options) -> str | None:
        corpus = folder_corpus(tmp_path / "sounds", clip_seconds=5, **options)
        out = tmp_path / f"{len(options)}.zarr"
        manifest = build_store(corpus, StoreOutput(path=out, spec=spec), BuildOptions(workers=0))
        return describe_left_out(corpus.dataset_settings, manifest, spec.clip_seconds)

    assert note_of() == (
        "2 sounds are longer than 5 s: 1.6 minutes are left out; --clip-seconds 5 --hop-seconds 5 keeps them"
    )
    assert note_of(hop_seconds=5) is None
