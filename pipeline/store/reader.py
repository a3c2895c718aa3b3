"""Read the stored values of rows from their shards into the caller's memory, and check them against their crc32c."""

import errno
import fcntl
import mmap
import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

import google_crc32c
import numpy as np

from pipeline.errors import BrokenClipError, InputError, StoreError
from pipeline.store.header import ShardLayout
from pipeline.store.shards import ABSENT_OFFSET, CRC_BYTES, read_shard_index

ReadMethod = Literal["pread", "mmap", "direct"]

ChecksumMode = Literal["first-epoch", "always", "never"]

MAX_OPEN_SHARDS = 256  # files that a reader keeps open; a mapped file counts twice

# A reader's part of the files that the process may have open: there is one reader for each store and thread.
OPEN_FILES_SHARE = 1 / 8

DISK_BLOCK_BYTES = 4096  # offsets, lengths and memory of direct reads are multiples of it

# Flags of a read: it may wait for the disk, or it fails if bytes are not in memory, which only Linux can tell.
WAIT_FLAG = 0
NO_WAIT_FLAG = getattr(os, "RWF_NOWAIT", WAIT_FLAG)

OPEN_ATTEMPTS = 3  # attempts to open a shard before it counts as missing

# An OSError with one of these errnos is the fault of the file, not of this process.
BROKEN_FILE_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ESTALE)

# A read with NO_WAIT_FLAG fails with one of these: not in memory, or the file system does not support the flag.
NOT_IN_MEMORY_ERRNOS = (errno.EAGAIN, errno.EOPNOTSUPP)


class RowReader(Protocol):
    """The interface through which a store reads its values."""

    def read(self, rows_B: np.ndarray, starts_B: np.ndarray, out_BTF: np.ndarray) -> None:
        """Read the stored frames [start, start + T) of each row; BrokenClipError for a clip that fails."""


class _ShardFile:
    """An open shard file; it is closed when nothing refers to it any more."""

    chunk_offsets: memoryview  # u64, one per clip of the shard

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = -1  # so that `__del__` works if opening fails
        self.descriptor = os.open(path, os.O_RDONLY)
        self.file_identity = _file_identity(os.fstat(self.descriptor))

    def map_into_memory(self) -> None:
        """Map the whole file, for `_read_from_mmap`."""
        self.mapped_file = mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ)
        self.mapped_bytes_N = np.frombuffer(self.mapped_file, np.uint8)
        self.probe_byte = bytearray(1)

    def bypass_page_cache(self) -> None:
        """Read past the page cache from now on; StoreError if the file system refuses."""
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            raise StoreError(
                f"{self.path}: its file system refuses direct reads; use --io pread or mmap"
            ) from None

    def is_still_on_disk(self) -> bool:
        """Return whether the path still refers to this open file."""
        try:
            return _file_identity(self.path.stat()) == self.file_identity
        except FileNotFoundError:
            return False

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class _ReadRequest(NamedTuple):
    """The read of one row of a batch: the bytes of a shard, and the memory to copy them to.

      offset
        |<---------------------- clip_bytes ----------------------->|
    ... | frames before the crop |    the crop    | frames after it | crc32c | ...
        |<---- skipped_bytes --->|<-- len(out) -->|
    """

    row: int
    shard: _ShardFile
    offset: int  # of the clip's chunk in the shard
    skipped_bytes: int  # of the chunk, before the crop
    out: memoryview


class _ChunkOffsets(NamedTuple):
    """Where the chunks of a shard begin, one offset for each of its clips, as read from one version of its file."""

    file_identity: tuple[int, ...]
    offsets: memoryview


# Reads into buffers from an offset of a shard, as `preadv` does; returns the number of bytes read.
_ReadBytes = Callable[[_ShardFile, list[memoryview], int, int], int]


