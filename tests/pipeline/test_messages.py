"""What is told on stderr: readable at a terminal, one line wherever a program reads it."""

import fcntl
import io
import os
import pty
import select
import signal
import struct
import sys
import termios

import pytest
from tqdm import tqdm

from pipeline.cli.options import run_command_line
from pipeline.errors import STOP_SIGNALS, InputError
from pipeline.messages import print_to_stderr, wrap_to_terminal

LONG = (
    "error: /data/stores/as20k.zarr: holds mel spec panns (64 bands, 0f1e2d3c4b5a), recipe a-jepa needs a-jepa "
    "(128 bands); build a store with --spec a-jepa"
)


@pytest.fixture
def terminal():
    """Both ends of a terminal: what a program writes to, and what the screen is given."""
    screen, inner = pty.openpty()
    with open(inner, "w", buffering=1) as stream:
        yield stream, screen
    os.close(screen)


@pytest.fixture
def own_signals():
    """run_app takes these; pytest wants them back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def resize(screen: int, columns: int) -> None:
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def on_the_screen(screen: int, lines: int) -> str:
    """What was written to the terminal, so many lines of it; less where no more comes within ten seconds."""
    shown = b""
    while shown.count(b"\n") < lines and select.select([screen], [], [], 10.0)[0]:
        shown += os.read(screen, 4096)
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [40, 80, 100])
def test_a_line_longer_than_the_terminal_breaks_between_words(terminal, columns):
    """A word cut in two at the edge can neither be read nor copied."""
    stream, screen = terminal
    resize(screen, columns)
    lines = wrap_to_terminal(LONG, stream).splitlines()
    assert max(map(len, lines)) <= columns
    assert " ".join(line.strip() for line in lines) == LONG
    assert all(line.startswith("  ") for line in lines[1:])


def test_a_path_longer_than_the_terminal_stays_whole(terminal):
    """To be copied, with its hyphens."""
    stream, screen = terminal
    resize(screen, 40)
    path = "/data/" + "a-long-name/" * 8 + "clip.wav"
    assert path in wrap_to_terminal(f"skipped: {path}: unreadable", stream).splitlines()[1].strip()


def test_a_terminal_that_does_not_know_its_width_has_80_columns(terminal):
    """As some have in containers: 0 is what they answer."""
    stream, screen = terminal
    resize(screen, 0)
    assert 70 < max(map(len, wrap_to_terminal(LONG, stream).splitlines())) <= 80


def test_what_fits_stays_as_it_is(terminal):
    stream, screen = terminal
    resize(screen, 80)
    assert wrap_to_terminal("short:  two  spaces\nand more", stream) == "short:  two  spaces\nand more"


def test_a_file_or_a_pipe_is_given_one_line():
    """Logs are searched line by line."""
    assert wrap_to_terminal(LONG, io.StringIO()) == LONG


def test_errors_and_told_lines_are_fitted_alike(terminal, monkeypatch, own_signals):
    """The command line's last word, and what runs and loaders say."""
    stream, screen = terminal
    resize(screen, 60)
    monkeypatch.setattr(sys, "stderr", stream)

    def failing() -> None:
        print_to_stderr(LONG)
        raise InputError(LONG.removeprefix("error: "))

    with pytest.raises(SystemExit):
        run_command_line(failing)  # type: ignore[arg-type]
    told = 2 * (wrap_to_terminal(LONG, stream) + "\n")
    shown = on_the_screen(screen, told.count("\n"))
    assert shown.replace("\x1b[31m", "").replace("\x1b[0m", "").strip() == told.strip()
    assert told.count("\n") == 6


def test_a_line_stands_alone_beside_a_progress_bar(capsys):
    """What was skipped must be readable while a trainer's bar is drawn on the same terminal."""
    with tqdm(total=10, file=sys.stderr):
        print_to_stderr("skipped: row 3")
    assert "skipped: row 3\n" in capsys.readouterr().err.split("\r")
