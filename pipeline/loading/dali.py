"""The fast loader: a thread reads batches ahead and NVIDIA DALI computes them; only this file imports DALI.

A separate thread runs the DALI pipeline, because DALI calls a serial source in the thread that requests a batch:
without the thread, every step would wait for its reads. On a GPU, the stored values are uploaded unchanged. DALI casts,
normalises and augments them there, and the tensors share DALI's device memory. The graph is the same on a CPU and on a
GPU. On a CPU each operator gives exactly the same bits as the plain loader.
"""

import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, Self, Unpack

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import RunError, StoreError
from pipeline.loading.augment import copy_rolled
from pipeline.loading.loader import (
    Batch,
    BatchMaker,
    BrokenClipOptions,
    Loader,
    PlainLoader,
    StepCuts,
    View,
    resolve_device,
)
from pipeline.loading.sampling import RowOrder
from pipeline.loading.transfer import pin_for_device, use_device
from pipeline.messages import print_to_stderr
from pipeline.store.joined_store import AnyStore

CLOSED_MESSAGE = "the loader was closed while batches were still asked of it"

DALI_QUEUE_DEPTH = 2  # batches in DALI at the same time: DALI computes one while the next is read

# Default number of batches that are made ahead. Measured for 1, 2, 4 and 8, on two busy cores: a trainer that needs
# 20 ms for 16 clips waited 1.1, 1.0, 2.0 and 1.5 ms for the next batch. The differences are within the noise, because
# DALI holds DALI_QUEUE_DEPTH more batches. Each batch costs its memory.
PREFETCH_BATCHES = 2

# DALI reuses host buffers of at least this size. Its default is 32 MiB (64 clips of 1024 frames). With the default,
# every smaller batch was allocated anew: 126 page faults and 700 us a clip, compared with 250 us of computing.
POOL_THRESHOLD = "1M"

MelAndCuts = tuple[Tensor, StepCuts]


