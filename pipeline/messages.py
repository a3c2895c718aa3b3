"""Messages for the user: lines on stderr, fitted to a terminal, and the nearest name to one that does not exist."""

import difflib
import os
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

# The width of a terminal that does not know its own, as some in containers.
DEFAULT_COLUMNS = 80


def print_to_stderr(line: str) -> None:
    """Print a line on stderr, beside a progress bar rather than into it: the default `say` of loaders and runs."""
    # Imported late, because `--help` and the tab key do not need it.
    from tqdm import tqdm

    tqdm.write(wrap_to_terminal(line, sys.stderr), file=sys.stderr)


def wrap_to_terminal(text: str, stream: TextIO) -> str:
    """Break the text into lines that fit the terminal `stream`; unchanged if the stream is no terminal.

    Words longer than a line, such as paths, stay whole, so that they can be copied.
    """
    if not stream.isatty():
        return text

    # `shutil.get_terminal_size` would ask stdout, which may be a file while stderr is a terminal.
    columns = os.get_terminal_size(stream.fileno()).columns or DEFAULT_COLUMNS
    wrapper = textwrap.TextWrapper(
        width=columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False, tabsize=4
    )
    return "\n".join(wrapper.fill(line) for line in text.splitlines())


def count_phrase(count: int, noun: str) -> str:
    """A number with its noun: `1 clip`, `2,000 clips`, `3 classes`."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"


def closest_word(word: str, known: Iterable[str]) -> str:
    """The known word that a misspelt one most resembles; `known` holds at least one."""
    # Without a cutoff there is an answer even if nothing resembles the word.
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]


def suggest_known(word: str, known: Iterable[str], there_are: str = "There are") -> str:
    """The end of an error about a misspelt word: the known word that it most resembles, then all that are known."""
    words = list(known)
    if not words:
        return "there is none"
    return f"did you mean {closest_word(word, words)!r}? {there_are}: {', '.join(words)}"


def did_you_mean(path: Path) -> str:
    """The end of an error about a path that does not exist: the neighbour of a similar name, or nothing."""
    neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    # With the usual cutoff: a folder may hold thousands of files, none of which was meant.
    similar = difflib.get_close_matches(path.name, neighbours, n=1)
    return f"; did you mean {path.parent / similar[0]}?" if similar else ""
