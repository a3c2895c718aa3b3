"""Run the tasks of a build in processes, which may hang or die, or on a Ray cluster; only this file uses Ray."""

import ctypes
import logging
import multiprocessing as mp
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Protocol, Self, TypeVar

from pipeline.errors import InputError, StoreError

POLL_SECONDS = 0.5

SUSPENDED_SECONDS = 4 * POLL_SECONDS  # a longer poll means Ctrl-Z, or that the machine slept

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

MAX_IDLE_DEATHS = 3  # most deaths of workers while they try no row; no clip can be the cause of these

CONNECT_TIMEOUT_SECONDS = 10  # for the first answer of a Ray cluster

TASK_DONE = "done"  # a worker's message at the end of a task


# The answer of `cpu_capability` once it is known: it is the same in all processes of a machine.
KNOWN_CPU_CAPABILITIES: list[str] = []


def cpu_capability() -> str:
    """Return the instruction set for which PyTorch chooses its kernels here.

    Every worker tells it when it starts, so a process that ran workers need not import PyTorch, which takes seconds.
    """
    if not KNOWN_CPU_CAPABILITIES:
        import torch

        KNOWN_CPU_CAPABILITIES.append(torch.backends.cpu.get_cpu_capability())
    return KNOWN_CPU_CAPABILITIES[0]


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """A worker's first message: the `cpu_capability` of its process."""

    cpu_capability: str


class RowTask(Protocol):
    """A task of several rows; any row may kill the process that tries it."""

    def with_failed_row(self, row: int, reason: str, detail: str) -> Self:
        """Return the same task, in which this row fails without being tried."""
        ...


T = TypeVar("T", bound=RowTask)

# Runs a task; yields each row before it tries the row, and None before work that belongs to no row.
TaskFunction = Callable[[T], Iterator[int | None]]


def run_in_processes(
    task_function: TaskFunction[T], tasks: Iterable[T], *, workers: int, clip_limit_seconds: float
) -> Iterator[int]:
    """Run all tasks and yield each row that is tried.

    The tasks run in `workers` processes of a `WorkerPool`; with 0 they run in this process, without protection against
    rows that hang or kill it.
    """
    if workers == 0:
        for task in tasks:
            yield from (row for row in task_function(task) if row is not None)
        return
    pool = WorkerPool(task_function, workers)
    try:
        yield from pool.run_tasks(tasks, clip_limit_seconds=clip_limit_seconds)
    finally:
        pool.close()


class WorkerPool(Generic[T]):
    """Up to `workers` spawned processes that run tasks with one function; each process is used for many tasks."""

    def __init__(self, task_function: TaskFunction[T], workers: int) -> None:
        self._task_function = task_function
        self._worker_limit = workers
        self._workers: list[_WorkerProcess[T]] = []

    def run_tasks(self, tasks: Iterable[T], *, clip_limit_seconds: float) -> Iterator[int]:
        """Run the tasks; takes the next task when a worker is free, and yields each row when it is tried.

        If a row kills its process or takes more than `clip_limit_seconds` of wall time, `with_failed_row` marks it as
        failed and its task runs again. An error in a worker ends the run: an InputError is raised unchanged, any other
        error as a RuntimeError with its traceback.
        """
        new_tasks = iter(tasks)
        retries: list[T] = []
        idle_deaths = 0
        while True:
            # Give every free worker a task: first the tasks of killed workers, then new tasks.
            while len(self._busy_workers()) < self._worker_limit:
                task = retries.pop() if retries else next(new_tasks, None)
                if task is None:
                    break
                self._idle_worker().assign_task(task)
            busy = self._busy_workers()
            if not busy:
                return

            # Yield the tried rows. Kill workers that are stuck, and retry the tasks of dead workers without the row.
            ready = _wait_for_messages(busy)
            for worker in busy:
                if worker.pipe in ready:
                    row = worker.receive_row()
                    if row is not None:
                        yield row
                if worker.is_dead or worker.is_overdue(clip_limit_seconds):
                    self._workers.remove(worker)
                    idle_deaths += worker.current_row is None
                    retries.append(worker.kill_for_retry(clip_limit_seconds))

            # A task that kills its worker before it tries a row would be retried for ever.
            if idle_deaths >= MAX_IDLE_DEATHS:
                raise StoreError(
                    f"worker processes died {idle_deaths} times; out of memory? Try again with fewer --workers"
                )

    def _busy_workers(self) -> "list[_WorkerProcess[T]]":
        return [worker for worker in self._workers if worker.current_task is not None]

    def _idle_worker(self) -> "_WorkerProcess[T]":
        """Return a worker without a task; starts a new worker if all are busy."""
        for worker in self._workers:
            if worker.current_task is None:
                return worker
        worker = _WorkerProcess(self._task_function)
        self._workers.append(worker)
        return worker

    def close(self) -> None:
        """Kill all processes, busy or not."""
        while self._workers:
            self._workers.pop().kill_process()


