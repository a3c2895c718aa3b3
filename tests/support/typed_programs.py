"""Lines of a shell and blocks of Python as a user types them, in processes that are forked: use `start_forked`."""

import os
import sys
from importlib import import_module
from pathlib import Path

from pages import command_words

MODULES = {"ajepa-data": "pipeline.cli.app", "ajepa-train": "ajepa.cli.app"}


def run_line(line: str, folder: Path) -> None:
    """Run the program that a line calls, with its arguments, from `folder`; ends as the program does."""
    os.chdir(folder)
    program, *words = command_words(line)
    sys.argv = [program, *words]
    import_module(MODULES[program]).main()


def run_python(text: str, folder: Path) -> None:
    """Run a block of Python from `folder`."""
    os.chdir(folder)
    exec(compile(text, "block", "exec"), {})
