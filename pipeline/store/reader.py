"""Reading: the stored values of rows, out of their shards, into the caller's memory."""

import errno
import fcntl
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol, get_args

import google_crc32c
import numpy as np

from pipeline.errors import BrokenClip, InputError, StoreError
from pipeline.store.header import Layout
from pipeline.store.shards import ABSENT, CRC_BYTES, read_index

Io = Literal["pread", "mmap", "direct"]

Check = Literal["first-epoch", "always", "never"]

OPEN_SHARDS = 256  # file descriptors a reader keeps

BLOCK_BYTES = 4096  # what places, lengths and memory of direct reads are multiples of

NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # only Linux can say what is in memory already

TRIES = 3  # to open a shard before it is gone for good

BROKEN = (errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ESTALE)  # of an OSError: this file, not this process


class Reader(Protocol):
    """Where a store has its values from."""

    def read(self, rows_B: np.ndarray, starts_B: np.ndarray, out_BTF: np.ndarray) -> None:
        """Frames [start, start + T) of each row, as stored; raises BrokenClip for what cannot be had."""


class _Shard:
    """An open shard; its file is closed with the last reference."""

    offsets: memoryview  # of each clip's chunk

    def __init__(self, path: Path) -> None:
        self.path, self.descriptor = path, -1
        self.descriptor = os.open(path, os.O_RDONLY)
        self.stamp = _stamp(os.fstat(self.descriptor))

    def map(self) -> None:
        """Read from mapped memory from now on."""
        self.mapped = mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ)
        self.bytes_N, self.one_byte = np.frombuffer(self.mapped, np.uint8), bytearray(1)

    def bypass_the_page_cache(self) -> None:
        """Read directly from now on; raises StoreError where the file system does not have it."""
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            raise StoreError(
                f"{self.path}: its file system refuses direct reads; use --io pread or mmap"
            ) from None

    def is_there(self) -> bool:
        """Whether its path still leads to it."""
        try:
            return _stamp(self.path.stat()) == self.stamp
        except FileNotFoundError:
            return False

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


Part = tuple[int, _Shard, int, int, memoryview]  # row, where, offset of its chunk, bytes to skip, where to


