"""A store in a bucket is read like a local store, through a cache that never exceeds its size limit."""

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from bucket import BUCKET
from forked import FORKSERVER, start_forked
from stores import point_at_no_server

from ajepa.cli import app as trainer
from pipeline.cli import app
from pipeline.errors import BrokenClipError, InputError, StoreError
from pipeline.files import lock_when_free
from pipeline.labels.label_sets import propagate_store_labels
from pipeline.loading.loader import PlainLoader, View
from pipeline.loading.sampling import RowOrder
from pipeline.object_store import remove_object, upload_file
from pipeline.store import cache
from pipeline.store.feature_store import FeatureStore

pytestmark = pytest.mark.usefixtures("bucket_server")

ROOMY_GB = 0.1


def push_store(store: Path, url: str) -> str:
    """Copy a store into the bucket; returns the URL."""
    for path in (path for path in store.rglob("*") if path.is_file()):
        upload_file(path, f"{url}/{path.relative_to(store).as_posix()}")
    return url


@pytest.fixture(scope="module")
def url(store_path) -> str:
    """The URL of a store of three shards in the bucket; no test changes it."""
    return push_store(store_path, f"s3://{BUCKET}/shared/tiny.zarr")


@pytest.fixture
def own_url(store_path, tmp_path) -> str:
    """The URL of a copy of the store for this test alone."""
    return push_store(store_path, f"s3://{BUCKET}/{tmp_path.name}/tiny.zarr")


def cached_shards(folder: Path) -> list[int]:
    return sorted(int(path.parts[-3]) for path in folder.glob("*/*/mel/c/*/0/0"))


def cached_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/*/mel/c/*/0/*"))


def shard_gb(store_path: Path, shards: float) -> float:
    """Return the size of `shards` of the largest shards, in GB."""
    return shards * max(path.stat().st_size for path in store_path.glob("mel/c/*/0/0")) / cache.BYTES_PER_GB


def test_a_store_in_a_bucket_reads_like_the_same_store_on_the_disk(store, url, tmp_path):
    """Rows, labels, statistics and batches; a URL with a slash at its end is the same store."""
    remote = FeatureStore.open(url + "/", cache=tmp_path, cache_gb=ROOMY_GB)
    rows = store.good_rows()
    np.testing.assert_array_equal(remote.read(rows), store.read(rows))
    np.testing.assert_array_equal(remote.labels_BC(rows, "unambiguous"), store.labels_BC(rows, "unambiguous"))
    assert (remote.stats, remote.store_id, remote.location) == (store.stats, store.store_id, url)
    view = View(frames=96, mean=0.0, std=1.0, label_set="raw")
    batches = [
        PlainLoader(one, RowOrder(rows_N=rows, clips=6, seed=0), view).make_batch(3).mel_BTF
        for one in (store, remote)
    ]
    assert batches[0].equal(batches[1])


def test_only_the_shards_that_are_asked_for_are_fetched_and_once(url, tmp_path, monkeypatch):
    """A store of a terabyte must not be downloaded as a whole."""
    fetched = []
    fetch_into = cache.download_into_file
    monkeypatch.setattr(
        cache, "download_into_file", lambda at, file: fetched.append(at) or fetch_into(at, file)
    )
    for _ in range(2):
        remote = FeatureStore.open(url, cache=tmp_path, cache_gb=ROOMY_GB)
        assert remote.manifest.height == 48
        remote.read(np.array([33, 0, 34, 1]))
    assert cached_shards(tmp_path) == [0, 2]
    assert sorted(fetched) == [f"{url}/mel/c/0/0/0", f"{url}/mel/c/2/0/0"]


def test_tables_are_fetched_again_only_where_they_have_changed(own_url, store_path, tmp_path, monkeypatch):
    """New labels are read at the next opening, without fetching the manifest of millions of rows again."""
    FeatureStore.open(own_url, cache=tmp_path)
    local = shutil.copytree(store_path, tmp_path / "local.zarr")
    propagate_store_labels(local, "all-ancestors")
    upload_file(local / "labels.parquet", f"{own_url}/labels.parquet")
    fetched = []
    fetch = cache.download_object
    monkeypatch.setattr(cache, "download_object", lambda at, path: fetched.append(at) or fetch(at, path))
    assert "all-ancestors" in FeatureStore.open(own_url, cache=tmp_path).label_sets
    assert fetched == [f"{own_url}/labels.parquet"]


