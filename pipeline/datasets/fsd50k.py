"""FSD50K (Fonseca et al. 2020, arXiv 2010.00475): Freesound clips of 0.3 to 30 s, 200 of AudioSet's classes."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from pipeline.datasets.corpus import (
    Corpus,
    CutSettings,
    ListedClip,
    ProgressWrapper,
    absolute_path_or_url,
    check_dataset_folder,
    compare_with_release,
    cut_clips,
    note_missing_files,
    plan_from_clips,
    read_csv_rows,
    read_list_text,
    sources_from_clips,
)
from pipeline.errors import ManifestError
from pipeline.labels.ontology import ClassList

GROUND_TRUTH_FOLDER = "FSD50K.ground_truth"

FSD50K_AUDIO_FOLDERS = {"dev": "FSD50K.dev_audio", "eval": "FSD50K.eval_audio"}

FSD50K_REQUIRED = (*FSD50K_AUDIO_FOLDERS.values(), GROUND_TRUTH_FOLDER)

DEV_SPLITS = ("train", "val")

FSD50K_SOUND_COUNTS = {"dev": 40_966, "eval": 10_231}


def fsd50k_corpus(
    root: Path | str,
    clip_seconds: float = 10.0,
    cut: bool = False,
    *,
    progress: ProgressWrapper | None = None,
) -> Corpus:
    """FSD50K as unpacked: the folder that holds FSD50K.dev_audio, .eval_audio, .ground_truth; raises InputError.

    clip_seconds  the first that many seconds of a sound are its clip
    cut           make of what follows clips too, each with the labels of the whole sound. Those are weak labels:
                  a piece need not hold what its sound is labelled with; for scores on eval leave it off

    Splits train, val (both from dev.csv) and eval. A clip is its Freesound number, and `@` and its first millisecond
    where sounds are cut. Labels are AudioSet's ids and hold their ancestors already, but where FSD50K follows no
    link of the ontology: a tap is at no door, a church bell no instrument. Propagation adds these.
    """
    how = CutSettings(clip_seconds=clip_seconds, hop_seconds=clip_seconds if cut else None)
    folder = Path(root)
    check_dataset_folder(folder, "FSD50K", FSD50K_REQUIRED)
    classes = _read_vocabulary(folder / GROUND_TRUTH_FOLDER / "vocabulary.csv")
    part = {name: list(_read_sound_list(folder, name, classes)) for name in FSD50K_AUDIO_FOLDERS}
    sounds = [sound for sounds in part.values() for sound in sounds]
    missing = [
        note
        for name, sounds in part.items()
        for note in note_missing_files(sounds, folder / FSD50K_AUDIO_FOLDERS[name])
    ]
    clips, notes = cut_clips(sounds, how, progress=progress)
    return Corpus(
        plan=plan_from_clips(clips),
        sources=sources_from_clips(clips, files=len(sounds)),
        classes=classes,
        dataset_settings={
            "dataset": "fsd50k",
            "root": absolute_path_or_url(root),
            "clip_seconds": clip_seconds,
            "cut": cut,
        },
        clip_seconds=clip_seconds,
        notes=(
            *missing,
            *notes,
            *compare_with_release(
                (f"{name} sounds", len(part[name]), count) for name, count in FSD50K_SOUND_COUNTS.items()
            ),
            *compare_with_release([("classes", len(classes), 200)]),
        ),
    )


def _read_sound_list(folder: Path, name: str, classes: ClassList) -> Iterator[ListedClip]:
    path = folder / GROUND_TRUTH_FOLDER / f"{name}.csv"
    for number, row in enumerate(
        read_csv_rows(path, ["fname", "mids", *["split"] * (name == "dev")]), start=2
    ):
        mids = tuple(mid.strip() for mid in row["mids"].split(",") if mid.strip())
        if unknown := [mid for mid in mids if mid not in classes.index_of]:
            raise ManifestError(
                f"{path}: line {number}: {unknown[0]} is not in vocabulary.csv; fetch it again"
            )
        split = row["split"] if name == "dev" else "eval"
        if name == "dev" and split not in DEV_SPLITS:
            raise ManifestError(f"{path}: line {number}: split {split!r}, expected {' or '.join(DEV_SPLITS)}")
        source = f"{FSD50K_AUDIO_FOLDERS[name]}/{row['fname']}.wav"
        yield ListedClip(
            clip_id=row["fname"], path=str(folder / source), source=source, split=split, mids=mids
        )


def _read_vocabulary(path: Path) -> ClassList:
    """The classes of lines like `7,Applause,/m/028ght`; there is no line of column names."""
    rows = [cells for cells in csv.reader(io.StringIO(read_list_text(path), newline="")) if cells]
    for index, cells in enumerate(rows):
        if len(cells) != 3 or cells[0] != str(index):
            raise ManifestError(
                f"{path}: line {index + 1}: {','.join(cells)[:60]!r}, expected {index},name,mid; fetch it again"
            )
    mids, names = (tuple(cells[place].strip() for cells in rows) for place in (2, 1))
    return ClassList(mids=mids, names=tuple(name.replace("_", " ") for name in names))
