"""A Hugging Face dataset with an audio column: from the hub, or as a folder of Parquet files or of `save_to_disk`."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.audio.arrow import (
    ARROW_FAULTS,
    read_arrow_batches,
    sound_bytes,
    sound_column_name,
    sound_paths,
)
from pipeline.audio.parquet import SOUND_ID_COLUMNS, list_parquet_rows
from pipeline.audio.sources import MEMBER_SEPARATOR, SOURCES_SCHEMA, ClipSources
from pipeline.datasets.corpus import Corpus, CutSettings, ListedClip, cut_clips, plan_from_clips
from pipeline.datasets.folder import classes_in_use
from pipeline.datasets.hub_files import DatasetFile, list_dataset_files, open_dataset_folder
from pipeline.errors import InputError, first_error_line
from pipeline.labels.ontology import ClassList
from pipeline.messages import count_phrase, suggest_known

HUB_CLIP_SECONDS = 10.0  # default length of a clip

# Columns that are taken for labels, in this order, where no column is named.
LABEL_COLUMNS = ("label", "labels", "class", "classes", "category", "target", "human_labels", "fine_label")

FEATURES_KEY = b"huggingface"  # in the metadata of a table's schema

UNKNOWN_CLASS = -1  # the number of a class that is kept secret, as in test splits


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetRow:
    """One row of a dataset: where its sound lies (None: it has none), its split, its names and its labels.

    name   of the sound within the dataset, for people: the path stored with it, its id, or its place in the file
    index  number of the row within its split
    """

    source: dict[str, Any] | None
    split: str
    name: str
    index: int
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelColumn:
    """A column of labels; `class_names` are those of its numbers if it is one of class labels, else empty."""

    name: str
    class_names: tuple[str, ...] = ()

    def read_labels(self, value: Any) -> tuple[str, ...]:
        """Return the labels of a cell, each once; ValueError for a number that is no class."""
        cells = value if isinstance(value, list) else [value]
        return tuple(dict.fromkeys(name for cell in cells if (name := self._name_of(cell)) is not None))

    def _name_of(self, cell: Any) -> str | None:
        if cell is None or cell == "" or (self.class_names and cell == UNKNOWN_CLASS):
            return None
        if not self.class_names or isinstance(cell, str):
            return str(cell)
        if not 0 <= cell < len(self.class_names):
            raise ValueError(f"class {cell}, expected 0 to {len(self.class_names) - 1}")
        return self.class_names[cell]


def hub_corpus(
    dataset: str,
    config: str | None = None,
    revision: str | None = None,
    label_column: str | None = None,
    clip_seconds: float | None = None,
) -> Corpus:
    """Return the corpus of a dataset's rows, each a clip; raises InputError.

    dataset       ORG/NAME on the hub; or a folder of Parquet files, or one that `save_to_disk` wrote
    config        folder at its top, where it has several configurations
    revision      branch, tag or commit of the hub
    label_column  column of class labels, of texts, or of lists of either; None: the only column of class labels, or one
                  named in LABEL_COLUMNS, or no labels
    clip_seconds  length of a clip in seconds, default 10; longer sounds are cut off there

    Splits are those of the dataset. The id of a clip is the path stored with its sound, or its id column, if all of
    these differ; else split and row. Classes are all that the column of class labels names, in its order, else the
    labels in use.
    """
    # The files, and how their labels are to be read.
    folder = open_dataset_folder(dataset, revision)
    files = list_dataset_files(folder, dataset, config)
    column = choose_label_column(dataset, table_schema(files[0]), label_column)
    rows = read_dataset_rows(dataset, files, column)

    # The clips, cut at the end of a row of the store.
    names = Counter(row.name for row in rows)
    named = len(names) == len(rows)
    clips = [
        ListedClip(
            clip_id=row.name if named else f"{row.split}-{row.index:07d}",
            path=None,
            source=row.name,
            split=row.split,
            mids=row.labels,
        )
        for row in rows
    ]
    clips, _ = cut_clips(clips, CutSettings(clip_seconds=clip_seconds or HUB_CLIP_SECONDS))
    classes = classes_in_use(clips)
    if column is not None and column.class_names:
        classes = ClassList(mids=column.class_names, names=column.class_names)
    return Corpus(
        plan=plan_from_clips(clips),
        sources=sources_of_rows(rows),
        classes=classes,
        dataset_settings={
            "dataset": "hub",
            # The name is passed on to the function under another key than that of the function.
            "source": dataset if folder.commit else str(folder.path.absolute()),
            "config": config,
            "revision": folder.commit,
            "label_column": None if column is None else column.name,
            "clip_seconds": clip_seconds,
        },
        clip_seconds=clip_seconds,
        notes=tuple(describe_dataset(dataset, files, rows, column)),
    )


def hub_settings(
    dataset: str,
    config: str | None = None,
    revision: str | None = None,
    label_column: str | None = None,
    clip_seconds: float | None = None,
) -> dict[str, Any]:
    """Return what was asked of `hub_corpus`. A corpus also records the commit and the column that it found."""
    is_folder = Path(dataset).is_dir()
    return {
        "dataset": "hub",
        "source": str(Path(dataset).absolute()) if is_folder else dataset,
        "config": config,
        "revision": revision,
        "label_column": label_column,
        "clip_seconds": clip_seconds,
    }


def recreate_hub_corpus(source: str, **options: Any) -> Corpus:
    """Make the corpus of `Corpus.dataset_settings` again; raises InputError."""
    return hub_corpus(source, **options)


def describe_dataset(
    dataset: str, files: Sequence[DatasetFile], rows: Sequence[DatasetRow], column: LabelColumn | None
) -> Iterator[str]:
    """Yield what a user should know before the build: splits, labels, rows without a sound."""
    counts = Counter(row.split for row in rows)
    splits = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    yield f"{dataset}: {count_phrase(len(rows), 'row')} in {count_phrase(len(files), 'file')}: {splits}"
    if column is None:
        yield f"{dataset}: no column of labels; --label-column names one"
    else:
        labelled = sum(bool(row.labels) for row in rows)
        yield f"{dataset}: labels are those of column {column.name!r}, which {labelled:,} of {len(rows):,} rows have"


def table_schema(file: DatasetFile) -> pa.Schema:
    """Return the columns of a file; InputError if it is damaged."""
    try:
        if file.kind == "parquet":
            return pq.read_schema(file.path)
        batches = read_arrow_batches(file.path)
    except ARROW_FAULTS as error:
        raise damaged_file(file, error) from None
    if not batches:
        raise InputError(f"{file.path}: has no rows; leave the file out")
    return batches[0].schema


def damaged_file(file: DatasetFile, error: Exception) -> InputError:
    """Return the error for a file that cannot be read."""
    return InputError(
        f"{file.path}: cannot be read ({first_error_line(error, file.path)}); fetch or save it again"
    )


def choose_label_column(dataset: str, schema: pa.Schema, wanted: str | None) -> LabelColumn | None:
    """Return the column of labels; None if the dataset has none. InputError if it is absent, or there are several."""
    class_names = class_names_by_column(schema)
    if wanted is not None:
        if wanted not in schema.names:
            raise InputError(f"{dataset}: no column {wanted!r}; {suggest_known(wanted, schema.names)}")
        return LabelColumn(name=wanted, class_names=class_names.get(wanted, ()))

    # A column with a usual name, else the only one of class labels.
    usual = [name for name in LABEL_COLUMNS if name in schema.names]
    candidates = [name for name in usual if name in class_names] or usual[:1] or list(class_names)
    if len(candidates) > 1:
        raise InputError(
            f"{dataset}: {len(candidates)} columns of class labels; add --label-column, one of: {', '.join(candidates)}"
        )
    if not candidates:
        return None
    return LabelColumn(name=candidates[0], class_names=class_names.get(candidates[0], ()))


def class_names_by_column(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Return the class names of every column of class labels, or of lists of them, by what `datasets` wrote."""
    text = (schema.metadata or {}).get(FEATURES_KEY)
    if text is None:
        return {}
    features = json.loads(text).get("info", {}).get("features") or {}
    return {name: names for name, feature in features.items() if (names := class_names(feature))}


