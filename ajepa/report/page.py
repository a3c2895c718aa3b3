"""One self-contained HTML page about a run: curves, masks, predictions, a map of clips, scores and recipe."""

import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from ajepa.evaluate.result import EVALUATION_FILE, METRIC_TITLES
from ajepa.model.classifier import VitSpec, classifier_kind_name
from ajepa.model.jepa import Jepa, JepaSpec
from ajepa.model.patches import PatchGrid
from ajepa.pretrain.monitor import open_training_probe
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.pretrain import Pretrain
from ajepa.report.charts import (
    curve_legend,
    curves_over_steps,
    figure_data_url,
    heat_map_data_url,
    mel_data_url,
    scores_section,
)
from ajepa.report.clip_map import clip_map_section, neighbours_section
from ajepa.report.confusion import confusion_section
from ajepa.report.headline import headline_section, headline_tiles
from ajepa.report.masks import NORMALISED_RANGE, busiest_stored_view, mask_figure
from ajepa.report.model_outputs import (
    HIDING_ROUNDS,
    PageData,
    load_pretrained_model,
    prediction_distance_BP,
    pretrained_views,
)
from ajepa.training.meter import COMPUTE_COST_FILE
from ajepa.training.run import Json, Run
from ajepa.training.trained_run import INITIAL_CHECKPOINT, TrainedRun
from pipeline.files import replacing_file
from pipeline.report.html import (
    Markup,
    definition_list,
    escape_markup,
    html_figure,
    html_tag,
    join_markup,
)
from pipeline.report.players import SoundPlayers
from pipeline.report.store_header import folded
from pipeline.store.feature_store import FeatureStore

RUN_PAGE_SECTIONS = {
    "headline": "Scores beside baselines",
    "confusions": "Confusions",
    "masks": "Masks",
    "curves": "Training curves",
    "predictions": "Predictions of hidden patches",
    "map": "Map of held-out clips",
    "neighbours": "Nearest neighbours",
    "scores": "Every score",
    "recipe": "Recipe, compute, ids and versions",
}

PREDICTED_CLIPS = 3

SHOWN_DISTANCE_RANGE = (0.0, 1.5)  # of the colours, in cosine distance; 1 is that of unrelated vectors

PREDICTED_MEL_FRAMES = 256  # columns of the spectrogram above the distances

# Before a prefix, probes of runs whose probes were still measured on clips of evaluation splits.
PROBE_KEY_PREFIXES = ("val_probe_linear_", "val_probe_knn_", "probe_linear_", "probe_knn_")

PROBE_CHART = "Probes while training, on held-back clips, mAP"

EXACT_KEYS = {"lr", "momentum"}  # functions of the step, which need no smoothing

# The title of each chart, and its curves: key in the log, name in the legend.
LOGGED_CURVES: tuple[tuple[str, dict[str, str]], ...] = (
    ("Loss", {"loss": "all", "token_loss": "tokens", "clip_loss": "clips"}),
    ("Views of a clip (0: alike)", {"disagreement": "disagreement"}),
    ("Distance of z from a normal distribution", {"normality": "normality"}),
    ("Predictions against targets", {"explained": "explained share", "cosine": "cosine"}),
    ("Spread over tokens (0: collapsed)", {"target_std": "targets", "prediction_std": "predictions"}),
    ("Effective rank of the encoder", {"health_rank": "RankMe"}),
    ("Learning rate", {"lr": "learning rate"}),
    ("Teacher's momentum", {"momentum": "momentum"}),
    ("Gradient norm", {"gradient_norm": "norm"}),
    ("Clips a second", {"clips_per_s": "clips/s"}),
)


def write_run_page(store: FeatureStore, run: Run, path: Path, *, with_sounds: bool = False) -> None:
    """Write the page about a run to `path`, whole or not at all; with sounds, it plays the neighbours."""
    # Make the whole text first, so that a run that cannot be shown leaves no file.
    content = run_page_html(store, run, with_sounds=with_sounds)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as scratch:
        scratch.write_text(content, encoding="utf-8")


