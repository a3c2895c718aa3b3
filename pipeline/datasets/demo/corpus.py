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

from pipeline.datasets.demo.audio_files import CONTAINERS, write
from pipeline.datasets.demo.clips import (
    CLIP_SECONDS,
    EXTRA_FILES,
    EXTRA_ROWS,
    ODD_CLIPS,
    Clip,
    Palette,
    extra_rows,
    odd_clips,
    plan_clips,
    render,
    spoil_file,
    spoil_wave,
    with_kind,
)
from pipeline.datasets.demo.recordings import (
    EVAL_SHARE,
    LICENCES,
    SPLITS,
    fetch,
    keep_licences,
    recordings,
    sound,
    split_recordings,
)
from pipeline.datasets.demo.synthesis import FORMULAS, Sound
from pipeline.errors import InputError
from pipeline.files import PARTIAL

TRUTH_FIELDS = (
    *("split", "clip_id", "file", "kind", "expected", "start_seconds", "end_seconds"),
    *("seconds", "container", "rate_hz", "channels", "labels", "parts"),
)


def write_lists(folder: Path, planned: Sequence[Clip], *, title: str) -> None:
    """Write SPLIT_segments.csv for each split, in AudioSet's own format, with true counts."""
    for split in dict.fromkeys(clip.split for clip in planned):
        rows = [clip for clip in planned if clip.split == split and clip.expected != "unlisted"]
        text = "\n".join([*header(rows, title=title), *map(row, rows)]) + "\n"
        (folder / f"{split}_segments.csv").write_text(text, encoding="utf-8")


def header(rows: Sequence[Clip], *, title: str) -> list[str]:
    """The three comment lines of a segments list; where AudioSet's names a date, ours names what was asked for."""
    ids = len({clip.clip_id for clip in rows})
    labels = [mid for clip in rows for mid in clip.labels]
    return [
        f"# Segments csv created by ajepa-data demo-corpus: {title}",
        f"# num_ytids={ids}, num_segs={len(rows)}, "
        f"num_unique_labels={len(set(labels))}, num_positive_labels={len(labels)}",
        "# YTID, start_seconds, end_seconds, positive_labels",
    ]


def row(clip: Clip) -> str:
    """One line of a segments list."""
    return f'{clip.clip_id}, {clip.start_seconds:.3f}, {clip.end_seconds:.3f}, "{",".join(clip.labels)}"'


