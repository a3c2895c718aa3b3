"""Faults of a store: ledger against objects against checksums against manifest against statistics."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import polars as pl

from pipeline.build.finish import statistics
from pipeline.errors import ManifestError, StoreError
from pipeline.files import PARTIAL
from pipeline.labels.label_sets import OntologyGone, ontology_of
from pipeline.labels.propagation import Provenance, propagate, relation_CC
from pipeline.store.exclusions import Exclusions
from pipeline.store.header import Header
from pipeline.store.manifest import PLAN_SCHEMA, RESULT_SCHEMA, check_schema
from pipeline.store.shards import (
    ABSENT,
    CRC_BYTES,
    NEXT,
    Commit,
    array_json,
    group_json,
    read_commit,
    read_index,
    shard_path,
    store_id,
    stray_shards,
)
from pipeline.store.tables import digest_of, read_table

Record = tuple[Commit, pl.DataFrame]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong, in a line; `shard` or `label_set` where these have to be made again."""

    text: str
    shard: int | None = None
    label_set: str | None = None


def faults_of(store: Path, sample: int | None = None, seed: int = 0) -> Iterator[Fault]:
    """What is wrong with a store, nothing for one that is whole. Raises StoreError if there is none.

    The content of every shard is read, or with `sample` that of as many drawn by `seed`; ledger, sizes, labels,
    manifest and statistics are always checked in full.
    """
    header = Header.read(store)
    yield from _faults_beside(store, header)
    yield from _faults_of_labels(store, header)
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
    """What is wrong beside the shards: headers, what was asked, leftovers."""
    for path, told in (
        (store / "zarr.json", group_json({"ajepa": header.to_json()})),
        (store / "mel" / "zarr.json", array_json(header.layout)),
    ):
        if not path.is_file() or path.read_bytes() != told:
            yield Fault(f"{path}: not as written")
    try:
        json.loads((store / "build.json").read_text())["asked"]
    except (OSError, ValueError, KeyError):
        yield Fault("build.json: does not say what the store was built from; its build command writes it")
    try:
        Exclusions.recorded(store)
    except StoreError as error:
        yield Fault(str(error))
    leftovers = [*store.rglob(f"*{PARTIAL}"), *store.glob(f"ledger/*{NEXT}"), *stray_shards(store)]
    yield from (Fault(f"{path}: left by a build that was cut off") for path in leftovers)


def _faults_of_labels(store: Path, header: Header) -> Iterator[Fault]:
    """Raw labels against the digest of the plan's, propagated ones against what their rule gives."""
    try:
        labels, sources = read_table(store / "labels.parquet")
    except StoreError as error:
        yield Fault(str(error))
        return
    if not {"raw", "outside"} <= set(labels.columns):
        yield Fault(f"labels.parquet: has {', '.join(labels.columns)}; expected raw and outside")
        return
    if digest_of(labels.select("raw", "outside")) != header.labels_digest:
        yield Fault("labels.parquet: raw labels are not those that the store was built with")
        return
    for name in (name for name in labels.columns if name not in ("raw", "outside")):
        if (fault := _fault_of_set(store, header, labels, name, sources.get(name))) is not None:
            yield fault


def _fault_of_set(
    store: Path, header: Header, labels: pl.DataFrame, name: str, by: dict[str, Any] | None
) -> Fault | None:
    """A propagated set against what its rule gives; one whose ontology is gone cannot be made again by a repair."""
    if not by or set(by) != {field.name for field in fields(Provenance)}:
        return Fault(f"labels.parquet: label set {name} does not say where it comes from", label_set=name)
    try:
        ontology = ontology_of(store, name, by["ontology"])
        splits = read_table(store / "manifest.parquet", ["split"])[0]["split"]
    except OntologyGone as error:
        return Fault(f"labels.parquet: {error}")
    except (StoreError, pl.exceptions.ColumnNotFoundError):
        return None  # told of where the manifest is looked at
    adds_CC = relation_CC(name, ontology=ontology, classes=header.classes)
    expected = propagate(labels["raw"], adds_CC).zip_with(splits.is_in(by["splits"]), labels["raw"])
    if expected.equals(labels[name]):
        return None
    return Fault(
        f"labels.parquet: label set {name} is not what its rule makes of the raw labels", label_set=name
    )


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
    try:
        there = _index(path, header)[: len(results), 0] != ABSENT
    except ValueError as error:
        return f"{path}: {error}"
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
    if digest_of(manifest.select(*PLAN_SCHEMA)) != header.plan_digest:
        yield Fault("manifest.parquet: ids, splits or times are not those that the store was built with")
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
