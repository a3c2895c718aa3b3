"""Markup: HTML and SVG put together so that whatever comes from files is escaped."""

from html import escape
from numbers import Integral, Real

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
