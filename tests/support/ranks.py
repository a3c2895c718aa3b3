"""Runs of eight steps in which something may happen to the last rank in step 6: alone, on ranks, or under torchrun."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from dying import die_after_checkpoint
from forked import start_forked
from tiny import tiny, tiny_finetune, tiny_views
from torch.distributed import TCPStore

from ajepa.evaluate.tasks import TASKS
from ajepa.finetune.cross_validation import cross_validate
from ajepa.finetune.finetune import finetune
from ajepa.finetune.trainer import FinetuneTrainer
from ajepa.pretrain.pretrain import pretrain
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.distributed import world_from_environment
from ajepa.training.run import Run
from ajepa.training.trained_run import TrainedRun
from ajepa.training.trainer import StartedStep
from pipeline.cli.options import run_command_line
from pipeline.errors import BrokenClipError
from pipeline.loading.loader import Batch
from pipeline.store.feature_store import FeatureStore


def with_event(
    start_step: Callable[..., StartedStep], run: Path, event: str, describe_draws: Callable[[Any, int], Any]
) -> Callable[..., StartedStep]:
    """A trainer's step in which `event` happens to the last rank; rows and draws are written beside the run."""
    world = world_from_environment()

    def step_with_event(trainer: Any, step: int, batch: Batch) -> StartedStep:
        if (step, world.rank) == (5, world.size - 1):
            if event == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
            if event == "die":
                die_after_checkpoint(run, 4)
            if event in ("nan", "skip"):
                batch.mel_BTF[2, 3, 4] = float("nan")
            if event == "broken":
                raise BrokenClipError(7, "row 7 cannot be read")
        with (run / f"steps-{world.rank}.jsonl").open("a") as handle:
            handle.write(f"{[step, batch.rows_B.tolist(), describe_draws(trainer, step)]}\n")
        return start_step(trainer, step, batch)

    return step_with_event


def train(store: Path | str, run: Path, event: str = "train", recipe: Pretrain | None = None) -> Run:
    """Pre-train; `event` is train (nothing happens), micro (passes of three clips), stop, die, nan, skip or broken.

    skip: nan, in a run that passes over bad steps.
    """
    recipe = replace((recipe or tiny()).with_counts(steps=8), mask_sets=2, checkpoint_every=4)
    micro_batch = 3 if event == "micro" else None

    def targets(trainer: PretrainTrainer, step: int) -> list:
        return trainer.draw_for_rank(step).targets_MGQ.tolist()

    start_step = with_event(PretrainTrainer.start_step, run, event, targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainTrainer, "start_step", start_step)
        return pretrain(
            store,
            recipe,
            run,
            device="cpu",
            precision="fp32",
            micro_batch=micro_batch,
            on_bad_step="skip" if event == "skip" else "stop",
        )


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
    start_step = with_event(FinetuneTrainer.start_step, run, event, lambda trainer, step: trainer.first_clip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FinetuneTrainer, "start_step", start_step)
        return finetune(store, TASKS["own"], recipe, run, device="cpu", **options)


def train_folds(store: Path | str, run: Path) -> None:
    """Cross-validate with four steps a fold; the main rank prints the scores."""
    recipe = tiny_finetune(1024, steps=4, clips_per_step=8)
    folds = cross_validate(
        FeatureStore.open(store), TASKS["own"], recipe, run, device="cpu", precision="fp32"
    )
    if folds:
        print(folds.format_table())


def train_views(store: Path | str, run: Path, event: str = "train") -> Run:
    """Pre-train with views and the clip objective, which sees the views of all ranks; events as in `train`."""
    return train(store, run, event, tiny_views())


STAGES: dict[str, Callable[..., Any]] = {
    "pretrain": train,
    "views": train_views,
    "finetune": train_classifier,
    "folds": train_folds,
}


RANK_SECONDS = 240  # how long ranks may take


def torchrun(
    store: Path | str, run: Path, event: str = "train", *more: str, stage: str = "pretrain", ranks: int = 2
) -> tuple[int, list[str]]:
    """Run this file on several ranks by torchrun; the exit status, and the lines that all of them printed."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    process = subprocess.run(
        [*program, __file__, stage, *stage_arguments(stage, store, run, event, *more)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=RANK_SECONDS,
    )
    return process.returncode, process.stdout.splitlines()


def run_on_ranks(
    store: Path | str, run: Path, event: str = "train", *more: str, stage: str = "pretrain", ranks: int = 2
) -> tuple[int, list[str]]:
    """Run a stage on several ranks as `torchrun` does, in forked processes: no rank imports torch again.

    As torchrun does, this process serves the store of the ranks, which outlives them, and terminates all ranks once
    one has failed. Returns 0 if none has, else 1, and the lines that all of them printed.
    """
    rank_store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(rank_store.port)}
    environment = os.environ | sizes | address | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    arguments = stage_arguments(stage, store, run, event, *more)
    with tempfile.NamedTemporaryFile("r") as output:
        processes = [
            start_forked(
                run_stage,
                stage,
                *arguments,
                output=Path(output.name),
                environment=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(ranks)
        ]
        try:
            wait_for_ranks(processes)
        finally:
            for process in processes:
                process.kill()
        failed = any(process.exitcode for process in processes)
        return int(failed), output.read().splitlines()


def wait_for_ranks(processes: Sequence[ForkServerProcess]) -> None:
    """Wait until all processes have ended; terminate the others when the first one fails."""
    running = list(processes)
    while running:
        ended = wait([process.sentinel for process in running], timeout=RANK_SECONDS)
        assert ended, f"{len(running)} of {len(processes)} ranks hang"
        running = [process for process in running if process.sentinel not in ended]
        if any(process.exitcode for process in processes):
            for process in running:
                process.terminate()


def stage_arguments(stage: str, store: Path | str, run: Path, *more: str) -> list[str]:
    """The arguments of a stage: store and run, and what may happen, which is nothing in folds."""
    return [str(store), str(run), *([] if stage == "folds" else more)]


def run_stage(stage: str, store: str, run: str, *more: str) -> None:
    """Run a stage as a command: errors of ours become one line and an exit status."""
    run_command_line(lambda: STAGES[stage](store, Path(run), *more))


def steps_of_rank(run_path: Path, rank: int) -> list:
    """Step, rows and draws of each step that a rank took."""
    return [json.loads(line) for line in (run_path / f"steps-{rank}.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    run_stage(*sys.argv[1:])
