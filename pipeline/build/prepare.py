"""A store before and between builds: created, mended, swept of what a crash left, marked as unfinished."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.build.plan import Blocks
from pipeline.errors import StoreError
from pipeline.files import PARTIAL, abandoned, fsync, gate, replacing, scratch_of
from pipeline.labels.label_sets import split_mids
from pipeline.store.header import Header, Layout
from pipeline.store.manifest import PLAN_SCHEMA, pending
from pipeline.store.shards import (
    NEXT,
    array_json,
    commit_at,
    create_array,
    group_json,
    ledger_path,
    settle,
    stray_shards,
)
from pipeline.store.tables import digest_of, read_metadata, read_table, write_table


def create_store(out: Path, header: Header, plan: pl.DataFrame) -> bool:
    """A store in which nothing is built yet, whole or not at all; False where another process was first."""
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    for debris in abandoned(out):
        shutil.rmtree(debris, ignore_errors=True)
    scratch = scratch_of(out)
    try:
        create_array(scratch, header.layout, {"ajepa": header.to_json()})
        mend(scratch, header, plan)
        try:
            scratch.rename(out)
        except OSError:
            if not out.is_dir():
                raise
            return False
        fsync(out.absolute().parent)
        return True
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def restore_header(out: Path, header: Header) -> None:
    """Write a zarr.json that is not as written anew where the ledger says that the store is the one now asked for.

    Raises StoreError where it is not, or where `out` is there and is no store.
    """
    told = group_json({"ajepa": header.to_json()})
    try:
        if Header.read(out) != header or (out / "zarr.json").read_bytes() == told:
            return
    except StoreError as error:
        damage = error
    else:
        damage = StoreError(f"{out}/zarr.json: not as written")
    records = sorted(out.glob("ledger/[0-9]*.parquet"))
    if not records:
        raise StoreError(f"{out}: is there already and is no store; choose another --out, or remove it")
    commit, _ = commit_at(records[0])
    if (commit.spec_id, commit.plan_id) != (header.spec.spec_id, header.plan_id):
        raise damage
    with replacing(out / "zarr.json") as scratch:
        scratch.write_bytes(told)


def mend(out: Path, header: Header, plan: pl.DataFrame) -> None:
    """Write what follows from the plan alone where it is not there, or not as it should be."""
    (out / "ledger").mkdir(exist_ok=True)
    array, told = out / "mel" / "zarr.json", array_json(header.layout)
    if not array.is_file() or array.read_bytes() != told:
        array.parent.mkdir(exist_ok=True)
        with replacing(array) as scratch:
            scratch.write_bytes(told)
    manifest = _table_of(out / "manifest.parquet", tuple(PLAN_SCHEMA))
    if manifest is None or not manifest.equals(plan.select(*PLAN_SCHEMA)):
        write_table(out / "manifest.parquet", pending(plan), {})
    labels = _table_of(out / "labels.parquet", ("raw", "outside"))
    if (
        labels is None or digest_of(labels) != header.labels_digest
    ):  # written anew: loses the propagated sets and no more
        write_table(
            out / "labels.parquet",
            pl.DataFrame(split_mids(plan["mids"], header.classes)),
            {"raw": "as listed"},
        )


def _table_of(path: Path, columns: Sequence[str]) -> pl.DataFrame | None:
    """Some columns of a table; None where it is not there, or not as it should be."""
    try:
        table = read_table(path, columns)[0] if path.exists() else pl.DataFrame()
    except StoreError:
        return None
    return table if table.columns == list(columns) else None


def told_of_build(store: Path) -> dict[str, Any]:
    """What build.json tells; StoreError where it does not say what the store was built from."""
    try:
        told = json.loads((store / "build.json").read_text())
        return {**told, "asked": told["asked"], "policy": told["policy"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(
            f"{store}/build.json: does not say what the store was built from; run its build command again"
        ) from None


def check_same(out: Path | str, there: Header, header: Header) -> None:
    """Refuse to continue a store that is not the one now asked for."""
    if there.spec.spec_id != header.spec.spec_id:
        raise StoreError(
            f"{out} holds mel spec {there.spec.name}, not {header.spec.name}; choose another --out"
        )
    if there.layout.dtype != header.layout.dtype:
        raise StoreError(f"{out} holds {there.layout.dtype}, not {header.layout.dtype}; choose another --out")
    if there != header:
        raise StoreError(
            f"{out} was planned from other clips, lists or classes; give the same, or another --out"
        )


def sweep(out: Path, layout: Layout, blocks: Blocks) -> None:
    """Settle what a crash left: records that wait for their shard, unfinished files, shards without a record."""
    for path in out.glob(f"ledger/*{NEXT}"):
        if blocks.holds(int(path.name[:6]), layout):
            settle(out, path)
    for path in [
        *out.glob(f"*{PARTIAL}"),
        *out.glob(f"mel/*{PARTIAL}"),
    ]:  # written at the gate, which is ours
        path.unlink()
    for path in out.glob(f"ledger/*{PARTIAL}"):
        if blocks.holds(int(path.name[:6]), layout):
            path.unlink()
    for path in list(out.glob(f"mel/c/**/*{PARTIAL}")):
        if blocks.holds(int(path.relative_to(out / "mel" / "c").parts[0]), layout):
            path.unlink()
    for path in stray_shards(out):
        if not path.parts[-3].isdecimal() or blocks.holds(int(path.parts[-3]), layout):
            path.unlink()


def mark_open(out: Path, header: Header, plan: pl.DataFrame, work: dict[int, int], blocks: Blocks) -> bool:
    """Make the manifest say that the build has not finished, where a shard has no record; whether there is one."""
    shards = (shard for block in work for shard in blocks.shards(block, header.layout))
    if all(ledger_path(out, shard).exists() for shard in shards):
        return False
    with gate(out):
        if "store_id" in read_metadata(out / "manifest.parquet"):
            write_table(out / "manifest.parquet", pending(plan), {})
    return True
