"""The roles of splits: which splits are for training, for evaluation and for validation. Only their names decide.

A split is for evaluation, and never for training, if a word of its name begins with `eval` or `test`. All other splits
are for training. Those among them that are named `val`, `valid`, `validation` or `dev` select hyper-parameters, in the
stages that have any to select; in a store without `eval` or `test` they are for evaluation. If no split is for
evaluation, splits named `fold1`, `fold2` ... are evaluated in turn.
If a share of the clips is held out instead of a split, a hash selects them: of each clip's id, or of the names of
groups of clips that stay together, label by label.
"""

import re
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import polars as pl

from pipeline.errors import RunError
from pipeline.store.joined_store import AnyStore

# A word that begins with eval or test: `test`, `my-test`, `evaluation`, but not `contest` or `latest`.
EVALUATION_PATTERN = re.compile(r"(?:^|[^a-z])(?:eval|test)", re.IGNORECASE)

# A whole word: `val`, `a_dev`, but not `valley` or `device`.
VALIDATION_PATTERN = re.compile(r"(?:^|[^a-z])(?:val|valid|validation|dev)(?:$|[^a-z])", re.IGNORECASE)

# The whole name: `fold1`, `fold2` ...
FOLD_PATTERN = re.compile(r"fold[1-9]\d*")

EVAL_SPLIT = "eval"  # the split on which probes are evaluated, if it exists

# What to do about a store without a split to evaluate on.
HOLDOUT_HINT = "build it with --holdout 0.2 (ajepa-data build-folder), or name one in its table"


def evaluation_split_names(splits: Sequence[str]) -> tuple[str, ...]:
    """Return the evaluation splits: a word of their names begins with eval or test.

    Without such a split, those for validation are, if any other split is left to train on.
    """
    measuring = tuple(split for split in splits if EVALUATION_PATTERN.search(split))
    if measuring:
        return measuring
    validating = tuple(split for split in splits if VALIDATION_PATTERN.search(split))
    return validating if len(validating) < len(splits) else ()


def train_splits(store: AnyStore) -> list[str]:
    """Return the training splits, sorted: all but the evaluation splits; RunError if there is no training split."""
    splits = _split_names(store)
    measuring = evaluation_split_names(splits)
    if len(measuring) == len(splits):
        verb = "is" if len(measuring) == 1 else "are"
        raise RunError(
            f"{store.location}: no split to train on ({', '.join(measuring)} {verb} for evaluation, by name); "
            "leave the store out, or build one with another split"
        )
    return [split for split in splits if split not in measuring]


def evaluation_splits(store: AnyStore) -> list[str]:
    """Return the evaluation splits, sorted; may be empty."""
    return list(evaluation_split_names(_split_names(store)))


def probe_eval_splits(store: AnyStore) -> list[str]:
    """Return the splits on which probes are evaluated; RunError if there is no evaluation split.

    This is only `eval` if a split has that name, else all evaluation splits.
    """
    splits = _split_names(store)
    if EVAL_SPLIT in splits:
        return [EVAL_SPLIT]
    measuring = evaluation_splits(store)
    if not measuring:
        raise RunError(
            f"{store.location}: no split to evaluate on, none of {', '.join(splits)} is named eval, test or val; "
            f"{HOLDOUT_HINT}"
        )
    return measuring


def describe_splits(store: AnyStore) -> str:
    """Return the training splits, and in brackets the evaluation splits: `train, val (not test)`."""
    trained = ", ".join(train_splits(store))
    measuring = evaluation_splits(store)
    return f"{trained} (not {', '.join(measuring)})" if measuring else trained


def _split_names(store: AnyStore) -> list[str]:
    return sorted(store.split_names)


# Patterns in the ids of pieces of one sound -> replacements after which all pieces have the same id.
PIECE_ID_PATTERNS = {
    r"@\d+$": "",  # `pipeline.datasets.corpus` appends the millisecond at which a piece starts
    r"^([A-Za-z0-9_-]{11})_(?:0|[1-9]\d*000)$": "${1}",  # AudioSet-strong: video and millisecond
}


