"""What the demo corpus says about itself: the segments lists, truth.csv, README.txt.

A corpus in AudioSet's shape that anyone can make in a minute, with a few broken files to meet early.
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

TRUTH_COLUMNS = (
    *("split", "clip_id", "file", "kind", "expected", "start_seconds", "end_seconds"),
    *("seconds", "container", "rate_hz", "channels", "labels", "parts"),
)


def write_segments_lists(folder: Path, clips: Sequence[DemoClip], *, title: str) -> None:
    """Write SPLIT_segments.csv for each split, in AudioSet's own format, with true counts."""
    for split in dict.fromkeys(clip.split for clip in clips):
        rows = [clip for clip in clips if clip.split == split and clip.expected != "unlisted"]
        text = "\n".join([*segments_header_lines(rows, title=title), *map(segments_line, rows)]) + "\n"
        (folder / f"{split}_segments.csv").write_text(text, encoding="utf-8")


def segments_header_lines(rows: Sequence[DemoClip], *, title: str) -> list[str]:
    """The three comment lines of a segments list; where AudioSet's names a date, ours names what was asked for."""
    ids = len({clip.clip_id for clip in rows})
    labels = [mid for clip in rows for mid in clip.labels]
    return [
        f"# Segments csv created by ajepa-data demo-corpus: {title}",
        f"# num_ytids={ids}, num_segs={len(rows)}, "
        f"num_unique_labels={len(set(labels))}, num_positive_labels={len(labels)}",
        "# YTID, start_seconds, end_seconds, positive_labels",
    ]


def segments_line(clip: DemoClip) -> str:
    """One line of a segments list."""
    return f'{clip.clip_id}, {clip.start_seconds:.3f}, {clip.end_seconds:.3f}, "{",".join(clip.labels)}"'


