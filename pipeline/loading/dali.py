"""ReadAhead: batches made by a thread before they are asked for.

The fast loader: the plain loader's batches, read ahead of the trainer and computed by NVIDIA DALI.

A thread of ours drives the DALI pipeline, because DALI calls a serial source in the thread that asks for a
batch: without it, every step would wait for its reads. On a GPU the stored values are uploaded as they are;
DALI casts, normalises and augments them there, and the tensors share its device memory. The graph is the same
on a CPU and on a GPU; each of its operators gives the plain loader's values to the bit on a CPU.
"""

import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import RunError, StoreError
from pipeline.loading.augment import place
from pipeline.loading.loader import Batch, Cuts, Feed, Loader, PlainLoader, View, device_of
from pipeline.loading.sampling import Order
from pipeline.messages import to_stderr
from pipeline.store.joined_store import AnyStore

CLOSED = "the loader was closed while batches were still asked of it"

Made = tuple[Tensor, Cuts]


class ReadAhead(Iterator[Batch]):
    """The batches of some steps, `prefetch` of them made ahead by a thread; for one consumer, closed by anyone.

    `maker` is called with the first batch asked for; what it returns makes the mels, one after the other.
    An error in making a batch is raised where that batch is asked for. After an error, or once closed,
    RunError is raised for every further batch.
    """

    def __init__(
        self, feed: Feed, steps: range, maker: Callable[[], Callable[[], Made]], prefetch: int
    ) -> None:
        self._feed, self._steps, self._maker, self._prefetch = feed, steps, maker, prefetch
        self._make: Callable[[], Made] | None = None
        self._made: deque[Future[Made]] = deque()
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._submitted, self._yielded, self._closed = 0, 0, False

    def __next__(self) -> Batch:
        if self._yielded == len(self._steps):
            self.close()
            raise StopIteration
        try:
            with self._lock:
                self._fill()
                made = self._made.popleft()
            mel_BTF, cuts = made.result()
            batch = self._feed.batch(mel_BTF, cuts)
            with self._lock:
                self._fill()
        except CancelledError:
            raise RunError(CLOSED) from None
        except BaseException:
            self.close()
            raise
        self._yielded += 1
        return batch

    def _fill(self) -> None:
        """Have the thread make the batches that are to be ahead."""
        if self._closed:
            raise RunError(CLOSED)
        if self._thread is None or self._make is None:
            self._make = self._maker()
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        while len(self._made) < self._prefetch and self._submitted < len(self._steps):
            self._made.append(self._thread.submit(self._make))
            self._submitted += 1

    def close(self) -> None:
        """End the thread after the batch it is at; who waits for another is told so."""
        with self._lock:
            self._closed, thread = True, self._thread
            self._thread = None
        if thread is not None:
            thread.shutdown(cancel_futures=True)
            self._made.clear()
            self._make = None  # and what it stands on: buffers, threads

    __del__ = close


DALI_DEPTH = 2  # batches in DALI at once: it computes one while the next is read

# Batches. 1, 2, 4 and 8 differ by less than the noise, as DALI holds DALI_DEPTH more: a trainer that takes
# 20 ms for 16 clips waited 1.1, 1.0, 2.0 and 1.5 ms for the next, on two busy cores; each costs its memory.
PREFETCH = 2

# Host memory from this size on is kept and used again. DALI's own limit is 32 MiB, which are 64 clips of 1024
# frames: up to there every batch was new memory, 126 page faults and 700 us a clip beside 250 us of work.
POOLED_FROM = "1M"


def dali() -> Any:
    """The package, told which memory to keep before it allocates any; ImportError where it is not installed."""
    os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", POOLED_FROM)
    import nvidia.dali
    import nvidia.dali.fn

    return nvidia.dali


def maker(feed: Feed, steps: range, threads: int) -> Callable[[], tuple[torch.Tensor, Cuts]]:
    """A function that makes the steps' mels one after the other, each with its cuts."""
    source = Source(feed, steps)
    return partial(source.make, pipeline_of(source, threads))


