"""Functions in processes of their own that are forked from one with torch imported: no process imports it again.

Importing torch, and what its optimisers import, takes five to six CPU seconds; a run of a few steps takes one or two.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from multiprocessing.forkserver import ensure_running, set_forkserver_preload
from pathlib import Path
from typing import Any

import pytest

FORKSERVER = multiprocessing.get_context("forkserver")

SUPPORT = Path(__file__).parent


def start_forked(
    function: Callable[..., Any], *arguments: Any, output: Path, environment: Mapping[str, str]
) -> ForkServerProcess:
    """Start `function(*arguments)` in a process whose environment is `environment`; what it prints goes to `output`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        set_forkserver_preload(["forked_imports"])
        ensure_running()
    process = FORKSERVER.Process(
        target=run_forked, args=(function, arguments, str(output), dict(environment))
    )
    process.start()
    return process


def run_forked(
    function: Callable[..., Any], arguments: tuple, output: str, environment: dict[str, str]
) -> None:
    """Call the function in a process that has just been forked."""
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    function(*arguments)


def start_command(
    *words: str, folder: Path, output: Path, environment: Mapping[str, str] = os.environ
) -> ForkServerProcess:
    """Start ajepa-train with these words in a folder; what it prints goes to `output`, its errors to `output`.err."""
    return start_forked(
        call_command, words, str(folder), f"{output}.err", output=output, environment=environment
    )


def run_command(
    *words: str, folder: Path, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run ajepa-train with these words in a folder, as a process of its own, to its end."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "output")
        process = start_command(*words, folder=folder, output=output, environment=environment)
        process.join()
        assert process.exitcode is not None
        printed, errors = output.read_text(), Path(f"{output}.err").read_text()
    return subprocess.CompletedProcess(words, process.exitcode, printed, errors)


def call_command(words: tuple[str, ...], folder: str, errors: str) -> None:
    """Be the program ajepa-train."""
    from ajepa.cli.app import main

    os.chdir(folder)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    sys.argv = ["ajepa-train", *words]
    main()
