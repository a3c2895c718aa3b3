"""Every fault a disk or a crash can bring is found, and building again mends it."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import build

from pipeline.shards import shard_path
from pipeline.store import ledger_path
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
        (lambda s: shard_path(s, 0).unlink(), "shard 0: .*No such file"),
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
def test_damage_is_found_named_and_mended(damaged, corpus, damage, said):
    """One line that says what and where; then the same build command makes the store whole."""
    damage(damaged)
    faults = list(faults_of(damaged))
    assert any(re.search(said, fault) for fault in faults), faults
    for fault in faults:
        if named := re.search(r"delete (\S+) and|^(\S+): .*; delete it", fault):
            Path(named[1] or named[2]).unlink(missing_ok=True)
    build(corpus, damaged)
    assert list(faults_of(damaged)) == []
