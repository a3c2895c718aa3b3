"""Evaluation: what was found of a run, with the protocol that produced it, as JSON, as a table, class by class."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ajepa.bootstrap import Estimate
from pipeline.errors import RunError
from pipeline.files import replacing

EVALUATION = "evaluation.json"
FORMAT = 3
KindName = Literal["single", "multi"]
PRIMARY: dict[KindName, str] = {"multi": "map", "single": "accuracy"}
OTHERS: dict[KindName, tuple[str, str]] = {"multi": ("auc", "d_prime"), "single": ("f1", "map")}
TITLES = {"map": "mAP", "accuracy": "accuracy", "auc": "AUC", "d_prime": "d'", "f1": "macro F1"}
PROBES = {"linear": "linear", "knn": "kNN", "attentive": "attentive"}
CLASSIFIER, HEAD = "classifier", "head"  # features and probe of what is measured as it was trained
METHODS = PROBES | {HEAD: "own head"}
SETS_PER_BLOCK = 2  # label sets side by side in 80 columns


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
    kind: KindName
    metrics: dict[str, Estimate]
    chance: float
    classes: int
    skipped: int
    chosen: tuple[float, ...]
    by_fold: dict[str, tuple[float, ...]]
    per_class_ap: tuple[float | None, ...]
    per_class_recall: tuple[float | None, ...]

    @property
    def map(self) -> float:
        """Macro mean average precision."""
        return self.metrics["map"].value

    @property
    def primary(self) -> Estimate:
        """The metric to compare by: accuracy of single labels, else mAP."""
        return self.metrics[PRIMARY[self.kind]]

    @property
    def spread(self) -> float | None:
        """Sample deviation of that metric over folds; None where there are none."""
        values = self.by_fold.get(PRIMARY[self.kind], ())
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "Score":
        lists = {name: tuple(told[name]) for name in ("chosen", "per_class_ap", "per_class_recall")}
        metrics = {name: Estimate(**estimate) for name, estimate in told["metrics"].items()}
        by_fold = {name: tuple(values) for name, values in told["by_fold"].items()}
        return cls(**(told | lists | {"metrics": metrics, "by_fold": by_fold}))


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
        """What `save` wrote; RunError where it is something else, or of another version."""
        try:
            told = json.loads(file.read_text())
        except json.JSONDecodeError:
            raise RunError(f"{file}: is not JSON; give what evaluate or finetune wrote") from None
        if not isinstance(told, dict) or not {"protocol", "scores"} <= set(told):
            raise RunError(f"{file}: holds no scores; give what evaluate or finetune wrote")
        if told.get("format") != FORMAT:
            raise RunError(
                f"{file}: evaluation format {told.get('format', 1)}, this version reads {FORMAT}; "
                "delete it and run ajepa-train evaluate again"
            )
        classes = tuple((mid, name) for mid, name in told["classes"])
        scores = tuple(Score.from_json(score) for score in told["scores"])
        return cls(protocol=told["protocol"], classes=classes, scores=scores)

    def notes(self) -> Iterator[str]:
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

    def table(self) -> str:
        """Metrics by features and probe, label sets side by side, in lines of at most 80 columns."""
        lines = list(self.notes())
        for kind in PRIMARY:
            sets = [name for name in self.label_sets if self._one(name).kind == kind]
            for start in range(0, len(sets), SETS_PER_BLOCK):
                lines += self.block(kind, sets[start : start + SETS_PER_BLOCK])
        return "\n".join(lines)

    def block(self, kind: KindName, sets: Sequence[str]) -> list[str]:
        """The table of some label sets of one kind: its first metric with intervals, its spread, two others."""
        first, (second, third) = PRIMARY[kind], OTHERS[kind]
        folds = self.protocol["folds"]
        return [
            f"  {'':31}" + "".join(f"  {_cut(name, 20):20}" for name in sets).rstrip(),
            f"  {'':31}" + "".join(f"  {self._classes(name):20}" for name in sets).rstrip(),
            TITLES[first],
            *self._lines(sets, lambda score: interval(score.metrics[first])),
            f"  {'chance':31}" + "".join(f"  {self._one(name).chance:5.3f}{'':15}" for name in sets).rstrip(),
            *([f"deviation over {folds} folds"] if folds else []),
            *(self._lines(sets, lambda score: f"{score.spread:5.3f}") if folds else []),
            f"{TITLES[second]} / {TITLES[third]}",
            *self._lines(sets, lambda score: pair(score, second, third)),
        ]

    def _lines(self, sets: Sequence[str], cell: Callable[[Score], str]) -> Iterator[str]:
        """A line for each probe on each kind of features."""
        for features, probe in self._rows():
            cells = "".join(f"  {cell(self.of(features, probe, name)):20}" for name in sets)
            yield f"  {features:20} {METHODS[probe]:10}{cells}".rstrip()

    def _rows(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((score.features, score.probe) for score in self.scores))

    def _classes(self, label_set: str) -> str:
        one = self._one(label_set)
        return f"{one.classes} classes" + (f", {one.skipped} not" if one.skipped else "")

    def _one(self, label_set: str) -> Score:
        return next(score for score in self.scores if score.label_set == label_set)

    def write_classes(self, file: Path) -> None:
        """Every class as CSV: a line for each label set and class, a column for each probe's average precision.

        And one for its recall, where a label set is of single labels.
        """
        rows = self._rows()
        recalls = rows if any(score.per_class_recall for score in self.scores) else []
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as scratch, scratch.open("w", newline="") as handle:
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
                scores = [self.of(name, probe, label_set) for name, probe in rows]
                empty = (None,) * len(self.classes)
                columns = [score.per_class_ap for score in scores]
                columns += [score.per_class_recall or empty for score in scores] if recalls else []
                for (mid, name), values in zip(self.classes, zip(*columns, strict=True), strict=True):
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
