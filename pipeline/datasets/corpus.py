"""Corpus: what stores are built from: which clip is row i, where its sound lies, what the classes are.

Listed: one clip as a dataset's own list tells of it; clips so listed -> plan and sources, and where they lie.

How long sounds are, told from their headers, and clips cut out of long ones.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.audio.containers import recognise_container
from pipeline.audio.decode import AudioPolicy, VideoSegment, decode_segment
from pipeline.audio.sources import SOURCES_SCHEMA, ClipSources, SoundLocator
from pipeline.errors import AudioError, InputError, ManifestError
from pipeline.labels.ontology import ClassList
from pipeline.messages import did_you_mean
from pipeline.store.manifest import PLAN_SCHEMA


def absolute_path_or_url(path: Path | str) -> str:
    """A path as `Corpus.asked` holds it: the same from any folder; URLs stay as they are."""
    return str(path) if "://" in str(path) else str(Path(path).absolute())


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """What a dataset's own folders and lists come to; made by one function a dataset, in `pipeline/datasets/`.

    plan     columns of `pipeline.manifest.PLAN_SCHEMA`, `mids` (lists of class ids) and `duplicate` (why the row does
             not count, or null), in an order that depends on the lists alone
    asked    JSON values from which `pipeline.datasets.catalogue.corpus_of` makes the same corpus again; key `dataset`
    clip_seconds  length of a row; None where the mel spec decides
    notes    sentences that whoever builds should read, such as lines of a list that were left out
    """

    plan: pl.DataFrame
    sources: ClipSources
    classes: ClassList
    dataset_settings: dict[str, Any]
    clip_seconds: float | None = None
    notes: tuple[str, ...] = ()


ARCHIVE_SUFFIXES = (".zip", ".z01", ".tar", ".gz", ".tgz", ".7z", ".rar")

SHOWN_FILE_NAMES = 8  # names of a folder in an error


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedClip:
    """One clip: seconds [start, end) of a sound. `path` is None where its sound lies nowhere."""

    clip_id: str
    path: str | None
    source: str  # what the manifest tells of the path
    split: str
    mids: tuple[str, ...] = ()
    start_seconds: float = 0.0
    end_seconds: float | None = None  # None: as the sound, or the length of clips, has it


def loose_file_sources(
    paths: Sequence[str | None], sources: Sequence[str], **source_facts: object
) -> ClipSources:
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
    return ClipSources(frame=frame.select(*frame.columns, *absent).select(*SOURCES_SCHEMA), **source_facts)  # type: ignore[arg-type]


def plan_from_clips(clips: Sequence[ListedClip]) -> pl.DataFrame:
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


def sources_from_clips(
    clips: Sequence[ListedClip], *, files: int, unmatched: Sequence[str] = ()
) -> ClipSources:
    """Where the clips of a plan lie."""
    paths, sources = [clip.path for clip in clips], [clip.source for clip in clips]
    return loose_file_sources(paths, sources, files=files, unmatched=list(unmatched))


def check_dataset_folder(root: Path, dataset: str, required_names: Sequence[str]) -> None:
    """InputError where `root` is not the dataset's own folder: what was expected, what is there, what to give."""
    if all((root / name).exists() for name in required_names):
        return
    wanted = f"no folder of {dataset}: expected {', '.join(required_names)}"
    if root.is_file():
        what = "an archive: unpack it and" if root.suffix.lower() in ARCHIVE_SUFFIXES else "a file:"
        raise InputError(f"{root}: {what} give the folder that holds {', '.join(required_names)}")
    if not root.exists():
        raise InputError(f"{root}: no such folder{did_you_mean(root)}")
    for near in nearby_folders(root):
        if all((near / name).exists() for name in required_names):
            raise InputError(f"{root}: {wanted}; these are in {near}: give that")
    there = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    shown = ", ".join(there[:SHOWN_FILE_NAMES]) + f" and {len(there) - SHOWN_FILE_NAMES} more" * (
        len(there) > SHOWN_FILE_NAMES
    )
    packed = [name for name in there if name.lower().endswith(ARCHIVE_SUFFIXES)]
    hint = f"unpack {packed[0]} first" if packed else "give the folder as it was unpacked"
    raise InputError(f"{root}: {wanted}; found {shown or 'nothing'}; {hint}")


