"""The training loop of every stage: steps taken in order, metrics and checkpoints out, signals heard."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

from tqdm import tqdm

from ajepa.run import Checkpoint, Json, Run
from pipeline.errors import STOP_SIGNALS
from pipeline.loader import Batch


class Paced(Protocol):
    """What a recipe says of the length of its run, and of what is written when."""

    @property
    def steps(self) -> int: ...
    @property
    def log_every(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def keep_checkpoints(self) -> int: ...


class Trainer(Protocol):
    """What a step changes, and what a checkpoint holds."""

    @property
    def recipe(self) -> Paced: ...

    def step(self, step: int, batch: Batch) -> Json:
        """One update, from `step` to `step + 1`; what there is to log, `loss` among it. RunError: a bad one."""

    def checkpoint(self, step: int) -> Checkpoint:
        """Everything that the next step stands on."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Stand where `checkpoint` was written."""


class Watch(Protocol):
    """What looks at the model beside the loop."""

    def after(self, done: int) -> Json:
        """What there is to log after `done` steps: called after every step, empty most of the time."""


def train(
    run: Run,
    trainer: Trainer,
    batches: Iterator[Batch],
    stop: threading.Event,
    *,
    progress: bool,
    watch: Watch | None = None,
) -> None:
    """Every step after the run's checkpoint, up to the recipe's last or until asked to stop.

    A step of which `watch` has something to tell is logged whenever it comes.
    """
    recipe, clock, first = trainer.recipe, Clock(), run.step
    with bar_of(first, recipe.steps, shown=progress) as bar:
        for step in range(first, recipe.steps):
            with clock.waiting():
                batch = next(batches)
            line = trainer.step(step, batch)
            clock.clips += len(batch.rows_B)
            clock.skipped += batch.skipped
            done, last = step + 1, step + 1 == recipe.steps
            seen = watch.after(done) if watch else {}
            if seen or done % recipe.log_every == 0 or last:
                line = {"step": done, **line, **clock.read(), **seen}
                run.log(line)
                bar.set_postfix_str(postfix(line), refresh=False)
            bar.update()
            stopping = stop.is_set()
            if done % recipe.checkpoint_every == 0 or last or stopping:
                run.save(trainer.checkpoint(done), keep=recipe.keep_checkpoints)
            if stopping:
                return


def bar_of(first: int, steps: int, *, shown: bool) -> tqdm:
    """A progress line with time left; where stderr is a file, one line in 15 seconds."""
    every = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(
        total=steps, initial=first, unit="step", disable=not shown, dynamic_ncols=True, mininterval=every
    )


def postfix(line: Json) -> str:
    """What the progress line shows beside steps and time left."""
    return f"loss {line['loss']:.3f}, {line['clips_per_s']:.0f} clips/s, wait {line['data_wait']:.0%}"


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """An event that STOP_SIGNALS set; a second signal acts at once. Only in the main thread."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Clock:
    """Clips per second, how many were skipped, and the share of time spent waiting for data, since last read."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.started, self.waited_seconds, self.clips, self.skipped = time.perf_counter(), 0.0, 0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited_seconds += time.perf_counter() - began

    def read(self) -> Json:
        seconds = time.perf_counter() - self.started
        told = {
            "clips_per_s": round(self.clips / seconds, 2),
            "data_wait": round(self.waited_seconds / seconds, 4),
            "skipped": self.skipped,
        }
        self.reset()
        return told
