"""Markup: HTML and SVG put together so that whatever comes from files is escaped.

Charts for the page: inline SVG in the page's own colours, so that they follow light and dark.
"""

import base64
import struct
import zlib
from collections.abc import Iterator, Sequence
from html import escape
from numbers import Integral, Real

import matplotlib
import numpy as np
from numpy.typing import ArrayLike

VOID_ELEMENTS = {"input", "br"}  # they end where they begin


class Markup(str):
    """HTML already; any other text is escaped when it becomes part of some."""

    __slots__ = ()


def escape_markup(inner: object) -> Markup:
    """Text, escaped; integers with their thousands told apart."""
    if isinstance(inner, Markup):
        return inner
    return Markup(escape(f"{int(inner):,}" if isinstance(inner, Integral) else str(inner)))


def join_markup(*inner: object) -> Markup:
    """One after another."""
    return Markup("".join(escape_markup(part) for part in inner))


def html_tag(name: str, *inner: object, **attributes: object) -> Markup:
    """An element; `class_` and `stroke_width` become `class` and `stroke-width`, attributes that are None vanish."""
    written = (
        f' {key.rstrip("_").replace("_", "-")}="{_attribute_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    start = f"<{name}{''.join(written)}>"
    return Markup(start) if name in VOID_ELEMENTS else Markup(f"{start}{join_markup(*inner)}</{name}>")


def _attribute_value(value: object) -> str:
    """Coordinates to a tenth of a unit: more cannot be seen."""
    if isinstance(value, Real) and not isinstance(value, Integral):
        return f"{float(value):.1f}".removesuffix(".0")
    return escape(str(value))


CHART_WIDTH, CHART_HEIGHT = 360, 170  # in the units of the view box: about a phone's pixels

PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 40, 350, 8, 146  # the plot's edges

COLOUR_LEVELS = 64  # colours of a spectrogram: more cannot be told apart and cost bytes

AxisTick = tuple[float, str]  # where, and what is written there


def svg_chart(*inner: object, label: str, height: float = CHART_HEIGHT) -> Markup:
    """An SVG that takes the width it is given."""
    box = f"0 0 {CHART_WIDTH} {height:g}"
    return html_tag("svg", *inner, viewBox=box, role="img", aria_label=label, class_="chart")


def svg_text(x: float, y: float, content: object, anchor: str = "middle") -> Markup:
    return html_tag("text", content, x=x, y=y, text_anchor=anchor)


def svg_line(x1: float, y1: float, x2: float, y2: float, css_class: str = "grid") -> Markup:
    return html_tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=css_class)


def svg_axes(
    x_ticks: Sequence[AxisTick], y_ticks: Sequence[AxisTick], unit: str, *, bottom: float = PLOT_BOTTOM
) -> Iterator[Markup]:
    """Grid lines and labels at places in the view box; the unit stands below."""
    for y, words in y_ticks:
        yield svg_line(PLOT_LEFT, y, PLOT_RIGHT, y)
        yield svg_text(PLOT_LEFT - 5, y + 3.5, words, "end")
    for x, words in x_ticks:
        yield svg_line(x, bottom, x, bottom + 3, "axis")
        yield svg_text(x, bottom + 13, words)
    yield svg_line(PLOT_LEFT, bottom, PLOT_RIGHT, bottom, "axis")
    yield svg_text(PLOT_RIGHT, bottom + 23, unit, "end")


def scale_to_plot(values: ArrayLike, low: float, high: float, first: float, last: float) -> np.ndarray:
    """Values between `low` and `high` as places between `first` and `last`."""
    return first + (np.asarray(values, float) - low) / (high - low) * (last - first)


