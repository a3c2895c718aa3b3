"""Bootstrap: how much a metric would move with other clips of the same kind to measure on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ajepa.metrics import accuracy_B, d_prime, macro_f1_B
from ajepa.ranking import ranked_CB

CONFIDENCE = 0.95
MOST_RESAMPLES, LEAST_RESAMPLES = 1_000, 200
BUDGET = 2_000_000_000  # resamples x clips x classes; 20,000 clips of 527 classes are drawn 200 times


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A metric and its interval of `CONFIDENCE`: where its mean over many such sets of clips may lie."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values_B: np.ndarray) -> "Estimate":
        """Of a metric in [0, 1]: first its value of the clips themselves, then those of resamples.

        Percentiles of the resamples, moved so that their mean is the value: a positive that is drawn twice is
        found together with itself, so average precision rises with every resampling. On AudioSet's 527 classes
        the percentiles as they are lie above the very value that they are of.
        """
        tail = 50 * (1 - CONFIDENCE)
        value, drawn_B = float(values_B[0]), values_B[1:][~np.isnan(values_B[1:])]
        low, high = np.percentile(drawn_B, [tail, 100 - tail]) - drawn_B.mean() + value
        return cls(value=value, low=max(float(low), 0.0), high=min(float(high), 1.0))


def resamples(clips: int, classes: int) -> int:
    """How often so many clips are drawn again: 1,000 times, down to 200 where that would take minutes."""
    return int(np.clip(BUDGET // max(1, clips * classes), LEAST_RESAMPLES, MOST_RESAMPLES))


def resampled_NB(clips: int, count: int, seed: int) -> np.ndarray:
    """How often each clip lies in each sample, float32: first once in all, then `count` drawn with replacement."""
    rng = np.random.default_rng([seed, 2])
    drawn = [np.bincount(rng.integers(clips, size=clips), minlength=clips) for _ in range(count)]
    return np.stack([np.ones(clips, np.int64), *drawn], axis=1).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Measured:
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
    def ranked(self) -> tuple[np.ndarray, np.ndarray]:
        """Average precision and area, `[C, B]`."""
        return ranked_CB(self.labels_NC, self.scores_NC, self.weights_NB)

    def metrics(self) -> dict[str, np.ndarray]:
        """Every metric under every weighting; a class without a positive of any weight is left out of its mean.

        There is no area where every clip has every class.
        """
        precision_CB, area_CB = self.ranked
        told = {"map": mean_B(precision_CB)}
        if not np.isnan(area_CB[:, 0]).all():
            told["auc"] = mean_B(area_CB)
        if self.single:
            true_N, said_N = self.labels_NC.argmax(1), self.scores_NC.argmax(1)
            told["accuracy"] = accuracy_B(true_N, said_N, self.weights_NB)
            told["f1"] = macro_f1_B(true_N, said_N, self.weights_NB)
        return told


def mean_B(value_CB: np.ndarray) -> np.ndarray:
    """Mean over the classes that have a value; nan where none has."""
    there_CB = ~np.isnan(value_CB)
    with np.errstate(invalid="ignore"):  # 0/0 is nan, as promised
        return np.where(there_CB, value_CB, 0).sum(axis=0) / there_CB.sum(axis=0)


def estimates(folds: Sequence[Measured]) -> dict[str, Estimate]:
    """Every metric: the mean over folds, clips drawn again within each; d' of the mean area."""
    of_folds = [fold.metrics() for fold in folds]
    names = [name for name in of_folds[0] if all(name in fold for fold in of_folds)]
    means = {name: np.mean([fold[name] for fold in of_folds], axis=0) for name in names}
    told = {name: Estimate.of(values_B) for name, values_B in means.items()}
    if "auc" in told:
        area = told["auc"]
        value, low, high = d_prime(np.array([area.value, area.low, area.high])).tolist()
        told["d_prime"] = Estimate(value=value, low=low, high=high)
    return told
