"""Messages for the user: lines on stderr that fit the terminal, and suggestions for misspelt names."""

import difflib
import os
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

# The assumed width of a terminal that reports none, as some in containers.
DEFAULT_COLUMNS = 80


def print_to_stderr(line: str) -> None:
    """Print a line on stderr without breaking a progress bar: the default `say` of loaders and runs."""
    # Imported here, because `--help` and tab completion do not need it.
    from tqdm import tqdm

    tqdm.write(wrap_to_terminal(line, sys.stderr), file=sys.stderr)


def wrap_to_terminal(text: str, stream: TextIO) -> str:
    """Return the text in lines that fit the terminal `stream`; the text is unchanged if the stream is no terminal.

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
    """Return a number with its noun: `1 clip`, `2,000 clips`, `3 classes`."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"


def closest_word(word: str, known: Iterable[str]) -> str:
    """Return the word of `known` that `word` resembles most; `known` is not empty."""
    # Without a cutoff, a word is returned even if none is similar.
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]


def suggest_known(word: str, known: Iterable[str], there_are: str = "There are") -> str:
    """Return the end of an error about a misspelt word: the most similar word of `known`, then all of `known`."""
    words = list(known)
    if not words:
        return "there is none"
    return f"did you mean {closest_word(word, words)!r}? {there_are}: {', '.join(words)}"


def describe_seconds(seconds: float) -> str:
    """Return a time as `12.8 s`, or in minutes from one minute on: `7.6 minutes`."""
    return f"{seconds:.3g} s" if seconds < 60 else f"{seconds / 60:,.1f} minutes"


def describe_no_store(location: Path | str) -> str:
    """Return the error for a path or URL that is not a feature store; a missing path gets the most similar one."""
    problem = "not a feature store"
    is_url = "://" in str(location)
    if not is_url and not Path(location).exists():
        problem += f"; there is nothing at this path{did_you_mean(Path(location))}"
    end = " Or make one" if problem.endswith("?") else "; make one"
    return f"{location}: {problem}{end} with: ajepa-data build-folder, or ajepa-data build-audioset"


def did_you_mean(path: Path) -> str:
    """Return the end of an error about a missing path: an entry of its folder with a similar name, or nothing."""
    neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    # With difflib's default cutoff: a folder may contain thousands of files, none of which is similar.
    similar = difflib.get_close_matches(path.name, neighbours, n=1)
    return f"; did you mean {path.parent / similar[0]}?" if similar else ""
