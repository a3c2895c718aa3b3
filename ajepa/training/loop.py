"""The training loop of every stage: steps in order, metrics and checkpoints written, stop signals obeyed."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from ajepa.training.bad_steps import BAD_STEPS_METRIC, BadSteps, OnBadStep
from ajepa.training.checkpoint_writer import CheckpointWriter
from ajepa.training.checkpoints import Checkpoint, CheckpointScore
from ajepa.training.distributed import SINGLE_PROCESS, World
from ajepa.training.loggers import MetricWriters
from ajepa.training.run import Json, Run
from ajepa.training.run_identity import RunIdentity
from ajepa.training.trained_stores import TrainedStore
from ajepa.training.trainer import BadStep, StartedStep, TrainRecipe
from pipeline.errors import STOP_SIGNALS, RunError, StopSignal
from pipeline.loading.loader import Batch
from pipeline.progress import open_progress

# The logged metric by which checkpoints are compared; the higher, the better. Runs of before logged `probe_map`, which
# was measured on clips of evaluation splits.
SCORE_METRIC = "val_probe_map"

# On a terminal: within 80 columns.
PROGRESS_FORMAT = "{n_fmt}/{total_fmt}|{bar}|ETA {remaining}{postfix}"


class StageTrainer(Protocol):
    """A stage's trainer as the loop sees it."""

    @property
    def recipe(self) -> TrainRecipe: ...

    def start_step(self, step: int, batch: Batch) -> StartedStep:
        """Queue one update, from `step` to `step + 1`, on the device."""

    def make_checkpoint(self, step: int) -> Checkpoint:
        """Everything that the next step depends on."""


class TrainingMonitor(Protocol):
    """Looks at the model beside the loop, on the main rank."""

    def after_step(self, steps_done: int) -> Json:
        """Metrics of the model after a step; called after every step, and empty most of the time."""

    def count_bad_step(self) -> None:
        """Called for a step that was passed over, once that is known: at that step or the next one."""

    @property
    def scored_clips(self) -> str | None:
        """The clips that SCORE_METRIC is measured on, in words; None where it is not measured."""

    def before_checkpoint(self) -> None:
        """Called just before each checkpoint is written."""

    def stop_reason(self) -> str | None:
        """Why the run must not go on, or None. The loop then writes a checkpoint and ends with this reason."""


@contextmanager
def open_run(
    world: World,
    path: Path,
    recipe: Json,
    identity: RunIdentity,
    *,
    precision: str,
    warm_start: Json | None = None,
    trained_stores: Sequence[TrainedStore] = (),
) -> Iterator[tuple[Run, int]]:
    """The run, locked and rewound by the main rank, and the step at which all ranks carry on.

    Another recipe or precision than before, where it is allowed, begins a phase of the run. The main rank tells the
    others the step: on a network disk they may still see an older one.
    """
    # Another rank only reads, once the main rank has made the folder and told the step.
    if not world.is_main:
        (first_step,) = map(int, world.sum_over_ranks(0))
        yield Run.open(path), first_step
        return

    # The main rank keeps the folder locked for as long as anybody trains.
    run = Run.create_or_open(
        path,
        recipe=recipe,
        identity=identity,
        precision=precision,
        warm_start=warm_start,
        trained_stores=trained_stores,
    )
    with run.writing_lock():
        run.rewind_to_checkpoint()
        first_step = run.newest_step
        world.sum_over_ranks(first_step)

        # Now all ranks have read recipe.json as it was.
        yield run.begin_phase(recipe, precision), first_step


