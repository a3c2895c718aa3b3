"""The table of embeddings: what `ajepa-train embed` writes, row for row, and how a killed one is carried on.

NAME.parquet            one row a sound; the schema's metadata says which model made it, and how:
  clip_id               text: of a store, its clip's; else as `path`
  path                  text: of the sound, absolute; of a member of an archive, ARCHIVE::MEMBER
  seconds               float64: its length; null where it could not be used
  embedding             fixed-size list of float32; null where it could not be used
  reason, detail        text: why not (pipeline.manifest.REASONS); null where it could
  labels                list of text: a store's raw labels; null where none are known
  frames, frame_ms      with frames: list of fixed-size lists of float32, and list of float64; empty where unusable
NAME.parquet.partial/   until it is whole: plan.json, and the rows so far in files that are each written whole
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ajepa.embedding import Embedding
from ajepa.run import Json, differences
from pipeline.errors import AudioError, RunError
from pipeline.files import PARTIAL, fsync, replacing
from pipeline.tables import DAMAGED, METADATA_KEY

PLAN = "plan.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One sound of the table: what is known of it before it is heard."""

    clip_id: str
    path: str
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingTable:
    """A table in the making, at `path`: `plan` says from what and by which model, and is compared on resume."""

    path: Path
    plan: Json
    width: int
    frames: bool

    @property
    def parts(self) -> Path:
        return self.path.with_name(self.path.name + PARTIAL)

    @property
    def schema(self) -> pa.Schema:
        vector = pa.list_(pa.float32(), self.width)
        fields = [
            ("clip_id", pa.string()),
            ("path", pa.string()),
            ("seconds", pa.float64()),
            ("embedding", vector),
            ("reason", pa.string()),
            ("detail", pa.string()),
            ("labels", pa.list_(pa.string())),
        ]
        fields += [("frames", pa.list_(vector)), ("frame_ms", pa.list_(pa.float64()))] if self.frames else []
        return pa.schema(fields, metadata={METADATA_KEY: json.dumps(self.plan, separators=(",", ":"))})

    def start(self) -> int:
        """How many rows are there already, of this table or of one that was interrupted; RunError: of another."""
        if self.path.exists():
            self._refuse_change(plan_of(self.path), self.path)
            shutil.rmtree(
                self.parts, ignore_errors=True
            )  # what was killed between its last two lines leaves them
            return int(pq.read_metadata(self.path).num_rows)
        self.parts.mkdir(parents=True, exist_ok=True)
        if (self.parts / PLAN).exists():
            self._refuse_change(json.loads((self.parts / PLAN).read_text()), self.parts)
        with replacing(self.parts / PLAN) as scratch:
            scratch.write_text(json.dumps(self.plan, indent=1) + "\n")
        return sum(int(pq.read_metadata(part).num_rows) for part in self._written())

    def write(self, first: int, rows: Sequence[Row], told: Sequence[Embedding | AudioError]) -> None:
        """Rows from number `first` on, whole or not at all."""
        table = pa.table(
            self._columns(rows, told),
            schema=self.schema,
        )
        with replacing(self.parts / f"{first:010d}.parquet") as scratch:
            pq.write_table(table, scratch, compression="zstd", write_page_checksum=True)

    def finish(self) -> None:
        """All rows in one file, a row group for each part; the parts are gone then."""
        with replacing(self.path) as scratch:
            how: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
            with pq.ParquetWriter(scratch, self.schema, **how) as writer:
                for part in self._written():
                    writer.write_table(pq.read_table(part, schema=self.schema))
        shutil.rmtree(self.parts)
        fsync(self.path.parent)

    def counts(self) -> Counter[str]:
        """How many rows of the whole table are good, and how many each reason has."""
        counts: Counter[str] = Counter()
        for batch in batches_of(self.path, ("reason",), 65_536):
            counts.update(reason or "good" for reason in batch.column("reason").to_pylist())
        return counts

    def _written(self) -> list[Path]:
        return sorted(self.parts.glob("*.parquet"))

    def _refuse_change(self, before: Json, where: Path) -> None:
        if changes := differences(before, self.plan):
            told = f"holds other embeddings ({'; '.join(changes)})"
            raise RunError(f"{where}: {told}; delete it, or choose another --out")

    def _columns(self, rows: Sequence[Row], told: Sequence[Embedding | AudioError]) -> dict[str, pa.Array]:
        good = [one if isinstance(one, Embedding) else None for one in told]
        bad = [one if isinstance(one, AudioError) else None for one in told]
        columns = {
            "clip_id": pa.array([row.clip_id for row in rows], pa.string()),
            "path": pa.array([row.path for row in rows], pa.string()),
            "seconds": pa.array([None if one is None else one.seconds for one in good], pa.float64()),
            "embedding": self._vectors(good),
            "reason": pa.array([None if one is None else one.reason for one in bad], pa.string()),
            "detail": pa.array([None if one is None else str(one) for one in bad], pa.string()),
            "labels": pa.array([row.labels for row in rows], pa.list_(pa.string())),
        }
        if self.frames:
            lengths = [0 if one is None else len(one.frames_TD) for one in good]
            offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
            there = [one for one in good if one is not None]
            values_N = np.concatenate([one.frames_TD.numpy().ravel() for one in there] or [np.zeros(0, "f4")])
            times_N = np.concatenate([one.times_ms_T.numpy() for one in there] or [np.zeros(0)])
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(values_N, pa.float32()), self.width)
            columns["frames"] = pa.ListArray.from_arrays(offsets, vectors)
            columns["frame_ms"] = pa.ListArray.from_arrays(offsets, pa.array(times_N, pa.float64()))
        return columns

    def _vectors(self, good: Sequence[Embedding | None]) -> pa.Array:
        values_ND = np.zeros((len(good), self.width), np.float32)
        for place_D, one in zip(values_ND, good, strict=True):
            if one is not None:
                place_D[:] = one.clip_D.numpy()
        missing = pa.array([one is None for one in good], pa.bool_())
        return pa.FixedSizeListArray.from_arrays(pa.array(values_ND.ravel()), self.width, mask=missing)


def plan_of(path: Path) -> Json:
    """How a table of embeddings was made; RunError where it is none."""
    try:
        told = (pq.read_schema(path).metadata or {}).get(METADATA_KEY)
    except DAMAGED as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        raise RunError(f"{path}: cannot be read ({why}); make it with `ajepa-train embed`") from None
    plan = {} if told is None else json.loads(told)
    if "model_id" not in plan:
        raise RunError(f"{path}: no table of embeddings; make one with `ajepa-train embed`")
    return plan


def failures(path: Path, most: int) -> list[str]:
    """The first rows of a whole table that have no embedding, at most so many, each with its path and reason."""
    told: list[str] = []
    for batch in batches_of(path, ("path", "reason", "detail"), 65_536):
        bad = (row for row in batch.to_pylist() if row["reason"])
        told += [
            f"{row['path']}: {row['reason']} ({row['detail'].removeprefix(Path(row['path']).name + ': ')})"
            for row in islice(bad, most - len(told))
        ]
    return told


def batches_of(path: Path, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Some rows of a table at a time; raises RunError where it is damaged."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield from file.iter_batches(batch_size=rows, columns=list(columns))
    except DAMAGED as error:
        raise RunError(f"{path}: damaged ({str(error).splitlines()[0]}); delete it and embed again") from None
