"""Lines told on stderr: at a terminal broken between words, to a file or a pipe left whole."""

import os
import sys
import textwrap
from typing import TextIO

USUAL_COLUMNS = 80  # of a terminal that does not know its width


def to_stderr(line: str) -> None:
    """Where loaders and runs tell what they do, unless they are given another place; not into a progress line."""
    from tqdm import tqdm  # --help and the tab key need none

    tqdm.write(fitted(line, sys.stderr), file=sys.stderr)


def fitted(text: str, stream: TextIO) -> str:
    """The text in lines no longer than the terminal that `stream` is; as it is where that is none.

    Words that are longer, such as paths, stay whole, to be copied.
    """
    if not stream.isatty():
        return text
    columns = os.get_terminal_size(stream.fileno()).columns or USUAL_COLUMNS  # shutil's asks stdout
    return "\n".join(
        textwrap.fill(
            line, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False, tabsize=4
        )
        for line in text.splitlines()
    )