def nearby_folders(root: Path) -> Iterator[Path]:
    """The folders in which those who give the wrong one mean to be: two levels up, two down."""
    yield from (root.absolute().parent, root.absolute().parent.parent)
    for pattern in ("*/", "*/*/"):
        yield from sorted(path for path in root.glob(pattern) if path.is_dir())


def read_csv_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of an official CSV list that must have these columns; ManifestError."""
    lines = csv.reader(io.StringIO(read_list_text(path), newline=""))
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


def read_list_text(path: Path) -> str:
    """A list as text, with or without a byte order mark; ManifestError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}){did_you_mean(path)}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ManifestError(
            f"{path}: line {line}: not UTF-8 text; save it again as CSV in UTF-8 (Excel: 'CSV UTF-8')"
        ) from None


def note_missing_files(clips: Sequence[ListedClip], folder: Path) -> list[str]:
    """A note on files that are listed and not there, if any; InputError where not one is there."""
    missing = [clip.source for clip in clips if clip.path is None or not Path(clip.path).is_file()]
    if len(missing) == len(clips):
        raise InputError(
            f"{folder}: not one of {len(clips)} listed files is there, such as {missing[0]}; unpacked elsewhere?"
        )
    if not missing:
        return []
    return [f"{len(missing)} of {len(clips)} listed files are missing, such as {missing[0]}"]


def compare_with_release(counts: Iterable[tuple[str, int, int]]) -> list[str]:
    """Notes on what (a word, how many there are, how many there should be) is not as in the official release."""
    return [f"{is_} {what}, the official release has {be}" for what, is_, be in counts if is_ != be]


ProgressWrapper = Callable[[int, Iterator[Any]], Iterator[Any]]  # their number, and the stream to wrap

MIN_CLIP_SECONDS = 0.1  # of a clip: the build takes no shorter sound

MIN_LAST_PIECE_SHARE = 0.5  # of a clip: the piece that a file ends with is kept from here up

MIN_HOP_SHARE = 0.1  # of a clip: with less, every sound would be stored over ten times

HOP_TOLERANCE_SHARE = 0.01  # of a hop: what is less than this longer than a piece is not longer

LENGTH_CHECK_SECONDS = 0.01

LENGTH_CHECK_THREADS = (
    8  # at a time: no gain on files in memory (1 ms a wav, 5 an m4a), much where a network answers late
)

MAX_SOUND_SECONDS = AudioPolicy().max_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class CutSettings:
    """How clips are cut: pieces [k hop, k hop + clip) of a sound; without a hop its first piece only.

    The pieces end with the first that reaches the sound's end. That one is as long as there is sound, and is kept
    if it is at least half a clip long, or the only one.
    """

    clip_seconds: float = 10.0
    hop_seconds: float | None = None

    def __post_init__(self) -> None:
        if not MIN_CLIP_SECONDS <= self.clip_seconds <= MAX_SOUND_SECONDS:
            raise InputError(
                f"clip_seconds {self.clip_seconds:g}: expected {MIN_CLIP_SECONDS} to {MAX_SOUND_SECONDS:g}"
            )
        if self.hop_seconds is not None and not (
            MIN_HOP_SHARE * self.clip_seconds <= self.hop_seconds <= MAX_SOUND_SECONDS
        ):
            raise InputError(
                f"hop_seconds {self.hop_seconds:g}: expected at least {MIN_HOP_SHARE:g} of clip_seconds, "
                f"{MIN_HOP_SHARE * self.clip_seconds:g}; {self.clip_seconds:g} cuts without overlap"
            )

    def piece_spans(self, begin_seconds: float, stop_seconds: float) -> Iterator[tuple[float, float]]:
        """The pieces of a sound between two of its seconds, to the millisecond; at least one."""
        assert self.hop_seconds is not None
        start_seconds, number = begin_seconds, 0
        while stop_seconds - start_seconds > self.clip_seconds + HOP_TOLERANCE_SHARE * self.hop_seconds:
            yield start_seconds, round(start_seconds + self.clip_seconds, 3)
            number += 1
            start_seconds = round(begin_seconds + number * self.hop_seconds, 3)
        if number == 0 or stop_seconds - start_seconds >= MIN_LAST_PIECE_SHARE * self.clip_seconds:
            yield start_seconds, round(min(start_seconds + self.clip_seconds, stop_seconds), 3)


