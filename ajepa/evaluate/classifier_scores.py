"""Scores of a fine-tuned run's classifier on whole held-out clips of any store, and the evaluation made of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ajepa.evaluate.features import CLIPS_PER_READ, ClipViews
from ajepa.evaluate.metrics import resample_count
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
from ajepa.training.devices import pick_precision
from ajepa.training.run import Json, Run
from ajepa.training.trained_run import TrainedRun
from pipeline.errors import RunError
from pipeline.labels.ontology import ClassList
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import FOLD_PATTERN, probe_eval_splits

VIEWS_NOTE = (
    "the whole clip in views of the model's length; logits are means over them, weighted by valid frames"
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeldOutScores:
    """A classifier's logits `NC` for the N held-out clips of a store, `task_data.eval_N`."""

    task_data: TaskData
    logits_NC: np.ndarray

    def true_labels(self, kind: LabelKindOption = "auto", label_sets: Sequence[str] = ()) -> list[TrueLabels]:
        """The clips' labels: of the label set that was trained, then of every other of the store; or of those named.

        `auto`: single where the classifier was trained on single labels and these are single, else multi.
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
        """The primary metric on each label set, under its name in the metrics of a run."""
        return {
            f"eval_{PRIMARY_METRIC[truth.kind]}_{truth.label_set}": truth.primary_value(self.logits_NC)
            for truth in self.true_labels()
        }


def held_out_task_data(run: Run, store: FeatureStore) -> TaskData:
    """The clips of a store that a fine-tuned run's classifier is measured on, and the classes that both have.

    They are those of the run's own splits where the store has these (`run_splits_in_store`); in another store those
    kept to measure on, or all folds. RunError where run and store share no class, or no clip has a shared one.
    """
    # Which splits
    splits = sorted(store.manifest["split"].unique())
    train_names: tuple[str, ...] = ()
    run_splits = run_splits_in_store(run, store)
    if run_splits is not None:
        train_names, eval_names = run_splits
    elif all(FOLD_PATTERN.fullmatch(split) for split in splits):
        eval_names = tuple(splits)
    else:
        eval_names = tuple(probe_eval_splits(store))

    # Which of their clips
    identity = run.identity
    label_set = identity["label_set"] if identity["label_set"] in store.label_sets else "raw"
    classes, merge_SC = shared_classes(identity, store)
    eval_good_N = store.good_rows(list(eval_names))
    eval_N = rows_with_labels(store, eval_good_N, label_set, merge_SC)
    if not len(eval_N):
        raise RunError(
            f"{store.location}: nothing to measure: no clip of {' + '.join(eval_names)} has a class of {run.path}; "
            f"see: ajepa-data report {store.location}"
        )
    return TaskData(
        task=TASKS.get(identity["task"], TASKS["own"]),
        store=store,
        label_set=label_set,
        classes=classes,
        single=identity["kind"] == "single",
        train_splits=train_names,
        eval_splits=eval_names,
        train_N=rows_with_labels(store, store.good_rows(list(train_names)), label_set, merge_SC),
        eval_N=eval_N,
        merge_SC=merge_SC,
        unlabelled_clips=len(eval_good_N) - len(eval_N),
    )


def run_splits_in_store(run: Run, store: FeatureStore) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The splits that a fine-tuned run was trained and measured on, where they mean the same in this store.

    They do in the run's own store, and where both stores are cut into the same folds; else None.
    """
    train_names = tuple(run.identity["train_splits"])
    eval_names = tuple(run.identity["eval_splits"])
    names = {*train_names, *eval_names}
    are_folds = all(FOLD_PATTERN.fullmatch(split) for split in names)
    has_folds = are_folds and names <= set(store.manifest["split"].unique())
    if has_folds or is_training_store(run, store):
        return train_names, eval_names
    return None


def shared_classes(identity: Json, store: FeatureStore) -> tuple[ClassList, np.ndarray]:
    """The classifier's classes that a store has, in the classifier's order, and `merge_SC` (`TaskData`).

    A word that the classifier's task does not tell apart belongs to the task's `other_class`. RunError where the
    store has no class of the classifier's.
    """
    # The words that the classifier knows as one class
    task = TASKS.get(identity["task"])
    other_class = task.other_class if task and task.distinct_classes else None
    task_words = set(task.classes.mids) if task and task.classes else set()

    # Which class of the classifier each class of the store is
    mids = identity["classes"]
    place_of = {mid: place for place, mid in enumerate(mids)}
    merge_SC = np.zeros((len(store.classes), len(mids)), np.float32)
    for index, mid in enumerate(store.classes.mids):
        if mid in place_of:
            merge_SC[index, place_of[mid]] = 1.0
        elif other_class is not None and mid in task_words:
            merge_SC[index, place_of[other_class]] = 1.0

    # Only classes of both
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


