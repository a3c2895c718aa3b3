"""Locations of sounds: of one clip (SoundLocator), of a plan's clips (ClipSources), of a folder's files (find_sounds).

A sound is a file of its own, a member of a tar, or a row of a Parquet, Arrow or HDF5 file.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Self

import polars as pl

from pipeline import object_store
from pipeline.audio import arrow, hdf5, parquet, tar
from pipeline.audio.byte_window import SoundInput
from pipeline.audio.folder_walk import (
    ARCHIVE_KINDS,
    COMPRESSED_SUFFIXES,
    SOUND_EXTENSIONS,
    LeftOut,
    file_extension,
    is_sound_or_archive,
    walk_sounds_and_archives,
)
from pipeline.audio.tar import COMPRESSED_TAR_ADVICE, TarReader
from pipeline.object_store import is_remote_url, list_files_below

MEMBER_SEPARATOR = "::"  # in `source`, between the names of an archive and its member

SOURCES_SCHEMA: dict[str, pl.DataType] = {
    "kind": pl.String(),  # file, tar, parquet, arrow or hdf5; null for a clip that has no sound
    "path": pl.String(),  # path or URL of the file that contains the sound
    "source": pl.String(),  # the name of the sound in the manifest, relative to its --audio folder
    "exact": pl.Boolean(),  # True: the clip's seconds count in this sound; False: it may be the clip alone
    "offset": pl.Int64(),  # first byte of a tar member
    "size": pl.Int64(),  # number of bytes of a tar member
    "group": pl.Int32(),  # row group of a row in a Parquet file, or batch of an Arrow file
    "row": pl.Int64(),  # number of a row in its row group or batch, or in an HDF5 file
}

FOUND_SOUNDS_SCHEMA: dict[str, pl.DataType] = SOURCES_SCHEMA | {
    "folder": pl.String(),  # the --audio folder
    "name": pl.String(),  # file name without folders; a name in a table may lack an extension
    "id": pl.String(),  # from a column of the sound's table; null if there is none
}

NO_MEMBERS = pl.DataFrame(schema={"member": pl.String})


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundLocator:
    """The location of one clip's sound: a file of its own, or a place in an archive (see SOURCES_SCHEMA)."""

    kind: str = "file"
    path: str
    source: str
    exact: bool | None = None
    offset: int | None = None
    size: int | None = None
    group: int | None = None
    row: int | None = None

    @classmethod
    def from_path(cls, path: Path) -> Self:
        """The locator of a file that is one sound."""
        return cls(path=str(path), source=path.name)

    @property
    def name(self) -> str:
        """The file name of the sound, or the name of the member, without folders."""
        if self.kind == "file":
            return Path(self.path).name
        return Path(self.source.rpartition(MEMBER_SEPARATOR)[2]).name

    @contextmanager
    def open_sound(self) -> Iterator[SoundInput]:
        """Open the sound for a decoder: a path if it is a file of its own, else the bytes in an archive or on a server.

        AudioError (missing or unreadable) if the archive fails, InputError if the server fails.
        """
        path = Path(self.path)
        if is_remote_url(self.path):
            yield BytesIO(object_store.read_remote_sound(self.path, self.offset or 0, self.size))
        elif self.kind == "file":
            yield path
        elif self.kind == "tar" and self.offset is not None and self.size is not None:
            with tar.open_tar_member(path, self.offset, self.size) as window:
                yield window
        elif self.kind == "parquet" and self.group is not None and self.row is not None:
            yield BytesIO(parquet.read_parquet_sound(path, self.group, self.row))
        elif self.kind == "arrow" and self.group is not None and self.row is not None:
            yield BytesIO(arrow.read_arrow_sound(path, self.group, self.row))
        elif self.kind == "hdf5" and self.row is not None:
            yield BytesIO(hdf5.read_hdf5_sound(path, self.row))
        else:
            raise ValueError(f"{self} names no place of a sound")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSources:
    """The locations of a plan's sounds: row i of `frame` (SOURCES_SCHEMA) belongs to row i of the plan.

    sound_count            number of sounds that were found
    unmatched_sources      `source` of each sound that belongs to no row
    other_segment_sources  `source` of each sound that is another segment of a listed video
    notes                  sentences about files that could not be searched
    """

    frame: pl.DataFrame
    sound_count: int = 0
    unmatched_sources: list[str] = field(default_factory=list)
    other_segment_sources: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def locators_of_rows(self, rows: range) -> Sequence[SoundLocator | None]:
        """The locators of some rows; None for a clip that has no sound."""
        sources = self.frame[rows.start : rows.stop].rows(named=True)
        return [None if source["kind"] is None else SoundLocator(**source) for source in sources]


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundSounds:
    """Every sound below some folders (FOUND_SOUNDS_SCHEMA), in a fixed order; a note on every file that failed."""

    sounds: pl.DataFrame
    notes: tuple[str, ...]


