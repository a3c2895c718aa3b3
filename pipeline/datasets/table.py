"""A user's own table of clips (CSV or Parquet) -> rows, checked cell by cell."""

import csv
import difflib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.datasets.listed import meant, text_of
from pipeline.errors import InputError, ManifestError

COLUMNS = ("path", "label", "labels", "split", "start", "end", "id")
SEPARATORS = (",", ";", "\t")
LIKELY_PATHS = ("file", "filename", "file_name", "fname", "filepath", "file_path", "wav", "audio", "name")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of a table; None and no labels where a cell is empty or there is no such column."""

    where: str  # "line 7"
    path: str
    labels: tuple[str, ...]
    split: str | None
    start_seconds: float | None
    end_seconds: float | None
    clip_id: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """The rows of a table, at least one, and what whoever wrote it should know."""

    rows: tuple[Row, ...]
    labelled: bool  # there is a column for labels
    notes: tuple[str, ...]


def load_table(path: Path) -> Table:
    """A table with the column `path`, and maybe label or labels, split, start, end, id; raises ManifestError.

    Several labels of a clip are separated by `;`, or are a list in Parquet. Times are seconds of the file. CSV is
    UTF-8 with any of the separators , ; tab; with ; or tab numbers may have a decimal comma. Names of columns may
    have capitals; other columns are left alone, and noted. A file is Parquet if it is called so.
    """
    if path.is_dir():
        raise InputError(f"{path}: a folder, expected a table (CSV or Parquet) with a column path")
    columns, records = _parquet(path) if path.suffix.lower() in (".parquet", ".pq") else _csv(path)
    _check_columns(path, columns)
    rows = []
    for where, cells in records:
        try:
            rows.append(_row(where, dict(zip(columns, cells, strict=True))))
        except ValueError as error:
            raise ManifestError(f"{path}: {where}: {error}") from None
    if not rows:
        raise ManifestError(f"{path}: no rows below the names of its columns")
    labelled = bool({"label", "labels"} & set(columns))
    return Table(rows=tuple(rows), labelled=labelled, notes=tuple(_notes(path, columns, rows)))


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    if "path" not in columns:
        near = difflib.get_close_matches("path", columns, n=1) or [c for c in columns if c in LIKELY_PATHS]
        hint = f"; rename {near[0]!r} to 'path'" if near else "; name the column of file paths so"
        raise ManifestError(f"{path}: no column path; found {', '.join(columns)[:200] or 'nothing'}{hint}")
    if twice := [name for name in COLUMNS if columns.count(name) > 1]:
        raise ManifestError(f"{path}: column {twice[0]} stands twice; rename or remove one")
    if {"label", "labels"} <= set(columns):
        raise ManifestError(f"{path}: columns label and labels; which counts? Rename or remove one")


def _csv(path: Path) -> tuple[list[str], Iterator[tuple[str, list[Any]]]]:
    text = text_of(path)
    head = next((line for line in text.splitlines() if line.strip()), "")
    separator = max(SEPARATORS, key=lambda sign: ("path" in _names([head], sign), head.count(sign)))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    names = next((cells for cells in lines if any(cells)), [])
    columns = [name.strip().lower() for name in names]
    return columns, _lines(path, lines, columns, separator)


def _names(lines: Sequence[str], separator: str) -> list[str]:
    return [name.strip().lower() for name in next(csv.reader(lines, delimiter=separator), [])]


def _lines(path: Path, lines: Any, columns: Sequence[str], separator: str) -> Iterator[tuple[str, list[Any]]]:
    """Each row's first line, whatever line breaks its cells hold, and its cells; blank lines are nothing."""
    before = lines.line_num
    try:
        for cells in lines:
            where, before = f"line {before + 1}", lines.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(columns):
                raise ManifestError(
                    f"{path}: {where}: {len(cells)} cells, the first line has {len(columns)}; "
                    f"put cells that hold {separator!r} in double quotes"
                )
            if separator != ",":
                pairs = zip(columns, cells, strict=True)
                cells = [_decimal(cell) if name in ("start", "end") else cell for name, cell in pairs]
            yield where, cells
    except csv.Error as error:
        raise ManifestError(f"{path}: line {lines.line_num}: no CSV ({error})") from None


def _decimal(cell: str) -> str:
    return cell.replace(",", ".") if cell.count(",") == 1 else cell


def _parquet(path: Path) -> tuple[list[str], Iterator[tuple[str, Sequence[Any]]]]:
    try:
        frame = pl.read_parquet(path)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror or error}){meant(path)}") from None
    except pl.exceptions.PolarsError as error:
        raise ManifestError(f"{path}: no Parquet file ({str(error).splitlines()[0]})") from None
    columns = [name.strip().lower() for name in frame.columns]
    return columns, ((f"row {number}", cells) for number, cells in enumerate(frame.iter_rows(), start=1))


def _row(where: str, cells: dict[str, Any]) -> Row:
    path = _text(cells["path"])
    if not path:
        raise ValueError("no path")
    start_seconds, end_seconds = (_seconds(name, cells.get(name)) for name in ("start", "end"))
    if end_seconds is not None and end_seconds <= (start_seconds or 0):
        raise ValueError(f"start {start_seconds or 0:g} is not before end {end_seconds:g}; both are seconds")
    return Row(
        where=where,
        path=path,
        labels=_labels(cells.get("label", cells.get("labels"))),
        split=_text(cells.get("split")) or None,
        start_seconds=start_seconds,
        end_seconds=end_seconds,
        clip_id=_text(cells.get("id")) or None,
    )


def _text(cell: Any) -> str:
    """A cell as text: whole numbers without a point, whatever type the table gave them."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return str(int(cell) if isinstance(cell, float) and cell.is_integer() else cell).strip()


def _labels(cell: Any) -> tuple[str, ...]:
    parts = cell if isinstance(cell, list) else _text(cell).split(";")
    return tuple(dict.fromkeys(name for part in parts if (name := _text(part))))


def _seconds(name: str, cell: Any) -> float | None:
    text = _text(cell)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {text[:40]!r}, expected seconds from 0 on")
    return round(value, 3)


def _notes(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> Iterator[str]:
    if other := [name for name in columns if name not in COLUMNS]:
        yield f"{path}: columns left alone: {', '.join(map(repr, other))}; known are {', '.join(COLUMNS)}"
    with_comma = [label for row in rows for label in row.labels if "," in label]
    if with_comma and not any(len(row.labels) > 1 for row in rows):
        yield f"{path}: {with_comma[0]!r} is taken for one label; several are separated by ;"
