"""The fast loader: the plain loader's batches, read ahead of the trainer and normalised by NVIDIA DALI.

A thread of ours drives the DALI pipeline, because DALI calls a serial source in the thread that asks for a
batch: without it, every step would wait for its reads. On a GPU the stored values are uploaded as they are,
DALI casts and normalises them there, and the tensors share its device memory.
"""

import sys
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Literal, Self

import numpy as np
import torch

from pipeline.errors import RunError, StoreError
from pipeline.joined import AnyStore
from pipeline.loader import Batch, Feed, Loader, PlainLoader, View, device_of
from pipeline.order import Order

DALI_DEPTH = 2  # batches in DALI at once: it normalises one while the next is read


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
        threads: int = 2,
        prefetch: int = 2,
    ) -> None:
        self.feed = Feed(store=store, order=order, view=view, device=device_of(device), weights_N=weights_N)
        self.threads, self.prefetch = threads, prefetch
        self._running: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The batches of steps [first, last); reading ahead begins with the first one asked for."""
        batches = self._batches(range(first_step, last_step))
        self._running.add(batches)
        return batches

    def _batches(self, steps: range) -> Generator[Batch, None, None]:
        source = Source(self.feed, steps)
        pipe = pipeline_of(source, self.threads)
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as thread:
            made = (thread.submit(source.next_mel, pipe) for _ in steps)
            ahead = deque(islice(made, self.prefetch))
            try:
                for step in steps:
                    mel_BTF = torch.from_dlpack(ahead.popleft().result())
                    ahead.extend(islice(made, 1))
                    yield self.feed.batch(mel_BTF, self.feed.cuts(step))
            finally:
                thread.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Stop reading ahead; the iterators handed out are over."""
        for batches in list(self._running):
            batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Source:
    """What DALI calls for the stored values of a batch, as `[B, view.frames, F]`.

    On a CPU, float16 is widened here: 0.02 ms of a clip by PyTorch against 0.12 ms by DALI's cast.
    A clip that cannot be read ends the batches, so that those before it still come, and is told in its turn.
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

    def __call__(self, info: Any) -> list[np.ndarray]:
        if self.failure is not None or info.iteration >= len(self.steps):
            raise StopIteration
        try:
            self.feed.read(self.feed.cuts(self.steps[info.iteration]), self._stored_BTF)
        except StoreError as error:
            self.failure = error
            raise StopIteration from None
        buffer_BTF = self._buffers[info.iteration % len(self._buffers)]
        buffer_BTF[:, : self.feed.frames].copy_(torch.from_numpy(self._stored_BTF))
        return list(buffer_BTF.numpy())

    def next_mel(self, pipe: Any) -> Any:
        """The next normalised batch, a DALI tensor; raises the StoreError that ended the batches."""
        try:
            (mel_BTF,) = pipe.run(self.stream)
        except StopIteration:
            assert self.failure is not None, "more batches were asked for than the source has steps"
            raise self.failure from None
        return mel_BTF.as_tensor()


def pipeline_of(source: Source, threads: int) -> Any:
    """A built DALI pipeline from stored to normalised values.

    `fn.normalize` is (x - mean) * (1 / stddev) in float32, to the bit what the plain loader computes.
    """
    from nvidia.dali import Pipeline, fn
    from nvidia.dali.types import DALIDataType

    feed = source.feed
    pipe = Pipeline(
        batch_size=feed.order.clips,
        num_threads=threads,
        device_id=feed.device.index if source.on_gpu else None,
        prefetch_queue_depth=DALI_DEPTH,
        exec_dynamic=True,  # outputs live as long as their tensors: no copy into PyTorch
        py_start_method="spawn",
    )
    float32 = DALIDataType.FLOAT
    dtypes = {"float16": DALIDataType.FLOAT16, "float32": float32, "uint8": DALIDataType.UINT8}
    centre, spread = feed.centre_and_spread
    with pipe:
        stored_TF = fn.external_source(
            source=source,
            batch=True,
            batch_info=True,
            dtype=dtypes[source.dtype.name],
            ndim=2,
            no_copy=not source.on_gpu,
        )
        if source.on_gpu:
            stored_TF = stored_TF.gpu()
        if source.dtype == np.float16:
            stored_TF = fn.cast(stored_TF, dtype=float32)
        pipe.set_outputs(fn.normalize(stored_TF, mean=float(centre), stddev=float(spread)))
    pipe.build()
    return pipe


def open_loader(
    store: AnyStore,
    order: Order,
    view: View,
    *,
    kind: Literal["dali", "plain"] = "dali",
    device: str | torch.device = "cpu",
    weights_N: np.ndarray | None = None,
) -> Loader:
    """The loader asked for; where DALI cannot be imported, the plain one, and a line on stderr says so."""
    if kind not in ("dali", "plain"):
        raise RunError(f"loader must be dali or plain, got {kind!r}")
    if kind == "dali":
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            print(f"{error}: reading with the plain loader, equal but slower", file=sys.stderr)
            kind = "plain"
    loader = DaliLoader if kind == "dali" else PlainLoader
    return loader(store, order, view, device, weights_N=weights_N)
