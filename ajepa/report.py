"""A run, seen: its curves, its masks over a real clip, its probes; PNG files."""

import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from ajepa.evaluate import EVALUATION, RANDOM, STATISTICS, TRAINED, Evaluation
from ajepa.masking import Masks
from ajepa.patches import PatchGrid
from ajepa.recipes import Pretrain, from_json
from ajepa.run import Json, Run
from ajepa.training_set import open_store, train_splits
from pipeline.errors import RunError
from pipeline.store import FeatureStore

matplotlib.use("Agg")
HIDDEN = "#14141e"
TARGETS = ("#4cc9f0", "#f72585", "#ffd166", "#80ed99")
COLOURS = {TRAINED: "#4361ee", RANDOM: "#9aa0b5", STATISTICS: "#f4a261"}


def report(store: Path | str | FeatureStore, run_path: Path, out: Path) -> list[Path]:
    """Draw `curves.png`, `masks.png` and, once evaluated, `probes.png` into `out`; returns what was drawn."""
    run = Run.open(run_path)
    recipe = from_json(run.recipe)
    store = open_store(store, recipe)
    if not run.metrics():
        raise RunError(f"{run.path}: nothing is logged yet; let `ajepa-train pretrain` take some steps first")
    out.mkdir(parents=True, exist_ok=True)
    figures = {"curves.png": curves(run.metrics(), recipe), "masks.png": masks(store, recipe, run)}
    if (run.path / EVALUATION).exists():
        evaluation = Evaluation.from_json(json.loads((run.path / EVALUATION).read_text()))
        figures["probes.png"] = probes(evaluation)
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=120)
    return [out / name for name in figures]


