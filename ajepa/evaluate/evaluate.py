"""Evaluate a run on a store: its trained classifier, or probes on its frozen encoder and on two baselines."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

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
    STATISTICS,
    TO_PROBE,
    ClipFeatures,
    ClipViews,
    compared_encoders,
    extract_features,
)
from ajepa.evaluate.metrics import resample_count
from ajepa.evaluate.probe_splits import VALIDATION_SHARE, ProbeFold, ProbeSplits
from ajepa.evaluate.probes import (
    ATTENTIVE_CLIPS_PER_STEP,
    ATTENTIVE_HEADS,
    ATTENTIVE_PEAK_LR,
    L2_GRID,
    MAX_ATTENTIVE_STEPS,
    NEIGHBOUR_COUNT,
    choose_l2,
    knn_scores_NC,
    linear_probe_scores_NC,
    standardise_features,
    train_attentive_probe,
)
from ajepa.evaluate.protocol import EvaluationProtocol, ProbeTraining, build_protocol, count_folds
from ajepa.evaluate.result import PROBE_TITLES, Evaluation, Score, refuse_overwriting, result_path
from ajepa.evaluate.true_labels import LabelKindOption, TrueLabels
from ajepa.model.pooling import EncoderLayer, PoolingName
from ajepa.model.vit import EncoderSpec
from ajepa.training.devices import pick_device
from ajepa.training.feature_choice import VectorFeatures, read_feature_choice, resolve_features
from ajepa.training.run import RECIPE_FILE, Json, Run
from ajepa.training.trained_run import TrainedRun
from pipeline.errors import RunError
from pipeline.messages import suggest_known
from pipeline.store.feature_store import FeatureStore

PROBE_NOTES: Json = {
    "encoder": (
        "frozen; the whole clip in views of the recipe's length, one after the other; the last frame fills its patch"
    ),
    "standardised": "with the mean and deviation of the clips that a probe is trained on",
    "choice": "on the val splits, or else on a fifth of the train clips, which then train too (not attentive)",
    "linear": "logistic regression, one per class, of single labels one over all; L2 chosen from l2_grid",
    "knn": f"share of the {NEIGHBOUR_COUNT} most similar (cosine) train clips that carry a class",
    "attentive": (
        f"{ATTENTIVE_HEADS} queries over at most {MAX_CLIP_TOKENS} tokens (all rows by stretches of time), "
        f"AdamW {ATTENTIVE_PEAK_LR:g}, {MAX_ATTENTIVE_STEPS} steps of {ATTENTIVE_CLIPS_PER_STEP} clips at most"
    ),
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
    pooling: PoolingName | None = None,
    layer: EncoderLayer | None = None,
    probes: Sequence[str] | None = None,
    label_sets: Sequence[str] = (),
    kind: LabelKindOption = "auto",
    out: Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure a checkpoint of a run on a store, its own or another of the same mel spec; save and return the result.

    The classifier of a fine-tuned run is measured on clips that did not train it, and on the classes that run and
    store share. With `probes`, and always for a pre-trained run, probes are trained on the frozen encoder instead, on
    at most `train_clips` clips.

    checkpoint  last, best, init or a step, as in `TrainedRun.open`
    pooling, layer  of the vectors that are probed; None: those that probes on training clips found best when the run
                was trained (`feature_choice`), or else a fixed fallback
    probes      some of linear, knn, attentive; None: all for a pre-trained run, none for a fine-tuned run
    label_sets  label sets to measure; the probes of a label set are also trained on it; empty: all of the store
    kind        labels per clip: single, multi or auto; auto: single if every clip has exactly one label (and the
                classifier was trained on single labels), else multi
    out         file to save the result in, replaced if it exists; None: `result_path`, where a result of another
                protocol is not replaced

    RunError or StoreError if run, store and labels do not fit together.
    """
    # The run, and a store of its mel spec
    refuse_fold_folder(run_path)
    run = Run.open(run_path)
    if not isinstance(store, FeatureStore):
        store = FeatureStore.open(store)
    store.refuse_other_front_end(run.identity.mel, f"{run.path} was trained on")

    # Where the result is saved, and whether it may replace another
    probed = not run.is_finetuned or probes is not None
    file = out or result_path(run, store, probed=probed)
    options = EvaluateOptions(
        store=store,
        run=run,
        checkpoint=checkpoint,
        device=pick_device(device),
        label_sets=tuple(label_sets),
        kind=kind,
        protected_path=None if out else file,
    )

    # Probes, or the classifier
    if probed:
        probing = ProbeOptions(
            probe_names=tuple(PROBE_TITLES if probes is None else probes),
            pooling=pooling,
            layer=layer,
            train_clips=train_clips,
            progress=progress,
        )
        evaluation = evaluate_probes(options, probing)
    elif pooling is not None or layer is not None:
        raise RunError(f"{run_path}: pooling and layer are for probes on its encoder; add --probe linear")
    else:
        evaluation = evaluate_classifier(options)
    evaluation.save_json(file)
    return evaluation


