"""Every method reads clips bit for bit, or raises an error."""

import contextlib
import errno
import gc
import os
import pickle
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from damage import DAMAGES, copied, flip

from pipeline.errors import BrokenClipError, InputError, StoreError
from pipeline.loading.dali import DaliLoader
from pipeline.loading.loader import PlainLoader, View
from pipeline.loading.sampling import RowOrder
from pipeline.store import reader as reader_module
from pipeline.store.feature_store import FeatureStore
from pipeline.store.header import ShardLayout
from pipeline.store.reader import ShardReader
from pipeline.store.shards import ShardWriter, shard_path

LAYOUT = ShardLayout(clips=20, frames=60, bands=40, dtype="float16", shard_clips=16)

READ_METHODS = ("pread", "mmap", "direct")


def write(folder: Path, layout: ShardLayout, mel_NTF: np.ndarray) -> None:
    """Write every shard from all values, without the rows that are NaN or 0."""
    for shard in range(layout.shard_count):
        writer = ShardWriter(folder, layout, shard)
        for row in layout.rows_of_shard(shard):
            if not np.isnan(mel_NTF[row]).all() and mel_NTF[row].any():
                writer.append_clip(row, mel_NTF[row])
        writer.finish_file()
        writer.place()


@pytest.fixture
def written(tmp_path) -> tuple[Path, np.ndarray]:
    """Twenty clips in two shards, without the third and the last; returns the folder and the values."""
    mel_NTF = np.random.default_rng(0).normal(-8, 4, (20, 60, 40)).astype(np.float16)
    mel_NTF[[2, 19]] = np.nan
    write(tmp_path, LAYOUT, mel_NTF)
    return tmp_path, mel_NTF


def reader_of(folder: Path, layout: ShardLayout = LAYOUT, **options) -> ShardReader:
    return ShardReader(partial(shard_path, folder), layout, **options)


def read(reader: ShardReader, rows: list[int], starts: list[int], frames: int = 60) -> np.ndarray:
    out_BTF = np.empty((len(rows), frames, 40), np.float16)
    reader.read(np.array(rows, np.int64), np.array(starts, np.int64), out_BTF)
    return out_BTF


