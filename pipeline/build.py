"""A corpus -> plan -> stores; run again it carries on; statistics at the end."""

import platform
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from pipeline.audio import AudioPolicy
from pipeline.blocks import Blocks, open_rows, tasks_of
from pipeline.cluster import run_on_ray
from pipeline.corpus import Corpus
from pipeline.engines import run_here
from pipeline.errors import InputError, StoreError
from pipeline.files import WHOLE, Part, gate, locked
from pipeline.finalise import finalise
from pipeline.header import Header
from pipeline.labels import split_mids
from pipeline.manifest import PLAN_SCHEMA, plan_id
from pipeline.melspec import MelSpec
from pipeline.mirror import Mirror
from pipeline.shardmaker import BlockTask, ShardMaker
from pipeline.shards import DTYPES, Layout, shard_clips_for
from pipeline.tables import digest_of
from pipeline.upkeep import check_same, create_store, mark_open, mend, restore_header, sweep

ENGINES = ("local", "ray")
UINT8_TOP = 14.0  # nats: a full-scale sine reaches 12 in the a-jepa front end; what is louder is clipped
VERSIONS = ("ajepa", "av", "numpy", "soundfile", "soxr", "torch", "zarr")

Progress = Callable[
    [int, Iterator[int]], Iterator[int]
]  # wraps the stream of tried rows; their number comes first


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """One store to build: where, and everything that decides its bytes beside the corpus and the policy."""

    path: Path
    spec: MelSpec
    dtype: str = "float16"
    remote: str | None = None  # URL where the store is to lie; `path` is then what is kept here to build it

    @property
    def place(self) -> str:
        """Where the store lies, for people."""
        return self.remote or str(self.path)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r}: expected {' or '.join(DTYPES)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """How to build; only `policy` can change what comes out."""

    policy: AudioPolicy = field(default_factory=AudioPolicy)
    workers: int = 2
    clip_seconds: float = 60.0  # wall time a clip may take before its worker is killed
    part: Part = WHOLE
    engine: str = "local"  # or ray, whose cluster answers at `address`; None: one on this machine
    address: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InputError(f"engine {self.engine!r}: expected {' or '.join(ENGINES)}")
        if self.engine == "ray" and self.workers < 1:
            raise InputError("--engine ray --workers 0: expected how many tasks run at a time, 1 or more")


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


def plan_store(corpus: Corpus, output: Output) -> Header:
    """The header of the store that `output` asks for."""
    spec, clips = output.spec, corpus.plan.height
    shard_clips = shard_clips_for(clips, spec.frames * spec.mel_bands * np.dtype(output.dtype).itemsize)
    scale, offset = 1.0, 0.0
    if output.dtype == "uint8":  # 1..255 span the floor to UINT8_TOP; 0 means: not there
        scale = (UINT8_TOP - spec.floor_log) / 254
        offset = spec.floor_log - scale
    return Header(
        spec=spec,
        layout=Layout(
            clips=clips,
            frames=spec.frames,
            bands=spec.mel_bands,
            dtype=output.dtype,
            shard_clips=shard_clips,
        ),
        plan_id=plan_id(corpus.plan, shard_clips=shard_clips),
        scale=scale,
        offset=offset,
        classes=corpus.classes,
        plan_digest=digest_of(corpus.plan.select(*PLAN_SCHEMA)),
        labels_digest=digest_of(pl.DataFrame(split_mids(corpus.plan["mids"], corpus.classes))),
    )


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


def versions() -> dict[str, str]:
    """What the values of a store depend on beside its spec and its sounds, and who wrote it."""
    cpu = torch.backends.cpu.get_cpu_capability()  # which kernels PyTorch takes: they round differently
    return {name: version(name) for name in VERSIONS} | {"python": platform.python_version(), "cpu": cpu}
