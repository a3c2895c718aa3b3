"""What a frozen encoder is worth: probes on it, on a random encoder and on plain log-mel statistics."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ajepa import attentive
from ajepa.bootstrap import CONFIDENCE, Measured, estimates, resampled_NB, resamples
from ajepa.devices import pick_device
from ajepa.evaluation import EVALUATION, PRIMARY, PROBES, Evaluation, KindName, Score, mean_of_folds
from ajepa.features import MOST_TOKENS, Features, Views, all_features
from ajepa.jepa import Jepa
from ajepa.metrics import random_precision_C
from ajepa.partition import HELD_SHARE, Part, Partition
from ajepa.pooling import LAST, POOLING, Layer, PoolingName
from ajepa.probes import L2_GRID, NEIGHBOURS, chosen_l2, knn_NC, linear_NC, standardised
from ajepa.recipes import Pretrain, from_json
from ajepa.run import Checkpoint, Json, Run, versions
from ajepa.training_set import open_store
from ajepa.vit import Encoder
from pipeline.errors import RunError
from pipeline.store import FeatureStore

PROTOCOL = {
    "encoder": "target (EMA), frozen; the whole clip in views of the recipe's length, one after the other",
    "standardised": "with the mean and deviation of the clips that a probe is trained on",
    "choice": "on the val splits, or else on a fifth of the train clips, which then train too (not attentive)",
    "linear": "logistic regression, one per class, of single labels one over all; L2 chosen from l2_grid",
    "knn": f"share of the {NEIGHBOURS} most similar (cosine) train clips that carry a class",
    "attentive": f"{attentive.HEADS} queries over at most {MOST_TOKENS} tokens (all rows by stretches of time), "
    f"AdamW {attentive.PEAK_LR:g}, {attentive.MOST_STEPS} steps of {attentive.CLIPS_PER_STEP} clips at most",
    "map": "macro, classes without an eval clip skipped; each label set trained and measured on itself",
    "folds_mean": "every metric is computed within a fold, then averaged",
    "intervals": "clips drawn again within each fold; percentiles moved to lie about the value",
    "confidence": CONFIDENCE,
    "l2_grid": list(L2_GRID),
}
TRAINED, RANDOM, STATISTICS = "encoder", "random init", "log-mel statistics"
Kind = Literal["auto", "single", "multi"]


def evaluate(
    store: Path | str | FeatureStore,
    run_path: Path,
    *,
    checkpoint: str | int = "last",
    device: str = "auto",
    train_clips: int = 20_000,
    pooling: PoolingName = POOLING,
    layer: Layer = LAST,
    probes: Sequence[str] = tuple(PROBES),
    labels: Sequence[str] = (),
    kind: Kind = "auto",
    out: Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Probe a checkpoint of a run on a store of its mel spec: its own, or that of another task.

    `checkpoint` is `Run.load`'s: last, best or a step; its target (EMA) encoder is what is probed. What trains,
    chooses and measures is `Partition`'s to say; of `labels` (all sets of the store, where none is named) each is
    trained and measured on itself. Labels are `single` where every clip has exactly one, if nothing else is
    said. Kept as `out`, else in the run's folder as evaluation.json, of another store as evaluation-STORE.json.
    RunError or StoreError where run, store and labels do not fit.
    """
    run = Run.open(run_path)
    run.refuse_finetuned()
    recipe = from_json(run.recipe)
    store = open_store(store, recipe)
    refuse_unknown(probes)
    partition = Partition.of(store, recipe.seed, train_clips)
    truths = [Truth.of(store, name, partition, kind) for name in labels or store.label_sets]
    loaded, on = run.load("target", at=checkpoint), pick_device(device)
    views = Views(store=store, frames=recipe.view_frames, mean=run.identity["mean"], std=run.identity["std"])
    count = resamples(len(partition.eval_N), len(store.classes.mids))
    scores: list[Score] = []
    for name, encoder in encoders(recipe, loaded, on).items():
        found = all_features(
            views,
            partition.rows_N,
            encoder,
            pooling=pooling,
            layer=layer,
            tokens="attentive" in probes,
            progress=name if progress else None,
        )
        used = [probe for probe in probes if probe != "attentive" or encoder is not None]
        told = {"desc": f"{name}: probes", "unit": "probes", "leave": False}
        asked = [(truth, probe) for truth in truths for probe in used]
        for truth, probe in tqdm(asked, disable=None if progress else True, **told):
            bench = Bench(found=found, partition=partition, truth=truth, seed=recipe.seed, device=on)
            scores.append(bench.score(name, probe, count))
    evaluation = Evaluation(
        protocol=protocol(run, loaded, store, partition)
        | {"pooling": pooling, "layer": str(layer), "resamples": count, "probes": list(probes)}
        | {"checkpoint": str(checkpoint), "grid": grid_told(recipe), "seed": recipe.seed, "device": on.type},
        classes=tuple(zip(store.classes.mids, store.classes.names, strict=True)),
        scores=tuple(scores),
    )
    evaluation.save(out or run.path / file_name(run, store))
    return evaluation


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """One label set of the rows of a partition, 0/1, and whether each of them has exactly one label."""

    label_set: str
    labels_NC: np.ndarray
    kind: KindName

    @classmethod
    def of(cls, store: FeatureStore, label_set: str, partition: Partition, kind: Kind) -> "Truth":
        """RunError where labels are told to be single and are not."""
        labels_NC = store.labels_BC(partition.rows_N, label_set)
        others = int((labels_NC.sum(axis=1) != 1).sum())
        if kind == "single" and others:
            told = f"{others} of {len(labels_NC)} clips have no {label_set} label or several"
            raise RunError(f"{store.place}: {told}, single labels were asked for; leave out --kind single")
        found: KindName = "multi" if others else "single"
        return cls(label_set=label_set, labels_NC=labels_NC, kind=found if kind == "auto" else kind)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """The features of a partition's rows and what is true of them: what a probe is put on."""

    found: Features
    partition: Partition
    truth: Truth
    seed: int
    device: torch.device

    def score(self, features: str, probe: str, count: int) -> Score:
        """Train the probe on every part and measure it there; intervals from `count` resamples."""
        folds, chosen = [], []
        for place, part in enumerate(self.partition.parts):
            said_NC, setting = self.said(part, probe)
            chosen += [] if setting is None else [setting]
            fold = Measured(
                labels_NC=self.labels(part.eval_N),
                scores_NC=said_NC,
                weights_NB=resampled_NB(len(part.eval_N), count, self.seed + place),
                single=self.truth.kind == "single",
            )
            folds.append(fold)
        per_class_ap = mean_of_folds(np.stack([fold.ranked[0][:, 0] for fold in folds]))
        skipped = sum(value is None for value in per_class_ap)
        metrics = estimates(folds)
        return Score(
            features=features,
            probe=probe,
            label_set=self.truth.label_set,
            kind=self.truth.kind,
            metrics=metrics,
            chance=float(np.mean([chance(fold.labels_NC, self.truth.kind) for fold in folds])),
            classes=len(per_class_ap) - skipped,
            skipped=skipped,
            chosen=tuple(chosen),
            per_class_ap=per_class_ap,
        )

    def said(self, part: Part, probe: str) -> tuple[np.ndarray, float | None]:
        """A probe's scores of the clips to measure on, and what was chosen for it."""
        single = self.truth.kind == "single"
        if probe == "attentive":
            told = attentive.attended(
                self.of(part.train_N),
                self.labels(part.train_N),
                self.of(part.val_N),
                self.labels(part.val_N),
                self.of(part.eval_N),
                seed=self.seed,
                single=single,
                device=self.device,
            )
            return told.scores_NC, told.steps
        train_ND, val_ND, fit_ND, eval_ND = self.vectors(part)
        if probe == "knn":
            return knn_NC(fit_ND, self.labels(part.fit_N), eval_ND), None
        labels_NC, val_NC = self.labels(part.train_N), self.labels(part.val_N)
        l2 = chosen_l2(train_ND, labels_NC, val_ND, val_NC, single=single)
        return linear_NC(fit_ND, self.labels(part.fit_N), eval_ND, l2=l2, single=single), l2

    def vectors(self, part: Part) -> Iterator[Tensor]:
        """Of the clips to train on, to choose with, to fit in the end and to measure on, all standardised alike."""
        rows = (part.fit_N, part.train_N, part.val_N, part.fit_N, part.eval_N)
        told = standardised(*(self.of(rows_N).vectors_ND for rows_N in rows))
        return (vectors_ND.to(self.device) for vectors_ND in told[1:])

    def of(self, rows_N: np.ndarray) -> Features:
        return self.found.of(np.searchsorted(self.partition.rows_N, rows_N))

    def labels(self, rows_N: np.ndarray) -> np.ndarray:
        return self.truth.labels_NC[np.searchsorted(self.partition.rows_N, rows_N)]


