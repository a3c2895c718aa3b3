"""A user's own table of clips (CSV or Parquet) -> rows, checked cell by cell.

A user's own sounds: any folder of files, with or without a table that tells of labels, splits and times.
"""

import csv
import difflib
import io
import math
import os.path
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.audio.sources import EXTENSIONS, sounds
from pipeline.datasets.corpus import (
    Corpus,
    Cut,
    Listed,
    Progress,
    fitted,
    place_of,
    plan_of,
    sources_of,
    text_of,
)
from pipeline.errors import InputError, ManifestError
from pipeline.labels.ontology import ClassList
from pipeline.messages import meant

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


LABELS_FROM = ("none", "parent")

UNLABELLED = ClassList(mids=("unlabelled",), names=("unlabelled",))  # a store has a class; no clip is of this


def folder(
    root: Path | str,
    table: Path | str | None = None,
    clip_seconds: float | None = None,
    hop_seconds: float | None = None,
    split: str = "train",
    label_from: str = "none",
    *,
    progress: Progress | None = None,
) -> Corpus:
    """Every sound below a folder, or those that a table lists; raises InputError.

    Without a table every file is one clip, in the order of names; with one, every line is, in its order.
    root          folder of sounds; all folders below it are searched
    table         CSV or Parquet with a column path (below the folder, or absolute) and maybe: label or labels
                  (several separated by ;), split, start and end (seconds of the file), id
    clip_seconds  length of a clip: the first that many seconds of a file (10), unless the table says its end
    hop_seconds   cut files that are longer into clips that start so far apart; as far as clip_seconds: no overlap.
                  What a file ends with is a clip of its own if it is at least half a clip long
    split         of every clip to which the table gives none
    label_from    parent: the name of the folder that a file lies in is its label; none

    A clip's id is the table's, or the path below the folder, extension included. `@` and the millisecond of the
    file at which it starts follow where files are cut, and where the table gives a start above 0.
    Classes are the labels in use, sorted: by number if all are whole numbers, else by name.
    """
    _check_wish(clip_seconds, hop_seconds, split, label_from)
    cut = Cut(clip_seconds=10.0 if clip_seconds is None else clip_seconds, hop_seconds=hop_seconds)
    below, notes = Below.of(Path(root))
    if table is None:
        clips = [_whole(below, name, split, label_from) for name in below.names]
    else:
        listed = load_table(Path(table))
        clips, more = _tabled(listed, Path(table), below, split, label_from, cutting=hop_seconds is not None)
        notes = [*notes, *listed.notes, *more]
    named = {clip.path for clip in clips}
    clips, more = fitted(clips, cut, progress=progress)
    classes = classes_of(clips)
    if classes is UNLABELLED:
        more.append("no clip has a label: such a store can be pre-trained on, not evaluated")
    return Corpus(
        plan=plan_of(clips),
        sources=sources_of(
            clips,
            files=len(below.names),
            unmatched=[name for name in below.names if below.path(name) not in named],
        ),
        classes=classes,
        asked={
            "dataset": "folder",
            "root": place_of(root),
            "table": None if table is None else place_of(table),
            "clip_seconds": clip_seconds,
            "hop_seconds": hop_seconds,
            "split": split,
            "label_from": label_from,
        },
        clip_seconds=clip_seconds,
        notes=(*notes, *more),
    )


def _check_wish(clip_seconds: float | None, hop_seconds: float | None, split: str, label_from: str) -> None:
    if hop_seconds is not None and clip_seconds is None:
        raise InputError("hop_seconds without clip_seconds: say also how long a clip is")
    if not split.strip():
        raise InputError("the split has no name; expected a word such as train")
    if label_from not in LABELS_FROM:
        raise InputError(f"label_from {label_from!r}: expected {' or '.join(LABELS_FROM)}")


def classes_of(clips: Sequence[Listed]) -> ClassList:
    """The labels in use, each its own id and name: by number if all are whole numbers, else by name."""
    used = {mid for clip in clips for mid in clip.mids}
    if not used:
        return UNLABELLED
    numbers = all(mid.isdecimal() for mid in used)
    names = tuple(sorted(used, key=(lambda mid: (int(mid), mid)) if numbers else None))
    return ClassList(mids=names, names=names)


def _whole(below: "Below", name: str, split: str, label_from: str) -> Listed:
    mids = _parent(name) if label_from == "parent" else ()
    return Listed(clip_id=name, path=below.path(name), source=name, split=split, mids=mids)


def _parent(name: str) -> tuple[str, ...]:
    folder = os.path.basename(os.path.dirname(name))
    return (folder,) if folder and folder != ".." else ()


def _tabled(
    table: Table, path: Path, below: "Below", split: str, label_from: str, *, cutting: bool
) -> tuple[list[Listed], list[str]]:
    """The rows of a table as clips; a file that is not there stays a row, if any other is there."""
    if label_from == "parent" and table.labelled:
        raise InputError(f"{path}: has labels itself, and label_from=parent asks for others; choose one")
    clips: list[Listed] = []
    absent: list[Row] = []
    ways: Counter[str] = Counter()
    for row in table.rows:
        found, way = below.find(row.path, f"{path}: {row.where}")
        ways.update([way] if way else [])
        absent += [row] if found is None else []
        name = os.path.normpath(row.path) if found is None else found
        start_seconds = row.start_seconds or 0.0
        named = f"{name}@{round(start_seconds * 1000)}" if start_seconds and not cutting else name
        clips.append(
            Listed(
                clip_id=row.clip_id or named,
                path=below.path(name),
                source=name,
                split=row.split or split,
                mids=_parent(name) if label_from == "parent" else row.labels,
                start_seconds=start_seconds,
                end_seconds=row.end_seconds,
            )
        )
    _refuse_repeats(path, table, clips)
    notes = [f"{path}: {count} paths were matched {way}" for way, count in ways.items()]
    return clips, notes + _absence(path, table, absent, below)


