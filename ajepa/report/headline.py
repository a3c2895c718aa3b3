"""The top of a run's page: its scores beside those of the baselines and chance, as bars with intervals."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ajepa.evaluate.features import RANDOM, STATISTICS, TRAINED
from ajepa.evaluate.metrics import MetricEstimate
from ajepa.evaluate.result import (
    CLASSIFIER_FEATURES,
    EVALUATION_FILE,
    METHOD_TITLES,
    METRIC_TITLES,
    PRIMARY_METRIC,
    Evaluation,
    Score,
)
from ajepa.training.meter import COMPUTE_COST_FILE
from ajepa.training.run import Run
from pipeline.report.durations import format_duration
from pipeline.report.html import (
    CHART_WIDTH,
    Markup,
    html_figure,
    html_tag,
    join_markup,
    svg_chart,
    svg_line,
    svg_text,
)
from pipeline.report.store_header import number_tile

# The number of each kind of features among the colours of the bars.
BAR_COLOURS = {TRAINED: 0, CLASSIFIER_FEATURES: 0, RANDOM: 1, STATISTICS: 2}

CHANCE_MARK = 3  # chance is a line, with its own mark in the legend

BAR_LEFT, BAR_RIGHT = 4.0, 232.0  # edges of the bars; to their right stand the numbers

BAR_HEIGHT, BAR_STEP, GROUP_HEAD = 11.0, 15.0, 20.0


def evaluation_files(run: Run) -> list[Path]:
    """The results in a run's folder: that of its own store first, then those of other stores and of probes."""
    own = run.path / EVALUATION_FILE
    others = sorted(set(run.path.glob(f"{own.stem}-*.json")))
    return [file for file in (own, *others) if file.exists()]


def headline_tiles(run: Run) -> Markup:
    """Large numbers: the first score and its rivals, then what the run cost."""
    tiles = []
    files = evaluation_files(run)
    if files:
        scores = Evaluation.read_json(files[0]).scores
        first = scores[0]
        rivals = [s for s in scores if (s.probe, s.label_set) == (first.probe, first.label_set)]
        metric = METRIC_TITLES[PRIMARY_METRIC[first.kind]]
        tiles += [
            number_tile(
                f"{score.primary_estimate.value:.3f}", f"{score.features}: {metric}, {method_text(score)}"
            )
            for score in rivals
        ]
        tiles.append(number_tile(f"{first.chance:.3f}", "chance"))

    # Only runs that got to a checkpoint have a record of their cost.
    cost_file = run.path / COMPUTE_COST_FILE
    if cost_file.exists():
        cost = json.loads(cost_file.read_text())
        tiles.append(
            number_tile(format_duration(3600 * cost["hours"]), f"{cost['flop']:.2g} FLOP, {cost['device']}")
        )
    return html_tag("div", *tiles, class_="tiles")


def method_text(score: Score) -> str:
    """How a score was measured, in a few words."""
    return f"{METHOD_TITLES[score.probe]}, {score.label_set} labels"


def headline_section(run: Run, store_name: str) -> Markup:
    """A chart for every result and label set, or the command that makes the first result."""
    files = evaluation_files(run)
    if not files:
        command = html_tag("code", f"ajepa-train evaluate --store {store_name} --run {run.path}")
        return html_tag("p", "Not evaluated yet: ", command, class_="warn")
    figures = []
    for file in files:
        evaluation = Evaluation.read_json(file)
        figures += [score_figure(evaluation, label_set) for label_set in evaluation.label_sets]
    note = "Lines: intervals of 95 % over the held-out clips."
    if run.is_finetuned and not any("probes" in file.stem for file in files):
        note += (
            f" For baselines: ajepa-train evaluate --store {store_name} --run {run.path} --probe linear --probe knn "
            "measures frozen features, and this page then shows them too."
        )
    return join_markup(html_tag("p", note, class_="soft"), html_tag("div", *figures, class_="scores"))


def score_figure(evaluation: Evaluation, label_set: str) -> Markup:
    """The scores of one label set, a group of bars for each probe."""
    scores = [score for score in evaluation.scores if score.label_set == label_set]
    first = scores[0]
    protocol = evaluation.protocol
    title = f"{METRIC_TITLES[PRIMARY_METRIC[first.kind]]} by {label_set} labels"
    description = f"{protocol.eval_clips:,} held-out clips of {protocol.store_name}, {first.classes} classes"
    if protocol.probes is not None:
        description += f"; pooling {protocol.probes.pooling}, layer {protocol.probes.layer}"

    kinds = list(dict.fromkeys(score.features for score in scores))
    marks = [(BAR_COLOURS.get(kind, 0), kind) for kind in kinds] + [
        (CHANCE_MARK, f"chance {first.chance:.3f}")
    ]
    keys = (html_tag("span", html_tag("i", class_=f"mark mark{mark}"), name) for mark, name in marks)
    picture = join_markup(html_tag("p", *keys, class_="legend"), score_bars(scores, first.chance))
    return html_figure(picture, title, description)


def score_bars(scores: Sequence[Score], chance: float) -> Markup:
    """Horizontal bars with intervals, grouped by probe; a dashed line at chance."""
    # The scale ends at the next tenth above the largest interval.
    highest = max(max(score.primary_estimate.high, score.primary_estimate.value) for score in scores)
    end = min(1.0, np.ceil(10 * highest + 0.2) / 10)

    def x_of(value: float) -> float:
        return BAR_LEFT + (BAR_RIGHT - BAR_LEFT) * float(np.clip(value / end, 0, 1))

    # The bars, from the top down.
    parts = []
    top = 0.0
    for probe in dict.fromkeys(score.probe for score in scores):
        parts.append(html_tag("text", METHOD_TITLES[probe], x=BAR_LEFT, y=top + 14, class_="group"))
        top += GROUP_HEAD
        for score in scores:
            if score.probe == probe:
                colour = BAR_COLOURS.get(score.features, 0)
                parts += score_bar(score.primary_estimate, x_of, top, colour, score.features)
                top += BAR_STEP

    # The axis below, and the line at chance behind nothing.
    ticks = np.linspace(0, end, 3)
    axis = [svg_text(x_of(tick), top + 17, f"{tick:.2g}") for tick in ticks[1:]]
    axis += [
        svg_text(BAR_LEFT, top + 17, "0", "start"),
        svg_line(BAR_LEFT, top + 5, BAR_RIGHT, top + 5, "axis"),
    ]
    axis.append(svg_line(x_of(chance), 4, x_of(chance), top + 5, "chance"))
    label = "; ".join(
        f"{score.features}, {METHOD_TITLES[score.probe]}: {score.primary_estimate.value:.3f}"
        for score in scores
    )
    return svg_chart(*parts, *axis, label=label, height=top + 22)


def score_bar(
    estimate: MetricEstimate, x_of: Callable[[float], float], top: float, colour: int, name: str
) -> list[Markup]:
    """A bar, its interval, and its numbers at the right edge."""
    middle = top + BAR_HEIGHT / 2
    text = f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
    return [
        html_tag(
            "rect",
            html_tag("title", f"{name}: {text}"),
            x=BAR_LEFT,
            y=top,
            width=max(1.0, x_of(estimate.value) - BAR_LEFT),
            height=BAR_HEIGHT,
            class_=f"bar{colour}",
        ),
        svg_line(x_of(estimate.low), middle, x_of(estimate.high), middle, "interval"),
        html_tag("text", text, x=CHART_WIDTH - 2.0, y=middle + 3.5, text_anchor="end", class_="value"),
    ]