def held_out_scores(trained: TrainedRun, task_data: TaskData, device: torch.device) -> HeldOutScores:
    """The logits of a run's classifier for the clips to measure, of the task data's classes alone."""
    logits_NC = classifier_logits_NC(trained, task_data.store, task_data.eval_N, device)

    # The network has an output for every class of the run; the store may lack some
    place_of = {mid: place for place, mid in enumerate(trained.run.identity["classes"])}
    places = [place_of[mid] for mid in task_data.classes.mids]
    return HeldOutScores(task_data=task_data, logits_NC=logits_NC[:, places])


def classifier_logits_NC(
    trained: TrainedRun, store: FeatureStore, rows_N: np.ndarray, device: torch.device
) -> np.ndarray:
    """Logits of a run's classifier for some clips of a store, whole, normalised as the run's own clips were."""
    identity = trained.run.identity
    frames = trained.finetune_recipe.model.frames
    views = ClipViews(store=store, frames=frames, mean=identity["mean"], std=identity["std"])
    bf16 = pick_precision("auto", device).is_half
    return predict_logits_NC(trained.classifier(device), views, rows_N, device, bf16=bf16)


def predict_logits_NC(
    model: Classifier, views: ClipViews, rows_N: np.ndarray, device: torch.device, *, bf16: bool
) -> np.ndarray:
    """One logit per class for each clip, float32 `NC`; the model is in evaluation mode, so nothing is random."""
    model.train(False)
    logits = []
    for start in range(0, len(rows_N), CLIPS_PER_READ):
        mel_BVTF, n_frames_BV = views.read_views(rows_N[start : start + CLIPS_PER_READ])
        logits.append(average_view_logits_BC(model, mel_BVTF, n_frames_BV, device, bf16=bf16).numpy())
    return np.concatenate(logits)


@torch.inference_mode()
def average_view_logits_BC(
    model: Classifier, mel_BVTF: Tensor, n_frames_BV: Tensor, device: torch.device, *, bf16: bool
) -> Tensor:
    """Mean of the logits of a clip's views, weighted by their valid frames; views past the clip's end are left out."""
    # Only views that hold sound go through the model
    clip_N, view_N = torch.nonzero(n_frames_BV, as_tuple=True)
    frames_N = n_frames_BV[clip_N, view_N]
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits_NC = model(mel_BVTF[clip_N, view_N].to(device), frames_N)

    # A last view of few frames weighs as much less as it is shorter
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
    train_clips: int | None = None,
    checkpoint: str | int = "last",
    kind: LabelKindOption = "auto",
) -> EvaluationProtocol:
    """The protocol of measuring a classifier on its held-out clips, or one classifier a fold on each fold's.

    Where there are folds, run, weights and step are those of the first. `train_clips` is how many clips the classifier
    was trained on, where that is known and the task data are of another store.
    """
    first = data_by_fold[0]
    folds = count_folds(data_by_fold)
    eval_clips = sum(len(task_data.eval_N) for task_data in data_by_fold)

    # On the run's own store the task data say on how many clips it was trained
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
        checkpoint=checkpoint,
        kind=kind,
        folds=folds,
        classifier=describe_training(run, folds=folds, train_clips=train_clips),
    )


def describe_training(run: Run, *, folds: int, train_clips: int | None) -> ClassifierTraining:
    """How the run's classifier was trained; of folds, how all of them were."""
    train_splits = run.identity["train_splits"]
    if folds:
        train_splits = ["all folds but the one measured"]
    return ClassifierTraining(
        task=run.identity["task"],
        kind=run.identity["kind"],
        label_set=run.identity["label_set"],
        start=run.identity["from"],
        ema=run.recipe["ema"],
        clips_per_step=run.recipe["clips_per_step"],
        train_splits=tuple(train_splits),
        train_clips=train_clips,
        class_count=len(run.identity["classes"]),
        views=VIEWS_NOTE,
    )


def classifier_evaluation(
    protocol: EvaluationProtocol,
    fold_scores: Sequence[HeldOutScores],
    *,
    kind: LabelKindOption = "auto",
    label_sets: Sequence[str] = (),
) -> Evaluation:
    """The evaluation of a protocol from the logits for each fold's held-out clips, label set by label set."""
    # Each fold is resampled by a seed of its own
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
    """How many clips the run's classifier was trained on, if the run was measured at its end; else None."""
    protocol = read_protocol(run.path / EVALUATION_FILE)
    if protocol is None or protocol.classifier is None:
        return None
    return protocol.classifier.train_clips
