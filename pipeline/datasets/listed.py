"""Listed: one clip as a dataset's own list tells of it; clips so listed -> plan and sources, and where they lie."""

import csv
import difflib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipeline.errors import InputError, ManifestError
from pipeline.locators import SOURCES_SCHEMA, Sources
from pipeline.manifest import PLAN_SCHEMA

ARCHIVES = (".zip", ".z01", ".tar", ".gz", ".tgz", ".7z", ".rar")
SHOWN = 8  # names of a folder in an error


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """One clip: seconds [start, end) of a sound. `path` is None where its sound lies nowhere."""

    clip_id: str
    path: str | None
    source: str  # what the manifest tells of the path
    split: str
    mids: tuple[str, ...] = ()
    start_seconds: float = 0.0
    end_seconds: float | None = None  # None: as the sound, or the length of clips, has it


def loose(paths: Sequence[str | None], sources: Sequence[str], **known: object) -> Sources:
    """Sources of files that lie loose: row i is the file `paths[i]`, told of as `sources[i]`, to be cut exactly."""
    there = pl.col("path").is_not_null()
    frame = pl.DataFrame(
        {"path": paths, "source": sources}, schema={"path": pl.String, "source": pl.String}
    ).select(
        kind=pl.when(there).then(pl.lit("file")),
        path="path",
        source=pl.when(there).then("source"),
        exact=pl.lit(True),
    )
    absent = [pl.lit(None, dtype=t).alias(n) for n, t in SOURCES_SCHEMA.items() if n not in frame.columns]
    return Sources(frame=frame.select(*frame.columns, *absent).select(*SOURCES_SCHEMA), **known)  # type: ignore[arg-type]


def plan_of(clips: Sequence[Listed]) -> pl.DataFrame:
    """The plan of clips in their order; ManifestError where two share an id."""
    plan = pl.DataFrame(
        {
            "clip_id": [clip.clip_id for clip in clips],
            "split": [clip.split for clip in clips],
            "start_seconds": [clip.start_seconds for clip in clips],
            "end_seconds": [clip.end_seconds for clip in clips],
            "mids": [list(clip.mids) for clip in clips],
            "duplicate": [None] * len(clips),
        },
        schema={**PLAN_SCHEMA, "mids": pl.List(pl.String), "duplicate": pl.String},
    )
    twice = plan.filter(pl.col("clip_id").is_duplicated())
    if twice.height:
        raise ManifestError(
            f"{twice.height} clips share their id with another, such as {twice.item(0, 'clip_id')!r}; "
            "every clip needs its own: list the same seconds of a sound once"
        )
    return plan


def sources_of(clips: Sequence[Listed], *, files: int, unmatched: Sequence[str] = ()) -> Sources:
    """Where the clips of a plan lie."""
    paths, sources = [clip.path for clip in clips], [clip.source for clip in clips]
    return loose(paths, sources, files=files, unmatched=list(unmatched))


def check_layout(root: Path, dataset: str, needed: Sequence[str]) -> None:
    """InputError where `root` is not the dataset's own folder: what was expected, what is there, what to give."""
    if all((root / name).exists() for name in needed):
        return
    wanted = f"no folder of {dataset}: expected {', '.join(needed)}"
    if root.is_file():
        what = "an archive: unpack it and" if root.suffix.lower() in ARCHIVES else "a file:"
        raise InputError(f"{root}: {what} give the folder that holds {', '.join(needed)}")
    if not root.exists():
        raise InputError(f"{root}: no such folder{meant(root)}")
    for near in neighbours(root):
        if all((near / name).exists() for name in needed):
            raise InputError(f"{root}: {wanted}; these are in {near}: give that")
    there = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    shown = ", ".join(there[:SHOWN]) + f" and {len(there) - SHOWN} more" * (len(there) > SHOWN)
    packed = [name for name in there if name.lower().endswith(ARCHIVES)]
    hint = f"unpack {packed[0]} first" if packed else "give the folder as it was unpacked"
    raise InputError(f"{root}: {wanted}; found {shown or 'nothing'}; {hint}")


def meant(path: Path) -> str:
    """What there is of a like name, as the end of a sentence."""
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def neighbours(root: Path) -> Iterator[Path]:
    """The folders in which those who give the wrong one mean to be: two levels up, two down."""
    yield from (root.absolute().parent, root.absolute().parent.parent)
    for pattern in ("*/", "*/*/"):
        yield from sorted(path for path in root.glob(pattern) if path.is_dir())


def rows_of(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of an official CSV list that must have these columns; ManifestError."""
    lines = csv.reader(io.StringIO(text_of(path), newline=""))
    header = next(lines, [])
    if missing := [name for name in columns if name not in header]:
        raise ManifestError(
            f"{path}: line 1: no column {', '.join(missing)}; found {', '.join(header)[:200]!r}: fetch it again"
        )
    rows = []
    for cells in lines:
        if cells and len(cells) != len(header):
            raise ManifestError(
                f"{path}: line {lines.line_num}: {len(cells)} cells, expected {len(header)}: fetch it again"
            )
        if cells:
            rows.append(dict(zip(header, cells, strict=True)))
    if not rows:
        raise ManifestError(f"{path}: no rows; fetch it again")
    return rows


def text_of(path: Path) -> str:
    """A list as text, with or without a byte order mark; ManifestError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}){meant(path)}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ManifestError(
            f"{path}: line {line}: not UTF-8 text; save it again as CSV in UTF-8 (Excel: 'CSV UTF-8')"
        ) from None


def present(clips: Sequence[Listed], where: Path) -> list[str]:
    """A note on files that are listed and not there, if any; InputError where not one is there."""
    missing = [clip.source for clip in clips if clip.path is None or not Path(clip.path).is_file()]
    if len(missing) == len(clips):
        raise InputError(
            f"{where}: not one of {len(clips)} listed files is there, such as {missing[0]}; unpacked elsewhere?"
        )
    if not missing:
        return []
    return [f"{len(missing)} of {len(clips)} listed files are missing, such as {missing[0]}"]


def counted(facts: Iterable[tuple[str, int, int]]) -> list[str]:
    """Notes on what (a word, how many there are, how many there should be) is not as in the official release."""
    return [f"{is_} {what}, the official release has {be}" for what, is_, be in facts if is_ != be]
