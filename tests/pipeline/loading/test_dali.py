"""The fast loader makes the plain loader's batches; an error ends the reading ahead, says why and leaves no thread."""

import gc
import itertools
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from loading_inputs import order_of, store_with_broken_rows, view_of

from pipeline.errors import RunError, StoreError
from pipeline.loading.augment import Augment
from pipeline.loading.dali import BatchPrefetcher, DaliLoader, DaliSource, open_loader
from pipeline.loading.loader import Batch, BatchMaker, PlainLoader, View
from pipeline.loading.sampling import RowOrder
from pipeline.store.feature_store import FeatureStore

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not there: only Linux has it")

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")

pytestmark = pytest.mark.timeout(60)

EVERYTHING = {
    "roll": True,
    "gain_db": 6.0,
    "time_mask_frames": 192,
    "band_mask_bands": 48,
    "mixup_share": 0.6,
}

SUBSETS = [
    {name: EVERYTHING[name] for name in names}
    for count in range(1, len(EVERYTHING) + 1)
    for names in itertools.combinations(EVERYTHING, count)
]

SUBSETS.append({**EVERYTHING, "masks_each": 2})


def assert_equal(fast: Batch, plain: Batch) -> None:
    """Bit for bit in every field."""
    assert fast.mel_BTF.dtype == plain.mel_BTF.dtype == torch.float32
    assert torch.equal(fast.mel_BTF.view(torch.int32), plain.mel_BTF.view(torch.int32))
    assert torch.equal(fast.n_frames_B, plain.n_frames_B)
    assert np.array_equal(fast.rows_B, plain.rows_B)
    assert (fast.labels_BC is None) == (plain.labels_BC is None)
    assert fast.labels_BC is None or torch.equal(fast.labels_BC, plain.labels_BC)
    assert fast.skipped_clips == plain.skipped_clips


@pytest.mark.parametrize(
    ("frames", "crop"), [(96, "random"), (250, "start"), (998, "random"), (1_100, "random")]
)
def test_two_epochs_are_the_plain_loaders_bit_for_bit(any_store, frames, crop):
    """Crops, short clips, padding beyond the stored frames, labels; kept until the end, so that no memory is reused."""
    store = any_store
    view = view_of(store, frames=frames, crop=crop, label_set="raw")
    order = order_of(store)
    steps = 2 * order.steps_per_epoch
    with DaliLoader(store, order, view) as loader:
        batches = list(loader.batches(0, steps))
    plain = PlainLoader(store, order, view)
    assert len(batches) == steps
    for step, batch in enumerate(batches):
        assert_equal(batch, plain.make_batch(step))


@pytest.mark.parametrize("augment", SUBSETS, ids="+".join)
def test_two_augmented_epochs_are_the_plain_loaders_bit_for_bit(any_store, augment):
    """Every augmentation on and off; half of the cases with crops and labels, half with padding."""
    store = any_store
    case = {"frames": 96, "label_set": "raw"} if len(augment) % 2 == 0 else {"frames": 1_024}
    view = view_of(store, augment=Augment(**augment), **case)
    order = order_of(store)
    steps = 2 * order.steps_per_epoch
    plain = PlainLoader(store, order, view)
    with DaliLoader(store, order, view) as loader:
        batches = list(loader.batches(0, steps))
    assert len(batches) == steps
    for step, batch in enumerate(batches):
        assert_equal(batch, plain.make_batch(step))


@pytest.mark.parametrize("frames", [48, 96, 1_100])
def test_several_crops_are_the_plain_loaders_bit_for_bit(any_store, frames):
    """Each of three crops, of clips that are longer or shorter than a view."""
    view = view_of(any_store, frames=frames, crops=3)
    order = order_of(any_store)
    steps = 2 * order.steps_per_epoch
    with DaliLoader(any_store, order, view) as loader:
        for made, plain in zip(
            loader.batches(0, steps), PlainLoader(any_store, order, view).batches(0, steps), strict=True
        ):
            assert len(made.mel_BTF) == 3 * len(made.rows_B)
            assert torch.equal(made.mel_BTF, plain.mel_BTF)
            assert torch.equal(made.n_frames_B, plain.n_frames_B)
            np.testing.assert_array_equal(made.rows_B, plain.rows_B)


@pytest.mark.parametrize("augment", [{}, EVERYTHING], ids=["plain", "augmented"])
@pytest.mark.parametrize("first", range(1, 10))
def test_a_run_resumes_at_any_step(store, first, augment):
    """A resumed run sees what the uninterrupted one saw; 7 steps are an epoch here."""
    loader = DaliLoader(store, order_of(store), view_of(store, augment=Augment(**augment)))
    whole = list(loader.batches(0, 10))
    for resumed, uninterrupted in zip(loader.batches(first, 10), whole[first:], strict=True):
        assert_equal(resumed, uninterrupted)


