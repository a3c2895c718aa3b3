"""The sounds of a table, known before they are read: their rows, whether a table has the same, and what differs.

The plan of a table that was made from files tells its sounds by three keys:
  sounds  digest of their absolute paths: the same sounds may be given in other words
  rows    their number
  given   only where paths are relative: digest of the paths as given, and of the place of the current folder as seen
          from the table's. A table that moves with its sounds keeps this one
Sounds are the same if either digest is.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path, PurePath

import polars as pl

from ajepa.training.run import Json, setting_differences
from pipeline.audio.sources import MEMBER_SEPARATOR
from pipeline.errors import InputError
from pipeline.object_store import is_remote_url

# The keys of a plan that tell its sounds, in their order.
SOUND_KEYS = ("sounds", "rows", "given")


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundRow:
    """The columns of a sound's row that are known before the sound is read.

    absolute_path  what tables have as `path` that were begun when paths were still written as absolute ones; None for
                   clips of a store
    """

    clip_id: str
    path: str
    labels: tuple[str, ...] | None = None
    absolute_path: str | None = None

    def with_absolute_path(self) -> "SoundRow":
        """Return the row as tables of earlier versions have it."""
        path = self.absolute_path
        return self if path is None else replace(self, clip_id=path, path=path)

    def with_normal_path(self) -> "SoundRow":
        """Return the row of the same file given in the shortest words: `sounds/a.wav` for `./sounds//a.wav`."""
        if self.absolute_path is None:
            return self
        path = normal_path(self.path)
        return replace(self, clip_id=path, path=path)

    def with_dotted_path(self) -> "SoundRow":
        """Return the row of the same file given as `./sounds/a.wav`."""
        if self.absolute_path is None or not is_relative(self.path):
            return self
        path = os.path.join(os.curdir, normal_path(self.path))
        return replace(self, clip_id=path, path=path)


def normal_path(path: str) -> str:
    """Return a path as given without `.` and doubled slashes; `..` stays, as a link may precede it."""
    if is_remote_url(path):
        return path
    file, separator, member = path.partition(MEMBER_SEPARATOR)
    return f"{PurePath(file)}{separator}{member}"


def is_relative(path: str) -> bool:
    """Return whether a path as given is that of a file below the current folder."""
    return not is_remote_url(path) and not os.path.isabs(path)


def digest_paths(paths: Iterable[str]) -> str:
    """Return a short digest of paths in their order."""
    return hashlib.sha256("\n".join(paths).encode()).hexdigest()[:16]


def digest_as_given(rows: Sequence[SoundRow], table: Path) -> str | None:
    """Return the digest of the paths as given, for a table; None if none is relative: absolute paths do not move."""
    paths = [normal_path(row.path) for row in rows if row.absolute_path is not None]
    if not any(map(is_relative, paths)):
        return None
    here = os.path.relpath(os.path.realpath(os.curdir), os.path.realpath(table.parent))
    return digest_paths([here, *paths])


def are_same_sounds(stored_plan: Json, plan: Json) -> bool:
    """Return whether two plans are of the same files, by either digest."""
    if "sounds" not in stored_plan or stored_plan.get("rows") != plan.get("rows"):
        return False
    given = stored_plan.get("given")
    same_given = given is not None and given == plan.get("given")
    return same_given or bool(stored_plan["sounds"] == plan.get("sounds"))


def plan_as_begun(plan: Json, plan_file: Path) -> Json:
    """Return the plan with the sounds as `plan_file` tells them, if it tells the same sounds in other words.

    A table that is carried on ends with the bytes of one that was never interrupted.
    """
    if not plan_file.is_file():
        return plan
    begun = json.loads(plan_file.read_text())
    if not are_same_sounds(begun, plan):
        return plan
    settings = {key: value for key, value in plan.items() if key not in SOUND_KEYS}
    return settings | {key: begun[key] for key in SOUND_KEYS if key in begun}


def plan_differences(
    stored_plan: Json, plan: Json, rows: Sequence[SoundRow], stored_paths: Iterable[str]
) -> list[str]:
    """Return what differs between the plan of a table and that of now, one text each; empty: it may be carried on.

    `stored_paths` are the table's own, in the order of its rows, and may be fewer; they are read only if its sounds
    differ from `rows`.
    """
    ignored: tuple[str, ...] = SOUND_KEYS
    if "sounds" not in stored_plan or "sounds" not in plan:
        kinds = ["files" if "sounds" in each else "a store" for each in (stored_plan, plan)]
        others = [f"sounds: was {kinds[0]}, now {kinds[1]}"] if kinds[0] != kinds[1] else []
        ignored = ("store_id", "excluded", *SOUND_KEYS) if others else ()
    else:
        same = are_same_sounds(stored_plan, plan)
        others = [] if same else [describe_other_sounds(stored_plan, plan, rows, stored_paths)]

    before, now = (
        {key: value for key, value in each.items() if key not in ignored} for each in (stored_plan, plan)
    )
    return [*setting_differences(before, now), *others]


def describe_other_sounds(
    stored_plan: Json, plan: Json, rows: Sequence[SoundRow], stored_paths: Iterable[str]
) -> str:
    """Return in words how the files of a table differ from those of now: their number, and the first other path."""
    counts = (stored_plan.get("rows"), plan["rows"])
    texts = [f"{counts[0]} then, {counts[1]} now"] if counts[0] != counts[1] else []
    try:
        # A sound may have several rows one after the other.
        for (path, _), row in zip(groupby(stored_paths), rows, strict=False):
            if normal_path(path) not in (normal_path(row.path), row.absolute_path):
                texts.append(f"the first that differs was {path}, is {row.path} now")
                break
        else:
            if not texts:
                texts.append("the same paths, in another folder than then")
    except (InputError, OSError, pl.exceptions.PolarsError):
        # The paths are a help, and no more.
        texts = texts or ["as many, with other paths"]
    return f"other sounds: {', '.join(texts)}"
