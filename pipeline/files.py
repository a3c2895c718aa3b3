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

EMPTY_HOLDER_SECONDS = 60.0  # after so long, an empty holder file is that of a dead process

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


def make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing, and force their names to the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_to_disk(folder.parent)


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
        if _try_flock(lock_file, fcntl.LOCK_EX, waiting=fcntl.LOCK_EX) is not None:
            yield
            return
    while True:
        with _try_holder_file(path) as is_ours:
            if is_ours:
                yield
                return
        time.sleep(LOCK_POLL_SECONDS)


@contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock of a file that stays there, as `lock_when_free` does; yield False if another process holds it."""
    with path.open("ab") as lock_file, _try_lock(lock_file) as is_ours:
        yield is_ours


@contextmanager
def _try_exclusive_lock(path: Path) -> Iterator[BinaryIO | None]:
    """Yield an exclusively locked file, or None if another process holds the lock; the file is removed afterwards."""
    with path.open("a+b") as lock_file, _try_lock(lock_file) as is_locked:
        # Between opening and locking, the last holder may have removed the file; a lock on it would exclude nobody.
        is_ours = False
        if is_locked:
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
            is_free = _try_flock(lock_file, fcntl.LOCK_SH)
    except FileNotFoundError:
        return True
    return not _is_held(_holder_path(path)) if is_free is None else is_free


@contextmanager
def _try_lock(lock_file: BinaryIO) -> Iterator[bool]:
    """Take the exclusive lock of an open file, without waiting; yield whether it was free."""
    is_free = _try_flock(lock_file, fcntl.LOCK_EX)
    if is_free is not None:
        yield is_free
        return
    with _try_holder_file(Path(lock_file.name)) as is_ours:
        yield is_ours


def _try_flock(lock_file: BinaryIO, kind: int, *, waiting: int | None = None) -> bool | None:
    """Take a lock of the kernel, LOCK_EX or LOCK_SH, without waiting; return whether it was free.

    None if the file system has no such locks. With `waiting`, wait for a lock of that kind instead.
    """
    try:
        fcntl.flock(lock_file, kind | fcntl.LOCK_NB if waiting is None else waiting)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCK_ERRNOS:
            raise
        return None
    return True


# Locks where the file system has none (NFS without lockd, Lustre without -o flock, some FUSE): a file beside the lock,
# made with O_EXCL, that names its process. That of a dead process is taken away; only its own machine can tell.


def _holder_path(lock_path: Path) -> Path:
    return lock_path.with_name(lock_path.name + ".held")


@contextmanager
def _try_holder_file(lock_path: Path) -> Iterator[bool]:
    """Make the file that stands for the lock; yield whether no other process has it. It is removed afterwards."""
    holder = _holder_path(lock_path)
    _remove_dead_holder(holder)
    try:
        descriptor = os.open(holder, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        yield False
        return
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(_describe_process(os.getpid()))
            file.flush()
            os.fsync(file.fileno())
        yield True
    finally:
        holder.unlink(missing_ok=True)


def _describe_process(pid: int) -> str:
    return f"process {pid} on {socket.gethostname()}, begun at {_process_start(pid)}"


def _process_start(pid: int) -> str:
    """Return when a process of this machine began, in the kernel's ticks; empty if there is none with this number."""
    # The name of the program, in brackets, may contain spaces; the start is the 20th field after it.
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_held(holder: Path) -> bool:
    """Return whether the process that a holder file names may still run."""
    try:
        text = holder.read_text()
        age_seconds = time.time() - holder.stat().st_mtime
    except FileNotFoundError:
        return False

    # A process that died between making the file and writing into it left it empty.
    if not text:
        return age_seconds < EMPTY_HOLDER_SECONDS
    words = text.split()
    if len(words) < 4 or words[3].rstrip(",") != socket.gethostname():
        return True
    pid = int(words[1])
    return bool(_process_start(pid)) and text == _describe_process(pid)


def _remove_dead_holder(holder: Path) -> None:
    """Remove a holder file whose process has ended; of several processes that try, one succeeds."""
    if not holder.exists() or _is_held(holder):
        return
    taken = scratch_path(holder)
    try:
        holder.rename(taken)
    except FileNotFoundError:
        return

    # Another process may have removed the dead file and made its own in the meantime: give that back.
    if _is_held(taken):
        with suppress(FileExistsError):
            os.link(taken, holder)
    taken.unlink()


def _in_use_error(path: Path, lock_path: Path) -> StoreError:
    try:
        owner = lock_path.read_text() or "another process"
    except FileNotFoundError:
        owner = "another process"

    # Without locks of the kernel, nobody can tell from here whether a process of another machine still runs.
    holder = _holder_path(lock_path)
    advice = f"; if that process is gone, remove {holder}" if holder.exists() else ""
    return StoreError(f"{path} is being written by {owner}; wait for it{advice}")
