"""Errors that a user can act on (InputError and its subclasses), signals that stop a run, and its exit status."""

import signal
from pathlib import Path

# Ctrl-C, `kill`, and the signal by which batch systems warn that a job's time is nearly over.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# EX_TEMPFAIL of sysexits.h: the run was interrupted, nothing is lost, and the same command continues it.
RUN_AGAIN_STATUS = 75


class InputError(Exception):
    """Something outside the program is wrong; one line says what, where, what was expected and what to do next.

    The commands print the line as `error: ...` and exit with status 1; tracebacks are for bugs only.
    """


class UnavailableError(InputError):
    """A server does not answer, or says that it cannot for now; the same command carries on once it does."""


class AudioError(InputError):
    """One clip cannot be used: `reason` is a key of `pipeline.store.manifest.FAILURE_REASONS`, the text explains it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class UnexpectedAudioError(AudioError):
    """One clip cannot be used because of an exception that nobody expected; `fault` is the exception's name."""

    def __init__(self, detail: str, fault: str) -> None:
        super().__init__("unreadable", detail)
        self.fault = fault


class ManifestError(InputError):
    """A segments list, class list or manifest does not have the expected form."""


class OntologyError(InputError):
    """A class tree or label set contradicts itself."""


class StoreError(InputError):
    """A feature store is absent, damaged, of another kind than expected, or in use."""


class BrokenClipError(StoreError):
    """A clip of a store cannot be read, or differs from what was written; `row` is its row in the store."""

    def __init__(self, row: int, text: str) -> None:
        super().__init__(text)
        self.row = row

    def __reduce__(self) -> tuple[object, ...]:
        # Loader processes pickle this error; without this method, pickle would call the class with the text alone.
        return BrokenClipError, (self.row, str(self))


class RunError(InputError):
    """A training run, its recipe or its device does not fit the command."""


class StopSignal(BaseException):
    """One of STOP_SIGNALS arrived: stop as soon as nothing would be lost. It is no error; only commands catch it."""


def archive_error(path: Path, error: BaseException) -> AudioError:
    """Return the error for a clip whose archive cannot be read."""
    if isinstance(error, FileNotFoundError):
        return AudioError("missing", f"{path.name} is gone; fetch it again")
    return AudioError(
        "unreadable", f"{path.name} cannot be read ({first_error_line(error, path)}); fetch it again"
    )


def first_error_line(error: BaseException, path: Path) -> str:
    """Return the first line of a library's error about a file, with the file's name in place of its whole path."""
    # Later lines are guesses and advice for the library's own users; some errors have no text at all.
    lines = str(error).replace(str(path), path.name).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
