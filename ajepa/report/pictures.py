"""The report of a run as PNG files (training curves, masks over a stored clip, probe scores) or as one HTML page."""

from dataclasses import dataclass
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
from ajepa.report.charts import running_mean
from ajepa.report.masks import PNG_DPI, busiest_stored_view, mask_figure
from ajepa.report.page import PROBE_KEY_PREFIXES, write_run_page
from ajepa.training.run import Json, Run
from pipeline.errors import RunError
from pipeline.store.feature_store import FeatureStore

matplotlib.use("Agg")

CURVE_COLOURS = ("#4361ee", "#f72585", "#2a9d8f", "#f4a261", "#7b2cbf", "#6c757d")

FEATURE_COLOURS = {TRAINED: "#4361ee", RANDOM: "#9aa0b5", STATISTICS: "#f4a261"}

MAX_DOTTED_VALUES = 30  # a curve with at most this many values shows each as a dot

BAR_STEP = 0.27  # distance between the bars of two kinds of features; the distance between two probes is 1

BAR_WIDTH = 0.25


def draw_run_report(
    store: Path | str | FeatureStore,
    run_path: Path,
    out: Path | None = None,
    *,
    html: Path | None = None,
    with_sounds: bool = False,
) -> list[Path]:
    """Draw pictures of a run into the folder `out`, a page into the file `html`, or both; returns the written files.

    With sounds, the page plays some clips. `out` gets `curves.png`, `masks.png` and a picture of each evaluation:
    `probes.png`, or `probes-STORE.png` if the store of the evaluation is not the run's own. A fine-tuned run has only a
    page. Raises RunError if there is nothing to show.
    """
    # Open the run and its store; a store that does not fit the run is refused before anything is drawn.
    run = Run.open(run_path)
    if run.is_finetuned and out is not None:
        raise RunError(
            f"{run.path}: was fine-tuned, and such a run has a page but no pictures; give --html, leave out --out"
        )
    recipe = recipe_from_json(run.recipe)
    store = open_report_store(store, run, recipe)
    if not run.read_metrics():
        raise RunError(f"{run.path}: nothing is logged yet; let its training take some steps first")

    # The page, then the pictures.
    written = []
    if html is not None:
        write_run_page(store, run, html, with_sounds=with_sounds)
        written.append(html)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in run_figures(store, run, recipe).items():
            figure.savefig(out / name, dpi=PNG_DPI)
            written.append(out / name)
    return written


def open_report_store(store: Path | str | FeatureStore, run: Run, recipe: Pretrain) -> FeatureStore:
    """Return the opened store; raises an error if its features differ from those on which the run was trained."""
    if not run.is_finetuned:
        return open_training_store(store, recipe)
    if not isinstance(store, FeatureStore):
        store = FeatureStore.open(store)
    store.refuse_other_front_end(run.identity.mel, f"{run.path} was trained on")
    return store


def run_figures(store: FeatureStore, run: Run, recipe: Pretrain) -> dict[str, Figure]:
    """Return the pictures of a pre-trained run by file name."""
    mel_TF = busiest_stored_view(store, recipe, run.identity.mean, run.identity.std)
    figures = {
        "curves.png": draw_training_curves(run.read_metrics(), recipe),
        "masks.png": mask_figure(mel_TF, recipe, store.spec),
    }

    # The evaluations: evaluation.json, and evaluation-STORE.json for each other store.
    evaluation_stem = Path(EVALUATION_FILE).stem
    for file in sorted(run.path.glob(f"{evaluation_stem}*.json")):
        name = file.stem.replace(evaluation_stem, "probes")
        figures[f"{name}.png"] = draw_probe_scores(Evaluation.read_json(file))
    return figures


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePanel:
    """One chart of logged values over steps."""

    title: str
    label_of_key: dict[str, str]  # key in the log: name in the legend
    smooth: bool = False  # add a running mean, as in `draw_logged_curves`
    starts_at_zero: bool = False


