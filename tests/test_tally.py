"""What propagation changes in all of AudioSet, against the reference; and the table that tells it."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.labels import split_mids
from pipeline.ontology import load_class_list, load_ontology
from pipeline.propagation import propagate, relation_CC
from pipeline.tally import Change, Provenance, Tally, table

ORIGINALS = Path(__file__).parents[2] / "shared" / "audioset"
needs_originals = pytest.mark.skipif(
    not ORIGINALS.exists(), reason="the original AudioSet files are not here"
)
CLASSES = load_class_list()


@pytest.fixture(scope="module")
def audioset() -> Tally:
    """Every clip of AudioSet, as label sets in random order, before and after propagation."""
    with gzip.open(ORIGINALS / "labelset_counts.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    splits = ("unbalanced", "balanced", "eval")
    sets = pl.Series(
        [[int(i) for i in row["label_indices"].split()] for row in rows], dtype=pl.List(pl.UInt16)
    )
    counts = np.array([[int(row[split]) for row in rows] for split in splits])
    split_N, set_N = (np.repeat(axis, counts.ravel()) for axis in np.indices(counts.shape).reshape(2, -1))
    order = np.random.default_rng(0).permutation(len(set_N))
    tally = Tally(splits, CLASSES)
    raw = sets.gather(set_N[order])
    tally.add(split_N[order], raw, propagate(raw, relation_CC()))
    return tally


def is_the_reference(change: Change) -> bool:
    """Whether every figure of the reference for this split is the change's."""
    reference = json.loads((ORIGINALS / "hlp_reference_stats.json").read_text())[change.split]
    fields = {key: key.replace("_raw", "_before").replace("_hlp", "_after") for key in reference}
    return {key: getattr(change, field) for key, field in fields.items()} == reference


@needs_originals
@pytest.mark.parametrize("name", ["unbalanced", "balanced", "eval", "train", "all"])
def test_the_figures_of_all_of_audioset_are_the_references(audioset, name):
    """2,084,320 clips: means, labels added, clips changed and classes gaining, all exactly."""
    parts = {"train": ("unbalanced", "balanced"), "all": audioset.splits}.get(name, (name,))
    assert is_the_reference(audioset.change(name, parts))


@needs_originals
@pytest.mark.parametrize("name", ["balanced", "eval"])
def test_the_figures_of_the_official_lists_are_the_references(name):
    """From the lists of ids, as Google published them, to the table of what changed."""
    path = ORIGINALS / ("eval_segments.csv" if name == "eval" else "balanced_train_segments.csv")
    lines = path.read_text().splitlines()[3:]
    mids = pl.Series([line.split('"')[1].split(",") for line in lines])
    raw, outside = split_mids(mids, CLASSES)
    tally = Tally([name], CLASSES)
    tally.add(np.zeros(len(raw), np.int64), raw, propagate(raw, relation_CC()))
    assert is_the_reference(tally.change(name, [name]))
    assert outside.list.len().sum() == 0


@needs_originals
def test_each_class_gains_what_the_reference_says(audioset):
    """Not only the sums: the positives of all 527 classes, before and after."""
    with (ORIGINALS / "class_counts.csv").open() as file:
        rows = list(csv.DictReader(file))
    for when, ours_NC in (("raw", audioset.before_NC), ("hlp", audioset.after_NC)):
        reference_NC = [[int(row[f"{split}_{when}"]) for row in rows] for split in audioset.splits]
        assert np.array_equal(ours_NC, reference_NC)


def told(outside: list[list[str]]) -> str:
    """The table of unlabelled clips with such ids outside the class list."""
    ontology, adds_CC = load_ontology(), relation_CC()
    nothing = pl.Series([[] for _ in outside], dtype=pl.List(pl.UInt16))
    tally = Tally(["train"], CLASSES)
    tally.add(
        np.zeros(len(outside), np.int64), nothing, nothing, pl.Series(outside, dtype=pl.List(pl.String))
    )
    return table(tally.done(Provenance.of("unambiguous", ontology, CLASSES, adds_CC, ("train",)), ontology))


def test_the_table_names_what_is_outside_the_class_list():
    """An id alone tells nobody that washing machines are not among the 527; the most frequent comes first."""
    lines = told([["/m/0174k2"], ["/m/0174k2", "/m/0bm0k"], ["/m/0"], []]).splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("outside the class list"))
    assert [line.rsplit(maxsplit=1) for line in lines[place + 1 :]] == [
        ["Washing machine (/m/0174k2)", "2"],
        ["/m/0, known to no list", "1"],
        ["Crash cymbal (/m/0bm0k)", "1"],
    ]


def test_the_table_is_silent_where_nothing_is_outside():
    """The usual case gets no heading; many ids get ten lines and a count."""
    assert "outside" not in told([[], []])
    assert told([[f"/m/{n}" for n in range(12)]]).endswith("and 2 more ids")
