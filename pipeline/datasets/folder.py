"""A user's own sounds: any folder of files, with or without a table of labels, splits and times."""

import os.path
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.datasets.clip_table import (
    GROUP_COLUMN,
    SPLIT_COLUMN,
    ClipTable,
    ClipTableRow,
    load_clip_table,
)
from pipeline.datasets.corpus import (
    Corpus,
    CutSettings,
    ListedClip,
    ProgressWrapper,
    absolute_path_or_url,
    cut_clips,
    plan_from_clips,
    sources_from_clips,
)
from pipeline.datasets.holdout import (
    FILE_GROUPING,
    FOLDER_GROUPING,
    NO_HELD_OUT_SPLIT_NOTE,
    hold_out_clips,
    lacks_split_to_measure,
)
from pipeline.datasets.sound_folder import SoundFolder
from pipeline.errors import InputError, ManifestError
from pipeline.labels.ontology import UNLABELLED_CLASSES, ClassList
from pipeline.messages import count_phrase, suggest_known
from pipeline.store.manifest import nearest_texts

FOLDER_CLIP_SECONDS = 10.0  # default length of a clip

LABEL_ORIGINS = ("none", "parent")


def folder_corpus(
    root: Path | str,
    table: Path | str | None = None,
    clip_seconds: float | None = None,
    hop_seconds: float | None = None,
    split: str = "train",
    label_from: str = "none",
    holdout: float | None = None,
    group: str | None = None,
    split_column: str | None = None,
    keep_tail: bool = False,
    *,
    progress: ProgressWrapper | None = None,
) -> Corpus:
    """Return the corpus of all sounds below a folder, or of the sounds in a table; raises InputError.

    Without a table, every file is one clip, in the order of names. With a table, every row is one clip, in its order.

    root          folder of sounds; all folders below it are searched
    table         CSV or Parquet table with the column path (relative to the folder, or absolute) and optionally: label
                  or labels (several separated by ;), split, start and end (seconds of the file), id
    clip_seconds  length of a clip in seconds, default 10; a clip without an end in the table is at most this long
    hop_seconds   distance in seconds between the starts of two clips of a file; longer files are cut into several
                  clips, without overlap if it equals clip_seconds. The rest at the end of a file is a clip if it is at
                  least half a clip long (see keep_tail). None: each file gives one clip
    split         split of every clip that has none in the table
    label_from    parent: a file's label is the name of its folder; none: labels come only from the table
    holdout       share of the sounds that is held out as the split eval; None: only the table names splits
    group         clips that are held out together: file, folder, or a column of the table (`hold_out_clips`)
    split_column  column of the table that names splits, or numbers folds; None: split
    keep_tail     with a hop, also keep a shorter rest at the end of a file, from `CutSettings.min_tail_seconds` on

    The id of a clip is its id in the table, or else the path below the folder with the extension. If files are cut, or
    if the start in the table is above 0, `@` and the start in milliseconds are added. Classes are the labels in use,
    sorted by number if all are whole numbers, else by name.
    """
    _check_folder_options(clip_seconds, hop_seconds, split, label_from, keep_tail=keep_tail)
    _check_split_options(table, holdout, group, split_column)
    cut_settings = CutSettings(
        clip_seconds=FOLDER_CLIP_SECONDS if clip_seconds is None else clip_seconds,
        hop_seconds=hop_seconds,
        keep_tail=keep_tail,
    )

    # The clips, one for each file or row of the table, and the groups of the table.
    sound_folder, notes = SoundFolder.scan_folder(Path(root))
    if table is None:
        clips = [_whole_file_clip(sound_folder, name, split, label_from) for name in sound_folder.sound_names]
        groups: list[str | None] = [None] * len(clips)
    else:
        has_group_column = group not in (None, FILE_GROUPING, FOLDER_GROUPING)
        clip_table = load_clip_table(
            Path(table),
            split_column=split_column or SPLIT_COLUMN,
            group_column=group if group and has_group_column else GROUP_COLUMN,
        )
        groups = [row.group for row in clip_table.rows]
        clips, table_notes = _clips_from_table(
            Path(table),
            clip_table,
            sound_folder,
            split,
            label_from,
            cuts_long_files=hop_seconds is not None,
        )
        notes += table_notes

    # The files that no clip names, because the table leaves them out.
    clip_paths = {clip.path for clip in clips}
    unmatched = [name for name in sound_folder.sound_names if sound_folder.file_path(name) not in clip_paths]
    if unmatched:
        notes.append(
            f"{count_phrase(len(unmatched), 'sound')} of the folder {'is' if len(unmatched) == 1 else 'are'} "
            f"in no row of the table and left out, such as {unmatched[0]}"
        )

    # What is held out, whole files at least: before they are cut.
    if holdout is not None:
        clips, holdout_notes = hold_out_clips(clips, groups, holdout, group)
        notes += holdout_notes

    # The pieces of the clips, and the classes in use.
    clips, cut_notes = cut_clips(clips, cut_settings, progress=progress, keeping_option="--keep-tail")
    notes += cut_notes
    classes = classes_in_use(clips)
    if classes is UNLABELLED_CLASSES:
        notes.append("no clip has a label: such a store can be pre-trained on, not evaluated")
    elif lacks_split_to_measure(clips):
        notes.append(NO_HELD_OUT_SPLIT_NOTE)

    return Corpus(
        plan=plan_from_clips(clips),
        sources=sources_from_clips(clips, files=len(sound_folder.sound_names), unmatched=unmatched),
        classes=classes,
        dataset_settings=folder_settings(
            root, table, clip_seconds, hop_seconds, split, label_from, holdout, group, split_column, keep_tail
        ),
        clip_seconds=clip_seconds,
        notes=tuple(notes),
    )


