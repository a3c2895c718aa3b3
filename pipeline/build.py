"""Lists and files -> plan -> store; run again it carries on; statistics at the end."""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.audio import AudioPolicy
from pipeline.corpus import Corpus
from pipeline.engines import run_here
from pipeline.errors import InputError, StoreError
from pipeline.files import PARTIAL, fsync, locked, replacing
from pipeline.labels import split_mids
from pipeline.locators import Sources
from pipeline.manifest import PLAN_SCHEMA, pending, plan_id
from pipeline.melspec import MelSpec
from pipeline.ontology import ClassList
from pipeline.shardmaker import NEXT, Clip, ShardMaker, ShardTask, settle
from pipeline.shards import DTYPES, Layout, array_json, create_array, shard_clips_for
from pipeline.store import (
    Commit,
    Header,
    ledger_path,
    read_commit,
    read_table,
    store_id,
    stray_shards,
    write_table,
)

UINT8_TOP = 14.0  # nats: a full-scale sine reaches 12 in the a-jepa front end; what is louder is clipped
VERSIONS = ("ajepa", "av", "numpy", "soundfile", "soxr", "torch", "zarr")


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """What to build: everything that decides the store's bytes, beside the files themselves."""

    spec: MelSpec
    dtype: str = "float16"
    policy: AudioPolicy = field(default_factory=AudioPolicy)
    workers: int = 2
    clip_seconds: float = 60.0  # wall time a clip may take before its worker is killed

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r}: expected {' or '.join(DTYPES)}")


def build_store(
    corpus: Corpus,
    out: Path,
    build: Build,
    *,
    progress: Callable[[int, Iterator[int]], Iterator[int]] | None = None,
) -> pl.DataFrame:
    """Build or continue the store `out`; returns its manifest.

    What is good already is kept; what is missing or failed is tried again where there is a file for it.
    `progress` wraps the stream of tried rows (their number comes first). Raises InputError with nothing half-made.
    """
    plan, sources = corpus.plan, corpus.sources
    header = plan_store(plan, build, corpus.classes)
    began = time.monotonic()
    if not out.exists():
        _check_space(
            out.absolute().parent, header.layout, sources.frame.height - sources.frame["kind"].null_count()
        )
        create_store(out, header, plan)
    check_same(out, header)
    with locked(out):
        check_same(out, header)
        sweep(out)
        mend(out, header, plan)
        tasks = open_tasks(out, header.layout, plan, sources)
        if any(not ledger_path(out, task.shard).exists() for task in tasks):
            write_table(out / "manifest.parquet", pending(plan), {})  # no reader takes the store for finished
        maker = ShardMaker(store=out, header=header, policy=build.policy)
        rows = run_here(maker, tasks, workers=build.workers, clip_seconds=build.clip_seconds)
        tried = list(progress(sum(task.open_rows for task in tasks), rows) if progress else rows)
        manifest = finalise(out, header, plan)
        _write_told(out, corpus, build, tried=len(tried), seconds=time.monotonic() - began)
    return manifest


def plan_store(plan: pl.DataFrame, build: Build, classes: ClassList) -> Header:
    """The header of the store that `build` makes of `plan`."""
    spec = build.spec
    clip_bytes = spec.frames * spec.mel_bands * np.dtype(build.dtype).itemsize
    shard_clips = shard_clips_for(plan.height, clip_bytes)
    scale, offset = 1.0, 0.0
    if build.dtype == "uint8":  # 1..255 span the floor to UINT8_TOP; 0 means: not there
        scale = (UINT8_TOP - spec.floor_log) / 254
        offset = spec.floor_log - scale
    return Header(
        spec=spec,
        layout=Layout(
            clips=plan.height,
            frames=spec.frames,
            bands=spec.mel_bands,
            dtype=build.dtype,
            shard_clips=shard_clips,
        ),
        plan_id=plan_id(plan, shard_clips=shard_clips),
        scale=scale,
        offset=offset,
        classes=classes,
    )


