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

from pipeline.audio.sources import SOUND_EXTENSIONS, sounds
from pipeline.datasets.corpus import (
    Corpus,
    CutSettings,
    ListedClip,
    ProgressWrapper,
    absolute_path_or_url,
    cut_clips,
    plan_from_clips,
    read_list_text,
    sources_from_clips,
)
from pipeline.errors import InputError, ManifestError
from pipeline.labels.ontology import ClassList
from pipeline.messages import did_you_mean

CLIP_TABLE_COLUMNS = ("path", "label", "labels", "split", "start", "end", "id")

CSV_SEPARATORS = (",", ";", "\t")

LIKELY_PATH_COLUMNS = (
    "file",
    "filename",
    "file_name",
    "fname",
    "filepath",
    "file_path",
    "wav",
    "audio",
    "name",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipTableRow:
    """One line of a table; None and no labels where a cell is empty or there is no such column."""

    location: str  # "line 7"
    path: str
    labels: tuple[str, ...]
    split: str | None
    start_seconds: float | None
    end_seconds: float | None
    clip_id: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipTable:
    """The rows of a table, at least one, and what whoever wrote it should know."""

    rows: tuple[ClipTableRow, ...]
    has_label_column: bool  # there is a column for labels
    notes: tuple[str, ...]


def load_clip_table(path: Path) -> ClipTable:
    """A table with the column `path`, and maybe label or labels, split, start, end, id; raises ManifestError.

    Several labels of a clip are separated by `;`, or are a list in Parquet. Times are seconds of the file. CSV is
    UTF-8 with any of the separators , ; tab; with ; or tab numbers may have a decimal comma. Names of columns may
    have capitals; other columns are left alone, and noted. A file is Parquet if it is called so.
    """
    if path.is_dir():
        raise InputError(f"{path}: a folder, expected a table (CSV or Parquet) with a column path")
    columns, records = (
        _read_parquet_table(path) if path.suffix.lower() in (".parquet", ".pq") else _read_csv_table(path)
    )
    _check_table_columns(path, columns)
    rows = []
    for where, cells in records:
        try:
            rows.append(_parse_table_row(where, dict(zip(columns, cells, strict=True))))
        except ValueError as error:
            raise ManifestError(f"{path}: {where}: {error}") from None
    if not rows:
        raise ManifestError(f"{path}: no rows below the names of its columns")
    labelled = bool({"label", "labels"} & set(columns))
    return ClipTable(
        rows=tuple(rows), has_label_column=labelled, notes=tuple(_table_notes(path, columns, rows))
    )


def _check_table_columns(path: Path, columns: Sequence[str]) -> None:
    if "path" not in columns:
        near = difflib.get_close_matches("path", columns, n=1) or [
            c for c in columns if c in LIKELY_PATH_COLUMNS
        ]
        hint = f"; rename {near[0]!r} to 'path'" if near else "; name the column of file paths so"
        raise ManifestError(f"{path}: no column path; found {', '.join(columns)[:200] or 'nothing'}{hint}")
    if twice := [name for name in CLIP_TABLE_COLUMNS if columns.count(name) > 1]:
        raise ManifestError(f"{path}: column {twice[0]} stands twice; rename or remove one")
    if {"label", "labels"} <= set(columns):
        raise ManifestError(f"{path}: columns label and labels; which counts? Rename or remove one")


def _read_csv_table(path: Path) -> tuple[list[str], Iterator[tuple[str, list[Any]]]]:
    text = read_list_text(path)
    head = next((line for line in text.splitlines() if line.strip()), "")
    separator = max(
        CSV_SEPARATORS, key=lambda sign: ("path" in _parse_column_names([head], sign), head.count(sign))
    )
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    names = next((cells for cells in lines if any(cells)), [])
    columns = [name.strip().lower() for name in names]
    return columns, _read_csv_records(path, lines, columns, separator)


def _parse_column_names(lines: Sequence[str], separator: str) -> list[str]:
    return [name.strip().lower() for name in next(csv.reader(lines, delimiter=separator), [])]


def _read_csv_records(
    path: Path, lines: Any, columns: Sequence[str], separator: str
) -> Iterator[tuple[str, list[Any]]]:
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
                cells = [
                    _with_decimal_point(cell) if name in ("start", "end") else cell for name, cell in pairs
                ]
            yield where, cells
    except csv.Error as error:
        raise ManifestError(f"{path}: line {lines.line_num}: no CSV ({error})") from None


def _with_decimal_point(cell: str) -> str:
    return cell.replace(",", ".") if cell.count(",") == 1 else cell


def _read_parquet_table(path: Path) -> tuple[list[str], Iterator[tuple[str, Sequence[Any]]]]:
    try:
        frame = pl.read_parquet(path)
    except OSError as error:
        raise ManifestError(
            f"{path}: cannot be read ({error.strerror or error}){did_you_mean(path)}"
        ) from None
    except pl.exceptions.PolarsError as error:
        raise ManifestError(f"{path}: no Parquet file ({str(error).splitlines()[0]})") from None
    columns = [name.strip().lower() for name in frame.columns]
    return columns, ((f"row {number}", cells) for number, cells in enumerate(frame.iter_rows(), start=1))


def _parse_table_row(location: str, cells: dict[str, Any]) -> ClipTableRow:
    path = _cell_text(cells["path"])
    if not path:
        raise ValueError("no path")
    start_seconds, end_seconds = (_cell_seconds(name, cells.get(name)) for name in ("start", "end"))
    if end_seconds is not None and end_seconds <= (start_seconds or 0):
        raise ValueError(f"start {start_seconds or 0:g} is not before end {end_seconds:g}; both are seconds")
    return ClipTableRow(
        location=location,
        path=path,
        labels=_cell_labels(cells.get("label", cells.get("labels"))),
        split=_cell_text(cells.get("split")) or None,
        start_seconds=start_seconds,
        end_seconds=end_seconds,
        clip_id=_cell_text(cells.get("id")) or None,
    )


def _cell_text(cell: Any) -> str:
    """A cell as text: whole numbers without a point, whatever type the table gave them."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return str(int(cell) if isinstance(cell, float) and cell.is_integer() else cell).strip()


def _cell_labels(cell: Any) -> tuple[str, ...]:
    parts = cell if isinstance(cell, list) else _cell_text(cell).split(";")
    return tuple(dict.fromkeys(name for part in parts if (name := _cell_text(part))))


def _cell_seconds(name: str, cell: Any) -> float | None:
    text = _cell_text(cell)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {text[:40]!r}, expected seconds from 0 on")
    return round(value, 3)


def _table_notes(path: Path, columns: Sequence[str], rows: Sequence[ClipTableRow]) -> Iterator[str]:
    if other := [name for name in columns if name not in CLIP_TABLE_COLUMNS]:
        yield f"{path}: columns left alone: {', '.join(map(repr, other))}; known are {', '.join(CLIP_TABLE_COLUMNS)}"
    with_comma = [label for row in rows for label in row.labels if "," in label]
    if with_comma and not any(len(row.labels) > 1 for row in rows):
        yield f"{path}: {with_comma[0]!r} is taken for one label; several are separated by ;"


LABEL_ORIGINS = ("none", "parent")

UNLABELLED_CLASSES = ClassList(
    mids=("unlabelled",), names=("unlabelled",)
)  # a store has a class; no clip is of this


def folder_corpus(
    root: Path | str,
    table: Path | str | None = None,
    clip_seconds: float | None = None,
    hop_seconds: float | None = None,
    split: str = "train",
    label_from: str = "none",
    *,
    progress: ProgressWrapper | None = None,
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
    _check_folder_options(clip_seconds, hop_seconds, split, label_from)
    cut = CutSettings(clip_seconds=10.0 if clip_seconds is None else clip_seconds, hop_seconds=hop_seconds)
    below, notes = SoundFolder.scan_folder(Path(root))
    if table is None:
        clips = [_whole_file_clip(below, name, split, label_from) for name in below.sound_names]
    else:
        listed = load_clip_table(Path(table))
        clips, more = _clips_from_table(
            listed, Path(table), below, split, label_from, cuts_long_files=hop_seconds is not None
        )
        notes = [*notes, *listed.notes, *more]
    named = {clip.path for clip in clips}
    clips, more = cut_clips(clips, cut, progress=progress)
    classes = classes_in_use(clips)
    if classes is UNLABELLED_CLASSES:
        more.append("no clip has a label: such a store can be pre-trained on, not evaluated")
    return Corpus(
        plan=plan_from_clips(clips),
        sources=sources_from_clips(
            clips,
            files=len(below.sound_names),
            unmatched=[name for name in below.sound_names if below.file_path(name) not in named],
        ),
        classes=classes,
        dataset_settings={
            "dataset": "folder",
            "root": absolute_path_or_url(root),
            "table": None if table is None else absolute_path_or_url(table),
            "clip_seconds": clip_seconds,
            "hop_seconds": hop_seconds,
            "split": split,
            "label_from": label_from,
        },
        clip_seconds=clip_seconds,
        notes=(*notes, *more),
    )


def _check_folder_options(
    clip_seconds: float | None, hop_seconds: float | None, split: str, label_from: str
) -> None:
    if hop_seconds is not None and clip_seconds is None:
        raise InputError("hop_seconds without clip_seconds: say also how long a clip is")
    if not split.strip():
        raise InputError("the split has no name; expected a word such as train")
    if label_from not in LABEL_ORIGINS:
        raise InputError(f"label_from {label_from!r}: expected {' or '.join(LABEL_ORIGINS)}")


def classes_in_use(clips: Sequence[ListedClip]) -> ClassList:
    """The labels in use, each its own id and name: by number if all are whole numbers, else by name."""
    used = {mid for clip in clips for mid in clip.mids}
    if not used:
        return UNLABELLED_CLASSES
    numbers = all(mid.isdecimal() for mid in used)
    names = tuple(sorted(used, key=(lambda mid: (int(mid), mid)) if numbers else None))
    return ClassList(mids=names, names=names)


def _whole_file_clip(sound_folder: "SoundFolder", name: str, split: str, label_from: str) -> ListedClip:
    mids = _parent_folder_label(name) if label_from == "parent" else ()
    return ListedClip(clip_id=name, path=sound_folder.file_path(name), source=name, split=split, mids=mids)


def _parent_folder_label(name: str) -> tuple[str, ...]:
    folder = os.path.basename(os.path.dirname(name))
    return (folder,) if folder and folder != ".." else ()


def _clips_from_table(
    table: ClipTable,
    path: Path,
    sound_folder: "SoundFolder",
    split: str,
    label_from: str,
    *,
    cuts_long_files: bool,
) -> tuple[list[ListedClip], list[str]]:
    """The rows of a table as clips; a file that is not there stays a row, if any other is there."""
    if label_from == "parent" and table.has_label_column:
        raise InputError(f"{path}: has labels itself, and label_from=parent asks for others; choose one")
    clips: list[ListedClip] = []
    absent: list[ClipTableRow] = []
    ways: Counter[str] = Counter()
    for row in table.rows:
        found, way = sound_folder.find_sound(row.path, f"{path}: {row.location}")
        ways.update([way] if way else [])
        absent += [row] if found is None else []
        name = os.path.normpath(row.path) if found is None else found
        start_seconds = row.start_seconds or 0.0
        named = f"{name}@{round(start_seconds * 1000)}" if start_seconds and not cuts_long_files else name
        clips.append(
            ListedClip(
                clip_id=row.clip_id or named,
                path=sound_folder.file_path(name),
                source=name,
                split=row.split or split,
                mids=_parent_folder_label(name) if label_from == "parent" else row.labels,
                start_seconds=start_seconds,
                end_seconds=row.end_seconds,
            )
        )
    _refuse_repeated_clips(path, table, clips)
    notes = [f"{path}: {count} paths were matched {way}" for way, count in ways.items()]
    return clips, notes + _note_absent_files(path, table, absent, sound_folder)


def _refuse_repeated_clips(path: Path, table: ClipTable, clips: Sequence[ListedClip]) -> None:
    seen: dict[str, str] = {}
    for row, clip in zip(table.rows, clips, strict=True):
        own_id = [] if row.clip_id is None else [f"id {row.clip_id!r}"]
        for what in (f"{clip.source!r} from {clip.start_seconds:g} s on", *own_id):
            if what in seen:
                raise ManifestError(
                    f"{path}: {row.location}: {what} stands already in {seen[what]}; list every clip once"
                )
            seen[what] = row.location


def _note_absent_files(
    path: Path, table: ClipTable, absent_rows: Sequence[ClipTableRow], sound_folder: "SoundFolder"
) -> list[str]:
    """A note on files that are not there, if any; ManifestError where not one is."""
    if not absent_rows:
        return []
    first = absent_rows[0]
    near = difflib.get_close_matches(os.path.normpath(first.path), sound_folder.sound_names, n=1)
    nearest = f", the nearest is {near[0]!r}" if near else ""
    told = (
        f"{path}: {len(absent_rows)} of {len(table.rows)} files are not there, "
        f"such as {first.location}: {first.path!r}{nearest}"
    )
    if len(absent_rows) == len(table.rows):
        raise ManifestError(f"{told}; paths are taken from {sound_folder.root} on")
    return [told]


def _without_extension(name: str) -> str:
    """Without its extension, if that is one of a sound."""
    stem, dot, extension = name.rpartition(".")
    return stem if dot and extension.lower() in SOUND_EXTENSIONS else name


def _normalised_name(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # macOS writes an umlaut as two characters, others as one


def _case_folded_name(name: str) -> str:
    return _normalised_name(name).casefold()


PATH_MATCH_RULES: dict[
    str, Callable[[str], str]
] = {  # how a path of a table may differ from a file's, least first
    "": _normalised_name,
    "without regard to capitals": _case_folded_name,
    "without regard to capitals and extensions": lambda name: _without_extension(_case_folded_name(name)),
}

FILE_NAME_MATCH_RULES: dict[str, Callable[[str], str]] = {  # for paths that are a name only
    "by the name of the file alone": lambda name: os.path.basename(_normalised_name(name)),
    "by the name of the file alone, without regard to capitals and extensions": lambda name: (
        _without_extension(os.path.basename(_case_folded_name(name)))
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundFolder:
    """The sounds below a folder, to be found by paths as people write them."""

    root: Path
    sound_names: list[str]  # relative to the folder
    _index_by_rule: dict[str, dict[str, list[str]]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def scan_folder(cls, root: Path) -> tuple["SoundFolder", list[str]]:
        """All sounds below a folder, and notes; InputError where there are none."""
        if not root.exists():
            raise InputError(f"{root}: no such folder{did_you_mean(root)}")
        if not root.is_dir():
            raise InputError(f"{root}: a file; give the folder that it lies in")
        every = list(sounds(root))
        names = [name for name in every if not os.path.basename(name).startswith("._")]
        if not names:
            found = Counter(path.suffix.lower() or path.name for path in root.rglob("*") if path.is_file())
            shown = ", ".join(f"{count} {suffix}" for suffix, count in found.most_common(5)) or "no files"
            looked = ", ".join(f".{extension}" for extension in SOUND_EXTENSIONS)
            raise InputError(f"{root}: no sounds below it; looked for {looked}; found {shown}")
        notes = []
        if len(every) > len(names):
            notes.append(f"{len(every) - len(names)} files named ._* left out: macOS's own notes, no sounds")
        return cls(root=root, sound_names=names), notes

    def file_path(self, name: str) -> str:
        """The file, given its name below the folder; an absolute one is itself."""
        return os.path.join(self.root, name)

    def find_sound(self, table_path: str, location: str) -> tuple[str | None, str]:
        """The name of the file that a table's path means, and in which way it does; ManifestError if many do."""
        for form in self._possible_names(table_path):
            for way, key in (
                PATH_MATCH_RULES
                if os.path.basename(form) != form
                else PATH_MATCH_RULES | FILE_NAME_MATCH_RULES
            ).items():
                names = self._sounds_by_key(way, key).get(key(form), [])
                if len(names) > 1:
                    raise ManifestError(
                        f"{location}: {table_path!r} may be {names[0]!r} or {names[1]!r}; "
                        "write the path below the folder as it is"
                    )
                if names:
                    return names[0], way
                if way == "" and os.path.isfile(self.file_path(form)):
                    return form, ""  # of another extension, or elsewhere
        return None, ""

    def _sounds_by_key(self, rule_name: str, key_of_name: Callable[[str], str]) -> dict[str, list[str]]:
        """The files by their keys in one way of looking; made when first looked for."""
        if rule_name not in self._index_by_rule:
            keyed = self._index_by_rule[rule_name] = {}
            for name in self.sound_names:
                keyed.setdefault(key_of_name(name), []).append(name)
        return self._index_by_rule[rule_name]

    def _possible_names(self, table_path: str) -> list[str]:
        """The path as it is, from the folder on if it lies in it, and after the folder's own name."""
        own = os.path.basename(os.path.abspath(self.root))
        forms = [os.path.normpath(table_path)]
        if "\\" in table_path:
            forms.append(os.path.normpath(table_path.replace("\\", "/")))
        for form in list(forms):
            parts = form.split("/")
            if os.path.isabs(form) and form.startswith(os.path.abspath(self.root) + "/"):
                forms.insert(0, os.path.relpath(form, os.path.abspath(self.root)))
            elif own in parts[:-1] and (parts[0] == own or not parts[0] or ":" in parts[0]):
                forms.append("/".join(parts[parts.index(own) + 1 :]))
        return forms
