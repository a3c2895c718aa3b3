"""Compare the project's results with published ones: print both, and state whether the numbers are comparable."""

import csv
import importlib.resources
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from string import ascii_lowercase
from textwrap import wrap
from typing import Any

import polars as pl

from ajepa.evaluate.protocol import ClassifierTraining, ProbeTraining
from ajepa.evaluate.result import (
    EVALUATION_FILE,
    METRIC_TITLES,
    PRIMARY_METRIC,
    UNKNOWN_CHOICE,
    Evaluation,
    Score,
)
from ajepa.training.trained_run import CHOSEN_ON_EVAL_CLIPS
from pipeline.datasets.speech_commands import SPEECH_COMMANDS_WORDS
from pipeline.errors import RunError
from pipeline.labels.ontology import fsd50k_classes, load_class_list

PUBLISHED_TABLE = importlib.resources.files("manifests") / "published_results.csv"

# Clips of the official eval split, or of all folds together; manifests/README.md names the source of each number.
OFFICIAL_EVAL_CLIPS = {
    "audioset-2m": 20_371,
    "audioset-20k": 20_371,
    "esc50": 2_000,
    "fsd50k": 10_231,
    "speech-commands-v1": 6_835,
    "speech-commands-v2": 11_005,
    "voxceleb1-sid": 8_251,
}

# AudioSet's official train clips: the balanced and the unbalanced set together, and the balanced set alone.
OFFICIAL_TRAIN_CLIPS = {
    "audioset-2m": 2_063_949,
    "audioset-20k": 22_160,
}

# Smallest share of the official eval split that is comparable. AudioSet loses clips over time: results are published
# on 94 % of its eval split.
MIN_EVAL_SHARE = 0.9

# Smallest share of the official train clips that is comparable; this share of AudioSet can still be downloaded.
MIN_TRAIN_SHARE = 0.75

