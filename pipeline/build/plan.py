"""The plan of a build: it leaves out what the ledger already records, so that a killed build carries on.

This file has the outputs and options of a build, the header of each store, and the blocks of rows that become tasks.
A row is open if at least one store of the build has no good spectrogram of it: its shard has no record in the ledger
yet, or the record says that the row failed. A block becomes a task if a shard of it has no record, or if one of its
failed rows has a sound now. The task then tries all open rows of the block.
"""

import math
import platform
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import polars as pl

from pipeline.audio.decode import AudioPolicy
from pipeline.audio.mel_spec import MelSpec
from pipeline.build.plan_files import plan_with_labels
from pipeline.build.shard_builder import BlockTask, PlannedClip, StoreTarget
from pipeline.build.workers import cpu_capability
from pipeline.datasets.corpus import Corpus
from pipeline.errors import InputError
from pipeline.files import WHOLE_BUILD, BuildPart
from pipeline.labels.label_sets import index_class_ids
from pipeline.store.header import STORED_DTYPES, ShardLayout, StoreHeader
from pipeline.store.manifest import PLAN_SCHEMA, compute_plan_id
from pipeline.store.shards import choose_shard_clips, read_commit_statuses
from pipeline.tables import frame_digest

BUILD_ENGINES = ("local", "ray")

# The largest log-mel that uint8 can store; larger values are clipped. A full-scale sine reaches 12 nats in the a-jepa
# front end.
UINT8_TOP_NAT = 14.0

VERSIONED_PACKAGES = ("ajepa", "av", "numpy", "soundfile", "soxr", "torch", "zarr")

