"""AudioSet's segments lists, as published and as spreadsheets damage them."""

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.errors import ManifestError
from pipeline.labels import segment_lists
from pipeline.labels.segment_lists import plan_segment_lists, read_segment_list, segment_line_fields

HEAD = "# Segments csv created today\n# num_ytids=2\n# YTID, start_seconds, end_seconds, positive_labels\n"

GOOD = 'abcdefghijk, 0.000, 10.000, "/m/04rlf"'


def write_list(path, *lines, head=HEAD):
    """Write a segments list."""
    path.write_text(head + "".join(f"{line}\n" for line in lines))
    return path


def test_the_official_list_is_read_as_it_is_written(tmp_path):
    """Comma and space apart, labels quoted, ids that begin with a dash, times with three decimals."""
    rows, _ = read_segment_list(
        write_list(
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
    ("line", "message"),
    [
        (
            '#NAME?, 30.000, 40.000, "/m/04rlf"',
            "line 5: a spreadsheet has damaged the id: .*, found '#NAME?",
        ),
        ('abcdefghijk, 40.000, 30.000, "/m/04rlf"', "line 5: expected times"),
        ('abcdefghijk, half, 30.000, "/m/04rlf"', "line 5: expected times"),
        ("abcdefghijk", "line 5: expected"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    """Spreadsheets turn ids that begin with a dash into `#NAME?`; the clip would be lost without a message."""
    with pytest.raises(ManifestError, match=message):
        read_segment_list(write_list(tmp_path / "x.csv", 'abcdefghijk, 0.000, 10.000, "/m/04rlf"', line))


def test_an_empty_or_missing_list_is_refused(tmp_path):
    """An empty plan would look like a build that went well."""
    with pytest.raises(ManifestError, match="no rows"):
        read_segment_list(write_list(tmp_path / "x.csv"))
    with pytest.raises(ManifestError, match=r"y\.csv"):
        read_segment_list(tmp_path / "y.csv")


def test_evaluation_keeps_its_clips_and_the_first_of_a_list_counts(tmp_path):
    """A clip in training and in evaluation would make scores too high."""
    train = write_list(
        tmp_path / "t.csv", *(f'{c * 11}, {start}.000, 10.000, ""' for c, start in ("a0", "b0", "a5"))
    )
    evaluation = write_list(tmp_path / "eval.csv", 'bbbbbbbbbbb, 0.000, 10.000, ""')
    plan, _ = plan_segment_lists([train, evaluation])
    assert plan["duplicate"].is_null().to_list() == [True, False, False, True]
    assert "evaluation" in plan["duplicate"][1]
    assert "same list" in plan["duplicate"][2]


def test_two_lists_of_one_name_are_refused(tmp_path):
    """The name is the split; two of a name would be mixed."""
    (tmp_path / "b").mkdir()
    paths = [
        write_list(tmp_path / "x.csv", 'abcdefghijk, 0.000, 1.000, ""'),
        write_list(tmp_path / "b" / "x.csv", 'bbbbbbbbbbb, 0.000, 1.000, ""'),
    ]
    with pytest.raises(ManifestError, match="share a name"):
        plan_segment_lists(paths)


def test_the_plan_is_the_lists_in_their_order(tmp_path):
    """Row i is line i, whatever files exist on the disk."""
    ids = [f"{n:011d}" for n in (5, 3, 9)]
    plan, _ = plan_segment_lists([write_list(tmp_path / "x.csv", *(f'{i}, 0.000, 1.000, ""' for i in ids))])
    assert plan["clip_id"].to_list() == ids
    assert plan.schema["mids"] == pl.List(pl.String)


def test_lenient_leaves_damaged_lines_out_with_a_note_for_each_list(tmp_path):
    """One damaged line should not stop two million rows, but the note must report it."""
    bad = ["#NAME?, 1, 2", "abcdefghijk, 9, 2", "x", "y", "z"]
    path = write_list(tmp_path / "x.csv", bad[0], GOOD, *bad[1:])
    plan, notes = plan_segment_lists(
        [path, write_list(tmp_path / "eval.csv", GOOD.replace("a", "b"))], lenient=True
    )
    assert plan["clip_id"].to_list() == ["abcdefghijk", "bbcdefghijk"]
    (note,) = notes
    assert note.startswith(f"{path}: 5 damaged lines left out (line 4: a spreadsheet has damaged the id")
    assert "line 6: expected times" in note
    assert note.endswith("; and 2 more)")


def test_a_list_without_one_good_line_is_refused_leniently_too(tmp_path):
    """A file without a good line is not a segments list."""
    with pytest.raises(ManifestError, match="line 4: expected a YouTube id"):
        read_segment_list(write_list(tmp_path / "x.csv", "x", "y"), lenient=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD.encode() + b"\nabcdefghij\xff, 0, 1\n", "line 2: is not UTF-8"),
        (GOOD.encode("utf-16"), "line 1: holds NUL bytes"),
        (GOOD.encode() + b"\n" + bytes(40), "line 2: holds NUL bytes"),
    ],
)
def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path, content, message):
    """A download that broke off leaves zeros; spreadsheets save as UTF-16."""
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        read_segment_list(path)


ROW = r'^\s*([^,]*?)\s*,\s*([^,]*?)\s*,\s*([^,]*?)\s*(?:,\s*"?([^"]*?)"?\s*)?$'


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(alphabet='ab,," /\t', max_size=14), min_size=1, max_size=9))
@example(texts=["", ",,", 'a,b,c,"', 'a,b,c,""', 'a,b,c,"x"y"', ' a , b , c , "x, y" ', "a,b,c,x,y", "a,b"])
def test_lines_are_cut_as_the_grammar_has_it(texts):
    """The fast split agrees with the regular expression that defines a line."""
    lines = pl.DataFrame({"text": texts})
    groups = pl.col("text").str.extract_groups(ROW).struct.rename_fields(list("abcd"))
    expected = lines.select(groups).unnest("text").with_columns(pl.col("d").fill_null(""))
    expected = expected.with_columns(d=pl.when(pl.col("a").is_not_null()).then(pl.col("d").str.strip_chars()))
    cut = lines.select(segment_line_fields()).unnest("cells").with_columns(pl.col("d").str.strip_chars())
    assert cut.rows() == expected.rows()


def test_a_list_is_the_same_whatever_is_read_at_a_time(tmp_path, monkeypatch):
    """Lists of 101 MB are read in blocks; rows, and line numbers in notes, do not depend on the blocks."""
    rows = [GOOD.replace("a", letter) for letter in "bcdefgh"]
    path = write_list(tmp_path / "x.csv", *rows[:3], "# no comment", "", *rows[3:], "#NAME?, 1, 2")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    whole, (note,) = read_segment_list(path, lenient=True)
    assert "line 7: " in note
    assert "line 13: " in note
    for size in (1, 40, 70, 1000):
        monkeypatch.setattr(segment_lists, "LIST_BLOCK_BYTES", size)
        frame, notes = read_segment_list(path, lenient=True)
        assert frame.equals(whole)
        assert notes == (note,)