def run_page_html(store: FeatureStore, run: Run, *, with_sounds: bool = False) -> str:
    """Return the page as text, about 2 MB, most of it the spectrograms of 300 clips.

    The page of a fine-tuned run has confusions, but neither masks nor predictions, because the run has no predictor.
    """
    # The body of each section, in the order of the page.
    page_data = PageData.from_run(store, run)
    recipe = page_data.recipe
    players = SoundPlayers.of_store(store) if with_sounds else None
    bodies = {"headline": headline_section(run, store.location)}
    if page_data.task_scores is not None:
        bodies["confusions"] = confusion_section(page_data.task_scores)
    if isinstance(recipe, Pretrain):
        bodies["masks"] = masks_section(page_data, recipe)
    bodies["curves"] = curves_section(page_data)
    if isinstance(recipe, Pretrain):
        bodies["predictions"] = predictions_section(page_data, recipe)
    bodies["map"] = clip_map_section(page_data)
    bodies["neighbours"] = neighbours_section(page_data, players)
    bodies["scores"] = scores_section(run.path / EVALUATION_FILE)
    bodies["recipe"] = recipe_section(page_data)

    # The sections, in the same frame as a page about a store.
    sections = [
        html_tag("section", html_tag("h2", RUN_PAGE_SECTIONS[name]), body, id=name)
        for name, body in bodies.items()
    ]
    header = run_page_header(page_data, list(bodies))
    frame = importlib.resources.files("pipeline.report").joinpath("page.html").read_text(encoding="utf-8")
    return Template(frame).substitute(
        title=escape_markup(run.path.name), body=join_markup(header, html_tag("main", *sections))
    )


def run_page_header(page_data: PageData, sections: Sequence[str]) -> Markup:
    """Return the name and progress of the run, its scores and cost in large numbers, and links to the sections."""
    # Recipe and progress.
    run = page_data.run
    recipe = page_data.recipe
    mel_spec = page_data.store.spec
    frames = recipe.view_frames if isinstance(recipe, Pretrain) else recipe.model.frames
    network = f"views of {frames * mel_spec.hop_samples / mel_spec.sample_rate_hz:.2f} s"
    if isinstance(recipe.model, JepaSpec | VitSpec):
        encoder = recipe.model.encoder
        network = f"width {encoder.width}, depth {encoder.depth}, {encoder.heads} heads, {network}"
    network_kind = "encoder" if isinstance(recipe, Pretrain) else classifier_kind_name(recipe.model)
    progress = join_markup(
        "Recipe ",
        html_tag("b", recipe.name),
        ", ",
        html_tag("b", f"step {run.newest_step:,}"),
        f" of {recipe.steps:,}, {recipe.clips_per_step} clips each",
    )

    facts = {network_kind: network}
    if isinstance(recipe, Finetune):
        facts |= finetune_task_facts(run)
    facts["shown on"] = page_data.store.location
    links = (html_tag("a", RUN_PAGE_SECTIONS[name], href=f"#{name}") for name in sections)
    return html_tag(
        "header",
        html_tag("h1", run.path.name),
        html_tag("p", progress, class_="lead"),
        headline_tiles(run),
        definition_list(facts.items()),
        html_tag("nav", *links),
    )


def finetune_task_facts(run: Run) -> dict[str, str]:
    """Return the task of a fine-tuned run, its splits, and the weights from which it started."""
    identity = run.task_identity
    labels_per_clip = "one" if identity.single_label else "several"
    origin = "random weights"
    if identity.start:
        origin = f"the encoder of step {identity.start.step:,} ({identity.start.sha256[:12]})"
    return {
        "task": (
            f"{identity.task}, {len(identity.classes)} classes, {labels_per_clip} to a clip, "
            f"by {identity.label_set} labels"
        ),
        "splits": f"{', '.join(identity.train_splits)}; measured on {', '.join(identity.eval_splits)}",
        "started from": origin,
    }