def held_out_mask_N(clip_ids: pl.Series, share: float, seed: int = 0) -> np.ndarray:
    """Return a mask of the held-out clips, bool `[N]`: about `share` of the sounds; each seed selects other sounds.

    Only the id decides: adding or removing clips changes nothing for other clips, and a greater share holds out the
    same clips and more. All pieces of one sound are held out together, as are all segments of one AudioSet video.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")

    # Every id becomes a number that is uniform in [0, 1); 53 bits are the precision of float64.
    hashes_N = _hash_names(sound_ids_N(clip_ids).cast(pl.Binary).to_list(), seed)
    return (hashes_N >> np.uint64(11)) * 2.0**-53 < share


def sound_ids_N(clip_ids: pl.Series) -> pl.Series:
    """Return the id of each clip's sound, `[N]`: the same for all pieces of one sound (`PIECE_ID_PATTERNS`)."""
    sounds_N = clip_ids.cast(pl.String)
    for pattern, shared_id in PIECE_ID_PATTERNS.items():
        sounds_N = sounds_N.str.replace(pattern, shared_id)
    return sounds_N


def sound_numbers_N(manifest: pl.DataFrame) -> np.ndarray:
    """Return a number for each row's sound, int64 `[N]`: equal for rows of one file and for pieces of one sound."""
    sounds_N = sound_ids_N(manifest["clip_id"])

    # Rows of one file may have ids of their own: all get the id of the first.
    if "source" in manifest.columns:
        frame = pl.DataFrame({"sound": sounds_N, "source": manifest["source"].fill_null(sounds_N)})
        sounds_N = frame.select(pl.col("sound").first().over("source"))["sound"]
    return np.unique(sounds_N.to_numpy(), return_inverse=True)[1]


def hold_out_groups(
    labels_by_group: Mapping[str, Collection[str]], share: float, seed: int = 0
) -> frozenset[str]:
    """Return the names of held-out groups of clips: of each label the share of its groups, drawn by a hash of names.

    A group with several labels counts for the rarest of them. Of two groups of a label or more, at least one is held
    out and at least one is not; the only group of a label is never held out.
    """
    held_out: set[str] = set()
    for groups in _groups_by_label(labels_by_group, seed):
        most = len(groups) - 1
        held_out.update(groups[: min(max(round(share * len(groups)), 1), most)])
    return frozenset(held_out)


def deal_groups_to_folds(
    labels_by_group: Mapping[str, Collection[str]], folds: int, seed: int = 0
) -> dict[str, int]:
    """Return the fold of each group of clips, from 0: groups in the order of a hash are dealt out, label by label."""
    dealt = [group for groups in _groups_by_label(labels_by_group, seed) for group in groups]
    return {group: position % folds for position, group in enumerate(dealt)}


def _groups_by_label(labels_by_group: Mapping[str, Collection[str]], seed: int) -> list[list[str]]:
    """Return the groups of each label, or of a group's rarest label, in the order of a hash of their names."""
    group_counts = Counter(label for labels in labels_by_group.values() for label in set(labels))
    groups_of: dict[str, list[str]] = {}
    for group in sorted(labels_by_group):
        # Groups without a label are one kind too.
        rarest = min(labels_by_group[group], key=lambda label: (group_counts[label], label), default="")
        groups_of.setdefault(rarest, []).append(group)
    return [_sort_by_hash(groups, seed) for _, groups in sorted(groups_of.items())]


def _sort_by_hash(names: Sequence[str], seed: int) -> list[str]:
    hashes_N = _hash_names([name.encode() for name in names], seed)
    return [names[place] for place in np.argsort(hashes_N, kind="stable")]


def _hash_names(names: Sequence[bytes], seed: int) -> np.ndarray:
    checksums_N = np.fromiter(map(zlib.crc32, names), np.uint64, len(names))
    return _mix_bits(checksums_N ^ _mix_bits(np.array([seed], np.uint64)))


def _mix_bits(words_N: np.ndarray) -> np.ndarray:
    """Return mixed 64-bit words: every bit depends on every bit of the input word (the finaliser of SplitMix64)."""
    words_N = words_N + np.uint64(0x9E3779B97F4A7C15)
    words_N = (words_N ^ (words_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words_N = (words_N ^ (words_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words_N ^ (words_N >> np.uint64(31))
