"""Compare: the project's results beside the published ones, and whether the two may be compared."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_lowercase
from textwrap import wrap
from typing import Any

import numpy as np

from ajepa.evaluation import EVALUATION, TITLES, Evaluation
from ajepa.published import EVAL_CLIPS, TRAIN_CLIPS, Published, published, task_of
from pipeline.errors import RunError

ALL_CLIPS = 0.9  # of the official split: AudioSet's is shrinking, results are published on 94 % of it
MOST_TRAIN = 0.75  # of the clips to train on: that many of AudioSet's can still be had
ALIKE = {
    ("linear", "xares-mlp"),
    ("linear", "linear"),
    ("knn", "xares-knn"),
}  # frozen, each with its own settings
PROTOCOLS = {
    "fine-tuned": "fine-tuned",
    "linear": "linear probe",
    "knn": "kNN",
    "attentive": "attentive probe",
    "xares-mlp": "X-ARES MLP",
    "xares-knn": "X-ARES kNN",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ours:
    """One number of the project; `value` in [0, 1], `interval` where there is one, `task` None: not a public one."""

    name: str
    task: str | None
    protocol: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    label_set: str
    classes: int
    train_clips: int
    eval_clips: int


def compare(places: Sequence[Path]) -> str:
    """Every result, the published ones of its task below it, in lines of at most 80 columns; RunError."""
    found = [ours for place in places for ours in results_at(place)]
    return "\n\n".join("\n".join(block(ours)) for ours in found)


def results_at(place: Path) -> list[Ours]:
    """Those of a JSON file, of a run (all its evaluations), or of a run of folds (their means)."""
    if place.is_file():
        return list(results_in(place))
    if folds := sorted(place.glob(f"fold*/{EVALUATION}")):
        return mean_over([list(results_in(file)) for file in folds], str(place))
    files = sorted(place.glob(f"{Path(EVALUATION).stem}*.json"))
    if not files:
        raise RunError(
            f"{place}: holds no {EVALUATION}; run ajepa-train evaluate or finetune first, or give a JSON file"
        )
    return [ours for file in files for ours in results_in(file)]


def results_in(file: Path) -> Iterator[Ours]:
    """What `evaluate` or `finetune` wrote into a file; RunError for any other."""
    try:
        told = json.loads(file.read_text())
    except json.JSONDecodeError:
        raise RunError(f"{file}: is not JSON; give what evaluate or finetune wrote") from None
    if not isinstance(told, dict) or not {"protocol", "scores"} <= set(told):
        raise RunError(f"{file}: holds no scores; give what evaluate or finetune wrote")
    yield from probed(file) if "format" in told else fine_tuned(file, told)


def probed(file: Path) -> Iterator[Ours]:
    """The trained encoder's scores in an evaluation of frozen features."""
    evaluation = Evaluation.read(file)
    told, name = evaluation.protocol, evaluation.scores[0].features
    train_clips = told["train_clips"]
    task = task_of([mid for mid, _ in evaluation.classes], folds=told["folds"], train_clips=train_clips)
    for score in evaluation.scores:
        if score.features == name:
            metric = "accuracy" if score.kind == "single" else "map"
            yield Ours(
                name=str(file),
                task=task,
                protocol=score.probe,
                metric=metric,
                value=score.primary.value,
                interval=(score.primary.low, score.primary.high),
                label_set=score.label_set,
                classes=len(evaluation.classes),
                train_clips=train_clips,
                eval_clips=told["eval_clips"],
            )


def fine_tuned(file: Path, told: dict[str, Any]) -> Iterator[Ours]:
    """The scores of a fine-tuned run, one for each label set."""
    protocol = told["protocol"]
    task, train_clips = protocol.get("task"), protocol["train_clips"]
    if task == "audioset":
        task = "audioset-20k" if train_clips <= TRAIN_CLIPS["audioset-20k"] else "audioset-2m"
    for score in told["scores"]:
        yield Ours(
            name=str(file),
            task=task if task in EVAL_CLIPS else None,
            protocol="fine-tuned",
            metric=score["metric"],
            value=score["value"],
            interval=None,
            label_set=score["label_set"],
            classes=score["classes"] + score["skipped"],
            train_clips=train_clips,
            eval_clips=protocol["eval_clips"],
        )


