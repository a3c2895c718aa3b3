"""What a predictor believes: how far its guess at every patch lies from what the teacher says of it.

Seen: a run with the store that its page shows it on, and what it says of clips that it never saw.

A run on one page: what it was told, how it went, what it hides, believes and finds alike; needs nothing beside.
"""

import importlib.resources
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import polars as pl
import torch
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn import functional as F

from ajepa.evaluate.classifier_scores import held_out_scores, held_out_task_data
from ajepa.evaluate.features import TRAINED, ClipViews, clip_vectors, compared_encoders
from ajepa.evaluate.probe_splits import good_eval_rows
from ajepa.evaluate.probes import standardise_features
from ajepa.evaluate.result import EVALUATION_FILE, METRIC_TITLES
from ajepa.model.classifier import VitSpec, classifier_kind_name
from ajepa.model.jepa import Jepa, JepaSpec, normalise_features
from ajepa.model.patches import PatchGrid
from ajepa.recipes.catalogue import recipe_from_json
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
from ajepa.report.masks import busiest_stored_view, mask_figure
from ajepa.training.run import Json, Run
from ajepa.training.trained_run import TrainedRun
from pipeline.files import replacing_file
from pipeline.report.html import Markup, html_tag, join_markup
from pipeline.report.spectrograms import colour_range, label_title, read_log_mel
from pipeline.report.store_page import definition_list, html_figure
from pipeline.store.feature_store import FeatureStore
from pipeline.store.summary import read_label_table

HIDING_ROUNDS = 4  # a quarter of the patches is hidden at a time


@torch.inference_mode()
def prediction_distance_BP(
    model: Jepa, mel_BTF: Tensor, n_frames_B: Tensor, *, hiding_rounds: int = HIDING_ROUNDS, seed: int = 0
) -> Tensor:
    """Cosine distance of prediction and target of every token, `BP` in [0, 2]; nan where a token holds no sound.

    Every token is predicted once, from all that lie in other folds; which lie together is drawn by `seed`.
    """
    grid, device = model.spec.encoder.grid, mel_BTF.device
    valid_BP = model.valid_mask_if_padded(n_frames_B, device)
    target_BPD = normalise_features(model.target_features(mel_BTF, valid_BP).float())
    order_P = np.random.default_rng([seed, grid.tokens]).permutation(grid.tokens)
    apart_BP = torch.full((len(mel_BTF), grid.tokens), float("nan"), device=device)
    for hidden_Q in np.array_split(order_P, hiding_rounds):
        targets_BGQ = repeat_tokens_BN(np.sort(hidden_Q), mel_BTF)[:, None]
        context_BK = repeat_tokens_BN(np.setdiff1d(order_P, hidden_Q), mel_BTF)
        context_BKD = model.encoder(mel_BTF, context_BK, valid_BP)
        guess_BQD = model.predictor(context_BKD, context_BK, targets_BGQ, valid_BP)[:, 0].float()
        tokens_Q = targets_BGQ[0, 0]
        apart_BP[:, tokens_Q] = 1 - F.cosine_similarity(guess_BQD, target_BPD[:, tokens_Q], dim=-1)
    return apart_BP if valid_BP is None else apart_BP.masked_fill(~valid_BP, float("nan"))


def repeat_tokens_BN(tokens_N: np.ndarray, mel_BTF: Tensor) -> Tensor:
    """The same tokens for every clip, `BN`."""
    return torch.from_numpy(tokens_N).to(mel_BTF.device).expand(len(mel_BTF), -1).contiguous()


MAX_MAP_CLIPS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class PageData:
    """A run with the store that it is shown on, and what it says of some clips that it never saw."""

    run: Run
    recipe: Pretrain | Finetune
    store: FeatureStore
    labels: pl.DataFrame
    rows_N: np.ndarray  # eval clips
    features_ND: np.ndarray  # of those, standardised: its encoder's, or its classifier's logits

    @classmethod
    def from_run(cls, store: FeatureStore, run: Run) -> "PageData":
        """RunError where the run has no checkpoint, StoreError or RunError where the store has nothing to show."""
        cpu = torch.device("cpu")
        recipe: Pretrain | Finetune
        if run.is_finetuned:
            trained = TrainedRun.open(run)
            assignment = held_out_task_data(run, store)
            recipe = trained.recipe
            rows_N = draw_map_rows(assignment.eval_N, recipe.seed)
            said_ND = held_out_scores(trained, replace(assignment, eval_N=rows_N), cpu).logits_NC
        else:
            recipe = pretrained = recipe_from_json(run.recipe)
            rows_N = draw_map_rows(good_eval_rows(store), recipe.seed)
            mean, std = run.identity["mean"], run.identity["std"]
            views = ClipViews(store=store, frames=pretrained.view_frames, mean=mean, std=std)
            said_ND = clip_vectors(views, rows_N, compared_encoders(TrainedRun.open(run), cpu)[TRAINED])
        features_ND = standardise_features(said_ND, said_ND)[0].numpy()
        labels = read_label_table(store)[0]
        return cls(run=run, recipe=recipe, store=store, labels=labels, rows_N=rows_N, features_ND=features_ND)

    @property
    def model_description(self) -> str:
        """Who says what is said of the clips."""
        return "classifier" if self.run.is_finetuned else "frozen encoder"

    def clip_title(self, row: int) -> str:
        return label_title(self.store, self.labels, row, max_letters=60)


