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

EmbeddingJob: which sounds to embed, in a fixed order; all of them -> a table, however often it is interrupted.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor
from tqdm import tqdm

from ajepa.embed.embedder import WINDOWS_PER_BATCH, Embedder, Embedding
from ajepa.embed.windows import SoundStream, open_ahead
from ajepa.training.run import Json, setting_differences
from pipeline.audio.sources import (
    ARCHIVE_KINDS,
    MEMBER_SEPARATOR,
    SOURCES_SCHEMA,
    SoundLocator,
    file_extension,
    find_sounds,
)
from pipeline.errors import AudioError, InputError, RunError
from pipeline.files import PARTIAL_SUFFIX, lock_output_file, replacing_file, sync_to_disk
from pipeline.messages import print_to_stderr
from pipeline.object_store import is_remote_url
from pipeline.store.feature_store import FeatureStore
from pipeline.tables import DAMAGED_TABLE_ERRORS, TABLE_METADATA_KEY

TABLE_PLAN_FILE = "plan.json"

TABLE_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundRow:
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
    def parts_folder(self) -> Path:
        return self.path.with_name(self.path.name + PARTIAL_SUFFIX)

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
        return pa.schema(fields, metadata={TABLE_METADATA_KEY: json.dumps(self.plan, separators=(",", ":"))})

    def start_or_resume(self) -> int:
        """How many rows are there already, of this table or of one that was interrupted; RunError: of another."""
        if self.path.exists():
            self._refuse_other_plan(read_table_plan(self.path), self.path)
            shutil.rmtree(
                self.parts_folder, ignore_errors=True
            )  # what was killed between its last two lines leaves them
            return int(pq.read_metadata(self.path).num_rows)
        self.parts_folder.mkdir(parents=True, exist_ok=True)
        if (self.parts_folder / TABLE_PLAN_FILE).exists():
            self._refuse_other_plan(
                json.loads((self.parts_folder / TABLE_PLAN_FILE).read_text()), self.parts_folder
            )
        with replacing_file(self.parts_folder / TABLE_PLAN_FILE) as scratch:
            scratch.write_text(json.dumps(self.plan, indent=1) + "\n")
        return sum(int(pq.read_metadata(part).num_rows) for part in self._part_files())

    def write_rows(
        self, first: int, rows: Sequence[SoundRow], outcomes: Sequence[Embedding | AudioError]
    ) -> None:
        """Rows from number `first` on, whole or not at all."""
        table = pa.table(
            self._table_columns(rows, outcomes),
            schema=self.schema,
        )
        with replacing_file(self.parts_folder / f"{first:010d}.parquet") as scratch:
            pq.write_table(table, scratch, compression="zstd", write_page_checksum=True)

    def merge_parts(self) -> None:
        """All rows in one file, a row group for each part; the parts are gone then."""
        with replacing_file(self.path) as scratch:
            how: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
            with pq.ParquetWriter(scratch, self.schema, **how) as writer:
                for part in self._part_files():
                    writer.write_table(pq.read_table(part, schema=self.schema))
        shutil.rmtree(self.parts_folder)
        sync_to_disk(self.path.parent)

    def count_reasons(self) -> Counter[str]:
        """How many rows of the whole table are good, and how many each reason has."""
        counts: Counter[str] = Counter()
        for batch in table_batches(self.path, ("reason",), 65_536):
            counts.update(reason or "good" for reason in batch.column("reason").to_pylist())
        return counts

    def _part_files(self) -> list[Path]:
        return sorted(self.parts_folder.glob("*.parquet"))

    def _refuse_other_plan(self, stored_plan: Json, location: Path) -> None:
        if changes := setting_differences(stored_plan, self.plan):
            told = f"holds other embeddings ({'; '.join(changes)})"
            raise RunError(f"{location}: {told}; delete it, or choose another --out")

    def _table_columns(
        self, rows: Sequence[SoundRow], outcomes: Sequence[Embedding | AudioError]
    ) -> dict[str, pa.Array]:
        good = [one if isinstance(one, Embedding) else None for one in outcomes]
        bad = [one if isinstance(one, AudioError) else None for one in outcomes]
        columns = {
            "clip_id": pa.array([row.clip_id for row in rows], pa.string()),
            "path": pa.array([row.path for row in rows], pa.string()),
            "seconds": pa.array([None if one is None else one.seconds for one in good], pa.float64()),
            "embedding": self._embedding_array(good),
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

    def _embedding_array(self, good: Sequence[Embedding | None]) -> pa.Array:
        values_ND = np.zeros((len(good), self.width), np.float32)
        for place_D, one in zip(values_ND, good, strict=True):
            if one is not None:
                place_D[:] = one.clip_D.numpy()
        missing = pa.array([one is None for one in good], pa.bool_())
        return pa.FixedSizeListArray.from_arrays(pa.array(values_ND.ravel()), self.width, mask=missing)


def read_table_plan(path: Path) -> Json:
    """How a table of embeddings was made; RunError where it is none."""
    try:
        told = (pq.read_schema(path).metadata or {}).get(TABLE_METADATA_KEY)
    except DAMAGED_TABLE_ERRORS as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        raise RunError(f"{path}: cannot be read ({why}); make it with `ajepa-train embed`") from None
    table_plan = {} if told is None else json.loads(told)
    if "model_id" not in table_plan:
        raise RunError(f"{path}: no table of embeddings; make one with `ajepa-train embed`")
    return table_plan


def describe_failures(path: Path, limit: int) -> list[str]:
    """The first rows of a whole table that have no embedding, at most so many, each with its path and reason."""
    told: list[str] = []
    for batch in table_batches(path, ("path", "reason", "detail"), 65_536):
        bad = (row for row in batch.to_pylist() if row["reason"])
        told += [
            f"{row['path']}: {row['reason']} ({row['detail'].removeprefix(Path(row['path']).name + ': ')})"
            for row in islice(bad, limit - len(told))
        ]
    return told


def table_batches(path: Path, columns: Sequence[str], rows_per_batch: int) -> Iterator[pa.RecordBatch]:
    """Some rows of a table at a time; raises RunError where it is damaged."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield from file.iter_batches(batch_size=rows_per_batch, columns=list(columns))
    except DAMAGED_TABLE_ERRORS as error:
        raise RunError(f"{path}: damaged ({str(error).splitlines()[0]}); delete it and embed again") from None


PART_CLIPS, PART_FRAMES = (
    512,
    1_000_000,
)  # rows that are written together: so many sounds, or three hours of them

FAILURES_SHOWN = 3

STORE_MARKER_FILE = "zarr.json"  # what a folder that is a store holds


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EmbeddingJob:
    """Rows in their order, how to open each, and what identifies them all."""

    rows: Sequence[SoundRow]
    row_opener: Callable[[int], Callable[[], SoundStream]]
    source_identity: Json

    @classmethod
    def from_store(cls, store: FeatureStore, model: Embedder) -> "EmbeddingJob":
        """Every good clip of a store; RunError: there is none, or its features are not the model's."""
        store.refuse_other_front_end(model.mel, "the model needs")
        rows_N = store.good_rows()
        if not len(rows_N):
            raise RunError(f"{store.location}: has no good clip to embed; ajepa-data report tells why")
        some = store.manifest[rows_N]
        indices_N, offsets_N = store.flat_labels()
        labels = [
            tuple(store.classes.names[i] for i in indices_N[offsets_N[row] : offsets_N[row + 1]])
            for row in rows_N.tolist()
        ]
        identity = {"store_id": store.store_id, "rows": len(rows_N)}
        if store.exclusions.digest is not None:
            identity["excluded"] = store.exclusions.digest
        told = zip(some["clip_id"], some["source"], labels, strict=True)
        return cls(
            rows=[SoundRow(clip_id=clip_id, path=source, labels=names) for clip_id, source, names in told],
            row_opener=lambda number: model.row_opener(store, int(rows_N[number])),
            source_identity=identity,
        )

    @classmethod
    def from_locations(cls, locations: Sequence[str], model: Embedder) -> "EmbeddingJob":
        """Files as they are given, every sound of folders and archives; InputError: nothing there, nothing in it."""
        locators = [locator for place in locations for locator in sounds_at_location(place)]
        paths = [sound_path(locator) for locator in locators]
        return cls(
            rows=[SoundRow(clip_id=path, path=path) for path in paths],
            row_opener=lambda number: model.file_opener(locators[number]),
            source_identity={
                "sounds": hashlib.sha256("\n".join(paths).encode()).hexdigest()[:16],
                "rows": len(paths),
            },
        )


def sounds_at_location(location: str) -> Iterator[SoundLocator]:
    """The sounds at one place; raises InputError."""
    path = Path(location)
    if not is_remote_url(location):
        if not path.exists():
            raise InputError(f"{location}: no such file or folder; expected sounds, or a store")
        if path.is_file() and file_extension(location) not in ARCHIVE_KINDS:
            yield SoundLocator.from_path(path.absolute())
            return
    found = find_sounds([location if is_remote_url(location) else path.absolute()])
    for note in found.notes:
        print_to_stderr(note)
    if found.sounds.is_empty():
        raise InputError(f"{location}: holds no sound; expected audio files, or archives of them")
    for row in found.sounds.select(*SOURCES_SCHEMA).iter_rows(named=True):
        yield SoundLocator(**row)


def sound_path(locator: SoundLocator) -> str:
    """A sound's path, and its member's name where it lies in an archive."""
    if locator.kind == "file":
        return locator.path
    return locator.path + MEMBER_SEPARATOR + locator.source.rpartition(MEMBER_SEPARATOR)[2]


def make_embedding_job(locations: Sequence[str], model: Embedder, **store_options: object) -> EmbeddingJob:
    """Of a store (one, alone; `how` is `FeatureStore.open`'s), or of files, folders and archives."""
    stores = [
        place for place in locations if place.rstrip("/").endswith(".zarr") or is_store_folder(Path(place))
    ]
    if stores and len(locations) > 1:
        raise InputError(f"{stores[0]}: is a store, and goes alone; embed the rest by itself")
    if stores:
        return EmbeddingJob.from_store(FeatureStore.open(stores[0], **store_options), model)  # type: ignore[arg-type]
    return EmbeddingJob.from_locations(locations, model)


def is_store_folder(path: Path) -> bool:
    return (path / STORE_MARKER_FILE).is_file()


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
    """Write the table of embeddings `out`, or carry on with it; how many rows are `good`, and of each reason.

    A run that is killed and started again gives the same rows, and the same bytes on the same machine: windows of
    sounds that are written together are encoded together, wherever the run began. Sounds that cannot be used are
    rows without an embedding, with their reason. RunError where `out` holds other embeddings, StoreError where
    another process is writing it.
    """
    table = EmbeddingTable(path=out, plan=plan(model, job, frames, batch), width=model.width, frames=frames)
    told = {"unit": "sound", "disable": not progress, "dynamic_ncols": True, "mininterval": 0.5}
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock_output_file(out):
        first, total = table.start_or_resume(), len(job.rows)
        if out.exists():
            say(f"{out}: already whole, {total} rows")
            return table.count_reasons()
        if first:
            say(f"{out}: carrying on after {first} of {total} rows")
        openings = open_ahead((job.row_opener(number) for number in range(first, total)), workers)
        with tqdm(total=total, initial=first, **told) as bar:
            while first < total:
                done = []
                for one in model.iterate_embeddings(openers_of_part(openings), frames=frames, batch=batch):
                    done.append(one)
                    bar.update()
                table.write_rows(first, job.rows[first : first + len(done)], done)
                first += len(done)
        table.merge_parts()
        return table.count_reasons()


def summarise_table(out: Path, counts: Counter[str], say: Callable[[str], None] = print_to_stderr) -> str:
    """What became of a table's sounds, in one line; `say` is told of the first that have no embedding.

    RunError where none has one.
    """
    bad, total = describe_failures(out, FAILURES_SHOWN), counts.total()
    if not counts["good"]:
        told = f"none of {total} sounds could be embedded, the first is {bad[0]}"
        raise RunError(f"{out}: {told}; the table has every reason, delete it to try again")
    for line in bad:
        say(f"without embedding: {line}")
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if reason != "good")
    return f"{out}: {counts['good']} of {total} sounds embedded" + (f"; without: {reasons}" if bad else "")


def plan(model: Embedder, job: EmbeddingJob, frames: bool, batch: int) -> Json:
    """What decides every value of a table."""
    return {
        "format": TABLE_FORMAT,
        "model_id": model.model.model_id,
        "recipe": model.model.recipe_name,
        "pooling": model.pooling,
        "layer": str(model.layer),
        "overlap": model.overlap,
        "batch": batch,
        "frames": frames,
        **job.source_identity,
    }


def openers_of_part(openers: Iterable[Callable[[], SoundStream]]) -> Iterator[Callable[[], SoundStream]]:
    """The next few sounds: as many as are written together."""
    seen_frames = 0

    def open_and_count(opening: Callable[[], SoundStream]) -> SoundStream:
        sound = opening()
        sound.mels = count_frames(sound.mels)
        return sound

    def count_frames(mels: Iterable[Tensor]) -> Iterator[Tensor]:
        nonlocal seen_frames
        for mel_TF in mels:
            seen_frames += len(mel_TF)
            yield mel_TF

    for number, opening in enumerate(openers, start=1):
        yield lambda opening=opening: open_and_count(opening)  # type: ignore[misc]
        if number == PART_CLIPS or seen_frames >= PART_FRAMES:
            return