def refuse_fold_folder(path: Path) -> None:
    """RunError if `path` is the folder of a cross-validated task."""
    if not (path / RECIPE_FILE).is_file() and (path / "fold1" / RECIPE_FILE).is_file():
        raise RunError(
            f"{path}: holds a run for each fold; give one of them, such as {path / 'fold1'}; "
            f"for all folds together: ajepa-train compare {path}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """The run to measure, the store to measure it on, and the options of the evaluation.

    protected_path  a file that a result of another protocol must not replace; None: any file may be replaced
    """

    store: FeatureStore
    run: Run
    checkpoint: str | int
    device: torch.device
    label_sets: tuple[str, ...]
    kind: LabelKindOption
    protected_path: Path | None

    def refuse_lost_result(self, protocol: EvaluationProtocol) -> None:
        """RunError if saving a result of this protocol would replace a result of another protocol."""
        if self.protected_path is not None:
            refuse_overwriting(self.protected_path, protocol)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeOptions:
    """The probes to train, and the pooling and layer that were asked for (`resolve_features`).

    RunError for an unknown probe, or if there is none.
    """

    probe_names: tuple[str, ...]
    pooling: PoolingName | None
    layer: EncoderLayer | None
    train_clips: int
    progress: bool

    def __post_init__(self) -> None:
        if not self.probe_names:
            raise RunError(f"no probe is named; expected some of {', '.join(PROBE_TITLES)}")
        for name in self.probe_names:
            if name not in PROBE_TITLES:
                raise RunError(f"probe {name!r} is unknown; {suggest_known(name, PROBE_TITLES)}")


def evaluate_classifier(options: EvaluateOptions) -> Evaluation:
    """Measure the classifier of a fine-tuned run on held-out clips."""
    trained = TrainedRun.open(options.run, options.checkpoint)
    task_data = held_out_task_data(options.run, options.store)
    protocol = classifier_protocol(
        options.run,
        [task_data],
        step=trained.step,
        weights=trained.weights,
        weights_name=trained.part,
        device=options.device,
        train_clips=count_train_clips(options.run),
        checkpoint=options.checkpoint,
        kind=options.kind,
    )
    options.refuse_lost_result(protocol)
    scores = held_out_scores(trained, task_data, options.device)
    return classifier_evaluation(protocol, [scores], kind=options.kind, label_sets=options.label_sets)


def evaluate_probes(options: EvaluateOptions, probing: ProbeOptions) -> Evaluation:
    """Measure probes on a run's frozen encoder, on an encoder of random weights, and on log-mel statistics."""
    # The clips, and their labels
    store = options.store
    run = options.run
    trained = TrainedRun.open(run, options.checkpoint)
    spec = trained.encoder_spec(TO_PROBE)
    features = resolve_features(spec, read_feature_choice(run.path), probing.pooling, probing.layer)
    all_splits = choose_probe_splits(run, store, trained.recipe.seed, probing.train_clips)
    splits = all_splits.drop_unlabelled(store)
    label_sets = [
        TrueLabels.from_labels(name, store.labels_BC(splits.rows_N, name), options.kind, store.location)
        for name in options.label_sets or store.label_sets
    ]

    # The protocol is checked before clips are encoded, which takes long
    eval_clips = len(splits.eval_N)
    protocol = build_protocol(
        run,
        store,
        step=trained.step,
        weights=trained.weights,
        weights_name=trained.part,
        eval_splits=splits.eval_splits,
        eval_clips=eval_clips,
        unlabelled_clips=len(all_splits.eval_N) - eval_clips,
        resamples=resample_count(eval_clips, len(store.classes.mids)),
        device=options.device.type,
        checkpoint=options.checkpoint,
        kind=options.kind,
        folds=count_folds(splits.folds),
        probes=describe_probing(probing, features, splits, spec),
    )
    options.refuse_lost_result(protocol)

    scores = score_probes(options, probing, features, trained, splits, label_sets, protocol.resamples)
    classes = zip(store.classes.mids, store.classes.names, strict=True)
    return Evaluation(protocol=protocol, classes=tuple(classes), scores=tuple(scores))


def choose_probe_splits(run: Run, store: FeatureStore, seed: int, train_clips: int) -> ProbeSplits:
    """The clips that train, validate and measure probes; of a fine-tuned run's own clips, the held-out ones measure."""
    run_splits = run_splits_in_store(run, store) if run.is_finetuned else None
    if run_splits is None:
        return ProbeSplits.from_store(store, seed, train_clips)
    train_names, eval_names = run_splits
    return ProbeSplits.from_run_splits(store, train_names, eval_names, seed, train_clips)


def describe_probing(
    probing: ProbeOptions, features: VectorFeatures, probe_splits: ProbeSplits, spec: EncoderSpec
) -> ProbeTraining:
    """The training settings of the probes, and their clips; clips are counted in the first fold."""
    # The encoder's patches determine how many tokens are pooled
    fold = probe_splits.folds[0]
    grid = {
        "rows": spec.grid.rows,
        "cols": spec.grid.cols,
        "frames": spec.grid.patch_frames,
        "bands": spec.grid.patch_bands,
    }
    return ProbeTraining(
        names=probing.probe_names,
        pooling=features.pooling,
        layer=str(features.layer),
        grid=grid,
        train_splits=probe_splits.train_splits,
        val_splits=probe_splits.val_splits,
        train_clips=len(fold.fit_N),
        val_clips=len(fold.val_N),
        val_share=VALIDATION_SHARE if fold.val_from_train else None,
        notes=PROBE_NOTES,
    )


def score_probes(
    options: EvaluateOptions,
    probing: ProbeOptions,
    vectors: VectorFeatures,
    trained: TrainedRun,
    probe_splits: ProbeSplits,
    label_sets: Sequence[TrueLabels],
    resamples: int,
) -> Iterator[Score]:
    """Yield the score of every probe on every kind of features under every label set."""
    # Views of the recipe's length, normalised as the run's own clips were
    identity = options.run.identity
    frames = trained.encoder_spec(TO_PROBE).grid.frames
    views = ClipViews(store=options.store, frames=frames, mean=identity.mean, std=identity.std)

    # One pass of each encoder serves all its probes
    for features_name, encoder in compared_encoders(trained, options.device).items():
        features = extract_features(
            views,
            probe_splits.rows_N,
            encoder,
            pooling=vectors.pooling,
            layer=vectors.layer,
            tokens="attentive" in probing.probe_names,
            progress_label=features_name if probing.progress else None,
        )

        # Log-mel statistics have no tokens to attend to
        probe_names = [
            name for name in probing.probe_names if name != "attentive" or features_name != STATISTICS
        ]
        bar = tqdm(
            [(true_labels, probe) for true_labels in label_sets for probe in probe_names],
            desc=f"{features_name}: probes",
            disable=None if probing.progress else True,
            unit="probes",
            leave=False,
        )
        for true_labels, probe in bar:
            fit = ProbeFit(
                features=features,
                probe_splits=probe_splits,
                true_labels=true_labels,
                seed=trained.recipe.seed,
                device=options.device,
            )
            yield fit.score_probe(features_name, probe, resamples)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeFit:
    """The features and labels of all rows of the probe splits, with which probes are trained and measured."""

    features: ClipFeatures
    probe_splits: ProbeSplits
    true_labels: TrueLabels
    seed: int
    device: torch.device

    def score_probe(self, features_name: str, probe: str, resamples: int) -> Score:
        """Train the probe for every fold and measure it there, with intervals from this many resamples."""
        scored_folds = []
        chosen_settings = []
        for number, fold in enumerate(self.probe_splits.folds):
            scores_NC, setting = self.fit_and_score(fold, probe)
            if setting is not None:
                chosen_settings.append(setting)
            positions_N = self.row_positions(fold.eval_N)
            scored_folds.append(
                self.true_labels.scored_fold(positions_N, scores_NC, resamples, self.seed + number)
            )
        return self.true_labels.summarise_folds(features_name, probe, scored_folds, chosen_settings)

    def fit_and_score(self, fold: ProbeFold, probe: str) -> tuple[np.ndarray, float | None]:
        """A trained probe's scores of the fold's eval clips, and the selected setting (None for nearest neighbours)."""
        # The attentive probe standardises its tokens itself, and selects its own number of steps
        single = self.true_labels.kind == "single"
        if probe == "attentive":
            attentive = train_attentive_probe(
                self.features_of_rows(fold.train_N),
                self.labels_of_rows(fold.train_N),
                self.features_of_rows(fold.val_N),
                self.labels_of_rows(fold.val_N),
                self.features_of_rows(fold.eval_N),
                seed=self.seed,
                single=single,
                device=self.device,
            )
            return attentive.scores_NC, attentive.steps

        # Nearest neighbours have no setting to select
        train_ND, val_ND, fit_ND, eval_ND = self.standardised_vectors(fold)
        fit_NC = self.labels_of_rows(fold.fit_N)
        if probe == "knn":
            return knn_scores_NC(fit_ND, fit_NC, eval_ND), None

        # The val clips select the penalty of the linear probe; then all fit clips train the probe
        train_NC = self.labels_of_rows(fold.train_N)
        val_NC = self.labels_of_rows(fold.val_N)
        l2 = choose_l2(train_ND, train_NC, val_ND, val_NC, single=single)
        return linear_probe_scores_NC(fit_ND, fit_NC, eval_ND, l2=l2, single=single), l2

    def standardised_vectors(self, fold: ProbeFold) -> Iterator[Tensor]:
        """Yield the vectors of the train, val, fit and eval clips, all standardised by the fit clips."""
        rows = (fold.fit_N, fold.train_N, fold.val_N, fold.fit_N, fold.eval_N)
        vectors = standardise_features(*(self.features_of_rows(rows_N).vectors_ND for rows_N in rows))
        return (vectors_ND.to(self.device) for vectors_ND in vectors[1:])

    def features_of_rows(self, rows_N: np.ndarray) -> ClipFeatures:
        return self.features.select_clips(self.row_positions(rows_N))

    def labels_of_rows(self, rows_N: np.ndarray) -> np.ndarray:
        return self.true_labels.labels_NC[self.row_positions(rows_N)]

    def row_positions(self, rows_N: np.ndarray) -> np.ndarray:
        """The positions of some rows among all rows of the probe splits."""
        return np.searchsorted(self.probe_splits.rows_N, rows_N)
