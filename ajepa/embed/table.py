"""The table of embeddings of `ajepa-train embed`: the sounds, the Parquet file, resuming after a kill, and reading.

NAME.parquet            one row per sound; the schema's metadata name the model and the options that made the table:
  clip_id               text: the clip's id in the store; for a file the same as `path`
  path                  text: path of the sound as it was given, below a folder that was given FOLDER/PATH; for a
                        member of an archive ARCHIVE::MEMBER; for a clip of a store its source
  seconds               float64: length of the sound; null if the sound could not be used
  embedding             fixed-size list of float32; null if the sound could not be used
  reason, detail        text: key of `pipeline.store.manifest.FAILURE_REASONS`, and a sentence; null for usable sounds
  labels                list of text: the clip's raw labels in the store; null for files
  frames, frame_ms      if requested: list of fixed-size lists of float32, and list of float64; empty if unusable
NAME.parquet.partial/   until the table is complete: plan.json, and part files with the rows so far
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from ajepa.embed.embedder import WINDOWS_PER_BATCH, Embedder, Embedding
from ajepa.embed.embedding_job import EmbeddingJob
from ajepa.embed.sound_rows import (
    SoundRow,
    plan_as_begun,
    plan_differences,
)
from ajepa.embed.windows import SoundStream, open_ahead
from ajepa.training.run import Json
from pipeline.errors import AudioError, InputError, RunError
from pipeline.files import PARTIAL_SUFFIX, lock_output_file, replacing_file, sync_to_disk
from pipeline.messages import print_to_stderr
from pipeline.progress import open_progress
from pipeline.table_files import (
    CSV_SUFFIXES,
    JSON_LINES_SUFFIXES,
    PARQUET_SUFFIXES,
    is_csv,
    refuse_other_suffix,
    write_table_file,
)
from pipeline.tables import DAMAGED_TABLE_ERRORS, TABLE_METADATA_KEY, describe_table_damage

# Increased whenever the same plan would give other values: a table is not carried on with these.
TABLE_FORMAT = 2
TABLE_PLAN_FILE = "plan.json"

# Why the table has this pooling and this layer, among the settings of its plan.
REASON_KEY = "chosen"

# A part file is written after PART_CLIPS sounds or PART_FRAMES mel frames (about three hours), whichever comes first;
# where vectors of frames are kept, earlier if these come to PART_VALUES numbers (512 MB), which wide ones soon do.
PART_CLIPS = 512
PART_FRAMES = 1_000_000
PART_VALUES = 2**27

# At most this many failed sounds are named in the summary.
FAILURES_SHOWN = 3

# Columns with small values are read in batches of this many rows.
SMALL_ROWS_PER_READ = 65_536

PARQUET_OPTIONS: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}


def write_embedding_table(
    model: Embedder,
    job: EmbeddingJob,
    out: Path,
    *,
    frames: bool = False,
    batch: int = WINDOWS_PER_BATCH,
    workers: int = 2,
    progress: bool = False,
    say: Callable[[str], None] = print_to_stderr,
) -> Counter[str]:
    """Write or resume the table of embeddings `out`; return the numbers of `good` rows and of failed rows by reason.

    A run that is killed and started again gives the same rows, and on the same machine the same bytes: the sounds of
    a part file are always encoded together, wherever the run resumed. A sound that cannot be used gets a row with a
    reason and without an embedding. RunError if `out` contains other embeddings or is damaged; StoreError if another
    process is writing it.
    """
    plan = table_plan(model, job, out, frames, batch)
    out.parent.mkdir(parents=True, exist_ok=True)
    total = len(job.rows)
    with lock_output_file(out):
        # Count the rows that an earlier run wrote.
        table = EmbeddingTable(
            path=out,
            plan=plan_as_begun(plan, parts_folder_of(out) / TABLE_PLAN_FILE),
            width=model.width,
            frame_width=model.frame_width,
            frames=frames,
        )
        written = table.start_or_resume(job.rows)
        if out.exists():
            say(f"{out}: already complete, {total} rows")
            return table.count_reasons()
        rows = rows_as_begun(job.rows, table.part_files(), table.parts_folder)
        if written:
            say(f"{out}: carrying on after {written} of {total} rows")

        # Embed and write the remaining sounds, part by part.
        openers = open_ahead((job.row_opener(number) for number in range(written, total)), workers)
        with open_progress(total, label="embed", unit="sound", shown=progress, initial=written) as bar:
            while written < total:
                results = []
                part = openers_of_part(openers, frames_per_part(model, frames))
                for result in model.iterate_embeddings(part, frames=frames, batch=batch):
                    results.append(result)
                    bar.update()
                table.write_rows(written, rows[written : written + len(results)], results)
                written += len(results)
        table.merge_parts()
        return table.count_reasons()


def rows_as_begun(rows: Sequence[SoundRow], parts: Sequence[Path], parts_folder: Path) -> Sequence[SoundRow]:
    """Return the rows of a table with paths like those in its part files, each named by the number of its first row.

    They are absolute in tables that an earlier version began, and may have been given with `./`. RunError if the same
    sounds were given by other paths.
    """
    candidates: list[Callable[[SoundRow], SoundRow]] = [
        lambda row: row,
        SoundRow.with_normal_path,
        SoundRow.with_dotted_path,
        SoundRow.with_absolute_path,
    ]
    for part in parts:
        with refusing_damage(part, f"delete {parts_folder} and make the table again"):
            paths = pq.read_table(part, columns=["path"]).column("path").to_pylist()

        # A sound may have several rows one after the other, and so may its clips in a store.
        begun = [path for path, _ in groupby(paths)]
        first = int(part.stem)
        slice_rows = rows[first : first + len(paths)]
        candidates = [
            as_begun
            for as_begun in candidates
            if begun
            == [path for path, _ in islice(groupby(as_begun(row).path for row in slice_rows), len(begun))]
        ]
        if not candidates:
            raise RunError(
                f"{parts_folder}: was begun with paths such as {begun[0]}, which is {rows[first].path} now; "
                "give the same sounds as then, or delete it"
            )
    return [candidates[0](row) for row in rows]


def table_plan(model: Embedder, job: EmbeddingJob, out: Path, frames: bool, batch: int) -> Json:
    """Return all that determines the values in the table `out`: format, model, options, and identity of the sounds."""
    return {
        "format": TABLE_FORMAT,
        "model_id": model.pretrained.model_id,
        "recipe": model.pretrained.recipe_name,
        "pooling": model.pooling,
        "layer": str(model.layer),
        REASON_KEY: model.features.reason,
        "overlap": model.overlap,
        "batch": batch,
        "frames": frames,
        **job.identity_for(out),
    }


def frames_per_part(model: Embedder, keeps_frames: bool) -> int:
    """Return the number of mel frames after which a part file is written."""
    if not keeps_frames:
        return PART_FRAMES
    columns = max(1, PART_VALUES // model.frame_width)
    return min(PART_FRAMES, columns * model.grid.patch_frames)


def openers_of_part(
    openers: Iterable[Callable[[], SoundStream]], part_frames: int
) -> Iterator[Callable[[], SoundStream]]:
    """Yield the openers of the sounds of the next part file, which ends after `part_frames` mel frames."""
    frame_count = 0

    def count_frames(mels: Iterable[Tensor]) -> Iterator[Tensor]:
        nonlocal frame_count
        for mel_TF in mels:
            frame_count += len(mel_TF)
            yield mel_TF

    def open_and_count(opener: Callable[[], SoundStream]) -> SoundStream:
        sound = opener()
        sound.mels = count_frames(sound.mels)
        return sound

    # The frames of a sound are counted while the caller reads them, before it takes the next opener.
    for number, opener in enumerate(openers, start=1):
        yield partial(open_and_count, opener)
        if number == PART_CLIPS or frame_count >= part_frames:
            return


def summarise_table(out: Path, counts: Counter[str], say: Callable[[str], None] = print_to_stderr) -> str:
    """Return one line with the number of sounds that have an embedding; `say` prints the first failed sounds.

    RunError if no sound has an embedding.
    """
    failures = describe_failures(out, FAILURES_SHOWN)
    if not counts["good"]:
        shortfall = f"none of {counts.total()} sounds could be embedded, the first is {failures[0]}"
        raise RunError(f"{out}: {shortfall}; the table has every reason, delete it to try again")

    for failure in failures:
        say(f"without embedding: {failure}")
    summary = f"{out}: {counts['good']} of {counts.total()} sounds embedded"
    reasons = [f"{count} {reason}" for reason, count in sorted(counts.items()) if reason != "good"]
    return f"{summary}; without: {', '.join(reasons)}" if failures else summary


def parts_folder_of(path: Path) -> Path:
    """Return the folder of the parts of the table at a path, while it is written."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def read_part_paths(parts: Iterable[Path]) -> Iterator[str]:
    """Yield the paths of the sounds in part files, row by row; RunError if one is damaged."""
    for part in parts:
        with refusing_damage(part, f"delete {part.parent} and make the table again"):
            paths = pq.read_table(part, columns=["path"]).column("path").to_pylist()
        yield from paths


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingTable:
    """The table at `path` while it is written. `plan` (`table_plan`) must be unchanged on resume."""

    path: Path
    plan: Json
    width: int
    frame_width: int
    frames: bool

    @property
    def parts_folder(self) -> Path:
        return parts_folder_of(self.path)

    @property
    def schema(self) -> pa.Schema:
        fields = [
            ("clip_id", pa.string()),
            ("path", pa.string()),
            ("seconds", pa.float64()),
            ("embedding", pa.list_(pa.float32(), self.width)),
            ("reason", pa.string()),
            ("detail", pa.string()),
            ("labels", pa.list_(pa.string())),
        ]
        if self.frames:
            frame = pa.list_(pa.float32(), self.frame_width)
            fields += [("frames", pa.list_(frame)), ("frame_ms", pa.list_(pa.float64()))]
        return pa.schema(fields, metadata={TABLE_METADATA_KEY: json.dumps(self.plan, separators=(",", ":"))})

    def start_or_resume(self, rows: Sequence[SoundRow]) -> int:
        """Return how many of the `rows` are already written, in a complete or an interrupted table.

        RunError if they have another plan, or are damaged.
        """
        if self.path.exists():
            stored_paths: Iterator[str] = (
                path
                for columns in table_batches(self.path, ("path",), SMALL_ROWS_PER_READ)
                for path in columns.column("path").to_pylist()
            )
            self._refuse_other_plan(read_table_plan(self.path), self.path, rows, stored_paths)

            # If a run was killed after it merged the parts and before it deleted them, delete them now.
            shutil.rmtree(self.parts_folder, ignore_errors=True)
            return int(pq.read_metadata(self.path).num_rows)

        # Write the plan, or compare it; it is always written before the first part.
        self.parts_folder.mkdir(parents=True, exist_ok=True)
        plan_file = self.parts_folder / TABLE_PLAN_FILE
        if plan_file.exists():
            stored_paths = read_part_paths(self.part_files())
            self._refuse_other_plan(json.loads(plan_file.read_text()), self.parts_folder, rows, stored_paths)
        with replacing_file(plan_file) as scratch:
            scratch.write_text(json.dumps(self.plan, indent=1) + "\n")

        written = 0
        for part in self.part_files():
            with refusing_damage(part, f"delete {self.parts_folder} and embed again"):
                written += int(pq.read_metadata(part).num_rows)
        return written

    def write_rows(
        self, first: int, rows: Sequence[SoundRow], results: Sequence[Embedding | AudioError]
    ) -> None:
        """Write the rows from number `first` on as one part file, completely or not at all."""
        table = pa.table(self._table_columns(rows, results), schema=self.schema)
        with replacing_file(self.parts_folder / f"{first:010d}.parquet") as scratch:
            pq.write_table(table, scratch, **PARQUET_OPTIONS)

    def merge_parts(self) -> None:
        """Write all rows into one file with one row group per part, and delete the parts."""
        with (
            replacing_file(self.path) as scratch,
            pq.ParquetWriter(scratch, self.schema, **PARQUET_OPTIONS) as writer,
        ):
            for part in self.part_files():
                with refusing_damage(part, f"delete {self.parts_folder} and embed again"):
                    table = pq.read_table(part, schema=self.schema, page_checksum_verification=True)
                writer.write_table(table)
        shutil.rmtree(self.parts_folder)
        sync_to_disk(self.path.parent)

    def count_reasons(self) -> Counter[str]:
        """Return the number of good rows in the complete table, and of failed rows by reason."""
        counts: Counter[str] = Counter()
        for batch in table_batches(self.path, ("reason",), SMALL_ROWS_PER_READ):
            counts.update(reason or "good" for reason in batch.column("reason").to_pylist())
        return counts

    def part_files(self) -> list[Path]:
        """Return the part files in the order of their rows."""
        return sorted(self.parts_folder.glob("*.parquet"))

    def _refuse_other_plan(
        self, stored_plan: Json, location: Path, rows: Sequence[SoundRow], stored_paths: Iterable[str]
    ) -> None:
        # Equal vectors may be wanted for different reasons: by name, or as the run's best.
        stored_plan, plan = (
            {key: value for key, value in each.items() if key != REASON_KEY}
            for each in (stored_plan, self.plan)
        )
        changes = plan_differences(stored_plan, plan, rows, stored_paths)
        if changes:
            raise RunError(
                f"{location}: holds other embeddings ({'; '.join(changes)}); delete it, or choose another --out"
            )

    def _table_columns(
        self, rows: Sequence[SoundRow], results: Sequence[Embedding | AudioError]
    ) -> dict[str, pa.Array]:
        """Return the table columns of some rows; the result of a row is either an embedding or an error."""
        embeddings = [result if isinstance(result, Embedding) else None for result in results]
        errors = [result if isinstance(result, AudioError) else None for result in results]
        columns = {
            "clip_id": pa.array([row.clip_id for row in rows], pa.string()),
            "path": pa.array([row.path for row in rows], pa.string()),
            "seconds": pa.array([good.seconds if good else None for good in embeddings], pa.float64()),
            "embedding": self._clip_vectors(embeddings),
            "reason": pa.array([error.reason if error else None for error in errors], pa.string()),
            "detail": pa.array([str(error) if error else None for error in errors], pa.string()),
            "labels": pa.array([row.labels for row in rows], pa.list_(pa.string())),
        }
        if self.frames:
            columns |= self._frame_columns(embeddings)
        return columns

    def _clip_vectors(self, embeddings: Sequence[Embedding | None]) -> pa.Array:
        """Return the vector of every clip; null for a failed sound."""
        values_ND = np.zeros((len(embeddings), self.width), np.float32)
        for row_D, embedding in zip(values_ND, embeddings, strict=True):
            if embedding is not None:
                row_D[:] = embedding.clip_D.numpy()
        missing = pa.array([embedding is None for embedding in embeddings], pa.bool_())
        return pa.FixedSizeListArray.from_arrays(pa.array(values_ND.ravel()), self.width, mask=missing)

    def _frame_columns(self, embeddings: Sequence[Embedding | None]) -> dict[str, pa.Array]:
        """Return the columns with the frame vectors of every clip and their times; empty lists for a failed sound."""
        # Concatenate the frames of all clips; the offsets mark where the frames of each clip begin.
        lengths = [0 if embedding is None else len(embedding.frames_TD) for embedding in embeddings]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        present = [embedding for embedding in embeddings if embedding is not None]
        values = [embedding.frames_TD.numpy().ravel() for embedding in present]
        times = [embedding.times_ms_T.numpy() for embedding in present]

        # NumPy does not concatenate an empty list.
        values_N = np.concatenate(values or [np.zeros(0, np.float32)])
        times_N = np.concatenate(times or [np.zeros(0)])
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(values_N, pa.float32()), self.frame_width)
        return {
            "frames": pa.ListArray.from_arrays(offsets, vectors),
            "frame_ms": pa.ListArray.from_arrays(offsets, pa.array(times_N, pa.float64())),
        }


