"""Mirror: a store on an object store, and the folder from which a build feeds it, shard by shard."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.files import Part
from pipeline.object_store import fetch, push, reach, remove, sizes
from pipeline.store.exclusions import EXCLUDED
from pipeline.store.header import Header
from pipeline.store.shards import NEXT, commit_at, ledger_path, matches, shard_path
from pipeline.store.tables import read_table

CONNECTIONS = 16  # records fetched at a time

KEPT = "kept"  # folder below the staging one, for shards that come back because rows of them are kept

TABLES = (  # the manifest last: with its store_id the store is finished
    *(
        "zarr.json",
        "mel/zarr.json",
        "labels.parquet",
        EXCLUDED,
        "stats.json",
        "build.json",
        "manifest.parquet",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mirror:
    """The store at `url`, of which `staging` holds tables and ledger, and each shard until it is pushed.

    A shard is pushed as it is placed locally: its record as `.next`, the shard, the record (THE commit point), and
    `.next` removed. So whenever a build dies, the old shard with its record or the new one can be had, and a lost
    staging folder costs what was not pushed yet. Object stores know no locks: two builds of the same part on two
    machines are not kept apart, and may leave a shard that its record does not match; `verify` of a copy tells.
    """

    url: str
    staging: Path

    def url_of(self, path: Path) -> str:
        """Of what lies at `path` in the staging folder."""
        return f"{self.url}/{path.relative_to(self.staging).as_posix()}"

    def header(self) -> Header | None:
        """What the remote store is, None where there is none yet; InputError where the bucket does not answer."""
        reach(self.url)
        with tempfile.TemporaryDirectory() as folder:
            if not fetch(f"{self.url}/zarr.json", Path(folder, "zarr.json")):
                return None
            try:
                return Header.read(Path(folder))
            except StoreError as error:
                raise StoreError(str(error).replace(folder, self.url)) from None

    def pull(self, ours: Callable[[int], bool]) -> None:
        """Make the ledger here that of the remote store, after pushing those of our shards that have not been.

        Labels come along if they know more label sets than those here, exclude lists if there are none here.
        """
        shutil.rmtree(self.staging / KEPT, ignore_errors=True)
        for path in self.staging.glob("mel/c/*/0/0"):
            if ours(shard := int(path.parts[-3])):
                self.push_shard(shard)
            else:
                path.unlink()
        there = sizes(f"{self.url}/ledger")
        for name in (name for name in there if name.endswith(NEXT)):
            if ours(int(name[:6])):
                self._settle(self.staging / "ledger" / name)
        for record in self.staging.glob("ledger/[0-9]*.parquet"):
            if record.name in there:
                continue
            if ours(int(record.stem)) and not commit_at(record)[0].size_bytes:
                push(record, self.url_of(record))
            else:
                record.unlink()
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            records = [self.staging / "ledger" / name for name in sizes(f"{self.url}/ledger")]
            list(threads.map(self._fetch, (path for path in records if path.suffix != NEXT)))
        self._pull_labels()
        if not (self.staging / EXCLUDED).exists():
            self._fetch(self.staging / EXCLUDED)

    def _fetch(self, path: Path) -> bool:
        return fetch(self.url_of(path), path)

    def _settle(self, waiting: Path) -> None:
        """Adopt a remote record that waits if its shard is in place, else drop it: the old record holds."""
        if not self._fetch(waiting):
            return
        commit, _ = commit_at(waiting)
        with self.kept(commit.shard) as home:
            if matches(home, commit):
                push(waiting, self.url_of(waiting.with_suffix("")))
        remove(self.url_of(waiting))
        waiting.unlink()

    def _pull_labels(self) -> None:
        labels = self.staging / "labels.parquet"
        theirs = self.staging / KEPT / "labels.parquet"
        if fetch(self.url_of(labels), theirs):
            if not labels.exists() or read_table(theirs)[0].width > read_table(labels)[0].width:
                theirs.replace(labels)
            shutil.rmtree(theirs.parent)

    @contextmanager
    def kept(self, shard: int) -> Iterator[Path]:
        """Fetch a shard; yields the folder in which it lies as in a store, if it is there. It goes afterwards."""
        path = shard_path(self.staging / KEPT, shard)
        try:
            fetch(self.url_of(shard_path(self.staging, shard)), path)
            yield self.staging / KEPT
        finally:
            path.unlink(missing_ok=True)

    def push_shard(self, shard: int) -> None:
        """Push what is committed here of a shard, and keep only its record."""
        record, shard_file = ledger_path(self.staging, shard), shard_path(self.staging, shard)
        if not shard_file.exists():  # no clip of it is good
            push(record, self.url_of(record))
            return
        waiting = self.url_of(record) + NEXT
        push(record, waiting)
        push(shard_file, self.url_of(shard_file))
        push(record, self.url_of(record))
        remove(waiting)
        shard_file.unlink()

    def push_tables(self) -> None:
        """Push what lies beside the shards."""
        for path in (self.staging / name for name in TABLES):
            if path.exists():
                push(path, self.url_of(path))


def staging_of(url: str, folder: Path, part: Part) -> Path:
    """Where below `folder` a store at `url`, or a part of it, is staged."""
    name = url.rstrip("/").rpartition("/")[2]
    return folder / (f"{name}.staging" if part.of == 1 else f"{name}.{part.index}-of-{part.of}.staging")
