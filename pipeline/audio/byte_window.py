"""Part of a file, or of a buffer in memory, as a read-only file: decoders read members of a tar through it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, RawIOBase
from pathlib import Path
from typing import Any, Self


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


SoundInput = Path | BytesIO | ByteWindow  # what a decoder opens
