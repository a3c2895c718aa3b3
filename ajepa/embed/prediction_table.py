"""The table of predictions of `ajepa-train predict`: its rows, its three formats, and resuming after a kill.

NAME.csv, .parquet or .jsonl  one row per sound; with a hop also one per stretch of it:
  clip_id, path               text: the clip's id in the store and its sound; for a file both are its path as given
  row                         only with a hop. `sound`: scores of the whole sound; `stretch`: of seconds [start, end)
  start, end                  float64: seconds of the sound, to a millisecond
  classes, scores             lists of the best classes and their scores; in CSV class_1, score_1, class_2 ... With all
                              classes, instead a column of scores for each class, by its name
  reason, detail              text: key of `pipeline.store.manifest.FAILURE_REASONS` and a sentence; null if usable
NAME.csv.plan.json            the model and options that made the table
NAME.csv.partial/             until the table is complete: plan.json, and part files with the rows so far
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from ajepa.embed.embedding_job import EmbeddingJob
from ajepa.embed.predictor import VIEWS_PER_BATCH, Prediction, Predictor, top_classes
from ajepa.embed.sound_rows import SoundRow, plan_as_begun, plan_differences
from ajepa.embed.table import (
    parts_folder_of,
    read_part_paths,
    refusing_damage,
    rows_as_begun,
)
from ajepa.embed.windows import open_ahead
from ajepa.training.run import Json
from pipeline.errors import RunError
from pipeline.files import lock_output_file, replacing_file
from pipeline.messages import print_to_stderr
from pipeline.progress import open_progress
from pipeline.table_files import PARQUET_SUFFIXES, is_csv, write_table_file

# Increased whenever the same plan would give other values: a table is not carried on with these.
TABLE_FORMAT = 1
PLAN_FILE = "plan.json"
PLAN_SUFFIX = ".plan.json"

# A part file holds the rows of this many sounds.
PART_SOUNDS = 256

# Decimal places of seconds in the table.
TIME_DIGITS = 3

FAILURES_SHOWN = 3

FIXED_COLUMNS = ("clip_id", "path", "row", "start", "end", "reason", "detail")


def write_prediction_table(
    predictor: Predictor,
    job: EmbeddingJob,
    out: Path,
    *,
    top: int = 5,
    hop_seconds: float | None = None,
    batch: int = VIEWS_PER_BATCH,
    workers: int = 2,
    progress: bool = False,
    say: Callable[[str], None] = print_to_stderr,
) -> str:
    """Write or resume the table `out`, and return a line about it; `top` 0: every class in a column of its own.

    A run that is killed and started again gives the same rows, and on the same machine the same bytes. A sound that
    cannot be used has a row with the reason and without scores. RunError if `out` holds other predictions or is
    damaged, or if no sound can be used; StoreError if another process is writing it.
    """
    plan = {
        "format": TABLE_FORMAT,
        "model_id": predictor.model_id,
        "classes": len(predictor.class_ids),
        "activation": predictor.activation,
        "top": top,
        "hop_seconds": hop_seconds,
        "batch": batch,
        **job.identity_for(out),
    }
    layout = RowLayout.from_options(predictor, top, has_stretches=hop_seconds is not None, flat=is_csv(out))
    total = len(job.rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock_output_file(out):
        # What an earlier run wrote.
        table = PredictionTable(path=out, plan=plan_as_begun(plan, parts_folder_of(out) / PLAN_FILE))
        if table.is_complete(job.rows):
            say(f"{out}: already complete")
            return f"{out}: predictions of {total} sounds"
        written = min(total, PART_SOUNDS * table.start_or_resume(job.rows))
        sound_rows = rows_as_begun(job.rows, table.part_files(), table.parts_folder)
        if written:
            say(f"{out}: carrying on after {written} of {total} sounds")

        # Part by part: the sounds of a part are always scored together.
        openers = open_ahead((job.row_opener(number) for number in range(written, total)), workers)
        with open_progress(total, label="predict", unit="sound", shown=progress, initial=written) as bar:
            while written < total:
                rows = sound_rows[written : written + PART_SOUNDS]
                predictions = []
                part = islice(openers, len(rows))
                for prediction in predictor.predict_openers(part, hop_seconds=hop_seconds, batch=batch):
                    predictions.append(prediction)
                    bar.update()
                table.write_part(written, layout.frame(rows, predictions))
                written += len(rows)
        frame = table.merge_parts()
    return summarise_predictions(out, frame, say)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLayout:
    """The columns of a table: the best classes as lists or, if `flat`, side by side; or every class by its name.

    top            number of best classes; 0: every class
    has_stretches  whether there are rows of stretches
    """

    class_names: tuple[str, ...]
    top: int
    has_stretches: bool
    flat: bool

    @classmethod
    def from_options(cls, predictor: Predictor, top: int, *, has_stretches: bool, flat: bool) -> "RowLayout":
        # Names that are no names of columns, because they occur twice or are taken, are replaced by the ids.
        names = predictor.class_names
        if not top and (len(set(names)) < len(names) or set(names) & set(FIXED_COLUMNS)):
            names = tuple(f"class {class_id}" for class_id in predictor.class_ids)
        return cls(class_names=names, top=min(top, len(names)), has_stretches=has_stretches, flat=flat)

    @property
    def schema(self) -> dict[str, pl.DataType]:
        """Names and types of the columns, in their order."""
        text = pl.String()
        score = pl.Float32()
        columns: dict[str, pl.DataType] = {"clip_id": text, "path": text}
        if self.has_stretches:
            columns["row"] = text
        columns |= {"start": pl.Float64(), "end": pl.Float64()}
        if not self.top:
            columns |= dict.fromkeys(self.class_names, score)
        elif self.flat:
            for place in range(1, self.top + 1):
                columns |= {f"class_{place}": text, f"score_{place}": score}
        else:
            columns |= {"classes": pl.List(pl.String), "scores": pl.List(pl.Float32)}
        return columns | {"reason": text, "detail": text}

    def frame(self, rows: Sequence[SoundRow], predictions: Sequence[Prediction]) -> pl.DataFrame:
        """The rows of some sounds."""
        records: list[Json] = []
        for row, prediction in zip(rows, predictions, strict=True):
            ids = {"clip_id": row.clip_id, "path": row.path}
            kind = {"row": "sound"} if self.has_stretches else {}
            if prediction.error is not None:
                failure = {"reason": prediction.error.reason, "detail": str(prediction.error)}
                records.append(ids | kind | failure)
                continue
            whole = {"start": 0.0, "end": prediction.seconds}
            records.append(ids | kind | whole | self._score_cells(prediction.scores_C))
            for (start, end), scores_C in zip(prediction.spans_W2, prediction.scores_WC, strict=True):
                span = {"row": "stretch", "start": float(start), "end": float(end)}
                records.append(ids | span | self._score_cells(scores_C))
        return pl.DataFrame(records, schema=self.schema)

    def _score_cells(self, scores_C: np.ndarray) -> Json:
        if not self.top:
            return dict(zip(self.class_names, map(float, scores_C), strict=True))
        best = top_classes(self.class_names, scores_C, self.top)
        if not self.flat:
            return {"classes": [name for name, _ in best], "scores": [score for _, score in best]}
        cells: Json = {}
        for place, (name, score) in enumerate(best, start=1):
            cells |= {f"class_{place}": name, f"score_{place}": score}
        return cells


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionTable:
    """The table at `path` while it is written; `plan` must be unchanged on resume."""

    path: Path
    plan: Json

    @property
    def parts_folder(self) -> Path:
        return parts_folder_of(self.path)

    @property
    def plan_file(self) -> Path:
        return self.path.with_name(self.path.name + PLAN_SUFFIX)

    def is_complete(self, rows: Sequence[SoundRow]) -> bool:
        """Whether an earlier run wrote all of this table, of these rows; RunError if the file is another table."""
        if not self.path.exists() or self.parts_folder.exists():
            return False
        if not self.plan_file.is_file():
            raise RunError(f"{self.path}: is there already, and not from predict; choose another --out")
        stored_plan = json.loads(self.plan_file.read_text())
        self._refuse_other_plan(stored_plan, self.path, rows, iterate_table_paths(self.path))
        return True

    def start_or_resume(self, rows: Sequence[SoundRow]) -> int:
        """Return the number of parts of these rows that are already written; RunError if they have another plan."""
        self.parts_folder.mkdir(parents=True, exist_ok=True)
        plan_file = self.parts_folder / PLAN_FILE
        if plan_file.exists():
            stored_paths = read_part_paths(self.part_files())
            self._refuse_other_plan(json.loads(plan_file.read_text()), self.parts_folder, rows, stored_paths)
        self._write_plan(plan_file)
        return len(self.part_files())

    def write_part(self, first: int, frame: pl.DataFrame) -> None:
        """Write the rows of the sounds from number `first` on as one part file, completely or not at all."""
        with replacing_file(self.parts_folder / f"{first:010d}.parquet") as scratch:
            pq.write_table(frame.to_arrow(), scratch, compression="zstd", write_page_checksum=True)

    def merge_parts(self) -> pl.DataFrame:
        """Write all rows into the table, delete the parts, and return the rows."""
        parts = []
        for part in self.part_files():
            with refusing_damage(part, f"delete {self.parts_folder} and predict again"):
                read = pl.from_arrow(pq.read_table(part, page_checksum_verification=True))
            assert isinstance(read, pl.DataFrame)
            parts.append(read)
        # Products of frames and seconds have ends such as 47.30000000000002.
        frame = pl.concat(parts).with_columns(pl.col("start", "end").round(TIME_DIGITS))
        write_table_file(self.path, frame)
        self._write_plan(self.plan_file)
        shutil.rmtree(self.parts_folder)
        return frame

    def part_files(self) -> list[Path]:
        """Return the part files in the order of their rows."""
        return sorted(self.parts_folder.glob("*.parquet"))

    def _write_plan(self, file: Path) -> None:
        with replacing_file(file) as scratch:
            scratch.write_text(json.dumps(self.plan, indent=1) + "\n")

    def _refuse_other_plan(
        self, stored_plan: Json, location: Path, rows: Sequence[SoundRow], stored_paths: Iterable[str]
    ) -> None:
        changes = plan_differences(stored_plan, self.plan, rows, stored_paths)
        if changes:
            raise RunError(
                f"{location}: holds other predictions ({'; '.join(changes)}); delete it, or choose another --out"
            )


def iterate_table_paths(path: Path) -> Iterator[str]:
    """Yield the paths of the sounds in a complete table, row by row; OSError or PolarsError if it cannot be read."""
    if is_csv(path):
        frame = pl.read_csv(path, columns=["path"], infer_schema=False)
    elif path.suffix.lower() in PARQUET_SUFFIXES:
        frame = pl.read_parquet(path, columns=["path"])
    else:
        frame = pl.scan_ndjson(path).select("path").collect()
    yield from frame["path"]


def summarise_predictions(out: Path, frame: pl.DataFrame, say: Callable[[str], None]) -> str:
    """Return one line with the number of sounds that were scored; `say` prints the first failed sounds.

    RunError if no sound could be used.
    """
    sounds = frame.filter(pl.col("row") == "sound") if "row" in frame.columns else frame
    failed = sounds.filter(pl.col("reason").is_not_null())
    failures = [
        f"{row['path']}: {row['reason']} ({row['detail'].removeprefix(Path(row['path']).name + ': ')})"
        for row in failed.head(FAILURES_SHOWN).rows(named=True)
    ]
    if failed.height == sounds.height:
        raise RunError(
            f"{out}: none of {sounds.height} sounds could be used, the first is {failures[0]}; "
            "the table has every reason, delete it to try again"
        )
    for failure in failures:
        say(f"without scores: {failure}")
    summary = f"{out}: predictions of {sounds.height - failed.height} of {sounds.height} sounds"
    reasons = Counter(failed["reason"].to_list())
    without = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return f"{summary}; without: {without}" if without else summary
