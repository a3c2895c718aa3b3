"""One pre-training step beside the published one: the same model, masks and batch, in turns, in one run.

    just bench step [--rows audio-jepa-s audio-jepa a-jepa-s a-jepa] [--clips 4] [--rounds 5] [--precisions fp32 bf16]

Ours is the trainer's whole step: masks drawn, health and gradient norm taken, AdamW, teacher. The published step
(`bench/step_baseline.py`) gets the same masks for nothing and is timed twice, with attention written out and with
PyTorch's own. Losses must agree at every turn. Seconds are wall time, on one CPU thread (`--threads 1`) processor time.
The peak is that of a square matrix product on the same device in the same precision, between the turns. Then what a
step costs by clip length and batch, each in a process of its own, and the share of time that a run waits for data.
"""

import argparse
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ajepa.model.masking import Masks
from ajepa.model.patches import PatchGrid
from ajepa.model.randomness import step_rng
from ajepa.model.vit import a_jepa_encoder
from ajepa.pretrain.pretrain import pretrain
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.recipes.catalogue import pretrain_recipe
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.devices import Precision, hardware_precision, pick_device, pick_precision
from ajepa.training.memory import BYTES_PER_GB, pretrain_memory
from bench.build import LIST, make_files
from bench.machine import machine, memory_mb
from bench.step_baseline import PublishedStep
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build.build import build_store
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.datasets.audioset import audioset_corpus
from pipeline.loading.loader import Batch

ROWS = ("audio-jepa-s", "audio-jepa", "a-jepa-s", "a-jepa")

OURS, WRITTEN_OUT, FUSED = (
    "ours",
    "published step, attention written out",
    "published step, PyTorch's attention",
)

COMPILED = "ours, --compile"

LENGTHS = (256, 512, 1_024)  # frames

TOLERANCE = {False: 1e-3, True: 5e-2}  # between the losses of two sides, by bf16

PRODUCT_SIDE = {"cpu": 2_048, "cuda": 8_192}

WAIT_CLIPS, WAIT_STEPS = 64, 8


class Turn(NamedTuple):
    """One step of one side, and the machine's pace beside it."""

    seconds: float
    peak: float  # FLOP/s of a matrix product


def row_recipe(name: str, clips: int) -> Pretrain:
    """A recipe by its name; `audio-jepa-s` is Audio-JEPA with a ViT-S."""
    made = pretrain_recipe("audio-jepa" if name == "audio-jepa-s" else name)
    if name == "audio-jepa-s":
        made = with_encoder(made, "s", made.model.encoder.grid)
    return made.with_counts(clips_per_step=clips)


def with_encoder(made: Pretrain, size: str, grid: PatchGrid) -> Pretrain:
    return replace(made, model=replace(made.model, encoder=a_jepa_encoder(size, grid)))


def noise(made: Pretrain, device: torch.device) -> Batch:
    """Normalised clips of full length; what is in them costs nothing."""
    clips, grid = made.clips_per_step, made.model.encoder.grid
    mel_BTF = torch.randn(clips, grid.frames, grid.bands, generator=torch.Generator().manual_seed(0))
    return Batch(
        mel_BTF=mel_BTF.to(device),
        n_frames_B=torch.full((clips,), grid.frames),
        rows_B=np.arange(clips),
        labels_BC=None,
        weights_B=torch.ones(clips),
    )


def masks_of(made: Pretrain, step: int) -> Masks:
    """Those that the trainer draws at that step."""
    rng = step_rng(made.seed, step)
    return made.masks.mask_maker_at(step, rng).sample(rng, made.model.encoder.grid, batch=made.clips_per_step)


def numbers(device: torch.device, bf16: bool) -> Precision:
    return pick_precision("bf16" if bf16 else "fp32", device)


def sides_of(
    made: Pretrain, device: torch.device, *, bf16: bool, compiled: bool
) -> dict[str, Callable[[], float]]:
    """For each side the call that makes one update and gives the loss before it; all begin with equal weights."""
    batch, step = noise(made, device), made.steps // 2  # the same one every time: the same masks and rates
    masks, sides = masks_of(made, step), {}
    lr, momentum = (
        made.schedule.learning_rate(step, made.steps),
        made.schedule.teacher_momentum(step, made.steps),
    )
    for name in (OURS, COMPILED) if compiled else (OURS,):
        trainer = PretrainTrainer(made, device, precision=numbers(device, bf16), compiled=name == COMPILED)
        sides[name] = lambda trainer=trainer: float(trainer.train_step(step, batch)["loss"])
    for name in (WRITTEN_OUT, FUSED):
        plain = PublishedStep(made, trainer.model, device, bf16=bf16, fused=name == FUSED)
        sides[name] = lambda plain=plain: plain.step(batch.mel_BTF, masks, lr=lr, momentum=momentum)
    return sides


