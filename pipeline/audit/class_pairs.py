"""Surprises among classes: pairs that share clips more or less than by chance, and shifts between the splits."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

# Only the classes with most clips are paired: the square table of their counts stays under 10 MB.
MAX_PAIRED_CLASSES = 1_024

# A clip with more labels is left out: n labels are n (n - 1) / 2 pairs.
MAX_PAIRED_LABELS = 64

# With fewer clips, observed or expected, the statistic means little.
MIN_CLIPS_TOGETHER = 5

# The chance that clips without any surprise show one, over all pairs together.
SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class ClassPair:
    """Two unrelated classes, and the number of clips that have both."""

    one: str
    other: str
    clips: int
    expected: float  # if the classes were independent
    g2: float  # log-likelihood ratio of the 2 x 2 table


@dataclass(frozen=True, slots=True)
class SurprisingPairs:
    """The most surprising pairs of classes, and how much of the labels was not compared."""

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


def find_surprising_pairs(
    row_N: np.ndarray, class_N: np.ndarray, names: Sequence[str], related_pairs: np.ndarray, *, top: int
) -> SurprisingPairs:
    """The classes that stand together more or less often than chance, among clips that have a label.

    Where clips have few labels each, any two classes keep each other away a little: the first pairs count most.

    row_N, class_N  the labels, by row, then class, each once
    related_pairs   pairs [N, 2] of classes, smaller index first, that the ontology relates: they cannot surprise
    top             how many pairs of each kind to return
    """
    # A crowded clip counts for nothing: neither for its classes, nor for a pair, nor for the total.
    is_crowded_R = np.bincount(row_N, minlength=1) > MAX_PAIRED_LABELS
    is_kept_N = ~is_crowded_R[row_N]
    row_N = row_N[is_kept_N]
    class_N = class_N[is_kept_N]
    total = int(np.count_nonzero(np.diff(row_N, prepend=-1)))

    # The classes with most clips get a place in the table of pairs.
    clips_C = np.bincount(class_N, minlength=len(names))
    busy_K = _busiest_classes(clips_C)
    clips_K = clips_C[busy_K]
    place_C = np.full(len(names), -1)
    place_C[busy_K] = np.arange(len(busy_K))
    has_place_N = place_C[class_N] >= 0
    together_KK = count_together_KK(row_N[has_place_N], place_C[class_N[has_place_N]], len(busy_K))

    # Every unrelated pair, with the clips that have both and the clips expected to.
    one_N, other_N = np.nonzero(_unrelated_mask_KK(place_C, related_pairs, len(busy_K)))
    together_N = together_KK[one_N, other_N]
    expected_N = clips_K[one_N] * clips_K[other_N] / max(total, 1)
    g2_N = log_likelihood_ratio(together_N, clips_K[one_N], clips_K[other_N], total)
    is_significant_N = g2_N > g2_threshold(len(g2_N))

    def strongest_pairs(candidates_N: np.ndarray) -> tuple[tuple[ClassPair, ...], int]:
        indices = np.flatnonzero(candidates_N)
        strongest = indices[np.argsort(-g2_N[indices], kind="stable")][:top]
        pairs = tuple(
            ClassPair(
                names[busy_K[one_N[i]]],
                names[busy_K[other_N[i]]],
                int(together_N[i]),
                float(expected_N[i]),
                float(g2_N[i]),
            )
            for i in strongest
        )
        return pairs, len(indices)

    # More than expected counts where enough clips are seen, fewer where enough are expected.
    enough_seen_N = together_N >= MIN_CLIPS_TOGETHER
    enough_expected_N = expected_N >= MIN_CLIPS_TOGETHER
    more, more_in_all = strongest_pairs(is_significant_N & (together_N > expected_N) & enough_seen_N)
    less, less_in_all = strongest_pairs(is_significant_N & (together_N < expected_N) & enough_expected_N)
    return SurprisingPairs(more, less, more_in_all, less_in_all, len(busy_K), int(is_crowded_R.sum()))


def _busiest_classes(clips_C: np.ndarray) -> np.ndarray:
    """The classes with most clips, at most MAX_PAIRED_CLASSES and none without a clip, in ascending order."""
    busy_K = np.sort(np.argsort(-clips_C, kind="stable")[:MAX_PAIRED_CLASSES])
    return busy_K[clips_C[busy_K] > 0]


def _unrelated_mask_KK(place_C: np.ndarray, related_pairs: np.ndarray, place_count: int) -> np.ndarray:
    """True at [one, other], one < other, of every two places whose classes the ontology does not relate."""
    mask_KK = np.triu(np.ones((place_count, place_count), bool), 1)
    if len(related_pairs):
        one_N, other_N = place_C[related_pairs].T
        both_N = (one_N >= 0) & (other_N >= 0)
        mask_KK[one_N[both_N], other_N[both_N]] = False
    return mask_KK


def count_together_KK(row_N: np.ndarray, position_N: np.ndarray, position_count: int) -> np.ndarray:
    """The number of rows that have two positions together, at [one, other] with one < other.

    Entries come by row, then position, each once.
    """
    # Entries of one row lie side by side, so that each meets the entry `distance` places further on.
    count_KK = np.zeros(position_count * position_count, np.int64)
    for distance in range(1, MAX_PAIRED_LABELS):
        same_row_N = row_N[distance:] == row_N[:-distance]
        if not same_row_N.any():
            break
        one_N = position_N[:-distance][same_row_N]
        other_N = position_N[distance:][same_row_N]
        count_KK += np.bincount(one_N * position_count + other_N, minlength=position_count * position_count)
    return count_KK.reshape(position_count, position_count)


def find_class_shifts(
    train_clips_C: np.ndarray,
    held_out_clips_C: np.ndarray,
    train_clips: int,
    held_out_clips: int,
    names: Sequence[str],
    *,
    top: int,
) -> tuple[tuple[ClassShift, ...], int]:
    """The classes whose shares of the clips to train on and held out differ most, by evidence; and how many differ.

    `train_clips` and `held_out_clips` are labelled clips, so that a class's share is of these.
    """
    if not train_clips or not held_out_clips:
        return (), 0
    clips_C = train_clips_C + held_out_clips_C
    total = train_clips + held_out_clips
    g2_C = log_likelihood_ratio(train_clips_C, clips_C, np.full(len(names), train_clips), total)

    # Rare classes are not compared, so that they do not raise the threshold either.
    enough_C = clips_C >= MIN_CLIPS_TOGETHER
    shifted = np.flatnonzero(enough_C & (g2_C > g2_threshold(int(enough_C.sum()))))
    strongest = shifted[np.argsort(-g2_C[shifted], kind="stable")][:top]
    shifts = tuple(
        ClassShift(
            names[i],
            float(train_clips_C[i] / train_clips),
            float(held_out_clips_C[i] / held_out_clips),
            float(g2_C[i]),
        )
        for i in strongest
    )
    return shifts, len(shifted)


def log_likelihood_ratio(
    both_N: np.ndarray, one_N: np.ndarray, other_N: np.ndarray, total: int
) -> np.ndarray:
    """Log-likelihood ratio (Dunning 1993) of tables of clips with both, either or neither of two marks.

    Chi-squared with one degree of freedom if the marks are independent. It holds for rare marks better than Pearson's
    sum, and ranks by evidence rather than by ratio, as mutual information would.
    """
    one_N = one_N.astype(float)
    other_N = other_N.astype(float)

    # The four cells of every table: both marks, the one alone, the other alone, neither.
    observed_4N = np.stack([both_N, one_N - both_N, other_N - both_N, total - one_N - other_N + both_N])
    products_4N = np.stack(
        [
            one_N * other_N,
            one_N * (total - other_N),
            (total - one_N) * other_N,
            (total - one_N) * (total - other_N),
        ]
    )
    expected_4N = products_4N / max(total, 1)

    # An empty cell adds nothing, as x log x does at zero.
    is_filled_4N = observed_4N > 0
    ratio_4N = np.where(is_filled_4N, observed_4N / np.maximum(expected_4N, 1e-300), 1)
    return 2 * np.where(is_filled_4N, observed_4N * np.log(ratio_4N), 0).sum(0)


def g2_threshold(draws: int) -> float:
    """The ratio that the largest of `draws` independent ones exceeds with chance SIGNIFICANCE_LEVEL (Bonferroni)."""
    return NormalDist().inv_cdf(1 - SIGNIFICANCE_LEVEL / (2 * max(draws, 1))) ** 2