def folder_settings(
    root: Path | str,
    table: Path | str | None = None,
    clip_seconds: float | None = None,
    hop_seconds: float | None = None,
    split: str = "train",
    label_from: str = "none",
    holdout: float | None = None,
    group: str | None = None,
    split_column: str | None = None,
    keep_tail: bool = False,
) -> dict[str, Any]:
    """Return the `Corpus.dataset_settings` of `folder_corpus` with these arguments."""
    # Settings that are not used are not recorded, as before there were such.
    later_settings = {
        "holdout": holdout,
        "group": group,
        "split_column": split_column,
        "keep_tail": keep_tail or None,
    }
    return {
        "dataset": "folder",
        "root": absolute_path_or_url(root),
        "table": None if table is None else absolute_path_or_url(table),
        "clip_seconds": clip_seconds,
        "hop_seconds": hop_seconds,
        "split": split,
        "label_from": label_from,
        **{name: value for name, value in later_settings.items() if value is not None},
    }


def _check_folder_options(
    clip_seconds: float | None,
    hop_seconds: float | None,
    split: str,
    label_from: str,
    *,
    keep_tail: bool,
) -> None:
    if hop_seconds is not None and clip_seconds is None:
        raise InputError("hop_seconds without clip_seconds: say also how long a clip is")
    if keep_tail and hop_seconds is None:
        raise InputError(
            "keep_tail without hop_seconds: only sounds that are cut have a tail; say also the hop"
        )
    if not split.strip():
        raise InputError("the split has no name; expected a word such as train")
    if label_from not in LABEL_ORIGINS:
        raise InputError(f"label_from {label_from!r} is unknown; {suggest_known(label_from, LABEL_ORIGINS)}")


def _check_split_options(
    table: Path | str | None, holdout: float | None, group: str | None, split_column: str | None
) -> None:
    if split_column is not None and table is None:
        raise InputError(f"split_column {split_column!r} without a table: give the table that has it")
    if group is not None and holdout is None:
        raise InputError(f"group {group!r} without holdout: say also which share is held out, such as 0.2")
    if group not in (None, FILE_GROUPING, FOLDER_GROUPING) and table is None:
        raise InputError(f"group {group!r}: expected file or folder, or a table that has this column")


def classes_in_use(clips: Sequence[ListedClip]) -> ClassList:
    """Return the labels in use as classes, sorted by number if all are whole numbers, else by name."""
    mids = {mid for clip in clips for mid in clip.mids}
    if not mids:
        return UNLABELLED_CLASSES
    if all(mid.isdecimal() for mid in mids):
        names = tuple(sorted(mids, key=lambda mid: (int(mid), mid)))
    else:
        names = tuple(sorted(mids))
    return ClassList(mids=names, names=names)


