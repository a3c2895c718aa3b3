"""The pre-training loop: batches in, steps taken, checkpoints and metrics out."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ajepa.jepa import Jepa
from ajepa.masking import Masks
from ajepa.recipes import Pretrain, to_json
from ajepa.run import Checkpoint, Json, Run
from pipeline.dali import open_loader
from pipeline.errors import RunError
from pipeline.loader import Batch, View
from pipeline.mel import mel_spec
from pipeline.order import Order
from pipeline.store import FeatureStore

EVAL_SPLIT = "eval"  # never trained on
PARTS = ("encoder", "target", "predictor")


def to_stderr(line: str) -> None:
    """Where a run tells what it does, unless it is given another place."""
    print(line, file=sys.stderr, flush=True)


def pretrain(
    store_path: Path,
    recipe: Pretrain,
    run_path: Path,
    *,
    steps: int | None = None,
    batch: int | None = None,
    device: str = "auto",
    loader: str = "dali",
    progress: bool = False,
    say: Callable[[str], None] = to_stderr,
) -> Run:
    """Train `recipe` on every split of the store but `eval`, into the folder `run_path`, and return the run.

    A run that is there is carried on with, exactly: on a CPU and with equal versions its weights and metrics are
    bit for bit those of a run that was never interrupted. `steps` and `batch` (clips per step) replace the
    recipe's. SIGINT and SIGTERM end the step at hand, write a checkpoint and return: then `run.finished` is
    false. Nothing is written before store, recipe and device fit: RunError or StoreError says what does not.
    """
    recipe = recipe.resized(steps=steps, clips_per_step=batch)
    on = pick_device(device)
    store = open_store(store_path, recipe)
    order = Order(rows_N=store.good_rows(train_splits(store)), clips=recipe.clips_per_step, seed=recipe.seed)
    stats = store.stats["all"]
    view = View(frames=recipe.view_frames, crop=recipe.crop, mean=stats["mean"], std=stats["std"], seed=recipe.seed)
    run = Run.start(run_path, recipe=to_json(recipe), identity=identity_of(store))
    with run.locked():
        run.rewind()
        if run.finished:
            say(f"{run.path}: already at its last step, {run.step}")
            return run
        trainer = Trainer.of(recipe, on)
        trainer.restore(run)
        say(f"{run.path}: step {run.step} of {recipe.steps}, {len(order.rows_N)} clips, {trainer.precision}")
        with open_loader(store, order, view, kind=loader, device=str(on)) as batches, asked_to_stop() as stop:
            train(run, recipe, trainer, batches.batches(run.step, recipe.steps), stop, progress=progress)
    if not run.finished:
        say(f"{run.path}: stopped at step {run.step} of {recipe.steps}, checkpoint written; run me again")
    return run


def train(
    run: Run, recipe: Pretrain, trainer: "Trainer", batches: Iterator[Batch], stop: threading.Event, *, progress: bool
) -> None:
    """Every step from the run's checkpoint on, until the last or until asked to stop."""
    clock = Clock()
    bar = tqdm(total=recipe.steps, initial=run.step, unit="step", disable=not progress, dynamic_ncols=True)
    with bar:
        for done in range(run.step + 1, recipe.steps + 1):
            with clock.waiting():
                batch = next(batches)
            line = trainer.step(run, done - 1, batch)
            clock.step(len(batch.rows_B))
            bar.update()
            last = done == recipe.steps or stop.is_set()
            if done % recipe.log_every == 0 or done == recipe.steps:
                line = {"step": done, **line, **clock.read()}
                run.log(line)
                bar.set_postfix_str(postfix(line))
            if done % recipe.checkpoint_every == 0 or last:
                run.save(trainer.checkpoint(done), keep=recipe.keep_checkpoints)
            if last:
                break


def postfix(line: Json) -> str:
    return f"loss {line['loss']:.4f}, {line['clips_per_s']:.0f} clips/s, data wait {line['data_wait']:.0%}"
