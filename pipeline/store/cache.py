"""The cache of stores on an object store: local copies of their tables and of the shards that were read last.

    CACHE/HASH/NAME.zarr/       the tables: all files of the store outside `ledger/` and `mel/c/`; and `seen.json`, the
                                version of each of them in the bucket
    CACHE/HASH/STORE_ID/        `ledger/` and `mel/c/` as in a store, with the records and shards that have been read
    CACHE/*.lock                locks, held while space is freed or while one shard is fetched

Any number of processes may share one cache, also for several stores: a shard is fetched once, and all processes
together stay under the size limit. A process that is killed leaves a partial file, which is removed the next time that
space is freed.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError, StoreError
from pipeline.files import (
    DISK_FULL_ERRNOS,
    PARTIAL_SUFFIX,
    abandoned_scratch_paths,
    lock_when_free,
    replacing_file,
    scratch_path,
)
from pipeline.object_store import check_reachable, download_into_file, download_object, object_versions
from pipeline.store.header import ShardLayout, no_store_error
from pipeline.store.manifest_table import ManifestTable
from pipeline.store.plan_file import PLAN_FILE, SOURCES_FILE
from pipeline.store.shards import ShardCommit, file_matches_commit, ledger_path, read_commit_file, shard_path

# Gigabytes are decimal everywhere, as disks are sold.
BYTES_PER_GB = 10**9

SHARD_FETCH_THREADS = 8  # shards of a batch that are fetched at a time

ROOM_POLL_SECONDS = 0.05

VERSIONS_FILE = "seen.json"


def fetch_store_tables(url: str, cache: Path) -> Path:
    """Update the cached tables of a store; returns their folder.

    InputError if the bucket does not answer, StoreError if the URL is not a store.
    """
    url = url.rstrip("/")
    check_reachable(url)
    folder = cache / hashlib.sha256(url.encode()).hexdigest()[:12] / url.rpartition("/")[2]
    versions = _remote_table_versions(url)
    if "zarr.json" not in versions:
        raise no_store_error(url)

    # One process at a time compares the versions and fetches the files that have changed.
    folder.mkdir(parents=True, exist_ok=True)
    with lock_when_free(folder.parent / "tables.lock"):
        versions_path = folder / VERSIONS_FILE
        cached_versions = json.loads(versions_path.read_text()) if versions_path.exists() else {}
        for name in cached_versions.keys() - versions.keys():
            (folder / name).unlink(missing_ok=True)
        for name, version in versions.items():
            if cached_versions.get(name) != version or not (folder / name).exists():
                download_object(f"{url}/{name}", folder / name)

        # The record of versions comes last: after a crash the files are fetched again.
        if cached_versions != versions:
            with replacing_file(versions_path) as scratch:
                scratch.write_text(json.dumps(versions))
    return folder


def _remote_table_versions(url: str) -> dict[str, str]:
    """Return the version of each table in the bucket, by the table's path in the store."""
    # Leave out locks, which belong to processes that write the store, and the files that only builds read.
    versions = {
        name: version
        for name, version in object_versions(url).items()
        if not name.endswith((".lock", ".held")) and name not in (PLAN_FILE, SOURCES_FILE)
    }

    # Below `mel`, only the array's metadata counts as a table; all other objects are shards.
    mel_versions = object_versions(f"{url}/mel")
    if "zarr.json" in mel_versions:
        versions["mel/zarr.json"] = mel_versions["zarr.json"]
    return versions


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShardCache:
    """The shards of the store at `url` in a cache; `max_bytes` limits the shards of all stores in `cache_folder`."""

    url: str
    cache_folder: Path
    max_bytes: int
    snapshot_folder: Path  # folder in the cache with the shards of this build of the store
    layout: ShardLayout
    manifest: ManifestTable  # of the store

    def local_path(self, shard: int) -> Path:
        """Return the local path of a shard, fetched if necessary; no file exists if the shard has no good clip.

        Raises ValueError if the shard is damaged in the bucket, StoreError if no shard can be fetched: the server does
        not answer, or there is no space.
        """
        # The lock is taken only for a fetch, so that cached shards are found without waiting.
        path = shard_path(self.snapshot_folder, shard)
        if not _touch_if_present(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with lock_when_free(self.cache_folder / f"{self.snapshot_folder.name}-{shard:06d}.lock"):
                # Another process may have fetched the shard while this one waited for the lock.
                if not _touch_if_present(path):
                    self._fetch_shard(shard, path)
        return path

    def fetch_missing_shards(self, shards: Iterable[int]) -> bool:
        """Fetch the shards that are not in the cache, several at a time; returns whether any shard was missing.

        No error is raised here: `local_path` raises it later for a shard that could not be fetched.
        """
        missing = [
            shard for shard in shards if not _touch_if_present(shard_path(self.snapshot_folder, shard))
        ]
        if missing:
            with ThreadPoolExecutor(SHARD_FETCH_THREADS) as threads:
                for future in [threads.submit(self.local_path, shard) for shard in missing]:
                    future.exception()
        return bool(missing)

    def _fetch_shard(self, shard: int, path: Path) -> None:
        try:
            # An empty commit has no object: no clip of the shard is good.
            commit = self._fetch_commit(shard)
            scratch = scratch_path(path)
            if commit.size_bytes:
                with self._reserve_room(commit.size_bytes, scratch):
                    self._download_shard(commit, scratch)

                    # Moved under the lock: whoever lists files meanwhile would count the shard twice, or not at all.
                    with self._room_lock():
                        scratch.replace(path)
        except StoreError:
            raise
        except InputError as error:  # keep the server's message, but as an error of the store
            raise StoreError(str(error)) from None

    def _download_shard(self, commit: ShardCommit, scratch: Path) -> None:
        """Download the shard into a file; ValueError if its bytes are not the committed ones."""
        # The file has its full size already: `_reserve_room` made it.
        with scratch.open("r+b") as file:
            exists = download_into_file(f"{self.url}/{shard_path(Path(), commit.shard)}", file)
            file.flush()
            os.fsync(file.fileno())
        if not exists or not file_matches_commit(scratch, commit):
            fault = "does not match its record in the bucket" if exists else "is gone from the bucket"
            raise ValueError(f"{fault}; delete {self._record_url(commit.shard)} and build again")

    def _record_url(self, shard: int) -> str:
        return f"{self.url}/{ledger_path(Path(), shard)}"

    def _fetch_commit(self, shard: int) -> ShardCommit:
        """Return the commit of a shard; StoreError if it does not agree with the manifest."""
        record = ledger_path(self.snapshot_folder, shard)
        if not record.exists() and not download_object(self._record_url(shard), record):
            raise StoreError(f"{self._record_url(shard)}: is not in the bucket; build the store again")

        # The manifest is that of the build which was opened. A record of a later build has other checksums.
        commit, results = read_commit_file(record)
        rows = self.layout.rows_of_shard(shard)
        stored = self.manifest.columns("n_frames", "crc32c")[rows.start : rows.stop]
        if not results.select("n_frames", "crc32c").equals(stored):
            record.unlink()
            raise StoreError(f"{self.url}: has been built anew since it was opened; start this command again")
        return commit

    @contextmanager
    def _reserve_room(self, needed_bytes: int, scratch: Path) -> Iterator[None]:
        """Reserve space in the cache as a scratch file, which is removed unless moved; StoreError if too large."""
        if needed_bytes > self.max_bytes:
            raise StoreError(
                f"{self.cache_folder}: is limited to {self.max_bytes:,} bytes, a shard has {needed_bytes:,}; "
                "give a larger --cache-gb"
            )
        try:
            # Shards that other processes are fetching cannot be dropped yet; wait until they can.
            while not self._try_reserve_room(needed_bytes, scratch):
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

    def _room_lock(self) -> AbstractContextManager[None]:
        """Wait for the lock under which files come into the cache and leave it; hold it only briefly."""
        return lock_when_free(self.cache_folder / "room.lock")

    def _try_reserve_room(self, needed_bytes: int, scratch: Path) -> bool:
        """Drop the least recently used shards and reserve the space; return False if not enough can be dropped."""
        with self._room_lock():
            # Drop complete shards, the least recently used first. Scratch files sort after them.
            files = self._list_cached_files()
            total_bytes = sum(size for _, _, size, _ in files)
            for is_scratch, _, size, path in sorted(files):
                if total_bytes + needed_bytes <= self.max_bytes or is_scratch:
                    break
                path.unlink(missing_ok=True)
                total_bytes -= size
            if total_bytes + needed_bytes > self.max_bytes:
                return False

            # Reserve the space while the lock is held, so that no other process takes it.
            with scratch.open("wb") as file:
                if needed_bytes:
                    os.posix_fallocate(file.fileno(), 0, needed_bytes)
            return True

    def _list_cached_files(self) -> list[tuple[bool, int, int, Path]]:
        """List the files that count towards the limit: is it a scratch file, time of last use (ns), bytes, path.

        Scratch files of processes that have ended are removed.
        """
        files = []
        for path in self.cache_folder.glob("*/*/mel/c/*/0/0*"):
            if path.name != "0":
                for abandoned in abandoned_scratch_paths(path.with_name("0")):
                    abandoned.unlink(missing_ok=True)
            try:
                status = path.stat()
            except FileNotFoundError:  # just removed, by this or another process
                continue
            files.append((path.name.endswith(PARTIAL_SUFFIX), status.st_atime_ns, status.st_size, path))
        return files


def _touch_if_present(path: Path) -> bool:
    """Return whether a file exists; if so, record that it has been used just now."""
    # Set the time of access explicitly: most file systems are mounted with `relatime` or `noatime`.
    try:
        status = path.stat()
        os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
    except FileNotFoundError:
        return False
    return True
