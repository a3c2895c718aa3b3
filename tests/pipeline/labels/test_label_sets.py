"""Propagation in a store: the new label set, the unchanged raw labels, and the summary of the changes."""

import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError, OntologyError, StoreError
from pipeline.files import scratch_path
from pipeline.labels import label_sets
from pipeline.labels.label_sets import index_class_ids, propagate_store_labels
from pipeline.labels.ontology import ClassList, load_class_list, load_ontology
from pipeline.labels.propagation import propagation_table, rule_relation_CC
from pipeline.tables import read_table

CLASSES = load_class_list()

ROWS = [  # split, classes, classes after propagation
    ("train", ["Bell"], ["Music", "Musical instrument", "Bell"]),
    ("train", ["Speech"], ["Speech"]),
    ("train", ["Growling"], ["Growling"]),
    ("eval", ["Bark", "Animal"], ["Animal", "Domestic animals, pets", "Dog", "Bark"]),
    ("train", [], []),
    ("eval", ["Pop music"], ["Music", "Pop music"]),
]


def indices(names: list[str]) -> list[int]:
    return sorted(CLASSES.names.index(name) for name in names)


@pytest.fixture
def bare_store(tmp_path) -> Path:
    """The three files of a store that labels live in, in two row groups."""
    store = tmp_path / "some.zarr"
    store.mkdir()
    header = {"attributes": {"ajepa": {"classes": list(CLASSES.mids)}}}
    (store / "zarr.json").write_text(json.dumps(header))
    pl.DataFrame({"clip_id": list("abcdef"), "split": [row[0] for row in ROWS]}).write_parquet(
        store / "manifest.parquet", row_group_size=4
    )
    raw = pa.array([indices(row[1]) for row in ROWS], pa.large_list(pa.uint16()))
    outside = pa.array([[], ["/m/0"], [], [], [], []], pa.large_list(pa.large_string()))
    table = pa.table({"raw": raw, "outside": outside}).replace_schema_metadata(
        {b"ajepa": b'{"raw":"as listed"}'}
    )
    pq.write_table(table, store / "labels.parquet", row_group_size=4)
    return store


def read_column(store: Path, name: str) -> list[list[int]]:
    return pl.read_parquet(store / "labels.parquet")[name].to_list()


