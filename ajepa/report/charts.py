"""Parts of a run's HTML page: curves over steps and a map of clips as inline SVG, pictures, and tables of scores."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ajepa.evaluate.metrics import MetricEstimate
from ajepa.evaluate.result import METHOD_TITLES, METRIC_TITLES, Evaluation, Score
from pipeline.report.html import (
    CHART_HEIGHT,
    PLOT_BOTTOM,
    PLOT_LEFT,
    PLOT_RIGHT,
    PLOT_TOP,
    Markup,
    html_tag,
    join_markup,
    palette_png,
    png_data_url,
    scale_to_plot,
    short_count,
    signed_number,
    svg_axes,
    svg_chart,
    svg_line,
    svg_points,
)

MAX_CURVE_POINTS = 400  # points drawn of a curve: more cannot be seen

AXIS_PARTS = 4

ROUND_STEP_FACTORS = (1, 2, 2.5, 5, 10)  # the length of an axis part is one of these times a power of ten

SMOOTHING_PARTS = 12  # a curve is smoothed over this part of its points

MIN_SMOOTHED_POINTS = 20  # shorter curves are shown as they are


def curves_over_steps(
    step_N: np.ndarray,
    curves: Sequence[tuple[str, np.ndarray]],
    unit: str,
    *,
    baselines: Sequence[tuple[str, int, float]] = (),
    smooth: bool = True,
) -> Markup:
    """Return a chart of values over steps, a line for each name; nan marks steps at which nothing was measured.

    A long curve is faint, and its running mean is drawn over it, unless `smooth` is false. `baselines` are dashed
    lines: name, number of the curve whose colour they have, and value.
    """
    # The axes.
    finite_N = np.concatenate(
        [*(values_N[np.isfinite(values_N)] for _, values_N in curves), [value for *_, value in baselines]]
    )
    low, high = round_axis_range(float(finite_N.min()), float(finite_N.max()))
    last = max(float(step_N[-1]), 1.0)
    y_ticks = [
        (float(scale_to_plot(value, low, high, PLOT_BOTTOM, PLOT_TOP)), format_three_digits(value))
        for value in np.linspace(low, high, AXIS_PARTS + 1)
    ]
    x_ticks = [
        (float(scale_to_plot(step, 0, last, PLOT_LEFT, PLOT_RIGHT)), short_count(step))
        for step in whole_number_ticks(last)
    ]

    # The lines, each through the finite values of a curve, or through a part of them if there are many.
    lines = [
        svg_line(PLOT_LEFT, y, PLOT_RIGHT, y, f"line line{number} base")
        for _, number, value in baselines
        for y in [float(scale_to_plot(value, low, high, PLOT_BOTTOM, PLOT_TOP))]
    ]
    for number, (name, values_N) in enumerate(curves):
        known_N = np.flatnonzero(np.isfinite(values_N))
        smooth_N = values_N[known_N]
        is_smoothed = smooth and len(known_N) >= MIN_SMOOTHED_POINTS
        if is_smoothed:
            smooth_N = running_mean(smooth_N, len(known_N) // SMOOTHING_PARTS)
        point_count = min(MAX_CURVE_POINTS, len(known_N))
        place_N = np.linspace(0, len(known_N) - 1, point_count).astype(int)
        x_N = scale_to_plot(step_N[known_N[place_N]], 0, last, PLOT_LEFT, PLOT_RIGHT)
        drawn = [(values_N[known_N[place_N]], " faint")] if is_smoothed else []
        for y_values_N, css_class in [*drawn, (smooth_N[place_N], "")]:
            y_N = scale_to_plot(y_values_N, low, high, PLOT_BOTTOM, PLOT_TOP)
            points = " ".join(svg_points(x_N, y_N))
            lines.append(
                html_tag(
                    "polyline", html_tag("title", name), points=points, class_=f"line line{number}{css_class}"
                )
            )
    label = f"{', '.join(name for name, _ in curves)} over steps"
    return svg_chart(*svg_axes(x_ticks, y_ticks, unit), *lines, label=label, height=CHART_HEIGHT + 4)


def running_mean(value_N: np.ndarray, width: int) -> np.ndarray:
    """Return the running mean: the mean of each value and of up to `width` values before it."""
    # Differences of cumulative sums, so that the cost does not grow with the width.
    total_N = np.cumsum(np.concatenate([[0.0], value_N]))
    end_N = np.arange(1, len(value_N) + 1)
    start_N = np.maximum(0, end_N - width - 1)
    return (total_N[end_N] - total_N[start_N]) / (end_N - start_N)


def whole_number_ticks(last: float) -> list[float]:
    """Return four to ten whole, round numbers from 0 up to `last`; 0 and 1 where `last` is below 2."""
    part = max(1.0, 10.0 ** np.floor(np.log10(last / AXIS_PARTS)))
    for factor in ROUND_STEP_FACTORS:
        step = part * factor
        if step.is_integer() and last / step <= AXIS_PARTS + 1:
            return [float(tick) for tick in np.arange(0, last + 1e-9, step)]
    return [0.0, last]


def round_axis_range(low: float, high: float) -> tuple[float, float]:
    """Return the smallest range that contains [low, high] and whose four equal parts begin at round numbers."""
    # For a single value, invent a range.
    span = (high - low) or abs(high) or 1.0
    power_of_ten = 10.0 ** np.floor(np.log10(span / AXIS_PARTS))
    for factor in ROUND_STEP_FACTORS:
        part = power_of_ten * factor
        start = np.floor(low / part) * part
        if start + AXIS_PARTS * part >= high:
            return float(start), float(start + AXIS_PARTS * part)
    return low, high


def format_three_digits(number: float) -> str:
    """Return the number with at most three digits, and with a minus sign as wide as a plus sign."""
    # Small numbers get an exponent: 3.0e-5.
    if 0 < abs(number) < 0.01:
        digits, power = f"{number:.1e}".split("e")
        return f"{signed_number(float(digits))}e{signed_number(int(power))}"
    if abs(number) < 1000:
        return signed_number(float(f"{number:.3g}"))
    return short_count(number)


def curve_legend(names: Sequence[str]) -> Markup:
    """Return a legend of the curves: each name with its colour."""
    return colour_legend("key", names)


def colour_legend(css_class: str, names: Sequence[str]) -> Markup:
    """Return a legend of names; the page's style sheet has the colour of each CSS class and number."""
    keys = (
        html_tag("span", html_tag("i", class_=f"{css_class} {css_class}{number}"), name)
        for number, name in enumerate(names)
    )
    return html_tag("p", *keys, class_="legend")


