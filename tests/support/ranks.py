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


def happening(trainer: type, run: Path, what: str, drawn: Callable[[Any, int], Any]) -> Callable[..., Json]:
    """The trainer's step, in which `what` happens; what it saw is written beside the run."""
    world, taken = world_from_environment(), trainer.step

    def step(trainer: Any, at: int, batch: Batch) -> Json:
        if (at, world.rank) == (5, world.size - 1):
            if what in ("stop", "die"):
                os.kill(os.getpid(), signal.SIGTERM if what == "stop" else signal.SIGKILL)
            if what == "nan":
                batch.mel_BTF[2, 3, 4] = float("nan")
            if what == "broken":
                raise BrokenClipError(7, "row 7 cannot be read")
        with (run / f"seen-{world.rank}.jsonl").open("a") as handle:
            handle.write(f"{[at, batch.rows_B.tolist(), drawn(trainer, at)]}\n")
        return taken(trainer, at, batch)

    return step


def train(store: Path | str, run: Path, what: str = "train") -> Run:
    """`what` happens: train (nothing), micro (passes of three clips), stop, die, nan or broken."""
    recipe = replace(tiny().with_counts(steps=8), mask_sets=2, checkpoint_every=4)
    micro = 3 if what == "micro" else None
    step = happening(PretrainTrainer, run, what, lambda trainer, at: trainer.draw(at).targets_NGQ.tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainTrainer, "train_step", step)
        return pretrain(store, recipe, run, device="cpu", precision="fp32", micro_batch=micro)


def train_classifier(store: Path | str, run: Path, what: str = "train", start: str = "") -> Run:
    """The same of fine-tuning, with all that is random, from a probed head if there is a start."""
    recipe = tiny_finetune(steps=8, checkpoint_every=4, head="probe" if start else "random")
    micro = 3 if what == "micro" else None
    step = happening(FinetuneTrainer, run, what, lambda trainer, at: trainer.first)
    started = TrainedRun.open(Path(start)) if start else None
    recipe = started.adapt_recipe(recipe) if started else recipe
    how: dict[str, Any] = {"start": started, "precision": "fp32", "micro_batch": micro}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FinetuneTrainer, "train_step", step)
        return finetune(store, TASKS["own"], recipe, run, device="cpu", **how)


def train_folds(store: Path | str, run: Path) -> None:
    """Every fold of a store, four steps each; the main rank says what came of it."""
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
    store: Path | str, run: Path, what: str = "train", *more: str, stage: str = "pretrain", ranks: int = 2
) -> tuple[int, list[str]]:
    """This file on so many ranks; its status, and what all of them said."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    asked = [stage, str(store), str(run), *([] if stage == "folds" else [what, *more])]
    done = subprocess.run(
        [*program, __file__, *asked],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=240,
    )
    return done.returncode, done.stdout.splitlines()


if __name__ == "__main__":
    stage, store, run, *more = sys.argv[1:]
    run_command_line(lambda: STAGES[stage](store, Path(run), *more))


def seen(run_path: Path, rank: int) -> list:
    """Step, rows and targets of each step of a rank."""
    return [json.loads(line) for line in (run_path / f"seen-{rank}.jsonl").read_text().splitlines()]
