"""Lines told on stderr: at a terminal broken between words, to a file or a pipe left whole."""

import difflib
import os
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

DEFAULT_COLUMNS = 80  # of a terminal that does not know its width


def print_to_stderr(line: str) -> None:
    """Where loaders and runs tell what they do, unless they are given another place; not into a progress line."""
    from tqdm import tqdm  # --help and the tab key need none

    tqdm.write(wrap_to_terminal(line, sys.stderr), file=sys.stderr)


def wrap_to_terminal(text: str, stream: TextIO) -> str:
    """The text in lines no longer than the terminal that `stream` is; as it is where that is none.

    Words that are longer, such as paths, stay whole, to be copied.
    """
    if not stream.isatty():
        return text
    columns = os.get_terminal_size(stream.fileno()).columns or DEFAULT_COLUMNS  # shutil's asks stdout
    return "\n".join(
        textwrap.fill(
            line, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False, tabsize=4
        )
        for line in text.splitlines()
    )


def closest_word(word: str, known: Iterable[str]) -> str:
    """The known word that a misspelt one most resembles."""
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]


def suggest_known(word: str, known: Iterable[str], there_are: str = "There are") -> str:
    """The known word that a misspelt one most resembles, and all there are, as the end of an error message."""
    words = list(known)
    if not words:
        return "there is none"
    return f"did you mean {closest_word(word, words)!r}? {there_are}: {', '.join(words)}"


def did_you_mean(path: Path) -> str:
    """What there is of a like name, as the end of a sentence."""
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
