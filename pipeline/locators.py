"""Locator: where the sound of one clip lies; Sources: where those of all clips of a plan do."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Self

import polars as pl

from pipeline import hdf5, parquet, remote, tar
from pipeline.remote import is_remote
from pipeline.window import Window

Sound = Path | BytesIO | Window  # what a decoder opens
MEMBER = "::"  # in `source`, between an archive and what lies in it

SOURCES_SCHEMA: dict[str, pl.DataType] = {
    "kind": pl.String(),  # file, tar, parquet or hdf5; null where a clip's sound lies nowhere
    "path": pl.String(),  # of the file that holds it, or its URL
    "source": pl.String(),  # what the manifest tells of it: relative to its --audio folder
    "exact": pl.Boolean(),  # a clip's seconds are those of the sound; else it may be the clip alone, or a whole video
    "offset": pl.Int64(),  # of a member of a tar: its first byte
    "size": pl.Int64(),  # and how many bytes it has
    "group": pl.Int32(),  # of a row of a Parquet file: its row group
    "row": pl.Int64(),  # in that row group, or in an HDF5 file
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Locator:
    """Where the sound of one clip lies: a file of its own, or a place in an archive (SOURCES_SCHEMA)."""

    kind: str = "file"
    path: str
    source: str
    exact: bool | None = None
    offset: int | None = None
    size: int | None = None
    group: int | None = None
    row: int | None = None

    @classmethod
    def of(cls, path: Path) -> Self:
        """A loose file."""
        return cls(path=str(path), source=path.name)

    @property
    def name(self) -> str:
        """The sound's own name, of which the extension may tell its container."""
        return Path(self.path if self.kind == "file" else self.source.rpartition(MEMBER)[2]).name

    @contextmanager
    def opened(self) -> Iterator[Sound]:
        """The sound, for a decoder to open; AudioError missing or unreadable where its archive fails.

        InputError where a server does.
        """
        path = Path(self.path)
        if is_remote(self.path):
            yield BytesIO(remote.sound_of(self.path, self.offset or 0, self.size))
        elif self.kind == "file":
            yield path
        elif self.kind == "tar" and self.offset is not None and self.size is not None:
            with tar.sound_of(path, self.offset, self.size) as window:
                yield window
        elif self.kind == "parquet" and self.group is not None and self.row is not None:
            yield BytesIO(parquet.sound_of(path, self.group, self.row))
        elif self.kind == "hdf5" and self.row is not None:
            yield BytesIO(hdf5.sound_of(path, self.row))
        else:
            raise ValueError(f"{self} says nowhere")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Where the clips of a plan lie: row i of `frame` (SOURCES_SCHEMA) for row i of the plan."""

    frame: pl.DataFrame
    files: int = 0  # sounds seen
    unmatched: list[str] = field(default_factory=list)  # those that no row names, as `source` would tell them
    other_start: list[str] = field(default_factory=list)  # those of a listed video, but of another segment
    notes: tuple[str, ...] = ()  # sentences on what could not be searched

    def locators(self, rows: range) -> Sequence[Locator | None]:
        """Of some rows; None where a clip's sound lies nowhere."""
        some = self.frame[rows.start : rows.stop].rows(named=True)
        return [None if row["kind"] is None else Locator(**row) for row in some]