class ShardReader:
    """Reads clips of a store by row, for one thread; a clip that cannot be read raises BrokenClipError.

    locate_shard  function that returns the path of a shard; it may fetch the shard first
    io            how bytes are read
                  pread   all bytes that are not in memory are requested at once, so that the disk can work on the
                          whole batch (measured: 22 instead of 46 ms for 64 clips)
                  mmap    bytes in memory are copied from the mapped file; a quarter faster, but they count as the
                          process's own memory
                  direct  past the page cache, one clip after the other; for stores so large that they would displace
                          everything else in the cache
    check         when a clip is compared with its own crc32c: `first-epoch` (the first time that this process reads
                  the row), `always` or `never`. A check reads the whole clip, even if only a crop is requested
    checked_rows  for `first-epoch`: one byte per row, 0 while its check is due; the readers of a store share it
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
        _check_choice("io", io, get_args(ReadMethod))
        _check_choice("check", check, get_args(ChecksumMode))
        self._locate_shard = locate_shard
        self._layout = layout
        self._io = io

        # One byte per row: 0 while its check is due. With `always` a row's byte is never set.
        if checked_rows is None or check != "first-epoch":
            checked_rows = bytearray(layout.clips)
        self._checked_rows = checked_rows
        if check == "never":
            self._checked_rows[:] = bytes([1]) * layout.clips
        self._checked_mark = 0 if check == "always" else 1

        # The least recently used file is closed first; the offsets read from its index are kept.
        self._open_shards: OrderedDict[int, _ShardFile] = OrderedDict()
        self._max_open_shards = most_open_shards(io)
        self._offsets_by_shard: dict[int, _ChunkOffsets] = {}

        # Buffers: a whole clip if only a crop is requested, the checksum of a clip, and whole blocks of the disk.
        self._clip_buffer = memoryview(bytearray(layout.clip_bytes))
        self._checksum_buffer = memoryview(bytearray(CRC_BYTES))
        if io == "direct":
            blocks = layout.clip_bytes // DISK_BLOCK_BYTES + 3
            self._block_buffer = memoryview(mmap.mmap(-1, blocks * DISK_BLOCK_BYTES))  # page-aligned
        read_methods: dict[ReadMethod, _ReadBytes] = {
            "pread": _read_with_pread,
            "mmap": _read_from_mmap,
            "direct": self._read_direct,
        }
        self._read_bytes = read_methods[io]

    def read(self, rows_B: np.ndarray, starts_B: np.ndarray, out_BTF: np.ndarray) -> None:
        """Read frames [start, start + T) of each row; BrokenClipError if a clip is missing or not as it was written."""
        if not out_BTF.size:
            return

        # Read first every clip that is already in memory.
        waiting = []
        for request in self._plan_requests(rows_B, starts_B, out_BTF):
            if not self._try_request(request, NO_WAIT_FLAG):
                waiting.append(request)

        # Request all other clips from the disk before waiting for the first of them.
        if self._io == "pread":
            for request in waiting:
                os.posix_fadvise(
                    request.shard.descriptor, request.offset, self._layout.clip_bytes, os.POSIX_FADV_WILLNEED
                )
        for request in waiting:
            if not self._try_request(request, WAIT_FLAG):
                raise BrokenClipError(request.row, f"{request.shard.path}: ends early")

    def _plan_requests(
        self, rows_B: np.ndarray, starts_B: np.ndarray, out_BTF: np.ndarray
    ) -> Iterator[_ReadRequest]:
        """Yield a request for each row, with its shard opened; BrokenClipError if the shard lacks the clip."""
        # The output as bytes, `crop_bytes` of them for each row.
        out = out_BTF.data.cast("B")
        crop_bytes = out_BTF[0].nbytes
        frame_bytes = self._layout.bands * out_BTF.itemsize

        # Where each clip stands: its shard, its chunk in the shard, and the bytes of the chunk before the crop.
        shards_B, chunks_B = np.divmod(rows_B, self._layout.shard_clips)
        columns = (rows_B, shards_B, chunks_B, starts_B * frame_bytes)
        places = zip(*(column.tolist() for column in columns), strict=True)
        for clip, (row, number, chunk, skipped_bytes) in enumerate(places):
            shard = self._shard_file(number, row)
            offset = shard.chunk_offsets[chunk]
            if offset == ABSENT_OFFSET:
                raise BrokenClipError(row, f"{shard.path}: does not contain the clip")
            crop = out[clip * crop_bytes : (clip + 1) * crop_bytes]
            yield _ReadRequest(row, shard, offset, skipped_bytes, crop)

    def _try_request(self, request: _ReadRequest, flags: int) -> bool:
        """Read one clip and return whether all its bytes were read; BrokenClipError if a check is due and fails."""
        try:
            if self._checked_rows[request.row]:
                return self._read_crop(request, flags)
            return self._read_and_check_clip(request, flags)
        except OSError as error:
            if flags != WAIT_FLAG and error.errno in NOT_IN_MEMORY_ERRNOS:
                return False
            raise _read_error(error, request.row, request.shard.path) from None

    def _read_crop(self, request: _ReadRequest, flags: int) -> bool:
        """Read only the requested frames of a clip whose check is not due; return whether all were there."""
        _, shard, offset, skipped_bytes, out = request
        return self._read_bytes(shard, [out], offset + skipped_bytes, flags) == len(out)

    def _read_and_check_clip(self, request: _ReadRequest, flags: int) -> bool:
        """Read a whole clip and return whether all of it was there; BrokenClipError if its checksum differs."""
        # Read straight to the output if all frames are requested.
        row, shard, offset, skipped_bytes, out = request
        clip = self._clip_buffer
        if len(out) == len(clip):
            clip = out
        count = self._read_bytes(shard, [clip, self._checksum_buffer], offset, flags)
        if count != len(clip) + CRC_BYTES:
            return False

        # Compare the clip with its own checksum.
        expected_crc = int.from_bytes(self._checksum_buffer, "little")
        if google_crc32c.value(np.frombuffer(clip, np.uint8)) != expected_crc:
            raise BrokenClipError(row, f"{shard.path}: its spectrogram does not match its checksum")

        # If frames were read only for the check, copy the crop to the output.
        if clip is not out:
            out[:] = clip[skipped_bytes : skipped_bytes + len(out)]
        self._checked_rows[row] = self._checked_mark
        return True

    def _read_direct(self, shard: _ShardFile, buffers: list[memoryview], offset: int, flags: int) -> int:
        """Read past the page cache, with the result of `preadv`: whole blocks are read, the requested bytes copied."""
        # The blocks from the first requested byte to the last.
        count = sum(map(len, buffers))
        first = offset // DISK_BLOCK_BYTES * DISK_BLOCK_BYTES
        block_count = -(-(offset + count - first) // DISK_BLOCK_BYTES)
        blocks = self._block_buffer[: block_count * DISK_BLOCK_BYTES]

        # At the end of a file, fewer bytes are read than requested.
        wanted_count = os.preadv(shard.descriptor, [blocks], first) - (offset - first)
        return _copy_into_buffers(blocks[offset - first :][: max(wanted_count, 0)], buffers)

    def _shard_file(self, number: int, row: int) -> _ShardFile:
        """Return a shard's open file; opening one may close the least recently used file."""
        shard = self._open_shards.get(number)
        if shard is not None:
            self._open_shards.move_to_end(number)
            return shard
        shard = self._open_shard_file(number, row)
        self._open_shards[number] = shard
        if len(self._open_shards) > self._max_open_shards:
            self._open_shards.popitem(last=False)
        return shard

    def _open_shard_file(self, number: int, row: int) -> _ShardFile:
        # Errors name the path, or the shard's number if its path could not be found.
        path = Path(f"shard {number}")
        try:
            path = self._locate_shard(number)
            shard = self._open_with_retries(number, path)
            shard.chunk_offsets = self._chunk_offsets(number, shard)
            if self._io == "mmap":
                shard.map_into_memory()
            elif self._io == "direct":
                shard.bypass_page_cache()
        except OSError as error:
            raise _read_error(error, row, path) from None
        except ValueError as error:
            raise BrokenClipError(row, f"{path}: {error}") from None
        return shard

    def _chunk_offsets(self, number: int, shard: _ShardFile) -> memoryview:
        """Return the offsets of a shard's chunks; the index is read again only if the file has been replaced."""
        known = self._offsets_by_shard.get(number)
        if known is None or known.file_identity != shard.file_identity:
            known = _ChunkOffsets(shard.file_identity, _read_chunk_offsets(shard.descriptor, self._layout))
            self._offsets_by_shard[number] = known
        return known.offsets

    def _open_with_retries(self, number: int, path: Path) -> _ShardFile:
        for _ in range(OPEN_ATTEMPTS):
            try:
                return _ShardFile(path)
            except FileNotFoundError:  # another process may have dropped it from the cache just now
                path = self._locate_shard(number)
        return _ShardFile(path)

    def close_missing_files(self) -> None:
        """Close files that no longer exist: a file that the cache has deleted occupies the disk until it is closed."""
        missing = [number for number, shard in self._open_shards.items() if not shard.is_still_on_disk()]
        for number in missing:
            del self._open_shards[number]

    def close(self) -> None:
        """Close all files; the next read opens them again."""
        self._open_shards.clear()