def draw_training_curves(lines: list[Json], recipe: Pretrain) -> Figure:
    """Draw loss, explained share of the targets, spreads, rank, probes, learning rate, momentum and speed."""
    # The charts, in the order of reading: down a column, then the next column.
    waiting_share = np.mean([line["data_wait"] for line in lines])
    panels = (
        CurvePanel(
            title=f"loss ({recipe.model.loss})",
            label_of_key={"loss": "loss", "token_loss": "of tokens", "clip_loss": "of clips"},
            smooth=True,
        ),
        CurvePanel(
            title="predictions against targets",
            label_of_key={"explained": "explained", "cosine": "cosine"},
            smooth=True,
        ),
        CurvePanel(
            title="spread over tokens (0: collapsed)",
            label_of_key={"target_std": "targets, before norm", "prediction_std": "predictions"},
            smooth=True,
            starts_at_zero=True,
        ),
        CurvePanel(
            title=f"effective rank on held-out clips (of {recipe.model.encoder.width})",
            label_of_key={"health_rank": "of tokens", "health_rank_clips": "of clips"},
            starts_at_zero=True,
        ),
        CurvePanel(
            title="mAP of probes while training",
            label_of_key={key: probe_label(key) for key in logged_probe_keys(lines)},
            starts_at_zero=True,
        ),
        CurvePanel(title="learning rate", label_of_key={"lr": "learning rate"}),
        CurvePanel(title="target encoder's momentum", label_of_key={"momentum": "momentum"}),
        CurvePanel(
            title=f"clips/s (waiting for data: {waiting_share:.1%})",
            label_of_key={"clips_per_s": "clips/s"},
            starts_at_zero=True,
        ),
    )

    # The figure has two panels in a column.
    figure = Figure(figsize=(15, 6), layout="constrained")
    axes_of_panels = figure.subplots(2, len(panels) // 2).T.flat
    figure.suptitle(f"{recipe.name}: {lines[-1]['step']} steps of {recipe.clips_per_step} clips", fontsize=12)
    for axes, panel in zip(axes_of_panels, panels, strict=True):
        draw_logged_curves(axes, lines, panel.label_of_key, smooth=panel.smooth)
        axes.set_title(panel.title)
        axes.set_xlabel("step")
        if panel.starts_at_zero:
            axes.set_ylim(bottom=0)
    return figure


def logged_probe_keys(lines: list[Json]) -> list[str]:
    """Return the log keys of a run's probes; each key names a kind of probe and a label set."""
    return sorted({key for line in lines for key in line if key.startswith(PROBE_KEY_PREFIXES)})


def probe_label(key: str) -> str:
    """Return the name of a probe's curve; older runs measured their probes on eval clips, and the name says so."""
    label = key.removeprefix("val_").removeprefix("probe_").replace("_", ", ")
    return label if key.startswith("val_") else f"{label} (eval clips)"


def draw_logged_curves(
    axes: Axes, lines: list[Json], label_of_key: dict[str, str], *, smooth: bool = False
) -> None:
    """Draw logged values over steps, as dots if they are few; without any value, draw a text that says so.

    With `smooth`, the values are faint, and their running mean over a twentieth of the run is drawn on top.
    """
    axes.grid(alpha=0.25)
    for number, (key, label) in enumerate(label_of_key.items()):
        colour = CURVE_COLOURS[number % len(CURVE_COLOURS)]
        # Few values are drawn as dots, because a line would hide how few they are.
        points = [(line["step"], line[key]) for line in lines if key in line]
        if not points:
            continue  # a part of the loss that this recipe does not have
        point_N2 = np.array(points, float).reshape(-1, 2)
        step_N = point_N2[:, 0]
        value_N = point_N2[:, 1]
        marker = "." if len(step_N) < MAX_DOTTED_VALUES else None
        if not smooth:
            axes.plot(step_N, value_N, color=colour, alpha=1.0, marker=marker, label=label)
            continue

        # The faint values, then their running mean.
        axes.plot(step_N, value_N, color=colour, alpha=0.25, marker=marker)
        mean_N = running_mean(value_N, max(1, len(step_N) // 20))
        axes.plot(step_N, mean_N, color=colour, label=label)

    # Only some runs log probes and health.
    if not any(key in line for line in lines for key in label_of_key):
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
    elif len(label_of_key) > 1:
        axes.legend(fontsize=8)


def draw_probe_scores(evaluation: Evaluation) -> Figure:
    """Draw bars of mAP or accuracy with intervals for the kinds of features, and a line at chance level."""
    # A chart for each label set.
    label_sets = evaluation.label_sets
    probes = list(dict.fromkeys(score.probe for score in evaluation.scores))
    size_inches = ((1.6 + len(probes)) * 1.4 * len(label_sets), 3.6)
    figure = Figure(figsize=size_inches, layout="constrained")
    axes_of_sets = figure.subplots(1, len(label_sets), sharey=True, squeeze=False)[0]
    for axes, label_set in zip(axes_of_sets, label_sets, strict=True):
        scores = [score for score in evaluation.scores if score.label_set == label_set]

        # A group of bars for each probe, with one bar for each kind of features.
        for number, (features, colour) in enumerate(FEATURE_COLOURS.items()):
            shift = BAR_STEP * (number - 1)
            placed_estimates = [
                (place + shift, score.primary_estimate)
                for place, probe in enumerate(probes)
                for score in scores
                if (score.features, score.probe) == (features, probe)
            ]
            draw_score_bars(axes, placed_estimates, colour, features)

        # The chance level depends only on the clips, so every score has the same one.
        first = scores[0]
        axes.axhline(first.chance, color="black", linestyle=":", label="chance")
        axes.set_xticks(range(len(probes)), [PROBE_TITLES[probe] for probe in probes])
        axes.set_title(f"{label_set} labels: {METRIC_TITLES[PRIMARY_METRIC[first.kind]]}", fontsize=10)
        axes.set_ylim(0, 1.05)
    axes_of_sets[0].legend(fontsize=8, loc="upper left")
    protocol = evaluation.protocol
    figure.suptitle(f"Frozen features at step {protocol.step} on {protocol.store_name}", fontsize=11)
    return figure


def draw_score_bars(
    axes: Axes, placed_estimates: list[tuple[float, MetricEstimate]], colour: str, label: str
) -> None:
    """Draw a bar for each position and estimate, with its interval as a line and its value above the line."""
    places = [place for place, _ in placed_estimates]
    estimates = [estimate for _, estimate in placed_estimates]
    values = [estimate.value for estimate in estimates]
    # The interval may not contain the value; error bars must not be negative.
    below = [max(0.0, estimate.value - estimate.low) for estimate in estimates]
    above = [max(0.0, estimate.high - estimate.value) for estimate in estimates]
    bars = axes.bar(places, values, BAR_WIDTH, color=colour, label=label, yerr=[below, above])
    axes.bar_label(bars, fmt="%.3f", fontsize=7, padding=2)