def mean_over(folds: list[list[Ours]], name: str) -> list[Ours]:
    """Cross-validated results: the mean of each, on the clips of all folds."""
    means = []
    for of_folds in zip(*folds, strict=True):
        value, clips = np.mean([ours.value for ours in of_folds]), sum(ours.eval_clips for ours in of_folds)
        means.append(replace(of_folds[0], name=name, value=float(value), interval=None, eval_clips=clips))
    return means


def block(ours: Ours) -> list[str]:
    """One result, the published ones of its task from the best down, and the reasons against comparing them."""
    task = ours.task or "no task in the table"
    lines = [
        ours.name,
        f"{task}, {ours.label_set} labels, {PROTOCOLS[ours.protocol]}, {ours.eval_clips} clips",
    ]
    interval = "" if ours.interval is None else " [{:.3f} {:.3f}]".format(*ours.interval)
    lines.append(f"  {'this result':24}{TITLES[ours.metric]:9} {ours.value:.3f}{interval}")
    told = [row for row in published() if row.task == ours.task and row.metric == ours.metric]
    reasons: list[str] = []
    for row in sorted(told, key=lambda row: -row.value):
        against, with_care = refusals(ours, row), cautions(ours, row)
        reasons += [reason for reason in against + with_care if reason not in reasons]
        marks = ", ".join(ascii_lowercase[reasons.index(reason)] for reason in against + with_care)
        verdict = "no" if against else "with care" if with_care else "yes"
        lines.append(
            f"  {row.model:24}{TITLES[row.metric]:9} {row.value:.3f}  {PROTOCOLS[row.protocol]:12} "
            f"{verdict}{f' ({marks})' if marks else ''}"
        )
    if not told:
        lines.append("  nothing is published of it here: see manifests/published_results.csv")
    for mark, reason in zip(ascii_lowercase, reasons, strict=False):
        lines += wrap(f"({mark}) {reason}", 78, initial_indent="  ", subsequent_indent="      ")
    return lines


def refusals(ours: Ours, row: Published) -> list[str]:
    """Why the two numbers say different things; none: they may be compared."""
    told, official = [], EVAL_CLIPS[row.task]
    if ours.protocol != row.protocol and (ours.protocol, row.protocol) not in ALIKE:
        told.append(f"protocol: that one is {PROTOCOLS[row.protocol]}, this one {PROTOCOLS[ours.protocol]}")
    if ours.eval_clips < ALL_CLIPS * official or ours.eval_clips > official:
        told.append(f"clips: measured on {ours.eval_clips}, the official split has {official}")
    if ours.label_set != "raw":
        told.append(f"labels: measured on {ours.label_set} labels, published are raw ones")
    if row.classes is not None and row.classes != ours.classes:
        told.append(f"classes: {ours.classes} are told apart here, {row.classes} there")
    wanted = TRAIN_CLIPS.get(row.task)
    if wanted is not None and ours.train_clips < MOST_TRAIN * wanted:
        told.append(f"training: on {ours.train_clips} clips, {row.task} has {wanted}")
    return told


def cautions(ours: Ours, row: Published) -> list[str]:
    """What differs a little."""
    told = []
    if (ours.protocol, row.protocol) in ALIKE:
        told.append("recipe: both frozen, the probes are trained with other settings")
    if row.eval_clips is not None and row.eval_clips != ours.eval_clips:
        told.append(f"clips: that one was measured on {row.eval_clips}, this one on {ours.eval_clips}")
    if "supervised" in row.pretraining:
        told.append("pre-training: that one was shown labels")
    if row.caution:
        told.append(f"{row.model}: {row.caution}")
    return told
