"""The rows of `bench/gpu.py`, section speed: a recipe and an encoder's size, ours or the published step, in bf16.

Ours takes stored clips through DALI, as a run does: it waits for a batch, queues the step, and reads the figures of the
step before. Columns: steps and clips a second; the matrix products of `training/flops.py` a second, and as a share
of the data sheet's peak (MFU); the share of the time that the host waits for clips, and the share that it queues work
(also while the queue is full); what is left of it, it waits for figures; memory.
The published step (`bench/step_baseline.py`, PyTorch's attention) has its batch on the device and gets its masks for
nothing. Both have the same clips a step: the recipe's, or the most that fit into half of the memory.
"""

import gc
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ajepa.model.patches import PatchGrid
from ajepa.model.vit import EncoderSpec, PredictorSpec
from ajepa.pretrain.pretrain import pretrain_view
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.pretrain.training_set import TrainingSet
from ajepa.recipes.catalogue import pretrain_recipe
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.devices import Precision, pick_precision
from ajepa.training.flops import pretrain_step_flop
from ajepa.training.memory import pretrain_memory
from ajepa.training.trainer import StartedStep
from bench.step import draw_masks, measure_peak_flops, noise_batch, with_encoder
from bench.step_baseline import PublishedStep
from pipeline.loading.dali import DaliLoader
from pipeline.loading.loader import Batch

if TYPE_CHECKING:
    from bench.gpu import Job

# Dense bf16 FLOP/s of the data sheets, by a part of the GPU's name.
DATA_SHEET_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2_250e12}

MEMORY_SHARE = 0.5  # of the GPU's, for one side of a row

# By whether models are tiny.
WARM_STEPS = {False: 4, True: 1}
MEASURED_SECONDS = {False: 4.0, True: 0.0}
FEWEST_STEPS = {False: 6, True: 2}

TINY_CLIPS = 4

CLIPS_PER_S: dict[tuple[str, str], float] = {}  # of our rows so far, by recipe and size


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    recipe: str
    size: str  # of the encoder: s, b or l
    side: str  # ours, compiled or published

    def __str__(self) -> str:
        return f"{self.recipe} ViT-{self.size.upper()} {self.side}"


# The most important first; compiling costs most of a minute each.
ROWS = [
    *(
        Row(recipe=recipe, size=size, side=side)
        for size in ("b", "l", "s")
        for recipe in ("a-jepa", "audio-jepa")
        for side in ("ours", "published")
    ),
    *(
        Row(recipe=recipe, size=size, side="compiled")
        for size in ("b", "l", "s")
        for recipe in ("a-jepa", "audio-jepa")
    ),
]


def row_seconds(number: int) -> float:
    """After how long a row counts as hanging."""
    return 90.0 if ROWS[number].side == "compiled" else 60.0


