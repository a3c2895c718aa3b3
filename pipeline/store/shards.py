"""Shards, the standard Zarr v3 objects that contain the spectrograms, and the ledger, which records valid shards.

zarr-python creates the array. `ShardWriter` writes the shards, because it needs no copy of a shard in memory.
`reader.ShardReader` reads them for training, because zarr-python's random access is an order of magnitude slower.
Layout of `mel/c/<shard>/0/0`: one chunk per stored clip (little-endian values, then their crc32c), then one
(offset, bytes) pair of u64 per clip of the shard, then the crc32c of these pairs. An absent clip has the pair
(2^64-1, 2^64-1), and zarr-python reads it as the fill value.

The ledger has one record per shard. The record is the commit point: a shard without a record does not exist.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.errors import StoreError
from pipeline.files import make_folders, scratch_path, sync_to_disk
from pipeline.store.header import ShardLayout, StoreHeader
from pipeline.store.manifest import RESULT_SCHEMA
from pipeline.tables import (
    DAMAGED_TABLE_ERRORS,
    frame_digest,
    frame_digests,
    frame_from_arrow,
    read_arrow_table,
    read_table,
    read_table_schema,
    write_table,
)

if TYPE_CHECKING:
    from torch import Tensor  # takes three seconds to import, and who reads a store may not need it

ABSENT_OFFSET = 2**64 - 1

CRC_BYTES = 4

MAX_SHARD_BYTES = 128 * 2**20

MIN_SHARD_CLIPS = 16

MIN_SHARDS = 64  # if the data set is large enough; this many processes can build at once

ROWS_OF_RECORDS = 32_768  # of the ledger, that `read_commits` reads at a time

PENDING_SUFFIX = ".next"  # suffix of a record whose shard is about to be moved into place


def choose_shard_clips(clips: int, clip_bytes: int) -> int:
    """Return the number of clips per shard, a power of two.

    A shard has at most 128 MiB and at least 16 clips; a store has at least 64 shards if the data set is large enough.
    """
    # Large shards are fast to read and are few files. Small shards spread the work, and little is lost if one breaks.
    most = min(MAX_SHARD_BYTES // clip_bytes, clips // MIN_SHARDS)
    return max(MIN_SHARD_CLIPS, 2 ** int(math.log2(max(most, 1))))


def shard_path(store: Path, shard: int) -> Path:
    """Return the path at which Zarr stores a shard of `mel`."""
    return store / "mel" / "c" / str(shard) / "0" / "0"


def create_mel_array(store: Path, layout: ShardLayout, attributes: dict[str, object]) -> None:
    """Write the group's and the array's `zarr.json` below the folder `store`."""
    import zarr  # takes a second, and reading or writing shards does not need it

    folder = zarr.storage.LocalStore(store)
    zarr.create_group(folder, attributes=attributes)
    _create_zarr_array(folder, layout)


def zarr_group_json(attributes: dict[str, object]) -> bytes:
    """Return the content of the store's own `zarr.json`."""
    import zarr

    # zarr-python writes it into a dict in memory.
    objects: dict[str, Any] = {}
    zarr.create_group(zarr.storage.MemoryStore(objects), attributes=attributes)
    return objects["zarr.json"].to_bytes()


def zarr_array_json(layout: ShardLayout) -> bytes:
    """Return the content of `mel/zarr.json`."""
    from zarr.storage import MemoryStore

    objects: dict[str, Any] = {}
    _create_zarr_array(MemoryStore(objects), layout)
    return objects["mel/zarr.json"].to_bytes()


