"""ESC-50 (Piczak 2015): 2,000 environmental sounds of 5 s, 50 classes, five folds to cross-validate over."""

from collections import Counter
from pathlib import Path

from pipeline.datasets.corpus import (
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
    """ESC-50 as unpacked: the folder that holds `audio/` and `meta/esc50.csv`; raises InputError.

    Splits fold1 to fold5, classes in the order of `target`; a clip is its file's name without `.wav`, 5 s long.
    Folds keep the pieces of one recording together: test on whole folds only.
    """
    folder = Path(root)
    check_dataset_folder(folder, "ESC-50", ESC50_REQUIRED)
    rows = read_csv_rows(folder / "meta" / "esc50.csv", ["filename", "fold", "target", "category"])
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
    classes = _esc50_classes(folder / "meta" / "esc50.csv", rows)
    folds = Counter(clip.split for clip in clips)
    return Corpus(
        plan=plan_from_clips(clips),
        sources=sources_from_clips(clips, files=len(clips)),
        classes=classes,
        dataset_settings={"dataset": "esc50", "root": absolute_path_or_url(root)},
        clip_seconds=ESC50_CLIP_SECONDS,
        notes=(
            *note_missing_files(clips, folder / "audio"),
            *compare_with_release(
                [("clips", len(clips), 2000), ("classes", len(classes), 50), ("folds", len(folds), 5)]
            ),
        ),
    )


def _esc50_classes(path: Path, rows: list[dict[str, str]]) -> ClassList:
    named: dict[int, str] = {}
    for number, row in enumerate(rows, start=2):
        if not row["target"].isdecimal() or not row["fold"].isdecimal():
            raise ManifestError(
                f"{path}: line {number}: target and fold must be whole numbers; fetch it again"
            )
        target, category = int(row["target"]), row["category"]
        if named.setdefault(target, category) != category:
            raise ManifestError(
                f"{path}: line {number}: target {target} is {category!r}, above {named[target]!r}; fetch it again"
            )
    mids = tuple(named[target] for target in sorted(named))
    return ClassList(mids=mids, names=tuple(mid.replace("_", " ") for mid in mids))
