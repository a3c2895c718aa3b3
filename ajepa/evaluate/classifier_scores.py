"""Logits of a fine-tuned run's classifier for the held-out clips of any store, and the evaluation based on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ajepa.evaluate.features import ClipViews, iterate_views
from ajepa.evaluate.metrics import resample_count
from ajepa.evaluate.overlap import TrainingOverlap
from ajepa.evaluate.protocol import (
    ClassifierTraining,
    EvaluationProtocol,
    build_protocol,
    count_folds,
    is_training_store,
)
from ajepa.evaluate.result import (
    CLASSIFIER_FEATURES,
    EVALUATION_FILE,
    HEAD_PROBE,
    PRIMARY_METRIC,
    Evaluation,
    read_protocol,
)
from ajepa.evaluate.task_data import TaskData, rows_with_labels
from ajepa.evaluate.tasks import TASKS
from ajepa.evaluate.true_labels import LabelKindOption, TrueLabels
from ajepa.model.classifier import Classifier
from ajepa.training.devices import Precision
from ajepa.training.run import Json, Run
from ajepa.training.run_identity import TaskIdentity
from ajepa.training.trained_run import TrainedRun
from pipeline.errors import RunError
from pipeline.labels.ontology import ClassList
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import FOLD_PATTERN, evaluation_split_names, probe_eval_splits

VIEWS_NOTE = (
    "the whole clip in views of the model's length; logits are means over them, weighted by valid frames"
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeldOutScores:
    """A classifier's logits `NC` for the N held-out clips of a store, `task_data.eval_N`."""

    task_data: TaskData
    logits_NC: np.ndarray

    def true_labels(self, kind: LabelKindOption = "auto", label_sets: Sequence[str] = ()) -> list[TrueLabels]:
        """The clips' labels in each of `label_sets`; by default in the trained label set, then in the store's others.

        With kind `auto`, labels are single if the classifier was trained on single labels and every clip has exactly
        one label of the set; else they are multi.
        """
        task_data = self.task_data
        names = label_sets or dict.fromkeys((task_data.label_set, *task_data.store.label_sets))
        if kind == "auto" and not task_data.single:
            kind = "multi"
        return [
            TrueLabels.from_labels(
                name, task_data.labels_NC(task_data.eval_N, name), kind, task_data.store.location
            )
            for name in names
        ]

    def primary_metrics(self) -> Json:
        """The primary metric on each label set, with the keys `eval_METRIC_LABELSET` of a run's metrics."""
        return {
            f"eval_{PRIMARY_METRIC[truth.kind]}_{truth.label_set}": truth.primary_value(self.logits_NC)
            for truth in self.true_labels()
        }


def held_out_task_data(run: Run, store: FeatureStore) -> TaskData:
    """The clips of a store that measure a fine-tuned run's classifier, and the classes that run and store share.

    If the store has the run's own splits (`run_splits_in_store`), the clips are those of the run's eval splits.
    In another store they are those of the store's evaluation splits, or of all splits if none is for evaluation: none
    of them trained the classifier. RunError if run and store share no class, or if no clip has a shared class.
    """
    # The splits to train on and to measure
    splits = sorted(store.split_names)
    train_names: tuple[str, ...] = ()
    run_splits = run_splits_in_store(run, store)
    if run_splits is not None:
        train_names, eval_names = run_splits
    elif not evaluation_split_names(splits):
        eval_names = tuple(splits)
    else:
        eval_names = tuple(probe_eval_splits(store))

    # The shared classes, and the clips that have one of them
    identity = run.task_identity
    label_set = identity.label_set if identity.label_set in store.label_sets else "raw"
    classes, merge_SC = shared_classes(identity, store)
    eval_good_N = store.good_rows(list(eval_names))
    eval_N = rows_with_labels(store, eval_good_N, label_set, merge_SC)
    if not len(eval_N):
        raise RunError(
            f"{store.location}: nothing to measure: no clip of {' + '.join(eval_names)} has a class of {run.path}; "
            f"see: ajepa-data report {store.location}"
        )
    return TaskData(
        task=TASKS.get(identity.task, TASKS["own"]),
        store=store,
        label_set=label_set,
        classes=classes,
        single=identity.single_label,
        train_splits=train_names,
        eval_splits=eval_names,
        train_N=rows_with_labels(store, store.good_rows(list(train_names)), label_set, merge_SC),
        eval_N=eval_N,
        merge_SC=merge_SC,
        unlabelled_clips=len(eval_good_N) - len(eval_N),
    )


