"""Surprises among classes: which stand together, and which one side of the splits has, more or less than chance."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

BUSIEST = 1_024  # classes that are paired, those with most clips: a square table of counts stays under 10 MB

MOST_LABELS = 64  # of a clip that is paired: n labels are n(n-1)/2 pairs

LEAST_TOGETHER = 5  # clips, seen or expected: below, the statistic means little

CHANCE = 0.05  # that a set without any surprise shows one: every pair is one more draw


@dataclass(frozen=True, slots=True)
class Pair:
    """Two classes that are not related, and in how many clips they stand together."""

    one: str
    other: str
    clips: int
    expected: float  # if they had nothing to do with each other
    g2: float  # log-likelihood ratio of the 2 x 2 table


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of classes that surprise most, and what was not looked at."""

    more: tuple[Pair, ...]
    less: tuple[Pair, ...]
    more_in_all: int
    less_in_all: int
    classes: int  # paired
    clips_left_out: int  # with too many labels


@dataclass(frozen=True, slots=True)
class Shift:
    """A class that is more, or less, frequent in the splits to train on than in those held out."""

    name: str
    trained: float  # share of the labelled clips
    held_out: float
    g2: float


def g2(both_N: np.ndarray, one_N: np.ndarray, other_N: np.ndarray, total: int) -> np.ndarray:
    """Log-likelihood ratio (Dunning 1993) of tables of clips with both, either or neither of two marks.

    Chi-squared with one degree of freedom where the marks are independent; holds for rare ones better than
    Pearson's sum, and ranks by evidence rather than by ratio, as mutual information would.
    """
    one_N, other_N = one_N.astype(float), other_N.astype(float)
    seen_4N = np.stack([both_N, one_N - both_N, other_N - both_N, total - one_N - other_N + both_N])
    due_4N = np.stack(
        [
            one_N * other_N,
            one_N * (total - other_N),
            (total - one_N) * other_N,
            (total - one_N) * (total - other_N),
        ]
    ) / max(total, 1)
    there_4N = seen_4N > 0
    return 2 * np.where(
        there_4N, seen_4N * np.log(np.where(there_4N, seen_4N / np.maximum(due_4N, 1e-300), 1)), 0
    ).sum(0)


def least_g2(draws: int) -> float:
    """What the largest of so many independent draws exceeds with probability CHANCE (Bonferroni)."""
    return NormalDist().inv_cdf(1 - CHANCE / (2 * max(draws, 1))) ** 2


def together_KK(row_N: np.ndarray, place_N: np.ndarray, places: int) -> np.ndarray:
    """Rows in which two of `places` stand together, at [one, other] with one < other; entries by row, then place."""
    count_KK = np.zeros(places * places, np.int64)
    for apart in range(1, MOST_LABELS):
        same_N = row_N[apart:] == row_N[:-apart]
        if not same_N.any():
            break
        count_KK += np.bincount(
            place_N[:-apart][same_N] * places + place_N[apart:][same_N], minlength=places * places
        )
    return count_KK.reshape(places, places)


def pairs_of(
    row_N: np.ndarray, class_N: np.ndarray, names: Sequence[str], related: np.ndarray, *, top: int
) -> Pairs:
    """Classes that stand together more or less often than chance, among clips that have a label.

    Where clips have few labels each, any two classes keep each other away a little: look at what stands first.

    Entries come by row, then class, each once. `related` are pairs [N, 2] of classes, smaller index first, of which
    the ontology says something, so that they cannot surprise.
    """
    crowded_N = np.bincount(row_N, minlength=1) > MOST_LABELS
    kept_N = ~crowded_N[row_N]  # of what a clip counts for: one class, a pair, or the total
    row_N, class_N = row_N[kept_N], class_N[kept_N]
    total = int(np.count_nonzero(np.diff(row_N, prepend=-1)))
    clips_C = np.bincount(class_N, minlength=len(names))
    busy_K = np.sort(np.argsort(-clips_C, kind="stable")[:BUSIEST])
    busy_K = busy_K[clips_C[busy_K] > 0]
    place_C = np.full(len(names), -1)
    place_C[busy_K] = np.arange(len(busy_K))
    paired_N = place_C[class_N] >= 0
    seen_KK = together_KK(row_N[paired_N], place_C[class_N[paired_N]], len(busy_K))
    open_KK = np.triu(np.ones(seen_KK.shape, bool), 1)
    one_N, other_N = place_C[related].T if len(related) else np.zeros((2, 0), int)
    there_N = (one_N >= 0) & (other_N >= 0)
    open_KK[one_N[there_N], other_N[there_N]] = False
    one_N, other_N = np.nonzero(open_KK)
    seen_N, clips_K = seen_KK[one_N, other_N], clips_C[busy_K]
    due_N = clips_K[one_N] * clips_K[other_N] / max(total, 1)
    score_N = g2(seen_N, clips_K[one_N], clips_K[other_N], total)
    odd_N = score_N > least_g2(len(score_N))

    def best(wanted_N: np.ndarray) -> tuple[tuple[Pair, ...], int]:
        some = np.flatnonzero(wanted_N)
        order = some[np.argsort(-score_N[some], kind="stable")][:top]
        told = tuple(
            Pair(
                names[busy_K[one_N[i]]],
                names[busy_K[other_N[i]]],
                int(seen_N[i]),
                float(due_N[i]),
                float(score_N[i]),
            )
            for i in order
        )
        return told, len(some)

    more, more_in_all = best(odd_N & (seen_N > due_N) & (seen_N >= LEAST_TOGETHER))
    less, less_in_all = best(odd_N & (seen_N < due_N) & (due_N >= LEAST_TOGETHER))
    return Pairs(more, less, more_in_all, less_in_all, len(busy_K), int(crowded_N.sum()))


def shifts_of(
    trained_C: np.ndarray, held_C: np.ndarray, trained: int, held: int, names: Sequence[str], *, top: int
) -> tuple[tuple[Shift, ...], int]:
    """The classes whose shares of clips to train on and held out differ most, by evidence; how many differ."""
    if not trained or not held:
        return (), 0
    score_C = g2(trained_C, trained_C + held_C, np.full(len(names), trained), trained + held)
    there_C = trained_C + held_C >= LEAST_TOGETHER
    odd = np.flatnonzero(there_C & (score_C > least_g2(int(there_C.sum()))))
    order = odd[np.argsort(-score_C[odd], kind="stable")]
    told = tuple(
        Shift(names[i], float(trained_C[i] / trained), float(held_C[i] / held), float(score_C[i]))
        for i in order[:top]
    )
    return told, len(odd)