class DaliLoader:
    """Equal to PlainLoader: bit for bit on a CPU, within float32 rounding on a GPU.

    `prefetch` batches are made ahead, `threads` are DALI's own. On a GPU, use a batch on the stream that was
    current when the first of its range was asked for.
    """

    def __init__(
        self,
        store: AnyStore,
        order: Order,
        view: View,
        device: str | torch.device = "cpu",
        *,
        weights_N: np.ndarray | None = None,
        on_broken: Literal["raise", "skip"] = "raise",
        say: Callable[[str], None] = to_stderr,
        threads: int = 2,
        prefetch: int = PREFETCH,
    ) -> None:
        self.feed = Feed(
            store=store,
            order=order,
            view=view,
            device=device_of(device),
            weights_N=weights_N,
            on_broken=on_broken,
            say=say,
        )
        if min(threads, prefetch) < 1:
            raise ValueError(f"threads and prefetch must be 1 or more, got {threads} and {prefetch}")
        self.threads, self.prefetch = threads, prefetch
        self._running: weakref.WeakSet[ReadAhead] = weakref.WeakSet()

    def batches(self, first_step: int, last_step: int) -> ReadAhead:
        """The batches of steps [first, last); reading ahead begins with the first one asked for."""
        steps = range(first_step, last_step)
        batches = ReadAhead(self.feed, steps, partial(maker, self.feed, steps, self.threads), self.prefetch)
        self._running.add(batches)
        return batches

    def close(self) -> None:
        """Stop reading ahead; who still asks the iterators handed out for batches, or waits for one, is told so."""
        for batches in list(self._running):
            batches.close()
        if "nvidia.dali" in sys.modules:
            dali().backend.ReleaseUnusedMemory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Source:
    """What DALI calls for the stored values of a batch, as `[B, view.frames, F]`, and what is done to each clip.

    On a CPU, float16 is widened here: 0.02 ms of a clip by PyTorch against 0.12 ms by DALI's cast.
    Clips that cannot be read end the batches, so that those before them still come, and are told in their turn.
    """

    def __init__(self, feed: Feed, steps: range) -> None:
        self.feed, self.steps = feed, steps
        self.on_gpu = feed.device.type == "cuda"
        self.stream = torch.cuda.current_stream(feed.device) if self.on_gpu else None
        self.failure: StoreError | None = None
        clips, store = feed.order.clips, feed.store
        widen = store.dtype == np.float16 and not self.on_gpu
        self.dtype = np.dtype(np.float32) if widen else store.dtype
        # DALI reads these without a copy and is done with one when its batch is out, DALI_DEPTH calls later
        shape = (DALI_DEPTH + 1, clips, feed.view.frames, store.bands)
        self._buffers = torch.from_numpy(np.zeros(shape, self.dtype))
        self._stored_BTF = np.empty((clips, feed.frames, store.bands), store.dtype)
        self._read: deque[Cuts] = deque()  # of the batches that DALI is at
        self._reads = 0

    def stored(self, info: Any) -> list[np.ndarray]:
        """The values of a batch; raises StopIteration after the last that can be read."""
        self._cuts(info.iteration)
        return list(self._buffer(info.iteration).numpy())

    def numbers(self, info: Any) -> list[list[np.ndarray]]:
        """What `names` lists, of each clip of a batch: a centre, boxes to erase, a partner and a share."""
        cuts, clips = self._cuts(info.iteration), self.feed.order.clips
        changes, frames, bands = cuts.changes, self.feed.view.frames, self.feed.store.bands
        spans = changes.time_masks_BN2.shape[1]
        starts_BN2, stops_BN2 = (np.zeros((clips, 2 * spans + 1, 2), np.float32) for _ in range(2))
        stops_BN2[:] = frames, bands  # boxes of frames x bands: the masks of each kind, and what is not audio
        starts_BN2[:, :spans, 0], stops_BN2[:, :spans, 0] = np.moveaxis(changes.time_masks_BN2, 2, 0)
        starts_BN2[:, spans:-1, 1], stops_BN2[:, spans:-1, 1] = np.moveaxis(changes.band_masks_BN2, 2, 0)
        starts_BN2[:, -1, 0] = cuts.n_frames_B
        values = {
            "centre": self.feed.centres_B(cuts)[:, None, None],
            "anchor": starts_BN2.reshape(clips, -1),
            "shape": (stops_BN2 - starts_BN2).reshape(clips, -1),
            "partner": changes.partners_B.astype(np.int32),
            "share": changes.shares_B,
        }
        return [list(values[name]) for name in self.names]

    @property
    def names(self) -> list[str]:
        """The numbers of each clip that the view's augmentations need."""
        augment = self.feed.view.augment
        erases, mixes = augment.masks or augment.mixes, augment.mixes
        return (
            ["centre"] * (augment.gain_db > 0) + ["anchor", "shape"] * erases + ["partner", "share"] * mixes
        )

    def _buffer(self, iteration: int) -> torch.Tensor:
        return self._buffers[iteration % len(self._buffers)]

    def _cuts(self, iteration: int) -> Cuts:
        """The cuts of a batch, whose values are read into its buffer by whichever of DALI's calls comes first."""
        if self.failure is not None or iteration >= len(self.steps):
            raise StopIteration
        if iteration == self._reads:
            try:
                cuts, stored_BTF = self.feed.read(self.steps[iteration], self._stored_BTF)
            except StoreError as error:
                self.failure = error
                raise StopIteration from None
            mel_BTF = self._buffer(iteration)
            place(torch.from_numpy(stored_BTF), mel_BTF, cuts.changes.rolls_B, cuts.n_frames_B)
            self._read.append(cuts)
            self._reads += 1
        return self._read[-1]

    def make(self, pipe: Any) -> tuple[torch.Tensor, Cuts]:
        """The next batch's mel, in DALI's memory, and its cuts; raises the StoreError that ended the batches."""
        try:
            (mel_BTF,) = pipe.run(self.stream)
        except StopIteration:
            assert self.failure is not None, "more batches were asked for than the source has steps"
            raise self.failure from None
        except RuntimeError as error:  # DALI's only kind
            told = str(error).partition("encountered:")[2] or str(error)
            why = next((line for line in told.splitlines() if line), "no reason told")
            raise RunError(f"DALI failed: {why}; --loader plain makes the same batches without it") from error
        with torch.cuda.stream(self.stream):  # the stream that waits for DALI's; on a CPU there is none
            return torch.from_dlpack(mel_BTF.as_tensor()), self._read.popleft()


