"""One plan, many machines: parts, restarts and several stores in one pass change no byte."""

import os
import shutil

import pytest
from killed_build import outputs_in
from stores import assert_same_bytes, corpus_in

from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build.build import build_store, build_stores
from pipeline.build.finish import finish_store
from pipeline.build.plan import BuildBlocks, BuildOptions, StoreOutput, plan_store
from pipeline.build.verify import find_faults
from pipeline.build.workers import run_in_processes
from pipeline.errors import InputError, StoreError
from pipeline.files import WHOLE_BUILD, BuildPart, lock_shared_files, lock_store
from pipeline.store.feature_store import FeatureStore
from pipeline.store.header import StoreHeader

IN_THIS_PROCESS = {"workers": 0}


@pytest.fixture(scope="module")
def whole_stores(corpus, tmp_path_factory):
    """Two stores of one decoding pass, built in one go."""
    folder = tmp_path_factory.mktemp("whole")
    build_stores(corpus_in(corpus), outputs_in(folder), BuildOptions(**IN_THIS_PROCESS))
    return folder


def test_several_stores_of_one_pass_are_each_what_they_would_be_alone(corpus, whole_stores, tmp_path):
    """Decoding dominates the cost; sharing it must not show."""
    for output in outputs_in(tmp_path):
        build_store(corpus_in(corpus), output, BuildOptions(**IN_THIS_PROCESS))
    for expected, actual in zip(outputs_in(whole_stores), outputs_in(tmp_path), strict=True):
        assert_same_bytes(expected.path, actual.path)


def test_a_second_spec_added_later_leaves_the_first_store_alone(corpus, whole_stores, tmp_path, monkeypatch):
    """Only the missing store is made."""
    first, second = outputs_in(tmp_path)
    build_store(corpus_in(corpus), first, BuildOptions(**IN_THIS_PROCESS))
    before = {path: path.stat().st_mtime_ns for path in first.path.glob("mel/c/*/0/0")}
    build_stores(corpus_in(corpus), [first, second], BuildOptions(**IN_THIS_PROCESS))
    assert {path: path.stat().st_mtime_ns for path in first.path.glob("mel/c/*/0/0")} == before
    assert_same_bytes(outputs_in(whole_stores)[1].path, second.path)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_make_the_bytes_of_the_whole(corpus, whole_stores, tmp_path, order):
    """In any order, the last one to end finishes the stores by itself."""
    for place, index in enumerate(order):
        manifests = build_stores(
            corpus_in(corpus), outputs_in(tmp_path), BuildOptions(part=BuildPart(index, 3), **IN_THIS_PROCESS)
        )
        assert [manifest is None for manifest in manifests] == [place < 2] * 2
        if place < 2:
            with pytest.raises(StoreError, match="not finished"):
                FeatureStore.open(tmp_path / "a-jepa.zarr")
    for expected, actual in zip(outputs_in(whole_stores), outputs_in(tmp_path), strict=True):
        assert_same_bytes(expected.path, actual.path)


def test_a_division_may_change_between_runs(corpus, whole_stores, tmp_path):
    """A job array of other size, then one machine: the ledger is all that counts."""
    corpus, outputs = corpus_in(corpus), outputs_in(tmp_path)
    build_stores(corpus, outputs, BuildOptions(part=BuildPart(1, 2), **IN_THIS_PROCESS))
    build_stores(corpus, outputs, BuildOptions(part=BuildPart(0, 4), **IN_THIS_PROCESS))
    build_stores(corpus, outputs, BuildOptions(workers=1))
    for expected, actual in zip(outputs_in(whole_stores), outputs, strict=True):
        assert_same_bytes(expected.path, actual.path)
        assert not list(find_faults(actual.path))


def test_more_parts_than_blocks_leave_some_with_nothing_to_do(corpus, tmp_path):
    """An array of 64 jobs on a small set is no error."""
    assert (
        build_stores(
            corpus_in(corpus), outputs_in(tmp_path), BuildOptions(part=BuildPart(63, 64), **IN_THIS_PROCESS)
        )
        == [None] * 2
    )


def test_a_store_can_be_finished_by_hand(whole_stores, tmp_path):
    """Where the last part died between its last shard and the end."""
    store = shutil.copytree(whole_stores / "a-jepa.zarr", tmp_path / "copy.zarr")
    (store / "stats.json").unlink()
    finish_store(store, StoreHeader.read(store))
    assert_same_bytes(whole_stores / "a-jepa.zarr", store)


def test_blocks_hold_whole_shards_of_every_store(corpus, tmp_path):
    """Shards of 16 and of 2048 clips from one pass: a shard has one writer, whatever the part."""
    headers = [plan_store(corpus_in(corpus), output) for output in outputs_in(tmp_path)]
    for count in (1, 2, 3):
        parts = [BuildBlocks.of_part(headers, BuildPart(index, count)) for index in range(count)]
        for header in headers:
            shards = [
                shard
                for part in parts
                for block in part.block_numbers
                for shard in part.block_shards(block, header.layout)
            ]
            assert sorted(shards) == list(range(header.layout.shard_count))
            for shard in shards:
                assert sum(part.owns_shard(shard, header.layout) for part in parts) == 1


def test_tasks_are_made_when_they_are_asked_for(corpus):
    """Two million clips at once would fill the memory."""
    numbers_made = []

    class EmptyTask:
        def with_failed_row(self, row, reason, detail):
            return self

    def tasks():
        for number in range(5):
            numbers_made.append(number)
            yield EmptyTask()

    rows = run_in_processes(lambda task: iter([len(numbers_made)]), tasks(), workers=0, clip_limit_seconds=1)
    assert list(rows) == [1, 2, 3, 4, 5]


def test_parts_of_one_division_may_build_together_and_no_others(tmp_path):
    """Two writers in one shard lose data; a job array's parts never share one."""
    with (
        lock_store(tmp_path, BuildPart(0, 3)),
        lock_store(tmp_path, BuildPart(1, 3)),
        lock_shared_files(tmp_path),
    ):
        for other in (BuildPart(0, 3), BuildPart(1, 4), WHOLE_BUILD):
            with (
                pytest.raises(StoreError, match=f"written by process {os.getpid()} on"),
                lock_store(tmp_path, other),
            ):
                pass
    with (
        lock_store(tmp_path),
        pytest.raises(StoreError, match="being written"),
        lock_store(tmp_path, BuildPart(0, 3)),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_build_stops_nobody(tmp_path):
    """The kernel frees it; the file is only its name."""
    (tmp_path / "build.0-of-3.lock").write_text("process 1 on another machine")
    (tmp_path / "gate.lock").touch()
    with lock_store(tmp_path), lock_shared_files(tmp_path):
        pass


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/3", "1/0", ""])
def test_a_malformed_part_is_refused(text):
    """The message says what a part looks like."""
    with pytest.raises(InputError, match="expected i/n with 0 <= i < n"):
        BuildPart.parse(text)


def test_two_stores_in_one_place_are_refused(corpus, tmp_path):
    """Before anything is written."""
    outputs = [
        StoreOutput(path=tmp_path / "x.zarr", spec=preset_mel_spec(name)) for name in ("a-jepa", "audio-jepa")
    ]
    with pytest.raises(InputError, match="two stores with one path"):
        build_stores(corpus_in(corpus), outputs)
    assert not list(tmp_path.iterdir())
