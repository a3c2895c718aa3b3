"""Part of a file, or of a buffer in memory, as a read-only file: decoders read members of a tar through it."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, Self

from pipeline.errors import AudioError

# After so long, a change of a file changes its time, too: times have steps of milliseconds.
SETTLED_NS = 10**9


class ByteWindow(RawIOBase):
    """Bytes [offset, offset + size) of an open file or of memory. They are read on demand, never copied as a whole.

    A seek to a negative position goes to the first byte. libsndfile requests negative positions in damaged files, and
    an exception raised inside its callback would be printed, not raised.
    """

    def __init__(self, source: int | memoryview, offset: int, size: int) -> None:
        self._source = source  # a file descriptor, or a buffer
        self._offset = offset
        self._size = size
        self._position = 0

    @classmethod
    @contextmanager
    def open_range(cls, path: Path, offset: int, size: int) -> Iterator[Self]:
        """Open `size` bytes from `offset` on of the file at `path`; OSError if the file cannot be opened."""
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield cls(file, offset, size)
        finally:
            os.close(file)

    def duplicate(self) -> "ByteWindow":
        """A window on the same bytes with a position of its own, at the first byte."""
        return ByteWindow(self._source, self._offset, self._size)

    def tail(self, offset: int, size: int | None = None) -> "ByteWindow":
        """A window on the bytes from `offset` on, at most `size` of them."""
        rest = max(0, self._size - offset)
        return ByteWindow(self._source, self._offset + offset, rest if size is None else min(size, rest))

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer and return the number of bytes read, which is smaller at the end of the window or file."""
        target = memoryview(buffer).cast("B")
        count = max(0, min(len(target), self._size - self._position))
        if not count:
            return 0

        begin = self._offset + self._position
        if isinstance(self._source, int):
            piece: bytes | memoryview = os.pread(self._source, count, begin)
        else:
            piece = self._source[begin : begin + count]

        # The file may end before the window does: then the piece is shorter than `count`.
        target[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move as in any file and return the new position, which is never negative."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def tell(self) -> int:
        """The position, counted from the first byte of the window."""
        return self._position

    def readable(self) -> bool:
        """Always True."""
        return True

    def seekable(self) -> bool:
        """Always True."""
        return True


ReadableFile = BinaryIO | ByteWindow  # what a header is read from

SoundInput = Path | BytesIO | ByteWindow  # what a decoder opens


@contextmanager
def open_from_start(sound: SoundInput) -> Iterator[ReadableFile]:
    """Open the sound at its first byte, with a position of its own: a sound may be open twice at the same time."""
    if isinstance(sound, Path):
        if not sound.is_file():
            raise AudioError("missing", f"{describe_absence(sound)}; fetch it, or correct its path")
        with sound.open("rb") as file:
            yield file
    elif isinstance(sound, ByteWindow):
        yield sound.duplicate()
    else:
        buffer = sound.getbuffer()
        yield ByteWindow(buffer, 0, buffer.nbytes)


def describe_absence(path: Path) -> str:
    """Why there is no file at a path, in a few words."""
    if path.is_symlink():
        return f"a link to {str(path.readlink())!a}, where there is no file"
    if path.is_dir():
        return "a folder, not a file"
    return "no such file"


def file_identity(path: Path) -> tuple[int, int, int] | None:
    """Size, time and inode of a file, which change with it; None if there is none, or if it was written just now."""
    try:
        status = path.stat()
    except OSError:
        return None
    if abs(time.time_ns() - status.st_mtime_ns) < SETTLED_NS:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


@contextmanager
def open_byte_range(sound: SoundInput, offset: int, size: int | None = None) -> Iterator[ByteWindow]:
    """Open the bytes of a sound from `offset` on, at most `size` of them."""
    if isinstance(sound, Path):
        with ByteWindow.open_range(sound, 0, sound.stat().st_size) as window:
            yield window.tail(offset, size)
    else:
        with open_from_start(sound) as window:
            assert isinstance(window, ByteWindow)
            yield window.tail(offset, size)