def find_sounds(locations: Sequence[Path | str]) -> FoundSounds:
    """Find all sounds below some folders or URLs, or in single files.

    Archives are recognised by their extensions. A damaged archive becomes a note, and only its own sounds are missing.
    Files that are no sounds are counted in a note; members of a tar that are none (.json, .txt, .cls) are not.
    InputError if a location does not exist, cannot be listed, or is a single compressed tar.
    """
    tables = [pl.DataFrame(schema=FOUND_SOUNDS_SCHEMA)]
    notes: list[str] = []
    left_out = LeftOut()
    for location in locations:
        # Files that are one sound each.
        folder, candidates = list_candidates(location, left_out)
        names = pl.Series("source", candidates, dtype=pl.String)
        is_sound = names.str.extract(r"([^.]*)$").str.to_lowercase().is_in(SOUND_EXTENSIONS)
        tables.append(conform_to_schema(sound_file_table(folder, names.filter(is_sound)), folder))

        # Archives; a compressed tar becomes a note, because its members cannot be read.
        for name in names.filter(~is_sound):
            path = folder / name if isinstance(folder, Path) else f"{folder}/{name}"
            if name.lower().endswith(COMPRESSED_SUFFIXES):
                notes.append(f"{path}: {COMPRESSED_TAR_ADVICE}")
            elif kind := ARCHIVE_KINDS.get(file_extension(name)):
                members, fault = list_archive_sounds(path, kind, name)
                tables.append(conform_to_schema(members, folder))
                if fault:
                    notes.append(f"{path}: {fault}")
    return FoundSounds(sounds=pl.concat(tables), notes=(*notes, *left_out.describe()))


def list_candidates(location: Path | str, left_out: LeftOut) -> tuple[Path | str, list[str]]:
    """The folder or URL of a location, and the names below it that are sounds or archives; counts the others."""
    if isinstance(location, str) and is_remote_url(location):
        url, names = list_files_below(location)
        candidates = [name for name in names if is_sound_or_archive(name)]
        for name in set(names).difference(candidates):
            left_out.count_file(name)
        return url, candidates

    path = Path(location)
    folder = path if path.is_dir() else path.parent
    return folder, list(walk_sounds_and_archives(path, left_out))


def sound_file_table(folder: Path | str, names: pl.Series) -> pl.DataFrame:
    """A row for every file that is one sound, by its path below `folder`."""
    return names.to_frame().with_columns(
        kind=pl.lit("file"),
        path=pl.lit(str(folder) + "/") + pl.col("source"),
        name=base_name_expr("source"),
    )


def list_archive_sounds(path: Path | str, kind: str, source: str) -> tuple[pl.DataFrame, str | None]:
    """A row for every sound of an archive, and the fault of the archive, or None."""
    if kind == "tar":
        rows, fault = list_tar_sounds(path)
    elif isinstance(path, str):
        rows = NO_MEMBERS
        fault = f"cannot be read from a URL, only sounds and tars can; copy {kind} files to a disk"
    elif kind == "parquet":
        rows, fault = parquet.list_parquet_rows(path)
    else:
        rows, fault = hdf5.list_hdf5_rows(path)

    members = rows.with_columns(
        kind=pl.lit(kind),
        path=pl.lit(str(path)),
        source=pl.lit(source + MEMBER_SEPARATOR) + pl.col("member"),
        name=base_name_expr("member"),
    )
    return members, fault


def list_tar_sounds(path: Path | str) -> tuple[pl.DataFrame, str | None]:
    """The members of a tar that are sounds, and the fault of the tar, or None."""
    reader = TarReader(path)
    try:
        members = [
            member for member in reader.read_members() if file_extension(member.name) in SOUND_EXTENSIONS
        ]
        fault = reader.fault
    except OSError as error:
        members = []
        fault = f"cannot be read ({error.strerror}); make it readable"
    schema = {"member": pl.String, "offset": pl.Int64, "size": pl.Int64}
    return pl.DataFrame(members, schema=schema, orient="row"), fault


def conform_to_schema(table: pl.DataFrame, folder: Path | str) -> pl.DataFrame:
    """A table of sounds with all columns of FOUND_SOUNDS_SCHEMA; `folder` is the --audio folder."""
    absent_columns = [
        pl.lit(None, dtype).alias(name)
        for name, dtype in FOUND_SOUNDS_SCHEMA.items()
        if name not in table.columns
    ]
    return (
        table.with_columns(*absent_columns)
        .with_columns(folder=pl.lit(str(folder)))
        .select(pl.col(name).cast(dtype) for name, dtype in FOUND_SOUNDS_SCHEMA.items())
    )


def base_name_expr(column: str) -> pl.Expr:
    """The text after the last slash of a column of paths."""
    return pl.col(column).str.extract("([^/]*)$")