def most_open_shards(io: ReadMethod) -> int:
    """Return how many shard files a reader keeps open, by the limit of this process (`ulimit -n`); at least one."""
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_SHARDS
    if soft_limit != resource.RLIM_INFINITY:
        most = min(most, int(OPEN_FILES_SHARE * soft_limit))
    return max(1, most // 2 if io == "mmap" else most)


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name} {value!r}: expected {', '.join(known)}")


def _read_with_pread(shard: _ShardFile, buffers: list[memoryview], offset: int, flags: int) -> int:
    return os.preadv(shard.descriptor, buffers, offset, flags)


def _read_from_mmap(shard: _ShardFile, buffers: list[memoryview], offset: int, flags: int) -> int:
    """Read with the result of `preadv`; bytes are copied from mapped memory if the last one is already in memory.

    This is checked first, because copying from a failing disk or a truncated file would kill the process.
    """
    count = sum(map(len, buffers))
    if flags == WAIT_FLAG or shard.mapped_file.size() < offset + count:
        return os.preadv(shard.descriptor, buffers, offset)

    # Raises BlockingIOError if the last byte is not in memory.
    os.preadv(shard.descriptor, [shard.probe_byte], offset + count - 1, flags)
    return _copy_into_buffers(shard.mapped_bytes_N[offset : offset + count], buffers)


