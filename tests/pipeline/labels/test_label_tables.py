"""Propagation without a store: from lists and tables to one Parquet table of label sets."""

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError, OntologyError
from pipeline.labels import label_tables, segment_lists
from pipeline.labels.label_sets import propagate_store_labels
from pipeline.labels.label_tables import propagate_inputs
from pipeline.labels.ontology import fsd50k_classes, load_class_list, load_ontology

ORIGINALS = Path(__file__).parents[4] / "shared" / "audioset"

CLASSES = load_class_list()

HEAD = "# Segments csv created today\n# num_ytids=4\n# YTID, start_seconds, end_seconds, positive_labels\n"

GROWN = 'abcdefghijk, 30.000, 40.000, "/m/05tny_,/m/09x0r,/m/04rlf"\n'

CLIPS = [  # class names, and those after propagation
    (["Bell"], ["Music", "Musical instrument", "Bell"]),
    (["Speech", "Bark"], ["Speech", "Animal", "Domestic animals, pets", "Dog", "Bark"]),
    ([], []),
    (["Growling"], ["Growling"]),
]


def mids(names: list[str]) -> list[str]:
    return [CLASSES.mids[CLASSES.names.index(name)] for name in names]


def indices(names: list[str]) -> list[int]:
    return sorted(CLASSES.names.index(name) for name in names)


def segments_list(path: Path, label_lists=None) -> Path:
    """Clips aaaaaaaaaaa, bbbbbbbbbbb, ... as an official list."""
    rows = [mids(names) for names, _ in CLIPS] if label_lists is None else label_lists
    lines = [f'{chr(97 + n) * 11}, {n}.000, {n + 10}.000, "{",".join(row)}"\n' for n, row in enumerate(rows)]
    path.write_text(HEAD + "".join(lines))
    return path


def write_parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def read_frame(path: Path) -> pl.DataFrame:
    return pl.read_parquet(path)


def propagated_indices() -> list[list[int]]:
    """The label lists of CLIPS after propagation."""
    return [indices(after) for _, after in CLIPS]


def test_a_bare_list_becomes_a_table_of_label_sets(tmp_path):
    """Labels can be propagated without a store: the table has ids, splits, times, raw and propagated indices."""
    out = tmp_path / "labels.parquet"
    propagate_inputs([segments_list(tmp_path / "eval_segments.csv")], out=out)
    assert read_frame(out).to_dict(as_series=False) == {
        "clip_id": [letter * 11 for letter in "abcd"],
        "split": ["eval"] * 4,
        "start_seconds": [0.0, 1.0, 2.0, 3.0],
        "end_seconds": [10.0, 11.0, 12.0, 13.0],
        "raw": [indices(names) for names, _ in CLIPS],
        "unambiguous": propagated_indices(),
        "outside": [[]] * 4,
    }
    assert read_frame(out).schema["raw"] == pl.List(pl.UInt16)


def test_a_table_says_where_its_label_set_comes_from(tmp_path):
    """As in a store: rule, ontology, class list, splits and version; the summary is saved in a second file."""
    out = tmp_path / "labels.parquet"
    summary = propagate_inputs([segments_list(tmp_path / "eval_segments.csv")], out=out)
    source = json.loads(pq.read_schema(out).metadata[b"ajepa"])["unambiguous"]
    expected = {
        "pairs": 731,
        "ontology": load_ontology().digest,
        "classes": CLASSES.digest,
        "splits": ["eval"],
    }
    assert source.items() >= expected.items()
    record = json.loads((tmp_path / "labels.propagation.json").read_text())
    assert record["provenance"] == source
    assert record["changes"][-1] == {
        "split": "all",
        "clips": 4,
        "clips_changed": 2,
        "labels_before": 4,
        "labels_after": 9,
        "labels_added": 5,
        "mean_before": 1.0,
        "mean_after": 2.25,
        "classes_gaining": 5,
    }
    assert summary.changes[-1].labels_added == 5


def test_several_lists_are_several_splits(tmp_path):
    """In their order; a split that is not requested keeps its raw labels in the set."""
    lists = [segments_list(tmp_path / f"{name}_segments.csv") for name in ("balanced_train", "eval")]
    summary = propagate_inputs(lists, splits=["eval"], out=tmp_path / "labels.parquet")
    frame = read_frame(tmp_path / "labels.parquet")
    assert frame["split"].to_list() == ["balanced_train"] * 4 + ["eval"] * 4
    assert frame["unambiguous"].to_list() == frame["raw"].to_list()[:4] + propagated_indices()
    assert [change.labels_added for change in summary.changes] == [0, 5, 5]


