"""Surprises among classes: which stand together, and which one side of the splits has, more or less than chance."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

MAX_PAIRED_CLASSES = (
    1_024  # classes that are paired, those with most clips: a square table of counts stays under 10 MB
)

MAX_PAIRED_LABELS = 64  # of a clip that is paired: n labels are n(n-1)/2 pairs

MIN_CLIPS_TOGETHER = 5  # clips, seen or expected: below, the statistic means little

SIGNIFICANCE_LEVEL = 0.05  # that a set without any surprise shows one: every pair is one more draw


@dataclass(frozen=True, slots=True)
class ClassPair:
    """Two classes that are not related, and in how many clips they stand together."""

    one: str
    other: str
    clips: int
    expected: float  # if they had nothing to do with each other
    g2: float  # log-likelihood ratio of the 2 x 2 table


@dataclass(frozen=True, slots=True)
class SurprisingPairs:
    """The pairs of classes that surprise most, and what was not looked at."""

    more: tuple[ClassPair, ...]
    less: tuple[ClassPair, ...]
    more_in_all: int
    less_in_all: int
    classes: int  # paired
    clips_left_out: int  # with too many labels


@dataclass(frozen=True, slots=True)
class ClassShift:
    """A class that is more, or less, frequent in the splits to train on than in those held out."""

    name: str
    trained: float  # share of the labelled clips
    held_out: float
    g2: float


def log_likelihood_ratio(
    both_N: np.ndarray, one_N: np.ndarray, other_N: np.ndarray, total: int
) -> np.ndarray:
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


def g2_threshold(draws: int) -> float:
    """What the largest of so many independent draws exceeds with probability CHANCE (Bonferroni)."""
    return NormalDist().inv_cdf(1 - SIGNIFICANCE_LEVEL / (2 * max(draws, 1))) ** 2


def count_together_KK(row_N: np.ndarray, position_N: np.ndarray, position_count: int) -> np.ndarray:
    """Rows in which two of `places` stand together, at [one, other] with one < other; entries by row, then place."""
    count_KK = np.zeros(position_count * position_count, np.int64)
    for apart in range(1, MAX_PAIRED_LABELS):
        same_N = row_N[apart:] == row_N[:-apart]
        if not same_N.any():
            break
        count_KK += np.bincount(
            position_N[:-apart][same_N] * position_count + position_N[apart:][same_N],
            minlength=position_count * position_count,
        )
    return count_KK.reshape(position_count, position_count)


def find_surprising_pairs(
    row_N: np.ndarray, class_N: np.ndarray, names: Sequence[str], related_pairs: np.ndarray, *, top: int
) -> SurprisingPairs:
    """Classes that stand together more or less often than chance, among clips that have a label.

    Where clips have few labels each, any two classes keep each other away a little: look at what stands first.

    Entries come by row, then class, each once. `related` are pairs [N, 2] of classes, smaller index first, of which
    the ontology says something, so that they cannot surprise.
    """
    crowded_N = np.bincount(row_N, minlength=1) > MAX_PAIRED_LABELS
    kept_N = ~crowded_N[row_N]  # of what a clip counts for: one class, a pair, or the total
    row_N, class_N = row_N[kept_N], class_N[kept_N]
    total = int(np.count_nonzero(np.diff(row_N, prepend=-1)))
    clips_C = np.bincount(class_N, minlength=len(names))
    busy_K = np.sort(np.argsort(-clips_C, kind="stable")[:MAX_PAIRED_CLASSES])
    busy_K = busy_K[clips_C[busy_K] > 0]
    place_C = np.full(len(names), -1)
    place_C[busy_K] = np.arange(len(busy_K))
    paired_N = place_C[class_N] >= 0
    seen_KK = count_together_KK(row_N[paired_N], place_C[class_N[paired_N]], len(busy_K))
    open_KK = np.triu(np.ones(seen_KK.shape, bool), 1)
    one_N, other_N = place_C[related_pairs].T if len(related_pairs) else np.zeros((2, 0), int)
    there_N = (one_N >= 0) & (other_N >= 0)
    open_KK[one_N[there_N], other_N[there_N]] = False
    one_N, other_N = np.nonzero(open_KK)
    seen_N, clips_K = seen_KK[one_N, other_N], clips_C[busy_K]
    due_N = clips_K[one_N] * clips_K[other_N] / max(total, 1)
    score_N = log_likelihood_ratio(seen_N, clips_K[one_N], clips_K[other_N], total)
    odd_N = score_N > g2_threshold(len(score_N))

    def strongest_pairs(candidate_N: np.ndarray) -> tuple[tuple[ClassPair, ...], int]:
        some = np.flatnonzero(candidate_N)
        order = some[np.argsort(-score_N[some], kind="stable")][:top]
        told = tuple(
            ClassPair(
                names[busy_K[one_N[i]]],
                names[busy_K[other_N[i]]],
                int(seen_N[i]),
                float(due_N[i]),
                float(score_N[i]),
            )
            for i in order
        )
        return told, len(some)

    more, more_in_all = strongest_pairs(odd_N & (seen_N > due_N) & (seen_N >= MIN_CLIPS_TOGETHER))
    less, less_in_all = strongest_pairs(odd_N & (seen_N < due_N) & (due_N >= MIN_CLIPS_TOGETHER))
    return SurprisingPairs(more, less, more_in_all, less_in_all, len(busy_K), int(crowded_N.sum()))


def find_class_shifts(
    train_clips_C: np.ndarray,
    held_out_clips_C: np.ndarray,
    train_clips: int,
    held_out_clips: int,
    names: Sequence[str],
    *,
    top: int,
) -> tuple[tuple[ClassShift, ...], int]:
    """The classes whose shares of clips to train on and held out differ most, by evidence; how many differ."""
    if not train_clips or not held_out_clips:
        return (), 0
    score_C = log_likelihood_ratio(
        train_clips_C,
        train_clips_C + held_out_clips_C,
        np.full(len(names), train_clips),
        train_clips + held_out_clips,
    )
    there_C = train_clips_C + held_out_clips_C >= MIN_CLIPS_TOGETHER
    odd = np.flatnonzero(there_C & (score_C > g2_threshold(int(there_C.sum()))))
    order = odd[np.argsort(-score_C[odd], kind="stable")]
    told = tuple(
        ClassShift(
            names[i],
            float(train_clips_C[i] / train_clips),
            float(held_out_clips_C[i] / held_out_clips),
            float(score_C[i]),
        )
        for i in order[:top]
    )
    return told, len(odd)
