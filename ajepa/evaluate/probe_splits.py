"""ProbeSplits: the clips of a store that train a probe, that select its settings, and that measure it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from pipeline.errors import RunError
from pipeline.store.joined_store import AnyStore
from pipeline.store.splits import (
    FOLD_PATTERN,
    HOLDOUT_HINT,
    VALIDATION_PATTERN,
    deal_groups_to_folds,
    evaluation_split_names,
    probe_eval_splits,
    sound_numbers_N,
    train_splits,
)

# Folds of a store without a split to measure on, and the most clips that they are worth computing for.
DRAWN_FOLD_COUNT = 5
MAX_CROSS_VALIDATED_CLIPS = 5_000

# Share of the train clips that selects a probe's settings if the store has no validation split.
VALIDATION_SHARE = 0.2

# Of fewer clips, nothing is held back to select settings.
MIN_CLIPS_TO_SELECT = 5

NO_ROWS_N = np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeFold:
    """Rows of a store, ascending. The rows that measure a probe are never among those that train it or select settings.

    train_N         rows that train the probe while its settings are selected
    val_N           rows that select the settings
    eval_N          rows that measure the probe
    val_from_train  whether `val_N` was drawn from the train splits; then it also trains the final probe
    """

    train_N: np.ndarray
    val_N: np.ndarray
    eval_N: np.ndarray
    val_from_train: bool

    @classmethod
    def from_rows(
        cls, store: AnyStore, train_N: np.ndarray, val_N: np.ndarray, eval_N: np.ndarray, seed: int
    ) -> "ProbeFold":
        """A fold of these rows; if `val_N` is empty, the seed draws a fifth of `train_N` for it, sound by sound."""
        val_from_train = not len(val_N)
        if val_from_train:
            order_N = np.random.default_rng([seed, 1]).permutation(train_N)
            val_N, train_N = hold_back_sounds(order_N, store.manifest)
        return cls(
            train_N=np.sort(train_N), val_N=np.sort(val_N), eval_N=eval_N, val_from_train=val_from_train
        )

    @property
    def fit_N(self) -> np.ndarray:
        """The rows that train the final probe, after its settings are selected."""
        if not self.val_from_train:
            return self.train_N
        return np.sort(np.concatenate([self.train_N, self.val_N]))

    def refuse_few_clips(self, location: str) -> None:
        """RunError if there are too few clips, or sounds, to hold some back for the selection of settings."""
        clips = len(self.fit_N)
        if self.val_from_train and clips < MIN_CLIPS_TO_SELECT:
            raise RunError(
                f"{location}: {clips} labelled clips to train on, and a probe needs {MIN_CLIPS_TO_SELECT} to choose "
                "its settings on some of them; label more, or measure neighbours alone with --probe knn"
            )
        for purpose, left_N in (("train on", self.train_N), ("choose settings on", self.val_N)):
            if not len(left_N):
                raise RunError(
                    f"{location}: no labelled clip to {purpose} is left beside those of the same sound; "
                    "add other sounds, or measure neighbours alone with --probe knn"
                )

    def keep_rows(self, kept_N: np.ndarray) -> "ProbeFold":
        """The fold restricted to the rows of `kept_N`."""
        return replace(
            self,
            train_N=self.train_N[np.isin(self.train_N, kept_N)],
            val_N=self.val_N[np.isin(self.val_N, kept_N)],
            eval_N=self.eval_N[np.isin(self.eval_N, kept_N)],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSplits:
    """A single fold, one for each split `foldN` of a store, or drawn ones, with the splits that their rows come from.

    notes  sentences for the user about folds that no split names
    """

    folds: tuple[ProbeFold, ...]
    train_splits: tuple[str, ...]
    val_splits: tuple[str, ...]
    eval_splits: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def from_store(cls, store: AnyStore, seed: int, train_clips: int) -> "ProbeSplits":
        """Select the clips that train, validate and measure probes by the names of the store's splits.

        A store without an evaluation split is cross-validated over `fold1`, `fold2`, ..., or else, if it is small,
        over folds of its sounds (`from_sounds`). In any other store the splits named val, valid, validation or dev
        select settings, and the other splits train. If there are no such splits, the seed draws a fifth of the train
        clips for selection, and these clips also train the final probe.
        At most `train_clips` clips train, and as many select. RunError if no clip measures, or no split trains.
        """
        # Folds, if there is no evaluation split
        splits = sorted(store.split_names)
        fold_names = [split for split in splits if FOLD_PATTERN.fullmatch(split)]
        if len(fold_names) > 1 and not evaluation_split_names(splits):
            ordered = sorted(fold_names, key=lambda fold: int(fold[4:]))
            return cls.from_folds(store, ordered, seed, train_clips)
        if not evaluation_split_names(splits):
            return cls.from_sounds(store, splits, seed, train_clips)

        # The clips that train, measure and validate
        train_names, val_names = train_and_val_splits(store)
        train_N = draw_split_rows(store, train_names, seed, train_clips)
        eval_N = good_eval_rows(store)
        val_N = draw_split_rows(store, val_names, seed, train_clips) if val_names else NO_ROWS_N
        return cls(
            folds=(ProbeFold.from_rows(store, train_N, val_N, eval_N, seed),),
            train_splits=train_names,
            val_splits=val_names,
            eval_splits=tuple(probe_eval_splits(store)),
        )

    @classmethod
    def from_folds(
        cls, store: AnyStore, fold_names: Sequence[str], seed: int, train_clips: int
    ) -> "ProbeSplits":
        """One fold per split, which measures a probe that the other splits train. RunError if one has no good clip."""
        folds = []
        for name in fold_names:
            eval_N = store.good_rows([name])
            if not len(eval_N):
                raise RunError(f"{store.location}: {name} has no good clip; see: ajepa-data report")
            others = [other for other in fold_names if other != name]
            train_N = draw_split_rows(store, others, seed, train_clips)
            folds.append(ProbeFold.from_rows(store, train_N, NO_ROWS_N, eval_N, seed))
        names = tuple(fold_names)
        return cls(folds=tuple(folds), train_splits=names, val_splits=(), eval_splits=names)

    @classmethod
    def from_sounds(
        cls, store: AnyStore, split_names: Sequence[str], seed: int, train_clips: int
    ) -> "ProbeSplits":
        """Five folds of all good clips, drawn by sound and label (`deal_groups_to_folds`).

        All clips of one sound are in one fold. RunError if there are more than MAX_CROSS_VALIDATED_CLIPS clips, or
        fewer than two sounds with a label.
        """
        good_N = store.good_rows(list(split_names))
        if len(good_N) > MAX_CROSS_VALIDATED_CLIPS:
            raise RunError(
                f"{store.location}: no split to evaluate on, and {len(good_N):,} clips are too many to cross-validate "
                f"(at most {MAX_CROSS_VALIDATED_CLIPS:,}); {HOLDOUT_HINT}"
            )

        # The sound of each clip, and the labels of each sound.
        sounds = store.manifest["source"][good_N].to_list()
        labels_by_sound: dict[str, set[str]] = {}
        for sound, labels_C in zip(sounds, store.labels_BC(good_N, "raw"), strict=True):
            labels_by_sound.setdefault(sound, set()).update(map(str, np.flatnonzero(labels_C)))
        labelled_sounds = sum(map(bool, labels_by_sound.values()))
        fold_count = min(DRAWN_FOLD_COUNT, labelled_sounds)
        if fold_count < 2:
            raise RunError(
                f"{store.location}: sounds with a label: {labelled_sounds}; probes need two or more; "
                "build it with labels (ajepa-data build-folder --table, or --label-from parent)"
            )

        # Each fold is measured once.
        fold_of_sound = deal_groups_to_folds(labels_by_sound, fold_count, seed)
        fold_N = np.array([fold_of_sound[sound] for sound in sounds])
        folds = []
        for number in range(fold_count):
            train_N = good_N[fold_N != number]
            drawn_N = np.sort(np.random.default_rng([seed, 0]).permutation(train_N)[:train_clips])
            folds.append(ProbeFold.from_rows(store, drawn_N, NO_ROWS_N, good_N[fold_N == number], seed))
        names = tuple(split_names)
        note = (
            f"{store.location}: no split to measure on, so probes are cross-validated over {fold_count} folds of its "
            "sounds; the encoder may have seen all of them in pre-training, without labels"
        )
        return cls(folds=tuple(folds), train_splits=names, val_splits=(), eval_splits=names, notes=(note,))

    @classmethod
    def from_run_splits(
        cls,
        store: AnyStore,
        train_names: tuple[str, ...],
        eval_names: tuple[str, ...],
        seed: int,
        train_clips: int,
    ) -> "ProbeSplits":
        """A fold of a fine-tuned run's train and eval splits; a fifth of the train clips selects settings.

        RunError if the eval splits have no good clip.
        """
        eval_N = _good_rows_to_measure(store, eval_names)
        train_N = draw_split_rows(store, train_names, seed, train_clips)
        fold = ProbeFold.from_rows(store, train_N, NO_ROWS_N, eval_N, seed)
        return cls(folds=(fold,), train_splits=train_names, val_splits=(), eval_splits=eval_names)

    @property
    def rows_N(self) -> np.ndarray:
        """Every row that trains, selects or measures, ascending."""
        return np.unique(
            np.concatenate([rows for fold in self.folds for rows in (fold.train_N, fold.val_N, fold.eval_N)])
        )

    @property
    def eval_N(self) -> np.ndarray:
        """Every row that measures a probe, ascending."""
        return np.unique(np.concatenate([fold.eval_N for fold in self.folds]))

    def drop_unlabelled(self, store: AnyStore) -> "ProbeSplits":
        """The splits without unlabelled clips: a missing label does not show that a class is absent.

        RunError if no clip is left to train or to measure.
        """
        # A clip without raw labels has no label of any set: other label sets are derived from the raw one
        rows_N = self.rows_N
        labelled_N = rows_N[store.labels_BC(rows_N, "raw").any(axis=1)]
        folds = tuple(fold.keep_rows(labelled_N) for fold in self.folds)

        # Every fold still needs clips that train and clips that measure
        for fold in folds:
            for purpose, left_N in (("train", fold.fit_N), ("measure", fold.eval_N)):
                if not len(left_N):
                    raise RunError(
                        f"{store.location}: no clip to {purpose} on has a label; see: ajepa-data report"
                    )
        return replace(self, folds=folds)


def train_and_val_splits(store: AnyStore) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The splits that train, and those named val that select settings; these train only if there are no others.

    RunError if no split trains.
    """
    candidates = train_splits(store)
    val_names = tuple(split for split in candidates if VALIDATION_PATTERN.search(split))
    train_names = tuple(split for split in candidates if split not in val_names)
    return (train_names, val_names) if train_names else (val_names, ())


