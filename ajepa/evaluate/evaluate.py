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
    classifier_evaluation,
    classifier_protocol,
    count_train_clips,
    held_out_scores,
    held_out_task_data,
    run_splits_in_store,
)
from ajepa.evaluate.features import (
    MAX_CLIP_TOKENS,
    TO_PROBE,
    ClipFeatures,
    ClipViews,
    compared_encoders,
    extract_features,
)
from ajepa.evaluate.metrics import resample_count
from ajepa.evaluate.probe_splits import VALIDATION_SHARE, ProbeFold, ProbeSplits
from ajepa.evaluate.probes import (
    L2_GRID,
    NEIGHBOUR_COUNT,
    choose_l2,
    knn_scores_NC,
    linear_probe_scores_NC,
    standardise_features,
)
from ajepa.evaluate.protocol import protocol_of, refuse_overwriting, result_path
from ajepa.evaluate.result import PROBE_TITLES, Evaluation, LabelKindOption, Score, TrueLabels
from ajepa.model.pooling import DEFAULT_POOLING, LAST_LAYER, EncoderLayer, PoolingName
from ajepa.model.vit import EncoderSpec
from ajepa.training.devices import pick_device
from ajepa.training.run import RECIPE_FILE, Json, Run
from ajepa.training.trained_run import TrainedRun
from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import RunError
from pipeline.store.feature_store import FeatureStore


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeFit:
    """The features of a partition's rows and what is true of them: what a probe is put on."""

    features: ClipFeatures
    probe_splits: ProbeSplits
    true_labels: TrueLabels
    seed: int
    device: torch.device

    def score_probe(self, features_name: str, probe: str, count: int) -> Score:
        """Train the probe on every part and measure it there; intervals from `count` resamples."""
        folds, chosen = [], []
        for place, part in enumerate(self.probe_splits.folds):
            said_NC, setting = self.fit_and_score(part, probe)
            chosen += [] if setting is None else [setting]
            folds.append(
                self.true_labels.scored_fold(
                    self.row_positions(part.eval_N), said_NC, count, self.seed + place
                )
            )
        return self.true_labels.summarise_folds(features_name, probe, folds, chosen)

    def fit_and_score(self, fold: ProbeFold, probe: str) -> tuple[np.ndarray, float | None]:
        """A probe's scores of the clips to measure on, and what was chosen for it."""
        single = self.true_labels.kind == "single"
        if probe == "attentive":
            told = probes.train_attentive_probe(
                self.features_of_rows(fold.train_N),
                self.labels_of_rows(fold.train_N),
                self.features_of_rows(fold.val_N),
                self.labels_of_rows(fold.val_N),
                self.features_of_rows(fold.eval_N),
                seed=self.seed,
                single=single,
                device=self.device,
            )
            return told.scores_NC, told.steps
        train_ND, val_ND, fit_ND, eval_ND = self.standardised_vectors(fold)
        if probe == "knn":
            return knn_scores_NC(fit_ND, self.labels_of_rows(fold.fit_N), eval_ND), None
        labels_NC, val_NC = self.labels_of_rows(fold.train_N), self.labels_of_rows(fold.val_N)
        l2 = choose_l2(train_ND, labels_NC, val_ND, val_NC, single=single)
        return linear_probe_scores_NC(
            fit_ND, self.labels_of_rows(fold.fit_N), eval_ND, l2=l2, single=single
        ), l2

    def standardised_vectors(self, fold: ProbeFold) -> Iterator[Tensor]:
        """Of the clips to train on, to choose with, to fit in the end and to measure on, all standardised alike."""
        rows = (fold.fit_N, fold.train_N, fold.val_N, fold.fit_N, fold.eval_N)
        told = standardise_features(*(self.features_of_rows(rows_N).vectors_ND for rows_N in rows))
        return (vectors_ND.to(self.device) for vectors_ND in told[1:])

    def features_of_rows(self, rows_N: np.ndarray) -> ClipFeatures:
        return self.features.select_clips(self.row_positions(rows_N))

    def labels_of_rows(self, rows_N: np.ndarray) -> np.ndarray:
        return self.true_labels.labels_NC[self.row_positions(rows_N)]

    def row_positions(self, rows_N: np.ndarray) -> np.ndarray:
        """Where some rows stand among those of the partition."""
        return np.searchsorted(self.probe_splits.rows_N, rows_N)