def _copy_into_buffers(content: "np.ndarray | memoryview", buffers: list[memoryview]) -> int:
    """Fill the buffers one after the other with the content; returns how many bytes were copied."""
    copied = 0
    for buffer in buffers:
        count = min(len(buffer), len(content) - copied)
        # numpy's copy releases the GIL, so that other threads can run.
        np.copyto(np.frombuffer(buffer, np.uint8)[:count], content[copied : copied + count])
        copied += count
    return copied


def _read_chunk_offsets(descriptor: int, layout: ShardLayout) -> memoryview:
    """Return the offset of every clip's chunk in a shard; ValueError if a chunk has another length."""
    index_N2 = read_shard_index(descriptor, layout.shard_clips)
    present_N = index_N2[:, 0] != ABSENT_OFFSET
    if (index_N2[present_N, 1] != layout.clip_bytes + CRC_BYTES).any():
        raise ValueError(f"contains chunks that are not {layout.clip_bytes} bytes and a checksum")
    return np.ascontiguousarray(index_N2[:, 0], np.uint64).data


def _file_identity(status: os.stat_result) -> tuple[int, ...]:
    """Return device, inode, size and time of change: at least one differs between two files or versions of a file."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_error(error: OSError, row: int, path: Path) -> StoreError:
    """Return the error for a failed read: BrokenClipError if it concerns only this clip, else StoreError."""
    if error.errno in BROKEN_FILE_ERRNOS:
        return BrokenClipError(row, f"{path}: {error.strerror}")
    return StoreError(f"{path}: {error.strerror}; check its permissions, the disk and `ulimit -n`")