def draw_map_rows(rows_N: np.ndarray, seed: int) -> np.ndarray:
    """As many of the rows as a map can hold, in their order."""
    return np.sort(np.random.default_rng([seed, 2]).permutation(rows_N)[:MAX_MAP_CLIPS])


RUN_PAGE_SECTIONS = {
    "curves": "How it went",
    "masks": "What it hides",
    "beliefs": "What the predictor believes",
    "map": "What it finds alike",
    "neighbours": "Nearest neighbours",
    "scores": "Scores",
    "recipe": "Recipe, compute, environment",
}

QUERY_CLIPS, NEIGHBOURS_PER_QUERY, PREDICTED_CLIPS = 6, 5, 4

SHOWN_DISTANCE_RANGE = (0.0, 1.5)  # cosine distances; 1: no better than an unrelated guess

LOGGED_CURVES: tuple[tuple[str, dict[str, str]], ...] = (
    ("Loss", {"loss": "loss"}),
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
    content = run_page_html(store, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as scratch:
        scratch.write_text(content, encoding="utf-8")


def run_page_html(store: FeatureStore, run: Run) -> str:
    """The page as text, about 2 MB: 300 clips' spectrograms are most of it.

    Of a fine-tuned run without masks and beliefs: it has no predictor.
    """
    seen = PageData.from_run(store, run)
    bodies = {"curves": curves_section(run.read_metrics())}
    if isinstance(seen.recipe, Pretrain):
        bodies |= {
            "masks": masks_section(seen, seen.recipe),
            "beliefs": predictions_section(seen, seen.recipe),
        }
    bodies |= {
        "map": clip_map_section(seen),
        "neighbours": neighbours_section(seen),
        "scores": scores_section(run.path / EVALUATION_FILE),
        "recipe": recipe_section(run),
    }
    parts = [
        html_tag("section", html_tag("h2", RUN_PAGE_SECTIONS[key]), body, id=key)
        for key, body in bodies.items()
    ]
    frame = importlib.resources.files("pipeline.report").joinpath("page.html").read_text(encoding="utf-8")
    body = join_markup(run_page_header(seen, list(bodies)), html_tag("main", *parts))
    return Template(frame).substitute(title=html_tag("title", run.path.name)[7:-8], body=body)


def run_page_header(page_data: PageData, sections: Sequence[str]) -> Markup:
    """What was trained, on what, how far."""
    run, recipe = page_data.run, page_data.recipe
    done = join_markup(
        html_tag("b", f"step {run.newest_step:,}"),
        f" of {recipe.steps:,}, {recipe.clips_per_step} clips each",
    )
    facts = {"recipe": recipe.name} | (finetune_task_facts(run) if isinstance(recipe, Finetune) else {})
    frames = recipe.view_frames if isinstance(recipe, Pretrain) else recipe.model.frames
    views = (
        f"views of {frames * page_data.store.spec.hop_samples / page_data.store.spec.sample_rate_hz:.2f} s"
    )
    if isinstance(recipe.model, JepaSpec | VitSpec):
        spec = recipe.model.encoder
        views = f"width {spec.width}, depth {spec.depth}, {spec.heads} heads, {views}"
    facts |= {
        "encoder" if isinstance(recipe, Pretrain) else classifier_kind_name(recipe.model): views,
        "mel spec": f"{page_data.store.spec.name} ({page_data.store.spec_id})",
        "trained on": run.identity["store_id"],
        "shown on": f"{page_data.store.location} ({page_data.store.store_id})",
        "versions": ", ".join(f"{name} {number}" for name, number in run.versions.items()),
    }
    links = html_tag("nav", *(html_tag("a", RUN_PAGE_SECTIONS[key], href=f"#{key}") for key in sections))
    return html_tag(
        "header",
        html_tag("h1", run.path.name),
        html_tag("p", done, class_="lead"),
        definition_list(facts.items()),
        links,
    )


def finetune_task_facts(run: Run) -> dict[str, str]:
    """What a classifier learnt, and where it started."""
    told, start = run.identity, run.identity["from"]
    several = "one" if told["kind"] == "single" else "several"
    origin = f"the encoder of step {start['step']:,} ({start['sha256'][:12]})" if start else "random weights"
    return {
        "task": f"{told['task']}, {len(told['classes'])} classes, {several} to a clip, by {told['label_set']} labels",
        "splits": f"{', '.join(told['train_splits'])}; measured on {', '.join(told['eval_splits'])}",
        "started from": origin,
    }


def curves_section(lines: list[Json]) -> Markup:
    """Every value that the run logged, over its steps; in-run probes, and what was measured, together."""
    step_N = np.array([line["step"] for line in lines])
    probes = {
        key: key.removeprefix("probe_").replace("_", " ")
        for line in lines
        for key in line
        if key.startswith(("probe_linear_", "probe_knn_"))
    }
    measured = dict.fromkeys(key for line in lines for key in line if key.startswith("eval_"))
    looks = [("Probes while training, mAP", probes)]
    for metric, title_ in METRIC_TITLES.items():
        mine = {
            key: key.removeprefix(f"eval_{metric}_") for key in measured if key.startswith(f"eval_{metric}_")
        }
        looks.append((f"Held-out clips while training, {title_}", mine))
    tiles = []
    for name, wanted in (*LOGGED_CURVES, *looks):
        curves = [(label, logged_values_N(lines, key)) for key, label in wanted.items()]
        curves = [(label, values_N) for label, values_N in curves if np.isfinite(values_N).any()]
        if curves:
            keys = curve_legend([label for label, _ in curves]) if len(curves) > 1 else ""
            tiles.append(html_figure(join_markup(keys, curves_over_steps(step_N, curves, "step")), name, ""))
    return html_tag("div", *tiles, class_="grid")


def logged_values_N(lines: list[Json], key: str) -> np.ndarray:
    """What was logged under a key; nan where it was not."""
    return np.array([line[key] if line.get(key) is not None else np.nan for line in lines], float)


def masks_section(page_data: PageData, recipe: Pretrain) -> Markup:
    """The recipe's masks over a real clip, at points of the run."""
    mel_TF = busiest_stored_view(
        page_data.store, recipe, page_data.run.identity["mean"], page_data.run.identity["std"]
    )
    drawn = figure_data_url(mask_figure(mel_TF, recipe, page_data.store.spec))
    return html_tag("img", src=drawn, alt="masks over a clip, at several steps", class_="full")


def predictions_section(page_data: PageData, recipe: Pretrain) -> Markup:
    """Some clips, and how far the predictor's guess at each patch lies from what the teacher says of it."""
    run, store = page_data.run, page_data.store
    rows_B, frames = (
        page_data.rows_N[:: max(1, len(page_data.rows_N) // PREDICTED_CLIPS)][:PREDICTED_CLIPS],
        recipe.view_frames,
    )
    views = ClipViews(store=store, frames=frames, mean=run.identity["mean"], std=run.identity["std"])
    mel_BVTF, n_frames_BV = views.read_views(rows_B)
    model, parts = (
        Jepa(recipe.model, seed=recipe.seed).eval(),
        run.load_checkpoint("encoder", "predictor", "target").parts,
    )
    for name, tensors in parts.items():
        getattr(model, name).load_state_dict(tensors)
    apart_BP = prediction_distance_BP(model, mel_BVTF[:, 0], n_frames_BV[:, 0]).numpy()
    grid, tiles = recipe.model.encoder.grid, []
    for row, mel_TF, apart_P in zip(rows_B.tolist(), mel_BVTF[:, 0].numpy(), apart_BP, strict=True):
        spectrogram = html_tag(
            "img", src=mel_data_url(mel_TF, (-2.5, 2.5), frames=256), alt="log mel", class_="full"
        )
        heat = html_tag(
            "img",
            src=heat_map_data_url(tokens_on_grid(apart_P, grid), SHOWN_DISTANCE_RANGE),
            alt="distance",
            class_="full",
        )
        tiles.append(
            html_figure(
                join_markup(spectrogram, heat),
                page_data.clip_title(row),
                f"mean distance {np.nanmean(apart_P):.2f}",
            )
        )
    note = (
        f"Below each clip: the cosine distance of prediction and target of every patch, hidden one time in {HIDING_ROUNDS}. "
        f"Dark: {SHOWN_DISTANCE_RANGE[0]:g}, as predicted; bright: {SHOWN_DISTANCE_RANGE[1]:g} or more; 1 is a guess that has nothing to do with it."
    )
    return join_markup(html_tag("p", note, class_="soft"), html_tag("div", *tiles, class_="grid"))


def tokens_on_grid(values_P: np.ndarray, grid: PatchGrid) -> np.ndarray:
    """Tokens as they lie, `[col, row]`: columns follow each other, rows of a column from low bands up."""
    return values_P.reshape(grid.cols, grid.rows)


def clip_map_section(page_data: PageData) -> Markup:
    """Clips placed so that those which the model finds alike lie together (t-SNE), coloured by label."""
    count = len(page_data.rows_N)
    if count < 5:
        return html_tag("p", f"{count} eval clips are too few for a map.", class_="warn")
    placer = TSNE(perplexity=min(30, (count - 1) / 3), init="pca", random_state=0)
    place_N2 = placer.fit_transform(page_data.features_ND)
    group_N, names = common_label_groups(page_data)
    mel_BTF = read_log_mel(page_data.store, page_data.rows_N)
    span = colour_range(mel_BTF)
    mels = [mel_data_url(mel_TF, span) for mel_TF in mel_BTF]
    titles = [page_data.clip_title(row) for row in page_data.rows_N.tolist()]
    note = f"{count} clips of the eval splits, by t-SNE of what the {page_data.model_description} says. Point at a clip to see it."
    return join_markup(
        html_tag("p", note, class_="soft"), clip_map_chart(place_N2, group_N, names, titles, mels)
    )


def common_label_groups(page_data: PageData) -> tuple[np.ndarray, list[str]]:
    """Of each clip the place of its commonest label among the commonest labels, -1 for none of these; their names."""
    of_clips = [page_data.labels["raw"][row].to_list() for row in page_data.rows_N.tolist()]
    common = [
        index
        for index, _ in Counter(index for one in of_clips for index in one).most_common(CLIP_MAP_COLOURS)
    ]
    group_N = [min((common.index(index) for index in one if index in common), default=-1) for one in of_clips]
    return np.array(group_N), [page_data.store.classes.names[index] for index in common]


def neighbours_section(page_data: PageData) -> Markup:
    """Some clips, each with those that the model finds most alike, by the cosine of standardised features."""
    unit_ND = page_data.features_ND / np.maximum(
        np.linalg.norm(page_data.features_ND, axis=1, keepdims=True), 1e-9
    )
    queries_Q = np.linspace(0, len(page_data.rows_N) - 1, min(QUERY_CLIPS, len(page_data.rows_N))).astype(int)
    lines = []
    for query in queries_Q:
        alike_N = unit_ND @ unit_ND[query]
        alike_N[query] = -np.inf
        best = np.argsort(-alike_N, kind="stable")[: min(NEIGHBOURS_PER_QUERY, len(alike_N) - 1)]
        mel_BTF = read_log_mel(page_data.store, page_data.rows_N[[query, *best]])
        span = colour_range(mel_BTF)
        cells = [
            html_tag(
                "div",
                html_tag("img", src=mel_data_url(mel_TF, span), alt="log mel"),
                html_tag("span", "asked" if place == query else f"{alike_N[place]:.2f}", class_="soft"),
                html_tag("span", page_data.clip_title(int(page_data.rows_N[place]))),
                class_="alike",
            )
            for place, mel_TF in zip([query, *best], mel_BTF, strict=True)
        ]
        lines.append(html_tag("div", *cells, class_="row"))
    return html_tag("div", *lines, class_="scroll")


def recipe_section(run: Run) -> Markup:
    """Every field of the recipe, what it cost, what the run is identified by."""
    told: dict[str, Any] = {"recipe": run.recipe, "identity": run.identity, "versions": run.versions}
    if (run.path / "compute.json").exists():
        told = {"compute": json.loads((run.path / "compute.json").read_text())} | told
    parts = [
        html_tag(
            "details",
            html_tag("summary", name),
            html_tag("pre", json.dumps(value, indent=1)),
            open=number == 0 or None,
        )
        for number, (name, value) in enumerate(told.items())
    ]
    return join_markup(*parts)