def write_truth_table(folder: Path, clips: Sequence[DemoClip]) -> None:
    """Write truth.csv: what every row and every file is, and what must come of it."""
    with (folder / "truth.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(TRUTH_COLUMNS)
        for clip in clips:
            cells = {name: getattr(clip, name) for name in TRUTH_COLUMNS}
            cells |= {"labels": ";".join(clip.labels), "parts": ";".join(clip.parts)}
            table.writerow([f"{cell:.3f}" if isinstance(cell, float) else cell for cell in cells.values()])


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


def write_demo_readme(folder: Path, clips: Sequence[DemoClip], source: str, *, title: str) -> None:
    """Write README.txt: the layout, whose the sounds are, and every broken file."""
    files = {clip.kind: clip for clip in clips}
    sounds = DEBIAN_NOTICE + "\n".join(f"  {package}: {by}" for package, by in PACKAGE_LICENCES.items())
    text = DEMO_README_TEMPLATE.format(
        title=title,
        good=sum(clip.expected == "good" for clip in clips),
        sounds=FORMULA_NOTICE if source == "formula" else sounds,
        extras="\n".join(
            f"  {kind.name:16} {files[kind.name].clip_id}  {kind.expected:12} {kind.description}"
            for kind in BROKEN_FILE_KINDS + REPEATED_ROW_KINDS
        ),
        odd="\n".join(
            f"  {kind.name:16} {files[kind.name].clip_id}  {kind.description}" for kind in ODD_CLIP_KINDS
        ),
    )
    (folder / "README.txt").write_text(text, encoding="utf-8")


DEMO_VERSION = 1  # changes whenever the same arguments give other files

DEMO_SOURCES = ("formula", "debian")

MIN_DEMO_CLIPS = 20  # fewer would be mostly broken files

DEMO_CLIP_BYTES = 800_000  # 500 kB were measured

PACKAGES_BYTES = 200_000_000  # fetched and unpacked, while it is being made


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """What decides the files of a demo corpus; raises InputError on nonsense."""

    source: str
    clips: int
    seed: int
    version: int = DEMO_VERSION

    def __post_init__(self) -> None:
        if self.source not in DEMO_SOURCES:
            raise InputError(
                f"demo corpus: no source {self.source!r}; expected one of {', '.join(DEMO_SOURCES)}"
            )
        if self.clips < MIN_DEMO_CLIPS:
            raise InputError(f"demo corpus: expected {MIN_DEMO_CLIPS} clips at least, got {self.clips}")
        if self.seed < 0:
            raise InputError(f"demo corpus: expected a seed of 0 or more, got {self.seed}")

    def __str__(self) -> str:
        return settings_line(asdict(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoCorpus:
    """A finished demo corpus; `made` is False where it was there already.

    `train_clips` and `eval_clips` are the good ones, `other` counts the broken rows and files beside them.
    """

    path: Path
    is_new: bool
    asked: DemoSettings
    train_clips: int
    eval_clips: int
    other: int
    classes: int
    files: int
    megabytes: float

    def __str__(self) -> str:
        verb = "made" if self.is_new else "already there, left alone"
        return (
            f"{self.path}: {verb}: {self.train_clips} train and {self.eval_clips} eval clips "
            f"of {self.classes} classes, {self.other} broken rows and files beside them, {self.megabytes:.0f} MB; "
            "README.txt and truth.csv say what is what"
        )


def make_demo_corpus(
    out: Path, *, clips: int = 400, source: str = "formula", seed: int = 0, progress: bool | None = None
) -> DemoCorpus:
    """Make a corpus of so many good clips, a quarter of them for eval, in the new folder `out`.

    `formula` makes every sound here; `debian` fetches 49 MB of recordings. The same arguments give the same
    files, whatever the machine's cores. `progress` True or False shows or hides the bars; None asks the terminal.
    Raises InputError where `out` holds anything else than this very corpus, and leaves nothing half-made.
    """
    out, asked = Path(out), DemoSettings(source=source, clips=clips, seed=seed)
    if has_same_corpus(out, asked):
        return read_corpus_record(out, is_new=False)
    quiet = None if progress is None else not progress
    with corpus_scratch_folder(
        out, needed_bytes=clips * DEMO_CLIP_BYTES + PACKAGES_BYTES * (source == "debian")
    ) as folder:
        rng = np.random.default_rng([seed, DEMO_SOURCES.index(source)])
        palette = (
            formula_split_sounds() if source == "formula" else debian_split_sounds(rng, folder, quiet=quiet)
        )
        planned = plan_demo_corpus(rng, palette, clips=clips)
        write_clip_files(folder, planned, palette, seed=seed, quiet=quiet)
        write_segments_lists(folder, planned, title=str(asked))
        write_truth_table(folder, planned)
        write_demo_readme(folder, planned, asked.source, title=str(asked))
        write_corpus_record(folder, planned, asked)
    return read_corpus_record(out, is_new=True)


def formula_split_sounds() -> SplitSounds:
    """The formulas, for both splits alike; one to three in a clip."""
    return SplitSounds(
        sounds_by_split=dict.fromkeys(DEMO_SPLITS, FORMULA_SOUNDS), extra_sound_chances=(0.45, 0.35, 0.2)
    )


def debian_split_sounds(rng: np.random.Generator, folder: Path, *, quiet: bool | None) -> SplitSounds:
    """The recordings, dealt to the splits; one or two in a clip. The packages are gone afterwards."""
    packages = folder / "packages"
    fetch_packages(packages, quiet=quiet)
    sounds: dict[str, tuple[DemoSound, ...]] = {
        split: tuple(load_recorded_sound(recording, packages) for recording in chosen)
        for split, chosen in split_recordings(rng, tuple(list_recordings())).items()
    }
    copy_licences(packages, folder / "licences")
    shutil.rmtree(packages)  # a build would take the recordings for unlisted clips
    return SplitSounds(sounds_by_split=sounds, extra_sound_chances=(0.5, 0.5))


def plan_demo_corpus(rng: np.random.Generator, split_sounds: SplitSounds, *, clips: int) -> list[DemoClip]:
    """Every row and every file of the corpus: train, what is broken beside it, eval."""
    train, evaluation = DEMO_SPLITS
    first_eval, taken = clips - round(DEMO_EVAL_SHARE * clips), set[str]()
    plan = partial(plan_demo_clips, rng, split_sounds, used_ids=taken)
    trains = plan(split=train, numbers=range(first_eval))
    evals = plan(split=evaluation, numbers=range(first_eval, clips))
    extras = plan(split=train, numbers=range(clips, clips + len(BROKEN_FILE_KINDS)))
    broken = [
        with_clip_kind(replace(clip, seconds=DEMO_CLIP_SECONDS), kind)
        for clip, kind in zip(extras, BROKEN_FILE_KINDS, strict=True)
    ]
    return [*make_odd_clips(trains), *broken, *make_repeated_rows(trains, evals), *evals]


def write_clip_files(
    folder: Path, clips: list[DemoClip], split_sounds: SplitSounds, *, seed: int, quiet: bool | None
) -> None:
    """Render and write every clip that has a file of its own, on all cores."""
    for split in DEMO_SPLITS:
        (folder / "audio" / split).mkdir(parents=True)
    own = [clip for clip in clips if clip.expected != "duplicate"]
    # threads: the encoders and most of numpy leave the interpreter lock, and a script needs no main guard
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(partial(write_clip_file, folder, split_sounds, seed), own)
        for _ in tqdm(made, total=len(own), desc="demo corpus", unit="clip", disable=quiet):
            pass


def write_clip_file(folder: Path, split_sounds: SplitSounds, seed: int, clip: DemoClip) -> None:
    """Render one clip, write it in its container, and break it if it is to be broken."""
    sounds = {sound.name: sound for sound in split_sounds.sounds_by_split[clip.split]}
    wave_SN = render_clip(clip, [sounds[name] for name in clip.parts], seed=seed)
    write_audio_file(
        folder / clip.file,
        damage_wave(wave_SN, clip.kind),
        CONTAINERS_BY_NAME[clip.container],
        rate_hz=clip.rate_hz,
    )
    damage_file(folder / clip.file, clip.kind)


@contextmanager
def corpus_scratch_folder(out: Path, *, needed_bytes: int) -> Iterator[Path]:
    """Yield a scratch folder beside `out` that takes its place on success and is gone after a failure."""
    out = out.absolute()
    scratch = out.with_name(out.name + PARTIAL_SUFFIX)
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{out}: cannot make a folder here: {error.strerror}; name another place") from None
    try:
        free_bytes = shutil.disk_usage(scratch).free
        if free_bytes < needed_bytes:
            raise InputError(
                f"{out}: {free_bytes / 1e9:.1f} GB are free, expected {needed_bytes / 1e9:.1f} GB; "
                "make room, or ask for fewer clips"
            )
        yield scratch
        scratch.replace(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_corpus_record(folder: Path, clips: list[DemoClip], settings: DemoSettings) -> None:
    """Write corpus.json: what was asked for, what came out, and a digest of the names and sizes of all files."""
    files = file_sizes(folder)
    good = [clip for clip in clips if clip.expected == "good"]
    record = {
        "asked": asdict(settings),
        "train_clips": sum(clip.split == DEMO_SPLITS[0] for clip in good),
        "eval_clips": sum(clip.split == DEMO_SPLITS[1] for clip in good),
        "other": len(clips) - len(good),
        "classes": len({clip.labels[0] for clip in good}),
        "files": len(files),
        "megabytes": sum(files.values()) / 1e6,
        "digest": file_sizes_digest(files),
    }
    (folder / "corpus.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_corpus_record(out: Path, *, is_new: bool) -> DemoCorpus:
    """What corpus.json says."""
    record = json.loads((out / "corpus.json").read_text(encoding="utf-8"))
    del record["digest"]
    return DemoCorpus(path=out, is_new=is_new, **(record | {"asked": DemoSettings(**record["asked"])}))


def has_same_corpus(out: Path, settings: DemoSettings) -> bool:
    """Whether the corpus asked for is there; False where `out` is absent or empty, else InputError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "corpus.json").is_file():
        raise InputError(f"{out}: exists and holds no demo corpus; name a new folder")
    record = json.loads((out / "corpus.json").read_text(encoding="utf-8"))
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


def settings_line(settings: dict[str, object]) -> str:
    """Settings in one line: source formula, clips 400, seed 0."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def file_sizes(folder: Path) -> dict[str, int]:
    """The size in bytes of every file below a folder but corpus.json."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "corpus.json")
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def file_sizes_digest(bytes_by_name: dict[str, int]) -> str:
    """One hash of names and sizes."""
    return hashlib.sha256(json.dumps(bytes_by_name, sort_keys=True).encode()).hexdigest()
