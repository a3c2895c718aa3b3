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
from pipeline.loading.augment import copy_rolled
from pipeline.loading.loader import Batch, BatchMaker, Loader, PlainLoader, StepCuts, View, resolve_device
from pipeline.loading.sampling import RowOrder
from pipeline.messages import print_to_stderr
from pipeline.store.joined_store import AnyStore

CLOSED_MESSAGE = "the loader was closed while batches were still asked of it"

MelAndCuts = tuple[Tensor, StepCuts]


class BatchPrefetcher(Iterator[Batch]):
    """The batches of some steps, `prefetch` of them made ahead by a thread; for one consumer, closed by anyone.

    `maker` is called with the first batch asked for; what it returns makes the mels, one after the other.
    An error in making a batch is raised where that batch is asked for. After an error, or once closed,
    RunError is raised for every further batch.
    """

    def __init__(
        self,
        batch_maker: BatchMaker,
        steps: range,
        make_mel_function: Callable[[], Callable[[], MelAndCuts]],
        prefetch: int,
    ) -> None:
        self._batch_maker, self._steps, self._make_mel_function, self._prefetch = (
            batch_maker,
            steps,
            make_mel_function,
            prefetch,
        )
        self._next_mel: Callable[[], MelAndCuts] | None = None
        self._pending_mels: deque[Future[MelAndCuts]] = deque()
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._submitted_count, self._yielded_count, self._is_closed = 0, 0, False

    def __next__(self) -> Batch:
        if self._yielded_count == len(self._steps):
            self.close()
            raise StopIteration
        try:
            with self._lock:
                self._submit_ahead()
                made = self._pending_mels.popleft()
            mel_BTF, cuts = made.result()
            batch = self._batch_maker.finish_batch(mel_BTF, cuts)
            with self._lock:
                self._submit_ahead()
        except CancelledError:
            raise RunError(CLOSED_MESSAGE) from None
        except BaseException:
            self.close()
            raise
        self._yielded_count += 1
        return batch

    def _submit_ahead(self) -> None:
        """Have the thread make the batches that are to be ahead."""
        if self._is_closed:
            raise RunError(CLOSED_MESSAGE)
        if self._thread is None or self._next_mel is None:
            self._next_mel = self._make_mel_function()
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        while len(self._pending_mels) < self._prefetch and self._submitted_count < len(self._steps):
            self._pending_mels.append(self._thread.submit(self._next_mel))
            self._submitted_count += 1

    def close(self) -> None:
        """End the thread after the batch it is at; who waits for another is told so."""
        with self._lock:
            self._is_closed, thread = True, self._thread
            self._thread = None
        if thread is not None:
            thread.shutdown(cancel_futures=True)
            self._pending_mels.clear()
            self._next_mel = None  # and what it stands on: buffers, threads

    __del__ = close


DALI_QUEUE_DEPTH = 2  # batches in DALI at once: it computes one while the next is read

# Batches. 1, 2, 4 and 8 differ by less than the noise, as DALI holds DALI_DEPTH more: a trainer that takes
# 20 ms for 16 clips waited 1.1, 1.0, 2.0 and 1.5 ms for the next, on two busy cores; each costs its memory.
PREFETCH_BATCHES = 2

# Host memory from this size on is kept and used again. DALI's own limit is 32 MiB, which are 64 clips of 1024
# frames: up to there every batch was new memory, 126 page faults and 700 us a clip beside 250 us of work.
POOL_THRESHOLD = "1M"


def import_dali() -> Any:
    """The package, told which memory to keep before it allocates any; ImportError where it is not installed."""
    os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", POOL_THRESHOLD)
    import nvidia.dali
    import nvidia.dali.fn

    return nvidia.dali


def next_mel_function(
    batch_maker: BatchMaker, steps: range, threads: int
) -> Callable[[], tuple[torch.Tensor, StepCuts]]:
    """A function that makes the steps' mels one after the other, each with its cuts."""
    source = DaliSource(batch_maker, steps)
    return partial(source.next_mel, build_dali_pipeline(source, threads))


