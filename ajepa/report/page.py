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

from ajepa.evaluate.classifier_scores import held_out, held_out_scores
from ajepa.evaluate.features import TRAINED, Views, compared_encoders, features
from ajepa.evaluate.probe_splits import measured_rows
from ajepa.evaluate.probes import standardised
from ajepa.evaluate.result import EVALUATION, TITLES
from ajepa.model.classifier import VitSpec, model_name
from ajepa.model.jepa import Jepa, JepaSpec, normalise
from ajepa.model.patches import PatchGrid
from ajepa.recipes.catalogue import from_json
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.pretrain import Pretrain
from ajepa.report.charts import (
    COLOURS,
    clip_map,
    figure_source,
    heat_source,
    legend,
    mel_source,
    scores_section,
    step_chart,
)
from ajepa.report.masks import mask_figure, stored_view
from ajepa.training.run import Json, Run
from ajepa.training.trained_run import TrainedRun
from pipeline.files import replacing
from pipeline.report.html import Markup, joined, tag
from pipeline.report.spectrograms import colour_range, read_mel, title
from pipeline.report.store_page import definitions, figure
from pipeline.store.feature_store import FeatureStore
from pipeline.store.summary import label_table

FOLDS = 4  # a quarter of the patches is hidden at a time


@torch.inference_mode()
def distances(
    model: Jepa, mel_BTF: Tensor, n_frames_B: Tensor, *, folds: int = FOLDS, seed: int = 0
) -> Tensor:
    """Cosine distance of prediction and target of every token, `BP` in [0, 2]; nan where a token holds no sound.

    Every token is predicted once, from all that lie in other folds; which lie together is drawn by `seed`.
    """
    grid, device = model.spec.encoder.grid, mel_BTF.device
    valid_BP = model.validity(n_frames_B, device)
    target_BPD = normalise(model.describe(mel_BTF, valid_BP).float())
    order_P = np.random.default_rng([seed, grid.tokens]).permutation(grid.tokens)
    apart_BP = torch.full((len(mel_BTF), grid.tokens), float("nan"), device=device)
    for hidden_Q in np.array_split(order_P, folds):
        targets_BGQ = every(np.sort(hidden_Q), mel_BTF)[:, None]
        context_BK = every(np.setdiff1d(order_P, hidden_Q), mel_BTF)
        context_BKD = model.encoder(mel_BTF, context_BK, valid_BP)
        guess_BQD = model.predictor(context_BKD, context_BK, targets_BGQ, valid_BP)[:, 0].float()
        tokens_Q = targets_BGQ[0, 0]
        apart_BP[:, tokens_Q] = 1 - F.cosine_similarity(guess_BQD, target_BPD[:, tokens_Q], dim=-1)
    return apart_BP if valid_BP is None else apart_BP.masked_fill(~valid_BP, float("nan"))


def every(tokens_N: np.ndarray, mel_BTF: Tensor) -> Tensor:
    """The same tokens for every clip, `BN`."""
    return torch.from_numpy(tokens_N).to(mel_BTF.device).expand(len(mel_BTF), -1).contiguous()


