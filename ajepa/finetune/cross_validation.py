"""Folds: a task cross-validated: one run for each fold, and what they come to together."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ajepa.evaluate.classifier_scores import Held, held_out_scores, judged, protocol
from ajepa.evaluate.protocol import digest_of
from ajepa.evaluate.result import EVALUATION, Evaluation
from ajepa.evaluate.task_data import assigned, folds_of
from ajepa.evaluate.tasks import Task
from ajepa.finetune.finetune import finetune, refuse_seen
from ajepa.recipes.finetune import Finetune
from ajepa.training.devices import pick_device
from ajepa.training.distributed import joined
from ajepa.training.loop import quiet
from ajepa.training.run import RECIPE, Run
from ajepa.training.trained_run import TrainedRun
from pipeline.errors import RunError
from pipeline.labels.ontology import ClassList
from pipeline.messages import to_stderr
from pipeline.store.feature_store import FeatureStore


def cross_validated(
    store: FeatureStore,
    task: Task,
    recipe: Finetune,
    run_path: Path,
    *,
    start: TrainedRun | None = None,
    label_set: str = "raw",
    device: str = "auto",
    say: Callable[[str], None] = to_stderr,
    **how: Any,
) -> Evaluation | None:
    """`finetune` for each fold of the store, in RUN/fold1 and so on; folds that are finished are left alone.

    The mean over them and its spread are kept as RUN/evaluation.json. Of several ranks the main one measures, and
    says; None to the others. RunError where RUN is the run of a single fold.
    """
    runs, folds = [], folds_of(task, store)
    how = how | {"start": start, "label_set": label_set, "device": device, "say": say}
    with joined() as world:
        if (run_path / RECIPE).is_file():
            raise RunError(f"{run_path}: is a run by itself; choose another --run for all folds")
        refuse_seen(start, store, folds)
        for number, split in enumerate(folds, start=1):
            (say if world.main else quiet)(f"{run_path}: {split}")
            runs.append(finetune(store, task, recipe, run_path / split, fold=number, **how))
    if not world.main:
        return None
    found = over_folds(store, task, runs, label_set=label_set, device=device)
    found = replace(found, protocol=found.protocol | {"run": str(run_path)})
    found.save(run_path / EVALUATION)
    return found


def over_folds(
    store: FeatureStore, task: Task, runs: Sequence[Run], *, label_set: str, device: str
) -> Evaluation:
    """Every fold measured by its own run: all metrics within it, then their means."""
    on, held = pick_device(device), []
    trained = [TrainedRun.open(run) for run in runs]
    for number, one in enumerate(trained, start=1):
        held.append(held_out_scores(one, assigned(task, store, label_set=label_set, fold=number), on))
    held = aligned(held)
    told = protocol(
        runs[0],
        [one.assignment for one in held],
        step=trained[0].step,
        weights=trained[0].weights,
        part=trained[0].part,
        device=on,
    )
    return judged(told | {"weights_sha256": [digest_of(one.weights) for one in trained]}, held)


def aligned(held: Sequence[Held]) -> list[Held]:
    """All with the same classes: those that any fold's run knows.

    Where labels of one's own are learnt, a class may have no clip but in one fold: that fold's run does not know
    it, and leaves its clips out. It is then of no account in that fold.
    """
    lists = [one.assignment.classes for one in held]
    if all(classes.mids == lists[0].mids for classes in lists):
        return list(held)
    store = held[0].assignment.store
    mids = [mid for mid in store.classes.mids if any(mid in classes.index_of for classes in lists)]
    names = dict(zip(store.classes.mids, store.classes.names, strict=True))
    union = ClassList(mids=tuple(mids), names=tuple(names[mid] for mid in mids))
    return [widened(one, union) for one in held]


def widened(one: Held, union: ClassList) -> Held:
    """The same among more classes: labels of those are 0, and no clip is said to have one."""
    made = one.assignment
    places = [union.index_of[mid] for mid in made.classes.mids]
    merge_SC = np.zeros((len(made.merge_SC), len(union)), np.float32)
    merge_SC[:, places] = made.merge_SC
    logits_NC = np.full((len(one.logits_NC), len(union)), -np.inf, np.float32)
    logits_NC[:, places] = one.logits_NC
    return Held(assignment=replace(made, classes=union, merge_SC=merge_SC), logits_NC=logits_NC)
