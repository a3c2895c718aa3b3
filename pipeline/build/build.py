"""Build stores from a corpus: plan and open the stores, decode and write their clips, and finish the stores."""

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Self

import polars as pl

from pipeline.build.finish import BuildRecord, finish_store
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
    describe_changes,
    mark_unfinished,
    refuse_other_plan,
    remove_crash_debris,
    restore_header,
    restore_tables,
)
from pipeline.build.remote_store import RemoteStore
from pipeline.build.shard_builder import BlockTask, ShardBuilder, StoreTarget
from pipeline.build.workers import run_in_processes, run_on_ray_cluster
from pipeline.datasets.corpus import Corpus
from pipeline.errors import InputError, StoreError
from pipeline.files import WHOLE_BUILD, BuildPart, lock_shared_files, lock_store
from pipeline.store.header import StoreHeader
from pipeline.tables import read_table


@dataclass(kw_only=True, slots=True)
class OpenStore:
    """One store of a build, from its creation to its manifest; a store at a URL includes its remote side."""

    target: StoreTarget
    corpus: Corpus
    is_new: bool = False  # whether this build created the store; a new store needs no clean-up

    @classmethod
    def from_output(cls, corpus: Corpus, output: StoreOutput) -> Self:
        """Return the store that `output` describes; uses neither the disk nor the network."""
        remote_store = None
        if output.remote:
            remote_store = RemoteStore(url=output.remote, staging=output.path)
        target = StoreTarget(path=output.path, header=plan_store(corpus, output), remote_store=remote_store)
        return cls(target=target, corpus=corpus)

    def create(self) -> None:
        """Create the store if it does not exist; raises StoreError if the URL has a store with another plan."""
        path, header, remote_store = self.target.path, self.target.header, self.target.remote_store
        if remote_store is not None and (remote_header := remote_store.read_header()) is not None:
            refuse_other_plan(remote_store.url, remote_header, header, self._describe_remote_changes)
        if not path.exists() and create_store(path, header, self.corpus):
            # A new staging folder is not a new store: it still has to fetch the ledger of its remote store.
            self.is_new = remote_store is None

    @contextmanager
    def lock(self, part: BuildPart) -> Iterator[None]:
        """Lock the store for writing; raises StoreError if it has another plan or another process is writing it."""
        path, header = self.target.path, self.target.header
        restore_header(path, header)
        find_changes = partial(describe_changes, path, self.corpus.dataset_settings)
        refuse_other_plan(path, StoreHeader.read(path), header, find_changes)
        # Each part of a remote build has its own staging folder, so it locks the whole folder.
        held_part = part if self.target.remote_store is None else WHOLE_BUILD
        with lock_store(path, held_part):
            yield

    def _describe_remote_changes(self) -> list[str]:
        """Return what differs from the options with which the store at the URL was planned (`describe_changes`)."""
        assert self.target.remote_store is not None
        with self.target.remote_store.fetched_plan() as folder:
            return describe_changes(folder, self.corpus.dataset_settings)

    def clean_up(self, blocks: BuildBlocks) -> None:
        """Remove the files left by a crash, fetch the remote ledger, and restore tables that follow from the plan."""
        if self.is_new:
            return
        path, header, remote_store = self.target.path, self.target.header, self.target.remote_store
        with lock_shared_files(path):
            remove_crash_debris(path, header.layout, blocks)
            if remote_store is not None:
                remote_store.sync_ledger(partial(blocks.owns_shard, layout=header.layout))
            restore_tables(path, header, self.corpus)

    def mark_unfinished(self, open_row_counts: dict[int, int], blocks: BuildBlocks) -> None:
        """Mark the store as unfinished in its manifest, here and at the URL, if shards are still to be built."""
        remote_store = self.target.remote_store
        is_unfinished = mark_unfinished(
            self.target.path, self.target.header, self.corpus.plan, open_row_counts, blocks
        )
        if is_unfinished and remote_store is not None:
            remote_store.push_tables()

    def release_corpus(self) -> None:
        """Let go of the tables of the corpus, which take most of its memory."""
        self.corpus = replace(
            self.corpus,
            plan=self.corpus.plan.clear(),
            sources=replace(self.corpus.sources, frame=self.corpus.sources.frame.clear()),
        )

    def finish(self, build_record: BuildRecord | None, *, rewrite: bool) -> bool:
        """Write and push manifest and statistics; returns False while shards are missing."""
        target = self.target
        return finish_store(target.path, target.header, build_record, target.remote_store, rewrite=rewrite)


def build_stores(
    corpus: Corpus,
    outputs: Sequence[StoreOutput],
    options: BuildOptions = BuildOptions(),
    *,
    progress: RowProgress | None = None,
) -> list[pl.DataFrame | None]:
    """Build or continue stores as `run_build` does; returns their manifests, None while other parts are missing."""
    finished = run_build(corpus, outputs, options, progress=progress)
    return [
        read_table(output.path / "manifest.parquet")[0] if is_finished else None
        for output, is_finished in zip(outputs, finished, strict=True)
    ]


def run_build(
    corpus: Corpus,
    outputs: Sequence[StoreOutput],
    options: BuildOptions = BuildOptions(),
    *,
    progress: RowProgress | None = None,
    only_shards: Collection[int] | None = None,
    write_record: bool = True,
) -> list[bool]:
    """Build or continue stores in one decoding pass; returns whether each is finished, or lacks other parts.

    Good rows are not built again. Missing and failed rows are tried again if the corpus has a sound for them. With
    `only_shards`, a build of a single store tries only the rows of these shards, and writes its tables anew. With
    `write_record=False`, build.json is not changed. Raises InputError before anything is written.
    """
    with decoded_stores(
        corpus, outputs, options, progress=progress, only_shards=only_shards, write_record=write_record
    ) as finish:
        return finish()


