"""A run, seen: its curves, its masks over a real clip, its probes; PNG files, or one page."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ajepa.evaluate.features import RANDOM, STATISTICS, TRAINED
from ajepa.evaluate.metrics import Estimate
from ajepa.evaluate.result import EVALUATION, PRIMARY, PROBES, TITLES, Evaluation
from ajepa.pretrain.training_set import open_store
from ajepa.recipes.catalogue import from_json
from ajepa.recipes.pretrain import Pretrain
from ajepa.report.masks import mask_figure, stored_view
from ajepa.report.page import write_run_page
from ajepa.training.run import Json, Run
from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import RunError
from pipeline.store.feature_store import FeatureStore

matplotlib.use("Agg")

SERIES = ("#4361ee", "#f72585", "#2a9d8f", "#f4a261", "#7b2cbf", "#6c757d")

COLOURS = {TRAINED: "#4361ee", RANDOM: "#9aa0b5", STATISTICS: "#f4a261"}


def report(
    store: Path | str | FeatureStore, run_path: Path, out: Path | None = None, *, html: Path | None = None
) -> list[Path]:
    """Draw `curves.png`, `masks.png` and of each evaluation `probes.png` into `out`; returns what was drawn.

    Evaluations on stores that the run was not trained on are drawn as `probes-STORE.png`. With `html` all of it,
    and what the encoder makes of clips that it never saw, on one page; of a fine-tuned run there is the page alone.
    RunError where there is nothing to show.
    """
    run = Run.open(run_path)
    if run.finetuned and out is not None:
        raise RunError(f"{run.path}: is fine-tuned, of which there are no pictures to draw; leave out --out")
    recipe = from_json(run.recipe)
    if run.finetuned:
        store = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
        store.refuse_other_front_end(MelSpec.from_json(run.identity["mel"]), f"{run.path} was trained on")
    else:
        store = open_store(store, recipe)
    if not run.metrics():
        raise RunError(f"{run.path}: nothing is logged yet; let its training take some steps first")
    if html is not None:
        write_run_page(store, run, html)
    if out is None:
        return [] if html is None else [html]
    out.mkdir(parents=True, exist_ok=True)
    mel_TF = stored_view(store, recipe, run.identity["mean"], run.identity["std"])
    masks = mask_figure(mel_TF, recipe, store.spec)
    figures = {"curves.png": curves(run.metrics(), recipe), "masks.png": masks}
    for file in sorted(run.path.glob(f"{Path(EVALUATION).stem}*.json")):
        name = file.name.replace(Path(EVALUATION).stem, "probes").replace(".json", ".png")
        figures[name] = probes(Evaluation.read(file))
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=120)
    return [*([] if html is None else [html]), *(out / name for name in figures)]


def curves(lines: list[Json], recipe: Pretrain) -> Figure:
    """Loss, explained share of the targets, spreads, rank, probes, rate, momentum, speed."""
    figure = Figure(figsize=(15, 6), layout="constrained")
    axes = figure.subplots(2, 4).T.flat
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
    curve(axes[3], lines, {"health_rank": "of tokens", "health_rank_clips": "of clips"})
    axes[3].set_title(f"effective rank on held-out clips (of {recipe.model.encoder.width})")
    axes[3].set_ylim(bottom=0)
    curve(axes[4], lines, {name: name.removeprefix("probe_").replace("_", ", ") for name in probed(lines)})
    axes[4].set_title("mAP of probes under way")
    axes[4].set_ylim(bottom=0)
    curve(axes[5], lines, {"lr": "learning rate"})
    axes[5].set_title("learning rate")
    curve(axes[6], lines, {"momentum": "momentum"})
    axes[6].set_title("target encoder's momentum")
    curve(axes[7], lines, {"clips_per_s": "clips/s"})
    waited = np.mean([line["data_wait"] for line in lines])
    axes[7].set_title(f"clips/s (waiting for data: {waited:.1%})")
    axes[7].set_ylim(bottom=0)
    for each in axes:
        each.set_xlabel("step")
    return figure


def probed(lines: list[Json]) -> list[str]:
    """The probes of a run, each of a kind and a label set."""
    return sorted({key for line in lines for key in line if key.startswith(("probe_knn_", "probe_linear_"))})


def curve(axes: Axes, lines: list[Json], names: dict[str, str], *, smooth: bool = False) -> None:
    """Logged values over steps, as dots where they are few, or the words that there are none.

    With `smooth` faint, under their running mean over a twentieth of the run.
    """
    axes.grid(alpha=0.25)
    for number, (name, label) in enumerate(names.items()):
        colour = SERIES[number % len(SERIES)]
        step_N, value_N = (
            np.array([(line["step"], line[name]) for line in lines if name in line]).reshape(-1, 2).T
        )
        dots = "." if len(step_N) < 30 else None
        faint = 0.25 if smooth else 1.0
        axes.plot(step_N, value_N, color=colour, alpha=faint, marker=dots, label=None if smooth else label)
        if smooth:
            axes.plot(step_N, running_mean(value_N, max(1, len(step_N) // 20)), color=colour, label=label)
    if not any(name in line for line in lines for name in names):
        axes.text(0.5, 0.5, "not looked at", ha="center", va="center", transform=axes.transAxes)
    elif len(names) > 1:
        axes.legend(fontsize=8)


def running_mean(value_N: np.ndarray, width: int) -> np.ndarray:
    """The mean of each value and up to `width` before it."""
    total_N = np.cumsum(np.concatenate([[0.0], value_N]))
    end_N = np.arange(1, len(value_N) + 1)
    start_N = np.maximum(0, end_N - width - 1)
    return (total_N[end_N] - total_N[start_N]) / (end_N - start_N)


def probes(evaluation: Evaluation) -> Figure:
    """Bars of mAP or accuracy with their intervals: encoder, random one, log-mel statistics; a line at chance."""
    sets = evaluation.label_sets
    asked = list(dict.fromkeys(score.probe for score in evaluation.scores))
    figure = Figure(figsize=((1.6 + len(asked)) * 1.4 * len(sets), 3.6), layout="constrained")
    panes = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for axes, label_set in zip(panes, sets, strict=True):
        for place, (name, colour) in enumerate(COLOURS.items()):
            told = [
                (i, s)
                for i, probe in enumerate(asked)
                for s in evaluation.scores
                if (s.features, s.probe, s.label_set) == (name, probe, label_set)
            ]
            bars(axes, [(i + 0.27 * (place - 1), s.primary) for i, s in told], colour, name)
        one = next(score for score in evaluation.scores if score.label_set == label_set)
        axes.axhline(one.chance, color="black", linestyle=":", label="chance")
        axes.set_xticks(range(len(asked)), [PROBES[probe] for probe in asked])
        axes.set_title(f"{label_set} labels: {TITLES[PRIMARY[one.kind]]}", fontsize=10)
        axes.set_ylim(0, 1.05)
    panes[0].legend(fontsize=8, loc="upper left")
    step, store = evaluation.protocol["step"], evaluation.protocol["store"]
    figure.suptitle(f"Frozen features at step {step} on {store}", fontsize=11)
    return figure


def bars(axes: Axes, told: list[tuple[float, Estimate]], colour: str, label: str) -> None:
    """A bar for each place and estimate, its interval as a line, its value above that."""
    values = [estimate.value for _, estimate in told]
    ends = [[max(0.0, e.value - e.low) for _, e in told], [max(0.0, e.high - e.value) for _, e in told]]
    drawn = axes.bar([place for place, _ in told], values, 0.25, color=colour, label=label, yerr=ends)
    axes.bar_label(drawn, fmt="%.3f", fontsize=7, padding=2)
