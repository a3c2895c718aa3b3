"""Counts of the clips of a store, per split and per class: good, failed, excluded, and flagged as unusual."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import polars as pl

from pipeline.labels.ontology import flatten_label_lists
from pipeline.store.feature_store import FeatureStore
from pipeline.store.manifest import FAILURE_REASONS
from pipeline.store.shards import CRC_BYTES
from pipeline.tables import read_table

# The flags of good clips in the manifest, explained to people.
FLAG_MEANINGS: dict[str, str] = {
    "cut": "cut out of a whole recording",
    "longer": "longer than its segment; the end is not used",
    "shorter": "shorter than its segment; the rest of the row is padding",
    "gaps": "silence where the time stamps of the file leave out sound",
    "truncated": "the file is cut short; accepted by an option",
    "silent": "peak under -90 dBFS; kept by an option",
    "mixed_down": "several channels; their mean is used",
    "beyond_full_scale": "samples beyond full scale; not clipped",
    "wrong_extension": "content and extension differ; the content is used",
}

EXAMPLES_PER_REASON = 5

MAX_FAILED_FILES = 5  # named after a build

# A sound that is longer than its clip by at most this share loses nothing that matters.
LONGER_SHARE = 0.05

COVERAGE_COLUMNS = ("split", "status", "reason", "flags")  # of the manifest: what `ClipCoverage` counts

# What `failed_file_lines`, `failure_examples` and `left_out_lengths` need.
FAILED_FILE_COLUMNS = ("clip_id", "source", "status", "reason")
EXAMPLE_COLUMNS = ("clip_id", "split", "source", "status", "reason", "detail")
LENGTH_COLUMNS = ("source", "status", "start_seconds", "end_seconds", "seconds")

IS_GOOD_CLIP = pl.col("status") == "good"


def coverage_table(manifest: pl.DataFrame, excluded_N: np.ndarray | None = None) -> str:
    """Return a text table with a column per split: clips listed, good, excluded, flagged, and failed by reason."""
    # The rows of the table, subheadings indented.
    coverage = ClipCoverage.from_manifest(manifest, excluded_N)
    rows = [("clips listed", coverage.listed_counts), ("good", coverage.good_counts)]
    if any(coverage.excluded_counts):
        rows.append(("  excluded by a list", coverage.excluded_counts))
    rows += [(f"  {flag}", counts) for flag, counts in coverage.flag_counts.items()]
    rows.append(("failed", coverage.failed_counts))
    rows += [(f"  {reason}", counts) for reason, counts in coverage.reason_counts.items()]

    # Columns are as wide as the longest name of a split.
    width = max(18, *(len(split) + 2 for split in coverage.splits))
    lines = ["".join(["split".ljust(22), *(split.rjust(width) for split in coverage.splits)])]
    lines += ["".join([name.ljust(22), *(f"{count:>{width},}" for count in counts)]) for name, counts in rows]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipCoverage:
    """Numbers of clips per split, in the order of `splits`; flags and reasons that no clip has are left out."""

    splits: tuple[str, ...]
    listed_counts: tuple[int, ...]
    good_counts: tuple[int, ...]
    failed_counts: tuple[int, ...]
    excluded_counts: tuple[int, ...]  # good clips that an exclude list names
    flag_counts: dict[str, tuple[int, ...]]  # by flag, of good clips; a clip may have several flags
    reason_counts: dict[str, tuple[int, ...]]  # by failure reason

    @classmethod
    def from_store(cls, store: FeatureStore) -> Self:
        """Count the clips of a store."""
        return cls.from_manifest(store.manifest_columns(*COVERAGE_COLUMNS), store.excluded_N)

    @classmethod
    def from_manifest(cls, manifest: pl.DataFrame, excluded_N: np.ndarray | None = None) -> Self:
        """Count the clips of a manifest; `excluded_N` marks the rows that exclude lists name."""
        splits = tuple(manifest["split"].unique(maintain_order=True))

        # Two passes over millions of rows, lazily: only the columns that are needed are filtered.
        rows = manifest.lazy()
        by_status = rows.group_by("split", "status", "reason").len().collect()
        by_flags = rows.filter(IS_GOOD_CLIP).group_by("split", "flags").len().collect()
        by_flag = by_flags.explode("flags").drop_nulls("flags")
        flags = sorted(by_flag["flags"].unique())

        excluded_counts = (0,) * len(splits)
        if excluded_N is not None:
            excluded = manifest.select("split", "status").filter(pl.Series(excluded_N))
            good_excluded = excluded.filter(IS_GOOD_CLIP).group_by("split").len()
            excluded_counts = _counts_per_split(good_excluded, splits)

        return cls(
            splits=splits,
            listed_counts=_counts_per_split(by_status, splits),
            good_counts=_counts_per_split(by_status.filter(IS_GOOD_CLIP), splits),
            failed_counts=_counts_per_split(by_status.filter(pl.col("status") == "failed"), splits),
            excluded_counts=excluded_counts,
            flag_counts={
                flag: _counts_per_split(by_flag.filter(pl.col("flags") == flag), splits) for flag in flags
            },
            reason_counts={
                reason: _counts_per_split(by_status.filter(pl.col("reason") == reason), splits)
                for reason in FAILURE_REASONS
                if reason in by_status["reason"]
            },
        )


def _counts_per_split(counts: pl.DataFrame, splits: Sequence[str]) -> tuple[int, ...]:
    """Return the sum of the column `len` for each split, 0 for a split without rows."""
    sums = dict(counts.group_by("split").agg(pl.col("len").sum()).iter_rows())
    return tuple(sums.get(split, 0) for split in splits)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassCounts:
    """Numbers of clips per split and class."""

    listed_NC: np.ndarray  # clips with the raw label, good or not
    # Good, not excluded clips that have the class, by label set; `raw` first.
    positives_NC: dict[str, np.ndarray]

    @classmethod
    def from_store(cls, store: FeatureStore, labels: pl.DataFrame, splits: Sequence[str]) -> Self:
        """Count the clips of a store; `labels` has the columns of labels.parquet."""
        # The split of each row as a number, and whether the row is good.
        split_names = store.manifest_columns("split").to_series().cast(pl.Enum(list(splits)))
        split_N = split_names.to_physical().to_numpy().astype(np.int64)
        good_N = np.zeros(len(split_N), bool)
        good_N[store.good_rows()] = True

        # Each label has a row, and a cell in the flattened table of splits and classes.
        classes = len(store.classes)
        cells = {name: _label_cells(labels[name], split_N, classes) for name in label_set_names(labels)}

        def count_cells(cell_N: np.ndarray) -> np.ndarray:
            return np.bincount(cell_N, minlength=len(splits) * classes).reshape(len(splits), classes)

        _, raw_cell_N = cells["raw"]
        return cls(
            listed_NC=count_cells(raw_cell_N),
            positives_NC={
                name: count_cells(cell_N[good_N[rows_N]]) for name, (rows_N, cell_N) in cells.items()
            },
        )


def _label_cells(labels: pl.Series, split_N: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row of every label, and its cell: split * classes + class."""
    rows_N, values = flatten_label_lists(labels)
    class_N = values.to_numpy(zero_copy_only=False).astype(np.int64)
    return rows_N, split_N[rows_N] * classes + class_N


