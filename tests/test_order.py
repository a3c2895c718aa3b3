"""Which rows come when."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.order import Order, shuffled

ROWS_N = np.arange(1_000, 1_060)  # 60 rows, none of them equal to its place


def epoch_rows(epoch: int, *, clips: int, world: int = 1, seed: int = 0) -> list[int]:
    """All rows of one epoch, of all ranks, step by step."""
    orders = [Order(rows_N=ROWS_N, clips=clips, seed=seed, rank=rank, world=world) for rank in range(world)]
    steps = orders[0].steps_per_epoch
    return [
        row
        for step in range(epoch * steps, (epoch + 1) * steps)
        for order in orders
        for row in order.rows(step)
    ]


@given(count=st.integers(1, 300), seed=st.integers(0, 2**32), epoch=st.integers(0, 1_000))
def test_a_shuffle_is_a_permutation(count, seed, epoch):
    """No place is lost or taken twice, whatever the size."""
    assert np.array_equal(np.sort(shuffled(count, seed, epoch)), np.arange(count))


def test_every_permutation_is_equally_likely():
    """Chi-square over the 24 permutations of 4 rows; a fair shuffle exceeds 49.7 once in a thousand seeds."""
    codes = [shuffled(4, seed, 0) @ [64, 16, 4, 1] for seed in range(4_800)]
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_takes_every_row_once(epoch):
    """12 divides 60, so nothing is dropped."""
    assert sorted(epoch_rows(epoch, clips=12)) == list(ROWS_N)


def test_epochs_and_seeds_differ():
    """A shuffle that repeats is learnt by heart."""
    ways = [epoch_rows(0, clips=12), epoch_rows(1, clips=12), epoch_rows(0, clips=12, seed=1)]
    assert len({tuple(way) for way in ways}) == 3


def test_what_does_not_fill_a_step_is_dropped_and_differs_by_epoch():
    """7 rows a step leave 4 of 60 over; the same four left out always would never be learnt."""
    left_over = [set(ROWS_N) - set(epoch_rows(epoch, clips=7)) for epoch in range(4)]
    assert [len(rows) for rows in left_over] == [4, 4, 4, 4]
    assert len(set.union(*left_over)) > 4


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_all_ranks_together_see_one_epoch_without_repeats(world):
    """A row that two ranks see counts twice in the gradient."""
    rows = epoch_rows(2, clips=5, world=world)
    assert len(set(rows)) == len(rows) == 60 // (5 * world) * 5 * world


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_union_over_ranks_does_not_depend_on_their_number(world):
    """12 clips a step on however many GPUs are the same 12: a run may be resumed on another machine."""
    assert epoch_rows(1, clips=12 // world, world=world) == epoch_rows(1, clips=12)


def test_an_order_remembers_nothing():
    """A resumed run asks a fresh order for step k alone, and gets what the uninterrupted run got."""
    whole = Order(rows_N=ROWS_N, clips=8, seed=3)
    walked = [whole.rows(step) for step in range(20)]
    for step in (19, 0, 7, 6):
        assert np.array_equal(Order(rows_N=ROWS_N, clips=8, seed=3).rows(step), walked[step])


def test_rows_can_be_changed_without_harm():
    """The shuffle is cached; what a caller does to its rows must not reach it."""
    order = Order(rows_N=ROWS_N, clips=8, seed=0)
    before = order.rows(0).copy()
    order.rows(0)[:] = -1
    assert np.array_equal(order.rows(0), before)


def test_too_few_rows_for_a_step_are_refused():
    """Seen when a batch size meant for AudioSet meets a toy store: said at once, in numbers."""
    with pytest.raises(InputError, match="60 clips do not fill one step of 16 clips on each of 4 ranks"):
        Order(rows_N=ROWS_N, clips=16, seed=0, world=4)


@pytest.mark.parametrize("wrong", [{"clips": 0}, {"rank": 2, "world": 2}, {"rank": -1}])
def test_a_rank_outside_its_world_is_refused(wrong):
    with pytest.raises(ValueError, match="rank in"):
        Order(**{"rows_N": ROWS_N, "clips": 4, "seed": 0} | wrong)


def test_an_epoch_of_all_audioset_starts_within_a_second():
    """2,084,320 clips; later steps of the epoch cost microseconds."""
    order = Order(rows_N=np.arange(2_084_320), clips=512, seed=987_654)
    start = time.perf_counter()
    order.rows(0)
    first_seconds = time.perf_counter() - start
    start = time.perf_counter()
    order.rows(1)
    assert first_seconds < 1
    assert time.perf_counter() - start < 0.01
