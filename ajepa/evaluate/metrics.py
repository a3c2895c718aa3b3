"""Ranking: average precision and area under the ROC curve of one class, for many weightings of the clips at once.

With weight 1 for every clip they are scikit-learn's `average_precision_score` and `roc_auc_score`, ties included;
with whole numbers those of a sample in which each clip lies so many times. Clips are sorted once: every weighting
then needs only how much of it lies above, at and below each score that a positive has.

Metrics of scored clips: mean average precision, area under the ROC curve, d', accuracy, F1.

Each is also computed for many weightings of the clips at once, which is what intervals are made of
(`bootstrap.py`). All but d' lie in [0, 1], d' in [-8.5, 8.5].

Bootstrap: how much a metric would move with other clips of the same kind to measure on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.sparse import csr_matrix
from scipy.stats import norm

from pipeline.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ClassRanking:
    """The clips in the order of a class's scores, those of equal scores together: G such ties hold a positive.

    order_N    clips from the highest score down to the end of the last tie
    cuts       where ties start and end in `order_N`: `[0, start, end, start, end, ...]`, 2G + 1 places
    members_R  the positives, tie after tie; those of tie g end before `ends_G[g]`
    """

    order_N: np.ndarray
    tie_bounds: np.ndarray
    positives_R: np.ndarray
    positive_ends_G: np.ndarray
    clip_count: int

    @classmethod
    def from_scores(cls, labels_N: np.ndarray, scores_N: np.ndarray) -> "ClassRanking":
        """Of the clips where `labels_N` is above 0 against all others; there is at least one of the former."""
        order_N = np.argsort(-scores_N, kind="stable")
        sorted_N = scores_N[order_N]
        starts_T = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]]))
        ends_T = np.append(starts_T[1:], len(order_N))
        places_R = np.flatnonzero(labels_N[order_N] > 0)
        tie_R = np.searchsorted(ends_T, places_R, side="right")
        ties_G, count_G = np.unique(tie_R, return_counts=True)
        cuts = np.concatenate([[0], np.stack([starts_T[ties_G], ends_T[ties_G]], axis=1).ravel()])
        return cls(
            order_N=order_N[: cuts[-1]],
            tie_bounds=cuts,
            positives_R=order_N[places_R],
            positive_ends_G=np.cumsum(count_G),
            clip_count=len(order_N),
        )

    def precision_and_area(self, weights_NB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Average precision `B` (nan where no positive has weight) and area `B` (nan: or no negative has)."""
        cumulated_2GB = np.cumsum(self._segment_matrix @ weights_NB, axis=0)
        above_GB, with_GB = cumulated_2GB[::2], cumulated_2GB[1::2]
        positive_GB = self._positive_matrix @ weights_NB
        found_GB = np.cumsum(positive_GB, axis=0)
        positives_B = found_GB[-1]
        negatives_B = weights_NB.sum(axis=0) - positives_B
        precise_GB = found_GB / np.maximum(with_GB, 1)  # a tie without weight counts 0 times
        beaten_GB = negatives_B - (with_GB - found_GB) + (with_GB - above_GB - positive_GB) / 2
        with np.errstate(invalid="ignore"):  # 0/0 is nan, as promised
            precision_B = (positive_GB * precise_GB).sum(axis=0) / positives_B
            area_B = (positive_GB * beaten_GB).sum(axis=0) / (positives_B * negatives_B)
        return precision_B, area_B

    @cached_property
    def _segment_matrix(self) -> csr_matrix:
        """`[2G, clips]`: what lies between two ties, and then the tie, in turns."""
        return _sum_matrix(self.order_N, self.tie_bounds, self.clip_count)

    @cached_property
    def _positive_matrix(self) -> csr_matrix:
        """`[G, clips]`: the positives of each tie."""
        return _sum_matrix(self.positives_R, np.concatenate([[0], self.positive_ends_G]), self.clip_count)


def _sum_matrix(clips_M: np.ndarray, bounds: np.ndarray, clips: int) -> csr_matrix:
    """A matrix that adds up what the clips between each two cuts weigh."""
    return csr_matrix((np.ones(len(clips_M), np.float32), clips_M, bounds), shape=(len(bounds) - 1, clips))


