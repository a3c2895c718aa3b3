"""Workers that hang, die or find a bug."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from pipeline.engines import run_here
from pipeline.errors import StoreError


@dataclass(frozen=True)
class Numbers:
    """Rows to touch a file for, each after the name of what happens on it."""

    folder: Path
    rows: tuple[str, ...]
    failed: dict[int, str] = field(default_factory=dict)

    def without(self, row, reason, detail):
        return replace(self, failed=self.failed | {row: reason})


def work(task: Numbers) -> Iterator[int | None]:
    for row, what in enumerate(task.rows):
        if row in task.failed:
            (task.folder / f"{row}.{task.failed[row]}").touch()
            continue
        yield row
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "hangs":
            time.sleep(60)
        elif what == "is full":
            raise StoreError("no space left")
        elif what == "is a bug":
            raise ZeroDivisionError("no sound divides by zero")
        (task.folder / f"{row}.good").touch()
    yield None


def test_a_clip_that_kills_or_hangs_its_decoder_costs_only_itself(tmp_path):
    """One deadly file among millions must not end a build, nor take its neighbours along."""
    task = Numbers(tmp_path, ("is fine", "dies", "is fine", "hangs", "is fine"))
    list(run_here(work, [task], workers=1, clip_seconds=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0.good",
        "1.crashed",
        "2.good",
        "3.timed_out",
        "4.good",
    ]


def test_an_input_error_in_a_worker_reaches_the_user_as_it_is(tmp_path):
    """A full disk is for the user to mend, with the sentence that says so."""
    with pytest.raises(StoreError, match="no space left"):
        list(run_here(work, [Numbers(tmp_path, ("is full",))], workers=1, clip_seconds=60))


def test_a_bug_in_a_worker_is_loud(tmp_path):
    """A bug must not be taken for a broken clip."""
    with pytest.raises(RuntimeError, match="ZeroDivisionError: no sound divides by zero"):
        list(run_here(work, [Numbers(tmp_path, ("is a bug",))], workers=1, clip_seconds=60))
