"""Where the time of a batch goes."""

import pytest

from pipeline.errors import RunError, StoreError
from pipeline.loading import benchmark
from pipeline.loading.benchmark import LoadingSpeed, LoadingStage, measure_loading


@pytest.fixture
def hasty(monkeypatch):
    """Milliseconds instead of seconds: what is tested is the table, not this machine."""
    monkeypatch.setattr(benchmark, "MIN_TIMED_SECONDS", 0.01)


def test_every_stage_and_both_loaders_are_timed(store, hasty):
    """A stage left out would hide the one that holds up the others."""
    told: list[str] = []
    found = measure_loading(store, batch_clips=4, say=told.append)
    assert [stage.name for stage in found.stages] == [
        "disk, from end to end",
        "random read, from memory",
        "checksum, when first read",
        "cast and normalise",
        "masks and mixup, if asked for",
    ]
    assert set(found.batch_clips_per_s) == {"plain", "dali"}
    assert all(stage.clips_per_s > 0 for stage in found.stages)
    assert all(speed > 0 for speed in found.batch_clips_per_s.values())
    assert found.clip_bytes == store.frames * store.bands * store.dtype.itemsize
    assert len(told) == 7


def test_the_slowest_stage_is_named_with_what_helps():
    """The last line is the one a user acts on."""
    stages = (
        LoadingStage(name="disk", clips_per_s=50.0, advice="move it"),
        LoadingStage(name="read", clips_per_s=200.0, advice="x"),
        LoadingStage(name="mixup", clips_per_s=10.0, advice="y", is_every_epoch=False),
    )
    table = LoadingSpeed(stages=stages, batch_clips_per_s={"dali": 40.0}, clip_bytes=1_000_000).format_table()
    assert table.splitlines()[-1] == "slowest: disk; if a trainer waits, move it"
    assert table.splitlines()[1].split() == ["disk", "50", "50"]


def test_a_batch_larger_than_the_store_is_refused(store):
    """Rather than timed on the same clips again and again."""
    with pytest.raises(StoreError, match=r"good clips do not fill a batch of 100000; lower --batch"):
        measure_loading(store, batch_clips=100_000)


def test_a_device_that_is_not_there_is_told_before_anything_is_timed(store):
    """Half a gigabyte is read from the disk first."""
    told: list[str] = []
    with pytest.raises(RunError, match="device 'tpu': expected cpu, cuda or cuda:N"):
        measure_loading(store, batch_clips=4, device="tpu", say=told.append)
    assert not told