def _whole_file_clip(sound_folder: SoundFolder, name: str, split: str, label_from: str) -> ListedClip:
    mids = _parent_folder_label(name) if label_from == "parent" else ()
    return ListedClip(clip_id=name, path=sound_folder.file_path(name), source=name, split=split, mids=mids)


def _parent_folder_label(name: str) -> tuple[str, ...]:
    """Return the name of the file's folder as its label; no label for a file directly in the root, or outside it."""
    folder = os.path.basename(os.path.dirname(name))
    return (folder,) if folder and folder != ".." else ()


def _clips_from_table(
    path: Path,
    table: ClipTable,
    sound_folder: SoundFolder,
    split: str,
    label_from: str,
    *,
    cuts_long_files: bool,
) -> tuple[list[ListedClip], list[str]]:
    """Return the table's rows as clips, and notes; a row without its file stays a clip if any other file exists."""
    if label_from == "parent" and table.has_label_column:
        raise InputError(f"{path}: has labels itself, and label_from=parent asks for others; choose one")

    # The file of each row; if the file does not exist, the path in the table.
    names: list[str] = []
    absent_rows: list[ClipTableRow] = []
    paths_by_rule: Counter[str] = Counter()
    for row in table.rows:
        name, rule_name = sound_folder.find_sound(row.path, f"{path}: {row.location}")
        if name is None:
            absent_rows.append(row)
            name = os.path.normpath(row.path)
        if rule_name:
            paths_by_rule[rule_name] += 1
        names.append(name)

    clips = [
        ListedClip(
            clip_id=row.clip_id or _clip_id_of_row(row, name, cuts_long_files=cuts_long_files),
            path=sound_folder.file_path(name),
            source=name,
            split=row.split or split,
            mids=_parent_folder_label(name) if label_from == "parent" else row.labels,
            start_seconds=row.start_seconds or 0.0,
            end_seconds=row.end_seconds,
        )
        for row, name in zip(table.rows, names, strict=True)
    ]
    _refuse_repeated_clips(path, table, clips)
    match_notes = [
        f"{path}: {count} paths were matched {rule_name}" for rule_name, count in paths_by_rule.items()
    ]
    absence_notes = _note_absent_files(path, table, absent_rows, sound_folder)
    return clips, [*table.notes, *match_notes, *absence_notes]


def _clip_id_of_row(row: ClipTableRow, name: str, *, cuts_long_files: bool) -> str:
    """Return the id of a clip that has none in the table: its file, and its start in milliseconds."""
    # If files are cut, cutting adds the start to every id.
    if cuts_long_files or not row.start_seconds:
        return name
    return f"{name}@{round(row.start_seconds * 1000)}"


def _refuse_repeated_clips(path: Path, table: ClipTable, clips: Sequence[ListedClip]) -> None:
    """Raise ManifestError if two rows have the same id, or the same start in the same file."""
    # Each row has one or two keys; no key may be in two rows.
    location_by_key: dict[str, str] = {}
    for row, clip in zip(table.rows, clips, strict=True):
        keys = [f"{clip.source!r} from {clip.start_seconds:g} s on"]
        if row.clip_id is not None:
            keys.append(f"id {row.clip_id!r}")
        for key in keys:
            if key in location_by_key:
                raise ManifestError(
                    f"{path}: {row.location}: {key} stands already in {location_by_key[key]}; list every clip once"
                )
            location_by_key[key] = row.location


def _note_absent_files(
    path: Path, table: ClipTable, absent_rows: Sequence[ClipTableRow], sound_folder: SoundFolder
) -> list[str]:
    """Return a note on files that do not exist, if any; ManifestError if none of the table's files exists."""
    if not absent_rows:
        return []

    # Name only the first file and the most similar name: all names would be too long for a message.
    first = absent_rows[0]
    nearest = nearest_texts(pl.Series("name", sound_folder.sound_names), os.path.normpath(first.path))
    suggestion = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    shortfall = (
        f"{path}: {len(absent_rows)} of {len(table.rows)} files are not there, "
        f"such as {first.location}: {first.path!r}{suggestion}"
    )
    if len(absent_rows) == len(table.rows):
        raise ManifestError(f"{shortfall}; paths are taken from {sound_folder.root} on")
    return [shortfall]
