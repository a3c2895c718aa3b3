"""Faults of a store: ledger against objects against checksums against manifest against statistics."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import polars as pl

from pipeline.errors import ManifestError, StoreError
from pipeline.files import PARTIAL
from pipeline.finalise import statistics
from pipeline.ledger import NEXT, Commit, read_commit, store_id, stray_shards
from pipeline.manifest import RESULT_SCHEMA, check_schema
from pipeline.shards import ABSENT, CRC_BYTES, array_json, read_index, shard_path
from pipeline.store import Header, read_table

Record = tuple[Commit, pl.DataFrame]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong, in a line; `shard` where that shard has to be made again."""

    text: str
    shard: int | None = None


def faults_of(store: Path, sample: int | None = None, seed: int = 0) -> Iterator[Fault]:
    """What is wrong with a store, nothing for one that is whole. Raises StoreError if there is none.

    The content of every shard is read, or with `sample` that of as many drawn by `seed`; ledger, sizes, labels,
    manifest and statistics are always checked in full.
    """
    header = Header.read(store)
    yield from _faults_beside(store, header)
    shards = header.layout.shards
    drawn = set(range(shards))
    if sample is not None:
        drawn = set(np.random.default_rng(seed).permutation(shards)[:sample].tolist())
    records: list[Record] = []
    for shard in range(shards):
        try:
            record = read_commit(store, shard)
        except StoreError as error:
            yield Fault(f"shard {shard}: {error}", shard)
            continue
        if record is None:
            yield Fault(f"shard {shard}: not committed", shard)
            continue
        if why := _fault(store, header, *record, content=shard in drawn):
            yield Fault(f"shard {shard}: {why}", shard)
        records.append(record)
    if len(records) == shards:
        yield from _faults_of_whole(store, header, records)


def _faults_beside(store: Path, header: Header) -> Iterator[Fault]:
    """What is wrong beside the shards: array header, labels, leftovers."""
    array = store / "mel" / "zarr.json"
    if not array.is_file() or array.read_bytes() != array_json(header.layout):
        yield Fault(f"{array}: not as written")
    try:
        height = read_table(store / "labels.parquet")[0].height
        if height != header.layout.clips:
            yield Fault(f"labels.parquet: {height} rows, expected {header.layout.clips}")
    except StoreError as error:
        yield Fault(str(error))
    leftovers = [*store.rglob(f"*{PARTIAL}"), *store.glob(f"ledger/*{NEXT}"), *stray_shards(store)]
    yield from (Fault(f"{path}: left by a build that was cut off") for path in leftovers)


def _fault(
    store: Path, header: Header, commit: Commit, results: pl.DataFrame, *, content: bool
) -> str | None:
    """What is wrong with one shard's object, its chunks or its ledger record; None if nothing is."""
    if len(results) != len(header.layout.rows(commit.shard)):
        return "its ledger record has another number of rows"
    if (commit.spec_id, commit.plan_id) != (header.spec.spec_id, header.plan_id):
        return "its ledger record is of another spec or plan"
    path = shard_path(store, commit.shard)
    if not commit.size_bytes:
        return f"{path} should not exist, no clip of it is good" if path.exists() else None
    if not path.is_file():
        return f"{path}: no such file"
    if path.stat().st_size != commit.size_bytes:
        return f"{path} has {path.stat().st_size} bytes, expected {commit.size_bytes}"
    if not content:
        return None
    whole = path.read_bytes()
    if hashlib.sha256(whole).hexdigest() != commit.sha256:
        return f"{path} does not match its digest{_damaged_rows(path, whole, header, commit)}"
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


def _faults_of_whole(store: Path, header: Header, records: list[Record]) -> Iterator[Fault]:
    """What does not follow from the ledger: manifest, identity, statistics."""
    commits = [commit for commit, _ in records]
    results = pl.concat([results for _, results in records])
    try:
        manifest, metadata = read_table(store / "manifest.parquet")
        check_schema(manifest, store / "manifest.parquet")
    except (StoreError, ManifestError) as error:
        yield Fault(str(error))
        return
    if not manifest.select(*RESULT_SCHEMA).equals(results):
        odd = manifest.height != results.height or (manifest["status"] != results["status"]).arg_max()
        yield Fault(
            f"manifest.parquet: it and the ledger differ{'' if odd is True else f', as in row {odd}'}"
        )
    if metadata.get("store_id") != store_id(header, commits):
        yield Fault("manifest.parquet: the store's id does not follow from its shards")
    try:
        stats = json.loads((store / "stats.json").read_text())
    except (OSError, ValueError):
        stats = None
    if stats != statistics(commits, results):
        yield Fault("stats.json: does not follow from the ledger")
