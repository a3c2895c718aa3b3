"""OwnResult: one number that `evaluate` or `finetune` measured; found in run folders, and the public task it is of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ajepa.evaluate.protocol import ClassifierTraining, ProbeTraining
from ajepa.evaluate.result import (
    CLASSIFIER_FEATURES,
    EVALUATION_FILE,
    PRIMARY_METRIC,
    Evaluation,
    Score,
)
from pipeline.datasets.speech_commands import SPEECH_COMMANDS_WORDS
from pipeline.errors import RunError
from pipeline.labels.ontology import fsd50k_classes, load_class_list

# Clips of the official eval split, or of all folds together; manifests/README.md names the source of each number.
OFFICIAL_EVAL_CLIPS = {
    "audioset-2m": 20_371,
    "audioset-20k": 20_371,
    "esc50": 2_000,
    "fsd50k": 10_231,
    "speech-commands-v1": 6_835,
    "speech-commands-v2": 11_005,
    "voxceleb1-sid": 8_251,
}

# AudioSet's official train clips: the balanced and the unbalanced set together, and the balanced set alone.
OFFICIAL_TRAIN_CLIPS = {
    "audioset-2m": 2_063_949,
    "audioset-20k": 22_160,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureScore:
    """What a probe reached on one kind of features, or a classifier: `value` in [0, 1], with its interval.

    fold_deviation  sample deviation over folds; None: no folds
    """

    features: str
    value: float
    interval: tuple[float, float] | None
    fold_deviation: float | None = None

    @classmethod
    def from_score(cls, score: Score) -> "FeatureScore":
        """The primary metric of a score."""
        estimate = score.primary_estimate
        return cls(
            features=score.features,
            value=estimate.value,
            interval=(estimate.low, estimate.high),
            fold_deviation=score.fold_deviation,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnResult:
    """One result of this project.

    task            public task that was measured; None: none of the table
    value           in [0, 1]
    train_clips     number of clips that trained the classifier or the probe; None: not recorded
    fold_deviation  sample deviation over folds; None: no folds
    from_nothing    whether a classifier was trained without a pre-trained encoder
    tuned           whether the probed encoder was fine-tuned with labels
    checkpoint      last, best, init or a step
    chosen_by       what chose that checkpoint, in words; None: not recorded
    features        that were measured: encoder, or classifier
    baselines       what the same probe reached on an encoder of random weights and on log-mel statistics
    store_name      file name of the measured store; empty: not recorded
    measured        what results that measured the same clips by the same probe have in common; empty: not recorded
    chance          chance level of the metric; None: not recorded
    step            of the run
    pooling, layer  of a probed encoder's vectors; None: a classifier
    """

    name: str
    task: str | None
    protocol: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    label_set: str
    classes: int
    train_clips: int | None
    eval_clips: int
    fold_deviation: float | None = None
    folds: int = 0
    from_nothing: bool = False
    tuned: bool = False
    checkpoint: str = "last"
    chosen_by: str | None = None
    features: str = CLASSIFIER_FEATURES
    baselines: tuple[FeatureScore, ...] = ()
    store_name: str = ""
    measured: tuple[object, ...] = ()
    chance: float | None = None
    step: int = 0
    pooling: str | None = None
    layer: str | None = None

    @property
    def run_name(self) -> str:
        """The run folder, or the file where it has another name than the result on the run's own store."""
        return self.name.removesuffix(f"/{EVALUATION_FILE}")


def find_results(result_path: Path) -> list[OwnResult]:
    """The results in a JSON file, or all results in a folder of a run or of a cross-validated task."""
    if result_path.is_file():
        return list(read_results(result_path))

    # The result on the run's own store comes first
    files = sorted(
        result_path.glob(f"{Path(EVALUATION_FILE).stem}*.json"),
        key=lambda file: (file.name != EVALUATION_FILE, file.name),
    )
    if not files:
        fold_files = sorted(result_path.glob(f"*/{EVALUATION_FILE}"))
        next_step = "evaluate or finetune first"
        if fold_files:
            next_step = f"finetune with every fold, or give {fold_files[0].parent}"
        raise RunError(
            f"{result_path}: holds no {EVALUATION_FILE}; run ajepa-train {next_step}, or give a JSON file"
        )
    return [result for file in files for result in read_results(file)]


