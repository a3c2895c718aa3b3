"""InputError: what a user can act on, and its few kinds."""

import signal
from pathlib import Path

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last: a batch system's warning


class InputError(Exception):
    """Something outside the program is wrong; its text is one line: what, where, expected, what to do next.

    The command lines print it as `error: ...` and exit with status 1; a traceback is for bugs only.
    """


class AudioError(InputError):
    """One clip could not be used: `reason` is one of `pipeline.manifest.REASONS`, the text says why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def archive_error(path: Path, error: BaseException) -> AudioError:
    """What it means for a clip that the archive which holds it cannot be read."""
    if isinstance(error, FileNotFoundError):
        return AudioError("missing", f"{path.name} is gone; fetch it again")
    return AudioError(
        "unreadable", f"{path.name} cannot be read ({first_error_line(error, path)}); fetch it again"
    )


def first_error_line(error: BaseException, path: Path) -> str:
    """What a library says about a file, without its second thoughts and without the folders."""
    lines = str(error).replace(str(path), path.name).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


class ManifestError(InputError):
    """A segments list, class list or manifest is not what it should be."""


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
        return BrokenClipError, (self.row, str(self))  # it comes from other processes too


class RunError(InputError):
    """A training run, its recipe or its device is not what was asked for."""


class StopSignal(BaseException):
    """One of STOP_SIGNALS: stop as soon as nothing is lost. Not an error, and nobody's to swallow."""


RUN_AGAIN_STATUS = 75  # EX_TEMPFAIL: interrupted with nothing lost; the same command carries on
