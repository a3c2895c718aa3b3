"""Which clips an epoch takes in which order, which rows a step has, and how well a block shuffle mixes."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.loading.sampling import (
    FULL_SHUFFLE,
    BlockShuffle,
    RowOrder,
    WeightedSampling,
    argsort_packed,
    draw_with_replacement,
    draw_without_replacement,
    measure_mixing,
    natural_log,
    random_permutation,
)

SEEDS = st.integers(0, 2**32)

EPOCHS = st.integers(0, 1_000)

WEIGHTS_N = np.array([0.0, 1.0, 2.0, 4.0, 0.0, 8.0, 5.0, 0.0])

BLOCKS = BlockShuffle(blocks_N=np.arange(60) // 7, window_blocks=3)

RARE = 49.7  # what chi-square over 24 cells exceeds once in a thousand seeds


def chi_square(counts_N: np.ndarray, expected_N: np.ndarray) -> float:
    return float(((counts_N - expected_N) ** 2 / expected_N).sum())


@given(count=st.integers(1, 300), seed=SEEDS, epoch=EPOCHS)
def test_a_shuffle_is_a_permutation(count, seed, epoch):
    """No place is lost or taken twice, whatever the size."""
    assert np.array_equal(np.sort(random_permutation(count, seed, epoch)), np.arange(count))


def test_every_permutation_is_equally_likely():
    """Chi-square over the 24 permutations of 4 rows."""
    codes = [random_permutation(4, seed, 0) @ [64, 16, 4, 1] for seed in range(4_800)]
    counts_N = np.unique(codes, return_counts=True)[1]
    assert len(counts_N) == 24
    assert chi_square(counts_N, np.full(24, 200)) < RARE


def test_the_streams_are_those_of_earlier_versions():
    """A run is resumed by drawing its order again, so a stream that changes breaks every run that is under way."""
    assert random_permutation(10, 1, 2).tolist() == [5, 6, 9, 3, 2, 1, 0, 8, 4, 7]
    assert FULL_SHUFFLE.epoch_indices(60, 0, 0)[:8].tolist() == [11, 3, 20, 13, 2, 59, 53, 48]
    assert BLOCKS.epoch_indices(60, 3, 1)[:8].tolist() == [34, 10, 22, 24, 13, 33, 26, 25]
    assert draw_with_replacement(WEIGHTS_N, 12, 3, 1).tolist() == [5, 6, 6, 5, 3, 1, 6, 5, 5, 3, 5, 3]
    without = WeightedSampling(weights_N=WEIGHTS_N, clips_per_epoch=4, replacement=False)
    assert without.epoch_indices(8, 3, 1).tolist() == [3, 1, 6, 5]


def test_keys_are_put_in_order_by_all_but_their_lowest_bits():
    """Which hold the place: of keys that differ in these alone the first stays first."""
    keys_N = np.array([9 << 8, 3 << 8, 5 << 8, (3 << 8) + 1], np.uint64)
    assert argsort_packed(keys_N).tolist() == [1, 3, 2, 0]


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    window=st.integers(1, 40),
    seed=SEEDS,
    epoch=EPOCHS,
)
def test_a_block_shuffle_takes_every_row_once(sizes, window, seed, epoch):
    """However unlike the blocks are, and however few; epochs and seeds differ."""
    blocks_N = np.repeat(np.arange(len(sizes)) * 5 + 2, sizes)
    places_N = BlockShuffle(blocks_N=blocks_N, window_blocks=window).epoch_indices(len(blocks_N), seed, epoch)
    assert np.array_equal(np.sort(places_N), np.arange(len(blocks_N)))


@pytest.mark.parametrize("window", [1, 2, 8, 31])
def test_rows_come_from_no_more_blocks_at_a_time_than_the_window_holds(window):
    """Each block's rows lie, around the epoch, within the time in which `window` blocks begin: that is what is to be
    kept in memory, and nothing is fetched twice but across the epoch's end."""
    blocks, size = 50, 200
    sampling = BlockShuffle(blocks_N=np.arange(blocks * size) // size, window_blocks=window)
    block_N = sampling.epoch_indices(blocks * size, 5, 3) // size
    # While 200 rows pass one block begins, or at most two where others lag.
    block_counts = [len(set(block_N[first : first + size])) for first in range(0, blocks * size, size)]
    assert max(block_counts) <= window + 2
    for block in range(blocks):
        place_N = np.flatnonzero(block_N == block)
        gaps_N = np.diff(place_N, append=place_N[0] + blocks * size)
        spread = blocks * size - gaps_N.max()
        assert spread <= (window + 1.5) * size


def test_blocks_come_in_another_order_every_epoch():
    """Not only the rows within the window: neighbours of one epoch are strangers in the next, and for another seed."""
    sampling = BlockShuffle(blocks_N=np.arange(2_000) // 20, window_blocks=2)
    epochs = [sampling.epoch_indices(2_000, seed, epoch) // 20 for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    middles = [[np.median(np.flatnonzero(epoch_N == block)) for block in range(100)] for epoch_N in epochs]
    correlations = np.corrcoef(middles)[np.triu_indices(3, 1)]
    assert (np.abs(correlations) < 0.4).all()  # unrelated orders have a standard deviation of 0.1


def test_a_window_over_all_blocks_is_a_full_shuffle():
    """All 24 orders of two blocks of two rows are equally likely."""
    sampling = BlockShuffle(blocks_N=np.array([0, 0, 1, 1]), window_blocks=64)
    codes = [sampling.epoch_indices(4, seed, 0) @ [64, 16, 4, 1] for seed in range(4_800)]
    counts_N = np.unique(codes, return_counts=True)[1]
    assert len(counts_N) == 24
    assert chi_square(counts_N, np.full(24, 200)) < RARE


def test_every_block_is_as_likely_at_the_start_of_an_epoch_as_anywhere():
    """A shuffle that fills its window first would begin each epoch with batches of one block."""
    sampling = BlockShuffle(blocks_N=np.arange(1_000) // 20, window_blocks=10)
    heads = [sampling.epoch_indices(1_000, seed, 0)[:20] // 20 for seed in range(200)]
    middles = [sampling.epoch_indices(1_000, seed, 0)[500:520] // 20 for seed in range(200)]
    at_start, in_the_middle = (
        np.mean([len(set(block_N)) for block_N in batches]) for batches in (heads, middles)
    )
    assert abs(at_start - in_the_middle) < 0.2
    assert 8 < at_start < 11


@pytest.mark.parametrize("weights_N", [WEIGHTS_N, WEIGHTS_N * 1e-30, WEIGHTS_N * 1e30])
def test_draws_follow_their_weights(weights_N):
    """Chi-square of 40,000 draws over 5 rows that weigh something, in any unit; 18.5 is exceeded once in a thousand."""
    counts_N = np.bincount(
        WeightedSampling(weights_N=weights_N, clips_per_epoch=40_000).epoch_indices(8, 11, 0), minlength=8
    )
    expected_N = 40_000 * WEIGHTS_N / WEIGHTS_N.sum()
    is_heavy_N = WEIGHTS_N > 0
    assert (counts_N[~is_heavy_N] == 0).all()
    assert chi_square(counts_N[is_heavy_N], expected_N[is_heavy_N]) < 18.5


def test_draws_come_in_no_order():
    """They are looked up sorted; a batch of rising rows would be one class after the other."""
    places_N = draw_with_replacement(np.ones(1_000), 20_000, 0, 0)
    rising = np.mean(np.diff(places_N) > 0)
    assert abs(rising - 0.5) < 0.02


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-310, 1e-6, 1.0, 3.5, 1e6]), min_size=1, max_size=50),
    seed=SEEDS,
    data=st.data(),
)
def test_without_replacement_no_row_comes_twice_and_none_that_weighs_nothing(weights, seed, data):
    """Whatever the weights, as long as enough of them are above 0."""
    weights_N = np.array(weights)
    heavy = np.count_nonzero(weights_N)
    if not heavy:
        with pytest.raises(InputError, match="none of"):
            WeightedSampling(weights_N=weights_N, clips_per_epoch=1, replacement=False)
        return
    clips = data.draw(st.integers(1, heavy))
    sampling = WeightedSampling(weights_N=weights_N, clips_per_epoch=clips, replacement=False)
    places_N = sampling.epoch_indices(len(weights_N), seed, 0)
    assert len(set(places_N)) == len(places_N) == clips == sampling.epoch_length(len(weights_N))
    assert (weights_N[places_N] > 0).all()


def test_without_replacement_rows_are_taken_as_one_by_one_from_an_urn():
    """Which two of four are taken: chi-square against the sum over both orders of p * q / (1 - p)."""
    weights_N = np.array([1.0, 2.0, 3.0, 6.0])
    share_N = weights_N / weights_N.sum()
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    expected_N = [share_N[a] * share_N[b] * (1 / (1 - share_N[a]) + 1 / (1 - share_N[b])) for a, b in pairs]
    drawn_pairs = [tuple(draw_without_replacement(weights_N, 2, seed, 0)) for seed in range(6_000)]
    counts_N = np.array([drawn_pairs.count(pair) for pair in pairs])
    assert sum(expected_N) == pytest.approx(1)
    assert chi_square(counts_N, 6_000 * np.array(expected_N)) < 20.5  # once in a thousand over 6 cells


def test_without_replacement_every_part_of_an_epoch_is_as_heavy():
    """As they are chosen, heavy rows come first: the last steps of every epoch would see only common classes."""
    weights_N = np.repeat([100.0, 1.0], [100, 900])
    sampling = WeightedSampling(weights_N=weights_N, clips_per_epoch=400, replacement=False)
    heavy = np.array([weights_N[sampling.epoch_indices(1_000, 0, epoch)] == 100.0 for epoch in range(40)])
    assert heavy.sum(1).min() > 90
    assert abs(heavy[:, :200].sum() / heavy.sum() - 0.5) < 0.03


def test_weighted_epochs_and_seeds_differ():
    """In both kinds."""
    for replacement in (True, False):
        sampling = WeightedSampling(weights_N=np.ones(500), clips_per_epoch=50, replacement=replacement)
        epochs = {tuple(sampling.epoch_indices(500, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
        assert len(epochs) == 4


def test_the_logarithm_is_right_to_the_last_bits():
    """Over all of (0, 1], its ends included."""
    values_N = np.concatenate([np.linspace(2**-53, 1, 100_001), 2.0 ** np.arange(-60, 1), [1 - 2**-53]])
    np.testing.assert_allclose(natural_log(values_N), np.log(values_N), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weights_N": np.zeros(5)}, "none of 5 clips weighs more than 0"),
        (
            {"clips_per_epoch": 6, "replacement": False},
            "6 clips an epoch without replacement, but only 5 of 8",
        ),
    ],
)
def test_weights_from_which_nothing_can_be_drawn_are_refused(wrong, message):
    """A loader that tried would hang or repeat itself."""
    with pytest.raises(InputError, match=message):
        WeightedSampling(**{"weights_N": WEIGHTS_N, "clips_per_epoch": 3} | wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"weights_N": np.array([1.0, -1.0])},
        {"weights_N": np.array([1.0, np.nan])},
        {"weights_N": np.array([1.0, np.inf])},
        {"clips_per_epoch": 0},
    ],
)
def test_weights_that_are_no_weights_are_refused(wrong):
    with pytest.raises(ValueError, match="must be 0 or more"):
        WeightedSampling(**{"weights_N": WEIGHTS_N, "clips_per_epoch": 3} | wrong)


@pytest.mark.parametrize("sampling", [BLOCKS, WeightedSampling(weights_N=np.ones(60), clips_per_epoch=5)])
def test_a_sampling_made_for_other_rows_is_refused(sampling):
    """Weights of all rows of a store, with an order over its good ones, would weigh the wrong clips."""
    with pytest.raises(ValueError, match="one of 60 rows, the order has 61"):
        sampling.epoch_length(61)


ALL_AUDIOSET = """
from pathlib import Path
import numpy as np
from pipeline.loading.sampling import FULL_SHUFFLE, BlockShuffle, WeightedSampling
from pipeline.loading.sampling import RowOrder

rows = 2_084_320
weights_N = 1 + np.arange(rows) % 1_000 * 1.0
samplings = [
    FULL_SHUFFLE,
    BlockShuffle(blocks_N=np.arange(rows) // 512),
    WeightedSampling(weights_N=weights_N, clips_per_epoch=rows),
    WeightedSampling(weights_N=weights_N, clips_per_epoch=200_000, replacement=False),
]
rows_N = np.arange(rows)
for sampling in samplings:
    order = RowOrder(rows_N=rows_N, clips=512, seed=0, sampling=sampling)
    for epoch in range(3):
        order.rows_at_step(epoch * order.steps_per_epoch)
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")))
"""


def test_epochs_of_all_audioset_stay_under_a_gigabyte():
    """2,084,320 rows, three epochs of each sampling in one process, Python and NumPy included.

    Not `ru_maxrss`: a child's begins with the size of the parent that it was forked from.
    """
    done = subprocess.run([sys.executable, "-c", ALL_AUDIOSET], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_000_000  # kB


ROWS_N = np.arange(1_000, 1_060)  # 60 rows, none of them equal to its place

LIGHT_AND_HEAVY = np.repeat([1.0, 0.0, 20.0], 20)

SAMPLINGS = {
    "full": FULL_SHUFFLE,
    "block": BlockShuffle(blocks_N=ROWS_N // 7, window_blocks=3),
    "with replacement": WeightedSampling(weights_N=LIGHT_AND_HEAVY, clips_per_epoch=60),
    "without replacement": WeightedSampling(weights_N=LIGHT_AND_HEAVY, clips_per_epoch=36, replacement=False),
}

ONCE = ["full", "block"]  # samplings that take every row once an epoch


@pytest.fixture(params=SAMPLINGS)
def sampling(request):
    return SAMPLINGS[request.param]


def epoch_rows(epoch: int, *, clips: int, world: int = 1, seed: int = 0, sampling=FULL_SHUFFLE) -> list[int]:
    """All rows of one epoch, of all ranks, step by step."""
    settings = {"rows_N": ROWS_N, "clips": clips, "seed": seed, "world": world, "sampling": sampling}
    orders = [RowOrder(rank=rank, **settings) for rank in range(world)]
    steps = orders[0].steps_per_epoch
    return [
        row
        for step in range(epoch * steps, (epoch + 1) * steps)
        for order in orders
        for row in order.rows_at_step(step)
    ]


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_takes_every_row_once(epoch, name):
    """12 divides 60, so nothing is dropped."""
    assert sorted(epoch_rows(epoch, clips=12, sampling=SAMPLINGS[name])) == list(ROWS_N)


def test_epochs_and_seeds_differ(sampling):
    """A shuffle that repeats is learnt by heart."""
    epochs = [
        epoch_rows(epoch, clips=12, seed=seed, sampling=sampling) for epoch, seed in [(0, 0), (1, 0), (0, 1)]
    ]
    assert len({tuple(rows) for rows in epochs}) == 3


@pytest.mark.parametrize("name", ONCE)
def test_rows_that_do_not_fill_a_step_are_dropped_and_differ_by_epoch(name):
    """7 rows a step leave 4 of 60 over; the same four left out always would never be learnt."""
    epochs = [set(epoch_rows(epoch, clips=7, sampling=SAMPLINGS[name])) for epoch in range(4)]
    dropped = [set(ROWS_N) - rows for rows in epochs]
    assert [len(rows) for rows in dropped] == [4, 4, 4, 4]
    assert len(set.union(*dropped)) > 4


@pytest.mark.parametrize("name", [*ONCE, "without replacement"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_all_ranks_together_see_one_epoch_without_repeats(world, name):
    """A row that two ranks see counts twice in the gradient."""
    rows = epoch_rows(2, clips=5, world=world, sampling=SAMPLINGS[name])
    length = SAMPLINGS[name].epoch_length(60)
    assert len(set(rows)) == len(rows) == length // (5 * world) * 5 * world


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_union_over_ranks_does_not_depend_on_their_number(world, sampling):
    """12 clips a step on however many GPUs are the same 12: a run may be resumed on another machine."""
    whole = epoch_rows(1, clips=12, sampling=sampling)
    assert epoch_rows(1, clips=12 // world, world=world, sampling=sampling) == whole


def test_an_order_remembers_nothing(sampling):
    """A resumed run asks a fresh order for step k alone, and gets what the uninterrupted run got."""
    whole = RowOrder(rows_N=ROWS_N, clips=8, seed=3, sampling=sampling)
    steps = [whole.rows_at_step(step) for step in range(20)]
    for step in (19, 0, 7, 6):
        alone = RowOrder(rows_N=ROWS_N, clips=8, seed=3, sampling=sampling)
        assert np.array_equal(alone.rows_at_step(step), steps[step])


def test_rows_can_be_changed_without_harm(sampling):
    """The epoch is cached; what a caller does to its rows must not reach it."""
    order = RowOrder(rows_N=ROWS_N, clips=8, seed=0, sampling=sampling)
    before = order.rows_at_step(0).copy()
    order.rows_at_step(0)[:] = -1
    assert np.array_equal(order.rows_at_step(0), before)


def test_rows_that_weigh_more_come_more_often():
    """Weights go with the rows of the order, place by place, not with the store's."""
    rows = epoch_rows(0, clips=12, sampling=SAMPLINGS["with replacement"])
    assert not set(rows) & set(range(1_020, 1_040))
    assert sum(row >= 1_040 for row in rows) > 48


def test_an_epoch_may_be_longer_than_its_rows():
    """200,000 draws an epoch, of however few clips: fine-tuning on AudioSet counts epochs so."""
    order = RowOrder(
        rows_N=ROWS_N, clips=50, seed=0, sampling=WeightedSampling(weights_N=np.ones(60), clips_per_epoch=200)
    )
    assert order.steps_per_epoch == 4
    assert all(len(order.rows_at_step(step)) == 50 for step in range(8))


def test_two_orders_with_unlike_weights_do_not_share_an_epoch():
    """Epochs are cached, and two samplings of one length differ in what they hold."""
    first, second = (
        RowOrder(
            rows_N=ROWS_N,
            clips=60,
            seed=0,
            sampling=WeightedSampling(weights_N=weights_N, clips_per_epoch=60),
        )
        for weights_N in (LIGHT_AND_HEAVY, LIGHT_AND_HEAVY[::-1])
    )
    assert (first.rows_at_step(0) >= 1_040).sum() > 48
    assert (second.rows_at_step(0) < 1_020).sum() > 48


def test_too_few_rows_for_a_step_are_refused():
    """Seen when a batch size meant for AudioSet meets a toy store: said at once, in numbers."""
    with pytest.raises(InputError, match="60 clips do not fill one step of 16 clips on each of 4 ranks"):
        RowOrder(rows_N=ROWS_N, clips=16, seed=0, world=4)


def test_a_sampling_of_other_rows_is_refused_with_the_order():
    """Not at the first batch."""
    with pytest.raises(ValueError, match="one of 60 rows, the order has 59"):
        RowOrder(rows_N=ROWS_N[1:], clips=4, seed=0, sampling=SAMPLINGS["with replacement"])


@pytest.mark.parametrize("wrong", [{"clips": 0}, {"rank": 2, "world": 2}, {"rank": -1}])
def test_a_rank_outside_its_world_is_refused(wrong):
    with pytest.raises(ValueError, match="rank in"):
        RowOrder(**{"rows_N": ROWS_N, "clips": 4, "seed": 0} | wrong)


ROWS = 40 * 256


def mixing(window: int, *, clips: int = 64, block: int = 256):
    sampling = BlockShuffle(blocks_N=np.arange(ROWS) // block, window_blocks=window)
    return measure_mixing(sampling, clips, 0, clip_bytes=1_000)


def test_the_figures_are_those_of_all_batches_counted_one_by_one():
    """40 blocks of 256, batches of 64 from 6 at a time: every pair of every batch, by the definition."""
    sampling = BlockShuffle(blocks_N=np.arange(ROWS) // 256, window_blocks=6)
    batches = (sampling.epoch_indices(ROWS, 0, 0) // 256).reshape(-1, 64)
    pairs = np.mean([(row[:, None] == row)[np.triu_indices(64, 1)].mean() for row in batches])
    quality = mixing(6)
    assert quality.same_block_pairs == pytest.approx(pairs)
    assert quality.blocks_per_batch == pytest.approx(np.mean([len(set(row)) for row in batches]))


@pytest.mark.parametrize("window", [2, 5, 20])
def test_as_many_pairs_share_a_block_as_there_are_blocks_at_a_time(window):
    """One in `window`: the gain of a window can be computed beforehand."""
    assert mixing(window).same_block_pairs == pytest.approx(1 / window, rel=0.06)


def test_the_figures_of_a_full_shuffle_are_what_full_shuffles_have():
    """In closed form, against the mean over 400 batches."""
    quality = mixing(4)
    batches = [random_permutation(ROWS, seed)[:64] // 256 for seed in range(400)]
    mean_blocks = np.mean([len(set(batch)) for batch in batches])
    assert quality.full_blocks_per_batch == pytest.approx(mean_blocks, rel=0.01)
    assert quality.full_same_block_pairs == pytest.approx((256 - 1) / (ROWS - 1))


def test_a_window_over_all_blocks_mixes_as_a_full_shuffle_does():
    """So the figures can be compared."""
    quality = mixing(64)
    assert quality.window_blocks == 40
    assert quality.blocks_per_batch == pytest.approx(quality.full_blocks_per_batch, rel=0.02)
    assert quality.same_block_pairs == pytest.approx(quality.full_same_block_pairs, rel=0.03)
    assert quality.effective_clips == pytest.approx(quality.full_effective_clips, rel=0.02)


def test_a_batch_is_worth_at_least_the_blocks_that_it_draws_on():
    """From one block alone it is worth one clip, if all clips of a block are the same."""
    assert mixing(1, clips=64).effective_clips < 2
    assert 3 < mixing(4).effective_clips < 5
    assert mixing(1, block=1).effective_clips == pytest.approx(64)


def test_a_step_of_one_clip_has_no_pairs():
    assert mixing(2, clips=1).same_block_pairs == 0


def test_the_sentence_tells_memory_and_figures():
    """Whoever chooses block shuffle sees what it costs and what it gives, beside what a full shuffle gives."""
    assert str(mixing(6)) == (
        "block shuffle: 6 blocks of up to 256 clips at a time, 2 MB to keep in memory; a batch of 64 draws on "
        "6.2 blocks (full shuffle: 32.1), 16.45% of its pairs share one (2.49%): worth at least 6 unlike clips (25)"
    )
