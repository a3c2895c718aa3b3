"""The names of the splits decide which clips train, select settings and measure; no clip trains and measures."""

import numpy as np
import polars as pl
import pytest

from ajepa.evaluate.probe_splits import ProbeSplits, hold_back_sounds, probe_rows
from pipeline.errors import RunError


class Splits:
    """The part of a store that `ProbeSplits` reads: splits of these sizes, in which every tenth clip is not good."""

    location = "some.zarr"

    def __init__(self, **sizes: int) -> None:
        names = [name for name, size in sizes.items() for _ in range(size)]
        ids = [f"clip {number}" for number in range(len(names))]
        self.manifest = pl.DataFrame({"clip_id": ids, "split": names})

    @property
    def split_names(self) -> tuple[str, ...]:
        return tuple(self.manifest["split"].unique(maintain_order=True))

    def label_sounds(self, sounds: list[str], labels: list[list[int]]) -> "Splits":
        """The same clips as pieces of these sounds, with these classes."""
        self.manifest = self.manifest.with_columns(source=pl.Series(sounds))
        self.label_lists = labels
        return self

    def labels_BC(self, rows_B, label_set):
        labels_BC = np.zeros((len(rows_B), 3), np.float32)
        for place, row in enumerate(rows_B):
            labels_BC[place, self.label_lists[row]] = 1
        return labels_BC

    def good_rows(self, splits):
        in_splits_N = self.manifest["split"].is_in(list(splits)).to_numpy()
        good_N = np.arange(len(self.manifest)) % 10 > 0
        return np.flatnonzero(in_splits_N & good_N)

    def split_of(self, rows_N) -> set[str]:
        return set(self.manifest["split"].to_numpy()[rows_N])


def test_folds_take_turns_and_each_is_measured_by_what_the_others_train():
    """As in the store of `build-esc50`; fold10 comes after fold2."""
    store = Splits(fold1=20, fold10=20, fold2=20)
    splits = ProbeSplits.from_store(store, 0, 1_000)
    assert splits.eval_splits == ("fold1", "fold2", "fold10")
    for fold, name in zip(splits.folds, splits.eval_splits, strict=True):
        assert store.split_of(fold.eval_N) == {name}
        assert store.split_of(fold.fit_N) == {"fold1", "fold2", "fold10"} - {name}
    assert len(splits.eval_N) == len(splits.rows_N) == 54


@pytest.mark.parametrize("name", ["val", "validation", "fsd_val", "dev", "Valid-2"])
def test_a_split_that_chooses_never_trains(name):
    """It selects settings only, also for the final probe."""
    store = Splits(train=40, test=20, **{name: 20})
    (fold,) = ProbeSplits.from_store(store, 0, 1_000).folds
    assert store.split_of(fold.val_N) == {name}
    assert store.split_of(fold.fit_N) == {"train"}
    assert store.split_of(fold.eval_N) == {"test"}


def test_without_such_a_split_a_fifth_of_the_train_clips_chooses_and_then_trains():
    """Drawn by the seed."""
    store = Splits(balanced=100, eval=20)
    (fold,), (again,), (other,) = (ProbeSplits.from_store(store, seed, 1_000).folds for seed in (0, 0, 1))
    assert len(fold.val_N) == 18
    assert not set(fold.val_N) & set(fold.train_N)
    assert np.array_equal(fold.fit_N, store.good_rows(["balanced"]))
    assert np.array_equal(fold.val_N, again.val_N)
    assert not np.array_equal(fold.val_N, other.val_N)


def test_a_store_whose_only_other_split_is_named_val_trains_on_it():
    """No other split can train; a fifth of its clips selects settings."""
    store = Splits(val=50, eval=20)
    (fold,) = ProbeSplits.from_store(store, 0, 1_000).folds
    assert store.split_of(fold.fit_N) == {"val"}
    assert len(fold.val_N) == 9


@pytest.mark.parametrize(
    "sizes", [{"train": 60, "eval": 20}, {"train": 40, "val": 30, "test": 20}, {"fold1": 30, "fold2": 30}]
)
def test_no_clip_is_measured_that_trained_or_chose(sizes):
    """A result on such clips would be worthless."""
    for fold in ProbeSplits.from_store(Splits(**sizes), 0, 20).folds:
        assert not set(fold.eval_N) & (set(fold.train_N) | set(fold.val_N))
        assert not set(fold.train_N) & set(fold.val_N)
        assert all(
            (np.diff(rows_N) > 0).all() for rows_N in (fold.train_N, fold.val_N, fold.eval_N, fold.fit_N)
        )


def test_no_more_train_than_asked_for_and_all_are_measured():
    """A cap draws the same rows every time."""
    store = Splits(train=80, eval=20)
    (fold,) = ProbeSplits.from_store(store, 0, 10).folds
    assert len(fold.fit_N) == 10
    assert len(fold.eval_N) == 18
    assert np.array_equal(fold.fit_N, probe_rows(store, 0, 10)[0])