def chance(labels_NC: np.ndarray, kind: KindName) -> float:
    """What the first metric is without knowing a clip: mAP of a random order; accuracy of the commonest class."""
    positives_C = (labels_NC > 0).sum(axis=0)
    if PRIMARY[kind] == "accuracy":
        return float(positives_C.max() / len(labels_NC))
    return float(random_precision_C(positives_C[positives_C > 0], len(labels_NC)).mean())


def encoders(recipe: Pretrain, checkpoint: Checkpoint, device: torch.device) -> dict[str, Encoder | None]:
    """What is compared: the run's target encoder, the same before its first step, and none at all."""
    trained, random = (Jepa(recipe.model, seed=recipe.seed).target for _ in range(2))
    trained.load_state_dict(checkpoint.parts["target"])
    if trained.bands_2F is not None:
        random.know_bands(*trained.bands_2F)
    return {TRAINED: trained.to(device).eval(), RANDOM: random.to(device).eval(), STATISTICS: None}


def protocol(run: Run, checkpoint: Checkpoint, store: FeatureStore, partition: Partition) -> Json:
    """What was measured, on what: enough to say whether two results may be compared."""
    part = partition.parts[0]
    return {
        "run": str(run.path),
        "step": checkpoint.step,
        "weights_sha256": digest_of(checkpoint.parts["target"]),
        "recipe": run.recipe["name"],
        "store": Path(store.place).name,
        "store_id": store.store_id,
        "trained_on": run.identity["store_id"],
        **({} if store.excluded.digest is None else {"excluded": store.excluded.digest}),
        "splits": {"train": partition.train, "val": partition.val, "eval": partition.eval},
        "folds": len(partition.parts) if len(partition.parts) > 1 else 0,
        "train_clips": len(part.fit_N),
        "val_clips": len(part.val_N),
        "val_share": HELD_SHARE if part.drawn else None,
        "eval_clips": len(partition.eval_N),
        **PROTOCOL,
        "versions": versions(),
        "trained_with": run.versions,
    }


def digest_of(weights: dict[str, Tensor]) -> str:
    """SHA-256 of named tensors, whatever file they lay in."""
    told = hashlib.sha256()
    for name in sorted(weights):
        told.update(f"{name} {tuple(weights[name].shape)} ".encode())
        told.update(weights[name].contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return told.hexdigest()


def grid_told(recipe: Pretrain) -> dict[str, Any]:
    """The patches that a view is cut into."""
    grid = recipe.model.encoder.grid
    return {"rows": grid.rows, "cols": grid.cols, "frames": grid.patch_frames, "bands": grid.patch_bands}


def file_name(run: Run, store: FeatureStore) -> str:
    """Where an evaluation is kept: of a store that the run was not trained on, under that one's name."""
    own = {run.identity["store_id"], *run.identity.get("stores", [])}
    return EVALUATION if store.store_id in own else f"evaluation-{Path(store.place).stem}.json"


def refuse_unknown(probes: Sequence[str]) -> None:
    """RunError where a probe is none."""
    if not probes or (unknown := [probe for probe in probes if probe not in PROBES]):
        raise RunError(
            f"probes {', '.join(unknown if probes else ['none'])}: expected of {', '.join(PROBES)}"
        )
