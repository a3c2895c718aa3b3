"""Scores of a classifier on held-out clips, whole clips at once: on the way of a run, and kept at its end.

Learnt: a classifier as a fine-tuned run left it, and what of any store it can be measured on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ajepa.evaluate.features import CLIPS_PER_READ, Views
from ajepa.evaluate.metrics import resamples
from ajepa.evaluate.protocol import is_own, protocol_in, stamp
from ajepa.evaluate.result import AS_TRAINED, EVALUATION, HEAD, PRIMARY, Evaluation, Kind, Truth
from ajepa.evaluate.task_data import Assignment
from ajepa.evaluate.tasks import TASKS
from ajepa.model.classifier import Classifier
from ajepa.training.devices import precision
from ajepa.training.run import Json, Run
from ajepa.training.trained_run import TrainedRun
from pipeline.errors import RunError
from pipeline.labels.ontology import ClassList
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import FOLD, eval_splits

CLIPS = "the whole clip in views of the model's length; logits are means over them, weighted by valid frames"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Held:
    """Clips of a store that are held out, what is true of them, and what a classifier says: `logits_NC`."""

    assignment: Assignment
    logits_NC: np.ndarray

    def truths(self, kind: Kind = "auto", label_sets: Sequence[str] = ()) -> list[Truth]:
        """By the label set that was trained, then by every other that the store has, or by those named.

        `auto`: single where the classifier was trained on single labels and these are, else multi.
        """
        made, place = self.assignment, self.assignment.store.place
        names = label_sets or dict.fromkeys((made.label_set, *made.store.label_sets))
        kind = "multi" if kind == "auto" and not made.single else kind
        return [Truth.of(name, made.labels_NC(made.eval_N, name), kind, place) for name in names]

    def logged(self) -> Json:
        """The first metric on each label set, as it is called in the metrics of a run."""
        return {
            f"eval_{PRIMARY[truth.kind]}_{truth.label_set}": truth.value(self.logits_NC)
            for truth in self.truths()
        }


def protocol(
    run: Run,
    assignments: Sequence[Assignment],
    *,
    step: int,
    weights: dict[str, Tensor],
    part: str,
    device: torch.device,
    train_clips: int | None = None,
    checkpoint: str | int = "last",
    kind: Kind = "auto",
) -> Json:
    """How a classifier is measured on the clips of an assignment, or one for each fold on that fold's.

    Of folds, run, weights and step are those of the first. `train_clips`: how many it was trained on, where the
    assignment is of another store and that is known.
    """
    made, folds = assignments[0], len(assignments) if len(assignments) > 1 else 0
    clips = sum(len(one.eval_N) for one in assignments)
    own = is_own(run, made.store)
    return stamp(
        run,
        made.store,
        step=step,
        weights=weights,
        part=part,
        eval_splits=[split for one in assignments for split in one.eval_splits],
        eval_clips=clips,
        left_out=sum(one.left_out for one in assignments),
        resamples=resamples(clips, len(made.classes)),
        device=device.type,
        checkpoint=checkpoint,
        kind=kind,
        folds=folds,
        classifier=trained_as(run, folds=folds, train_clips=len(made.train_N) if own else train_clips),
    )


def judged(
    protocol: Json, held: Sequence[Held], *, kind: Kind = "auto", label_sets: Sequence[str] = ()
) -> Evaluation:
    """The evaluation that a protocol promises, of what the classifier says of each fold's held-out clips."""
    scores = []
    for of_folds in zip(*(one.truths(kind, label_sets) for one in held), strict=True):
        measured = [
            truth.measured(
                np.arange(len(one.logits_NC)), one.logits_NC, protocol["resamples"], protocol["seed"] + place
            )
            for place, (truth, one) in enumerate(zip(of_folds, held, strict=True))
        ]
        scores.append(of_folds[0].score(AS_TRAINED, HEAD, measured))
    classes = held[0].assignment.classes
    named = tuple(zip(classes.mids, classes.names, strict=True))
    return Evaluation(protocol=protocol, classes=named, scores=tuple(scores))


def trained_as(run: Run, *, folds: int, train_clips: int | None) -> Json:
    """How a classifier was trained that is measured."""
    told = {name: run.identity[name] for name in ("task", "kind", "label_set", "from")}
    splits = ["all folds but the one measured"] if folds else run.identity["train_splits"]
    return told | {
        "ema": run.recipe["ema"],
        "clips_per_step": run.recipe["clips_per_step"],
        "train_splits": splits,
        "train_clips": train_clips,
        "classes": len(run.identity["classes"]),
        "views": CLIPS,
    }


