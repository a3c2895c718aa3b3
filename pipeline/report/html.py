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

VOID = {"input", "br"}  # they end where they begin


class Markup(str):
    """HTML already; any other text is escaped when it becomes part of some."""

    __slots__ = ()


def markup(inner: object) -> Markup:
    """Text, escaped; integers with their thousands told apart."""
    if isinstance(inner, Markup):
        return inner
    return Markup(escape(f"{int(inner):,}" if isinstance(inner, Integral) else str(inner)))


def joined(*inner: object) -> Markup:
    """One after another."""
    return Markup("".join(markup(part) for part in inner))


def tag(name: str, *inner: object, **attributes: object) -> Markup:
    """An element; `class_` and `stroke_width` become `class` and `stroke-width`, attributes that are None vanish."""
    written = (
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    start = f"<{name}{''.join(written)}>"
    return Markup(start) if name in VOID else Markup(f"{start}{joined(*inner)}</{name}>")


def _value(value: object) -> str:
    """Coordinates to a tenth of a unit: more cannot be seen."""
    if isinstance(value, Real) and not isinstance(value, Integral):
        return f"{float(value):.1f}".removesuffix(".0")
    return escape(str(value))


WIDTH, HEIGHT = 360, 170  # in the units of the view box: about a phone's pixels

LEFT, RIGHT, TOP, BOTTOM = 40, 350, 8, 146  # the plot's edges

LEVELS = 64  # colours of a spectrogram: more cannot be told apart and cost bytes

Tick = tuple[float, str]  # where, and what is written there


def chart(*inner: object, label: str, height: float = HEIGHT) -> Markup:
    """An SVG that takes the width it is given."""
    box = f"0 0 {WIDTH} {height:g}"
    return tag("svg", *inner, viewBox=box, role="img", aria_label=label, class_="chart")


def text(x: float, y: float, words: object, anchor: str = "middle") -> Markup:
    return tag("text", words, x=x, y=y, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def axes(
    across: Sequence[Tick], up: Sequence[Tick], unit: str, *, bottom: float = BOTTOM
) -> Iterator[Markup]:
    """Grid lines and labels at places in the view box; the unit stands below."""
    for y, words in up:
        yield line(LEFT, y, RIGHT, y)
        yield text(LEFT - 5, y + 3.5, words, "end")
    for x, words in across:
        yield line(x, bottom, x, bottom + 3, "axis")
        yield text(x, bottom + 13, words)
    yield line(LEFT, bottom, RIGHT, bottom, "axis")
    yield text(RIGHT, bottom + 23, unit, "end")


def scaled(values: ArrayLike, low: float, high: float, first: float, last: float) -> np.ndarray:
    """Values between `low` and `high` as places between `first` and `last`."""
    return first + (np.asarray(values, float) - low) / (high - low) * (last - first)


def histogram_chart(
    counts_N: np.ndarray, edges_N: np.ndarray, ticks: Sequence[float], unit: str, *, log: bool = False
) -> Markup:
    """Bars between edges; on a logarithmic scale a single clip can be seen beside a million."""
    most = max(int(counts_N.max()), 1)
    up_N = decades(most) if log else np.array([most / 2, most] if most > 1 else [most])
    grow = np.log1p if log else np.float64
    tops_N = scaled(grow(counts_N), 0, float(grow(most)), BOTTOM, TOP)
    x_N = scaled(edges_N, edges_N[0], edges_N[-1], LEFT, RIGHT)
    bars = [
        tag(
            "rect",
            tag("title", f"{low:g} to {high:g} {unit}: {count:,}"),
            x=x + 0.5,
            y=top,
            width=max(after - x - 1, 0.5),
            height=BOTTOM - top,
            class_="bar",
        )
        for low, high, x, after, top, count in zip(
            edges_N[:-1], edges_N[1:], x_N[:-1], x_N[1:], tops_N, counts_N, strict=True
        )
        if count
    ]
    across = list(
        zip(
            scaled(np.array(ticks), edges_N[0], edges_N[-1], LEFT, RIGHT),
            map(signed, ticks),
            strict=True,
        )
    )
    up = [(float(scaled(grow(n), 0, float(grow(most)), BOTTOM, TOP)), short(n)) for n in up_N]
    return chart(*axes(across, up, unit), *bars, label=f"clips by {unit}")


def decades(most: int) -> np.ndarray:
    """1, 10, 100, ... up to `most`."""
    return 10.0 ** np.arange(len(str(most)))


def short(count: float) -> str:
    """A count of at most four letters or so: 1,234 is 1.2k."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def curve_chart(
    lines: Sequence[tuple[str, np.ndarray]], spread: tuple[np.ndarray, np.ndarray], ticks: Sequence[Tick]
) -> Markup:
    """Means per band, one line each, over the `spread` of the first; ticks at bands."""
    bands = len(spread[0])
    low, high = np.floor(spread[0].min() / 2) * 2, np.ceil(spread[1].max() / 2) * 2
    x_F = scaled(np.arange(bands) + 0.5, 0, bands, LEFT, RIGHT)
    y = [scaled(side_F, low, high, BOTTOM, TOP) for side_F in spread]
    outline = [*points(x_F, y[0]), *points(x_F[::-1], y[1][::-1])]
    step = max(2, round((high - low) / 5))
    up = [(float(scaled(n, low, high, BOTTOM, TOP)), signed(n)) for n in np.arange(low, high + 1, step)]
    across = [(float(scaled(place, 0, bands, LEFT, RIGHT)), name) for place, name in ticks]
    drawn = [
        tag(
            "polyline",
            tag("title", name),
            points=" ".join(points(x_F, scaled(mean_F, low, high, BOTTOM, TOP))),
            class_=f"line line{number}",
        )
        for number, (name, mean_F) in enumerate(lines)
    ]
    area = tag(
        "polygon", tag("title", "mean ± standard deviation"), points=" ".join(outline), class_="spread"
    )
    return chart(*axes(across, up, "Hz"), area, *drawn, label="mean log mel power by band")


def signed(number: float) -> str:
    """With a minus as wide as a plus."""
    return f"{number:g}".replace("-", "\N{MINUS SIGN}")


def points(x_N: np.ndarray, y_N: np.ndarray) -> list[str]:
    return [f"{x:.1f},{y:.1f}" for x, y in zip(x_N, y_N, strict=True)]


def mel_chart(
    mel_TF: np.ndarray,
    span: tuple[float, float],
    ticks: Sequence[Tick],
    *,
    seconds: float,
    frame_seconds: float,
    valid_frames: int,
) -> Markup:
    """A spectrogram on an axis of `seconds`; a line marks where the clip's own frames end, the rest is dimmed."""
    frames, bands = mel_TF.shape
    wide = -(-frames // 500)  # a page is at most so many pixels wide
    thin_TF = mel_TF[: frames - frames % wide].reshape(-1, wide, bands).mean(1)
    source = f"data:image/png;base64,{base64.b64encode(coloured_png(thin_TF, span)).decode()}"
    second = (RIGHT - LEFT) / seconds
    width, x = frames * frame_seconds * second, LEFT + valid_frames * frame_seconds * second
    place = {"x": LEFT, "y": TOP, "width": width, "height": BOTTOM - TOP}
    up = [(float(scaled(at, 0, bands, BOTTOM, TOP)), name) for at, name in ticks]
    across = [(LEFT + n * second, f"{n:g}") for n in np.arange(0, seconds + 1e-6, max(1, round(seconds / 5)))]
    parts = [*axes(across, up, "seconds"), text(LEFT - 5, TOP + 7, "Hz", "end")]
    parts += [tag("image", href=source, preserveAspectRatio="none", **place)]
    if valid_frames < frames:
        rest = {"x": x, "y": TOP, "width": LEFT + width - x, "height": BOTTOM - TOP}
        parts += [tag("rect", **rest, class_="dimmed"), line(x, TOP, x, BOTTOM, "end")]
    return chart(*parts, label="log mel power over seconds and Hz")


def colour_bar(span: tuple[float, float]) -> Markup:
    """What the colours of spectrograms mean, in nat."""
    ramp = np.linspace(*span, LEVELS)[:, None]
    source = f"data:image/png;base64,{base64.b64encode(coloured_png(ramp, span)).decode()}"
    bar = tag("image", href=source, x=LEFT, y=4, width=RIGHT - LEFT, height=8, preserveAspectRatio="none")
    nats = np.arange(np.ceil(span[0]), span[1], max(1, round((span[1] - span[0]) / 6)))
    ticks = [(float(scaled(n, *span, LEFT, RIGHT)), signed(n)) for n in nats]
    labels = [text(x, 24, words) for x, words in ticks]
    return chart(bar, *labels, text(RIGHT, 36, "log mel power, nat", "end"), label="colours", height=40)


def coloured_png(values_XY: np.ndarray, span: tuple[float, float]) -> bytes:
    """A palette PNG: the first axis to the right, the second upwards."""
    low, high = span
    level_XY = np.clip((values_XY - low) / (high - low) * LEVELS, 0, LEVELS - 1).astype(np.uint8)
    pixels = level_XY.T[::-1]
    palette = (matplotlib.colormaps["magma"](np.linspace(0, 1, LEVELS))[:, :3] * 255).round().astype(np.uint8)
    lines = np.pad(pixels, ((0, 0), (1, 0)))  # each line begins with its filter: none
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 3, 0, 0, 0)
    content = zlib.compress(lines.tobytes(), 9)
    parts = [(b"IHDR", head), (b"PLTE", palette.tobytes()), (b"IDAT", content), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(_png_part, parts))


def _png_part(part: tuple[bytes, bytes]) -> bytes:
    kind, content = part
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def share_bar(parts: Sequence[tuple[str, int]]) -> Markup:
    """One bar of several shares; the first is what one hopes for."""
    total = max(sum(count for _, count in parts), 1)
    shares = (
        tag("i", class_=f"share{number}", style=f"flex:{count / total:.6f}", title=f"{name}: {count:,}")
        for number, (name, count) in enumerate(parts)
        if count
    )
    return tag(
        "div", *shares, class_="shares", role="img", aria_label=", ".join(f"{n} {c:,}" for n, c in parts)
    )


def count_bars(counted: Sequence[tuple[object, int]]) -> Markup:
    """Rows of name, bar and count, each bar against the longest."""
    most = max((count for _, count in counted), default=1)
    rows = (
        tag(
            "tr",
            tag("th", name, scope="row"),
            tag("td", tag("i", style=f"width:{100 * count / most:.2f}%"), class_="count-bar"),
            tag("td", count, class_="n"),
        )
        for name, count in counted
    )
    return tag("table", joined(*rows), class_="bars")
