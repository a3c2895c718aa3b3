"""Folds: a task cross-validated: one run for each fold, and the mean over them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ajepa.assignment import folds_of
from ajepa.distributed import joined
from ajepa.finetune import finetune
from ajepa.finetuning import Finetune
from ajepa.loop import quiet
from ajepa.run import Run
from ajepa.scores import ClassScores, kept_scores
from ajepa.tasks.task import Task
from pipeline.loader import to_stderr
from pipeline.store import FeatureStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Folds:
    """The run of each fold, all of them finished."""

    runs: tuple[Run, ...]

    @property
    def scores(self) -> tuple[ClassScores, ...]:
        """What each fold came to, on the label set that was trained."""
        return tuple(kept_scores(run.path)[0] for run in self.runs)

    def __str__(self) -> str:
        scores = self.scores
        values_N = np.array([score.value for score in scores])
        of_each = ", ".join(f"{value:.3f}" for value in values_N)
        spread = values_N.std(ddof=1)
        return (
            f"{scores[0].metric} {values_N.mean():.3f} +- {spread:.3f} over {len(values_N)} folds ({of_each})"
        )


def cross_validated(
    store: FeatureStore,
    task: Task,
    recipe: Finetune,
    run_path: Path,
    *,
    say: Callable[[str], None] = to_stderr,
    **how: Any,
) -> Folds:
    """`finetune` for each fold of the store, in RUN/fold1 and so on; folds that are finished are left alone."""
    runs = []
    with joined() as world:
        for number, split in enumerate(folds_of(task, store), start=1):
            (say if world.main else quiet)(f"{run_path}: {split}")
            runs.append(finetune(store, task, recipe, run_path / split, fold=number, say=say, **how))
    return Folds(runs=tuple(runs))
