"""Evaluate a run on a store: its trained classifier, or probes on its frozen encoder and on two baselines."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

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
    RANDOM,
    STATISTICS,
    TO_PROBE,
    TRAINED,
    ClipViews,
    compared_encoders,
    extract_features,
)
from ajepa.evaluate.linear_probe import L2_GRID
from ajepa.evaluate.metrics import resample_count
from ajepa.evaluate.overlap import TrainingOverlap, measure_overlap
from ajepa.evaluate.probe_fit import ProbeFit
from ajepa.evaluate.probe_splits import VALIDATION_SHARE, ProbeSplits
from ajepa.evaluate.probes import (
    ATTENTIVE_CLIPS_PER_STEP,
    ATTENTIVE_HEADS,
    ATTENTIVE_PEAK_LR,
    MAX_ATTENTIVE_STEPS,
    NEIGHBOUR_COUNT,
)
from ajepa.evaluate.protocol import EvaluationProtocol, ProbeTraining, build_protocol, count_folds
from ajepa.evaluate.result import (
    PROBE_TITLES,
    Evaluation,
    Score,
    read_evaluation,
    refuse_overwriting,
    result_path,
)
from ajepa.evaluate.true_labels import LabelKindOption, TrueLabels
from ajepa.model.pooling import EncoderLayer, PoolingName
from ajepa.model.vit import EncoderSpec
from ajepa.training.devices import Precision, PrecisionName, pick_device
from ajepa.training.feature_choice import VectorFeatures, read_feature_choice, resolve_features
from ajepa.training.run import RECIPE_FILE, Json, Run
from ajepa.training.trained_run import TrainedRun
from pipeline.errors import RunError
from pipeline.messages import print_to_stderr, suggest_known
from pipeline.store.feature_store import FeatureStore

PROBE_NOTES: Json = {
    "encoder": (
        "frozen; the whole clip in views of the recipe's length, one after the other; the last frame fills its patch"
    ),
    "standardised": "with the mean and deviation of the clips that a probe is trained on",
    "choice": (
        "on the val splits, or else on a fifth of the train clips, whole sounds, which then train too (not attentive)"
    ),
    "linear": "logistic regression, one per class, of single labels one over all; L2 chosen from l2_grid",
    "knn": f"share of the {NEIGHBOUR_COUNT} most similar (cosine) train clips that carry a class",
    "attentive": (
        f"{ATTENTIVE_HEADS} queries over at most {MAX_CLIP_TOKENS} tokens (all rows by stretches of time, kept in "
        "float16), "
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
    precision: PrecisionName = "auto",
    train_clips: int = 20_000,
    pooling: PoolingName | None = None,
    layer: EncoderLayer | None = None,
    probes: Sequence[str] | None = None,
    label_sets: Sequence[str] = (),
    kind: LabelKindOption = "auto",
    out: Path | None = None,
    progress: bool = False,
    say: Callable[[str], None] = print_to_stderr,
) -> Evaluation:
    """Measure a checkpoint of a run on a store, its own or another of the same mel spec; save and return the result.

    The classifier of a fine-tuned run is measured on clips that did not train it, and on the classes that run and
    store share. With `probes`, and always for a pre-trained run, probes are trained on the frozen encoder instead, on
    at most `train_clips` clips.

    checkpoint  last, best, init or a step, as in `TrainedRun.open`
    precision   of the network, up to its tokens; auto: as it was trained (`pick_measuring_precision`). Pooling, heads,
                probes and metrics are fp32
    pooling, layer  of the vectors that are probed; None: those that probes on training clips found best when the run
                was trained (`feature_choice`), or else a fixed fallback
    probes      some of linear, knn, attentive; None: all for a pre-trained run, none for a fine-tuned run
    label_sets  label sets to measure; the probes of a label set are also trained on it; empty: all of the store
    kind        labels per clip: single, multi or auto; auto: single if every clip has exactly one label (and the
                classifier was trained on single labels), else multi
    out         file to save the result in, replaced if it exists; None: `result_path`, where a result of another
                protocol is not replaced
    progress    say what is measured, a line for each stage, and show progress bars on a terminal

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
    trained = TrainedRun.open(run, checkpoint)
    torch_device = pick_device(device)
    options = EvaluateOptions(
        store=store,
        run=run,
        trained=trained,
        checkpoint=checkpoint,
        device=torch_device,
        precision=trained.pick_precision(torch_device, precision),
        label_sets=tuple(label_sets),
        kind=kind,
        file=file,
        is_protected=out is None,
        progress=progress,
        say=say if progress else ignore_line,
    )

    # Probes, or the classifier
    if probed:
        probing = ProbeOptions(
            probe_names=tuple(PROBE_TITLES if probes is None else probes),
            pooling=pooling,
            layer=layer,
            train_clips=train_clips,
        )
        evaluation = evaluate_probes(options, probing)
    elif pooling is not None or layer is not None:
        raise RunError(f"{run_path}: pooling and layer are for probes on its encoder; add --probe linear")
    else:
        evaluation = evaluate_classifier(options, progress=progress)
    evaluation.save_json(file)
    options.say(f"{file}: written; beside others: ajepa-train compare {run.path}")
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

    file          where the result will be saved
    is_protected  whether a result of another protocol in that file must not be replaced
    say           told of every stage
    """

    store: FeatureStore
    run: Run
    trained: TrainedRun
    checkpoint: str | int
    device: torch.device
    precision: Precision
    label_sets: tuple[str, ...]
    kind: LabelKindOption
    file: Path
    is_protected: bool
    progress: bool
    say: Callable[[str], None]

    def refuse_lost_result(self, protocol: EvaluationProtocol) -> None:
        """RunError if saving a result of this protocol would replace a result of another protocol."""
        if self.is_protected:
            refuse_overwriting(self.file, protocol)

    def measure_overlap(
        self, eval_N: np.ndarray, *, is_own_store_told: bool = False
    ) -> TrainingOverlap | None:
        """The measured clips whose sound trained the run; None too for a checkpoint before the first step."""
        if not self.trained.step:
            return None
        return measure_overlap(self.run, self.store, eval_N, is_own_store_told=is_own_store_told)


def ignore_line(line: str) -> None:
    """Print nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeOptions:
    """The probes to train, and the pooling and layer that were asked for (`resolve_features`).

    RunError for an unknown probe, or if there is none.
    """

    probe_names: tuple[str, ...]
    pooling: PoolingName | None
    layer: EncoderLayer | None
    train_clips: int

    def __post_init__(self) -> None:
        if not self.probe_names:
            raise RunError(f"no probe is named; expected some of {', '.join(PROBE_TITLES)}")
        for name in self.probe_names:
            if name not in PROBE_TITLES:
                raise RunError(f"probe {name!r} is unknown; {suggest_known(name, PROBE_TITLES)}")

    @property
    def selects_settings(self) -> bool:
        """Whether a probe has settings to select on held-back clips; nearest neighbours have none."""
        return any(name != "knn" for name in self.probe_names)


