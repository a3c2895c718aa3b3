"""Which rows come when."""

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.order import Order
from pipeline.sampling import FULL_SHUFFLE, BlockShuffle, Weighted

ROWS_N = np.arange(1_000, 1_060)  # 60 rows, none of them equal to its place
LIGHT_AND_HEAVY = np.repeat([1.0, 0.0, 20.0], 20)
SAMPLINGS = {
    "full": FULL_SHUFFLE,
    "block": BlockShuffle(blocks_N=ROWS_N // 7, window_blocks=3),
    "drawn": Weighted(weights_N=LIGHT_AND_HEAVY, clips_per_epoch=60),
    "raced": Weighted(weights_N=LIGHT_AND_HEAVY, clips_per_epoch=36, replacement=False),
}
ONCE = ["full", "block"]  # those that take every row once an epoch


@pytest.fixture(params=SAMPLINGS)
def sampling(request):
    return SAMPLINGS[request.param]


def epoch_rows(epoch: int, *, clips: int, world: int = 1, seed: int = 0, sampling=FULL_SHUFFLE) -> list[int]:
    """All rows of one epoch, of all ranks, step by step."""
    known = {"rows_N": ROWS_N, "clips": clips, "seed": seed, "world": world, "sampling": sampling}
    orders = [Order(rank=rank, **known) for rank in range(world)]
    steps = orders[0].steps_per_epoch
    return [
        row
        for step in range(epoch * steps, (epoch + 1) * steps)
        for order in orders
        for row in order.rows(step)
    ]


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_takes_every_row_once(epoch, name):
    """12 divides 60, so nothing is dropped."""
    assert sorted(epoch_rows(epoch, clips=12, sampling=SAMPLINGS[name])) == list(ROWS_N)


def test_epochs_and_seeds_differ(sampling):
    """A shuffle that repeats is learnt by heart."""
    ways = [
        epoch_rows(epoch, clips=12, seed=seed, sampling=sampling) for epoch, seed in [(0, 0), (1, 0), (0, 1)]
    ]
    assert len({tuple(way) for way in ways}) == 3


@pytest.mark.parametrize("name", ONCE)
def test_what_does_not_fill_a_step_is_dropped_and_differs_by_epoch(name):
    """7 rows a step leave 4 of 60 over; the same four left out always would never be learnt."""
    kept = [set(epoch_rows(epoch, clips=7, sampling=SAMPLINGS[name])) for epoch in range(4)]
    left_over = [set(ROWS_N) - rows for rows in kept]
    assert [len(rows) for rows in left_over] == [4, 4, 4, 4]
    assert len(set.union(*left_over)) > 4


@pytest.mark.parametrize("name", [*ONCE, "raced"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_all_ranks_together_see_one_epoch_without_repeats(world, name):
    """A row that two ranks see counts twice in the gradient."""
    rows = epoch_rows(2, clips=5, world=world, sampling=SAMPLINGS[name])
    length = SAMPLINGS[name].length(60)
    assert len(set(rows)) == len(rows) == length // (5 * world) * 5 * world


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_union_over_ranks_does_not_depend_on_their_number(world, sampling):
    """12 clips a step on however many GPUs are the same 12: a run may be resumed on another machine."""
    whole = epoch_rows(1, clips=12, sampling=sampling)
    assert epoch_rows(1, clips=12 // world, world=world, sampling=sampling) == whole


def test_an_order_remembers_nothing(sampling):
    """A resumed run asks a fresh order for step k alone, and gets what the uninterrupted run got."""
    whole = Order(rows_N=ROWS_N, clips=8, seed=3, sampling=sampling)
    walked = [whole.rows(step) for step in range(20)]
    for step in (19, 0, 7, 6):
        alone = Order(rows_N=ROWS_N, clips=8, seed=3, sampling=sampling)
        assert np.array_equal(alone.rows(step), walked[step])


def test_rows_can_be_changed_without_harm(sampling):
    """The epoch is cached; what a caller does to its rows must not reach it."""
    order = Order(rows_N=ROWS_N, clips=8, seed=0, sampling=sampling)
    before = order.rows(0).copy()
    order.rows(0)[:] = -1
    assert np.array_equal(order.rows(0), before)


def test_rows_that_weigh_more_come_more_often():
    """Weights go with the rows of the order, place by place, not with the store's."""
    rows = epoch_rows(0, clips=12, sampling=SAMPLINGS["drawn"])
    assert not set(rows) & set(range(1_020, 1_040))
    assert sum(row >= 1_040 for row in rows) > 48


def test_an_epoch_may_be_longer_than_its_rows():
    """200,000 draws an epoch, of however few clips: fine-tuning on AudioSet counts epochs so."""
    order = Order(
        rows_N=ROWS_N, clips=50, seed=0, sampling=Weighted(weights_N=np.ones(60), clips_per_epoch=200)
    )
    assert order.steps_per_epoch == 4
    assert all(len(order.rows(step)) == 50 for step in range(8))


def test_two_orders_with_unlike_weights_do_not_share_an_epoch():
    """Epochs are cached, and two samplings of one length differ in what they hold."""
    first, second = (
        Order(rows_N=ROWS_N, clips=60, seed=0, sampling=Weighted(weights_N=weights_N, clips_per_epoch=60))
        for weights_N in (LIGHT_AND_HEAVY, LIGHT_AND_HEAVY[::-1])
    )
    assert (first.rows(0) >= 1_040).sum() > 48
    assert (second.rows(0) < 1_020).sum() > 48


def test_too_few_rows_for_a_step_are_refused():
    """Seen when a batch size meant for AudioSet meets a toy store: said at once, in numbers."""
    with pytest.raises(InputError, match="60 clips do not fill one step of 16 clips on each of 4 ranks"):
        Order(rows_N=ROWS_N, clips=16, seed=0, world=4)


def test_a_sampling_of_other_rows_is_refused_with_the_order():
    """Not at the first batch."""
    with pytest.raises(ValueError, match="one of 60 rows, the order has 59"):
        Order(rows_N=ROWS_N[1:], clips=4, seed=0, sampling=SAMPLINGS["drawn"])


@pytest.mark.parametrize("wrong", [{"clips": 0}, {"rank": 2, "world": 2}, {"rank": -1}])
def test_a_rank_outside_its_world_is_refused(wrong):
    with pytest.raises(ValueError, match="rank in"):
        Order(**{"rows_N": ROWS_N, "clips": 4, "seed": 0} | wrong)
