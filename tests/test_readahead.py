"""Whatever ends the making of batches ahead ends it with an error that says what, and with nothing left behind."""

import gc
import threading
from collections.abc import Callable

import pytest
import torch

from pipeline.errors import RunError, StoreError
from pipeline.loader import Feed, View
from pipeline.order import Order
from pipeline.readahead import ReadAhead
from pipeline.store import FeatureStore

pytestmark = pytest.mark.timeout(60)


class Maker:
    """Makes mels of zeros, and does `at_step` at the step of that number."""

    def __init__(self, feed: Feed, step: int = 10**9, act: Callable[[], None] = lambda: None) -> None:
        self.feed, self.at, self.act, self.step = feed, step, act, 0

    def __call__(self):
        if self.step == self.at:
            self.act()
        cuts = self.feed.cuts(self.step)
        self.step += 1
        return torch.zeros(self.feed.order.clips, self.feed.view.frames, self.feed.store.bands), cuts


@pytest.fixture
def feed(store: FeatureStore) -> Feed:
    return Feed(
        store=store,
        order=Order(rows_N=store.good_rows(), clips=6, seed=1),
        view=View(frames=16, mean=0.0, std=1.0),
        device=torch.device("cpu"),
    )


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def failing(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    "error",
    [StoreError("gone"), MemoryError("full"), ZeroDivisionError(), SystemExit(3), KeyboardInterrupt()],
)
@pytest.mark.parametrize("prefetch", [1, 4])
def test_whatever_ends_the_thread_is_raised_in_its_turn(feed, error, prefetch):
    """The batches before it come; the error is the thread's own, not a report of its absence."""
    batches = ReadAhead(feed, range(10), lambda: Maker(feed, 3, failing(error)), prefetch)
    assert [len(next(batches).rows_B) for _ in range(3)] == [6, 6, 6]
    with pytest.raises(type(error)):
        next(batches)
    with pytest.raises(RunError, match="closed"):
        next(batches)


def test_a_pipeline_that_cannot_be_built_is_told_at_the_first_batch(feed):
    """As when a GPU has no memory left."""
    batches = ReadAhead(feed, range(10), failing(RunError("no memory")), 2)
    with pytest.raises(RunError, match="no memory"):
        next(batches)
    with pytest.raises(RunError, match="closed"):
        next(batches)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_closing_ends_a_wait(feed, prefetch):
    """A trainer's other thread closes the loader while a batch is awaited: the wait ends, with an error."""
    reading, go_on = threading.Event(), threading.Event()

    def stall() -> None:
        reading.set()
        assert go_on.wait(30)

    batches = ReadAhead(feed, range(10), lambda: Maker(feed, 1, stall), prefetch)
    next(batches)
    told: list[RunError] = []

    def consume() -> None:
        try:
            next(batches)
        except RunError as error:
            told.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert reading.wait(30)
    closer = threading.Thread(target=batches.close)
    closer.start()
    go_on.set()
    for thread in (consumer, closer):
        thread.join(30)
        assert not thread.is_alive()
    assert "closed" in str(told[0])


def test_no_more_is_made_than_is_to_be_ahead(feed):
    """A slow trainer must not fill the memory; what is ahead of its last batch is `prefetch`."""
    makers: list[Maker] = []

    def maker() -> Maker:
        makers.append(Maker(feed))
        return makers[0]

    batches = ReadAhead(feed, range(100), maker, 3)
    assert not makers
    for taken in range(1, 6):
        next(batches)
        batches._made[-1].result()
        assert makers[0].step == taken + 3
    batches.close()


def test_batches_left_in_the_middle_leave_nothing(feed):
    """Dropped, closed, or closed twice; the fixture looks for threads."""
    for way in range(3):
        batches = ReadAhead(feed, range(10**6), lambda: Maker(feed), 4)
        next(batches)
        for _ in range(way):
            batches.close()
        del batches


def test_the_last_batch_ends_the_thread(feed):
    """A finished epoch holds no thread while the next thing is done; asking again is no error."""
    batches = ReadAhead(feed, range(5, 9), lambda: Maker(feed), 2)
    assert sum(1 for _ in batches) == 4
    assert list(batches) == []