def measured_at_its_end(run: Run) -> bool:
    """Whether RUN/evaluation.json is of the run's last step."""
    held = protocol_in(run.path / EVALUATION)
    return held is not None and held["step"] == run.step


def logits_of(
    model: Classifier, views: Views, rows_N: np.ndarray, device: torch.device, *, bf16: bool
) -> np.ndarray:
    """One logit per class for each clip, float32 `NC`, the model in evaluation mode: nothing of it is random."""
    model.train(False)
    pieces = []
    for start in range(0, len(rows_N), CLIPS_PER_READ):
        mel_BVTF, n_frames_BV = views.of(rows_N[start : start + CLIPS_PER_READ])
        pieces.append(clip_logits(model, mel_BVTF, n_frames_BV, device, bf16=bf16).numpy())
    return np.concatenate(pieces)


@torch.inference_mode()
def clip_logits(
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
    views = Views(store=store, frames=trained.finetune_recipe.model.frames, mean=mean, std=std)
    return logits_of(trained.classifier(device), views, rows_N, device, bf16=precision(device)[0])


def held_out_scores(trained: TrainedRun, assignment: Assignment, device: torch.device) -> Held:
    """Logits of a run's classifier for the clips to measure, of the classes of the assignment alone."""
    logits_NC = classifier_logits_NC(trained, assignment.store, assignment.eval_N, device)
    place_of = {mid: place for place, mid in enumerate(trained.run.identity["classes"])}
    places = [place_of[mid] for mid in assignment.classes.mids]
    return Held(assignment=assignment, logits_NC=logits_NC[:, places])


def count_train_clips(run: Run) -> int | None:
    """On how many clips a classifier was trained, if the run was measured at its end."""
    held = protocol_in(run.path / EVALUATION)
    return held["classifier"]["train_clips"] if held and held["classifier"] else None


def splits_of_run(run: Run, store: FeatureStore) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The splits that a fine-tuned run was trained and measured on, where they mean the same in this store.

    They do in its own, and where both are cut into the same folds; else None.
    """
    train, measured = (tuple(run.identity[name]) for name in ("train_splits", "eval_splits"))
    there = set(store.manifest["split"].unique())
    in_folds = all(FOLD.fullmatch(split) for split in (*train, *measured)) and {*train, *measured} <= there
    return (train, measured) if is_own(run, store) or in_folds else None


def held_out(run: Run, store: FeatureStore) -> Assignment:
    """What of a store a fine-tuned run's classifier is measured on: clips held out that have a class of both.

    Its own splits where `splits_of_run` has them; of another store those kept to measure on, or all folds.
    RunError where no class is of both, or no clip has one.
    """
    identity, mine = run.identity, splits_of_run(run, store)
    there = sorted(store.manifest["split"].unique())
    folds = tuple(there) if all(FOLD.fullmatch(split) for split in there) else ()
    train, measured = mine or ((), folds or tuple(eval_splits(store)))
    label_set = identity["label_set"] if identity["label_set"] in store.label_sets else "raw"
    classes, merge_SC = shared_classes(identity, store)
    kept, good = [], [store.good_rows(list(splits)) for splits in (train, measured)]
    for rows_N in good:
        kept.append(rows_N[(store.labels_BC(rows_N, label_set) @ merge_SC > 0).any(axis=1)])
    if not len(kept[1]):
        told = f"no clip of {' + '.join(measured)} has a class of {run.path}"
        raise RunError(f"{store.place}: nothing to measure: {told}; see: ajepa-data report {store.place}")
    return Assignment(
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
        left_out=len(good[1]) - len(kept[1]),
    )


def shared_classes(identity: Json, store: FeatureStore) -> tuple[ClassList, np.ndarray]:
    """The classifier's classes that a store has, in its order, and which of them each of the store's is, `SC`.

    A word that its task does not tell apart is of the one class for such. RunError where there is none.
    """
    held, mids = store.classes, identity["classes"]
    task = TASKS.get(identity["task"])
    others = task.others if task and task.told_apart else None
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
            f"{store.place}: none of its {len(held)} classes, such as {held.mids[0]}, is one of the classifier's "
            f"{len(mids)}, such as {mids[0]}; probe its encoder on them: --probe linear"
        )
    names = dict(zip(held.mids, held.names, strict=True))
    found = [mids[place] for place in shared_C]
    return ClassList(mids=tuple(found), names=tuple(names.get(mid, mid) for mid in found)), merge_SC[
        :, shared_C
    ]