@pytest.mark.parametrize(("prefetch", "threads"), [(1, 1), (1, 3), (5, 2), (50, 1)])
def test_settings_change_the_speed_only(store, prefetch, threads):
    """More made ahead, or by more threads, is the same."""
    loader = DaliLoader(store, order_of(store), view_of(store), prefetch=prefetch, threads=threads)
    plain = PlainLoader(store, order_of(store), view_of(store))
    for fast, slow in zip(loader.batches(0, 9), plain.batches(0, 9), strict=True):
        assert_equal(fast, slow)


def test_no_steps_are_no_batches(store):
    """Resuming a finished run."""
    assert list(DaliLoader(store, order_of(store), view_of(store)).batches(5, 5)) == []


def rows_until_the_error(batches: Iterator[Batch]) -> tuple[list[int], str]:
    """The rows of the batches before a StoreError, and its message."""
    rows: list[int] = []
    try:
        for batch in batches:
            rows.extend(batch.rows_B)
    except StoreError as error:
        return rows, str(error)
    pytest.fail("no StoreError came")


def test_a_missing_shard_is_an_error_at_its_batch(store_path, tmp_path):
    """The batches before it come, then the plain loader's error at the plain loader's step: no hang, no zeros."""
    shutil.copytree(store_path, tmp_path / "damaged.zarr")
    store = FeatureStore.open(tmp_path / "damaged.zarr")
    shard_clips = store.header.layout.shard_clips
    orders = (order_of(store, clips=1, seed=seed) for seed in range(1_000))
    order = next(
        o for o in orders if [int(o.rows_at_step(s)[0]) // shard_clips for s in range(4)] == [0, 2, 0, 1]
    )
    shutil.rmtree(tmp_path / "damaged.zarr" / "mel" / "c" / "1")
    ends = [
        rows_until_the_error(kind(store, order, view_of(store)).batches(0, 20))
        for kind in (PlainLoader, DaliLoader)
    ]
    assert ends[0] == ends[1]
    assert len(ends[0][0]) == 3
    assert "mel/c/1/0/0" in ends[0][1]


def test_skipped_clips_are_the_plain_loaders(store_path):
    """They are met while reading ahead, reported once, and the batches before, with and after them are equal."""
    broken_rows = order_of(FeatureStore.open(store_path)).rows_at_step(2)[:3].tolist()
    lines: tuple[list[str], list[str]] = ([], [])
    batches = []
    for kind, kind_lines in zip((PlainLoader, DaliLoader), lines, strict=True):
        store = store_with_broken_rows(store_path, broken_rows)
        view = view_of(store, augment=Augment(**EVERYTHING), label_set="raw")
        with kind(store, order_of(store), view, on_broken="skip", say=kind_lines.append) as loader:
            batches.append(list(loader.batches(0, 14)))
    for plain, fast in zip(*batches, strict=True):
        assert_equal(fast, plain)
    assert sum(batch.skipped_clips for batch in batches[0]) >= 3
    assert sorted(lines[0]) == sorted(lines[1])
    assert len(lines[0]) == 3


@pytest.mark.parametrize("augment", [{}, EVERYTHING], ids=["plain", "augmented"])
def test_a_step_without_a_readable_clip_is_an_error_at_its_batch(store_path, augment):
    """Two batches come, then the error: no hang in the thread that read ahead."""
    broken_rows = order_of(FeatureStore.open(store_path)).rows_at_step(2)
    store = store_with_broken_rows(store_path, broken_rows)
    view = view_of(store, augment=Augment(**augment))
    loader = DaliLoader(store, order_of(store), view, on_broken="skip", say=str)
    rows, message = rows_until_the_error(loader.batches(0, 14))
    assert len(rows) == 12
    assert "none of the 6 clips" in message


def test_an_error_in_dali_becomes_one_line(store, monkeypatch):
    """Here its source returns a batch of another shape; on a GPU the memory may be too small."""
    stored_values = DaliSource.stored_values

    def misshapen_values(self, info):
        values = stored_values(self, info)
        return [clip[None] for clip in values] if info.iteration == 3 else values

    monkeypatch.setattr(DaliSource, "stored_values", misshapen_values)
    batches = DaliLoader(store, order_of(store), view_of(store)).batches(0, 14)
    with pytest.raises(
        RunError, match=r"DALI failed: .*expected data with 2 dimensions.*--loader plain"
    ) as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="closed"):
        next(batches)


