"""Who runs the shards: worker processes of this machine, which may hang or die without taking the build along."""

import ctypes
import multiprocessing as mp
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
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
    """Do all tasks in `workers` spawned processes; yields each row when it is tried. Tasks are drawn when needed.

    A row on which a process dies, or which takes over `clip_seconds` of wall time, is failed by `task.without` and
    the task done again. With 0 workers everything runs in this process, without that protection.
    Errors in a worker end the run: an InputError as it is, anything else as a RuntimeError with its traceback.
    """
    if workers == 0:
        for task in tasks:
            yield from (row for row in work(task) if row is not None)
        return
    waiting, again, pool, deaths = iter(tasks), list[T](), list[_Worker[T]](), 0
    try:
        while True:
            while sum(worker.task is not None for worker in pool) < workers:
                if (next_task := again.pop() if again else next(waiting, None)) is None:
                    break
                _idle(pool, work).give(next_task)
            if not (busy := [worker for worker in pool if worker.task]):
                return
            began = time.monotonic()
            ready = wait([worker.pipe for worker in busy], timeout=POLL_SECONDS)
            if (
                slept := time.monotonic() - began
            ) > 4 * POLL_SECONDS:  # stopped by Ctrl-Z, or the machine slept
                for worker in busy:
                    worker.pardon(slept)
            for worker in busy:
                if worker.pipe in ready and (row := worker.listen()) is not None:
                    yield row
                if worker.dead or worker.overdue(clip_seconds):
                    pool.remove(worker)
                    deaths += worker.row is None
                    again.append(worker.bury(clip_seconds))
            if deaths >= MOST_DEATHS:
                raise StoreError(
                    f"worker processes died {deaths} times; out of memory? Try again with fewer --workers"
                )
    finally:
        for worker in pool:
            worker.kill()


def _idle(pool: "list[_Worker[T]]", work: Work[T]) -> "_Worker[T]":
    """A worker without a task, a new one if there is none."""
    free = next((worker for worker in pool if worker.task is None), None)
    if free is None:
        pool.append(free := _Worker(work))
    return free


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
