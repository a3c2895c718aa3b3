"""Which sound belongs to which row, in any layout."""

import tarfile
import time

import pytest
from archives import write_parquet, write_passt, write_tar

from pipeline.audio.sources import SOURCES_SCHEMA
from pipeline.datasets.audioset import audioset_corpus, match_sounds_to_plan
from pipeline.datasets.catalogue import recreate_corpus
from pipeline.errors import InputError
from pipeline.labels.segment_lists import plan_segment_lists

HEAD = "# Segments csv created today\n# num_ytids=2\n# YTID, start_seconds, end_seconds, positive_labels\n"


def write(path, *lines, head=HEAD):
    path.write_text(head + "".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "{}.wav",
        "Y{}.wav",
        "{}_30.000_40.000.m4a",
        "{}_30000.flac",
        "{}_30_40.opus",
        "Y{}_30.mp3",
        "a/b/{}.WAV",
        "{}_30000_40000.webm",
        "{}_30-40.wav",
        "{}-30.0-40.0.wav",
        "id_{}.m4a",
        "id_{}_30.m4a",
    ],
)
@pytest.mark.parametrize(
    "clip_id", ["abcdefghijk", "-b_defgh_1_", "Yabcdefghij", "id_abcdefgh", "___________"]
)
def test_every_common_naming_is_found(tmp_path, name, clip_id):
    """14 % of the ids contain an underscore, 3 % begin with a dash, some begin with Y."""
    plan, _ = plan_segment_lists([write(tmp_path / "x.csv", f'{clip_id}, 30.000, 40.000, ""')])
    file = tmp_path / "audio" / name.format(clip_id)
    file.parent.mkdir(parents=True)
    file.touch()
    assert match_sounds_to_plan(plan, [tmp_path / "audio"]).frame["path"].to_list() == [str(file)]


def test_a_file_of_another_segment_of_the_video_is_not_the_clip(tmp_path):
    """AudioSet's strong labels use other segments of the same videos."""
    plan, _ = plan_segment_lists(
        [write(tmp_path / "x.csv", 'abcdefghijk, 30.000, 40.000, ""', 'bbbbbbbbbbb, 0.000, 1.000, ""')]
    )
    for name in ("abcdefghijk_50000.wav", "bbbbbbbbbbb.wav"):
        (tmp_path / name).touch()
    assert match_sounds_to_plan(plan, [tmp_path]).frame["path"].to_list() == [
        None,
        str(tmp_path / "bbbbbbbbbbb.wav"),
    ]


