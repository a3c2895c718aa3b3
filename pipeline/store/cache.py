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
from pipeline.files import FULL, PARTIAL, abandoned, replacing, scratch_of
from pipeline.object_store import fetch, fetch_into, reach, versions
from pipeline.store.header import Layout
from pipeline.store.manifest import RESULT_SCHEMA
from pipeline.store.shards import Commit, commit_at, is_committed, ledger_path, shard_path

CONNECTIONS = 8  # shards of a batch fetched at a time

ROOM_POLL_SECONDS = 0.05

GB = 10**9

SEEN = "seen.json"


def tables_of(url: str, cache: Path) -> Path:
    """Bring what lies beside the shards of a store, where it is not here as it is there; returns the folder.

    InputError where the bucket does not answer, StoreError where nothing is there.
    """
    url = url.rstrip("/")
    reach(url)
    folder = cache / hashlib.sha256(url.encode()).hexdigest()[:12] / url.rpartition("/")[2]
    there = {name: told for name, told in versions(url).items() if not name.endswith(".lock")}
    there |= {f"mel/{name}": told for name, told in versions(f"{url}/mel").items() if name == "zarr.json"}
    if "zarr.json" not in there:
        raise StoreError(f"{url}: not a feature store; make one with: ajepa-data build-audioset")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / "tables.lock"):
        seen_path = folder / SEEN
        seen = json.loads(seen_path.read_text()) if seen_path.exists() else {}
        for name in seen.keys() - there.keys():
            (folder / name).unlink(missing_ok=True)
        for name, told in there.items():
            if seen.get(name) != told or not (folder / name).exists():
                fetch(f"{url}/{name}", folder / name)
        if seen != there:
            with replacing(seen_path) as scratch:
                scratch.write_text(json.dumps(there))
    return folder


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShardCache:
    """Shards of the store at `url` below `cache`, which keeps to `most_bytes`; `manifest` is the store's."""

    url: str
    cache: Path
    most_bytes: int
    home: Path  # of this state of the store
    layout: Layout
    manifest: pl.DataFrame

    def path(self, shard: int) -> Path:
        """Where a shard lies here, fetched if need be; a path to nothing if it is not there either.

        Raises ValueError where it is damaged there, StoreError where none can be had: no answer, or no room.
        """
        path = shard_path(self.home, shard)
        if not _used(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.cache / f"{self.home.name}-{shard:06d}.lock"):
                if not _used(path):
                    self._fetch(shard, path)
        return path

    def bring(self, shards: Iterable[int]) -> bool:
        """Fetch those that are not here, some at a time; whether there were any. What fails is told by `path`."""
        missing = [shard for shard in shards if not _used(shard_path(self.home, shard))]
        if missing:
            with ThreadPoolExecutor(CONNECTIONS) as threads:
                for done in [threads.submit(self.path, shard) for shard in missing]:
                    done.exception()
        return bool(missing)

    def _fetch(self, shard: int, path: Path) -> None:
        try:
            commit, scratch = self._commit(shard), scratch_of(path)
            if commit.size_bytes:
                with self._room(commit.size_bytes, scratch):
                    self._download(commit, scratch)
                    scratch.replace(path)
        except StoreError:
            raise
        except InputError as error:  # what the server says, as a fault of the store
            raise StoreError(str(error)) from None

    def _download(self, commit: Commit, scratch: Path) -> None:
        """Fill a file with the shard; ValueError where that is not the one that was committed."""
        with scratch.open("r+b") as file:
            there = fetch_into(f"{self.url}/{shard_path(Path(), commit.shard)}", file)
            file.flush()
            os.fsync(file.fileno())
        if not there or not is_committed(scratch, commit):
            why = "is not what its record tells" if there else "is gone from there"
            raise ValueError(f"{why}; delete {self._record(commit.shard)} and build again")

    def _record(self, shard: int) -> str:
        return f"{self.url}/{ledger_path(Path(), shard)}"

    def _commit(self, shard: int) -> Commit:
        """The record of a shard; StoreError where it is not that of the manifest."""
        record = ledger_path(self.home, shard)
        if not record.exists() and not fetch(self._record(shard), record):
            raise StoreError(f"{self._record(shard)}: not there; build again")
        commit, results = commit_at(record)
        rows = self.layout.rows(shard)
        if not results.equals(self.manifest[rows.start : rows.stop].select(*RESULT_SCHEMA)):
            record.unlink()
            raise StoreError(f"{self.url}: has been built anew since it was opened; start again")
        return commit

    @contextmanager
    def _room(self, count: int, scratch: Path) -> Iterator[None]:
        """Hold `count` bytes of the cache as a scratch file, which goes if it is not moved; StoreError."""
        if count > self.most_bytes:
            told = f"holds {self.most_bytes:,} bytes at most, a shard has {count:,}; give a larger --cache-gb"
            raise StoreError(f"{self.cache}: {told}")
        try:
            while not self._took(count, scratch):  # others are fetching; what they fetch can go in a moment
                time.sleep(ROOM_POLL_SECONDS)
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise StoreError(
                f"{self.cache}: no space left; free some, or give a smaller --cache-gb"
            ) from None
        finally:
            scratch.unlink(missing_ok=True)

    def _took(self, count: int, scratch: Path) -> bool:
        """Drop the shards used least lately until there is room, and take it; False where too little can go."""
        with _locked(self.cache / "room.lock"):
            files = []
            for path in self.cache.glob("*/*/mel/c/*/0/0*"):
                for debris in abandoned(path.with_name("0")) if path.name != "0" else ():
                    debris.unlink(missing_ok=True)
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                files.append((path.name.endswith(PARTIAL), status.st_atime_ns, status.st_size, path))
            held = sum(size for _, _, size, _ in files)
            for unfinished, _, size, path in sorted(files):
                if held + count <= self.most_bytes or unfinished:
                    break
                path.unlink(missing_ok=True)
                held -= size
            if held + count > self.most_bytes:
                return False
            with scratch.open("wb") as file:
                if count:
                    os.posix_fallocate(file.fileno(), 0, count)
            return True


def _used(path: Path) -> bool:
    """Whether a file is there; if so, it has been used just now."""
    try:
        status = path.stat()
        os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for, then hold, an exclusive lock; the kernel frees it with its process."""
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
