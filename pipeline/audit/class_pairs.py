"""Statistics of classes: pairs that share more or fewer clips than by chance, and shifts between splits."""

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

# The probability of at least one false finding, over all pairs together.
SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class ClassPair:
    """Two unrelated classes, and the number of clips that have both."""

    one: str
    other: str
    clips: int
    expected: float  # number of clips if the classes were independent
    g2: float  # log-likelihood ratio of the 2 x 2 table


@dataclass(frozen=True, slots=True)
class SurprisingPairs:
    """The most surprising pairs of classes, and the numbers of compared classes and of clips that were left out."""

    more: tuple[ClassPair, ...]  # with more clips than expected, strongest first
    less: tuple[ClassPair, ...]  # with fewer clips than expected, strongest first
    more_in_all: int  # number of such pairs, including those not in `more`
    less_in_all: int
    classes: int  # number of classes that were paired
    clips_left_out: int  # clips with more than MAX_PAIRED_LABELS labels


@dataclass(frozen=True, slots=True)
class ClassShift:
    """A class whose frequency in the training splits differs from that in the held-out splits."""

    name: str
    trained: float  # share of the labelled training clips that have the class
    held_out: float  # share of the labelled held-out clips
    g2: float


def find_surprising_pairs(
    row_N: np.ndarray, class_N: np.ndarray, names: Sequence[str], related_pairs: np.ndarray, *, top: int
) -> SurprisingPairs:
    """Return the pairs of classes that share more or fewer clips than by chance, among the clips that have a label.

    If clips have few labels each, any two classes slightly exclude each other, so only the strongest pairs matter.

    row_N, class_N  row and class of every label, sorted by row, then class, without repeats
    related_pairs   pairs [N, 2] of classes, smaller index first, that the ontology relates; they are not reported
    top             maximum number of pairs of each kind
    """
    # Leave out clips with too many labels, also from the counts of classes and from the total.
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

    # For every unrelated pair, the observed and the expected number of clips with both classes.
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

    # `more` needs enough observed clips, `less` needs enough expected clips.
    enough_seen_N = together_N >= MIN_CLIPS_TOGETHER
    enough_expected_N = expected_N >= MIN_CLIPS_TOGETHER
    more, more_in_all = strongest_pairs(is_significant_N & (together_N > expected_N) & enough_seen_N)
    less, less_in_all = strongest_pairs(is_significant_N & (together_N < expected_N) & enough_expected_N)
    return SurprisingPairs(more, less, more_in_all, less_in_all, len(busy_K), int(is_crowded_R.sum()))


def _busiest_classes(clips_C: np.ndarray) -> np.ndarray:
    """Return the classes with most clips, at most MAX_PAIRED_CLASSES and none without a clip, in ascending order."""
    busy_K = np.sort(np.argsort(-clips_C, kind="stable")[:MAX_PAIRED_CLASSES])
    return busy_K[clips_C[busy_K] > 0]


def _unrelated_mask_KK(place_C: np.ndarray, related_pairs: np.ndarray, place_count: int) -> np.ndarray:
    """Return a mask, true at [i, j], i < j, if the ontology does not relate the classes at places i and j."""
    mask_KK = np.triu(np.ones((place_count, place_count), bool), 1)
    if len(related_pairs):
        one_N, other_N = place_C[related_pairs].T
        both_N = (one_N >= 0) & (other_N >= 0)
        mask_KK[one_N[both_N], other_N[both_N]] = False
    return mask_KK


def count_together_KK(row_N: np.ndarray, position_N: np.ndarray, position_count: int) -> np.ndarray:
    """Return at [i, j], i < j, the number of rows that have both positions i and j.

    Entries are sorted by row, then position, without repeats.
    """
    # Entries of one row are adjacent, so compare each with the entry `distance` places later.
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
    """Return the classes whose shares of training and held-out clips differ most significantly; and how many differ.

    `train_clips` and `held_out_clips` are the numbers of labelled clips, from which the shares are computed.
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
    """Return G2, the log-likelihood ratio (Dunning 1993), of 2 x 2 tables of clips with and without two properties.

    It is chi-squared with one degree of freedom if the properties are independent. For rare properties it is more
    accurate than Pearson's sum. It ranks by evidence; mutual information would rank by ratio.

    both_N, one_N, other_N  number of clips with both properties, with the first, with the second
    total                   number of all clips
    """
    one_N = one_N.astype(float)
    other_N = other_N.astype(float)

    # The four cells of every table: both properties, only the first, only the second, neither.
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

    # An empty cell adds nothing: x log x is 0 at x = 0.
    is_filled_4N = observed_4N > 0
    ratio_4N = np.where(is_filled_4N, observed_4N / np.maximum(expected_4N, 1e-300), 1)
    return 2 * np.where(is_filled_4N, observed_4N * np.log(ratio_4N), 0).sum(0)


def g2_threshold(draws: int) -> float:
    """Return the G2 that any of `draws` independent values exceeds with probability SIGNIFICANCE_LEVEL (Bonferroni)."""
    return NormalDist().inv_cdf(1 - SIGNIFICANCE_LEVEL / (2 * max(draws, 1))) ** 2
