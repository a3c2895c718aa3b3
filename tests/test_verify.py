"""Every fault a disk or a crash can bring is found, and building again mends it."""

import shutil

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
        (flip, r"shard 1: .* does not match its digest \(clips \[1\] of it are damaged\)"),
        (lambda s: shard_path(s, 0).unlink(), "shard 0: .*No such file"),
        (
            lambda s: shard_path(s, 2).write_bytes(shard_path(s, 2).read_bytes()[:-100]),
            "shard 2: .* bytes, expected",
        ),
        (lambda s: ledger_path(s, 1).unlink(), "shard 1: not committed"),
        (lambda s: ledger_path(s, 1).write_bytes(b"PAR1"), "000001.parquet: cannot be read"),
        (lambda s: (s / "mel" / "stray.partial").touch(), "stray.partial: left by a build"),
        (lambda s: (s / "stats.json").write_text("{}"), "stats.json: does not follow"),
        (lambda s: shutil.copy(ledger_path(s, 0), ledger_path(s, 1)), "shard 1: "),
    ],
)
def test_damage_is_found_named_and_mended(damaged, corpus, damage, said):
    """One line that says what and where; then the same build command makes the store whole."""
    import re

    damage(damaged)
    faults = list(faults_of(damaged))
    assert any(re.search(said, fault) for fault in faults), faults
    for shard in range(3):
        if any(fault.startswith(f"shard {shard}") or f"{shard:06d}.parquet" in fault for fault in faults):
            ledger_path(damaged, shard).unlink(missing_ok=True)  # what the messages ask for
    build(corpus, damaged)
    assert list(faults_of(damaged)) == []
