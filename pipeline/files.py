"""Files written whole or not at all, and who may write a store or a file that takes long."""

import errno
import fcntl
import glob
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from pipeline.errors import InputError, StoreError

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: the disk has no room

PARTIAL_SUFFIX = ".partial"  # suffix of what a crash may leave behind; swept at the next start

LOCK_POLL_SECONDS = 0.05

DEFAULT_CACHE_GB = (
    100.0  # 10^9 bytes that shards fetched from object stores take at most, unless told otherwise
)


def scratch_path(path: Path) -> Path:
    """Where to write what will be `path`; another on every machine and in every process.

    InputError for `/`, and for what is neither a file nor a folder: a rename would put a file in a device's place.
    """
    if not path.name:
        raise InputError(f"{path}: is a folder; expected the name of a file to write")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: is a device or a pipe; expected the name of a file to write")
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{PARTIAL_SUFFIX}")


def check_writable(path: Path) -> None:
    """InputError where no file could be put at `path` in the end; for before the work, which may take hours."""
    scratch_path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected the name of a file to write")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{path}: {folder} is a file; expected a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path}: nothing can be written in {folder}; choose another folder")


def abandoned_scratch_paths(path: Path) -> Iterator[Path]:
    """Scratch paths of `path` whose process, on this machine, is no more."""
    for scratch in path.parent.glob(
        f"{glob.escape(path.name)}.{glob.escape(socket.gethostname())}-*{PARTIAL_SUFFIX}"
    ):
        pid = scratch.name.removesuffix(PARTIAL_SUFFIX).rpartition("-")[2]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            yield scratch


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside `path`; on success it is fsynced and renamed to `path`, else removed.

    After the block either the old file or the whole new one is there, also after a power cut.
    """
    scratch = scratch_path(path)
    try:
        yield scratch
        sync_to_disk(scratch)
        scratch.replace(path)
        sync_to_disk(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Force a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class BuildPart:
    """Every `of`-th block of a plan's shards, beginning with number `index`; 0 of 1 is all of them."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """`0/3`, `1/3` and `2/3` are the three parts of a plan; raises InputError."""
        index, _, of = text.partition("/")
        if not (index.isdecimal() and of.isdecimal() and int(index) < int(of)):
            raise InputError(f"--part {text}: expected i/n with 0 <= i < n, such as 0/3, 1/3 and 2/3")
        return cls(int(index), int(of))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def lock_name(self) -> str:
        return "build.lock" if self.count == 1 else f"build.{self.index}-of-{self.count}.lock"

    def overlaps_lock(self, lock_name: str) -> bool:
        """Whether whoever holds that lock may write where this part does."""
        return (
            self.count == 1 or lock_name == self.lock_name or not lock_name.endswith(f"-of-{self.count}.lock")
        )


WHOLE_BUILD = BuildPart()


@contextmanager
def lock_store(store: Path, part: BuildPart = WHOLE_BUILD) -> Iterator[None]:
    """Hold a store, or a part of it, for writing; raises StoreError that names who holds it.

    Parts of one division may be held together, all else excludes each other. The kernel frees a lock with its
    process. Of two that start in the same instant both may be refused.
    """
    with _try_exclusive_lock(store / part.lock_name) as lock:
        if lock is None:
            raise _in_use_error(store, store / part.lock_name)
        for other in sorted(store.glob("build.*lock")):
            if other.name != part.lock_name and part.overlaps_lock(other.name) and not _is_lock_free(other):
                raise _in_use_error(store, other)
        _write_lock_owner(lock)
        yield


@contextmanager
def lock_output_file(path: Path) -> Iterator[None]:
    """Hold a file that is long in the making; raises StoreError that names who else makes it. As `locked` else."""
    lock_path = path.with_name(path.name + ".lock")
    with _try_exclusive_lock(lock_path) as lock:
        if lock is None:
            raise _in_use_error(path, lock_path)
        _write_lock_owner(lock)
        yield


@contextmanager
def lock_shared_files(store: Path) -> Iterator[None]:
    """Wait for, then hold, what parts share: the files beside the shards. For moments only."""
    while True:
        with _try_exclusive_lock(store / "gate.lock") as lock:
            if lock is not None:
                yield
                return
        time.sleep(LOCK_POLL_SECONDS)


@contextmanager
def _try_exclusive_lock(path: Path) -> Iterator[BinaryIO | None]:
    """An exclusive lock on a file that is gone afterwards; None where somebody else has it."""
    with path.open("a+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = path.stat().st_ino == os.fstat(lock.fileno()).st_ino
        except (BlockingIOError, FileNotFoundError):  # held, or gone between opening and locking it
            ours = False
        try:
            yield lock if ours else None
        finally:
            if ours:
                path.unlink()  # who opened it before now finds it gone, above


def _write_lock_owner(lock: BinaryIO) -> None:
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    lock.flush()


def _is_lock_free(path: Path) -> bool:
    """Whether nobody holds that lock: its holder was killed, or has just finished."""
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _in_use_error(store: Path, path: Path) -> StoreError:
    try:
        who = path.read_text() or "another process"
    except FileNotFoundError:
        who = "another process"
    return StoreError(f"{store} is being written by {who}; wait for it")
