"""Sampling: the rows of each epoch and their order, their division into steps and ranks, and how well they mix.

A row is a clip's row in the store; an index is the place of a row in `RowOrder.rows_N`. The order of an epoch depends
only on the seed and the epoch number; the rows of a step also depend on rank and world. All randomness comes from the
raw stream of a NumPy bit generator, which never changes (NEP 19 guarantees this for the raw stream, but not for the
methods of `Generator`). The draws are processed as whole numbers, or with arithmetic whose last bit IEEE 754 fixes.
Therefore a run can be resumed under another NumPy version, and ranks on different CPUs agree.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from pipeline.errors import InputError

# The last number of a stream's name, after seed and epoch. It is never 0: NumPy takes [1, 2] and [1, 2, 0] as equal.
(
    BLOCK_ORDER_STREAM,
    ROW_SPREAD_STREAM,
    WEIGHTED_DRAW_STREAM,
    EXPONENTIAL_CLOCK_STREAM,
    CHOSEN_SHUFFLE_STREAM,
) = range(1, 6)

WINDOW_BLOCKS = 64

MEASURED_BATCHES = 256  # batches that `measure_mixing` counts, spread evenly over an epoch


class Sampling(Hashable, Protocol):
    """A way to choose and order the rows of an epoch; a frozen value, because its epochs are cached."""

    def epoch_length(self, row_count: int) -> int:
        """Return how many rows an epoch over `row_count` rows takes; ValueError if made for another number of rows."""

    def epoch_indices(self, row_count: int, seed: int, epoch: int) -> np.ndarray:
        """Return the int64 indices of the epoch's rows among all `row_count` rows, in the order of the epoch."""


@dataclass(frozen=True, slots=True)
class FullShuffle:
    """Takes every row once an epoch, all orders equally likely: 0.1 s and 16 MB for the 2,084,320 rows of AudioSet."""

    def epoch_length(self, row_count: int) -> int:
        return row_count

    def epoch_indices(self, row_count: int, seed: int, epoch: int) -> np.ndarray:
        return random_permutation(row_count, seed, epoch)


FULL_SHUFFLE = FullShuffle()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockShuffle:
    """Takes every row once an epoch, at any time from few blocks of the disk: for stores much larger than memory.

    The blocks begin one after the other in random order. Each block spreads its rows at random over the time in which
    `window_blocks` blocks begin. So the rows always come from `window_blocks` blocks, each with a probability that is
    proportional to its size. Whenever one block begins, another ends. Many blocks must be fetched at once only at the
    start of an epoch, because the rows of the last blocks continue there. With a window as long as the epoch, this is a
    full shuffle.
    """

    blocks_N: np.ndarray  # block of each row, e.g. the number of its shard; rows of a block are adjacent
    window_blocks: int = WINDOW_BLOCKS

    def __post_init__(self) -> None:
        if self.window_blocks < 1:
            raise ValueError(f"window_blocks must be 1 or more, got {self.window_blocks}")

    @property
    def block_index_N(self) -> np.ndarray:
        """Block of each row; blocks are numbered from 0 in the order of the rows."""
        return np.cumsum(np.diff(self.blocks_N, prepend=self.blocks_N[:1]) != 0)

    def epoch_length(self, row_count: int) -> int:
        _refuse_other_row_count(row_count, len(self.blocks_N))
        return row_count

    def epoch_indices(self, row_count: int, seed: int, epoch: int) -> np.ndarray:
        # The time at which each block begins, in blocks since the start of the epoch.
        block_of_row_N = self.block_index_N
        blocks = int(block_of_row_N[-1]) + 1
        order_N = random_permutation(blocks, seed, epoch, BLOCK_ORDER_STREAM)
        begins_N = np.empty(blocks, np.uint64)
        begins_N[order_N] = np.arange(blocks, dtype=np.uint64)

        # The time of each row, a fixed-point number in the upper bits of a word: the beginning of its block plus a
        # random wait within the window, modulo the epoch.
        low_bits = index_bits(row_count)
        fraction_bits = 64 - low_bits - (blocks - 1).bit_length()
        waits_N = _random_words(row_count, seed, epoch, ROW_SPREAD_STREAM) >> np.uint64(64 - fraction_bits)
        waits_N *= np.uint64(min(self.window_blocks, blocks))
        times_N = (begins_N << np.uint64(fraction_bits))[block_of_row_N] + waits_N
        times_N %= np.uint64(blocks << fraction_bits)
        return argsort_packed(times_N << np.uint64(low_bits))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WeightedSampling:
    """Draws `clips_per_epoch` rows in proportion to their weights; a row of weight 0 is never drawn.

    With replacement, draws are independent. Without replacement, an epoch takes each row at most once. The rows are
    chosen as if one by one, in proportion to their weights among the rows that are left (Efraimidis and Spirakis 2006,
    Information Processing Letters 97). They are then shuffled, because the first chosen rows are heavier than the last.

    Raises InputError if no row has a weight above 0, or if an epoch without replacement needs more rows than have one.
    """

    weights_N: np.ndarray  # weight of each row of the `RowOrder`, in any unit
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

        # The chosen indices are ascending, so they are shuffled.
        chosen_N = draw_without_replacement(weights_N, self.clips_per_epoch, seed, epoch)
        return chosen_N[random_permutation(len(chosen_N), seed, epoch, CHOSEN_SHUFFLE_STREAM)]


