"""Shards: the standard Zarr v3 objects that hold the spectrograms, written whole and read by offset.

zarr-python creates the array and reads it; shards are written by `ShardWriter`, which needs no second copy of them in
memory, and read for training by `reading.ShardReader`, because zarr-python's random access is an order of
magnitude slower. Layout of `mel/c/<shard>/0/0`: one chunk per clip that is there (little-endian
values, then their crc32c), then one (offset, bytes) pair of u64 per clip of the shard, then the crc32c of these.
A clip that is not there has the pair (2^64-1, 2^64-1) and reads as the fill value through zarr-python.

The ledger: one record a shard, the commit point; how a shard and its record are put in place.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import polars as pl
from torch import Tensor

from pipeline.errors import StoreError
from pipeline.files import scratch_path, sync_to_disk
from pipeline.store.header import ShardLayout, StoreHeader
from pipeline.store.manifest import RESULT_SCHEMA
from pipeline.tables import frame_digest, read_table, write_table

ABSENT_OFFSET = 2**64 - 1

CRC_BYTES = 4


def choose_shard_clips(clips: int, clip_bytes: int) -> int:
    """A power of two: at most 128 MiB, at least 16 clips, and at least 64 shards where the set allows it."""
    most = min(128 * 2**20 // clip_bytes, clips // 64)
    return max(16, 2 ** int(math.log2(max(most, 1))))


def shard_path(store: Path, shard: int) -> Path:
    """Where Zarr keeps a shard of `mel`."""
    return store / "mel" / "c" / str(shard) / "0" / "0"


def create_mel_array(store: Path, layout: ShardLayout, attributes: dict[str, object]) -> None:
    """Write the group's and the array's `zarr.json` below the folder `store`."""
    import zarr  # takes a second, and those who only read or write shards need none of it

    folder = zarr.storage.LocalStore(store)
    zarr.create_group(folder, attributes=attributes)
    _create_zarr_array(folder, layout)


def zarr_group_json(attributes: dict[str, object]) -> bytes:
    """What the store's own `zarr.json` holds."""
    import zarr

    objects: dict[str, Any] = {}
    zarr.create_group(zarr.storage.MemoryStore(objects), attributes=attributes)
    return objects["zarr.json"].to_bytes()


def zarr_array_json(layout: ShardLayout) -> bytes:
    """What `mel/zarr.json` holds."""
    from zarr.storage import MemoryStore

    objects: dict[str, Any] = {}
    _create_zarr_array(MemoryStore(objects), layout)
    return objects["mel/zarr.json"].to_bytes()