def curves_section(page_data: PageData) -> Markup:
    """Return charts of every logged value over the steps; all probes share a chart, and all label sets of a metric."""
    # The charts whose curves depend on the keys that the run logged.
    lines = page_data.run.read_metrics()
    keys = list(dict.fromkeys(key for line in lines for key in line))
    probe_names = {
        key: key.removeprefix("val_").removeprefix("probe_").replace("_", " ")
        for key in keys
        if key.startswith(PROBE_KEY_PREFIXES)
    }
    held_back = {key: name for key, name in probe_names.items() if key.startswith("val_")}
    measured = {key: name for key, name in probe_names.items() if key not in held_back}
    charts = [
        *LOGGED_CURVES,
        (PROBE_CHART, held_back),
        ("Probes while training, on eval clips, mAP", measured),
    ]
    for metric, metric_title in METRIC_TITLES.items():
        prefix = f"eval_{metric}_"
        label_sets = {key: key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        charts.append((f"Held-out clips while training, {metric_title}", label_sets))
    baselines = initial_probe_scores(page_data, list(held_back))

    # Charts without a value are left out.
    step_N = np.array([line["step"] for line in lines])
    figures = []
    for title, name_by_key in charts:
        curves = [(name, logged_values_N(lines, key)) for key, name in name_by_key.items()]
        curves = [(name, values_N) for name, values_N in curves if np.isfinite(values_N).any()]
        if not curves:
            continue
        legend = curve_legend([name for name, _ in curves]) if len(curves) > 1 else ""
        shown_baselines = baselines if title == PROBE_CHART else []
        description = ""
        if title == "Loss":
            description = loss_description(page_data.recipe)
        elif shown_baselines:
            description = "Dashed: the same probes of the encoder before its first step."
        is_exact = bool(EXACT_KEYS & set(name_by_key))
        chart = curves_over_steps(step_N, curves, "step", baselines=shown_baselines, smooth=not is_exact)
        figures.append(html_figure(join_markup(legend, chart), title, description))
    return html_tag("div", *figures, class_="grid")


def loss_description(recipe: Pretrain | Finetune) -> str:
    """What the loss of a recipe is, in words; faint lines are single values."""
    if isinstance(recipe, Finetune):
        return "cross-entropy of the labels; faint: single steps"
    words = f"tokens: {recipe.model.loss.replace('_', ' ').replace('l2', 'L2')} of predictions and targets"
    if recipe.model.clip is not None:
        words = f"clips: views agree, and SIGReg spreads them; {words}, x {recipe.model.token_weight:g}"
    return f"{words}; faint: single steps"


def initial_probe_scores(page_data: PageData, probe_keys: Sequence[str]) -> list[tuple[str, int, float]]:
    """Return the scores that the probes of the log give the encoder before its first step; nothing without probes."""
    run = page_data.run
    store = page_data.store
    recipe = page_data.recipe
    if not probe_keys or not isinstance(recipe, Pretrain) or store.store_id != run.identity.store_id:
        return []
    probe = open_training_probe(store, recipe, run.identity, "raise", lambda line: None)
    if probe is None:
        return []
    model = Jepa(recipe.model, seed=recipe.seed).eval()
    model.target.load_state_dict(TrainedRun.open(run, INITIAL_CHECKPOINT).encoder_weights())
    scores = probe.measure_scores(model)
    name = "random init" if run.warm_start is None else "first weights"
    return [(name, number, float(scores[key])) for number, key in enumerate(probe_keys)]


def logged_values_N(lines: list[Json], key: str) -> np.ndarray:
    """Return the value under a key in each line of the log; nan for lines without the key."""
    values = (line.get(key) for line in lines)
    return np.array([np.nan if value is None else value for value in values], float)


def masks_section(page_data: PageData, recipe: Pretrain) -> Markup:
    """Return a picture of the recipe's masks over a stored clip, at several points of the run."""
    store = page_data.store
    identity = page_data.run.identity
    mel_TF = busiest_stored_view(store, recipe, identity.mean, identity.std)
    picture = figure_data_url(mask_figure(mel_TF, recipe, store.spec))
    image = html_tag("img", src=picture, alt="masks over a clip, at several steps", class_="full masks")
    return html_tag("div", image, class_="scroll")


def predictions_section(page_data: PageData, recipe: Pretrain) -> Markup:
    """Return figures of some clips, with the distance between prediction and target of each patch."""
    # The first view of some clips, spread evenly over the clips of the page.
    step = max(1, len(page_data.rows_N) // PREDICTED_CLIPS)
    rows_B = page_data.rows_N[::step][:PREDICTED_CLIPS]
    views = pretrained_views(page_data.store, page_data.run, recipe)
    mel_BVTF, n_frames_BV = views.read_views(rows_B)
    mel_BTF = mel_BVTF[:, 0]

    # The distances of all patches, and a figure of each clip.
    model = load_pretrained_model(page_data.run, recipe)
    distance_BP = prediction_distance_BP(model, mel_BTF, n_frames_BV[:, 0]).numpy()

    figures = [
        prediction_figure(page_data.clip_title(row), mel_TF, distance_P, recipe.model.encoder.grid)
        for row, mel_TF, distance_P in zip(rows_B.tolist(), mel_BTF.numpy(), distance_BP, strict=True)
    ]
    low, high = SHOWN_DISTANCE_RANGE
    note = (
        "Below each clip: the cosine distance of prediction and target of every patch, "
        f"hidden one time in {HIDING_ROUNDS}. "
        f"Dark: {low:g}, as predicted; bright: {high:g} or more; 1: unrelated to the target."
    )
    return join_markup(html_tag("p", note, class_="soft"), html_tag("div", *figures, class_="grid"))


def prediction_figure(title: str, mel_TF: np.ndarray, distance_P: np.ndarray, grid: PatchGrid) -> Markup:
    """Return a figure of a clip's spectrogram, with the distances of its patches below."""
    spectrogram = html_tag(
        "img",
        src=mel_data_url(mel_TF, NORMALISED_RANGE, frames=PREDICTED_MEL_FRAMES),
        alt="log mel",
        class_="full",
    )
    heat_map = html_tag(
        "img",
        src=heat_map_data_url(tokens_on_grid(distance_P, grid), SHOWN_DISTANCE_RANGE),
        alt="distance",
        class_="full",
    )
    mean_distance = f"mean distance {np.nanmean(distance_P):.2f}"
    return html_figure(join_markup(spectrogram, heat_map), title, mean_distance)


def tokens_on_grid(values_P: np.ndarray, grid: PatchGrid) -> np.ndarray:
    """Return token values on the grid, `[col, row]`; tokens are numbered column by column, low bands first."""
    return values_P.reshape(grid.cols, grid.rows)


def recipe_section(page_data: PageData) -> Markup:
    """Return ids and versions, all fields of the recipe, the cost of the run and the identity of its data, folded."""
    run = page_data.run
    facts = {
        "run": run.path,
        "mel spec": f"{page_data.store.spec.name} ({page_data.store.spec_id})",
        "trained on": run.identity.store_id,
        "shown on": f"{page_data.store.location} ({page_data.store.store_id})",
        "versions": ", ".join(f"{name} {number}" for name, number in run.versions.items()),
    }
    parts = [folded("Ids and versions", definition_list(facts.items()))]

    records: dict[str, Any] = {}
    compute_file = run.path / COMPUTE_COST_FILE
    if compute_file.exists():
        records["compute"] = json.loads(compute_file.read_text())
    records |= {**run.settings(), "versions": run.versions}
    if run.earlier_phases:
        records["earlier phases"] = [phase.to_json() for phase in run.earlier_phases]
    if run.warm_start is not None:
        records["warm start"] = run.warm_start
    parts += [folded(name, html_tag("pre", json.dumps(record, indent=1))) for name, record in records.items()]
    return join_markup(*parts)