def cut_clips(
    clips: Sequence[ListedClip], cut_settings: CutSettings, *, progress: ProgressWrapper | None = None
) -> tuple[list[ListedClip], list[str]]:
    """The clips with their ends, cut where a hop says so, and notes on what could not be as listed.

    A piece's id is the clip's with `@` and the millisecond of the sound that it starts at. A sound whose length
    cannot be told, or that ends before the clip starts, stays one clip; the build will say why.
    """
    opened = [clip.path for clip in clips if clip.path and cut_settings.hop_seconds is not None]
    seconds_of = measure_sound_lengths(list(dict.fromkeys(opened)), progress=progress)
    done, behind = list[ListedClip](), list[ListedClip]()
    for clip in clips:
        length_seconds = seconds_of.get(clip.path) if clip.path else None
        if length_seconds is not None and clip.start_seconds >= round(length_seconds, 3):
            behind.append(clip)
            length_seconds = None
        done.extend(_cut_one_clip(clip, cut_settings, length_seconds))
    return done, _note_on_clips(behind, "start behind the end of their sound")


def _cut_one_clip(
    clip: ListedClip, cut_settings: CutSettings, length_seconds: float | None
) -> Iterator[ListedClip]:
    begin_seconds, end_seconds = clip.start_seconds, clip.end_seconds
    if cut_settings.hop_seconds is None:
        stop_seconds = begin_seconds + cut_settings.clip_seconds if end_seconds is None else end_seconds
        yield replace(clip, end_seconds=round(stop_seconds, 3))
        return
    known = length_seconds is not None and length_seconds <= MAX_SOUND_SECONDS and clip.path is not None
    stop_seconds = length_seconds if known and length_seconds else begin_seconds + cut_settings.clip_seconds
    if end_seconds is not None:
        stop_seconds = min(stop_seconds, end_seconds) if known else end_seconds
    for start_seconds, end_seconds in cut_settings.piece_spans(begin_seconds, stop_seconds):
        clip_id = f"{clip.clip_id}@{round(start_seconds * 1000)}"
        yield replace(clip, clip_id=clip_id, start_seconds=start_seconds, end_seconds=end_seconds)


def _note_on_clips(clips: Sequence[ListedClip], problem: str) -> list[str]:
    if not clips:
        return []
    return [f"{len(clips)} clips {problem}, such as {clips[0].source} from {clips[0].start_seconds:g} s on"]


def measure_sound_lengths(
    paths: Sequence[str], *, progress: ProgressWrapper | None = None
) -> dict[str, float]:
    """Seconds of each sound that can be opened."""
    pool = ThreadPoolExecutor(LENGTH_CHECK_THREADS)
    try:
        found = pool.map(measure_sound_length, paths)
        told = list(progress(len(paths), found) if progress and paths else found)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    return {path: length for path, length in zip(paths, told, strict=True) if length is not None}


def measure_sound_length(path: str) -> float | None:
    """Seconds of a sound as the build will see them; a hundredth of a second is decoded. None: it cannot be used."""
    try:
        with SoundLocator.from_path(Path(path)).open_sound() as sound:
            take = decode_segment(
                sound,
                recognise_container(sound),
                VideoSegment(0.0, LENGTH_CHECK_SECONDS),
                max_seconds=float("inf"),
            )
    except AudioError:
        return None
    return take.source_seconds or None
