"""README and documentation cannot drift: what they name exists, and what exists they name."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
from pages import PAGES

import ajepa.cli
import ajepa.cli.app
import pipeline.cli
import pipeline.cli.app

ROOT = Path(__file__).parents[1]

README = PAGES["README.md"]

COMMAND_TABLE = PAGES["docs/commands.md"]

JUSTFILE = (ROOT / "justfile").read_text()

APPS = {"ajepa-data": pipeline.cli.app.app, "ajepa-train": ajepa.cli.app.app}

APPS_FOLDERS = ("pipeline", "ajepa")

COMMANDS = [
    f"{program} {name} "
    for program, app in APPS.items()
    for name in sorted(typer.main.get_command(app).commands)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_table_of_commands(command):
    """A command that nobody reads of is a command that nobody uses."""
    assert command in COMMAND_TABLE


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_exists(page):
    """Nor may a page promise what is not there."""
    named = set(re.findall(r"(?<![\w/-])(ajepa-(?:data|train) [a-z][a-z0-9-]+)", PAGES[page]))
    assert {f"{name} " for name in named} <= set(COMMANDS)


def option_names(command: typer.core.TyperCommand) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("page", PAGES)
def test_every_option_of_a_page_exists(page):
    """A renamed option would break the reader's first try."""
    options = {"--install-completion", "--help"}
    for app in APPS.values():
        program = typer.main.get_command(app)
        for command in (program, *program.commands.values()):
            options |= option_names(command)
    others = (
        r"^#SBATCH .*$|^srun .*?(?=ajepa-)|torchrun [^`]*?(?=ajepa-)|^pip install.*$"
        r"|`(?:tensorboard|AJEPA_MODEL|just bench|python -m bench|hear-validator|pip install)[^`]*`"
    )
    ours = re.sub(others, "", PAGES[page], flags=re.MULTILINE)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)) <= options


@pytest.mark.parametrize("line", re.findall(r"^    (ajepa-.*)$", JUSTFILE, re.MULTILINE))
def test_the_lines_of_just_demo_can_be_typed(line):
    """The demo takes minutes, so no test runs it; its commands and options are at least there."""
    program, name, *words = shlex.split(line)
    typer.main.get_command(APPS[program]).commands[name].make_context(name, words)


def test_the_readme_is_short():
    """It is read in one go; what is longer is a page of docs/."""
    assert len(README.splitlines()) <= 130


def test_ci_runs_the_readmes_test_command():
    """One way to run the tests, for people and machines."""
    command = "pip install rust-just && just test"
    assert command in README
    assert command.replace("install", "install --quiet") in (ROOT / ".ci" / "run").read_text()


def test_the_tested_versions_satisfy_the_declared_ones():
    """`constraints.txt` pins what pyproject.toml asks for."""
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["dev"], *extras["docs"]]
    assert {re.split(r"[\[><=;\s]", name)[0].lower() for name in asked} <= pinned | {"ajepa"}


def test_the_map_is_the_tree():
    """Every folder of code has its line in the map, and every file that the map or CONTRIBUTING names is there."""
    map_text = PAGES["docs/map.md"]
    folders = set(re.findall(r"^  ([a-z]+)/ ", map_text, flags=re.MULTILINE))
    there = {path.parent.name for package in APPS_FOLDERS for path in (ROOT / package).glob("*/__init__.py")}
    assert folders == there
    text = map_text + (ROOT / "CONTRIBUTING.md").read_text()
    for path in re.findall(r"`((?:pipeline|ajepa|tests)/[\w/]+(?:\.py|/)?)`", text):
        assert (ROOT / path).exists(), path
