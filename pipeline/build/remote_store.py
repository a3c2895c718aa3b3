"""Mirror: a store on an object store, and the folder from which a build feeds it, shard by shard."""

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
from pipeline.store.shards import (
    PENDING_SUFFIX,
    ledger_path,
    read_commit_file,
    shard_matches_commit,
    shard_path,
)
from pipeline.tables import read_table

FETCH_CONNECTIONS = 16  # records fetched at a time

FETCHED_FOLDER = (
    "kept"  # folder below the staging one, for shards that come back because rows of them are kept
)

PUSHED_TABLES = (  # the manifest last: with its store_id the store is finished
    *(
        "zarr.json",
        "mel/zarr.json",
        "labels.parquet",
        EXCLUSIONS_FILE,
        "stats.json",
        "build.json",
        "manifest.parquet",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteStore:
    """The store at `url`, of which `staging` holds tables and ledger, and each shard until it is pushed.

    A shard is pushed as it is placed locally: its record as `.next`, the shard, the record (THE commit point), and
    `.next` removed. So whenever a build dies, the old shard with its record or the new one can be had, and a lost
    staging folder costs what was not pushed yet. Object stores know no locks: two builds of the same part on two
    machines are not kept apart, and may leave a shard that its record does not match; `verify` of a copy tells.
    """

    url: str
    staging: Path

    def file_url(self, path: Path) -> str:
        """Of what lies at `path` in the staging folder."""
        return f"{self.url}/{path.relative_to(self.staging).as_posix()}"

    def read_header(self) -> StoreHeader | None:
        """What the remote store is, None where there is none yet; InputError where the bucket does not answer."""
        check_reachable(self.url)
        with tempfile.TemporaryDirectory() as folder:
            if not download_object(f"{self.url}/zarr.json", Path(folder, "zarr.json")):
                return None
            try:
                return StoreHeader.read(Path(folder))
            except StoreError as error:
                raise StoreError(str(error).replace(folder, self.url)) from None

    def sync_ledger(self, is_ours: Callable[[int], bool]) -> None:
        """Make the ledger here that of the remote store, after pushing those of our shards that have not been.

        Labels come along if they know more label sets than those here, exclude lists if there are none here.
        """
        shutil.rmtree(self.staging / FETCHED_FOLDER, ignore_errors=True)
        for path in self.staging.glob("mel/c/*/0/0"):
            if is_ours(shard := int(path.parts[-3])):
                self.push_shard(shard)
            else:
                path.unlink()
        there = object_sizes(f"{self.url}/ledger")
        for name in (name for name in there if name.endswith(PENDING_SUFFIX)):
            if is_ours(int(name[:6])):
                self._resolve_pending_record(self.staging / "ledger" / name)
        for record in self.staging.glob("ledger/[0-9]*.parquet"):
            if record.name in there:
                continue
            if is_ours(int(record.stem)) and not read_commit_file(record)[0].size_bytes:
                upload_file(record, self.file_url(record))
            else:
                record.unlink()
        with ThreadPoolExecutor(FETCH_CONNECTIONS) as threads:
            records = [self.staging / "ledger" / name for name in object_sizes(f"{self.url}/ledger")]
            list(threads.map(self._fetch_file, (path for path in records if path.suffix != PENDING_SUFFIX)))
        self._sync_labels()
        if not (self.staging / EXCLUSIONS_FILE).exists():
            self._fetch_file(self.staging / EXCLUSIONS_FILE)

    def _fetch_file(self, path: Path) -> bool:
        return download_object(self.file_url(path), path)

    def _resolve_pending_record(self, pending_record: Path) -> None:
        """Adopt a remote record that waits if its shard is in place, else drop it: the old record holds."""
        if not self._fetch_file(pending_record):
            return
        commit, _ = read_commit_file(pending_record)
        with self.fetched_shard(commit.shard) as home:
            if shard_matches_commit(home, commit):
                upload_file(pending_record, self.file_url(pending_record.with_suffix("")))
        remove_object(self.file_url(pending_record))
        pending_record.unlink()

    def _sync_labels(self) -> None:
        labels = self.staging / "labels.parquet"
        theirs = self.staging / FETCHED_FOLDER / "labels.parquet"
        if download_object(self.file_url(labels), theirs):
            if not labels.exists() or read_table(theirs)[0].width > read_table(labels)[0].width:
                theirs.replace(labels)
            shutil.rmtree(theirs.parent)

    @contextmanager
    def fetched_shard(self, shard: int) -> Iterator[Path]:
        """Fetch a shard; yields the folder in which it lies as in a store, if it is there. It goes afterwards."""
        path = shard_path(self.staging / FETCHED_FOLDER, shard)
        try:
            download_object(self.file_url(shard_path(self.staging, shard)), path)
            yield self.staging / FETCHED_FOLDER
        finally:
            path.unlink(missing_ok=True)

    def push_shard(self, shard: int) -> None:
        """Push what is committed here of a shard, and keep only its record."""
        record, shard_file = ledger_path(self.staging, shard), shard_path(self.staging, shard)
        if not shard_file.exists():  # no clip of it is good
            upload_file(record, self.file_url(record))
            return
        waiting = self.file_url(record) + PENDING_SUFFIX
        upload_file(record, waiting)
        upload_file(shard_file, self.file_url(shard_file))
        upload_file(record, self.file_url(record))
        remove_object(waiting)
        shard_file.unlink()

    def push_tables(self) -> None:
        """Push what lies beside the shards."""
        for path in (self.staging / name for name in PUSHED_TABLES):
            if path.exists():
                upload_file(path, self.file_url(path))


def staging_folder(url: str, folder: Path, part: BuildPart) -> Path:
    """Where below `folder` a store at `url`, or a part of it, is staged."""
    name = url.rstrip("/").rpartition("/")[2]
    return folder / (f"{name}.staging" if part.count == 1 else f"{name}.{part.index}-of-{part.count}.staging")
