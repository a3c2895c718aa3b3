"""Compare results with each other and with published ones, and state whether the numbers are comparable."""

import csv
import importlib.resources
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from string import ascii_lowercase
from textwrap import TextWrapper, wrap
from typing import Any

import polars as pl

from ajepa.evaluate.features import RANDOM, STATISTICS
from ajepa.evaluate.own_results import (
    OFFICIAL_EVAL_CLIPS,
    OFFICIAL_TRAIN_CLIPS,
    FeatureScore,
    OwnResult,
    find_results,
)
from ajepa.evaluate.result import METRIC_TITLES, TABLE_COLUMNS, UNKNOWN_CHOICE, describe_checkpoint_choice
from ajepa.training.trained_run import CHOSEN_ON_EVAL_CLIPS

PUBLISHED_TABLE = importlib.resources.files("manifests") / "published_results.csv"

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


VALUE_COLUMNS = 28  # of a number with its interval and its deviation over folds


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


def compare_results(result_paths: Sequence[Path]) -> str:
    """Tables of the results, each followed by the published results of its task, in lines of at most 80 columns.

    Results that measured the same clips by the same probe share a table; any other has a block of its own. RunError if
    a path contains no result.
    """
    groups = group_results(find_all_results(result_paths))
    blocks = [
        "\n".join(comparison_lines(group[0]) if len(group) == 1 else shared_lines(group)) for group in groups
    ]
    lonely = sum(not published_rows(group[0]) for group in groups)
    if lonely:
        which = "what is measured here" if lonely == len(groups) else f"{lonely} of the {len(groups)} tables"
        blocks.append(f"no published result of {which} is listed in published_results.csv")
    return "\n\n".join(blocks)


def find_all_results(result_paths: Sequence[Path]) -> list[OwnResult]:
    """The results in all paths; a path that is given twice counts once. RunError if a path contains none."""
    return [result for path in dict.fromkeys(result_paths) for result in find_results(path)]


def group_results(results: Sequence[OwnResult]) -> list[list[OwnResult]]:
    """Results that measured the same clips by the same probe together, in the order of the first of each."""
    groups: dict[tuple[object, ...], list[OwnResult]] = {}
    for number, result in enumerate(results):
        groups.setdefault((result.task, result.protocol, *(result.measured or (number,))), []).append(result)
    return list(groups.values())


def comparison_table(result_paths: Sequence[Path]) -> pl.DataFrame:
    """The same as a table: a row for every result, and after it one for every published result of its task.

    `comparable` (yes, with care, no) and `reasons` are empty in the row of a result, which alone has the last columns:
    the features, what random init and log-mel statistics reached (empty for a classifier), store, clips and step.
    RunError if a path contains none.
    """
    records: list[dict[str, Any]] = []
    for result in find_all_results(result_paths):
        low, high = result.interval or (None, None)
        own = {
            "result": result.name,
            "task": result.task,
            "label_set": result.label_set,
            "metric": result.metric,
        }
        baselines = {score.features: score.value for score in result.baselines}
        records.append(
            own
            | {"model": "this result", "protocol": result.protocol, "value": result.value}
            | {"low": low, "high": high, "features": result.features}
            | {"random_init": baselines.get(RANDOM), "log_mel_statistics": baselines.get(STATISTICS)}
            | {"store": result.store_name, "eval_clips": result.eval_clips, "step": result.step}
        )
        for row in published_rows(result):
            against = reasons_against(result, row)
            caveats = comparison_caveats(result, row)
            records.append(
                own
                | {"model": row.model, "protocol": row.protocol, "value": row.value}
                | {"comparable": comparison_verdict(against, caveats), "reasons": [*against, *caveats]}
            )
    schema = dict.fromkeys(("result", "model", "task", "label_set", "protocol", "metric"), pl.String())
    numbers = dict.fromkeys(("value", "low", "high"), pl.Float64())
    verdicts = {"comparable": pl.String(), "reasons": pl.List(pl.String()), "features": pl.String()}
    baseline_numbers = dict.fromkeys(("random_init", "log_mel_statistics"), pl.Float64())
    facts = {"store": pl.String(), "eval_clips": pl.Int64(), "step": pl.Int64()}
    return pl.DataFrame(records, schema={**schema, **numbers, **verdicts, **baseline_numbers, **facts})


