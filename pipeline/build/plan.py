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
from pipeline.build.shard_builder import BlockTask, Clip
from pipeline.datasets.corpus import Corpus
from pipeline.errors import InputError
from pipeline.files import WHOLE, Part
from pipeline.labels.label_sets import split_mids
from pipeline.store.header import DTYPES, Header, Layout
from pipeline.store.manifest import PLAN_SCHEMA, plan_id
from pipeline.store.shards import read_commit, shard_clips_for
from pipeline.store.tables import digest_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Which blocks of rows a build looks after: runs of whole shards in every store, every `part.of`-th of them."""

    clips: int  # in a block
    part: Part
    numbers: range

    @classmethod
    def of(cls, headers: Sequence[Header], part: Part) -> "Blocks":
        """All that the part holds; shards are powers of two, so the largest is a run of whole others."""
        clips = max(header.layout.shard_clips for header in headers)
        return cls(
            clips=clips,
            part=part,
            numbers=range(part.index, math.ceil(headers[0].layout.clips / clips), part.of),
        )

    def rows(self, block: int, layout: Layout) -> range:
        return range(block * self.clips, min((block + 1) * self.clips, layout.clips))

    def shards(self, block: int, layout: Layout) -> range:
        rows = self.rows(block, layout)
        return range(rows[0] // layout.shard_clips, rows[-1] // layout.shard_clips + 1)

    def holds(self, shard: int, layout: Layout) -> bool:
        return shard * layout.shard_clips // self.clips % self.part.of == self.part.index


def open_rows(
    stores: Sequence[tuple[Path, Header]], corpus: Corpus, blocks: Blocks, only: Collection[int] | None
) -> dict[int, int]:
    """Block -> how many rows to try: all of a shard without record, and failed ones that have a sound now."""
    counts = {}
    hopeful_N = (corpus.plan["duplicate"].is_null() & corpus.sources.frame["kind"].is_not_null()).to_numpy()
    for block in blocks.numbers:
        tried, worth = np.zeros(blocks.clips, bool), False
        for out, header in stores:
            for shard in blocks.shards(block, header.layout):
                rows, record = header.layout.rows(shard), read_commit(out, shard)
                open_N = np.ones(len(rows), bool)
                if record is not None:
                    open_N = (record[1]["status"] != "good").to_numpy()
                worth |= record is None or bool((open_N & hopeful_N[rows.start : rows.stop]).any())
                tried[rows.start - block * blocks.clips :][: len(rows)] |= open_N
        if worth and (only is None or block in only):
            counts[block] = int(tried.sum())
    return counts


def tasks_of(corpus: Corpus, work: dict[int, int], blocks: Blocks) -> Iterator[BlockTask]:
    """The blocks to work through, made when they are wanted: two million clips would fill the memory."""
    for block in work:
        rows = range(block * blocks.clips, min((block + 1) * blocks.clips, corpus.plan.height))
        facts = corpus.plan[rows.start : rows.stop].select(
            "split", "start_seconds", "end_seconds", "duplicate"
        )
        found = corpus.sources.locators(rows)
        yield BlockTask(
            clips=tuple(
                Clip(row=row, locator=locator, **fact)
                for row, locator, fact in zip(rows, found, facts.rows(named=True), strict=True)
            )
        )


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


def versions() -> dict[str, str]:
    """What the values of a store depend on beside its spec and its sounds, and who wrote it."""
    cpu = torch.backends.cpu.get_cpu_capability()  # which kernels PyTorch takes: they round differently
    return {name: version(name) for name in VERSIONS} | {"python": platform.python_version(), "cpu": cpu}
