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

from ajepa.evaluate.result import EVALUATION, HEAD, PRIMARY, TITLES, Evaluation, Score
from pipeline.datasets.speech_commands import WORDS
from pipeline.errors import RunError
from pipeline.labels.ontology import fsd50k_classes, load_class_list

TABLE = importlib.resources.files("manifests") / "published_results.csv"

EVAL_CLIPS = {  # what the official split lists, the folds together; manifests/README.md says where each was read
    "audioset-2m": 20_371,
    "audioset-20k": 20_371,
    "esc50": 2_000,
    "fsd50k": 10_231,
    "speech-commands-v1": 6_835,
    "speech-commands-v2": 11_005,
    "voxceleb1-sid": 8_251,
}

TRAIN_CLIPS = {"audioset-2m": 2_063_949, "audioset-20k": 22_160}  # both sets of AudioSet; the balanced one

CHECKED = ("source", "second hand", "no")


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
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
def published() -> tuple[Published, ...]:
    """Every row of the table."""
    return tuple(_row(row) for row in csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines()))


def _row(told: dict[str, str]) -> Published:
    counts = {
        name: int(told[name]) if told[name] else None for name in ("parameters", "classes", "eval_clips")
    }
    return Published(**(told | counts | {"value": float(told["value"])}))  # type: ignore[arg-type]


def task_of(classes: Sequence[str], *, folds: int, train_clips: int) -> str | None:
    """The public task that a store's class ids are of; None: none of those in the table.

    AudioSet has two: with at most its balanced clips to train on it is `audioset-20k`.
    """
    if set(classes) == set(load_class_list().mids):
        return "audioset-20k" if train_clips <= TRAIN_CLIPS["audioset-20k"] else "audioset-2m"
    if set(classes) == set(fsd50k_classes().mids):
        return "fsd50k"
    for version, words in WORDS.items():
        if set(classes) == set(words):
            return f"speech-commands-{version}"
    return "esc50" if len(classes) == 50 and folds == 5 else None


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
    "elsewhere": "trained on another store",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ours:
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
    spread: float | None = None
    folds: int = 0
    from_nothing: bool = False
    tuned: bool = False


def compare(places: Sequence[Path]) -> str:
    """Every result, the published ones of its task below it, in lines of at most 80 columns; RunError."""
    found = [ours for place in places for ours in results_at(place)]
    return "\n\n".join("\n".join(block(ours)) for ours in found)


def results_at(place: Path) -> list[Ours]:
    """Those of a JSON file, or of a run, cross-validated or not: all its evaluations."""
    files = [place] if place.is_file() else sorted(place.glob(f"{Path(EVALUATION).stem}*.json"), key=rank)
    if not files:
        more = sorted(place.glob(f"*/{EVALUATION}"))
        told = f"finetune with every fold, or give {more[0].parent}" if more else "evaluate or finetune first"
        raise RunError(f"{place}: holds no {EVALUATION}; run ajepa-train {told}, or give a JSON file")
    return [ours for file in files for ours in results_in(file)]


def rank(file: Path) -> tuple[bool, str]:
    """What a run is measured by on its own store first."""
    return file.name != EVALUATION, file.name


def results_in(file: Path) -> Iterator[Ours]:
    """What `evaluate` or `finetune` wrote: of probes those on the run's encoder; RunError for any other file."""
    evaluation = Evaluation.read(file)
    told, name = evaluation.protocol, evaluation.scores[0].features
    for score in evaluation.scores:
        if score.features == name:
            how = judged_how(evaluation) if score.probe == HEAD else probed_how(evaluation, score)
            yield Ours(
                name=str(file),
                metric=PRIMARY[score.kind],
                value=score.primary.value,
                interval=(score.primary.low, score.primary.high),
                spread=score.spread,
                folds=told["folds"],
                label_set=score.label_set,
                classes=len(evaluation.classes),
                eval_clips=told["eval_clips"],
                **how,
            )


def probed_how(evaluation: Evaluation, score: Score) -> dict[str, Any]:
    """The task that a store is by its classes; what trained the probe."""
    told = evaluation.protocol
    train_clips = told["probes"]["train_clips"]
    mids = [mid for mid, _ in evaluation.classes]
    task = task_of(mids, folds=told["folds"], train_clips=train_clips)
    return {
        "task": task,
        "protocol": score.probe,
        "train_clips": train_clips,
        "tuned": told["task"] is not None,
    }


def judged_how(evaluation: Evaluation) -> dict[str, Any]:
    """The task that a classifier was trained on, if it is measured on that; where it is trained elsewhere, says so."""
    told, classifier = evaluation.protocol, evaluation.protocol["classifier"]
    task, train_clips = classifier["task"], classifier["train_clips"]
    if task == "audioset":
        few = train_clips is not None and train_clips <= TRAIN_CLIPS["audioset-20k"]
        task = "audioset-20k" if few else "audioset-2m"
    own = told["store_id"] == told["trained_on"]
    if not own and len(evaluation.classes) < classifier["classes"]:
        task = None
    return {
        "task": task if task in EVAL_CLIPS else None,
        "protocol": "fine-tuned" if own or task in EVAL_CLIPS else "elsewhere",
        "train_clips": train_clips,
        "from_nothing": classifier["from"] is None,
    }


def block(ours: Ours) -> list[str]:
    """One result, the published ones of its task from the best down, and the reasons against comparing them."""
    task = ours.task or "no task in the table"
    lines = [
        ours.name,
        f"{task}, {ours.label_set} labels, {PROTOCOLS[ours.protocol]}, {ours.eval_clips} clips",
    ]
    interval = "" if ours.interval is None else " [{:.3f} {:.3f}]".format(*ours.interval)
    spread = "" if ours.spread is None else f" ± {ours.spread:.3f} over {ours.folds} folds"
    lines.append(f"  {'this result':24}{TITLES[ours.metric]:9} {ours.value:.3f}{interval}{spread}")
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
    if wanted is not None and ours.train_clips is None:
        told.append("training: on how many clips is not told in the run; run ajepa-train finetune to its end")
    elif wanted is not None and ours.train_clips is not None and ours.train_clips < MOST_TRAIN * wanted:
        told.append(f"training: on {ours.train_clips} clips, {row.task} has {wanted}")
    return told


def cautions(ours: Ours, row: Published) -> list[str]:
    """What differs a little."""
    told = []
    if (ours.protocol, row.protocol) in ALIKE:
        told.append("recipe: both frozen, the probes are trained with other settings")
    if row.eval_clips is not None and row.eval_clips != ours.eval_clips:
        told.append(f"clips: that one was measured on {row.eval_clips}, this one on {ours.eval_clips}")
    if ours.tuned:
        told.append("pre-training: this one's encoder was fine-tuned, with labels")
    if ours.from_nothing:
        told.append("pre-training: this one had none")
    if "supervised" in row.pretraining:
        told.append("pre-training: that one was shown labels")
    if row.checked == "no":
        told.append("value: that one was copied from notes on the paper and not seen there again")
    if row.caution:
        told.append(f"{row.model}: {row.caution}")
    return told
