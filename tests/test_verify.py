"""Every fault a disk or a crash can bring is found, and building again mends it."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import assert_same_bytes
from corpus import clip_id

from pipeline.errors import StoreError
from pipeline.ledger import ledger_path
from pipeline.repair import repair
from pipeline.shards import shard_path
from pipeline.verify import faults_of


@pytest.fixture
def damaged(store_path, tmp_path):
    return shutil.copytree(store_path, tmp_path / "copy.zarr")


def test_a_whole_store_has_no_faults(store_path):
    """Otherwise nobody would believe the others."""
    assert list(faults_of(store_path)) == []


def flip(store):
    content = bytearray(shard_path(store, 1).read_bytes())
    content[300_000] ^= 1  # inside the second clip of the shard
    shard_path(store, 1).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, r"shard 1: .* does not match its digest \(rows \[17\] are damaged\)"),
        (lambda s: shard_path(s, 0).unlink(), "shard 0: .*no such file"),
        (
            lambda s: shard_path(s, 2).write_bytes(shard_path(s, 2).read_bytes()[:-100]),
            "shard 2: .* bytes, expected",
        ),
        (lambda s: ledger_path(s, 1).unlink(), "shard 1: not committed"),
        (lambda s: ledger_path(s, 1).write_bytes(b"PAR1"), "000001.parquet: cannot be read"),
        (lambda s: (s / "mel" / "stray.partial").touch(), "stray.partial: left by a build"),
        (lambda s: (s / "stats.json").write_text("{}"), "stats.json: does not follow"),
        (lambda s: shutil.copy(ledger_path(s, 0), ledger_path(s, 1)), "is the record of shard 0"),
        (lambda s: (s / "labels.parquet").unlink(), "labels.parquet: cannot be read .missing."),
        (lambda s: (s / "mel" / "zarr.json").write_text("{}"), "zarr.json: not as written"),
        (lambda s: shutil.copytree(s / "mel" / "c" / "0", s / "mel" / "c" / "9"), "c/9/0/0: left by"),
    ],
)
def test_damage_is_found_named_and_mended(damaged, store_path, damage, said):
    """One line that says what and where; then a repair makes the store what it was, byte for byte."""
    damage(damaged)
    faults = list(faults_of(damaged))
    assert any(re.search(said, fault.text) for fault in faults), faults
    repair(damaged, faults, workers=0)
    assert list(faults_of(damaged)) == []
    if "labels" not in said:  # propagated labels are added by a command of their own
        assert_same_bytes(store_path, damaged)


def test_a_repair_decodes_nothing_but_the_broken_shards(damaged, monkeypatch):
    """On two million clips one flipped bit must not cost a week."""
    flip(damaged)
    tried = []
    repair(
        damaged, list(faults_of(damaged)), workers=0, progress=lambda clips, rows: tried.append(clips) or rows
    )
    assert tried == [16]


def test_a_repair_does_not_throw_away_what_cannot_be_decoded_again(damaged, monkeypatch):
    """A flipped bit in one clip must not cost the others whose sounds are gone."""
    flip(damaged)
    before = shard_path(damaged, 1).read_bytes()
    told = json.loads((damaged / "build.json").read_text())
    empty = damaged.parent / "audio"
    empty.mkdir()
    shutil.copy(Path(told["asked"]["audio"][0]) / f"{clip_id(0)}.wav", empty)
    told["asked"]["audio"] = [str(empty)]
    (damaged / "build.json").write_text(json.dumps(told))
    with pytest.raises(StoreError, match="16 good clips of shard 1 have no sound any more"):
        repair(damaged, list(faults_of(damaged)), workers=0)
    assert shard_path(damaged, 1).read_bytes() == before
    (damaged / "build.json").unlink()
    with pytest.raises(StoreError, match="run its build command again"):
        repair(damaged, list(faults_of(damaged)), workers=0)


def test_a_sample_reads_some_shards_and_checks_the_sizes_of_all(damaged):
    """Terabytes take hours to read; a lost shard is seen at once."""
    for shard in range(3):
        content = bytearray(shard_path(damaged, shard).read_bytes())
        content[300_000] ^= 1
        shard_path(damaged, shard).write_bytes(content)
    assert len(list(faults_of(damaged))) == 3
    assert len(list(faults_of(damaged, sample=1))) == 1
    shard_path(damaged, 0).write_bytes(b"short")
    shard_path(damaged, 1).write_bytes(b"short")
    assert len(list(faults_of(damaged, sample=1))) >= 2
