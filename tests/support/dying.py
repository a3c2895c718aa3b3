"""Runs that end by SIGKILL once a checkpoint is on the disk: checkpoints are written while training goes on.

Start them by `start_forked`.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from tiny import tiny, tiny_finetune

from ajepa.evaluate.tasks import TASKS
from ajepa.finetune.finetune import finetune
from ajepa.pretrain.pretrain import pretrain
from ajepa.training.run import Run
from ajepa.training.trained_run import TrainedRun


def die_after_checkpoint(run: Path, step: int) -> None:
    """Kill this process as soon as the run has a checkpoint of this step, which a thread of it or a rank is writing."""
    while Run.open(run).newest_step < step:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_logging(logged_step: int, checkpoint_step: int) -> None:
    """Let this process kill itself once a step is logged that comes after the step of a checkpoint."""
    log_metrics = Run.log_metrics

    def log_and_die(run: Run, line: dict[str, Any]) -> None:
        log_metrics(run, line)
        if line["step"] == logged_step:
            die_after_checkpoint(run.path, checkpoint_step)

    Run.log_metrics = log_and_die


def pretrain_until_killed(store: Path, run: Path, threads: int) -> None:
    """Pre-train; killed when step 17 is logged, with a checkpoint of step 15."""
    torch.set_num_threads(threads)
    die_after_logging(17, checkpoint_step=15)
    pretrain(store, tiny(), run, device="cpu")


def finetune_until_killed(store: Path, run: Path, pretrained: Path, threads: int) -> None:
    """Fine-tune; killed when step 12 is logged, with a checkpoint of step 10."""
    torch.set_num_threads(threads)
    die_after_logging(12, checkpoint_step=10)
    finetune(store, TASKS["own"], tiny_finetune(), run, start=TrainedRun.open(pretrained), device="cpu")
