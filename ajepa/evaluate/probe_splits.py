"""Partition: which clips train a probe, which choose its settings, and which it is measured on."""

from dataclasses import dataclass

import numpy as np

from pipeline.errors import RunError
from pipeline.store.joined_store import AnyStore
from pipeline.store.splits import (
    FOLD_PATTERN,
    VALIDATION_PATTERN,
    evaluation_split_names,
    probe_eval_splits,
    train_splits,
)

VALIDATION_SHARE = 0.2  # of the train clips, to choose with where no split is there for it


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeFold:
    """Rows of a store, ascending; nothing is measured on what it was trained or chosen on.

    drawn  whether `val_N` was drawn from the splits to train on: then both train, once the choice is made
    """

    train_N: np.ndarray
    val_N: np.ndarray
    eval_N: np.ndarray
    val_from_train: bool

    @property
    def rows_by_role(self) -> dict[str, np.ndarray]:
        return {"train_N": self.train_N, "val_N": self.val_N, "eval_N": self.eval_N}

    @property
    def fit_N(self) -> np.ndarray:
        """What trains once the choice is made."""
        return np.sort(np.concatenate([self.train_N, self.val_N])) if self.val_from_train else self.train_N


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSplits:
    """One part, or one for each fold; and the splits that they are of."""

    folds: tuple[ProbeFold, ...]
    train_splits: tuple[str, ...]
    val_splits: tuple[str, ...]
    eval_splits: tuple[str, ...]

    @property
    def rows_N(self) -> np.ndarray:
        """Every row of some use, ascending."""
        return np.unique(
            np.concatenate([rows for p in self.folds for rows in (p.train_N, p.val_N, p.eval_N)])
        )

    @property
    def eval_N(self) -> np.ndarray:
        """Every row that is measured on, ascending."""
        return np.unique(np.concatenate([part.eval_N for part in self.folds]))

    @classmethod
    def from_store(cls, store: AnyStore, seed: int, train_clips: int) -> "ProbeSplits":
        """By the names of the splits: `fold1`, `fold2` ... take turns where no split is kept to measure on.

        Else what is named val, valid, validation or dev chooses, and the other splits train. Where no split
        chooses, a fifth of the train clips does, drawn by the seed, and trains thereafter. At most `train_clips`
        train, and as many choose. RunError where nothing is there to measure on or to train on.
        """
        splits = sorted(store.manifest["split"].unique())
        folds = [split for split in splits if FOLD_PATTERN.fullmatch(split)]
        if len(folds) > 1 and not evaluation_split_names(splits):
            return cls.from_folds(store, sorted(folds, key=lambda fold: int(fold[4:])), seed, train_clips)
        trained = train_splits(store)
        choosing = tuple(split for split in trained if VALIDATION_PATTERN.search(split))
        train = tuple(split for split in trained if split not in choosing) or choosing
        train_N, eval_N = draw_split_rows(store, train, seed, train_clips), good_eval_rows(store)
        val = choosing if train != choosing else ()
        val_N = draw_split_rows(store, val, seed, train_clips) if val else np.empty(0, np.int64)
        part = make_probe_fold(train_N, val_N, eval_N, seed)
        return cls(
            folds=(part,), train_splits=train, val_splits=val, eval_splits=tuple(probe_eval_splits(store))
        )

    @classmethod
    def from_run_splits(
        cls,
        store: AnyStore,
        train_names: tuple[str, ...],
        eval_names: tuple[str, ...],
        seed: int,
        train_clips: int,
    ) -> "ProbeSplits":
        """The splits that a run was fine-tuned and measured on; a fifth of the train clips chooses.

        RunError where nothing is there to measure on.
        """
        if not len(eval_N := store.good_rows(list(eval_names))):
            told = f"split {' + '.join(eval_names)} has no good clip to measure on"
            raise RunError(f"{store.location}: {told}; see: ajepa-data report")
        train_N = draw_split_rows(store, train_names, seed, train_clips)
        part = make_probe_fold(train_N, np.empty(0, np.int64), eval_N, seed)
        return cls(folds=(part,), train_splits=train_names, val_splits=(), eval_splits=eval_names)

    def drop_unlabelled(self, store: AnyStore) -> "ProbeSplits":
        """Without the clips that have no label: no label is no statement. RunError where none is left."""
        rows_N = self.rows_N
        kept_N = rows_N[store.labels_BC(rows_N, "raw").any(axis=1)]
        parts = tuple(
            ProbeFold(
                **{name: rows_N[np.isin(rows_N, kept_N)] for name, rows_N in part.rows_by_role.items()},
                val_from_train=part.val_from_train,
            )
            for part in self.folds
        )
        for part in parts:
            for what, rows_N in (("train", part.fit_N), ("measure", part.eval_N)):
                if not len(rows_N):
                    raise RunError(
                        f"{store.location}: no clip to {what} on has a label; see: ajepa-data report"
                    )
        return ProbeSplits(
            folds=parts,
            train_splits=self.train_splits,
            val_splits=self.val_splits,
            eval_splits=self.eval_splits,
        )

    @classmethod
    def from_folds(cls, store: AnyStore, folds: list[str], seed: int, train_clips: int) -> "ProbeSplits":
        """Each fold measured by what the others train; RunError where one has no good clip."""
        parts = []
        for fold in folds:
            if not len(eval_N := store.good_rows([fold])):
                raise RunError(f"{store.location}: {fold} has no good clip; see: ajepa-data report")
            others = [other for other in folds if other != fold]
            train_N = draw_split_rows(store, others, seed, train_clips)
            parts.append(make_probe_fold(train_N, np.empty(0, np.int64), eval_N, seed))
        return cls(folds=tuple(parts), train_splits=tuple(folds), val_splits=(), eval_splits=tuple(folds))


def make_probe_fold(train_N: np.ndarray, val_N: np.ndarray, eval_N: np.ndarray, seed: int) -> ProbeFold:
    """A part; without clips to choose with, a fifth of the train clips is kept back for it."""
    if drawn := not len(val_N):
        order_N = np.random.default_rng([seed, 1]).permutation(train_N)
        val_N, train_N = np.split(order_N, [int(len(order_N) * VALIDATION_SHARE)])
    return ProbeFold(train_N=np.sort(train_N), val_N=np.sort(val_N), eval_N=eval_N, val_from_train=drawn)


def probe_rows(store: AnyStore, seed: int, train_clips: int) -> tuple[np.ndarray, np.ndarray]:
    """Good rows to train probes on (at most `train_clips`, drawn by `seed`) and to measure them on."""
    return draw_split_rows(store, train_splits(store), seed, train_clips), good_eval_rows(store)


def draw_split_rows(
    store: AnyStore, splits: list[str] | tuple[str, ...], seed: int, max_clips: int
) -> np.ndarray:
    """At most so many good rows of some splits, drawn by the seed, ascending."""
    rows_N = store.good_rows(list(splits))
    return np.sort(np.random.default_rng([seed, 0]).permutation(rows_N)[:max_clips])


def good_eval_rows(store: AnyStore) -> np.ndarray:
    """The good rows of what is kept to measure on; RunError where there are none."""
    eval_N = store.good_rows(measured := probe_eval_splits(store))
    if not len(eval_N):
        raise RunError(
            f"{store.location}: split {' + '.join(measured)} has no good clip to measure on; see: ajepa-data report"
        )
    return eval_N