def histogram_chart(
    counts_N: np.ndarray, edges_N: np.ndarray, ticks: Sequence[float], unit: str, *, log_scale: bool = False
) -> Markup:
    """Bars between edges; on a logarithmic scale a single clip can be seen beside a million."""
    most = max(int(counts_N.max()), 1)
    up_N = powers_of_ten(most) if log_scale else np.array([most / 2, most] if most > 1 else [most])
    grow = np.log1p if log_scale else np.float64
    tops_N = scale_to_plot(grow(counts_N), 0, float(grow(most)), PLOT_BOTTOM, PLOT_TOP)
    x_N = scale_to_plot(edges_N, edges_N[0], edges_N[-1], PLOT_LEFT, PLOT_RIGHT)
    bars = [
        html_tag(
            "rect",
            html_tag("title", f"{low:g} to {high:g} {unit}: {count:,}"),
            x=x + 0.5,
            y=top,
            width=max(after - x - 1, 0.5),
            height=PLOT_BOTTOM - top,
            class_="bar",
        )
        for low, high, x, after, top, count in zip(
            edges_N[:-1], edges_N[1:], x_N[:-1], x_N[1:], tops_N, counts_N, strict=True
        )
        if count
    ]
    across = list(
        zip(
            scale_to_plot(np.array(ticks), edges_N[0], edges_N[-1], PLOT_LEFT, PLOT_RIGHT),
            map(signed_number, ticks),
            strict=True,
        )
    )
    up = [
        (float(scale_to_plot(grow(n), 0, float(grow(most)), PLOT_BOTTOM, PLOT_TOP)), short_count(n))
        for n in up_N
    ]
    return svg_chart(*svg_axes(across, up, unit), *bars, label=f"clips by {unit}")


def powers_of_ten(max_count: int) -> np.ndarray:
    """1, 10, 100, ... up to `most`."""
    return 10.0 ** np.arange(len(str(max_count)))


