"""Which sound belongs to which row, in any layout."""

import pytest

from pipeline.datasets.audioset import find_sources
from pipeline.datasets.segments import plan_clips
from pipeline.errors import InputError

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
    ],
)
@pytest.mark.parametrize("clip_id", ["abcdefghijk", "-b_defgh_1_", "Yabcdefghij", "___________"])
def test_every_common_naming_is_found(tmp_path, name, clip_id):
    """14 % of the ids contain an underscore, 3 % begin with a dash, some begin with Y."""
    plan, _ = plan_clips([write(tmp_path / "x.csv", f'{clip_id}, 30.000, 40.000, ""')])
    file = tmp_path / "audio" / name.format(clip_id)
    file.parent.mkdir(parents=True)
    file.touch()
    assert find_sources(plan, [tmp_path / "audio"]).frame["path"].to_list() == [str(file)]


def test_a_file_of_another_segment_of_the_video_is_not_the_clip(tmp_path):
    """AudioSet's strong labels use other segments of the same videos."""
    plan, _ = plan_clips(
        [write(tmp_path / "x.csv", 'abcdefghijk, 30.000, 40.000, ""', 'bbbbbbbbbbb, 0.000, 1.000, ""')]
    )
    for name in ("abcdefghijk_50000.wav", "bbbbbbbbbbb.wav"):
        (tmp_path / name).touch()
    assert find_sources(plan, [tmp_path]).frame["path"].to_list() == [None, str(tmp_path / "bbbbbbbbbbb.wav")]


def test_among_several_files_the_split_then_the_container_decides(tmp_path):
    """Which of two files is used must not depend on the order in which a disk lists them."""
    plan, _ = plan_clips([write(tmp_path / "eval_segments.csv", 'abcdefghijk, 0.000, 10.000, ""')])
    for name in ("a/abcdefghijk.flac", "eval/abcdefghijk.mp3", "eval/abcdefghijk.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_sources(plan, [tmp_path]).frame["source"].to_list() == ["eval/abcdefghijk.wav"]


def test_ids_differ_by_case(tmp_path):
    """YouTube ids do, even where a file system would not."""
    plan, _ = plan_clips(
        [write(tmp_path / "x.csv", 'abcdefghijk, 0.000, 1.000, ""', 'ABCDEFGHIJK, 0.000, 1.000, ""')]
    )
    (tmp_path / "ABCDEFGHIJK.wav").touch()
    assert find_sources(plan, [tmp_path]).frame["source"].to_list() == [None, "ABCDEFGHIJK.wav"]


def test_what_matches_nothing_is_told(tmp_path):
    """Five hundred unmatched files are a wrong list, not a detail."""
    plan, _ = plan_clips([write(tmp_path / "x.csv", 'abcdefghijk, 0.000, 1.000, ""')])
    for name in ("abcdefghijk.wav", "zzzzzzzzzzz.wav", "holiday.mp3", "notes.txt"):
        (tmp_path / name).touch()
    assert find_sources(plan, [tmp_path]).unmatched == ["holiday.mp3", "zzzzzzzzzzz.wav"]


def test_wrong_folders_say_what_was_looked_for_and_found(tmp_path):
    """The first mistake of a newcomer is the wrong folder."""
    plan, _ = plan_clips([write(tmp_path / "x.csv", 'abcdefghijk, 0.000, 1.000, ""')])
    with pytest.raises(InputError, match="no such folder or file"):
        find_sources(plan, [tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"no audio files .* looked for .*\.flac"):
        find_sources(plan, [tmp_path])
    (tmp_path / "holiday.mp3").touch()
    with pytest.raises(InputError, match=r"looked for names like abcdefghijk\.wav, found holiday\.mp3"):
        find_sources(plan, [tmp_path])
