"""ESC-50 (Piczak 2015): 2,000 environmental sounds of 5 s, 50 classes, five folds for cross-validation."""

from pathlib import Path
from typing import Any

from pipeline.datasets.corpus import (
    FIRST_ROW_LINE,
    Corpus,
    ListedClip,
    absolute_path_or_url,
    check_dataset_folder,
    compare_with_release,
    note_missing_files,
    plan_from_clips,
    read_csv_rows,
    sources_from_clips,
)
from pipeline.errors import ManifestError
from pipeline.labels.ontology import ClassList

ESC50_REQUIRED = ("audio", "meta/esc50.csv")

ESC50_CLIP_SECONDS = 5.0


def esc50_corpus(root: Path | str) -> Corpus:
    """Return the corpus of the unpacked ESC-50: `root` contains `audio/` and `meta/esc50.csv`; raises InputError.

    The splits are fold1 to fold5; the classes are in the order of `target`. A clip is 5 s long; its id is the file name
    without `.wav`. All pieces of one recording are in the same fold, so test only on whole folds.
    """
    folder = Path(root)
    check_dataset_folder(folder, "ESC-50", ESC50_REQUIRED)
    list_path = folder / "meta" / "esc50.csv"
    rows = read_csv_rows(list_path, ["filename", "fold", "target", "category"])

    # A clip for each row, even if its file does not exist.
    clips = [
        ListedClip(
            clip_id=row["filename"].removesuffix(".wav"),
            path=str(folder / "audio" / row["filename"]),
            source=f"audio/{row['filename']}",
            split=f"fold{row['fold']}",
            mids=(row["category"],),
            end_seconds=ESC50_CLIP_SECONDS,
        )
        for row in rows
    ]

    # Classes and folds; their numbers in the official release are fixed.
    classes = _esc50_classes(list_path, rows)
    folds = {clip.split for clip in clips}
    return Corpus(
        plan=plan_from_clips(clips),
        sources=sources_from_clips(clips, files=len(clips)),
        classes=classes,
        dataset_settings=esc50_settings(root),
        clip_seconds=ESC50_CLIP_SECONDS,
        notes=(
            *note_missing_files(clips, folder / "audio"),
            *compare_with_release(
                [("clips", len(clips), 2000), ("classes", len(classes), 50), ("folds", len(folds), 5)]
            ),
        ),
    )


def esc50_settings(root: Path | str) -> dict[str, Any]:
    """Return the `Corpus.dataset_settings` of `esc50_corpus` with these arguments."""
    return {"dataset": "esc50", "root": absolute_path_or_url(root)}


def _esc50_classes(path: Path, rows: list[dict[str, str]]) -> ClassList:
    """Return the classes in the order of `target`; ManifestError if a row contradicts another row."""
    category_by_target: dict[int, str] = {}
    for line_number, row in enumerate(rows, start=FIRST_ROW_LINE):
        # The target orders the classes, the fold names the split.
        if not row["target"].isdecimal() or not row["fold"].isdecimal():
            raise ManifestError(
                f"{path}: line {line_number}: target and fold must be whole numbers; fetch it again"
            )

        # Each target has one category.
        target = int(row["target"])
        category = row["category"]
        earlier_category = category_by_target.setdefault(target, category)
        if category != earlier_category:
            raise ManifestError(
                f"{path}: line {line_number}: target {target} is {category!r}, above {earlier_category!r}; "
                "fetch it again"
            )

    mids = tuple(category_by_target[target] for target in sorted(category_by_target))
    return ClassList(mids=mids, names=tuple(mid.replace("_", " ") for mid in mids))