def evaluate_classifier(options: EvaluateOptions, *, progress: bool = False) -> Evaluation:
    """Measure the classifier of a fine-tuned run on held-out clips."""
    trained = options.trained
    task_data = held_out_task_data(options.run, options.store)
    protocol = classifier_protocol(
        options.run,
        [task_data],
        step=trained.step,
        weights=trained.weights,
        weights_name=trained.part,
        device=options.device,
        precision=options.precision,
        chosen_by=trained.chosen_by,
        train_clips=count_train_clips(options.run),
        checkpoint=options.checkpoint,
        kind=options.kind,
        overlap=options.measure_overlap(task_data.eval_N),
    )
    options.refuse_lost_result(protocol)
    options.say(f"classifier: logits of {len(task_data.eval_N)} clips, in {options.precision.name}")
    scores = held_out_scores(trained, task_data, options.device, options.precision, progress=progress)
    return classifier_evaluation(protocol, [scores], kind=options.kind, label_sets=options.label_sets)


def evaluate_probes(options: EvaluateOptions, probing: ProbeOptions) -> Evaluation:
    """Measure probes on a run's frozen encoder, on an encoder of random weights, and on log-mel statistics."""
    # The clips, and their labels
    store = options.store
    run = options.run
    trained = options.trained
    spec = trained.encoder_spec(TO_PROBE)
    features = resolve_features(spec, read_feature_choice(run.path), probing.pooling, probing.layer)
    all_splits = choose_probe_splits(run, store, trained.recipe.seed, probing.train_clips)
    splits = all_splits.drop_unlabelled(store)
    for note in splits.notes:
        options.say(note)
    options.say(f"vectors: {features.description}")
    if probing.selects_settings:
        for fold in splits.folds:
            fold.refuse_few_clips(store.location)
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
        precision=options.precision.name,
        chosen_by=trained.chosen_by,
        labels={truth.label_set: truth.digest for truth in label_sets},
        checkpoint=options.checkpoint,
        kind=options.kind,
        folds=count_folds(splits.folds),
        probes=describe_probing(probing, features, splits, spec),
        overlap=options.measure_overlap(splits.eval_N, is_own_store_told=bool(splits.notes)),
    )
    options.refuse_lost_result(protocol)

    scores = score_probes(options, probing, features, trained, splits, label_sets, protocol)
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
    protocol: EvaluationProtocol,
) -> Iterator[Score]:
    """Yield the score of every probe on every kind of features under every label set.

    Scores that the result's file holds already, of the same weights, clips and settings, are taken from there.
    """
    # Views of the recipe's length, normalised as the run's own clips were
    identity = options.run.identity
    frames = trained.encoder_spec(TO_PROBE).grid.frames
    views = ClipViews(store=options.store, frames=frames, mean=identity.mean, std=identity.std)
    known = known_scores(options.file, protocol)

    for features_name, encoder in compared_encoders(trained, options.device).items():
        # Log-mel statistics have no tokens to attend to
        probe_names = [
            name for name in probing.probe_names if name != "attentive" or features_name != STATISTICS
        ]
        wanted = [(true_labels, probe) for true_labels in label_sets for probe in probe_names]
        keys = [(features_name, probe, true_labels.label_set) for true_labels, probe in wanted]
        if all(key in known for key in keys):
            options.say(f"{features_name}: measured before, in {options.file}; delete it to measure again")
            yield from (known[key] for key in keys)
            continue

        # One pass of an encoder serves all its probes
        clips = len(probe_splits.rows_N)
        options.say(f"{features_name}: features of {clips} clips, in {options.precision.name}")
        features = extract_features(
            views,
            probe_splits.rows_N,
            encoder,
            pooling=vectors.pooling,
            layer=vectors.layer,
            tokens="attentive" in probe_names,
            precision=options.precision,
            progress_label=features_name if options.progress else None,
        )
        fit = ProbeFit(
            features=features,
            probe_splits=probe_splits,
            seed=trained.recipe.seed,
            device=options.device,
        )
        for true_labels, probe in wanted:
            options.say(f"{features_name}: {PROBE_TITLES[probe]} probe, {true_labels.label_set} labels")
            score = fit.score_probe(features_name, probe, true_labels, protocol.resamples)
            yield score

            # Before its first step a run's encoder is the random one
            if features_name == TRAINED and trained.step == 0:
                known[RANDOM, probe, true_labels.label_set] = replace(score, features=RANDOM)


def known_scores(file: Path, protocol: EvaluationProtocol) -> dict[tuple[str, str, str], Score]:
    """The scores in a result's file that measuring by this protocol would give again, by features, probe and label set.

    Those of the run's encoder depend on its weights. A random encoder and log-mel statistics do not, so that a later
    checkpoint of the run finds them measured.
    """
    stored = read_evaluation(file)
    if stored is None or not stored.protocol.gives_same_baselines(protocol):
        return {}
    has_same_weights = stored.protocol.weights_sha256 == protocol.weights_sha256
    same_labels = {
        name for name, digest in protocol.labels.items() if stored.protocol.labels.get(name) == digest
    }
    return {
        (score.features, score.probe, score.label_set): score
        for score in stored.scores
        if score.label_set in same_labels and (has_same_weights or score.features != TRAINED)
    }
