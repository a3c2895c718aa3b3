"""A store before and between builds: created, mended, swept of what a crash left, marked as unfinished."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.build.plan import BuildBlocks
from pipeline.errors import StoreError
from pipeline.files import (
    PARTIAL_SUFFIX,
    abandoned_scratch_paths,
    lock_shared_files,
    replacing_file,
    scratch_path,
    sync_to_disk,
)
from pipeline.labels.label_sets import index_class_ids
from pipeline.store.header import ShardLayout, StoreHeader
from pipeline.store.manifest import PLAN_SCHEMA, pending_manifest
from pipeline.store.shards import (
    PENDING_SUFFIX,
    create_mel_array,
    ledger_path,
    read_commit_file,
    resolve_pending_record,
    uncommitted_shards,
    zarr_array_json,
    zarr_group_json,
)
from pipeline.tables import frame_digest, read_table, read_table_metadata, write_table


def create_store(out: Path, header: StoreHeader, plan: pl.DataFrame) -> bool:
    """A store in which nothing is built yet, whole or not at all; False where another process was first."""
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    for debris in abandoned_scratch_paths(out):
        shutil.rmtree(debris, ignore_errors=True)
    scratch = scratch_path(out)
    try:
        create_mel_array(scratch, header.layout, {"ajepa": header.to_json()})
        restore_tables(scratch, header, plan)
        try:
            scratch.rename(out)
        except OSError:
            if not out.is_dir():
                raise
            return False
        sync_to_disk(out.absolute().parent)
        return True
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def restore_header(out: Path, header: StoreHeader) -> None:
    """Write a zarr.json that is not as written anew where the ledger says that the store is the one now asked for.

    Raises StoreError where it is not, or where `out` is there and is no store.
    """
    told = zarr_group_json({"ajepa": header.to_json()})
    try:
        if StoreHeader.read(out) != header or (out / "zarr.json").read_bytes() == told:
            return
    except StoreError as error:
        damage = error
    else:
        damage = StoreError(f"{out}/zarr.json: not as written")
    records = sorted(out.glob("ledger/[0-9]*.parquet"))
    if not records:
        raise StoreError(f"{out}: is there already and is no store; choose another --out, or remove it")
    commit, _ = read_commit_file(records[0])
    if (commit.spec_id, commit.plan_id) != (header.spec.spec_id, header.plan_id):
        raise damage
    with replacing_file(out / "zarr.json") as scratch:
        scratch.write_bytes(told)


def restore_tables(out: Path, header: StoreHeader, plan: pl.DataFrame) -> None:
    """Write what follows from the plan alone where it is not there, or not as it should be."""
    (out / "ledger").mkdir(exist_ok=True)
    array, told = out / "mel" / "zarr.json", zarr_array_json(header.layout)
    if not array.is_file() or array.read_bytes() != told:
        array.parent.mkdir(exist_ok=True)
        with replacing_file(array) as scratch:
            scratch.write_bytes(told)
    manifest = _read_valid_table(out / "manifest.parquet", tuple(PLAN_SCHEMA))
    if manifest is None or not manifest.equals(plan.select(*PLAN_SCHEMA)):
        write_table(out / "manifest.parquet", pending_manifest(plan), {})
    labels = _read_valid_table(out / "labels.parquet", ("raw", "outside"))
    if (
        labels is None or frame_digest(labels) != header.labels_digest
    ):  # written anew: loses the propagated sets and no more
        write_table(
            out / "labels.parquet",
            pl.DataFrame(index_class_ids(plan["mids"], header.classes)),
            {"raw": "as listed"},
        )


def _read_valid_table(path: Path, columns: Sequence[str]) -> pl.DataFrame | None:
    """Some columns of a table; None where it is not there, or not as it should be."""
    try:
        table = read_table(path, columns)[0] if path.exists() else pl.DataFrame()
    except StoreError:
        return None
    return table if table.columns == list(columns) else None


def read_build_record(store: Path) -> dict[str, Any]:
    """What build.json tells; StoreError where it does not say what the store was built from."""
    try:
        told = json.loads((store / "build.json").read_text())
        return {**told, "asked": told["asked"], "policy": told["policy"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(
            f"{store}/build.json: does not say what the store was built from; run its build command again"
        ) from None


def refuse_other_plan(out: Path | str, stored_header: StoreHeader, header: StoreHeader) -> None:
    """Refuse to continue a store that is not the one now asked for."""
    if stored_header.spec.spec_id != header.spec.spec_id:
        raise StoreError(
            f"{out} holds mel spec {stored_header.spec.name}, not {header.spec.name}; choose another --out"
        )
    if stored_header.layout.dtype != header.layout.dtype:
        raise StoreError(
            f"{out} holds {stored_header.layout.dtype}, not {header.layout.dtype}; choose another --out"
        )
    if stored_header != header:
        raise StoreError(
            f"{out} was planned from other clips, lists or classes; give the same, or another --out"
        )


def remove_crash_debris(out: Path, layout: ShardLayout, blocks: BuildBlocks) -> None:
    """Settle what a crash left: records that wait for their shard, unfinished files, shards without a record."""
    for path in out.glob(f"ledger/*{PENDING_SUFFIX}"):
        if blocks.owns_shard(int(path.name[:6]), layout):
            resolve_pending_record(out, path)
    for path in [
        *out.glob(f"*{PARTIAL_SUFFIX}"),
        *out.glob(f"mel/*{PARTIAL_SUFFIX}"),
    ]:  # written at the gate, which is ours
        path.unlink()
    for path in out.glob(f"ledger/*{PARTIAL_SUFFIX}"):
        if blocks.owns_shard(int(path.name[:6]), layout):
            path.unlink()
    for path in list(out.glob(f"mel/c/**/*{PARTIAL_SUFFIX}")):
        if blocks.owns_shard(int(path.relative_to(out / "mel" / "c").parts[0]), layout):
            path.unlink()
    for path in uncommitted_shards(out):
        if not path.parts[-3].isdecimal() or blocks.owns_shard(int(path.parts[-3]), layout):
            path.unlink()


def mark_unfinished(
    out: Path, header: StoreHeader, plan: pl.DataFrame, open_row_counts: dict[int, int], blocks: BuildBlocks
) -> bool:
    """Make the manifest say that the build has not finished, where a shard has no record; whether there is one."""
    shards = (shard for block in open_row_counts for shard in blocks.block_shards(block, header.layout))
    if all(ledger_path(out, shard).exists() for shard in shards):
        return False
    with lock_shared_files(out):
        if "store_id" in read_table_metadata(out / "manifest.parquet"):
            write_table(out / "manifest.parquet", pending_manifest(plan), {})
    return True