def test_the_cache_stays_under_its_bound_and_drops_what_was_used_least_lately(
    store, store_path, url, tmp_path
):
    """With space for two of three shards, the least recently used one is deleted, and fetched again when it is read."""
    most_gb = shard_gb(store_path, 2.5)
    remote = FeatureStore.open(url, cache=tmp_path, cache_gb=most_gb)
    for row, kept in (
        (0, [0]),
        (16, [0, 1]),
        (1, [0, 1]),
        (32, [0, 2]),
        (17, [1, 2]),
        (33, [1, 2]),
        (2, [0, 2]),
    ):
        np.testing.assert_array_equal(remote.read(np.array([row])), store.read(np.array([row])))
        assert cached_shards(tmp_path) == kept
        assert cached_bytes(tmp_path) <= most_gb * cache.BYTES_PER_GB


def test_files_that_are_dropped_are_closed(store, store_path, url, tmp_path):
    """An open file occupies the disk even after it is deleted."""
    remote = FeatureStore.open(url, cache=tmp_path, cache_gb=shard_gb(store_path, 1.5))
    for row in (0, 16, 32, 1, 17, 33):
        remote.read(np.array([row]))
        open_paths = [
            os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_link(name)
        ]
        assert not [
            path for path in open_paths if path.startswith(str(tmp_path)) and path.endswith("(deleted)")
        ]


def _is_link(name: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{name}")


def test_a_batch_of_more_shards_than_there_is_room_for_is_read(store, store_path, url, tmp_path):
    """Every shard is fetched again, which is slow but correct."""
    remote = FeatureStore.open(url, cache=tmp_path, cache_gb=shard_gb(store_path, 1.01))
    rows = store.good_rows()
    for _ in range(2):
        np.testing.assert_array_equal(remote.read(rows), store.read(rows))
    assert len(cached_shards(tmp_path)) == 1


def test_a_shard_that_has_no_room_at_all_is_reported(url, tmp_path):
    with pytest.raises(
        StoreError, match=r"is limited to 1,000 bytes, a shard has [\d,]+; give a larger --cache-gb"
    ):
        FeatureStore.open(url, cache=tmp_path, cache_gb=1e-6).read(np.array([0]))


def test_a_full_disk_is_reported_and_leaves_nothing(url, tmp_path, monkeypatch):
    """The size limit may be larger than the disk."""
    remote = FeatureStore.open(url, cache=tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.os, "posix_fallocate", full)
    with pytest.raises(StoreError, match="no space left; free some, or give a smaller --cache-gb") as refused:
        remote.read(np.array([0]))
    assert not isinstance(refused.value, BrokenClipError)
    assert cached_bytes(tmp_path) == 0
    monkeypatch.undo()


def read_random_rows(url: str, folder: Path, most_gb: float, seed: int, local_path: Path, exceeded) -> None:
    """Compare random rows with the store on the disk; sets the event `exceeded` if the cache grows too large."""
    remote = FeatureStore.open(url, cache=folder, cache_gb=most_gb)
    local = FeatureStore.open(local_path)
    rng = np.random.default_rng(seed)
    for _ in range(12):
        rows = rng.choice(local.good_rows(), 3)
        assert (remote.read(rows) == local.read(rows)).all()

        # Under the lock, so that the sum is of one moment.
        with lock_when_free(folder / "room.lock"):
            if cached_bytes(folder) > most_gb * cache.BYTES_PER_GB:
                exceeded.set()


def test_processes_share_one_cache_within_its_bound(store_path, url, tmp_path):
    """Eight ranks of one machine delete shards that others need; one rank is killed."""
    exceeded = FORKSERVER.Event()
    most_gb = shard_gb(store_path, 2.2)
    cache_folder = tmp_path / "cache"
    processes = [
        start_forked(
            read_random_rows,
            *(url, cache_folder, most_gb, seed, store_path, exceeded),
            output=tmp_path / "output",
            environment=os.environ,
        )
        for seed in range(3)
    ]
    while not cached_shards(cache_folder):
        time.sleep(0.01)
    os.kill(processes[0].pid, signal.SIGKILL)
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0], (
        tmp_path / "output"
    ).read_text()
    assert not exceeded.is_set()


