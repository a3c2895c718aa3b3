"""The name of a split decides its role; the id of a clip decides whether it is held out."""

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
    """AudioSet, FSD50K, Speech Commands and most users' tables use these names."""
    assert evaluation_split_names(["train", name]) == (name,)


@pytest.mark.parametrize(
    "name", ["balanced_train", "val", "validation", "fold1", "contest", "latest", "medieval"]
)
def test_any_other_split_is_trained_on(name):
    """Folds have no fixed role, and a word may end in the same letters."""
    assert evaluation_split_names([name]) == ()


@pytest.mark.parametrize("name", ["val", "validation", "dev", "my-valid"])
def test_without_eval_and_test_the_split_for_validation_is_measured_on(name):
    """As in timm and transformers; where a test split exists, it only chooses."""
    assert evaluation_split_names(["train", name]) == (name,)
    assert evaluation_split_names(["train", name, "test"]) == ("test",)


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
    """The whole name decides whether a split is a fold."""
    assert bool(FOLD_PATTERN.fullmatch(name)) == is_fold


@pytest.mark.parametrize("ids", [VIDEOS, NUMBERED], ids=["videos", "numbered"])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_about_the_wanted_share_is_held_out(ids, share, seed):
    """The share is within four standard deviations of independent draws, for random ids and for consecutive numbers."""
    count = held_out_mask_N(ids, share, seed).sum()
    assert abs(count - 20_000 * share) < 4 * np.sqrt(20_000 * share * (1 - share))


@pytest.mark.parametrize("ids", [VIDEOS, NUMBERED], ids=["videos", "numbered"])
def test_seeds_hold_out_independent_clips(ids):
    """Chi-squared over the four cells of two seeds; by chance, 16.3 is exceeded once in a thousand."""
    cells_N = np.bincount(2 * held_out_mask_N(ids, 0.5, 0) + held_out_mask_N(ids, 0.5, 1), minlength=4)
    assert ((cells_N - 5_000) ** 2 / 5_000).sum() < 16.3


@given(places=st.sets(st.integers(0, 999), min_size=1))
def test_clips_that_are_added_or_lost_move_no_other(places):
    """After a store has grown, its held-out clips are still clips that were not trained on."""
    some = sorted(places)
    assert np.array_equal(held_out_mask_N(VIDEOS[:1_000], 0.3)[some], held_out_mask_N(VIDEOS[some], 0.3))


def test_a_greater_share_holds_out_the_same_and_more():
    """A share of 0 holds out no clip, a share of 1 all clips."""
    less, more = held_out_mask_N(VIDEOS, 0.1), held_out_mask_N(VIDEOS, 0.2)
    assert (more | ~less).all()
    assert not held_out_mask_N(VIDEOS, 0.0).any()
    assert held_out_mask_N(VIDEOS, 1.0).all()


def test_pieces_of_a_sound_go_one_way():
    """Otherwise a model is evaluated on other pieces of its training sounds."""
    sounds = [f"hall/{number}.flac" for number in range(200)]
    pieces = pl.Series(f"{sound}@{start}" for sound in sounds for start in (0, 10_000, 20_000))
    held_NP = held_out_mask_N(pieces, 0.5).reshape(200, 3)
    assert (held_NP.min(1) == held_NP.max(1)).all()
    assert np.array_equal(held_NP[:, 0], held_out_mask_N(pl.Series(sounds), 0.5))


def test_segments_of_a_video_go_one_way():
    """AudioSet-strong ids have video and millisecond, ids of the official lists only the video."""
    segments = pl.Series(f"{video}_{start}" for video in VIDEOS[:200] for start in (0, 30_000, 120_000))
    held_NP = held_out_mask_N(segments, 0.5).reshape(200, 3)
    assert np.array_equal(held_NP, np.repeat(held_out_mask_N(VIDEOS[:200], 0.5)[:, None], 3, 1))


def test_numbered_sounds_are_not_taken_for_segments():
    """Otherwise a data set could be held out as a whole or not at all."""
    numbered = pl.Series(f"mydataset01_{number:06d}" for number in range(1, 1_000))
    assert 400 < held_out_mask_N(numbered, 0.5).sum() < 600


def test_the_same_clips_are_held_out_on_every_machine_and_day():
    """The hash is defined in this package, because those of Python and polars change."""
    assert np.flatnonzero(held_out_mask_N(NUMBERED[:60], 0.2, 7)).tolist() == [10, 14, 33, 35, 44, 48, 54, 58]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(share):
    with pytest.raises(ValueError, match="share must be in"):
        held_out_mask_N(VIDEOS, share)
