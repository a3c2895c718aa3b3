"""Corpus: the clip of each row of a store, the location of its sound, and the classes, from a dataset's own lists.

Each dataset has one function. It lists its clips as `ListedClip`, cuts long sounds with `cut_clips`, and makes the
corpus with `plan_from_clips` and `sources_from_clips`. The checks of folders and lists that datasets share are in this
file too.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.audio.containers import recognise_container
from pipeline.audio.decode import AudioPolicy, VideoSegment, costing_the_clip_alone, decode_segment
from pipeline.audio.sources import SOURCES_SCHEMA, ClipSources, SoundLocator
from pipeline.errors import AudioError, InputError, ManifestError
from pipeline.labels.ontology import ClassList
from pipeline.messages import count_phrase, describe_seconds, did_you_mean
from pipeline.store.header import StoreHeader
from pipeline.store.manifest import PLAN_SCHEMA
from pipeline.threads import map_on_threads

SHOWN_UNMATCHED = 20  # sounds that belong to no row, in build.json

ARCHIVE_SUFFIXES = (".zip", ".z01", ".tar", ".gz", ".tgz", ".7z", ".rar")

SHOWN_FILE_NAMES = 8  # at most this many names of a folder's content in an error

SHOWN_HEADER_LETTERS = 200  # at most this many letters of a list's first line in an error

SHOWN_LINE_LETTERS = 60  # the same for any other line

FIRST_ROW_LINE = 2  # line number of the first row of a CSV list, below the column names

MIN_CLIP_SECONDS = 0.1  # the build refuses shorter sounds

MAX_SOUND_SECONDS = AudioPolicy().max_seconds

MIN_LAST_PIECE_SHARE = 0.5  # a file's last piece is kept if it is at least this share of a clip

# A shorter rest at the end of a sound is left out without a note, also with `keep_tail`. Of clips under 5 s, rests of
# this share of a clip count.
MIN_TAIL_SECONDS = 0.5
MIN_TAIL_SHARE = 0.1

MIN_HOP_SHARE = 0.1  # of a clip: with less, every sound would be stored over ten times

HOP_TOLERANCE_SHARE = 0.01  # of a hop: a sound that exceeds a piece by at most this needs no further piece

LENGTH_CHECK_SECONDS = 0.01  # seconds that are decoded to find the length of a sound

# Sounds that are opened at the same time. For files in memory (1 ms a wav, 5 ms an m4a) threads gain nothing; on a slow
# network they gain much.
LENGTH_CHECK_THREADS = 8

# Wraps the stream of opened sounds in a progress bar; the first argument is the number of sounds.
ProgressWrapper = Callable[[int, Iterator[Any]], Iterator[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The clips of a dataset; each dataset has one function in `pipeline/datasets/` that makes its corpus.

    plan     table with the columns of `pipeline.store.manifest.PLAN_SCHEMA`, `mids` (lists of class ids) and
             `duplicate` (why the row does not count, or null); its order depends only on the lists
    sources  location of the sound of each row of the plan
    dataset_settings  JSON values from which `pipeline.datasets.catalogue.recreate_corpus` makes the same corpus again;
                      the key `dataset` names the function
    requested_settings  what a build command asked for, where the dataset settings say more: on the hub, which commit a
                      branch was; None where they are the same
    clip_seconds      length of a row in seconds; None if the mel spec decides
    notes    sentences for the user who builds a store, e.g. how many lines of a list were left out
    stored_plan       if the plan was read from a store: its folder, its header, and what its build found
    """

    plan: pl.DataFrame
    sources: ClipSources
    classes: ClassList
    dataset_settings: dict[str, Any]
    requested_settings: dict[str, Any] | None = None
    clip_seconds: float | None = None
    notes: tuple[str, ...] = ()
    stored_plan: "StoredPlan | None" = None

    @property
    def sound_counts(self) -> dict[str, Any]:
        """How many sounds were found, and how many of them belong to no row, with examples; keys of build.json."""
        if self.stored_plan is not None:
            return self.stored_plan.sound_counts
        sources = self.sources
        return {
            "audio_files": sources.sound_count,
            "unmatched_files": len(sources.unmatched_sources),
            "unmatched_examples": sources.unmatched_sources[:SHOWN_UNMATCHED],
            "other_start_files": len(sources.other_segment_sources),
            "other_start_examples": sources.other_segment_sources[:SHOWN_UNMATCHED],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPlan:
    """Where a plan was read from: the store, its header, and the `Corpus.sound_counts` of the build that looked."""

    store: Path
    header: StoreHeader
    sound_counts: dict[str, Any]
    is_current: bool = True  # whether sources.parquet of the store has the sources of the corpus


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusRequest:
    """A corpus that is made only if no store has its plan already.

    `settings` are its `Corpus.dataset_settings`, or its `Corpus.requested_settings` where these say less.
    """

    settings: dict[str, Any]
    make: Callable[[], Corpus]


def absolute_path_or_url(path: Path | str) -> str:
    """Return the path as stored in `Corpus.dataset_settings`: absolute; a URL is returned unchanged."""
    return str(path) if "://" in str(path) else str(Path(path).absolute())


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedClip:
    """One clip in a dataset's list: seconds [start, end) of a sound."""

    clip_id: str
    path: str | None  # None: the clip has no sound
    source: str  # the path as the manifest shows it
    split: str
    mids: tuple[str, ...] = ()
    start_seconds: float = 0.0
    end_seconds: float | None = None  # None: the end of the sound, or the length of a clip after the start


def plan_from_clips(clips: Sequence[ListedClip]) -> pl.DataFrame:
    """Return the plan of the clips, in their order; ManifestError if two clips have the same id."""
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

    # Results are identified by id, so ids must be unique.
    repeated = plan.filter(pl.col("clip_id").is_duplicated())
    if repeated.height:
        raise ManifestError(
            f"{repeated.height} clips share their id with another, such as {repeated.item(0, 'clip_id')!r}; "
            "every clip needs its own: list the same seconds of a sound once"
        )
    return plan


def sources_from_clips(
    clips: Sequence[ListedClip], *, files: int, unmatched: Sequence[str] = ()
) -> ClipSources:
    """Return the locations of the clips' sounds: all are loose files, which are cut exactly at start and end.

    `files` is the number of sounds that were found; `unmatched` lists the found sounds that no clip names.
    """
    listed = pl.DataFrame(
        {"path": [clip.path for clip in clips], "source": [clip.source for clip in clips]},
        schema={"path": pl.String, "source": pl.String},
    )

    # A clip without a path has null in every column.
    has_sound = pl.col("path").is_not_null()
    frame = listed.select(
        kind=pl.when(has_sound).then(pl.lit("file")),
        path="path",
        source=pl.when(has_sound).then("source"),
        exact=pl.lit(True),
    )

    # The other columns of the schema give the location of a sound in an archive.
    archive_columns = [
        pl.lit(None, dtype=dtype).alias(name)
        for name, dtype in SOURCES_SCHEMA.items()
        if name not in frame.columns
    ]
    frame = frame.with_columns(archive_columns).select(*SOURCES_SCHEMA)
    return ClipSources(frame=frame, sound_count=files, unmatched_sources=list(unmatched))


def check_dataset_folder(root: Path, dataset: str, required_names: Sequence[str]) -> None:
    """Raise InputError if `root` is not the dataset's folder, with the expected and the found content, and a fix."""
    if _holds_all(root, required_names):
        return
    required = ", ".join(required_names)

    # A file, most likely the downloaded archive.
    if root.is_file():
        mistake = "a file:"
        if root.suffix.lower() in ARCHIVE_SUFFIXES:
            mistake = "an archive: unpack it and"
        raise InputError(f"{root}: {mistake} give the folder that holds {required}")

    # A misspelt path.
    if not root.exists():
        raise InputError(f"{root}: no such folder{did_you_mean(root)}")

    # A folder above or below the right one.
    mismatch = f"not the folder of {dataset}: expected {required}"
    for folder in nearby_folders(root):
        if _holds_all(folder, required_names):
            raise InputError(f"{root}: {mismatch}; these are in {folder}: give that folder")

    # Some other folder.
    names = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    shown = ", ".join(names[:SHOWN_FILE_NAMES]) or "nothing"
    if len(names) > SHOWN_FILE_NAMES:
        shown += f" and {len(names) - SHOWN_FILE_NAMES} more"
    archives = [name for name in names if name.lower().endswith(ARCHIVE_SUFFIXES)]
    hint = f"unpack {archives[0]} first" if archives else "give the folder as it was unpacked"
    raise InputError(f"{root}: {mismatch}; found {shown}; {hint}")


def _holds_all(folder: Path, names: Sequence[str]) -> bool:
    return all((folder / name).exists() for name in names)


def nearby_folders(root: Path) -> Iterator[Path]:
    """Yield the folders up to two levels above and below, one of which is most likely the right folder."""
    yield from (root.absolute().parent, root.absolute().parent.parent)

    # Sorted, so that the folder that an error names does not depend on the disk.
    for pattern in ("*/", "*/*/"):
        yield from sorted(path for path in root.glob(pattern) if path.is_dir())


def read_csv_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read the rows of an official CSV list, at least one; ManifestError if one of `columns` is missing."""
    # The first line has the column names, in any order.
    lines = csv.reader(io.StringIO(read_list_text(path), newline=""))
    header = next(lines, [])
    if missing := [name for name in columns if name not in header]:
        found = ", ".join(header)[:SHOWN_HEADER_LETTERS]
        raise ManifestError(
            f"{path}: line 1: no column {', '.join(missing)}; found {found!r}: fetch it again"
        )

    # The other lines; a blank one has no cells.
    rows = []
    for cells in lines:
        if not cells:
            continue
        if len(cells) != len(header):
            raise ManifestError(
                f"{path}: line {lines.line_num}: {len(cells)} cells, expected {len(header)}: fetch it again"
            )
        rows.append(dict(zip(header, cells, strict=True)))
    if not rows:
        raise ManifestError(f"{path}: no rows; fetch it again")
    return rows


def read_list_text(path: Path) -> str:
    """Read a list as text, with or without a byte order mark; ManifestError if that fails."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}){did_you_mean(path)}") from None
    except UnicodeDecodeError as error:
        line_number = error.object.count(b"\n", 0, error.start) + 1
        raise ManifestError(
            f"{path}: line {line_number}: not UTF-8 text; save it again as CSV in UTF-8 (Excel: 'CSV UTF-8')"
        ) from None