def clock(device: torch.device) -> float:
    """Seconds; on a GPU once it has done what it was told, on one CPU thread those of the processor."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if alone(device) else time.perf_counter()


def alone(device: torch.device) -> bool:
    """Whether one thread does it all, so that its processor time is the wall time of a quiet machine."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def peak_flops(device: torch.device, bf16: bool) -> float:
    """FLOP/s of a square matrix product, the best of three."""
    side = PRODUCT_SIDE[device.type]
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    took = []
    for _ in range(4):  # the first one warms up
        began = clock(device)
        a @ b
        took.append(clock(device) - began)
    return 2 * side**3 / min(took[1:])


def measured(
    sides: dict[str, Callable[[], float]], device: torch.device, bf16: bool, rounds: int
) -> tuple[dict[str, list[Turn]], dict[str, int]]:
    """Turns of each side, and the FLOPs of its matrix products, counted in an untimed first step."""
    flops, turns = {}, {name: [] for name in sides}
    for name, step in sides.items():
        with FlopCounterMode(display=False) as counter:
            step()
        flops[name] = counter.get_total_flops()
    if COMPILED in sides:
        flops[COMPILED] = flops[OURS]  # the counter does not see into compiled kernels
    for turn in range(rounds):
        peak, losses = peak_flops(device, bf16), {}
        for name in (list(sides) * 2)[turn % len(sides) :][: len(sides)]:
            began = clock(device)
            losses[name] = sides[name]()
            turns[name].append(Turn(clock(device) - began, peak))
        if not all(math.isclose(loss, losses[OURS], rel_tol=TOLERANCE[bf16]) for loss in losses.values()):
            raise RuntimeError(f"round {turn}: the sides do not do the same sum, their losses are {losses}")
    return turns, flops