def run_splits_in_store(run: Run, store: FeatureStore) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The train and eval splits of a fine-tuned run, if their names mean the same clips in this store; else None.

    They do in the run's own store, and in a store that has all folds (`fold1`, `fold2`, ...) of the run.
    """
    train_names = run.task_identity.train_splits
    eval_names = run.task_identity.eval_splits
    names = {*train_names, *eval_names}
    are_folds = all(FOLD_PATTERN.fullmatch(split) for split in names)
    has_folds = are_folds and names <= set(store.split_names)
    if has_folds or is_training_store(run, store):
        return train_names, eval_names
    return None


def shared_classes(identity: TaskIdentity, store: FeatureStore) -> tuple[ClassList, np.ndarray]:
    """The classes that classifier and store share, in the classifier's order, and `merge_SC` (see `TaskData`).

    A word of the classifier's task that is not one of its `distinct_classes` belongs to its `other_class`. RunError
    if classifier and store share no class.
    """
    # The words that the classifier's task merges into one class
    task = TASKS.get(identity.task)
    other_class = task.other_class if task and task.distinct_classes else None
    task_words = set(task.classes.mids) if task and task.classes else set()

    # The classifier's class for each class of the store
    mids = identity.classes
    place_of = {mid: place for place, mid in enumerate(mids)}
    merge_SC = np.zeros((len(store.classes), len(mids)), np.float32)
    for index, mid in enumerate(store.classes.mids):
        if mid in place_of:
            merge_SC[index, place_of[mid]] = 1.0
        elif other_class is not None and mid in task_words:
            merge_SC[index, place_of[other_class]] = 1.0

    # Keep the classes that classifier and store share
    shared_C = np.flatnonzero(merge_SC.any(axis=0))
    if not len(shared_C):
        raise RunError(
            f"{store.location}: none of its {len(store.classes)} classes, such as {store.classes.mids[0]}, is one of "
            f"the classifier's {len(mids)}, such as {mids[0]}; probe its encoder on them: --probe linear"
        )
    name_of = dict(zip(store.classes.mids, store.classes.names, strict=True))
    shared_mids = tuple(mids[place] for place in shared_C)
    shared_names = tuple(name_of.get(mid, mid) for mid in shared_mids)
    return ClassList(mids=shared_mids, names=shared_names), merge_SC[:, shared_C]


def held_out_scores(
    trained: TrainedRun,
    task_data: TaskData,
    device: torch.device,
    precision: Precision | None = None,
    *,
    progress: bool = False,
) -> HeldOutScores:
    """The logits of a run's classifier for the eval clips of the task data, restricted to the task data's classes."""
    logits_NC = classifier_logits_NC(
        trained, task_data.store, task_data.eval_N, device, precision, progress=progress
    )

    # The network has an output for every class of the run; the store may lack some
    place_of = {mid: place for place, mid in enumerate(trained.run.task_identity.classes)}
    places = [place_of[mid] for mid in task_data.classes.mids]
    return HeldOutScores(task_data=task_data, logits_NC=logits_NC[:, places])


def classifier_logits_NC(
    trained: TrainedRun,
    store: FeatureStore,
    rows_N: np.ndarray,
    device: torch.device,
    precision: Precision | None = None,
    *,
    progress: bool = False,
) -> np.ndarray:
    """Logits of a run's classifier for whole clips of a store, normalised by the run's own mean and deviation.

    `precision` is that of the network below its head; None: as the run was trained (`pick_measuring_precision`).
    """
    identity = trained.run.identity
    frames = trained.finetune_recipe.model.frames
    views = ClipViews(store=store, frames=frames, mean=identity.mean, std=identity.std)
    precision = precision or trained.pick_precision(device)
    return predict_logits_NC(
        trained.classifier(device), views, rows_N, device, precision=precision, progress=progress
    )


def predict_logits_NC(
    model: Classifier,
    views: ClipViews,
    rows_N: np.ndarray,
    device: torch.device,
    *,
    precision: Precision,
    progress: bool = False,
) -> np.ndarray:
    """One logit per class for each clip, float32 `NC`; the model is set to evaluation mode, so nothing is random."""
    model.train(False)
    logits = []
    for mel_BVTF, n_frames_BV in iterate_views(views, rows_N, "classifier" if progress else None):
        logits_BC = average_view_logits_BC(model, mel_BVTF, n_frames_BV, device, precision=precision)
        logits.append(logits_BC.numpy())
    return np.concatenate(logits)


@torch.inference_mode()
def average_view_logits_BC(
    model: Classifier, mel_BVTF: Tensor, n_frames_BV: Tensor, device: torch.device, *, precision: Precision
) -> Tensor:
    """Mean of the logits of a clip's views, weighted by their valid frames; views past the clip's end are left out."""
    # Only views with valid frames go through the model
    clip_N, view_N = torch.nonzero(n_frames_BV, as_tuple=True)
    frames_N = n_frames_BV[clip_N, view_N]
    with precision.autocast(device):
        logits_NC = model(mel_BVTF[clip_N, view_N].to(device), frames_N)

    # Each view is weighted by its valid frames, because the last view may be short
    weighted_NC = logits_NC.float().cpu() * frames_N[:, None]
    sums_BC = torch.zeros(len(mel_BVTF), weighted_NC.shape[1]).index_add_(0, clip_N, weighted_NC)
    return sums_BC / n_frames_BV.sum(dim=1, keepdim=True)


def classifier_protocol(
    run: Run,
    data_by_fold: Sequence[TaskData],
    *,
    step: int,
    weights: dict[str, Tensor],
    weights_name: str,
    device: torch.device,
    precision: Precision,
    chosen_by: str | None,
    train_clips: int | None = None,
    checkpoint: str | int = "last",
    kind: LabelKindOption = "auto",
    overlap: TrainingOverlap | None = None,
) -> EvaluationProtocol:
    """The protocol of an evaluation of one classifier on its held-out clips, or of one classifier for each fold.

    With folds, `run`, `weights` and `step` are those of the first fold. `train_clips` is the number of clips that
    trained the classifier; it is ignored if the task data are of the run's own store, which contains these clips.
    """
    first = data_by_fold[0]
    folds = count_folds(data_by_fold)
    eval_clips = sum(len(task_data.eval_N) for task_data in data_by_fold)

    # The run's own store contains the clips that trained the classifier
    if is_training_store(run, first.store):
        train_clips = len(first.train_N)
    return build_protocol(
        run,
        first.store,
        step=step,
        weights=weights,
        weights_name=weights_name,
        eval_splits=[split for task_data in data_by_fold for split in task_data.eval_splits],
        eval_clips=eval_clips,
        unlabelled_clips=sum(task_data.unlabelled_clips for task_data in data_by_fold),
        resamples=resample_count(eval_clips, len(first.classes)),
        device=device.type,
        precision=precision.name,
        chosen_by=chosen_by,
        checkpoint=checkpoint,
        kind=kind,
        folds=folds,
        classifier=describe_training(run, folds=folds, train_clips=train_clips),
        overlap=overlap,
    )


def describe_training(run: Run, *, folds: int, train_clips: int | None) -> ClassifierTraining:
    """How the run's classifier was trained; with folds, how the classifiers of all folds were trained."""
    identity = run.task_identity
    train_splits = identity.train_splits
    if folds:
        train_splits = ("all folds but the one measured",)
    return ClassifierTraining(
        task=identity.task,
        kind=identity.kind,
        label_set=identity.label_set,
        start=None if identity.start is None else identity.start.to_json(),
        ema=run.recipe["ema"],
        clips_per_step=run.recipe["clips_per_step"],
        train_splits=train_splits,
        train_clips=train_clips,
        class_count=len(identity.classes),
        views=VIEWS_NOTE,
    )