def curves(lines: list[Json], recipe: Pretrain) -> Figure:
    """Loss, explained share of the targets, spread of targets and predictions, rate, momentum, speed."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3).flat
    figure.suptitle(f"{recipe.name}: {lines[-1]['step']} steps of {recipe.clips_per_step} clips", fontsize=12)
    curve(axes[0], lines, {"loss": "loss"}, smooth=True)
    axes[0].set_title(f"loss ({recipe.model.loss})")
    curve(axes[1], lines, {"explained": "explained", "cosine": "cosine"}, smooth=True)
    axes[1].set_title("predictions against targets")
    curve(
        axes[2], lines, {"target_std": "targets, before norm", "prediction_std": "predictions"}, smooth=True
    )
    axes[2].set_title("spread over tokens (0: collapsed)")
    axes[2].set_ylim(bottom=0)
    curve(axes[3], lines, {"lr": "learning rate"})
    axes[3].set_title("learning rate")
    curve(axes[4], lines, {"momentum": "momentum"})
    axes[4].set_title("target encoder's momentum")
    curve(axes[5], lines, {"clips_per_s": "clips/s"})
    waited = np.mean([line["data_wait"] for line in lines])
    axes[5].set_title(f"clips/s (waiting for data: {waited:.1%})")
    axes[5].set_ylim(bottom=0)
    for each in axes:
        each.set_xlabel("step")
    return figure


def curve(axes: Axes, lines: list[Json], names: dict[str, str], *, smooth: bool = False) -> None:
    """Logged values over steps; with `smooth` faint, under their running mean over a twentieth of the run."""
    step_N = np.array([line["step"] for line in lines])
    for (name, label), colour in zip(names.items(), ("#4361ee", "#f72585"), strict=False):
        value_N = np.array([line[name] for line in lines])
        axes.plot(
            step_N, value_N, color=colour, alpha=0.25 if smooth else 1.0, label=None if smooth else label
        )
        if smooth:
            axes.plot(step_N, running_mean(value_N, max(1, len(lines) // 20)), color=colour, label=label)
    axes.grid(alpha=0.25)
    if len(names) > 1:
        axes.legend(fontsize=8)


def running_mean(value_N: np.ndarray, width: int) -> np.ndarray:
    """The mean of each value and up to `width` before it."""
    total_N = np.cumsum(np.concatenate([[0.0], value_N]))
    end_N = np.arange(1, len(value_N) + 1)
    start_N = np.maximum(0, end_N - width - 1)
    return (total_N[end_N] - total_N[start_N]) / (end_N - start_N)


def masks(store: FeatureStore, recipe: Pretrain, run: Run, *, draws: int = 3) -> Figure:
    """One clip, and what the context encoder sees of it at five points of the run, `draws` masks each."""
    mel_TF, grid = loudest_view(store, recipe, run), recipe.model.encoder.grid
    points = (0.0, 0.05, 0.25, 0.5, 1.0)
    figure = Figure(figsize=(3.0 * (draws + 1) + 0.6, 1.9 * len(points) + 0.6), layout="constrained")
    axes_RC = figure.subplots(len(points), draws + 1, squeeze=False)
    for axes_C, point in zip(axes_RC, points, strict=True):
        step = min(recipe.steps - 1, round(point * recipe.steps))
        show(axes_C[0], mel_TF)
        axes_C[0].set_title("the clip", fontsize=8)
        axes_C[0].set_ylabel(f"step {step:,}", fontsize=9)
        for draw, axes in enumerate(axes_C[1:]):
            rng = np.random.default_rng([recipe.seed, step, draw])
            maker = recipe.masks.maker(step, rng)
            drawn = maker.sample(rng, grid, batch=1)
            show(axes, mel_TF, overlay(drawn, grid))
            seen = drawn.context_BK.shape[1] / grid.tokens
            axes.set_title(f"{type(maker).__name__}, context {seen:.0%}", fontsize=8)
    seconds = recipe.view_frames * store.spec.hop_samples / store.spec.sample_rate_hz
    figure.suptitle(
        f"{recipe.name}: {seconds:.2f} s of a clip, low bands below. Visible: the context; colours: targets;"
        " dark: hidden from both",
        fontsize=10,
    )
    return figure


def loudest_view(store: FeatureStore, recipe: Pretrain, run: Run) -> np.ndarray:
    """The first view, normalised `[T, F]`, of the train clip among 32 in which most goes on."""
    rows_N = store.good_rows(train_splits(store))
    full_N = rows_N[store.n_frames_N[rows_N] == store.n_frames_N[rows_N].max()]
    frames = min(recipe.view_frames, store.frames)
    mel_BTF = store.offset + store.scale * store.read(full_N[:32])[:, :frames].astype(np.float32)
    mel_BTF = (mel_BTF - run.identity["mean"]) / run.identity["std"]
    busiest = mel_BTF.std(axis=1).mean(axis=1).argmax()
    return np.pad(mel_BTF[busiest], ((0, recipe.view_frames - frames), (0, 0)))


def show(axes: Axes, mel_TF: np.ndarray, over_RC4: np.ndarray | None = None) -> None:
    """A spectrogram, low bands below, with patch colours over it."""
    extent = (0, mel_TF.shape[0], 0, mel_TF.shape[1])
    axes.imshow(mel_TF.T, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=-2.5, vmax=2.5)
    if over_RC4 is not None:
        axes.imshow(over_RC4, origin="lower", aspect="auto", extent=extent, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def overlay(masks: Masks, grid: PatchGrid) -> np.ndarray:
    """Colours `[row, col, rgba]` of one clip's patches: context clear, targets tinted, the rest dark."""
    colour_P4 = np.tile(to_rgba(HIDDEN, 0.92), (grid.tokens, 1))
    for group, targets_Q in enumerate(masks.targets_BGQ[0]):
        colour_P4[targets_Q] = to_rgba(TARGETS[group % len(TARGETS)], 0.75)
    colour_P4[masks.context_BK[0]] = 0.0
    return colour_P4.reshape(grid.cols, grid.rows, 4).swapaxes(0, 1)  # tokens count rows first


def probes(evaluation: Evaluation) -> Figure:
    """Bars of mAP: the encoder, the random one, log-mel statistics; a line where chance lies."""
    sets = list(dict.fromkeys(score.label_set for score in evaluation.scores))
    figure = Figure(figsize=(4.6 * len(sets), 3.6), layout="constrained")
    for axes, label_set in zip(
        figure.subplots(1, len(sets), sharey=True, squeeze=False)[0], sets, strict=True
    ):
        for place, (name, colour) in enumerate(COLOURS.items()):
            values = [evaluation.of(name, probe, label_set).map for probe in ("linear", "knn")]
            bars = axes.bar(np.arange(2) + 0.27 * (place - 1), values, 0.25, color=colour, label=name)
            axes.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
        chance = evaluation.of(STATISTICS, "knn", label_set).chance
        axes.axhline(chance, color="black", linestyle=":", label="chance")
        axes.set_xticks([0, 1], ["linear probe", "kNN"])
        axes.set_title(f"{label_set} labels", fontsize=10)
        axes.set_ylim(0, 1)
    figure.axes[0].set_ylabel("mAP")
    figure.axes[0].legend(fontsize=8, loc="upper left")
    figure.suptitle(f"Frozen features at step {evaluation.protocol['step']}", fontsize=11)
    return figure