def run_training_loop(
    run: Run,
    trainer: StageTrainer,
    batches: Iterator[Batch],
    stop: threading.Event,
    *,
    progress: bool,
    monitor: TrainingMonitor | None = None,
    keep_every: int = 0,
    on_bad_step: OnBadStep = "stop",
    loggers: Sequence[str] = (),
    world: World = SINGLE_PROCESS,
) -> int:
    """Take every step after the run's checkpoint, to the recipe's last or until `stop` is set; the steps done.

    A step at which the monitor has metrics is logged whenever it comes, and where its `val_probe_map` is the highest
    so far, a checkpoint is written. All ranks call this and stop at the same step; the main rank alone has a
    monitor, writes, and shows progress. Checkpoints at multiples of `keep_every` are never deleted. A bad step that
    is passed over changes no weight and has a line in the metrics. RunError where the monitor has a reason to stop,
    after a checkpoint of that step, and at a bad step that is not passed over.
    """
    # Find where the run stands: on a network disk only the main rank is sure to see the newest checkpoint.
    recipe = trainer.recipe
    newest_step = run.newest_step if world.is_main else 0
    (first_step,) = map(int, world.sum_over_ranks(newest_step))
    steps_done = first_step
    unread: StartedStep | None = None  # the newest step, until its figures have been read
    bad_steps = BadSteps(on_bad_step=on_bad_step)
    bad_steps.resume_counts(run.read_metrics() if world.is_main else (), steps_done, world)

    # Open what is written to.
    clock = ThroughputClock()
    shown: Json = {}
    event_writer = None
    if world.is_main:
        event_writer = MetricWriters(run, first_step, loggers)
    bar = open_progress(
        recipe.steps,
        label=str(run.path),
        unit="step",
        shown=progress and world.is_main,
        initial=first_step,
        mininterval=0.2,
        bar_format=PROGRESS_FORMAT,
    )
    reader = StepReader(run=run, bad_steps=bad_steps, monitor=monitor, writers=event_writer)

    with event_writer or nullcontext(), bar, CheckpointWriter(run) as checkpoint_writer:
        for step in range(first_step, recipe.steps):
            # Wait for the clips of the step, and queue it. A GPU has it before the figures of the last one are read,
            # so that it never waits for the host.
            with clock.measure_waiting():
                batch = next(batches)
            before, unread = unread, trainer.start_step(step, batch)
            if before is not None:
                reader.read_unlogged(before, step)
            steps_done = step + 1
            is_last = steps_done == recipe.steps
            clock.clips += len(batch.rows_B) * world.size

            # Look at the model: health, probes, held-out clips.
            observed, ill_because = observe_model(monitor, steps_done)

            # Log, at the recipe's steps and wherever the monitor of the main rank has seen something. All ranks wait
            # for the step then: a bad one ends them together.
            skipped, observers = world.sum_over_ranks(batch.skipped_clips, bool(observed))
            clock.skipped += int(skipped)
            is_logged = bool(observers) or steps_done % recipe.log_every == 0 or is_last
            metrics: Json = {}
            if is_logged:
                metrics = reader.read(unread)
                unread = None
            if event_writer is not None and is_logged:
                line = {"step": steps_done, **metrics, **clock.read_and_reset(), **observed}
                reader.log(steps_done, line)
                shown |= line
                bar.set_postfix_str(progress_postfix(shown), refresh=False)
            bar.update()

            # Agree with the other ranks on whether this step is the last: a signal may have reached only one.
            (stop_requests,) = world.sum_over_ranks(stop.is_set())

            # Write a checkpoint, if it is time for one or the run ends here, and never one after a bad step.
            is_due = is_checkpoint_step(recipe, steps_done, keep_every)
            if unread is not None and (is_due or stop_requests):
                reader.read_unlogged(unread, steps_done)
                unread = None
            checkpoint_writer.raise_failure()
            if SCORE_METRIC in observed:
                checkpoint_writer.wait()  # the score before it may be on its way to the disk
            is_end = is_last or stop_requests or ill_because
            if event_writer is not None and (is_due or is_end or is_best_score(run, observed)):
                event_writer.flush()
                save_step(
                    checkpoint_writer,
                    trainer,
                    steps_done,
                    monitor=monitor,
                    keep_every=keep_every,
                    score=checkpoint_score(monitor, observed),
                )
            if ill_because:
                raise RunError(f"{run.path}: step {steps_done}: {ill_because}")
            if stop_requests:
                break

    # torchrun terminates all ranks as soon as one ends: the main one may still be writing its checkpoint.
    world.wait_for_ranks()
    return steps_done


def raise_if_interrupted(run: Run, steps_done: int, steps: int, say: Callable[[str], None]) -> None:
    """StopSignal, and a line about the checkpoint, if training ended before the last of `steps`."""
    if steps_done < steps:
        say(f"{run.path}: checkpoint written at step {steps_done} of {steps}")
        raise StopSignal


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepReader:
    """Reads the figures of a run's steps once they are there, and counts the bad steps.

    writers  of the metrics; None on all ranks but the main one
    """

    run: Run
    bad_steps: BadSteps
    monitor: TrainingMonitor | None
    writers: MetricWriters | None

    def read(self, started: StartedStep) -> Json:
        """Wait for a step; its metrics. A bad step that is passed over has the metric `bad_steps` alone.

        RunError for a bad step that ends the run. Its clips are kept in the run's folder, and the error says where.
        """
        try:
            metrics = started.read_metrics()
        except BadStep as bad:
            self.bad_steps.count_bad_step()
            reason = self.bad_steps.stop_reason(has_broken_clips=bad.has_broken_clips)
            if self.bad_steps.keeps_clips:
                folder = bad.write_to_run(self.run.path)
            if reason:
                raise RunError(f"{bad}; {reason}; its clips and draws are kept in {folder}") from None
            if self.monitor is not None:
                self.monitor.count_bad_step()
            return {BAD_STEPS_METRIC: 1}
        self.bad_steps.count_good_step()
        return metrics

    def read_unlogged(self, started: StartedStep, steps_done: int) -> None:
        """Wait for a step at which nothing is logged; a bad one has a line of its own all the same."""
        metrics = self.read(started)
        if BAD_STEPS_METRIC in metrics:
            self.log(steps_done, {"step": steps_done, **metrics})

    def log(self, steps_done: int, line: Json) -> None:
        """Write a line of metrics, on the main rank."""
        if self.writers is not None:
            self.run.log_metrics(line)
            self.writers.write(steps_done, line)


