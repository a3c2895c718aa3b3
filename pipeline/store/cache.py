"""Cache: of a store on an object store, its tables and the shards used last, as files of this machine.

    CACHE/HASH/NAME.zarr/       what lies beside the shards, and `seen.json`: which versions of it these are
    CACHE/HASH/STORE_ID/        ledger/ and mel/c/ as in a store, as far as they have been asked for
    CACHE/*.lock                held while room is made, or one shard fetched

Any number of processes may share one, also for several stores: a shard is fetched once, and all of them together
stay under the bound. Whoever is killed leaves a part that is swept when room is made.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipeline.errors import InputError, StoreError
from pipeline.files import (
    DISK_FULL_ERRNOS,
    PARTIAL_SUFFIX,
    abandoned_scratch_paths,
    replacing_file,
    scratch_path,
)
from pipeline.object_store import check_reachable, download_into_file, download_object, object_versions
from pipeline.store.header import ShardLayout
from pipeline.store.manifest import RESULT_SCHEMA
from pipeline.store.shards import ShardCommit, file_matches_commit, ledger_path, read_commit_file, shard_path

SHARD_FETCH_THREADS = 8  # shards of a batch fetched at a time

ROOM_POLL_SECONDS = 0.05

BYTES_PER_GB = 10**9

VERSIONS_FILE = "seen.json"


def fetch_store_tables(url: str, cache: Path) -> Path:
    """Bring what lies beside the shards of a store, where it is not here as it is there; returns the folder.

    InputError where the bucket does not answer, StoreError where nothing is there.
    """
    url = url.rstrip("/")
    check_reachable(url)
    folder = cache / hashlib.sha256(url.encode()).hexdigest()[:12] / url.rpartition("/")[2]
    there = {name: told for name, told in object_versions(url).items() if not name.endswith(".lock")}
    there |= {
        f"mel/{name}": told for name, told in object_versions(f"{url}/mel").items() if name == "zarr.json"
    }
    if "zarr.json" not in there:
        raise StoreError(f"{url}: not a feature store; make one with: ajepa-data build-audioset")
    folder.mkdir(parents=True, exist_ok=True)
    with _exclusive_lock(folder.parent / "tables.lock"):
        seen_path = folder / VERSIONS_FILE
        seen = json.loads(seen_path.read_text()) if seen_path.exists() else {}
        for name in seen.keys() - there.keys():
            (folder / name).unlink(missing_ok=True)
        for name, told in there.items():
            if seen.get(name) != told or not (folder / name).exists():
                download_object(f"{url}/{name}", folder / name)
        if seen != there:
            with replacing_file(seen_path) as scratch:
                scratch.write_text(json.dumps(there))
    return folder


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShardCache:
    """Shards of the store at `url` below `cache`, which keeps to `most_bytes`; `manifest` is the store's."""

    url: str
    cache_folder: Path
    max_bytes: int
    snapshot_folder: Path  # of this state of the store
    layout: ShardLayout
    manifest: pl.DataFrame

    def local_path(self, shard: int) -> Path:
        """Where a shard lies here, fetched if need be; a path to nothing if it is not there either.

        Raises ValueError where it is damaged there, StoreError where none can be had: no answer, or no room.
        """
        path = shard_path(self.snapshot_folder, shard)
        if not _touch_if_present(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _exclusive_lock(self.cache_folder / f"{self.snapshot_folder.name}-{shard:06d}.lock"):
                if not _touch_if_present(path):
                    self._fetch_shard(shard, path)
        return path

    def fetch_missing_shards(self, shards: Iterable[int]) -> bool:
        """Fetch those that are not here, some at a time; whether there were any. What fails is told by `path`."""
        missing = [
            shard for shard in shards if not _touch_if_present(shard_path(self.snapshot_folder, shard))
        ]
        if missing:
            with ThreadPoolExecutor(SHARD_FETCH_THREADS) as threads:
                for done in [threads.submit(self.local_path, shard) for shard in missing]:
                    done.exception()
        return bool(missing)

    def _fetch_shard(self, shard: int, path: Path) -> None:
        try:
            commit, scratch = self._fetch_commit(shard), scratch_path(path)
            if commit.size_bytes:
                with self._reserve_room(commit.size_bytes, scratch):
                    self._download_shard(commit, scratch)
                    scratch.replace(path)
        except StoreError:
            raise
        except InputError as error:  # what the server says, as a fault of the store
            raise StoreError(str(error)) from None

    def _download_shard(self, commit: ShardCommit, scratch: Path) -> None:
        """Fill a file with the shard; ValueError where that is not the one that was committed."""
        with scratch.open("r+b") as file:
            there = download_into_file(f"{self.url}/{shard_path(Path(), commit.shard)}", file)
            file.flush()
            os.fsync(file.fileno())
        if not there or not file_matches_commit(scratch, commit):
            why = "is not what its record tells" if there else "is gone from there"
            raise ValueError(f"{why}; delete {self._record_url(commit.shard)} and build again")

    def _record_url(self, shard: int) -> str:
        return f"{self.url}/{ledger_path(Path(), shard)}"

    def _fetch_commit(self, shard: int) -> ShardCommit:
        """The record of a shard; StoreError where it is not that of the manifest."""
        record = ledger_path(self.snapshot_folder, shard)
        if not record.exists() and not download_object(self._record_url(shard), record):
            raise StoreError(f"{self._record_url(shard)}: not there; build again")
        commit, results = read_commit_file(record)
        rows = self.layout.rows_of_shard(shard)
        if not results.equals(self.manifest[rows.start : rows.stop].select(*RESULT_SCHEMA)):
            record.unlink()
            raise StoreError(f"{self.url}: has been built anew since it was opened; start again")
        return commit

    @contextmanager
    def _reserve_room(self, count: int, scratch: Path) -> Iterator[None]:
        """Hold `count` bytes of the cache as a scratch file, which goes if it is not moved; StoreError."""
        if count > self.max_bytes:
            told = f"holds {self.max_bytes:,} bytes at most, a shard has {count:,}; give a larger --cache-gb"
            raise StoreError(f"{self.cache_folder}: {told}")
        try:
            while not self._try_reserve_room(
                count, scratch
            ):  # others are fetching; what they fetch can go in a moment
                time.sleep(ROOM_POLL_SECONDS)
            yield
        except OSError as error:
            if error.errno not in DISK_FULL_ERRNOS:
                raise
            raise StoreError(
                f"{self.cache_folder}: no space left; free some, or give a smaller --cache-gb"
            ) from None
        finally:
            scratch.unlink(missing_ok=True)

    def _try_reserve_room(self, count: int, scratch: Path) -> bool:
        """Drop the shards used least lately until there is room, and take it; False where too little can go."""
        with _exclusive_lock(self.cache_folder / "room.lock"):
            files = []
            for path in self.cache_folder.glob("*/*/mel/c/*/0/0*"):
                for debris in abandoned_scratch_paths(path.with_name("0")) if path.name != "0" else ():
                    debris.unlink(missing_ok=True)
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                files.append((path.name.endswith(PARTIAL_SUFFIX), status.st_atime_ns, status.st_size, path))
            held = sum(size for _, _, size, _ in files)
            for unfinished, _, size, path in sorted(files):
                if held + count <= self.max_bytes or unfinished:
                    break
                path.unlink(missing_ok=True)
                held -= size
            if held + count > self.max_bytes:
                return False
            with scratch.open("wb") as file:
                if count:
                    os.posix_fallocate(file.fileno(), 0, count)
            return True


def _touch_if_present(path: Path) -> bool:
    """Whether a file is there; if so, it has been used just now."""
    try:
        status = path.stat()
        os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _exclusive_lock(path: Path) -> Iterator[None]:
    """Wait for, then hold, an exclusive lock; the kernel frees it with its process."""
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
