"""One self-contained HTML page about a run: curves, masks, predictions, a map of clips, scores and recipe."""

import importlib.resources
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from sklearn.manifold import TSNE

from ajepa.evaluate.result import EVALUATION_FILE, METRIC_TITLES
from ajepa.model.classifier import VitSpec, classifier_kind_name
from ajepa.model.jepa import JepaSpec
from ajepa.model.patches import PatchGrid
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.pretrain import Pretrain
from ajepa.report.charts import (
    CLIP_MAP_COLOURS,
    clip_map_chart,
    curve_legend,
    curves_over_steps,
    figure_data_url,
    heat_map_data_url,
    mel_data_url,
    scores_section,
)
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
from pipeline.files import replacing_file
from pipeline.report.html import Markup, escape_markup, html_tag, join_markup
from pipeline.report.spectrograms import colour_range, read_log_mel
from pipeline.report.store_page import definition_list, html_figure
from pipeline.store.feature_store import FeatureStore

RUN_PAGE_SECTIONS = {
    "curves": "Training curves",
    "masks": "Masks",
    "predictions": "Predictions of hidden patches",
    "map": "Map of held-out clips",
    "neighbours": "Nearest neighbours",
    "scores": "Scores",
    "recipe": "Recipe, compute, environment",
}

PREDICTED_CLIPS = 4

MIN_MAP_CLIPS = 5

MAX_PERPLEXITY = 30  # of t-SNE

QUERY_CLIPS = 6

NEIGHBOURS_PER_QUERY = 5

SHOWN_DISTANCE_RANGE = (0.0, 1.5)  # of the colours, in cosine distance; 1 is that of unrelated vectors

PREDICTED_MEL_FRAMES = 256  # columns of the spectrogram above the distances

# Before a prefix, probes of runs whose probes were still measured on clips of evaluation splits.
PROBE_KEY_PREFIXES = ("val_probe_linear_", "val_probe_knn_", "probe_linear_", "probe_knn_")