def observe_model(monitor: TrainingMonitor | None, steps_done: int) -> tuple[Json, str | None]:
    """The monitor's metrics after a step, and its reason to stop; nothing on a rank without a monitor."""
    if monitor is None:
        return {}, None
    metrics = monitor.after_step(steps_done)
    return metrics, monitor.stop_reason()


def is_checkpoint_step(recipe: TrainRecipe, steps_done: int, keep_every: int) -> bool:
    """Whether the recipe wants a checkpoint after this step, or one that is kept for good is due."""
    if keep_every and steps_done % keep_every == 0:
        return True
    return steps_done % recipe.checkpoint_every == 0


def save_step(
    checkpoint_writer: CheckpointWriter,
    trainer: StageTrainer,
    steps_done: int,
    *,
    monitor: TrainingMonitor | None,
    keep_every: int,
    score: CheckpointScore | None,
) -> None:
    """Begin to write a checkpoint of the trainer as it is after `steps_done` steps."""
    if monitor:
        monitor.before_checkpoint()
    checkpoint_writer.start(
        trainer.make_checkpoint(steps_done),
        keep=trainer.recipe.keep_checkpoints,
        keep_every=keep_every,
        score=score,
    )


def checkpoint_score(monitor: TrainingMonitor | None, observed: Json) -> CheckpointScore | None:
    """The score of the weights as they are, if the monitor has just measured it."""
    if monitor is None or monitor.scored_clips is None or SCORE_METRIC not in observed:
        return None
    return CheckpointScore(value=observed[SCORE_METRIC], clips=monitor.scored_clips)


def is_best_score(run: Run, observed: Json) -> bool:
    """Whether the monitor has just measured a higher score than that of any checkpoint so far."""
    if SCORE_METRIC not in observed:
        return False
    best = run.best_checkpoint
    return best is None or not best.is_held_back or observed[SCORE_METRIC] > best.score


def progress_postfix(line: Json) -> str:
    """The end of the progress line, after steps and time left; with the effective rank once it is known."""
    rank = ""
    if "health_rank" in line:
        rank = f"rank {line['health_rank']:.0f}, "
    loss = f"loss {line['loss']:.3f}" if "loss" in line else "no loss yet"
    return f"{loss}, {rank}{line['clips_per_s']:.0f} clips/s, wait {line['data_wait']:.0%}"


@contextmanager
def catch_stop_signals() -> Iterator[threading.Event]:
    """An event that is set by the first of STOP_SIGNALS; a second one acts at once. Only in the main thread."""
    # Python lets only the main thread handle signals.
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    # The old handlers come back after the block, and with the first signal: the next one is theirs.
    old_handlers: dict[int, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def request_stop(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, old_handlers[number])

    for number in old_handlers:
        signal.signal(number, request_stop)
    try:
        yield stop
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


class ThroughputClock:
    """Clips per second, skipped clips, and the share of time spent waiting for data, since it was last read."""

    def __init__(self) -> None:
        self.reset_counts()

    def reset_counts(self) -> None:
        """Count from 0, from now on."""
        self.start_seconds = time.perf_counter()
        self.waited_seconds = 0.0
        self.clips = 0
        self.skipped = 0

    @contextmanager
    def measure_waiting(self) -> Iterator[None]:
        """Count the time of a `with` block as time spent waiting."""
        began = time.perf_counter()
        yield
        self.waited_seconds += time.perf_counter() - began

    def read_and_reset(self) -> Json:
        """The counts as metrics; they start again from 0."""
        seconds = time.perf_counter() - self.start_seconds
        metrics = {
            "clips_per_s": round(self.clips / seconds, 2),
            "data_wait": round(self.waited_seconds / seconds, 4),
            "skipped": self.skipped,
        }
        self.reset_counts()
        return metrics