def forget_pages(folder: Path) -> None:
    """Remove the shards from memory, so that the next reads come from the disk."""
    for path in folder.glob("mel/c/*/0/0"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("io", READ_METHODS)
@pytest.mark.parametrize("check", ["first-epoch", "always", "never"])
@pytest.mark.parametrize("cold", [False, True])
def test_rows_and_crops_of_them_are_read_bit_for_bit(written, io, check, cold):
    """An offset wrong by one frame would shift every label; each row twice, as its check is due once."""
    folder, mel_NTF = written
    reader = reader_of(folder, io=io, check=check)
    rows = [18, 0, 16, 1, 3, 15, 0]
    for frames in (60, 7, 1):
        starts = np.random.default_rng(frames).integers(0, 61 - frames, len(rows)).tolist()
        for _ in range(2):
            if cold:
                forget_pages(folder)
            wanted = [mel_NTF[row, start : start + frames] for row, start in zip(rows, starts, strict=True)]
            np.testing.assert_array_equal(read(reader, rows, starts, frames), wanted)


@pytest.mark.parametrize("io", READ_METHODS)
@pytest.mark.parametrize("row", [2, 19])
def test_a_clip_that_is_not_there_is_refused(written, io, row):
    """Zarr returns the fill value for a missing clip; training must never get one."""
    with pytest.raises(BrokenClipError, match="does not contain the clip") as refused:
        read(reader_of(written[0], io=io), [0, row], [0, 0])
    assert refused.value.row == row


@pytest.mark.parametrize("io", READ_METHODS)
def test_a_shard_cut_while_it_is_open_is_reported_and_kills_no_process(written, io):
    """Mapped memory past a file's end is a SIGBUS."""
    folder, mel_NTF = written
    reader = reader_of(folder, io=io, check="never")
    read(reader, [0, 15], [0, 0])
    os.truncate(shard_path(folder, 0), 3 * 4804 + 17)
    np.testing.assert_array_equal(read(reader, [0, 3], [0, 0]), mel_NTF[[0, 3]])
    for start, frames in ((0, 60), (50, 5)):
        with pytest.raises(BrokenClipError, match="0/0/0: ends early") as refused:
            read(reader, [0, 15], [0, start], frames)
        assert refused.value.row == 15


def test_a_shard_that_is_replaced_is_read_by_its_new_index(written, monkeypatch):
    """A repair may move clips while a training run still has their old offsets."""
    monkeypatch.setattr(reader_module, "MAX_OPEN_SHARDS", 1)
    folder, mel_NTF = written
    reader = reader_of(folder)
    read(reader, [3, 16], [0, 0])
    mel_NTF[0] = np.nan
    write(folder, LAYOUT, mel_NTF)
    np.testing.assert_array_equal(read(reader, [3, 16, 1], [0, 0, 0]), mel_NTF[[3, 16, 1]])


def test_chunks_of_another_length_are_refused(written):
    """A shard of another spec, or a compressed one, may have replaced the shard."""
    short = ShardLayout(clips=20, frames=60, bands=30, dtype="float16", shard_clips=16)
    with pytest.raises(BrokenClipError, match="chunks that are not 3600 bytes"):
        reader_of(written[0], short).read(np.zeros(1, int), np.zeros(1, int), np.empty((1, 60, 30), "f2"))


@pytest.mark.parametrize("io", READ_METHODS)
def test_a_flipped_bit_is_reported_as_often_as_its_check_is_due(store_path, tmp_path, io):
    """never: no error; first-epoch: until the row was correct once; always: at every read. Crops are checked too."""
    path = copied(store_path, tmp_path)
    rows = FeatureStore.open(path).good_rows()[:8]
    stores = {
        check: FeatureStore.open(path, io=io, check=check) for check in ("never", "first-epoch", "always")
    }
    for store in stores.values():
        store.read(rows[:4], frames=10)
    for row in (rows[1], rows[6]):
        flip(path, row)
    if io == "mmap":
        assert (
            stores["never"].read(rows[6:7])[0, -1, -1]
            != FeatureStore.open(store_path).read(rows[6:7])[0, -1, -1]
        )
    broken_rows = {}
    for check, store in stores.items():
        store = pickle.loads(pickle.dumps(store)) if check == "always" else store
        broken_rows[check] = []
        for row in rows:
            try:
                store.read(np.array([row]), frames=10)
            except BrokenClipError as broken:
                broken_rows[check].append(broken.row)
    assert broken_rows == {"never": [], "first-epoch": [rows[6]], "always": [rows[1], rows[6]]}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("io", READ_METHODS)
def test_one_line_names_store_shard_row_clip_and_remedy(store_path, tmp_path, damage, said, io):
    """The error must be understood from the log alone."""
    path = copied(store_path, tmp_path)
    damage(path, 20)
    with pytest.raises(BrokenClipError) as broken:
        FeatureStore.open(path, io=io).read(np.array([0, 20]))
    assert broken.value.row == 20
    text = str(broken.value)
    fault = f"{path}: row 20 (clip clip_000020, shard 1) cannot be read: {path}/mel/c/1/0/0: {said}"
    assert text == f"{fault}; run: ajepa-data verify {path} --repair"
    again = pickle.loads(pickle.dumps(broken.value))
    assert (again.row, str(again)) == (20, text)


def test_a_row_that_never_was_good_is_the_callers_mistake(store):
    """Nothing is broken: a loader that skips broken clips must not skip these."""
    row = int(np.setdiff1d(np.arange(len(store.n_frames_N)), store.good_rows())[0])
    with pytest.raises(
        StoreError, match=rf"row {row} \(clip clip_00000{row}\) is not good: missing"
    ) as refused:
        store.read(np.array([row]))
    assert not isinstance(refused.value, BrokenClipError)


def test_an_error_of_the_process_condemns_no_clip(store_path, monkeypatch):
    """Otherwise a process without free descriptors would skip a whole store."""
    store = FeatureStore.open(store_path)

    def refused(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(reader_module.os, "open", refused)
    with pytest.raises(StoreError, match=r"Too many open files; check .* `ulimit -n`") as refusal:
        store.read(store.good_rows()[:2])
    assert not isinstance(refusal.value, BrokenClipError)


def test_a_disk_that_fails_breaks_the_clip(store_path, monkeypatch):
    """EIO comes from a bad sector."""
    store, preadv = FeatureStore.open(store_path), os.preadv
    store.read(np.array([0]))

    def failing(*values):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(reader_module.os, "preadv", failing)
    with pytest.raises(BrokenClipError, match="Input/output error"):
        store.read(np.array([0]))
    monkeypatch.setattr(reader_module.os, "preadv", preadv)


def test_a_file_system_without_direct_reads_says_so(store_path, monkeypatch):
    """The reader must not use the page cache without a message."""

    def refused(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(reader_module.fcntl, "fcntl", refused)
    with pytest.raises(StoreError, match="its file system refuses direct reads; use --io pread or mmap"):
        FeatureStore.open(store_path, io="direct").read(np.array([0]))


def test_all_is_read_where_the_kernel_cannot_say_what_is_in_memory(written, monkeypatch):
    """Some file systems do not support the flag."""
    folder, mel_NTF = written
    preadv = os.preadv

    def without_flags(descriptor, buffers, offset, flags=0):
        if flags:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(reader_module.os, "preadv", without_flags)
    for io in ("pread", "mmap"):
        np.testing.assert_array_equal(read(reader_of(folder, io=io), [0, 18], [0, 0]), mel_NTF[[0, 18]])


@pytest.mark.parametrize("wrong", [{"io": "zarr"}, {"check": "sometimes"}])
def test_an_unknown_method_of_reading_is_refused(store_path, wrong):
    with pytest.raises(InputError, match=r"expected (pread, mmap, direct|first-epoch, always, never)"):
        FeatureStore.open(store_path, **wrong)


@pytest.mark.parametrize("io", READ_METHODS)
def test_a_reader_keeps_few_files_open(tmp_path, monkeypatch, io):
    """Two million clips are four thousand shards, more than a process may have open."""
    monkeypatch.setattr(reader_module, "MAX_OPEN_SHARDS", 4)
    layout = ShardLayout(clips=160, frames=60, bands=40, dtype="uint8", shard_clips=16)
    mel_NTF = np.random.default_rng(0).integers(1, 255, (160, 60, 40)).astype(np.uint8)
    write(tmp_path, layout, mel_NTF)
    reader = reader_of(tmp_path, layout, io=io)
    for rows_B in np.random.default_rng(1).integers(0, 160, (20, 10)):
        out_BTF = np.empty((10, 60, 40), np.uint8)
        reader.read(rows_B, np.zeros(10, int), out_BTF)
        np.testing.assert_array_equal(out_BTF, mel_NTF[rows_B])
    assert count_open_files(tmp_path) == 4
    reader.close()
    assert count_open_files(tmp_path) == 0


@pytest.mark.parametrize("io", READ_METHODS)
def test_threads_read_one_store_at_once(store_path, io, monkeypatch):
    """Each thread has its own files, so that none closes a file that another reads; each check is due only once."""
    monkeypatch.setattr(reader_module, "MAX_OPEN_SHARDS", 2)
    store = FeatureStore.open(store_path, io=io)
    rows_N = store.good_rows()
    wanted_NTF = store.read(rows_N)

    def random_reads(seed: int) -> bool:
        places = [np.random.default_rng([seed, turn]).integers(0, len(rows_N), 5) for turn in range(20)]
        return all((store.read(rows_N[some]) == wanted_NTF[some]).all() for some in places)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(random_reads, range(8)))
    monkeypatch.setattr(reader_module.google_crc32c, "value", None)
    store.read(rows_N)


def view_of(store: FeatureStore, **kind) -> View:
    return View(**{"frames": 96, "mean": store.stats["all"]["mean"], "std": store.stats["all"]["std"]} | kind)


def read_until_error(loader: type, store: FeatureStore, order: RowOrder) -> tuple[list[int], BrokenClipError]:
    """Return the rows of all batches before the error, and the error."""
    rows: list[int] = []
    try:
        with loader(store, order, view_of(store)) as batches:
            for batch in batches.batches(0, 100):
                rows.extend(batch.rows_B.tolist())
    except BrokenClipError as broken:
        return rows, broken
    pytest.fail("no error was raised")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_broken_clip_is_reported_in_its_turn_and_nothing_is_left_running(
    store_path, tmp_path, damage, said
):
    """With either loader, all earlier batches come first, then the error at its step: no hang, no thread, no zeros."""
    path = copied(store_path, tmp_path)
    store = FeatureStore.open(path)
    last_shard = 2 * store.header.layout.shard_clips
    orders = (RowOrder(rows_N=store.good_rows(), clips=2, seed=seed) for seed in range(10_000))
    alone = [0, 0, 0, 1]  # how many of each step's rows are in the last shard
    order = next(o for o in orders if [(o.rows_at_step(s) >= last_shard).sum() for s in range(4)] == alone)
    row = int(order.rows_at_step(3).max())
    damage(path, row)
    threads = threading.active_count()
    for loader in (PlainLoader, DaliLoader):
        rows, broken = read_until_error(loader, FeatureStore.open(path), order)
        assert rows == np.concatenate([order.rows_at_step(s) for s in range(3)]).tolist()
        assert broken.row == row
        assert said in str(broken)
    gc.collect()
    assert threading.active_count() == threads


def count_open_files(folder: Path) -> int:
    """Return how many files of `folder` this process has open; what other tests left open does not count."""
    targets = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed in the meantime
            targets.append(os.readlink(descriptor))
    return sum(Path(target).is_relative_to(folder) for target in targets)


def measure_memory_kb() -> int:
    """Return this process's resident memory in kilobytes."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024


@pytest.mark.parametrize("loader", [PlainLoader, DaliLoader])
def test_two_hundred_epochs_take_no_more_than_twenty(store_path, loader):
    """Memory and descriptors do not grow, so that a run of weeks is not killed by its loader."""
    store = FeatureStore.open(store_path, check="always")
    order = RowOrder(rows_N=store.good_rows(), clips=9, seed=0)
    steps = order.steps_per_epoch
    memory_kb, files = [], []
    with loader(store, order, view_of(store)) as batches:
        for step, _ in enumerate(batches.batches(0, 200 * steps), 1):
            if step in (20 * steps, 110 * steps, 200 * steps):
                memory_kb.append(measure_memory_kb())
                files.append(count_open_files(store_path))
    assert len(set(files)) == 1
    growth_kb = np.diff(memory_kb)
    assert growth_kb.min() < 2_000, (
        f"{growth_kb} kB in each 90 epochs"
    )  # a leak grows in both, a warm-up in one


@pytest.mark.parametrize(
    ("limit", "pread", "mmap"), [(1024, 128, 64), (256, 32, 16), (4, 1, 1), (65_536, 256, 128)]
)
def test_a_reader_leaves_most_files_of_the_process_to_others(monkeypatch, limit, pread, mmap):
    """From Python nobody raises the limit, and a reader for each thread would use it up."""
    monkeypatch.setattr("resource.getrlimit", lambda _: (limit, limit))
    assert (reader_module.most_open_shards("pread"), reader_module.most_open_shards("mmap")) == (pread, mmap)


def test_codes_become_log_mels_by_one_call(store, uint8_store_path):
    """`read` gives what is stored, which of a uint8 store is no log-mel: a model would take it without an error."""
    codes = FeatureStore.open(uint8_store_path)
    rows_N = store.good_rows()[:3]
    assert codes.read(rows_N).dtype == np.uint8
    assert store.read(rows_N).dtype == np.float16
    mel_BTF = codes.to_log_mel(codes.read(rows_N))
    assert mel_BTF.dtype == np.float32
    np.testing.assert_allclose(mel_BTF, store.to_log_mel(store.read(rows_N)), atol=0.1)