def mel_data_url(mel_TF: np.ndarray, span: tuple[float, float], *, frames: int = 80) -> str:
    """Return a small spectrogram as a data URL, low bands below; a pixel is the mean of some frames and two bands."""
    # At least `frames` columns, if the spectrogram has that many frames.
    frames_per_column = max(1, len(mel_TF) // frames)
    used_frames = len(mel_TF) - len(mel_TF) % frames_per_column
    mel_TF = mel_TF[:used_frames].reshape(-1, frames_per_column, mel_TF.shape[1]).mean(1)

    used_bands = mel_TF.shape[1] - mel_TF.shape[1] % 2
    mel_TF = mel_TF[:, :used_bands].reshape(len(mel_TF), -1, 2).mean(2)
    return png_data_url(palette_png(mel_TF, span))


def figure_data_url(figure: Figure, *, dpi: int = 110) -> str:
    """Return a figure as a data URL."""
    file = io.BytesIO()
    figure.savefig(file, dpi=dpi, format="png")
    return png_data_url(file.getvalue())


def heat_map_data_url(values_XY: np.ndarray, span: tuple[float, float], *, scale: int = 8) -> str:
    """Return a grid as a picture: first axis to the right, second upwards, `scale` pixels a cell, nan transparent."""
    low, high = span
    colour_XY4 = matplotlib.colormaps["viridis"](np.clip((values_XY - low) / (high - low), 0, 1))
    colour_XY4[~np.isfinite(values_XY)] = 0.0

    # The rows of a picture are counted from the top.
    pixels = np.kron(colour_XY4.swapaxes(0, 1)[::-1], np.ones((scale, scale, 1)))
    file = io.BytesIO()
    matplotlib.image.imsave(file, pixels, format="png")
    return png_data_url(file.getvalue())


def scores_section(file: Path) -> Markup:
    """Return the scores that `ajepa-train evaluate` saved in a file, or, without a file, the command to run."""
    if not file.exists():
        command = html_tag("code", f"ajepa-train evaluate --store STORE --run {file.parent}")
        return html_tag("p", "Not evaluated yet: ", command, class_="warn")
    evaluation = Evaluation.read_json(file)
    note = f"{'; '.join(evaluation.describe_protocol())}."
    probe_tables = (probe_scores_table(evaluation, label_set) for label_set in evaluation.label_sets)
    return join_markup(html_tag("p", note, class_="soft"), *probe_tables, class_scores_table(evaluation))


def probe_scores_table(evaluation: Evaluation, label_set: str) -> Markup:
    """Return a table with a row for each probe and kind of features, and a column for each metric."""
    scores = [score for score in evaluation.scores if score.label_set == label_set]

    # The title, with the numbers that all scores have in common.
    first = scores[0]
    facts = f"{first.classes} classes"
    if first.skipped:
        facts += f", {first.skipped} without an eval clip"
    title = html_tag(
        "h3",
        f"{label_set} labels",
        html_tag("span", f" · {facts}, chance {first.chance:.3f}", class_="soft"),
    )

    # A row for each probe and kind of features.
    metrics = list(first.metrics)
    heads = [html_tag("th", METRIC_TITLES[metric], scope="col", class_="n") for metric in metrics]
    rows = [
        html_tag(
            "tr",
            html_tag("th", f"{score.features}, {METHOD_TITLES[score.probe]}", scope="row"),
            *(html_tag("td", format_estimate(score.metrics[metric]), class_="n") for metric in metrics),
        )
        for score in scores
    ]
    head = html_tag("thead", html_tag("tr", html_tag("th", ""), *heads))
    table = html_tag("table", head, html_tag("tbody", *rows))
    return join_markup(title, html_tag("div", table, class_="scroll"))


def format_estimate(estimate: MetricEstimate) -> str:
    """Return the value with its interval."""
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def class_scores_table(evaluation: Evaluation) -> Markup:
    """Return a table of the average precision of each class: the encoder's first probe, a column for each label set."""
    first = evaluation.scores[0]
    title = html_tag(
        "h3", f"Average precision of every class ({first.features}, {METHOD_TITLES[first.probe]})"
    )
    score_by_label_set = {
        label_set: evaluation.find_score(first.features, first.probe, label_set)
        for label_set in evaluation.label_sets
    }
    scores = list(score_by_label_set.values())

    # Each column head is a button that sorts by the column. All heads but the first are right-aligned, like numbers.
    heads = [
        html_tag("th", html_tag("button", name, type="button"), scope="col", class_="n" if column else None)
        for column, name in enumerate(["class", *score_by_label_set])
    ]

    # Classes without a score are left out.
    rows = [
        html_tag(
            "tr", html_tag("th", name, scope="row"), *(class_score_cell(score, index) for score in scores)
        )
        for index, (_, name) in enumerate(evaluation.classes)
        if any(score.per_class_ap[index] is not None for score in scores)
    ]
    head = html_tag("thead", html_tag("tr", *heads))
    table = html_tag("table", head, html_tag("tbody", *rows), data_sorted="")
    return join_markup(title, html_tag("div", table, class_="box"))


def class_score_cell(score: Score, index: int) -> Markup:
    """Return a table cell with the average precision of one class; empty if it was not measured."""
    value = score.per_class_ap[index]
    return html_tag("td", "" if value is None else f"{value:.3f}", class_="n")