def file_bytes(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def test_a_label_set_is_added_beside_the_raw_labels(bare_store):
    """Raw labels come from raters and never change."""
    before = pl.read_parquet(bare_store / "labels.parquet")
    propagate_store_labels(bare_store)
    assert read_column(bare_store, "unambiguous") == [indices(row[2]) for row in ROWS]
    assert pl.read_parquet(bare_store / "labels.parquet").drop("unambiguous").equals(before)


def test_the_label_set_says_where_it_comes_from(bare_store):
    """The file records rule, ontology and version, and keeps other metadata."""
    propagate_store_labels(bare_store)
    sources = json.loads(pq.read_schema(bare_store / "labels.parquet").metadata[b"ajepa"])
    assert sources["raw"] == "as listed"
    assert sources["unambiguous"].items() >= {"pairs": 731, "ontology": load_ontology().digest}.items()
    assert sources["unambiguous"]["version"].startswith("ajepa ")


def test_propagating_a_store_again_changes_no_byte(bare_store):
    """Running the command twice changes nothing and leaves no other file."""
    propagate_store_labels(bare_store)
    propagate_store_labels(bare_store, "all-ancestors")
    once = file_bytes(bare_store)
    propagate_store_labels(bare_store)
    propagate_store_labels(bare_store, "all-ancestors")
    assert file_bytes(bare_store) == once
    assert len(once) == 5  # the three files of the store, and a report for each rule


def test_every_rule_keeps_its_own_label_set(bare_store):
    """Rules can be compared on one store, because none overwrites the set of another."""
    for rule in ("unambiguous", "dominators"):
        propagate_store_labels(bare_store, rule)
    assert read_column(bare_store, "unambiguous")[2] == indices(["Growling"])
    assert read_column(bare_store, "dominators")[2] == indices(["Growling", "Animal"])


def test_only_the_requested_splits_are_propagated(bare_store):
    """Other splits have raw labels in the set, as its provenance and the table state."""
    summary = propagate_store_labels(bare_store, splits=["eval"])
    expected = [indices(row[2] if row[0] == "eval" else row[1]) for row in ROWS]
    assert read_column(bare_store, "unambiguous") == expected
    assert "raw labels kept in: train" in propagation_table(summary)
    assert summary.provenance.splits == ("eval",)


def test_the_summary_counts_the_changes(bare_store):
    """By hand: two labels added to one of four train clips, three to both eval clips."""
    summary = propagate_store_labels(bare_store)
    counts = {
        change.split: (change.clips, change.clips_changed, change.labels_before, change.labels_added)
        for change in summary.changes
    }
    assert counts == {"train": (4, 1, 3, 2), "eval": (2, 2, 3, 3), "all": (6, 3, 6, 5)}
    assert [change.classes_gaining for change in summary.changes] == [2, 3, 4]
    assert (summary.changes[0].mean_before, summary.changes[0].mean_after) == (0.75, 1.25)
    gains = {gainer.name: gainer.clips_after - gainer.clips_before for gainer in summary.gainers}
    assert gains == {"Music": 2, "Musical instrument": 1, "Dog": 1, "Domestic animals, pets": 1}
    assert summary.gainers[0].name == "Music"


def test_the_summary_is_saved_and_printed(bare_store):
    """As JSON beside the labels, and as a table with a line per split and the biggest gainers."""
    summary = propagate_store_labels(bare_store)
    record = json.loads((bare_store / "propagation-unambiguous.json").read_text())
    assert record["provenance"]["rule"] == "unambiguous"
    assert record["changes"][-1]["mean_after"] == summary.changes[-1].mean_after
    lines = propagation_table(summary).splitlines()
    assert lines[0].startswith("label set 'unambiguous': 731 class pairs")
    assert [line.split() for line in lines if line.startswith("train")] == [
        ["train", "4", "0.750000", "->", "1.250000", "2", "1", "2"]
    ]
    assert any(line.split() == ["Music", "0", "2", "2"] for line in lines)
    assert max(map(len, lines)) <= 80


def test_gains_of_classes_are_counted_among_good_clips(bare_store):
    """Models are trained on these alone; the JSON, which outlives a later build, counts all listed rows."""
    manifest = pl.read_parquet(bare_store / "manifest.parquet")
    once = propagate_store_labels(bare_store)
    record = (bare_store / "propagation-unambiguous.json").read_bytes()
    assert once.good_clips is once.good_gainers is None

    # The clip with the label Bell failed.
    status = pl.Series("status", ["failed", *["good"] * 4, "missing"])
    manifest.with_columns(status).write_parquet(bare_store / "manifest.parquet", row_group_size=4)
    summary = propagate_store_labels(bare_store)
    assert summary.good_clips == 4
    assert {gainer.name: gainer.clips_after for gainer in summary.good_gainers} == {
        "Dog": 1,
        "Domestic animals, pets": 1,
    }
    assert (summary.changes, summary.gainers) == (once.changes, once.gainers)
    assert (bare_store / "propagation-unambiguous.json").read_bytes() == record
    table = propagation_table(summary)
    assert "counts are of all 6 listed rows, with a sound or without; 4 are good\n" in table
    assert "biggest gainers of good clips" in table
    assert "Music" not in table

    # The build has not finished.
    manifest.with_columns(status=pl.lit("pending")).write_parquet(bare_store / "manifest.parquet")
    assert "biggest gainers   " in propagation_table(propagate_store_labels(bare_store))


def test_ids_outside_the_class_list_are_kept_aside():
    """They are reported, not dropped; known ids become sorted unique indices; no labels stay no labels."""
    classes = ClassList(mids=("/m/a", "/m/b", "/m/c"), names=("A", "B", "C"))
    rows = [["/m/c", "/m/x", "/m/a", "/m/x"], [], ["/m/y", "/m/x"], ["/m/b", "/m/b"]]
    raw, outside = index_class_ids(pl.Series(rows, dtype=pl.List(pl.String)), classes)
    assert raw.to_list() == [[0, 2], [], [], [1]]
    assert outside.to_list() == [["/m/x"], [], ["/m/x", "/m/y"], []]
    assert (raw.name, raw.dtype) == ("raw", pl.List(pl.UInt16))
    assert (outside.name, outside.dtype) == ("outside", pl.List(pl.String))


def test_ids_that_are_all_known_leave_nothing_outside():
    """The usual case, whose list of outside ids has no entry at all."""
    raw, outside = index_class_ids(pl.Series([[], [CLASSES.mids[5]]], dtype=pl.List(pl.String)), CLASSES)
    assert raw.to_list() == [[], [5]]
    assert outside.to_list() == [[], []]


def test_a_null_list_of_ids_is_refused():
    """A clip without labels has an empty list; a null is an error of the table."""
    with pytest.raises(OntologyError, match="row 1: a label is null"):
        index_class_ids(pl.Series([[], None], dtype=pl.List(pl.String)), CLASSES)


def damage(store: Path, kind: str) -> None:
    """Damage a store in one way."""
    manifest = store / "manifest.parquet"
    labels = store / "labels.parquet"
    match kind:
        case "no header":
            (store / "zarr.json").unlink()
        case "another kind":
            (store / "zarr.json").write_text('{"attributes": {}}')
        case "no labels":
            labels.unlink()
        case "no Parquet":
            labels.write_text("labels")
        case "no raw":
            pl.read_parquet(labels).drop("raw").write_parquet(labels)
        case "fewer rows":
            pl.read_parquet(labels).head(5).write_parquet(labels)
        case "no split":
            pl.read_parquet(manifest).with_columns(split=pl.lit(None, pl.String)).write_parquet(manifest)
        case "odd index":
            rows = [[], [], [], [], [], [999]]
            pl.DataFrame({"raw": rows}, schema={"raw": pl.List(pl.UInt16)}).write_parquet(
                labels, row_group_size=4
            )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no header", r"some\.zarr: not a feature store; make one with"),
        ("another kind", r"some\.zarr: not a feature store"),
        ("no labels", r"labels\.parquet: cannot be read \(missing\); .* run the ajepa-data build command"),
        ("no Parquet", r"labels\.parquet: cannot be read \("),
        ("no raw", r"labels\.parquet: no column 'raw', it has outside"),
        ("fewer rows", r"labels\.parquet: 5 rows, the manifest has 6"),
        ("no split", r"manifest\.parquet: 6 rows have no split"),
        ("odd index", r"labels\.parquet: row 5: class index 999, expected 0 to 526"),
    ],
)
def test_a_damaged_store_is_named_and_left_as_it_is(bare_store, kind, message):
    """One line that says what and where; nothing is written."""
    damage(bare_store, kind)
    before = file_bytes(bare_store)
    with pytest.raises(StoreError, match=message) as caught:
        propagate_store_labels(bare_store)
    assert "\n" not in str(caught.value)
    assert file_bytes(bare_store) == before


