"""Blocks: which rows a build works through in one go, which of them are open, and the task each comes to."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.corpus import Corpus
from pipeline.files import Part
from pipeline.header import Header
from pipeline.ledger import read_commit
from pipeline.shardmaker import BlockTask, Clip
from pipeline.shards import Layout


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
