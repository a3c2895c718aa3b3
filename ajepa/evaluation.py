"""Evaluation: what probes found, with the protocol that produced it, as JSON, as a table, class by class."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ajepa.bootstrap import Estimate
from pipeline.errors import RunError
from pipeline.files import replacing

EVALUATION = "evaluation.json"
FORMAT = 2
KindName = Literal["single", "multi"]
PRIMARY: dict[KindName, str] = {"multi": "map", "single": "accuracy"}
OTHERS: dict[KindName, tuple[str, str]] = {"multi": ("auc", "d_prime"), "single": ("f1", "map")}
TITLES = {"map": "mAP", "accuracy": "accuracy", "auc": "AUC", "d_prime": "d'", "f1": "macro F1"}
PROBES = {"linear": "linear", "knn": "kNN", "attentive": "attentive"}
SETS_PER_BLOCK = 2  # label sets side by side in 80 columns


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One probe on one kind of features, trained and measured on one label set.

    metrics         of `single` labels (every clip has exactly one) accuracy and f1, of all map, auc and d_prime
    chance          of the first metric: mAP of a random order, accuracy of always saying the commonest class
    skipped         classes that no measured clip has; `classes` are the others
    chosen          what was chosen for the probe, once for each fold: its penalty, or its number of steps
    per_class_ap    average precision, mean over the folds that have the class; None where it is skipped
    """

    features: str
    probe: str
    label_set: str
    kind: KindName
    metrics: dict[str, Estimate]
    chance: float
    classes: int
    skipped: int
    chosen: tuple[float, ...]
    per_class_ap: tuple[float | None, ...]

    @property
    def map(self) -> float:
        """Macro mean average precision."""
        return self.metrics["map"].value

    @property
    def primary(self) -> Estimate:
        """The metric to compare by: accuracy of single labels, else mAP."""
        return self.metrics[PRIMARY[self.kind]]

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "Score":
        lists = {name: tuple(told[name]) for name in ("chosen", "per_class_ap")}
        metrics = {name: Estimate(**estimate) for name, estimate in told["metrics"].items()}
        return cls(**(told | lists | {"metrics": metrics}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Every score, with the protocol that produced it; `classes` are the ids and names that precisions are of."""

    protocol: dict[str, Any]
    classes: tuple[tuple[str, str], ...]
    scores: tuple[Score, ...]

    def of(self, features: str, probe: str, label_set: str) -> Score:
        """The one score of that name."""
        wanted = (features, probe, label_set)
        return next(s for s in self.scores if (s.features, s.probe, s.label_set) == wanted)

    @property
    def label_sets(self) -> list[str]:
        return list(dict.fromkeys(score.label_set for score in self.scores))

    def save(self, file: Path) -> None:
        """Write whole or not at all."""
        told = {"format": FORMAT, **asdict(self)}
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as scratch:
            scratch.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, file: Path) -> "Evaluation":
        """What `save` wrote; RunError where it is of another version."""
        told = json.loads(file.read_text())
        if told.get("format") != FORMAT:
            raise RunError(
                f"{file}: evaluation format {told.get('format', 1)}, this version reads {FORMAT}; "
                "run ajepa-train evaluate again"
            )
        classes = tuple((mid, name) for mid, name in told["classes"])
        scores = tuple(Score.from_json(score) for score in told["scores"])
        return cls(protocol=told["protocol"], classes=classes, scores=scores)

    def table(self) -> str:
        """Metrics by features and probe, label sets side by side, in lines of at most 80 columns."""
        told = self.protocol
        folds = f", mean over {told['folds']} folds" if told["folds"] else ""
        lines = [
            f"{told['eval_clips']} eval clips{folds}, probes trained on {told['train_clips']}; "
            f"run at step {told['step']}",
            f"pooling {told['pooling']}, layer {told['layer']}; [95 % of {told['resamples']} resamples of the clips]",
        ]
        for kind in PRIMARY:
            sets = [name for name in self.label_sets if self._one(name).kind == kind]
            for start in range(0, len(sets), SETS_PER_BLOCK):
                lines += self.block(kind, sets[start : start + SETS_PER_BLOCK])
        return "\n".join(lines)

    def block(self, kind: KindName, sets: Sequence[str]) -> list[str]:
        """The table of some label sets of one kind: its first metric with intervals, then two others."""
        first, (second, third) = PRIMARY[kind], OTHERS[kind]
        rows = list(dict.fromkeys((score.features, score.probe) for score in self.scores))
        head = f"  {'':31}" + "".join(f"  {_cut(name, 20):20}" for name in sets)
        names = f"  {'':31}" + "".join(f"  {self._classes(name):20}" for name in sets)
        return [
            head,
            names,
            TITLES[first],
            *(self._line(row, sets, lambda score: interval(score.metrics[first])) for row in rows),
            f"  {'chance':31}" + "".join(f"  {self._one(name).chance:5.3f}{'':15}" for name in sets),
            f"{TITLES[second]} / {TITLES[third]}",
            *(self._line(row, sets, lambda score: pair(score, second, third)) for row in rows),
        ]

    def _line(self, row: tuple[str, str], sets: Sequence[str], cell: Any) -> str:
        features, probe = row
        cells = "".join(f"  {cell(self.of(features, probe, name)):20}" for name in sets)
        return f"  {features:20} {PROBES[probe]:10}{cells}".rstrip()

    def _classes(self, label_set: str) -> str:
        one = self._one(label_set)
        return f"{one.classes} classes" + (f", {one.skipped} not" if one.skipped else "")

    def _one(self, label_set: str) -> Score:
        return next(score for score in self.scores if score.label_set == label_set)

    def write_classes(self, file: Path) -> None:
        """Average precision of every class as CSV: a line for each label set and class, a column for each probe."""
        rows = list(dict.fromkeys((score.features, score.probe) for score in self.scores))
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as scratch, scratch.open("w", newline="") as handle:
            out = csv.writer(handle)
            out.writerow(["label_set", "class", "name", *(f"{name} {probe}" for name, probe in rows)])
            for label_set in self.label_sets:
                scores = [self.of(name, probe, label_set) for name, probe in rows]
                for index, (mid, name) in enumerate(self.classes):
                    values = [score.per_class_ap[index] for score in scores]
                    out.writerow([label_set, mid, name, *("" if v is None else f"{v:.6f}" for v in values)])


def interval(estimate: Estimate) -> str:
    """`0.601 [0.580 0.622]`"""
    return f"{estimate.value:5.3f} [{estimate.low:5.3f} {estimate.high:5.3f}]"


def pair(score: Score, second: str, third: str) -> str:
    """`0.912 / 1.910`; a metric that there is not is a dash."""
    told = (score.metrics.get(name) for name in (second, third))
    return " / ".join("-" if estimate is None else f"{estimate.value:5.3f}" for estimate in told)


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 3] + "..."


def mean_of_folds(value_FC: np.ndarray) -> tuple[float | None, ...]:
    """The mean of every column's values, of 6 decimals; None where a column has none."""
    there_FC = ~np.isnan(value_FC)
    sums_C, counts_C = np.where(there_FC, value_FC, 0).sum(0), there_FC.sum(0)
    pairs = zip(sums_C.tolist(), counts_C.tolist(), strict=True)
    return tuple(round(total / count, 6) if count else None for total, count in pairs)