def count_resources() -> tuple[int, int]:
    """Threads of this process, Python's and others, and its open files."""
    gc.collect()
    return len(list(Path("/proc/self/task").iterdir())), len(os.listdir("/proc/self/fd"))


def test_a_hundred_loaders_broken_off_leave_nothing_behind(store):
    """A sweep over settings opens many loaders in one process; each is left after a batch, by every way there is."""
    rows: list[np.ndarray] = []

    def take_one_batch(way: int) -> None:
        loader = DaliLoader(store, order_of(store), view_of(store, frames=16))
        batches = loader.batches(0, 1_000_000)
        rows.append(next(batches).rows_B)
        if way == 0:
            loader.close()
        elif way == 1:
            batches.close()

    for cycle in range(3):
        take_one_batch(cycle)
    threads_before, files_before = count_resources()
    for cycle in range(100):
        take_one_batch(cycle % 3)

    # The last loaders' threads take a moment to end; fewer threads than before: one of an earlier test has ended.
    deadline = time.monotonic() + 30
    while True:
        threads_after, files_after = count_resources()
        if threads_after <= threads_before and files_after <= files_before:
            break
        assert time.monotonic() < deadline, (threads_after, threads_before, files_after, files_before)
        time.sleep(0.1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_a_closed_loader_says_so(store):
    """Half an epoch that ends as if it were whole would be a silent error."""
    with DaliLoader(store, order_of(store), view_of(store)) as loader:
        batches = loader.batches(0, 100)
        next(batches)
    with pytest.raises(RunError, match="closed"):
        next(batches)


def test_large_batches_use_the_same_memory_again(store):
    """32 MiB that are new for every batch are 8,192 page faults, which take longer than all else."""
    order, view = order_of(store, clips=32), view_of(store, frames=2_048)
    with DaliLoader(store, order, view) as loader:
        batches = loader.batches(0, 30)
        for _ in itertools.islice(batches, 10):
            pass
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        assert sum(1 for _ in batches) == 20
        new_batches = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 8_192
        assert new_batches < 5  # as many as may be about at once, which depends on who is faster


def test_where_dali_is_absent_the_plain_loader_says_so(store, monkeypatch, capsys):
    """macOS has no DALI wheels: training works there, and nobody wonders why it is slower."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    loader = open_loader(store, order_of(store), view_of(store))
    assert isinstance(loader, PlainLoader)
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert "plain loader" in stderr


@pytest.mark.parametrize(("kind", "loader"), [("dali", DaliLoader), ("plain", PlainLoader)])
def test_a_loader_is_opened_by_name(store, kind, loader, capsys):
    assert isinstance(open_loader(store, order_of(store), view_of(store), kind=kind), loader)
    assert capsys.readouterr().err == ""


def test_a_loader_of_another_name_is_refused(store):
    with pytest.raises(RunError, match="dali or plain"):
        open_loader(store, order_of(store), view_of(store), kind="torch")


def test_cuda_where_there_is_none_is_refused_in_one_line(store, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RunError, match="device cuda: PyTorch finds 0 CUDA devices; use cpu"):
        open_loader(store, order_of(store), view_of(store), device="cuda")


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("frames", [96, 1_100])
@pytest.mark.parametrize(
    "augment", [{}, *SUBSETS[:5], EVERYTHING], ids=lambda augment: "+".join(augment) or "none"
)
def test_batches_made_on_a_gpu_are_the_plain_ones(any_store, frames, augment):
    """Float32 on both sides; a GPU may round the last bit of a product or a sum another way."""
    view = view_of(any_store, frames=frames, label_set="raw", augment=Augment(**augment))
    with DaliLoader(any_store, order_of(any_store), view, device="cuda") as loader:
        batches = list(loader.batches(0, 14))
    plain = PlainLoader(any_store, order_of(any_store), view)
    for step, batch in enumerate(batches):
        expected = plain.make_batch(step)
        assert batch.mel_BTF.is_cuda
        torch.testing.assert_close(batch.mel_BTF.cpu(), expected.mel_BTF, rtol=1e-6, atol=2e-6)
        assert torch.equal(batch.labels_BC.cpu(), expected.labels_BC)
        assert torch.equal(batch.n_frames_B.cpu(), expected.n_frames_B)


@pytest.mark.gpu
@CUDA
def test_a_gpu_batch_is_not_overwritten_while_it_is_used(store):
    """Its memory is DALI's: work queued on it must be done before DALI takes it back."""
    view = view_of(store, frames=998)
    plain = PlainLoader(store, order_of(store), view)
    sums = []
    with DaliLoader(store, order_of(store), view, device="cuda") as loader:
        for batch in loader.batches(0, 50):
            torch.cuda._sleep(2_000_000)  # the copy below waits on the device while the host runs ahead
            sums.append(batch.mel_BTF.clone())
            del batch
    for step, mel_BTF in enumerate(sums):
        torch.testing.assert_close(mel_BTF.cpu(), plain.make_batch(step).mel_BTF, rtol=1e-6, atol=1e-6)


class ZeroMels:
    """Makes mels of zeros step by step, and calls `action` at step `action_step`."""

    def __init__(
        self, batch_maker: BatchMaker, action_step: int = 10**9, action: Callable[[], None] = lambda: None
    ) -> None:
        self.batch_maker = batch_maker
        self.action_step = action_step
        self.action = action
        self.step = 0

    def __call__(self):
        if self.step == self.action_step:
            self.action()
        cuts = self.batch_maker.cuts_at_step(self.step)
        self.step += 1
        frames, bands = self.batch_maker.view.frames, self.batch_maker.store.bands
        return torch.zeros(self.batch_maker.order.clips, frames, bands), cuts


@pytest.fixture
def batch_maker(store: FeatureStore) -> BatchMaker:
    return BatchMaker(
        store=store,
        order=RowOrder(rows_N=store.good_rows(), clips=6, seed=1),
        view=View(frames=16, mean=0.0, std=1.0),
        device=torch.device("cpu"),
    )


@pytest.fixture(autouse=True, scope="module")
def only_new_objects_are_collected():
    """A collection after every test would walk through all that the imports have made: 0.8 s each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def raise_when_called(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    "error",
    [StoreError("gone"), MemoryError("full"), ZeroDivisionError(), SystemExit(3), KeyboardInterrupt()],
)
@pytest.mark.parametrize("prefetch", [1, 4])
def test_an_error_in_the_thread_is_raised_at_its_batch(batch_maker, error, prefetch):
    """The batches before it come; the error is the thread's own, not a report of its absence."""
    batches = BatchPrefetcher(
        batch_maker, range(10), lambda: ZeroMels(batch_maker, 3, raise_when_called(error)), prefetch
    )
    assert [len(next(batches).rows_B) for _ in range(3)] == [6, 6, 6]
    with pytest.raises(type(error)):
        next(batches)
    with pytest.raises(RunError, match="closed"):
        next(batches)


def test_a_pipeline_that_cannot_be_built_is_an_error_at_the_first_batch(batch_maker):
    """As when a GPU has no memory left."""
    batches = BatchPrefetcher(batch_maker, range(10), raise_when_called(RunError("no memory")), 2)
    with pytest.raises(RunError, match="no memory"):
        next(batches)
    with pytest.raises(RunError, match="closed"):
        next(batches)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_closing_ends_a_wait(batch_maker, prefetch):
    """A trainer's other thread closes the loader while a batch is awaited: the wait ends, with an error."""
    reading, go_on = threading.Event(), threading.Event()

    def stall() -> None:
        reading.set()
        assert go_on.wait(30)

    batches = BatchPrefetcher(batch_maker, range(10), lambda: ZeroMels(batch_maker, 1, stall), prefetch)
    next(batches)
    errors: list[RunError] = []

    def consume() -> None:
        try:
            next(batches)
        except RunError as error:
            errors.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert reading.wait(30)
    closer = threading.Thread(target=batches.close)
    closer.start()
    go_on.set()
    for thread in (consumer, closer):
        thread.join(30)
        assert not thread.is_alive()
    assert "closed" in str(errors[0])


def test_no_more_than_prefetch_batches_are_made_ahead(batch_maker):
    """A slow trainer must not fill the memory; what is ahead of its last batch is `prefetch`."""
    started: list[ZeroMels] = []

    def start_mels() -> ZeroMels:
        started.append(ZeroMels(batch_maker))
        return started[0]

    batches = BatchPrefetcher(batch_maker, range(100), start_mels, 3)
    assert not started
    for taken in range(1, 6):
        next(batches)
        batches._pending_mels[-1].result()
        assert started[0].step == taken + 3
    batches.close()


def test_batches_left_in_the_middle_leave_nothing(batch_maker):
    """Dropped, closed, or closed twice; the fixture looks for threads."""
    for way in range(3):
        batches = BatchPrefetcher(batch_maker, range(10**6), lambda: ZeroMels(batch_maker), 4)
        next(batches)
        for _ in range(way):
            batches.close()
        del batches


def test_the_last_batch_ends_the_thread(batch_maker):
    """A finished epoch holds no thread while the next thing is done; asking again is no error."""
    batches = BatchPrefetcher(batch_maker, range(5, 9), lambda: ZeroMels(batch_maker), 2)
    assert sum(1 for _ in batches) == 4
    assert list(batches) == []
