"""A store in numbers: what became of every clip, split by split and class by class."""

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

FLAG_MEANINGS: dict[str, str] = {
    "cut": "a whole recording, cut at the segment",
    "longer": "longer than its segment; the first seconds count",
    "shorter": "shorter than its segment; its valid frames say so",
    "truncated": "cut short, and accepted",
    "silent": "peak under -90 dBFS, and kept",
    "mixed_down": "several channels, of which the mean was taken",
    "beyond_full_scale": "samples beyond full scale; not clipped",
    "wrong_extension": "content and extension differ; content decided",
}

EXAMPLES_PER_REASON = 5

IS_GOOD_CLIP = pl.col("status") == "good"


def coverage_table(manifest: pl.DataFrame, excluded_N: np.ndarray | None = None) -> str:
    """Per split: clips listed, good, excluded of these, odd but used, and failed by reason, as a table in text."""
    seen = ClipCoverage.from_manifest(manifest, excluded_N)
    rows = [("clips listed", seen.listed_counts), ("good", seen.good_counts)]
    rows += [("  excluded by a list", seen.excluded_counts)] * any(seen.excluded_counts)
    rows += [(f"  {flag}", counts) for flag, counts in seen.flag_counts.items()]
    rows += [("failed", seen.failed_counts)]
    rows += [(f"  {reason}", counts) for reason, counts in seen.reason_counts.items()]
    width = max(18, *(len(split) + 2 for split in seen.splits))
    lines = ["".join(["split".ljust(22), *(split.rjust(width) for split in seen.splits)])]
    lines += ["".join([name.ljust(22), *(f"{count:>{width},}" for count in counts)]) for name, counts in rows]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipCoverage:
    """Clips per split, in the order of `splits`; flags and reasons that no clip has are left out."""

    splits: tuple[str, ...]
    listed_counts: tuple[int, ...]
    good_counts: tuple[int, ...]
    failed_counts: tuple[int, ...]
    excluded_counts: tuple[int, ...]  # good, and marked by an exclude list
    flag_counts: dict[str, tuple[int, ...]]  # of good clips; one may have several
    reason_counts: dict[str, tuple[int, ...]]

    @classmethod
    def from_manifest(cls, manifest: pl.DataFrame, excluded_N: np.ndarray | None = None) -> Self:
        """Counted in two passes; `excluded_N` marks the rows that exclude lists name."""
        splits = tuple(manifest["split"].unique(maintain_order=True))
        rows = manifest.lazy()  # lazy: only the columns asked for are filtered
        became = rows.group_by("split", "status", "reason").len().collect()
        odd = rows.filter(IS_GOOD_CLIP).group_by("split", "flags").len().collect()
        odd = odd.explode("flags").drop_nulls("flags")
        flags = sorted(odd["flags"].unique())
        marked = manifest.select("split", "status").filter(
            pl.lit(False) if excluded_N is None else pl.Series(excluded_N)
        )
        left_out = marked.filter(IS_GOOD_CLIP).group_by("split").len()
        return cls(
            splits=splits,
            listed_counts=_counts_per_split(became, splits),
            good_counts=_counts_per_split(became.filter(IS_GOOD_CLIP), splits),
            failed_counts=_counts_per_split(became.filter(pl.col("status") == "failed"), splits),
            excluded_counts=_counts_per_split(left_out, splits),
            flag_counts={
                flag: _counts_per_split(odd.filter(pl.col("flags") == flag), splits) for flag in flags
            },
            reason_counts={
                reason: _counts_per_split(became.filter(pl.col("reason") == reason), splits)
                for reason in FAILURE_REASONS
                if reason in became["reason"]
            },
        )


