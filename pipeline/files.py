"""Files written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"  # suffix of what a crash may leave behind; swept at the next start


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside `path`; on success it is fsynced and renamed to `path`, else removed.

    After the block either the old file or the whole new one is there, also after a power cut.
    """
    scratch = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield scratch
        fsync(scratch)
        scratch.replace(path)
        fsync(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