PROBE_PROTOCOL = {
    "encoder": "frozen; the whole clip in views of the recipe's length, one after the other",
    "standardised": "with the mean and deviation of the clips that a probe is trained on",
    "choice": "on the val splits, or else on a fifth of the train clips, which then train too (not attentive)",
    "linear": "logistic regression, one per class, of single labels one over all; L2 chosen from l2_grid",
    "knn": f"share of the {NEIGHBOUR_COUNT} most similar (cosine) train clips that carry a class",
    "attentive": f"{probes.ATTENTIVE_HEADS} queries over at most {MAX_CLIP_TOKENS} tokens (all rows by stretches of time), "
    f"AdamW {probes.ATTENTIVE_PEAK_LR:g}, {probes.MAX_ATTENTIVE_STEPS} steps of {probes.ATTENTIVE_CLIPS_PER_STEP} clips at most",
    "labels": "each label set trained and measured on itself",
    "l2_grid": list(L2_GRID),
}


def evaluate_run(
    store: Path | str | FeatureStore,
    run_path: Path,
    *,
    checkpoint: str | int = "last",
    device: str = "auto",
    train_clips: int = 20_000,
    pooling: PoolingName = DEFAULT_POOLING,
    layer: EncoderLayer = LAST_LAYER,
    probes: Sequence[str] | None = None,
    label_sets: Sequence[str] = (),
    kind: LabelKindOption = "auto",
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
    refuse_fold_folder(run_path)
    run = Run.open(run_path)
    store = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    store.refuse_other_front_end(MelSpec.from_json(run.identity["mel"]), f"{run.path} was trained on")
    probed = not run.is_finetuned or probes is not None
    place = out or result_path(run, store, probed=probed)
    asked = EvaluateOptions(
        store=store,
        run=run,
        checkpoint=checkpoint,
        device=pick_device(device),
        label_sets=tuple(label_sets),
        kind=kind,
        protected_path=None if out else place,
    )
    if not probed:
        if pooling != DEFAULT_POOLING or layer != LAST_LAYER:
            raise RunError(
                f"{run_path}: pooling and layer are the probes' on its encoder; add --probe linear"
            )
        found = evaluate_classifier(asked)
    else:
        names = tuple(PROBE_TITLES) if probes is None else tuple(probes)
        how = ProbeOptions(
            probe_names=names, pooling=pooling, layer=layer, train_clips=train_clips, progress=progress
        )
        found = evaluate_probes(asked, how)
    found.save_json(place)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """What is to be measured on what; `place`: where a result of another protocol is not to be replaced."""

    store: FeatureStore
    run: Run
    checkpoint: str | int
    device: torch.device
    label_sets: tuple[str, ...]
    kind: LabelKindOption
    protected_path: Path | None

    def refuse_lost_result(self, protocol: Json) -> None:
        """RunError where that would be lost."""
        if self.protected_path is not None:
            refuse_overwriting(self.protected_path, protocol)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeOptions:
    """Which probes, on which features; RunError where one is none."""

    probe_names: tuple[str, ...]
    pooling: PoolingName
    layer: EncoderLayer
    train_clips: int
    progress: bool

    def __post_init__(self) -> None:
        if not self.probe_names or (
            unknown := [name for name in self.probe_names if name not in PROBE_TITLES]
        ):
            told = ", ".join(unknown if self.probe_names else ["none"])
            raise RunError(f"probes {told}: expected of {', '.join(PROBE_TITLES)}")


def evaluate_classifier(options: EvaluateOptions) -> Evaluation:
    """The classifier of a fine-tuned run on held-out clips."""
    trained = TrainedRun.open(options.run, options.checkpoint)
    assignment = held_out_task_data(options.run, options.store)
    told = classifier_protocol(
        options.run,
        [assignment],
        step=trained.step,
        weights=trained.weights,
        weights_name=trained.part,
        device=options.device,
        train_clips=count_train_clips(options.run),
        checkpoint=options.checkpoint,
        kind=options.kind,
    )
    options.refuse_lost_result(told)
    held = held_out_scores(trained, assignment, options.device)
    return classifier_evaluation(told, [held], kind=options.kind, label_sets=options.label_sets)


def evaluate_probes(options: EvaluateOptions, probing: ProbeOptions) -> Evaluation:
    """Probes on a run's frozen encoder, on the same drawn at random, and on log-mel statistics."""
    store, run = options.store, options.run
    trained = TrainedRun.open(run, options.checkpoint)
    spec = trained.encoder_spec(TO_PROBE)
    whole = choose_probe_splits(run, store, trained.recipe.seed, probing.train_clips)
    partition = whole.drop_unlabelled(store)
    truths = [
        TrueLabels.from_labels(name, store.labels_BC(partition.rows_N, name), options.kind, store.location)
        for name in options.label_sets or store.label_sets
    ]
    count = resample_count(len(partition.eval_N), len(store.classes.mids))
    told = protocol_of(
        run,
        store,
        step=trained.step,
        weights=trained.weights,
        weights_name=trained.part,
        eval_splits=partition.eval_splits,
        eval_clips=len(partition.eval_N),
        unlabelled_clips=len(whole.eval_N) - len(partition.eval_N),
        resamples=count,
        device=options.device.type,
        checkpoint=options.checkpoint,
        kind=options.kind,
        folds=len(partition.folds) if len(partition.folds) > 1 else 0,
        probes=describe_probing(probing, partition, spec),
    )
    options.refuse_lost_result(told)
    scores = tuple(score_probes(options, probing, trained, partition, truths, count))
    classes = tuple(zip(store.classes.mids, store.classes.names, strict=True))
    return Evaluation(protocol=told, classes=classes, scores=scores)


def score_probes(
    options: EvaluateOptions,
    probing: ProbeOptions,
    trained: TrainedRun,
    probe_splits: ProbeSplits,
    label_sets: Sequence[TrueLabels],
    count: int,
) -> Iterator[Score]:
    """Every probe on every kind of features under every label set."""
    identity, seed = options.run.identity, trained.recipe.seed
    views = ClipViews(
        store=options.store,
        frames=trained.encoder_spec(TO_PROBE).grid.frames,
        mean=identity["mean"],
        std=identity["std"],
    )
    for name, encoder in compared_encoders(trained, options.device).items():
        found = extract_features(
            views,
            probe_splits.rows_N,
            encoder,
            pooling=probing.pooling,
            layer=probing.layer,
            tokens="attentive" in probing.probe_names,
            progress_label=name if probing.progress else None,
        )
        used = [probe for probe in probing.probe_names if probe != "attentive" or encoder is not None]
        pairs = [(truth, probe) for truth in label_sets for probe in used]
        bar = {"desc": f"{name}: probes", "unit": "probes", "leave": False}
        for truth, probe in tqdm(pairs, disable=None if probing.progress else True, **bar):
            bench = ProbeFit(
                features=found, probe_splits=probe_splits, true_labels=truth, seed=seed, device=options.device
            )
            yield bench.score_probe(name, probe, count)


def choose_probe_splits(run: Run, store: FeatureStore, seed: int, train_clips: int) -> ProbeSplits:
    """What trains, chooses and measures; of a fine-tuned run's own clips those that it held out measure."""
    mine = run_splits_in_store(run, store) if run.is_finetuned else None
    if mine is None:
        return ProbeSplits.from_store(store, seed, train_clips)
    return ProbeSplits.from_run_splits(store, *mine, seed, train_clips)


def describe_probing(probing: ProbeOptions, probe_splits: ProbeSplits, spec: EncoderSpec) -> Json:
    """How probes are trained, on what."""
    part, grid = probe_splits.folds[0], spec.grid
    return {
        "names": list(probing.probe_names),
        "pooling": probing.pooling,
        "layer": str(probing.layer),
        "grid": {
            "rows": grid.rows,
            "cols": grid.cols,
            "frames": grid.patch_frames,
            "bands": grid.patch_bands,
        },
        "train_splits": list(probe_splits.train_splits),
        "val_splits": list(probe_splits.val_splits),
        "train_clips": len(part.fit_N),
        "val_clips": len(part.val_N),
        "val_share": VALIDATION_SHARE if part.val_from_train else None,
        **PROBE_PROTOCOL,
    }


def refuse_fold_folder(path: Path) -> None:
    """RunError where this is the folder of a cross-validated task."""
    if not (path / RECIPE_FILE).is_file() and (path / "fold1" / RECIPE_FILE).is_file():
        told = f"give one of them, such as {path / 'fold1'}; all together: ajepa-train compare {path}"
        raise RunError(f"{path}: holds a run for each fold; {told}")
