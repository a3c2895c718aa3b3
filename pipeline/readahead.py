"""ReadAhead: batches made by a thread before they are asked for."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

from torch import Tensor

from pipeline.errors import RunError
from pipeline.loader import Batch, Cuts, Feed

CLOSED = "the loader was closed while batches were still asked of it"
Made = tuple[Tensor, Cuts]


class ReadAhead(Iterator[Batch]):
    """The batches of some steps, `prefetch` of them made ahead by a thread; for one consumer, closed by anyone.

    `maker` is called with the first batch asked for; what it returns makes the mels, one after the other.
    An error in making a batch is raised where that batch is asked for. After an error, or once closed,
    RunError is raised for every further batch.
    """

    def __init__(
        self, feed: Feed, steps: range, maker: Callable[[], Callable[[], Made]], prefetch: int
    ) -> None:
        self._feed, self._steps, self._maker, self._prefetch = feed, steps, maker, prefetch
        self._make: Callable[[], Made] | None = None
        self._made: deque[Future[Made]] = deque()
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._submitted, self._yielded, self._closed = 0, 0, False

    def __next__(self) -> Batch:
        if self._yielded == len(self._steps):
            self.close()
            raise StopIteration
        try:
            with self._lock:
                self._fill()
                made = self._made.popleft()
            mel_BTF, cuts = made.result()
            batch = self._feed.batch(mel_BTF, cuts)
            with self._lock:
                self._fill()
        except CancelledError:
            raise RunError(CLOSED) from None
        except BaseException:
            self.close()
            raise
        self._yielded += 1
        return batch

    def _fill(self) -> None:
        """Have the thread make the batches that are to be ahead."""
        if self._closed:
            raise RunError(CLOSED)
        if self._thread is None or self._make is None:
            self._make = self._maker()
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        while len(self._made) < self._prefetch and self._submitted < len(self._steps):
            self._made.append(self._thread.submit(self._make))
            self._submitted += 1

    def close(self) -> None:
        """End the thread after the batch it is at; who waits for another is told so."""
        with self._lock:
            self._closed, thread = True, self._thread
            self._thread = None
        if thread is not None:
            thread.shutdown(cancel_futures=True)
            self._made.clear()
            self._make = None  # and what it stands on: buffers, threads

    __del__ = close
