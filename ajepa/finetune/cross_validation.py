"""Folds: a task cross-validated: one run for each fold, and what they come to together."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ajepa.evaluate.classifier_scores import (
    HeldOutScores,
    classifier_evaluation,
    classifier_protocol,
    held_out_scores,
)
from ajepa.evaluate.protocol import weights_digest
from ajepa.evaluate.result import EVALUATION_FILE, Evaluation
from ajepa.evaluate.task_data import select_task_data, task_folds
from ajepa.evaluate.tasks import Task
from ajepa.finetune.finetune import finetune, refuse_label_leak
from ajepa.recipes.finetune import Finetune
from ajepa.training.devices import pick_device
from ajepa.training.distributed import join_ranks
from ajepa.training.loop import say_nothing
from ajepa.training.run import RECIPE_FILE, Run
from ajepa.training.trained_run import TrainedRun
from pipeline.errors import RunError
from pipeline.labels.ontology import ClassList
from pipeline.messages import print_to_stderr
from pipeline.store.feature_store import FeatureStore


def cross_validate(
    store: FeatureStore,
    task: Task,
    recipe: Finetune,
    run_path: Path,
    *,
    start: TrainedRun | None = None,
    label_set: str = "raw",
    device: str = "auto",
    say: Callable[[str], None] = print_to_stderr,
    **how: Any,
) -> Evaluation | None:
    """`finetune` for each fold of the store, in RUN/fold1 and so on; folds that are finished are left alone.

    The mean over them and its spread are kept as RUN/evaluation.json. Of several ranks the main one measures, and
    says; None to the others. RunError where RUN is the run of a single fold.
    """
    runs, folds = [], task_folds(task, store)
    how = how | {"start": start, "label_set": label_set, "device": device, "say": say}
    with join_ranks() as world:
        if (run_path / RECIPE_FILE).is_file():
            raise RunError(f"{run_path}: is a run by itself; choose another --run for all folds")
        refuse_label_leak(start, store, folds)
        for number, split in enumerate(folds, start=1):
            (say if world.is_main else say_nothing)(f"{run_path}: {split}")
            runs.append(finetune(store, task, recipe, run_path / split, fold=number, **how))
    if not world.is_main:
        return None
    found = evaluate_folds(store, task, runs, label_set=label_set, device=device)
    found = replace(found, protocol=found.protocol | {"run": str(run_path)})
    found.save_json(run_path / EVALUATION_FILE)
    return found


def evaluate_folds(
    store: FeatureStore, task: Task, runs: Sequence[Run], *, label_set: str, device: str
) -> Evaluation:
    """Every fold measured by its own run: all metrics within it, then their means."""
    on, held = pick_device(device), []
    trained = [TrainedRun.open(run) for run in runs]
    for number, one in enumerate(trained, start=1):
        held.append(held_out_scores(one, select_task_data(task, store, label_set=label_set, fold=number), on))
    held = align_fold_classes(held)
    told = classifier_protocol(
        runs[0],
        [one.task_data for one in held],
        step=trained[0].step,
        weights=trained[0].weights,
        weights_name=trained[0].part,
        device=on,
    )
    return classifier_evaluation(
        told | {"weights_sha256": [weights_digest(one.weights) for one in trained]}, held
    )


def align_fold_classes(fold_scores: Sequence[HeldOutScores]) -> list[HeldOutScores]:
    """All with the same classes: those that any fold's run knows.

    Where labels of one's own are learnt, a class may have no clip but in one fold: that fold's run does not know
    it, and leaves its clips out. It is then of no account in that fold.
    """
    lists = [one.task_data.classes for one in fold_scores]
    if all(classes.mids == lists[0].mids for classes in lists):
        return list(fold_scores)
    store = fold_scores[0].task_data.store
    mids = [mid for mid in store.classes.mids if any(mid in classes.index_of for classes in lists)]
    names = dict(zip(store.classes.mids, store.classes.names, strict=True))
    union = ClassList(mids=tuple(mids), names=tuple(names[mid] for mid in mids))
    return [widen_to_classes(one, union) for one in fold_scores]


def widen_to_classes(fold_scores: HeldOutScores, all_classes: ClassList) -> HeldOutScores:
    """The same among more classes: labels of those are 0, and no clip is said to have one."""
    made = fold_scores.task_data
    places = [all_classes.index_of[mid] for mid in made.classes.mids]
    merge_SC = np.zeros((len(made.merge_SC), len(all_classes)), np.float32)
    merge_SC[:, places] = made.merge_SC
    logits_NC = np.full((len(fold_scores.logits_NC), len(all_classes)), -np.inf, np.float32)
    logits_NC[:, places] = fold_scores.logits_NC
    return HeldOutScores(task_data=replace(made, classes=all_classes, merge_SC=merge_SC), logits_NC=logits_NC)
