"""Call a function on many values on threads, a few values ahead: memory does not grow with the number of values."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

CALLS_AHEAD = 4  # for each thread, begun or waiting


def map_on_threads(function: Callable[[T], R], values: Iterable[T], threads: int) -> Iterator[R]:
    """Yield the result for each value, in their order; values are taken only as results are taken.

    An error of the function is raised in the place of its result. If the caller stops early, no further call begins.
    """
    remaining = iter(values)
    waiting: deque[Future[R]] = deque()

    # No `with`, which would wait for all calls even after Ctrl-C.
    pool = ThreadPoolExecutor(threads)
    try:
        waiting.extend(pool.submit(function, value) for value in islice(remaining, threads * CALLS_AHEAD))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, value) for value in islice(remaining, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