def pipeline_of(source: Source, threads: int) -> Any:
    """A built DALI pipeline from stored to normalised and augmented values; what is off is not in it.

    `fn.normalize` is (x - mean) * (1 / stddev) in float32, to the bit what the plain loader computes.
    """
    feed = source.feed
    fn, types = dali().fn, dali().types
    pipe = dali().Pipeline(
        batch_size=feed.order.clips,
        num_threads=threads,
        device_id=feed.device.index if source.on_gpu else None,
        prefetch_queue_depth=DALI_DEPTH,
        exec_dynamic=True,  # outputs live as long as their tensors: no copy into PyTorch
        py_start_method="spawn",
    )
    dtypes = {"float16": types.FLOAT16, "float32": types.FLOAT, "uint8": types.UINT8}
    with pipe:
        mel_TF = fn.external_source(
            source=source.stored,
            batch=True,
            batch_info=True,
            dtype=dtypes[source.dtype.name],
            ndim=2,
            no_copy=not source.on_gpu,
        )
        if source.on_gpu:
            mel_TF = mel_TF.gpu()
        if source.dtype == np.float16:
            mel_TF = fn.cast(mel_TF, dtype=types.FLOAT)
        numbers = numbers_of(source)
        centre = numbers.get("centre", float(feed.centre))
        mel_TF = fn.normalize(mel_TF, mean=centre, stddev=float(feed.spread))
        if "anchor" in numbers:
            anchor, shape = numbers["anchor"], numbers["shape"]
            mel_TF = fn.erase(mel_TF, anchor=anchor, shape=shape, axes=(0, 1), fill_value=0.0)
        if "share" in numbers:
            share = numbers["share"].gpu() if source.on_gpu else numbers["share"]
            partner_TF = fn.permute_batch(mel_TF, indices=numbers["partner"])
            mel_TF = mel_TF * share + partner_TF * (1.0 - share)
        pipe.set_outputs(mel_TF)
    pipe.build()
    return pipe


def numbers_of(source: Source) -> dict[str, Any]:
    """DALI's inputs for the numbers of each clip, by name."""
    if not source.names:
        return {}
    dali_types = dali().types
    kinds = {
        "centre": (dali_types.FLOAT, 2),
        "anchor": (dali_types.FLOAT, 1),
        "shape": (dali_types.FLOAT, 1),
        "partner": (dali_types.INT32, 0),
        "share": (dali_types.FLOAT, 0),
    }
    inputs = dali().fn.external_source(
        source=source.numbers,
        num_outputs=len(source.names),
        batch=True,
        batch_info=True,
        dtype=[kinds[name][0] for name in source.names],
        ndim=[kinds[name][1] for name in source.names],
    )
    return dict(zip(source.names, inputs, strict=True))


def open_loader(
    store: AnyStore,
    order: Order,
    view: View,
    *,
    kind: Literal["dali", "plain"] = "dali",
    device: str | torch.device = "cpu",
    weights_N: np.ndarray | None = None,
    on_broken: Literal["raise", "skip"] = "raise",
    say: Callable[[str], None] = to_stderr,
) -> Loader:
    """The loader asked for; where DALI cannot be imported, the plain one, and a line on stderr says so."""
    if kind not in ("dali", "plain"):
        raise RunError(f"loader must be dali or plain, got {kind!r}")
    if kind == "dali":
        try:
            dali()
        except ImportError as error:
            say(f"{error}: reading with the plain loader, equal but slower")
            kind = "plain"
    loader = DaliLoader if kind == "dali" else PlainLoader
    return loader(store, order, view, device, weights_N=weights_N, on_broken=on_broken, say=say)
