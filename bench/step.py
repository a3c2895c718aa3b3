"""One pre-training step beside the published one: the same model, masks and batch, in turns, in one run.

    just bench step [--rows audio-jepa-s audio-jepa a-jepa-s a-jepa] [--clips 4] [--rounds 5] [--precisions fp32 bf16]

Ours is the trainer's whole step: masks drawn, health and gradient norm taken, AdamW, teacher. The published step
(`bench/step_baseline.py`) gets the same masks for nothing and is timed twice, with attention written out and with
PyTorch's own. Losses must agree at every turn. Seconds are wall time, on one CPU thread (`--threads 1`) processor time.
The peak is that of a square matrix product on the same device in the same precision, between the turns. Then the cost
of a step by clip length and by batch, each in a process of its own, and the share of time that a run waits for data.
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

# The sides of the comparison.
OURS = "ours"
COMPILED = "ours, --compile"
WRITTEN_OUT = "published step, attention written out"
FUSED = "published step, PyTorch's attention"

# Clip lengths of the cost table, in frames.
LENGTHS = (256, 512, 1_024)

# By how much the losses of two sides may differ, in fp32 and (True) in bf16.
TOLERANCE = {False: 1e-3, True: 5e-2}

# Rows of the square matrices whose product is the device's peak.
PRODUCT_SIDE = {"cpu": 2_048, "cuda": 8_192}

# Clips of the store, and steps of the run, whose wait for data is measured.
WAIT_CLIPS = 64
WAIT_STEPS = 8

Sides = dict[str, Callable[[], float]]


class Turn(NamedTuple):
    """One step of one side, and the machine's peak beside it."""

    seconds: float
    peak_flops: float  # FLOP/s of a matrix product


def row_recipe(name: str, clips: int) -> Pretrain:
    """Return a recipe by its name; `audio-jepa-s` is Audio-JEPA with a ViT-S."""
    recipe = pretrain_recipe("audio-jepa" if name == "audio-jepa-s" else name)
    if name == "audio-jepa-s":
        recipe = with_encoder(recipe, "s", recipe.model.encoder.grid)
    return recipe.with_counts(clips_per_step=clips)


def with_encoder(recipe: Pretrain, size: str, grid: PatchGrid) -> Pretrain:
    """Return the recipe with another of A-JEPA's encoders."""
    return replace(recipe, model=replace(recipe.model, encoder=a_jepa_encoder(size, grid)))


def noise_batch(recipe: Pretrain, device: torch.device) -> Batch:
    """Return normalised clips of full length; their content does not change the cost."""
    clips = recipe.clips_per_step
    grid = recipe.sound_grid
    mel_BTF = torch.randn(clips, grid.frames, grid.bands, generator=torch.Generator().manual_seed(0))
    return Batch(
        mel_BTF=mel_BTF.to(device),
        n_frames_B=torch.full((clips,), grid.frames),
        rows_B=np.arange(clips),
        labels_BC=None,
    )


def draw_masks(recipe: Pretrain, step: int) -> Masks:
    """Return the masks that the trainer draws at that step."""
    rng = step_rng(recipe.seed, step)
    masking = recipe.masks.mask_maker_at(step, rng)
    return masking.sample(rng, recipe.sound_grid, batch=recipe.clips_per_step)


def precision_of(device: torch.device, bf16: bool) -> Precision:
    """Return bf16 or fp32 as the trainer takes it."""
    return pick_precision("bf16" if bf16 else "fp32", device)


def build_sides(recipe: Pretrain, device: torch.device, *, bf16: bool, compiled: bool) -> Sides:
    """Return for each side the call that makes one update and returns the loss before it.

    All sides begin with equal weights, and repeat one step: the same batch, masks and rates every time.
    """
    batch = noise_batch(recipe, device)
    step = recipe.steps // 2
    masks = draw_masks(recipe, step)
    lr = recipe.schedule.learning_rate(step, recipe.steps)
    momentum = recipe.schedule.teacher_momentum(step, recipe.steps)

    # Our trainer, with and without compilation.
    sides: Sides = {}
    for name in (OURS, COMPILED) if compiled else (OURS,):
        trainer = PretrainTrainer(
            recipe, device, precision=precision_of(device, bf16), compiled=name == COMPILED
        )
        sides[name] = lambda trainer=trainer: float(trainer.train_step(step, batch)["loss"])

    # The published step, with copies of our weights.
    for name in (WRITTEN_OUT, FUSED):
        published = PublishedStep(recipe, trainer.model, device, bf16=bf16, fused=name == FUSED)
        sides[name] = lambda published=published: published.step(
            batch.mel_BTF, masks, lr=lr, momentum=momentum
        )
    return sides


