"""Holdout: clips kept back to measure on while training, told from the rest by a hash of their sound's name."""

import zlib

import numpy as np
import polars as pl

PIECE = r"@\d+$"  # what `pipeline.datasets.cutting` adds to the id of a sound for each of its pieces


def held_out(clip_ids: pl.Series, share: float, seed: int = 0) -> np.ndarray:
    """Whether each clip is held out, bool `[N]`: about `share` of the sounds, others for another seed.

    Decided by the id alone: clips that are added or lost move no other, and a greater share holds out the same ones
    and more. Pieces of one sound go one way; of AudioSet the id is the video, so do its segments.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    sounds = clip_ids.cast(pl.String).str.replace(PIECE, "").cast(pl.Binary).to_list()
    checks_N = np.fromiter(map(zlib.crc32, sounds), np.uint64, len(sounds))
    hashes_N = mixed(checks_N ^ mixed(np.array([seed], np.uint64)))
    return (hashes_N >> np.uint64(11)) * 2.0**-53 < share


def mixed(words_N: np.ndarray) -> np.ndarray:
    """Words of which every bit depends on every bit of those given (the finaliser of SplitMix64)."""
    words_N = words_N + np.uint64(0x9E3779B97F4A7C15)
    words_N = (words_N ^ (words_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words_N = (words_N ^ (words_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words_N ^ (words_N >> np.uint64(31))
