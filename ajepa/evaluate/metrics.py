"""Metrics of scored clips (mAP, area under the ROC curve, d', accuracy, macro F1), each with its confidence interval.

Every metric is computed for many weightings of the clips at once. Weight 1 for every clip gives the metric's value,
which equals scikit-learn's, ties included. The weightings of a bootstrap give its interval: a clip of weight 3 counts
as 3 clips. All metrics are in [0, 1], except d', which is in [-8.5, 8.5].
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import ndtri  # scipy.stats has it too, and takes a second to import

from pipeline.errors import InputError

CONFIDENCE_LEVEL = 0.95

MAX_RESAMPLES, MIN_RESAMPLES = 1_000, 200

# Largest resamples x clips x classes: with it, 20,000 clips of 527 classes are resampled 200 times.
RESAMPLING_BUDGET = 2_000_000_000

# An area of 1 would have an infinite d'; it is replaced by this area, whose d' is 8.5.
LARGEST_AREA = 1 - 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricEstimate:
    """A metric's value, and the interval of `CONFIDENCE_LEVEL` for its mean over many sets of clips."""

    value: float
    low: float
    high: float

    @classmethod
    def from_resamples(cls, values_B: np.ndarray) -> "MetricEstimate":
        """The estimate of a metric in [0, 1]: `values_B[0]` is its value on the clips, the rest those on resamples.

        The interval ends are percentiles of the resamples, shifted so that the mean of the resamples equals the value.
        The shift is needed because resampling raises average precision: a positive that is drawn twice is ranked high
        twice. On AudioSet's 527 classes even the lower percentile is above the value without the shift.
        """
        # Resamples in which the metric is undefined (nan) are left out
        value = float(values_B[0])
        resampled_B = values_B[1:][~np.isnan(values_B[1:])]
        tail_percent = 50 * (1 - CONFIDENCE_LEVEL)
        low, high = (
            np.percentile(resampled_B, [tail_percent, 100 - tail_percent]) - resampled_B.mean() + value
        )
        return cls(value=value, low=max(float(low), 0.0), high=min(float(high), 1.0))

    @classmethod
    def of_unanimous_clips(cls, value: float, clips: int) -> "MetricEstimate":
        """The accuracy of clips that are all right (`value` 1) or all wrong (0), with its exact binomial interval.

        Every resample of such clips has the same accuracy, and an interval of the resamples would be a point: 9 of 9
        would seem to be certain. The end on the other side is the accuracy at which all clips are as alike in 2.5 % of
        all sets (Clopper-Pearson): [0.664, 1] for 9 of 9.
        """
        tail = (1 - CONFIDENCE_LEVEL) / 2
        farthest = tail ** (1 / clips)
        return cls(value=value, low=value * farthest, high=1 - (1 - value) * farthest)


@dataclass(frozen=True, kw_only=True)
class ScoredFold:
    """The scores that a probe or classifier gives to the clips of one fold, or to all clips where there are no folds.

    labels_NC   1 where a clip has a class, else 0
    scores_NC   score of each class for each clip: the higher, the more likely the clip has the class
    weights_NB  weightings of the clips (`resample_weights_NB`)
    single      whether every clip has exactly one class
    """

    labels_NC: np.ndarray
    scores_NC: np.ndarray
    weights_NB: np.ndarray = field(repr=False)
    single: bool

    @cached_property
    def precision_and_area_CB(self) -> tuple[np.ndarray, np.ndarray]:
        """Average precision and area under the ROC curve of every class under every weighting, both `[C, B]`."""
        return precisions_and_areas_CB(self.labels_NC, self.scores_NC, self.weights_NB)

    def metric_values(self) -> dict[str, np.ndarray]:
        """Every metric under every weighting, `[B]`, by name.

        The mean over classes leaves out a class whose positives all have weight 0. If every clip has every class,
        no area is defined, and `auc` is missing.
        """
        precision_CB, area_CB = self.precision_and_area_CB
        values = {"map": class_mean_B(precision_CB)}
        if not np.isnan(area_CB[:, 0]).all():
            values["auc"] = class_mean_B(area_CB)
        if self.single:
            true_N = self.labels_NC.argmax(1)
            predicted_N = self.scores_NC.argmax(1)
            values["accuracy"] = accuracy_B(true_N, predicted_N, self.weights_NB)
            values["f1"] = macro_f1_B(true_N, predicted_N, self.weights_NB)
        return values


