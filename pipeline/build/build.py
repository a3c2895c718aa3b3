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

from pipeline.build.finish import finalise
from pipeline.build.plan import Blocks, Build, Output, Progress, open_rows, plan_store, tasks_of, versions
from pipeline.build.prepare import check_same, create_store, mark_open, mend, restore_header, sweep
from pipeline.build.remote_store import Mirror
from pipeline.build.shard_builder import BlockTask, ShardMaker
from pipeline.build.workers import run_here, run_on_ray
from pipeline.datasets.corpus import Corpus
from pipeline.errors import InputError, StoreError
from pipeline.files import WHOLE, gate, locked
from pipeline.store.header import Header


def build_stores(
    corpus: Corpus,
    outputs: Sequence[Output],
    build: Build = Build(),
    *,
    progress: Progress | None = None,
    shards: Collection[int] | None = None,
    tell: bool = True,
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
        output.path: Mirror(url=output.remote, staging=output.path) for output in outputs if output.remote
    }
    _check_outputs(corpus, stores, mirrors)
    created = []
    for out, header in stores:
        if out in mirrors and (there := mirrors[out].header()) is not None:
            check_same(mirrors[out].url, there, header)
        if not out.exists() and create_store(out, header, corpus.plan) and out not in mirrors:
            created.append(out)
    with ExitStack() as stack:
        for out, header in stores:
            restore_header(out, header)
            check_same(out, Header.read(out), header)
            stack.enter_context(locked(out, WHOLE if out in mirrors else build.part))
        blocks = Blocks.of(headers, build.part)
        for out, header in stores:
            if out not in created:
                with gate(out):
                    sweep(out, header.layout, blocks)
                    if out in mirrors:
                        mirrors[out].pull(partial(blocks.holds, layout=header.layout))
                    mend(out, header, corpus.plan)
        work = open_rows(stores, corpus, blocks, shards)
        for out, header in stores:
            if mark_open(out, header, corpus.plan, work, blocks) and out in mirrors:
                mirrors[out].push_tables()
        maker = ShardMaker(stores=tuple(stores), policy=build.policy, mirrors=mirrors)
        rows = run(maker, tasks_of(corpus, work, blocks), build)
        tried = sum(1 for _ in (progress(sum(work.values()), rows) if progress else rows))
        told = _told(corpus, build, tried=tried, seconds=time.monotonic() - began)
        return [finalise(out, header, told if tell else None, mirrors.get(out)) for out, header in stores]


def run(maker: ShardMaker, tasks: Iterator[BlockTask], build: Build) -> Iterator[int]:
    """The rows of all tasks, as they are tried by the engine that is asked for."""
    if build.engine == "ray":
        return run_on_ray(
            maker, tasks, workers=build.workers, clip_seconds=build.clip_seconds, address=build.address
        )
    return run_here(maker, tasks, workers=build.workers, clip_seconds=build.clip_seconds)


def build_store(
    corpus: Corpus, output: Output, build: Build = Build(), *, progress: Progress | None = None
) -> pl.DataFrame:
    """`build_stores` for a single one, whole; returns its manifest."""
    (manifest,) = build_stores(corpus, [output], build, progress=progress)
    if manifest is None:
        raise StoreError(f"{output.path}: part {build.part} is done, others are not; run them too")
    return manifest


def _check_outputs(
    corpus: Corpus, stores: Sequence[tuple[Path, Header]], elsewhere: Collection[Path]
) -> None:
    """Refuse two stores in one place, and one for which there is no room."""
    paths = [out.resolve() for out, _ in stores]
    if len(set(paths)) < len(paths):
        raise InputError("two stores with one path; give every --spec an --out of its own")
    clips = corpus.sources.frame.height - corpus.sources.frame["kind"].null_count()
    needed = sum(
        clips * header.layout.clip_bytes
        for out, header in stores
        if out not in elsewhere and not out.exists()
    )
    for out in (out.resolve() for out, _ in stores if out not in elsewhere and not out.exists()):
        folder = next(parent for parent in out.parents if parent.exists())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise StoreError(
                f"{folder}: {free / 2**20:,.0f} MiB free, {clips:,} clips need {needed / 2**20:,.0f} MiB; "
                "free some, or choose another --out or --dtype uint8"
            )


def _told(corpus: Corpus, build: Build, *, tried: int, seconds: float) -> dict[str, Any]:
    sources = corpus.sources
    return {
        "asked": corpus.asked,
        "notes": list(corpus.notes),
        "policy": asdict(build.policy),
        "workers": build.workers,
        "limit_seconds": build.clip_seconds,
        "part": str(build.part),
        "audio_files": sources.files,
        "unmatched_files": len(sources.unmatched),
        "unmatched_examples": sources.unmatched[:20],
        "other_start_files": len(sources.other_start),
        "other_start_examples": sources.other_start[:20],
        "clips_tried": tried,
        "seconds": round(seconds, 1),
        "versions": versions(),
    }
