"""Metrics of scored clips: mean average precision, area under the ROC curve, d', accuracy, F1.

Each is also computed for many weightings of the clips at once, which is what intervals are made of
(`bootstrap.py`). All but d' lie in [0, 1], d' in [-8.5, 8.5].
"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.stats import norm

from ajepa.ranking import ranked_CB
from pipeline.errors import InputError

LARGEST_AREA = 1 - 1e-9  # what d' takes for a perfect one, which has none: 8.5


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
    """mAP of `scores_NC` against 0/1 `labels_NC`: the mean of scikit-learn's average precision of every class.

    A class without positives would be nan and take the mean with it: it is skipped and counted instead.
    InputError where no class has a positive: there is nothing to rank.
    """
    positives_C = (labels_NC > 0).sum(axis=0)
    counted = np.flatnonzero(positives_C)
    if not len(counted):
        raise InputError(f"none of {labels_NC.shape[1]} classes has a positive among {len(labels_NC)} clips")
    per_class_C = ranked_CB(labels_NC, scores_NC, np.ones((len(labels_NC), 1)))[0][:, 0]
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


def d_prime(area: np.ndarray) -> np.ndarray:
    """How far apart two normal distributions of variance 1 lie that would have this area under the ROC curve.

    Of the macro mean of the areas, as in the papers on AudioSet (AST, arXiv 2104.01778).
    """
    return np.sqrt(2) * norm.ppf(np.clip(area, 1 - LARGEST_AREA, LARGEST_AREA))


def accuracy_B(true_N: np.ndarray, said_N: np.ndarray, weights_NB: np.ndarray) -> np.ndarray:
    """Share of the weight on clips whose one class was said, for every weighting."""
    return (true_N == said_N).astype(weights_NB.dtype) @ weights_NB / weights_NB.sum(axis=0)


def macro_f1_B(true_N: np.ndarray, said_N: np.ndarray, weights_NB: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that have or were said of a clip of any weight (scikit-learn's, with weights)."""
    classes = int(max(true_N.max(), said_N.max())) + 1

    def per_class_CB(class_N: np.ndarray, weights_NB: np.ndarray) -> np.ndarray:
        ones_N, clips = np.ones(len(class_N), np.float32), np.arange(len(class_N))
        return csr_matrix((ones_N, (class_N, clips)), shape=(classes, len(class_N))) @ weights_NB

    right_N1 = (true_N == said_N)[:, None]
    counted_CB = per_class_CB(true_N, weights_NB) + per_class_CB(said_N, weights_NB)
    hits_CB = 2 * per_class_CB(true_N, weights_NB * right_N1)
    f1_CB = hits_CB / np.maximum(counted_CB, 1)
    return f1_CB.sum(axis=0) / (counted_CB > 0).sum(axis=0)
