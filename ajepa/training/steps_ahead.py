"""StepsAhead: what the next step needs of the host is made by a thread while the device takes this step."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Made = TypeVar("Made")


class StepsAhead(Generic[Made]):
    """The values of a function of the step: `take(step)` returns that step's, and a thread begins with the next one's.

    `make` must depend on the step alone, so that values are the same however steps are taken, and must not touch what
    another thread changes. An error in it is raised by the `take` of its step.
    """

    def __init__(self, make: Callable[[int], Made], last_step: int) -> None:
        self._make = make
        self._last_step = last_step
        self._thread: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[Made]] | None = None

    def take(self, step: int) -> Made:
        """Return the value of a step below the last; at once if it is the one after the step taken before."""
        # Made ahead, or now.
        ahead, self._next = self._next, None
        made = ahead[1].result() if ahead is not None and ahead[0] == step else self._make(step)

        # Begin with the next one.
        if step + 1 < self._last_step:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="draws")
            self._next = (step + 1, self._thread.submit(self._make, step + 1))
        return made
