"""Progress of long work on stderr: a bar on a terminal; in a log or a pipe a line after 5 s, then every 30 s."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from pipeline.messages import count_phrase

SECONDS_TO_FIRST_LINE = 5.0  # soon enough to see that the work has begun

SECONDS_BETWEEN_LINES = 30.0

Item = TypeVar("Item")


class Progress(Protocol):
    """Work that is being counted: used in a `with` block, where `update` is called as parts of it are done."""

    def __enter__(self) -> "Progress": ...
    def __exit__(self, *error: Any) -> Any: ...
    def update(self, n: int = 1) -> Any:
        """Count `n` more units as done."""

    def set_postfix_str(self, s: str, refresh: bool = True) -> Any:
        """Show `s` after the counts from the next update on."""


def open_progress(
    total: int,
    *,
    label: str,
    unit: str,
    shown: bool = True,
    initial: int = 0,
    **bar_options: Any,
) -> Progress:
    """Return a tqdm bar where stderr is a terminal, and else `ProgressLines`.

    `unit` is a noun in the singular; `initial` units of `total` were done before. `bar_options` go to tqdm. What is
    not `shown` is counted without a word.
    """
    if shown and not sys.stderr.isatty():
        return ProgressLines(total, label=label, unit=unit, initial=initial)

    # Imported here, because `--help` and tab completion do not need it.
    from tqdm import tqdm

    bar: Progress = tqdm(
        total=total,
        initial=initial,
        desc=label,
        unit=unit,
        disable=not shown,
        dynamic_ncols=True,
        **bar_options,
    )
    return bar


def track_progress(
    items: Iterable[Item], total: int, *, label: str, unit: str, shown: bool = True, **bar_options: Any
) -> Iterator[Item]:
    """Yield the items, and count each as done when the next one is taken; options are those of `open_progress`."""
    with open_progress(total, label=label, unit=unit, shown=shown, **bar_options) as progress:
        for item in items:
            yield item
            progress.update()


class ProgressLines:
    """Prints a line with count, rate and time left after 5 s and then every 30 s, and one at the end of such work.

    A thread prints them, so that a log shows that the work goes on even while a single unit takes minutes. Work that
    ends within the first 5 s prints nothing.
    """

    def __init__(
        self,
        total: int,
        *,
        label: str,
        unit: str,
        initial: int = 0,
        seconds_to_first: float = SECONDS_TO_FIRST_LINE,
        seconds_between: float = SECONDS_BETWEEN_LINES,
    ) -> None:
        # What is counted.
        self.total = total
        self.label = label
        self.unit = unit
        self.initial = initial
        self.done = initial
        self.postfix = ""

        # The thread that prints.
        self.began_seconds = time.monotonic()
        self._printed_done: int | None = None  # what the newest line counted
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._print_lines, args=(seconds_to_first, seconds_between), daemon=True
        )

    def __enter__(self) -> Self:
        self.began_seconds = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

        # The end of work that nobody saw the beginning of needs no line, nor one that a line has told already.
        if self._printed_done is not None and self._printed_done != self.total:
            print(self.describe(), file=sys.stderr, flush=True)

    def update(self, n: int = 1) -> None:
        """Count `n` more units as done."""
        self.done += n

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        """Show `s` at the end of later lines; `refresh` is tqdm's, and has no meaning here."""
        self.postfix = s

    def describe(self) -> str:
        """Return the line: count, rate and the time left, or the time taken when everything is done."""
        seconds = time.monotonic() - self.began_seconds
        counted = self.done - self.initial
        parts = [f"{self.label}: {self.done:,} of {count_phrase(self.total, self.unit)}"]

        # A rate needs something that was done.
        if counted:
            parts.append(rate_phrase(counted / max(seconds, 1e-9), self.unit))
        if counted and self.done < self.total:
            parts.append(f"{clock_phrase(seconds / counted * (self.total - self.done))} left")
        else:
            parts.append(f"after {clock_phrase(seconds)}")
        if self.postfix:
            parts.append(self.postfix)
        return ", ".join(parts)

    def _print_lines(self, seconds_to_first: float, seconds_between: float) -> None:
        wait_seconds = seconds_to_first
        while not self._ended.wait(wait_seconds):
            self._printed_done = self.done
            print(self.describe(), file=sys.stderr, flush=True)
            wait_seconds = seconds_between


def rate_phrase(per_second: float, unit: str) -> str:
    """Return a rate: `35.2 clips/s`; slow work in units a minute or an hour, so that the number is at least 1."""
    units = count_phrase(2, unit).partition(" ")[2]
    for seconds, period in ((1, "s"), (60, "min"), (3600, "h")):
        if per_second * seconds >= 1 or period == "h":
            break
    return (
        f"{per_second * seconds:.3g} {units}/{period}"
        if per_second < 1000
        else f"{per_second:,.0f} {units}/s"
    )


def clock_phrase(seconds: float) -> str:
    """Return a duration as `m:ss` or `h:mm:ss`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
