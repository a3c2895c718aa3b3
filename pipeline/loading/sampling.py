"""Sampling: which clips an epoch takes, and in what order; a pure function of seed and epoch.

All that is random comes from the raw stream of a NumPy bit generator, which never changes (NEP 19 guarantees it, and
does not for the methods of `Generator`), and is worked on with whole numbers, or with arithmetic of which IEEE 754
fixes the last bit: a run can be resumed under another NumPy, and ranks on unlike CPUs agree.

Order: which rows in which order, a pure function of seed, step, rank and world.

Mixing: how well a block shuffle mixes, in figures, beside a full shuffle of the same rows.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from pipeline.errors import InputError

# What is drawn, after seed and epoch in a stream's name. None is 0: NumPy takes [1, 2] and [1, 2, 0] for one name.
(
    BLOCK_ORDER_STREAM,
    ROW_SPREAD_STREAM,
    WEIGHTED_DRAW_STREAM,
    EXPONENTIAL_CLOCK_STREAM,
    CHOSEN_SHUFFLE_STREAM,
) = range(1, 6)

WINDOW_BLOCKS = 64


class Sampling(Hashable, Protocol):
    """Which of some rows an epoch takes, and in what order; a frozen value, for its epochs are cached."""

    def epoch_length(self, row_count: int) -> int:
        """Clips of an epoch over so many rows; ValueError where the sampling is one of another number."""

    def epoch_indices(self, row_count: int, seed: int, epoch: int) -> np.ndarray:
        """The places among the rows, int64, in the order of the epoch."""


@dataclass(frozen=True, slots=True)
class FullShuffle:
    """Every row once an epoch, all orders equally likely: 0.1 s and 16 MB for the 2,084,320 clips of AudioSet."""

    def epoch_length(self, row_count: int) -> int:
        return row_count

    def epoch_indices(self, row_count: int, seed: int, epoch: int) -> np.ndarray:
        return random_permutation(row_count, seed, epoch)


FULL_SHUFFLE = FullShuffle()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockShuffle:
    """Every row once an epoch, and at any time from few blocks of the disk: for stores much larger than memory.

    The blocks begin one after the other, in random order, and each spreads its rows at random over the time in
    which `window_blocks` of them begin. So rows always come from that many blocks, each as likely as its size, and
    as one begins another ends: no moment at which many must be fetched at once, but for the start of an epoch.
    The last to begin end where the epoch starts. With a window as long as the epoch this is a full shuffle.
    """

    blocks_N: np.ndarray  # of each row its block's number (shard, `row // 256`); a block's rows lie together
    window_blocks: int = WINDOW_BLOCKS

    def __post_init__(self) -> None:
        if self.window_blocks < 1:
            raise ValueError(f"window_blocks must be 1 or more, got {self.window_blocks}")

    @property
    def block_index_N(self) -> np.ndarray:
        """Of each row its block, counted from 0 in the order of the rows."""
        return np.cumsum(np.diff(self.blocks_N, prepend=self.blocks_N[:1]) != 0)

    def epoch_length(self, row_count: int) -> int:
        _refuse_other_row_count(row_count, len(self.blocks_N))
        return row_count

    def epoch_indices(self, row_count: int, seed: int, epoch: int) -> np.ndarray:
        numbers_N = self.block_index_N
        blocks = int(numbers_N[-1]) + 1
        begins_N = np.empty(blocks, np.uint64)  # in blocks since the epoch's start
        begins_N[random_permutation(blocks, seed, epoch, BLOCK_ORDER_STREAM)] = np.arange(
            blocks, dtype=np.uint64
        )
        low_bits = index_bits(row_count)
        fraction_bits = 64 - low_bits - (blocks - 1).bit_length()
        waits_N = _random_words(row_count, seed, epoch, ROW_SPREAD_STREAM) >> np.uint64(64 - fraction_bits)
        waits_N *= np.uint64(min(self.window_blocks, blocks))
        times_N = (begins_N << np.uint64(fraction_bits))[numbers_N] + waits_N
        times_N %= np.uint64(blocks << fraction_bits)
        return argsort_packed(times_N << np.uint64(low_bits))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WeightedSampling:
    """Rows drawn in proportion to their weights, so many an epoch; a row that weighs 0 never comes.

    With replacement, every draw is for itself. Without, no row comes twice an epoch: they are chosen as if one by
    one, each in proportion to its weight among those left (Efraimidis and Spirakis 2006, Information Processing
    Letters 97), then shuffled, for the first chosen are heavier than the last.
    Raises InputError where no row weighs anything, or fewer do than an epoch takes without replacement.
    """

    weights_N: np.ndarray  # one of each row of the order, in any unit
    clips_per_epoch: int
    replacement: bool = True

    def __post_init__(self) -> None:
        if (
            self.clips_per_epoch < 1
            or not (self.weights_N >= 0).all()
            or not np.isfinite(self.weights_N.sum())
        ):
            raise ValueError(f"weights must be 0 or more, and an epoch 1 or more, got {self.clips_per_epoch}")
        heavy = np.count_nonzero(self.weights_N)
        if not heavy:
            raise InputError(f"none of {len(self.weights_N)} clips weighs more than 0, so none can be drawn")
        if not self.replacement and heavy < self.clips_per_epoch:
            raise InputError(
                f"{self.clips_per_epoch} clips an epoch without replacement, but only {heavy} of "
                f"{len(self.weights_N)} weigh more than 0; take fewer an epoch, or draw with replacement"
            )

    def epoch_length(self, row_count: int) -> int:
        _refuse_other_row_count(row_count, len(self.weights_N))
        return self.clips_per_epoch

    def epoch_indices(self, row_count: int, seed: int, epoch: int) -> np.ndarray:
        weights_N = np.asarray(self.weights_N, np.float64)
        if self.replacement:
            return draw_with_replacement(weights_N, self.clips_per_epoch, seed, epoch)
        chosen_N = draw_without_replacement(weights_N, self.clips_per_epoch, seed, epoch)
        return chosen_N[random_permutation(len(chosen_N), seed, epoch, CHOSEN_SHUFFLE_STREAM)]


def random_permutation(count: int, *stream: int) -> np.ndarray:
    """A permutation of 0..count-1."""
    return argsort_packed(_random_words(count, *stream))


def argsort_packed(keys_N: np.ndarray) -> np.ndarray:
    """The places of the keys, that of the smallest first; their lowest `place_bits` do not count.

    Sorts (key, place) pairs packed into one word, three times as fast as argsort, and without ties.
    """
    bits = np.uint64(index_bits(len(keys_N)))
    keys_N = keys_N >> bits << bits
    keys_N |= np.arange(len(keys_N), dtype=np.uint64)
    keys_N.sort()
    return (keys_N & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


def draw_with_replacement(weights_N: np.ndarray, clips: int, seed: int, epoch: int) -> np.ndarray:
    """Places drawn with replacement: those of uniform draws among the cumulative weights.

    The draws are sorted first: looked up as they come, 2 M of them among 2 M weights take 3 s.
    """
    bits = index_bits(clips)
    draws_N = _random_words(clips, seed, epoch, WEIGHTED_DRAW_STREAM) >> np.uint64(bits)
    order_N = argsort_packed(draws_N << np.uint64(bits))
    ends_N = np.cumsum(weights_N)  # one by one, and so to the last bit the same anywhere; np.sum is not
    levels_N = (ends_N / ends_N[-1] * 2.0 ** (64 - bits)).astype(np.uint64)
    times_N = np.diff(np.searchsorted(draws_N[order_N], levels_N), prepend=0)  # that each row is drawn
    places_N = np.empty(clips, np.int64)
    places_N[order_N] = np.repeat(np.arange(len(weights_N)), times_N)
    return places_N


def draw_without_replacement(weights_N: np.ndarray, clips: int, seed: int, epoch: int) -> np.ndarray:
    """Places chosen without replacement, ascending: the first of exponential clocks that run at the weights' rates."""
    heavy_N = np.flatnonzero(weights_N)
    uniform_N = (
        (_random_words(len(weights_N), seed, epoch, EXPONENTIAL_CLOCK_STREAM)[heavy_N] >> np.uint64(12)) + 0.5
    ) * 2.0**-52  # in (0, 1)
    with np.errstate(over="ignore"):  # the lightest of all may finish at infinity
        finish_N = -natural_log(uniform_N) / weights_N[heavy_N]
    last = np.partition(finish_N, clips - 1)[clips - 1]
    ahead_N, level_N = np.flatnonzero(finish_N < last), np.flatnonzero(finish_N == last)
    return heavy_N[np.sort(np.concatenate([ahead_N, level_N[: clips - len(ahead_N)]]))]