@pytest.mark.parametrize(
    ("column", "cells"),
    [
        ("mids", [mids(names) for names, _ in CLIPS]),
        ("Labels", [mids(names)[::-1] * 2 for names, _ in CLIPS]),
        ("label", [" ; ".join(mids(names)) for names, _ in CLIPS]),
        ("positive_labels", pa.array([";".join(mids(n)) for n, _ in CLIPS]).dictionary_encode()),
        ("raw", [indices(names)[::-1] * 2 for names, _ in CLIPS]),
        ("raw", pa.array([indices(names) for names, _ in CLIPS], pa.list_(pa.uint16()))),
    ],
)
def test_tables_are_read_as_people_write_them(tmp_path, column, cells):
    """Ids as lists or as text with semicolons, or indices; in any order, also twice; under any of five names."""
    path = write_parquet(
        tmp_path / "mine.parquet", video_id=list("abcd"), **{column: cells}, beside=[1, 2, 3, 4]
    )
    propagate_inputs([path], out=tmp_path / "labels.parquet")
    frame = read_frame(tmp_path / "labels.parquet")
    assert frame.columns == ["clip_id", "split", "raw", "unambiguous", "outside"]
    assert frame["clip_id"].to_list() == list("abcd")
    assert frame["split"].to_list() == ["mine"] * 4
    assert frame["raw"].to_list() == [indices(names) for names, _ in CLIPS]
    assert frame["unambiguous"].to_list() == propagated_indices()


def test_a_table_may_have_its_own_splits_and_times(tmp_path):
    """Splits are in the order of their first rows; integer seconds are read; a list can be another input."""
    path = write_parquet(
        tmp_path / "mine.parquet",
        raw=[indices(names) for names, _ in CLIPS],
        split=["b", "a", "b", "a"],
        start=[0, 1, 2, 3],
    )
    summary = propagate_inputs([path, segments_list(tmp_path / "eval.csv")], out=tmp_path / "labels.parquet")
    frame = read_frame(tmp_path / "labels.parquet")
    assert [change.split for change in summary.changes] == ["b", "a", "eval", "all"]
    assert [change.labels_added for change in summary.changes] == [2, 3, 5, 10]
    assert frame["start_seconds"].to_list() == [0.0, 1.0, 2.0, 3.0] * 2
    assert frame["end_seconds"].to_list() == [None] * 4 + [10.0, 11.0, 12.0, 13.0]
    assert frame["clip_id"].null_count() == 4


def test_again_gives_the_same_bytes_and_again_of_its_own_output_the_same_sets(tmp_path):
    """Running it twice gives the same result, from the list and from the output of the first run."""
    out, again = tmp_path / "labels.parquet", tmp_path / "again.parquet"
    path = segments_list(tmp_path / "eval_segments.csv")
    for _ in range(2):
        propagate_inputs([path], out=out)
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    propagate_inputs([path], out=out)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    propagate_inputs([out], out=again)
    assert read_frame(again).equals(read_frame(out))


def test_the_size_of_the_blocks_leaves_no_trace(tmp_path, monkeypatch):
    """Two million rows are read in blocks: rows, counts and row numbers in errors do not depend on the blocks."""
    path = segments_list(tmp_path / "eval_segments.csv", [mids(CLIPS[n % 4][0]) for n in range(26)])
    whole = propagate_inputs([path], out=tmp_path / "whole.parquet")
    monkeypatch.setattr(segment_lists, "LIST_BLOCK_BYTES", 100)
    monkeypatch.setattr(label_tables, "LABEL_BLOCK_ROWS", 3)
    assert propagate_inputs([path], out=tmp_path / "parts.parquet") == whole
    assert read_frame(tmp_path / "parts.parquet").equals(read_frame(tmp_path / "whole.parquet"))
    propagate_inputs([tmp_path / "whole.parquet"], out=tmp_path / "more.parquet")
    assert read_frame(tmp_path / "more.parquet").equals(read_frame(tmp_path / "whole.parquet"))
    rows = [mids(["Bell"])] * 7 + [["/m/nothing"]]
    with pytest.raises(InputError, match=r"row 7 \(clip h+\): unknown class '/m/nothing'"):
        propagate_inputs([segments_list(tmp_path / "x.csv", rows)], out=tmp_path / "y.parquet")
    odd = write_parquet(tmp_path / "odd.parquet", raw=[[1]] * 7 + [[999]])
    with pytest.raises(InputError, match=r"odd\.parquet: row 7: class index 999, expected 0 to 526"):
        propagate_inputs([odd], out=tmp_path / "y.parquet")