def read_results(file: Path) -> Iterator[OwnResult]:
    """Yield the results of a file that `evaluate` or `finetune` wrote; for probes, only those on the trained encoder.

    RunError for any other file.
    """
    evaluation = Evaluation.read_json(file)
    classifier = evaluation.protocol.classifier
    probes = evaluation.protocol.probes
    own_features = evaluation.scores[0].features
    for score in evaluation.scores:
        if score.features != own_features:
            continue
        if classifier is not None:
            yield classifier_result(str(file), evaluation, score, classifier)
        elif probes is not None:
            yield probe_result(str(file), evaluation, score, probes)


def classifier_result(
    name: str, evaluation: Evaluation, score: Score, classifier: ClassifierTraining
) -> OwnResult:
    """The result of a classifier. Its task is the task of its training, or None if fewer classes were measured."""
    # AudioSet is two public tasks, which differ in the number of train clips
    task: str | None = classifier.task
    train_clips = classifier.train_clips
    if task == "audioset":
        is_balanced = train_clips is not None and train_clips <= OFFICIAL_TRAIN_CLIPS["audioset-20k"]
        task = "audioset-20k" if is_balanced else "audioset-2m"

    # On another store only shared classes are measured; if some are missing, the task is a different one
    is_own_store = evaluation.protocol.store_id == evaluation.protocol.training_store_id
    if not is_own_store and len(evaluation.classes) < classifier.class_count:
        task = None
    is_public = task in OFFICIAL_EVAL_CLIPS
    return _own_result(
        name,
        evaluation,
        score,
        task=task if is_public else None,
        protocol="fine-tuned" if is_own_store or is_public else "elsewhere",
        train_clips=train_clips,
        from_nothing=classifier.start is None,
    )


def probe_result(name: str, evaluation: Evaluation, score: Score, probes: ProbeTraining) -> OwnResult:
    """The result of a probe. Its task is recognised by the classes of the store."""
    mids = [mid for mid, _ in evaluation.classes]
    return _own_result(
        name,
        evaluation,
        score,
        task=match_public_task(mids, folds=evaluation.protocol.folds, train_clips=probes.train_clips),
        protocol=score.probe,
        train_clips=probes.train_clips,
        tuned=evaluation.protocol.task is not None,
        pooling=probes.pooling,
        layer=probes.layer,
    )


def _own_result(
    name: str, evaluation: Evaluation, score: Score, *, protocol: str, **training_facts: Any
) -> OwnResult:
    estimate = score.primary_estimate
    of_run = evaluation.protocol
    mids = tuple(mid for mid, _ in evaluation.classes)
    return OwnResult(
        name=name,
        protocol=protocol,
        metric=PRIMARY_METRIC[score.kind],
        value=estimate.value,
        interval=(estimate.low, estimate.high),
        fold_deviation=score.fold_deviation,
        folds=of_run.folds,
        label_set=score.label_set,
        classes=len(evaluation.classes),
        eval_clips=of_run.eval_clips,
        checkpoint=of_run.checkpoint,
        chosen_by=of_run.chosen_by,
        features=score.features,
        baselines=tuple(
            FeatureScore.from_score(other)
            for other in evaluation.scores
            if other.features != score.features
            and (other.probe, other.label_set) == (score.probe, score.label_set)
        ),
        store_name=of_run.store_name,
        measured=(
            *(of_run.store_id, of_run.exclusions, of_run.eval_splits, of_run.eval_clips, of_run.folds),
            *(mids, score.label_set, score.kind, score.probe),
        ),
        chance=score.chance,
        step=of_run.step,
        **training_facts,
    )


def match_public_task(classes: Sequence[str], *, folds: int, train_clips: int) -> str | None:
    """The public task that has these class ids; None if the table has no such task.

    AudioSet is two tasks: `audioset-20k` if there are no more train clips than in its balanced set, else `audioset-2m`.
    """
    # AudioSet, FSD50K and Speech Commands are recognised by their class ids
    if set(classes) == set(load_class_list().mids):
        return "audioset-20k" if train_clips <= OFFICIAL_TRAIN_CLIPS["audioset-20k"] else "audioset-2m"
    if set(classes) == set(fsd50k_classes().mids):
        return "fsd50k"
    for version, words in SPEECH_COMMANDS_WORDS.items():
        if set(classes) == set(words):
            return f"speech-commands-{version}"

    # ESC-50 is recognised by its numbers of classes and folds
    return "esc50" if len(classes) == 50 and folds == 5 else None
