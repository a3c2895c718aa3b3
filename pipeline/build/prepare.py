"""Prepare a store for a build: create it, restore damaged files, remove the debris of a crash, mark it unfinished."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.build.plan import BuildBlocks
from pipeline.build.plan_files import plan_with_labels, read_sources_record, write_sources_file
from pipeline.datasets.corpus import Corpus
from pipeline.errors import StoreError
from pipeline.files import (
    PARTIAL_SUFFIX,
    abandoned_scratch_paths,
    lock_shared_files,
    make_folders,
    replacing_file,
    scratch_path,
    sync_to_disk,
)
from pipeline.labels.label_sets import index_class_ids
from pipeline.store.header import ShardLayout, StoreHeader
from pipeline.store.manifest import PLAN_SCHEMA, pending_manifest
from pipeline.store.plan_file import has_valid_plan_file, write_plan_file
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
from pipeline.tables import ROWS_CONVERTED, read_table_schema, table_digest, write_table, writing_table_parts

# Settings of a dataset whose option of the build command has another name.
SETTING_OPTIONS = {"root": "folder"}


def create_store(out: Path, header: StoreHeader, corpus: Corpus) -> bool:
    """Create a store without shards, completely or not at all; returns False if another process created it first."""
    # Remove the scratch folders of processes that died.
    make_folders(out.absolute().parent)
    for debris in abandoned_scratch_paths(out):
        shutil.rmtree(debris, ignore_errors=True)

    # The store is created in a scratch folder beside `out`, which is renamed when it is complete.
    scratch = scratch_path(out)
    try:
        create_mel_array(scratch, header.layout, {"ajepa": header.to_json()})
        restore_tables(scratch, header, corpus)
        for path in (scratch / "zarr.json", scratch / "mel" / "zarr.json", scratch / "mel", scratch):
            sync_to_disk(path)
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
    """Write a damaged zarr.json again if the ledger belongs to the store that `header` describes.

    A readable header of another store is not changed. Raises StoreError if the ledger belongs to another store, or if
    `out` exists and is no store.
    """
    # An intact header stays; `refuse_other_plan` refuses the intact header of another store.
    expected_json = zarr_group_json({"ajepa": header.to_json()})
    try:
        if StoreHeader.read(out) != header or (out / "zarr.json").read_bytes() == expected_json:
            return
    except StoreError as error:
        damage = error
    else:
        damage = StoreError(f"{out}/zarr.json: not as written")

    # Check the ledger: every record has the spec id and the plan id of its store.
    records = sorted(out.glob("ledger/[0-9]*.parquet"))
    if not records:
        raise StoreError(f"{out}: is there already and is no store; choose another --out, or remove it")
    commit, _ = read_commit_file(records[0])
    if (commit.spec_id, commit.plan_id) != (header.spec.spec_id, header.plan_id):
        raise damage
    with replacing_file(out / "zarr.json") as scratch:
        scratch.write_bytes(expected_json)


def restore_tables(out: Path, header: StoreHeader, corpus: Corpus) -> None:
    """Write the files that follow from the corpus alone again if they are missing or damaged."""
    plan = corpus.plan
    make_folders(out / "ledger")

    # The array's metadata.
    array_file = out / "mel" / "zarr.json"
    expected_json = zarr_array_json(header.layout)
    if not array_file.is_file() or array_file.read_bytes() != expected_json:
        make_folders(array_file.parent)
        with replacing_file(array_file) as scratch:
            scratch.write_bytes(expected_json)

    # The manifest; in a new one, every row is pending.
    if _digest_of_columns(out / "manifest.parquet", tuple(PLAN_SCHEMA)) != header.plan_digest:
        write_pending_manifest(out, plan)

    # The raw labels; a table that is written again no longer has the propagated label sets.
    if _digest_of_columns(out / "labels.parquet", ("raw", "outside")) != header.labels_digest:
        mids = plan_with_labels(corpus)["mids"]
        write_table(
            out / "labels.parquet",
            pl.DataFrame(index_class_ids(mids, header.classes)),
            {"raw": "as listed"},
        )

    # The plan, and the places of the sounds, which may have been found elsewhere this time.
    stored = corpus.stored_plan
    is_stored_here = stored is not None and stored.store == out
    if not is_stored_here and not has_valid_plan_file(out, header):
        write_plan_file(out, plan_with_labels(corpus))
    if stored is None or not is_stored_here or not stored.is_current:
        write_sources_file(out, corpus, header.plan_digest)


def _digest_of_columns(path: Path, columns: Sequence[str]) -> str | None:
    """Return the digest of these columns of a table; None if the table is missing or damaged, or lacks one of them."""
    try:
        has_columns = path.exists() and set(columns) <= set(read_table_schema(path)[0])
        return table_digest(path, columns) if has_columns else None
    except StoreError:
        return None


def read_build_record(store: Path) -> dict[str, Any]:
    """Return the content of build.json; raises StoreError if it lacks the dataset's settings or the audio policy."""
    try:
        record = json.loads((store / "build.json").read_text())
        return {**record, "asked": record["asked"], "policy": record["policy"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(
            f"{store}/build.json: does not say what the store was built from; run its build command again"
        ) from None


def refuse_other_plan(
    out: Path | str,
    stored_header: StoreHeader,
    header: StoreHeader,
    find_changes: Callable[[], Sequence[str]],
) -> None:
    """Raise StoreError if the stored header differs from the header of the store to build.

    `find_changes` is called where the plans differ, and returns what may be the reason, as `describe_changes` does.
    """
    if stored_header.spec.spec_id != header.spec.spec_id:
        stored, asked = stored_header.spec.name, header.spec.name
        if stored == asked:
            # The same front end on clips of another length.
            stored, asked = (
                f"{spec.name} of {spec.clip_seconds:g} s" for spec in (stored_header.spec, header.spec)
            )
        raise StoreError(f"{out} holds mel spec {stored}, not {asked}; choose another --out")
    if stored_header.layout.dtype != header.layout.dtype:
        raise StoreError(
            f"{out} holds {stored_header.layout.dtype}, not {header.layout.dtype}; choose another --out"
        )
    if stored_header != header:
        changes = find_changes()
        reasons = f" ({', '.join(changes)})" if changes else ""
        raise StoreError(
            f"{out} was planned from other clips, lists or classes{reasons}; "
            "give the same, or choose another --out"
        )


def describe_changes(out: Path, settings: dict[str, Any]) -> list[str]:
    """Return what differs between the options that a store was planned with and those of `settings`, with both values.

    `settings` are a `Corpus.dataset_settings`. The list has also a table or list of clips that has changed since.
    """
    record = read_sources_record(out)
    try:
        planned_settings = read_build_record(out)["asked"] if record is None else record.asked
    except StoreError:
        return []
    names = dict.fromkeys([*planned_settings, *settings])
    changes = [
        f"{SETTING_OPTIONS.get(name, name.replace('_', '-'))} {_setting_text(planned_settings.get(name))} "
        f"-> {_setting_text(settings.get(name))}"
        for name in names
        if planned_settings.get(name) != settings.get(name)
    ]
    if record is not None and (changed := record.changed_list()) is not None:
        changes.append(f"{changed} has changed since")
    return changes


def _setting_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return " and ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def remove_crash_debris(out: Path, layout: ShardLayout, blocks: BuildBlocks) -> None:
    """Resolve pending records, and delete unfinished files and shards without a record, in the blocks of this part."""
    # Pending records, whose shard may be in place or not.
    for path in out.glob(f"ledger/*{PENDING_SUFFIX}"):
        if blocks.owns_shard(int(path.name[:6]), layout):
            resolve_pending_record(out, path)

    # Unfinished tables: the caller has the lock of the shared files, so no other process is writing one.
    for path in [*out.glob(f"*{PARTIAL_SUFFIX}"), *out.glob(f"mel/*{PARTIAL_SUFFIX}")]:
        path.unlink()

    # Unfinished records and shards; their paths contain the shard number.
    for path in out.glob(f"ledger/*{PARTIAL_SUFFIX}"):
        if blocks.owns_shard(int(path.name[:6]), layout):
            path.unlink()
    for path in list(out.glob(f"mel/c/**/*{PARTIAL_SUFFIX}")):
        if blocks.owns_shard(int(path.relative_to(out / "mel" / "c").parts[0]), layout):
            path.unlink()

    # Complete shards without a record.
    for path in uncommitted_shards(out):
        if not path.parts[-3].isdecimal() or blocks.owns_shard(int(path.parts[-3]), layout):
            path.unlink()


def mark_unfinished(
    out: Path, header: StoreHeader, plan: pl.DataFrame, open_row_counts: dict[int, int], blocks: BuildBlocks
) -> bool:
    """Mark the store as unfinished in its manifest and return True, if a shard to build has no record."""
    shards = (shard for block in open_row_counts for shard in blocks.block_shards(block, header.layout))
    if all(ledger_path(out, shard).exists() for shard in shards):
        return False
    with lock_shared_files(out):
        if "store_id" in read_table_schema(out / "manifest.parquet")[1]:
            write_pending_manifest(out, plan)
    return True


def write_pending_manifest(out: Path, plan: pl.DataFrame) -> None:
    """Write the manifest of a store in which nothing is built yet; a part of it is in memory at a time."""
    parts = (
        map(pending_manifest, plan.iter_slices(ROWS_CONVERTED)) if plan.height else [pending_manifest(plan)]
    )
    with writing_table_parts(out / "manifest.parquet", parts, {}):
        pass  # there is nothing to do between writing the file and moving it into place