def row_recipe(row: Row, device: torch.device, tiny: bool) -> Pretrain:
    """The recipe of a row, with as many clips a step as fit."""
    recipe = pretrain_recipe(row.recipe)
    if tiny:
        encoder = EncoderSpec(grid=PatchGrid.from_size(64, 128), width=32, depth=1, heads=2)
        model = replace(recipe.model, encoder=encoder, predictor=PredictorSpec(width=16, depth=1, heads=2))
        return replace(recipe, mel="a-jepa", model=model).with_counts(clips_per_step=TINY_CLIPS)
    recipe = with_encoder(recipe, row.size, recipe.model.encoder.grid)

    # Halve the step until it fits.
    limit_bytes = MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory
    while pretrain_memory(recipe, bf16=True, written_out=False).total_bytes > limit_bytes:
        recipe = recipe.with_counts(clips_per_step=recipe.clips_per_step // 2)
    return recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Steps that were timed together; shares are of `seconds`."""

    steps: int
    seconds: float
    flop: int  # 0: not counted
    waiting_share: float
    host_share: float


def measure_row(row: Row, job: "Job", say: Callable[[str], None]) -> None:
    """Measure a row and print its line; the first one also prints the peak, kernels and waits."""
    device = torch.device(job.device_name)
    gc.collect()
    recipe = row_recipe(row, device, job.tiny)
    precision = pick_precision("bf16", device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    compiled = row.side == "compiled" and not job.tiny
    trainer = PretrainTrainer(recipe, device, precision=precision, compiled=compiled)
    if row == ROWS[0] and not job.tiny:
        peak_flops = measure_peak_flops(device, bf16=True)
        say(f"a square matrix product in bf16: {peak_flops / 1e12:.3g} TFLOP/s")

    # Measure one of the sides.
    if row.side == "published":
        measurement = time_published(recipe, trainer, device, tiny=job.tiny)
    else:
        measurement = time_ours(recipe, trainer, job)
    if row.side == "ours":
        CLIPS_PER_S[row.recipe, row.size] = recipe.clips_per_step * measurement.steps / measurement.seconds
    say(format_row(row, recipe, measurement, device))

    # What only needs to be seen once.
    if row == ROWS[0]:
        describe_step(recipe, trainer, precision, say)


def time_ours(recipe: Pretrain, trainer: PretrainTrainer, job: "Job") -> Measurement:
    """Time our steps with stored clips through DALI, the way that `training/loop.py` takes them."""
    first = recipe.steps // 2
    warm = first + WARM_STEPS[job.tiny]
    with open_batches(recipe, trainer.device, job.wait_for_store(recipe.mel), first) as batches:
        newest: StartedStep | None = None
        for step in range(first, recipe.steps):
            # The first steps warm up.
            if newest is not None and step == warm:
                newest.read_metrics()
                began = time.perf_counter()
                waited = queueing = 0.0
                flop = 0
            marks = [time.perf_counter()]
            batch = next(batches)
            marks.append(time.perf_counter())
            previous, newest = newest, trainer.start_step(step, batch)
            marks.append(time.perf_counter())
            if previous is not None:
                previous.read_metrics()
            if step < warm:
                continue

            # Count, until there is enough.
            waited += marks[1] - marks[0]
            queueing += marks[2] - marks[1]
            flop += pretrain_step_flop(recipe, trainer.step_shape)
            steps = step + 1 - warm
            if steps >= FEWEST_STEPS[job.tiny] and marks[2] - began >= MEASURED_SECONDS[job.tiny]:
                break
        newest.read_metrics()
        seconds = time.perf_counter() - began
    return Measurement(
        steps=steps,
        seconds=seconds,
        flop=flop,
        waiting_share=waited / seconds,
        host_share=queueing / seconds,
    )


@contextmanager
def open_batches(
    recipe: Pretrain, device: torch.device, store_path: Path | None, first_step: int
) -> Iterator[Iterator[Batch]]:
    """The batches of a run from a step on, through DALI; without a store one of noise, again and again."""
    if store_path is None:
        yield itertools.repeat(noise_batch(recipe, device))
        return
    training_set = TrainingSet(stores=(store_path,))
    store = training_set.open_stores(recipe)
    order = training_set.clip_order(store, recipe)
    view = pretrain_view(training_set.data_identity(store), recipe)
    with DaliLoader(store, order, view, device) as loader:
        yield loader.batches(first_step, recipe.steps)


def time_published(
    recipe: Pretrain, trainer: PretrainTrainer, device: torch.device, *, tiny: bool
) -> Measurement:
    """Time the published step on the same masks, which it gets for nothing, as it gets its batch."""
    published = PublishedStep(recipe, trainer.model, device, bf16=True, fused=True)
    mel_BTF = noise_batch(recipe, device).mel_BTF
    first = recipe.steps // 2
    masks_of_steps = [draw_masks(recipe, step) for step in range(first, first + 4)]
    seconds: list[float] = []
    for number in range(100):
        masks = masks_of_steps[number % 4]
        began = time.perf_counter()
        published.step(mel_BTF, masks, lr=1e-5, momentum=0.999)  # returns its loss: the device is done
        seconds.append(time.perf_counter() - began)
        measured = seconds[WARM_STEPS[tiny] :]
        if len(measured) >= FEWEST_STEPS[tiny] and sum(measured) >= MEASURED_SECONDS[tiny]:
            break

    return Measurement(steps=len(measured), seconds=sum(measured), flop=0, waiting_share=0.0, host_share=0.0)


COLUMNS = {
    "clips": 7,
    "steps/s": 10,
    "clips/s": 9,
    "of ours": 9,
    "TFLOP/s": 9,
    "MFU": 7,
    "waiting": 9,
    "queueing": 10,
    "GB": 7,
}
HEADING = f"{'':28}" + "".join(f"{name:>{width}}" for name, width in COLUMNS.items())


def format_row(row: Row, recipe: Pretrain, measurement: Measurement, device: torch.device) -> str:
    """The line of a row; nothing in the columns that a side does not have."""
    steps_per_s = measurement.steps / measurement.seconds
    clips_per_s = steps_per_s * recipe.clips_per_step
    ours = CLIPS_PER_S.get((row.recipe, row.size))
    ratio = f"{clips_per_s / ours:8.2f}x" if ours else f"{'':9}"
    line = f"{row!s:28}{recipe.clips_per_step:7}{steps_per_s:10.2f}{clips_per_s:9.1f}{ratio}"
    if measurement.flop:
        flops = measurement.flop / measurement.seconds
        sheet_flops = data_sheet_flops(device)
        mfu = f"{flops / sheet_flops:7.1%}" if sheet_flops else f"{'':7}"
        shares = f"{measurement.waiting_share:9.1%}{measurement.host_share:10.1%}"
        line += f"{flops / 1e12:9.3g}{mfu}{shares}"
    else:
        line += " " * 35
    if device.type == "cuda":
        line += f"{torch.cuda.max_memory_allocated() / 1e9:7.1f}"
    return line


def data_sheet_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the GPU by its data sheet; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in DATA_SHEET_FLOPS.items() if part in name), None)


def describe_step(
    recipe: Pretrain, trainer: PretrainTrainer, precision: Precision, say: Callable[[str], None]
) -> None:
    """Print which calls of a step wait for the GPU, the kernels that it spends its time in, and what draws cost."""
    device = trainer.device
    batch = noise_batch(recipe, device)
    step = recipe.steps // 2
    if device.type == "cuda":
        for line in waits_of_step(trainer, step, batch):
            say(f"  a step waits: {line}")
    for line in kernels_of_step(trainer, step + 1, batch):
        say(f"  {line}")

    # The draws of a step, which a thread makes ahead.
    seconds = []
    for ahead in range(3):
        began = time.perf_counter()
        trainer.draw_for_rank(step + ahead)
        seconds.append(time.perf_counter() - began)
    say(
        f"  the draws of a step: {1e3 * statistics.median(seconds):.1f} ms of a thread, {precision.description}"
    )


def waits_of_step(trainer: PretrainTrainer, step: int, batch: Batch) -> list[str]:
    """Calls of a step, after a first one, for which PyTorch had to wait for the GPU; none is right."""
    trainer.train_step(step, batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            started = trainer.start_step(step + 1, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    started.read_metrics()
    return [f"{warning.filename}:{warning.lineno}: {warning.message}" for warning in caught] or ["never"]


def kernels_of_step(trainer: PretrainTrainer, step: int, batch: Batch, *, most: int = 12) -> list[str]:
    """The operations that a step spends its time in, longest first."""
    is_on_gpu = trainer.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if is_on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profiler:
        trainer.train_step(step, batch)
    key = "self_device_time_total" if is_on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    return [
        f"{getattr(event, key) / total:5.1%}  {event.count:5} x  {event.key[:90]}" for event in events[:most]
    ]
