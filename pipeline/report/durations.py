"""How much sound a store holds, and how much of its sources is in none of its clips."""

from dataclasses import dataclass
from typing import Self

import polars as pl

from pipeline.report.spectrograms import frame_step_seconds
from pipeline.store.feature_store import FeatureStore
from pipeline.store.summary import IS_GOOD_CLIP

# Clips are rounded to whole frames, so that a little less than this is missing of every clip.
ROUNDING_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundDurations:
    """Seconds of the good clips, together and by split, and of the parts of their sources that no clip uses.

    unused_seconds  of a source that is longer than the clips cut out of it together: the rest of it
    longer_sources  how many sources have such a rest
    """

    good_seconds: float
    split_seconds: dict[str, float]
    unused_seconds: float
    longer_sources: int

    @classmethod
    def of_store(cls, store: FeatureStore) -> Self:
        """Sum up the manifest of a store."""
        # The good clips of each split.
        step_seconds = frame_step_seconds(store.spec)
        good = (
            store.manifest_columns("split", "status", "n_frames", "source", "seconds")
            .lazy()
            .filter(IS_GOOD_CLIP)
        )
        frames = good.group_by("split", maintain_order=True).agg(pl.col("n_frames").sum()).collect()
        split_seconds = {split: count * step_seconds for split, count in frames.iter_rows()}

        # The rest of every source beyond its clips. All clips of a source have its length in `seconds`.
        used = pl.col("n_frames").sum() * step_seconds
        rest = pl.col("seconds").max() - used - ROUNDING_SECONDS * pl.len()
        rests = good.filter(pl.col("source").is_not_null()).group_by("source").agg(rest=rest)
        longer = rests.filter(pl.col("rest") > 0).select(pl.col("rest").sum(), pl.len()).collect()
        unused_seconds, longer_sources = longer.row(0)
        return cls(
            good_seconds=sum(split_seconds.values()),
            split_seconds=split_seconds,
            unused_seconds=float(unused_seconds or 0.0),
            longer_sources=longer_sources,
        )


def format_duration(seconds: float) -> str:
    """Seconds in the unit that people would use: `42 s`, `7.6 min`, `1.67 h`, `5,790 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    hours = seconds / 3600
    return f"{hours:,.0f} h" if hours >= 100 else f"{hours:.3g} h"