PEAK = """
import sys
from pathlib import Path
from pipeline.labels.label_tables import propagate_inputs
propagate_inputs([sys.argv[1]], out=Path(sys.argv[2]))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux' /proc"
)
def test_memory_does_not_grow_with_the_list(tmp_path):
    """With ten times the rows, the peak memory differs by less than 100 MB."""
    peaks_mb = []
    for rows in (100_000, 1_000_000):
        path = tmp_path / f"{rows}.csv"
        path.write_text(GROWN * rows)
        process = subprocess.run(
            [sys.executable, "-c", PEAK, path, tmp_path / "labels.parquet"],
            check=True,
            capture_output=True,
            text=True,
        )
        peaks_mb.append(int(process.stdout) / 1000)
    assert peaks_mb[1] < peaks_mb[0] + 100, peaks_mb


def test_ids_that_another_list_knows_are_kept_aside_by_name(tmp_path):
    """`Washing machine` is a class of AudioSet's strong labels: no typing error, but not among the 527."""
    path = segments_list(tmp_path / "eval.csv", [["/m/0174k2", *mids(["Bark"])], ["/m/0bm0k"]])
    summary = propagate_inputs([path], out=tmp_path / "labels.parquet")
    assert read_frame(tmp_path / "labels.parquet")["outside"].to_list() == [["/m/0174k2"], ["/m/0bm0k"]]
    assert read_frame(tmp_path / "labels.parquet")["raw"].to_list() == [indices(["Bark"]), []]
    assert {entry.name for entry in summary.outside} == {"Washing machine", "Crash cymbal"}


def own_files(folder: Path) -> dict[str, Path]:
    """A tree of three, and a list of its two lower classes."""
    nodes = {"top": ["mid"], "mid": ["leaf"], "leaf": []}
    facts = [{"id": mid, "name": mid.title(), "child_ids": children} for mid, children in nodes.items()]
    (folder / "tree.json").write_text(json.dumps(facts))
    (folder / "classes.csv").write_text("index,mid,display_name\n0,leaf,Leaf\n1,mid,Middle\n")
    return {"ontology": folder / "tree.json", "classes": folder / "classes.csv"}


def test_ones_own_ontology_and_classes_are_used(tmp_path):
    """Any vocabulary with parents; its digest is in the provenance, its names in the summary."""
    path = write_parquet(tmp_path / "mine.parquet", mids=[["leaf"], ["top", "mid"], []])
    summary = propagate_inputs([path], out=tmp_path / "labels.parquet", **own_files(tmp_path))
    frame = read_frame(tmp_path / "labels.parquet")
    assert frame["unambiguous"].to_list() == [[0, 1], [1], []]
    assert frame["outside"].to_list() == [[], ["top"], []]
    assert [(entry.mid, entry.name) for entry in summary.outside] == [("top", "Top")]
    assert summary.provenance.ontology == load_ontology(tmp_path / "tree.json").digest


def test_a_class_list_needs_the_ontology_it_is_from(tmp_path):
    """A class list with another ontology would give no implied labels."""
    path = write_parquet(tmp_path / "mine.parquet", mids=[["leaf"]])
    with pytest.raises(OntologyError, match="2 of 2 classes are not in the ontology, such as leaf"):
        propagate_inputs([path], out=tmp_path / "x.parquet", classes=own_files(tmp_path)["classes"])


def test_fsd50ks_list_is_a_class_list_like_any(tmp_path):
    """200 classes over AudioSet's own tree, given as a file."""
    fsd50k = fsd50k_classes()
    lines = [
        f'{n},{mid},"{name}"' for n, (mid, name) in enumerate(zip(fsd50k.mids, fsd50k.names, strict=True))
    ]
    (tmp_path / "classes.csv").write_text("index,mid,display_name\n" + "\n".join(lines) + "\n")
    path = write_parquet(tmp_path / "mine.parquet", label=["/m/05tny_"])
    propagate_inputs([path], out=tmp_path / "labels.parquet", classes=tmp_path / "classes.csv")
    (row,) = read_frame(tmp_path / "labels.parquet")["unambiguous"].to_list()
    assert {fsd50k.names[index] for index in row} == {"Bark", "Dog", "Domestic animals and pets", "Animal"}


