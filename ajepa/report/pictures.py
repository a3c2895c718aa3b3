"""A run, seen: its curves, its masks over a real clip, its probes; PNG files, or one page."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ajepa.evaluate.features import RANDOM, STATISTICS, TRAINED
from ajepa.evaluate.metrics import MetricEstimate
from ajepa.evaluate.result import EVALUATION_FILE, METRIC_TITLES, PRIMARY_METRIC, PROBE_TITLES, Evaluation
from ajepa.pretrain.training_set import open_training_store
from ajepa.recipes.catalogue import recipe_from_json
from ajepa.recipes.pretrain import Pretrain
from ajepa.report.masks import busiest_stored_view, mask_figure
from ajepa.report.page import write_run_page
from ajepa.training.run import Json, Run
from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import RunError
from pipeline.store.feature_store import FeatureStore

matplotlib.use("Agg")

CURVE_COLOURS = ("#4361ee", "#f72585", "#2a9d8f", "#f4a261", "#7b2cbf", "#6c757d")

FEATURE_COLOURS = {TRAINED: "#4361ee", RANDOM: "#9aa0b5", STATISTICS: "#f4a261"}


def draw_run_report(
    store: Path | str | FeatureStore, run_path: Path, out: Path | None = None, *, html: Path | None = None
) -> list[Path]:
    """Draw `curves.png`, `masks.png` and of each evaluation `probes.png` into `out`; returns what was drawn.

    Evaluations on stores that the run was not trained on are drawn as `probes-STORE.png`. With `html` all of it,
    and what the encoder makes of clips that it never saw, on one page; of a fine-tuned run there is the page alone.
    RunError where there is nothing to show.
    """
    run = Run.open(run_path)
    if run.is_finetuned and out is not None:
        raise RunError(f"{run.path}: is fine-tuned, of which there are no pictures to draw; leave out --out")
    recipe = recipe_from_json(run.recipe)
    if run.is_finetuned:
        store = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
        store.refuse_other_front_end(MelSpec.from_json(run.identity["mel"]), f"{run.path} was trained on")
    else:
        store = open_training_store(store, recipe)
    if not run.read_metrics():
        raise RunError(f"{run.path}: nothing is logged yet; let its training take some steps first")
    if html is not None:
        write_run_page(store, run, html)
    if out is None:
        return [] if html is None else [html]
    out.mkdir(parents=True, exist_ok=True)
    mel_TF = busiest_stored_view(store, recipe, run.identity["mean"], run.identity["std"])
    masks = mask_figure(mel_TF, recipe, store.spec)
    figures = {"curves.png": draw_training_curves(run.read_metrics(), recipe), "masks.png": masks}
    for file in sorted(run.path.glob(f"{Path(EVALUATION_FILE).stem}*.json")):
        name = file.name.replace(Path(EVALUATION_FILE).stem, "probes").replace(".json", ".png")
        figures[name] = draw_probe_scores(Evaluation.read_json(file))
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=120)
    return [*([] if html is None else [html]), *(out / name for name in figures)]


def draw_training_curves(lines: list[Json], recipe: Pretrain) -> Figure:
    """Loss, explained share of the targets, spreads, rank, probes, rate, momentum, speed."""
    figure = Figure(figsize=(15, 6), layout="constrained")
    axes = figure.subplots(2, 4).T.flat
    figure.suptitle(f"{recipe.name}: {lines[-1]['step']} steps of {recipe.clips_per_step} clips", fontsize=12)
    draw_logged_curve(axes[0], lines, {"loss": "loss"}, smooth=True)
    axes[0].set_title(f"loss ({recipe.model.loss})")
    draw_logged_curve(axes[1], lines, {"explained": "explained", "cosine": "cosine"}, smooth=True)
    axes[1].set_title("predictions against targets")
    draw_logged_curve(
        axes[2], lines, {"target_std": "targets, before norm", "prediction_std": "predictions"}, smooth=True
    )
    axes[2].set_title("spread over tokens (0: collapsed)")
    axes[2].set_ylim(bottom=0)
    draw_logged_curve(axes[3], lines, {"health_rank": "of tokens", "health_rank_clips": "of clips"})
    axes[3].set_title(f"effective rank on held-out clips (of {recipe.model.encoder.width})")
    axes[3].set_ylim(bottom=0)
    draw_logged_curve(
        axes[4],
        lines,
        {name: name.removeprefix("probe_").replace("_", ", ") for name in logged_probe_keys(lines)},
    )
    axes[4].set_title("mAP of probes under way")
    axes[4].set_ylim(bottom=0)
    draw_logged_curve(axes[5], lines, {"lr": "learning rate"})
    axes[5].set_title("learning rate")
    draw_logged_curve(axes[6], lines, {"momentum": "momentum"})
    axes[6].set_title("target encoder's momentum")
    draw_logged_curve(axes[7], lines, {"clips_per_s": "clips/s"})
    waited = np.mean([line["data_wait"] for line in lines])
    axes[7].set_title(f"clips/s (waiting for data: {waited:.1%})")
    axes[7].set_ylim(bottom=0)
    for each in axes:
        each.set_xlabel("step")
    return figure


def logged_probe_keys(lines: list[Json]) -> list[str]:
    """The probes of a run, each of a kind and a label set."""
    return sorted({key for line in lines for key in line if key.startswith(("probe_knn_", "probe_linear_"))})


def draw_logged_curve(
    axes: Axes, lines: list[Json], label_of_key: dict[str, str], *, smooth: bool = False
) -> None:
    """Logged values over steps, as dots where they are few, or the words that there are none.

    With `smooth` faint, under their running mean over a twentieth of the run.
    """
    axes.grid(alpha=0.25)
    for number, (name, label) in enumerate(label_of_key.items()):
        colour = CURVE_COLOURS[number % len(CURVE_COLOURS)]
        step_N, value_N = (
            np.array([(line["step"], line[name]) for line in lines if name in line]).reshape(-1, 2).T
        )
        dots = "." if len(step_N) < 30 else None
        faint = 0.25 if smooth else 1.0
        axes.plot(step_N, value_N, color=colour, alpha=faint, marker=dots, label=None if smooth else label)
        if smooth:
            axes.plot(step_N, running_mean(value_N, max(1, len(step_N) // 20)), color=colour, label=label)
    if not any(name in line for line in lines for name in label_of_key):
        axes.text(0.5, 0.5, "not looked at", ha="center", va="center", transform=axes.transAxes)
    elif len(label_of_key) > 1:
        axes.legend(fontsize=8)


def running_mean(value_N: np.ndarray, width: int) -> np.ndarray:
    """The mean of each value and up to `width` before it."""
    total_N = np.cumsum(np.concatenate([[0.0], value_N]))
    end_N = np.arange(1, len(value_N) + 1)
    start_N = np.maximum(0, end_N - width - 1)
    return (total_N[end_N] - total_N[start_N]) / (end_N - start_N)


def draw_probe_scores(evaluation: Evaluation) -> Figure:
    """Bars of mAP or accuracy with their intervals: encoder, random one, log-mel statistics; a line at chance."""
    sets = evaluation.label_sets
    asked = list(dict.fromkeys(score.probe for score in evaluation.scores))
    figure = Figure(figsize=((1.6 + len(asked)) * 1.4 * len(sets), 3.6), layout="constrained")
    panes = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for axes, label_set in zip(panes, sets, strict=True):
        for place, (name, colour) in enumerate(FEATURE_COLOURS.items()):
            told = [
                (i, s)
                for i, probe in enumerate(asked)
                for s in evaluation.scores
                if (s.features, s.probe, s.label_set) == (name, probe, label_set)
            ]
            draw_score_bars(
                axes, [(i + 0.27 * (place - 1), s.primary_estimate) for i, s in told], colour, name
            )
        one = next(score for score in evaluation.scores if score.label_set == label_set)
        axes.axhline(one.chance, color="black", linestyle=":", label="chance")
        axes.set_xticks(range(len(asked)), [PROBE_TITLES[probe] for probe in asked])
        axes.set_title(f"{label_set} labels: {METRIC_TITLES[PRIMARY_METRIC[one.kind]]}", fontsize=10)
        axes.set_ylim(0, 1.05)
    panes[0].legend(fontsize=8, loc="upper left")
    step, store = evaluation.protocol["step"], evaluation.protocol["store"]
    figure.suptitle(f"Frozen features at step {step} on {store}", fontsize=11)
    return figure


def draw_score_bars(
    axes: Axes, placed_estimates: list[tuple[float, MetricEstimate]], colour: str, label: str
) -> None:
    """A bar for each place and estimate, its interval as a line, its value above that."""
    values = [estimate.value for _, estimate in placed_estimates]
    ends = [
        [max(0.0, e.value - e.low) for _, e in placed_estimates],
        [max(0.0, e.high - e.value) for _, e in placed_estimates],
    ]
    drawn = axes.bar(
        [place for place, _ in placed_estimates], values, 0.25, color=colour, label=label, yerr=ends
    )
    axes.bar_label(drawn, fmt="%.3f", fontsize=7, padding=2)