# Pairs of own and published protocols that both probe a frozen encoder, each with its own settings.
SIMILAR_PROTOCOLS = {
    ("linear", "xares-mlp"),
    ("linear", "linear"),
    ("knn", "xares-knn"),
}

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
class PublishedResult:
    """A published number: a row of manifests/published_results.csv, without the columns that the program does not use.

    value                in [0, 1]
    classes, eval_clips  None if the source does not state them
    checked              where the number was read: `source`; `second hand`, on a page that quotes the source; or `no`,
                         in notes on the paper only
    caution              reason to compare the number with care even if all else is equal; may be empty
    """

    model: str
    pretraining: str
    task: str
    protocol: str
    metric: str
    value: float
    classes: int | None
    eval_clips: int | None
    checked: str
    caution: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnResult:
    """One result of this project.

    task            public task that was measured; None: none of the table
    value           in [0, 1]
    train_clips     number of clips that trained the classifier or the probe; None: not recorded
    fold_deviation  sample deviation over folds; None: no folds
    from_nothing    whether a classifier was trained without a pre-trained encoder
    tuned           whether the probed encoder was fine-tuned with labels
    checkpoint      last, best, init or a step
    chosen_by       what chose that checkpoint, in words; None: not recorded
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
    checkpoint: str = "last"
    chosen_by: str | None = None


def compare_results(result_paths: Sequence[Path]) -> str:
    """A table of every result, followed by the published results of its task, in lines of at most 80 columns.

    RunError if a path contains no result.
    """
    results = [result for path in result_paths for result in find_results(path)]
    return "\n\n".join("\n".join(comparison_lines(result)) for result in results)


def comparison_table(result_paths: Sequence[Path]) -> pl.DataFrame:
    """The same as a table: a row for every result, and after it one for every published result of its task.

    `comparable` (yes, with care, no) and `reasons` are empty in the row of a result. RunError if a path contains none.
    """
    records = []
    for result in (result for path in result_paths for result in find_results(path)):
        low, high = result.interval or (None, None)
        own = {
            "result": result.name,
            "task": result.task,
            "label_set": result.label_set,
            "metric": result.metric,
        }
        records.append(
            own
            | {"model": "this result", "protocol": result.protocol, "value": result.value}
            | {"low": low, "high": high, "comparable": None, "reasons": None}
        )
        for row in published_results():
            if (row.task, row.metric) != (result.task, result.metric):
                continue
            against = reasons_against(result, row)
            caveats = comparison_caveats(result, row)
            records.append(
                own
                | {
                    "model": row.model,
                    "protocol": row.protocol,
                    "value": row.value,
                    "low": None,
                    "high": None,
                }
                | {"comparable": comparison_verdict(against, caveats), "reasons": [*against, *caveats]}
            )
    schema = dict.fromkeys(("result", "model", "task", "label_set", "protocol", "metric"), pl.String())
    numbers = dict.fromkeys(("value", "low", "high"), pl.Float64())
    return pl.DataFrame(
        records, schema={**schema, **numbers, "comparable": pl.String(), "reasons": pl.List(pl.String())}
    )


def find_results(result_path: Path) -> list[OwnResult]:
    """The results in a JSON file, or all results in a folder of a run or of a cross-validated task."""
    if result_path.is_file():
        return list(read_results(result_path))

    # The result on the run's own store comes first
    files = sorted(
        result_path.glob(f"{Path(EVALUATION_FILE).stem}*.json"),
        key=lambda file: (file.name != EVALUATION_FILE, file.name),
    )
    if not files:
        fold_files = sorted(result_path.glob(f"*/{EVALUATION_FILE}"))
        next_step = "evaluate or finetune first"
        if fold_files:
            next_step = f"finetune with every fold, or give {fold_files[0].parent}"
        raise RunError(
            f"{result_path}: holds no {EVALUATION_FILE}; run ajepa-train {next_step}, or give a JSON file"
        )
    return [result for file in files for result in read_results(file)]


def read_results(file: Path) -> Iterator[OwnResult]:
    """Yield the results of a file that `evaluate` or `finetune` wrote; for probes, only those on the trained encoder.

    RunError for any other file.
    """
    evaluation = Evaluation.read_json(file)
    classifier = evaluation.protocol.classifier
    probes = evaluation.protocol.probes
    own_features = evaluation.scores[0].features
    for score in evaluation.scores:
        if score.features != own_features:
            continue
        if classifier is not None:
            yield classifier_result(str(file), evaluation, score, classifier)
        elif probes is not None:
            yield probe_result(str(file), evaluation, score, probes)


def classifier_result(
    name: str, evaluation: Evaluation, score: Score, classifier: ClassifierTraining
) -> OwnResult:
    """The result of a classifier. Its task is the task of its training, or None if fewer classes were measured."""
    # AudioSet is two public tasks, which differ in the number of train clips
    task: str | None = classifier.task
    train_clips = classifier.train_clips
    if task == "audioset":
        is_balanced = train_clips is not None and train_clips <= OFFICIAL_TRAIN_CLIPS["audioset-20k"]
        task = "audioset-20k" if is_balanced else "audioset-2m"

    # On another store only shared classes are measured; if some are missing, the task is a different one
    is_own_store = evaluation.protocol.store_id == evaluation.protocol.training_store_id
    if not is_own_store and len(evaluation.classes) < classifier.class_count:
        task = None
    is_public = task in OFFICIAL_EVAL_CLIPS
    return _own_result(
        name,
        evaluation,
        score,
        task=task if is_public else None,
        protocol="fine-tuned" if is_own_store or is_public else "elsewhere",
        train_clips=train_clips,
        from_nothing=classifier.start is None,
    )


def probe_result(name: str, evaluation: Evaluation, score: Score, probes: ProbeTraining) -> OwnResult:
    """The result of a probe. Its task is recognised by the classes of the store."""
    mids = [mid for mid, _ in evaluation.classes]
    return _own_result(
        name,
        evaluation,
        score,
        task=match_public_task(mids, folds=evaluation.protocol.folds, train_clips=probes.train_clips),
        protocol=score.probe,
        train_clips=probes.train_clips,
        tuned=evaluation.protocol.task is not None,
    )


def _own_result(name: str, evaluation: Evaluation, score: Score, **training_facts: Any) -> OwnResult:
    estimate = score.primary_estimate
    return OwnResult(
        name=name,
        metric=PRIMARY_METRIC[score.kind],
        value=estimate.value,
        interval=(estimate.low, estimate.high),
        fold_deviation=score.fold_deviation,
        folds=evaluation.protocol.folds,
        label_set=score.label_set,
        classes=len(evaluation.classes),
        eval_clips=evaluation.protocol.eval_clips,
        checkpoint=evaluation.protocol.checkpoint,
        chosen_by=evaluation.protocol.chosen_by,
        **training_facts,
    )


def match_public_task(classes: Sequence[str], *, folds: int, train_clips: int) -> str | None:
    """The public task that has these class ids; None if the table has no such task.

    AudioSet is two tasks: `audioset-20k` if there are no more train clips than in its balanced set, else `audioset-2m`.
    """
    # AudioSet, FSD50K and Speech Commands are recognised by their class ids
    if set(classes) == set(load_class_list().mids):
        return "audioset-20k" if train_clips <= OFFICIAL_TRAIN_CLIPS["audioset-20k"] else "audioset-2m"
    if set(classes) == set(fsd50k_classes().mids):
        return "fsd50k"
    for version, words in SPEECH_COMMANDS_WORDS.items():
        if set(classes) == set(words):
            return f"speech-commands-{version}"

    # ESC-50 is recognised by its numbers of classes and folds
    return "esc50" if len(classes) == 50 and folds == 5 else None


def comparison_lines(result: OwnResult) -> list[str]:
    """The lines of one result: its number, the published numbers of its task from the best down, and all reasons."""
    # The result
    interval = ""
    if result.interval is not None:
        interval = " [{:.3f} {:.3f}]".format(*result.interval)
    spread = ""
    if result.fold_deviation is not None:
        spread = f" ± {result.fold_deviation:.3f} over {result.folds} folds"
    lines = [
        result.name,
        f"{result.task or 'no task in the table'}, {result.label_set} labels, "
        f"{PROTOCOL_TITLES[result.protocol]}, {result.eval_clips} clips",
        *wrap(
            f"checkpoint {result.checkpoint}, chosen by {result.chosen_by or UNKNOWN_CHOICE}",
            78,
            initial_indent="  ",
            subsequent_indent="    ",
        ),
        f"  {'this result':24}{METRIC_TITLES[result.metric]:9} {result.value:.3f}{interval}{spread}",
    ]

    # The published results; each reason gets a letter when it is first used
    rows = [row for row in published_results() if row.task == result.task and row.metric == result.metric]
    if not rows:
        lines.append("  no published result of this task is listed in published_results.csv")
    letters: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: -row.value):
        against = reasons_against(result, row)
        caveats = comparison_caveats(result, row)
        for reason in against + caveats:
            if reason not in letters:
                letters[reason] = ascii_lowercase[len(letters)]
        verdict = comparison_verdict(against, caveats)
        if against or caveats:
            verdict += f" ({', '.join(letters[reason] for reason in against + caveats)})"
        lines.append(
            f"  {row.model:24}{METRIC_TITLES[row.metric]:9} {row.value:.3f}  {PROTOCOL_TITLES[row.protocol]:12} "
            f"{verdict}"
        )
    for reason, letter in letters.items():
        lines += wrap(f"({letter}) {reason}", 78, initial_indent="  ", subsequent_indent="      ")
    return lines


def comparison_verdict(against: Sequence[str], caveats: Sequence[str]) -> str:
    """Whether two numbers are comparable: no, with care, or yes."""
    if against:
        return "no"
    return "with care" if caveats else "yes"


def reasons_against(result: OwnResult, row: PublishedResult) -> list[str]:
    """The reasons why the two numbers measure different things; empty if they are comparable."""
    # The method, the clips and the labels of the measurement
    reasons = []
    if result.protocol != row.protocol and (result.protocol, row.protocol) not in SIMILAR_PROTOCOLS:
        reasons.append(
            f"protocol: published {PROTOCOL_TITLES[row.protocol]}, here {PROTOCOL_TITLES[result.protocol]}"
        )
    official_clips = OFFICIAL_EVAL_CLIPS[row.task]
    if not MIN_EVAL_SHARE * official_clips <= result.eval_clips <= official_clips:
        reasons.append(f"clips: measured on {result.eval_clips}, the official split has {official_clips}")
    if result.label_set != "raw":
        reasons.append(f"labels: measured on {result.label_set} labels, published on raw labels")
    if row.classes is not None and row.classes != result.classes:
        reasons.append(f"classes: published {row.classes}, here {result.classes}")

    # Only AudioSet has training sets of two sizes
    train_clips = OFFICIAL_TRAIN_CLIPS.get(row.task)
    if train_clips is None:
        return reasons
    if result.train_clips is None:
        reasons.append(
            "training: the run records no number of train clips; complete it with ajepa-train finetune"
        )
    elif result.train_clips < MIN_TRAIN_SHARE * train_clips:
        reasons.append(f"training: on {result.train_clips} clips, {row.task} has {train_clips}")
    return reasons


def comparison_caveats(result: OwnResult, row: PublishedResult) -> list[str]:
    """Smaller differences, for which the two numbers are to be compared with care."""
    # Differences in the measurement
    caveats = []
    if (result.protocol, row.protocol) in SIMILAR_PROTOCOLS:
        caveats.append("recipe: both encoders are frozen, but the probes are trained with other settings")
    if row.eval_clips is not None and row.eval_clips != result.eval_clips:
        caveats.append(f"clips: published on {row.eval_clips}, here on {result.eval_clips}")

    # A checkpoint that may have been chosen on the clips that are measured
    if result.chosen_by == CHOSEN_ON_EVAL_CLIPS:
        caveats.append("checkpoint: it was chosen on clips of the splits that are measured")
    elif result.checkpoint == "best" and result.chosen_by is None:
        caveats.append("checkpoint: the best, and the result does not say on which clips")

    # Differences in pre-training
    if result.tuned:
        caveats.append("pre-training: the encoder here was fine-tuned with labels")
    if result.from_nothing:
        caveats.append("pre-training: the network here had none")
    if "supervised" in row.pretraining:
        caveats.append("pre-training: the published network was pre-trained with labels")

    # How reliable the published number is
    if row.checked == "no":
        caveats.append("value: the published number comes from notes, not from the paper itself")
    if row.caution:
        caveats.append(f"{row.model}: {row.caution}")
    return caveats


@cache
def published_results() -> tuple[PublishedResult, ...]:
    """Every row of the table."""
    records = csv.DictReader(PUBLISHED_TABLE.read_text(encoding="utf-8").splitlines())
    return tuple(_parse_published_row(record) for record in records)


def _parse_published_row(record: dict[str, str]) -> PublishedResult:
    values: dict[str, Any] = {field.name: record[field.name] for field in fields(PublishedResult)}
    for name in ("classes", "eval_clips"):
        values[name] = int(record[name]) if record[name] else None
    return PublishedResult(**(values | {"value": float(record["value"])}))
