"""Messages on stderr: wrapped on a terminal, one line each in files and pipes; suggestions for typing errors."""

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
from pipeline.messages import (
    count_phrase,
    did_you_mean,
    print_to_stderr,
    suggest_known,
    wrap_to_terminal,
)

LONG = (
    "error: /data/stores/as20k.zarr: holds mel spec panns (64 bands, 0f1e2d3c4b5a), recipe a-jepa needs a-jepa "
    "(128 bands); build a store with --spec a-jepa"
)


@pytest.fixture
def terminal():
    """Both ends of a terminal: the stream that a program writes to, and the descriptor that reads the screen."""
    screen, inner = pty.openpty()
    with open(inner, "w", buffering=1) as stream:
        yield stream, screen
    os.close(screen)


@pytest.fixture
def own_signals():
    """Restore the signal handlers that `run_command_line` replaces, because pytest needs them."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def resize(screen: int, columns: int) -> None:
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def read_screen(screen: int, lines: int) -> str:
    """Read `count` lines from the screen, or fewer if no more arrive within ten seconds."""
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
    """A path, hyphens included, must stay copyable."""
    stream, screen = terminal
    resize(screen, 40)
    path = "/data/" + "a-long-name/" * 8 + "clip.wav"
    assert path in wrap_to_terminal(f"skipped: {path}: unreadable", stream).splitlines()[1].strip()


def test_a_terminal_that_does_not_know_its_width_has_80_columns(terminal):
    """Some terminals in containers report a width of 0."""
    stream, screen = terminal
    resize(screen, 0)
    assert 70 < max(map(len, wrap_to_terminal(LONG, stream).splitlines())) <= 80


def test_text_that_fits_stays_as_it_is(terminal):
    stream, screen = terminal
    resize(screen, 80)
    assert wrap_to_terminal("short:  two  spaces\nand more", stream) == "short:  two  spaces\nand more"


def test_a_file_or_a_pipe_is_given_one_line():
    """A log is searched line by line, so a message must not be wrapped there."""
    assert wrap_to_terminal(LONG, io.StringIO()) == LONG


def test_errors_and_messages_are_fitted_alike(terminal, monkeypatch, own_signals):
    """The final error of a command is wrapped in the same way as the messages of runs and loaders."""
    stream, screen = terminal
    resize(screen, 60)
    monkeypatch.setattr(sys, "stderr", stream)

    def failing() -> None:
        print_to_stderr(LONG)
        raise InputError(LONG.removeprefix("error: "))

    with pytest.raises(SystemExit):
        run_command_line(failing)  # type: ignore[arg-type]
    expected = 2 * (wrap_to_terminal(LONG, stream) + "\n")
    shown = read_screen(screen, expected.count("\n"))
    assert shown.replace("\x1b[31m", "").replace("\x1b[0m", "").strip() == expected.strip()
    assert expected.count("\n") == 6


def test_a_line_stands_alone_beside_a_progress_bar(capsys):
    """A message about skipped clips must be readable while a progress bar is drawn on the same terminal."""
    with tqdm(total=10, file=sys.stderr):
        print_to_stderr("skipped: row 3")
    assert "skipped: row 3\n" in capsys.readouterr().err.split("\r")


def test_a_number_and_its_noun_agree():
    """Findings and summaries are sentences."""
    phrases = [count_phrase(count, noun) for count, noun in ((1, "class"), (0, "class"), (2_000, "clip"))]
    assert phrases == ["1 class", "0 classes", "2,000 clips"]


def test_a_misspelt_word_is_answered_with_the_nearest_and_with_all():
    """This holds even if no word is similar; without any known word, the message says so."""
    assert suggest_known("evals", ["train", "eval"]) == "did you mean 'eval'? There are: train, eval"
    assert suggest_known("?", ["train"], there_are="It has") == "did you mean 'train'? It has: train"
    assert suggest_known("evals", []) == "there is none"


def test_a_path_that_does_not_exist_is_answered_with_a_similar_neighbour(tmp_path):
    """The suggestion is empty if no entry of the folder is similar, or if the folder does not exist."""
    (tmp_path / "eval.csv").touch()
    assert did_you_mean(tmp_path / "evil.csv") == f"; did you mean {tmp_path / 'eval.csv'}?"
    assert did_you_mean(tmp_path / "xyz") == did_you_mean(tmp_path / "no" / "x") == ""
