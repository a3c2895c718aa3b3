"""Ray: the same tasks on the machines of a Ray cluster; the only door to it."""

import logging
import pickle
import socket
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from pipeline.engines import Pool, T, Work
from pipeline.errors import InputError


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
