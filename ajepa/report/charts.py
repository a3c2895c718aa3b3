"""Charts of a run for its page: curves over steps, a map of clips, pictures within the page; inline SVG.

The scores of a run as its page shows them: every probe, and every class under each label set side by side.
"""

import base64
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
    scale_to_plot,
    short_count,
    signed_number,
    svg_axes,
    svg_chart,
    svg_points,
)

MAX_CURVE_POINTS = 400  # of a curve: more cannot be seen

CLIP_MAP_SIDE = 340.0

CLIP_MAP_COLOURS = 10  # of a map; what is rarer is grey

ROUND_STEP_FACTORS = (1, 2, 2.5, 5, 10)


def curves_over_steps(step_N: np.ndarray, curves: Sequence[tuple[str, np.ndarray]], unit: str) -> Markup:
    """Values over steps, one line each; a curve may have nan where nothing was measured."""
    finite = np.concatenate([values_N[np.isfinite(values_N)] for _, values_N in curves])
    low, high = round_axis_range(float(finite.min()), float(finite.max()))
    last = max(float(step_N[-1]), 1.0)
    up = [
        (float(scale_to_plot(n, low, high, PLOT_BOTTOM, PLOT_TOP)), format_three_digits(n))
        for n in np.linspace(low, high, 5)
    ]
    across = [
        (float(scale_to_plot(n, 0, last, PLOT_LEFT, PLOT_RIGHT)), short_count(n))
        for n in np.linspace(0, last, 5)
    ]
    drawn = []
    for number, (name, values_N) in enumerate(curves):
        there_N = np.flatnonzero(np.isfinite(values_N))
        there_N = there_N[np.linspace(0, len(there_N) - 1, min(MAX_CURVE_POINTS, len(there_N))).astype(int)]
        x_N = scale_to_plot(step_N[there_N], 0, last, PLOT_LEFT, PLOT_RIGHT)
        y_N = scale_to_plot(values_N[there_N], low, high, PLOT_BOTTOM, PLOT_TOP)
        line = {"points": " ".join(svg_points(x_N, y_N)), "class_": f"line line{number}"}
        drawn.append(html_tag("polyline", html_tag("title", name), **line))
    label = f"{', '.join(name for name, _ in curves)} over steps"
    return svg_chart(*svg_axes(across, up, unit), *drawn, label=label, height=CHART_HEIGHT + 4)


def round_axis_range(low: float, high: float) -> tuple[float, float]:
    """The range in round numbers, in four equal parts."""
    span = (high - low) or abs(high) or 1.0
    size = 10.0 ** np.floor(np.log10(span / 4))
    for step in (size * factor for factor in ROUND_STEP_FACTORS):
        start = np.floor(low / step) * step
        if start + 4 * step >= high:
            return float(start), float(start + 4 * step)
    return low, high


def format_three_digits(number: float) -> str:
    """At most three digits, with a minus as wide as a plus."""
    if 0 < abs(number) < 0.01:
        digits, power = f"{number:.1e}".split("e")
        return f"{signed_number(float(digits))}e{signed_number(int(power))}"
    return signed_number(float(f"{number:.3g}")) if abs(number) < 1000 else short_count(number)


def curve_legend(names: Sequence[str]) -> Markup:
    """Which line is which."""
    keys = (html_tag("span", html_tag("i", class_=f"key key{n}"), name) for n, name in enumerate(names))
    return html_tag("p", *keys, class_="legend")


def clip_map_chart(
    position_N2: np.ndarray,
    group_N: np.ndarray,
    names: Sequence[str],
    titles: Sequence[str],
    mels: Sequence[str],
) -> Markup:
    """Clips as dots: `group_N` chooses the colour (-1: none), pointing at one shows its title and its mel."""
    low_2, high_2 = position_N2.min(0), position_N2.max(0)
    at_N2 = 8 + (position_N2 - low_2) / np.maximum(high_2 - low_2, 1e-9) * (CLIP_MAP_SIDE - 16)
    dots = [
        html_tag(
            "circle",
            html_tag("title", title),
            cx=x,
            cy=y,
            r=3.4,
            class_=f"dot dot{group}",
            data_mel=mel,
            tabindex=0,
        )
        for (x, y), group, title, mel in zip(at_N2, group_N.tolist(), titles, mels, strict=True)
    ]
    keys = [html_tag("span", html_tag("i", class_=f"spot spot{n}"), name) for n, name in enumerate(names)]
    box = f"0 0 {CLIP_MAP_SIDE:g} {CLIP_MAP_SIDE:g}"
    drawn = html_tag(
        "svg", *dots, viewBox=box, role="img", aria_label="clips by what the encoder says", class_="map"
    )
    return join_markup(
        html_tag("p", *keys, class_="legend"),
        html_tag("div", drawn, html_tag("output", class_="shown"), class_="mapped"),
    )