def natural_log(values_N: np.ndarray) -> np.ndarray:
    """To 1e-15 of itself, and everywhere the same: np.log may round otherwise on the next rank's CPU."""
    mantissa_N, exponent_N = np.frexp(values_N)
    low_N = mantissa_N < math.sqrt(0.5)
    mantissa_N, exponent_N = np.where(low_N, 2 * mantissa_N, mantissa_N), exponent_N - low_N
    ratio_N = (mantissa_N - 1) / (mantissa_N + 1)
    square_N, series_N = ratio_N * ratio_N, np.zeros_like(ratio_N)
    for odd in range(23, 0, -2):  # 2 artanh; its next term is under 1e-20
        series_N = series_N * square_N + 1 / odd
    return 2 * ratio_N * series_N + exponent_N * math.log(2)


def index_bits(count: int) -> int:
    """Bits that hold any place of 0..count-1."""
    return max(1, (count - 1).bit_length())


def _random_words(count: int, *stream: int) -> np.ndarray:
    """Random 64-bit words of the stream of that name."""
    return np.random.PCG64(list(stream)).random_raw(count)


def _refuse_other_row_count(row_count: int, expected_count: int) -> None:
    if row_count != expected_count:
        raise ValueError(f"the sampling is one of {expected_count} rows, the order has {row_count}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowOrder:
    """Epochs of `rows_N` as `sampling` takes them, dealt to `world` ranks, `clips` rows to each a step.

    One step of all ranks takes `clips * world` places of the epoch, whoever they are dealt to: worlds with equal
    products see the same rows at the same step. What does not fill a last step is dropped, other rows each epoch.
    Raises InputError where an epoch does not fill a single step.
    """

    rows_N: np.ndarray
    clips: int
    seed: int
    rank: int = 0
    world: int = 1
    sampling: Sampling = FULL_SHUFFLE

    def __post_init__(self) -> None:
        if self.clips < 1 or not 0 <= self.rank < self.world:
            raise ValueError(
                f"clips must be 1 or more and rank in [0, {self.world}), got {self.clips}, {self.rank}"
            )
        if not self.steps_per_epoch:
            raise InputError(
                f"{self.clips_per_epoch} clips do not fill one step of {self.clips} clips"
                f"{f' on each of {self.world} ranks' if self.world > 1 else ''}; "
                "choose fewer clips per step (--batch), or more splits"
            )

    @property
    def clips_per_step(self) -> int:
        return self.clips * self.world

    @property
    def clips_per_epoch(self) -> int:
        return self.sampling.epoch_length(len(self.rows_N))

    @property
    def steps_per_epoch(self) -> int:
        return self.clips_per_epoch // self.clips_per_step

    def rows_at_step(self, step: int) -> np.ndarray:
        """The rows of this rank at a step counted from the start of training, int64 `rows_B`."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        first = step_of_epoch * self.clips_per_step + self.rank * self.clips
        places_N = _cached_epoch_indices(self.sampling, len(self.rows_N), self.seed, epoch)
        return np.asarray(self.rows_N, np.int64)[places_N[first : first + self.clips]]


# Four: training and validation, each with the epoch that the prefetch has begun; 16 MB at 2 M rows
@lru_cache(maxsize=4)
def _cached_epoch_indices(sampling: Sampling, row_count: int, seed: int, epoch: int) -> np.ndarray:
    places_N = sampling.epoch_indices(row_count, seed, epoch)
    places_N.flags.writeable = False  # the cache hands out the same array again
    return places_N


MEASURED_BATCHES = 256  # looked at, evenly over an epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class MixingQuality:
    """What batches of `clips` hold of how many blocks.

    Clips of one block may be alike: of one folder, one recorder, one day. Where the gradients of two such clips
    correlate by r, those of a batch vary (clips - 1) * pairs * r more than independent ones (Kish's design effect);
    `worth` is what is left of the batch if r is 1, so a bound on the harm.
    """

    batch_clips: int
    block_clips: int  # of the largest block
    window_blocks: int
    window_bytes: int  # that are read over and over while the window lasts, so should stay in memory
    blocks_per_batch: float  # distinct ones in a batch
    same_block_pairs: float  # share of a batch's pairs of clips that come from one block
    full_blocks_per_batch: float  # the same of a full shuffle
    full_same_block_pairs: float

    @property
    def effective_clips(self) -> float:
        """Clips of unlike blocks that a batch is worth at least."""
        return self.batch_clips / (1 + (self.batch_clips - 1) * self.same_block_pairs)

    @property
    def full_effective_clips(self) -> float:
        return self.batch_clips / (1 + (self.batch_clips - 1) * self.full_same_block_pairs)

    def __str__(self) -> str:
        return (
            f"block shuffle: {self.window_blocks} blocks of up to {self.block_clips} clips at a time, "
            f"{self.window_bytes / 1e6:,.0f} MB to keep in memory; a batch of {self.batch_clips} draws on "
            f"{self.blocks_per_batch:.1f} blocks (full shuffle: {self.full_blocks_per_batch:.1f}), {self.same_block_pairs:.2%} of its pairs share "
            f"one ({self.full_same_block_pairs:.2%}): worth at least {self.effective_clips:.0f} unlike clips ({self.full_effective_clips:.0f})"
        )


def measure_mixing(sampling: BlockShuffle, batch_clips: int, seed: int, *, clip_bytes: int) -> MixingQuality:
    """Of batches of `clips` (of all ranks) from epoch 0: exact for those looked at, and for the full shuffle."""
    numbers_N = sampling.block_index_N
    rows = len(numbers_N)
    places_N = sampling.epoch_indices(rows, seed, 0)
    steps = rows // batch_clips
    looked_at = np.unique(np.linspace(0, steps - 1, min(steps, MEASURED_BATCHES)).astype(int))
    counts = [
        np.unique(numbers_N[places_N[s * batch_clips : (s + 1) * batch_clips]], return_counts=True)[1]
        for s in looked_at
    ]
    sizes_N = np.bincount(numbers_N)
    window_blocks = min(sampling.window_blocks, len(sizes_N))
    return MixingQuality(
        batch_clips=batch_clips,
        block_clips=int(sizes_N.max()),
        window_blocks=window_blocks,
        window_bytes=window_blocks * int(sizes_N.max()) * clip_bytes,
        blocks_per_batch=float(np.mean([len(count_N) for count_N in counts])),
        same_block_pairs=float(np.mean([_same_block_share(count_N) for count_N in counts])),
        full_blocks_per_batch=_expected_distinct_blocks(sizes_N, batch_clips),
        full_same_block_pairs=_same_block_share(sizes_N),
    )


def _same_block_share(count_N: np.ndarray) -> float:
    """Share of the pairs of clips that are of one block, of so many from each block."""
    clips = int(count_N.sum())
    return float((count_N * (count_N - 1)).sum() / max(clips * (clips - 1), 1))


def _expected_distinct_blocks(sizes_N: np.ndarray, clips: int) -> float:
    """Expected distinct blocks of `clips` rows that are drawn without replacement from all."""
    sizes, times = np.unique(sizes_N, return_counts=True)
    left_N = sizes_N.sum() - np.arange(clips)  # rows left before each draw
    missed = [np.prod(np.maximum(left_N - size, 0) / left_N) for size in sizes]
    return float(((1 - np.array(missed)) * times).sum())
