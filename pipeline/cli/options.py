"""Names that options take, read off the source of what defines them: the tab key cannot wait for it to load.

What both command lines share: their arguments for stores, and how a run of them ends.
"""

import ast
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from pipeline.errors import RUN_AGAIN_STATUS, STOP_SIGNALS, InputError, StopSignal
from pipeline.files import DISK_FULL_ERRNOS, PARTIAL_SUFFIX, check_writable
from pipeline.messages import wrap_to_terminal

PACKAGE = Path(__file__).parents[1]


def keys_in_source(file: Path, table: str) -> tuple[str, ...]:
    """The keys that a module writes out in its dict `table`, in their order; not those of dicts unpacked there."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Dict(keys=keys)) if name == table:
                return tuple(str(key.value) for key in keys if isinstance(key, ast.Constant))
    raise LookupError(f"{file}: has no dict {table}")


def names_in_source(file: Path) -> tuple[str, ...]:
    """Every text that a module gives as `name=`."""
    calls = (
        node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    )
    given = (word.value for call in calls for word in call.keywords if word.arg == "name")
    return tuple(str(value.value) for value in given if isinstance(value, ast.Constant))


def complete_from(names: Callable[[], Sequence[str]]) -> Callable[[str], list[str]]:
    """What the tab key offers for an option: those of the names that begin as what is typed."""

    def matching_names(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return matching_names


def mel_spec_names() -> tuple[str, ...]:
    """Mel specs."""
    return names_in_source(PACKAGE / "audio/mel_spec.py")


def propagation_rule_names() -> tuple[str, ...]:
    """Rules of propagation."""
    return keys_in_source(PACKAGE / "labels/propagation.py", "PROPAGATION_RULES")


MAX_OPEN_FILES = 65_536  # asked for at most


def require_local_store(store: Path) -> Path:
    if str(store).startswith(("s3:/", "gs:/", "http:/", "https:/")):
        raise InputError(
            f"{store}: lies on an object store; copy it to a disk first, or give its staging folder"
        )
    return store


StorePath = Annotated[
    Path, typer.Argument(help="Feature store, NAME.zarr.", show_default=False, callback=require_local_store)
]

StoreLocation = Annotated[
    str, typer.Argument(help="Feature store, NAME.zarr or s3://...", show_default=False)
]


def check_output_path(path: Path | None) -> Path | None:
    """Callback of options that name a file to write: told at once, and not after the work."""
    if path is not None:
        check_writable(path)
    return path


CacheFolder = Annotated[
    Path | None, typer.Option(help="Folder that keeps what was read from s3://.", show_default=False)
]

CacheSizeGb = Annotated[float, typer.Option(min=0.001, help="Most that --cache may take, in 10^9 bytes.")]


def run_command_line(app: typer.Typer) -> NoReturn:
    """Run a command line: our own errors become one line and exit status 1, an interruption one and status 75."""
    for number in STOP_SIGNALS:
        signal.signal(number, _raise_interrupted)
    raise_open_file_limit()
    try:
        app()
    except InputError as error:
        _exit_with_message(f"error: {error}", 1)
    except BrokenPipeError:  # whoever reads what is printed, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:  # a read-only folder, a full disk, a file where a folder should be
        if error.errno in DISK_FULL_ERRNOS:
            _exit_with_message(
                "error: no space left on the disk; free some and run the same command again", 1
            )
        if error.filename is None:
            raise
        _exit_with_message(f"error: {describe_os_error(error)}", 1)
    except StopSignal:
        _exit_with_message("interrupted; nothing is lost: the same command carries on", RUN_AGAIN_STATUS)
    raise SystemExit(0)


def describe_os_error(error: OSError) -> str:
    """What the system refused, where (scratch files by the name that they were to have), and what to look at."""
    name = str(error.filename)
    if name.endswith(PARTIAL_SUFFIX):
        name = name.removesuffix(PARTIAL_SUFFIX).removesuffix(f".{socket.gethostname()}-{os.getpid()}")
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{name}: is a file, or lies below one; expected a folder"
    if isinstance(error, IsADirectoryError):
        return f"{name}: is a folder; expected a file"
    return f"{name}: {error.strerror}; check the path and its permissions"


def raise_open_file_limit() -> None:
    """Let this process open more files: each store read from holds 256 shards, and most systems begin with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS has lower limits than it tells
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MAX_OPEN_FILES)), hard))


def _raise_interrupted(number: int, frame: object) -> NoReturn:
    raise StopSignal


def _exit_with_message(message: str, status: int) -> NoReturn:
    typer.secho(wrap_to_terminal(message, sys.stderr), fg="red", err=True)
    raise SystemExit(status) from None