def failure_examples(manifest: pl.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Return the first rows of each failure reason: clip_id, split, source, detail."""
    # Most of millions of clips may be missing, so that only the rows that are shown are copied.
    failed = manifest.select("reason", "status").with_row_index("row").filter(pl.col("status") == "failed")
    examples = failed.group_by("reason", maintain_order=True).head(EXAMPLES_PER_REASON)
    columns = manifest[examples["row"]].select("reason", "clip_id", "split", "source", "detail")
    by_reason = columns.partition_by("reason", as_dict=True)
    return {str(reason): frame.rows(named=True) for (reason,), frame in by_reason.items()}


def failed_file_lines(manifest: pl.DataFrame, list_command: str) -> list[str]:
    """Return a line for each of the first files with failed clips, such as `a.wav: truncated (6 pieces)`.

    A clip without a file is named by its id, after all others. The last line has the number of further files, and
    `list_command`, which lists them all.
    """
    # Of all AudioSet, most clips may be missing: they are counted, and only the first of them are named.
    failed = manifest.lazy().filter(pl.col("status") == "failed")
    has_file = pl.col("source").is_not_null()
    files = failed.filter(has_file).group_by("source", "reason", maintain_order=True).len("pieces").collect()
    without_file = failed.filter(~has_file).select("clip_id", "reason")
    named = without_file.head(max(0, MAX_FAILED_FILES - files.height)).collect()

    lines = []
    for source, reason, pieces in files.head(MAX_FAILED_FILES).iter_rows():
        lines.append(f"{source}: {reason}" + (f" ({pieces:,} pieces)" if pieces > 1 else ""))
    lines += [f"{clip_id}: {reason}" for clip_id, reason in named.iter_rows()]
    others = files.height + without_file.select(pl.len()).collect().item() - len(lines)
    if others:
        lines.append(f"and {others:,} more: {list_command}")
    return lines


def count_good_values(manifest: pl.DataFrame, column: str) -> list[tuple[Any, int]]:
    """Return the values of a column among good clips and how often each occurs, the most frequent first."""
    counts = manifest.lazy().filter(IS_GOOD_CLIP).group_by(column).len().collect()
    return list(counts.sort("len", column, descending=[True, False]).iter_rows())


def left_out_lengths(manifest: pl.DataFrame, clip_seconds: float) -> tuple[int, float]:
    """Return how many sounds end after their only clip, of `clip_seconds` from their start, and the seconds after it.

    Sounds with several clips, or with a clip of another length or start, were cut by somebody who knew their length.
    """
    by_sound = (
        manifest.lazy()
        .filter(IS_GOOD_CLIP & pl.col("source").is_not_null())
        .group_by("source")
        .agg(
            clips=pl.len(),
            start=pl.col("start_seconds").min(),
            end=pl.col("end_seconds").max(),
            seconds=pl.col("seconds").max(),
        )
    )
    whole = (pl.col("clips") == 1) & (pl.col("start") == 0)
    ends_by_length = (pl.col("end") - clip_seconds).abs() < 1e-3
    left_out = (pl.col("seconds") - pl.col("end")).filter(
        whole & ends_by_length & (pl.col("seconds") > (1 + LONGER_SHARE) * pl.col("end"))
    )
    count, seconds = by_sound.select(left_out.len(), left_out.sum().alias("sum")).collect().row(0)
    return count, seconds or 0.0


def good_clip_histogram(manifest: pl.DataFrame, column: str, edges_N: np.ndarray) -> np.ndarray:
    """Return the number of good clips per bin; values beyond the edges count in the outermost bins."""
    values = manifest.lazy().filter(IS_GOOD_CLIP).select(pl.col(column).drop_nulls()).collect()
    values_N = values[column].to_numpy()
    # Values beyond the outermost edges move just inside them.
    inside_N = np.clip(values_N, edges_N[0], np.nextafter(edges_N[-1], edges_N[0]))
    return np.histogram(inside_N, edges_N)[0]


def read_label_table(store: FeatureStore) -> tuple[pl.DataFrame, dict[str, str]]:
    """Return labels.parquet, and for each label set a sentence about its origin."""
    labels, metadata = read_table(store.path / "labels.parquet")
    return labels, {name: _describe_provenance(metadata.get(name)) for name in label_set_names(labels)}


def label_set_names(labels: pl.DataFrame) -> list[str]:
    """Return the names of the label sets of a labels.parquet, `raw` first."""
    return [name for name in labels.columns if name != "outside"]


def _describe_provenance(record: Any) -> str:
    if not isinstance(record, dict):
        return str(record or "not recorded")
    splits = ", ".join(record["splits"])
    return (
        f"{record['pairs']} class pairs of ontology {record['ontology']}, in {splits}; by {record['version']}"
    )


def stored_mel_bytes(store: FeatureStore) -> int:
    """Return the bytes of all shards on the disk: the good clips, and one index per shard with a good clip."""
    layout = store.header.layout
    good_rows_N = (store.manifest_columns("status").to_series() == "good").arg_true().to_numpy()
    shard_count = len(np.unique(good_rows_N // layout.shard_clips))
    index_bytes = 16 * layout.shard_clips + CRC_BYTES
    return len(good_rows_N) * (layout.clip_bytes + CRC_BYTES) + shard_count * index_bytes


def format_bytes(count: float) -> str:
    """Return a number of bytes as text: 1,536 is `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
