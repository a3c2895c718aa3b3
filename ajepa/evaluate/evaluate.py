"""Probe bench: the frozen features of some clips, on which a probe is trained part by part and measured.

What a run is worth on a store: a classifier as it was trained, or probes on a frozen encoder, beside baselines.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ajepa.evaluate import probes
from ajepa.evaluate.classifier_scores import (
    count_train_clips,
    held_out,
    held_out_scores,
    judged,
    protocol,
    splits_of_run,
)
from ajepa.evaluate.features import MOST_TOKENS, TO_PROBE, Features, Views, all_features, compared_encoders
from ajepa.evaluate.metrics import resamples
from ajepa.evaluate.probe_splits import HELD_SHARE, Part, Partition
from ajepa.evaluate.probes import L2_GRID, NEIGHBOURS, chosen_l2, knn_NC, linear_NC, standardised
from ajepa.evaluate.protocol import place_of, refuse_replacing, stamp
from ajepa.evaluate.result import PROBES, Evaluation, Kind, Score, Truth
from ajepa.model.pooling import LAST, POOLING, Layer, PoolingName
from ajepa.model.vit import EncoderSpec
from ajepa.training.devices import pick_device
from ajepa.training.run import RECIPE, Json, Run
from ajepa.training.trained_run import TrainedRun
from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import RunError
from pipeline.store.feature_store import FeatureStore


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
            folds.append(self.truth.measured(self.places(part.eval_N), said_NC, count, self.seed + place))
        return self.truth.score(features, probe, folds, chosen)

    def said(self, part: Part, probe: str) -> tuple[np.ndarray, float | None]:
        """A probe's scores of the clips to measure on, and what was chosen for it."""
        single = self.truth.kind == "single"
        if probe == "attentive":
            told = probes.attended(
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
        return self.found.of(self.places(rows_N))

    def labels(self, rows_N: np.ndarray) -> np.ndarray:
        return self.truth.labels_NC[self.places(rows_N)]

    def places(self, rows_N: np.ndarray) -> np.ndarray:
        """Where some rows stand among those of the partition."""
        return np.searchsorted(self.partition.rows_N, rows_N)


PROTOCOL = {
    "encoder": "frozen; the whole clip in views of the recipe's length, one after the other",
    "standardised": "with the mean and deviation of the clips that a probe is trained on",
    "choice": "on the val splits, or else on a fifth of the train clips, which then train too (not attentive)",
    "linear": "logistic regression, one per class, of single labels one over all; L2 chosen from l2_grid",
    "knn": f"share of the {NEIGHBOURS} most similar (cosine) train clips that carry a class",
    "attentive": f"{probes.HEADS} queries over at most {MOST_TOKENS} tokens (all rows by stretches of time), "
    f"AdamW {probes.PEAK_LR:g}, {probes.MOST_STEPS} steps of {probes.CLIPS_PER_STEP} clips at most",
    "labels": "each label set trained and measured on itself",
    "l2_grid": list(L2_GRID),
}


def evaluate(
    store: Path | str | FeatureStore,
    run_path: Path,
    *,
    checkpoint: str | int = "last",
    device: str = "auto",
    train_clips: int = 20_000,
    pooling: PoolingName = POOLING,
    layer: Layer = LAST,
    probes: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    kind: Kind = "auto",
    out: Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure a checkpoint of a run on a store of its mel spec: its own, or another one.

    A fine-tuned run's classifier, on clips that it was not trained on, by the classes that it and the store share;
    with `probes`, and of a pre-trained run always (all of them, where none is named), a frozen encoder. `checkpoint`
    is `Run.load`'s: last, best or a step. Of `labels` (all sets of the store, where none is named) each is measured,
    and by probes trained, on itself. Labels are `single` where every clip has exactly one, if nothing else is said;
    a classifier's only if it was trained on such. Kept as `out`, else where `stamp.place_of` says, unless another
    protocol's result lies there. RunError or StoreError where run, store and labels do not fit.
    """
    refuse_folds(run_path)
    run = Run.open(run_path)
    store = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    store.refuse_other_front_end(MelSpec.from_json(run.identity["mel"]), f"{run.path} was trained on")
    probed = not run.finetuned or probes is not None
    place = out or place_of(run, store, probed=probed)
    asked = Asked(
        store=store,
        run=run,
        checkpoint=checkpoint,
        device=pick_device(device),
        labels=tuple(labels),
        kind=kind,
        place=None if out else place,
    )
    if not probed:
        if pooling != POOLING or layer != LAST:
            raise RunError(
                f"{run_path}: pooling and layer are the probes' on its encoder; add --probe linear"
            )
        found = classified(asked)
    else:
        names = tuple(PROBES) if probes is None else tuple(probes)
        how = Probing(names=names, pooling=pooling, layer=layer, train_clips=train_clips, progress=progress)
        found = frozen(asked, how)
    found.save(place)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is to be measured on what; `place`: where a result of another protocol is not to be replaced."""

    store: FeatureStore
    run: Run
    checkpoint: str | int
    device: torch.device
    labels: tuple[str, ...]
    kind: Kind
    place: Path | None

    def refuse(self, protocol: Json) -> None:
        """RunError where that would be lost."""
        if self.place is not None:
            refuse_replacing(self.place, protocol)


@dataclass(frozen=True, kw_only=True, slots=True)
class Probing:
    """Which probes, on which features; RunError where one is none."""

    names: tuple[str, ...]
    pooling: PoolingName
    layer: Layer
    train_clips: int
    progress: bool

    def __post_init__(self) -> None:
        if not self.names or (unknown := [name for name in self.names if name not in PROBES]):
            told = ", ".join(unknown if self.names else ["none"])
            raise RunError(f"probes {told}: expected of {', '.join(PROBES)}")


def classified(asked: Asked) -> Evaluation:
    """The classifier of a fine-tuned run on held-out clips."""
    trained = TrainedRun.open(asked.run, asked.checkpoint)
    assignment = held_out(asked.run, asked.store)
    told = protocol(
        asked.run,
        [assignment],
        step=trained.step,
        weights=trained.weights,
        part=trained.part,
        device=asked.device,
        train_clips=count_train_clips(asked.run),
        checkpoint=asked.checkpoint,
        kind=asked.kind,
    )
    asked.refuse(told)
    held = held_out_scores(trained, assignment, asked.device)
    return judged(told, [held], kind=asked.kind, label_sets=asked.labels)


def frozen(asked: Asked, how: Probing) -> Evaluation:
    """Probes on a run's frozen encoder, on the same drawn at random, and on log-mel statistics."""
    store, run = asked.store, asked.run
    trained = TrainedRun.open(run, asked.checkpoint)
    spec = trained.encoder_spec(TO_PROBE)
    whole = partition_of(run, store, trained.recipe.seed, how.train_clips)
    partition = whole.labelled(store)
    truths = [
        Truth.of(name, store.labels_BC(partition.rows_N, name), asked.kind, store.place)
        for name in asked.labels or store.label_sets
    ]
    count = resamples(len(partition.eval_N), len(store.classes.mids))
    told = stamp(
        run,
        store,
        step=trained.step,
        weights=trained.weights,
        part=trained.part,
        eval_splits=partition.eval,
        eval_clips=len(partition.eval_N),
        left_out=len(whole.eval_N) - len(partition.eval_N),
        resamples=count,
        device=asked.device.type,
        checkpoint=asked.checkpoint,
        kind=asked.kind,
        folds=len(partition.parts) if len(partition.parts) > 1 else 0,
        probes=probes_told(how, partition, spec),
    )
    asked.refuse(told)
    scores = tuple(probe_scores(asked, how, trained, partition, truths, count))
    classes = tuple(zip(store.classes.mids, store.classes.names, strict=True))
    return Evaluation(protocol=told, classes=classes, scores=scores)


def probe_scores(
    asked: Asked,
    how: Probing,
    trained: TrainedRun,
    partition: Partition,
    truths: Sequence[Truth],
    count: int,
) -> Iterator[Score]:
    """Every probe on every kind of features under every label set."""
    identity, seed = asked.run.identity, trained.recipe.seed
    views = Views(
        store=asked.store,
        frames=trained.encoder_spec(TO_PROBE).grid.frames,
        mean=identity["mean"],
        std=identity["std"],
    )
    for name, encoder in compared_encoders(trained, asked.device).items():
        found = all_features(
            views,
            partition.rows_N,
            encoder,
            pooling=how.pooling,
            layer=how.layer,
            tokens="attentive" in how.names,
            progress=name if how.progress else None,
        )
        used = [probe for probe in how.names if probe != "attentive" or encoder is not None]
        pairs = [(truth, probe) for truth in truths for probe in used]
        bar = {"desc": f"{name}: probes", "unit": "probes", "leave": False}
        for truth, probe in tqdm(pairs, disable=None if how.progress else True, **bar):
            bench = Bench(found=found, partition=partition, truth=truth, seed=seed, device=asked.device)
            yield bench.score(name, probe, count)


def partition_of(run: Run, store: FeatureStore, seed: int, train_clips: int) -> Partition:
    """What trains, chooses and measures; of a fine-tuned run's own clips those that it held out measure."""
    mine = splits_of_run(run, store) if run.finetuned else None
    if mine is None:
        return Partition.of(store, seed, train_clips)
    return Partition.of_splits(store, *mine, seed, train_clips)


def probes_told(how: Probing, partition: Partition, spec: EncoderSpec) -> Json:
    """How probes are trained, on what."""
    part, grid = partition.parts[0], spec.grid
    return {
        "names": list(how.names),
        "pooling": how.pooling,
        "layer": str(how.layer),
        "grid": {
            "rows": grid.rows,
            "cols": grid.cols,
            "frames": grid.patch_frames,
            "bands": grid.patch_bands,
        },
        "train_splits": list(partition.train),
        "val_splits": list(partition.val),
        "train_clips": len(part.fit_N),
        "val_clips": len(part.val_N),
        "val_share": HELD_SHARE if part.drawn else None,
        **PROTOCOL,
    }


def refuse_folds(path: Path) -> None:
    """RunError where this is the folder of a cross-validated task."""
    if not (path / RECIPE).is_file() and (path / "fold1" / RECIPE).is_file():
        told = f"give one of them, such as {path / 'fold1'}; all together: ajepa-train compare {path}"
        raise RunError(f"{path}: holds a run for each fold; {told}")
