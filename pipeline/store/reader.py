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

from pipeline.errors import BrokenClipError, InputError, StoreError
from pipeline.store.header import ShardLayout
from pipeline.store.shards import ABSENT_OFFSET, CRC_BYTES, read_shard_index

ReadMethod = Literal["pread", "mmap", "direct"]

ChecksumMode = Literal["first-epoch", "always", "never"]

MAX_OPEN_SHARDS = 256  # file descriptors a reader keeps

DISK_BLOCK_BYTES = 4096  # what places, lengths and memory of direct reads are multiples of

NO_WAIT_FLAG = getattr(os, "RWF_NOWAIT", 0)  # only Linux can say what is in memory already

OPEN_ATTEMPTS = 3  # to open a shard before it is gone for good

BROKEN_FILE_ERRNOS = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EIO,
    errno.ESTALE,
)  # of an OSError: this file, not this process


class RowReader(Protocol):
    """Where a store has its values from."""

    def read(self, rows_B: np.ndarray, starts_B: np.ndarray, out_BTF: np.ndarray) -> None:
        """Frames [start, start + T) of each row, as stored; raises BrokenClip for what cannot be had."""


class _ShardFile:
    """An open shard; its file is closed with the last reference."""

    chunk_offsets: memoryview  # of each clip's chunk

    def __init__(self, path: Path) -> None:
        self.path, self.descriptor = path, -1
        self.descriptor = os.open(path, os.O_RDONLY)
        self.file_identity = _file_identity(os.fstat(self.descriptor))

    def map_into_memory(self) -> None:
        """Read from mapped memory from now on."""
        self.mapped_file = mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ)
        self.mapped_bytes_N, self.probe_byte = np.frombuffer(self.mapped_file, np.uint8), bytearray(1)

    def bypass_page_cache(self) -> None:
        """Read directly from now on; raises StoreError where the file system does not have it."""
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            raise StoreError(
                f"{self.path}: its file system refuses direct reads; use --io pread or mmap"
            ) from None

    def is_still_on_disk(self) -> bool:
        """Whether its path still leads to it."""
        try:
            return _file_identity(self.path.stat()) == self.file_identity
        except FileNotFoundError:
            return False

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