def wrong_call(tmp_path: Path, mistake: str) -> dict:
    """Return the arguments of a call with the given mistake."""
    good = segments_list(tmp_path / "eval.csv")
    out = tmp_path / "out.parquet"
    typing_error = "/m/09x0z" if mistake == "an id" else "speech"
    match mistake:
        case "no out":
            return {"inputs": [good]}
        case "no table's name":
            return {"inputs": [good], "out": tmp_path / "labels.txt"}
        case "onto an input":
            return {"inputs": [write_parquet(out, label=["/m/09x0r"])], "out": out}
        case "twice":
            return {"inputs": [good, tmp_path / "." / "eval.csv"], "out": out}
        case "an id" | "a name":
            return {"inputs": [segments_list(tmp_path / "x.csv", [[], [typing_error]])], "out": out}
        case "commas":
            return {
                "inputs": [write_parquet(tmp_path / "x.parquet", label=["/m/09x0r,/m/04rlf"])],
                "out": out,
            }
        case "a null":
            return {"inputs": [write_parquet(tmp_path / "x.parquet", mids=[["/m/09x0r"], None])], "out": out}
        case "no labels":
            return {"inputs": [write_parquet(tmp_path / "x.parquet", clip_id=["a"], score=[0.5])], "out": out}
        case "numbers":
            return {"inputs": [write_parquet(tmp_path / "x.parquet", label=[0.5])], "out": out}
        case "one index":
            return {"inputs": [write_parquet(tmp_path / "x.parquet", label=[3])], "out": out}
        case "no split":
            return {
                "inputs": [write_parquet(tmp_path / "x.parquet", label=["", ""], split=["a", None])],
                "out": out,
            }
        case "no seconds":
            return {
                "inputs": [write_parquet(tmp_path / "x.parquet", label=["/m/09x0r"], start=["soon"])],
                "out": out,
            }
        case "no Parquet":
            (tmp_path / "x.parquet").write_text("labels")
            return {"inputs": [tmp_path / "x.parquet"], "out": out}
        case "absent":
            return {"inputs": [tmp_path / "evil.csv"], "out": out}
        case "two of a name":
            (tmp_path / "b").mkdir()
            return {"inputs": [good, segments_list(tmp_path / "b" / "eval.csv")], "out": out}
        case "a damaged line":
            good.write_text(good.read_text() + "#NAME?, 1, 2\n")
            return {"inputs": [good], "out": out}
        case "split":
            return {"inputs": [good], "out": out, "splits": ["evals"]}
        case "rule":
            return {"inputs": [good], "out": out, "rule": "dominator"}
        case "another list":
            propagate_inputs([good], out=tmp_path / "x.parquet")
            return {"inputs": [tmp_path / "x.parquet"], "out": out, **own_files(tmp_path)}
    raise AssertionError(mistake)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            "no out",
            r"eval\.csv: not a store, so the labels are written to a new file: add --out FILE\.parquet",
        ),
        ("no table's name", r"--out .*labels\.txt: expected the name of a table, such as labels\.parquet"),
        ("onto an input", r"--out .*out\.parquet: is also an input"),
        ("twice", r"eval\.csv: is given twice, so its clips would be written twice"),
        ("an id", r"x\.csv: row 1 \(clip b+\): unknown class '/m/09x0z'; did you mean /m/09x0r \(Speech\)\?"),
        ("a name", r"row 1 \(clip b+\): unknown class 'speech'; did you mean /m/09x0r \(Speech\)\?"),
        ("commas", r"row 0: unknown class '/m/09x0r,/m/04rlf'; several ids are separated by ;"),
        ("a null", r"x\.parquet: row 1: a label is null; expected a list, empty where a clip has no labels"),
        ("no labels", r"no column of labels; expected one of raw, mids, .*, it has clip_id, score"),
        ("numbers", r"column 'label' holds double; expected lists of class ids"),
        ("one index", r"column 'label' holds int64; expected lists of class ids"),
        ("no split", r"x\.parquet: column 'split' is null in some rows"),
        (
            "no seconds",
            r"x\.parquet: conversion from `str` to `f64` failed in column 'start' .*; mend the column",
        ),
        ("no Parquet", r"x\.parquet: cannot be read \(.*; fetch or make it again"),
        ("absent", r"evil\.csv: no such file; did you mean .*eval\.csv\?"),
        ("two of a name", r"two segments lists share a name, which names the split: \['eval', 'eval'\]"),
        (
            "a damaged line",
            r"eval\.csv: line 8: a spreadsheet has damaged the id: .* \(1 of 5 rows are bad\)",
        ),
        ("split", r"no split 'evals'; did you mean 'eval'\? It has: eval"),
        ("rule", r"unknown rule 'dominator'; did you mean 'dominators'\?"),
        ("another list", r"x\.parquet: its indices are of another class list than the 2 classes given"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, mistake, message):
    """The error says what, where and what to do; no partial table is left."""
    arguments = wrong_call(tmp_path, mistake)
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(InputError, match=message) as caught:
        propagate_inputs(**arguments)
    assert "\n" not in str(caught.value)
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


