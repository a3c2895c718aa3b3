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

from pipeline.errors import RUN_AGAIN, STOP_SIGNALS, InputError, Interrupted
from pipeline.files import FULL, PARTIAL, refuse_unwritable
from pipeline.messages import fitted

PACKAGE = Path(__file__).parents[1]


def keys_of(file: Path, table: str) -> tuple[str, ...]:
    """The keys that a module writes out in its dict `table`, in their order; not those of dicts unpacked there."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Dict(keys=keys)) if name == table:
                return tuple(str(key.value) for key in keys if isinstance(key, ast.Constant))
    raise LookupError(f"{file}: has no dict {table}")


def names_in(file: Path) -> tuple[str, ...]:
    """Every text that a module gives as `name=`."""
    calls = (
        node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    )
    given = (word.value for call in calls for word in call.keywords if word.arg == "name")
    return tuple(str(value.value) for value in given if isinstance(value, ast.Constant))


def completing(names: Callable[[], Sequence[str]]) -> Callable[[str], list[str]]:
    """What the tab key offers for an option: those of the names that begin as what is typed."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def specs() -> tuple[str, ...]:
    """Mel specs."""
    return names_in(PACKAGE / "audio/mel_spec.py")


def rules() -> tuple[str, ...]:
    """Rules of propagation."""
    return keys_of(PACKAGE / "labels/propagation.py", "RULES")


OPEN_FILES = 65_536  # asked for at most


def on_a_disk(store: Path) -> Path:
    if str(store).startswith(("s3:/", "gs:/", "http:/", "https:/")):
        raise InputError(
            f"{store}: lies on an object store; copy it to a disk first, or give its staging folder"
        )
    return store


StorePath = Annotated[
    Path, typer.Argument(help="Feature store, NAME.zarr.", show_default=False, callback=on_a_disk)
]

StorePlace = Annotated[str, typer.Argument(help="Feature store, NAME.zarr or s3://...", show_default=False)]


def to_write(path: Path | None) -> Path | None:
    """Callback of options that name a file to write: told at once, and not after the work."""
    if path is not None:
        refuse_unwritable(path)
    return path


Cache = Annotated[
    Path | None, typer.Option(help="Folder that keeps what was read from s3://.", show_default=False)
]

CacheGb = Annotated[float, typer.Option(min=0.001, help="Most that --cache may take, in 10^9 bytes.")]


def run_app(app: typer.Typer) -> NoReturn:
    """Run a command line: our own errors become one line and exit status 1, an interruption one and status 75."""
    for number in STOP_SIGNALS:
        signal.signal(number, _interrupt)
    raise_open_files()
    try:
        app()
    except InputError as error:
        _fail(f"error: {error}", 1)
    except BrokenPipeError:  # whoever reads what is printed, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:  # a read-only folder, a full disk, a file where a folder should be
        if error.errno in FULL:
            _fail("error: no space left on the disk; free some and run the same command again", 1)
        if error.filename is None:
            raise
        _fail(f"error: {told_of(error)}", 1)
    except Interrupted:
        _fail("interrupted; nothing is lost: the same command carries on", RUN_AGAIN)
    raise SystemExit(0)


def told_of(error: OSError) -> str:
    """What the system refused, where (scratch files by the name that they were to have), and what to look at."""
    name = str(error.filename)
    if name.endswith(PARTIAL):
        name = name.removesuffix(PARTIAL).removesuffix(f".{socket.gethostname()}-{os.getpid()}")
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{name}: is a file, or lies below one; expected a folder"
    if isinstance(error, IsADirectoryError):
        return f"{name}: is a folder; expected a file"
    return f"{name}: {error.strerror}; check the path and its permissions"


def raise_open_files() -> None:
    """Let this process open more files: each store read from holds 256 shards, and most systems begin with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS has lower limits than it tells
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, OPEN_FILES)), hard))


def _interrupt(number: int, frame: object) -> NoReturn:
    raise Interrupted


def _fail(message: str, status: int) -> NoReturn:
    typer.secho(fitted(message, sys.stderr), fg="red", err=True)
    raise SystemExit(status) from None