def classifier_evaluation(
    protocol: EvaluationProtocol,
    fold_scores: Sequence[HeldOutScores],
    *,
    kind: LabelKindOption = "auto",
    label_sets: Sequence[str] = (),
) -> Evaluation:
    """The evaluation under a protocol: a score per label set, from the logits for each fold's held-out clips."""
    # Each fold is resampled with its own seed
    labels_by_fold = [fold.true_labels(kind, label_sets) for fold in fold_scores]
    scores = []
    for fold_labels in zip(*labels_by_fold, strict=True):
        scored_folds = [
            truth.scored_fold(
                np.arange(len(fold.logits_NC)), fold.logits_NC, protocol.resamples, protocol.seed + number
            )
            for number, (truth, fold) in enumerate(zip(fold_labels, fold_scores, strict=True))
        ]
        scores.append(fold_labels[0].summarise_folds(CLASSIFIER_FEATURES, HEAD_PROBE, scored_folds))

    # All folds have the same classes
    classes = fold_scores[0].task_data.classes
    return Evaluation(
        protocol=protocol,
        classes=tuple(zip(classes.mids, classes.names, strict=True)),
        scores=tuple(scores),
    )


def has_final_evaluation(run: Run) -> bool:
    """Whether RUN/evaluation.json is of the run's last step."""
    protocol = read_protocol(run.path / EVALUATION_FILE)
    return protocol is not None and protocol.step == run.newest_step


def count_train_clips(run: Run) -> int | None:
    """The number of clips that trained the run's classifier, read from evaluation.json; None if it is not recorded."""
    protocol = read_protocol(run.path / EVALUATION_FILE)
    if protocol is None or protocol.classifier is None:
        return None
    return protocol.classifier.train_clips