def estimate_metrics(folds: Sequence[ScoredFold]) -> dict[str, MetricEstimate]:
    """Estimate every metric as its mean over folds, resampling clips within each fold; d' is that of the mean area.

    Only where all clips are right, or all wrong, accuracy has an exact interval instead (`of_unanimous_clips`):
    resamples tell nothing there, and all that is known is the number of clips.
    """
    fold_values = metrics_of_all_folds(folds)
    means = {name: np.mean(values, axis=0) for name, values in fold_values.items()}
    estimates = {name: MetricEstimate.from_resamples(values_B) for name, values_B in means.items()}
    if "accuracy" in estimates and estimates["accuracy"].value in (0, 1):
        clips = sum(len(fold.labels_NC) for fold in folds)
        estimates["accuracy"] = MetricEstimate.of_unanimous_clips(estimates["accuracy"].value, clips)
    # d' grows with the area, so its interval follows from the interval of the area
    if "auc" in estimates:
        area = estimates["auc"]
        value, low, high = d_prime(np.array([area.value, area.low, area.high])).tolist()
        estimates["d_prime"] = MetricEstimate(value=value, low=low, high=high)
    return estimates


def metrics_of_all_folds(folds: Sequence[ScoredFold]) -> dict[str, list[np.ndarray]]:
    """The values `[B]` of every metric that all folds have, fold by fold."""
    fold_values = [fold.metric_values() for fold in folds]
    shared_names = [name for name in fold_values[0] if all(name in values for values in fold_values)]
    return {name: [values[name] for values in fold_values] for name in shared_names}


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanAveragePrecision:
    """The macro mean of average precision over the classes that have a positive clip.

    per_class_C   average precision in [0, 1], nan where a class has no positive clip
    chance        expected value of the mean for random scores, over the same classes
    """

    value: float
    chance: float
    per_class_C: np.ndarray


def mean_average_precision(labels_NC: np.ndarray, scores_NC: np.ndarray) -> MeanAveragePrecision:
    """mAP of `scores_NC` against 0/1 `labels_NC`: the mean of scikit-learn's average precision of every class.

    A class without positives has no average precision (nan), so the mean leaves it out. InputError if no class has a
    positive.
    """
    # Classes with a positive clip
    clips, classes = labels_NC.shape
    positives_C = (labels_NC > 0).sum(axis=0)
    scored = np.flatnonzero(positives_C)
    if not len(scored):
        raise InputError(f"none of {classes} classes has a positive among {clips} clips")

    # The only weighting counts every clip once
    per_class_C = precisions_and_areas_CB(labels_NC, scores_NC, np.ones((clips, 1)))[0][:, 0]
    return MeanAveragePrecision(
        value=float(per_class_C[scored].mean()),
        chance=float(random_precision_C(positives_C[scored], clips).mean()),
        per_class_C=per_class_C,
    )


def random_precision_C(positives_C: np.ndarray, clips: int) -> np.ndarray:
    """The exact expected average precision of `clips` clips in random order, for classes of `positives_C` positives.

    With R positives among N clips, the clip at rank k is positive with probability R/N; then (k - 1)(R - 1)/(N - 1)
    other positives are expected above it. The result is the sum over k. For rare classes it is well above their share
    of the clips: 0.026 for 5 positives of 400, not 0.0125.
    """
    harmonic = (1 / np.arange(1, clips + 1)).sum()
    others_C = (positives_C - 1) / max(clips - 1, 1)
    return (harmonic + others_C * (clips - harmonic)) / clips


