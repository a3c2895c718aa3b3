"""The files below a folder that are sounds or archives, by their names, and what a search leaves out."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.audio.tar import COMPRESSED_TAR_ADVICE
from pipeline.errors import InputError

# Extensions, from lossless containers to the most lossy: if one clip has several sounds, the sound whose extension
# comes first is used.
SOUND_EXTENSIONS = (
    *("flac", "wav", "wave", "aiff", "aif", "aifc", "w64", "caf", "au", "snd", "wv", "tta"),
    *("ape", "tak", "shn", "mlp", "thd", "dsf", "dff"),
    *("bwf", "rf64", "sph", "nist", "voc", "sf", "ircam", "sox", "avr", "pvf", "paf"),
    *("sds", "xi", "8svx", "svx", "wve"),
    *("mka", "m4a", "mp4", "mkv", "mov", "aac", "opus", "webm", "weba", "ogg", "oga", "mp3", "mp2", "mpga"),
    *("3gp", "wma", "ac3", "ts", "avi", "flv", "asf", "amr", "awb", "adts"),
    *("m4b", "m4r", "m4v", "qt", "f4v", "3g2", "spx", "ogv", "ogx"),
    *("wmv", "mpg", "mpeg", "vob", "mts", "m2ts"),
    *("f4a", "mk3d", "ogm", "m2a", "mpa", "mpc", "mpp", "eac3", "ec3"),
    *("dts", "dtshd", "loas", "latm", "divx"),
    *("m2t", "tp", "mpe", "m2p", "evo", "nut", "mxf", "wtv"),
    *("rm", "ra", "rmvb", "qcp", "oma", "aa3", "dss", "ds2"),
)

# The same for a message, which nobody reads to the end with all of them in it.
NAMED_EXTENSIONS = ("wav", "flac", "mp3", "m4a", "ogg", "opus", "mp4", "webm")
SEARCHED_SUFFIXES = (
    f"{', '.join(f'.{extension}' for extension in NAMED_EXTENSIONS)} "
    f"and {len(SOUND_EXTENSIONS) - len(NAMED_EXTENSIONS)} other suffixes of sounds"
)

ARCHIVE_KINDS = {"tar": "tar", "parquet": "parquet", "h5": "hdf5", "hdf5": "hdf5"}  # by extension

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")

# A folder with one of these files or suffixes is a Zarr store, or the tables of one that is built.
STORE_FILES = ("zarr.json", ".zgroup", ".zarray")
STORE_SUFFIXES = (".zarr", ".staging")

SHOWN_SUFFIXES = 8  # at most this many kinds of files in a note
SHOWN_FAULTS = 5  # at most this many folders and names that were left out


@dataclass(kw_only=True, slots=True)
class LeftOut:
    """What a search leaves out: files that are no sounds, by suffix, and folders and names with the reason."""

    files_by_suffix: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def count_file(self, name: str) -> None:
        """Count a file that is no sound."""
        self.files_by_suffix[Path(name).suffix.lower() or "without suffix"] += 1

    def describe(self) -> Iterator[str]:
        """Yield sentences for the user: one about the files, and one about each folder or name."""
        yield from self.faults[:SHOWN_FAULTS]
        if len(self.faults) > SHOWN_FAULTS:
            yield f"{len(self.faults) - SHOWN_FAULTS:,} more folders or names were left out"
        if self.files_by_suffix:
            common = self.files_by_suffix.most_common()
            common.sort(key=lambda item: (-item[1], item[0]))
            counts = [f"{count:,} {ascii(suffix)[1:-1]}" for suffix, count in common[:SHOWN_SUFFIXES]]
            others = sum(count for _, count in common[SHOWN_SUFFIXES:])
            counts += [f"{others:,} others"] if others else []
            yield f"left out, since by their names they are no sounds: {', '.join(counts)}"


def is_sound_or_archive(name: str) -> bool:
    """Whether a file of this name is a sound or an archive, by its extension; compressed tars are included."""
    extension = file_extension(name)
    return (
        extension in SOUND_EXTENSIONS
        or extension in ARCHIVE_KINDS
        or name.lower().endswith(COMPRESSED_SUFFIXES)
    )


def file_extension(name: str) -> str:
    """The extension of a file name, in lower case, without its dot."""
    return name.rpartition(".")[2].lower()


def walk_sounds_and_archives(location: Path, left_out: LeftOut | None = None) -> Iterator[str]:
    """Yield every sound file and archive below a folder as a path relative to it, in a fixed order.

    Broken links are included. Links to folders are followed, but each folder is entered once; stores are not searched.
    A single file yields its name. A folder below that cannot be listed, and a name that is not UTF-8, is left out; both
    are told by `left_out`. InputError if `location` itself cannot be listed.
    """
    left_out = LeftOut() if left_out is None else left_out

    # A single file. A compressed tar in a folder becomes a note; alone it is an error, as nothing else can be used.
    if location.is_file():
        if location.name.lower().endswith(COMPRESSED_SUFFIXES):
            raise InputError(f"--audio {location}: {COMPRESSED_TAR_ADVICE}")
        if not is_utf8(location.name):
            raise InputError(f"{str(location)!a}: the name is not UTF-8; rename the file")
        yield location.name
        return
    if not location.is_dir():
        raise InputError(f"--audio {location}: no such folder or file")

    def tell_unlistable(error: OSError) -> None:
        if error.filename == str(location):
            raise InputError(
                f"{location}: cannot be listed ({error.strerror}); make it readable, or move it away"
            )
        left_out.faults.append(f"{error.filename!a}: cannot be listed ({error.strerror}), so left out")

    visited: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(location, followlinks=True, onerror=tell_unlistable):
        # A folder is identified by its device and inode; `os.walk` enters the folders that remain in `folders`.
        try:
            status = os.stat(parent)
        except OSError as error:
            tell_unlistable(error)
            folders.clear()
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in visited:
            folders.clear()
            continue
        visited.add(identity)
        folders.sort()
        if parent != str(location) and is_store(parent, names):
            left_out.faults.append(f"{parent!a}: a store, not searched for sounds")
            folders.clear()
            continue

        # Names that are not UTF-8 have no place in a table.
        relative = os.path.relpath(parent, location)
        prefix = "" if relative == "." else f"{relative}/"
        for name in [name for name in folders if not is_utf8(name)]:
            left_out.faults.append(
                f"{prefix + name!a}: the name is not UTF-8, so left out; rename the folder"
            )
            folders.remove(name)
        for name in sorted(names):
            if not is_sound_or_archive(name):
                left_out.count_file(name)
            elif is_utf8(name):
                yield prefix + name
            else:
                left_out.faults.append(
                    f"{prefix + name!a}: the name is not UTF-8, so left out; rename the file"
                )


def walk_sound_files(folder: Path, left_out: LeftOut | None = None) -> Iterator[str]:
    """Yield every sound file below a folder, as `walk_sounds_and_archives` does, but no archive."""
    left_out = LeftOut() if left_out is None else left_out
    for name in walk_sounds_and_archives(folder, left_out):
        if file_extension(name) in SOUND_EXTENSIONS:
            yield name
        else:
            left_out.count_file(name)


def is_store(folder: str, names: list[str]) -> bool:
    """Whether a folder with these files is a Zarr store, or the staging folder of one."""
    return folder.lower().endswith(STORE_SUFFIXES) or any(name in STORE_FILES for name in names)


def is_utf8(name: str) -> bool:
    """Whether a name can be written as UTF-8: the system gives bytes that are none as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
