"""Holdout: what is kept back to measure on: splits by their names, and clips while training by a hash of theirs."""

import re
import zlib
from collections.abc import Sequence

import numpy as np
import polars as pl

from pipeline.errors import RunError
from pipeline.store.joined_store import AnyStore

EVALUATION_PATTERN = re.compile(r"(?:^|[^a-z])(?:eval|test)", re.IGNORECASE)

PIECE_ID_PATTERNS = {  # ids of parts of one sound -> what they share
    r"@\d+$": "",  # `pipeline.datasets.cutting`: the millisecond that a piece starts at
    r"^([A-Za-z0-9_-]{11})_(?:0|[1-9]\d*000)$": "${1}",  # AudioSet-strong: video and millisecond
}


def evaluation_split_names(splits: Sequence[str]) -> tuple[str, ...]:
    """The splits that nobody trains on: those with a word in their names that begins with eval or test."""
    return tuple(split for split in splits if EVALUATION_PATTERN.search(split))


def held_out_mask_N(clip_ids: pl.Series, share: float, seed: int = 0) -> np.ndarray:
    """Whether each clip is held out, bool `[N]`: about `share` of the sounds, others for another seed.

    Decided by the id alone: clips that are added or lost move no other, and a greater share holds out the same ones
    and more. Pieces of one sound go one way, and so do segments of one video of AudioSet.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    sounds_N = clip_ids.cast(pl.String)
    for pattern, shared in PIECE_ID_PATTERNS.items():
        sounds_N = sounds_N.str.replace(pattern, shared)
    sounds = sounds_N.cast(pl.Binary).to_list()
    checks_N = np.fromiter(map(zlib.crc32, sounds), np.uint64, len(sounds))
    hashes_N = mix_bits(checks_N ^ mix_bits(np.array([seed], np.uint64)))
    return (hashes_N >> np.uint64(11)) * 2.0**-53 < share


def mix_bits(words_N: np.ndarray) -> np.ndarray:
    """Words of which every bit depends on every bit of those given (the finaliser of SplitMix64)."""
    words_N = words_N + np.uint64(0x9E3779B97F4A7C15)
    words_N = (words_N ^ (words_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words_N = (words_N ^ (words_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words_N ^ (words_N >> np.uint64(31))


EVAL_SPLIT = "eval"  # what probes are measured on


def train_splits(store: AnyStore) -> list[str]:
    """Every split but those that are kept to measure on; RunError where there is no other."""
    splits = sorted(store.manifest["split"].unique())
    kept = evaluation_split_names(splits)
    if len(kept) == len(splits):
        told = f"{', '.join(kept)} {'is' if len(kept) == 1 else 'are'} kept to measure on, by name"
        raise RunError(
            f"{store.location}: no split to train on ({told}); leave it out, or build one with another split"
        )
    return [split for split in splits if split not in kept]


def probe_eval_splits(store: AnyStore) -> list[str]:
    """What probes are measured on: `eval` where there is one, else all that are kept for it; RunError: none."""
    splits = sorted(store.manifest["split"].unique())
    if EVAL_SPLIT in splits:
        return [EVAL_SPLIT]
    if not (kept := evaluation_split_names(splits)):
        raise RunError(
            f"{store.location}: no split to measure on, none of {', '.join(splits)} is named eval or test; "
            "build a store with one"
        )
    return list(kept)


def evaluation_splits(store: AnyStore) -> list[str]:
    """The splits that are kept to measure on; there may be none."""
    return list(evaluation_split_names(sorted(store.manifest["split"].unique())))


def describe_splits(store: AnyStore) -> str:
    """Which splits are trained on, and which are kept to measure on: `train, val (not test)`."""
    trained = train_splits(store)
    kept = sorted(set(store.manifest["split"].unique()) - set(trained))
    return ", ".join(trained) + (f" (not {', '.join(kept)})" if kept else "")


FOLD_PATTERN = re.compile(r"fold[1-9]\d*")

VALIDATION_PATTERN = re.compile(r"(?:^|[^a-z])(?:val|valid|validation|dev)(?:$|[^a-z])", re.IGNORECASE)