def create_store(out: Path, header: Header, plan: pl.DataFrame) -> None:
    """A store in which nothing is built yet, whole or not at all."""
    scratch = out.with_name(f"{out.name}.{os.getpid()}{PARTIAL}")
    try:
        create_array(scratch, header.layout, {"ajepa": header.to_json()})
        write_table(scratch / "manifest.parquet", pending(plan), {})
        mend(scratch, header, plan)
        scratch.rename(out)
        fsync(out.absolute().parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def mend(out: Path, header: Header, plan: pl.DataFrame) -> None:
    """Write what follows from the plan alone where it is not there, or not readable."""
    (out / "ledger").mkdir(exist_ok=True)
    array, told = out / "mel" / "zarr.json", array_json(header.layout)
    if not array.is_file() or array.read_bytes() != told:
        array.parent.mkdir(exist_ok=True)
        with replacing(array) as scratch:
            scratch.write_bytes(told)
    labels = out / "labels.parquet"
    try:
        if labels.exists() and read_table(labels)[0].height == plan.height:
            return
    except StoreError:
        pass  # damaged: written anew, which loses the propagated sets and no more
    write_table(labels, pl.DataFrame(split_mids(plan["mids"], header.classes)), {"raw": "as listed"})


def _check_space(folder: Path, layout: Layout, clips: int) -> None:
    folder = next(parent for parent in (folder, *folder.parents) if parent.exists())
    needed, free = clips * layout.clip_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise StoreError(
            f"{folder}: {free / 2**20:,.0f} MiB free, {clips:,} clips need {needed / 2**20:,.0f} MiB; "
            "free some, or choose another --out or --dtype uint8"
        )


def check_same(out: Path, header: Header) -> None:
    """Refuse to continue a store that is not the one now asked for."""
    there = Header.read(out)
    if there.spec.spec_id != header.spec.spec_id:
        raise StoreError(
            f"{out} holds mel spec {there.spec.name}, not {header.spec.name}; choose another --out"
        )
    if there.layout.dtype != header.layout.dtype:
        raise StoreError(f"{out} holds {there.layout.dtype}, not {header.layout.dtype}; choose another --out")
    if there != header:
        raise StoreError(
            f"{out} was planned from other segments or class lists; give the same, or another --out"
        )


def sweep(out: Path) -> None:
    """Settle what a crash left: records that wait for their shard, unfinished files, shards without a record."""
    for path in out.glob(f"ledger/*{NEXT}"):
        settle(out, path)
    for path in list(out.rglob(f"*{PARTIAL}")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in stray_shards(out):
        path.unlink()


def open_tasks(out: Path, layout: Layout, plan: pl.DataFrame, sources: Sources) -> list[ShardTask]:
    """The shards that are not committed, or have failed clips for which there is a file now."""
    tasks = []
    facts = plan.select("split", "start_seconds", "end_seconds", "duplicate").rows(named=True)
    for shard in range(layout.shards):
        rows, commit = layout.rows(shard), read_commit(out, shard)
        locators = sources.locators(rows)
        bad: Sequence[int] = rows
        if commit is not None:
            bad = [row for row, status in zip(rows, commit[1]["status"], strict=True) if status != "good"]
        if commit is None or any(
            facts[row]["duplicate"] is None and locators[row - rows.start] for row in bad
        ):
            clips = (Clip(row=r, locator=found, **facts[r]) for r, found in zip(rows, locators, strict=True))
            tasks.append(ShardTask(shard=shard, clips=tuple(clips), open_rows=len(bad)))
    return tasks


def finalise(out: Path, header: Header, plan: pl.DataFrame) -> pl.DataFrame:
    """Write the manifest and the statistics that the ledger gives; returns the manifest."""
    records = [read_commit(out, shard) for shard in range(header.layout.shards)]
    if open_shards := records.count(None):
        raise StoreError(
            f"{out}: {open_shards} of {len(records)} shards are not built; run the same command again"
        )
    done = [record for record in records if record is not None]
    manifest = pl.concat(
        [plan.select(*PLAN_SCHEMA), pl.concat([results for _, results in done])], how="horizontal"
    )
    commits = [commit for commit, _ in done]
    with replacing(out / "stats.json") as scratch:
        scratch.write_text(json.dumps(statistics(commits), indent=1) + "\n")
    write_table(out / "manifest.parquet", manifest, {"store_id": store_id(header, commits)})
    return manifest


def statistics(commits: Sequence[Commit]) -> dict[str, dict[str, Any]]:
    """`all` and each split: frames, mean, std, mean_F, std_F from the moments of all shards."""
    splits = sorted({split for commit in commits for split in commit.moments})
    parts = {split: [c.moments[split] for c in commits if split in c.moments] for split in splits}
    return {"all": _merged([m for part in parts.values() for m in part])} | {
        s: _merged(p) for s, p in parts.items()
    }


def _merged(moments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    frames = sum(m["frames"] for m in moments)
    if not frames:
        return {"frames": 0}
    mean_F = np.sum([m["sum_F"] for m in moments], axis=0) / frames
    square_F = np.sum([m["square_F"] for m in moments], axis=0) / frames
    mean = mean_F.mean()
    return {
        "frames": frames,
        "mean": mean,
        "std": float(np.sqrt(max(square_F.mean() - mean**2, 0))),
        "mean_F": mean_F.tolist(),
        "std_F": np.sqrt(np.maximum(square_F - mean_F**2, 0)).tolist(),
    }


def _write_told(
    out: Path,
    corpus: Corpus,
    build: Build,
    *,
    tried: int,
    seconds: float,
) -> None:
    told = {
        "asked": corpus.asked,
        "policy": asdict(build.policy),
        "workers": build.workers,
        "audio_files": corpus.sources.files,
        "unmatched_files": len(corpus.sources.unmatched),
        "unmatched_examples": corpus.sources.unmatched[:20],
        "clips_tried": tried,
        "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in VERSIONS} | {"python": platform.python_version()},
    }
    with replacing(out / "build.json") as scratch:
        scratch.write_text(json.dumps(told, indent=1) + "\n")