def class_mean_B(value_CB: np.ndarray) -> np.ndarray:
    """Mean over the classes that have a value; nan if no class has one."""
    has_value_CB = ~np.isnan(value_CB)
    with np.errstate(invalid="ignore"):  # 0/0 is nan, as promised
        return np.where(has_value_CB, value_CB, 0).sum(axis=0) / has_value_CB.sum(axis=0)


def d_prime(area: np.ndarray) -> np.ndarray:
    """The distance between two normal distributions of variance 1 that have this area under the ROC curve.

    Papers on AudioSet apply it to the macro mean of the areas (AST, arXiv 2104.01778).
    """
    return np.sqrt(2) * ndtri(np.clip(area, 1 - LARGEST_AREA, LARGEST_AREA))


def accuracy_B(true_N: np.ndarray, predicted_N: np.ndarray, weights_NB: np.ndarray) -> np.ndarray:
    """Accuracy under every weighting: the weight of the correctly predicted clips over the weight of all clips."""
    return (true_N == predicted_N).astype(weights_NB.dtype) @ weights_NB / weights_NB.sum(axis=0)


def macro_f1_B(true_N: np.ndarray, predicted_N: np.ndarray, weights_NB: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that are true or predicted for a clip of non-zero weight, as in scikit-learn."""
    classes = int(max(true_N.max(), predicted_N.max())) + 1
    ones_N = np.ones(len(true_N), np.float32)
    clips_N = np.arange(len(true_N))

    def weight_per_class_CB(class_N: np.ndarray, clip_weights_NB: np.ndarray) -> np.ndarray:
        return csr_matrix((ones_N, (class_N, clips_N)), shape=(classes, len(class_N))) @ clip_weights_NB

    # F1 = 2 hits / (true + predicted). A class of count 0 gets 0/1, and the mean leaves it out
    right_N1 = (true_N == predicted_N)[:, None]
    counted_CB = weight_per_class_CB(true_N, weights_NB) + weight_per_class_CB(predicted_N, weights_NB)
    hits_CB = 2 * weight_per_class_CB(true_N, weights_NB * right_N1)
    f1_CB = hits_CB / np.maximum(counted_CB, 1)
    return f1_CB.sum(axis=0) / (counted_CB > 0).sum(axis=0)


def precisions_and_areas_CB(
    labels_NC: np.ndarray, scores_NC: np.ndarray, weights_NB: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Average precision and area under the ROC curve of every class under every weighting, both `[C, B]`.

    Both are nan where a class has no positive clip.
    """
    precision_CB = np.full((labels_NC.shape[1], weights_NB.shape[1]), np.nan, np.float64)
    area_CB = precision_CB.copy()
    # Class by class: each has its own order of the clips
    for index in np.flatnonzero((labels_NC > 0).any(axis=0)):
        ranking = ClassRanking.from_scores(labels_NC[:, index], scores_NC[:, index])
        precision_CB[index], area_CB[index] = ranking.precision_and_area(weights_NB)
    return precision_CB, area_CB


@dataclass(frozen=True, kw_only=True)
class ClassRanking:
    """The clips in the order of one class's scores. Clips of equal score form a tie; G ties contain a positive clip.

    Clips are sorted once; every weighting then needs only the weight above, in and below each of the G ties.

    order_N          clips from the highest score down to the end of the last of the G ties
    tie_bounds       positions in `order_N`: `[0, start, end, start, end, ...]` of the G ties, 2G + 1 values
    positives_R      the positive clips, tie after tie
    positive_ends_G  where the positives of each tie end in `positives_R`
    clip_count       number of clips
    """

    order_N: np.ndarray
    tie_bounds: np.ndarray
    positives_R: np.ndarray
    positive_ends_G: np.ndarray
    clip_count: int

    @classmethod
    def from_scores(cls, labels_N: np.ndarray, scores_N: np.ndarray) -> "ClassRanking":
        """Rank the clips by their scores. Clips with `labels_N` above 0 are positive; there must be at least one."""
        # Consecutive clips of equal score form one of T ties.
        order_N = np.argsort(-scores_N, kind="stable")
        sorted_N = scores_N[order_N]
        starts_T = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]]))
        ends_T = np.append(starts_T[1:], len(order_N))

        # Keep the G ties that contain a positive.
        places_R = np.flatnonzero(labels_N[order_N] > 0)
        tie_R = np.searchsorted(ends_T, places_R, side="right")
        ties_G, count_G = np.unique(tie_R, return_counts=True)
        tie_bounds = np.concatenate([[0], np.stack([starts_T[ties_G], ends_T[ties_G]], axis=1).ravel()])
        return cls(
            order_N=order_N[: tie_bounds[-1]],
            tie_bounds=tie_bounds,
            positives_R=order_N[places_R],
            positive_ends_G=np.cumsum(count_G),
            clip_count=len(order_N),
        )

    def precision_and_area(self, weights_NB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Average precision and area under the ROC curve, both `[B]`.

        Both are nan if no positive has weight; the area is also nan if no negative has weight.
        """
        # The weight of all clips above each tie, and up to the end of the tie; then the same for positives only.
        cumulated_2GB = np.cumsum(self._segment_matrix @ weights_NB, axis=0)
        above_GB, to_end_GB = cumulated_2GB[::2], cumulated_2GB[1::2]
        positive_GB = self._positive_matrix @ weights_NB
        positive_to_end_GB = np.cumsum(positive_GB, axis=0)
        positives_B = positive_to_end_GB[-1]
        negatives_B = weights_NB.sum(axis=0) - positives_B

        # Each positive adds the precision at its tie, and the negatives below it with half of those in its tie.
        precision_GB = positive_to_end_GB / np.maximum(to_end_GB, 1)  # a tie without weight counts 0 times
        below_GB = negatives_B - (to_end_GB - positive_to_end_GB) + (to_end_GB - above_GB - positive_GB) / 2
        with np.errstate(invalid="ignore"):  # 0/0 is nan, as promised
            precision_B = (positive_GB * precision_GB).sum(axis=0) / positives_B
            area_B = (positive_GB * below_GB).sum(axis=0) / (positives_B * negatives_B)
        return precision_B, area_B

    @cached_property
    def _segment_matrix(self) -> csr_matrix:
        """`[2G, clips]`, two rows per tie: one adds up the weight since the previous tie, one the weight in the tie."""
        return _segment_sum_matrix(self.order_N, self.tie_bounds, self.clip_count)

    @cached_property
    def _positive_matrix(self) -> csr_matrix:
        """`[G, clips]`: adds up the weight of the positives of each tie."""
        bounds = np.concatenate([[0], self.positive_ends_G])
        return _segment_sum_matrix(self.positives_R, bounds, self.clip_count)


def _segment_sum_matrix(clips_M: np.ndarray, bounds: np.ndarray, clip_count: int) -> csr_matrix:
    """A 0/1 matrix that adds up the weights of the clips between consecutive bounds."""
    shape = (len(bounds) - 1, clip_count)
    return csr_matrix((np.ones(len(clips_M), np.float32), clips_M, bounds), shape=shape)


def resample_count(clips: int, classes: int) -> int:
    """The number of resamples for an interval: 1,000, or as few as 200 where 1,000 would take minutes."""
    return int(np.clip(RESAMPLING_BUDGET // max(1, clips * classes), MIN_RESAMPLES, MAX_RESAMPLES))


def resample_weights_NB(clips: int, count: int, seed: int) -> np.ndarray:
    """How often each sample contains each clip, float32: once in the first, then `count` samples with replacement."""
    rng = np.random.default_rng([seed, 2])
    resamples = [np.bincount(rng.integers(clips, size=clips), minlength=clips) for _ in range(count)]
    return np.stack([np.ones(clips, np.int64), *resamples], axis=1).astype(np.float32)
