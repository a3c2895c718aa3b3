"""AudioSet's lists and file names, as official and as people have them."""

import polars as pl
import pytest

from pipeline.datasets.audioset import find_sources, plan_clips, read_segments
from pipeline.errors import InputError, ManifestError

HEAD = "# Segments csv created today\n# num_ytids=2\n# YTID, start_seconds, end_seconds, positive_labels\n"


def write(path, *lines, head=HEAD):
    path.write_text(head + "".join(f"{line}\n" for line in lines))
    return path


def test_the_official_list_is_read_as_it_is_written(tmp_path):
    """Comma and space apart, labels quoted, ids that begin with a dash, times with three decimals."""
    rows = read_segments(
        write(
            tmp_path / "eval_segments.csv",
            '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/0jbk"',
            'abc_EFG-hij, 30.000, 35.500, ""',
        )
    )
    assert rows.rows(named=True) == [
        {
            "clip_id": "--4gqARaEJE",
            "split": "eval",
            "start_seconds": 0.0,
            "end_seconds": 10.0,
            "mids": ["/m/068hy", "/m/0jbk"],
        },
        {"clip_id": "abc_EFG-hij", "split": "eval", "start_seconds": 30.0, "end_seconds": 35.5, "mids": []},
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            '#NAME?, 30.000, 40.000, "/m/04rlf"',
            "line 5: expected a YouTube id of 11 characters, found '#NAME?.*spreadsheet",
        ),
        ('abcdefghijk, 40.000, 30.000, "/m/04rlf"', "line 5: expected times"),
        ('abcdefghijk, half, 30.000, "/m/04rlf"', "line 5: expected times"),
        ("abcdefghijk", "line 5: expected"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, said):
    """Spreadsheets turn ids that begin with a dash into `#NAME?`; the clip would be lost without a word."""
    with pytest.raises(ManifestError, match=said):
        read_segments(write(tmp_path / "x.csv", 'abcdefghijk, 0.000, 10.000, "/m/04rlf"', line))


def test_an_empty_or_missing_list_is_refused(tmp_path):
    """An empty plan would look like a build that went well."""
    with pytest.raises(ManifestError, match="no rows"):
        read_segments(write(tmp_path / "x.csv"))
    with pytest.raises(ManifestError, match=r"y\.csv"):
        read_segments(tmp_path / "y.csv")


def test_evaluation_keeps_its_clips_and_the_first_of_a_list_counts(tmp_path):
    """A clip in training and in evaluation would make every score a lie."""
    train = write(
        tmp_path / "t.csv", *(f'{c * 11}, {start}.000, 10.000, ""' for c, start in ("a0", "b0", "a5"))
    )
    evaluation = write(tmp_path / "eval.csv", 'bbbbbbbbbbb, 0.000, 10.000, ""')
    plan = plan_clips([train, evaluation])
    assert plan["duplicate"].is_null().to_list() == [True, False, False, True]
    assert "evaluation" in plan["duplicate"][1]
    assert "same list" in plan["duplicate"][2]


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
    plan = plan_clips([write(tmp_path / "x.csv", f'{clip_id}, 30.000, 40.000, ""')])
    file = tmp_path / "audio" / name.format(clip_id)
    file.parent.mkdir(parents=True)
    file.touch()
    assert find_sources(plan, [tmp_path / "audio"]).frame["path"].to_list() == [str(file)]


def test_a_file_of_another_segment_of_the_video_is_not_the_clip(tmp_path):
    """AudioSet's strong labels use other segments of the same videos."""
    plan = plan_clips(
        [write(tmp_path / "x.csv", 'abcdefghijk, 30.000, 40.000, ""', 'bbbbbbbbbbb, 0.000, 1.000, ""')]
    )
    for name in ("abcdefghijk_50000.wav", "bbbbbbbbbbb.wav"):
        (tmp_path / name).touch()
    assert find_sources(plan, [tmp_path]).frame["path"].to_list() == [None, str(tmp_path / "bbbbbbbbbbb.wav")]


def test_among_several_files_the_split_then_the_container_decides(tmp_path):
    """Which of two files is used must not depend on the order in which a disk lists them."""
    plan = plan_clips([write(tmp_path / "eval_segments.csv", 'abcdefghijk, 0.000, 10.000, ""')])
    for name in ("a/abcdefghijk.flac", "eval/abcdefghijk.mp3", "eval/abcdefghijk.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_sources(plan, [tmp_path]).frame["source"].to_list() == ["eval/abcdefghijk.wav"]


def test_ids_differ_by_case(tmp_path):
    """YouTube ids do, even where a file system would not."""
    plan = plan_clips(
        [write(tmp_path / "x.csv", 'abcdefghijk, 0.000, 1.000, ""', 'ABCDEFGHIJK, 0.000, 1.000, ""')]
    )
    (tmp_path / "ABCDEFGHIJK.wav").touch()
    assert find_sources(plan, [tmp_path]).frame["source"].to_list() == [None, "ABCDEFGHIJK.wav"]


def test_what_matches_nothing_is_told(tmp_path):
    """Five hundred unmatched files are a wrong list, not a detail."""
    plan = plan_clips([write(tmp_path / "x.csv", 'abcdefghijk, 0.000, 1.000, ""')])
    for name in ("abcdefghijk.wav", "zzzzzzzzzzz.wav", "holiday.mp3", "notes.txt"):
        (tmp_path / name).touch()
    assert find_sources(plan, [tmp_path]).unmatched == ["holiday.mp3", "zzzzzzzzzzz.wav"]


def test_wrong_folders_say_what_was_looked_for_and_found(tmp_path):
    """The first mistake of a newcomer is the wrong folder."""
    plan = plan_clips([write(tmp_path / "x.csv", 'abcdefghijk, 0.000, 1.000, ""')])
    with pytest.raises(InputError, match="no such folder"):
        find_sources(plan, [tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"no audio files .* looked for .*\.flac"):
        find_sources(plan, [tmp_path])
    (tmp_path / "holiday.mp3").touch()
    with pytest.raises(InputError, match=r"looked for names like abcdefghijk\.wav, found holiday\.mp3"):
        find_sources(plan, [tmp_path])


def test_two_lists_of_one_name_are_refused(tmp_path):
    """The name is the split; two of a name would be mixed."""
    (tmp_path / "b").mkdir()
    paths = [
        write(tmp_path / "x.csv", 'abcdefghijk, 0.000, 1.000, ""'),
        write(tmp_path / "b" / "x.csv", 'bbbbbbbbbbb, 0.000, 1.000, ""'),
    ]
    with pytest.raises(ManifestError, match="share a name"):
        plan_clips(paths)


def test_the_plan_is_the_lists_in_their_order(tmp_path):
    """Row i is line i, whatever lies on the disk."""
    ids = [f"{n:011d}" for n in (5, 3, 9)]
    plan = plan_clips([write(tmp_path / "x.csv", *(f'{i}, 0.000, 1.000, ""' for i in ids))])
    assert plan["clip_id"].to_list() == ids
    assert plan.schema["mids"] == pl.List(pl.String)
