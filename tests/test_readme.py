"""The README cannot drift: what it names exists, and what exists it names."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

import ajepa.cli
import ajepa.cli.app
import pipeline.cli
import pipeline.cli.app

ROOT = Path(__file__).parents[1]

README = (ROOT / "README.md").read_text()

JUSTFILE = (ROOT / "justfile").read_text()

APPS = {"ajepa-data": pipeline.cli.app.app, "ajepa-train": ajepa.cli.app.app}

APPS_FOLDERS = ("pipeline", "ajepa")

COMMANDS = [
    f"{program} {name} "
    for program, app in APPS.items()
    for name in sorted(typer.main.get_command(app).commands)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command):
    """A command that nobody reads of is a command that nobody uses."""
    assert command in README


def test_every_command_of_the_readme_exists():
    """Nor may it promise what is not there."""
    named = set(re.findall(r"^(?:\| `)?(ajepa-(?:data|train) [a-z0-9-]+)", README, flags=re.MULTILINE))
    assert {f"{name} " for name in named} <= set(COMMANDS)


def test_every_option_of_the_readme_exists():
    """A renamed option would break the reader's first try."""
    options = set()
    for app in APPS.values():
        program = typer.main.get_command(app)
        for command in (program, *program.commands.values()):
            options |= {opt for parameter in command.params for opt in parameter.opts}
    others = r"^#SBATCH .*$|^srun .*?(?=ajepa-)|torchrun [^`]*?(?=ajepa-)|`(?:tensorboard|AJEPA_MODEL|just bench).*?`"
    ours = re.sub(others, "", README, flags=re.MULTILINE)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)) <= options


@pytest.mark.parametrize("line", re.findall(r"^    (ajepa-.*)$", JUSTFILE, re.MULTILINE))
def test_the_lines_of_just_demo_can_be_typed(line):
    """The demo takes minutes, so no test runs it; its commands and options are at least there."""
    program, name, *words = shlex.split(line)
    typer.main.get_command(APPS[program]).commands[name].make_context(name, words)


def test_ci_runs_the_readmes_test_command():
    """One way to run the tests, for people and machines."""
    command = "pip install rust-just && just test"
    assert command in README
    assert command.replace("install", "install --quiet") in (ROOT / ".ci" / "run").read_text()


def test_the_tested_versions_satisfy_the_declared_ones():
    """`constraints.txt` pins what pyproject.toml asks for."""
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {re.split(r"[\[><=;\s]", name)[0].lower() for name in asked} <= pinned | {"ajepa"}


def test_the_map_is_the_tree():
    """Every folder of code has its line in the map, and every file that the map or CONTRIBUTING names is there."""
    map_text = README.split("## The map")[1].split("\n## ")[0]
    folders = set(re.findall(r"^  ([a-z]+)/ ", map_text, flags=re.MULTILINE))
    there = {path.parent.name for package in APPS_FOLDERS for path in (ROOT / package).glob("*/__init__.py")}
    assert folders == there
    text = map_text + (ROOT / "CONTRIBUTING.md").read_text()
    for path in re.findall(r"`((?:pipeline|ajepa|tests)/[\w/]+(?:\.py|/)?)`", text):
        assert (ROOT / path).exists(), path
