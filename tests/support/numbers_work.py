"""Work for worker processes to do, to die of, or to hang on."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.errors import StoreError


@dataclass(frozen=True)
class Numbers:
    """Rows to touch a file for, each after the name of what happens on it."""

    folder: Path
    rows: tuple[str, ...]
    failed: dict[int, str] = field(default_factory=dict)

    def with_failed_row(self, row, reason, detail):
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