def test_a_torn_page_is_found_on_reading(bare_store):
    """Opening the file does not reveal bytes lost in its middle."""
    path = bare_store / "labels.parquet"
    content = bytearray(path.read_bytes())
    content[8:30] = bytes(22)
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"labels\.parquet: cannot be read \("):
        propagate_store_labels(bare_store)


def test_a_flipped_bit_of_a_propagated_table_never_becomes_another_label(bare_store, monkeypatch):
    """Without the checksum of every page, Parquet would read another label."""
    # The ontology is the same for every bit.
    for function in (load_ontology, rule_relation_CC):
        monkeypatch.setattr(label_sets, function.__name__, cache(function))
    path = bare_store / "labels.parquet"
    propagate_store_labels(bare_store)
    content = path.read_bytes()
    labels, _ = read_table(path)
    end = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    for place in range(4, end + 40):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with suppress(StoreError):
            assert read_table(path)[0].equals(labels)
        with suppress(StoreError):
            propagate_store_labels(bare_store)
            assert read_column(bare_store, "raw") == labels["raw"].to_list()


def test_the_scratch_file_of_a_killed_propagation_is_removed(bare_store):
    """For two million clips it is as large as the labels are."""
    own = scratch_path(bare_store / "labels.parquet")
    debris = own.with_name(own.name.replace(f"-{os.getpid()}.", "-999999999."))  # of a process that has ended
    debris.write_bytes(b"half")
    propagate_store_labels(bare_store)
    assert not debris.exists()


def test_an_absent_store_is_named(tmp_path):
    """A wrong path is the most common mistake."""
    with pytest.raises(StoreError, match=r"absent\.zarr: not a feature store"):
        propagate_store_labels(tmp_path / "absent.zarr")


def test_an_unknown_rule_or_split_is_answered_with_the_nearest(bare_store):
    """Both are typed by users."""
    with pytest.raises(OntologyError, match="'all-ancestor'; did you mean 'all-ancestors'"):
        propagate_store_labels(bare_store, "all-ancestor")
    with pytest.raises(InputError, match="no split 'evals'; did you mean 'eval'"):
        propagate_store_labels(bare_store, splits=["evals"])


def test_an_unknown_label_set_is_answered_with_those_there_are(store):
    """The error also gives the command that adds the label set."""
    message = r"no label set 'dominators', it has raw, unambiguous; add it with: ajepa-data propagate-labels .* --rule"
    with pytest.raises(StoreError, match=message):
        store.labels_BC(store.good_rows()[:1], "dominators")


def test_ids_are_indexed_a_part_at_a_time(monkeypatch):
    """Two million rows take little memory on the way; the result, and the row that an error names, are the same."""
    rows = [[], [CLASSES.mids[5], "/m/other"], [CLASSES.mids[2]] * 2, ["/m/b", "/m/a"], [CLASSES.mids[0]]]
    mids = pl.Series(rows, dtype=pl.List(pl.String))
    whole = pl.DataFrame(index_class_ids(mids, CLASSES))
    monkeypatch.setattr("pipeline.labels.label_sets.ROWS_INDEXED", 2)
    assert pl.DataFrame(index_class_ids(mids, CLASSES)).equals(whole)
    with pytest.raises(OntologyError, match="row 13"):
        index_class_ids(pl.Series([*rows[:3], None], dtype=pl.List(pl.String)), CLASSES, first_row=10)