def _wait_for_messages(workers: "list[_WorkerProcess[T]]") -> list[Any]:
    """Wait for at most one poll; returns the pipes from which a message or the end of the pipe can be read."""
    began = time.monotonic()
    ready = wait([worker.pipe for worker in workers], timeout=POLL_SECONDS)
    waited_seconds = time.monotonic() - began
    # While all processes were suspended, no row could progress.
    if waited_seconds > SUSPENDED_SECONDS:
        for worker in workers:
            worker.extend_deadline(waited_seconds)
    return ready


class _WorkerProcess(Generic[T]):
    """One spawned process, with its current task, its current row, and the time at which the row began."""

    def __init__(self, task_function: TaskFunction[T]) -> None:
        self.current_task: T | None = None
        self.current_row: int | None = None
        self.is_dead = False
        self._row_started = 0.0

        # Spawned: a fork may hang once torch or polars have threads.
        context = mp.get_context("spawn")
        self.pipe, worker_pipe = context.Pipe()
        self._process = context.Process(
            target=_serve_tasks, args=(worker_pipe, task_function, os.getpid()), daemon=True
        )

        # The worker inherits this signal mask, so that only the parent handles Ctrl-C. Before the first worker,
        # multiprocessing would start its tracker, and take the mask away after that.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        self._process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

        # The worker must be the only process that has this end of the pipe, so that the pipe ends when the worker dies.
        worker_pipe.close()

    def assign_task(self, task: T) -> None:
        """Send the process a task."""
        self.current_task = task
        self.current_row = None
        try:
            self.pipe.send(task)
        except OSError:
            self.is_dead = True

    def receive_row(self) -> int | None:
        """Read one message; returns the row in the message, if any, and raises the error in it, if any."""
        try:
            message = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.is_dead = True
            return None
        if isinstance(message, Exception):
            raise message
        if isinstance(message, WorkerStarted):
            if not KNOWN_CPU_CAPABILITIES:
                KNOWN_CPU_CAPABILITIES.append(message.cpu_capability)
            return None
        self._row_started = time.monotonic()
        if message == TASK_DONE:
            self.current_row = None
            self.current_task = None
        else:
            self.current_row = message
        return self.current_row

    def extend_deadline(self, seconds: float) -> None:
        """Allow the current row this much more time."""
        self._row_started += seconds

    def is_overdue(self, clip_limit_seconds: float) -> bool:
        """Return whether the current row has taken longer than the limit of a clip."""
        return self.current_row is not None and time.monotonic() - self._row_started > clip_limit_seconds

    def kill_for_retry(self, clip_limit_seconds: float) -> T:
        """Kill the process; returns its task with the current row marked as failed."""
        # If the process is still alive, its row took too long.
        timed_out = not self.is_dead
        self.kill_process()
        assert self.current_task is not None
        if self.current_row is None:
            return self.current_task
        if timed_out:
            return self.current_task.with_failed_row(
                self.current_row, "timed_out", f"took over {clip_limit_seconds:g} s to decode"
            )
        return self.current_task.with_failed_row(
            self.current_row, "crashed", f"took the decoder down ({_describe_exit(self._process.exitcode)})"
        )

    def kill_process(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _describe_exit(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"exit status {exitcode}"


def _serve_tasks(
    pipe: Connection, task_function: Callable[[Any], Iterator[int | None]], parent_pid: int
) -> None:
    """Run the tasks received from the pipe; send their rows and None, and after each task TASK_DONE or an error.

    The first message is `WorkerStarted`.
    """
    # End this worker when the build is killed; else it would write into the store together with the next build. The
    # parent may have died before `prctl`, so its id is checked too.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent_pid:
        return

    # One thread, because each core already has a process. Imported here, where no row's time runs yet, and an error is
    # still seen.
    import torch

    torch.set_num_threads(1)
    # Decoders write warnings to stderr; hide them, because a failed row has its reason in the results.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    try:
        pipe.send(WorkerStarted(cpu_capability()))
    except BrokenPipeError:  # the build has ended
        return
    while True:
        try:
            for row in task_function(pipe.recv()):
                pipe.send(row)
            pipe.send(TASK_DONE)
        except (EOFError, BrokenPipeError):  # the build has ended
            return
        except InputError as error:
            pipe.send(error)
        except BaseException:
            pipe.send(RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
            raise


def run_on_ray_cluster(
    task_function: TaskFunction[T],
    tasks: Iterable[T],
    *,
    workers: int,
    clip_limit_seconds: float,
    address: str | None = None,
) -> Iterator[int]:
    """Run all tasks on a Ray cluster, `workers` at a time; yields the rows of each task when the task ends.

    `address` is the argument of `ray.init`; None starts Ray on this machine. All machines must have the same paths. If
    a machine is lost, Ray runs its tasks again on another. A row that kills its process fails as in `WorkerPool`.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--engine ray: Ray is not installed; run: pip install 'ajepa[ray]'") from None

    # Connect.
    _check_cluster_answers(address)
    try:
        ray.init(
            address=address,
            num_cpus=None if address else workers,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except ConnectionError as error:
        raise _no_cluster_error(address, error) from None

    # Keep `workers` tasks running; whenever a task ends, take the next.
    try:
        remote_task: Any = ray.remote(num_cpus=1)(run_ray_task)
        function_reference = ray.put(task_function)
        new_tasks = iter(tasks)
        running: list[Any] = []
        while True:
            while len(running) < workers and (task := next(new_tasks, None)) is not None:
                running.append(remote_task.remote(function_reference, task, clip_limit_seconds))
            if not running:
                return
            ended, running = ray.wait(running)
            for result in ray.get(ended):
                if isinstance(result, InputError):
                    raise result
                yield from result
    finally:
        ray.shutdown()


def _check_cluster_answers(address: str | None) -> None:
    """Raise InputError if nothing listens at the address; Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_SECONDS).close()
        except OSError as error:
            raise _no_cluster_error(address, error) from None


def _no_cluster_error(address: str | None, error: Exception) -> InputError:
    return InputError(
        f"--address {address}: no Ray cluster answers ({error}); start one with: ray start --head"
    )


def run_ray_task(
    task_function: TaskFunction[T], task: T, clip_limit_seconds: float
) -> list[int] | InputError:
    """Run one task in a worker process of this machine; returns its rows, or the InputError that ended it.

    The error is returned, because Ray wraps an error that is raised.
    """
    pool = cached_worker_pool(pickle.dumps(task_function))
    try:
        return list(pool.run_tasks([task], clip_limit_seconds=clip_limit_seconds))
    except InputError as error:
        pool.close()
        return error


@lru_cache(maxsize=1)
def cached_worker_pool(pickled_function: bytes) -> WorkerPool[Any]:
    """Return the pool of this Ray worker, which has one process that runs all its tasks."""
    return WorkerPool(pickle.loads(pickled_function), workers=1)
