"""The measurement of a store's loading speed, stage by stage."""

import pytest

from pipeline.errors import RunError, StoreError
from pipeline.loading import benchmark
from pipeline.loading.benchmark import LoadingSpeed, LoadingStage, measure_loading


@pytest.fixture
def brief_timing(monkeypatch):
    """Milliseconds instead of seconds: these tests are about the table, not about this machine."""
    monkeypatch.setattr(benchmark, "MIN_TIMED_SECONDS", 0.01)


def test_every_stage_and_both_loaders_are_timed(store, brief_timing):
    """A stage that is left out would hide the one that limits the others."""
    lines: list[str] = []
    speed = measure_loading(store, batch_clips=4, say=lines.append)
    assert [stage.name for stage in speed.stages] == [
        "disk, from end to end",
        "random read, from memory",
        "checksum, when first read",
        "cast and normalise",
        "masks and mixup, if asked for",
    ]
    assert set(speed.batch_clips_per_s) == {"plain", "dali"}
    assert all(stage.clips_per_s > 0 for stage in speed.stages)
    assert all(clips_per_s > 0 for clips_per_s in speed.batch_clips_per_s.values())
    assert speed.clip_bytes == store.frames * store.bands * store.dtype.itemsize
    assert len(lines) == 7


def test_the_slowest_stage_is_named_with_its_advice():
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


def test_an_unknown_device_is_refused_before_anything_is_timed(store):
    """Half a gigabyte is read from the disk first."""
    lines: list[str] = []
    with pytest.raises(RunError, match="device 'tpu': expected cpu, cuda or cuda:N"):
        measure_loading(store, batch_clips=4, device="tpu", say=lines.append)
    assert not lines
