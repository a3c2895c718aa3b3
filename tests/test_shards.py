"""Shards on disk: standard Zarr, checksummed, read by offset."""

import hashlib
import os

import numpy as np
import pytest
import zarr

from pipeline.errors import StoreError
from pipeline.shards import Layout, ShardReader, ShardWriter, create_array, shard_clips_for, shard_path

LAYOUT = Layout(clips=20, frames=6, bands=4, dtype="float16", shard_clips=16)


@pytest.fixture
def written(tmp_path):
    """Twenty clips in two shards, the third and the last not there; the folder and the values."""
    mel_NTF = np.random.default_rng(0).normal(-8, 4, (20, 6, 4)).astype(np.float16)
    mel_NTF[[2, 19]] = np.nan
    create_array(tmp_path, LAYOUT, {"ajepa": {}})
    for shard in range(LAYOUT.shards):
        write(tmp_path, LAYOUT, shard, mel_NTF)
    return tmp_path, mel_NTF


def write(folder, layout, shard, mel_NTF):
    """One shard out of all values; rows of the fill value are not there. Its digest, and the writer."""
    writer = ShardWriter(folder, layout, shard)
    for row in layout.rows(shard):
        if not np.isnan(mel_NTF[row]).all() and mel_NTF[row].any():
            writer.add(row, mel_NTF[row])
    digest = writer.finish()
    writer.place()
    return digest, writer


def test_any_zarr_library_reads_the_same_numbers(written):
    """The store is the hand-over: it must not need this package."""
    folder, mel_NTF = written
    np.testing.assert_array_equal(zarr.open_group(folder, mode="r")["mel"][:], mel_NTF)


def test_a_row_and_a_crop_of_it_are_read_bit_for_bit(written):
    """Training reads crops; an offset wrong by one frame would shift every label."""
    folder, mel_NTF = written
    reader = ShardReader(folder, LAYOUT)
    for row in (0, 1, 3, 15, 16, 18):
        out_TF = np.empty((3, 4), np.float16)
        reader.read_into(row, out_TF, start_frame=2)
        np.testing.assert_array_equal(out_TF, mel_NTF[row, 2:5])


@pytest.mark.parametrize("row", [2, 19])
def test_a_clip_that_is_not_there_is_refused(written, row):
    """Zarr gives the fill value for it; a trainer must never see one."""
    with pytest.raises(StoreError, match=f"row {row} is not in shard"):
        ShardReader(written[0], LAYOUT).read_into(row, np.empty((6, 4), np.float16))


def test_a_missing_or_damaged_shard_is_refused_with_what_mends_it(written):
    """zarr-python reads a missing shard as fill values, without a word."""
    folder, _ = written
    out_TF = np.empty((6, 4), np.float16)
    content = bytearray(shard_path(folder, 0).read_bytes())
    content[-9] ^= 1
    shard_path(folder, 0).write_bytes(content)
    with pytest.raises(StoreError, match="index does not match its checksum; run: ajepa-data verify"):
        ShardReader(folder, LAYOUT).read_into(0, out_TF)
    shard_path(folder, 0).write_bytes(content[:50])
    with pytest.raises(StoreError, match="has 50 bytes"):
        ShardReader(folder, LAYOUT).read_into(0, out_TF)
    shard_path(folder, 0).unlink()
    with pytest.raises(StoreError, match="No such file"):
        ShardReader(folder, LAYOUT).read_into(0, out_TF)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_shard_has_the_bytes_that_zarr_python_would_write(tmp_path, dtype):
    """The standard, byte for byte: written without the copies that zarr-python makes, gaps and a short end included."""
    layout = Layout(clips=20, frames=6, bands=4, dtype=dtype, shard_clips=16)
    mel_NTF = np.random.default_rng(1).integers(1, 200, (20, 6, 4)).astype(dtype)
    mel_NTF[[2, 15, 19]] = layout.fill
    for folder in (tmp_path / "ours", tmp_path / "zarr"):
        create_array(folder, layout, {})
    zarr.open_group(tmp_path / "zarr", mode="r+")["mel"][:] = mel_NTF
    for shard in range(2):
        digest, writer = write(tmp_path / "ours", layout, shard, mel_NTF)
        content = shard_path(tmp_path / "ours", shard).read_bytes()
        assert content == shard_path(tmp_path / "zarr", shard).read_bytes()
        assert (digest, writer.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))


def test_a_shard_that_is_dropped_leaves_nothing(tmp_path):
    """An interrupted build must not litter."""
    writer = ShardWriter(tmp_path, LAYOUT, 0)
    writer.add(0, np.ones((6, 4), np.float16))
    writer.close()
    assert not list(shard_path(tmp_path, 0).parent.iterdir())


def test_a_reader_keeps_few_files_open(tmp_path, monkeypatch):
    """Two million clips are four thousand shards, more than a process may have open."""
    monkeypatch.setattr("pipeline.shards.OPEN_SHARDS", 3)
    layout = Layout(clips=160, frames=2, bands=2, dtype="uint8", shard_clips=16)
    mel_NTF = np.random.default_rng(0).integers(1, 255, (160, 2, 2)).astype(np.uint8)
    for shard in range(10):
        write(tmp_path, layout, shard, mel_NTF)
    before, reader, out_TF = (
        len(os.listdir("/proc/self/fd")),
        ShardReader(tmp_path, layout),
        np.empty((2, 2), np.uint8),
    )
    for row in np.random.default_rng(1).integers(0, 160, 200):
        reader.read_into(int(row), out_TF)
        np.testing.assert_array_equal(out_TF, mel_NTF[row])
    assert len(os.listdir("/proc/self/fd")) == before + 3
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("clips", "clip_bytes", "expected"),
    [
        (400, 255_488, 16),
        (2_000, 255_488, 16),
        (20_000, 255_488, 256),
        (2_084_320, 255_488, 512),
        (10**6, 65_024, 2048),
    ],
)
def test_shards_are_neither_too_many_nor_too_large(clips, clip_bytes, expected):
    """At most 128 MiB, at least 16 clips, at least 64 shards where the set allows it."""
    assert shard_clips_for(clips, clip_bytes) == expected