class BatchPrefetcher(Iterator[Batch]):
    """Yields the batches of a range of steps; a thread makes `prefetch` batches ahead.

    Only one thread may request batches; any thread may call `close`. The request for the first batch calls
    `make_mel_function`, which returns the function that makes the mels, one step after the other. An error in making a
    batch is raised by the request for that batch. After an error or `close`, every further request raises RunError.
    """

    def __init__(
        self,
        batch_maker: BatchMaker,
        steps: range,
        make_mel_function: Callable[[], Callable[[], MelAndCuts]],
        prefetch: int,
    ) -> None:
        self._batch_maker = batch_maker
        self._steps = steps
        self._make_mel_function = make_mel_function
        self._prefetch = prefetch

        # One thread requests batches while another may call `close`: the lock guards the state that both change.
        self._lock = threading.Lock()
        self._next_mel: Callable[[], MelAndCuts] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._pending_mels: deque[Future[MelAndCuts]] = deque()
        self._submitted_count = 0
        self._yielded_count = 0
        self._is_closed = False

    def __next__(self) -> Batch:
        if self._yielded_count == len(self._steps):
            self.close()
            raise StopIteration
        try:
            # Wait for this batch without the lock, so that `close` can end the wait.
            with self._lock:
                self._submit_ahead()
                pending_mel = self._pending_mels.popleft()
            mel_BTF, cuts = pending_mel.result()
            batch = self._batch_maker.finish_batch(mel_BTF, cuts)

            # The thread makes the next mels while the consumer uses this batch.
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
        """Submit steps to the thread until `prefetch` mels are pending; the first call starts the thread."""
        if self._is_closed:
            raise RunError(CLOSED_MESSAGE)

        # The pipeline is built in the consumer's thread, on its current stream.
        if self._thread is None or self._next_mel is None:
            self._next_mel = self._make_mel_function()
            device = self._batch_maker.device
            self._thread = ThreadPoolExecutor(
                1, thread_name_prefix="loader", initializer=use_device, initargs=(device,)
            )
        while len(self._pending_mels) < self._prefetch and self._submitted_count < len(self._steps):
            self._pending_mels.append(self._thread.submit(self._next_mel))
            self._submitted_count += 1

    def close(self) -> None:
        """End the thread after its current batch; a consumer that waits for a later batch gets RunError."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
            self._thread = None

        # Wait for the thread without the lock: the consumer needs the lock to see that the prefetcher is closed.
        if thread is not None:
            thread.shutdown(cancel_futures=True)
            self._pending_mels.clear()
            self._next_mel = None  # frees its DALI pipeline, with buffers and threads

    __del__ = close


def import_dali() -> Any:
    """Return the DALI package, configured before it allocates memory; raises ImportError if DALI is not installed."""
    os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", POOL_THRESHOLD)
    import nvidia.dali
    import nvidia.dali.fn

    return nvidia.dali


def next_mel_function(batch_maker: BatchMaker, steps: range, threads: int) -> Callable[[], MelAndCuts]:
    """Return a function that returns the mel of the next step, computed by DALI, and its cuts on each call."""
    source = DaliSource(batch_maker, steps)
    return partial(source.next_mel, build_dali_pipeline(source, threads))


class DaliLoader:
    """Makes the batches of PlainLoader, bit for bit on a CPU and within float32 rounding on a GPU.

    `prefetch` batches are made ahead; DALI computes in `threads` threads. On a GPU, use each batch on the CUDA stream
    that was current when the first batch of the range was requested.
    """

    def __init__(
        self,
        store: AnyStore,
        order: RowOrder,
        view: View,
        device: str | torch.device = "cpu",
        *,
        threads: int = 2,
        prefetch: int = PREFETCH_BATCHES,
        **broken_clips: Unpack[BrokenClipOptions],
    ) -> None:
        if min(threads, prefetch) < 1:
            raise ValueError(f"threads and prefetch must be 1 or more, got {threads} and {prefetch}")
        self.batch_maker = BatchMaker(
            store=store, order=order, view=view, device=resolve_device(device), **broken_clips
        )
        self.threads = threads
        self.prefetch = prefetch
        self._open_prefetchers: weakref.WeakSet[BatchPrefetcher] = weakref.WeakSet()

    def batches(self, first_step: int, last_step: int) -> BatchPrefetcher:
        """Yield the batches of steps [first, last); reading ahead begins with the request for the first batch."""
        steps = range(first_step, last_step)
        make_mel_function = partial(next_mel_function, self.batch_maker, steps, self.threads)
        prefetcher = BatchPrefetcher(self.batch_maker, steps, make_mel_function, self.prefetch)
        self._open_prefetchers.add(prefetcher)
        return prefetcher

    def close(self) -> None:
        """Stop reading ahead; an iterator of `batches` that is still in use raises RunError."""
        for prefetcher in list(self._open_prefetchers):
            prefetcher.close()
        if "nvidia.dali" in sys.modules:
            import_dali().backend.ReleaseUnusedMemory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DaliSource:
    """Feeds DALI with the stored values of a batch, `[B, view.frames, F]`, and the parameters of each clip.

    To DALI, a read failure is the end of the batches; `next_mel` raises it after it has returned all earlier batches.
    """

    def __init__(self, batch_maker: BatchMaker, steps: range) -> None:
        self.batch_maker = batch_maker
        self.steps = steps
        self.is_on_gpu = batch_maker.device.type == "cuda"
        self.stream = torch.cuda.current_stream(batch_maker.device) if self.is_on_gpu else None
        self.read_failure: StoreError | None = None
        self._cuts_in_flight: deque[StepCuts] = deque()  # cuts of the batches that DALI has not returned yet
        self._read_count = 0

        # On a CPU, PyTorch converts float16 to float32 here: 0.02 ms a clip, against 0.12 ms by DALI's cast.
        views = batch_maker.views
        store = batch_maker.store
        self.dtype = store.dtype
        if store.dtype == np.float16 and not self.is_on_gpu:
            self.dtype = np.dtype(np.float32)

        # DALI reads these buffers without a copy, and uses each until its batch is returned, DALI_QUEUE_DEPTH calls
        # later. On a GPU they are uploaded straight from pinned memory: a copy of them on the host would hold the
        # interpreter for milliseconds.
        shape = (DALI_QUEUE_DEPTH + 1, views, batch_maker.view.frames, store.bands)
        self._buffers = pin_for_device(torch.from_numpy(np.zeros(shape, self.dtype)), batch_maker.device)
        self._uploads: list[torch.cuda.Event | None] = [None] * len(self._buffers)
        self._returned_count = 0
        self._stored_BTF = np.empty((views, batch_maker.stored_frames, store.bands), store.dtype)

    def stored_values(self, info: Any) -> list[np.ndarray]:
        """Return the stored values of a batch, clip by clip; StopIteration after the last batch that can be read."""
        self._read_cuts(info.iteration)
        return list(self._step_buffer(info.iteration).numpy())

    def clip_parameters(self, info: Any) -> list[list[np.ndarray]]:
        """Return the values of each of `parameter_names`: mean, boxes to set to 0, partner and share of every clip."""
        cuts = self._read_cuts(info.iteration)
        changes = cuts.changes
        clips, spans, _ = changes.time_masks_BN2.shape

        # Boxes of frames x bands that are set to 0: time masks, then band masks, then the padding.
        starts_BN2 = np.zeros((clips, 2 * spans + 1, 2), np.float32)
        stops_BN2 = np.zeros((clips, 2 * spans + 1, 2), np.float32)
        stops_BN2[:] = self.batch_maker.view.frames, self.batch_maker.store.bands
        starts_BN2[:, :spans, 0], stops_BN2[:, :spans, 0] = np.moveaxis(changes.time_masks_BN2, 2, 0)
        starts_BN2[:, spans:-1, 1], stops_BN2[:, spans:-1, 1] = np.moveaxis(changes.band_masks_BN2, 2, 0)
        starts_BN2[:, -1, 0] = cuts.n_frames_B

        # DALI takes a list of arrays, one for each clip.
        values = {
            "mean": self.batch_maker.stored_means_B(cuts)[:, None, None],
            "anchor": starts_BN2.reshape(clips, -1),
            "shape": (stops_BN2 - starts_BN2).reshape(clips, -1),
            "partner": changes.partners_B.astype(np.int32),
            "share": changes.shares_B,
        }
        return [list(values[name]) for name in self.parameter_names]

    @property
    def parameter_names(self) -> list[str]:
        """The names of the clip parameters that the view's augmentation needs."""
        augment = self.batch_maker.view.augment
        names = []
        if augment.gain_db > 0:
            names.append("mean")
        if augment.has_masks or augment.has_mixup:
            names += ["anchor", "shape"]
        if augment.has_mixup:
            names += ["partner", "share"]
        return names

    def _step_buffer(self, iteration: int) -> torch.Tensor:
        return self._buffers[iteration % len(self._buffers)]

    def _wait_for_upload(self, iteration: int) -> None:
        """Wait until the buffer of this batch may be written: the batch that it held before has left it.

        That batch was returned before, but on a GPU it may still be on its way, like all that was queued before it.
        """
        upload = self._uploads[iteration % len(self._buffers)]
        if upload is not None:
            upload.synchronize()

    def _note_upload(self) -> None:
        """Mark when the buffer of the batch that DALI has just returned is free: the consumer's stream waits for it."""
        if self.stream is not None:
            upload = torch.cuda.Event()
            upload.record(self.stream)
            self._uploads[self._returned_count % len(self._buffers)] = upload
        self._returned_count += 1

    def _read_cuts(self, iteration: int) -> StepCuts:
        """Return the cuts of a batch; the first call for a batch also reads its values into a buffer."""
        # Tell DALI that the batches end; `next_mel` raises the failure.
        if self.read_failure is not None or iteration >= len(self.steps):
            raise StopIteration

        # If clips have parameters, DALI calls twice for each batch: only the first call reads.
        if iteration == self._read_count:
            try:
                cuts, stored_BTF = self.batch_maker.read_step(self.steps[iteration], self._stored_BTF)
            except StoreError as error:
                self.read_failure = error
                raise StopIteration from None
            mel_BTF = self._step_buffer(iteration)
            self._wait_for_upload(iteration)
            copy_rolled(torch.from_numpy(stored_BTF), mel_BTF, cuts.changes.rolls_B, cuts.n_frames_B)
            self._cuts_in_flight.append(cuts)
            self._read_count += 1

        return self._cuts_in_flight[-1]

    def next_mel(self, dali_pipeline: Any) -> MelAndCuts:
        """Return the next batch's mel, in DALI's memory, and its cuts; raises the StoreError that ended the batches."""
        # DALI has its own exceptions for the end of its source and for its errors.
        try:
            (mel_BTF,) = dali_pipeline.run(self.stream)
        except StopIteration:
            assert self.read_failure is not None, "more batches were asked for than the source has steps"
            raise self.read_failure from None
        except RuntimeError as error:  # DALI raises no other type
            message = str(error).partition("encountered:")[2] or str(error)
            reason = next((line for line in message.splitlines() if line), "it gives no reason")
            raise RunError(
                f"DALI failed: {reason}; --loader plain makes the same batches without it"
            ) from error

        # The consumer's CUDA stream has to wait for DALI's stream; a CPU has no streams.
        self._note_upload()
        with torch.cuda.stream(self.stream):
            return torch.from_dlpack(mel_BTF.as_tensor()), self._cuts_in_flight.popleft()