@contextmanager
def refusing_damage(path: Path, next_step: str) -> Iterator[None]:
    """Turn every error that reading a damaged Parquet file may raise into a RunError that ends with `next_step`."""
    try:
        yield
    except DAMAGED_TABLE_ERRORS as error:
        raise RunError(f"{path}: cannot be read ({describe_table_damage(error)}); {next_step}") from None


def read_table_plan(path: Path) -> Json:
    """Return the plan (`table_plan`) of a table of embeddings; RunError if the file is not a table of embeddings."""
    # `embed` writes CSV and JSON lines beside a Parquet table, which alone is read.
    table = path.with_suffix(".parquet")
    if path.suffix.lower() in (*CSV_SUFFIXES, *JSON_LINES_SUFFIXES):
        next_step = f"give {table}" if table.is_file() else f"embed again with --out {table}"
        raise RunError(f"{path}: `nearest` reads the Parquet table beside it, not its copy; {next_step}")
    with refusing_damage(path, "make it with `ajepa-train embed`"):
        metadata = pq.read_schema(path).metadata or {}
    text = metadata.get(TABLE_METADATA_KEY)
    plan = {} if text is None else json.loads(text)
    if "model_id" not in plan:
        raise RunError(f"{path}: is no table of embeddings; make one with `ajepa-train embed`")
    return plan


