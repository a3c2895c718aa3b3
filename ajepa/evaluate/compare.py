"""Published results: a table of facts with their sources, and the tasks that they are of.

Compare: the project's results beside the published ones, and whether the two may be compared.
"""

import csv
import importlib.resources
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import ascii_lowercase
from textwrap import wrap
from typing import Any

from ajepa.evaluate.result import (
    EVALUATION_FILE,
    HEAD_PROBE,
    METRIC_TITLES,
    PRIMARY_METRIC,
    Evaluation,
    Score,
)
from pipeline.datasets.speech_commands import SPEECH_COMMANDS_WORDS
from pipeline.errors import RunError
from pipeline.labels.ontology import fsd50k_classes, load_class_list

PUBLISHED_TABLE = importlib.resources.files("manifests") / "published_results.csv"

OFFICIAL_EVAL_CLIPS = {  # what the official split lists, the folds together; manifests/README.md says where each was read
    "audioset-2m": 20_371,
    "audioset-20k": 20_371,
    "esc50": 2_000,
    "fsd50k": 10_231,
    "speech-commands-v1": 6_835,
    "speech-commands-v2": 11_005,
    "voxceleb1-sid": 8_251,
}

OFFICIAL_TRAIN_CLIPS = {
    "audioset-2m": 2_063_949,
    "audioset-20k": 22_160,
}  # both sets of AudioSet; the balanced one

CHECKED_AT = ("source", "second hand", "no")


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedResult:
    """A number that others report; `value` in [0, 1], None or empty where the source does not say.

    checked  where the number was seen: at its source, on a page that quotes it, or (`no`) only in notes on the paper
    caution  why it is to be compared with care even where all else is equal
    """

    model: str
    parameters: int | None
    pretraining: str
    task: str
    protocol: str
    metric: str
    value: float
    classes: int | None
    eval_clips: int | None
    source: str
    where: str
    checked: str
    caution: str
    remark: str


@cache
def published_results() -> tuple[PublishedResult, ...]:
    """Every row of the table."""
    return tuple(
        _parse_published_row(row)
        for row in csv.DictReader(PUBLISHED_TABLE.read_text(encoding="utf-8").splitlines())
    )


def _parse_published_row(record: dict[str, str]) -> PublishedResult:
    counts = {
        name: int(record[name]) if record[name] else None for name in ("parameters", "classes", "eval_clips")
    }
    return PublishedResult(**(record | counts | {"value": float(record["value"])}))  # type: ignore[arg-type]


def match_public_task(classes: Sequence[str], *, folds: int, train_clips: int) -> str | None:
    """The public task that a store's class ids are of; None: none of those in the table.

    AudioSet has two: with at most its balanced clips to train on it is `audioset-20k`.
    """
    if set(classes) == set(load_class_list().mids):
        return "audioset-20k" if train_clips <= OFFICIAL_TRAIN_CLIPS["audioset-20k"] else "audioset-2m"
    if set(classes) == set(fsd50k_classes().mids):
        return "fsd50k"
    for version, words in SPEECH_COMMANDS_WORDS.items():
        if set(classes) == set(words):
            return f"speech-commands-{version}"
    return "esc50" if len(classes) == 50 and folds == 5 else None


MIN_EVAL_SHARE = 0.9  # of the official split: AudioSet's is shrinking, results are published on 94 % of it

MIN_TRAIN_SHARE = 0.75  # of the clips to train on: that many of AudioSet's can still be had

SIMILAR_PROTOCOLS = {
    ("linear", "xares-mlp"),
    ("linear", "linear"),
    ("knn", "xares-knn"),
}  # frozen, each with its own settings

