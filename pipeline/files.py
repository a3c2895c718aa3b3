"""Files written whole or not at all, by one process at a time."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import StoreError

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


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Hold a store for writing; raises StoreError that names who holds it. The kernel frees it with the process."""
    path = store / "build.lock"
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino
        except BlockingIOError:
            ours = False
        if not ours:
            lock.seek(0)
            raise StoreError(f"{store} is being written by {lock.read() or 'another process'}; wait for it")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        try:
            yield
        finally:
            path.unlink()  # who opened it before now finds it gone, above
