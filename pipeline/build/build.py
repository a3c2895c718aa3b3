"""A corpus -> plan -> stores; run again it carries on; statistics at the end."""

import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.build.finish import finish_store
from pipeline.build.plan import (
    BuildBlocks,
    BuildOptions,
    RowProgress,
    StoreOutput,
    block_tasks,
    count_open_rows,
    current_versions,
    plan_store,
)
from pipeline.build.prepare import (
    create_store,
    mark_unfinished,
    refuse_other_plan,
    remove_crash_debris,
    restore_header,
    restore_tables,
)
from pipeline.build.remote_store import RemoteStore
from pipeline.build.shard_builder import BlockTask, ShardBuilder
from pipeline.build.workers import run_in_processes, run_on_ray_cluster
from pipeline.datasets.corpus import Corpus
from pipeline.errors import InputError, StoreError
from pipeline.files import WHOLE_BUILD, lock_shared_files, lock_store
from pipeline.store.header import StoreHeader


def build_stores(
    corpus: Corpus,
    outputs: Sequence[StoreOutput],
    options: BuildOptions = BuildOptions(),
    *,
    progress: RowProgress | None = None,
    only_shards: Collection[int] | None = None,
    write_record: bool = True,
) -> list[pl.DataFrame | None]:
    """Build or continue stores in one decoding pass; returns their manifests, None while parts are missing.

    What is good already is kept; what is missing or failed is tried again where there is a sound for it. With
    `shards` only the blocks that hold these are looked at; without `tell` build.json stays as it is. Raises
    InputError with nothing half-made.
    """
    began = time.monotonic()
    headers = [plan_store(corpus, output) for output in outputs]
    stores = [(output.path, header) for output, header in zip(outputs, headers, strict=True)]
    mirrors = {
        output.path: RemoteStore(url=output.remote, staging=output.path)
        for output in outputs
        if output.remote
    }
    _check_outputs(corpus, stores, mirrors)
    created = []
    for out, header in stores:
        if out in mirrors and (there := mirrors[out].read_header()) is not None:
            refuse_other_plan(mirrors[out].url, there, header)
        if not out.exists() and create_store(out, header, corpus.plan) and out not in mirrors:
            created.append(out)
    with ExitStack() as stack:
        for out, header in stores:
            restore_header(out, header)
            refuse_other_plan(out, StoreHeader.read(out), header)
            stack.enter_context(lock_store(out, WHOLE_BUILD if out in mirrors else options.part))
        blocks = BuildBlocks.of_part(headers, options.part)
        for out, header in stores:
            if out not in created:
                with lock_shared_files(out):
                    remove_crash_debris(out, header.layout, blocks)
                    if out in mirrors:
                        mirrors[out].sync_ledger(partial(blocks.owns_shard, layout=header.layout))
                    restore_tables(out, header, corpus.plan)
        work = count_open_rows(stores, corpus, blocks, only_shards)
        for out, header in stores:
            if mark_unfinished(out, header, corpus.plan, work, blocks) and out in mirrors:
                mirrors[out].push_tables()
        maker = ShardBuilder(stores=tuple(stores), policy=options.policy, remote_stores=mirrors)
        rows = run_build_tasks(maker, block_tasks(corpus, work, blocks), options)
        tried = sum(1 for _ in (progress(sum(work.values()), rows) if progress else rows))
        told = _build_record(corpus, options, clips_tried=tried, seconds=time.monotonic() - began)
        return [
            finish_store(out, header, told if write_record else None, mirrors.get(out))
            for out, header in stores
        ]


def run_build_tasks(
    builder: ShardBuilder, tasks: Iterator[BlockTask], options: BuildOptions
) -> Iterator[int]:
    """The rows of all tasks, as they are tried by the engine that is asked for."""
    if options.engine == "ray":
        return run_on_ray_cluster(
            builder,
            tasks,
            workers=options.workers,
            clip_limit_seconds=options.clip_limit_seconds,
            address=options.address,
        )
    return run_in_processes(
        builder, tasks, workers=options.workers, clip_limit_seconds=options.clip_limit_seconds
    )


def build_store(
    corpus: Corpus,
    output: StoreOutput,
    options: BuildOptions = BuildOptions(),
    *,
    progress: RowProgress | None = None,
) -> pl.DataFrame:
    """`build_stores` for a single one, whole; returns its manifest."""
    (manifest,) = build_stores(corpus, [output], options, progress=progress)
    if manifest is None:
        raise StoreError(f"{output.path}: part {options.part} is done, others are not; run them too")
    return manifest


def _check_outputs(
    corpus: Corpus, stores: Sequence[tuple[Path, StoreHeader]], remote_paths: Collection[Path]
) -> None:
    """Refuse two stores in one place, and one for which there is no room."""
    paths = [out.resolve() for out, _ in stores]
    if len(set(paths)) < len(paths):
        raise InputError("two stores with one path; give every --spec an --out of its own")
    clips = corpus.sources.frame.height - corpus.sources.frame["kind"].null_count()
    needed = sum(
        clips * header.layout.clip_bytes
        for out, header in stores
        if out not in remote_paths and not out.exists()
    )
    for out in (out.resolve() for out, _ in stores if out not in remote_paths and not out.exists()):
        folder = next(parent for parent in out.parents if parent.exists())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise StoreError(
                f"{folder}: {free / 2**20:,.0f} MiB free, {clips:,} clips need {needed / 2**20:,.0f} MiB; "
                "free some, or choose another --out or --dtype uint8"
            )


def _build_record(
    corpus: Corpus, options: BuildOptions, *, clips_tried: int, seconds: float
) -> dict[str, Any]:
    sources = corpus.sources
    return {
        "asked": corpus.dataset_settings,
        "notes": list(corpus.notes),
        "policy": asdict(options.policy),
        "workers": options.workers,
        "limit_seconds": options.clip_limit_seconds,
        "part": str(options.part),
        "audio_files": sources.sound_count,
        "unmatched_files": len(sources.unmatched_sources),
        "unmatched_examples": sources.unmatched_sources[:20],
        "other_start_files": len(sources.other_segment_sources),
        "other_start_examples": sources.other_segment_sources[:20],
        "clips_tried": clips_tried,
        "seconds": round(seconds, 1),
        "versions": current_versions(),
    }
