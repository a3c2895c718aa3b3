"""Runs of eight steps in which something may happen to the last rank in step 6: alone, or under torchrun."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny, tiny_finetune

from ajepa.evaluate.tasks import TASKS
from ajepa.finetune.cross_validation import cross_validate
from ajepa.finetune.finetune import finetune
from ajepa.finetune.trainer import FinetuneTrainer
from ajepa.pretrain.pretrain import pretrain
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.training.distributed import world_from_environment
from ajepa.training.run import Json, Run
from ajepa.training.trained_run import TrainedRun
from pipeline.cli.options import run_command_line
from pipeline.errors import BrokenClipError
from pipeline.loading.loader import Batch
from pipeline.store.feature_store import FeatureStore


def with_event(
    train_step: Callable[..., Json], run: Path, event: str, describe_draws: Callable[[Any, int], Any]
) -> Callable[..., Json]:
    """A trainer's step in which `event` happens to the last rank; rows and draws are written beside the run."""
    world = world_from_environment()

    def step_with_event(trainer: Any, step: int, batch: Batch) -> Json:
        if (step, world.rank) == (5, world.size - 1):
            if event in ("stop", "die"):
                os.kill(os.getpid(), signal.SIGTERM if event == "stop" else signal.SIGKILL)
            if event == "nan":
                batch.mel_BTF[2, 3, 4] = float("nan")
            if event == "broken":
                raise BrokenClipError(7, "row 7 cannot be read")
        with (run / f"steps-{world.rank}.jsonl").open("a") as handle:
            handle.write(f"{[step, batch.rows_B.tolist(), describe_draws(trainer, step)]}\n")
        return train_step(trainer, step, batch)

    return step_with_event


def train(store: Path | str, run: Path, event: str = "train") -> Run:
    """Pre-train; `event` is train (nothing happens), micro (passes of three clips), stop, die, nan or broken."""
    recipe = replace(tiny().with_counts(steps=8), mask_sets=2, checkpoint_every=4)
    micro_batch = 3 if event == "micro" else None

    def targets(trainer: PretrainTrainer, step: int) -> list:
        return trainer.draw_for_rank(step).targets_NGQ.tolist()

    train_step = with_event(PretrainTrainer.train_step, run, event, targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainTrainer, "train_step", train_step)
        return pretrain(store, recipe, run, device="cpu", precision="fp32", micro_batch=micro_batch)


def train_classifier(store: Path | str, run: Path, event: str = "train", start: str = "") -> Run:
    """Fine-tune with all random augmentation, from a probed head if there is a start; the same events as in `train`."""
    recipe = tiny_finetune(steps=8, checkpoint_every=4, head="probe" if start else "random")
    started = TrainedRun.open(Path(start)) if start else None
    if started:
        recipe = started.adapt_recipe(recipe)
    options: dict[str, Any] = {
        "start": started,
        "precision": "fp32",
        "micro_batch": 3 if event == "micro" else None,
    }
    train_step = with_event(FinetuneTrainer.train_step, run, event, lambda trainer, step: trainer.first_clip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FinetuneTrainer, "train_step", train_step)
        return finetune(store, TASKS["own"], recipe, run, device="cpu", **options)


def train_folds(store: Path | str, run: Path) -> None:
    """Cross-validate with four steps a fold; the main rank prints the scores."""
    recipe = tiny_finetune(1024, steps=4, clips_per_step=8)
    folds = cross_validate(
        FeatureStore.open(store), TASKS["own"], recipe, run, device="cpu", precision="fp32"
    )
    if folds:
        print(folds.format_table())


STAGES: dict[str, Callable[..., Any]] = {
    "pretrain": train,
    "finetune": train_classifier,
    "folds": train_folds,
}


def torchrun(
    store: Path | str, run: Path, event: str = "train", *more: str, stage: str = "pretrain", ranks: int = 2
) -> tuple[int, list[str]]:
    """Run this file on several ranks; the exit status, and the lines that all of them printed."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    arguments = [stage, str(store), str(run), *([] if stage == "folds" else [event, *more])]
    process = subprocess.run(
        [*program, __file__, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=240,
    )
    return process.returncode, process.stdout.splitlines()


def steps_of_rank(run_path: Path, rank: int) -> list:
    """Step, rows and draws of each step that a rank took."""
    return [json.loads(line) for line in (run_path / f"steps-{rank}.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    stage, store, run, *more = sys.argv[1:]
    run_command_line(lambda: STAGES[stage](store, Path(run), *more))