class DaliLoader:
    """Equal to PlainLoader: bit for bit on a CPU, within float32 rounding on a GPU.

    `prefetch` batches are made ahead, `threads` are DALI's own. On a GPU, use a batch on the stream that was
    current when the first of its range was asked for.
    """

    def __init__(
        self,
        store: AnyStore,
        order: RowOrder,
        view: View,
        device: str | torch.device = "cpu",
        *,
        weights_N: np.ndarray | None = None,
        on_broken: Literal["raise", "skip"] = "raise",
        say: Callable[[str], None] = print_to_stderr,
        threads: int = 2,
        prefetch: int = PREFETCH_BATCHES,
    ) -> None:
        self.batch_maker = BatchMaker(
            store=store,
            order=order,
            view=view,
            device=resolve_device(device),
            weights_N=weights_N,
            on_broken=on_broken,
            say=say,
        )
        if min(threads, prefetch) < 1:
            raise ValueError(f"threads and prefetch must be 1 or more, got {threads} and {prefetch}")
        self.threads, self.prefetch = threads, prefetch
        self._open_prefetchers: weakref.WeakSet[BatchPrefetcher] = weakref.WeakSet()

    def batches(self, first_step: int, last_step: int) -> BatchPrefetcher:
        """The batches of steps [first, last); reading ahead begins with the first one asked for."""
        steps = range(first_step, last_step)
        batches = BatchPrefetcher(
            self.batch_maker,
            steps,
            partial(next_mel_function, self.batch_maker, steps, self.threads),
            self.prefetch,
        )
        self._open_prefetchers.add(batches)
        return batches

    def close(self) -> None:
        """Stop reading ahead; who still asks the iterators handed out for batches, or waits for one, is told so."""
        for batches in list(self._open_prefetchers):
            batches.close()
        if "nvidia.dali" in sys.modules:
            import_dali().backend.ReleaseUnusedMemory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DaliSource:
    """What DALI calls for the stored values of a batch, as `[B, view.frames, F]`, and what is done to each clip.

    On a CPU, float16 is widened here: 0.02 ms of a clip by PyTorch against 0.12 ms by DALI's cast.
    Clips that cannot be read end the batches, so that those before them still come, and are told in their turn.
    """

    def __init__(self, batch_maker: BatchMaker, steps: range) -> None:
        self.batch_maker, self.steps = batch_maker, steps
        self.is_on_gpu = batch_maker.device.type == "cuda"
        self.stream = torch.cuda.current_stream(batch_maker.device) if self.is_on_gpu else None
        self.read_failure: StoreError | None = None
        clips, store = batch_maker.order.clips, batch_maker.store
        widen = store.dtype == np.float16 and not self.is_on_gpu
        self.dtype = np.dtype(np.float32) if widen else store.dtype
        # DALI reads these without a copy and is done with one when its batch is out, DALI_DEPTH calls later
        shape = (DALI_QUEUE_DEPTH + 1, clips, batch_maker.view.frames, store.bands)
        self._buffers = torch.from_numpy(np.zeros(shape, self.dtype))
        self._stored_BTF = np.empty((clips, batch_maker.stored_frames, store.bands), store.dtype)
        self._cuts_in_flight: deque[StepCuts] = deque()  # of the batches that DALI is at
        self._read_count = 0

    def stored_values(self, info: Any) -> list[np.ndarray]:
        """The values of a batch; raises StopIteration after the last that can be read."""
        self._read_cuts(info.iteration)
        return list(self._step_buffer(info.iteration).numpy())

    def clip_parameters(self, info: Any) -> list[list[np.ndarray]]:
        """What `names` lists, of each clip of a batch: a centre, boxes to erase, a partner and a share."""
        cuts, clips = self._read_cuts(info.iteration), self.batch_maker.order.clips
        changes, frames, bands = cuts.changes, self.batch_maker.view.frames, self.batch_maker.store.bands
        spans = changes.time_masks_BN2.shape[1]
        starts_BN2, stops_BN2 = (np.zeros((clips, 2 * spans + 1, 2), np.float32) for _ in range(2))
        stops_BN2[:] = frames, bands  # boxes of frames x bands: the masks of each kind, and what is not audio
        starts_BN2[:, :spans, 0], stops_BN2[:, :spans, 0] = np.moveaxis(changes.time_masks_BN2, 2, 0)
        starts_BN2[:, spans:-1, 1], stops_BN2[:, spans:-1, 1] = np.moveaxis(changes.band_masks_BN2, 2, 0)
        starts_BN2[:, -1, 0] = cuts.n_frames_B
        values = {
            "centre": self.batch_maker.stored_means_B(cuts)[:, None, None],
            "anchor": starts_BN2.reshape(clips, -1),
            "shape": (stops_BN2 - starts_BN2).reshape(clips, -1),
            "partner": changes.partners_B.astype(np.int32),
            "share": changes.shares_B,
        }
        return [list(values[name]) for name in self.parameter_names]

    @property
    def parameter_names(self) -> list[str]:
        """The numbers of each clip that the view's augmentations need."""
        augment = self.batch_maker.view.augment
        erases, mixes = augment.has_masks or augment.has_mixup, augment.has_mixup
        return (
            ["centre"] * (augment.gain_db > 0) + ["anchor", "shape"] * erases + ["partner", "share"] * mixes
        )

    def _step_buffer(self, iteration: int) -> torch.Tensor:
        return self._buffers[iteration % len(self._buffers)]

    def _read_cuts(self, iteration: int) -> StepCuts:
        """The cuts of a batch, whose values are read into its buffer by whichever of DALI's calls comes first."""
        if self.read_failure is not None or iteration >= len(self.steps):
            raise StopIteration
        if iteration == self._read_count:
            try:
                cuts, stored_BTF = self.batch_maker.read_step(self.steps[iteration], self._stored_BTF)
            except StoreError as error:
                self.read_failure = error
                raise StopIteration from None
            mel_BTF = self._step_buffer(iteration)
            copy_rolled(torch.from_numpy(stored_BTF), mel_BTF, cuts.changes.rolls_B, cuts.n_frames_B)
            self._cuts_in_flight.append(cuts)
            self._read_count += 1
        return self._cuts_in_flight[-1]

    def next_mel(self, dali_pipeline: Any) -> tuple[torch.Tensor, StepCuts]:
        """The next batch's mel, in DALI's memory, and its cuts; raises the StoreError that ended the batches."""
        try:
            (mel_BTF,) = dali_pipeline.run(self.stream)
        except StopIteration:
            assert self.read_failure is not None, "more batches were asked for than the source has steps"
            raise self.read_failure from None
        except RuntimeError as error:  # DALI's only kind
            told = str(error).partition("encountered:")[2] or str(error)
            why = next((line for line in told.splitlines() if line), "no reason told")
            raise RunError(f"DALI failed: {why}; --loader plain makes the same batches without it") from error
        with torch.cuda.stream(self.stream):  # the stream that waits for DALI's; on a CPU there is none
            return torch.from_dlpack(mel_BTF.as_tensor()), self._cuts_in_flight.popleft()


