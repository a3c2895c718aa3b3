"""TrueLabels: the labels of some clips in one label set, and the scoring of predictions against them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ajepa.evaluate.metrics import (
    ScoredFold,
    estimate_metrics,
    metrics_of_all_folds,
    random_precision_C,
    resample_weights_NB,
)
from ajepa.evaluate.result import PRIMARY_METRIC, LabelKind, Score
from pipeline.errors import RunError

LabelKindOption = Literal["auto", "single", "multi"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrueLabels:
    """The labels of N clips in one label set.

    labels_NC  1 where a clip has a class, else 0
    kind       single: predictions are measured as one class per clip; multi: as any number of classes
    """

    label_set: str
    labels_NC: np.ndarray
    kind: LabelKind

    @classmethod
    def from_labels(
        cls, label_set: str, labels_NC: np.ndarray, kind: LabelKindOption, store_location: str
    ) -> "TrueLabels":
        """These labels as `kind`; `auto` is single if every clip has exactly one label, else multi.

        RunError, which names the store, if `kind` is single and a clip has no label or several.
        """
        other_clips = int((labels_NC.sum(axis=1) != 1).sum())
        if kind == "single" and other_clips:
            raise RunError(
                f"{store_location}: {other_clips} of {len(labels_NC)} clips have no {label_set} label or several, "
                "but single labels were requested; leave out --kind single"
            )
        if kind == "auto":
            kind = "multi" if other_clips else "single"
        return cls(label_set=label_set, labels_NC=labels_NC, kind=kind)

    @property
    def digest(self) -> str:
        """16 hex digits of the clips' labels: another label set, or the same after another propagation, has others."""
        return hashlib.sha256(np.ascontiguousarray(self.labels_NC > 0).tobytes()).hexdigest()[:16]

    def scored_fold(
        self, clips_M: np.ndarray, scores_MC: np.ndarray, resamples: int, seed: int
    ) -> ScoredFold:
        """The scores of M of the clips, with their labels and the weights of `resamples` resamples."""
        return ScoredFold(
            labels_NC=self.labels_NC[clips_M],
            scores_NC=scores_MC,
            weights_NB=resample_weights_NB(len(clips_M), resamples, seed),
            single=self.kind == "single",
        )

    def summarise_folds(
        self, features: str, probe: str, folds: Sequence[ScoredFold], chosen_settings: Sequence[float] = ()
    ) -> Score:
        """The score of this probe on these features: every metric, as the mean over folds."""
        # Class by class
        per_class_ap = mean_over_folds(np.stack([fold.precision_and_area_CB[0][:, 0] for fold in folds]))
        recalls_FC = np.stack([class_recall_C(fold.labels_NC, fold.scores_NC) for fold in folds])
        skipped = sum(value is None for value in per_class_ap)

        # Over all classes
        chances = [chance_level(fold.labels_NC, self.kind) for fold in folds]
        return Score(
            features=features,
            probe=probe,
            label_set=self.label_set,
            kind=self.kind,
            metrics=estimate_metrics(folds),
            chance=float(np.mean(chances)),
            classes=len(per_class_ap) - skipped,
            skipped=skipped,
            chosen=tuple(chosen_settings),
            by_fold=metrics_by_fold(folds) if len(folds) > 1 else {},
            per_class_ap=per_class_ap,
            per_class_recall=mean_over_folds(recalls_FC) if self.kind == "single" else (),
        )

    def primary_value(self, scores_NC: np.ndarray) -> float:
        """The primary metric of scores for all clips, without an interval."""
        fold = self.scored_fold(np.arange(len(scores_NC)), scores_NC, resamples=0, seed=0)
        return float(fold.metric_values()[PRIMARY_METRIC[self.kind]][0])


def chance_level(labels_NC: np.ndarray, kind: LabelKind) -> float:
    """The chance level of the primary metric: mAP of a random order, or accuracy of the commonest class."""
    positives_C = (labels_NC > 0).sum(axis=0)
    if PRIMARY_METRIC[kind] == "accuracy":
        return float(positives_C.max() / len(labels_NC))
    return float(random_precision_C(positives_C[positives_C > 0], len(labels_NC)).mean())


def class_recall_C(labels_NC: np.ndarray, scores_NC: np.ndarray) -> np.ndarray:
    """The recall of each class: the share of its clips for which it has the highest score; nan if it has no clip."""
    predicted_NC = np.eye(scores_NC.shape[1])[scores_NC.argmax(axis=1)]
    with np.errstate(invalid="ignore"):  # 0/0 is nan, as promised
        return (labels_NC * predicted_NC).sum(axis=0) / labels_NC.sum(axis=0)


def metrics_by_fold(folds: Sequence[ScoredFold]) -> dict[str, tuple[float, ...]]:
    """Every metric that all folds have, one value per fold, computed on the clips without resampling."""
    fold_values = metrics_of_all_folds(folds)
    return {name: tuple(float(values_B[0]) for values_B in values) for name, values in fold_values.items()}


def mean_over_folds(value_FC: np.ndarray) -> tuple[float | None, ...]:
    """The mean of every column without its nan values, to 6 decimals; None if all values are nan."""
    has_value_FC = ~np.isnan(value_FC)
    total_C = np.where(has_value_FC, value_FC, 0).sum(0)
    count_C = has_value_FC.sum(0)
    pairs = zip(total_C.tolist(), count_C.tolist(), strict=True)
    return tuple(round(total / count, 6) if count else None for total, count in pairs)
