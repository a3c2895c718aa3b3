"""Locator: where the sound of one clip lies; Sources: where those of all clips of a plan do.

Layout: how sounds lie below a folder: loose, in tars, in Parquet, in HDF5; all of them -> one table.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Self

import polars as pl

from pipeline import object_store
from pipeline.audio import hdf5, parquet, tar
from pipeline.audio.byte_window import ByteWindow
from pipeline.audio.tar import TarReader
from pipeline.errors import InputError
from pipeline.object_store import is_remote_url, list_files_below

SoundInput = Path | BytesIO | ByteWindow  # what a decoder opens

MEMBER_SEPARATOR = "::"  # in `source`, between an archive and what lies in it

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
class SoundLocator:
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
    def from_path(cls, path: Path) -> Self:
        """A loose file."""
        return cls(path=str(path), source=path.name)

    @property
    def name(self) -> str:
        """The sound's own name, of which the extension may tell its container."""
        return Path(self.path if self.kind == "file" else self.source.rpartition(MEMBER_SEPARATOR)[2]).name

    @contextmanager
    def open_sound(self) -> Iterator[SoundInput]:
        """The sound, for a decoder to open; AudioError missing or unreadable where its archive fails.

        InputError where a server does.
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
        elif self.kind == "hdf5" and self.row is not None:
            yield BytesIO(hdf5.read_hdf5_sound(path, self.row))
        else:
            raise ValueError(f"{self} says nowhere")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSources:
    """Where the clips of a plan lie: row i of `frame` (SOURCES_SCHEMA) for row i of the plan."""

    frame: pl.DataFrame
    sound_count: int = 0  # sounds seen
    unmatched_sources: list[str] = field(
        default_factory=list
    )  # those that no row names, as `source` would tell them
    other_segment_sources: list[str] = field(
        default_factory=list
    )  # those of a listed video, but of another segment
    notes: tuple[str, ...] = ()  # sentences on what could not be searched

    def locators_of_rows(self, rows: range) -> Sequence[SoundLocator | None]:
        """Of some rows; None where a clip's sound lies nowhere."""
        some = self.frame[rows.start : rows.stop].rows(named=True)
        return [None if row["kind"] is None else SoundLocator(**row) for row in some]


# Extensions by how much their containers lose: among several sounds of one clip the first of this list is taken.
SOUND_EXTENSIONS = (
    *("flac", "wav", "wave", "aiff", "aif", "aifc", "w64", "caf", "au", "snd", "wv"),
    *("mka", "m4a", "mp4", "mkv", "mov", "aac", "opus", "webm", "weba", "ogg", "oga", "mp3", "mp2"),
    *("3gp", "wma", "ac3", "ts", "avi", "flv", "asf", "amr"),
)

ARCHIVE_KINDS = {"tar": "tar", "parquet": "parquet", "h5": "hdf5", "hdf5": "hdf5"}  # extension: kind

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")

UNPACK_ADVICE = "is compressed, so no member can be sought; unpack it, or store it as a plain .tar"

FOUND_SOUNDS_SCHEMA: dict[str, pl.DataType] = SOURCES_SCHEMA | {
    "folder": pl.String(),  # the --audio folder
    "name": pl.String(),  # by which the sound is known: without folders, in a table maybe without an extension
    "id": pl.String(),  # in a column beside the sound, where there is one
}

NO_MEMBERS = pl.DataFrame(schema={"member": pl.String})


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundSounds:
    """Every sound below some folders (FOUND_SCHEMA), in a fixed order, and sentences on what could not be read."""

    sounds: pl.DataFrame
    notes: tuple[str, ...]


def find_sounds(locations: Sequence[Path | str]) -> FoundSounds:
    """All sounds of all layouts below some folders or URLs, or in single files; raises InputError.

    Archives are told by their extension, and a damaged one is a note: its sounds are not there, the rest is.
    What lies in a tar beside its sounds (.json, .txt, .cls) is left out.
    """
    tables, notes = [pl.DataFrame(schema=FOUND_SOUNDS_SCHEMA)], list[str]()
    for place in locations:
        folder, found = list_candidates(place)
        names = pl.Series("source", found, dtype=pl.String)
        loose = names.str.extract(r"([^.]*)$").str.to_lowercase().is_in(SOUND_EXTENSIONS)
        tables.append(conform_to_schema(loose_file_table(folder, names.filter(loose)), folder))
        for name in names.filter(~loose):
            path = folder / name if isinstance(folder, Path) else f"{folder}/{name}"
            if name.lower().endswith(COMPRESSED_SUFFIXES):
                notes.append(f"{path}: {UNPACK_ADVICE}")
            elif kind := ARCHIVE_KINDS.get(file_extension(name)):
                walk_loose_sounds, fault = list_archive_sounds(path, kind, name)
                tables.append(conform_to_schema(walk_loose_sounds, folder))
                notes += [f"{path}: {fault}"] if fault else []
    return FoundSounds(sounds=pl.concat(tables), notes=tuple(notes))