def step_row(
    name: str, made: Pretrain, device: torch.device, *, bf16: bool, compiled: bool, rounds: int
) -> None:
    """Print one model in one precision: all sides in turns."""
    masks, clips = masks_of(made, made.steps // 2), made.clips_per_step
    turns, flops = measured(sides_of(made, device, bf16=bf16, compiled=compiled), device, bf16, rounds)
    groups, queries = masks.targets_BGQ.shape[1:]
    encoder = made.model.encoder
    print(
        f"\n{name}, {'bf16' if bf16 else 'fp32'}: encoder {encoder.width} wide and {encoder.depth} deep, {clips} clips "
        f"of {encoder.grid.tokens} tokens, {masks.context_BK.shape[1]} seen, {groups} x {queries} predicted; "
        f"{rounds} rounds\n{'':42}{'s/step':>8}{'clips/s':>9}{'ours is':>10}{'GFLOP/clip':>12}{'of the peak':>13}"
    )
    for side, taken in turns.items():
        seconds = statistics.median(turn.seconds for turn in taken)
        ratio = statistics.median(
            turn.seconds / ours.seconds for turn, ours in zip(taken, turns[OURS], strict=True)
        )
        share = statistics.median(flops[side] / turn.seconds / turn.peak for turn in taken)
        told = "" if side == OURS else f"{ratio:.2f}x"
        figures = (
            f"{seconds:8.3f}{clips / seconds:9.1f}{told:>10}{flops[side] / clips / 1e9:12.1f}{share:13.0%}"
        )
        print(f"  {side:<40}{figures}", flush=True)
    peak = statistics.median(turn.peak for turn in turns[OURS])
    print(f"  peak {peak / 1e9:.0f} GFLOP/s; wanted: {'1.7x' if bf16 else '1.25x'} and 40 % of the peak")


def cost(made: Pretrain, device_name: str, bf16: bool, threads: int) -> tuple[float, float]:
    """Seconds of a step (the quicker of two) and bytes at its peak, in a process that does nothing else."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    tiny = pretrain_recipe("smoke").with_counts(clips_per_step=1)
    PretrainTrainer(tiny, device).train_step(
        0, noise(tiny, device)
    )  # what the libraries take is not the model's
    before = 0.0 if device.type == "cuda" else memory_mb(field="VmRSS") * 1e6
    trainer = PretrainTrainer(made, device, precision=numbers(device, bf16))
    batch, took = noise(made, device), list[float]()
    for _ in range(3):
        began = clock(device)
        trainer.train_step(made.steps // 2, batch)
        took.append(clock(device) - began)
    held = torch.cuda.max_memory_allocated() if device.type == "cuda" else memory_mb() * 1e6
    return min(took[1:]), held - before


def cost_table(clips: int, device: torch.device, bf16: bool) -> None:
    """Print what Audio-JEPA with a ViT-S costs by clip length and by batch."""
    base, threads = row_recipe("audio-jepa-s", clips), torch.get_num_threads()
    longer = [with_encoder(base, "s", PatchGrid.from_size(frames, 128)) for frames in LENGTHS]
    larger = [base.with_counts(clips_per_step=count) for count in (2 * clips, 4 * clips)]
    print(
        f"\naudio-jepa-s, {'bf16' if bf16 else 'fp32'}: cost by clip length and batch, a process each\n"
        f"{'frames':>8}{'tokens':>8}{'clips':>7}{'s/step':>9}{'clips/s':>9}{'memory GB':>11}{'estimated':>11}"
    )
    for made in (*longer, *larger):
        with multiprocessing.get_context("spawn").Pool(1) as alone_in_it:
            seconds, held = alone_in_it.apply(cost, (made, str(device), bf16, threads))
        needed = pretrain_memory(made, bf16=bf16, written_out=bf16 and device.type == "cpu").total_bytes
        grid, count = made.model.encoder.grid, made.clips_per_step
        print(
            f"{grid.frames:8}{grid.tokens:8}{count:7}{seconds:9.2f}{count / seconds:9.1f}"
            f"{held / BYTES_PER_GB:11.2f}{needed / BYTES_PER_GB:11.2f}",
            flush=True,
        )


def wait_line(clips: int, device: torch.device) -> None:
    """Print how long a run over a store waits for its batches, once its first step is over."""
    made = replace(row_recipe("audio-jepa-s", clips), log_every=1)
    with tempfile.TemporaryDirectory(prefix="bench-step-") as scratch:
        folder, store = Path(scratch), Path(scratch) / "clips.zarr"
        make_files(folder, ["wav"], WAIT_CLIPS)
        corpus = audioset_corpus([folder / "wav"], [folder / LIST])
        build_store(corpus, StoreOutput(path=store, spec=preset_mel_spec(made.mel)), BuildOptions(workers=2))
        run = pretrain(
            store, made, folder / "run", steps=WAIT_STEPS, device=device.type, say=lambda line: None
        )
        lines = run.read_metrics()[1:]
    wait, speed = (statistics.median(line[name] for line in lines) for name in ("data_wait", "clips_per_s"))
    print(
        f"\npre-training audio-jepa-s from a store: {speed:.1f} clips/s, {wait:.1%} of the time waiting for data"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=["audio-jepa-s", "audio-jepa"])
    parser.add_argument("--clips", type=int, help="in a step (default 4 on a CPU, 64 on a GPU)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precisions", nargs="*", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="also our step with its blocks compiled")
    parser.add_argument(
        "--no-costs", action="store_true", help="leave out the table of clip lengths and batches"
    )
    parser.add_argument("--no-wait", action="store_true", help="leave out the wait for data")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = pick_device(asked.device)
    hardware_bf16, told = hardware_precision(device)
    clips = asked.clips or (64 if device.type == "cuda" else 4)
    print(f"{machine('ajepa', 'torch', 'numpy')}\n{asked.threads} threads; {told}")
    if asked.precisions is None and not hardware_bf16:
        print("bf16: left out, this machine would only imitate it (--precisions bf16 times it all the same)")
    for name in asked.rows:
        for kind in asked.precisions or (("fp32", "bf16") if hardware_bf16 else ("fp32",)):
            made = row_recipe(name, clips)
            step_row(name, made, device, bf16=kind == "bf16", compiled=asked.compile, rounds=asked.rounds)
    if not asked.no_costs:
        cost_table(clips, device, hardware_bf16)
    if not asked.no_wait:
        wait_line(clips, device)


if __name__ == "__main__":
    main()