def parquet_table_path(out: Path, *, frames: bool) -> Path:
    """Return the Parquet table that is written for `out`: itself, or its neighbour NAME.parquet for NAME.csv.

    InputError if CSV would have to hold the vectors of columns, whose number differs from sound to sound.
    """
    refuse_other_suffix(out)
    if frames and is_csv(out):
        raise InputError(f"{out}: --frames has as many vectors as a sound is long; choose NAME.parquet")
    return out if out.suffix.lower() in PARQUET_SUFFIXES else out.with_suffix(".parquet")


def convert_embedding_table(table: Path, out: Path) -> None:
    """Write a complete table as CSV (a column for each value, embedding_0 ...) or JSON lines, as the suffix says."""
    with refusing_damage(table, "delete it and embed again"):
        frame = pl.from_arrow(pq.read_table(table, page_checksum_verification=True))
    assert isinstance(frame, pl.DataFrame)
    write_table_file(out, frame)


def table_batches(path: Path, columns: Sequence[str], rows_per_batch: int) -> Iterator[pa.RecordBatch]:
    """Yield batches of rows of a complete table, with the given columns; RunError if the table is damaged."""
    with (
        refusing_damage(path, "delete it and embed again"),
        pq.ParquetFile(path, page_checksum_verification=True) as file,
    ):
        yield from file.iter_batches(batch_size=rows_per_batch, columns=list(columns))


def describe_failures(path: Path, limit: int) -> list[str]:
    """Return path and reason of the first failed sounds of a complete table, at most `limit`."""
    lines: list[str] = []
    for batch in table_batches(path, ("path", "reason", "detail"), SMALL_ROWS_PER_READ):
        failed = (row for row in batch.to_pylist() if row["reason"])
        for row in islice(failed, limit - len(lines)):
            # The detail may begin with the name of the file, which the path already contains.
            detail = row["detail"].removeprefix(Path(row["path"]).name + ": ")
            lines.append(f"{row['path']}: {row['reason']} ({detail})")
    return lines