PROTOCOL_TITLES = {
    "fine-tuned": "fine-tuned",
    "linear": "linear probe",
    "knn": "kNN",
    "attentive": "attentive probe",
    "xares-mlp": "X-ARES MLP",
    "xares-knn": "X-ARES kNN",
    "elsewhere": "trained on another store",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnResult:
    """One number of the project; `value` in [0, 1]; `task` None: not a public one.

    spread      sample deviation over folds, where there are some
    train_clips what a classifier was trained on, or a probe; None: not known
    from_nothing whether a classifier was trained without a pre-trained encoder
    tuned       whether an encoder that is probed was fine-tuned, with labels
    """

    name: str
    task: str | None
    protocol: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    label_set: str
    classes: int
    train_clips: int | None
    eval_clips: int
    fold_deviation: float | None = None
    folds: int = 0
    from_nothing: bool = False
    tuned: bool = False


def compare_results(result_paths: Sequence[Path]) -> str:
    """Every result, the published ones of its task below it, in lines of at most 80 columns; RunError."""
    found = [ours for place in result_paths for ours in find_results(place)]
    return "\n\n".join("\n".join(comparison_lines(ours)) for ours in found)


def find_results(result_path: Path) -> list[OwnResult]:
    """Those of a JSON file, or of a run, cross-validated or not: all its evaluations."""
    files = (
        [result_path]
        if result_path.is_file()
        else sorted(result_path.glob(f"{Path(EVALUATION_FILE).stem}*.json"), key=result_order)
    )
    if not files:
        more = sorted(result_path.glob(f"*/{EVALUATION_FILE}"))
        told = f"finetune with every fold, or give {more[0].parent}" if more else "evaluate or finetune first"
        raise RunError(
            f"{result_path}: holds no {EVALUATION_FILE}; run ajepa-train {told}, or give a JSON file"
        )
    return [ours for file in files for ours in read_results(file)]


def result_order(file: Path) -> tuple[bool, str]:
    """What a run is measured by on its own store first."""
    return file.name != EVALUATION_FILE, file.name


def read_results(file: Path) -> Iterator[OwnResult]:
    """What `evaluate` or `finetune` wrote: of probes those on the run's encoder; RunError for any other file."""
    evaluation = Evaluation.read_json(file)
    told, name = evaluation.protocol, evaluation.scores[0].features
    for score in evaluation.scores:
        if score.features == name:
            how = (
                classifier_result_fields(evaluation)
                if score.probe == HEAD_PROBE
                else probe_result_fields(evaluation, score)
            )
            yield OwnResult(
                name=str(file),
                metric=PRIMARY_METRIC[score.kind],
                value=score.primary_estimate.value,
                interval=(score.primary_estimate.low, score.primary_estimate.high),
                fold_deviation=score.fold_deviation,
                folds=told["folds"],
                label_set=score.label_set,
                classes=len(evaluation.classes),
                eval_clips=told["eval_clips"],
                **how,
            )


def probe_result_fields(evaluation: Evaluation, score: Score) -> dict[str, Any]:
    """The task that a store is by its classes; what trained the probe."""
    told = evaluation.protocol
    train_clips = told["probes"]["train_clips"]
    mids = [mid for mid, _ in evaluation.classes]
    task = match_public_task(mids, folds=told["folds"], train_clips=train_clips)
    return {
        "task": task,
        "protocol": score.probe,
        "train_clips": train_clips,
        "tuned": told["task"] is not None,
    }


def classifier_result_fields(evaluation: Evaluation) -> dict[str, Any]:
    """The task that a classifier was trained on, if it is measured on that; where it is trained elsewhere, says so."""
    told, classifier = evaluation.protocol, evaluation.protocol["classifier"]
    task, train_clips = classifier["task"], classifier["train_clips"]
    if task == "audioset":
        few = train_clips is not None and train_clips <= OFFICIAL_TRAIN_CLIPS["audioset-20k"]
        task = "audioset-20k" if few else "audioset-2m"
    own = told["store_id"] == told["trained_on"]
    if not own and len(evaluation.classes) < classifier["classes"]:
        task = None
    return {
        "task": task if task in OFFICIAL_EVAL_CLIPS else None,
        "protocol": "fine-tuned" if own or task in OFFICIAL_EVAL_CLIPS else "elsewhere",
        "train_clips": train_clips,
        "from_nothing": classifier["from"] is None,
    }


def comparison_lines(result: OwnResult) -> list[str]:
    """One result, the published ones of its task from the best down, and the reasons against comparing them."""
    task = result.task or "no task in the table"
    lines = [
        result.name,
        f"{task}, {result.label_set} labels, {PROTOCOL_TITLES[result.protocol]}, {result.eval_clips} clips",
    ]
    interval = "" if result.interval is None else " [{:.3f} {:.3f}]".format(*result.interval)
    spread = (
        "" if result.fold_deviation is None else f" ± {result.fold_deviation:.3f} over {result.folds} folds"
    )
    lines.append(f"  {'this result':24}{METRIC_TITLES[result.metric]:9} {result.value:.3f}{interval}{spread}")
    told = [row for row in published_results() if row.task == result.task and row.metric == result.metric]
    reasons: list[str] = []
    for row in sorted(told, key=lambda row: -row.value):
        against, with_care = reasons_against(result, row), comparison_caveats(result, row)
        reasons += [reason for reason in against + with_care if reason not in reasons]
        marks = ", ".join(ascii_lowercase[reasons.index(reason)] for reason in against + with_care)
        verdict = "no" if against else "with care" if with_care else "yes"
        lines.append(
            f"  {row.model:24}{METRIC_TITLES[row.metric]:9} {row.value:.3f}  {PROTOCOL_TITLES[row.protocol]:12} "
            f"{verdict}{f' ({marks})' if marks else ''}"
        )
    if not told:
        lines.append("  nothing is published of it here: see manifests/published_results.csv")
    for mark, reason in zip(ascii_lowercase, reasons, strict=False):
        lines += wrap(f"({mark}) {reason}", 78, initial_indent="  ", subsequent_indent="      ")
    return lines


def reasons_against(result: OwnResult, row: PublishedResult) -> list[str]:
    """Why the two numbers say different things; none: they may be compared."""
    told, official = [], OFFICIAL_EVAL_CLIPS[row.task]
    if result.protocol != row.protocol and (result.protocol, row.protocol) not in SIMILAR_PROTOCOLS:
        told.append(
            f"protocol: that one is {PROTOCOL_TITLES[row.protocol]}, this one {PROTOCOL_TITLES[result.protocol]}"
        )
    if result.eval_clips < MIN_EVAL_SHARE * official or result.eval_clips > official:
        told.append(f"clips: measured on {result.eval_clips}, the official split has {official}")
    if result.label_set != "raw":
        told.append(f"labels: measured on {result.label_set} labels, published are raw ones")
    if row.classes is not None and row.classes != result.classes:
        told.append(f"classes: {result.classes} are told apart here, {row.classes} there")
    wanted = OFFICIAL_TRAIN_CLIPS.get(row.task)
    if wanted is not None and result.train_clips is None:
        told.append("training: on how many clips is not told in the run; run ajepa-train finetune to its end")
    elif (
        wanted is not None
        and result.train_clips is not None
        and result.train_clips < MIN_TRAIN_SHARE * wanted
    ):
        told.append(f"training: on {result.train_clips} clips, {row.task} has {wanted}")
    return told


def comparison_caveats(result: OwnResult, row: PublishedResult) -> list[str]:
    """What differs a little."""
    told = []
    if (result.protocol, row.protocol) in SIMILAR_PROTOCOLS:
        told.append("recipe: both frozen, the probes are trained with other settings")
    if row.eval_clips is not None and row.eval_clips != result.eval_clips:
        told.append(f"clips: that one was measured on {row.eval_clips}, this one on {result.eval_clips}")
    if result.tuned:
        told.append("pre-training: this one's encoder was fine-tuned, with labels")
    if result.from_nothing:
        told.append("pre-training: this one had none")
    if "supervised" in row.pretraining:
        told.append("pre-training: that one was shown labels")
    if row.checked == "no":
        told.append("value: that one was copied from notes on the paper and not seen there again")
    if row.caution:
        told.append(f"{row.model}: {row.caution}")
    return told
