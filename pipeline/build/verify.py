"""Find every fault of a store by comparing its header, ledger, shards, checksums, labels, manifest and statistics."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import polars as pl

from pipeline.build.finish import LedgerSummary
from pipeline.errors import ManifestError, StoreError
from pipeline.files import PARTIAL_SUFFIX
from pipeline.labels.label_sets import MissingOntologyError, label_set_ontology
from pipeline.labels.propagation import LabelProvenance, propagate, rule_relation_CC
from pipeline.progress import track_progress
from pipeline.store.exclusions import Exclusions
from pipeline.store.header import StoreHeader
from pipeline.store.manifest import PLAN_SCHEMA, RESULT_SCHEMA, check_manifest_schema
from pipeline.store.plan_file import PLAN_FILE, has_valid_plan_file
from pipeline.store.shards import (
    ABSENT_OFFSET,
    CRC_BYTES,
    PENDING_SUFFIX,
    ShardCommit,
    compute_store_id,
    read_commits,
    read_shard_index,
    shard_path,
    uncommitted_shards,
    zarr_array_json,
    zarr_group_json,
)
from pipeline.tables import TableRows, frame_digest, read_table, read_table_schema, table_digest


@dataclass(frozen=True, slots=True)
class StoreFault:
    """One fault as a line of text; `shard` or `label_set` names the part that a repair has to build again."""

    text: str
    shard: int | None = None
    label_set: str | None = None


def find_faults(
    store: Path, sample: int | None = None, seed: int = 0, *, progress: bool = False
) -> Iterator[StoreFault]:
    """Yield the faults of a store; an intact store has none. Raises StoreError if there is no store.

    The content of every shard is read, or, with `sample`, the content of `sample` shards that are drawn by `seed`.
    Ledger, sizes, labels, manifest and statistics are always checked in full.
    """
    header = StoreHeader.read(store)
    yield from _find_metadata_faults(store, header)
    if (store / PLAN_FILE).exists() and not has_valid_plan_file(store, header):
        yield StoreFault(
            "plan.parquet: not the plan that the store was built with; delete it, and the build command writes it anew"
        )
    yield from _find_label_faults(store, header)

    # Compare the shards with their records.
    shards = header.layout.shard_count
    drawn = set(range(shards))
    if sample is not None:
        drawn = set(np.random.default_rng(seed).permutation(shards)[:sample].tolist())
    comparison = _ManifestComparison(store, header)
    records = read_commits(store, range(shards))
    for shard, record in track_progress(records, shards, label="verify", unit="shard", shown=progress):
        if isinstance(record, StoreError):
            yield StoreFault(f"shard {shard}: {record}", shard)
            continue
        if record is None:
            yield StoreFault(f"shard {shard}: not committed", shard)
            continue
        if fault := _describe_shard_fault(store, header, *record, content=shard in drawn):
            yield StoreFault(f"shard {shard}: {fault}", shard)
        comparison.add_record(*record)

    # The manifest follows from the records, so it can be checked only if all records are readable.
    if len(comparison.commits) == shards:
        yield from comparison.find_faults()


def _find_metadata_faults(store: Path, header: StoreHeader) -> Iterator[StoreFault]:
    """Yield the faults of the headers, build.json and the exclude lists, and the files left by a crash."""
    # Headers.
    for path, expected_json in (
        (store / "zarr.json", zarr_group_json({"ajepa": header.to_json()})),
        (store / "mel" / "zarr.json", zarr_array_json(header.layout)),
    ):
        if not path.is_file() or path.read_bytes() != expected_json:
            yield StoreFault(f"{path}: not as written")

    # The build record (build.json) and the user's exclude lists.
    try:
        json.loads((store / "build.json").read_text())["asked"]
    except (OSError, ValueError, KeyError):
        yield StoreFault(
            "build.json: does not say what the store was built from; its build command writes it"
        )
    try:
        Exclusions.read_from_store(store)
    except StoreError as error:
        yield StoreFault(str(error))

    # Files left by a crash.
    leftovers = [
        *store.rglob(f"*{PARTIAL_SUFFIX}"),
        *store.glob(f"ledger/*{PENDING_SUFFIX}"),
        *uncommitted_shards(store),
    ]
    for path in leftovers:
        yield StoreFault(f"{path}: left by a build that was cut off")


def _find_label_faults(store: Path, header: StoreHeader) -> Iterator[StoreFault]:
    """Yield the faults of labels.parquet: raw labels that differ from the plan, label sets that break their rule."""
    # Raw labels; without them, no label set can be checked.
    try:
        labels, sources = read_table(store / "labels.parquet")
    except StoreError as error:
        yield StoreFault(str(error))
        return
    if not {"raw", "outside"} <= set(labels.columns):
        yield StoreFault(f"labels.parquet: has {', '.join(labels.columns)}; expected raw and outside")
        return
    if frame_digest(labels.select("raw", "outside")) != header.labels_digest:
        yield StoreFault("labels.parquet: raw labels are not those that the store was built with")
        return

    # Propagated label sets.
    for name in labels.columns:
        if name not in ("raw", "outside"):
            fault = _find_label_set_fault(store, header, labels, name, sources.get(name))
            if fault is not None:
                yield fault


def _find_label_set_fault(
    store: Path, header: StoreHeader, labels: pl.DataFrame, name: str, provenance: dict[str, Any] | None
) -> StoreFault | None:
    """Return the fault of a propagated label set, None if it has none; a repair needs the set's ontology."""
    # The provenance of the set: rule and ontology.
    if not provenance or set(provenance) != {field.name for field in fields(LabelProvenance)}:
        return StoreFault(
            f"labels.parquet: label set {name} does not say where it comes from", label_set=name
        )
    try:
        ontology = label_set_ontology(store, name, provenance["ontology"])
        splits = read_table(store / "manifest.parquet", ["split"])[0]["split"]
    except MissingOntologyError as error:
        return StoreFault(f"labels.parquet: {error}")
    except (StoreError, pl.exceptions.ColumnNotFoundError):
        return None  # the manifest is at fault; `_find_manifest_faults` reports it

    # Propagate the set again and compare.
    adds_CC = rule_relation_CC(name, ontology=ontology, classes=header.classes)
    expected = propagate(labels["raw"], adds_CC).zip_with(splits.is_in(provenance["splits"]), labels["raw"])
    if expected.equals(labels[name]):
        return None
    return StoreFault(
        f"labels.parquet: label set {name} is not what its rule makes of the raw labels", label_set=name
    )


