"""Shards: the standard Zarr v3 objects that hold the spectrograms, written whole and read by offset.

zarr-python creates the array and reads it; shards are written by `ShardWriter`, which needs no second copy of them in
memory, and read for training by `ShardReader`, because zarr-python's random access is an order of magnitude
slower. Layout of `mel/c/<shard>/0/0`: one chunk per clip that is there (little-endian
values, then their crc32c), then one (offset, bytes) pair of u64 per clip of the shard, then the crc32c of these.
A clip that is not there has the pair (2^64-1, 2^64-1) and reads as the fill value through zarr-python.
"""

import hashlib
import math
import os
from collections import OrderedDict
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
OPEN_SHARDS = 256  # file descriptors a reader keeps


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


class ShardReader:
    """Chunks of a store by row, each with one `pread` into the caller's memory.

    For one thread: a shard least recently used is closed, and another thread might be reading it.
    """

    def __init__(self, store: Path, layout: Layout) -> None:
        self._store, self._layout = store, layout
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()

    def read_into(self, row: int, out_TF: np.ndarray, *, start_frame: int = 0) -> None:
        """Frames [start, start + len(out)) of one row; raises StoreError where the clip is not there."""
        layout = self._layout
        shard, chunk = divmod(row, layout.shard_clips)
        descriptor, index_N2 = self._shard(shard)
        offset = int(index_N2[chunk, 0])
        if offset == ABSENT:
            raise StoreError(
                f"{self._store}: row {row} is not in shard {shard}; run: ajepa-data verify {self._store}"
            )
        skip = start_frame * layout.bands * out_TF.itemsize
        if os.preadv(descriptor, [out_TF.data.cast("B")], offset + skip) != out_TF.nbytes:
            raise StoreError(f"{self._store}: shard {shard} ends early; run: ajepa-data verify {self._store}")

    def _shard(self, shard: int) -> tuple[int, np.ndarray]:
        try:
            entry = self._open.pop(shard)  # popped and put back: the last used is the last closed
        except KeyError:
            entry = self._read_index(shard)
        self._open[shard] = entry
        if len(self._open) > OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
        return entry

    def _read_index(self, shard: int) -> tuple[int, np.ndarray]:
        path = shard_path(self._store, shard)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}; run: ajepa-data verify {self._store}") from None
        try:
            index = read_index(descriptor, self._layout.shard_clips)
        except ValueError as error:
            os.close(descriptor)
            raise StoreError(f"{path}: {error}; run: ajepa-data verify {self._store}") from None
        return descriptor, index

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1][0])

    __del__ = close


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