def test_a_shard_comes_into_the_cache_under_the_lock(url, tmp_path, monkeypatch):
    """Whoever counts files while one is moved would count it twice, or not at all and then exceed the bound."""
    downloaded, may_move = threading.Event(), threading.Event()
    download = cache.ShardCache._download_shard

    def download_and_wait(*values):
        download(*values)
        downloaded.set()
        assert may_move.wait(60)

    monkeypatch.setattr(cache.ShardCache, "_download_shard", download_and_wait)
    remote = FeatureStore.open(url, cache=tmp_path)
    reader = threading.Thread(target=remote.read, args=(np.array([0]),))
    reader.start()
    assert downloaded.wait(60)
    with lock_when_free(tmp_path / "room.lock"):
        may_move.set()
        time.sleep(0.2)
        assert not cached_shards(tmp_path)
    reader.join(60)
    assert len(cached_shards(tmp_path)) == 1


def test_the_partial_file_of_a_killed_process_is_removed(store_path, url, tmp_path):
    """Until then, the partial file counts towards the limit, and it is never read as a whole shard."""
    most_gb = shard_gb(store_path, 1.2)
    FeatureStore.open(url, cache=tmp_path, cache_gb=most_gb).read(np.array([0]))
    (path,) = tmp_path.glob("*/*/mel/c/0/0/0")
    ended = subprocess.Popen(["true"])
    ended.wait()
    partial = path.with_name(f"0.{os.uname().nodename}-{ended.pid}.partial")
    path.rename(partial)
    remote = FeatureStore.open(url, cache=tmp_path, cache_gb=most_gb)
    np.testing.assert_array_equal(
        remote.read(np.array([0])), FeatureStore.open(store_path).read(np.array([0]))
    )
    assert not partial.exists()


def test_a_shard_that_is_damaged_in_the_bucket_is_reported_and_not_kept(own_url, tmp_path):
    """The SHA-256 of the ledger is compared when the shard is fetched."""
    (tmp_path / "junk").write_bytes(b"junk")
    upload_file(tmp_path / "junk", f"{own_url}/mel/c/1/0/0")
    remote = FeatureStore.open(own_url, cache=tmp_path)
    with pytest.raises(
        BrokenClipError, match=f"does not match its record in the bucket; delete {own_url}/ledger/000001"
    ) as broken:
        remote.read(np.array([0, 20]))
    assert broken.value.row == 20
    assert cached_shards(tmp_path) == [0]
    remote.read(np.array([0]))


def test_a_shard_that_is_gone_from_the_bucket_is_reported(own_url, tmp_path):
    remove_object(f"{own_url}/mel/c/1/0/0")
    with pytest.raises(
        BrokenClipError, match=r"row 20 \(clip clip_000020, shard 1\) .* is gone from the bucket; delete"
    ):
        FeatureStore.open(own_url, cache=tmp_path).read(np.array([0, 20]))


def test_a_shard_that_is_damaged_in_the_cache_is_reported_with_the_folder_to_delete(url, tmp_path):
    """The deleted folder is fetched again."""
    FeatureStore.open(url, cache=tmp_path).read(np.array([0]))
    (path,) = tmp_path.glob("*/*/mel/c/0/0/0")
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        BrokenClipError, match=r"does not match its checksum; .*, delete .*: it is fetched again"
    ) as broken:
        FeatureStore.open(url, cache=tmp_path).read(np.array([0]))
    shutil.rmtree(str(broken.value).rpartition("delete ")[2].partition(":")[0])
    FeatureStore.open(url, cache=tmp_path).read(np.array([0]))


