"""Descriptions of stores and clips have the facts: rows, names of labels, position of bytes; mistakes are named."""

import re
import shutil
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from corpus import BROKEN, clip_id
from matplotlib.image import imread

from pipeline.cli import app
from pipeline.report.describe import describe_location, describe_rows, describe_store, find_clip_rows
from pipeline.store.feature_store import FeatureStore
from pipeline.store.manifest import nearest_texts
from pipeline.store.shards import shard_path
from pipeline.tables import read_table, write_table


def run(*arguments, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["ajepa-data", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        app.main()
    return stop.value.code or 0


@pytest.fixture
def copy(store_path, tmp_path):
    return shutil.copytree(store_path, tmp_path / "copy.zarr")


def test_the_summary_has_the_facts_of_the_store(store):
    """The summary has the ids, the numbers, and the origin of the labels."""
    text = describe_store(store)
    for fact in (store.store_id, store.header.plan_id, store.spec_id, "hop_samples 320", "float16"):
        assert fact in text
    assert "45 of 48" in text
    hours = store.n_frames_N[store.good_rows()].sum() * 320 / 32_000 / 3600
    assert re.search(rf"^good +45 of 48, {60 * hours:.1f} min$", text, re.MULTILINE)
    eval_seconds = store.n_frames_N[store.good_rows("eval")].sum() * 320 / 32_000
    assert re.search(rf"^  eval +[0-9]+ of [0-9]+, {eval_seconds / 60:.1f} min$", text, re.MULTILINE)
    assert "731 class pairs" in text
    assert "as listed" in text


def test_a_good_clip_is_described_in_full(store):
    """The manifest's values, and labels by their names; propagated labels are marked."""
    row = find_clip_rows(store, clip_id(2))[0]
    text = describe_rows(store, [row])
    assert "16,000 Hz, 1 channel, 10.000 s" in text
    assert store.manifest["digest"][row] in text
    assert "30.000 to 40.000 s" in text
    assert f"{store.manifest['error_rms_nat'][row]:.2g} nat rms" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "labels raw Bell" in lines
    assert "labels unambiguous + Music; + Musical instrument; Bell" in lines


def test_the_bytes_of_a_clip_are_at_the_described_position(store):
    """Any tool can fetch them by offset and length in the shard's file."""
    row = find_clip_rows(store, clip_id(20))[0]
    words = describe_location(store, row).replace(",", "").split()
    size, offset = (int(words[words.index(word) + step]) for word, step in (("bytes", -1), ("from", 1)))
    content = (store.path / words[-1]).read_bytes()[offset : offset + size]
    mel_TF = np.frombuffer(content[:-4], "<f2").reshape(store.frames, store.bands)
    np.testing.assert_array_equal(mel_TF, store.read(np.array([row]))[0])


def test_every_row_of_an_id_is_described(copy):
    """An id may be in two splits, or a recording in several pieces."""
    frame, metadata = read_table(copy / "manifest.parquet")
    repeated_id = pl.when(pl.col("clip_id") == clip_id(47)).then(pl.lit(clip_id(1))).otherwise("clip_id")
    write_table(copy / "manifest.parquet", frame.with_columns(clip_id=repeated_id), metadata)
    store = FeatureStore.open(copy)
    rows = find_clip_rows(store, clip_id(1))
    assert len(rows) == 2
    blocks = describe_rows(store, rows).split("\n\n")
    assert {block.split("split")[1].split()[0] for block in blocks} == {"a_train", "eval"}


def test_text_alone_loads_neither_torch_nor_matplotlib():
    """They take four of five seconds: whoever looks into a store would wait for nothing."""
    program = "import sys, pipeline.report.describe; print({'torch', 'matplotlib'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "set()\n"


def test_a_failed_clip_has_its_reason_and_no_picture(store_path, tmp_path, monkeypatch, capsys):
    """The picture that the command names is not written, so it ends with status 1 and one line."""
    arguments = ["inspect", store_path, "--clip", clip_id(BROKEN), "--png", tmp_path / "x.png"]
    assert run(*arguments, monkeypatch=monkeypatch) == 1
    out, error = capsys.readouterr()
    assert "unreadable: no decoder can read the file" in out
    assert "not there" in out
    assert "it is not good: unreadable" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_failed_clips_are_listed_with_their_reasons(store, store_path, tmp_path, monkeypatch, capsys):
    """On the terminal or as a table; the summary counts them by reason."""
    assert "3 (missing 1, unreadable 1, silent 1); --failed lists them" in describe_store(store)
    assert run("inspect", store_path, "--failed", monkeypatch=monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert any(line.startswith(f"{clip_id(BROKEN)}: unreadable, ") for line in lines)
    table = tmp_path / "failed.csv"
    assert run("inspect", store_path, "--failed", "--out", table, monkeypatch=monkeypatch) == 0
    assert pl.read_csv(table)["reason"].sort().to_list() == ["missing", "silent", "unreadable"]


def test_the_clips_of_a_file_are_found_by_its_name(copy):
    """A recording that is cut into pieces has no clip of its own name."""
    store = FeatureStore.open(copy)
    row = find_clip_rows(store, clip_id(2))[0]
    assert find_clip_rows(store, store.manifest["source"][row]) == [row]

    frame, metadata = read_table(copy / "manifest.parquet")
    ids = ["take@0", "take@10000", "take@2nd", *frame["clip_id"].to_list()[3:]]
    write_table(copy / "manifest.parquet", frame.with_columns(clip_id=pl.Series(ids)), metadata)
    assert find_clip_rows(FeatureStore.open(copy), "take") == [0, 1]


def test_a_good_clip_gets_its_picture(store_path, tmp_path, monkeypatch, capsys):
    """The clip is named by its id or by its row."""
    png = tmp_path / "new" / "x.png"
    assert run("inspect", store_path, "--clip", clip_id(3), "--png", png, monkeypatch=monkeypatch) == 0
    by_id = imread(png)
    row = find_clip_rows(FeatureStore.open(store_path), clip_id(3))[0]
    assert run("inspect", store_path, "--row", row, "--png", png, monkeypatch=monkeypatch) == 0
    np.testing.assert_array_equal(by_id, imread(png))
    assert clip_id(3) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clip", "clip_0000020"], f"did you mean '{clip_id(20)}'"),
        (["--clip", "CLIP_000007"], f"did you mean '{clip_id(7)}'"),
        (["--clip", "~"], "manifest.parquet"),
        (["--row", "48"], "it has 0 to 47"),
        (["--clip", clip_id(0), "--row", "47"], f"no row 47 of clip '{clip_id(0)}'"),
        (["--png", "x.png"], "--clip ID or --row N"),
        (["--failed", "--row", "1"], "--failed lists all failed clips"),
        (["--out", "x.csv"], "add --failed"),
    ],
)
def test_a_mistake_is_one_line(store_path, monkeypatch, capsys, arguments, message):
    """The line says what is wrong, where, and which values exist."""
    assert run("inspect", store_path, *arguments, monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_one_typing_error_is_found_among_many_ids():
    """Whichever letter is wrong, and however many ids are alike."""
    letters_N11 = np.random.default_rng(0).integers(97, 123, (20_000, 11), dtype=np.uint8)
    ids = pl.Series([row.tobytes().decode() for row in letters_N11])
    right = ids[12_345]
    for place in range(11):
        wrong = right[:place] + "Z" + right[place + 1 :]
        assert right in nearest_texts(ids, wrong)


def test_a_damaged_shard_is_named_in_one_line(copy, monkeypatch, capsys):
    """The line names the command that finds the damage."""
    path = shard_path(copy, 0)
    path.write_bytes(path.read_bytes()[:-1])
    assert run("inspect", copy, "--row", 0, monkeypatch=monkeypatch) == 1
    assert f"ajepa-data verify {copy}" in capsys.readouterr().err


def test_a_report_of_nothing_is_refused(store_path, monkeypatch, capsys):
    """The command needs a page, a picture or both to write."""
    assert run("report", store_path, monkeypatch=monkeypatch) == 1
    assert "--html FILE" in capsys.readouterr().err


def test_a_report_is_a_page(store_path, tmp_path, monkeypatch, capsys):
    """The table goes to the terminal, the page to its file."""
    assert run("report", store_path, "--html", tmp_path / "r.html", monkeypatch=monkeypatch) == 0
    assert "clips listed" in capsys.readouterr().out
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


def test_labels_outside_the_class_list_are_named(copy):
    """AudioSet's strong labels have washing machines; an id would mean nothing to a reader."""
    frame, metadata = read_table(copy / "labels.parquet")
    outside = pl.lit(["/m/0174k2", "x"], dtype=pl.List(pl.String))
    write_table(copy / "labels.parquet", frame.with_columns(outside=outside), metadata)
    assert "Washing machine (/m/0174k2); x" in describe_rows(FeatureStore.open(copy), [0])