def check_mel_array(store: Path, layout: ShardLayout) -> None:
    """Raise StoreError where `mel/zarr.json` tells of another array than `create_array` makes: it cannot be read."""
    path = store / "mel" / "zarr.json"
    try:
        told = json.loads(path.read_text())
        outer, (sharding,) = told["chunk_grid"]["configuration"]["chunk_shape"], told["codecs"]
        inner, form = sharding["configuration"], (told["shape"], told["data_type"], sharding["name"])
        there = (
            *form,
            outer,
            inner["chunk_shape"],
            _codec_names(inner["codecs"]),
            inner.get("index_location", "end"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not as written"
        raise StoreError(f"{path}: {why}; run: ajepa-data verify {store} --repair") from None
    clip = [layout.frames, layout.bands]
    form = [layout.clips, *clip], layout.dtype, "sharding_indexed"
    wanted = (*form, [layout.shard_clips, *clip], [1, *clip], ["bytes", "crc32c"], "end")
    if there != wanted:
        raise StoreError(f"{path}: tells of {there}, expected {wanted}; only stores as built can be read")


def _codec_names(codecs: list[dict[str, Any]]) -> list[str]:
    if any(codec.get("configuration", {}).get("endian", "little") != "little" for codec in codecs):
        raise ValueError("big-endian")
    return [codec["name"] for codec in codecs]


def _create_zarr_array(store: Any, layout: ShardLayout) -> None:
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    one_clip = (1, layout.frames, layout.bands)
    zarr.create_array(
        store,
        name="mel",
        shape=(layout.clips, layout.frames, layout.bands),
        chunks=one_clip,
        shards=(layout.shard_clips, *one_clip[1:]),
        dtype=layout.dtype,
        fill_value=layout.fill_value,
        filters=None,
        serializer=BytesCodec() if layout.dtype == "uint8" else BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        dimension_names=("clip", "frame", "band"),
    )


class ShardWriter:
    """One shard, written clip by clip beside its place: the bytes that zarr-python would write, without a copy of them.

    A shard of 512 clips is 128 MiB; zarr-python holds it three times to write it once.
    """

    def __init__(self, store: Path, layout: ShardLayout, shard: int) -> None:
        self.path, self._layout, self._shard_number = shard_path(store, shard), layout, shard
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._scratch_path = scratch_path(self.path)
        self._file = self._scratch_path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._index_N2 = np.full((layout.shard_clips, 2), ABSENT_OFFSET, "<u8")
        self.size_bytes = 0

    def append_clip(self, row: int, mel_TF: np.ndarray) -> None:
        """Append a clip of the layout's shape and dtype; rows come in ascending order."""
        chunk = mel_TF.tobytes()
        move_into_place = row - self._layout.rows_of_shard(self._shard_number).start
        self._index_N2[move_into_place] = self.size_bytes, len(chunk) + CRC_BYTES
        self._append_bytes(chunk)
        self._append_bytes(crc32c_bytes(chunk))

    def _append_bytes(self, content: bytes) -> None:
        self._digest.update(content)
        self.size_bytes += len(content)
        rest = memoryview(content)
        while rest:  # a disk that is almost full takes a part
            rest = rest[self._file.write(rest) :]

    def finish_file(self) -> str:
        """Write the index and force all to the disk; returns the hex SHA-256 of the whole."""
        index = self._index_N2.tobytes()
        self._append_bytes(index)
        self._append_bytes(crc32c_bytes(index))
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def place(self) -> None:
        """Move the finished shard to its place."""
        self._scratch_path.replace(self.path)
        sync_to_disk(self.path.parent)

    def close(self) -> None:
        """Leave nothing of an unfinished shard; does nothing after `place`."""
        self._file.close()
        self._scratch_path.unlink(missing_ok=True)


def crc32c_bytes(content: bytes) -> bytes:
    """As Zarr's codec of that name writes it."""
    return google_crc32c.value(content).to_bytes(CRC_BYTES, "little")


def read_shard_index(descriptor: int, shard_clips: int) -> np.ndarray:
    """(offset, bytes) of every clip of an open shard as `[shard_clips, 2]` u64; raises ValueError if damaged."""
    footer_bytes = shard_clips * 16 + CRC_BYTES
    size = os.fstat(descriptor).st_size
    footer = os.pread(descriptor, footer_bytes, max(0, size - footer_bytes))
    if len(footer) < footer_bytes:
        raise ValueError(f"has {size} bytes, too few for an index of {shard_clips} clips")
    if google_crc32c.value(footer[:-CRC_BYTES]) != int.from_bytes(footer[-CRC_BYTES:], "little"):
        raise ValueError("its index does not match its checksum")
    return np.frombuffer(footer[:-CRC_BYTES], "<u8").reshape(shard_clips, 2)


PENDING_SUFFIX = ".next"  # suffix of a record whose shard is about to be placed


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardCommit:
    """What the ledger says of one shard beside the results of its rows."""

    shard: int
    spec_id: str
    plan_id: str
    size_bytes: int  # 0: no clip of the shard is good, and Zarr keeps no object
    sha256: str
    policy: dict[str, Any]  # `AudioPolicy` of the clips: the loosest of those with which its rows were built
    moments: dict[str, dict[str, Any]]  # per split: frames, sum_F, square_F over valid frames of good clips


class SplitMoments:
    """Per split: how many valid frames, and the sums and sums of squares of their stored log-mel per band."""

    def __init__(self) -> None:
        self._sums_by_split: dict[str, tuple[int, Any, Any]] = {}

    def add_frames(self, split: str, values_TF: Tensor) -> None:
        frames, sum_F, square_F = self._sums_by_split.get(split, (0, 0.0, 0.0))
        values_TF = values_TF.double()
        self._sums_by_split[split] = (
            frames + len(values_TF),
            sum_F + values_TF.sum(0).numpy(),
            square_F + values_TF.square_().sum(0).numpy(),
        )

    def to_json(self) -> dict[str, dict[str, Any]]:
        return {
            split: {"frames": frames, "sum_F": sum_F.tolist(), "square_F": square_F.tolist()}
            for split, (frames, sum_F, square_F) in self._sums_by_split.items()
        }


def ledger_path(store: Path, shard: int) -> Path:
    return store / "ledger" / f"{shard:06d}.parquet"


def uncommitted_shards(store: Path) -> list[Path]:
    """Objects below `mel/c` that no record of the ledger tells of."""
    known = {shard_path(store, int(path.stem)) for path in store.glob("ledger/[0-9]*.parquet")}
    return sorted(set(store.glob("mel/c/*/0/0")) - known)


def write_commit(path: Path, commit: ShardCommit, results: pl.DataFrame) -> None:
    """Write what the ledger says of a shard."""
    results, values = results.select(*RESULT_SCHEMA), asdict(commit)
    write_table(path, results, {"commit": values, "digest": _commit_digest(results, values)})


def read_commit(store: Path, shard: int) -> tuple[ShardCommit, pl.DataFrame] | None:
    """A shard's commit and the results of its rows, or None where it is not committed."""
    path = ledger_path(store, shard)
    if not path.exists():
        return None
    commit, results = read_commit_file(path)
    if commit.shard != shard:
        raise StoreError(f"{path}: is the record of shard {commit.shard}; delete it and build again")
    return commit, results


def read_commit_file(path: Path) -> tuple[ShardCommit, pl.DataFrame]:
    """The record in one file of the ledger; raises StoreError, also where it does not match its own digest."""
    frame, metadata = read_table(path)
    values = metadata.get("commit")
    if (
        values is None
        or frame.columns != list(RESULT_SCHEMA)
        or metadata.get("digest") != _commit_digest(frame, values)
    ):
        raise StoreError(f"{path}: does not match its digest; run: ajepa-data verify --repair")
    return ShardCommit(**values), frame


def _commit_digest(results: pl.DataFrame, values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True) + frame_digest(results)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def compute_store_id(header: StoreHeader, commits: Sequence[ShardCommit]) -> str:
    """12 hex digits of plan, spec, and every shard's digest."""
    text = " ".join([header.plan_id, header.spec.spec_id, *(commit.sha256 for commit in commits)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def commit_shard(store: Path, commit: ShardCommit, results: pl.DataFrame, writer: ShardWriter | None) -> None:
    """Put a shard and its record in place so that at every instant the old pair or the new one can be had.

    The new record waits as `.next` while the shard is renamed; `settle` decides by the shard's digest.
    """
    record = ledger_path(store, commit.shard)
    waiting = record.with_name(record.name + PENDING_SUFFIX)
    write_commit(waiting, commit, results)
    if writer is not None:
        writer.place()
    promote_record(waiting)


def promote_record(pending_record: Path) -> None:
    """Let the record count whose shard is in place."""
    pending_record.replace(pending_record.with_suffix(""))
    sync_to_disk(pending_record.parent)


def resolve_pending_record(store: Path, pending_record: Path) -> None:
    """Adopt a waiting record if the shard it tells of is in place, else drop it: the old record holds."""
    if shard_matches_commit(store, read_commit_file(pending_record)[0]):
        promote_record(pending_record)
    else:
        pending_record.unlink()


def shard_matches_commit(store: Path, commit: ShardCommit) -> bool:
    """Whether the shard on disk is the one that was committed, byte for byte."""
    path = shard_path(store, commit.shard)
    return file_matches_commit(path, commit) if commit.size_bytes else not path.exists()


def file_matches_commit(path: Path, commit: ShardCommit) -> bool:
    """Whether a file is the shard that was committed, byte for byte."""
    if not path.is_file() or path.stat().st_size != commit.size_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == commit.sha256
