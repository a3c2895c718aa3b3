"""Who runs the shards: worker processes of this machine, which may hang or die without taking the build along.

Ray: the same tasks on the machines of a Ray cluster; the only door to it.
"""

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
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Protocol, Self, TypeVar

import torch

from pipeline.errors import InputError, StoreError

POLL_SECONDS = 0.5

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

MAX_IDLE_DEATHS = 3  # of workers with no clip in hand: not a clip's fault


class RowTask(Protocol):
    """Some clips to work through, of which one may turn out to be deadly."""

    def with_failed_row(self, row: int, reason: str, detail: str) -> Self:
        """The same task, with one row failed instead of tried."""
        ...


T = TypeVar("T", bound=RowTask)

TaskFunction = Callable[
    [T], Iterator[int | None]
]  # yields each row before it is tried, None before what is no clip


def run_in_processes(
    task_function: TaskFunction[T], tasks: Iterable[T], *, workers: int, clip_limit_seconds: float
) -> Iterator[int]:
    """Do all tasks in `workers` spawned processes, see `Pool`; with 0 in this one, without that protection."""
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
    """Up to `workers` spawned processes that do one kind of work, and stay for more of it."""

    def __init__(self, task_function: TaskFunction[T], workers: int) -> None:
        self._task_function, self._worker_limit = task_function, workers
        self._workers: list[_WorkerProcess[T]] = []

    def run_tasks(self, tasks: Iterable[T], *, clip_limit_seconds: float) -> Iterator[int]:
        """Do tasks, drawn when there is somebody to do them; yields each row when it is tried.

        A row on which a process dies, or which takes over `clip_seconds` of wall time, is failed by `task.without`
        and the task done again. Errors in a worker end the run: an InputError as it is, anything else as a
        RuntimeError with its traceback.
        """
        waiting, again, deaths = iter(tasks), list[T](), 0
        while True:
            while len(self._busy_workers()) < self._worker_limit:
                if (task := again.pop() if again else next(waiting, None)) is None:
                    break
                self._idle_worker().assign_task(task)
            if not (busy := self._busy_workers()):
                return
            began = time.monotonic()
            ready = wait([worker.pipe for worker in busy], timeout=POLL_SECONDS)
            slept = time.monotonic() - began
            if slept > 4 * POLL_SECONDS:  # stopped by Ctrl-Z, or the machine slept
                for worker in busy:
                    worker.extend_deadline(slept)
            for worker in busy:
                if worker.pipe in ready and (row := worker.receive_row()) is not None:
                    yield row
                if worker.is_dead or worker.is_overdue(clip_limit_seconds):
                    self._workers.remove(worker)
                    deaths += worker.current_row is None
                    again.append(worker.kill_for_retry(clip_limit_seconds))
            if deaths >= MAX_IDLE_DEATHS:
                raise StoreError(
                    f"worker processes died {deaths} times; out of memory? Try again with fewer --workers"
                )

    def _busy_workers(self) -> "list[_WorkerProcess[T]]":
        return [worker for worker in self._workers if worker.current_task is not None]

    def _idle_worker(self) -> "_WorkerProcess[T]":
        """A worker without a task, a new one if there is none."""
        free = next((worker for worker in self._workers if worker.current_task is None), None)
        if free is None:
            self._workers.append(free := _WorkerProcess(self._task_function))
        return free

    def close(self) -> None:
        """End the processes, whatever they are at."""
        while self._workers:
            self._workers.pop().kill_process()


class _WorkerProcess(Generic[T]):
    """One spawned process: the task it has, the row it is at, and since when."""

    def __init__(self, task_function: TaskFunction[T]) -> None:
        context = mp.get_context("spawn")  # a fork after torch or polars are up may hang
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve_tasks, args=(theirs, task_function, os.getpid()), daemon=True
        )
        signal.pthread_sigmask(
            signal.SIG_BLOCK, [signal.SIGINT]
        )  # inherited: Ctrl-C is for the parent to handle
        self._process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        theirs.close()  # so that the worker's death reads as the end of the pipe
        self.current_task: T | None = None
        self.current_row: int | None = None
        self._row_started = 0.0
        self.is_dead = False

    def assign_task(self, task: T) -> None:
        self.current_task, self.current_row = task, None
        try:
            self.pipe.send(task)
        except OSError:
            self.is_dead = True

    def receive_row(self) -> int | None:
        """The row now tried, if that is the news; raises what the worker raised."""
        try:
            news = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.is_dead = True
            return None
        if isinstance(news, Exception):
            raise news
        self.current_row, self._row_started = (None if news == "done" else news), time.monotonic()
        if news == "done":
            self.current_task = None
        return self.current_row

    def extend_deadline(self, seconds: float) -> None:
        """Do not count this time, in which nobody worked, against the clip."""
        self._row_started += seconds

    def is_overdue(self, clip_limit_seconds: float) -> bool:
        return self.current_row is not None and time.monotonic() - self._row_started > clip_limit_seconds

    def kill_for_retry(self, clip_limit_seconds: float) -> T:
        """The task to do again, without the row that took the process down."""
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
    """A worker's life: tasks come in; rows, None, and at the end "done" or an exception go out."""
    if sys.platform == "linux":  # a worker that outlives a killed build would write beside the next one
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent_pid:
        return
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), 2
    )  # decoders complain there; what matters comes back as a reason
    torch.set_num_threads(1)  # one process a core: more threads would only fight
    while True:
        try:
            for row in task_function(pipe.recv()):
                pipe.send(row)
            pipe.send("done")
        except (EOFError, BrokenPipeError):  # the build is gone
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
    """Do all tasks on a Ray cluster, `workers` at a time; yields their rows as tasks end.

    `address` as `ray.init` takes it; None starts Ray on this machine. Every machine must see the same paths. Ray
    does the tasks of a lost machine again on another; what a worker process survives is as in `Pool`.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--engine ray: Ray is not installed; run: pip install 'ajepa[ray]'") from None
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
    try:
        do: Any = ray.remote(num_cpus=1)(run_ray_task)
        there, waiting, running = ray.put(task_function), iter(tasks), list[Any]()
        while True:
            while len(running) < workers and (task := next(waiting, None)) is not None:
                running.append(do.remote(there, task, clip_limit_seconds))
            if not running:
                return
            done, running = ray.wait(running)
            for rows in ray.get(done):
                if isinstance(rows, InputError):
                    raise rows
                yield from rows
    finally:
        ray.shutdown()


def _check_cluster_answers(address: str | None) -> None:
    """Ray itself tries for minutes to reach a host that refuses."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise _no_cluster_error(address, error) from None


def _no_cluster_error(address: str | None, error: Exception) -> InputError:
    return InputError(
        f"--address {address}: no Ray cluster answers ({error}); start one with: ray start --head"
    )


def run_ray_task(
    task_function: TaskFunction[T], task: T, clip_limit_seconds: float
) -> list[int] | InputError:
    """One task in a guarded process of this machine, which stays for the next."""
    pool = cached_worker_pool(pickle.dumps(task_function))
    try:
        return list(pool.run_tasks([task], clip_limit_seconds=clip_limit_seconds))
    except InputError as error:  # as a value: Ray would wrap it
        pool.close()
        return error


@lru_cache(maxsize=1)
def cached_worker_pool(pickled_function: bytes) -> WorkerPool[Any]:
    """The process of this Ray worker."""
    return WorkerPool(pickle.loads(pickled_function), workers=1)
