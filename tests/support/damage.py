"""Damage to a store's shards, by name; and stores that suffer it."""

import shutil
from pathlib import Path

from pipeline.store.feature_store import FeatureStore
from pipeline.store.shards import CRC_BYTES, shard_path


def copied(store: Path, folder: Path) -> Path:
    """The store once more, to be damaged."""
    return shutil.copytree(store, folder / store.name)


def chunk_place(store: Path, row: int) -> tuple[Path, int]:
    """The shard that holds a row, and where in it its chunk begins: before it lie those of the good rows."""
    opened = FeatureStore.open(store)
    layout = opened.header.layout
    shard = row // layout.shard_clips
    good = opened.good_rows()
    before = ((good >= layout.rows_of_shard(shard).start) & (good < row)).sum()
    return shard_path(store, shard), int(before) * (layout.clip_bytes + CRC_BYTES)


def flip(store: Path, row: int) -> None:
    """One bit of a row's spectrogram, in its last frame."""
    path, offset = chunk_place(store, row)
    content = bytearray(path.read_bytes())
    content[offset + FeatureStore.open(store).header.layout.clip_bytes - 1] ^= 1
    path.write_bytes(content)


def delete(store: Path, row: int) -> None:
    """The shard that holds a row."""
    chunk_place(store, row)[0].unlink()


def cut(store: Path, row: int) -> None:
    """The shard that holds a row ends within that."""
    path, offset = chunk_place(store, row)
    path.write_bytes(path.read_bytes()[: offset + 1000])


def flip_index(store: Path, row: int) -> None:
    """One bit of the index of the shard that holds a row."""
    path = chunk_place(store, row)[0]
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flip": (flip, "its spectrogram does not match its checksum"),
    "delete": (delete, "No such file or directory"),
    "cut": (cut, "its index does not match its checksum"),
    "flip_index": (flip_index, "its index does not match its checksum"),
}
