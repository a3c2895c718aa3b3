"""Shards on disk are standard Zarr with checksums."""

import hashlib
import json

import numpy as np
import pytest
import zarr

from pipeline.errors import StoreError
from pipeline.store.header import ShardLayout
from pipeline.store.shards import (
    ShardWriter,
    check_mel_array,
    choose_shard_clips,
    create_mel_array,
    shard_path,
    zarr_array_json,
)

LAYOUT = ShardLayout(clips=20, frames=6, bands=4, dtype="float16", shard_clips=16)


@pytest.fixture
def written(tmp_path):
    """Twenty clips in two shards, without the third and the last; returns the folder and the values."""
    mel_NTF = np.random.default_rng(0).normal(-8, 4, (20, 6, 4)).astype(np.float16)
    mel_NTF[[2, 19]] = np.nan
    create_mel_array(tmp_path, LAYOUT, {"ajepa": {}})
    for shard in range(LAYOUT.shard_count):
        write(tmp_path, LAYOUT, shard, mel_NTF)
    return tmp_path, mel_NTF


def write(folder, layout, shard, mel_NTF):
    """Write one shard without the rows that are the fill value; returns its digest and the writer."""
    writer = ShardWriter(folder, layout, shard)
    for row in layout.rows_of_shard(shard):
        if not np.isnan(mel_NTF[row]).all() and mel_NTF[row].any():
            writer.append_clip(row, mel_NTF[row])
    digest = writer.finish_file()
    writer.place()
    return digest, writer


def test_any_zarr_library_reads_the_same_numbers(written):
    """Other programs must be able to read a store without this package."""
    folder, mel_NTF = written
    np.testing.assert_array_equal(zarr.open_group(folder, mode="r")["mel"][:], mel_NTF)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_shard_has_the_bytes_that_zarr_python_would_write(tmp_path, dtype):
    """The bytes are the same with gaps and a short last shard, although ShardWriter makes no copies in memory."""
    layout = ShardLayout(clips=20, frames=6, bands=4, dtype=dtype, shard_clips=16)
    mel_NTF = np.random.default_rng(1).integers(1, 200, (20, 6, 4)).astype(dtype)
    mel_NTF[[2, 15, 19]] = layout.fill_value
    for folder in (tmp_path / "ours", tmp_path / "zarr"):
        create_mel_array(folder, layout, {})
    zarr.open_group(tmp_path / "zarr", mode="r+")["mel"][:] = mel_NTF
    for shard in range(2):
        digest, writer = write(tmp_path / "ours", layout, shard, mel_NTF)
        content = shard_path(tmp_path / "ours", shard).read_bytes()
        assert content == shard_path(tmp_path / "zarr", shard).read_bytes()
        assert (digest, writer.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))


def test_an_unfinished_shard_leaves_nothing(tmp_path):
    """An interrupted build must not litter."""
    writer = ShardWriter(tmp_path, LAYOUT, 0)
    writer.append_clip(0, np.ones((6, 4), np.float16))
    writer.close()
    assert not list(shard_path(tmp_path, 0).parent.iterdir())


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
    """At most 128 MiB, at least 16 clips, and at least 64 shards if the data set is large enough."""
    assert choose_shard_clips(clips, clip_bytes) == expected


def compressed(array):
    array["codecs"][0]["configuration"]["codecs"].append({"name": "zstd", "configuration": {"level": 3}})


def index_first(array):
    array["codecs"][0]["configuration"]["index_location"] = "start"


def big_endian(array):
    array["codecs"][0]["configuration"]["codecs"][0]["configuration"]["endian"] = "big"


def unsharded(array):
    array["codecs"] = array["codecs"][0]["configuration"]["codecs"]


@pytest.mark.parametrize(
    "change",
    [
        compressed,
        index_first,
        big_endian,
        unsharded,
        lambda array: array.update(data_type="float32"),
        lambda array: array["chunk_grid"]["configuration"].update(chunk_shape=[8, 6, 4]),
        lambda array: array["codecs"][0]["configuration"].update(chunk_shape=[2, 6, 4]),
        lambda array: array.update(shape=[21, 6, 4]),
        lambda array: array.clear(),
    ],
)
def test_an_array_of_another_form_is_refused_in_one_line(tmp_path, change):
    """Compressed chunks, read by offset, would be noise that looks like sound."""
    create_mel_array(tmp_path, LAYOUT, {})
    check_mel_array(tmp_path, LAYOUT)
    array = json.loads(zarr_array_json(LAYOUT))
    change(array)
    (tmp_path / "mel" / "zarr.json").write_text(json.dumps(array))
    with pytest.raises(StoreError, match=r"mel/zarr.json: (describes an array|not as written)") as refused:
        check_mel_array(tmp_path, LAYOUT)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_the_array_of_every_dtype_is_accepted(tmp_path, dtype):
    layout = ShardLayout(clips=20, frames=6, bands=4, dtype=dtype, shard_clips=16)
    create_mel_array(tmp_path, layout, {})
    check_mel_array(tmp_path, layout)