def write_truth(folder: Path, planned: Sequence[Clip]) -> None:
    """Write truth.csv: what every row and every file is, and what must come of it."""
    with (folder / "truth.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(TRUTH_FIELDS)
        for clip in planned:
            cells = {name: getattr(clip, name) for name in TRUTH_FIELDS}
            cells |= {"labels": ";".join(clip.labels), "parts": ";".join(clip.parts)}
            table.writerow([f"{cell:.3f}" if isinstance(cell, float) else cell for cell in cells.values()])


README = """\
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

FORMULA = """\
Every sound is computed from the definition of its class: there is no recording in it, and no right of others.
A class never sounds the same twice: level, pitch, onset, length, cadence and the noise below are drawn anew."""

DEBIAN = """\
The sounds are recordings from Debian packages, mixed in ones and twos over faint noise. A recording is heard
in one split only, unless it is the only one of its classes: then it is heard in both.

Whoever passes this corpus on passes on their licences; each package's own statement is in licences/:
"""


def write_readme(folder: Path, planned: Sequence[Clip], source: str, *, title: str) -> None:
    """Write README.txt: the layout, whose the sounds are, and every broken file."""
    files = {clip.kind: clip for clip in planned}
    sounds = DEBIAN + "\n".join(f"  {package}: {by}" for package, by in LICENCES.items())
    text = README.format(
        title=title,
        good=sum(clip.expected == "good" for clip in planned),
        sounds=FORMULA if source == "formula" else sounds,
        extras="\n".join(
            f"  {kind.name:16} {files[kind.name].clip_id}  {kind.expected:12} {kind.what}"
            for kind in EXTRA_FILES + EXTRA_ROWS
        ),
        odd="\n".join(f"  {kind.name:16} {files[kind.name].clip_id}  {kind.what}" for kind in ODD_CLIPS),
    )
    (folder / "README.txt").write_text(text, encoding="utf-8")


VERSION = 1  # changes whenever the same arguments give other files

SOURCES = ("formula", "debian")

MIN_CLIPS = 20  # fewer would be mostly broken files

BYTES_PER_CLIP = 800_000  # 500 kB were measured

PACKAGES_BYTES = 200_000_000  # fetched and unpacked, while it is being made


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What decides the files of a demo corpus; raises InputError on nonsense."""

    source: str
    clips: int
    seed: int
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise InputError(f"demo corpus: no source {self.source!r}; expected one of {', '.join(SOURCES)}")
        if self.clips < MIN_CLIPS:
            raise InputError(f"demo corpus: expected {MIN_CLIPS} clips at least, got {self.clips}")
        if self.seed < 0:
            raise InputError(f"demo corpus: expected a seed of 0 or more, got {self.seed}")

    def __str__(self) -> str:
        return spelled(asdict(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoCorpus:
    """A finished demo corpus; `made` is False where it was there already.

    `train_clips` and `eval_clips` are the good ones, `other` counts the broken rows and files beside them.
    """

    path: Path
    made: bool
    asked: Asked
    train_clips: int
    eval_clips: int
    other: int
    classes: int
    files: int
    megabytes: float

    def __str__(self) -> str:
        verb = "made" if self.made else "already there, left alone"
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
    out, asked = Path(out), Asked(source=source, clips=clips, seed=seed)
    if holds(out, asked):
        return summary(out, made=False)
    quiet = None if progress is None else not progress
    with building(out, needed_bytes=clips * BYTES_PER_CLIP + PACKAGES_BYTES * (source == "debian")) as folder:
        rng = np.random.default_rng([seed, SOURCES.index(source)])
        palette = formula_palette() if source == "formula" else debian_palette(rng, folder, quiet=quiet)
        planned = plan_corpus(rng, palette, clips=clips)
        make_files(folder, planned, palette, seed=seed, quiet=quiet)
        write_lists(folder, planned, title=str(asked))
        write_truth(folder, planned)
        write_readme(folder, planned, asked.source, title=str(asked))
        write_record(folder, planned, asked)
    return summary(out, made=True)


def formula_palette() -> Palette:
    """The formulas, for both splits alike; one to three in a clip."""
    return Palette(sounds=dict.fromkeys(SPLITS, FORMULAS), chances=(0.45, 0.35, 0.2))


def debian_palette(rng: np.random.Generator, folder: Path, *, quiet: bool | None) -> Palette:
    """The recordings, dealt to the splits; one or two in a clip. The packages are gone afterwards."""
    packages = folder / "packages"
    fetch(packages, quiet=quiet)
    sounds: dict[str, tuple[Sound, ...]] = {
        split: tuple(sound(recording, packages) for recording in chosen)
        for split, chosen in split_recordings(rng, tuple(recordings())).items()
    }
    keep_licences(packages, folder / "licences")
    shutil.rmtree(packages)  # a build would take the recordings for unlisted clips
    return Palette(sounds=sounds, chances=(0.5, 0.5))


def plan_corpus(rng: np.random.Generator, palette: Palette, *, clips: int) -> list[Clip]:
    """Every row and every file of the corpus: train, what is broken beside it, eval."""
    train, evaluation = SPLITS
    first_eval, taken = clips - round(EVAL_SHARE * clips), set[str]()
    plan = partial(plan_clips, rng, palette, taken=taken)
    trains = plan(split=train, numbers=range(first_eval))
    evals = plan(split=evaluation, numbers=range(first_eval, clips))
    extras = plan(split=train, numbers=range(clips, clips + len(EXTRA_FILES)))
    broken = [
        with_kind(replace(clip, seconds=CLIP_SECONDS), kind)
        for clip, kind in zip(extras, EXTRA_FILES, strict=True)
    ]
    return [*odd_clips(trains), *broken, *extra_rows(trains, evals), *evals]


def make_files(folder: Path, planned: list[Clip], palette: Palette, *, seed: int, quiet: bool | None) -> None:
    """Render and write every clip that has a file of its own, on all cores."""
    for split in SPLITS:
        (folder / "audio" / split).mkdir(parents=True)
    own = [clip for clip in planned if clip.expected != "duplicate"]
    # threads: the encoders and most of numpy leave the interpreter lock, and a script needs no main guard
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(partial(make_file, folder, palette, seed), own)
        for _ in tqdm(made, total=len(own), desc="demo corpus", unit="clip", disable=quiet):
            pass


def make_file(folder: Path, palette: Palette, seed: int, clip: Clip) -> None:
    """Render one clip, write it in its container, and break it if it is to be broken."""
    sounds = {sound.name: sound for sound in palette.sounds[clip.split]}
    wave_SN = render(clip, [sounds[name] for name in clip.parts], seed=seed)
    write(
        folder / clip.file, spoil_wave(wave_SN, clip.kind), CONTAINERS[clip.container], rate_hz=clip.rate_hz
    )
    spoil_file(folder / clip.file, clip.kind)


@contextmanager
def building(out: Path, *, needed_bytes: int) -> Iterator[Path]:
    """Yield a scratch folder beside `out` that takes its place on success and is gone after a failure."""
    out = out.absolute()
    scratch = out.with_name(out.name + PARTIAL)
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


def write_record(folder: Path, planned: list[Clip], asked: Asked) -> None:
    """Write corpus.json: what was asked for, what came out, and a digest of the names and sizes of all files."""
    files = inventory(folder)
    good = [clip for clip in planned if clip.expected == "good"]
    record = {
        "asked": asdict(asked),
        "train_clips": sum(clip.split == SPLITS[0] for clip in good),
        "eval_clips": sum(clip.split == SPLITS[1] for clip in good),
        "other": len(planned) - len(good),
        "classes": len({clip.labels[0] for clip in good}),
        "files": len(files),
        "megabytes": sum(files.values()) / 1e6,
        "digest": digest(files),
    }
    (folder / "corpus.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def summary(out: Path, *, made: bool) -> DemoCorpus:
    """What corpus.json says."""
    record = json.loads((out / "corpus.json").read_text(encoding="utf-8"))
    del record["digest"]
    return DemoCorpus(path=out, made=made, **(record | {"asked": Asked(**record["asked"])}))


def holds(out: Path, asked: Asked) -> bool:
    """Whether the corpus asked for is there; False where `out` is absent or empty, else InputError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "corpus.json").is_file():
        raise InputError(f"{out}: exists and holds no demo corpus; name a new folder")
    record = json.loads((out / "corpus.json").read_text(encoding="utf-8"))
    if record.get("asked") != asdict(asked):
        found = spelled(record.get("asked", {}))
        raise InputError(f"{out}: holds another demo corpus ({found}), expected {asked}; name a new folder")
    if record["digest"] != digest(inventory(out)):
        raise InputError(
            f"{out}: files of this demo corpus were changed since; remove the folder to make it anew"
        )
    return True


def spelled(settings: dict[str, object]) -> str:
    """Settings in one line: source formula, clips 400, seed 0."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def inventory(folder: Path) -> dict[str, int]:
    """The size in bytes of every file below a folder but corpus.json."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "corpus.json")
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def digest(files: dict[str, int]) -> str:
    """One hash of names and sizes."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
