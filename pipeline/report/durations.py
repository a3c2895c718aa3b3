"""How much sound a store holds, and how much of its sources is in none of its clips."""

from dataclasses import dataclass
from typing import Self

import polars as pl

from pipeline.store.feature_store import FeatureStore
from pipeline.store.summary import IS_GOOD_CLIP

# Of a source that is longer than its clips by less than this, nothing is told.
MIN_REST_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundDurations:
    """Seconds of the good clips, together and by split, and of the parts of their sources that no clip uses.

    unused_seconds  of a source that is longer than the clips cut out of it together: the rest of it. What failed
                    clips would hold does not count, nor the end of a source of which a clip is truncated
    longer_sources  how many sources have such a rest
    """

    good_seconds: float
    split_seconds: dict[str, float]
    unused_seconds: float
    longer_sources: int

    @classmethod
    def of_store(cls, store: FeatureStore) -> Self:
        """Sum up the manifest of a store."""
        split_seconds = good_seconds_by_split(store)
        rest_N = unused_source_seconds(store)
        return cls(
            good_seconds=sum(split_seconds.values()),
            split_seconds=split_seconds,
            unused_seconds=float(rest_N.sum()),
            longer_sources=len(rest_N),
        )


def good_seconds_by_split(store: FeatureStore) -> dict[str, float]:
    """Return the seconds of the good clips of each split that has any: their valid frames times the hop."""
    good = store.manifest_columns("split", "status", "n_frames").lazy().filter(IS_GOOD_CLIP)
    frames = good.group_by("split", maintain_order=True).agg(pl.col("n_frames").sum()).collect()
    return {split: count * store.spec.hop_seconds for split, count in frames.iter_rows()}


def unused_source_seconds(store: FeatureStore) -> pl.Series:
    """Return the seconds of each source that are in no clip, of the sources that have such a rest."""
    columns = ("source", "status", "reason", "flags", "start_seconds", "end_seconds", "seconds")
    clips = store.manifest_columns(*columns).lazy().filter(pl.col("source").is_not_null())
    is_truncated = (pl.col("reason") == "truncated").fill_null(False)

    # The part of its source that a clip covers. A clip that is not cut out of its source begins it.
    held = pl.min_horizontal(pl.col("end_seconds") - pl.col("start_seconds"), store.spec.clip_seconds)
    is_cut = pl.col("flags").list.contains("cut") | ~IS_GOOD_CLIP
    begin = pl.when(is_cut).then(pl.col("start_seconds")).otherwise(0.0)
    clips = clips.with_columns(begin=begin, stop=begin + held, is_truncated=is_truncated)

    # A source ends where a clip of it ended early. All its good clips have its length, as its header declares it.
    end = pl.min_horizontal(pl.col("seconds").min(), pl.col("begin").filter("is_truncated").min())
    clips = clips.sort("source", "begin").with_columns(end=end.over("source"))

    # Each clip adds what no clip before it covers.
    stop = pl.min_horizontal("stop", "end")
    covered_before = stop.cum_max().shift(1, fill_value=0.0).over("source")
    added = (stop - pl.max_horizontal("begin", covered_before)).clip(lower_bound=0.0)
    rest = pl.col("end").first() - pl.col("added").sum()
    sources = clips.with_columns(added=added).group_by("source").agg(rest=rest)
    return sources.filter(pl.col("rest") > MIN_REST_SECONDS).collect()["rest"]


def format_duration(seconds: float) -> str:
    """Seconds in the unit that people would use: `42 s`, `7.6 min`, `1.67 h`, `5,790 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    hours = seconds / 3600
    return f"{hours:,.0f} h" if hours >= 100 else f"{hours:.3g} h"
