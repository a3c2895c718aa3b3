"""Write files whole or not at all, and lock a store or a file while one process writes it; the only user of flock."""

import errno
import fcntl
import glob
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from pipeline.errors import InputError, StoreError

# The errnos of an OSError that mean that the disk has no room.
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# The errnos by which a file system says that it has no locks.
NO_LOCK_ERRNOS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

# The suffix of files that a crash may leave behind; the next start removes them.
PARTIAL_SUFFIX = ".partial"

LOCK_POLL_SECONDS = 0.05

# The default limit for shards fetched from object stores, in 10^9 bytes.
DEFAULT_CACHE_GB = 100.0


# Files written whole.


def scratch_path(path: Path) -> Path:
    """Return a path in the folder of `path`, to write to until the file is complete; each process has its own.

    InputError for `/`, and for a device or a pipe, because the final rename would replace it by a file.
    """
    if not path.name:
        raise InputError(f"{path}: is a folder; expected the name of a file to write")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: is a device or a pipe; expected the name of a file to write")
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{PARTIAL_SUFFIX}")


def check_writable(path: Path) -> None:
    """Raise InputError if no file can be written at `path`; call this before work that may take hours."""
    scratch_path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected the name of a file to write")

    # Missing folders will be created, so the nearest existing folder decides.
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{path}: {folder} is a file; expected a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path}: nothing can be written in {folder}; choose another folder")


def abandoned_scratch_paths(path: Path) -> Iterator[Path]:
    """Yield the scratch paths of `path` whose process ran on this machine and has ended."""
    # Processes of other machines cannot be checked from here, so their files stay.
    pattern = f"{glob.escape(path.name)}.{glob.escape(socket.gethostname())}-*{PARTIAL_SUFFIX}"
    for scratch in path.parent.glob(pattern):
        pid = scratch.name.removesuffix(PARTIAL_SUFFIX).rpartition("-")[2]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            yield scratch


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a scratch path in the folder of `path`; on success it is fsynced and renamed to `path`, else removed.

    After the block, `path` is either the old file or the complete new file, even after a power cut.
    """
    scratch = scratch_path(path)
    try:
        yield scratch

        # Force the content to the disk, then rename the file, then force the folder, which records the name.
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


# Locks of a store, of a part of a store, or of a file.


@dataclass(frozen=True, slots=True)
class BuildPart:
    """Every `count`-th block of a plan's shards, beginning with block `index`; part 0 of 1 is the whole build."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a text such as `0/3`, the first of three parts; raises InputError."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise InputError(f"--part {text}: expected i/n with 0 <= i < n, such as 0/3, 1/3 and 2/3")
        return cls(int(index), int(count))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def lock_name(self) -> str:
        """The name of the lock file in the store while this part is being built."""
        return "build.lock" if self.count == 1 else f"build.{self.index}-of-{self.count}.lock"

    def overlaps_lock(self, lock_name: str) -> bool:
        """Return whether the holder of the lock `lock_name` may write the same shards as this part."""
        if self.count == 1 or lock_name == self.lock_name:
            return True
        return not lock_name.endswith(f"-of-{self.count}.lock")


WHOLE_BUILD = BuildPart()


@contextmanager
def lock_store(store: Path, part: BuildPart = WHOLE_BUILD) -> Iterator[None]:
    """Lock a store, or one part of it, for writing; if it is locked, the StoreError names the owner of the lock.

    Different parts of the same division can be locked at the same time; all other locks exclude each other. The
    kernel releases the lock when the process ends. If two processes start at the same instant, both may be refused.
    """
    with _try_exclusive_lock(store / part.lock_name) as lock_file:
        if lock_file is None:
            raise _in_use_error(store, store / part.lock_name)

        # After taking its own lock, check for locks of parts that would write the same shards.
        for lock_path in sorted(store.glob("build.*lock")):
            if lock_path.name == part.lock_name or not part.overlaps_lock(lock_path.name):
                continue
            if not _is_lock_free(lock_path):
                raise _in_use_error(store, lock_path)

        _write_lock_owner(lock_file)
        yield


@contextmanager
def lock_output_file(path: Path) -> Iterator[None]:
    """Lock a file that takes long to write; if it is locked, the StoreError names the process that writes it.

    As with `lock_store`, the kernel releases the lock when the process ends.
    """
    lock_path = path.with_name(path.name + ".lock")
    with _try_exclusive_lock(lock_path) as lock_file:
        if lock_file is None:
            raise _in_use_error(path, lock_path)
        _write_lock_owner(lock_file)
        yield


@contextmanager
def lock_shared_files(store: Path) -> Iterator[None]:
    """Wait for the lock on the files that every part of a build writes, such as `zarr.json`; hold it only briefly."""
    while True:
        with _try_exclusive_lock(store / "gate.lock") as lock_file:
            if lock_file is not None:
                yield
                return
        time.sleep(LOCK_POLL_SECONDS)


@contextmanager
def lock_when_free(path: Path) -> Iterator[None]:
    """Wait for the lock of a file that stays there, and hold it; the kernel releases it when the process ends."""
    with path.open("ab") as lock_file:
        with _naming_lockless_disk(path):
            fcntl.flock(lock_file, fcntl.LOCK_EX)
        yield


@contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock of a file that stays there, as `lock_when_free` does; yield False if another process holds it."""
    with path.open("ab") as lock_file:
        yield _try_flock(lock_file, fcntl.LOCK_EX)


@contextmanager
def _try_exclusive_lock(path: Path) -> Iterator[BinaryIO | None]:
    """Yield an exclusively locked file, or None if another process holds the lock; the file is removed afterwards."""
    with path.open("a+b") as lock_file:
        # Between opening and locking, the last holder may have removed the file; a lock on it would exclude nobody.
        is_ours = False
        if _try_flock(lock_file, fcntl.LOCK_EX):
            with suppress(FileNotFoundError):
                is_ours = path.stat().st_ino == os.fstat(lock_file.fileno()).st_ino
        try:
            yield lock_file if is_ours else None
        finally:
            if is_ours:
                path.unlink()


def _write_lock_owner(lock_file: BinaryIO) -> None:
    # The error of a process that is refused quotes this text.
    lock_file.truncate(0)
    lock_file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    lock_file.flush()


def _is_lock_free(path: Path) -> bool:
    """Return whether no process holds the lock `path`: its holder was killed, or has just finished."""
    # A shared lock is refused while another process holds the exclusive lock; closing the file releases it.
    try:
        with path.open("rb") as lock_file:
            return _try_flock(lock_file, fcntl.LOCK_SH)
    except FileNotFoundError:
        return True


def _try_flock(lock_file: BinaryIO, kind: int) -> bool:
    """Take a lock of this kind, LOCK_EX or LOCK_SH, without waiting; return whether it was free."""
    try:
        with _naming_lockless_disk(Path(lock_file.name)):
            fcntl.flock(lock_file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _naming_lockless_disk(lock_path: Path) -> Iterator[None]:
    """Raise StoreError, in one line, where the file system has no locks: without them two writers would meet."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_LOCK_ERRNOS:
            raise
        lock_path.unlink(missing_ok=True)  # nobody can hold it
        raise StoreError(
            f"{lock_path.parent}: its file system has no locks ({error.strerror}), which keep two writers apart; "
            "write to another disk and copy, or mount it with them (Lustre: -o flock, NFS: a running lockd)"
        ) from None


def _in_use_error(path: Path, lock_path: Path) -> StoreError:
    try:
        owner = lock_path.read_text() or "another process"
    except FileNotFoundError:
        owner = "another process"
    return StoreError(f"{path} is being written by {owner}; wait for it")