# The title of each chart, and its curves: key in the log, name in the legend.
LOGGED_CURVES: tuple[tuple[str, dict[str, str]], ...] = (
    ("Loss", {"loss": "loss", "token_loss": "of tokens", "clip_loss": "of clips"}),
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


def write_run_page(store: FeatureStore, run: Run, path: Path) -> None:
    """Write the page about a run to `path`, whole or not at all."""
    # Make the whole text first, so that a run that cannot be shown leaves no file.
    content = run_page_html(store, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as scratch:
        scratch.write_text(content, encoding="utf-8")


def run_page_html(store: FeatureStore, run: Run) -> str:
    """Return the page as text, about 2 MB, most of it the spectrograms of 300 clips.

    The page of a fine-tuned run has neither masks nor predictions, because the run has no predictor.
    """
    # The body of each section, in the order of the page.
    page_data = PageData.from_run(store, run)
    bodies = {"curves": curves_section(run.read_metrics())}
    if isinstance(page_data.recipe, Pretrain):
        bodies["masks"] = masks_section(page_data, page_data.recipe)
        bodies["predictions"] = predictions_section(page_data, page_data.recipe)
    bodies["map"] = clip_map_section(page_data)
    bodies["neighbours"] = neighbours_section(page_data)
    bodies["scores"] = scores_section(run.path / EVALUATION_FILE)
    bodies["recipe"] = recipe_section(run)

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
    """Return the name, the progress and the facts of the run, and links to the sections."""
    # The progress of the run.
    run = page_data.run
    recipe = page_data.recipe
    progress = join_markup(
        html_tag("b", f"step {run.newest_step:,}"),
        f" of {recipe.steps:,}, {recipe.clips_per_step} clips each",
    )

    # The network, and the length of its input clips.
    mel_spec = page_data.store.spec
    frames = recipe.view_frames if isinstance(recipe, Pretrain) else recipe.model.frames
    network = f"views of {frames * mel_spec.hop_samples / mel_spec.sample_rate_hz:.2f} s"
    if isinstance(recipe.model, JepaSpec | VitSpec):
        encoder = recipe.model.encoder
        network = f"width {encoder.width}, depth {encoder.depth}, {encoder.heads} heads, {network}"
    network_kind = "encoder" if isinstance(recipe, Pretrain) else classifier_kind_name(recipe.model)

    # Task, features, data and software.
    facts = {"recipe": recipe.name}
    if isinstance(recipe, Finetune):
        facts |= finetune_task_facts(run)
    facts |= {
        network_kind: network,
        "mel spec": f"{mel_spec.name} ({page_data.store.spec_id})",
        "trained on": run.identity.store_id,
        "shown on": f"{page_data.store.location} ({page_data.store.store_id})",
        "versions": ", ".join(f"{name} {number}" for name, number in run.versions.items()),
    }
    links = (html_tag("a", RUN_PAGE_SECTIONS[name], href=f"#{name}") for name in sections)
    return html_tag(
        "header",
        html_tag("h1", run.path.name),
        html_tag("p", progress, class_="lead"),
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


def curves_section(lines: list[Json]) -> Markup:
    """Return charts of every logged value over the steps; all probes share a chart, and all label sets of a metric."""
    # The charts whose curves depend on the keys that the run logged.
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
        ("Probes while training, on held-back clips, mAP", held_back),
        ("Probes while training, on eval clips, mAP", measured),
    ]
    for metric, metric_title in METRIC_TITLES.items():
        prefix = f"eval_{metric}_"
        label_sets = {key: key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        charts.append((f"Held-out clips while training, {metric_title}", label_sets))

    # Charts without a value are left out.
    step_N = np.array([line["step"] for line in lines])
    figures = []
    for title, name_by_key in charts:
        curves = [(name, logged_values_N(lines, key)) for key, name in name_by_key.items()]
        curves = [(name, values_N) for name, values_N in curves if np.isfinite(values_N).any()]
        if curves:
            legend = curve_legend([name for name, _ in curves]) if len(curves) > 1 else ""
            chart = curves_over_steps(step_N, curves, "step")
            figures.append(html_figure(join_markup(legend, chart), title, ""))
    return html_tag("div", *figures, class_="grid")


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
    return html_tag("img", src=picture, alt="masks over a clip, at several steps", class_="full")


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


def clip_map_section(page_data: PageData) -> Markup:
    """Return a t-SNE map of the clips, coloured by label; clips with similar vectors are close to each other."""
    count = len(page_data.rows_N)
    if count < MIN_MAP_CLIPS:
        return html_tag("p", f"{count} eval clips are too few for a map.", class_="warn")

    # t-SNE needs three times as many points as its perplexity.
    tsne = TSNE(perplexity=min(MAX_PERPLEXITY, (count - 1) / 3), init="pca", random_state=0)
    position_N2 = tsne.fit_transform(page_data.features_ND)
    group_N, names = common_label_groups(page_data)

    # A small spectrogram and a title for each clip.
    mel_BTF = read_log_mel(page_data.store, page_data.rows_N)
    span = colour_range(mel_BTF)
    mels = [mel_data_url(mel_TF, span) for mel_TF in mel_BTF]
    titles = [page_data.clip_title(row) for row in page_data.rows_N.tolist()]

    note = (
        f"{count} clips of the eval splits, placed by t-SNE of the {page_data.vector_description}. "
        "Point at a clip to see it."
    )
    chart = clip_map_chart(position_N2, group_N, names, titles, mels)
    return join_markup(html_tag("p", note, class_="soft"), chart)


def common_label_groups(page_data: PageData) -> tuple[np.ndarray, list[str]]:
    """Return the group of each clip and the names of the groups; a group is one of the most frequent labels.

    A clip belongs to its most frequent label; its group is -1 if it has none of these labels.
    """
    # Raw labels, because propagated labels would put most clips under a few roots of the tree.
    labels_of_clips = [page_data.labels["raw"][row].to_list() for row in page_data.rows_N.tolist()]
    label_counts = Counter(label for labels in labels_of_clips for label in labels)
    common_labels = [label for label, _ in label_counts.most_common(CLIP_MAP_COLOURS)]
    place_of_label = {label: place for place, label in enumerate(common_labels)}
    group_N = [
        min((place_of_label[label] for label in labels if label in place_of_label), default=-1)
        for labels in labels_of_clips
    ]
    return np.array(group_N), [page_data.store.classes.names[label] for label in common_labels]


def neighbours_section(page_data: PageData) -> Markup:
    """Return some clips, each with its nearest neighbours by the cosine of the standardised vectors."""
    # Vectors of length 1, so that their products are cosines.
    norm_N1 = np.linalg.norm(page_data.features_ND, axis=1, keepdims=True)
    unit_ND = page_data.features_ND / np.maximum(norm_N1, 1e-9)

    # The query clips, spread evenly over the clips of the page.
    count = len(page_data.rows_N)
    query_places = np.linspace(0, count - 1, min(QUERY_CLIPS, count)).astype(int)
    rows = [neighbours_row(page_data, unit_ND, int(query)) for query in query_places]
    return html_tag("div", *rows, class_="scroll")


def neighbours_row(page_data: PageData, unit_ND: np.ndarray, query: int) -> Markup:
    """Return a row of the page: the clip with index `query` among the page's clips, then its nearest neighbours."""
    # Exclude the clip itself from its neighbours.
    cosine_N = unit_ND @ unit_ND[query]
    cosine_N[query] = -np.inf
    neighbour_count = min(NEIGHBOURS_PER_QUERY, len(cosine_N) - 1)
    nearest = np.argsort(-cosine_N, kind="stable")[:neighbour_count]
    places = [query, *nearest]

    # The spectrograms; the whole row has one range of colours.
    mel_BTF = read_log_mel(page_data.store, page_data.rows_N[places])
    span = colour_range(mel_BTF)
    cells = [
        html_tag(
            "div",
            html_tag("img", src=mel_data_url(mel_TF, span), alt="log mel"),
            html_tag("span", "this clip" if place == query else f"{cosine_N[place]:.2f}", class_="soft"),
            html_tag("span", page_data.clip_title(int(page_data.rows_N[place]))),
            class_="alike",
        )
        for place, mel_TF in zip(places, mel_BTF, strict=True)
    ]
    return html_tag("div", *cells, class_="row")


def recipe_section(run: Run) -> Markup:
    """Return all fields of the recipe, the cost of the run, the identity of its data, and the software versions."""
    records: dict[str, Any] = {}
    compute_file = run.path / COMPUTE_COST_FILE
    if compute_file.exists():
        records["compute"] = json.loads(compute_file.read_text())
    records |= {**run.settings(), "versions": run.versions}

    # Only the first part is open at the start.
    parts = [
        html_tag(
            "details",
            html_tag("summary", name),
            html_tag("pre", json.dumps(record, indent=1)),
            open=number == 0 or None,
        )
        for number, (name, record) in enumerate(records.items())
    ]
    return join_markup(*parts)