def test_folders_for_the_table_are_made(tmp_path):
    """A build creates the folders for its store, too."""
    propagate_inputs([segments_list(tmp_path / "eval.csv")], out=tmp_path / "a" / "b" / "labels.parquet")
    names = [path.name for path in (tmp_path / "a" / "b").iterdir()]
    assert sorted(names) == ["labels.parquet", "labels.propagation.json"]


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    """The command line reports an OSError by the file that it names."""
    out = tmp_path / ("x" * 250 + ".parquet")
    with pytest.raises(OSError, match="File name too long") as caught:
        propagate_inputs([segments_list(tmp_path / "eval.csv")], out=out)
    assert str(caught.value.filename).startswith(str(out))


def test_a_store_keeps_its_own_label_sets(tmp_path, store_path):
    """--out with a store, two stores, and a class list other than the store's are errors."""
    with pytest.raises(
        InputError, match=r"the label set is added to the store itself; leave --out x\.parquet out"
    ):
        propagate_inputs([store_path], out=Path("x.parquet"))
    with pytest.raises(InputError, match="2 stores; propagate one at a time"):
        propagate_inputs([store_path, store_path])
    message = (
        r"its 527 classes are not the 2 given \(class 0 is /m/09x0r, given is leaf\); a store keeps the list"
    )
    with pytest.raises(InputError, match=message):
        propagate_inputs([store_path], **own_files(tmp_path))


def test_a_stores_labels_are_a_table_too(tmp_path, store_path):
    """Its labels.parquet, without the store, gives the label set that the store has."""
    propagate_inputs([store_path / "labels.parquet"], out=tmp_path / "labels.parquet")
    stored = read_frame(store_path / "labels.parquet")["unambiguous"]
    assert read_frame(tmp_path / "labels.parquet")["unambiguous"].to_list() == stored.to_list()


def test_a_list_and_the_store_built_from_it_agree(tmp_path):
    """A list and a store give the same labels."""
    store = tmp_path / "some.zarr"
    store.mkdir()
    header = {"attributes": {"ajepa": {"classes": list(CLASSES.mids)}}}
    (store / "zarr.json").write_text(json.dumps(header))
    propagate_inputs([segments_list(tmp_path / "eval.csv")], "all-ancestors", out=tmp_path / "labels.parquet")
    frame = read_frame(tmp_path / "labels.parquet")
    frame.select("clip_id", "split").write_parquet(store / "manifest.parquet")
    frame.select("raw", "outside").write_parquet(store / "labels.parquet")
    assert (
        propagate_store_labels(store, "all-ancestors").changes
        == propagate_inputs(
            [tmp_path / "labels.parquet"], "all-ancestors", out=tmp_path / "again.parquet"
        ).changes
    )
    assert read_frame(store / "labels.parquet")["all-ancestors"].to_list() == frame["all-ancestors"].to_list()


@pytest.mark.skipif(not ORIGINALS.exists(), reason="the original AudioSet files are not here")
def test_the_official_lists_give_the_references_figures(tmp_path):
    """From the two CSV files as Google published them to the saved table, by the one call."""
    lists = [ORIGINALS / "balanced_train_segments.csv", ORIGINALS / "eval_segments.csv"]
    summary = propagate_inputs(lists, out=tmp_path / "labels.parquet")
    reference = json.loads((ORIGINALS / "hlp_reference_stats.json").read_text())
    for change, name in zip(summary.changes, ("balanced", "eval"), strict=False):
        figures = {
            key: getattr(change, key.replace("_raw", "_before").replace("_hlp", "_after"))
            for key in reference[name]
        }
        assert figures == reference[name]
    assert not summary.outside


def test_a_csv_file_has_ids_and_is_an_input_again(tmp_path):
    """For a spreadsheet, in the form in which labels are read; indices would mean nothing there."""
    source = segments_list(tmp_path / "eval_segments.csv")
    propagate_inputs([source], out=tmp_path / "labels.csv")
    propagate_inputs([source], out=tmp_path / "labels.parquet")
    table = pl.read_csv(tmp_path / "labels.csv").with_columns(pl.col("raw", "unambiguous").fill_null(""))
    parquet = read_frame(tmp_path / "labels.parquet")
    assert table.columns == parquet.columns
    for name in ("raw", "unambiguous"):
        ids = [[CLASSES.mids[index] for index in row] for row in parquet[name]]
        assert table[name].to_list() == [";".join(row) for row in ids]
    assert table["start_seconds"].to_list() == parquet["start_seconds"].to_list()
    assert (tmp_path / "labels.propagation.json").is_file()
