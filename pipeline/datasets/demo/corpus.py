"""The demo corpus: a small corpus with AudioSet's lists and layout, made in a minute, with a few broken files.

The steps are: choose sounds, plan clips, write audio files, then write the segments lists, truth.csv, README.txt and
the record of the corpus, corpus.json.
"""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.datasets.demo.audio_files import CONTAINERS_BY_NAME, write_audio_file
from pipeline.datasets.demo.clips import (
    BROKEN_FILE_KINDS,
    DEMO_CLIP_SECONDS,
    ODD_CLIP_KINDS,
    REPEATED_ROW_KINDS,
    DemoClip,
    SplitSounds,
    damage_file,
    damage_wave,
    make_odd_clips,
    make_repeated_rows,
    plan_demo_clips,
    render_clip,
    with_clip_kind,
)
from pipeline.datasets.demo.recordings import (
    DEMO_EVAL_SHARE,
    DEMO_SPLITS,
    PACKAGE_LICENCES,
    copy_licences,
    fetch_packages,
    list_recordings,
    load_recorded_sound,
    split_recordings,
)
from pipeline.datasets.demo.synthesis import FORMULA_SOUNDS, DemoSound
from pipeline.errors import InputError
from pipeline.files import PARTIAL_SUFFIX
from pipeline.messages import suggest_known

DEMO_VERSION = 1  # is raised whenever the same arguments give other files

DEMO_SOURCES = ("formula", "debian")

MIN_DEMO_CLIPS = 20  # fewer would be mostly broken files

DEMO_CLIP_BYTES = 800_000  # disk space for a clip, with a margin; 500 kB were measured

PACKAGES_BYTES = 200_000_000  # disk space for the downloaded and unpacked recordings while the corpus is made

BYTES_PER_MB = 1e6

BYTES_PER_GB = 1e9

RECORD_FILE = "corpus.json"

# The columns of truth.csv: fields of `DemoClip`.
TRUTH_COLUMNS = (
    *("split", "clip_id", "file", "kind", "expected", "start_seconds", "end_seconds"),
    *("seconds", "container", "rate_hz", "channels", "labels", "parts"),
)

DEMO_README_TEMPLATE = """\
A corpus in the shape of AudioSet, made by: ajepa-data demo-corpus ({title})

audio/SPLIT/ID.EXTENSION    {good} good clips, nearly all of 10 s, in several containers, rates and channels
SPLIT_segments.csv          the lists, in AudioSet's own format
truth.csv                   what every row and file really is; `expected` says what must come of it

{sounds}

Beside the good clips there are broken ones, one of each kind, in balanced_train. They come on top of the {good}:

{extras}

Two of the good clips are odd; they are usable and count:

{odd}

The counts in the head of a list are those of its rows: broken and repeated rows count there, and so does the
unknown label; num_ytids counts an id once. The unlisted file is in no count.

The same arguments and the same versions of numpy, soxr, soundfile and av give the same bytes: containers are
written without their dates and random serial numbers.
"""

FORMULA_NOTICE = """\
Every sound is computed from the definition of its class: there is no recording in it, and no right of others.
A class never sounds the same twice: level, pitch, onset, length, cadence and the noise below are drawn anew."""

DEBIAN_NOTICE = """\
The sounds are recordings from Debian packages, mixed in ones and twos over faint noise. A recording is heard
in one split only, unless it is the only one of its classes: then it is heard in both.

Whoever passes this corpus on passes on their licences; each package's own statement is in licences/:
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """The settings that decide the files of a demo corpus; raises InputError if a setting is invalid."""

    source: str
    clips: int
    seed: int
    version: int = DEMO_VERSION

    def __post_init__(self) -> None:
        if self.source not in DEMO_SOURCES:
            raise InputError(
                f"demo corpus: source {self.source!r} is unknown; {suggest_known(self.source, DEMO_SOURCES)}"
            )
        if self.clips < MIN_DEMO_CLIPS:
            raise InputError(f"demo corpus: expected {MIN_DEMO_CLIPS} clips at least, got {self.clips}")
        if self.seed < 0:
            raise InputError(f"demo corpus: expected a seed of 0 or more, got {self.seed}")

    def __str__(self) -> str:
        return settings_line(asdict(self))


def settings_line(settings: dict[str, object]) -> str:
    """Return the settings in one line: source formula, clips 400, seed 0."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoCorpus:
    """A finished demo corpus, as `make_demo_corpus` returns it."""

    path: Path
    is_new: bool  # False: the corpus already existed
    settings: DemoSettings
    train_clips: int  # good clips
    eval_clips: int  # good clips
    broken_rows: int  # rows and files in addition to the good clips
    classes: int
    files: int
    megabytes: float

    def __str__(self) -> str:
        outcome = "made" if self.is_new else "already there, left alone"
        return (
            f"{self.path}: {outcome}: {self.train_clips} train and {self.eval_clips} eval clips "
            f"of {self.classes} classes, {self.broken_rows} broken rows and files beside them, "
            f"{self.megabytes:.0f} MB; README.txt and truth.csv say what is what"
        )


