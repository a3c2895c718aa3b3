"""HTML and SVG for pages: elements that escape every text, charts in the page's own colours, bars, tables, pictures.

Charts are inline SVG whose colours come from the page's style sheet, so that they follow its light and dark mode.
"""

import base64
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from numbers import Integral, Real
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import ArrayLike

VOID_ELEMENTS = {"input", "br"}  # elements without content and end tag

# Size of a chart in units of its view box: about the pixels of a phone.
CHART_WIDTH, CHART_HEIGHT = 360, 170

# Edges of the plot within a chart.
PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 40, 350, 8, 146

MAX_SPECTROGRAM_COLUMNS = 500  # a page shows a chart at most this many pixels wide

COLOUR_MAP = "magma"  # of spectrograms

COLOUR_LEVELS = 64  # colours of a spectrogram: more cannot be distinguished and cost bytes

AxisTick = tuple[float, str]  # place in the view box, label


class Markup(str):
    """Text that is HTML already; every other text is escaped when it becomes part of an element."""

    __slots__ = ()


def escape_markup(inner: object) -> Markup:
    """Any value as escaped text; an integer gets commas between its thousands."""
    if isinstance(inner, Markup):
        return inner
    if isinstance(inner, Integral):
        return Markup(f"{int(inner):,}")
    return Markup(escape(str(inner)))


def join_markup(*inner: object) -> Markup:
    """The parts one after another, each escaped."""
    return Markup("".join(escape_markup(part) for part in inner))


def html_tag(name: str, *inner: object, **attributes: object) -> Markup:
    """An element; `class_` and `stroke_width` become `class` and `stroke-width`, an attribute of None is left out."""
    # A trailing underscore allows names that Python reserves, such as `class_`.
    written = (
        f' {key.rstrip("_").replace("_", "-")}="{_attribute_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    start = f"<{name}{''.join(written)}>"
    if name in VOID_ELEMENTS:
        return Markup(start)
    return Markup(f"{start}{join_markup(*inner)}</{name}>")


def _attribute_value(value: object) -> str:
    """The text of an attribute; coordinates to a tenth of a unit, since more cannot be seen."""
    if isinstance(value, Real) and not isinstance(value, Integral):
        return f"{float(value):.1f}".removesuffix(".0")
    return escape(str(value))


def svg_chart(*inner: object, label: str, height: float = CHART_HEIGHT) -> Markup:
    """An SVG as wide as its place in the page; screen readers read `label` out."""
    view_box = f"0 0 {CHART_WIDTH} {height:g}"
    return html_tag("svg", *inner, viewBox=view_box, role="img", aria_label=label, class_="chart")


def svg_text(x: float, y: float, content: object, anchor: str = "middle") -> Markup:
    return html_tag("text", content, x=x, y=y, text_anchor=anchor)


def svg_line(x1: float, y1: float, x2: float, y2: float, css_class: str = "grid") -> Markup:
    return html_tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=css_class)


def svg_points(x_N: np.ndarray, y_N: np.ndarray) -> list[str]:
    """Points in the view box, each written as SVG's `x,y`."""
    return [f"{x:.1f},{y:.1f}" for x, y in zip(x_N, y_N, strict=True)]


def svg_axes(
    x_ticks: Sequence[AxisTick], y_ticks: Sequence[AxisTick], unit: str, *, bottom: float = PLOT_BOTTOM
) -> Iterator[Markup]:
    """Yield both axes: grid lines and labels at the ticks, and the unit of the x axis below it."""
    # Up the left edge, each with a line across the plot.
    for y, label in y_ticks:
        yield svg_line(PLOT_LEFT, y, PLOT_RIGHT, y)
        yield svg_text(PLOT_LEFT - 5, y + 3.5, label, "end")

    # Along the bottom, each with a short mark.
    for x, label in x_ticks:
        yield svg_line(x, bottom, x, bottom + 3, "axis")
        yield svg_text(x, bottom + 13, label)
    yield svg_line(PLOT_LEFT, bottom, PLOT_RIGHT, bottom, "axis")
    yield svg_text(PLOT_RIGHT, bottom + 23, unit, "end")


