"""Cross-validation of a task: a run for each fold, and the mean of their scores."""

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
from ajepa.evaluate.overlap import add_overlaps, measure_overlap
from ajepa.evaluate.protocol import weights_digest
from ajepa.evaluate.result import EVALUATION_FILE, Evaluation
from ajepa.evaluate.task_data import select_task_data, task_folds
from ajepa.evaluate.tasks import Task
from ajepa.finetune.finetune import finetune
from ajepa.finetune.setup import refuse_label_leak
from ajepa.recipes.finetune import Finetune
from ajepa.training.devices import pick_device
from ajepa.training.distributed import join_ranks
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
    **finetune_options: Any,
) -> Evaluation | None:
    """Call `finetune` for each fold of the store, in RUN/fold1 and so on; the means over the folds.

    Finished folds are left alone. The means and their spread are kept as RUN/evaluation.json. Of several ranks the
    main one measures and prints; the others return None. RunError where RUN is the run of a single fold.
    """
    folds = task_folds(task, store)
    runs = []
    with join_ranks() as world:
        # Refuse what no fold could be trained with.
        if (run_path / RECIPE_FILE).is_file():
            raise RunError(f"{run_path}: is a run by itself; choose another --run for all folds")
        refuse_label_leak(start, store, folds)

        # Train a run for each fold, on all the others.
        tell = world.main_rank_only(say)
        for number, split in enumerate(folds, start=1):
            tell(f"{run_path}: {split}")
            run = finetune(
                store,
                task,
                recipe,
                run_path / split,
                start=start,
                label_set=label_set,
                fold=number,
                device=device,
                say=say,
                **finetune_options,
            )
            runs.append(run)

    # Measure every fold by its own run.
    if not world.is_main:
        return None
    evaluation = evaluate_folds(store, task, runs, label_set=label_set, device=device)
    evaluation = replace(evaluation, protocol=replace(evaluation.protocol, run_path=str(run_path)))
    evaluation.save_json(run_path / EVALUATION_FILE)
    return evaluation


def evaluate_folds(
    store: FeatureStore, task: Task, runs: Sequence[Run], *, label_set: str, device: str
) -> Evaluation:
    """Measure every fold by its own run; the means over the folds of all metrics within one."""
    torch_device = pick_device(device)
    trained_runs = [TrainedRun.open(run) for run in runs]
    fold_scores = [
        held_out_scores(
            trained, select_task_data(task, store, label_set=label_set, fold=number), torch_device
        )
        for number, trained in enumerate(trained_runs, start=1)
    ]
    fold_scores = align_fold_classes(fold_scores)

    # The protocol is the first run's, but for the weights, of which every fold has its own.
    first = trained_runs[0]
    protocol = classifier_protocol(
        runs[0],
        [scores.task_data for scores in fold_scores],
        step=first.step,
        weights=first.weights,
        weights_name=first.part,
        device=torch_device,
        precision=first.pick_precision(torch_device),
        chosen_by=first.chosen_by,
        overlap=add_overlaps(
            measure_overlap(run, store, scores.task_data.eval_N)
            for run, scores in zip(runs, fold_scores, strict=True)
        ),
    )
    digests = tuple(weights_digest(trained.weights) for trained in trained_runs)
    return classifier_evaluation(replace(protocol, weights_sha256=digests), fold_scores)


def align_fold_classes(fold_scores: Sequence[HeldOutScores]) -> list[HeldOutScores]:
    """The scores of all folds over the same classes: those that any fold's run knows.

    In a task without classes of its own, a class may have clips in one fold alone. The run that is measured on that
    fold does not know the class and leaves its clips out, so the class does not count in that fold.
    """
    class_lists = [scores.task_data.classes for scores in fold_scores]
    if all(classes.mids == class_lists[0].mids for classes in class_lists):
        return list(fold_scores)

    # The classes that any of them knows, in the order of the store.
    store = fold_scores[0].task_data.store
    mids = [mid for mid in store.classes.mids if any(mid in classes.index_of for classes in class_lists)]
    names = dict(zip(store.classes.mids, store.classes.names, strict=True))
    all_classes = ClassList(mids=tuple(mids), names=tuple(names[mid] for mid in mids))
    return [widen_to_classes(scores, all_classes) for scores in fold_scores]


def widen_to_classes(fold_scores: HeldOutScores, all_classes: ClassList) -> HeldOutScores:
    """The scores of a fold among more classes: no clip has one of the others, and their logits are minus infinity."""
    task_data = fold_scores.task_data
    columns = [all_classes.index_of[mid] for mid in task_data.classes.mids]
    merge_SC = np.zeros((len(task_data.merge_SC), len(all_classes)), np.float32)
    merge_SC[:, columns] = task_data.merge_SC
    logits_NC = np.full((len(fold_scores.logits_NC), len(all_classes)), -np.inf, np.float32)
    logits_NC[:, columns] = fold_scores.logits_NC
    return HeldOutScores(
        task_data=replace(task_data, classes=all_classes, merge_SC=merge_SC), logits_NC=logits_NC
    )