def make_demo_corpus(
    out: Path, *, clips: int = 400, source: str = "formula", seed: int = 0, progress: bool | None = None
) -> DemoCorpus:
    """Make a corpus of `clips` good clips, a quarter of them for eval, in the new folder `out`.

    The source `formula` computes every sound; `debian` downloads 49 MB of recordings. The same arguments give the same
    files, on any number of cores. `progress` True or False shows or hides the progress bars; None shows them in a
    terminal. Raises InputError if `out` has other content than this corpus, and leaves no unfinished files.
    """
    out = Path(out)
    settings = DemoSettings(source=source, clips=clips, seed=seed)
    if has_same_corpus(out, settings):
        return read_corpus_record(out, is_new=False)

    # tqdm has the opposite option: whether to hide the bars.
    quiet = None if progress is None else not progress
    needed_bytes = clips * DEMO_CLIP_BYTES
    if source == "debian":
        needed_bytes += PACKAGES_BYTES
    with corpus_scratch_folder(out, needed_bytes=needed_bytes) as folder:
        # One generator draws first the split of each recording, then the clips.
        rng = np.random.default_rng([seed, DEMO_SOURCES.index(source)])
        split_sounds = formula_split_sounds()
        if source == "debian":
            split_sounds = debian_split_sounds(rng, folder, quiet=quiet)
        planned_clips = plan_demo_corpus(rng, split_sounds, clips=clips)
        write_clip_files(folder, planned_clips, split_sounds, seed=seed, quiet=quiet)

        # The record counts all files, so it comes last.
        title = str(settings)
        write_segments_lists(folder, planned_clips, title=title)
        write_truth_table(folder, planned_clips)
        write_demo_readme(folder, planned_clips, source, title=title)
        write_corpus_record(folder, planned_clips, settings)
    return read_corpus_record(out, is_new=True)


