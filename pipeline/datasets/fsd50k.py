"""FSD50K (Fonseca et al. 2020, arXiv 2010.00475): Freesound clips of 0.3 to 30 s, 200 of AudioSet's classes."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.datasets.corpus import (
    FIRST_ROW_LINE,
    SHOWN_LINE_LETTERS,
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

# Numbers of sounds in the official release.
FSD50K_SOUND_COUNTS = {"dev": 40_966, "eval": 10_231}

FSD50K_CLASS_COUNT = 200


def fsd50k_corpus(
    root: Path | str,
    clip_seconds: float = 10.0,
    cut: bool = False,
    *,
    progress: ProgressWrapper | None = None,
) -> Corpus:
    """Return the corpus of the unpacked FSD50K in the folder `root`; raises InputError.

    root          folder that contains FSD50K.dev_audio, FSD50K.eval_audio and FSD50K.ground_truth
    clip_seconds  length of a clip in seconds; a clip is the beginning of its sound
    cut           also make clips of the rest of a sound, each with the labels of the whole sound. These labels are
                  weak, because a piece may not contain the labelled event; do not cut to compute scores on eval

    The splits are train and val, both from dev.csv, and eval. The id of a clip is its Freesound number; if sounds are
    cut, `@` and the start in milliseconds are added. Labels are AudioSet ids and include their ancestors, except for
    links of the ontology that FSD50K does not use: its tap has no ancestor door, its church bell no ancestor
    instrument. Propagation adds these ancestors.
    """
    cut_settings = CutSettings(clip_seconds=clip_seconds, hop_seconds=clip_seconds if cut else None)

    # The classes, in the order of their numbers in the vocabulary.
    folder = Path(root)
    check_dataset_folder(folder, "FSD50K", FSD50K_REQUIRED)
    classes = _read_vocabulary(folder / GROUND_TRUTH_FOLDER / "vocabulary.csv")

    # The sounds of both lists, and a note on missing sounds.
    sounds: list[ListedClip] = []
    missing_notes: list[str] = []
    count_notes: list[str] = []
    for list_name, audio_folder in FSD50K_AUDIO_FOLDERS.items():
        listed = list(_read_sound_list(folder, list_name, classes))
        sounds += listed
        missing_notes += note_missing_files(listed, folder / audio_folder)
        count_notes += compare_with_release(
            [(f"{list_name} sounds", len(listed), FSD50K_SOUND_COUNTS[list_name])]
        )
    count_notes += compare_with_release([("classes", len(classes), FSD50K_CLASS_COUNT)])

    # The clips of these sounds: one clip of each sound, or several if sounds are cut.
    clips, cut_notes = cut_clips(sounds, cut_settings, progress=progress)
    return Corpus(
        plan=plan_from_clips(clips),
        sources=sources_from_clips(clips, files=len(sounds)),
        classes=classes,
        dataset_settings=fsd50k_settings(root, clip_seconds, cut=cut),
        clip_seconds=clip_seconds,
        notes=(*missing_notes, *cut_notes, *count_notes),
    )


def fsd50k_settings(root: Path | str, clip_seconds: float = 10.0, *, cut: bool = False) -> dict[str, Any]:
    """Return the `Corpus.dataset_settings` of `fsd50k_corpus` with these arguments."""
    return {
        "dataset": "fsd50k",
        "root": absolute_path_or_url(root),
        "clip_seconds": clip_seconds,
        "cut": cut,
    }


def _read_vocabulary(path: Path) -> ClassList:
    """Return the classes from lines like `7,Applause,/m/028ght`; the file has no line of column names."""
    rows = [cells for cells in csv.reader(io.StringIO(read_list_text(path), newline="")) if cells]
    for index, cells in enumerate(rows):
        if len(cells) != 3 or cells[0] != str(index):
            raise ManifestError(
                f"{path}: line {index + 1}: {','.join(cells)[:SHOWN_LINE_LETTERS]!r}, expected {index},name,mid; "
                "fetch it again"
            )
    return ClassList(
        mids=tuple(mid.strip() for _, _, mid in rows),
        names=tuple(name.strip().replace("_", " ") for _, name, _ in rows),
    )


def _read_sound_list(folder: Path, list_name: str, classes: ClassList) -> Iterator[ListedClip]:
    """Yield each sound of dev.csv or eval.csv as a clip; ManifestError if a line is invalid."""
    is_dev = list_name == "dev"
    path = folder / GROUND_TRUTH_FOLDER / f"{list_name}.csv"
    columns = ["fname", "mids", "split"] if is_dev else ["fname", "mids"]
    for line_number, row in enumerate(read_csv_rows(path, columns), start=FIRST_ROW_LINE):
        # Labels are ids of the vocabulary.
        mids = tuple(mid.strip() for mid in row["mids"].split(",") if mid.strip())
        if unknown := [mid for mid in mids if mid not in classes.index_of]:
            raise ManifestError(
                f"{path}: line {line_number}: {unknown[0]} is not in vocabulary.csv; fetch it again"
            )

        # dev.csv has two splits, eval.csv has one.
        split = row["split"] if is_dev else "eval"
        if is_dev and split not in DEV_SPLITS:
            raise ManifestError(
                f"{path}: line {line_number}: split {split!r}, expected {' or '.join(DEV_SPLITS)}; fetch it again"
            )
        source = f"{FSD50K_AUDIO_FOLDERS[list_name]}/{row['fname']}.wav"
        yield ListedClip(
            clip_id=row["fname"], path=str(folder / source), source=source, split=split, mids=mids
        )
