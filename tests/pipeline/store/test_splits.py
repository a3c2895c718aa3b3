"""Splits have their roles by name, and clips are held out by their ids."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.store.splits import (
    FOLD_PATTERN,
    VALIDATION_PATTERN,
    evaluation_split_names,
    held_out_mask_N,
)

LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))

VIDEOS = pl.Series("".join(ids) for ids in LETTERS[np.random.default_rng(0).integers(0, 64, (20_000, 11))])

NUMBERED = pl.Series(f"{number}.wav" for number in range(20_000))


@pytest.mark.parametrize(
    "name", ["eval", "a_eval", "test", "testing", "Test", "EVAL", "my-test", "2024test", "evaluation"]
)
def test_a_split_named_eval_or_test_is_kept_to_measure_on(name):
    """As AudioSet, FSD50K, Speech Commands and most tables of people's own call it."""
    assert evaluation_split_names(["train", name]) == (name,)


@pytest.mark.parametrize(
    "name", ["balanced_train", "val", "validation", "fold1", "contest", "latest", "medieval"]
)
def test_any_other_split_is_trained_on(name):
    """Folds are nobody's, and a word may end in the same letters."""
    assert evaluation_split_names([name]) == ()


@pytest.mark.parametrize(
    ("name", "chooses"),
    [("val", True), ("a_dev", True), ("Validation", True), ("valley", False), ("device", False)],
)
def test_a_split_named_by_a_whole_word_for_validation_chooses(name, chooses):
    """Unlike eval and test, `val` and `dev` begin many other words."""
    assert bool(VALIDATION_PATTERN.search(name)) == chooses


@pytest.mark.parametrize(
    ("name", "is_fold"), [("fold1", True), ("fold10", True), ("fold0", False), ("my-fold1", False)]
)
def test_folds_are_numbered_from_one(name, is_fold):
    """Folds that take turns are told apart from other splits by the whole name."""
    assert bool(FOLD_PATTERN.fullmatch(name)) == is_fold


@pytest.mark.parametrize("ids", [VIDEOS, NUMBERED], ids=["videos", "numbered"])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_about_the_wanted_share_is_held_out(ids, share, seed):
    """Within four standard deviations of independent coins, of random ids as of numbers in a row."""
    count = held_out_mask_N(ids, share, seed).sum()
    assert abs(count - 20_000 * share) < 4 * np.sqrt(20_000 * share * (1 - share))


@pytest.mark.parametrize("ids", [VIDEOS, NUMBERED], ids=["videos", "numbered"])
def test_seeds_hold_out_independent_clips(ids):
    """Chi-square over the four cells of two seeds' halves; 16.3 is exceeded once in a thousand."""
    cells_N = np.bincount(2 * held_out_mask_N(ids, 0.5, 0) + held_out_mask_N(ids, 0.5, 1), minlength=4)
    assert ((cells_N - 5_000) ** 2 / 5_000).sum() < 16.3


@given(places=st.sets(st.integers(0, 999), min_size=1))
def test_clips_that_are_added_or_lost_move_no_other(places):
    """A store that has grown is evaluated on what it was not trained on before."""
    some = sorted(places)
    assert np.array_equal(held_out_mask_N(VIDEOS[:1_000], 0.3)[some], held_out_mask_N(VIDEOS[some], 0.3))


def test_a_greater_share_holds_out_the_same_and_more():
    """None for a share of 0, all for 1."""
    less, more = held_out_mask_N(VIDEOS, 0.1), held_out_mask_N(VIDEOS, 0.2)
    assert (more | ~less).all()
    assert not held_out_mask_N(VIDEOS, 0.0).any()
    assert held_out_mask_N(VIDEOS, 1.0).all()


def test_pieces_of_a_sound_go_one_way():
    """Else a model is measured on the other half of what it has heard."""
    sounds = [f"hall/{number}.flac" for number in range(200)]
    pieces = pl.Series(f"{sound}@{start}" for sound in sounds for start in (0, 10_000, 20_000))
    held_NP = held_out_mask_N(pieces, 0.5).reshape(200, 3)
    assert (held_NP.min(1) == held_NP.max(1)).all()
    assert np.array_equal(held_NP[:, 0], held_out_mask_N(pl.Series(sounds), 0.5))


def test_segments_of_a_video_go_one_way():
    """AudioSet-strong names them by video and millisecond, the official lists by the video alone."""
    segments = pl.Series(f"{video}_{start}" for video in VIDEOS[:200] for start in (0, 30_000, 120_000))
    held_NP = held_out_mask_N(segments, 0.5).reshape(200, 3)
    assert np.array_equal(held_NP, np.repeat(held_out_mask_N(VIDEOS[:200], 0.5)[:, None], 3, 1))


def test_numbered_sounds_are_not_taken_for_segments():
    """Whatever their first 11 characters are: else a set would be held out as a whole, or not at all."""
    numbered = pl.Series(f"mydataset01_{number:06d}" for number in range(1, 1_000))
    assert 400 < held_out_mask_N(numbered, 0.5).sum() < 600


def test_the_same_clips_are_held_out_on_every_machine_and_day():
    """The hash is written out here, not Python's or polars' own, which change."""
    assert np.flatnonzero(held_out_mask_N(NUMBERED[:60], 0.2, 7)).tolist() == [10, 14, 33, 35, 44, 48, 54, 58]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(share):
    with pytest.raises(ValueError, match="share must lie in"):
        held_out_mask_N(VIDEOS, share)
