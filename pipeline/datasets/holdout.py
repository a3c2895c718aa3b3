"""A share of a user's sounds held out as the split eval: whole files, folders or groups, never pieces of them."""

import os.path
from collections.abc import Sequence
from dataclasses import replace

from pipeline.datasets.corpus import ListedClip
from pipeline.errors import InputError
from pipeline.messages import count_phrase
from pipeline.store.splits import (
    EVAL_SPLIT,
    EVALUATION_PATTERN,
    FOLD_PATTERN,
    VALIDATION_PATTERN,
    evaluation_split_names,
    hold_out_groups,
)

FILE_GROUPING = "file"
FOLDER_GROUPING = "folder"

# Fewer folders cannot be divided in the proportion that was asked for.
MIN_FOLDERS = 5

NO_HELD_OUT_SPLIT_NOTE = (
    "no split to measure on: evaluate cross-validates over the sounds, finetune needs one; "
    "--holdout 0.2 holds out a fifth of the sounds as eval (a table may name eval, test or val)"
)


def hold_out_clips(
    clips: Sequence[ListedClip], table_groups: Sequence[str | None], share: float, grouping: str | None
) -> tuple[list[ListedClip], list[str]]:
    """Return the clips with a share of them in the split `eval`, and a note with the rule that was used.

    Clips of a group are held out together, and of each label the share of its groups (`splits.hold_out_groups`).

    table_groups  the group of each clip in the table; None: the table has none for it, and its file is its group
    grouping      file, folder, or any other text for the groups of the table. None: those of the table, if any; else
                  folders, if there are at least MIN_FOLDERS and no label is in one of them only; else files

    InputError if the share is not in (0, 1), if a split is for evaluation already, or if nothing can be held out.
    """
    if not 0 < share < 1:
        raise InputError(
            f"holdout {share:g}: expected a share of the sounds above 0 and below 1, such as 0.2"
        )
    splits = dict.fromkeys(clip.split for clip in clips)
    measured = [split for split in splits if EVALUATION_PATTERN.search(split)]
    if measured:
        raise InputError(f"holdout {share:g}: the table has clips of {measured[0]} already; leave it out")

    # The groups of the clips that would train, with their labels.
    if grouping is None:
        grouping = choose_grouping(clips, table_groups)
    groups = [_group_name(clip, group, grouping) for clip, group in zip(clips, table_groups, strict=True)]
    labels_by_group: dict[str, set[str]] = {}
    for clip, group in zip(clips, groups, strict=True):
        if not VALIDATION_PATTERN.search(clip.split):
            labels_by_group.setdefault(group, set()).update(clip.mids)

    # A share of them, label by label.
    held_out = hold_out_groups(labels_by_group, share)
    if not held_out:
        raise InputError(
            f"holdout {share:g}: no label is in two groups by {grouping}, so none can be held out; "
            f"{'add sounds' if grouping == FILE_GROUPING else 'try --group file'}"
        )
    is_held_out = [
        group in held_out and not VALIDATION_PATTERN.search(clip.split)
        for clip, group in zip(clips, groups, strict=True)
    ]
    split_clips = [
        replace(clip, split=EVAL_SPLIT) if held else clip
        for clip, held in zip(clips, is_held_out, strict=True)
    ]
    rule = f"by {grouping}, of each label alike, drawn by a hash of names"
    return split_clips, [f"{EVAL_SPLIT}: {sum(is_held_out):,} of {count_phrase(len(clips), 'clip')}, {rule}"]


def choose_grouping(clips: Sequence[ListedClip], table_groups: Sequence[str | None]) -> str:
    """Return what stays together by default: the groups of a table, or else folders where they can, or else files."""
    if any(table_groups):
        return "group"
    folders_of_label: dict[str, set[str]] = {}
    for clip in clips:
        for mid in clip.mids:
            folders_of_label.setdefault(mid, set()).add(os.path.dirname(clip.source))
    folders = {os.path.dirname(clip.source) for clip in clips}
    divides_labels = all(len(found) > 1 for found in folders_of_label.values())
    return FOLDER_GROUPING if len(folders) >= MIN_FOLDERS and divides_labels else FILE_GROUPING


def lacks_split_to_measure(clips: Sequence[ListedClip]) -> bool:
    """Whether no split of the clips is for evaluation, and there are no two folds."""
    splits = sorted({clip.split for clip in clips})
    folds = [split for split in splits if FOLD_PATTERN.fullmatch(split)]
    return not evaluation_split_names(splits) and len(folds) < 2


def _group_name(clip: ListedClip, table_group: str | None, grouping: str) -> str:
    if grouping == FOLDER_GROUPING:
        return os.path.dirname(clip.source)
    if grouping == FILE_GROUPING or table_group is None:
        return clip.source
    return table_group
