"""Options, names for tab completion, and the handling of errors and signals, shared by ajepa-data and ajepa-train."""

import io
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from pipeline.errors import RUN_AGAIN_STATUS, STOP_SIGNALS, InputError, StopSignal, UnavailableError
from pipeline.files import DISK_FULL_ERRNOS, PARTIAL_SUFFIX, check_writable
from pipeline.messages import wrap_to_terminal

MAX_OPEN_FILES = 65_536  # the most that a command asks the system for

# Tab completion cannot wait for the modules that define these names; a test compares them with the definitions.
MEL_SPEC_NAMES = ("a-jepa", "a-jepa-16k", "audio-jepa", "panns", "convnext", "passt")

PROPAGATION_RULE_NAMES = ("unambiguous", "all-ancestors", "dominators", "direct-parent")


def complete_from(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a function for `autocompletion=`, which returns the names that begin with the typed text."""

    def matching_names(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return matching_names


def require_local_store(store: Path) -> Path:
    """Return the path of a store, or raise InputError if it is a URL; for use as a callback."""
    # `Path` keeps only one of the two slashes of a URL.
    if str(store).startswith(("s3:/", "gs:/", "http:/", "https:/")):
        raise InputError(
            f"{store}: is on an object store; copy it to a disk first, or give its staging folder"
        )
    return store


def count_cores() -> int:
    """Return the number of cores on which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_output_path(path: Path | None) -> Path | None:
    """Return the path of a file to write, or raise InputError before the work begins; for use as a callback."""
    if path is not None:
        check_writable(path)
    return path


def check_table_path(path: Path | None) -> Path | None:
    """Return the path of a table to write, or raise InputError before the work begins; for use as a callback."""
    from pipeline.table_files import refuse_other_suffix

    if path is not None:
        check_writable(refuse_other_suffix(path))
    return path


# The options that commands share.
StorePath = Annotated[
    Path, typer.Argument(help="Feature store, NAME.zarr.", show_default=False, callback=require_local_store)
]

StoreLocation = Annotated[
    str, typer.Argument(help="Feature store, NAME.zarr or s3://...", show_default=False)
]

WorkerCount = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Decoding processes; 0: this one, no crash protection.",
        show_default="one for each core",
    ),
]

CacheFolder = Annotated[
    Path | None, typer.Option(help="Folder for the cache of a store at s3://.", show_default=False)
]

CacheSizeGb = Annotated[float, typer.Option(min=0.001, help="Size limit of --cache, in 10^9 bytes.")]


def add_version_option(app: typer.Typer) -> None:
    """Give a command line the option --version, which prints the version of the package and ends."""

    def print_version(is_asked: bool) -> None:
        if is_asked:
            from importlib.metadata import version

            print(f"ajepa {version('ajepa')}")
            raise typer.Exit

    @app.callback()
    def take_common_options(
        version: Annotated[
            bool,
            typer.Option(
                "--version", is_eager=True, callback=print_version, help="Show the version and exit."
            ),
        ] = False,
    ) -> None:
        """Print the version, which the callback of the option does; commands have options of their own."""


def run_command_line(app: typer.Typer) -> NoReturn:
    """Run a command line; InputError prints one line and exits with status 1.

    An interruption, or a server that fails for now, exits with status 75.
    """
    sys.argv[1:] = [expand_home(argument) for argument in sys.argv[1:]]

    # A signal becomes an exception, so that files are closed and locks released at the end.
    for number in STOP_SIGNALS:
        signal.signal(number, _raise_interrupted)
    raise_open_file_limit()

    # Names of clips and classes are printed whatever the encoding of the terminal or pipe.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with ignoring_modules_of_user():
            app()
    except UnavailableError as error:
        _exit_with_message(f"error: {error}", RUN_AGAIN_STATUS)
    except InputError as error:
        _exit_with_message(f"error: {error}", 1)
    except BrokenPipeError:
        # The program that reads our output, such as head, has ended. Without this, Python prints an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        # For example a full disk, a read-only folder, or a file in place of a folder. Without a file name it is a bug.
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


def expand_home(argument: str) -> str:
    """Return an argument whose path begins with `~` with the home folder in its place, as a shell would.

    Shells leave `~` alone in quotes and in `--out=~/x.zarr`, and a folder named `~` is wanted by nobody.
    """
    option, equals, value = "", "", argument
    if argument.startswith("--"):
        option, equals, value = argument.partition("=")
    if not value.startswith("~"):
        return argument
    return option + equals + os.path.expanduser(value)


@contextmanager
def ignoring_modules_of_user() -> Iterator[None]:
    """Processes started in the block import no signal.py or types.py from the folder that the user is in."""
    previous = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = previous or "1"
    try:
        yield
    finally:
        if previous is None:
            del os.environ["PYTHONSAFEPATH"]


def describe_os_error(error: OSError) -> str:
    """Return one line that says what the system refused, for which file, and what to do."""
    name = str(error.filename)
    # For a scratch file, name the file that it would have become.
    if name.endswith(PARTIAL_SUFFIX):
        name = name.removesuffix(PARTIAL_SUFFIX).removesuffix(f".{socket.gethostname()}-{os.getpid()}")

    # Describe the user's mistake if the type of error shows it.
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{name}: is a file, or is inside one; expected a folder"
    if isinstance(error, IsADirectoryError):
        return f"{name}: is a folder; expected a file"
    return f"{name}: {error.strerror}; check the path and its permissions"


def raise_open_file_limit() -> None:
    """Let this process open more files: a reader keeps 256 shards open per store, and most systems allow only 1,024."""
    # Raising the soft limit up to the hard limit needs no special rights.
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft_limit, min(hard_limit, MAX_OPEN_FILES))
    with suppress(OSError, ValueError):  # macOS allows less than its hard limit says
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard_limit))


def _raise_interrupted(number: int, frame: object) -> NoReturn:
    raise StopSignal


def _exit_with_message(message: str, status: int) -> NoReturn:
    typer.secho(wrap_to_terminal(message, sys.stderr), fg="red", err=True)
    raise SystemExit(status) from None
