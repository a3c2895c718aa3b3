"""Evaluation: what was found of a run, with the protocol that produced it, as JSON, as a table, class by class.

Truth: what is true of some clips under one label set, and what scores of them come to.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ajepa.evaluate.metrics import (
    MetricEstimate,
    ScoredFold,
    estimate_metrics,
    random_precision_C,
    resample_weights_NB,
)
from pipeline.errors import RunError
from pipeline.files import replacing_file

EVALUATION_FILE = "evaluation.json"

EVALUATION_FORMAT = 3

LabelKind = Literal["single", "multi"]

PRIMARY_METRIC: dict[LabelKind, str] = {"multi": "map", "single": "accuracy"}

OTHER_METRICS: dict[LabelKind, tuple[str, str]] = {"multi": ("auc", "d_prime"), "single": ("f1", "map")}

METRIC_TITLES = {"map": "mAP", "accuracy": "accuracy", "auc": "AUC", "d_prime": "d'", "f1": "macro F1"}

PROBE_TITLES = {"linear": "linear", "knn": "kNN", "attentive": "attentive"}

CLASSIFIER_FEATURES, HEAD_PROBE = (
    "classifier",
    "head",
)  # features and probe of what is measured as it was trained

METHOD_TITLES = PROBE_TITLES | {HEAD_PROBE: "own head"}

LABEL_SETS_PER_BLOCK = 2  # label sets side by side in 80 columns


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A probe on one kind of features, or a classifier as it was trained, measured on one label set.

    metrics           of `single` labels (every clip has exactly one) accuracy and f1, of all map, auc and d_prime
    chance            of the first metric: mAP of a random order, accuracy of always saying the commonest class
    skipped           classes that no measured clip has; `classes` are the others
    chosen            what was chosen for a probe, once for each fold: its penalty, or its number of steps
    by_fold           each metric's value on every fold (d' apart); empty where there are none
    per_class_ap      average precision, mean over the folds that have the class; None where it is skipped
    per_class_recall  so for the share of a class's clips that is found, of single labels; else empty
    """

    features: str
    probe: str
    label_set: str
    kind: LabelKind
    metrics: dict[str, MetricEstimate]
    chance: float
    classes: int
    skipped: int
    chosen: tuple[float, ...]
    by_fold: dict[str, tuple[float, ...]]
    per_class_ap: tuple[float | None, ...]
    per_class_recall: tuple[float | None, ...]

    @property
    def map_value(self) -> float:
        """Macro mean average precision."""
        return self.metrics["map"].value

    @property
    def primary_estimate(self) -> MetricEstimate:
        """The metric to compare by: accuracy of single labels, else mAP."""
        return self.metrics[PRIMARY_METRIC[self.kind]]

    @property
    def fold_deviation(self) -> float | None:
        """Sample deviation of that metric over folds; None where there are none."""
        values = self.by_fold.get(PRIMARY_METRIC[self.kind], ())
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Score":
        lists = {name: tuple(record[name]) for name in ("chosen", "per_class_ap", "per_class_recall")}
        metrics = {name: MetricEstimate(**estimate) for name, estimate in record["metrics"].items()}
        by_fold = {name: tuple(values) for name, values in record["by_fold"].items()}
        return cls(**(record | lists | {"metrics": metrics, "by_fold": by_fold}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Every score, with the protocol that produced it; `classes` are the ids and names that precisions are of."""

    protocol: dict[str, Any]
    classes: tuple[tuple[str, str], ...]
    scores: tuple[Score, ...]

    def find_score(self, features: str, probe: str, label_set: str) -> Score:
        """The one score of that name."""
        wanted = (features, probe, label_set)
        return next(s for s in self.scores if (s.features, s.probe, s.label_set) == wanted)

    @property
    def label_sets(self) -> list[str]:
        return list(dict.fromkeys(score.label_set for score in self.scores))

    def save_json(self, file: Path) -> None:
        """Write whole or not at all."""
        told = {"format": EVALUATION_FORMAT, **asdict(self)}
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(file) as scratch:
            scratch.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n")

    @classmethod
    def read_json(cls, file: Path) -> "Evaluation":
        """What `save` wrote; RunError where it is something else, or of another version."""
        try:
            told = json.loads(file.read_text())
        except json.JSONDecodeError:
            raise RunError(f"{file}: is not JSON; give what evaluate or finetune wrote") from None
        if not isinstance(told, dict) or not {"protocol", "scores"} <= set(told):
            raise RunError(f"{file}: holds no scores; give what evaluate or finetune wrote")
        if told.get("format") != EVALUATION_FORMAT:
            raise RunError(
                f"{file}: evaluation format {told.get('format', 1)}, this version reads {EVALUATION_FORMAT}; "
                "delete it and run ajepa-train evaluate again"
            )
        classes = tuple((mid, name) for mid, name in told["classes"])
        scores = tuple(Score.from_json(score) for score in told["scores"])
        return cls(protocol=told["protocol"], classes=classes, scores=scores)

    def describe_protocol(self) -> Iterator[str]:
        """What was measured on what, in sentences."""
        told, named = self.protocol, self.protocol["classifier"]
        folds = f", mean over {told['folds']} folds" if told["folds"] else ""
        yield f"{told['eval_clips']} eval clips of {told['store']}{folds}; run at step {told['step']}"
        if named is not None:
            clips = "clips" if named["train_clips"] is None else f"{named['train_clips']} clips"
            yield f"classifier of task {named['task']}, trained on {clips} by {named['label_set']} labels"
            if len(self.classes) < named["classes"]:
                yield f"measured on {len(self.classes)} of its {named['classes']} classes: those of this store"
        if (probes := told["probes"]) is not None:
            tuned = "" if told["task"] is None else f" (encoder fine-tuned on task {told['task']})"
            yield f"probes trained on {probes['train_clips']} clips{tuned}"
            yield f"pooling {probes['pooling']}, layer {probes['layer']}"
        yield f"[95 % of {told['resamples']} resamples of the clips]"

    def format_table(self) -> str:
        """Metrics by features and probe, label sets side by side, in lines of at most 80 columns."""
        lines = list(self.describe_protocol())
        for kind in PRIMARY_METRIC:
            sets = [name for name in self.label_sets if self._first_score(name).kind == kind]
            for start in range(0, len(sets), LABEL_SETS_PER_BLOCK):
                lines += self.format_block(kind, sets[start : start + LABEL_SETS_PER_BLOCK])
        return "\n".join(lines)

    def format_block(self, kind: LabelKind, label_sets: Sequence[str]) -> list[str]:
        """The table of some label sets of one kind: its first metric with intervals, its spread, two others."""
        first, (second, third) = PRIMARY_METRIC[kind], OTHER_METRICS[kind]
        folds = self.protocol["folds"]
        return [
            f"  {'':31}" + "".join(f"  {_shorten_name(name, 20):20}" for name in label_sets).rstrip(),
            f"  {'':31}" + "".join(f"  {self._class_count_text(name):20}" for name in label_sets).rstrip(),
            METRIC_TITLES[first],
            *self._probe_lines(label_sets, lambda score: format_interval(score.metrics[first])),
            f"  {'chance':31}"
            + "".join(f"  {self._first_score(name).chance:5.3f}{'':15}" for name in label_sets).rstrip(),
            *([f"deviation over {folds} folds"] if folds else []),
            *(self._probe_lines(label_sets, lambda score: f"{score.fold_deviation:5.3f}") if folds else []),
            f"{METRIC_TITLES[second]} / {METRIC_TITLES[third]}",
            *self._probe_lines(label_sets, lambda score: format_metric_pair(score, second, third)),
        ]

    def _probe_lines(self, label_sets: Sequence[str], format_cell: Callable[[Score], str]) -> Iterator[str]:
        """A line for each probe on each kind of features."""
        for features, probe in self._measured_probes():
            cells = "".join(
                f"  {format_cell(self.find_score(features, probe, name)):20}" for name in label_sets
            )
            yield f"  {features:20} {METHOD_TITLES[probe]:10}{cells}".rstrip()

    def _measured_probes(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((score.features, score.probe) for score in self.scores))

    def _class_count_text(self, label_set: str) -> str:
        one = self._first_score(label_set)
        return f"{one.classes} classes" + (f", {one.skipped} not" if one.skipped else "")

    def _first_score(self, label_set: str) -> Score:
        return next(score for score in self.scores if score.label_set == label_set)

    def write_class_table(self, file: Path) -> None:
        """Every class as CSV: a line for each label set and class, a column for each probe's average precision.

        And one for its recall, where a label set is of single labels.
        """
        rows = self._measured_probes()
        recalls = rows if any(score.per_class_recall for score in self.scores) else []
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(file) as scratch, scratch.open("w", newline="") as handle:
            out = csv.writer(handle)
            names = [f"{name} {probe}" for name, probe in rows]
            out.writerow(
                [
                    "label_set",
                    "class",
                    "name",
                    *names,
                    *(f"recall, {name} {probe}" for name, probe in recalls),
                ]
            )
            for label_set in self.label_sets:
                scores = [self.find_score(name, probe, label_set) for name, probe in rows]
                empty = (None,) * len(self.classes)
                columns = [score.per_class_ap for score in scores]
                columns += [score.per_class_recall or empty for score in scores] if recalls else []
                for (mid, name), values in zip(self.classes, zip(*columns, strict=True), strict=True):
                    out.writerow([label_set, mid, name, *("" if v is None else f"{v:.6f}" for v in values)])


def format_interval(estimate: MetricEstimate) -> str:
    """`0.601 [0.580 0.622]`"""
    return f"{estimate.value:5.3f} [{estimate.low:5.3f} {estimate.high:5.3f}]"


def format_metric_pair(score: Score, second: str, third: str) -> str:
    """`0.912 / 1.910`; a metric that there is not is a dash."""
    told = (score.metrics.get(name) for name in (second, third))
    return " / ".join("-" if estimate is None else f"{estimate.value:5.3f}" for estimate in told)


def _shorten_name(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 3] + "..."


LabelKindOption = Literal["auto", "single", "multi"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrueLabels:
    """One label set of some clips, 0/1, and whether each of them has exactly one label."""

    label_set: str
    labels_NC: np.ndarray
    kind: LabelKind

    @classmethod
    def from_labels(
        cls, label_set: str, labels_NC: np.ndarray, kind: LabelKindOption, store_location: str
    ) -> "TrueLabels":
        """With `auto` as the labels are; RunError, naming `place`, where they are told to be single and are not."""
        others = int((labels_NC.sum(axis=1) != 1).sum())
        if kind == "single" and others:
            told = f"{others} of {len(labels_NC)} clips have no {label_set} label or several"
            raise RunError(f"{store_location}: {told}, single labels were asked for; leave out --kind single")
        found: LabelKind = "multi" if others else "single"
        return cls(label_set=label_set, labels_NC=labels_NC, kind=found if kind == "auto" else kind)

    def scored_fold(self, clips_N: np.ndarray, scores_NC: np.ndarray, count: int, seed: int) -> ScoredFold:
        """Scores of some of the clips beside what is true of these, to be drawn again `count` times."""
        return ScoredFold(
            labels_NC=self.labels_NC[clips_N],
            scores_NC=scores_NC,
            weights_NB=resample_weights_NB(len(clips_N), count, seed),
            single=self.kind == "single",
        )

    def summarise_folds(
        self, features: str, probe: str, folds: Sequence[ScoredFold], chosen_settings: Sequence[float] = ()
    ) -> Score:
        """Every metric of what was measured, of folds their mean."""
        per_class_ap = mean_over_folds(np.stack([fold.precision_and_area_CB[0][:, 0] for fold in folds]))
        recalls_FC = np.stack([class_recall_C(fold.labels_NC, fold.scores_NC) for fold in folds])
        skipped = sum(value is None for value in per_class_ap)
        metrics = estimate_metrics(folds)
        return Score(
            features=features,
            probe=probe,
            label_set=self.label_set,
            kind=self.kind,
            metrics=metrics,
            chance=float(np.mean([chance_level(fold.labels_NC, self.kind) for fold in folds])),
            classes=len(per_class_ap) - skipped,
            skipped=skipped,
            chosen=tuple(chosen_settings),
            by_fold=metrics_by_fold(folds) if len(folds) > 1 else {},
            per_class_ap=per_class_ap,
            per_class_recall=mean_over_folds(recalls_FC) if self.kind == "single" else (),
        )

    def primary_value(self, scores_NC: np.ndarray) -> float:
        """The first metric of scores of all the clips, without its interval."""
        return float(
            self.scored_fold(np.arange(len(scores_NC)), scores_NC, 0, 0).metric_values()[
                PRIMARY_METRIC[self.kind]
            ][0]
        )


def chance_level(labels_NC: np.ndarray, kind: LabelKind) -> float:
    """What the first metric is without knowing a clip: mAP of a random order; accuracy of the commonest class."""
    positives_C = (labels_NC > 0).sum(axis=0)
    if PRIMARY_METRIC[kind] == "accuracy":
        return float(positives_C.max() / len(labels_NC))
    return float(random_precision_C(positives_C[positives_C > 0], len(labels_NC)).mean())


def class_recall_C(labels_NC: np.ndarray, scores_NC: np.ndarray) -> np.ndarray:
    """The share of each class's clips whose highest score is that class's; nan where it has no clip."""
    said_NC = np.eye(scores_NC.shape[1])[scores_NC.argmax(axis=1)]
    with np.errstate(invalid="ignore"):  # 0/0 is nan, as promised
        return (labels_NC * said_NC).sum(axis=0) / labels_NC.sum(axis=0)


def metrics_by_fold(folds: Sequence[ScoredFold]) -> dict[str, tuple[float, ...]]:
    """Every metric that all folds have, fold by fold."""
    of_folds = [fold.metric_values() for fold in folds]
    names = [name for name in of_folds[0] if all(name in fold for fold in of_folds)]
    return {name: tuple(float(fold[name][0]) for fold in of_folds) for name in names}


def mean_over_folds(value_FC: np.ndarray) -> tuple[float | None, ...]:
    """The mean of every column's values, of 6 decimals; None where a column has none."""
    there_FC = ~np.isnan(value_FC)
    sums_C, counts_C = np.where(there_FC, value_FC, 0).sum(0), there_FC.sum(0)
    pairs = zip(sums_C.tolist(), counts_C.tolist(), strict=True)
    return tuple(round(total / count, 6) if count else None for total, count in pairs)
