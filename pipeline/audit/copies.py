"""Clips that share their id, their recording or their exact audio, within a split and across splits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

COPY_EXAMPLES_KEPT = 5

# Each kind of copy, and the column that has the same value for all copies.
COPY_KIND_COLUMNS = {"audio": "audio", "id": "clip_id", "recording": "recording"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipCopies:
    """Clips that share an id, a recording or their audio, within one split (named twice) or across two."""

    kind: str  # a key of COPY_KIND_COLUMNS
    splits: tuple[str, str]
    leak: bool  # exactly one of the two splits is held out
    groups: int  # number of shared ids, recordings or sounds
    clips: tuple[int, int]  # number of clips in each split; within one split both numbers are the same
    labels_differ: int  # number of groups whose raw labels are not all the same
    examples: tuple[tuple[str, str], ...]  # ids of two clips of a group, one from each split


def clip_recordings(manifest: pl.DataFrame, dataset: str | None) -> pl.Series:
    """Return the recording that each clip was cut from: AudioSet's video, which the id names, else the sound's file.

    If no file was found, it is the id without the position of the piece in a long sound.
    """
    if dataset == "audioset":
        return manifest["clip_id"].alias("recording")
    whole_id = pl.col("clip_id").str.replace(r"@\d+$", "")
    return manifest.select(recording=pl.coalesce("source", whole_id)).to_series()


def find_copies(
    clips: pl.DataFrame, splits: Sequence[str], held_out_names: Sequence[str]
) -> tuple[ClipCopies, ...]:
    """Return all copies among clips, leaks first, then by kind and by the number of groups.

    `clips` are the clips in use, with the columns row, split (index into `splits`), clip_id, recording, audio (null:
    not compared) and raw. Pieces of one recording in one split are normal, and are not reported.
    """
    # Find every kind of copies in every pair of splits.
    copies = [
        copy
        for kind in COPY_KIND_COLUMNS
        for copy in _copies_by_split(_clips_sharing_key(clips, kind), kind, splits, held_out_names)
        if kind != "recording" or copy.splits[0] != copy.splits[1]
    ]

    # Leaks first, then copies across two splits, then copies within one.
    kinds = list(COPY_KIND_COLUMNS)
    return tuple(
        sorted(
            copies,
            key=lambda copy: (
                not copy.leak,
                copy.splits[0] == copy.splits[1],
                kinds.index(copy.kind),
                -copy.groups,
                copy.splits,
            ),
        )
    )


def find_leaking_clips(
    clips: pl.DataFrame, splits: Sequence[str], held_out_names: Sequence[str]
) -> pl.DataFrame:
    """Return the training clips that share their id, audio or recording with a held-out clip, each once.

    Columns: `row`; `kind`, the first of these three that applies; `other` and `other_split`, the id and the split of
    the first such held-out clip. `clips` are those of `find_copies`.
    """
    held_out_indices = [index for index, name in enumerate(splits) if name in held_out_names]
    is_held_out = pl.col("split").is_in(held_out_indices)
    split_names = pl.DataFrame(
        {"split": range(len(splits)), "other_split": splits}, schema_overrides={"split": pl.Int64}
    )
    leaks = []
    for kind in ("id", "audio", "recording"):
        sharing = _clips_sharing_key(clips, kind).sort("row")

        # The first held-out clip of every key, then the clips to train on that have its key.
        firsts = sharing.filter(is_held_out).unique("key", keep="first", maintain_order=True)
        firsts = firsts.join(split_names, on="split").select("key", "other_split", other="clip_id")
        trained = sharing.filter(~is_held_out).join(firsts, on="key", how="inner")
        leaks.append(trained.select("row", "other", "other_split", kind=pl.lit(kind)))
    return pl.concat(leaks).unique("row", keep="first", maintain_order=True).sort("row")


def _clips_sharing_key(clips: pl.DataFrame, kind: str) -> pl.DataFrame:
    """Return the clips whose `key`, the value in the column of `kind`, other clips have too.

    There are none for recordings if these are the ids, because the kind `id` reports them all.
    """
    key = clips[COPY_KIND_COLUMNS[kind]]
    if kind == "recording" and key.equals(clips["clip_id"], check_names=False):
        return clips.clear().with_columns(key=key.clear())

    # Two million texts are compared by their hashes first, which is five times as fast.
    hash_N = key.hash().to_numpy()
    sorted_N = np.sort(hash_N)
    repeated = np.unique(sorted_N[1:][sorted_N[1:] == sorted_N[:-1]])
    if len(repeated):
        place_N = np.minimum(np.searchsorted(repeated, hash_N), len(repeated) - 1)
        may_share = pl.Series(repeated[place_N] == hash_N)
    else:
        may_share = pl.repeat(False, clips.height, eager=True)

    # Different texts may have one hash, so compare the few remaining texts themselves.
    candidates = clips.with_columns(key=key).filter(may_share & key.is_not_null())
    return candidates.filter(pl.col("key").is_duplicated())


def _copies_by_split(
    clips: pl.DataFrame, kind: str, splits: Sequence[str], held_out_names: Sequence[str]
) -> Iterator[ClipCopies]:
    """Yield the copies of one kind for every pair of splits that has any; `clips` have a shared `key`."""
    # Mark every clip whose group has different labels.
    labels = pl.col("raw").cast(pl.List(pl.String)).list.join(" ")
    clips = clips.select("row", "split", "clip_id", "key", labels=labels).sort("row")
    clips = clips.with_columns(differ=pl.col("labels").n_unique().over("key") > 1)

    # A row for each key and split.
    in_split = clips.group_by("key", "split", maintain_order=True).agg(
        clips=pl.len(),
        first=pl.col("clip_id").first(),
        second=pl.col("clip_id").get(1, null_on_oob=True),
        differ=pl.col("differ").first(),
    )

    # A row for each group: two clips in one split, or the same key in two splits.
    within = in_split.filter(pl.col("clips") > 1).select(
        "split", "clips", "differ", first="first", other="second", split_right="split", clips_right="clips"
    )
    across = in_split.join(in_split, on="key", maintain_order="left")
    across = across.filter(pl.col("split") < pl.col("split_right")).select(
        "split", "clips", "differ", "first", "split_right", "clips_right", other="first_right"
    )
    groups = pl.concat([within, across], how="diagonal")

    # A row for each pair of splits.
    pairs = groups.group_by("split", "split_right", maintain_order=True).agg(
        pl.len().alias("groups"),
        pl.col("clips", "clips_right", "differ").sum(),
        pl.col("first", "other").head(COPY_EXAMPLES_KEPT),
    )
    for pair in pairs.rows(named=True):
        one, other = splits[pair["split"]], splits[pair["split_right"]]
        yield ClipCopies(
            kind=kind,
            splits=(one, other),
            leak=(one in held_out_names) != (other in held_out_names),
            groups=pair["groups"],
            clips=(pair["clips"], pair["clips_right"]),
            labels_differ=pair["differ"],
            examples=tuple(zip(pair["first"], pair["other"], strict=True)),
        )
