"""Blocks: which rows a build works through in one go, which of them are open, and the task each comes to."""

import math
import platform
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import polars as pl
import torch

from pipeline.audio.decode import AudioPolicy
from pipeline.audio.mel_spec import MelSpec
from pipeline.build.shard_builder import BlockTask, PlannedClip
from pipeline.datasets.corpus import Corpus
from pipeline.errors import InputError
from pipeline.files import WHOLE_BUILD, BuildPart
from pipeline.labels.label_sets import index_class_ids
from pipeline.store.header import STORED_DTYPES, ShardLayout, StoreHeader
from pipeline.store.manifest import PLAN_SCHEMA, compute_plan_id
from pipeline.store.shards import choose_shard_clips, read_commit
from pipeline.tables import frame_digest


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildBlocks:
    """Which blocks of rows a build looks after: runs of whole shards in every store, every `part.of`-th of them."""

    clips_per_block: int  # in a block
    part: BuildPart
    block_numbers: range

    @classmethod
    def of_part(cls, headers: Sequence[StoreHeader], part: BuildPart) -> "BuildBlocks":
        """All that the part holds; shards are powers of two, so the largest is a run of whole others."""
        clips = max(header.layout.shard_clips for header in headers)
        return cls(
            clips_per_block=clips,
            part=part,
            block_numbers=range(part.index, math.ceil(headers[0].layout.clips / clips), part.count),
        )

    def block_rows(self, block: int, layout: ShardLayout) -> range:
        return range(block * self.clips_per_block, min((block + 1) * self.clips_per_block, layout.clips))

    def block_shards(self, block: int, layout: ShardLayout) -> range:
        rows = self.block_rows(block, layout)
        return range(rows[0] // layout.shard_clips, rows[-1] // layout.shard_clips + 1)

    def owns_shard(self, shard: int, layout: ShardLayout) -> bool:
        return shard * layout.shard_clips // self.clips_per_block % self.part.count == self.part.index


def count_open_rows(
    stores: Sequence[tuple[Path, StoreHeader]],
    corpus: Corpus,
    blocks: BuildBlocks,
    only_blocks: Collection[int] | None,
) -> dict[int, int]:
    """Block -> how many rows to try: all of a shard without record, and failed ones that have a sound now."""
    counts = {}
    hopeful_N = (corpus.plan["duplicate"].is_null() & corpus.sources.frame["kind"].is_not_null()).to_numpy()
    for block in blocks.block_numbers:
        tried, worth = np.zeros(blocks.clips_per_block, bool), False
        for out, header in stores:
            for shard in blocks.block_shards(block, header.layout):
                rows, record = header.layout.rows_of_shard(shard), read_commit(out, shard)
                open_N = np.ones(len(rows), bool)
                if record is not None:
                    open_N = (record[1]["status"] != "good").to_numpy()
                worth |= record is None or bool((open_N & hopeful_N[rows.start : rows.stop]).any())
                tried[rows.start - block * blocks.clips_per_block :][: len(rows)] |= open_N
        if worth and (only_blocks is None or block in only_blocks):
            counts[block] = int(tried.sum())
    return counts


def block_tasks(corpus: Corpus, open_row_counts: dict[int, int], blocks: BuildBlocks) -> Iterator[BlockTask]:
    """The blocks to work through, made when they are wanted: two million clips would fill the memory."""
    for block in open_row_counts:
        rows = range(
            block * blocks.clips_per_block, min((block + 1) * blocks.clips_per_block, corpus.plan.height)
        )
        facts = corpus.plan[rows.start : rows.stop].select(
            "split", "start_seconds", "end_seconds", "duplicate"
        )
        found = corpus.sources.locators_of_rows(rows)
        yield BlockTask(
            clips=tuple(
                PlannedClip(row=row, locator=locator, **fact)
                for row, locator, fact in zip(rows, found, facts.rows(named=True), strict=True)
            )
        )


BUILD_ENGINES = ("local", "ray")

UINT8_TOP_NAT = 14.0  # nats: a full-scale sine reaches 12 in the a-jepa front end; what is louder is clipped

VERSIONED_PACKAGES = ("ajepa", "av", "numpy", "soundfile", "soxr", "torch", "zarr")

RowProgress = Callable[
    [int, Iterator[int]], Iterator[int]
]  # wraps the stream of tried rows; their number comes first


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreOutput:
    """One store to build: where, and everything that decides its bytes beside the corpus and the policy."""

    path: Path
    spec: MelSpec
    dtype: str = "float16"
    remote: str | None = None  # URL where the store is to lie; `path` is then what is kept here to build it

    @property
    def location(self) -> str:
        """Where the store lies, for people."""
        return self.remote or str(self.path)

    def __post_init__(self) -> None:
        if self.dtype not in STORED_DTYPES:
            raise InputError(f"dtype {self.dtype!r}: expected {' or '.join(STORED_DTYPES)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """How to build; only `policy` can change what comes out."""

    policy: AudioPolicy = field(default_factory=AudioPolicy)
    workers: int = 2
    clip_limit_seconds: float = 60.0  # wall time a clip may take before its worker is killed
    part: BuildPart = WHOLE_BUILD
    engine: str = "local"  # or ray, whose cluster answers at `address`; None: one on this machine
    address: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in BUILD_ENGINES:
            raise InputError(f"engine {self.engine!r}: expected {' or '.join(BUILD_ENGINES)}")
        if self.engine == "ray" and self.workers < 1:
            raise InputError("--engine ray --workers 0: expected how many tasks run at a time, 1 or more")


def plan_store(corpus: Corpus, output: StoreOutput) -> StoreHeader:
    """The header of the store that `output` asks for."""
    spec, clips = output.spec, corpus.plan.height
    shard_clips = choose_shard_clips(clips, spec.frames * spec.mel_bands * np.dtype(output.dtype).itemsize)
    scale, offset = 1.0, 0.0
    if output.dtype == "uint8":  # 1..255 span the floor to UINT8_TOP; 0 means: not there
        scale = (UINT8_TOP_NAT - spec.floor_log) / 254
        offset = spec.floor_log - scale
    return StoreHeader(
        spec=spec,
        layout=ShardLayout(
            clips=clips,
            frames=spec.frames,
            bands=spec.mel_bands,
            dtype=output.dtype,
            shard_clips=shard_clips,
        ),
        plan_id=compute_plan_id(corpus.plan, shard_clips=shard_clips),
        scale=scale,
        offset=offset,
        classes=corpus.classes,
        plan_digest=frame_digest(corpus.plan.select(*PLAN_SCHEMA)),
        labels_digest=frame_digest(pl.DataFrame(index_class_ids(corpus.plan["mids"], corpus.classes))),
    )


def current_versions() -> dict[str, str]:
    """What the values of a store depend on beside its spec and its sounds, and who wrote it."""
    cpu = torch.backends.cpu.get_cpu_capability()  # which kernels PyTorch takes: they round differently
    return {name: version(name) for name in VERSIONED_PACKAGES} | {
        "python": platform.python_version(),
        "cpu": cpu,
    }
