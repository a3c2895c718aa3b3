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

MOST_DEATHS = 3  # of workers with no clip in hand: not a clip's fault


class Task(Protocol):
    """Some clips to work through, of which one may turn out to be deadly."""

    def without(self, row: int, reason: str, detail: str) -> Self:
        """The same task, with one row failed instead of tried."""
        ...


T = TypeVar("T", bound=Task)

Work = Callable[[T], Iterator[int | None]]  # yields each row before it is tried, None before what is no clip


def run_here(work: Work[T], tasks: Iterable[T], *, workers: int, clip_seconds: float) -> Iterator[int]:
    """Do all tasks in `workers` spawned processes, see `Pool`; with 0 in this one, without that protection."""
    if workers == 0:
        for task in tasks:
            yield from (row for row in work(task) if row is not None)
        return
    pool = Pool(work, workers)
    try:
        yield from pool.run(tasks, clip_seconds=clip_seconds)
    finally:
        pool.close()


class Pool(Generic[T]):
    """Up to `workers` spawned processes that do one kind of work, and stay for more of it."""

    def __init__(self, work: Work[T], workers: int) -> None:
        self._work, self._most = work, workers
        self._workers: list[_Worker[T]] = []

    def run(self, tasks: Iterable[T], *, clip_seconds: float) -> Iterator[int]:
        """Do tasks, drawn when there is somebody to do them; yields each row when it is tried.

        A row on which a process dies, or which takes over `clip_seconds` of wall time, is failed by `task.without`
        and the task done again. Errors in a worker end the run: an InputError as it is, anything else as a
        RuntimeError with its traceback.
        """
        waiting, again, deaths = iter(tasks), list[T](), 0
        while True:
            while len(self._busy()) < self._most:
                if (task := again.pop() if again else next(waiting, None)) is None:
                    break
                self._idle().give(task)
            if not (busy := self._busy()):
                return
            began = time.monotonic()
            ready = wait([worker.pipe for worker in busy], timeout=POLL_SECONDS)
            slept = time.monotonic() - began
            if slept > 4 * POLL_SECONDS:  # stopped by Ctrl-Z, or the machine slept
                for worker in busy:
                    worker.pardon(slept)
            for worker in busy:
                if worker.pipe in ready and (row := worker.listen()) is not None:
                    yield row
                if worker.dead or worker.overdue(clip_seconds):
                    self._workers.remove(worker)
                    deaths += worker.row is None
                    again.append(worker.bury(clip_seconds))
            if deaths >= MOST_DEATHS:
                raise StoreError(
                    f"worker processes died {deaths} times; out of memory? Try again with fewer --workers"
                )

    def _busy(self) -> "list[_Worker[T]]":
        return [worker for worker in self._workers if worker.task is not None]

    def _idle(self) -> "_Worker[T]":
        """A worker without a task, a new one if there is none."""
        free = next((worker for worker in self._workers if worker.task is None), None)
        if free is None:
            self._workers.append(free := _Worker(self._work))
        return free

    def close(self) -> None:
        """End the processes, whatever they are at."""
        while self._workers:
            self._workers.pop().kill()


class _Worker(Generic[T]):
    """One spawned process: the task it has, the row it is at, and since when."""

    def __init__(self, work: Work[T]) -> None:
        context = mp.get_context("spawn")  # a fork after torch or polars are up may hang
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, work, os.getpid()), daemon=True)
        signal.pthread_sigmask(
            signal.SIG_BLOCK, [signal.SIGINT]
        )  # inherited: Ctrl-C is for the parent to handle
        self._process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        theirs.close()  # so that the worker's death reads as the end of the pipe
        self.task: T | None = None
        self.row: int | None = None
        self._since = 0.0
        self.dead = False

    def give(self, task: T) -> None:
        self.task, self.row = task, None
        try:
            self.pipe.send(task)
        except OSError:
            self.dead = True

    def listen(self) -> int | None:
        """The row now tried, if that is the news; raises what the worker raised."""
        try:
            news = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.dead = True
            return None
        if isinstance(news, Exception):
            raise news
        self.row, self._since = (None if news == "done" else news), time.monotonic()
        if news == "done":
            self.task = None
        return self.row

    def pardon(self, seconds: float) -> None:
        """Do not count this time, in which nobody worked, against the clip."""
        self._since += seconds

    def overdue(self, clip_seconds: float) -> bool:
        return self.row is not None and time.monotonic() - self._since > clip_seconds

    def bury(self, clip_seconds: float) -> T:
        """The task to do again, without the row that took the process down."""
        timed_out = not self.dead
        self.kill()
        assert self.task is not None
        if self.row is None:
            return self.task
        if timed_out:
            return self.task.without(self.row, "timed_out", f"took over {clip_seconds:g} s to decode")
        return self.task.without(
            self.row, "crashed", f"took the decoder down ({_death(self._process.exitcode)})"
        )

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"exit status {exitcode}"


def _serve(pipe: Connection, work: Callable[[Any], Iterator[int | None]], parent: int) -> None:
    """A worker's life: tasks come in; rows, None, and at the end "done" or an exception go out."""
    if sys.platform == "linux":  # a worker that outlives a killed build would write beside the next one
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        return
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), 2
    )  # decoders complain there; what matters comes back as a reason
    torch.set_num_threads(1)  # one process a core: more threads would only fight
    while True:
        try:
            for row in work(pipe.recv()):
                pipe.send(row)
            pipe.send("done")
        except (EOFError, BrokenPipeError):  # the build is gone
            return
        except InputError as error:
            pipe.send(error)
        except BaseException:
            pipe.send(RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
            raise


def run_on_ray(
    work: Work[T], tasks: Iterable[T], *, workers: int, clip_seconds: float, address: str | None = None
) -> Iterator[int]:
    """Do all tasks on a Ray cluster, `workers` at a time; yields their rows as tasks end.

    `address` as `ray.init` takes it; None starts Ray on this machine. Every machine must see the same paths. Ray
    does the tasks of a lost machine again on another; what a worker process survives is as in `Pool`.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--engine ray: Ray is not installed; run: pip install 'ajepa[ray]'") from None
    _refuse_silence(address)
    try:
        ray.init(
            address=address,
            num_cpus=None if address else workers,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except ConnectionError as error:
        raise _silent(address, error) from None
    try:
        do: Any = ray.remote(num_cpus=1)(rows_of)
        there, waiting, running = ray.put(work), iter(tasks), list[Any]()
        while True:
            while len(running) < workers and (task := next(waiting, None)) is not None:
                running.append(do.remote(there, task, clip_seconds))
            if not running:
                return
            done, running = ray.wait(running)
            for rows in ray.get(done):
                if isinstance(rows, InputError):
                    raise rows
                yield from rows
    finally:
        ray.shutdown()


def _refuse_silence(address: str | None) -> None:
    """Ray itself tries for minutes to reach a host that refuses."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise _silent(address, error) from None


def _silent(address: str | None, error: Exception) -> InputError:
    return InputError(
        f"--address {address}: no Ray cluster answers ({error}); start one with: ray start --head"
    )


def rows_of(work: Work[T], task: T, clip_seconds: float) -> list[int] | InputError:
    """One task in a guarded process of this machine, which stays for the next."""
    pool = pool_of(pickle.dumps(work))
    try:
        return list(pool.run([task], clip_seconds=clip_seconds))
    except InputError as error:  # as a value: Ray would wrap it
        pool.close()
        return error


@lru_cache(maxsize=1)
def pool_of(pickled_work: bytes) -> Pool[Any]:
    """The process of this Ray worker."""
    return Pool(pickle.loads(pickled_work), workers=1)
