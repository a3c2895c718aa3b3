"""The counts of a store's summary agree with its manifest and labels."""

import numpy as np
import polars as pl
import pytest
from corpus import BROKEN, MISSING, SILENT, clip_id

from pipeline.store.manifest import FAILURE_REASONS
from pipeline.store.summary import (
    ClassCounts,
    ClipCoverage,
    count_good_values,
    coverage_table,
    failed_file_lines,
    failure_examples,
    format_bytes,
    good_clip_histogram,
    read_label_table,
)


def test_every_listed_clip_is_good_or_failed_for_a_reason(store):
    """No clip is missing: listed = good + failed, and failed = the sum over all reasons."""
    coverage = ClipCoverage.from_manifest(store.manifest)
    assert coverage.splits == ("a_train", "eval")
    assert coverage.listed_counts == (36, 12)
    assert coverage.good_counts == (36 - 2, 12 - 1)
    assert tuple(np.add(coverage.good_counts, coverage.failed_counts)) == coverage.listed_counts
    assert tuple(np.sum(list(coverage.reason_counts.values()), axis=0)) == coverage.failed_counts
    assert coverage.flag_counts["shorter"] == (2, 1)


def test_failed_files_are_named_with_their_pieces(store):
    """Five at most, then their number; clips that have no file come last, by their id."""
    lines = failed_file_lines(store.manifest, "LIST")
    assert [line.split(": ")[1] for line in lines] == ["silent", "unreadable", "missing"]
    assert lines[-1] == f"{clip_id(MISSING)}: missing"

    names = ["a.wav"] * 3 + [f"{number}.wav" for number in range(6)]
    pieces = pl.DataFrame({"source": names}).with_columns(
        clip_id=pl.col("source"), status=pl.lit("failed"), reason=pl.lit("truncated")
    )
    lines = failed_file_lines(pieces, "LIST")
    assert lines[:2] == ["a.wav: truncated (3 pieces)", "0.wav: truncated"]
    assert lines[5:] == ["and 2 more: LIST"]


def test_the_table_in_text_gives_the_same_counts(store):
    """Reasons are in the order of the manifest; reasons without a clip are left out."""
    lines = {line[:22].strip(): line[22:].split() for line in coverage_table(store.manifest).splitlines()}
    assert lines["clips listed"] == ["36", "12"]
    assert lines["missing"] == ["1", "0"]
    assert lines["unreadable"] == ["0", "1"]
    assert [name for name in lines if name in FAILURE_REASONS] == ["missing", "unreadable", "silent"]


def test_long_names_of_splits_stay_apart(store):
    """`unbalanced_train_segments` is wider than the minimum width of a column."""
    long = store.manifest.with_columns(split=pl.lit("unbalanced_train_segments_again") + pl.col("split"))
    head = coverage_table(long).splitlines()[0].split()
    assert head[1:] == [f"unbalanced_train_segments_again{split}" for split in ("a_train", "eval")]


def test_classes_are_counted_as_the_labels_say(store):
    """The counts over all labels agree with the 0/1 matrix of each split."""
    labels, _ = read_label_table(store)
    counts = ClassCounts.from_store(store, labels, ["a_train", "eval"])
    for name in ("raw", "unambiguous"):
        for place, split in enumerate(["a_train", "eval"]):
            expected_C = store.labels_BC(store.good_rows([split]), name).sum(0)
            np.testing.assert_array_equal(counts.positives_NC[name][place], expected_C)
    np.testing.assert_array_equal(counts.listed_NC.sum(0), store.labels_BC(np.arange(48)).sum(0))


def test_failures_are_shown_by_name(store):
    """A user who fetches a clip again needs its id."""
    examples = failure_examples(store.manifest)
    assert {reason: clips[0]["clip_id"] for reason, clips in examples.items()} == {
        "missing": clip_id(MISSING),
        "silent": clip_id(SILENT),
        "unreadable": clip_id(BROKEN),
    }


def test_distributions_count_every_good_clip_once(store):
    """Values beyond the outermost bins count in these bins."""
    good = len(store.good_rows())
    assert sum(count for _, count in count_good_values(store.manifest, "rate_hz")) == good
    assert good_clip_histogram(store.manifest, "seconds", np.array([0.0, 2.5, 5.0])).tolist() == [1, good - 1]
    assert good_clip_histogram(store.manifest, "seconds", np.array([20.0, 30.0])).tolist() == [good]


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (5 * 2**40, "5.0 TiB")])
def test_bytes_are_shown_in_binary_units(count, text):
    assert format_bytes(count) == text
