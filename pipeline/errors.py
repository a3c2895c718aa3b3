"""The errors that a user can act on: InputError and its kinds; the signals that stop a run, and what it exits with."""

import signal
from pathlib import Path

# Ctrl-C, `kill`, and the signal by which batch systems warn that the time is nearly over.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# EX_TEMPFAIL of sysexits.h: interrupted with nothing lost; the same command carries on.
RUN_AGAIN_STATUS = 75


class InputError(Exception):
    """Something outside the program is wrong; the text is one line: what, where, expected, what to do next.

    The command lines print it as `error: ...` and exit with status 1; a traceback is for bugs only.
    """


class AudioError(InputError):
    """One clip could not be used: `reason` is a key of `pipeline.store.manifest.FAILURE_REASONS`, the text says why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class ManifestError(InputError):
    """A segments list, class list or manifest is not in the form that is expected of it."""


class OntologyError(InputError):
    """A class tree or label set contradicts itself."""


class StoreError(InputError):
    """A feature store is absent, damaged, of another kind than expected, or in use."""


class BrokenClipError(StoreError):
    """A clip that a store should hold cannot be read as it was written; `row` is its row of the store."""

    def __init__(self, row: int, text: str) -> None:
        super().__init__(text)
        self.row = row

    def __reduce__(self) -> tuple[object, ...]:
        # Loading processes pickle this error, and by default pickle would call the class with the text alone.
        return BrokenClipError, (self.row, str(self))


class RunError(InputError):
    """A training run, its recipe or its device does not fit the command."""


class StopSignal(BaseException):
    """One of STOP_SIGNALS has come: stop as soon as nothing is lost. Not an error, so only a command catches it."""


def archive_error(path: Path, error: BaseException) -> AudioError:
    """The error of one clip whose archive cannot be read."""
    if isinstance(error, FileNotFoundError):
        return AudioError("missing", f"{path.name} is gone; fetch it again")
    return AudioError(
        "unreadable", f"{path.name} cannot be read ({first_error_line(error, path)}); fetch it again"
    )


def first_error_line(error: BaseException, path: Path) -> str:
    """The first line of a library's error about a file, with the file's name in place of its whole path."""
    # Later lines are guesses and advice for the library's own users; some errors have no text at all.
    lines = str(error).replace(str(path), path.name).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