def read_clock(device: torch.device) -> float:
    """Return seconds: on a GPU once it has finished its work, on one CPU thread those of the processor."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if has_one_thread(device) else time.perf_counter()


def has_one_thread(device: torch.device) -> bool:
    """Say whether one CPU thread does all the work: its processor time is the wall time of a quiet machine."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def measure_peak_flops(device: torch.device, bf16: bool) -> float:
    """Return FLOP/s of a square matrix product, the best of three."""
    side = PRODUCT_SIDE[device.type]
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)

    # The first of four warms up.
    seconds = []
    for _ in range(4):
        start = read_clock(device)
        a @ b
        seconds.append(read_clock(device) - start)
    return 2 * side**3 / min(seconds[1:])


def count_flops(sides: Sides) -> dict[str, int]:
    """Return the FLOPs of each side's matrix products, counted in an untimed first step."""
    flops = {}
    for name, step in sides.items():
        with FlopCounterMode(display=False) as counter:
            step()
        flops[name] = counter.get_total_flops()

    # The counter does not see into compiled kernels.
    if COMPILED in sides:
        flops[COMPILED] = flops[OURS]
    return flops


def time_sides(sides: Sides, device: torch.device, bf16: bool, rounds: int) -> dict[str, list[Turn]]:
    """Return the turns of each side; RuntimeError where their losses differ."""
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for number in range(rounds):
        peak_flops = measure_peak_flops(device, bf16)

        # Every round begins with another side.
        losses = {}
        for name in (list(sides) * 2)[number % len(sides) :][: len(sides)]:
            start = read_clock(device)
            losses[name] = sides[name]()
            turns[name].append(Turn(read_clock(device) - start, peak_flops))

        if not all(math.isclose(loss, losses[OURS], rel_tol=TOLERANCE[bf16]) for loss in losses.values()):
            raise RuntimeError(
                f"round {number}: all sides must make the same update, but their losses differ: {losses}"
            )
    return turns