# Wraps the stream of tried rows in a progress bar; the first argument is the number of rows.
RowProgress = Callable[[int, Iterator[int]], Iterator[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreOutput:
    """One store to build: its location, and all settings that decide its bytes besides corpus and audio policy."""

    path: Path
    spec: MelSpec
    dtype: str = "float16"
    remote: str | None = None  # URL of a store on an object store; `path` is then its staging folder

    def __post_init__(self) -> None:
        if self.dtype not in STORED_DTYPES:
            raise InputError(f"dtype {self.dtype!r}: expected {' or '.join(STORED_DTYPES)}")

    @property
    def location(self) -> str:
        """The location of the store as messages print it."""
        return self.remote or str(self.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """Options of a build; only `policy` changes the content of the store."""

    policy: AudioPolicy = field(default_factory=AudioPolicy)
    workers: int = 2
    clip_limit_seconds: float = 60.0  # wall time that a clip may take before its worker is killed
    part: BuildPart = WHOLE_BUILD
    engine: str = "local"  # or "ray"
    address: str | None = None  # address of the Ray cluster; None starts Ray on this machine

    def __post_init__(self) -> None:
        if self.engine not in BUILD_ENGINES:
            raise InputError(f"engine {self.engine!r}: expected {' or '.join(BUILD_ENGINES)}")
        if self.engine == "ray" and self.workers < 1:
            raise InputError("--engine ray --workers 0: expected how many tasks run at a time, 1 or more")


def plan_store(corpus: Corpus, output: StoreOutput) -> StoreHeader:
    """Return the header of the store that `output` describes."""
    # The shard size depends only on the number and size of the clips, not on the machine.
    spec = output.spec
    clips = corpus.plan.height
    clip_bytes = spec.frames * spec.mel_bands * np.dtype(output.dtype).itemsize
    shard_clips = choose_shard_clips(clips, clip_bytes)

    # uint8: the values 1..255 cover the range from the floor to UINT8_TOP_NAT; 0 marks an absent clip.
    scale = 1.0
    offset = 0.0
    if output.dtype == "uint8":
        scale = (UINT8_TOP_NAT - spec.floor_log) / 254
        offset = spec.floor_log - scale

    # With the digests, `verify` and later builds can recognise the plan and its labels. Those of a stored plan are
    # known.
    stored = None if corpus.stored_plan is None else corpus.stored_plan.header
    if stored is not None and stored.layout.shard_clips == shard_clips:
        plan_id = stored.plan_id
    else:
        plan_id = compute_plan_id(plan_with_labels(corpus), shard_clips=shard_clips)
    if stored is not None:
        plan_digest, labels_digest = stored.plan_digest, stored.labels_digest
    else:
        plan_digest = frame_digest(corpus.plan.select(*PLAN_SCHEMA))
        labels_digest = frame_digest(pl.DataFrame(index_class_ids(corpus.plan["mids"], corpus.classes)))
    return StoreHeader(
        spec=spec,
        layout=ShardLayout(
            clips=clips,
            frames=spec.frames,
            bands=spec.mel_bands,
            dtype=output.dtype,
            shard_clips=shard_clips,
        ),
        plan_id=plan_id,
        scale=scale,
        offset=offset,
        classes=corpus.classes,
        plan_digest=plan_digest,
        labels_digest=labels_digest,
    )


def current_versions() -> dict[str, str]:
    """Return the versions of the software on which the values of a store depend, or which wrote the store."""
    versions = {name: version(name) for name in VERSIONED_PACKAGES}
    versions["python"] = platform.python_version()
    # PyTorch chooses its kernels by the instruction set of the CPU, and these kernels round differently.
    versions["cpu"] = cpu_capability()
    return versions


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildBlocks:
    """The blocks of rows that one part of a build fills; in every store of the build, a block is whole shards."""

    clips_per_block: int
    part: BuildPart
    block_numbers: range  # every `part.count`-th block of the plan

    @classmethod
    def of_part(cls, headers: Sequence[StoreHeader], part: BuildPart) -> "BuildBlocks":
        """Return the blocks of `part` for stores with these headers."""
        # Shard sizes are powers of two, so the largest shard is as long as several whole shards of any other store.
        clips_per_block = max(header.layout.shard_clips for header in headers)
        block_count = math.ceil(headers[0].layout.clips / clips_per_block)
        return cls(
            clips_per_block=clips_per_block,
            part=part,
            block_numbers=range(part.index, block_count, part.count),
        )

    def block_rows(self, block: int, layout: ShardLayout) -> range:
        """Return the rows of a block."""
        return range(block * self.clips_per_block, min((block + 1) * self.clips_per_block, layout.clips))

    def block_shards(self, block: int, layout: ShardLayout) -> range:
        """Return the shards of a block in a store with this layout."""
        rows = self.block_rows(block, layout)
        return range(rows[0] // layout.shard_clips, rows[-1] // layout.shard_clips + 1)

    def owns_shard(self, shard: int, layout: ShardLayout) -> bool:
        """Return whether this part of the build writes the shard."""
        block = shard * layout.shard_clips // self.clips_per_block
        return block % self.part.count == self.part.index


def count_open_rows(
    stores: Sequence[StoreTarget],
    corpus: Corpus,
    blocks: BuildBlocks,
    only_blocks: Collection[int] | None,
) -> dict[int, int]:
    """Return the number of open rows of each block that becomes a task; both are defined at the top of this file.

    Other blocks are left out. With `only_blocks`, all blocks outside `only_blocks` are left out too.
    """
    counts = {}
    has_sound_N = (corpus.plan["duplicate"].is_null() & corpus.sources.frame["kind"].is_not_null()).to_numpy()
    for block in blocks.block_numbers:
        # A row is tried if it is open in any store.
        first_row = block * blocks.clips_per_block
        is_tried_N = np.zeros(blocks.clips_per_block, bool)
        has_work = False
        for store in stores:
            layout = store.header.layout
            for shard in blocks.block_shards(block, layout):
                # Without a record, every row is open. With one, failed rows are open, but they are work only if one
                # of them has a sound now.
                rows = layout.rows_of_shard(shard)
                statuses = read_commit_statuses(store.path, shard)
                is_open_N = np.ones(len(rows), bool)
                if statuses is not None:
                    is_open_N = (statuses != "good").to_numpy()
                has_work |= statuses is None or bool((is_open_N & has_sound_N[rows.start : rows.stop]).any())
                is_tried_N[rows.start - first_row :][: len(rows)] |= is_open_N

        if has_work and (only_blocks is None or block in only_blocks):
            counts[block] = int(is_tried_N.sum())
    return counts


def block_tasks(corpus: Corpus, open_row_counts: dict[int, int], blocks: BuildBlocks) -> Iterator[BlockTask]:
    """Yield the task of each block; each is made on request, because two million clips would fill the memory."""
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


def note_rows_beyond_clips(corpus: Corpus, outputs: Sequence[StoreOutput]) -> list[str]:
    """Return a sentence for each store whose clips are shorter than what some rows ask for: the rest is not stored."""
    notes = []
    seconds = (corpus.plan["end_seconds"] - corpus.plan["start_seconds"]).alias("seconds")
    for output in outputs:
        held_seconds = output.spec.clip_seconds
        longer = corpus.plan.select("clip_id", seconds).filter(pl.col("seconds") > held_seconds + 1e-3)
        if longer.height:
            clip_id, asked_seconds = longer.row(0)
            notes.append(
                f"{output.location}: {longer.height:,} of {corpus.plan.height:,} rows ask for more than the "
                f"{held_seconds:g} s of a clip, such as {clip_id!r} for {asked_seconds:g} s: only their first "
                f"{held_seconds:g} s are stored; choose longer clips, or cut them with a hop"
            )
    return notes