ReadRequest = tuple[
    int, _ShardFile, int, int, memoryview
]  # row, where, offset of its chunk, bytes to skip, where to


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
        locate_shard: Callable[[int], Path],
        layout: ShardLayout,
        *,
        io: ReadMethod = "pread",
        check: ChecksumMode = "never",
        checked_rows: bytearray | None = None,
    ) -> None:
        for name, value, known in (
            ("io", io, get_args(ReadMethod)),
            ("check", check, get_args(ChecksumMode)),
        ):
            if value not in known:
                raise InputError(f"{name} {value!r}: expected {', '.join(known)}")
        self._locate_shard, self._layout, self._io = locate_shard, layout, io
        self._checked_rows = (
            bytearray(layout.clips) if checked_rows is None or check != "first-epoch" else checked_rows
        )
        if check == "never":
            self._checked_rows[:] = bytes([1]) * layout.clips
        self._checked_mark = 0 if check == "always" else 1  # of a row whose check is done
        self._open_shards: OrderedDict[int, _ShardFile] = OrderedDict()
        self._offsets_by_shard: dict[
            int, tuple[tuple[int, ...], memoryview]
        ] = {}  # of every shard that was ever open
        self._clip_buffer, self._checksum_buffer = (
            memoryview(bytearray(layout.clip_bytes)),
            memoryview(bytearray(CRC_BYTES)),
        )
        self._read_bytes = {"pread": _read_with_pread, "mmap": _read_from_mmap, "direct": self._read_direct}[
            io
        ]
        if io == "direct":  # anonymous memory begins at a page
            self._block_buffer = memoryview(
                mmap.mmap(-1, (layout.clip_bytes // DISK_BLOCK_BYTES + 3) * DISK_BLOCK_BYTES)
            )

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
            shard = self._shard_file(number, row)
            offset = shard.chunk_offsets[chunk]
            if offset == ABSENT_OFFSET:
                raise BrokenClipError(row, f"{shard.path}: does not hold it")
            part = (row, shard, offset, skip, out[begin : begin + size])
            begin += size
            if not self._try_request(part, NO_WAIT_FLAG):
                waiting.append(part)
        for _, shard, offset, _, _ in (
            waiting if self._io == "pread" else ()
        ):  # ask for all, then wait for the first
            os.posix_fadvise(shard.descriptor, offset, layout.clip_bytes, os.POSIX_FADV_WILLNEED)
        for part in waiting:
            if not self._try_request(part, 0):
                raise BrokenClipError(part[0], f"{part[1].path}: ends early")

    def _try_request(self, request: ReadRequest, flags: int) -> bool:
        """Whether all of a part came, and is right if its check is due."""
        row, shard, offset, skip, out = request
        try:
            if self._checked_rows[row]:
                return self._read_bytes(shard, [out], offset + skip, flags) == len(out)
            clip = out if len(out) == len(self._clip_buffer) else self._clip_buffer
            if self._read_bytes(shard, [clip, self._checksum_buffer], offset, flags) != len(clip) + CRC_BYTES:
                return False
        except OSError as error:
            if flags and error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return False
            raise _read_error(error, row, shard.path) from None
        if google_crc32c.value(np.frombuffer(clip, np.uint8)) != int.from_bytes(
            self._checksum_buffer, "little"
        ):
            raise BrokenClipError(row, f"{shard.path}: its spectrogram does not match its checksum")
        if clip is not out:
            out[:] = clip[skip : skip + len(out)]
        self._checked_rows[row] = self._checked_mark
        return True

    def _read_direct(self, shard: _ShardFile, buffers: list[memoryview], offset: int, flags: int) -> int:
        """As `preadv` past the page cache: whole blocks into a buffer of whole blocks, then what is wanted of them."""
        first, count = offset // DISK_BLOCK_BYTES * DISK_BLOCK_BYTES, sum(map(len, buffers))
        blocks = self._block_buffer[: -(-(offset + count - first) // DISK_BLOCK_BYTES) * DISK_BLOCK_BYTES]
        came = os.preadv(shard.descriptor, [blocks], first) - (offset - first)
        return _copy_into_buffers(blocks[offset - first :][: max(came, 0)], buffers)

    def _shard_file(self, number: int, row: int) -> _ShardFile:
        shard = self._open_shards.get(number)
        if shard is None:
            self._open_shards[number] = shard = self._open_shard_file(number, row)
            if len(self._open_shards) > (
                MAX_OPEN_SHARDS // 2 if self._io == "mmap" else MAX_OPEN_SHARDS
            ):  # a map holds one too
                self._open_shards.popitem(last=False)
        else:
            self._open_shards.move_to_end(number)  # the last used is the last closed
        return shard

    def _open_shard_file(self, number: int, row: int) -> _ShardFile:
        path = Path(f"shard {number}")
        try:
            path = self._locate_shard(number)
            shard = self._open_with_retries(number, path)
            before = self._offsets_by_shard.get(number)
            if before is None or before[0] != shard.file_identity:  # never seen, or another by now
                before = shard.file_identity, _read_chunk_offsets(shard.descriptor, self._layout)
                self._offsets_by_shard[number] = before
            shard.chunk_offsets = before[1]
            if self._io == "mmap":
                shard.map_into_memory()
            elif self._io == "direct":
                shard.bypass_page_cache()
        except OSError as error:
            raise _read_error(error, row, path) from None
        except ValueError as error:
            raise BrokenClipError(row, f"{path}: {error}") from None
        return shard

    def _open_with_retries(self, number: int, path: Path) -> _ShardFile:
        for _ in range(OPEN_ATTEMPTS):
            try:
                return _ShardFile(path)
            except FileNotFoundError:  # another process may have dropped it from the cache just now
                path = self._locate_shard(number)
        return _ShardFile(path)

    def close_missing_files(self) -> None:
        """Close the files that are gone: what a cache has dropped takes room until then."""
        for number in [number for number, shard in self._open_shards.items() if not shard.is_still_on_disk()]:
            del self._open_shards[number]

    def close(self) -> None:
        self._open_shards.clear()


def _read_with_pread(shard: _ShardFile, buffers: list[memoryview], offset: int, flags: int) -> int:
    return os.preadv(shard.descriptor, buffers, offset, flags)


def _read_from_mmap(shard: _ShardFile, buffers: list[memoryview], offset: int, flags: int) -> int:
    """As `preadv`, copied from mapped memory where the last of it is there already.

    Else a disk that fails would kill the process, as would a file that has been cut: so it is measured first.
    """
    count = sum(map(len, buffers))
    if not flags or shard.mapped_file.size() < offset + count:
        return os.preadv(shard.descriptor, buffers, offset)
    os.preadv(
        shard.descriptor, [shard.probe_byte], offset + count - 1, flags
    )  # BlockingIOError: not in memory
    return _copy_into_buffers(shard.mapped_bytes_N[offset : offset + count], buffers)


def _copy_into_buffers(content: "np.ndarray | memoryview", buffers: list[memoryview]) -> int:
    """Copy to where it is wanted; how many bytes that were."""
    done = 0
    for out in buffers:
        some = min(len(out), len(content) - done)
        np.copyto(np.frombuffer(out, np.uint8)[:some], content[done : done + some])  # lets other threads run
        done += some
    return done


def _read_chunk_offsets(descriptor: int, layout: ShardLayout) -> memoryview:
    """Of the chunk of every clip of a shard; ValueError where these are not the ones that this package writes."""
    index_N2 = read_shard_index(descriptor, layout.shard_clips)
    there_N = index_N2[:, 0] != ABSENT_OFFSET
    if (index_N2[there_N, 1] != layout.clip_bytes + CRC_BYTES).any():
        raise ValueError(f"holds chunks that are not {layout.clip_bytes} bytes and a checksum")
    return np.ascontiguousarray(index_N2[:, 0], np.uint64).data


def _file_identity(status: os.stat_result) -> tuple[int, ...]:
    """What changes with a file."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_error(error: OSError, row: int, path: Path) -> StoreError:
    """What a failed read means: for this clip, or for all."""
    if error.errno in BROKEN_FILE_ERRNOS:
        return BrokenClipError(row, f"{path}: {error.strerror}")
    return StoreError(f"{path}: {error.strerror}; check its permissions, the disk and `ulimit -n`")