def mel_data_url(mel_TF: np.ndarray, span: tuple[float, float], *, frames: int = 80) -> str:
    """A small spectrogram as a data address, low bands below."""
    wide = max(1, len(mel_TF) // frames)
    thin_TF = mel_TF[: len(mel_TF) - len(mel_TF) % wide].reshape(-1, wide, mel_TF.shape[1]).mean(1)
    pairs_TF = thin_TF[:, : thin_TF.shape[1] - thin_TF.shape[1] % 2].reshape(len(thin_TF), -1, 2).mean(2)
    return png_data_url(palette_png(pairs_TF, span))


def figure_data_url(figure: Figure, *, dpi: int = 110) -> str:
    """A drawn figure as a data address."""
    file = io.BytesIO()
    figure.savefig(file, dpi=dpi, format="png")
    return png_data_url(file.getvalue())


def png_data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def heat_map_data_url(values_XY: np.ndarray, span: tuple[float, float], *, scale: int = 8) -> str:
    """A grid as a picture, the first axis to the right, the second upwards; nan is clear."""
    shade_XY4 = matplotlib.colormaps["viridis"](np.clip((values_XY - span[0]) / (span[1] - span[0]), 0, 1))
    shade_XY4[~np.isfinite(values_XY)] = 0.0
    pixels = np.kron(shade_XY4.swapaxes(0, 1)[::-1], np.ones((scale, scale, 1)))
    file = io.BytesIO()
    matplotlib.image.imsave(file, pixels, format="png")
    return png_data_url(file.getvalue())


def scores_section(file: Path) -> Markup:
    """What `ajepa-train evaluate` found, or how to have it."""
    if not file.exists():
        command = html_tag("code", f"ajepa-train evaluate --store STORE --run {file.parent}")
        return html_tag("p", "Not evaluated yet: ", command, class_="warn")
    evaluation = Evaluation.read_json(file)
    note = f"{'; '.join(evaluation.describe_protocol())}."
    tables = (probe_scores_table(evaluation, name) for name in evaluation.label_sets)
    return join_markup(html_tag("p", note, class_="soft"), *tables, class_scores_table(evaluation))


def probe_scores_table(evaluation: Evaluation, label_set: str) -> Markup:
    """Every probe on every kind of features, all metrics."""
    scores = [score for score in evaluation.scores if score.label_set == label_set]
    names = list(scores[0].metrics)
    heads = [html_tag("th", METRIC_TITLES[name], scope="col", class_="n") for name in names]
    rows = [
        html_tag(
            "tr",
            html_tag("th", f"{score.features}, {METHOD_TITLES[score.probe]}", scope="row"),
            *(html_tag("td", format_estimate(score.metrics[name]), class_="n") for name in names),
        )
        for score in scores
    ]
    one = scores[0]
    told = f"{one.classes} classes" + (f", {one.skipped} without an eval clip" if one.skipped else "")
    title = html_tag(
        "h3", f"{label_set} labels", html_tag("span", f" · {told}, chance {one.chance:.3f}", class_="soft")
    )
    inner = html_tag(
        "table", html_tag("thead", html_tag("tr", html_tag("th", ""), *heads)), html_tag("tbody", *rows)
    )
    return join_markup(title, html_tag("div", inner, class_="scroll"))


def format_estimate(estimate: MetricEstimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def class_scores_table(evaluation: Evaluation) -> Markup:
    """Average precision of the encoder's first probe class by class, a column for each label set."""
    first = evaluation.scores[0]
    sets = {name: evaluation.find_score(first.features, first.probe, name) for name in evaluation.label_sets}
    heads = (
        html_tag("th", html_tag("button", name, type="button"), scope="col", class_="n" if place else None)
        for place, name in enumerate(["class", *sets])
    )
    rows = (
        html_tag(
            "tr",
            html_tag("th", name, scope="row"),
            *(class_score_cell(score, index) for score in sets.values()),
        )
        for index, (_, name) in enumerate(evaluation.classes)
        if any(score.per_class_ap[index] is not None for score in sets.values())
    )
    title = html_tag(
        "h3", f"Average precision of every class ({first.features}, {METHOD_TITLES[first.probe]})"
    )
    inner = html_tag(
        "table", html_tag("thead", html_tag("tr", *heads)), html_tag("tbody", *rows), data_sorted=""
    )
    return join_markup(title, html_tag("div", inner, class_="box"))


def class_score_cell(score: Score, index: int) -> Markup:
    value = score.per_class_ap[index]
    return html_tag("td", "" if value is None else f"{value:.3f}", class_="n")