@contextmanager
def decoded_stores(
    corpus: Corpus,
    outputs: Sequence[StoreOutput],
    options: BuildOptions,
    *,
    progress: RowProgress | None = None,
    only_shards: Collection[int] | None = None,
    write_record: bool = True,
) -> Iterator[Callable[[], list[bool]]]:
    """Do all of `run_build` but its end; yields a function that finishes the stores and returns what `run_build` does.

    From here on, the corpus is not needed any more: who has given it may free its memory before the stores are
    finished.
    """
    # Plan: nothing is written until all locations have been checked.
    began = time.monotonic()
    stores = [OpenStore.from_output(corpus, output) for output in outputs]
    _check_places([store.target for store in stores], corpus)

    # Open; leaving the block unlocks the stores.
    with open_stores(stores, options.part) as blocks:
        clips_tried = _decode_and_write(
            corpus, stores, blocks, options, only_blocks=only_shards, progress=progress
        )

        # Finish: for the part that ends last, the ledger has the records of all shards.
        record = None
        if write_record:
            record = _build_record(corpus, options, clips_tried=clips_tried, seconds=time.monotonic() - began)
        for store in stores:
            store.release_corpus()
        del corpus
        yield lambda: [store.finish(record, rewrite=only_shards is not None) for store in stores]


def build_store(
    corpus: Corpus,
    output: StoreOutput,
    options: BuildOptions = BuildOptions(),
    *,
    progress: RowProgress | None = None,
) -> pl.DataFrame:
    """Build or continue a single store as `build_stores` does; returns its manifest.

    Raises StoreError where other parts of the store are missing.
    """
    (manifest,) = build_stores(corpus, [output], options, progress=progress)
    if manifest is None:
        raise StoreError(
            f"{output.path}: part {options.part} is built, other parts are not; run the build of these too"
        )
    return manifest


@contextmanager
def open_stores(stores: Sequence[OpenStore], part: BuildPart) -> Iterator[BuildBlocks]:
    """Create, lock and clean up all stores; yields the blocks of `part`, and unlocks the stores afterwards."""
    for store in stores:
        store.create()
    with ExitStack() as locks:
        for store in stores:
            locks.enter_context(store.lock(part))
        blocks = BuildBlocks.of_part([store.target.header for store in stores], part)
        for store in stores:
            store.clean_up(blocks)
        yield blocks


def _decode_and_write(
    corpus: Corpus,
    stores: Sequence[OpenStore],
    blocks: BuildBlocks,
    options: BuildOptions,
    *,
    only_blocks: Collection[int] | None,
    progress: RowProgress | None,
) -> int:
    """Try every open row and commit the shards that it changes; returns how many rows were tried."""
    # From here on, readers must see that the stores are unfinished.
    targets = tuple(store.target for store in stores)
    open_row_counts = count_open_rows(targets, corpus, blocks, only_blocks)
    for store in stores:
        store.mark_unfinished(open_row_counts, blocks)

    # The tasks are made and the rows are tried on request, by the loop at the end of this function.
    builder = ShardBuilder(stores=targets, policy=options.policy)
    tried_rows = _run_build_tasks(builder, block_tasks(corpus, open_row_counts, blocks), options)
    if progress is not None:
        tried_rows = progress(sum(open_row_counts.values()), tried_rows)
    with builder.open_sound:
        return sum(1 for _ in tried_rows)


def _run_build_tasks(
    builder: ShardBuilder, tasks: Iterator[BlockTask], options: BuildOptions
) -> Iterator[int]:
    """Run the tasks with the engine of `options`; yields each row that is tried."""
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


def _check_places(targets: Sequence[StoreTarget], corpus: Corpus) -> None:
    """Raise InputError if two stores have the same location, StoreError if a disk has no room for the new stores."""
    paths = [target.path.resolve() for target in targets]
    if len(set(paths)) < len(paths):
        raise InputError("two stores with one path; give every --spec an --out of its own")

    clips = corpus.sources.frame.height - corpus.sources.frame["kind"].null_count()
    new = [target for target in targets if target.remote_store is None and not target.path.exists()]
    needed_bytes = sum(clips * target.header.layout.clip_bytes for target in new)
    for target in new:
        folder = next(parent for parent in target.path.resolve().parents if parent.exists())
        free_bytes = shutil.disk_usage(folder).free
        if needed_bytes > free_bytes:
            raise StoreError(
                f"{folder}: {free_bytes / 2**20:,.0f} MiB free, {clips:,} clips need "
                f"{needed_bytes / 2**20:,.0f} MiB; free some, or choose another --out or --dtype uint8"
            )


def _build_record(corpus: Corpus, options: BuildOptions, *, clips_tried: int, seconds: float) -> BuildRecord:
    """Return the content of build.json: the inputs, settings and software versions of the build."""
    values = {
        "asked": corpus.dataset_settings,
        "notes": list(corpus.notes),
        "policy": asdict(options.policy),
        "workers": options.workers,
        "limit_seconds": options.clip_limit_seconds,
        "part": str(options.part),
        **corpus.sound_counts,
        "clips_tried": clips_tried,
        "seconds": round(seconds, 1),
    }
    return BuildRecord(values=values, versions=current_versions)