def class_names(feature: Any) -> tuple[str, ...]:
    """Return the names of a feature that is a class label, or a list of them; else nothing."""
    # A list of class labels is a list of one, or a Sequence, List or LargeList of one.
    if isinstance(feature, list):
        return class_names(feature[0]) if feature else ()
    if not isinstance(feature, dict):
        return ()
    if feature.get("_type") == "ClassLabel":
        return tuple(feature.get("names") or ())
    return class_names(feature["feature"]) if "feature" in feature else ()


def read_dataset_rows(
    dataset: str, files: Sequence[DatasetFile], column: LabelColumn | None
) -> list[DatasetRow]:
    """Return the rows of all files, in the order of the files; no sound is read. InputError if there are none."""
    rows: list[DatasetRow] = []
    index_by_split: Counter[str] = Counter()
    for file in files:
        sources = arrow_sources(file) if file.kind == "arrow" else parquet_sources(file)
        cells = read_cells(file, column)
        if cells is None:
            cells = [None] * len(sources)
        for (name, source), cell in zip(sources, cells, strict=True):
            try:
                labels = () if column is None else column.read_labels(cell)
            except ValueError as error:
                raise InputError(
                    f"{file.path}: {name}: {error}; see its column {column and column.name!r}"
                ) from None
            row = DatasetRow(
                source=source, split=file.split, name=name, index=index_by_split[file.split], labels=labels
            )
            rows.append(row)
            index_by_split[file.split] += 1
    if not rows:
        raise InputError(f"{dataset}: has no rows")
    return rows