class ShardReader:
    """Clips of a store by row; `locate` says where a shard lies. For one thread; BrokenClip is what it raises.

    io     pread: what is not in memory is asked for at once, so that a disk has all of a batch to do (measured:
           22 instead of 46 ms for 64 clips); mmap: what is in memory is copied from the mapped file, a quarter
           faster, but counted as the process's own memory; direct: past the page cache, for stores that would
           only wash it out, one clip after the other
    check  whether a clip's own crc32c is compared: the first time that this process reads its row (`checked` is
           shared by the readers of a store), always, or never. A check reads the whole clip, also for a crop of it
    """

    def __init__(
        self,
        locate: Callable[[int], Path],
        layout: Layout,
        *,
        io: Io = "pread",
        check: Check = "never",
        checked: bytearray | None = None,
    ) -> None:
        for name, value, known in (("io", io, get_args(Io)), ("check", check, get_args(Check))):
            if value not in known:
                raise InputError(f"{name} {value!r}: expected {', '.join(known)}")
        self._locate, self._layout, self._io = locate, layout, io
        self._checked = bytearray(layout.clips) if checked is None or check != "first-epoch" else checked
        if check == "never":
            self._checked[:] = bytes([1]) * layout.clips
        self._mark = 0 if check == "always" else 1  # of a row whose check is done
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._offsets: dict[int, tuple[tuple[int, ...], memoryview]] = {}  # of every shard that was ever open
        self._clip, self._crc = memoryview(bytearray(layout.clip_bytes)), memoryview(bytearray(CRC_BYTES))
        self._get = {"pread": _pread, "mmap": _mmap, "direct": self._direct}[io]
        if io == "direct":  # anonymous memory begins at a page
            self._blocks = memoryview(mmap.mmap(-1, (layout.clip_bytes // BLOCK_BYTES + 3) * BLOCK_BYTES))

    def read(self, rows_B: np.ndarray, starts_B: np.ndarray, out_BTF: np.ndarray) -> None:
        """Frames [start, start + T) of each row; raises BrokenClip where a clip is not there as it was written."""
        if not out_BTF.size:
            return
        layout, out, size = self._layout, out_BTF.data.cast("B"), out_BTF[0].nbytes
        skips_B = starts_B * (layout.bands * out_BTF.itemsize)
        shards_B, chunks_B = np.divmod(rows_B, layout.shard_clips)
        parts = zip(rows_B.tolist(), shards_B.tolist(), chunks_B.tolist(), skips_B.tolist(), strict=True)
        waiting, begin = [], 0
        for row, number, chunk, skip in parts:
            shard = self._shard(number, row)
            offset = shard.offsets[chunk]
            if offset == ABSENT:
                raise BrokenClip(row, f"{shard.path}: does not hold it")
            part = (row, shard, offset, skip, out[begin : begin + size])
            begin += size
            if not self._filled(part, NOWAIT):
                waiting.append(part)
        for _, shard, offset, _, _ in (
            waiting if self._io == "pread" else ()
        ):  # ask for all, then wait for the first
            os.posix_fadvise(shard.descriptor, offset, layout.clip_bytes, os.POSIX_FADV_WILLNEED)
        for part in waiting:
            if not self._filled(part, 0):
                raise BrokenClip(part[0], f"{part[1].path}: ends early")

    def _filled(self, part: Part, flags: int) -> bool:
        """Whether all of a part came, and is right if its check is due."""
        row, shard, offset, skip, out = part
        try:
            if self._checked[row]:
                return self._get(shard, [out], offset + skip, flags) == len(out)
            clip = out if len(out) == len(self._clip) else self._clip
            if self._get(shard, [clip, self._crc], offset, flags) != len(clip) + CRC_BYTES:
                return False
        except OSError as error:
            if flags and error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return False
            raise _told(error, row, shard.path) from None
        if google_crc32c.value(np.frombuffer(clip, np.uint8)) != int.from_bytes(self._crc, "little"):
            raise BrokenClip(row, f"{shard.path}: its spectrogram does not match its checksum")
        if clip is not out:
            out[:] = clip[skip : skip + len(out)]
        self._checked[row] = self._mark
        return True

    def _direct(self, shard: _Shard, outs: list[memoryview], offset: int, flags: int) -> int:
        """As `preadv` past the page cache: whole blocks into a buffer of whole blocks, then what is wanted of them."""
        first, count = offset // BLOCK_BYTES * BLOCK_BYTES, sum(map(len, outs))
        blocks = self._blocks[: -(-(offset + count - first) // BLOCK_BYTES) * BLOCK_BYTES]
        came = os.preadv(shard.descriptor, [blocks], first) - (offset - first)
        return _scatter(blocks[offset - first :][: max(came, 0)], outs)

    def _shard(self, number: int, row: int) -> _Shard:
        shard = self._open.get(number)
        if shard is None:
            self._open[number] = shard = self._opened(number, row)
            if len(self._open) > (
                OPEN_SHARDS // 2 if self._io == "mmap" else OPEN_SHARDS
            ):  # a map holds one too
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(number)  # the last used is the last closed
        return shard

    def _opened(self, number: int, row: int) -> _Shard:
        path = Path(f"shard {number}")
        try:
            path = self._locate(number)
            shard = self._found(number, path)
            before = self._offsets.get(number)
            if before is None or before[0] != shard.stamp:  # never seen, or another by now
                before = shard.stamp, _offsets(shard.descriptor, self._layout)
                self._offsets[number] = before
            shard.offsets = before[1]
            if self._io == "mmap":
                shard.map()
            elif self._io == "direct":
                shard.bypass_the_page_cache()
        except OSError as error:
            raise _told(error, row, path) from None
        except ValueError as error:
            raise BrokenClip(row, f"{path}: {error}") from None
        return shard

    def _found(self, number: int, path: Path) -> _Shard:
        for _ in range(TRIES):
            try:
                return _Shard(path)
            except FileNotFoundError:  # another process may have dropped it from the cache just now
                path = self._locate(number)
        return _Shard(path)

    def forget(self) -> None:
        """Close the files that are gone: what a cache has dropped takes room until then."""
        for number in [number for number, shard in self._open.items() if not shard.is_there()]:
            del self._open[number]

    def close(self) -> None:
        self._open.clear()


def _pread(shard: _Shard, outs: list[memoryview], offset: int, flags: int) -> int:
    return os.preadv(shard.descriptor, outs, offset, flags)


def _mmap(shard: _Shard, outs: list[memoryview], offset: int, flags: int) -> int:
    """As `preadv`, copied from mapped memory where the last of it is there already.

    Else a disk that fails would kill the process, as would a file that has been cut: so it is measured first.
    """
    count = sum(map(len, outs))
    if not flags or shard.mapped.size() < offset + count:
        return os.preadv(shard.descriptor, outs, offset)
    os.preadv(shard.descriptor, [shard.one_byte], offset + count - 1, flags)  # BlockingIOError: not in memory
    return _scatter(shard.bytes_N[offset : offset + count], outs)


def _scatter(content: "np.ndarray | memoryview", outs: list[memoryview]) -> int:
    """Copy to where it is wanted; how many bytes that were."""
    done = 0
    for out in outs:
        some = min(len(out), len(content) - done)
        np.copyto(np.frombuffer(out, np.uint8)[:some], content[done : done + some])  # lets other threads run
        done += some
    return done


def _offsets(descriptor: int, layout: Layout) -> memoryview:
    """Of the chunk of every clip of a shard; ValueError where these are not the ones that this package writes."""
    index_N2 = read_index(descriptor, layout.shard_clips)
    there_N = index_N2[:, 0] != ABSENT
    if (index_N2[there_N, 1] != layout.clip_bytes + CRC_BYTES).any():
        raise ValueError(f"holds chunks that are not {layout.clip_bytes} bytes and a checksum")
    return np.ascontiguousarray(index_N2[:, 0], np.uint64).data


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """What changes with a file."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _told(error: OSError, row: int, path: Path) -> StoreError:
    """What a failed read means: for this clip, or for all."""
    if error.errno in BROKEN:
        return BrokenClip(row, f"{path}: {error.strerror}")
    return StoreError(f"{path}: {error.strerror}; check its permissions, the disk and `ulimit -n`")
