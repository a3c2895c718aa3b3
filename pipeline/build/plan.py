"""The plan of a build: its outputs and options, the header of each store, and the blocks of rows that become tasks."""

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
from pipeline.build.shard_builder import BlockTask, PlannedClip, StoreTarget
from pipeline.datasets.corpus import Corpus
from pipeline.errors import InputError
from pipeline.files import WHOLE_BUILD, BuildPart
from pipeline.labels.label_sets import index_class_ids
from pipeline.store.header import STORED_DTYPES, ShardLayout, StoreHeader
from pipeline.store.manifest import PLAN_SCHEMA, compute_plan_id
from pipeline.store.shards import choose_shard_clips, read_commit
from pipeline.tables import frame_digest

BUILD_ENGINES = ("local", "ray")

# What uint8 values reach up to: a full-scale sine reaches 12 nats in the a-jepa front end; louder sounds are clipped.
UINT8_TOP_NAT = 14.0

VERSIONED_PACKAGES = ("ajepa", "av", "numpy", "soundfile", "soxr", "torch", "zarr")

# Wraps the stream of tried rows, for a progress bar; the number of rows comes first.
RowProgress = Callable[[int, Iterator[int]], Iterator[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreOutput:
    """One store to build: its place, and all that decides its bytes beside the corpus and the audio policy."""

    path: Path
    spec: MelSpec
    dtype: str = "float16"
    remote: str | None = None  # URL where the store is to lie; `path` is then its staging folder

    def __post_init__(self) -> None:
        if self.dtype not in STORED_DTYPES:
            raise InputError(f"dtype {self.dtype!r}: expected {' or '.join(STORED_DTYPES)}")

    @property
    def location(self) -> str:
        """The place of the store as messages print it."""
        return self.remote or str(self.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """How to build; of these options only `policy` changes the store."""

    policy: AudioPolicy = field(default_factory=AudioPolicy)
    workers: int = 2
    clip_limit_seconds: float = 60.0  # wall time that a clip may take before its worker is killed
    part: BuildPart = WHOLE_BUILD
    engine: str = "local"  # or ray
    address: str | None = None  # of the Ray cluster; None starts one on this machine

    def __post_init__(self) -> None:
        if self.engine not in BUILD_ENGINES:
            raise InputError(f"engine {self.engine!r}: expected {' or '.join(BUILD_ENGINES)}")
        if self.engine == "ray" and self.workers < 1:
            raise InputError("--engine ray --workers 0: expected how many tasks run at a time, 1 or more")


def plan_store(corpus: Corpus, output: StoreOutput) -> StoreHeader:
    """The header of the store that `output` asks for."""
    # Shards follow from the number of clips and their bytes, not from the machine.
    spec = output.spec
    clips = corpus.plan.height
    clip_bytes = spec.frames * spec.mel_bands * np.dtype(output.dtype).itemsize
    shard_clips = choose_shard_clips(clips, clip_bytes)

    # uint8: 1..255 span the floor to UINT8_TOP_NAT, 0 is an absent clip.
    scale = 1.0
    offset = 0.0
    if output.dtype == "uint8":
        scale = (UINT8_TOP_NAT - spec.floor_log) / 254
        offset = spec.floor_log - scale

    # The digests let `verify` and later builds recognise the plan and its labels.
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
    """The versions that decide, beside spec and sounds, the values of a store, and those that wrote it."""
    versions = {name: version(name) for name in VERSIONED_PACKAGES}
    versions["python"] = platform.python_version()
    # PyTorch chooses its kernels by the processor's instructions, and they round differently.
    versions["cpu"] = torch.backends.cpu.get_cpu_capability()
    return versions


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildBlocks:
    """The blocks of rows that one part of a build fills; a block is whole shards in every store of the build."""

    clips_per_block: int
    part: BuildPart
    block_numbers: range  # every `part.count`-th block of the plan

    @classmethod
    def of_part(cls, headers: Sequence[StoreHeader], part: BuildPart) -> "BuildBlocks":
        """The blocks of `part` for stores with these headers."""
        # Shard sizes are powers of two, so the largest shard is a number of whole shards of every other store.
        clips_per_block = max(header.layout.shard_clips for header in headers)
        block_count = math.ceil(headers[0].layout.clips / clips_per_block)
        return cls(
            clips_per_block=clips_per_block,
            part=part,
            block_numbers=range(part.index, block_count, part.count),
        )

    def block_rows(self, block: int, layout: ShardLayout) -> range:
        """The rows of a block."""
        return range(block * self.clips_per_block, min((block + 1) * self.clips_per_block, layout.clips))

    def block_shards(self, block: int, layout: ShardLayout) -> range:
        """The shards that a block has in a store of this layout."""
        rows = self.block_rows(block, layout)
        return range(rows[0] // layout.shard_clips, rows[-1] // layout.shard_clips + 1)

    def owns_shard(self, shard: int, layout: ShardLayout) -> bool:
        """Whether this part of the build writes the shard."""
        block = shard * layout.shard_clips // self.clips_per_block
        return block % self.part.count == self.part.index


def count_open_rows(
    stores: Sequence[StoreTarget],
    corpus: Corpus,
    blocks: BuildBlocks,
    only_blocks: Collection[int] | None,
) -> dict[int, int]:
    """How many rows of each block to try: all rows of an uncommitted shard, and failed rows that have a sound now.

    Blocks without work are left out, and with `only_blocks` all but these.
    """
    counts = {}
    has_sound_N = (corpus.plan["duplicate"].is_null() & corpus.sources.frame["kind"].is_not_null()).to_numpy()
    for block in blocks.block_numbers:
        # A row is tried if any store lacks it.
        first_row = block * blocks.clips_per_block
        is_tried_N = np.zeros(blocks.clips_per_block, bool)
        has_work = False
        for store in stores:
            layout = store.header.layout
            for shard in blocks.block_shards(block, layout):
                # Without a record every row is open; a failed row is worth a trial only if it has a sound now.
                rows = layout.rows_of_shard(shard)
                record = read_commit(store.path, shard)
                is_open_N = np.ones(len(rows), bool)
                if record is not None:
                    is_open_N = (record[1]["status"] != "good").to_numpy()
                has_work |= record is None or bool((is_open_N & has_sound_N[rows.start : rows.stop]).any())
                is_tried_N[rows.start - first_row :][: len(rows)] |= is_open_N

        if has_work and (only_blocks is None or block in only_blocks):
            counts[block] = int(is_tried_N.sum())
    return counts


def block_tasks(corpus: Corpus, open_row_counts: dict[int, int], blocks: BuildBlocks) -> Iterator[BlockTask]:
    """Yield the task of each block, made when it is asked for: two million clips at once would fill the memory."""
    for block in open_row_counts:
        first_row = block * blocks.clips_per_block
        rows = range(first_row, min(first_row + blocks.clips_per_block, corpus.plan.height))
        columns = corpus.plan[rows.start : rows.stop].select(
            "split", "start_seconds", "end_seconds", "duplicate"
        )
        locators = corpus.sources.locators_of_rows(rows)
        clips = zip(rows, locators, columns.rows(named=True), strict=True)
        yield BlockTask(
            clips=tuple(PlannedClip(row=row, locator=locator, **values) for row, locator, values in clips)
        )
