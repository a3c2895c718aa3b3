"""Mixing: how well a block shuffle mixes, in figures, beside a full shuffle of the same rows."""

from dataclasses import dataclass

import numpy as np

from pipeline.sampling import BlockShuffle

BATCHES = 256  # looked at, evenly over an epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """What batches of `clips` hold of how many blocks.

    Clips of one block may be alike: of one folder, one recorder, one day. Where the gradients of two such clips
    correlate by r, those of a batch vary (clips - 1) * pairs * r more than independent ones (Kish's design effect);
    `worth` is what is left of the batch if r is 1, so a bound on the harm.
    """

    clips: int
    block_clips: int  # of the largest block
    window_blocks: int
    window_bytes: int  # that are read over and over while the window lasts, so should stay in memory
    blocks: float  # distinct ones in a batch
    pairs: float  # share of a batch's pairs of clips that come from one block
    full_blocks: float  # the same of a full shuffle
    full_pairs: float

    @property
    def worth(self) -> float:
        """Clips of unlike blocks that a batch is worth at least."""
        return self.clips / (1 + (self.clips - 1) * self.pairs)

    @property
    def full_worth(self) -> float:
        return self.clips / (1 + (self.clips - 1) * self.full_pairs)

    def __str__(self) -> str:
        return (
            f"block shuffle: {self.window_blocks} blocks of up to {self.block_clips} clips at a time, "
            f"{self.window_bytes / 1e6:,.0f} MB to keep in memory; a batch of {self.clips} draws on "
            f"{self.blocks:.1f} blocks (full shuffle: {self.full_blocks:.1f}), {self.pairs:.2%} of its pairs share "
            f"one ({self.full_pairs:.2%}): worth at least {self.worth:.0f} unlike clips ({self.full_worth:.0f})"
        )


def mixing_of(sampling: BlockShuffle, clips: int, seed: int, *, clip_bytes: int) -> Mixing:
    """Of batches of `clips` (of all ranks) from epoch 0: exact for those looked at, and for the full shuffle."""
    numbers_N = sampling.numbers_N
    rows = len(numbers_N)
    places_N = sampling.places(rows, seed, 0)
    steps = rows // clips
    looked_at = np.unique(np.linspace(0, steps - 1, min(steps, BATCHES)).astype(int))
    counts = [
        np.unique(numbers_N[places_N[s * clips : (s + 1) * clips]], return_counts=True)[1] for s in looked_at
    ]
    sizes_N = np.bincount(numbers_N)
    window_blocks = min(sampling.window_blocks, len(sizes_N))
    return Mixing(
        clips=clips,
        block_clips=int(sizes_N.max()),
        window_blocks=window_blocks,
        window_bytes=window_blocks * int(sizes_N.max()) * clip_bytes,
        blocks=float(np.mean([len(count_N) for count_N in counts])),
        pairs=float(np.mean([_pairs(count_N) for count_N in counts])),
        full_blocks=_full_blocks(sizes_N, clips),
        full_pairs=_pairs(sizes_N),
    )


def _pairs(count_N: np.ndarray) -> float:
    """Share of the pairs of clips that are of one block, of so many from each block."""
    clips = int(count_N.sum())
    return float((count_N * (count_N - 1)).sum() / max(clips * (clips - 1), 1))


def _full_blocks(sizes_N: np.ndarray, clips: int) -> float:
    """Expected distinct blocks of `clips` rows that are drawn without replacement from all."""
    sizes, times = np.unique(sizes_N, return_counts=True)
    left_N = sizes_N.sum() - np.arange(clips)  # rows left before each draw
    missed = [np.prod(np.maximum(left_N - size, 0) / left_N) for size in sizes]
    return float(((1 - np.array(missed)) * times).sum())