def scale_to_plot(values: ArrayLike, low: float, high: float, first: float, last: float) -> np.ndarray:
    """Map values from the range `low` to `high` to positions from `first` to `last`."""
    return first + (np.asarray(values, float) - low) / (high - low) * (last - first)


def x_in_plot(values: ArrayLike, low: float, high: float) -> np.ndarray:
    """Horizontal positions in the plot: `low` is at the left edge, `high` at the right edge."""
    return scale_to_plot(values, low, high, PLOT_LEFT, PLOT_RIGHT)


def y_in_plot(values: ArrayLike, low: float, high: float) -> np.ndarray:
    """Vertical positions in the plot: `low` is at the bottom, `high` at the top."""
    return scale_to_plot(values, low, high, PLOT_BOTTOM, PLOT_TOP)


def place_x_ticks(ticks: Iterable[tuple[float, str]], low: float, high: float) -> list[AxisTick]:
    """Labelled values as ticks of the x axis."""
    return [(float(x_in_plot(value, low, high)), label) for value, label in ticks]


def place_y_ticks(ticks: Iterable[tuple[float, str]], low: float, high: float) -> list[AxisTick]:
    """Labelled values as ticks of the y axis."""
    return [(float(y_in_plot(value, low, high)), label) for value, label in ticks]


def signed_number(number: float) -> str:
    """A number with a minus sign as wide as a plus sign."""
    return f"{number:g}".replace("-", "\N{MINUS SIGN}")