def read_cells(file: DatasetFile, column: LabelColumn | None) -> list[Any] | None:
    """Return the cells of the column of labels; None without one. InputError if the file lacks the column."""
    if column is None:
        return None
    try:
        if file.kind == "parquet":
            return pq.read_table(file.path, columns=[column.name])[column.name].to_pylist()
        return [
            cell for batch in read_arrow_batches(file.path) for cell in batch.column(column.name).to_pylist()
        ]
    except KeyError:
        raise InputError(f"{file.path}: has no column {column.name!r}, which other files have") from None
    except ARROW_FAULTS as error:
        raise damaged_file(file, error) from None


def parquet_sources(file: DatasetFile) -> list[tuple[str, dict[str, Any] | None]]:
    """Return the name and the place of the sound of every row; InputError if the file has no sounds, or is damaged."""
    table, fault = list_parquet_rows(file.path)
    if fault is not None:
        raise InputError(f"{file.path}: {fault}")
    return [
        (row["member"], archive_place(file, row["group"], row["row"], row["member"]))
        for row in table.iter_rows(named=True)
    ]


def arrow_sources(file: DatasetFile) -> list[tuple[str, dict[str, Any] | None]]:
    """Return the same for an Arrow file; a sound that only a path names is a file of its own."""
    try:
        batches = read_arrow_batches(file.path)
    except ARROW_FAULTS as error:
        raise damaged_file(file, error) from None
    sources: list[tuple[str, dict[str, Any] | None]] = []
    for number, batch in enumerate(batches):
        column_name = sound_column_name(batch.schema)
        if column_name is None:
            columns = ", ".join(batch.schema.names)
            raise InputError(f"{file.path}: has no column of sounds (there are: {columns})")

        # Names are the stored paths, else an id, else the place.
        column = batch.column(column_name)
        has_bytes = sound_bytes(column).is_valid().to_pylist()
        paths = sound_paths(column).to_pylist()
        id_column = next((name for name in SOUND_ID_COLUMNS if name in batch.schema.names), None)
        ids = [None] * len(batch) if id_column is None else batch.column(id_column).to_pylist()
        for row, (is_inside, path, identity) in enumerate(zip(has_bytes, paths, ids, strict=True)):
            name = str(path or identity or f"row {row} of group {number}")
            source = None
            if is_inside:
                source = archive_place(file, number, row, name)
            elif path is not None and Path(path).is_file():
                source = {"kind": "file", "path": path, "source": path}
            sources.append((name, source))
    return sources


def archive_place(file: DatasetFile, group: int, row: int, name: str) -> dict[str, Any]:
    """Return the columns of `SOURCES_SCHEMA` for a row of a file."""
    source = f"{file.name}{MEMBER_SEPARATOR}{name}"
    return {"kind": file.kind, "path": str(file.path), "source": source, "group": group, "row": row}


def sources_of_rows(rows: Sequence[DatasetRow]) -> ClipSources:
    """Return the locations of the sounds of all rows; their seconds count from the start of the sound."""
    places = [row.source or {} for row in rows]
    frame = pl.DataFrame(
        {name: [True if name == "exact" else place.get(name) for place in places] for name in SOURCES_SCHEMA},
        schema=SOURCES_SCHEMA,
    )
    return ClipSources(frame=frame, sound_count=sum(row.source is not None for row in rows))