def test_a_store_that_is_built_anew_meanwhile_is_not_mixed_with_the_old(own_url, uint8_store_path, tmp_path):
    """Rows of two builds in one batch would be noise."""
    remote = FeatureStore.open(own_url, cache=tmp_path)
    remote.read(np.array([0]))
    push_store(uint8_store_path, own_url)
    with pytest.raises(StoreError, match="has been built anew since it was opened"):
        remote.read(np.array([20]))
    again = FeatureStore.open(own_url, cache=tmp_path)
    np.testing.assert_array_equal(
        again.read(np.array([20])), FeatureStore.open(uint8_store_path).read(np.array([20]))
    )


def test_a_server_that_is_gone_breaks_no_clip(url, tmp_path, monkeypatch):
    """A loader that skips broken clips must not skip a whole store because the network fails."""
    remote = FeatureStore.open(url, cache=tmp_path)
    point_at_no_server(monkeypatch)
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL") as gone:
        remote.read(np.array([0]))
    assert not isinstance(gone.value, BrokenClipError)
    assert "\n" not in str(gone.value)


def test_a_store_that_cannot_be_opened_is_reported_in_one_line(url, tmp_path):
    """The error comes before any file is created."""
    with pytest.raises(StoreError, match="is on an object store; give --cache DIR"):
        FeatureStore.open(url)
    with pytest.raises(StoreError, match=r"nothing\.zarr: not a feature store"):
        FeatureStore.open(f"s3://{BUCKET}/nothing.zarr", cache=tmp_path / "cache")
    with pytest.raises(InputError, match="no such object or bucket"):
        FeatureStore.open("s3://no-such-bucket/x.zarr", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_pickled_store_opens_itself_in_the_same_cache(store, url, tmp_path):
    remote = FeatureStore.open(url, cache=tmp_path, cache_gb=ROOMY_GB, io="mmap", check="always")
    again = pickle.loads(pickle.dumps(remote))
    assert again.location == url
    np.testing.assert_array_equal(again.read(np.array([0])), store.read(np.array([0])))
    assert (again._cache.cache_folder, again._cache.max_bytes) == (tmp_path, remote._cache.max_bytes)


def run(monkeypatch, app, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ajepa", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        app.main()
    return int(stop.value.code or 0)


def test_every_command_that_reads_takes_a_url(url, tmp_path, monkeypatch, capsys):
    """Describing, drawing, training and evaluating need no copy of the store."""
    cache_options = ("--cache", tmp_path / "cache", "--cache-gb", ROOMY_GB)
    png, page = tmp_path / "clip.png", tmp_path / "page.html"
    assert not run(monkeypatch, app, "inspect", url, "--row", 20, "--png", png, *cache_options)
    assert "in mel/c/1/0/0" in capsys.readouterr().out
    assert not run(monkeypatch, app, "report", url, "--html", page, *cache_options)
    assert png.stat().st_size > 1000
    assert "tiny.zarr" in page.read_text()
    stage = ("--store", url, "--run", tmp_path / "run", *cache_options)
    small = (
        "--recipe",
        "small",
        "--steps",
        1,
        "--batch",
        2,
        "--device",
        "cpu",
        "--io",
        "mmap",
        "--check",
        "always",
    )
    assert not run(monkeypatch, trainer, "pretrain", *stage, *small)
    assert not run(monkeypatch, trainer, "evaluate", *stage, "--device", "cpu")
    assert not run(monkeypatch, trainer, "report", *stage, "--out", tmp_path / "drawn")
    assert (tmp_path / "drawn" / "probes.png").exists()


@pytest.mark.parametrize("command", ["verify", "propagate-labels", "finalize"])
def test_commands_that_write_or_read_all_want_a_store_on_a_disk(url, monkeypatch, capsys, command):
    assert run(monkeypatch, app, command, url) == 1
    assert "copy it to a disk first" in capsys.readouterr().err


def test_a_url_without_a_cache_is_refused_with_the_missing_option(url, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, trainer, "pretrain", "--store", url, "--run", tmp_path / "run") == 1
    assert "give --cache DIR" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
