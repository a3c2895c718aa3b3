"""Scores of a classifier on held-out clips, whole clips at once: on the way of a run, and kept at its end.

Learnt: a classifier as a fine-tuned run left it, and what of any store it can be measured on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ajepa.evaluate.features import CLIPS_PER_READ, ClipViews
from ajepa.evaluate.metrics import resample_count
from ajepa.evaluate.protocol import is_training_store, protocol_of, read_protocol
from ajepa.evaluate.result import (
    CLASSIFIER_FEATURES,
    EVALUATION_FILE,
    HEAD_PROBE,
    PRIMARY_METRIC,
    Evaluation,
    LabelKindOption,
    TrueLabels,
)
from ajepa.evaluate.task_data import TaskData
from ajepa.evaluate.tasks import TASKS
from ajepa.model.classifier import Classifier
from ajepa.training.devices import pick_precision
from ajepa.training.run import Json, Run
from ajepa.training.trained_run import TrainedRun
from pipeline.errors import RunError
from pipeline.labels.ontology import ClassList
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import FOLD_PATTERN, probe_eval_splits

VIEWS_PROTOCOL = (
    "the whole clip in views of the model's length; logits are means over them, weighted by valid frames"
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeldOutScores:
    """Clips of a store that are held out, what is true of them, and what a classifier says: `logits_NC`."""

    task_data: TaskData
    logits_NC: np.ndarray

    def true_labels(self, kind: LabelKindOption = "auto", label_sets: Sequence[str] = ()) -> list[TrueLabels]:
        """By the label set that was trained, then by every other that the store has, or by those named.

        `auto`: single where the classifier was trained on single labels and these are, else multi.
        """
        made, place = self.task_data, self.task_data.store.location
        names = label_sets or dict.fromkeys((made.label_set, *made.store.label_sets))
        kind = "multi" if kind == "auto" and not made.single else kind
        return [
            TrueLabels.from_labels(name, made.labels_NC(made.eval_N, name), kind, place) for name in names
        ]

    def primary_metrics(self) -> Json:
        """The first metric on each label set, as it is called in the metrics of a run."""
        return {
            f"eval_{PRIMARY_METRIC[truth.kind]}_{truth.label_set}": truth.primary_value(self.logits_NC)
            for truth in self.true_labels()
        }


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
) -> Json:
    """How a classifier is measured on the clips of an assignment, or one for each fold on that fold's.

    Of folds, run, weights and step are those of the first. `train_clips`: how many it was trained on, where the
    assignment is of another store and that is known.
    """
    made, folds = data_by_fold[0], len(data_by_fold) if len(data_by_fold) > 1 else 0
    clips = sum(len(one.eval_N) for one in data_by_fold)
    own = is_training_store(run, made.store)
    return protocol_of(
        run,
        made.store,
        step=step,
        weights=weights,
        weights_name=weights_name,
        eval_splits=[split for one in data_by_fold for split in one.eval_splits],
        eval_clips=clips,
        unlabelled_clips=sum(one.unlabelled_clips for one in data_by_fold),
        resamples=resample_count(clips, len(made.classes)),
        device=device.type,
        checkpoint=checkpoint,
        kind=kind,
        folds=folds,
        classifier=describe_training(run, folds=folds, train_clips=len(made.train_N) if own else train_clips),
    )


def classifier_evaluation(
    protocol: Json,
    fold_scores: Sequence[HeldOutScores],
    *,
    kind: LabelKindOption = "auto",
    label_sets: Sequence[str] = (),
) -> Evaluation:
    """The evaluation that a protocol promises, of what the classifier says of each fold's held-out clips."""
    scores = []
    for of_folds in zip(*(one.true_labels(kind, label_sets) for one in fold_scores), strict=True):
        measured = [
            truth.measured(
                np.arange(len(one.logits_NC)), one.logits_NC, protocol["resamples"], protocol["seed"] + place
            )
            for place, (truth, one) in enumerate(zip(of_folds, fold_scores, strict=True))
        ]
        scores.append(of_folds[0].score(CLASSIFIER_FEATURES, HEAD_PROBE, measured))
    classes = fold_scores[0].task_data.classes
    named = tuple(zip(classes.mids, classes.names, strict=True))
    return Evaluation(protocol=protocol, classes=named, scores=tuple(scores))


def describe_training(run: Run, *, folds: int, train_clips: int | None) -> Json:
    """How a classifier was trained that is measured."""
    told = {name: run.identity[name] for name in ("task", "kind", "label_set", "from")}
    splits = ["all folds but the one measured"] if folds else run.identity["train_splits"]
    return told | {
        "ema": run.recipe["ema"],
        "clips_per_step": run.recipe["clips_per_step"],
        "train_splits": splits,
        "train_clips": train_clips,
        "classes": len(run.identity["classes"]),
        "views": VIEWS_PROTOCOL,
    }


def has_final_evaluation(run: Run) -> bool:
    """Whether RUN/evaluation.json is of the run's last step."""
    held = read_protocol(run.path / EVALUATION_FILE)
    return held is not None and held["step"] == run.newest_step


def predict_logits_NC(
    model: Classifier, views: ClipViews, rows_N: np.ndarray, device: torch.device, *, bf16: bool
) -> np.ndarray:
    """One logit per class for each clip, float32 `NC`, the model in evaluation mode: nothing of it is random."""
    model.train(False)
    pieces = []
    for start in range(0, len(rows_N), CLIPS_PER_READ):
        mel_BVTF, n_frames_BV = views.read_views(rows_N[start : start + CLIPS_PER_READ])
        pieces.append(average_view_logits_BC(model, mel_BVTF, n_frames_BV, device, bf16=bf16).numpy())
    return np.concatenate(pieces)