def _refuse_repeats(path: Path, table: Table, clips: Sequence[Listed]) -> None:
    seen: dict[str, str] = {}
    for row, clip in zip(table.rows, clips, strict=True):
        own_id = [] if row.clip_id is None else [f"id {row.clip_id!r}"]
        for what in (f"{clip.source!r} from {clip.start_seconds:g} s on", *own_id):
            if what in seen:
                raise ManifestError(
                    f"{path}: {row.where}: {what} stands already in {seen[what]}; list every clip once"
                )
            seen[what] = row.where


def _absence(path: Path, table: Table, absent: Sequence[Row], below: "Below") -> list[str]:
    """A note on files that are not there, if any; ManifestError where not one is."""
    if not absent:
        return []
    first = absent[0]
    near = difflib.get_close_matches(os.path.normpath(first.path), below.names, n=1)
    nearest = f", the nearest is {near[0]!r}" if near else ""
    told = (
        f"{path}: {len(absent)} of {len(table.rows)} files are not there, "
        f"such as {first.where}: {first.path!r}{nearest}"
    )
    if len(absent) == len(table.rows):
        raise ManifestError(f"{told}; paths are taken from {below.root} on")
    return [told]


def _bare(name: str) -> str:
    """Without its extension, if that is one of a sound."""
    stem, dot, extension = name.rpartition(".")
    return stem if dot and extension.lower() in EXTENSIONS else name


def _as_written(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # macOS writes an umlaut as two characters, others as one


def _folded(name: str) -> str:
    return _as_written(name).casefold()


WAYS: dict[str, Callable[[str], str]] = {  # how a path of a table may differ from a file's, least first
    "": _as_written,
    "without regard to capitals": _folded,
    "without regard to capitals and extensions": lambda name: _bare(_folded(name)),
}

BARE_WAYS: dict[str, Callable[[str], str]] = {  # for paths that are a name only
    "by the name of the file alone": lambda name: os.path.basename(_as_written(name)),
    "by the name of the file alone, without regard to capitals and extensions": lambda name: _bare(
        os.path.basename(_folded(name))
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Below:
    """The sounds below a folder, to be found by paths as people write them."""

    root: Path
    names: list[str]  # relative to the folder
    _keyed: dict[str, dict[str, list[str]]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, root: Path) -> tuple["Below", list[str]]:
        """All sounds below a folder, and notes; InputError where there are none."""
        if not root.exists():
            raise InputError(f"{root}: no such folder{meant(root)}")
        if not root.is_dir():
            raise InputError(f"{root}: a file; give the folder that it lies in")
        every = list(sounds(root))
        names = [name for name in every if not os.path.basename(name).startswith("._")]
        if not names:
            found = Counter(path.suffix.lower() or path.name for path in root.rglob("*") if path.is_file())
            shown = ", ".join(f"{count} {suffix}" for suffix, count in found.most_common(5)) or "no files"
            looked = ", ".join(f".{extension}" for extension in EXTENSIONS)
            raise InputError(f"{root}: no sounds below it; looked for {looked}; found {shown}")
        notes = []
        if len(every) > len(names):
            notes.append(f"{len(every) - len(names)} files named ._* left out: macOS's own notes, no sounds")
        return cls(root=root, names=names), notes

    def path(self, name: str) -> str:
        """The file, given its name below the folder; an absolute one is itself."""
        return os.path.join(self.root, name)

    def find(self, given: str, where: str) -> tuple[str | None, str]:
        """The name of the file that a table's path means, and in which way it does; ManifestError if many do."""
        for form in self._forms(given):
            for way, key in (WAYS if os.path.basename(form) != form else WAYS | BARE_WAYS).items():
                names = self._names_by(way, key).get(key(form), [])
                if len(names) > 1:
                    raise ManifestError(
                        f"{where}: {given!r} may be {names[0]!r} or {names[1]!r}; "
                        "write the path below the folder as it is"
                    )
                if names:
                    return names[0], way
                if way == "" and os.path.isfile(self.path(form)):
                    return form, ""  # of another extension, or elsewhere
        return None, ""

    def _names_by(self, way: str, key: Callable[[str], str]) -> dict[str, list[str]]:
        """The files by their keys in one way of looking; made when first looked for."""
        if way not in self._keyed:
            keyed = self._keyed[way] = {}
            for name in self.names:
                keyed.setdefault(key(name), []).append(name)
        return self._keyed[way]

    def _forms(self, given: str) -> list[str]:
        """The path as it is, from the folder on if it lies in it, and after the folder's own name."""
        own = os.path.basename(os.path.abspath(self.root))
        forms = [os.path.normpath(given)]
        if "\\" in given:
            forms.append(os.path.normpath(given.replace("\\", "/")))
        for form in list(forms):
            parts = form.split("/")
            if os.path.isabs(form) and form.startswith(os.path.abspath(self.root) + "/"):
                forms.insert(0, os.path.relpath(form, os.path.abspath(self.root)))
            elif own in parts[:-1] and (parts[0] == own or not parts[0] or ":" in parts[0]):
                forms.append("/".join(parts[parts.index(own) + 1 :]))
        return forms