def _describe_shard_fault(
    store: Path, header: StoreHeader, commit: ShardCommit, results: pl.DataFrame, *, content: bool
) -> str | None:
    """Return the fault of a shard's record or file, None if it has none; the file is read only with `content`."""
    # The record.
    if len(results) != len(header.layout.rows_of_shard(commit.shard)):
        return "its ledger record has another number of rows"
    if (commit.spec_id, commit.plan_id) != (header.spec.spec_id, header.plan_id):
        return "its ledger record is of another spec or plan"

    # The file's size.
    path = shard_path(store, commit.shard)
    if not commit.size_bytes:
        return f"{path} should not exist, no clip of it is good" if path.exists() else None
    if not path.is_file():
        return f"{path}: no such file"
    if path.stat().st_size != commit.size_bytes:
        return f"{path} has {path.stat().st_size} bytes, expected {commit.size_bytes}"
    if not content:
        return None

    # The file's bytes, and the clips in its index.
    shard_bytes = path.read_bytes()
    if hashlib.sha256(shard_bytes).hexdigest() != commit.sha256:
        return f"{path} does not match its digest{_describe_damaged_rows(path, shard_bytes, header, commit)}"
    try:
        is_present_N = _read_shard_index(path, header)[: len(results), 0] != ABSENT_OFFSET
    except ValueError as error:
        return f"{path}: {error}"
    if (is_present_N != (results["status"] == "good").to_numpy()).any():
        return f"{path} holds other clips than the ledger says"
    return None