def comparison_lines(result: OwnResult) -> list[str]:
    """The lines of one result: its number, the published numbers of its task from the best down, and all reasons."""
    interval = ""
    if result.interval is not None:
        interval = " [{:.3f} {:.3f}]".format(*result.interval)
    spread = ""
    if result.fold_deviation is not None:
        spread = f" ± {result.fold_deviation:.3f} over {result.folds} folds"
    return [
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
        *published_lines([result]),
    ]


def shared_lines(results: Sequence[OwnResult]) -> list[str]:
    """The lines of results that measured the same clips by the same probe: one table, the best first, then the runs.

    There is a row for each run and kind of features; the published numbers of the task follow.
    """
    # What they have in common. A path is never broken, so that it can be copied.
    first = results[0]
    wrapper = TextWrapper(TABLE_COLUMNS, break_on_hyphens=False, break_long_words=False)
    counts = sorted({result.train_clips for result in results if result.train_clips is not None})
    trained = f", trained on {' or '.join(map(str, counts))} clips" if counts else ""
    folds = f", mean over {first.folds} folds" if first.folds else ""
    task = "" if first.task is None else f"{first.task}: "
    lines = wrapper.wrap(
        f"{task}{first.eval_clips} clips of {first.store_name}, {first.label_set} labels{folds}, "
        f"{PROTOCOL_TITLES[first.protocol]}{trained}"
    )

    # The numbers, from the best down
    lines.append(f"  {METRIC_TITLES[first.metric]:{VALUE_COLUMNS}}  {'features':20} run")
    for score, result in sorted(feature_scores(results), key=lambda pair: -pair[0].value):
        cell = f"{score.value:.3f}"
        if score.interval is not None:
            cell += " [{:.3f} {:.3f}]".format(*score.interval)
        if score.fold_deviation is not None:
            cell += f" ± {score.fold_deviation:.3f}"
        lines.append(f"  {cell:{VALUE_COLUMNS}}  {score.features:20} {result.run_name}")
    if first.chance is not None:
        lines.append(f"  {f'{first.chance:.3f}':{VALUE_COLUMNS}}  chance")

    # The runs
    wrapper.initial_indent, wrapper.subsequent_indent = "  ", "    "
    for result in results:
        vectors = "" if result.pooling is None else f", pooling {result.pooling}, layer {result.layer}"
        lines += wrapper.wrap(
            f"{result.run_name}: step {result.step}{vectors}; "
            f"{describe_checkpoint_choice(result.checkpoint, result.chosen_by)}"
        )
    return lines + published_lines(results)


def feature_scores(results: Sequence[OwnResult]) -> Iterator[tuple[FeatureScore, OwnResult]]:
    """Yield the number of every result, and those of its baselines after it."""
    for result in results:
        own = FeatureScore(
            features=result.features,
            value=result.value,
            interval=result.interval,
            fold_deviation=result.fold_deviation,
        )
        yield own, result
        for score in result.baselines:
            yield score, result


def published_rows(result: OwnResult) -> list[PublishedResult]:
    """The published results of a result's task, in the order of the table."""
    return [row for row in published_results() if (row.task, row.metric) == (result.task, result.metric)]


def published_lines(results: Sequence[OwnResult]) -> list[str]:
    """The published results of the task of some results, the best first, and why they are or are not comparable.

    A reason that holds for some of the results only names these. Each reason gets a letter when it is first used.
    """
    lines = []
    letters: dict[str, str] = {}
    for row in sorted(published_rows(results[0]), key=lambda row: -row.value):
        against = collect_reasons(results, row, reasons_against)
        caveats = collect_reasons(results, row, comparison_caveats)
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
    wrapper = TextWrapper(
        78, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False, break_long_words=False
    )
    for reason, letter in letters.items():
        lines += wrapper.wrap(f"({letter}) {reason}")
    return lines


def collect_reasons(
    results: Sequence[OwnResult],
    row: PublishedResult,
    find_reasons: Callable[[OwnResult, PublishedResult], list[str]],
) -> list[str]:
    """The reasons of all results, each once; one that holds for some only is followed by their runs."""
    holders: dict[str, list[str]] = {}
    for result in results:
        for reason in find_reasons(result, row):
            holders.setdefault(reason, []).append(result.run_name)
    return [
        reason if len(names) == len(results) else f"{reason} ({', '.join(names)})"
        for reason, names in holders.items()
    ]


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