def short_count(count: float) -> str:
    """A count in about four characters: 1,234 is 1.23k."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def powers_of_ten(max_count: int) -> np.ndarray:
    """1, 10, 100, ... up to `max_count`."""
    return 10.0 ** np.arange(len(str(max_count)))


def histogram_chart(
    counts_N: np.ndarray, edges_N: np.ndarray, ticks: Sequence[float], unit: str, *, log_scale: bool = False
) -> Markup:
    """A bar between each two edges; on a logarithmic scale one clip is visible next to a million."""
    # The scale of the y axis and its ticks.
    max_count = max(int(counts_N.max()), 1)
    grow: Callable[[Any], Any] = np.float64
    tick_counts = np.unique([max(1, max_count // 2), max_count])
    if log_scale:
        grow = np.log1p
        tick_counts = powers_of_ten(max_count)
    top_value = float(grow(max_count))

    # A bar for every count that is not 0.
    top_N = y_in_plot(grow(counts_N), 0, top_value)
    x_N = x_in_plot(edges_N, edges_N[0], edges_N[-1])
    sides = zip(edges_N[:-1], edges_N[1:], x_N[:-1], x_N[1:], top_N, counts_N, strict=True)
    bars = [
        html_tag(
            "rect",
            html_tag("title", f"{low:g} to {high:g} {unit}: {count:,}"),
            x=left + 0.5,
            y=top,
            width=max(right - left - 1, 0.5),
            height=PLOT_BOTTOM - top,
            class_="bar",
        )
        for low, high, left, right, top, count in sides
        if count
    ]

    x_ticks = place_x_ticks([(tick, signed_number(tick)) for tick in ticks], edges_N[0], edges_N[-1])
    y_ticks = place_y_ticks([(grow(count), short_count(count)) for count in tick_counts], 0, top_value)
    return svg_chart(*svg_axes(x_ticks, y_ticks, unit), *bars, label=f"clips by {unit}")


def curve_chart(
    lines: Sequence[tuple[str, np.ndarray]], spread: tuple[np.ndarray, np.ndarray], ticks: Sequence[AxisTick]
) -> Markup:
    """A chart of every band's mean in nat: a line for each name, over the area between the two curves of `spread`.

    `ticks` are positions on the axis of bands, where band i extends from i to i + 1.
    """
    # The y axis covers the spread, in even numbers of nat.
    lower_F, upper_F = spread
    bands = len(lower_F)
    low = np.floor(lower_F.min() / 2) * 2
    high = np.ceil(upper_F.max() / 2) * 2
    step = max(2, round((high - low) / 5))
    y_ticks = place_y_ticks([(nat, signed_number(nat)) for nat in np.arange(low, high + 1, step)], low, high)
    x_ticks = place_x_ticks(ticks, 0, bands)

    # The outline of the spread runs along its lower curve and back along its upper one.
    x_F = x_in_plot(np.arange(bands) + 0.5, 0, bands)
    lower_points = svg_points(x_F, y_in_plot(lower_F, low, high))
    upper_points = svg_points(x_F[::-1], y_in_plot(upper_F, low, high)[::-1])
    area = html_tag(
        "polygon",
        html_tag("title", "mean ± standard deviation"),
        points=" ".join([*lower_points, *upper_points]),
        class_="spread",
    )

    # A line for every mean.
    curves = [
        html_tag(
            "polyline",
            html_tag("title", name),
            points=" ".join(svg_points(x_F, y_in_plot(mean_F, low, high))),
            class_=f"line line{number}",
        )
        for number, (name, mean_F) in enumerate(lines)
    ]
    axes = svg_axes(x_ticks, y_ticks, "Hz")
    return svg_chart(*axes, area, *curves, label="mean log mel power by band")


def spectrogram_chart(
    mel_TF: np.ndarray,
    value_range: tuple[float, float],
    ticks: Sequence[AxisTick],
    *,
    seconds: float,
    frame_seconds: float,
    valid_frames: int,
) -> Markup:
    """A spectrogram on an axis of `seconds`; frames beyond the clip's end are dimmed behind a line.

    `ticks` are positions on the axis of bands, where band i extends from i to i + 1.
    """
    frames, bands = mel_TF.shape
    second_width = (PLOT_RIGHT - PLOT_LEFT) / seconds
    width = frames * frame_seconds * second_width
    height = PLOT_BOTTOM - PLOT_TOP

    # Axes below, picture above.
    tick_seconds = np.arange(0, seconds + 1e-6, max(1, round(seconds / 5)))
    x_ticks = [(PLOT_LEFT + second * second_width, f"{second:g}") for second in tick_seconds]
    y_ticks = place_y_ticks(ticks, 0, bands)
    parts = [
        *svg_axes(x_ticks, y_ticks, "seconds"),
        svg_text(PLOT_LEFT - 5, PLOT_TOP + 7, "Hz", "end"),
        html_tag(
            "image",
            href=png_data_url(palette_png(average_frames(mel_TF), value_range)),
            preserveAspectRatio="none",
            x=PLOT_LEFT,
            y=PLOT_TOP,
            width=width,
            height=height,
        ),
    ]

    # The end of a shorter clip.
    if valid_frames < frames:
        end_x = PLOT_LEFT + valid_frames * frame_seconds * second_width
        rest_width = PLOT_LEFT + width - end_x
        parts += [
            html_tag("rect", x=end_x, y=PLOT_TOP, width=rest_width, height=height, class_="dimmed"),
            svg_line(end_x, PLOT_TOP, end_x, PLOT_BOTTOM, "end"),
        ]
    return svg_chart(*parts, label="log mel power over seconds and Hz")


def average_frames(mel_TF: np.ndarray) -> np.ndarray:
    """A spectrogram of at most MAX_SPECTROGRAM_COLUMNS frames: neighbouring frames are averaged if there are more."""
    frames, bands = mel_TF.shape
    frames_per_column = -(-frames // MAX_SPECTROGRAM_COLUMNS)
    divisible_TF = mel_TF[: frames - frames % frames_per_column]
    return divisible_TF.reshape(-1, frames_per_column, bands).mean(1)


def colour_scale_bar(value_range: tuple[float, float]) -> Markup:
    """A bar of the colours of spectrograms, with their values in nat."""
    low, high = value_range
    ramp = np.linspace(low, high, COLOUR_LEVELS)[:, None]
    bar = html_tag(
        "image",
        href=png_data_url(palette_png(ramp, value_range)),
        x=PLOT_LEFT,
        y=4,
        width=PLOT_RIGHT - PLOT_LEFT,
        height=8,
        preserveAspectRatio="none",
    )

    # About six whole numbers as ticks; the bar has no axes, only their labels.
    tick_nats = np.arange(np.ceil(low), high, max(1, round((high - low) / 6)))
    ticks = place_x_ticks([(nat, signed_number(nat)) for nat in tick_nats], low, high)
    labels = [svg_text(x, 24, label) for x, label in ticks]
    unit = svg_text(PLOT_RIGHT, 36, "log mel power, nat", "end")
    return svg_chart(bar, *labels, unit, label="colours", height=40)


def share_bar(parts: Sequence[tuple[str, int]]) -> Markup:
    """One bar of several shares, each a name and a count; the first share is the favourable one."""
    # A share of 0 has no element, but the label names it.
    total = max(sum(count for _, count in parts), 1)
    shares = (
        html_tag("i", class_=f"share{number}", style=f"flex:{count / total:.6f}", title=f"{name}: {count:,}")
        for number, (name, count) in enumerate(parts)
        if count
    )
    label = ", ".join(f"{name} {count:,}" for name, count in parts)
    return html_tag("div", *shares, class_="shares", role="img", aria_label=label)


def count_cell(count: int) -> Markup:
    """A table cell with a count; zeros are dimmed."""
    return html_tag("td", count, class_="n" if count else "n zero")


def count_bar_table(counts: Sequence[tuple[object, int]]) -> Markup:
    """A table of name, bar and count; the longest bar fills its column."""
    max_count = max((count for _, count in counts), default=1)
    rows = (
        html_tag(
            "tr",
            html_tag("th", name, scope="row"),
            html_tag("td", html_tag("i", style=f"width:{100 * count / max_count:.2f}%"), class_="count-bar"),
            html_tag("td", count, class_="n"),
        )
        for name, count in counts
    )
    return html_tag("table", join_markup(*rows), class_="bars")


def definition_list(pairs: Iterable[tuple[str, object]]) -> Markup:
    """Names and values as a list. Numbers get no commas between their thousands: a sampling rate needs none."""
    items = []
    for name, value in pairs:
        text = value if isinstance(value, Markup) else str(value)
        items.append(join_markup(html_tag("dt", name), html_tag("dd", text)))
    return html_tag("dl", *items)


def html_figure(picture: Markup, name: str, description: str, *, wide: bool = False) -> Markup:
    """A picture under its name and description; a wide one fills the width of the page."""
    caption = html_tag("figcaption", html_tag("b", name), html_tag("br"), description)
    return html_tag("figure", caption, picture, class_="wide" if wide else None)


def data_url(content: bytes, kind: str) -> str:
    """Bytes as a data URL, which needs no file beside the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png_data_url(png: bytes) -> str:
    """A PNG as a data URL."""
    return data_url(png, "image/png")


def palette_png(values_XY: np.ndarray, value_range: tuple[float, float]) -> bytes:
    """A PNG with a palette of COLOUR_LEVELS colours; the first axis runs to the right, the second upwards."""
    # Values become colour numbers; values beyond the range get the first or the last colour.
    low, high = value_range
    level_XY = (values_XY - low) / (high - low) * COLOUR_LEVELS
    pixels = np.clip(level_XY, 0, COLOUR_LEVELS - 1).astype(np.uint8).T[::-1]
    colours = matplotlib.colormaps[COLOUR_MAP](np.linspace(0, 1, COLOUR_LEVELS))[:, :3]
    palette = (colours * 255).round().astype(np.uint8)

    # The file: 8 bits per pixel, colours by number. Every line begins with its filter byte: 0 for no filter.
    lines = np.pad(pixels, ((0, 0), (1, 0)))
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 3, 0, 0, 0)
    content = zlib.compress(lines.tobytes(), 9)
    chunks = [(b"IHDR", head), (b"PLTE", palette.tobytes()), (b"IDAT", content), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, data) for kind, data in chunks)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