def short_count(count: float) -> str:
    """A count of at most four letters or so: 1,234 is 1.2k."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def curve_chart(
    lines: Sequence[tuple[str, np.ndarray]], spread: tuple[np.ndarray, np.ndarray], ticks: Sequence[AxisTick]
) -> Markup:
    """Means per band, one line each, over the `spread` of the first; ticks at bands."""
    bands = len(spread[0])
    low, high = np.floor(spread[0].min() / 2) * 2, np.ceil(spread[1].max() / 2) * 2
    x_F = scale_to_plot(np.arange(bands) + 0.5, 0, bands, PLOT_LEFT, PLOT_RIGHT)
    y = [scale_to_plot(side_F, low, high, PLOT_BOTTOM, PLOT_TOP) for side_F in spread]
    outline = [*svg_points(x_F, y[0]), *svg_points(x_F[::-1], y[1][::-1])]
    step = max(2, round((high - low) / 5))
    up = [
        (float(scale_to_plot(n, low, high, PLOT_BOTTOM, PLOT_TOP)), signed_number(n))
        for n in np.arange(low, high + 1, step)
    ]
    across = [(float(scale_to_plot(place, 0, bands, PLOT_LEFT, PLOT_RIGHT)), name) for place, name in ticks]
    drawn = [
        html_tag(
            "polyline",
            html_tag("title", name),
            points=" ".join(svg_points(x_F, scale_to_plot(mean_F, low, high, PLOT_BOTTOM, PLOT_TOP))),
            class_=f"line line{number}",
        )
        for number, (name, mean_F) in enumerate(lines)
    ]
    area = html_tag(
        "polygon", html_tag("title", "mean ± standard deviation"), points=" ".join(outline), class_="spread"
    )
    return svg_chart(*svg_axes(across, up, "Hz"), area, *drawn, label="mean log mel power by band")


def signed_number(number: float) -> str:
    """With a minus as wide as a plus."""
    return f"{number:g}".replace("-", "\N{MINUS SIGN}")


def svg_points(x_N: np.ndarray, y_N: np.ndarray) -> list[str]:
    return [f"{x:.1f},{y:.1f}" for x, y in zip(x_N, y_N, strict=True)]


def spectrogram_chart(
    mel_TF: np.ndarray,
    value_range: tuple[float, float],
    ticks: Sequence[AxisTick],
    *,
    seconds: float,
    frame_seconds: float,
    valid_frames: int,
) -> Markup:
    """A spectrogram on an axis of `seconds`; a line marks where the clip's own frames end, the rest is dimmed."""
    frames, bands = mel_TF.shape
    wide = -(-frames // 500)  # a page is at most so many pixels wide
    thin_TF = mel_TF[: frames - frames % wide].reshape(-1, wide, bands).mean(1)
    source = f"data:image/png;base64,{base64.b64encode(palette_png(thin_TF, value_range)).decode()}"
    second = (PLOT_RIGHT - PLOT_LEFT) / seconds
    width, x = frames * frame_seconds * second, PLOT_LEFT + valid_frames * frame_seconds * second
    place = {"x": PLOT_LEFT, "y": PLOT_TOP, "width": width, "height": PLOT_BOTTOM - PLOT_TOP}
    up = [(float(scale_to_plot(at, 0, bands, PLOT_BOTTOM, PLOT_TOP)), name) for at, name in ticks]
    across = [
        (PLOT_LEFT + n * second, f"{n:g}") for n in np.arange(0, seconds + 1e-6, max(1, round(seconds / 5)))
    ]
    parts = [*svg_axes(across, up, "seconds"), svg_text(PLOT_LEFT - 5, PLOT_TOP + 7, "Hz", "end")]
    parts += [html_tag("image", href=source, preserveAspectRatio="none", **place)]
    if valid_frames < frames:
        rest = {"x": x, "y": PLOT_TOP, "width": PLOT_LEFT + width - x, "height": PLOT_BOTTOM - PLOT_TOP}
        parts += [html_tag("rect", **rest, class_="dimmed"), svg_line(x, PLOT_TOP, x, PLOT_BOTTOM, "end")]
    return svg_chart(*parts, label="log mel power over seconds and Hz")


def colour_scale_bar(value_range: tuple[float, float]) -> Markup:
    """What the colours of spectrograms mean, in nat."""
    ramp = np.linspace(*value_range, COLOUR_LEVELS)[:, None]
    source = f"data:image/png;base64,{base64.b64encode(palette_png(ramp, value_range)).decode()}"
    bar = html_tag(
        "image",
        href=source,
        x=PLOT_LEFT,
        y=4,
        width=PLOT_RIGHT - PLOT_LEFT,
        height=8,
        preserveAspectRatio="none",
    )
    nats = np.arange(
        np.ceil(value_range[0]), value_range[1], max(1, round((value_range[1] - value_range[0]) / 6))
    )
    ticks = [(float(scale_to_plot(n, *value_range, PLOT_LEFT, PLOT_RIGHT)), signed_number(n)) for n in nats]
    labels = [svg_text(x, 24, words) for x, words in ticks]
    return svg_chart(
        bar, *labels, svg_text(PLOT_RIGHT, 36, "log mel power, nat", "end"), label="colours", height=40
    )


def palette_png(values_XY: np.ndarray, value_range: tuple[float, float]) -> bytes:
    """A palette PNG: the first axis to the right, the second upwards."""
    low, high = value_range
    level_XY = np.clip((values_XY - low) / (high - low) * COLOUR_LEVELS, 0, COLOUR_LEVELS - 1).astype(
        np.uint8
    )
    pixels = level_XY.T[::-1]
    palette = (
        (matplotlib.colormaps["magma"](np.linspace(0, 1, COLOUR_LEVELS))[:, :3] * 255)
        .round()
        .astype(np.uint8)
    )
    lines = np.pad(pixels, ((0, 0), (1, 0)))  # each line begins with its filter: none
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 3, 0, 0, 0)
    content = zlib.compress(lines.tobytes(), 9)
    parts = [(b"IHDR", head), (b"PLTE", palette.tobytes()), (b"IDAT", content), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(_png_chunk, parts))


def _png_chunk(chunk: tuple[bytes, bytes]) -> bytes:
    kind, content = chunk
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def share_bar(parts: Sequence[tuple[str, int]]) -> Markup:
    """One bar of several shares; the first is what one hopes for."""
    total = max(sum(count for _, count in parts), 1)
    shares = (
        html_tag("i", class_=f"share{number}", style=f"flex:{count / total:.6f}", title=f"{name}: {count:,}")
        for number, (name, count) in enumerate(parts)
        if count
    )
    return html_tag(
        "div", *shares, class_="shares", role="img", aria_label=", ".join(f"{n} {c:,}" for n, c in parts)
    )


def count_bar_table(counts: Sequence[tuple[object, int]]) -> Markup:
    """Rows of name, bar and count, each bar against the longest."""
    most = max((count for _, count in counts), default=1)
    rows = (
        html_tag(
            "tr",
            html_tag("th", name, scope="row"),
            html_tag("td", html_tag("i", style=f"width:{100 * count / most:.2f}%"), class_="count-bar"),
            html_tag("td", count, class_="n"),
        )
        for name, count in counts
    )
    return html_tag("table", join_markup(*rows), class_="bars")
