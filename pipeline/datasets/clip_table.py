"""A user's own table of clips (CSV or Parquet), read and checked cell by cell."""

import csv
import difflib
import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.datasets.corpus import SHOWN_HEADER_LETTERS, read_list_text
from pipeline.errors import InputError, ManifestError
from pipeline.messages import did_you_mean, suggest_known
from pipeline.tables import DAMAGED_TABLE_ERRORS, describe_table_damage

CLIP_TABLE_COLUMNS = ("path", "label", "labels", "split", "start", "end", "id", "group")

SPLIT_COLUMN = "split"

GROUP_COLUMN = "group"

LABEL_COLUMNS = {"label", "labels"}

# What programs write for "no value"; as a label it is none.
NO_VALUE_TEXTS = {"nan", "NaN", "None", "null", "NULL", "<NA>", "NaT"}

PARQUET_SUFFIXES = (".parquet", ".pq")

CSV_SEPARATORS = (",", ";", "\t")

LIKELY_PATH_COLUMNS = (
    *("file", "filename", "file_name", "fname", "filepath", "file_path", "wav", "audio", "name"),
)

SHOWN_CELL_LETTERS = 40  # at most this many letters of a cell in an error

# The location of a row in the table ("line 7"), and the cells of the row.
TableRecord = tuple[str, Sequence[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipTableRow:
    """One row of a table; None, or no labels, if a cell is empty or the table lacks the column."""

    location: str  # "line 7"
    path: str
    labels: tuple[str, ...]
    split: str | None
    start_seconds: float | None
    end_seconds: float | None
    clip_id: str | None
    group: str | None = None  # clips of one group are held out together


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipTable:
    """The rows of a table, at least one, and notes for the user."""

    rows: tuple[ClipTableRow, ...]
    has_label_column: bool
    notes: tuple[str, ...]


def load_clip_table(
    path: Path, *, split_column: str = SPLIT_COLUMN, group_column: str = GROUP_COLUMN
) -> ClipTable:
    """Read a table with the column path and optionally label(s), split, start, end, id, group; raises ManifestError.

    Split and group may have other names; a column of another name must be there. A column of splits whose name begins
    with fold may number them, from 0 or 1 on: `3` is the split `fold3`.

    Several labels of a clip are separated by `;`; in Parquet they may be a list. Times are seconds of the file. CSV is
    UTF-8 with the separator `,`, `;` or tab. With `;` or tab, numbers may have a decimal comma. Column names may have
    capitals. Other columns are ignored, with a note. The file's extension decides whether it is read as Parquet.
    """
    if path.is_dir():
        raise InputError(f"{path}: a folder, expected a table (CSV or Parquet) with a column path")

    # The column names, and an iterator over the rows.
    if path.suffix.lower() in PARQUET_SUFFIXES:
        columns, records = _read_parquet_table(path)
    else:
        columns, records = _read_csv_table(path)
    _check_table_columns(path, columns)
    renamed = {SPLIT_COLUMN: split_column.lower(), GROUP_COLUMN: group_column.lower()}
    for column, name in renamed.items():
        if name != column and name not in columns:
            raise ManifestError(f"{path}: no column {name}; {suggest_known(name, columns)}")

    # Check each row; an error names the location of the row.
    rows = []
    no_values: Counter[str] = Counter()
    for location, cells in records:
        try:
            row = _parse_table_row(location, dict(zip(columns, cells, strict=True)), renamed)
        except ValueError as error:
            raise ManifestError(f"{path}: {location}: {error}") from None
        no_values.update(NO_VALUE_TEXTS.intersection(row.labels))
        rows.append(replace(row, labels=tuple(name for name in row.labels if name not in NO_VALUE_TEXTS)))
    if not rows:
        raise ManifestError(f"{path}: no rows below the names of its columns")
    if renamed[SPLIT_COLUMN].startswith("fold"):
        rows = _name_numbered_folds(rows)
    return ClipTable(
        rows=tuple(rows),
        has_label_column=bool(LABEL_COLUMNS & set(columns)),
        notes=tuple(_table_notes(path, columns, {*CLIP_TABLE_COLUMNS, *renamed.values()}, rows, no_values)),
    )


def _name_numbered_folds(rows: Sequence[ClipTableRow]) -> list[ClipTableRow]:
    """Return the rows with the splits `fold1`, `fold2` ... if all of them are numbers; the lowest may be 0."""
    if not all(row.split and row.split.isdecimal() for row in rows):
        return list(rows)
    numbers = [int(row.split or "") for row in rows]
    first = min(1, *numbers)
    return [
        replace(row, split=f"fold{number - first + 1}") for row, number in zip(rows, numbers, strict=True)
    ]


def _read_csv_table(path: Path) -> tuple[list[str], Iterator[TableRecord]]:
    """Return the column names in lower case, and the rows; the first line decides the separator."""
    text = read_list_text(path)
    first_line = next((line for line in text.splitlines() if line.strip()), "")

    # The separator that gives a column `path`, or else the most frequent separator.
    separator = max(
        CSV_SEPARATORS,
        key=lambda sign: ("path" in _parse_column_names(first_line, sign), first_line.count(sign)),
    )
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    header = next((cells for cells in lines if any(cells)), [])
    columns = _plain_column_names(header)
    return columns, _read_csv_records(path, lines, columns, separator)


def _parse_column_names(line: str, separator: str) -> list[str]:
    return _plain_column_names(next(csv.reader([line], delimiter=separator), []))


def _plain_column_names(names: Sequence[str]) -> list[str]:
    return [name.strip().lower() for name in names]


def _read_csv_records(
    path: Path, lines: Any, columns: Sequence[str], separator: str
) -> Iterator[TableRecord]:
    """Yield the line number at which each row begins, and its cells, which may have line breaks; skip blank lines."""
    last_line = lines.line_num
    try:
        for cells in lines:
            # A row begins after the last line of the row before.
            location = f"line {last_line + 1}"
            last_line = lines.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(columns):
                raise ManifestError(
                    f"{path}: {location}: {len(cells)} cells, the first line has {len(columns)}; "
                    f"put cells that hold {separator!r} in double quotes"
                )

            # If commas do not separate cells, a comma may be a decimal comma.
            if separator != ",":
                cells = [
                    _with_decimal_point(cell) if name in ("start", "end") else cell
                    for name, cell in zip(columns, cells, strict=True)
                ]
            yield location, cells
    except csv.Error as error:
        raise ManifestError(f"{path}: line {lines.line_num}: no CSV ({error})") from None


def _with_decimal_point(cell: str) -> str:
    return cell.replace(",", ".") if cell.count(",") == 1 else cell


def _read_parquet_table(path: Path) -> tuple[list[str], Iterator[TableRecord]]:
    """Return the column names in lower case, and the rows."""
    try:
        frame = pl.read_parquet(path)
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
        raise ManifestError(f"{path}: {problem}{did_you_mean(path)}") from None
    except (pl.exceptions.PolarsError, *DAMAGED_TABLE_ERRORS) as error:
        raise ManifestError(f"{path}: no Parquet file ({describe_table_damage(error)})") from None
    records = ((f"row {number}", cells) for number, cells in enumerate(frame.iter_rows(), start=1))
    return _plain_column_names(frame.columns), records


def _check_table_columns(path: Path, columns: Sequence[str]) -> None:
    # If the column `path` is missing, suggest the column that is most likely meant.
    if "path" not in columns:
        likely = difflib.get_close_matches("path", columns, n=1)
        likely += [name for name in columns if name in LIKELY_PATH_COLUMNS]
        hint = f"rename {likely[0]!r} to 'path'" if likely else "name the column of file paths so"
        found = ", ".join(columns)[:SHOWN_HEADER_LETTERS] or "nothing"
        raise ManifestError(f"{path}: no column path; found {found}; {hint}")

    # Refuse two columns with the same content.
    repeated = [name for name in CLIP_TABLE_COLUMNS if columns.count(name) > 1]
    if repeated:
        raise ManifestError(f"{path}: column {repeated[0]} stands twice; rename or remove one")
    if set(columns) >= LABEL_COLUMNS:
        raise ManifestError(f"{path}: columns label and labels; which counts? Rename or remove one")


def _parse_table_row(location: str, cells: dict[str, Any], renamed: dict[str, str]) -> ClipTableRow:
    """Return the row as checked values; ValueError if a cell is invalid. `renamed`: columns of split and group."""
    path = _cell_text(cells["path"])
    if not path:
        raise ValueError("no path")

    # Without a start, the clip begins at the start of the file.
    start_seconds = _cell_seconds("start", cells.get("start"))
    end_seconds = _cell_seconds("end", cells.get("end"))
    if end_seconds is not None and end_seconds <= (start_seconds or 0):
        raise ValueError(f"start {start_seconds or 0:g} is not before end {end_seconds:g}; both are seconds")

    return ClipTableRow(
        location=location,
        path=path,
        labels=_cell_labels(cells.get("label", cells.get("labels"))),
        split=_cell_text(cells.get(renamed[SPLIT_COLUMN])) or None,
        start_seconds=start_seconds,
        end_seconds=end_seconds,
        clip_id=_cell_text(cells.get("id")) or None,
        group=_cell_text(cells.get(renamed[GROUP_COLUMN])) or None,
    )


def _cell_text(cell: Any) -> str:
    """Return the cell as text: whole numbers of any type without a decimal point; empty text for None and NaN."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return str(cell).strip()


def _cell_labels(cell: Any) -> tuple[str, ...]:
    """Return the labels of a cell in their order, each once."""
    parts = cell if isinstance(cell, list) else _cell_text(cell).split(";")
    return tuple(dict.fromkeys(name for part in parts if (name := _cell_text(part))))


def _cell_seconds(name: str, cell: Any) -> float | None:
    """Return the seconds in a cell, rounded to the millisecond; None if the cell is empty."""
    text = _cell_text(cell)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {text[:SHOWN_CELL_LETTERS]!r}, expected seconds from 0 on")
    return round(value, 3)


def _table_notes(
    path: Path,
    columns: Sequence[str],
    known: Set[str],
    rows: Sequence[ClipTableRow],
    no_values: Counter[str],
) -> Iterator[str]:
    # An unknown column may be a misspelt known column.
    unknown = [name for name in columns if name not in known]
    if unknown:
        yield (
            f"{path}: columns left alone: {', '.join(map(repr, unknown))}; "
            f"known are {', '.join(CLIP_TABLE_COLUMNS)}"
        )

    # What programs write for "no value" may be a class to the user.
    if no_values:
        counts = ", ".join(f"{text!r} {count:,} times" for text, count in sorted(no_values.items()))
        yield f"{path}: taken for no label: {counts}; if it is a class, give it another name"

    # Labels with commas are suspicious if no clip has several labels.
    with_comma = [label for row in rows for label in row.labels if "," in label]
    if with_comma and not any(len(row.labels) > 1 for row in rows):
        yield f"{path}: {with_comma[0]!r} is taken for one label; several are separated by ;"