def list_candidates(location: Path | str) -> tuple[Path | str, list[str]]:
    """A folder or its URL, and what in it may be or hold sounds."""
    if isinstance(location, str) and is_remote_url(location):
        url, names = list_files_below(location)
        return url, [name for name in names if is_sound_or_archive(name)]
    location = Path(location)
    return location if location.is_dir() else location.parent, list(walk_audio_files(location))


def is_sound_or_archive(name: str) -> bool:
    """Whether a file of that name is taken for a sound or an archive, if only one to be told of."""
    return (
        file_extension(name) in SOUND_EXTENSIONS
        or file_extension(name) in ARCHIVE_KINDS
        or name.lower().endswith(COMPRESSED_SUFFIXES)
    )


def conform_to_schema(sounds: pl.DataFrame, folder: Path | str) -> pl.DataFrame:
    """The table in its full schema."""
    absent = [
        pl.lit(None, dtype).alias(name)
        for name, dtype in FOUND_SOUNDS_SCHEMA.items()
        if name not in sounds.columns
    ]
    return (
        sounds.with_columns(*absent)
        .with_columns(folder=pl.lit(str(folder)))
        .select(pl.col(name).cast(dtype) for name, dtype in FOUND_SOUNDS_SCHEMA.items())
    )


def loose_file_table(folder: Path | str, names: pl.Series) -> pl.DataFrame:
    """Files that are one sound each, by their paths below `folder`."""
    return names.to_frame().with_columns(
        kind=pl.lit("file"),
        path=pl.lit(str(folder) + "/") + pl.col("source"),
        name=base_name_expr("source"),
    )


def list_archive_sounds(path: Path | str, kind: str, source: str) -> tuple[pl.DataFrame, str | None]:
    """The sounds of an archive, and what is wrong with it."""
    if kind == "tar":
        rows, fault = list_tar_sounds(path)
    elif isinstance(path, str):
        rows, fault = (
            NO_MEMBERS,
            f"is not read from a URL, only sounds and tars are; copy {kind} files to a disk",
        )
    elif kind == "parquet":
        rows, fault = parquet.list_parquet_rows(path)
    else:
        rows, fault = hdf5.list_hdf5_rows(path)
    sounds = rows.with_columns(
        kind=pl.lit(kind),
        path=pl.lit(str(path)),
        source=pl.lit(source + MEMBER_SEPARATOR) + pl.col("member"),
        name=base_name_expr("member"),
    )
    return sounds, fault


def list_tar_sounds(path: Path | str) -> tuple[pl.DataFrame, str | None]:
    """The sounds among the members of a tar, and what is wrong with it."""
    tar = TarReader(path)
    try:
        members = [member for member in tar.read_members() if file_extension(member.name) in SOUND_EXTENSIONS]
    except OSError as error:
        members, tar.fault = [], f"cannot be read ({error.strerror}); make it readable"
    schema = {"member": pl.String, "offset": pl.Int64, "size": pl.Int64}
    return pl.DataFrame(members, schema=schema, orient="row"), tar.fault


def base_name_expr(column: str) -> pl.Expr:
    """What follows the last slash."""
    return pl.col(column).str.extract("([^/]*)$")


def file_extension(name: str) -> str:
    """In lower case, without its dot."""
    return name.rpartition(".")[2].lower()


def walk_audio_files(location: Path) -> Iterator[str]:
    """Every sound file and archive below a folder as a path relative to it, links to nowhere included, in a fixed
    order; of a single file its name.

    Folders are followed through links, each once. InputError for a folder that cannot be listed: its clips
    would be taken for missing.
    """
    if location.is_file():
        if location.name.lower().endswith(COMPRESSED_SUFFIXES):
            raise InputError(f"--audio {location}: {UNPACK_ADVICE}")
        yield _require_utf8(location.name)
        return
    if not location.is_dir():
        raise InputError(f"--audio {location}: no such folder or file")
    seen = set()
    for parent, folders, names in os.walk(location, followlinks=True, onerror=_raise_unlistable):
        here = os.stat(parent)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders.sort()
        below = os.path.relpath(parent, location)
        prefix = "" if below == "." else f"{below}/"
        for name in sorted(names):
            if is_sound_or_archive(name):
                yield _require_utf8(prefix + name)


def sounds(folder: Path) -> Iterator[str]:
    """`walk` without the archives."""
    return (name for name in walk_audio_files(folder) if file_extension(name) in SOUND_EXTENSIONS)


def _raise_unlistable(error: OSError) -> None:
    raise InputError(
        f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or move it away"
    )


def _require_utf8(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name!a}: the name is not UTF-8; rename the file") from None
    return name
