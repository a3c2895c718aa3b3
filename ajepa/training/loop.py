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
from ajepa.training.distributed import ALONE, World
from ajepa.training.run import Json, Run
from ajepa.training.tensorboard import Events
from ajepa.training.trainer import BadStep
from pipeline.errors import STOP_SIGNALS, RunError
from pipeline.loading.loader import Batch


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

    def saving(self) -> None:
        """Called just before each checkpoint is written."""

    def ill(self) -> str | None:
        """Why the run must not go on, once it must not: a checkpoint is written, and it ends."""


SCORE = "probe_map"  # what a watch tells of a step, by which checkpoints are compared

EVENTS = "tensorboard"

PROGRESS = "{n_fmt}/{total_fmt}|{bar}|ETA {remaining}{postfix}"


@contextmanager
def begun(world: World, path: Path, recipe: Json, identity: Json) -> Iterator[tuple[Run, int]]:
    """The run, held and rewound by the main rank, and the step at which all ranks carry it on.

    The others are told that step: on a network disk they may see yet another one.
    """
    if not world.main:
        (first,) = map(int, world.sum(0))
        yield Run.open(path), first
        return
    run = Run.start(path, recipe=recipe, identity=identity)
    with run.locked():
        run.rewind()
        first = run.step
        world.sum(first)
        yield run, first


def quiet(line: str) -> None:
    """What all ranks would say, one says."""


def train(
    run: Run,
    trainer: Trainer,
    batches: Iterator[Batch],
    stop: threading.Event,
    *,
    progress: bool,
    watch: Watch | None = None,
    keep_every: int = 0,
    world: World = ALONE,
) -> int:
    """Every step after the run's checkpoint, up to the recipe's last or until asked to stop; the steps done.

    A step of which `watch` has something to tell is logged whenever it comes, and where its `probe_map` is the
    highest so far, there is a checkpoint of it. All ranks call this and stop at the same step; the main one
    alone has a watch, writes, and shows progress. Checkpoints at multiples of `keep_every` are never deleted.
    RunError where `watch` finds the run ill, a checkpoint of that behind it.
    """
    recipe, clock = trainer.recipe, Clock()
    shown: Json = {}
    (first,) = map(int, world.sum(run.step if world.main else 0))
    events = Events(run.path / EVENTS, first + 1) if world.main else None
    done = first
    with bar_of(first, recipe.steps, shown=progress and world.main) as bar:
        for step in range(first, recipe.steps):
            with clock.waiting():
                batch = next(batches)
            line = stepped(run, trainer, step, batch)
            done, last = step + 1, step + 1 == recipe.steps
            seen = watch.after(done) if watch else {}
            clock.clips += len(batch.rows_B) * world.size
            clock.skipped += int(*world.sum(batch.skipped))
            if events and (seen or done % recipe.log_every == 0 or last):
                line = {"step": done, **line, **clock.read(), **seen}
                run.log(line)
                events.write(done, line)
                shown |= line
                bar.set_postfix_str(postfix(shown), refresh=False)
            bar.update()
            (stops,) = world.sum(stop.is_set())
            better = SCORE in seen and (run.best is None or seen[SCORE] > run.best.score)
            due = done % recipe.checkpoint_every == 0 or (keep_every and done % keep_every == 0)
            ill = watch.ill() if watch else None
            if world.main and (due or better or last or stops or ill):
                score = seen.get(SCORE)
                if watch:
                    watch.saving()
                checkpoint = trainer.checkpoint(done)
                run.save(checkpoint, keep=recipe.keep_checkpoints, keep_every=keep_every, score=score)
            if ill:
                raise RunError(f"{run.path}: step {done}: {ill}")
            if stops:
                break
    world.wait()  # who ends first has the others terminated, also from writing a checkpoint
    return done


def stepped(run: Run, trainer: Trainer, step: int, batch: Batch) -> Json:
    """One step; what explains a bad one is kept in the run, and its message says where."""
    try:
        return trainer.step(step, batch)
    except BadStep as bad:
        raise RunError(f"{bad}; its clips and draws are kept in {bad.keep(run.path)}") from None


def bar_of(first: int, steps: int, *, shown: bool) -> tqdm:
    """A progress line with time left, within 80 columns; where stderr is a file, one line in 15 seconds."""
    every = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(
        total=steps,
        initial=first,
        disable=not shown,
        dynamic_ncols=True,
        mininterval=every,
        bar_format=PROGRESS,
    )


def postfix(line: Json) -> str:
    """What the progress line shows beside steps and time left; the effective rank once it is known."""
    rank = f"rank {line['health_rank']:.0f}, " if "health_rank" in line else ""
    return f"loss {line['loss']:.3f}, {rank}{line['clips_per_s']:.0f} clips/s, wait {line['data_wait']:.0%}"


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
