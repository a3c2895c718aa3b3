"""What the demo corpus says about itself: the segments lists, truth.csv, README.txt."""

import csv
from collections.abc import Sequence
from pathlib import Path

from pipeline.datasets.demo_broken import EXTRA_FILES, EXTRA_ROWS, ODD_CLIPS
from pipeline.datasets.demo_clips import Clip
from pipeline.datasets.demo_recordings import LICENCES

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