MAP_CLIPS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A run with the store that it is shown on, and what it says of some clips that it never saw."""

    run: Run
    recipe: Pretrain | Finetune
    store: FeatureStore
    labels: pl.DataFrame
    rows_N: np.ndarray  # eval clips
    features_ND: np.ndarray  # of those, standardised: its encoder's, or its classifier's logits

    @classmethod
    def of(cls, store: FeatureStore, run: Run) -> "Seen":
        """RunError where the run has no checkpoint, StoreError or RunError where the store has nothing to show."""
        cpu = torch.device("cpu")
        recipe: Pretrain | Finetune
        if run.finetuned:
            trained = TrainedRun.open(run)
            assignment = held_out(run, store)
            recipe = trained.recipe
            rows_N = some(assignment.eval_N, recipe.seed)
            said_ND = held_out_scores(trained, replace(assignment, eval_N=rows_N), cpu).logits_NC
        else:
            recipe = pretrained = from_json(run.recipe)
            rows_N = some(measured_rows(store), recipe.seed)
            mean, std = run.identity["mean"], run.identity["std"]
            views = Views(store=store, frames=pretrained.view_frames, mean=mean, std=std)
            said_ND = features(views, rows_N, compared_encoders(TrainedRun.open(run), cpu)[TRAINED])
        features_ND = standardised(said_ND, said_ND)[0].numpy()
        labels = label_table(store)[0]
        return cls(run=run, recipe=recipe, store=store, labels=labels, rows_N=rows_N, features_ND=features_ND)

    @property
    def teller(self) -> str:
        """Who says what is said of the clips."""
        return "classifier" if self.run.finetuned else "frozen encoder"

    def title(self, row: int) -> str:
        return title(self.store, self.labels, row, letters=60)


def some(rows_N: np.ndarray, seed: int) -> np.ndarray:
    """As many of the rows as a map can hold, in their order."""
    return np.sort(np.random.default_rng([seed, 2]).permutation(rows_N)[:MAP_CLIPS])


SECTIONS = {
    "curves": "How it went",
    "masks": "What it hides",
    "beliefs": "What the predictor believes",
    "map": "What it finds alike",
    "neighbours": "Nearest neighbours",
    "scores": "Scores",
    "recipe": "Recipe, compute, environment",
}

QUERIES, NEIGHBOURS, BELIEVED = 6, 5, 4

APART = (0.0, 1.5)  # cosine distances; 1: no better than an unrelated guess

CURVES: tuple[tuple[str, dict[str, str]], ...] = (
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
    content = run_page(store, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        scratch.write_text(content, encoding="utf-8")


def run_page(store: FeatureStore, run: Run) -> str:
    """The page as text, about 2 MB: 300 clips' spectrograms are most of it.

    Of a fine-tuned run without masks and beliefs: it has no predictor.
    """
    seen = Seen.of(store, run)
    bodies = {"curves": curves_section(run.metrics())}
    if isinstance(seen.recipe, Pretrain):
        bodies |= {"masks": masks_section(seen, seen.recipe), "beliefs": beliefs_section(seen, seen.recipe)}
    bodies |= {
        "map": map_section(seen),
        "neighbours": neighbours_section(seen),
        "scores": scores_section(run.path / EVALUATION),
        "recipe": recipe_section(run),
    }
    parts = [tag("section", tag("h2", SECTIONS[key]), body, id=key) for key, body in bodies.items()]
    frame = importlib.resources.files("pipeline.report").joinpath("page.html").read_text(encoding="utf-8")
    body = joined(head(seen, list(bodies)), tag("main", *parts))
    return Template(frame).substitute(title=tag("title", run.path.name)[7:-8], body=body)


def head(seen: Seen, sections: Sequence[str]) -> Markup:
    """What was trained, on what, how far."""
    run, recipe = seen.run, seen.recipe
    done = joined(tag("b", f"step {run.step:,}"), f" of {recipe.steps:,}, {recipe.clips_per_step} clips each")
    facts = {"recipe": recipe.name} | (task_facts(run) if isinstance(recipe, Finetune) else {})
    frames = recipe.view_frames if isinstance(recipe, Pretrain) else recipe.model.frames
    views = f"views of {frames * seen.store.spec.hop_samples / seen.store.spec.sample_rate_hz:.2f} s"
    if isinstance(recipe.model, JepaSpec | VitSpec):
        spec = recipe.model.encoder
        views = f"width {spec.width}, depth {spec.depth}, {spec.heads} heads, {views}"
    facts |= {
        "encoder" if isinstance(recipe, Pretrain) else model_name(recipe.model): views,
        "mel spec": f"{seen.store.spec.name} ({seen.store.spec_id})",
        "trained on": run.identity["store_id"],
        "shown on": f"{seen.store.place} ({seen.store.store_id})",
        "versions": ", ".join(f"{name} {number}" for name, number in run.versions.items()),
    }
    links = tag("nav", *(tag("a", SECTIONS[key], href=f"#{key}") for key in sections))
    return tag(
        "header", tag("h1", run.path.name), tag("p", done, class_="lead"), definitions(facts.items()), links
    )


def task_facts(run: Run) -> dict[str, str]:
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
    for metric, title_ in TITLES.items():
        mine = {
            key: key.removeprefix(f"eval_{metric}_") for key in measured if key.startswith(f"eval_{metric}_")
        }
        looks.append((f"Held-out clips while training, {title_}", mine))
    tiles = []
    for name, wanted in (*CURVES, *looks):
        curves = [(label, values_of(lines, key)) for key, label in wanted.items()]
        curves = [(label, values_N) for label, values_N in curves if np.isfinite(values_N).any()]
        if curves:
            keys = legend([label for label, _ in curves]) if len(curves) > 1 else ""
            tiles.append(figure(joined(keys, step_chart(step_N, curves, "step")), name, ""))
    return tag("div", *tiles, class_="grid")


def values_of(lines: list[Json], key: str) -> np.ndarray:
    """What was logged under a key; nan where it was not."""
    return np.array([line[key] if line.get(key) is not None else np.nan for line in lines], float)


def masks_section(seen: Seen, recipe: Pretrain) -> Markup:
    """The recipe's masks over a real clip, at points of the run."""
    mel_TF = stored_view(seen.store, recipe, seen.run.identity["mean"], seen.run.identity["std"])
    drawn = figure_source(mask_figure(mel_TF, recipe, seen.store.spec))
    return tag("img", src=drawn, alt="masks over a clip, at several steps", class_="full")


