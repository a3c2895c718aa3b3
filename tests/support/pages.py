"""The documentation as tests read it: its pages, their fenced blocks, and the commands in those."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAMS = ("ajepa-data", "ajepa-train")


def read_pages() -> dict[str, str]:
    """The text of README.md and of every page in docs/, by path."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


PAGES = read_pages()


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page: its language, its text, and the number of its first line."""

    page: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def command_lines(self) -> list[str]:
        """The lines that call our programs, whatever stands before them, each as one line."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.startswith((*PROGRAMS, "srun ", "torchrun "))]


def read_blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    pattern = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    text = PAGES[page]
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in pattern.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


def first_block(page: str, heading: str | None = None) -> str:
    """The text of the first fenced block of a page, or of the first one below a heading of it."""
    start_line = 0
    if heading is not None:
        before, _ = PAGES[page].split(f"\n## {heading}\n")
        start_line = before.count("\n")
    return next(block.text for block in read_blocks(page) if block.line > start_line)


def command_words(line: str) -> list[str]:
    """Program, command and arguments in a line of a shell, without what surrounds them."""
    start = min(line.index(f"{program} ") for program in PROGRAMS if f"{program} " in line)
    return [word for word in shlex.split(line[start:], comments=True) if word != "&"]