def random_permutation(count: int, *stream: int) -> np.ndarray:
    """Return a random permutation of 0..count-1, drawn from the stream with this name."""
    return argsort_packed(_random_words(count, *stream))


def argsort_packed(keys_N: np.ndarray) -> np.ndarray:
    """Return the indices that sort the keys in ascending order; ignores the lowest `index_bits` bits of each key.

    Sorts (key, index) pairs that are packed into one word: three times as fast as argsort, and without ties.
    """
    bits = np.uint64(index_bits(len(keys_N)))
    keys_N = keys_N >> bits << bits
    keys_N |= np.arange(len(keys_N), dtype=np.uint64)
    keys_N.sort()
    return (keys_N & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


def draw_with_replacement(weights_N: np.ndarray, clips: int, seed: int, epoch: int) -> np.ndarray:
    """Return indices drawn with replacement: uniform numbers are looked up among the cumulative weights.

    The uniform numbers are sorted first: looking up 2 M unsorted numbers among 2 M weights takes 3 s.
    """
    bits = index_bits(clips)
    draws_N = _random_words(clips, seed, epoch, WEIGHTED_DRAW_STREAM) >> np.uint64(bits)
    order_N = argsort_packed(draws_N << np.uint64(bits))

    # cumsum adds the numbers one by one, so its last bit is the same on every machine; np.sum does not.
    cumulative_N = np.cumsum(weights_N)
    levels_N = (cumulative_N / cumulative_N[-1] * 2.0 ** (64 - bits)).astype(np.uint64)

    # How often each row is drawn, then the indices in the order of the draws.
    draw_count_N = np.diff(np.searchsorted(draws_N[order_N], levels_N), prepend=0)
    indices_N = np.empty(clips, np.int64)
    indices_N[order_N] = np.repeat(np.arange(len(weights_N)), draw_count_N)
    return indices_N


def draw_without_replacement(weights_N: np.ndarray, clips: int, seed: int, epoch: int) -> np.ndarray:
    """Return indices chosen without replacement, ascending.

    Each row gets an exponential random time whose rate is its weight; the rows with the smallest times are chosen.
    """
    # The time of each row; the uniform numbers are in (0, 1), and the time of a very small weight may be infinite.
    heavy_N = np.flatnonzero(weights_N)
    words_N = _random_words(len(weights_N), seed, epoch, EXPONENTIAL_CLOCK_STREAM)[heavy_N]
    uniform_N = ((words_N >> np.uint64(12)) + 0.5) * 2.0**-52
    with np.errstate(over="ignore"):
        ends_N = -natural_log(uniform_N) / weights_N[heavy_N]

    # The `clips` smallest times; of rows that share the largest chosen time, the first in the order of the rows.
    last_end = np.partition(ends_N, clips - 1)[clips - 1]
    before_N = np.flatnonzero(ends_N < last_end)
    tied_N = np.flatnonzero(ends_N == last_end)
    return heavy_N[np.sort(np.concatenate([before_N, tied_N[: clips - len(before_N)]]))]


def natural_log(values_N: np.ndarray) -> np.ndarray:
    """Return the natural logarithm to a relative 1e-15, equal on all machines; np.log may depend on the CPU."""
    # Move the mantissa to [sqrt(1/2), sqrt(2)), so that the series converges fast.
    mantissa_N, exponent_N = np.frexp(values_N)
    is_low_N = mantissa_N < math.sqrt(0.5)
    mantissa_N = np.where(is_low_N, 2 * mantissa_N, mantissa_N)
    exponent_N = exponent_N - is_low_N

    # log(mantissa) = 2 artanh(ratio); the first omitted term of the series is under 1e-20.
    ratio_N = (mantissa_N - 1) / (mantissa_N + 1)
    square_N = ratio_N * ratio_N
    series_N = np.zeros_like(ratio_N)
    for odd in range(23, 0, -2):
        series_N = series_N * square_N + 1 / odd
    return 2 * ratio_N * series_N + exponent_N * math.log(2)


def index_bits(count: int) -> int:
    """Return the number of bits that can hold any index in 0..count-1."""
    return max(1, (count - 1).bit_length())


def _random_words(count: int, *stream: int) -> np.ndarray:
    """Return `count` random 64-bit words of the stream with this name."""
    return np.random.PCG64(list(stream)).random_raw(count)


def _refuse_other_row_count(row_count: int, expected_count: int) -> None:
    if row_count != expected_count:
        raise ValueError(f"the sampling is one of {expected_count} rows, the order has {row_count}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowOrder:
    """The rows of every step: `sampling` orders `rows_N` in each epoch, and each of `world` ranks takes `clips` rows.

    One step on all ranks takes the next `clips * world` rows of the epoch. Two runs with an equal product take the same
    rows at the same step, however many ranks they have. The rows left at the end of an epoch that do not fill a step
    are dropped; these are different rows in each epoch.

    Raises InputError if an epoch does not fill a single step.
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
            on_ranks = f" on each of {self.world} ranks" if self.world > 1 else ""
            raise InputError(
                f"{self.clips_per_epoch} clips do not fill one step of {self.clips} clips{on_ranks}; "
                "choose fewer clips per step (--batch), or more splits"
            )

    @property
    def clips_per_step(self) -> int:
        """Number of rows that a step takes on all ranks together."""
        return self.clips * self.world

    @property
    def clips_per_epoch(self) -> int:
        return self.sampling.epoch_length(len(self.rows_N))

    @property
    def steps_per_epoch(self) -> int:
        return self.clips_per_epoch // self.clips_per_step

    def rows_at_step(self, step: int) -> np.ndarray:
        """Return the rows of this rank at `step`, counted from the start of training, as int64 `rows_B`."""
        # Ranks take consecutive parts of the step's rows.
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        first = step_of_epoch * self.clips_per_step + self.rank * self.clips
        indices_N = _cached_epoch_indices(self.sampling, len(self.rows_N), self.seed, epoch)
        return np.asarray(self.rows_N, np.int64)[indices_N[first : first + self.clips]]


# Four epochs are cached, 16 MB each at 2 M rows: for training and for validation, the current epoch and the next one,
# which prefetching may already have begun.
@lru_cache(maxsize=4)
def _cached_epoch_indices(sampling: Sampling, row_count: int, seed: int, epoch: int) -> np.ndarray:
    indices_N = sampling.epoch_indices(row_count, seed, epoch)
    indices_N.flags.writeable = False  # the cache returns the same array again
    return indices_N


@dataclass(frozen=True, kw_only=True, slots=True)
class MixingQuality:
    """How well a block shuffle mixes blocks in its batches, compared with a full shuffle of the same rows.

    Rows of one block may be similar: from one folder, one recorder, one day. Let r be the correlation between the
    gradients of two rows of a block. The variance of a batch's gradient is then 1 + (batch_clips - 1) *
    same_block_pairs * r times that of independent rows (Kish's design effect). `effective_clips` is the equivalent
    number of independent rows at r = 1, which is the worst case.
    """

    batch_clips: int
    block_clips: int  # rows of the largest block
    window_blocks: int
    window_bytes: int  # size of the blocks in the window, which are read repeatedly and should fit in memory
    blocks_per_batch: float  # distinct blocks in a batch
    same_block_pairs: float  # share of a batch's pairs of rows that come from the same block
    full_blocks_per_batch: float  # `blocks_per_batch` of a full shuffle
    full_same_block_pairs: float  # `same_block_pairs` of a full shuffle

    @property
    def effective_clips(self) -> float:
        """The smallest number of independent rows to which a batch is equivalent (r = 1)."""
        return self.batch_clips / (1 + (self.batch_clips - 1) * self.same_block_pairs)

    @property
    def full_effective_clips(self) -> float:
        """`effective_clips` of a full shuffle."""
        return self.batch_clips / (1 + (self.batch_clips - 1) * self.full_same_block_pairs)

    def __str__(self) -> str:
        return (
            f"block shuffle: {self.window_blocks} blocks of up to {self.block_clips} clips at a time, "
            f"{self.window_bytes / 1e6:,.0f} MB to keep in memory; a batch of {self.batch_clips} draws on "
            f"{self.blocks_per_batch:.1f} blocks (full shuffle: {self.full_blocks_per_batch:.1f}), "
            f"{self.same_block_pairs:.2%} of its pairs share one ({self.full_same_block_pairs:.2%}): "
            f"worth at least {self.effective_clips:.0f} unlike clips ({self.full_effective_clips:.0f})"
        )


def measure_mixing(sampling: BlockShuffle, batch_clips: int, seed: int, *, clip_bytes: int) -> MixingQuality:
    """Measure the mixing in batches of epoch 0, `batch_clips` rows on all ranks; full-shuffle figures are exact."""
    # Count the rows of each block in the measured batches.
    block_of_row_N = sampling.block_index_N
    rows = len(block_of_row_N)
    blocks_N = block_of_row_N[sampling.epoch_indices(rows, seed, 0)]
    steps = rows // batch_clips
    measured_steps = np.unique(np.linspace(0, steps - 1, min(steps, MEASURED_BATCHES)).astype(int))
    counts = []
    for step in measured_steps:
        batch_B = blocks_N[step * batch_clips : (step + 1) * batch_clips]
        counts.append(np.unique(batch_B, return_counts=True)[1])

    # The size of the window.
    sizes_N = np.bincount(block_of_row_N)
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
    """Return the share of pairs of rows that are of the same block; `count_N` is the number of rows of each block."""
    clips = int(count_N.sum())
    return float((count_N * (count_N - 1)).sum() / max(clips * (clips - 1), 1))


def _expected_distinct_blocks(sizes_N: np.ndarray, clips: int) -> float:
    """Return the expected number of distinct blocks among `clips` rows that are drawn without replacement."""
    # For each block size, the probability that no draw takes a row of the block.
    sizes, block_counts = np.unique(sizes_N, return_counts=True)
    rows_left_N = sizes_N.sum() - np.arange(clips)
    missed = [np.prod(np.maximum(rows_left_N - size, 0) / rows_left_N) for size in sizes]
    return float(((1 - np.array(missed)) * block_counts).sum())