def beliefs_section(seen: Seen, recipe: Pretrain) -> Markup:
    """Some clips, and how far the predictor's guess at each patch lies from what the teacher says of it."""
    run, store = seen.run, seen.store
    rows_B, frames = seen.rows_N[:: max(1, len(seen.rows_N) // BELIEVED)][:BELIEVED], recipe.view_frames
    views = Views(store=store, frames=frames, mean=run.identity["mean"], std=run.identity["std"])
    mel_BVTF, n_frames_BV = views.of(rows_B)
    model, parts = (
        Jepa(recipe.model, seed=recipe.seed).eval(),
        run.load("encoder", "predictor", "target").parts,
    )
    for name, tensors in parts.items():
        getattr(model, name).load_state_dict(tensors)
    apart_BP = distances(model, mel_BVTF[:, 0], n_frames_BV[:, 0]).numpy()
    grid, tiles = recipe.model.encoder.grid, []
    for row, mel_TF, apart_P in zip(rows_B.tolist(), mel_BVTF[:, 0].numpy(), apart_BP, strict=True):
        spectrogram = tag(
            "img", src=mel_source(mel_TF, (-2.5, 2.5), frames=256), alt="log mel", class_="full"
        )
        heat = tag("img", src=heat_source(on_grid(apart_P, grid), APART), alt="distance", class_="full")
        tiles.append(
            figure(joined(spectrogram, heat), seen.title(row), f"mean distance {np.nanmean(apart_P):.2f}")
        )
    note = (
        f"Below each clip: the cosine distance of prediction and target of every patch, hidden one time in {FOLDS}. "
        f"Dark: {APART[0]:g}, as predicted; bright: {APART[1]:g} or more; 1 is a guess that has nothing to do with it."
    )
    return joined(tag("p", note, class_="soft"), tag("div", *tiles, class_="grid"))


def on_grid(values_P: np.ndarray, grid: PatchGrid) -> np.ndarray:
    """Tokens as they lie, `[col, row]`: columns follow each other, rows of a column from low bands up."""
    return values_P.reshape(grid.cols, grid.rows)


def map_section(seen: Seen) -> Markup:
    """Clips placed so that those which the model finds alike lie together (t-SNE), coloured by label."""
    count = len(seen.rows_N)
    if count < 5:
        return tag("p", f"{count} eval clips are too few for a map.", class_="warn")
    placer = TSNE(perplexity=min(30, (count - 1) / 3), init="pca", random_state=0)
    place_N2 = placer.fit_transform(seen.features_ND)
    group_N, names = groups(seen)
    mel_BTF = read_mel(seen.store, seen.rows_N)
    span = colour_range(mel_BTF)
    mels = [mel_source(mel_TF, span) for mel_TF in mel_BTF]
    titles = [seen.title(row) for row in seen.rows_N.tolist()]
    note = f"{count} clips of the eval splits, by t-SNE of what the {seen.teller} says. Point at a clip to see it."
    return joined(tag("p", note, class_="soft"), clip_map(place_N2, group_N, names, titles, mels))


def groups(seen: Seen) -> tuple[np.ndarray, list[str]]:
    """Of each clip the place of its commonest label among the commonest labels, -1 for none of these; their names."""
    of_clips = [seen.labels["raw"][row].to_list() for row in seen.rows_N.tolist()]
    common = [index for index, _ in Counter(index for one in of_clips for index in one).most_common(COLOURS)]
    group_N = [min((common.index(index) for index in one if index in common), default=-1) for one in of_clips]
    return np.array(group_N), [seen.store.classes.names[index] for index in common]


def neighbours_section(seen: Seen) -> Markup:
    """Some clips, each with those that the model finds most alike, by the cosine of standardised features."""
    unit_ND = seen.features_ND / np.maximum(np.linalg.norm(seen.features_ND, axis=1, keepdims=True), 1e-9)
    queries_Q = np.linspace(0, len(seen.rows_N) - 1, min(QUERIES, len(seen.rows_N))).astype(int)
    lines = []
    for query in queries_Q:
        alike_N = unit_ND @ unit_ND[query]
        alike_N[query] = -np.inf
        best = np.argsort(-alike_N, kind="stable")[: min(NEIGHBOURS, len(alike_N) - 1)]
        mel_BTF = read_mel(seen.store, seen.rows_N[[query, *best]])
        span = colour_range(mel_BTF)
        cells = [
            tag(
                "div",
                tag("img", src=mel_source(mel_TF, span), alt="log mel"),
                tag("span", "asked" if place == query else f"{alike_N[place]:.2f}", class_="soft"),
                tag("span", seen.title(int(seen.rows_N[place]))),
                class_="alike",
            )
            for place, mel_TF in zip([query, *best], mel_BTF, strict=True)
        ]
        lines.append(tag("div", *cells, class_="row"))
    return tag("div", *lines, class_="scroll")


def recipe_section(run: Run) -> Markup:
    """Every field of the recipe, what it cost, what the run is identified by."""
    told: dict[str, Any] = {"recipe": run.recipe, "identity": run.identity, "versions": run.versions}
    if (run.path / "compute.json").exists():
        told = {"compute": json.loads((run.path / "compute.json").read_text())} | told
    parts = [
        tag(
            "details", tag("summary", name), tag("pre", json.dumps(value, indent=1)), open=number == 0 or None
        )
        for number, (name, value) in enumerate(told.items())
    ]
    return joined(*parts)
