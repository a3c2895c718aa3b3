"""Mean average precision: how well scores rank the clips that carry a label above those that do not."""

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import average_precision_score

from pipeline.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanAveragePrecision:
    """Macro mean over the classes that have a positive clip; the others have no precision and are counted.

    per_class_C   average precision in [0, 1], nan where a class was skipped
    chance        what random scores reach in expectation, over the same classes
    """

    value: float
    chance: float
    counted: int
    skipped: int
    per_class_C: np.ndarray


def mean_average_precision(labels_NC: np.ndarray, scores_NC: np.ndarray) -> MeanAveragePrecision:
    """mAP of `scores_NC` against 0/1 `labels_NC`; scikit-learn's average precision, class by class.

    A class without positives would be nan and take the mean with it: it is skipped and counted instead.
    InputError where no class has a positive: there is nothing to rank.
    """
    positives_C = labels_NC.sum(axis=0)
    counted = np.flatnonzero(positives_C > 0)
    if not len(counted):
        raise InputError(f"none of {labels_NC.shape[1]} classes has a positive among {len(labels_NC)} clips")
    per_class_C = np.full(labels_NC.shape[1], np.nan)
    for index in counted:
        per_class_C[index] = average_precision_score(labels_NC[:, index], scores_NC[:, index])
    return MeanAveragePrecision(
        value=float(per_class_C[counted].mean()),
        chance=float(random_precision_C(positives_C[counted], len(labels_NC)).mean()),
        counted=len(counted),
        skipped=labels_NC.shape[1] - len(counted),
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