def note_missing_files(clips: Sequence[ListedClip], folder: Path) -> list[str]:
    """Return a note on listed files that do not exist, if any; InputError if none of the listed files exists."""
    missing = [clip.source for clip in clips if clip.path is None or not Path(clip.path).is_file()]
    if len(missing) == len(clips):
        raise InputError(
            f"{folder}: not one of {len(clips)} listed files is there, such as {missing[0]}; "
            "unpack the sounds here, beside their lists"
        )
    if not missing:
        return []
    return [f"{len(missing)} of {len(clips)} listed files are missing, such as {missing[0]}"]


def compare_with_release(counts: Iterable[tuple[str, int, int]]) -> list[str]:
    """Return a note on each count that differs; a count is its noun, the number here and the official number."""
    return [
        f"{number} {noun}, the official release has {official_number}"
        for noun, number, official_number in counts
        if number != official_number
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class CutSettings:
    """How clips are cut: into pieces [k hop, k hop + clip) of a sound; without a hop, only the first piece is cut.

    The last piece is the first that reaches the end of the sound. It ends with the sound, and is kept if it is at least
    half a clip long or the only piece; with `keep_tail`, if it is at least `min_tail_seconds` long.
    """

    clip_seconds: float = 10.0
    hop_seconds: float | None = None
    keep_tail: bool = False

    def __post_init__(self) -> None:
        if not MIN_CLIP_SECONDS <= self.clip_seconds <= MAX_SOUND_SECONDS:
            raise InputError(
                f"clip_seconds {self.clip_seconds:g}: expected {MIN_CLIP_SECONDS} to {MAX_SOUND_SECONDS:g}"
            )

        # With a short hop, every sound is stored many times; the hop must not be longer than the longest sound.
        min_hop_seconds = MIN_HOP_SHARE * self.clip_seconds
        if self.hop_seconds is not None and not min_hop_seconds <= self.hop_seconds <= MAX_SOUND_SECONDS:
            raise InputError(
                f"hop_seconds {self.hop_seconds:g}: expected at least {MIN_HOP_SHARE:g} of clip_seconds, "
                f"{min_hop_seconds:g}; {self.clip_seconds:g} cuts without overlap"
            )

    @property
    def min_tail_seconds(self) -> float:
        """The shortest end of a sound that counts: half a second, or of short clips a tenth, at least 0.1 s."""
        return max(MIN_CLIP_SECONDS, min(MIN_TAIL_SECONDS, MIN_TAIL_SHARE * self.clip_seconds))

    def piece_spans(self, begin_seconds: float, stop_seconds: float) -> Iterator[tuple[float, float]]:
        """Yield start and end, to the millisecond, of each piece of a sound from begin to stop; at least one piece."""
        assert self.hop_seconds is not None
        number = 0
        start_seconds = begin_seconds

        # Pieces that end before the sound does.
        while stop_seconds - start_seconds > self.clip_seconds + HOP_TOLERANCE_SHARE * self.hop_seconds:
            yield start_seconds, round(start_seconds + self.clip_seconds, 3)
            number += 1
            start_seconds = round(begin_seconds + number * self.hop_seconds, 3)

        # The last piece.
        last_seconds = stop_seconds - start_seconds
        is_long = last_seconds >= MIN_LAST_PIECE_SHARE * self.clip_seconds
        is_kept_tail = self.keep_tail and round(last_seconds, 3) >= self.min_tail_seconds
        if number == 0 or is_long or is_kept_tail:
            yield start_seconds, round(min(start_seconds + self.clip_seconds, stop_seconds), 3)


def cut_clips(
    clips: Sequence[ListedClip],
    cut_settings: CutSettings,
    *,
    progress: ProgressWrapper | None = None,
    keeping_option: str = "",
) -> tuple[list[ListedClip], list[str]]:
    """Return the clips with their ends, cut into pieces if the settings have a hop, and notes.

    The notes are on clips past the end and on ends of sounds that are left out; `keeping_option` keeps these ends.

    The id of a piece is the id of the clip, `@`, and the millisecond of the sound at which the piece starts. A clip
    stays whole if the length of its sound is unknown, or if it starts after the end; the build will report the reason.
    """
    # The lengths are needed only with a hop, where they decide the number of pieces.
    paths = [clip.path for clip in clips if clip.path and cut_settings.hop_seconds is not None]
    seconds_by_path = measure_sound_lengths(list(dict.fromkeys(paths)), progress=progress)

    # A clip that starts after the end of its sound is not changed; the build refuses it with the reason.
    pieces: list[ListedClip] = []
    clips_past_end: list[ListedClip] = []
    tail_seconds: list[float] = []
    for clip in clips:
        length_seconds = seconds_by_path.get(clip.path) if clip.path else None
        if length_seconds is not None and clip.start_seconds >= round(length_seconds, 3):
            clips_past_end.append(clip)
            length_seconds = None
        clip_pieces = list(_cut_one_clip(clip, cut_settings, length_seconds))
        pieces.extend(clip_pieces)
        if length_seconds is not None and length_seconds <= MAX_SOUND_SECONDS:
            tail_seconds.append(_left_out_tail(clip, clip_pieces, cut_settings, length_seconds))
    tails = [seconds for seconds in tail_seconds if seconds >= cut_settings.min_tail_seconds]
    return pieces, [*_note_clips_past_end(clips_past_end), *_note_tails(tails, keeping_option)]


def _cut_one_clip(
    clip: ListedClip, cut_settings: CutSettings, length_seconds: float | None
) -> Iterator[ListedClip]:
    # If the length of the sound is unknown, a clip ends at its listed end, or else after the length of a clip.
    stop_seconds = clip.end_seconds
    if stop_seconds is None:
        stop_seconds = clip.start_seconds + cut_settings.clip_seconds

    if cut_settings.hop_seconds is None:
        yield replace(clip, end_seconds=round(stop_seconds, 3))
        return

    # If the length is known, the whole sound is cut, or only the listed part of it.
    if length_seconds is not None and length_seconds <= MAX_SOUND_SECONDS:
        stop_seconds = length_seconds if clip.end_seconds is None else min(length_seconds, clip.end_seconds)
    for start_seconds, end_seconds in cut_settings.piece_spans(clip.start_seconds, stop_seconds):
        clip_id = f"{clip.clip_id}@{round(start_seconds * 1000)}"
        yield replace(clip, clip_id=clip_id, start_seconds=start_seconds, end_seconds=end_seconds)


def _left_out_tail(
    clip: ListedClip, pieces: Sequence[ListedClip], cut_settings: CutSettings, length_seconds: float
) -> float:
    """Return the seconds at the end of a cut clip that would be in one more piece; 0 or less if there are none."""
    assert cut_settings.hop_seconds is not None
    assert pieces[-1].end_seconds is not None
    stop_seconds = length_seconds if clip.end_seconds is None else min(length_seconds, clip.end_seconds)
    # With a hop longer than the clips, the sound between two pieces is left out by request.
    next_start_seconds = clip.start_seconds + len(pieces) * cut_settings.hop_seconds
    return round(stop_seconds - max(pieces[-1].end_seconds, next_start_seconds), 3)


def _note_tails(tail_seconds: Sequence[float], keeping_option: str) -> list[str]:
    if not tail_seconds:
        return []
    verb = "ends" if len(tail_seconds) == 1 else "end"
    remedy = f"; {keeping_option} keeps them" if keeping_option else ""
    return [
        f"{count_phrase(len(tail_seconds), 'sound')} {verb} with less than half a clip: "
        f"{describe_seconds(sum(tail_seconds))} are left out{remedy}"
    ]


def _note_clips_past_end(clips: Sequence[ListedClip]) -> list[str]:
    if not clips:
        return []
    first = clips[0]
    return [
        f"{len(clips)} clips start after the end of their sound, "
        f"such as {first.source} from {first.start_seconds:g} s on"
    ]


def measure_sound_lengths(
    paths: Sequence[str], *, progress: ProgressWrapper | None = None
) -> dict[str, float]:
    """Return the length in seconds, by path, of each sound that can be opened."""
    lengths = map_on_threads(measure_sound_length, paths, LENGTH_CHECK_THREADS)
    if progress and paths:
        lengths = progress(len(paths), lengths)
    seconds = list(lengths)
    return {path: length for path, length in zip(paths, seconds, strict=True) if length is not None}


def measure_sound_length(path: str) -> float | None:
    """Return a sound's length in seconds as the build will find it, by decoding a little of it; None if unusable."""
    locator = SoundLocator.from_path(Path(path))
    try:
        with costing_the_clip_alone(locator), locator.open_sound() as sound:
            segment = decode_segment(
                sound,
                recognise_container(sound),
                VideoSegment(0.0, LENGTH_CHECK_SECONDS),
                max_seconds=float("inf"),
            )
    except AudioError:
        return None
    return segment.source_seconds or None