def build_dali_pipeline(source: DaliSource, threads: int) -> Any:
    """A built DALI pipeline from stored to normalised and augmented values; what is off is not in it.

    `fn.normalize` is (x - mean) * (1 / stddev) in float32, to the bit what the plain loader computes.
    """
    feed = source.batch_maker
    fn, types = import_dali().fn, import_dali().types
    pipe = import_dali().Pipeline(
        batch_size=feed.order.clips,
        num_threads=threads,
        device_id=feed.device.index if source.is_on_gpu else None,
        prefetch_queue_depth=DALI_QUEUE_DEPTH,
        exec_dynamic=True,  # outputs live as long as their tensors: no copy into PyTorch
        py_start_method="spawn",
    )
    dtypes = {"float16": types.FLOAT16, "float32": types.FLOAT, "uint8": types.UINT8}
    with pipe:
        mel_TF = fn.external_source(
            source=source.stored_values,
            batch=True,
            batch_info=True,
            dtype=dtypes[source.dtype.name],
            ndim=2,
            no_copy=not source.is_on_gpu,
        )
        if source.is_on_gpu:
            mel_TF = mel_TF.gpu()
        if source.dtype == np.float16:
            mel_TF = fn.cast(mel_TF, dtype=types.FLOAT)
        numbers = parameter_inputs(source)
        centre = numbers.get("centre", float(feed.stored_mean))
        mel_TF = fn.normalize(mel_TF, mean=centre, stddev=float(feed.stored_std))
        if "anchor" in numbers:
            anchor, shape = numbers["anchor"], numbers["shape"]
            mel_TF = fn.erase(mel_TF, anchor=anchor, shape=shape, axes=(0, 1), fill_value=0.0)
        if "share" in numbers:
            share = numbers["share"].gpu() if source.is_on_gpu else numbers["share"]
            partner_TF = fn.permute_batch(mel_TF, indices=numbers["partner"])
            mel_TF = mel_TF * share + partner_TF * (1.0 - share)
        pipe.set_outputs(mel_TF)
    pipe.build()
    return pipe


def parameter_inputs(source: DaliSource) -> dict[str, Any]:
    """DALI's inputs for the numbers of each clip, by name."""
    if not source.parameter_names:
        return {}
    dali_types = import_dali().types
    kinds = {
        "centre": (dali_types.FLOAT, 2),
        "anchor": (dali_types.FLOAT, 1),
        "shape": (dali_types.FLOAT, 1),
        "partner": (dali_types.INT32, 0),
        "share": (dali_types.FLOAT, 0),
    }
    inputs = import_dali().fn.external_source(
        source=source.clip_parameters,
        num_outputs=len(source.parameter_names),
        batch=True,
        batch_info=True,
        dtype=[kinds[name][0] for name in source.parameter_names],
        ndim=[kinds[name][1] for name in source.parameter_names],
    )
    return dict(zip(source.parameter_names, inputs, strict=True))


def open_loader(
    store: AnyStore,
    order: RowOrder,
    view: View,
    *,
    kind: Literal["dali", "plain"] = "dali",
    device: str | torch.device = "cpu",
    weights_N: np.ndarray | None = None,
    on_broken: Literal["raise", "skip"] = "raise",
    say: Callable[[str], None] = print_to_stderr,
) -> Loader:
    """The loader asked for; where DALI cannot be imported, the plain one, and a line on stderr says so."""
    if kind not in ("dali", "plain"):
        raise RunError(f"loader must be dali or plain, got {kind!r}")
    if kind == "dali":
        try:
            import_dali()
        except ImportError as error:
            say(f"{error}: reading with the plain loader, equal but slower")
            kind = "plain"
    loader = DaliLoader if kind == "dali" else PlainLoader
    return loader(store, order, view, device, weights_N=weights_N, on_broken=on_broken, say=say)
