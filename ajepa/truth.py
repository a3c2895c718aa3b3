"""Truth: what is true of some clips under one label set, and what scores of them come to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ajepa.bootstrap import Measured, estimates, resampled_NB
from ajepa.evaluation import PRIMARY, KindName, Score
from ajepa.metrics import random_precision_C
from pipeline.errors import RunError

Kind = Literal["auto", "single", "multi"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Truth:
    """One label set of some clips, 0/1, and whether each of them has exactly one label."""

    label_set: str
    labels_NC: np.ndarray
    kind: KindName

    @classmethod
    def of(cls, label_set: str, labels_NC: np.ndarray, kind: Kind, place: str) -> "Truth":
        """With `auto` as the labels are; RunError, naming `place`, where they are told to be single and are not."""
        others = int((labels_NC.sum(axis=1) != 1).sum())
        if kind == "single" and others:
            told = f"{others} of {len(labels_NC)} clips have no {label_set} label or several"
            raise RunError(f"{place}: {told}, single labels were asked for; leave out --kind single")
        found: KindName = "multi" if others else "single"
        return cls(label_set=label_set, labels_NC=labels_NC, kind=found if kind == "auto" else kind)

    def measured(self, clips_N: np.ndarray, scores_NC: np.ndarray, count: int, seed: int) -> Measured:
        """Scores of some of the clips beside what is true of these, to be drawn again `count` times."""
        return Measured(
            labels_NC=self.labels_NC[clips_N],
            scores_NC=scores_NC,
            weights_NB=resampled_NB(len(clips_N), count, seed),
            single=self.kind == "single",
        )

    def score(
        self, features: str, probe: str, folds: Sequence[Measured], chosen: Sequence[float] = ()
    ) -> Score:
        """Every metric of what was measured, of folds their mean."""
        per_class_ap = mean_of_folds(np.stack([fold.ranked[0][:, 0] for fold in folds]))
        recalls_FC = np.stack([recall_C(fold.labels_NC, fold.scores_NC) for fold in folds])
        skipped = sum(value is None for value in per_class_ap)
        metrics = estimates(folds)
        return Score(
            features=features,
            probe=probe,
            label_set=self.label_set,
            kind=self.kind,
            metrics=metrics,
            chance=float(np.mean([chance(fold.labels_NC, self.kind) for fold in folds])),
            classes=len(per_class_ap) - skipped,
            skipped=skipped,
            chosen=tuple(chosen),
            by_fold=values_by_fold(folds) if len(folds) > 1 else {},
            per_class_ap=per_class_ap,
            per_class_recall=mean_of_folds(recalls_FC) if self.kind == "single" else (),
        )

    def value(self, scores_NC: np.ndarray) -> float:
        """The first metric of scores of all the clips, without its interval."""
        return float(
            self.measured(np.arange(len(scores_NC)), scores_NC, 0, 0).metrics()[PRIMARY[self.kind]][0]
        )


def chance(labels_NC: np.ndarray, kind: KindName) -> float:
    """What the first metric is without knowing a clip: mAP of a random order; accuracy of the commonest class."""
    positives_C = (labels_NC > 0).sum(axis=0)
    if PRIMARY[kind] == "accuracy":
        return float(positives_C.max() / len(labels_NC))
    return float(random_precision_C(positives_C[positives_C > 0], len(labels_NC)).mean())


def recall_C(labels_NC: np.ndarray, scores_NC: np.ndarray) -> np.ndarray:
    """The share of each class's clips whose highest score is that class's; nan where it has no clip."""
    said_NC = np.eye(scores_NC.shape[1])[scores_NC.argmax(axis=1)]
    with np.errstate(invalid="ignore"):  # 0/0 is nan, as promised
        return (labels_NC * said_NC).sum(axis=0) / labels_NC.sum(axis=0)


def values_by_fold(folds: Sequence[Measured]) -> dict[str, tuple[float, ...]]:
    """Every metric that all folds have, fold by fold."""
    of_folds = [fold.metrics() for fold in folds]
    names = [name for name in of_folds[0] if all(name in fold for fold in of_folds)]
    return {name: tuple(float(fold[name][0]) for fold in of_folds) for name in names}


def mean_of_folds(value_FC: np.ndarray) -> tuple[float | None, ...]:
    """The mean of every column's values, of 6 decimals; None where a column has none."""
    there_FC = ~np.isnan(value_FC)
    sums_C, counts_C = np.where(there_FC, value_FC, 0).sum(0), there_FC.sum(0)
    pairs = zip(sums_C.tolist(), counts_C.tolist(), strict=True)
    return tuple(round(total / count, 6) if count else None for total, count in pairs)
