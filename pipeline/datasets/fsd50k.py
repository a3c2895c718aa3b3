"""FSD50K (Fonseca et al. 2020, arXiv 2010.00475): Freesound clips of 0.3 to 30 s, 200 of AudioSet's classes."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from pipeline.datasets.corpus import (
    Corpus,
    Cut,
    Listed,
    Progress,
    check_layout,
    counted,
    fitted,
    place_of,
    plan_of,
    present,
    rows_of,
    sources_of,
    text_of,
)
from pipeline.errors import ManifestError
from pipeline.labels.ontology import ClassList

LISTS = "FSD50K.ground_truth"

AUDIO = {"dev": "FSD50K.dev_audio", "eval": "FSD50K.eval_audio"}

NEEDED = (*AUDIO.values(), LISTS)

DEV_SPLITS = ("train", "val")

OFFICIAL = {"dev": 40_966, "eval": 10_231}


def fsd50k(
    root: Path | str, clip_seconds: float = 10.0, cut: bool = False, *, progress: Progress | None = None
) -> Corpus:
    """FSD50K as unpacked: the folder that holds FSD50K.dev_audio, .eval_audio, .ground_truth; raises InputError.

    clip_seconds  the first that many seconds of a sound are its clip
    cut           make of what follows clips too, each with the labels of the whole sound. Those are weak labels:
                  a piece need not hold what its sound is labelled with; for scores on eval leave it off

    Splits train, val (both from dev.csv) and eval. A clip is its Freesound number, and `@` and its first millisecond
    where sounds are cut. Labels are AudioSet's ids and hold their ancestors already, but where FSD50K follows no
    link of the ontology: a tap is at no door, a church bell no instrument. Propagation adds these.
    """
    how = Cut(clip_seconds=clip_seconds, hop_seconds=clip_seconds if cut else None)
    folder = Path(root)
    check_layout(folder, "FSD50K", NEEDED)
    classes = _vocabulary(folder / LISTS / "vocabulary.csv")
    part = {name: list(_part(folder, name, classes)) for name in AUDIO}
    sounds = [sound for sounds in part.values() for sound in sounds]
    missing = [note for name, sounds in part.items() for note in present(sounds, folder / AUDIO[name])]
    clips, notes = fitted(sounds, how, progress=progress)
    return Corpus(
        plan=plan_of(clips),
        sources=sources_of(clips, files=len(sounds)),
        classes=classes,
        asked={"dataset": "fsd50k", "root": place_of(root), "clip_seconds": clip_seconds, "cut": cut},
        clip_seconds=clip_seconds,
        notes=(
            *missing,
            *notes,
            *counted((f"{name} sounds", len(part[name]), count) for name, count in OFFICIAL.items()),
            *counted([("classes", len(classes), 200)]),
        ),
    )


def _part(folder: Path, name: str, classes: ClassList) -> Iterator[Listed]:
    path = folder / LISTS / f"{name}.csv"
    for number, row in enumerate(rows_of(path, ["fname", "mids", *["split"] * (name == "dev")]), start=2):
        mids = tuple(mid.strip() for mid in row["mids"].split(",") if mid.strip())
        if unknown := [mid for mid in mids if mid not in classes.index_of]:
            raise ManifestError(
                f"{path}: line {number}: {unknown[0]} is not in vocabulary.csv; fetch it again"
            )
        split = row["split"] if name == "dev" else "eval"
        if name == "dev" and split not in DEV_SPLITS:
            raise ManifestError(f"{path}: line {number}: split {split!r}, expected {' or '.join(DEV_SPLITS)}")
        source = f"{AUDIO[name]}/{row['fname']}.wav"
        yield Listed(clip_id=row["fname"], path=str(folder / source), source=source, split=split, mids=mids)


def _vocabulary(path: Path) -> ClassList:
    """The classes of lines like `7,Applause,/m/028ght`; there is no line of column names."""
    rows = [cells for cells in csv.reader(io.StringIO(text_of(path), newline="")) if cells]
    for index, cells in enumerate(rows):
        if len(cells) != 3 or cells[0] != str(index):
            raise ManifestError(
                f"{path}: line {index + 1}: {','.join(cells)[:60]!r}, expected {index},name,mid; fetch it again"
            )
    mids, names = (tuple(cells[place].strip() for cells in rows) for place in (2, 1))
    return ClassList(mids=mids, names=tuple(name.replace("_", " ") for name in names))
