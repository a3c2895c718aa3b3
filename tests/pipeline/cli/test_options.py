"""Use of both command lines: help fits a screen, tab completion works, and both are fast."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import ajepa.cli
import ajepa.cli.app
import pipeline.cli
import pipeline.cli.app
from ajepa.evaluate.tasks import TASKS
from ajepa.model.classifier import CLASSIFIER_KINDS
from ajepa.recipes import pretrain
from ajepa.recipes.catalogue import FINETUNE_RECIPES
from ajepa.training.loggers import LOGGER_NAMES
from pipeline.audio.mel_spec import MEL_PRESETS
from pipeline.cli.options import (
    MEL_SPEC_NAMES,
    PROPAGATION_RULE_NAMES,
    check_output_path,
    describe_os_error,
    expand_home,
    run_command_line,
)
from pipeline.errors import InputError, UnavailableError
from pipeline.files import scratch_path
from pipeline.labels.propagation import PROPAGATION_RULES

BIN = Path(sys.executable).parent

PROGRAMS = {"ajepa-data": pipeline.cli.app.app, "ajepa-train": ajepa.cli.app.app}

COMMANDS = [
    (program, name, command)
    for program, app in PROGRAMS.items()
    for name, command in typer.main.get_command(app).commands.items()
]

UNITS = re.compile(
    r"second|\bs\b|clips?\b|steps?\b|epochs?\b|windows?\b|shards?\b|processes|threads|\b10\^9 bytes|share|trainings?"
    r"|rows?\b|spectrograms|fold\b|seeds?\b|order\b|how many|surprises",
    re.IGNORECASE,
)


def help_lines(program: str, *command: str) -> list[str]:
    """The lines that --help prints on a terminal of 80 columns."""
    result = CliRunner().invoke(
        PROGRAMS[program], [*command, "--help"], env={"COLUMNS": "80"}, prog_name=program
    )
    assert result.exit_code == 0
    return result.stdout.splitlines()


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_list_of_commands_says_what_each_does_in_a_whole_sentence(program):
    """A truncated sentence would hide the difference between two commands."""
    lines = help_lines(program)
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 30
    assert not [line for line in lines[1:] if line.endswith("...")]


@pytest.mark.parametrize(("program", "name", "command"), COMMANDS)
def test_help_fits_a_screen_and_has_an_example(program, name, command):
    """At most 80 columns and 45 lines, with an example to copy."""
    lines = help_lines(program, name)
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 45
    assert f"Example: {program} {name}" in " ".join(" ".join(lines).split())


@pytest.mark.parametrize(("program", "name", "command"), COMMANDS)
def test_the_example_can_be_typed(program, name, command, tmp_path, monkeypatch):
    """Its options exist, and all required ones are given."""
    monkeypatch.chdir(tmp_path)
    words = command.help.partition("Example: ")[2].split()[2:]
    for word in (word for word in words if "." not in word):
        Path(word).mkdir(parents=True, exist_ok=True)  # some commands check that their folders exist
    command.make_context(name, words)


def help_by_option(program: str, name: str) -> dict[str, str]:
    """The help of each option on one line, with its kind."""
    text = "\n".join(help_lines(program, name)).partition("Options:\n")[2]
    entries = re.split(r"^  (?=-)", text, flags=re.MULTILINE)[1:]
    return {entry.split()[0].rstrip(","): " ".join(entry.split()) for entry in entries}


@pytest.mark.parametrize(("program", "name", "command"), COMMANDS)
def test_every_option_has_a_text_its_default_and_its_unit(program, name, command):
    """Without unit and default, users would have to read the source."""
    texts = help_by_option(program, name)
    assert all(parameter.help for parameter in command.params)
    for parameter in command.params:
        text = texts.get(parameter.opts[0], "")
        if re.search(r"^\S+ <(int|float|list\[(int|float))", text):
            assert UNITS.search(text), text
        if text and parameter.default not in (None, False, ""):
            assert "[default: " in text, text


def completions(program: str, shell: str, *words: str) -> str:
    """The completions that the program offers while the last of `words` is being typed."""
    variables = {
        f"_{program.upper().replace('-', '_')}_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": " ".join([program, *words]),
        "COMP_CWORD": str(len(words)),
        "_TYPER_COMPLETE_ARGS": " ".join([program, *words]),
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    process = subprocess.run(
        [BIN / program], env=os.environ | variables, capture_output=True, text=True, check=True
    )
    assert not process.stderr
    return process.stdout


@pytest.mark.parametrize(
    ("shell", "words", "offered", "other"),
    [
        ("bash", ["ajepa-data", "ver"], "verify", "report"),
        ("zsh", ["ajepa-data", "ver"], "verify", "report"),
        ("fish", ["ajepa-data", "ver"], "verify", "report"),
        ("bash", ["ajepa-data", "build-audioset", "--seg"], "--segments", "--audio"),
        ("zsh", ["ajepa-data", "build-audioset", "--seg"], "--segments", "--audio"),
        ("fish", ["ajepa-data", "build-audioset", "--seg"], "--segments", "--audio"),
        ("bash", ["ajepa-train", "fine"], "finetune", "pretrain"),
        ("zsh", ["ajepa-train", "pretrain", "--device", "c"], "cuda", "auto"),
        ("fish", ["ajepa-train", "finetune", "--task", "esc"], "esc50", "audioset"),
        ("bash", ["ajepa-data", "build-audioset", "--spec", "a-jepa-"], "a-jepa-16k", "audio-jepa"),
    ],
)
def test_the_tab_key_completes_commands_options_and_choices(shell, words, offered, other):
    """Words that begin with the text typed so far, and no others."""
    answer = completions(words[0], shell, *words[1:])
    assert offered in answer
    assert other not in answer


@pytest.mark.parametrize(
    ("program", "command", "option", "known"),
    [
        ("ajepa-train", "pretrain", "recipe", pretrain.PRETRAIN_RECIPES),
        ("ajepa-train", "masks", "recipe", pretrain.PRETRAIN_RECIPES),
        ("ajepa-train", "finetune", "recipe", FINETUNE_RECIPES),
        ("ajepa-train", "finetune", "task", TASKS),
        ("ajepa-train", "finetune", "model", CLASSIFIER_KINDS),
        ("ajepa-train", "pretrain", "logger", LOGGER_NAMES),
        ("ajepa-train", "hlp-study", "rule", PROPAGATION_RULES),
        ("ajepa-data", "propagate-labels", "rule", PROPAGATION_RULES),
        ("ajepa-data", "build-fsd50k", "spec", MEL_PRESETS),
    ],
)
def test_the_tab_key_offers_every_name_that_there_is(program, command, option, known):
    """No name is missing, and none is offered that no longer exists."""
    command = typer.main.get_command(PROGRAMS[program]).commands[command]
    (parameter,) = (parameter for parameter in command.params if parameter.name == option)
    context = command.make_context(command.name, [], resilient_parsing=True)

    def offered(typed: str) -> list[str]:
        return sorted(item.value for item in parameter.shell_complete(context, typed))

    assert offered("") == sorted(known)
    assert offered("a") == sorted(name for name in known if name.startswith("a"))


def test_the_names_that_options_list_are_those_of_the_tables():
    """The names are written twice, because tab completion cannot wait for the modules that define them."""
    assert tuple(MEL_PRESETS) == MEL_SPEC_NAMES
    assert tuple(PROPAGATION_RULES) == PROPAGATION_RULE_NAMES


@pytest.mark.parametrize("program", PROGRAMS)
def test_bash_completes_with_the_script_that_it_is_given(program):
    """The script that `--install-completion` writes is sourced, then used by the shell itself."""
    typed = f"{BIN / program} --show-completion; exit $?"  # the shell that is detected is the one that asks
    script = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, check=True)
    name = f"_{program.replace('-', '_')}_completion"
    press_tab = f"COMP_WORDS=({program} rep); COMP_CWORD=1; {name} {program}; echo ${{COMPREPLY[@]}}"
    path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    pressed_tab = subprocess.run(
        ["bash", "-c", f"{script.stdout}\n{press_tab}"],
        env=os.environ | path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert pressed_tab.stdout == "report\n"


@pytest.mark.parametrize("module", ["pipeline.cli.app", "ajepa.cli.app"])
def test_help_and_the_tab_key_do_not_wait_for_heavy_libraries(module):
    """Half a second at most: torch alone takes several."""
    heavy = "{'torch', 'numpy', 'polars', 'pyarrow', 'matplotlib', 'sklearn', 'scipy', 'nvidia', 'zarr', 'av', 'rich'}"
    program = f"import sys, {module}; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_build_leaves_torch_to_its_workers():
    """They need it for their first clip; if the process that starts them imported it too, they would start later."""
    program = "import sys, pipeline.build.build; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("there", "there: is a folder; expected the name of a file to write"),
        ("file/x.csv", "file is a file; expected a folder"),
        ("shut/x.csv", "shut/x.csv: nothing can be written in "),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, where, said):
    """The error comes before the work, not hours later. A missing folder is no error: it is created."""
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("file").write_text("")
    Path("shut").mkdir()
    monkeypatch.setattr(os, "access", lambda folder, mode: folder.name != "shut")  # root may write anywhere
    with pytest.raises(InputError, match=re.escape(said)):
        check_output_path(Path(where))
    assert check_output_path(Path("new/folder/x.csv")) == Path("new/folder/x.csv")
    assert check_output_path(None) is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileExistsError(17, "File exists", "x"), "x: is a file, or is inside one; expected a folder"),
        (IsADirectoryError(21, "Is a directory", "x"), "x: is a folder; expected a file"),
        (
            PermissionError(13, "Permission denied", "x"),
            "x: Permission denied; check the path and its permissions",
        ),
        (
            OSError(30, "Read-only file system", str(scratch_path(Path("x")))),
            "x: Read-only file system; check the path",
        ),
    ],
)
def test_an_error_of_the_system_is_explained_in_words(error, said):
    """It names the file that the user gave, not the scratch file beside it."""
    assert describe_os_error(error).startswith(said)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("~/x.zarr", "{home}/x.zarr"),
        ("~", "{home}"),
        ("--out=~/x.zarr", "--out={home}/x.zarr"),
        ("--out", "--out"),
        ("x~/y", "x~/y"),
        ("--set=a=~b", "--set=a=~b"),
    ],
)
def test_a_tilde_means_home_where_no_shell_has_said_so(argument, expected):
    """A folder named ~ is wanted by nobody, and `rm -r ~` is how people remove it."""
    assert expand_home(argument) == expected.format(home=Path.home())


def test_a_server_that_fails_for_now_ends_with_the_status_of_run_me_again(monkeypatch, capsys):
    """Batch scripts requeue a job by this status."""
    failing = typer.Typer()

    @failing.command()
    def build() -> None:
        raise UnavailableError("s3://bucket/x: AWS Error SLOW_DOWN")

    monkeypatch.setattr(sys, "argv", ["ajepa-data"])
    with pytest.raises(SystemExit) as stop:
        run_command_line(failing)
    assert stop.value.code == 75
    assert "SLOW_DOWN" in capsys.readouterr().err