def _counts_per_split(counts: pl.DataFrame, splits: Sequence[str]) -> tuple[int, ...]:
    sums = dict(counts.group_by("split").agg(pl.col("len").sum()).iter_rows())
    return tuple(sums.get(split, 0) for split in splits)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassCounts:
    """Clips per split and class."""

    listed_NC: np.ndarray  # with the raw label, whatever became of them
    positives_NC: dict[
        str, np.ndarray
    ]  # good, not excluded clips that have the class, by label set; `raw` first

    @classmethod
    def from_store(cls, store: FeatureStore, labels: pl.DataFrame, splits: Sequence[str]) -> Self:
        """Of every row; `labels` as in labels.parquet."""
        split_N = (
            store.manifest["split"].cast(pl.Enum(list(splits))).to_physical().to_numpy().astype(np.int64)
        )
        good_N = np.zeros(len(split_N), bool)
        good_N[store.good_rows()] = True
        shape = len(splits), len(store.classes)
        cells = {name: label_cells(labels[name], split_N, shape[1]) for name in label_set_names(labels)}
        return cls(
            listed_NC=np.bincount(cells["raw"][1], minlength=shape[0] * shape[1]).reshape(shape),
            positives_NC={
                name: np.bincount(cell_N[good_N[rows_N]], minlength=shape[0] * shape[1]).reshape(shape)
                for name, (rows_N, cell_N) in cells.items()
            },
        )


def label_cells(labels: pl.Series, split_N: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The row of every label, and where it counts: split times `classes` plus class."""
    rows_N, class_N = flatten_label_lists(labels)
    return rows_N, split_N[rows_N] * classes + class_N.to_numpy(zero_copy_only=False).astype(np.int64)


def failure_examples(manifest: pl.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Of each reason the first rows: clip_id, split, source, detail."""
    failed = manifest.filter(pl.col("status") == "failed")
    some = failed.group_by("reason", maintain_order=True).head(EXAMPLES_PER_REASON)
    of = some.select("reason", "clip_id", "split", "source", "detail").partition_by("reason", as_dict=True)
    return {str(reason): frame.rows(named=True) for (reason,), frame in of.items()}


def count_good_values(manifest: pl.DataFrame, column: str) -> list[tuple[Any, int]]:
    """The values of a column among good clips and how often each is there, the most frequent first."""
    counted = manifest.lazy().filter(IS_GOOD_CLIP).group_by(column).len().collect()
    return list(counted.sort("len", column, descending=[True, False]).iter_rows())


def good_clip_histogram(manifest: pl.DataFrame, column: str, edges_N: np.ndarray) -> np.ndarray:
    """Good clips between each two edges; what lies beyond the outermost counts in the outermost bins."""
    values_N = (
        manifest.lazy().filter(IS_GOOD_CLIP).select(pl.col(column).drop_nulls()).collect()[column].to_numpy()
    )
    inside_N = np.clip(values_N, edges_N[0], np.nextafter(edges_N[-1], edges_N[0]))
    return np.histogram(inside_N, edges_N)[0]


def read_label_table(store: FeatureStore) -> tuple[pl.DataFrame, dict[str, str]]:
    """labels.parquet, and a sentence for each label set on where it comes from."""
    labels, sources = read_table(store.path / "labels.parquet")
    return labels, {name: _describe_provenance(sources.get(name)) for name in label_set_names(labels)}


def label_set_names(labels: pl.DataFrame) -> list[str]:
    """The names of the label sets of a labels.parquet, `raw` first."""
    return [name for name in labels.columns if name != "outside"]


def _describe_provenance(record: Any) -> str:
    if not isinstance(record, dict):
        return str(record or "not recorded")
    splits = ", ".join(record["splits"])
    return (
        f"{record['pairs']} class pairs of ontology {record['ontology']}, in {splits}; by {record['version']}"
    )


def stored_mel_bytes(store: FeatureStore) -> int:
    """What the shards take on a disk: the clips that are good, and an index in each shard that has one."""
    layout, good_N = store.header.layout, store.manifest["status"].to_numpy() == "good"
    shards = len(np.unique(np.flatnonzero(good_N) // layout.shard_clips))
    index_bytes = 16 * layout.shard_clips + CRC_BYTES
    return int(good_N.sum()) * (layout.clip_bytes + CRC_BYTES) + shards * index_bytes


def format_bytes(count: float) -> str:
    """Bytes to be read: 1,536 is 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
