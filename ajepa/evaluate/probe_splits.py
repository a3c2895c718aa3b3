"""Partition: which clips train a probe, which choose its settings, and which it is measured on."""

from dataclasses import dataclass

import numpy as np

from pipeline.errors import RunError
from pipeline.store.joined_store import AnyStore
from pipeline.store.splits import CHOOSING, FOLD, eval_splits, measured_splits, train_splits

HELD_SHARE = 0.2  # of the train clips, to choose with where no split is there for it


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Rows of a store, ascending; nothing is measured on what it was trained or chosen on.

    drawn  whether `val_N` was drawn from the splits to train on: then both train, once the choice is made
    """

    train_N: np.ndarray
    val_N: np.ndarray
    eval_N: np.ndarray
    drawn: bool

    @property
    def rows(self) -> dict[str, np.ndarray]:
        return {"train_N": self.train_N, "val_N": self.val_N, "eval_N": self.eval_N}

    @property
    def fit_N(self) -> np.ndarray:
        """What trains once the choice is made."""
        return np.sort(np.concatenate([self.train_N, self.val_N])) if self.drawn else self.train_N


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """One part, or one for each fold; and the splits that they are of."""

    parts: tuple[Part, ...]
    train: tuple[str, ...]
    val: tuple[str, ...]
    eval: tuple[str, ...]

    @property
    def rows_N(self) -> np.ndarray:
        """Every row of some use, ascending."""
        return np.unique(
            np.concatenate([rows for p in self.parts for rows in (p.train_N, p.val_N, p.eval_N)])
        )

    @property
    def eval_N(self) -> np.ndarray:
        """Every row that is measured on, ascending."""
        return np.unique(np.concatenate([part.eval_N for part in self.parts]))

    @classmethod
    def of(cls, store: AnyStore, seed: int, train_clips: int) -> "Partition":
        """By the names of the splits: `fold1`, `fold2` ... take turns where no split is kept to measure on.

        Else what is named val, valid, validation or dev chooses, and the other splits train. Where no split
        chooses, a fifth of the train clips does, drawn by the seed, and trains thereafter. At most `train_clips`
        train, and as many choose. RunError where nothing is there to measure on or to train on.
        """
        splits = sorted(store.manifest["split"].unique())
        folds = [split for split in splits if FOLD.fullmatch(split)]
        if len(folds) > 1 and not measured_splits(splits):
            return cls.of_folds(store, sorted(folds, key=lambda fold: int(fold[4:])), seed, train_clips)
        trained = train_splits(store)
        choosing = tuple(split for split in trained if CHOOSING.search(split))
        train = tuple(split for split in trained if split not in choosing) or choosing
        train_N, eval_N = drawn_rows(store, train, seed, train_clips), measured_rows(store)
        val = choosing if train != choosing else ()
        val_N = drawn_rows(store, val, seed, train_clips) if val else np.empty(0, np.int64)
        part = chosen_apart(train_N, val_N, eval_N, seed)
        return cls(parts=(part,), train=train, val=val, eval=tuple(eval_splits(store)))

    @classmethod
    def of_splits(
        cls, store: AnyStore, train: tuple[str, ...], measured: tuple[str, ...], seed: int, train_clips: int
    ) -> "Partition":
        """The splits that a run was fine-tuned and measured on; a fifth of the train clips chooses.

        RunError where nothing is there to measure on.
        """
        if not len(eval_N := store.good_rows(list(measured))):
            told = f"split {' + '.join(measured)} has no good clip to measure on"
            raise RunError(f"{store.place}: {told}; see: ajepa-data report")
        train_N = drawn_rows(store, train, seed, train_clips)
        part = chosen_apart(train_N, np.empty(0, np.int64), eval_N, seed)
        return cls(parts=(part,), train=train, val=(), eval=measured)

    def labelled(self, store: AnyStore) -> "Partition":
        """Without the clips that have no label: no label is no statement. RunError where none is left."""
        rows_N = self.rows_N
        kept_N = rows_N[store.labels_BC(rows_N, "raw").any(axis=1)]
        parts = tuple(
            Part(
                **{name: rows_N[np.isin(rows_N, kept_N)] for name, rows_N in part.rows.items()},
                drawn=part.drawn,
            )
            for part in self.parts
        )
        for part in parts:
            for what, rows_N in (("train", part.fit_N), ("measure", part.eval_N)):
                if not len(rows_N):
                    raise RunError(f"{store.place}: no clip to {what} on has a label; see: ajepa-data report")
        return Partition(parts=parts, train=self.train, val=self.val, eval=self.eval)

    @classmethod
    def of_folds(cls, store: AnyStore, folds: list[str], seed: int, train_clips: int) -> "Partition":
        """Each fold measured by what the others train; RunError where one has no good clip."""
        parts = []
        for fold in folds:
            if not len(eval_N := store.good_rows([fold])):
                raise RunError(f"{store.place}: {fold} has no good clip; see: ajepa-data report")
            others = [other for other in folds if other != fold]
            train_N = drawn_rows(store, others, seed, train_clips)
            parts.append(chosen_apart(train_N, np.empty(0, np.int64), eval_N, seed))
        return cls(parts=tuple(parts), train=tuple(folds), val=(), eval=tuple(folds))


def chosen_apart(train_N: np.ndarray, val_N: np.ndarray, eval_N: np.ndarray, seed: int) -> Part:
    """A part; without clips to choose with, a fifth of the train clips is kept back for it."""
    if drawn := not len(val_N):
        order_N = np.random.default_rng([seed, 1]).permutation(train_N)
        val_N, train_N = np.split(order_N, [int(len(order_N) * HELD_SHARE)])
    return Part(train_N=np.sort(train_N), val_N=np.sort(val_N), eval_N=eval_N, drawn=drawn)


def probe_rows(store: AnyStore, seed: int, train_clips: int) -> tuple[np.ndarray, np.ndarray]:
    """Good rows to train probes on (at most `train_clips`, drawn by `seed`) and to measure them on."""
    return drawn_rows(store, train_splits(store), seed, train_clips), measured_rows(store)


def drawn_rows(store: AnyStore, splits: list[str] | tuple[str, ...], seed: int, most: int) -> np.ndarray:
    """At most so many good rows of some splits, drawn by the seed, ascending."""
    rows_N = store.good_rows(list(splits))
    return np.sort(np.random.default_rng([seed, 0]).permutation(rows_N)[:most])


def measured_rows(store: AnyStore) -> np.ndarray:
    """The good rows of what is kept to measure on; RunError where there are none."""
    eval_N = store.good_rows(measured := eval_splits(store))
    if not len(eval_N):
        raise RunError(
            f"{store.place}: split {' + '.join(measured)} has no good clip to measure on; see: ajepa-data report"
        )
    return eval_N
