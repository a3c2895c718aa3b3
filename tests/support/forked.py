"""Functions in processes of their own that are forked from one with torch imported: no process imports it again.

Importing torch, and what its optimisers import, takes five to six CPU seconds; a run of a few steps takes one or two.
"""

import multiprocessing
import os
import sys
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