def check_mel_array(store: Path, layout: ShardLayout) -> None:
    """Raise StoreError if `mel/zarr.json` describes another array than the layout; that array could not be read."""
    path = store / "mel" / "zarr.json"
    try:
        described = _described_form(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not as written"
        raise StoreError(f"{path}: {reason}; run: ajepa-data verify {store} --repair") from None
    expected = _expected_form(layout)
    if described != expected:
        raise StoreError(
            f"{path}: describes an array {described}, expected {expected}; only unchanged stores can be read"
        )


def _described_form(array: dict[str, Any]) -> tuple[Any, ...]:
    """Return all fields in the JSON of a Zarr array that decide the offset of a value."""
    (sharding,) = array["codecs"]
    inner = sharding["configuration"]
    return (
        array["shape"],
        array["data_type"],
        sharding["name"],
        array["chunk_grid"]["configuration"]["chunk_shape"],
        inner["chunk_shape"],
        _codec_names(inner["codecs"]),
        inner.get("index_location", "end"),
    )


def _expected_form(layout: ShardLayout) -> tuple[Any, ...]:
    """Return these fields for the array that `create_mel_array` creates."""
    clip_shape = [layout.frames, layout.bands]
    return (
        [layout.clips, *clip_shape],
        layout.dtype,
        "sharding_indexed",
        [layout.shard_clips, *clip_shape],
        [1, *clip_shape],
        ["bytes", "crc32c"],
        "end",
    )


def _codec_names(codecs: list[dict[str, Any]]) -> list[str]:
    """Return the names of codecs; ValueError if any codec stores big-endian values."""
    if any(codec.get("configuration", {}).get("endian", "little") != "little" for codec in codecs):
        raise ValueError("big-endian")
    return [codec["name"] for codec in codecs]


def _create_zarr_array(store: Any, layout: ShardLayout) -> None:
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    clip_shape = (layout.frames, layout.bands)
    zarr.create_array(
        store,
        name="mel",
        shape=(layout.clips, *clip_shape),
        chunks=(1, *clip_shape),
        shards=(layout.shard_clips, *clip_shape),
        dtype=layout.dtype,
        fill_value=layout.fill_value,
        filters=None,  # values are stored unchanged, so that a crop can be read by its offset
        serializer=BytesCodec() if layout.dtype == "uint8" else BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        dimension_names=("clip", "frame", "band"),
    )


class ShardWriter:
    """Writes one shard clip by clip to a scratch file, with the bytes that zarr-python would write.

    A shard of 512 clips is 128 MiB; zarr-python needs three copies in memory to write it, this writer none.
    """

    def __init__(self, store: Path, layout: ShardLayout, shard: int) -> None:
        self.path = shard_path(store, shard)
        self.size_bytes = 0
        self._first_row = layout.rows_of_shard(shard).start
        make_folders(self.path.parent)
        self._scratch_path = scratch_path(self.path)
        self._file = self._scratch_path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._index_N2 = np.full((layout.shard_clips, 2), ABSENT_OFFSET, "<u8")

    def append_clip(self, row: int, mel_TF: np.ndarray) -> None:
        """Append a clip of the layout's shape and dtype; rows come in ascending order."""
        # The index has the offset of the chunk in the file and its length, checksum included.
        chunk = mel_TF.tobytes()
        self._index_N2[row - self._first_row] = self.size_bytes, len(chunk) + CRC_BYTES
        self._append_bytes(chunk)
        self._append_bytes(crc32c_bytes(chunk))

    def _append_bytes(self, content: bytes) -> None:
        self._digest.update(content)
        self.size_bytes += len(content)
        rest = memoryview(content)
        # An almost full disk writes only a part, and raises at the next attempt.
        while rest:
            rest = rest[self._file.write(rest) :]

    def finish_file(self) -> str:
        """Write the index and force the file to the disk; returns the hex SHA-256 of the whole file."""
        index = self._index_N2.tobytes()
        self._append_bytes(index)
        self._append_bytes(crc32c_bytes(index))
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def place(self) -> None:
        """Move the finished shard from its scratch path to `path`."""
        # The rename is on the disk only after the folder has been synced.
        self._scratch_path.replace(self.path)
        sync_to_disk(self.path.parent)

    def close(self) -> None:
        """Remove the scratch file of an unfinished shard; does nothing after `place`."""
        self._file.close()
        self._scratch_path.unlink(missing_ok=True)


def crc32c_bytes(content: bytes) -> bytes:
    """Return the crc32c of the content as Zarr's codec of that name writes it."""
    return google_crc32c.value(content).to_bytes(CRC_BYTES, "little")


def read_shard_index(descriptor: int, shard_clips: int) -> np.ndarray:
    """Return (offset, bytes) of every clip of an open shard, u64 `[shard_clips, 2]`; ValueError if damaged."""
    # The index is the footer of the file.
    footer_bytes = shard_clips * 16 + CRC_BYTES
    size = os.fstat(descriptor).st_size
    footer = os.pread(descriptor, footer_bytes, max(0, size - footer_bytes))

    # A truncated shard, or one with another number of clips, has another footer.
    if len(footer) < footer_bytes:
        raise ValueError(f"has {size} bytes, too few for an index of {shard_clips} clips")
    if google_crc32c.value(footer[:-CRC_BYTES]) != int.from_bytes(footer[-CRC_BYTES:], "little"):
        raise ValueError("its index does not match its checksum")
    return np.frombuffer(footer[:-CRC_BYTES], "<u8").reshape(shard_clips, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardCommit:
    """The facts that the ledger records about one shard, in addition to the results of its rows."""

    shard: int
    spec_id: str
    plan_id: str
    size_bytes: int  # 0: no clip of the shard is good, and there is no file
    sha256: str
    policy: dict[str, Any]  # `AudioPolicy`: the most permissive one with which any row was built
    moments: dict[str, dict[str, Any]]  # per split: frames, sum_F, square_F over valid frames of good clips


class SplitMoments:
    """Per split: the number of valid frames, and the sums and sums of squares of their stored log-mel per band."""

    def __init__(self) -> None:
        self._sums_by_split: dict[str, tuple[int, Any, Any]] = {}

    def add_frames(self, split: str, values_TF: "Tensor") -> None:
        """Count the valid frames of one clip of a split."""
        # float64: the sums of a million clips would lose digits in float32.
        frames, sum_F, square_F = self._sums_by_split.get(split, (0, 0.0, 0.0))
        values_TF = values_TF.double()
        self._sums_by_split[split] = (
            frames + len(values_TF),
            sum_F + values_TF.sum(0).numpy(),
            square_F + values_TF.square_().sum(0).numpy(),
        )

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return frames, sum_F and square_F by split."""
        return {
            split: {"frames": frames, "sum_F": sum_F.tolist(), "square_F": square_F.tolist()}
            for split, (frames, sum_F, square_F) in self._sums_by_split.items()
        }


def ledger_path(store: Path, shard: int) -> Path:
    """Return the path of the record of a shard."""
    return store / "ledger" / f"{shard:06d}.parquet"


def uncommitted_shards(store: Path) -> list[Path]:
    """Return the shard files below `mel/c` that have no record in the ledger, sorted."""
    known = {shard_path(store, int(path.stem)) for path in store.glob("ledger/[0-9]*.parquet")}
    return sorted(set(store.glob("mel/c/*/0/0")) - known)


def write_commit(path: Path, commit: ShardCommit, results: pl.DataFrame) -> None:
    """Write the record of a shard, with its digest."""
    results = results.select(*RESULT_SCHEMA)
    values = asdict(commit)
    write_table(path, results, {"commit": values, "digest": _commit_digest(frame_digest(results), values)})


def read_commit(store: Path, shard: int) -> tuple[ShardCommit, pl.DataFrame] | None:
    """Return a shard's commit and the results of its rows, or None if it is not committed."""
    path = ledger_path(store, shard)
    if not path.exists():
        return None
    commit, results = read_commit_file(path)
    return _commit_of_shard(path, commit, shard), results


def _commit_of_shard(path: Path, commit: ShardCommit, shard: int) -> ShardCommit:
    """Return the commit in this file if it is that of the shard; raises StoreError."""
    if commit.shard != shard:
        raise StoreError(f"{path}: is the record of shard {commit.shard}; delete it and build again")
    return commit


def read_commits(
    store: Path, shards: Iterable[int]
) -> Iterator[tuple[int, tuple[ShardCommit, pl.DataFrame] | StoreError | None]]:
    """Yield each shard with what `read_commit` returns for it, or with the error that it raises.

    Many records are read and checked at a time, of up to ROWS_OF_RECORDS rows: alone, a record takes five times longer
    to check than to read.
    """
    waiting: list[_ReadRecord] = []
    row_count = 0
    for shard in shards:
        path = ledger_path(store, shard)
        try:
            record = read_arrow_table(path) if path.exists() else None
        except StoreError as error:
            waiting.append((shard, error))
            continue
        waiting.append((shard, record))
        row_count += 0 if record is None else record[0].num_rows
        if row_count >= ROWS_OF_RECORDS:
            yield from _check_records(store, waiting)
            waiting = []
            row_count = 0
    yield from _check_records(store, waiting)


# A shard with its record as a table and metadata that are not checked yet, the error of reading it, or None.
_ReadRecord = tuple[int, tuple[pa.Table, dict[str, Any]] | StoreError | None]


def _check_records(
    store: Path, records: Sequence[_ReadRecord]
) -> Iterator[tuple[int, tuple[ShardCommit, pl.DataFrame] | StoreError | None]]:
    """Yield each shard with its commit and results, or with the error that `read_commit` raises."""
    tables = [record[0] for _, record in records if isinstance(record, tuple)]
    try:
        frames = _frames_with_digests(tables)
    except DAMAGED_TABLE_ERRORS:
        frames = None  # one of them has other columns or is damaged; it shows when each is read alone

    rest = iter(frames or ())
    for shard, record in records:
        if not isinstance(record, tuple):
            yield shard, record
            continue
        path = ledger_path(store, shard)
        try:
            if frames is None:
                yield shard, read_commit(store, shard)
                continue
            frame, digest = next(rest)
            commit = _checked_commit(path, frame.columns, digest, record[1])
            yield shard, (_commit_of_shard(path, commit, shard), frame)
        except StoreError as error:
            yield shard, error


def _frames_with_digests(tables: Sequence[pa.Table]) -> list[tuple[pl.DataFrame, str]]:
    """Return each of several tables as a frame, with its digest; ValueError if one has other columns than the first.

    Also if one has metadata that are no text: a frame of it alone could not be made.
    """
    if not tables:
        return []
    columns = tables[0].schema.remove_metadata()
    for table in tables:
        if not table.schema.remove_metadata().equals(columns, check_metadata=True):
            raise ValueError("other columns")
        for text in itertools.chain.from_iterable((table.schema.metadata or {}).items()):
            text.decode()
    frame = frame_from_arrow(pa.concat_tables(tables))
    heights = [table.num_rows for table in tables]
    ends = itertools.accumulate(heights)
    frames = [frame[end - height : end] for height, end in zip(heights, ends, strict=True)]
    return list(zip(frames, frame_digests(frame, heights), strict=True))


def read_commit_facts(store: Path, shard: int) -> ShardCommit:
    """Return the commit of a shard without its results, and so without the check of its digest; raises StoreError."""
    path = ledger_path(store, shard)
    _, metadata = read_table_schema(path)
    if "commit" not in metadata:
        raise _damaged_record_error(path)
    return ShardCommit(**metadata["commit"])


def read_commit_statuses(store: Path, shard: int) -> pl.Series | None:
    """Return the status of every row of a shard, without a check of the record's digest; None if not committed."""
    path = ledger_path(store, shard)
    if not path.exists():
        return None
    frame, _ = read_table(path, ["status"])
    if frame.columns != ["status"]:
        raise _damaged_record_error(path)
    return frame["status"]


def read_commit_file(path: Path) -> tuple[ShardCommit, pl.DataFrame]:
    """Return the record in one file of the ledger; raises StoreError if it is damaged."""
    frame, metadata = read_table(path)
    return _checked_commit(path, frame.columns, frame_digest(frame), metadata), frame


def _checked_commit(
    path: Path, columns: Sequence[str], results_digest: str, metadata: dict[str, Any]
) -> ShardCommit:
    """Return the commit in the metadata of a record if the record is as it was written; raises StoreError."""
    # The digest covers results and commit together, so that parts of two records cannot be mixed.
    values = metadata.get("commit")
    if (
        values is None
        or columns != list(RESULT_SCHEMA)
        or metadata.get("digest") != _commit_digest(results_digest, values)
    ):
        raise _damaged_record_error(path)
    return ShardCommit(**values)


def _damaged_record_error(path: Path) -> StoreError:
    return StoreError(f"{path}: does not match its digest; run: ajepa-data verify --repair")


def _commit_digest(results_digest: str, values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True) + results_digest
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def compute_store_id(header: StoreHeader, commits: Iterable[ShardCommit]) -> str:
    """Return 12 hex digits of the plan, the mel spec and every shard's digest."""
    text = " ".join([header.plan_id, header.spec.spec_id, *(commit.sha256 for commit in commits)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def commit_shard(store: Path, commit: ShardCommit, results: pl.DataFrame, writer: ShardWriter | None) -> None:
    """Move a shard and its record into place; at every instant, either the old pair or the new pair can be recovered.

    The new record is named `.next` until the shard has been renamed. After a crash between the two steps,
    `resolve_pending_record` decides by the shard's digest which record is valid.
    """
    record = ledger_path(store, commit.shard)
    pending_record = record.with_name(record.name + PENDING_SUFFIX)
    write_commit(pending_record, commit, results)
    if writer is not None:
        writer.place()
    promote_record(pending_record)


def promote_record(pending_record: Path) -> None:
    """Make a pending record valid; its shard must be in place."""
    pending_record.replace(pending_record.with_suffix(""))
    sync_to_disk(pending_record.parent)


def resolve_pending_record(store: Path, pending_record: Path) -> None:
    """Make a pending record valid if its shard is in place, else remove it, so that the old record stays valid."""
    if shard_matches_commit(store, read_commit_file(pending_record)[0]):
        promote_record(pending_record)
    else:
        pending_record.unlink()


def shard_matches_commit(store: Path, commit: ShardCommit) -> bool:
    """Return whether the shard on disk is the committed one, byte for byte (no file for an empty commit)."""
    path = shard_path(store, commit.shard)
    if not commit.size_bytes:
        return not path.exists()
    return file_matches_commit(path, commit)


def file_matches_commit(path: Path, commit: ShardCommit) -> bool:
    """Return whether a file is the committed shard, byte for byte."""
    if not path.is_file() or path.stat().st_size != commit.size_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == commit.sha256