@torch.inference_mode()
def average_view_logits_BC(
    model: Classifier, mel_BVTF: Tensor, n_frames_BV: Tensor, device: torch.device, *, bf16: bool
) -> Tensor:
    """Mean of the logits of a clip's views, weighted by their valid frames; a view past its end is never seen."""
    clip_N, view_N = torch.nonzero(n_frames_BV, as_tuple=True)
    frames_N = n_frames_BV[clip_N, view_N]
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits_NC = model(mel_BVTF[clip_N, view_N].to(device), frames_N)
    logits_NC = logits_NC.float().cpu() * frames_N[:, None]
    sums_BC = torch.zeros(len(mel_BVTF), logits_NC.shape[1]).index_add_(0, clip_N, logits_NC)
    return sums_BC / n_frames_BV.sum(dim=1, keepdim=True)


def classifier_logits_NC(
    trained: TrainedRun, store: FeatureStore, rows_N: np.ndarray, device: torch.device
) -> np.ndarray:
    """Logits of a run's classifier for some clips of a store, whole, normalised as its own clips were."""
    mean, std = trained.run.identity["mean"], trained.run.identity["std"]
    views = ClipViews(store=store, frames=trained.finetune_recipe.model.frames, mean=mean, std=std)
    return predict_logits_NC(
        trained.classifier(device), views, rows_N, device, bf16=pick_precision("auto", device).is_half
    )


def held_out_scores(trained: TrainedRun, assignment: TaskData, device: torch.device) -> HeldOutScores:
    """Logits of a run's classifier for the clips to measure, of the classes of the assignment alone."""
    logits_NC = classifier_logits_NC(trained, assignment.store, assignment.eval_N, device)
    place_of = {mid: place for place, mid in enumerate(trained.run.identity["classes"])}
    places = [place_of[mid] for mid in assignment.classes.mids]
    return HeldOutScores(task_data=assignment, logits_NC=logits_NC[:, places])


def count_train_clips(run: Run) -> int | None:
    """On how many clips a classifier was trained, if the run was measured at its end."""
    held = read_protocol(run.path / EVALUATION_FILE)
    return held["classifier"]["train_clips"] if held and held["classifier"] else None


def run_splits_in_store(run: Run, store: FeatureStore) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The splits that a fine-tuned run was trained and measured on, where they mean the same in this store.

    They do in its own, and where both are cut into the same folds; else None.
    """
    train, measured = (tuple(run.identity[name]) for name in ("train_splits", "eval_splits"))
    there = set(store.manifest["split"].unique())
    in_folds = (
        all(FOLD_PATTERN.fullmatch(split) for split in (*train, *measured)) and {*train, *measured} <= there
    )
    return (train, measured) if is_training_store(run, store) or in_folds else None


def held_out_task_data(run: Run, store: FeatureStore) -> TaskData:
    """What of a store a fine-tuned run's classifier is measured on: clips held out that have a class of both.

    Its own splits where `splits_of_run` has them; of another store those kept to measure on, or all folds.
    RunError where no class is of both, or no clip has one.
    """
    identity, mine = run.identity, run_splits_in_store(run, store)
    there = sorted(store.manifest["split"].unique())
    folds = tuple(there) if all(FOLD_PATTERN.fullmatch(split) for split in there) else ()
    train, measured = mine or ((), folds or tuple(probe_eval_splits(store)))
    label_set = identity["label_set"] if identity["label_set"] in store.label_sets else "raw"
    classes, merge_SC = shared_classes(identity, store)
    kept, good = [], [store.good_rows(list(splits)) for splits in (train, measured)]
    for rows_N in good:
        kept.append(rows_N[(store.labels_BC(rows_N, label_set) @ merge_SC > 0).any(axis=1)])
    if not len(kept[1]):
        told = f"no clip of {' + '.join(measured)} has a class of {run.path}"
        raise RunError(
            f"{store.location}: nothing to measure: {told}; see: ajepa-data report {store.location}"
        )
    return TaskData(
        task=TASKS.get(identity["task"], TASKS["own"]),
        store=store,
        label_set=label_set,
        classes=classes,
        single=identity["kind"] == "single",
        train_splits=train,
        eval_splits=measured,
        train_N=kept[0],
        eval_N=kept[1],
        merge_SC=merge_SC,
        unlabelled_clips=len(good[1]) - len(kept[1]),
    )


def shared_classes(identity: Json, store: FeatureStore) -> tuple[ClassList, np.ndarray]:
    """The classifier's classes that a store has, in its order, and which of them each of the store's is, `SC`.

    A word that its task does not tell apart is of the one class for such. RunError where there is none.
    """
    held, mids = store.classes, identity["classes"]
    task = TASKS.get(identity["task"])
    others = task.other_class if task and task.distinct_classes else None
    merged = set(task.classes.mids) if task and task.classes else set()
    place_of = {mid: place for place, mid in enumerate(mids)}
    merge_SC = np.zeros((len(held), len(mids)), np.float32)
    for index, mid in enumerate(held.mids):
        if mid in place_of:
            merge_SC[index, place_of[mid]] = 1.0
        elif others is not None and mid in merged:
            merge_SC[index, place_of[others]] = 1.0
    shared_C = np.flatnonzero(merge_SC.any(axis=0))
    if not len(shared_C):
        raise RunError(
            f"{store.location}: none of its {len(held)} classes, such as {held.mids[0]}, is one of the classifier's "
            f"{len(mids)}, such as {mids[0]}; probe its encoder on them: --probe linear"
        )
    names = dict(zip(held.mids, held.names, strict=True))
    found = [mids[place] for place in shared_C]
    return ClassList(mids=tuple(found), names=tuple(names.get(mid, mid) for mid in found)), merge_SC[
        :, shared_C
    ]