def print_step_table(
    name: str, recipe: Pretrain, device: torch.device, *, bf16: bool, compiled: bool, rounds: int
) -> None:
    """Print one model in one precision: all sides in turns."""
    masks = draw_masks(recipe, recipe.steps // 2)
    clips = recipe.clips_per_step
    sides = build_sides(recipe, device, bf16=bf16, compiled=compiled)
    flops = count_flops(sides)
    turns = time_sides(sides, device, bf16, rounds)

    # The model and its masks, then the columns.
    groups, queries = masks.targets_BGQ.shape[1:]
    encoder = recipe.model.encoder
    tokens = recipe.sound_grid.tokens
    print(
        f"\n{name}, {'bf16' if bf16 else 'fp32'}: encoder {encoder.width} wide and {encoder.depth} deep, {clips} clips "
        f"of {tokens} tokens, {masks.context_BK.shape[1]} seen, {groups} x {queries} predicted; "
        f"{rounds} rounds\n{'':42}{'s/step':>8}{'clips/s':>9}{'ours is':>10}{'GFLOP/clip':>12}{'of the peak':>13}"
    )

    # A line for each side: medians over its turns, its ratio to our turn of the same round.
    for side, side_turns in turns.items():
        seconds = statistics.median(turn.seconds for turn in side_turns)
        ratio = statistics.median(
            turn.seconds / ours.seconds for turn, ours in zip(side_turns, turns[OURS], strict=True)
        )
        share = statistics.median(flops[side] / turn.seconds / turn.peak_flops for turn in side_turns)
        speedup = "" if side == OURS else f"{ratio:.2f}x"
        print(
            f"  {side:<40}{seconds:8.3f}{clips / seconds:9.1f}{speedup:>10}"
            f"{flops[side] / clips / 1e9:12.1f}{share:13.0%}",
            flush=True,
        )
    peak_flops = statistics.median(turn.peak_flops for turn in turns[OURS])
    goal = "1.7x" if bf16 else "1.25x"
    print(f"  peak {peak_flops / 1e9:.0f} GFLOP/s; wanted: {goal} and 40 % of the peak")


def measure_cost(recipe: Pretrain, device_name: str, bf16: bool, threads: int) -> tuple[float, float]:
    """Return seconds of a step (the quicker of two) and bytes at its peak, in a process that does nothing else."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)

    # A tiny step first: the memory of the libraries is not the model's.
    tiny = pretrain_recipe("smoke").with_counts(clips_per_step=1)
    PretrainTrainer(tiny, device).train_step(0, noise_batch(tiny, device))
    bytes_before = 0.0 if device.type == "cuda" else memory_mb(field="VmRSS") * 1e6

    # Three steps, of which the first warms up.
    trainer = PretrainTrainer(recipe, device, precision=precision_of(device, bf16))
    batch = noise_batch(recipe, device)
    seconds = []
    for _ in range(3):
        start = read_clock(device)
        trainer.train_step(recipe.steps // 2, batch)
        seconds.append(read_clock(device) - start)
    peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else memory_mb() * 1e6
    return min(seconds[1:]), peak_bytes - bytes_before


def print_cost_table(clips: int, device: torch.device, bf16: bool) -> None:
    """Print the cost of Audio-JEPA with a ViT-S by clip length and by batch."""
    base = row_recipe("audio-jepa-s", clips)
    longer = [with_encoder(base, "s", PatchGrid.from_size(frames, 128)) for frames in LENGTHS]
    larger = [base.with_counts(clips_per_step=count) for count in (2 * clips, 4 * clips)]
    print(
        f"\naudio-jepa-s, {'bf16' if bf16 else 'fp32'}: cost by clip length and batch, a process each\n"
        f"{'frames':>8}{'tokens':>8}{'clips':>7}{'s/step':>9}{'clips/s':>9}{'memory GB':>11}{'estimated':>11}"
    )
    for recipe in (*longer, *larger):
        # A process that has run nothing else, so that its peak is this step's.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            arguments = (recipe, str(device), bf16, torch.get_num_threads())
            seconds, peak_bytes = pool.apply(measure_cost, arguments)
        estimate = pretrain_memory(recipe, bf16=bf16, written_out=bf16 and device.type == "cpu")

        grid = recipe.model.encoder.grid
        count = recipe.clips_per_step
        print(
            f"{grid.frames:8}{grid.tokens:8}{count:7}{seconds:9.2f}{count / seconds:9.1f}"
            f"{peak_bytes / BYTES_PER_GB:11.2f}{estimate.total_bytes / BYTES_PER_GB:11.2f}",
            flush=True,
        )


def print_data_wait(clips: int, device: torch.device) -> None:
    """Print how long a run over a store waits for its batches, once its first step is over."""
    recipe = replace(row_recipe("audio-jepa-s", clips), log_every=1)
    with tempfile.TemporaryDirectory(prefix="bench-step-") as scratch:
        folder = Path(scratch)
        store = folder / "clips.zarr"

        # A store of generated clips.
        make_files(folder, ["wav"], WAIT_CLIPS)
        corpus = audioset_corpus([folder / "wav"], [folder / LIST])
        output = StoreOutput(path=store, spec=preset_mel_spec(recipe.mel))
        build_store(corpus, output, BuildOptions(workers=2))

        # A short run over it; its first step waits for everything to start.
        run = pretrain(
            store, recipe, folder / "run", steps=WAIT_STEPS, device=device.type, say=lambda line: None
        )
        lines = run.read_metrics()[1:]
    wait = statistics.median(line["data_wait"] for line in lines)
    speed = statistics.median(line["clips_per_s"] for line in lines)
    print(
        f"\npre-training audio-jepa-s from a store: {speed:.1f} clips/s, {wait:.1%} of the time waiting for data"
    )


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
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
    return parser.parse_args()


def main() -> None:
    """Print the tables."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    clips = options.clips or (64 if device.type == "cuda" else 4)

    # The machine, and the precisions that it has in hardware.
    hardware_bf16, precision_text = hardware_precision(device)
    precisions = options.precisions or (("fp32", "bf16") if hardware_bf16 else ("fp32",))
    print(f"{machine('ajepa', 'torch', 'numpy')}\n{options.threads} threads; {precision_text}")
    if options.precisions is None and not hardware_bf16:
        print("bf16: left out, this machine would only imitate it (--precisions bf16 times it all the same)")

    for name in options.rows:
        for precision in precisions:
            print_step_table(
                name,
                row_recipe(name, clips),
                device,
                bf16=precision == "bf16",
                compiled=options.compile,
                rounds=options.rounds,
            )
    if not options.no_costs:
        print_cost_table(clips, device, hardware_bf16)
    if not options.no_wait:
        print_data_wait(clips, device)


if __name__ == "__main__":
    main()
