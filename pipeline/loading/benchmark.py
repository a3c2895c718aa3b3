"""Measure how fast a store can be loaded on this machine, stage by stage, and which stage limits the others."""

import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import google_crc32c
import numpy as np
import torch

from pipeline.errors import StoreError
from pipeline.loading.augment import Augment, draw_changes, zero_masked_spans
from pipeline.loading.dali import open_loader
from pipeline.loading.loader import Loader, View, resolve_device
from pipeline.loading.sampling import RowOrder
from pipeline.store.feature_store import FeatureStore
from pipeline.store.shards import shard_path

MIN_TIMED_SECONDS = 1.0  # each stage is timed for at least this long

MIN_ROUNDS = 5  # least number of timed calls of a stage; their median is reported

MAX_DISK_BYTES = 512 * 2**20  # the disk stage reads at most this much

READ_CHUNK_BYTES = 2**20

WARMUP_STEPS = 8

# Augmentation of Audio-MAE's fine-tuning.
AUDIO_MAE_AUGMENT = Augment(time_mask_frames=192, band_mask_bands=48, mixup_share=0.5)

FASTER_DISK_ADVICE = (
    "hold it in memory (a copy in /dev/shm), on a faster disk, or in half the bytes: build with --dtype uint8"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadingStage:
    """One stage of loading a clip into a batch, timed separately, and advice if the stage is too slow."""

    name: str
    clips_per_s: float
    advice: str
    is_every_epoch: bool = True  # False: runs only when a clip is first read, or only if it is turned on


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadingSpeed:
    """The speed of each stage on one machine, in the order in which they run, and of whole batches of each loader."""

    stages: tuple[LoadingStage, ...]
    batch_clips_per_s: dict[Literal["plain", "dali"], float]
    clip_bytes: int

    @property
    def bottleneck(self) -> LoadingStage:
        """The slowest of the stages that run for every clip in every epoch."""
        every_epoch = [stage for stage in self.stages if stage.is_every_epoch]
        return min(every_epoch, key=lambda stage: stage.clips_per_s)

    def format_table(self) -> str:
        """Return a line for each stage and loader, then the bottleneck with its advice."""
        rows = [(stage.name, stage.clips_per_s) for stage in self.stages]
        rows += [(f"whole batches, {kind} loader", speed) for kind, speed in self.batch_clips_per_s.items()]
        lines = [f"{'':36}{'clips/s':>9}{'MB/s':>8}"]
        for name, speed in rows:
            lines.append(f"{name:36}{speed:9,.0f}{speed * self.clip_bytes / 1e6:8,.0f}")
        slowest = self.bottleneck
        return "\n".join([*lines, f"slowest: {slowest.name}; if a trainer waits, {slowest.advice}"])


def measure_loading(
    store: FeatureStore,
    *,
    batch_clips: int = 64,
    device: str = "cpu",
    say: Callable[[str], None] = lambda stage: None,
) -> LoadingSpeed:
    """Time each stage separately with batches of `batch_clips` whole clips, then whole batches; takes half a minute.

    Whole batches are those of pre-training: normalised, without masks and mixup. The disk stage first asks the system
    to drop the shards from its cache (this has no effect for a store in /dev/shm); all other stages work in memory.
    Checksums are timed only as a separate stage if `store` was opened with check="never". `say` gets the name of each
    stage before the stage runs.

    Raises StoreError if the store has fewer good clips than a batch, or is not on a disk of this machine.
    """
    # Refuse unsuitable stores before anything is read.
    if store.location != str(store.path):
        raise StoreError(
            f"{store.location}: only a store on a disk of this machine can be timed; copy it here"
        )
    rows_N = store.good_rows()
    if len(rows_N) < batch_clips:
        raise StoreError(
            f"{store.path}: {len(rows_N)} good clips do not fill a batch of {batch_clips}; lower --batch"
        )
    torch_device = resolve_device(device)

    # Stages.
    mean, std = store.mean_and_std(sorted(store.split_names))
    order = RowOrder(rows_N=rows_N, clips=batch_clips, seed=0)
    view = View(frames=store.frames, mean=mean, std=std)
    stages = [time_disk(store, say), *time_memory_stages(store, order, view, torch_device, say)]

    # Whole batches.
    clips_per_s: dict[Literal["plain", "dali"], float] = {}
    for kind in ("plain", "dali"):
        say(f"{kind} loader")
        with open_loader(store, order, view, kind=kind, device=device) as loader:
            clips_per_s[kind] = batch_clips * measure_batches_per_s(loader)
    return LoadingSpeed(
        stages=tuple(stages), batch_clips_per_s=clips_per_s, clip_bytes=store.header.layout.clip_bytes
    )


def time_disk(store: FeatureStore, say: Callable[[str], None]) -> LoadingStage:
    """Time reading whole shards, 512 MiB at most, after asking the system to drop them from its cache."""
    say("disk")
    read_bytes = 0
    began = time.perf_counter()
    shards = sorted({row // store.header.layout.shard_clips for row in store.good_rows().tolist()})
    for shard in shards:
        descriptor = os.open(shard_path(store.path, shard), os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := os.read(descriptor, READ_CHUNK_BYTES):
            read_bytes += len(chunk)
        os.close(descriptor)
        if read_bytes > MAX_DISK_BYTES:
            break
    clips = read_bytes / store.header.layout.clip_bytes
    return LoadingStage(
        name="disk, from end to end",
        clips_per_s=clips / (time.perf_counter() - began),
        advice=FASTER_DISK_ADVICE,
    )


def time_memory_stages(
    store: FeatureStore, order: RowOrder, view: View, device: torch.device, say: Callable[[str], None]
) -> list[LoadingStage]:
    """Time the stages of loading a batch that come after the disk."""
    # The arrays that the stages use, and an endless count of steps.
    stored_BTF = np.empty((order.clips, store.frames, store.bands), store.dtype)
    mel_BTF = torch.empty(stored_BTF.shape)
    steps = itertools.count()

    def read_batch() -> None:
        store.read(order.rows_at_step(next(steps) % order.steps_per_epoch), out=stored_BTF)

    def compute_checksums() -> None:
        for stored_TF in stored_BTF:
            google_crc32c.value(stored_TF.reshape(-1).view(np.uint8))

    def normalise_batch() -> None:
        mel_BTF.copy_(torch.from_numpy(stored_BTF)).sub_(view.mean).mul_(1 / view.std)

    def augment_batch() -> None:
        changes = draw_changes(
            AUDIO_MAE_AUGMENT,
            0,
            next(steps),
            order,
            n_frames_B=np.full(order.clips, store.frames),
            bands=store.bands,
        )
        zero_masked_spans(mel_BTF, changes)
        shares_B11 = torch.from_numpy(changes.shares_B)[:, None, None]
        mel_BTF.mul_(shares_B11).add_(mel_BTF[changes.partners_B] * (1 - shares_B11))

    def upload_batch() -> None:
        torch.from_numpy(stored_BTF).to(device)
        torch.cuda.synchronize(device)

    # Name, function and advice of each stage, in the order in which they run.
    works = [
        (
            "random read, from memory",
            read_batch,
            "read fewer bytes: shorter crops, or a store built with --dtype uint8",
        ),
        ("checksum, when first read", compute_checksums, "compare less often: --check first-epoch, or never"),
        ("cast and normalise", normalise_batch, "let the DALI loader do it, on the GPU"),
        (
            "masks and mixup, if asked for",
            augment_batch,
            "change less about clips, or let the DALI loader do it, on the GPU",
        ),
    ]
    if device.type == "cuda":
        works.append(("host to device", upload_batch, "send fewer bytes: build with --dtype uint8"))

    stages = []
    for name, work, advice in works:
        say(name)
        clips_per_s = order.clips / median_seconds(work)
        is_every_epoch = work not in (compute_checksums, augment_batch)
        stages.append(
            LoadingStage(name=name, clips_per_s=clips_per_s, advice=advice, is_every_epoch=is_every_epoch)
        )
    return stages


def median_seconds(timed_function: Callable[[], None]) -> float:
    """Return the median time of a call, over at least MIN_ROUNDS calls and MIN_TIMED_SECONDS, after an untimed call."""
    seconds: list[float] = []
    timed_function()
    while len(seconds) < MIN_ROUNDS or sum(seconds) < MIN_TIMED_SECONDS:
        began = time.perf_counter()
        timed_function()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure_batches_per_s(loader: Loader) -> float:
    """Return the batches per second over a few seconds, not counting the first WARMUP_STEPS batches."""
    began = 0.0
    for count, batch in enumerate(loader.batches(0, 1_000_000), start=1):
        if count == WARMUP_STEPS:
            began = time.perf_counter()
        if count > WARMUP_STEPS:
            seconds = time.perf_counter() - began
            if seconds > 2 * MIN_TIMED_SECONDS:
                return (count - WARMUP_STEPS) / seconds
        del batch  # the loader may use its memory again
    raise AssertionError("a loader has no last batch")
