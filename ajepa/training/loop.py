"""The training loop of every stage: steps taken in order, metrics and checkpoints out, signals heard."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from tqdm import tqdm

from ajepa.training.checkpoints import Checkpoint
from ajepa.training.distributed import SINGLE_PROCESS, World
from ajepa.training.run import Json, Run
from ajepa.training.tensorboard import EventFileWriter
from ajepa.training.trainer import BadStep
from pipeline.errors import STOP_SIGNALS, RunError
from pipeline.loading.loader import Batch


class TrainRecipe(Protocol):
    """What a recipe says of the length of its run, and of what is written when."""

    @property
    def steps(self) -> int: ...
    @property
    def log_every(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def keep_checkpoints(self) -> int: ...


class StageTrainer(Protocol):
    """What a step changes, and what a checkpoint holds."""

    @property
    def recipe(self) -> TrainRecipe: ...

    def train_step(self, step: int, batch: Batch) -> Json:
        """One update, from `step` to `step + 1`; what there is to log, `loss` among it. RunError: a bad one."""

    def make_checkpoint(self, step: int) -> Checkpoint:
        """Everything that the next step stands on."""

    def restore_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Stand where `checkpoint` was written."""


class TrainingMonitor(Protocol):
    """What looks at the model beside the loop."""

    def after_step(self, steps_done: int) -> Json:
        """What there is to log after `done` steps: called after every step, empty most of the time."""

    def before_checkpoint(self) -> None:
        """Called just before each checkpoint is written."""

    def stop_reason(self) -> str | None:
        """Why the run must not go on, once it must not: a checkpoint is written, and it ends."""


SCORE_METRIC = "probe_map"  # what a watch tells of a step, by which checkpoints are compared

EVENTS_FOLDER = "tensorboard"

PROGRESS_FORMAT = "{n_fmt}/{total_fmt}|{bar}|ETA {remaining}{postfix}"


@contextmanager
def open_run(world: World, path: Path, recipe: Json, identity: Json) -> Iterator[tuple[Run, int]]:
    """The run, held and rewound by the main rank, and the step at which all ranks carry it on.

    The others are told that step: on a network disk they may see yet another one.
    """
    if not world.is_main:
        (first,) = map(int, world.sum_over_ranks(0))
        yield Run.open(path), first
        return
    run = Run.create_or_open(path, recipe=recipe, identity=identity)
    with run.writing_lock():
        run.rewind_to_checkpoint()
        first = run.newest_step
        world.sum_over_ranks(first)
        yield run, first


def say_nothing(line: str) -> None:
    """What all ranks would say, one says."""


def run_training_loop(
    run: Run,
    trainer: StageTrainer,
    batches: Iterator[Batch],
    stop: threading.Event,
    *,
    progress: bool,
    monitor: TrainingMonitor | None = None,
    keep_every: int = 0,
    world: World = SINGLE_PROCESS,
) -> int:
    """Every step after the run's checkpoint, up to the recipe's last or until asked to stop; the steps done.

    A step of which `watch` has something to tell is logged whenever it comes, and where its `probe_map` is the
    highest so far, there is a checkpoint of it. All ranks call this and stop at the same step; the main one
    alone has a watch, writes, and shows progress. Checkpoints at multiples of `keep_every` are never deleted.
    RunError where `watch` finds the run ill, a checkpoint of that behind it.
    """
    recipe, clock = trainer.recipe, ThroughputClock()
    shown: Json = {}
    (first,) = map(int, world.sum_over_ranks(run.newest_step if world.is_main else 0))
    events = EventFileWriter(run.path / EVENTS_FOLDER, first + 1) if world.is_main else None
    done = first
    with progress_bar(first, recipe.steps, shown=progress and world.is_main) as bar:
        for step in range(first, recipe.steps):
            with clock.measure_waiting():
                batch = next(batches)
            line = take_step(run, trainer, step, batch)
            done, last = step + 1, step + 1 == recipe.steps
            seen = monitor.after_step(done) if monitor else {}
            clock.clips += len(batch.rows_B) * world.size
            clock.skipped += int(*world.sum_over_ranks(batch.skipped_clips))
            if events and (seen or done % recipe.log_every == 0 or last):
                line = {"step": done, **line, **clock.read_and_reset(), **seen}
                run.log_metrics(line)
                events.write_scalars(done, line)
                shown |= line
                bar.set_postfix_str(progress_postfix(shown), refresh=False)
            bar.update()
            (stops,) = world.sum_over_ranks(stop.is_set())
            better = SCORE_METRIC in seen and (
                run.best_checkpoint is None or seen[SCORE_METRIC] > run.best_checkpoint.score
            )
            due = done % recipe.checkpoint_every == 0 or (keep_every and done % keep_every == 0)
            ill = monitor.stop_reason() if monitor else None
            if world.is_main and (due or better or last or stops or ill):
                score = seen.get(SCORE_METRIC)
                if monitor:
                    monitor.before_checkpoint()
                checkpoint = trainer.make_checkpoint(done)
                run.save_checkpoint(
                    checkpoint, keep=recipe.keep_checkpoints, keep_every=keep_every, score=score
                )
            if ill:
                raise RunError(f"{run.path}: step {done}: {ill}")
            if stops:
                break
    world.wait_for_ranks()  # who ends first has the others terminated, also from writing a checkpoint
    return done


def take_step(run: Run, trainer: StageTrainer, step: int, batch: Batch) -> Json:
    """One step; what explains a bad one is kept in the run, and its message says where."""
    try:
        return trainer.train_step(step, batch)
    except BadStep as bad:
        raise RunError(f"{bad}; its clips and draws are kept in {bad.write_to_run(run.path)}") from None


def progress_bar(first: int, steps: int, *, shown: bool) -> tqdm:
    """A progress line with time left, within 80 columns; where stderr is a file, one line in 15 seconds."""
    every = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(
        total=steps,
        initial=first,
        disable=not shown,
        dynamic_ncols=True,
        mininterval=every,
        bar_format=PROGRESS_FORMAT,
    )


def progress_postfix(line: Json) -> str:
    """What the progress line shows beside steps and time left; the effective rank once it is known."""
    rank = f"rank {line['health_rank']:.0f}, " if "health_rank" in line else ""
    return f"loss {line['loss']:.3f}, {rank}{line['clips_per_s']:.0f} clips/s, wait {line['data_wait']:.0%}"


@contextmanager
def catch_stop_signals() -> Iterator[threading.Event]:
    """An event that STOP_SIGNALS set; a second signal acts at once. Only in the main thread."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def request_stop(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, request_stop)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ThroughputClock:
    """Clips per second, how many were skipped, and the share of time spent waiting for data, since last read."""

    def __init__(self) -> None:
        self.reset_counts()

    def reset_counts(self) -> None:
        self.start_seconds, self.waited_seconds, self.clips, self.skipped = time.perf_counter(), 0.0, 0, 0

    @contextmanager
    def measure_waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited_seconds += time.perf_counter() - began

    def read_and_reset(self) -> Json:
        seconds = time.perf_counter() - self.start_seconds
        told = {
            "clips_per_s": round(self.clips / seconds, 2),
            "data_wait": round(self.waited_seconds / seconds, 4),
            "skipped": self.skipped,
        }
        self.reset_counts()
        return told
