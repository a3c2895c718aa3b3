"""Locator: where the sound of one clip lies; Sources: where those of all clips of a plan do."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Self

import polars as pl

Sound = Path | BytesIO  # what a decoder opens

SOURCES_SCHEMA: dict[str, pl.DataType] = {
    "kind": pl.String(),  # of locator; null where a clip's sound lies nowhere
    "path": pl.String(),  # of the file that holds it
    "source": pl.String(),  # what the manifest tells of it: relative to its --audio folder
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Locator:
    """Where the sound of one clip lies: a file of its own."""

    kind: str = "file"
    path: str
    source: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """A loose file."""
        return cls(path=str(path), source=path.name)

    @property
    def name(self) -> str:
        """The sound's own name, of which the extension may tell its container."""
        return Path(self.path).name

    @contextmanager
    def opened(self) -> Iterator[Sound]:
        """The sound, for a decoder to open."""
        yield Path(self.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Where the clips of a plan lie: row i of `frame` (SOURCES_SCHEMA) for row i of the plan."""

    frame: pl.DataFrame
    files: int = 0  # sounds seen
    unmatched: list[str] = field(default_factory=list)  # those that no row names, as `source` would tell them

    def locators(self, rows: range) -> Sequence[Locator | None]:
        """Of some rows; None where a clip's sound lies nowhere."""
        some = self.frame[rows.start : rows.stop].rows(named=True)
        return [None if row["kind"] is None else Locator(**row) for row in some]