def hold_back_sounds(order_N: np.ndarray, manifest: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The held-back rows and the others of some rows in random order: a fifth of them, whole sounds, from the first on.

    All rows of one sound (`sound_numbers_N`) are on one side. Where each row is a sound of its own, the first fifth of
    the rows is held back.
    """
    # The place of each row's sound in the order of the sounds' first rows.
    sound_N = sound_numbers_N(manifest[order_N])
    _, first_S, sound_N = np.unique(sound_N, return_index=True, return_inverse=True)
    place_S = np.argsort(np.argsort(first_S))
    place_N = place_S[sound_N]

    # Hold back whole sounds for as long as the fifth is not full.
    rows_S = np.bincount(place_N)
    rows_before_S = np.cumsum(rows_S) - rows_S
    is_held_N = (rows_before_S < int(len(order_N) * VALIDATION_SHARE))[place_N]
    return order_N[is_held_N], order_N[~is_held_N]


def probe_rows(store: AnyStore, seed: int, train_clips: int) -> tuple[np.ndarray, np.ndarray]:
    """The good rows that train probes (at most `train_clips`, drawn by `seed`), and those that measure them."""
    return draw_split_rows(store, train_splits(store), seed, train_clips), good_eval_rows(store)


def draw_split_rows(store: AnyStore, splits: Sequence[str], seed: int, max_clips: int) -> np.ndarray:
    """At most `max_clips` good rows of some splits, drawn by the seed, ascending."""
    rows_N = store.good_rows(list(splits))
    return np.sort(np.random.default_rng([seed, 0]).permutation(rows_N)[:max_clips])


def good_eval_rows(store: AnyStore) -> np.ndarray:
    """The good rows of the store's evaluation splits; RunError if there are none."""
    return _good_rows_to_measure(store, probe_eval_splits(store))


def _good_rows_to_measure(store: AnyStore, splits: Sequence[str]) -> np.ndarray:
    rows_N = store.good_rows(list(splits))
    if not len(rows_N):
        raise RunError(
            f"{store.location}: split {' + '.join(splits)} has no good clip to measure on; "
            "see: ajepa-data report"
        )
    return rows_N