def build_dali_pipeline(source: DaliSource, threads: int) -> Any:
    """Return a built DALI pipeline that normalises and augments stored values; it omits augmentations that are off.

    `fn.normalize` is (x - mean) * (1 / stddev) in float32, which gives the same bits as the plain loader.
    """
    batch_maker = source.batch_maker
    dali = import_dali()
    fn = dali.fn
    types = dali.types
    pipeline = dali.Pipeline(
        batch_size=batch_maker.views,
        num_threads=threads,
        device_id=batch_maker.device.index if source.is_on_gpu else None,
        prefetch_queue_depth=DALI_QUEUE_DEPTH,
        exec_dynamic=True,  # outputs live as long as their tensors, so PyTorch needs no copy
        py_start_method="spawn",
    )
    dtypes = {"float16": types.FLOAT16, "float32": types.FLOAT, "uint8": types.UINT8}
    with pipeline:
        # Stored values.
        mel_TF = fn.external_source(
            source=source.stored_values,
            batch=True,
            batch_info=True,
            dtype=dtypes[source.dtype.name],
            ndim=2,
            no_copy=True,
        )
        if source.is_on_gpu:
            mel_TF = mel_TF.gpu()
        if source.dtype == np.float16:
            mel_TF = fn.cast(mel_TF, dtype=types.FLOAT)

        # Gain and normalisation.
        parameters = parameter_inputs(source)
        mean = parameters.get("mean", float(batch_maker.stored_mean))
        mel_TF = fn.normalize(mel_TF, mean=mean, stddev=float(batch_maker.stored_std))

        # Masks and padding.
        if "anchor" in parameters:
            mel_TF = fn.erase(
                mel_TF,
                anchor=parameters["anchor"],
                shape=parameters["shape"],
                axes=(0, 1),
                fill_value=0.0,
            )

        # Mixup.
        if "share" in parameters:
            share = parameters["share"].gpu() if source.is_on_gpu else parameters["share"]
            partner_TF = fn.permute_batch(mel_TF, indices=parameters["partner"])
            mel_TF = mel_TF * share + partner_TF * (1.0 - share)
        pipeline.set_outputs(mel_TF)
    pipeline.build()
    return pipeline


