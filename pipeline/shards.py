"""Shards: the standard Zarr v3 objects that hold the spectrograms, written whole and read by offset.

zarr-python creates the array and reads it; shards are written by `ShardWriter`, which needs no second copy of them in
memory, and read for training by `reading.ShardReader`, because zarr-python's random access is an order of
magnitude slower. Layout of `mel/c/<shard>/0/0`: one chunk per clip that is there (little-endian
values, then their crc32c), then one (offset, bytes) pair of u64 per clip of the shard, then the crc32c of these.
A clip that is not there has the pair (2^64-1, 2^64-1) and reads as the fill value through zarr-python.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from pipeline.errors import StoreError
from pipeline.files import fsync, scratch_of

ABSENT = 2**64 - 1
CRC_BYTES = 4
DTYPES = ("float16", "uint8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The array `mel`: clips x frames x bands, one chunk a clip, `shard_clips` chunks a shard."""

    clips: int
    frames: int
    bands: int
    dtype: str  # float16 or uint8
    shard_clips: int

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype}")

    @property
    def fill(self) -> float | int:
        """What an absent clip reads as in zarr-python; no clip that is there holds it throughout."""
        return 0 if self.dtype == "uint8" else math.nan

    @property
    def clip_bytes(self) -> int:
        return self.frames * self.bands * np.dtype(self.dtype).itemsize

    @property
    def shards(self) -> int:
        return -(-self.clips // self.shard_clips)

    def rows(self, shard: int) -> range:
        """The rows of `mel` that a shard holds."""
        return range(shard * self.shard_clips, min((shard + 1) * self.shard_clips, self.clips))


def shard_clips_for(clips: int, clip_bytes: int) -> int:
    """A power of two: at most 128 MiB, at least 16 clips, and at least 64 shards where the set allows it."""
    most = min(128 * 2**20 // clip_bytes, clips // 64)
    return max(16, 2 ** int(math.log2(max(most, 1))))


def shard_path(store: Path, shard: int) -> Path:
    """Where Zarr keeps a shard of `mel`."""
    return store / "mel" / "c" / str(shard) / "0" / "0"


def create_array(store: Path, layout: Layout, attributes: dict[str, object]) -> None:
    """Write the group's and the array's `zarr.json` below the folder `store`."""
    import zarr  # takes a second, and those who only read or write shards need none of it

    folder = zarr.storage.LocalStore(store)
    zarr.create_group(folder, attributes=attributes)
    _array(folder, layout)


def group_json(attributes: dict[str, object]) -> bytes:
    """What the store's own `zarr.json` holds."""
    import zarr

    objects: dict[str, Any] = {}
    zarr.create_group(zarr.storage.MemoryStore(objects), attributes=attributes)
    return objects["zarr.json"].to_bytes()


def array_json(layout: Layout) -> bytes:
    """What `mel/zarr.json` holds."""
    from zarr.storage import MemoryStore

    objects: dict[str, Any] = {}
    _array(MemoryStore(objects), layout)
    return objects["mel/zarr.json"].to_bytes()


def check_array(store: Path, layout: Layout) -> None:
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
            _names(inner["codecs"]),
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


def _names(codecs: list[dict[str, Any]]) -> list[str]:
    if any(codec.get("configuration", {}).get("endian", "little") != "little" for codec in codecs):
        raise ValueError("big-endian")
    return [codec["name"] for codec in codecs]


def _array(store: Any, layout: Layout) -> None:
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
        fill_value=layout.fill,
        filters=None,
        serializer=BytesCodec() if layout.dtype == "uint8" else BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        dimension_names=("clip", "frame", "band"),
    )


class ShardWriter:
    """One shard, written clip by clip beside its place: the bytes that zarr-python would write, without a copy of them.

    A shard of 512 clips is 128 MiB; zarr-python holds it three times to write it once.
    """

    def __init__(self, store: Path, layout: Layout, shard: int) -> None:
        self.path, self._layout, self._shard = shard_path(store, shard), layout, shard
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = scratch_of(self.path)
        self._file = self._scratch.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._index_N2 = np.full((layout.shard_clips, 2), ABSENT, "<u8")
        self.size_bytes = 0

    def add(self, row: int, mel_TF: np.ndarray) -> None:
        """Append a clip of the layout's shape and dtype; rows come in ascending order."""
        chunk = mel_TF.tobytes()
        place = row - self._layout.rows(self._shard).start
        self._index_N2[place] = self.size_bytes, len(chunk) + CRC_BYTES
        self._append(chunk)
        self._append(crc32c(chunk))

    def _append(self, content: bytes) -> None:
        self._digest.update(content)
        self.size_bytes += len(content)
        rest = memoryview(content)
        while rest:  # a disk that is almost full takes a part
            rest = rest[self._file.write(rest) :]

    def finish(self) -> str:
        """Write the index and force all to the disk; returns the hex SHA-256 of the whole."""
        index = self._index_N2.tobytes()
        self._append(index)
        self._append(crc32c(index))
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def place(self) -> None:
        """Move the finished shard to its place."""
        self._scratch.replace(self.path)
        fsync(self.path.parent)

    def close(self) -> None:
        """Leave nothing of an unfinished shard; does nothing after `place`."""
        self._file.close()
        self._scratch.unlink(missing_ok=True)


def crc32c(content: bytes) -> bytes:
    """As Zarr's codec of that name writes it."""
    return google_crc32c.value(content).to_bytes(CRC_BYTES, "little")


def read_index(descriptor: int, shard_clips: int) -> np.ndarray:
    """(offset, bytes) of every clip of an open shard as `[shard_clips, 2]` u64; raises ValueError if damaged."""
    footer_bytes = shard_clips * 16 + CRC_BYTES
    size = os.fstat(descriptor).st_size
    footer = os.pread(descriptor, footer_bytes, max(0, size - footer_bytes))
    if len(footer) < footer_bytes:
        raise ValueError(f"has {size} bytes, too few for an index of {shard_clips} clips")
    if google_crc32c.value(footer[:-CRC_BYTES]) != int.from_bytes(footer[-CRC_BYTES:], "little"):
        raise ValueError("its index does not match its checksum")
    return np.frombuffer(footer[:-CRC_BYTES], "<u8").reshape(shard_clips, 2)