def _read_shard_index(path: Path, header: StoreHeader) -> np.ndarray:
    """Return offset and size of each chunk of a shard; raises ValueError if the index fails its checksum."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_shard_index(descriptor, header.layout.shard_clips)
    finally:
        os.close(descriptor)


def _describe_damaged_rows(path: Path, shard_bytes: bytes, header: StoreHeader, commit: ShardCommit) -> str:
    """Return the rows whose chunk fails its own checksum, as the end of a sentence."""
    try:
        index_N2 = _read_shard_index(path, header)
    except ValueError as error:
        return f" ({error})"
    rows = header.layout.rows_of_shard(commit.shard)
    damaged = []
    for row, (offset, size) in zip(rows, index_N2[: len(rows)].tolist(), strict=True):
        if offset == ABSENT_OFFSET:
            continue
        chunk = shard_bytes[offset : offset + size]
        checksum = int.from_bytes(chunk[-CRC_BYTES:], "little")
        if google_crc32c.value(chunk[:-CRC_BYTES]) != checksum:
            damaged.append(row)
    return f" (rows {damaged[:5]} are damaged)" if damaged else ""


class _ManifestComparison:
    """Compares manifest, store identity and statistics with the records of all shards, which are given in order.

    The manifest is read along with the records, so that neither is ever in memory as a whole.
    """

    def __init__(self, store: Path, header: StoreHeader) -> None:
        self.commits: list[ShardCommit] = []
        self._path = store / "manifest.parquet"
        self._stats_path = store / "stats.json"
        self._header = header
        self._summary = LedgerSummary()
        self._different_row: int | None = None

        # Without a manifest only its own fault is reported.
        self._fault: StoreFault | None = None
        self._metadata: dict[str, Any] = {}
        self._rows = TableRows(self._path, tuple(RESULT_SCHEMA))
        try:
            schema, self._metadata = read_table_schema(self._path)
            check_manifest_schema(schema, self._path)
        except (StoreError, ManifestError) as error:
            self._fault = StoreFault(str(error))

    def add_record(self, commit: ShardCommit, results: pl.DataFrame) -> None:
        """Compare the rows of the next shard; the record itself is not kept."""
        self.commits.append(replace(commit, moments={}))
        self._summary.add_record(commit, results)
        if self._fault is not None or self._different_row is not None:
            return
        try:
            stored = self._rows.next_rows(results.height)
        except StoreError as error:
            self._fault = StoreFault(str(error))
            return
        if not stored.equals(results):
            first_row = self._header.layout.rows_of_shard(commit.shard).start
            self._different_row = first_row + _first_different_row(stored, results)

    def find_faults(self) -> Iterator[StoreFault]:
        """Yield the differences; every shard's record must have been added."""
        try:
            plan_digest = None if self._fault is not None else table_digest(self._path, tuple(PLAN_SCHEMA))
        except StoreError as error:
            self._fault = StoreFault(str(error))
        if self._fault is not None:
            yield self._fault
            return

        # The manifest and its id.
        if plan_digest != self._header.plan_digest:
            yield StoreFault(
                "manifest.parquet: ids, splits or times are not those that the store was built with"
            )
        if self._different_row is not None:
            yield StoreFault(f"manifest.parquet: it and the ledger differ, as in row {self._different_row}")
        elif self._rows.next_rows(1).height:
            yield StoreFault("manifest.parquet: it and the ledger differ, it has more rows")
        if self._metadata.get("store_id") != compute_store_id(self._header, self.commits):
            yield StoreFault("manifest.parquet: the store's id does not follow from its shards")

        # Statistics.
        try:
            stats = json.loads(self._stats_path.read_text())
        except (OSError, ValueError):
            stats = None
        if stats != self._summary.statistics():
            yield StoreFault("stats.json: does not follow from the ledger")


def _first_different_row(stored: pl.DataFrame, results: pl.DataFrame) -> int:
    """Return the first row in which two frames of the same columns differ; they may have different heights."""
    rows = min(stored.height, results.height)
    return next((row for row in range(rows) if stored.row(row) != results.row(row)), rows)