def test_a_fold_without_a_good_clip_is_named():
    """With an empty fold, the mean would be over fewer folds than stated."""
    store = Splits(fold1=30, fold2=1, fold3=30)
    names = ["fold2"] + ["fold1"] * 30 + ["fold3"] * 30
    store.manifest = store.manifest.with_columns(split=pl.Series(names))
    with pytest.raises(RunError, match=r"some\.zarr: fold2 has no good clip"):
        ProbeSplits.from_store(store, 0, 1_000)


def test_a_kept_split_wins_over_folds():
    """If a store has both, the evaluation split measures, not the folds."""
    store = Splits(fold1=30, fold2=30, test=20)
    splits = ProbeSplits.from_store(store, 0, 1_000)
    assert splits.eval_splits == ("test",)
    assert splits.train_splits == ("fold1", "fold2")


def test_pieces_of_one_sound_are_all_held_back_or_all_train():
    """A probe that is chosen on the next ten seconds of what trained it is chosen for its memory."""
    store = Splits(train=120, eval=20)
    ids = [f"sound {number // 4}@{number % 4 * 10_000}" for number in range(140)]
    store.manifest = store.manifest.with_columns(clip_id=pl.Series(ids))
    (fold,) = ProbeSplits.from_store(store, 0, 1_000).folds
    sounds = [{ids[row].split("@")[0] for row in rows_N} for rows_N in (fold.train_N, fold.val_N)]
    assert not sounds[0] & sounds[1]
    assert 18 <= len(fold.val_N) <= 27
    assert np.array_equal(fold.fit_N, store.good_rows(["train"]))


def test_rows_of_one_file_are_one_sound_whatever_their_ids():
    """A table may cut a recording into events with names of their own."""
    manifest = pl.DataFrame(
        {
            "clip_id": [f"event {number}" for number in range(40)],
            "source": [f"tape{number // 10}.wav" for number in range(40)],
        }
    )
    held_N, others_N = hold_back_sounds(np.random.default_rng(0).permutation(40), manifest)
    assert len(held_N) == 10
    assert len({row // 10 for row in held_N}) == 1
    assert len({row // 10 for row in others_N}) == 3


def test_where_each_clip_is_a_sound_the_first_fifth_of_the_draw_is_held_back():
    """As before sounds were looked at: results of such stores stay what they were."""
    store = Splits(train=100, eval=20)
    (fold,) = ProbeSplits.from_store(store, 3, 1_000).folds
    order_N = np.random.default_rng([3, 1]).permutation(store.good_rows(["train"]))
    assert np.array_equal(fold.val_N, np.sort(order_N[: len(order_N) // 5]))


def test_clips_of_a_single_sound_choose_nothing():
    """All of them are held back together, and none is left to train."""
    store = Splits(train=30, eval=20)
    store.manifest = store.manifest.with_columns(clip_id=pl.Series([f"tape@{n * 1000}" for n in range(50)]))
    (fold,) = ProbeSplits.from_store(store, 0, 1_000).folds
    with pytest.raises(
        RunError, match=r"no labelled clip to train on is left beside those of the same sound"
    ):
        fold.refuse_few_clips(store.location)


def test_a_store_without_a_split_to_measure_on_is_cross_validated_over_its_sounds():
    """A folder of sounds has no splits; pieces of a sound that are on both sides would flatter the encoder."""
    sounds = [f"{number // 4}.wav" for number in range(200)]
    labels = [[number // 4 % 2] if number < 160 else [] for number in range(200)]
    store = Splits(train=200).label_sounds(sounds, labels)
    splits = ProbeSplits.from_store(store, 0, 1_000)
    assert (len(splits.folds), splits.eval_splits) == (5, ("train",))
    assert "no split to measure on, so probes are cross-validated over 5 folds" in splits.notes[0]
    assert np.array_equal(splits.eval_N, store.good_rows(["train"]))
    for fold in splits.drop_unlabelled(store).folds:
        sides = [{sounds[row] for row in rows_N} for rows_N in (fold.fit_N, fold.eval_N)]
        assert not sides[0] & sides[1]
        assert len(sides[1]) == 8
        assert {labels[row][0] for row in fold.eval_N} == {0, 1}


def test_what_cannot_be_cross_validated_says_what_to_do():
    """Too many clips to train five probes on each, or too few labels."""
    sounds = [f"{number}.wav" for number in range(6_000)]
    store = Splits(train=6_000).label_sounds(sounds, [[0]] * 6_000)
    with pytest.raises(RunError, match=r"5,400 clips are too many to cross-validate .* --holdout 0\.2"):
        ProbeSplits.from_store(store, 0, 1_000)
    store = Splits(train=60).label_sounds(sounds[:60], [[]] * 60)
    with pytest.raises(RunError, match=r"sounds with a label: 0; .* --label-from parent"):
        ProbeSplits.from_store(store, 0, 1_000)