@contextmanager
def corpus_scratch_folder(out: Path, *, needed_bytes: int) -> Iterator[Path]:
    """Yield a scratch folder beside `out`; it is renamed to `out` on success and deleted on failure."""
    out = out.absolute()
    scratch = out.with_name(out.name + PARTIAL_SUFFIX)

    # Remove the scratch folder of a run that was killed.
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{out}: cannot make a folder here: {error.strerror}; name another place") from None

    # Check the free disk space before the work.
    try:
        free_bytes = shutil.disk_usage(scratch).free
        if free_bytes < needed_bytes:
            raise InputError(
                f"{out}: {free_bytes / BYTES_PER_GB:.1f} GB are free, "
                f"expected {needed_bytes / BYTES_PER_GB:.1f} GB; make room, or ask for fewer clips"
            )
        yield scratch
        scratch.replace(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def formula_split_sounds() -> SplitSounds:
    """Return the synthetic sounds, the same for both splits; a clip has one to three."""
    return SplitSounds(
        sounds_by_split=dict.fromkeys(DEMO_SPLITS, FORMULA_SOUNDS), extra_sound_chances=(0.45, 0.35, 0.2)
    )


def debian_split_sounds(rng: np.random.Generator, folder: Path, *, quiet: bool | None) -> SplitSounds:
    """Download recordings and divide them between the splits, one or two to a clip; deletes the packages afterwards."""
    # These are the first draws of the corpus.
    packages = folder / "packages"
    fetch_packages(packages, quiet=quiet)
    sounds_by_split: dict[str, tuple[DemoSound, ...]] = {
        split: tuple(load_recorded_sound(recording, packages) for recording in recordings)
        for split, recordings in split_recordings(rng, tuple(list_recordings())).items()
    }
    copy_licences(packages, folder / "licences")

    # Delete the recordings, because a build would report them as sounds that no list names.
    shutil.rmtree(packages)
    return SplitSounds(sounds_by_split=sounds_by_split, extra_sound_chances=(0.5, 0.5))


def plan_demo_corpus(rng: np.random.Generator, split_sounds: SplitSounds, *, clips: int) -> list[DemoClip]:
    """Return every row and file of the corpus: the train list, the broken files, the eval list."""
    train, evaluation = DEMO_SPLITS
    first_eval = clips - round(DEMO_EVAL_SHARE * clips)
    plan_clips = partial(plan_demo_clips, rng, split_sounds, used_ids=set[str]())

    # The order of these calls decides the draws of every clip.
    train_clips = plan_clips(split=train, numbers=range(first_eval))
    eval_clips = plan_clips(split=evaluation, numbers=range(first_eval, clips))
    clips_to_break = plan_clips(split=train, numbers=range(clips, clips + len(BROKEN_FILE_KINDS)))

    broken_clips = [
        with_clip_kind(replace(clip, seconds=DEMO_CLIP_SECONDS), kind)
        for clip, kind in zip(clips_to_break, BROKEN_FILE_KINDS, strict=True)
    ]
    repeated_rows = make_repeated_rows(train_clips, eval_clips)
    return [*make_odd_clips(train_clips), *broken_clips, *repeated_rows, *eval_clips]


def write_clip_files(
    folder: Path, clips: list[DemoClip], split_sounds: SplitSounds, *, seed: int, quiet: bool | None
) -> None:
    """Render and write every clip that has a file of its own, on all cores."""
    for split in DEMO_SPLITS:
        (folder / "audio" / split).mkdir(parents=True)
    clips_with_file = [clip for clip in clips if clip.expected != "duplicate"]

    # Threads suffice, because the encoders and most of NumPy release the GIL; a script then needs no main guard.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        written = pool.map(partial(write_clip_file, folder, split_sounds, seed), clips_with_file)
        for _ in tqdm(written, total=len(clips_with_file), desc="demo corpus", unit="clip", disable=quiet):
            pass


def write_clip_file(folder: Path, split_sounds: SplitSounds, seed: int, clip: DemoClip) -> None:
    """Render one clip, write it in its container, and damage it as its kind requires."""
    sound_by_name = {sound.name: sound for sound in split_sounds.sounds_by_split[clip.split]}
    sounds = [sound_by_name[name] for name in clip.parts]
    wave_SN = damage_wave(render_clip(clip, sounds, seed=seed), clip.kind)
    path = folder / clip.file
    write_audio_file(path, wave_SN, CONTAINERS_BY_NAME[clip.container], rate_hz=clip.rate_hz)
    damage_file(path, clip.kind)


def write_segments_lists(folder: Path, clips: Sequence[DemoClip], *, title: str) -> None:
    """Write SPLIT_segments.csv for each split, in AudioSet's own format, with true counts."""
    for split in dict.fromkeys(clip.split for clip in clips):
        rows = [clip for clip in clips if clip.split == split and clip.expected != "unlisted"]
        lines = [*segments_header_lines(rows, title=title), *map(segments_line, rows)]
        (folder / f"{split}_segments.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def segments_header_lines(rows: Sequence[DemoClip], *, title: str) -> list[str]:
    """Return the three comment lines of a segments list, with the settings in place of AudioSet's date."""
    id_count = len({clip.clip_id for clip in rows})
    labels = [mid for clip in rows for mid in clip.labels]
    return [
        f"# Segments csv created by ajepa-data demo-corpus: {title}",
        f"# num_ytids={id_count}, num_segs={len(rows)}, "
        f"num_unique_labels={len(set(labels))}, num_positive_labels={len(labels)}",
        "# YTID, start_seconds, end_seconds, positive_labels",
    ]


def segments_line(clip: DemoClip) -> str:
    """Return the line of a clip in a segments list."""
    return f'{clip.clip_id}, {clip.start_seconds:.3f}, {clip.end_seconds:.3f}, "{",".join(clip.labels)}"'


def write_truth_table(folder: Path, clips: Sequence[DemoClip]) -> None:
    """Write truth.csv: the true properties of every row and file, and the result that a build must give."""
    with (folder / "truth.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(TRUTH_COLUMNS)
        for clip in clips:
            # Lists become text, and times have three decimals, as in the segments lists.
            cells = {name: getattr(clip, name) for name in TRUTH_COLUMNS}
            cells["labels"] = ";".join(clip.labels)
            cells["parts"] = ";".join(clip.parts)
            table.writerow([f"{cell:.3f}" if isinstance(cell, float) else cell for cell in cells.values()])


def write_demo_readme(folder: Path, clips: Sequence[DemoClip], source: str, *, title: str) -> None:
    """Write README.txt: the layout, the origin and licence of the sounds, and every broken file."""
    # The origin and licence of the sounds.
    sounds = FORMULA_NOTICE
    if source == "debian":
        licences = (f"  {package}: {licence}" for package, licence in PACKAGE_LICENCES.items())
        sounds = DEBIAN_NOTICE + "\n".join(licences)

    # The id of each odd or broken clip, so that a user can look up why a clip failed.
    clip_of_kind = {clip.kind: clip for clip in clips}
    broken_lines = [
        f"  {kind.name:16} {clip_of_kind[kind.name].clip_id}  {kind.expected:12} {kind.description}"
        for kind in BROKEN_FILE_KINDS + REPEATED_ROW_KINDS
    ]
    odd_lines = [
        f"  {kind.name:16} {clip_of_kind[kind.name].clip_id}  {kind.description}" for kind in ODD_CLIP_KINDS
    ]
    text = DEMO_README_TEMPLATE.format(
        title=title,
        good=sum(clip.expected == "good" for clip in clips),
        sounds=sounds,
        extras="\n".join(broken_lines),
        odd="\n".join(odd_lines),
    )
    (folder / "README.txt").write_text(text, encoding="utf-8")


def write_corpus_record(folder: Path, clips: list[DemoClip], settings: DemoSettings) -> None:
    """Write corpus.json: the settings, counts, and a digest of the names and sizes of all files."""
    bytes_by_name = file_sizes(folder)
    good_clips = [clip for clip in clips if clip.expected == "good"]
    train, evaluation = DEMO_SPLITS
    record = {
        "asked": asdict(settings),
        "train_clips": sum(clip.split == train for clip in good_clips),
        "eval_clips": sum(clip.split == evaluation for clip in good_clips),
        "other": len(clips) - len(good_clips),
        "classes": len({clip.labels[0] for clip in good_clips}),
        "files": len(bytes_by_name),
        "megabytes": sum(bytes_by_name.values()) / BYTES_PER_MB,
        "digest": file_sizes_digest(bytes_by_name),
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_corpus_record(out: Path, *, is_new: bool) -> DemoCorpus:
    """Read the corpus that corpus.json describes."""
    record = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))
    return DemoCorpus(
        path=out,
        is_new=is_new,
        settings=DemoSettings(**record["asked"]),
        train_clips=record["train_clips"],
        eval_clips=record["eval_clips"],
        broken_rows=record["other"],
        classes=record["classes"],
        files=record["files"],
        megabytes=record["megabytes"],
    )


def has_same_corpus(out: Path, settings: DemoSettings) -> bool:
    """Return True if `out` has the corpus of these settings, False if it is absent or empty; else raise InputError."""
    # The folder is absent or empty, or has other content.
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / RECORD_FILE).is_file():
        raise InputError(f"{out}: exists and holds no demo corpus; name a new folder")

    # The folder has a demo corpus, but with other settings, or its files have changed.
    record = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))
    if record.get("asked") != asdict(settings):
        found = settings_line(record.get("asked", {}))
        raise InputError(
            f"{out}: holds another demo corpus ({found}), expected {settings}; name a new folder"
        )
    if record["digest"] != file_sizes_digest(file_sizes(out)):
        raise InputError(
            f"{out}: files of this demo corpus were changed since; remove the folder to make it anew"
        )
    return True


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file below a folder except corpus.json."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RECORD_FILE)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def file_sizes_digest(bytes_by_name: dict[str, int]) -> str:
    """Return the SHA-256 of names and sizes, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(bytes_by_name, sort_keys=True).encode()).hexdigest()
