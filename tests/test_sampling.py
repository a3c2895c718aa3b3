"""Which clips an epoch takes, and in what order."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.sampling import (
    FULL_SHUFFLE,
    BlockShuffle,
    Weighted,
    drawn,
    in_order,
    natural_log,
    raced,
    shuffled,
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
    assert np.array_equal(np.sort(shuffled(count, seed, epoch)), np.arange(count))


def test_every_permutation_is_equally_likely():
    """Chi-square over the 24 permutations of 4 rows."""
    codes = [shuffled(4, seed, 0) @ [64, 16, 4, 1] for seed in range(4_800)]
    counts_N = np.unique(codes, return_counts=True)[1]
    assert len(counts_N) == 24
    assert chi_square(counts_N, np.full(24, 200)) < RARE


def test_the_streams_are_those_of_other_days():
    """A run is resumed by asking for its order again, so a stream that changes breaks every run that is under way."""
    assert shuffled(10, 1, 2).tolist() == [5, 6, 9, 3, 2, 1, 0, 8, 4, 7]
    assert FULL_SHUFFLE.places(60, 0, 0)[:8].tolist() == [11, 3, 20, 13, 2, 59, 53, 48]
    assert BLOCKS.places(60, 3, 1)[:8].tolist() == [34, 10, 22, 24, 13, 33, 26, 25]
    assert drawn(WEIGHTS_N, 12, 3, 1).tolist() == [5, 6, 6, 5, 3, 1, 6, 5, 5, 3, 5, 3]
    assert Weighted(weights_N=WEIGHTS_N, clips_per_epoch=4, replacement=False).places(8, 3, 1).tolist() == [
        3,
        1,
        6,
        5,
    ]


def test_keys_are_put_in_order_by_all_but_their_lowest_bits():
    """Which hold the place: of keys that differ in these alone the first stays first."""
    assert in_order(np.array([9 << 8, 3 << 8, 5 << 8, (3 << 8) + 1], np.uint64)).tolist() == [1, 3, 2, 0]


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    window=st.integers(1, 40),
    seed=SEEDS,
    epoch=EPOCHS,
)
def test_a_block_shuffle_takes_every_row_once(sizes, window, seed, epoch):
    """However unlike the blocks are, and however few; epochs and seeds differ."""
    blocks_N = np.repeat(np.arange(len(sizes)) * 5 + 2, sizes)
    places_N = BlockShuffle(blocks_N=blocks_N, window_blocks=window).places(len(blocks_N), seed, epoch)
    assert np.array_equal(np.sort(places_N), np.arange(len(blocks_N)))


@pytest.mark.parametrize("window", [1, 2, 8, 31])
def test_rows_come_from_no_more_blocks_at_a_time_than_the_window_holds(window):
    """Each block's rows lie, around the epoch, within the time in which `window` blocks begin: that is what is to be
    kept in memory, and nothing is fetched twice but across the epoch's end."""
    blocks, size = 50, 200
    sampling = BlockShuffle(blocks_N=np.arange(blocks * size) // size, window_blocks=window)
    block_N = sampling.places(blocks * size, 5, 3) // size
    held = [len(set(block_N[at : at + size])) for at in range(0, blocks * size, size)]
    assert max(held) <= window + 2  # while 200 rows pass one block begins, or at most two where others lag
    for block in range(blocks):
        at_N = np.flatnonzero(block_N == block)
        gaps_N = np.diff(at_N, append=at_N[0] + blocks * size)
        spread = blocks * size - gaps_N.max()
        assert spread <= (window + 1.5) * size


def test_blocks_come_in_another_order_every_epoch():
    """Not only the rows within the window: neighbours of one epoch are strangers in the next, and for another seed."""
    sampling = BlockShuffle(blocks_N=np.arange(2_000) // 20, window_blocks=2)
    ways = [sampling.places(2_000, seed, epoch) // 20 for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    middle_NB = [[np.median(np.flatnonzero(way_N == block)) for block in range(100)] for way_N in ways]
    likeness = np.corrcoef(middle_NB)[np.triu_indices(3, 1)]
    assert (np.abs(likeness) < 0.4).all()  # 0.1 is the standard deviation of no likeness


def test_a_window_over_all_blocks_is_a_full_shuffle():
    """All 24 orders of two blocks of two rows are equally likely."""
    sampling = BlockShuffle(blocks_N=np.array([0, 0, 1, 1]), window_blocks=64)
    codes = [sampling.places(4, seed, 0) @ [64, 16, 4, 1] for seed in range(4_800)]
    counts_N = np.unique(codes, return_counts=True)[1]
    assert len(counts_N) == 24
    assert chi_square(counts_N, np.full(24, 200)) < RARE


def test_every_block_is_as_likely_at_the_start_of_an_epoch_as_anywhere():
    """A shuffle that fills its window first would begin each epoch with batches of one block."""
    sampling = BlockShuffle(blocks_N=np.arange(1_000) // 20, window_blocks=10)
    heads = [sampling.places(1_000, seed, 0)[:20] // 20 for seed in range(200)]
    middles = [sampling.places(1_000, seed, 0)[500:520] // 20 for seed in range(200)]
    held_at = [np.mean([len(set(block_N)) for block_N in part]) for part in (heads, middles)]
    assert abs(held_at[0] - held_at[1]) < 0.2
    assert 8 < held_at[0] < 11


@pytest.mark.parametrize("weights_N", [WEIGHTS_N, WEIGHTS_N * 1e-30, WEIGHTS_N * 1e30])
def test_draws_follow_their_weights(weights_N):
    """Chi-square of 40,000 draws over 5 rows that weigh something, in any unit; 18.5 is exceeded once in a thousand."""
    counts_N = np.bincount(
        Weighted(weights_N=weights_N, clips_per_epoch=40_000).places(8, 11, 0), minlength=8
    )
    expected_N = 40_000 * WEIGHTS_N / WEIGHTS_N.sum()
    some_N = WEIGHTS_N > 0
    assert (counts_N[~some_N] == 0).all()
    assert chi_square(counts_N[some_N], expected_N[some_N]) < 18.5


def test_draws_come_in_no_order():
    """They are looked up sorted; a batch of rising rows would be one class after the other."""
    places_N = drawn(np.ones(1_000), 20_000, 0, 0)
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
            Weighted(weights_N=weights_N, clips_per_epoch=1, replacement=False)
        return
    clips = data.draw(st.integers(1, heavy))
    sampling = Weighted(weights_N=weights_N, clips_per_epoch=clips, replacement=False)
    places_N = sampling.places(len(weights_N), seed, 0)
    assert len(set(places_N)) == len(places_N) == clips == sampling.length(len(weights_N))
    assert (weights_N[places_N] > 0).all()


def test_without_replacement_rows_are_taken_as_one_by_one_from_an_urn():
    """Which two of four are taken: chi-square against the sum over both orders of p * q / (1 - p)."""
    weights_N = np.array([1.0, 2.0, 3.0, 6.0])
    share_N = weights_N / weights_N.sum()
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    wanted_N = [share_N[a] * share_N[b] * (1 / (1 - share_N[a]) + 1 / (1 - share_N[b])) for a, b in pairs]
    found = [tuple(raced(weights_N, 2, seed, 0)) for seed in range(6_000)]
    counts_N = np.array([found.count(pair) for pair in pairs])
    assert sum(wanted_N) == pytest.approx(1)
    assert chi_square(counts_N, 6_000 * np.array(wanted_N)) < 20.5  # once in a thousand over 6 cells


def test_without_replacement_every_part_of_an_epoch_is_as_heavy():
    """As they are chosen, heavy rows come first: the last steps of every epoch would see only common classes."""
    weights_N = np.repeat([100.0, 1.0], [100, 900])
    sampling = Weighted(weights_N=weights_N, clips_per_epoch=400, replacement=False)
    heavy = np.array([weights_N[sampling.places(1_000, 0, epoch)] == 100.0 for epoch in range(40)])
    assert heavy.sum(1).min() > 90
    assert abs(heavy[:, :200].sum() / heavy.sum() - 0.5) < 0.03


def test_weighted_epochs_and_seeds_differ():
    """In both kinds."""
    for replacement in (True, False):
        sampling = Weighted(weights_N=np.ones(500), clips_per_epoch=50, replacement=replacement)
        ways = {tuple(sampling.places(500, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
        assert len(ways) == 4


def test_the_logarithm_is_right_to_the_last_bits():
    """Over all of (0, 1], its ends included."""
    values_N = np.concatenate([np.linspace(2**-53, 1, 100_001), 2.0 ** np.arange(-60, 1), [1 - 2**-53]])
    np.testing.assert_allclose(natural_log(values_N), np.log(values_N), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"weights_N": np.zeros(5)}, "none of 5 clips weighs more than 0"),
        (
            {"clips_per_epoch": 6, "replacement": False},
            "6 clips an epoch without replacement, but only 5 of 8",
        ),
    ],
)
def test_weights_from_which_nothing_can_be_drawn_are_refused(wrong, told):
    """A loader that found out would hang or repeat itself."""
    with pytest.raises(InputError, match=told):
        Weighted(**{"weights_N": WEIGHTS_N, "clips_per_epoch": 3} | wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"weights_N": np.array([1.0, -1.0])},
        {"weights_N": np.array([1.0, np.nan])},
        {"weights_N": np.array([1.0, np.inf])},
        {"clips_per_epoch": 0},
    ],
)
def test_weights_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="must be 0 or more"):
        Weighted(**{"weights_N": WEIGHTS_N, "clips_per_epoch": 3} | wrong)


@pytest.mark.parametrize("sampling", [BLOCKS, Weighted(weights_N=np.ones(60), clips_per_epoch=5)])
def test_a_sampling_made_for_other_rows_is_refused(sampling):
    """Weights of all rows of a store, with an order over its good ones, would weigh the wrong clips."""
    with pytest.raises(ValueError, match="one of 60 rows, the order has 61"):
        sampling.length(61)


ALL_AUDIOSET = """
from pathlib import Path
import numpy as np
from pipeline.sampling import FULL_SHUFFLE, BlockShuffle, Weighted
from pipeline.order import Order

rows = 2_084_320
weights_N = 1 + np.arange(rows) % 1_000 * 1.0
samplings = [
    FULL_SHUFFLE,
    BlockShuffle(blocks_N=np.arange(rows) // 512),
    Weighted(weights_N=weights_N, clips_per_epoch=rows),
    Weighted(weights_N=weights_N, clips_per_epoch=200_000, replacement=False),
]
rows_N = np.arange(rows)
for sampling in samplings:
    order = Order(rows_N=rows_N, clips=512, seed=0, sampling=sampling)
    for epoch in range(3):
        order.rows(epoch * order.steps_per_epoch)
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")))
"""


def test_epochs_of_all_audioset_stay_under_a_gigabyte():
    """2,084,320 rows, three epochs of each sampling in one process, Python and NumPy included.

    Not `ru_maxrss`: a child's begins with the size of the parent that it was forked from.
    """
    done = subprocess.run([sys.executable, "-c", ALL_AUDIOSET], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_000_000  # kB
