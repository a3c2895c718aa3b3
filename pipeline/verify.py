"""Faults of a store: ledger against objects against checksums against manifest against statistics."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np
import polars as pl

from pipeline.build import statistics
from pipeline.errors import StoreError
from pipeline.files import PARTIAL
from pipeline.manifest import RESULT_SCHEMA
from pipeline.shardmaker import NEXT
from pipeline.shards import ABSENT, CRC_BYTES, array_json, read_index, shard_path
from pipeline.store import Commit, Header, ledger_path, read_commit, read_table, store_id, stray_shards


def faults_of(store: Path) -> Iterator[str]:
    """One line per fault, with what mends it; none for a store that is whole. Raises StoreError if there is none."""
    header = Header.read(store)
    yield from _faults_beside(store, header)
    try:
        manifest, metadata = read_table(store / "manifest.parquet")
    except StoreError as error:
        yield str(error)
        return
    commits: list[Commit] = []
    for shard in range(header.layout.shards):
        rows = header.layout.rows(shard)
        try:
            record = read_commit(store, shard)
        except StoreError as error:
            yield str(error)
            continue
        if record is None:
            yield f"shard {shard}: not committed; build again"
            continue
        commits.append(record[0])
        if why := _fault(store, header, *record):
            yield f"shard {shard}: {why}; delete {ledger_path(store, shard)} and build again"
        told = manifest.slice(rows.start, len(rows)).select(*RESULT_SCHEMA)
        if not told.equals(record[1]):
            yield f"shard {shard}: the manifest and the ledger differ; build again"
    if len(commits) == header.layout.shards:
        yield from _fault_of_whole(store, header, commits, metadata)


def _faults_beside(store: Path, header: Header) -> Iterator[str]:
    """What is wrong beside the shards: array header, labels, leftovers."""
    array = store / "mel" / "zarr.json"
    if not array.is_file() or array.read_bytes() != array_json(header.layout):
        yield f"{array}: not as written; build again"
    try:
        height = read_table(store / "labels.parquet")[0].height
        if height != header.layout.clips:
            yield f"labels.parquet: {height} rows, expected {header.layout.clips}; build again, then propagate"
    except StoreError as error:
        yield str(error)
    leftovers = [*store.rglob(f"*{PARTIAL}"), *store.glob(f"ledger/*{NEXT}"), *stray_shards(store)]
    yield from (f"{path}: left by a build that was cut off; build again" for path in leftovers)


def _fault(store: Path, header: Header, commit: Commit, results: pl.DataFrame) -> str | None:
    """What is wrong with one shard's object, its chunks or its ledger record; None if nothing is."""
    if len(results) != len(header.layout.rows(commit.shard)):
        return "its ledger record has another number of rows"
    if (commit.spec_id, commit.plan_id) != (header.spec.spec_id, header.plan_id):
        return "its ledger record is of another spec or plan"
    path = shard_path(store, commit.shard)
    if not commit.size_bytes:
        return f"{path} should not exist, no clip of it is good" if path.exists() else None
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"{path}: {error.strerror}"
    if len(content) != commit.size_bytes:
        return f"{path} has {len(content)} bytes, expected {commit.size_bytes}"
    if hashlib.sha256(content).hexdigest() != commit.sha256:
        return f"{path} does not match its digest{_damaged_rows(path, content, header, commit)}"
    there = _index(path, header)[: len(results), 0] != ABSENT
    if (there != (results["status"] == "good").to_numpy()).any():
        return f"{path} holds other clips than the ledger says"
    return None


def _index(path: Path, header: Header) -> np.ndarray:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_index(descriptor, header.layout.shard_clips)
    finally:
        os.close(descriptor)


def _damaged_rows(path: Path, content: bytes, header: Header, commit: Commit) -> str:
    """The rows whose chunk fails its own checksum, as the end of a sentence."""
    try:
        index_N2 = _index(path, header)
    except ValueError as error:
        return f" ({error})"
    rows, bad = header.layout.rows(commit.shard), []
    for row, (offset, size) in zip(rows, index_N2[: len(rows)].tolist(), strict=True):
        chunk = content[offset : offset + size]
        if offset != ABSENT and google_crc32c.value(chunk[:-CRC_BYTES]) != int.from_bytes(
            chunk[-CRC_BYTES:], "little"
        ):
            bad.append(row)
    return f" (rows {bad[:5]} are damaged)" if bad else ""


def _fault_of_whole(
    store: Path, header: Header, commits: list[Commit], metadata: dict[str, str]
) -> Iterator[str]:
    if metadata.get("store_id") != store_id(header, commits):
        yield "manifest.parquet: the store's id does not follow from its shards; build again"
    try:
        stats = json.loads((store / "stats.json").read_text())
    except (OSError, ValueError):
        stats = None
    if stats != statistics(commits):
        yield "stats.json: does not follow from the ledger; build again"
