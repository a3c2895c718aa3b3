"""A command of ajepa-data, run in this process."""

import sys

import pytest

from pipeline.cli import app as cli


def run(*arguments, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["ajepa-data", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0