def test_among_several_files_the_split_then_the_container_decides(tmp_path):
    """Which of two files is used must not depend on the order in which a disk lists them."""
    plan, _ = plan_segment_lists([write(tmp_path / "eval_segments.csv", 'abcdefghijk, 0.000, 10.000, ""')])
    for name in ("a/abcdefghijk.flac", "eval/abcdefghijk.mp3", "eval/abcdefghijk.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert match_sounds_to_plan(plan, [tmp_path]).frame["source"].to_list() == ["eval/abcdefghijk.wav"]


def test_ids_differ_by_case(tmp_path):
    """YouTube ids do, even where a file system would not."""
    plan, _ = plan_segment_lists(
        [write(tmp_path / "x.csv", 'abcdefghijk, 0.000, 1.000, ""', 'ABCDEFGHIJK, 0.000, 1.000, ""')]
    )
    (tmp_path / "ABCDEFGHIJK.wav").touch()
    assert match_sounds_to_plan(plan, [tmp_path]).frame["source"].to_list() == [None, "ABCDEFGHIJK.wav"]


def test_sounds_that_match_no_clip_are_listed(tmp_path):
    """Five hundred unmatched files are a wrong list, not a detail."""
    plan, _ = plan_segment_lists([write(tmp_path / "x.csv", 'abcdefghijk, 0.000, 1.000, ""')])
    for name in ("abcdefghijk.wav", "zzzzzzzzzzz.wav", "holiday.mp3", "notes.txt"):
        (tmp_path / name).touch()
    assert match_sounds_to_plan(plan, [tmp_path]).unmatched_sources == ["holiday.mp3", "zzzzzzzzzzz.wav"]


def test_wrong_folders_say_what_was_looked_for_and_found(tmp_path):
    """The first mistake of a newcomer is the wrong folder."""
    plan, _ = plan_segment_lists([write(tmp_path / "x.csv", 'abcdefghijk, 0.000, 1.000, ""')])
    with pytest.raises(InputError, match="no such folder or file"):
        match_sounds_to_plan(plan, [tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"no audio files .* looked for .*\.flac"):
        match_sounds_to_plan(plan, [tmp_path])
    (tmp_path / "holiday.mp3").touch()
    with pytest.raises(InputError, match=r"looked for names like abcdefghijk\.wav, found holiday\.mp3"):
        match_sounds_to_plan(plan, [tmp_path])


ID = "abcdefghijk"


def plan_of(path, *rows):
    """The plan of a segments list with these rows."""
    return plan_segment_lists([write(path, *rows)])[0]


def write_sound(folder, place):
    """Write a sound at a place such as `a/b.tar::c.wav`: a loose file, or an archive with it."""
    path, _, member = place.partition("::")
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    if not member:
        file.touch()
    elif file.suffix == ".tar":
        write_tar(file, {member: b"x"})
    elif file.suffix == ".parquet":
        write_parquet(file, {member: b"x"})
    else:
        pytest.importorskip("h5py")
        write_passt(file, {member: b"x"})


@pytest.mark.parametrize(
    "places",  # the one preferred first
    [
        (f"eval/{ID}.mp3", f"a/{ID}_30.flac"),
        (f"eval/{ID}.mp3", f"evaluation/{ID}.flac"),
        (f"eval-00003.tar::{ID}.mp3", f"a/{ID}.flac"),
        (f"eval.h5::Y{ID}.mp3", f"unbalanced_eval.h5::Y{ID}.mp3"),
        (f"eval-00000-of-00001.parquet::{ID}.mp3", f"a.parquet::{ID}.flac"),
        (f"x.tar::eval/{ID}.mp3", f"a/{ID}.flac"),
        (f"{ID}_30000_40000.mp3", f"{ID}.flac"),
        (f"x.tar::{ID}.flac", f"{ID}.wav"),
        (f"x.parquet::{ID}.wav", f"{ID}.mp3"),
        (f"x.h5::{ID}.mp3", f"x.parquet::{ID}"),
        (f"z/{ID}.wav", f"a.tar::{ID}.wav"),
        (f"z.tar::{ID}.wav", f"a.parquet::{ID}.wav"),
        (f"z.parquet::{ID}.wav", f"a.h5::{ID}.wav"),
        (f"a/{ID}.wav", f"b/{ID}.wav"),
        (f"a/Y{ID}.wav", f"a/{ID}.wav"),
    ],
)
def test_among_several_sounds_the_stated_order_decides(tmp_path, places):
    """Split, start, container, layout, name: whatever a disk lists first."""
    plan = plan_of(tmp_path / "eval_segments.csv", f'{ID}, 30.000, 40.000, ""')
    for place in reversed(places):
        write_sound(tmp_path / "audio", place)
    sources = match_sounds_to_plan(plan, [tmp_path / "audio"])
    assert sources.frame["source"].to_list() == [places[0]]
    assert (sources.sound_count, sources.unmatched_sources, sources.notes) == (2, [], ())


def test_layouts_mix_freely_and_may_be_single_files(tmp_path):
    """A little of the set in each, some of it given by name."""
    ids = [f"{number:011d}" for number in range(6)]
    plan = plan_of(tmp_path / "x.csv", *(f'{clip_id}, 30.000, 40.000, ""' for clip_id in ids))
    for place in (f"a/{ids[0]}.wav", f"a/b.tar::Y{ids[1]}.wav", f"c.parquet::{ids[2]}.wav", f"{ids[4]}.mp3"):
        write_sound(tmp_path, place)
    write_sound(tmp_path, f"d.h5::Y{ids[3]}.mp3")
    places = [tmp_path / "a", tmp_path / "c.parquet", tmp_path / "d.h5", tmp_path / f"{ids[4]}.mp3"]
    sources = match_sounds_to_plan(plan, places)
    assert sources.frame["kind"].to_list() == ["file", "tar", "parquet", "hdf5", "file", None]
    assert [locator and locator.name for locator in sources.locators_of_rows(range(6))] == [
        f"{ids[0]}.wav",
        f"Y{ids[1]}.wav",
        f"{ids[2]}.wav",
        f"Y{ids[3]}.mp3",
        f"{ids[4]}.mp3",
        None,
    ]
    assert dict(sources.frame.schema) == SOURCES_SCHEMA


def test_a_path_names_a_row_of_parquet_and_else_its_id_column(tmp_path):
    """Hugging Face's own viewers leave `path` empty, or fill it with a hash."""
    files = {f"{ID}_30.flac": b"x", "0a1b.flac": b"y"}
    write_parquet(tmp_path / "x.parquet", files, video_id=["zzzzzzzzzzz", "bbbbbbbbbbb"])
    plan = plan_of(tmp_path / "x.csv", f'{ID}, 30.000, 40.000, ""', 'bbbbbbbbbbb, 0.000, 1.000, ""')
    assert match_sounds_to_plan(plan, [tmp_path]).frame["row"].to_list() == [0, 1]


def test_a_listed_id_in_its_column_is_that_of_the_sound_whatever_its_name(tmp_path):
    """`audio_00017` has the form of an id without being one; so may the name have the id of another row."""
    files = {"audio_00000.wav": b"x", "audio_00001.wav": b"y", f"{ID}_30.wav": b"z"}
    write_parquet(tmp_path / "x.parquet", files, video_id=["bbbbbbbbbbb", "ccccccccccc", ID])
    plan = plan_of(
        tmp_path / "x.csv",
        f'{ID}, 30.000, 40.000, ""',
        'bbbbbbbbbbb, 0.000, 1.000, ""',
        'ccccccccccc, 5.000, 6.000, ""',
    )
    sources = match_sounds_to_plan(plan, [tmp_path])
    assert sources.frame["source"].str.extract("::(.*)").to_list() == [
        f"{ID}_30.wav",
        "audio_00000.wav",
        "audio_00001.wav",
    ]


def test_a_sound_of_another_start_is_reported_apart(tmp_path):
    """Not unknown, not used: the list wants other seconds of the video."""
    plan = plan_of(tmp_path / "x.csv", f'{ID}, 30.000, 40.000, ""', f'{ID}, 70.000, 80.000, ""')
    for name in (f"{ID}.wav", f"{ID}_50000.wav", f"{ID}_70.wav", "zzzzzzzzzzz_5.wav"):
        (tmp_path / name).touch()
    sources = match_sounds_to_plan(plan, [tmp_path])
    assert sources.frame["source"].to_list() == [f"{ID}.wav", None]  # the second row is a duplicate
    assert sources.other_segment_sources == [f"{ID}_50000.wav"]
    assert sources.unmatched_sources == ["zzzzzzzzzzz_5.wav"]
    (note,) = (note for note in sources.notes if "segments" in note)
    assert note.startswith("1 sounds are other segments of listed videos")


def test_starts_agree_to_the_millisecond(tmp_path):
    """Decimal fractions are not exact in binary, and 1000 times 4.35 is not 4350."""
    plan = plan_of(tmp_path / "x.csv", f'{ID}, 4.350, 14.350, ""', 'bbbbbbbbbbb, 8.290, 9.000, ""')
    for name in (f"{ID}_4350_14350.wav", "bbbbbbbbbbb_8.29_9.wav"):
        (tmp_path / name).touch()
    assert match_sounds_to_plan(plan, [tmp_path]).frame["kind"].to_list() == ["file", "file"]


def test_the_corpus_carries_its_notes_and_can_be_asked_for_again(tmp_path):
    """A damaged tar, a damaged line and an odd label cost themselves, and each has a note; so has what is no sound."""
    write_tar(tmp_path / "a.tar", {f"{ID}.wav": b"x"})
    (tmp_path / "b.tar").write_bytes(b"<html>")
    segments = write(tmp_path / "x_segments.csv", f'{ID}, 30.000, 40.000, "/m/0174k2"', "#NAME?, 1, 2")
    corpus = audioset_corpus([tmp_path], [segments], lenient=True)
    assert [text.partition(": ")[2][:17] for text in corpus.notes] == [
        "1 damaged lines l",
        "Washing machine (",
        "is no tar; fetch ",
        "1 .csv",
    ]
    again = recreate_corpus(corpus.dataset_settings)
    assert again.plan.equals(corpus.plan)
    assert again.sources.frame.equals(corpus.sources.frame)
    with pytest.raises(InputError, match="line 5"):
        audioset_corpus([tmp_path], [segments])


def test_only_a_damaged_archive_is_named_in_the_refusal(tmp_path):
    """Nothing was found, and this is why."""
    plan = plan_of(tmp_path / "x.csv", f'{ID}, 30.000, 40.000, ""')
    (tmp_path / "b.tar").write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"no audio files .*b\.tar: is no tar"):
        match_sounds_to_plan(plan, [tmp_path])


def test_the_cost_of_a_row_does_not_grow_with_their_number(tmp_path):
    """20,000 clips in four layouts: planned in seconds, held in columns."""
    ids = [f"{number:011d}" for number in range(20_000)]
    plan = plan_of(tmp_path / "x.csv", *(f'{clip_id}, 30.000, 40.000, "/m/04rlf"' for clip_id in ids))
    write_tar(
        tmp_path / "a.tar", {f"{clip_id}.flac": b"" for clip_id in ids[:10_000]}, form=tarfile.USTAR_FORMAT
    )
    write_parquet(tmp_path / "b.parquet", {f"{clip_id}.flac": b"" for clip_id in ids[10_000:]}, group=1_000)
    start_seconds = time.process_time()
    sources = match_sounds_to_plan(plan, [tmp_path])
    assert time.process_time() - start_seconds < 3  # 60 s for two million would be 0.6
    assert sources.frame["kind"].null_count() == 0
    assert sources.frame.estimated_size() < 200 * 20_000
