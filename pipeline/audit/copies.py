"""Copies: clips that share their id, their recording or their very audio, within a split and across splits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

COPY_EXAMPLES_KEPT = 5

COPY_KIND_COLUMNS = {"audio": "audio", "id": "clip_id", "recording": "recording"}  # kind: column of the clips


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipCopies:
    """Clips that share something with others, in one split (named twice) or in two."""

    kind: str  # a key of KEYS
    splits: tuple[str, str]
    leak: bool  # exactly one of the two splits is held out
    groups: int  # ids, recordings or waves that are shared
    clips: tuple[int, int]  # of each split; in one split both count the same clips
    labels_differ: int  # groups whose raw labels are not all the same
    examples: tuple[tuple[str, str], ...]  # ids of two clips of a group, one of each split


def clip_recordings(manifest: pl.DataFrame, dataset: str | None) -> pl.Series:
    """What each clip was cut from: in AudioSet the video, which its id names; else the sound's file.

    Where no file was found, the id without the place that a piece of a long sound has in it.
    """
    if dataset == "audioset":
        return manifest["clip_id"].alias("recording")
    whole = pl.col("clip_id").str.replace(r"@\d+$", "")
    return manifest.select(recording=pl.coalesce("source", whole)).to_series()


def find_copies(
    clips: pl.DataFrame, splits: Sequence[str], held_out_names: Sequence[str]
) -> tuple[ClipCopies, ...]:
    """Everything that clips share, leaks first, then by kind and by how many there are.

    `clips` are those in use: `row`, `split` (index into `splits`), clip_id, recording, audio (null: not to be
    compared) and raw. Pieces of one recording in one split are as they should be, and so not told.
    """
    found = [
        c
        for kind in COPY_KIND_COLUMNS
        for c in _copies_by_split(_clips_sharing_key(clips, kind), kind, splits, held_out_names)
    ]
    found = [c for c in found if c.kind != "recording" or c.splits[0] != c.splits[1]]
    kinds = list(COPY_KIND_COLUMNS)
    return tuple(
        sorted(
            found,
            key=lambda c: (not c.leak, len(set(c.splits)) == 1, kinds.index(c.kind), -c.groups, c.splits),
        )
    )


def _clips_sharing_key(clips: pl.DataFrame, kind: str) -> pl.DataFrame:
    """The clips that share their `key` of a kind with others; none where ids say as much as recordings.

    Two million texts are compared by their hashes first, which is five times as fast.
    """
    key = clips[COPY_KIND_COLUMNS[kind]]
    if kind == "recording" and key.equals(clips["clip_id"], check_names=False):
        return clips.clear().with_columns(key=key.clear())
    hash_N = key.hash().to_numpy()
    sorted_N = np.sort(hash_N)
    again_N = np.unique(sorted_N[1:][sorted_N[1:] == sorted_N[:-1]])
    if len(again_N):
        place_N = np.minimum(np.searchsorted(again_N, hash_N), len(again_N) - 1)
        marks = pl.Series(again_N[place_N] == hash_N)
    else:
        marks = pl.repeat(False, clips.height, eager=True)
    some = clips.with_columns(key=key).filter(marks & key.is_not_null())
    return some.filter(pl.col("key").is_duplicated())


def _copies_by_split(
    rows: pl.DataFrame, kind: str, splits: Sequence[str], held_out_names: Sequence[str]
) -> Iterator[ClipCopies]:
    """One kind of copies, for every pair of splits that has some."""
    labels = pl.col("raw").cast(pl.List(pl.String)).list.join(" ")
    rows = rows.select("row", "split", "clip_id", "key", labels=labels).sort("row")
    rows = rows.with_columns(differ=pl.col("labels").n_unique().over("key") > 1)
    in_split = rows.group_by("key", "split", maintain_order=True).agg(
        clips=pl.len(),
        first=pl.col("clip_id").first(),
        second=pl.col("clip_id").get(1, null_on_oob=True),
        differ=pl.col("differ").first(),
    )
    within = in_split.filter(pl.col("clips") > 1).select(
        "split", "clips", "differ", first="first", other="second", split_right="split", clips_right="clips"
    )
    across = in_split.join(in_split, on="key", maintain_order="left").filter(
        pl.col("split") < pl.col("split_right")
    )
    pairs = pl.concat([within, across.select(*within.columns[:4], *_OTHER_SPLIT_COLUMNS)], how="diagonal")
    told = pairs.group_by("split", "split_right", maintain_order=True).agg(
        pl.len().alias("groups"),
        pl.col("clips", "clips_right", "differ").sum(),
        pl.col("first", "other").head(COPY_EXAMPLES_KEPT),
    )
    for pair in told.rows(named=True):
        names = splits[pair["split"]], splits[pair["split_right"]]
        yield ClipCopies(
            kind=kind,
            splits=names,
            leak=(names[0] in held_out_names) != (names[1] in held_out_names),
            groups=pair["groups"],
            clips=(pair["clips"], pair["clips_right"]),
            labels_differ=pair["differ"],
            examples=tuple(zip(pair["first"], pair["other"], strict=True)),
        )


_OTHER_SPLIT_COLUMNS = (pl.col("first_right").alias("other"), "split_right", "clips_right")


def find_leaking_clips(
    clips: pl.DataFrame, splits: Sequence[str], held_out_names: Sequence[str]
) -> pl.DataFrame:
    """The clips to train on that share something with one held out: `row`, `kind`, and of the first such clip
    `other` (its id) and `other_split`; a clip once, with the kind that weighs most.

    `clips` as in `copies`.
    """
    is_measured = pl.col("split").is_in(
        [place for place, name in enumerate(splits) if name in held_out_names]
    )
    names = pl.DataFrame(
        {"split": range(len(splits)), "other_split": splits}, schema_overrides={"split": pl.Int64}
    )
    found = []
    for kind in ("id", "audio", "recording"):
        rows = _clips_sharing_key(clips, kind).sort("row")
        kept = rows.filter(is_measured).unique("key", keep="first", maintain_order=True)
        other = kept.join(names, on="split").select("key", "other_split", other="clip_id")
        told = rows.filter(~is_measured).join(other, on="key", how="inner")
        found.append(told.select("row", "other", "other_split", kind=pl.lit(kind)))
    return pl.concat(found).unique("row", keep="first", maintain_order=True).sort("row")
