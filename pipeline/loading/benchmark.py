"""How fast batches can come out of a store on this machine: stage by stage, and which stage holds up the others."""

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

MIN_TIMED_SECONDS = 1.0  # at least, that a stage is timed

MIN_ROUNDS = 5  # at least; their median counts

MAX_DISK_BYTES = 512 * 2**20  # read at most

READ_CHUNK_BYTES = 2**20  # at a time

WARMUP_STEPS = 8

AUDIO_MAE_AUGMENT = Augment(
    time_mask_frames=192, band_mask_bands=48, mixup_share=0.5
)  # Audio-MAE's fine-tuning

FASTER_DISK_ADVICE = (
    "hold it in memory (a copy in /dev/shm), on a faster disk, or in half the bytes: build with --dtype uint8"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadingStage:
    """What happens to every clip on its way into a batch, by itself, and what helps where it is too slow."""

    name: str
    clips_per_s: float
    advice: str
    is_every_epoch: bool = True  # False: only when a clip is first read, or where it is asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadingSpeed:
    """A store's stages on one machine, in the order of the way, and finished batches of each loader."""

    stages: tuple[LoadingStage, ...]
    batch_clips_per_s: dict[Literal["plain", "dali"], float]  # clips/s
    clip_bytes: int

    @property
    def bottleneck(self) -> LoadingStage:
        """The slowest of the stages that every clip goes through in every epoch."""
        return min(
            (stage for stage in self.stages if stage.is_every_epoch), key=lambda stage: stage.clips_per_s
        )

    def format_table(self) -> str:
        """A line for each stage and loader, then the bottleneck and what to do about it."""
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
    """Time every stage with batches of `batch` whole clips, each by itself, and whole batches; half a minute.

    Whole batches are those of pre-training: normalised, without masks and mixup.
    The disk is timed from end to end of shards that the system was asked to forget (one that lies in memory stays
    there); all else works in memory. Checksums are a stage of their own if `store` was opened with check="never".
    StoreError: fewer good clips than a batch, or a store that is not on a disk here.
    """
    if store.location != str(store.path):
        raise StoreError(
            f"{store.location}: only a store on a disk of this machine can be timed; copy it here"
        )
    rows_N = store.good_rows()
    if len(rows_N) < batch_clips:
        raise StoreError(
            f"{store.path}: {len(rows_N)} good clips do not fill a batch of {batch_clips}; lower --batch"
        )
    mean, std = store.mean_and_std(sorted(set(store.manifest["split"])))
    on = resolve_device(device)
    order = RowOrder(rows_N=rows_N, clips=batch_clips, seed=0)
    view = View(frames=store.frames, mean=mean, std=std)
    stages = [time_disk(store, say), *time_memory_stages(store, order, view, on, say)]
    batches: dict[Literal["plain", "dali"], float] = {}
    for kind in ("plain", "dali"):
        say(f"{kind} loader")
        with open_loader(store, order, view, kind=kind, device=device) as loader:
            batches[kind] = batch_clips * measure_batches_per_s(loader)
    return LoadingSpeed(
        stages=tuple(stages), batch_clips_per_s=batches, clip_bytes=store.header.layout.clip_bytes
    )


def time_disk(store: FeatureStore, say: Callable[[str], None]) -> LoadingStage:
    """Shards read from end to end, of at most 512 MiB, after the system was asked to forget them."""
    say("disk")
    seen, began = 0, time.perf_counter()
    for shard in {row // store.header.layout.shard_clips: None for row in store.good_rows().tolist()}:
        file = os.open(shard_path(store.path, shard), os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        while piece := os.read(file, READ_CHUNK_BYTES):
            seen += len(piece)
        os.close(file)
        if seen > MAX_DISK_BYTES:
            break
    clips = seen / store.header.layout.clip_bytes
    return LoadingStage(
        name="disk, from end to end",
        clips_per_s=clips / (time.perf_counter() - began),
        advice=FASTER_DISK_ADVICE,
    )


def time_memory_stages(
    store: FeatureStore, order: RowOrder, view: View, device: torch.device, say: Callable[[str], None]
) -> list[LoadingStage]:
    """What is done to a batch once the disk has given it."""
    stored_BTF = np.empty((order.clips, store.frames, store.bands), store.dtype)
    mel_BTF = torch.empty(stored_BTF.shape)
    step = iter(range(1_000_000_000))

    def read_batch() -> None:
        store.read(order.rows_at_step(next(step) % order.steps_per_epoch), out=stored_BTF)

    def compute_checksums() -> None:
        for stored_TF in stored_BTF:
            google_crc32c.value(stored_TF.reshape(-1).view(np.uint8))

    def normalise_batch() -> None:
        mel_BTF.copy_(torch.from_numpy(stored_BTF)).sub_(view.mean).mul_(1 / view.std)

    def augment_batch() -> None:
        changes = draw_changes(
            AUDIO_MAE_AUGMENT,
            0,
            next(step),
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
        pace = order.clips / median_seconds(work)
        stages.append(
            LoadingStage(
                name=name,
                clips_per_s=pace,
                advice=advice,
                is_every_epoch=work not in (compute_checksums, augment_batch),
            )
        )
    return stages


def median_seconds(timed_function: Callable[[], None]) -> float:
    """Median time of a call, over several and at least a second."""
    took: list[float] = []
    timed_function()
    while len(took) < MIN_ROUNDS or sum(took) < MIN_TIMED_SECONDS:
        began = time.perf_counter()
        timed_function()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def measure_batches_per_s(loader: Loader) -> float:
    """Over a few seconds, the first batches left out."""
    began = 0.0
    for made, batch in enumerate(loader.batches(0, 1_000_000), start=1):
        if made == WARMUP_STEPS:
            began = time.perf_counter()
        if made > WARMUP_STEPS and (passed := time.perf_counter() - began) > 2 * MIN_TIMED_SECONDS:
            return (made - WARMUP_STEPS) / passed
        del batch
    raise AssertionError("a loader has no last batch")
