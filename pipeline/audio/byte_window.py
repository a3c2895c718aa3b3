"""Window: some bytes of a file, or of memory, as a file of their own that is only read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path
from typing import Any, Self


class ByteWindow(RawIOBase):
    """Bytes [offset, offset + size) of an open file or of memory; nothing is held but the place.

    A seek before the first byte leads to the first byte: libsndfile asks for such places in damaged files, and
    an exception there would be printed, not raised.
    """

    def __init__(self, source: int | memoryview, offset: int, size: int) -> None:
        self._source, self._offset, self._size, self._position = source, offset, size, 0

    @classmethod
    @contextmanager
    def open_range(cls, path: Path, offset: int, size: int) -> Iterator[Self]:
        """Part of the file at `path`; OSError where there is none."""
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield cls(file, offset, size)
        finally:
            os.close(file)

    def duplicate(self) -> "ByteWindow":
        """The same bytes with a place of its own."""
        return ByteWindow(self._source, self._offset, self._size)

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as there are bytes; the file may end before the window does."""
        target = memoryview(buffer).cast("B")
        begin = self._offset + self._position
        count = max(0, min(len(target), self._size - self._position))
        if not count:
            return 0
        if isinstance(self._source, int):
            piece: bytes | memoryview = os.pread(self._source, count, begin)
        else:
            piece = self._source[begin : begin + count]
        target[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As any file's."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def tell(self) -> int:
        """As any file's."""
        return self._position

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True