def parameter_inputs(source: DaliSource) -> dict[str, Any]:
    """Return DALI's inputs for the parameters of each clip, by name."""
    if not source.parameter_names:
        return {}

    # Type and number of axes of each parameter.
    dali = import_dali()
    kinds = {
        "mean": (dali.types.FLOAT, 2),
        "anchor": (dali.types.FLOAT, 1),
        "shape": (dali.types.FLOAT, 1),
        "partner": (dali.types.INT32, 0),
        "share": (dali.types.FLOAT, 0),
    }

    # One source gives all parameters, in the order of `parameter_names`.
    inputs = dali.fn.external_source(
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
    **broken_clips: Unpack[BrokenClipOptions],
) -> Loader:
    """Return a loader of this kind; if DALI cannot be imported, a plain loader, and `say` gets a line about it."""
    if kind not in ("dali", "plain"):
        raise RunError(f"loader must be dali or plain, got {kind!r}")

    # DALI can be missing: it has wheels for Linux only.
    if kind == "dali":
        try:
            import_dali()
        except ImportError as error:
            print_line = broken_clips.get("say", print_to_stderr)
            print_line(f"{error}: reading with the plain loader, equal but slower")
            kind = "plain"

    loader = DaliLoader if kind == "dali" else PlainLoader
    return loader(store, order, view, device, **broken_clips)
