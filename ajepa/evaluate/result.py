"""Evaluation: every score of a run on a store, with its protocol; its JSON file, its tables, and its path."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import TextWrapper
from typing import Any, Literal

import numpy as np

from ajepa.evaluate.metrics import MetricEstimate
from ajepa.evaluate.protocol import EvaluationProtocol, is_training_store
from ajepa.training.run import Json, Run
from pipeline.errors import RunError
from pipeline.files import replacing_file
from pipeline.store.feature_store import FeatureStore

EVALUATION_FILE = "evaluation.json"

# Format 3 lacks `precision` and `chosen_by` in its protocol.
EVALUATION_FORMAT = 4
READABLE_FORMATS = (3, EVALUATION_FORMAT)

LabelKind = Literal["single", "multi"]

PRIMARY_METRIC: dict[LabelKind, str] = {"multi": "map", "single": "accuracy"}

OTHER_METRICS: dict[LabelKind, tuple[str, str]] = {"multi": ("auc", "d_prime"), "single": ("f1", "map")}

METRIC_TITLES = {"map": "mAP", "accuracy": "accuracy", "auc": "AUC", "d_prime": "d'", "f1": "macro F1"}

PROBE_TITLES = {"linear": "linear", "knn": "kNN", "attentive": "attentive"}

# Values of the fields `features` and `probe` in the score of a trained classifier.
CLASSIFIER_FEATURES, HEAD_PROBE = "classifier", "head"

METHOD_TITLES = PROBE_TITLES | {HEAD_PROBE: "own head"}

FEW_EVAL_CLIPS = 50

# In place of what chose a checkpoint, in a result that does not say.
UNKNOWN_CHOICE = "unknown: made before results said so"

LABEL_SETS_PER_BLOCK = 2  # label sets side by side in TABLE_COLUMNS

TABLE_COLUMNS = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The score of a probe on one kind of features, or of a trained classifier, on one label set.

    kind              single: every clip has exactly one label; multi: any number
    metrics           `map`, `auc` and `d_prime`; for single labels also `accuracy` and `f1`
    chance            chance level of the primary metric: mAP of a random order, or accuracy of the commonest class
    classes           number of classes that a measured clip has
    skipped           number of classes that no measured clip has
    chosen            setting selected for a probe, one per fold: its penalty, or its number of steps
    by_fold           each metric's value on every fold, except d'; empty without folds
    per_class_ap      average precision of each class, mean over the folds that have the class; None if no fold has it
    per_class_recall  recall of each class, averaged in the same way; empty unless labels are single
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
    def primary_estimate(self) -> MetricEstimate:
        """The metric that results are compared by: accuracy for single labels, else mAP."""
        return self.metrics[PRIMARY_METRIC[self.kind]]

    @property
    def fold_deviation(self) -> float | None:
        """Sample deviation of the primary metric over folds; None where there are no folds."""
        values = self.by_fold.get(PRIMARY_METRIC[self.kind], ())
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    @classmethod
    def from_json(cls, record: Json) -> "Score":
        """The score from its `asdict` in evaluation.json."""
        lists = {name: tuple(record[name]) for name in ("chosen", "per_class_ap", "per_class_recall")}
        metrics = {name: MetricEstimate(**estimate) for name, estimate in record["metrics"].items()}
        by_fold = {name: tuple(values) for name, values in record["by_fold"].items()}
        return cls(**(record | lists | {"metrics": metrics, "by_fold": by_fold}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Every score of a run on a store, with its protocol.

    classes  id and name of every class, in the order of the scores' per-class values
    """

    protocol: EvaluationProtocol
    classes: tuple[tuple[str, str], ...]
    scores: tuple[Score, ...]

    def find_score(self, features: str, probe: str, label_set: str) -> Score:
        """The score of this probe on these features and this label set."""
        wanted = (features, probe, label_set)
        return next(s for s in self.scores if (s.features, s.probe, s.label_set) == wanted)

    @property
    def label_sets(self) -> list[str]:
        """The label sets that were measured, in the order of the scores."""
        return list(dict.fromkeys(score.label_set for score in self.scores))

    def save_json(self, file: Path) -> None:
        """Write the evaluation whole or not at all."""
        record = {
            "format": EVALUATION_FORMAT,
            "protocol": self.protocol.to_json(),
            "classes": self.classes,
            "scores": [asdict(score) for score in self.scores],
        }
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(file) as scratch:
            scratch.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")

    @classmethod
    def read_json(cls, file: Path) -> "Evaluation":
        """The evaluation that `save_json` wrote; RunError if the file is no evaluation, or of another format."""
        record = _read_json_file(file)
        if not isinstance(record, dict) or not {"protocol", "scores"} <= set(record):
            raise RunError(f"{file}: holds no scores; give a file that evaluate or finetune wrote")
        if record.get("format") not in READABLE_FORMATS:
            raise RunError(
                f"{file}: has evaluation format {record.get('format', 1)}, this version reads "
                f"{' and '.join(map(str, READABLE_FORMATS))}; delete it and run ajepa-train evaluate again"
            )
        return cls(
            protocol=_parse_protocol(file, record),
            classes=tuple((mid, name) for mid, name in record["classes"]),
            scores=tuple(Score.from_json(score) for score in record["scores"]),
        )

    def describe_protocol(self) -> Iterator[str]:
        """Yield phrases that describe the measured clips, the run and its training."""
        # The clips and the run
        protocol = self.protocol
        folds = f", mean over {protocol.folds} folds" if protocol.folds else ""
        yield f"{protocol.eval_clips} eval clips of {protocol.store_name}{folds}; run at step {protocol.step}"
        if protocol.training_overlap is not None:
            yield from protocol.training_overlap.describe(protocol.eval_clips)
        yield describe_checkpoint_choice(protocol.checkpoint, protocol.chosen_by)
        if protocol.precision is not None:
            yield f"network computed in {protocol.precision}, everything after it in fp32"

        # The classifier, or the probes, and how they were trained
        if (classifier := protocol.classifier) is not None:
            clips = "clips" if classifier.train_clips is None else f"{classifier.train_clips} clips"
            yield f"classifier of task {classifier.task}, trained on {clips} by {classifier.label_set} labels"
            if len(self.classes) < classifier.class_count:
                yield (
                    f"measured on {len(self.classes)} of its {classifier.class_count} classes: "
                    "those of this store"
                )
        if (probes := protocol.probes) is not None:
            tuned = "" if protocol.task is None else f" (encoder fine-tuned on task {protocol.task})"
            yield f"probes trained on {probes.train_clips} clips{tuned}"
            yield f"pooling {probes.pooling}, layer {probes.layer}"
        few = ""
        if protocol.eval_clips < FEW_EVAL_CLIPS:
            few = "; of so few clips, and of scores near 0 or 1, such intervals say little"
        yield f"[95 % of {protocol.resamples} resamples of the clips{few}]"

    def format_table(self) -> str:
        """Metrics by features and probe, label sets side by side, in lines of at most 80 columns."""
        # A path is never broken, so that it can be copied.
        wrapper = TextWrapper(TABLE_COLUMNS, break_on_hyphens=False, break_long_words=False)
        lines = [line for phrase in self.describe_protocol() for line in wrapper.wrap(phrase)]
        for kind in PRIMARY_METRIC:
            names = [name for name in self.label_sets if self._first_score(name).kind == kind]
            for start in range(0, len(names), LABEL_SETS_PER_BLOCK):
                lines += self._table_block(kind, names[start : start + LABEL_SETS_PER_BLOCK])
        return "\n".join(lines)

    def _table_block(self, kind: LabelKind, label_sets: Sequence[str]) -> list[str]:
        """The table of some label sets of one kind."""
        primary = PRIMARY_METRIC[kind]
        second, third = OTHER_METRICS[kind]
        first_scores = [self._first_score(name) for name in label_sets]

        # The primary metric with its interval, then its chance level
        lines = [
            _table_line("", [_shorten_name(name, 20) for name in label_sets]),
            _table_line("", [_class_count_text(score) for score in first_scores]),
            METRIC_TITLES[primary],
            *self._probe_lines(label_sets, lambda score: format_interval(score.metrics[primary])),
            _table_line("chance", [f"{score.chance:5.3f}" for score in first_scores]),
        ]

        # Its deviation over folds, then two other metrics
        if self.protocol.folds:
            lines.append(f"deviation over {self.protocol.folds} folds")
            lines += self._probe_lines(label_sets, lambda score: f"{score.fold_deviation:5.3f}")
        lines.append(f"{METRIC_TITLES[second]} / {METRIC_TITLES[third]}")
        lines += self._probe_lines(label_sets, lambda score: format_metric_pair(score, second, third))
        return lines

    def _probe_lines(self, label_sets: Sequence[str], format_cell: Callable[[Score], str]) -> Iterator[str]:
        """Yield a line for each probe on each kind of features."""
        for features, probe in self._measured_probes():
            cells = [format_cell(self.find_score(features, probe, name)) for name in label_sets]
            yield _table_line(f"{features:20} {METHOD_TITLES[probe]:10}", cells)

    def _measured_probes(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((score.features, score.probe) for score in self.scores))

    def _first_score(self, label_set: str) -> Score:
        return next(score for score in self.scores if score.label_set == label_set)

    def write_class_table(self, file: Path) -> None:
        """Write every class as CSV: a line for each label set and class.

        There is a column for each probe's average precision, and one for its recall where any label set is of
        single labels.
        """
        # The columns
        probes = self._measured_probes()
        has_recall = any(score.per_class_recall for score in self.scores)
        titles = [f"{features} {probe}" for features, probe in probes]
        heads = ["label_set", "class", "name", *titles]
        if has_recall:
            heads += [f"recall, {title}" for title in titles]

        # The lines, label set by label set
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(file) as scratch, scratch.open("w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(heads)
            for label_set in self.label_sets:
                scores = [self.find_score(features, probe, label_set) for features, probe in probes]
                columns = [score.per_class_ap for score in scores]
                if has_recall:
                    absent = (None,) * len(self.classes)
                    columns += [score.per_class_recall or absent for score in scores]
                for (mid, name), values in zip(self.classes, zip(*columns, strict=True), strict=True):
                    cells = ["" if value is None else f"{value:.6f}" for value in values]
                    writer.writerow([label_set, mid, name, *cells])


def format_interval(estimate: MetricEstimate) -> str:
    """The estimate as `0.601 [0.580 0.622]`."""
    return f"{estimate.value:5.3f} [{estimate.low:5.3f} {estimate.high:5.3f}]"


def format_metric_pair(score: Score, second: str, third: str) -> str:
    """Two metrics as `0.912 / 1.910`, with a dash for a metric that the score lacks."""
    estimates = (score.metrics.get(name) for name in (second, third))
    return " / ".join("-" if estimate is None else f"{estimate.value:5.3f}" for estimate in estimates)


def _table_line(head: str, cells: Iterable[str]) -> str:
    return (f"  {head:31}" + "".join(f"  {cell:20}" for cell in cells)).rstrip()


def describe_checkpoint_choice(checkpoint: str, chosen_by: str | None) -> str:
    """The checkpoint that was measured, and what chose it, in words."""
    choice = chosen_by or UNKNOWN_CHOICE
    if choice.startswith("nothing: "):
        return f"checkpoint {checkpoint}: {choice.removeprefix('nothing: ')}"
    return f"checkpoint {checkpoint}, chosen by {choice}"


def _class_count_text(score: Score) -> str:
    """The number of classes that are measured, and of how many: a class without a held-out clip is not."""
    return f"{score.classes} of {score.classes + score.skipped} classes"


def _shorten_name(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 3] + "..."


def result_path(run: Run, store: FeatureStore, *, probed: bool) -> Path:
    """The file in the run folder that an evaluation of this run on this store is saved to.

    It is evaluation.json for the run's own store, and evaluation-STORE.json for another store. For probes on the
    encoder of a fine-tuned run (`probed`) it is evaluation-probes.json or evaluation-STORE-probes.json, because the
    other names belong to the run's classifier.
    """
    store_suffix = "" if is_training_store(run, store) else f"-{Path(store.location).stem}"
    probe_suffix = "-probes" if probed and run.is_finetuned else ""
    return run.path / f"{Path(EVALUATION_FILE).stem}{store_suffix}{probe_suffix}.json"


def read_protocol(file: Path) -> EvaluationProtocol | None:
    """The protocol of the evaluation in a file; None if the file does not exist, or has a format that is not read."""
    if not file.is_file():
        return None
    record = _read_json_file(file)
    if not isinstance(record, dict) or record.get("format") not in READABLE_FORMATS:
        return None
    return _parse_protocol(file, record)


def read_evaluation(file: Path) -> Evaluation | None:
    """The evaluation in a file; None if the file does not exist, or holds none that this version reads."""
    try:
        return None if read_protocol(file) is None else Evaluation.read_json(file)
    except RunError:
        return None


def refuse_overwriting(file: Path, protocol: EvaluationProtocol) -> None:
    """RunError if `file` contains a result of another protocol, which saving the new result would lose.

    A later step of the run, other versions, another device or additional probes do not count as another protocol.
    A result of a format that is no longer read may be replaced too.
    """
    stored = read_protocol(file)
    changes = stored.differences(protocol) if stored else []
    if changes:
        raise RunError(
            f"{file}: holds a result of another protocol ({'; '.join(changes[:3])}); "
            "save the new result elsewhere with --out FILE, or give this file as FILE to replace it"
        )


def _read_json_file(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError:
        raise RunError(f"{file}: is not JSON; expected a file that evaluate or finetune wrote") from None


def _parse_protocol(file: Path, record: Json) -> EvaluationProtocol:
    try:
        return EvaluationProtocol.from_json(record["protocol"])
    except KeyError as error:
        raise RunError(
            f"{file}: its protocol lacks {error}; delete the file and run ajepa-train evaluate again"
        ) from None