def precisions_and_areas_CB(
    labels_NC: np.ndarray, scores_NC: np.ndarray, weights_NB: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Average precision and area of every class under every weighting, both `[C, B]`; nan where no clip has it."""
    precision_CB = np.full((labels_NC.shape[1], weights_NB.shape[1]), np.nan, np.float64)
    area_CB = precision_CB.copy()
    for index in np.flatnonzero((labels_NC > 0).any(axis=0)):
        ranking = ClassRanking.from_scores(labels_NC[:, index], scores_NC[:, index])
        precision_CB[index], area_CB[index] = ranking.precision_and_area(weights_NB)
    return precision_CB, area_CB


LARGEST_AREA = 1 - 1e-9  # what d' takes for a perfect one, which has none: 8.5


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanAveragePrecision:
    """Macro mean over the classes that have a positive clip; the others have no precision and are counted.

    per_class_C   average precision in [0, 1], nan where a class was skipped
    chance        what random scores reach in expectation, over the same classes
    """

    value: float
    chance: float
    scored_classes: int
    skipped_classes: int
    per_class_C: np.ndarray


def mean_average_precision(labels_NC: np.ndarray, scores_NC: np.ndarray) -> MeanAveragePrecision:
    """mAP of `scores_NC` against 0/1 `labels_NC`: the mean of scikit-learn's average precision of every class.

    A class without positives would be nan and take the mean with it: it is skipped and counted instead.
    InputError where no class has a positive: there is nothing to rank.
    """
    positives_C = (labels_NC > 0).sum(axis=0)
    counted = np.flatnonzero(positives_C)
    if not len(counted):
        raise InputError(f"none of {labels_NC.shape[1]} classes has a positive among {len(labels_NC)} clips")
    per_class_C = precisions_and_areas_CB(labels_NC, scores_NC, np.ones((len(labels_NC), 1)))[0][:, 0]
    return MeanAveragePrecision(
        value=float(per_class_C[counted].mean()),
        chance=float(random_precision_C(positives_C[counted], len(labels_NC)).mean()),
        scored_classes=len(counted),
        skipped_classes=labels_NC.shape[1] - len(counted),
        per_class_C=per_class_C,
    )


def random_precision_C(positives_C: np.ndarray, clips: int) -> np.ndarray:
    """Expected average precision of a random order of `clips`, exactly, for classes of so many positives.

    A clip at rank k is positive with probability R/N and then finds (k - 1)(R - 1)/(N - 1) others above it;
    summed over k. Rare classes reach well more than their share: 5 positives of 400 reach 0.026, not 0.0125.
    """
    harmonic = (1 / np.arange(1, clips + 1)).sum()
    others_C = (positives_C - 1) / max(clips - 1, 1)
    return (harmonic + others_C * (clips - harmonic)) / clips


def d_prime(area: np.ndarray) -> np.ndarray:
    """How far apart two normal distributions of variance 1 lie that would have this area under the ROC curve.

    Of the macro mean of the areas, as in the papers on AudioSet (AST, arXiv 2104.01778).
    """
    return np.sqrt(2) * norm.ppf(np.clip(area, 1 - LARGEST_AREA, LARGEST_AREA))


def accuracy_B(true_N: np.ndarray, predicted_N: np.ndarray, weights_NB: np.ndarray) -> np.ndarray:
    """Share of the weight on clips whose one class was said, for every weighting."""
    return (true_N == predicted_N).astype(weights_NB.dtype) @ weights_NB / weights_NB.sum(axis=0)


def macro_f1_B(true_N: np.ndarray, predicted_N: np.ndarray, weights_NB: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that have or were said of a clip of any weight (scikit-learn's, with weights)."""
    classes = int(max(true_N.max(), predicted_N.max())) + 1

    def weight_per_class_CB(class_N: np.ndarray, weights_NB: np.ndarray) -> np.ndarray:
        ones_N, clips = np.ones(len(class_N), np.float32), np.arange(len(class_N))
        return csr_matrix((ones_N, (class_N, clips)), shape=(classes, len(class_N))) @ weights_NB

    right_N1 = (true_N == predicted_N)[:, None]
    counted_CB = weight_per_class_CB(true_N, weights_NB) + weight_per_class_CB(predicted_N, weights_NB)
    hits_CB = 2 * weight_per_class_CB(true_N, weights_NB * right_N1)
    f1_CB = hits_CB / np.maximum(counted_CB, 1)
    return f1_CB.sum(axis=0) / (counted_CB > 0).sum(axis=0)


CONFIDENCE_LEVEL = 0.95

MAX_RESAMPLES, MIN_RESAMPLES = 1_000, 200

RESAMPLING_BUDGET = (
    2_000_000_000  # resamples x clips x classes; 20,000 clips of 527 classes are drawn 200 times
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricEstimate:
    """A metric and its interval of `CONFIDENCE`: where its mean over many such sets of clips may lie."""

    value: float
    low: float
    high: float

    @classmethod
    def from_resamples(cls, values_B: np.ndarray) -> "MetricEstimate":
        """Of a metric in [0, 1]: first its value of the clips themselves, then those of resamples.

        Percentiles of the resamples, moved so that their mean is the value: a positive that is drawn twice is
        found together with itself, so average precision rises with every resampling. On AudioSet's 527 classes
        the percentiles as they are lie above the very value that they are of.
        """
        tail = 50 * (1 - CONFIDENCE_LEVEL)
        value, drawn_B = float(values_B[0]), values_B[1:][~np.isnan(values_B[1:])]
        low, high = np.percentile(drawn_B, [tail, 100 - tail]) - drawn_B.mean() + value
        return cls(value=value, low=max(float(low), 0.0), high=min(float(high), 1.0))


def resample_count(clips: int, classes: int) -> int:
    """How often so many clips are drawn again: 1,000 times, down to 200 where that would take minutes."""
    return int(np.clip(RESAMPLING_BUDGET // max(1, clips * classes), MIN_RESAMPLES, MAX_RESAMPLES))


def resample_weights_NB(clips: int, count: int, seed: int) -> np.ndarray:
    """How often each clip lies in each sample, float32: first once in all, then `count` drawn with replacement."""
    rng = np.random.default_rng([seed, 2])
    drawn = [np.bincount(rng.integers(clips, size=clips), minlength=clips) for _ in range(count)]
    return np.stack([np.ones(clips, np.int64), *drawn], axis=1).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class ScoredFold:
    """What a probe says of the clips of one fold (the whole of them, where there are no folds).

    labels_NC, scores_NC  what is true, and how sure the probe is of it
    weights_NB            `resampled_NB`
    single                whether every clip has exactly one class
    """

    labels_NC: np.ndarray
    scores_NC: np.ndarray
    weights_NB: np.ndarray = field(repr=False)
    single: bool

    @cached_property
    def precision_and_area_CB(self) -> tuple[np.ndarray, np.ndarray]:
        """Average precision and area, `[C, B]`."""
        return precisions_and_areas_CB(self.labels_NC, self.scores_NC, self.weights_NB)

    def metric_values(self) -> dict[str, np.ndarray]:
        """Every metric under every weighting; a class without a positive of any weight is left out of its mean.

        There is no area where every clip has every class.
        """
        precision_CB, area_CB = self.precision_and_area_CB
        told = {"map": class_mean_B(precision_CB)}
        if not np.isnan(area_CB[:, 0]).all():
            told["auc"] = class_mean_B(area_CB)
        if self.single:
            true_N, said_N = self.labels_NC.argmax(1), self.scores_NC.argmax(1)
            told["accuracy"] = accuracy_B(true_N, said_N, self.weights_NB)
            told["f1"] = macro_f1_B(true_N, said_N, self.weights_NB)
        return told


def class_mean_B(value_CB: np.ndarray) -> np.ndarray:
    """Mean over the classes that have a value; nan where none has."""
    there_CB = ~np.isnan(value_CB)
    with np.errstate(invalid="ignore"):  # 0/0 is nan, as promised
        return np.where(there_CB, value_CB, 0).sum(axis=0) / there_CB.sum(axis=0)


def estimate_metrics(folds: Sequence[ScoredFold]) -> dict[str, MetricEstimate]:
    """Every metric: the mean over folds, clips drawn again within each; d' of the mean area."""
    of_folds = [fold.metric_values() for fold in folds]
    names = [name for name in of_folds[0] if all(name in fold for fold in of_folds)]
    means = {name: np.mean([fold[name] for fold in of_folds], axis=0) for name in names}
    told = {name: MetricEstimate.from_resamples(values_B) for name, values_B in means.items()}
    if "auc" in told:
        area = told["auc"]
        value, low, high = d_prime(np.array([area.value, area.low, area.high])).tolist()
        told["d_prime"] = MetricEstimate(value=value, low=low, high=high)
    return told
