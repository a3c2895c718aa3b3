"""A store on an object store, and the staging folder from which a build pushes its shards."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.files import BuildPart
from pipeline.object_store import check_reachable, download_object, object_sizes, remove_object, upload_file
from pipeline.store.exclusions import EXCLUSIONS_FILE
from pipeline.store.header import StoreHeader
from pipeline.store.plan_file import PLAN_FILE, SOURCES_FILE
from pipeline.store.shards import (
    PENDING_SUFFIX,
    ledger_path,
    read_commit_file,
    shard_matches_commit,
    shard_path,
)
from pipeline.tables import read_table

FETCH_CONNECTIONS = 16  # records that are fetched at the same time

FETCHED_FOLDER = "kept"  # below the staging folder: shards that are fetched to keep some rows

# In the order in which they are pushed. The manifest is last, because its store_id marks the store as finished.
PUSHED_TABLES = (
    "zarr.json",
    "mel/zarr.json",
    "labels.parquet",
    EXCLUSIONS_FILE,
    "stats.json",
    "build.json",
    PLAN_FILE,
    SOURCES_FILE,
    "manifest.parquet",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteStore:
    """The store at `url`; the folder `staging` holds its tables and ledger, and each shard until the shard is pushed.

    A shard is pushed in the order of a local commit: first its record as `.next`, then the shard, then the record (the
    commit point); then `.next` is removed. So if a build dies at any time, either the old shard and record or the new
    ones can be restored. If the staging folder is lost, only the shards that were not pushed yet are lost.

    Object stores have no locks: two builds of the same part on two machines may leave a shard that does not match its
    record. To find this fault, copy the store to a disk and run `verify` on the copy.
    """

    url: str
    staging: Path

    def file_url(self, path: Path) -> str:
        """Return the URL of the object to which `path` in the staging folder is pushed."""
        return f"{self.url}/{path.relative_to(self.staging).as_posix()}"

    def read_header(self) -> StoreHeader | None:
        """Return the remote store's header, None if there is no store; InputError if the bucket does not answer."""
        check_reachable(self.url)
        with tempfile.TemporaryDirectory() as folder:
            if not download_object(f"{self.url}/zarr.json", Path(folder, "zarr.json")):
                return None
            try:
                return StoreHeader.read(Path(folder))
            except StoreError as error:
                raise StoreError(str(error).replace(folder, self.url)) from None

    @contextmanager
    def fetched_plan(self) -> Iterator[Path]:
        """Yield a folder with the files that say what the remote store was planned from; deletes it afterwards."""
        with tempfile.TemporaryDirectory() as folder:
            for name in (PLAN_FILE, SOURCES_FILE, "build.json"):
                download_object(f"{self.url}/{name}", Path(folder, name))
            yield Path(folder)

    def sync_ledger(self, is_ours: Callable[[int], bool]) -> None:
        """Push the shards of this part that were not pushed yet, then fetch the ledger of the remote store.

        Labels are fetched if the remote table has more label sets; exclude lists, if the staging folder has none.
        """
        # Push the shards that were built but not pushed. Delete shards of a part that this build no longer has.
        shutil.rmtree(self.staging / FETCHED_FOLDER, ignore_errors=True)
        for path in self.staging.glob("mel/c/*/0/0"):
            if is_ours(shard := int(path.parts[-3])):
                self.push_shard(shard)
            else:
                path.unlink()

        # Complete or undo pushes that were interrupted between two of their steps.
        remote_records = object_sizes(f"{self.url}/ledger")
        for name in remote_records:
            if name.endswith(PENDING_SUFFIX) and is_ours(int(name[:6])):
                self._resolve_pending_record(self.staging / "ledger" / name)

        # Records that exist only here. A shard without a good clip has no file, so only its record is pushed; any other
        # record is deleted.
        for record in self.staging.glob("ledger/[0-9]*.parquet"):
            if record.name in remote_records:
                continue
            if is_ours(int(record.stem)) and not read_commit_file(record)[0].size_bytes:
                upload_file(record, self.file_url(record))
            else:
                record.unlink()

        # Fetch the ledger of all parts, then the files that users may have changed: labels and exclude lists.
        with ThreadPoolExecutor(FETCH_CONNECTIONS) as threads:
            records = [self.staging / "ledger" / name for name in object_sizes(f"{self.url}/ledger")]
            list(threads.map(self._fetch_file, (path for path in records if path.suffix != PENDING_SUFFIX)))
        self._sync_labels()
        if not (self.staging / EXCLUSIONS_FILE).exists():
            self._fetch_file(self.staging / EXCLUSIONS_FILE)

    def _fetch_file(self, path: Path) -> bool:
        """Fetch the object of `path`; returns False if it does not exist."""
        return download_object(self.file_url(path), path)

    def _resolve_pending_record(self, pending_record: Path) -> None:
        """Adopt a pending remote record if its shard is in place; else remove it, so that the old record counts."""
        if not self._fetch_file(pending_record):
            return
        commit, _ = read_commit_file(pending_record)
        with self.fetched_shard(commit.shard) as folder:
            if shard_matches_commit(folder, commit):
                upload_file(pending_record, self.file_url(pending_record.with_suffix("")))
        remove_object(self.file_url(pending_record))
        pending_record.unlink()

    def _sync_labels(self) -> None:
        """Replace the local labels by the remote labels if the remote table has more label sets."""
        labels = self.staging / "labels.parquet"
        remote_labels = self.staging / FETCHED_FOLDER / "labels.parquet"
        if download_object(self.file_url(labels), remote_labels):
            if not labels.exists() or read_table(remote_labels)[0].width > read_table(labels)[0].width:
                remote_labels.replace(labels)
            shutil.rmtree(remote_labels.parent)

    @contextmanager
    def fetched_shard(self, shard: int) -> Iterator[Path]:
        """Yield a folder, laid out like a store, with the shard if the remote store has it; deletes it afterwards."""
        path = shard_path(self.staging / FETCHED_FOLDER, shard)
        try:
            download_object(self.file_url(shard_path(self.staging, shard)), path)
            yield self.staging / FETCHED_FOLDER
        finally:
            path.unlink(missing_ok=True)

    def push_shard(self, shard: int) -> None:
        """Push a committed shard and its record, and keep only the record here."""
        record = ledger_path(self.staging, shard)
        shard_file = shard_path(self.staging, shard)
        if not shard_file.exists():  # no clip of the shard is good
            upload_file(record, self.file_url(record))
            return
        pending_url = self.file_url(record) + PENDING_SUFFIX
        upload_file(record, pending_url)
        upload_file(shard_file, self.file_url(shard_file))
        upload_file(record, self.file_url(record))
        remove_object(pending_url)
        shard_file.unlink()

    def push_tables(self) -> None:
        """Push the files beside the shards."""
        for path in (self.staging / name for name in PUSHED_TABLES):
            if path.exists():
                upload_file(path, self.file_url(path))


def staging_folder(url: str, folder: Path, part: BuildPart) -> Path:
    """Return the staging folder below `folder` for a store at `url`, or for one part of its build."""
    name = url.rstrip("/").rpartition("/")[2]
    if part.count > 1:
        name += f".{part.index}-of-{part.count}"
    return folder / f"{name}.staging"
