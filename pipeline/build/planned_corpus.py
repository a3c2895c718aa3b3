"""The corpus of a build whose store may have its plan already: from the store, or from the lists and folders."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import polars as pl

from pipeline.audio.sources import SOURCES_SCHEMA
from pipeline.build.plan import StoreOutput, plan_store
from pipeline.build.plan_files import (
    SourcesRecord,
    read_sources_record,
    read_stored_corpus,
)
from pipeline.build.prepare import read_build_record
from pipeline.datasets.catalogue import recreate_corpus
from pipeline.datasets.corpus import Corpus, CorpusRequest
from pipeline.errors import StoreError
from pipeline.messages import count_phrase, print_to_stderr
from pipeline.object_store import is_remote_url
from pipeline.store.header import StoreHeader


def corpus_of_request(request: CorpusRequest, stores: Sequence[Path], *, rescan: bool = False) -> Corpus:
    """Return the corpus of a build command: that of the first of its stores which was planned by the same command.

    A plan never changes, so the lists and folders are read again only if no store has one, if the command is another,
    if a list or an archive has changed, or with `rescan`, which looks for sounds that came since. Prints what is used.
    Raises InputError.
    """
    # A plan by the same command, with the lists that are there now.
    found = _find_stored_plan(request, stores)
    if found is None:
        corpus = request.make()
        is_same = corpus.dataset_settings == request.settings
        return replace(corpus, requested_settings=None if is_same else request.settings)
    store, header, record = found
    stored = read_stored_corpus(store, header, record)

    # What the request stands for may have moved since, as a branch of the hub does; the plan is of what it was.
    is_same = record.asked == request.settings
    look_again = request.make if is_same else partial(recreate_corpus, record.asked)

    # Look for sounds again, or do not.
    if rescan:
        return rescan_sounds(stored, look_again())
    if archive := record.changed_archive():
        change = "has changed" if os.path.exists(archive) or is_remote_url(archive) else "is gone"
        print_to_stderr(f"{archive}: {change} since it was listed, so the sounds are looked up again")
        return rescan_sounds(stored, look_again())
    missing = stored.sources.frame["kind"].null_count()
    print_to_stderr(
        f"{store}: its clips and sounds are those that were found when they were last looked up, and are not looked up "
        f"again: {missing:,} of {stored.plan.height:,} had no sound then. --rescan fills rows whose sound was missing; "
        "a store never grows, so new sounds go into another store"
    )
    return stored


def _find_stored_plan(
    request: CorpusRequest, stores: Sequence[Path]
) -> tuple[Path, StoreHeader, SourcesRecord] | None:
    """Return the first store that was planned by the same command from the same lists; None if there is none."""
    for store in stores:
        record = read_sources_record(store)
        if record is None or request.settings not in (record.asked, record.requested):
            continue
        if record.changed_list() is not None:
            continue
        try:
            return store, StoreHeader.read(store), record
        except StoreError:
            continue  # the build mends a damaged header, but needs the corpus for that
    return None


def rescan_sounds(stored: Corpus, found: Corpus) -> Corpus:
    """Return the stored plan with the sounds of `found`, the corpus that the same command gives now.

    Rows keep their clips. A row whose clip is not found keeps its place of a sound. Clips that are found and have no
    row are left out, and counted in a note.
    """
    # Clips are the same if id, split and start are.
    assert stored.stored_plan is not None
    keys = ["clip_id", "split", "start_seconds"]
    is_found = found.sources.frame["kind"].is_not_null()
    places = pl.concat(
        [found.plan.select(keys), found.sources.frame.select(*SOURCES_SCHEMA)], how="horizontal"
    )
    places = places.filter(is_found).unique(keys, keep="first", maintain_order=True)
    joined = stored.plan.select(keys).join(places, on=keys, how="left", maintain_order="left")

    # The new place, or the old one; a place is taken as a whole.
    use_new = joined["kind"].is_not_null()
    old = stored.sources.frame
    frame = pl.DataFrame([joined[name].zip_with(use_new, old[name]) for name in SOURCES_SCHEMA])

    # Clips without a row.
    notes = found.notes
    others = found.plan.select(keys).join(stored.plan.select(keys), on=keys, how="anti")
    if others.height:
        notes += (
            f"{count_phrase(others.height, 'clip')} came since the store was planned, such as {others['clip_id'][0]}; "
            "a plan never changes, so they get no row: build another store of them",
        )
    return replace(
        stored,
        sources=replace(stored.sources, frame=frame),
        notes=notes,
        stored_plan=replace(stored.stored_plan, sound_counts=found.sound_counts, is_current=False),
    )


def corpus_as_built(path: Path, header: StoreHeader) -> Corpus:
    """Return the corpus from which a store was built: from its own files, or else from those that build.json names.

    Raises StoreError if build.json is missing or damaged, or if the lists and folders are needed and now give another
    plan.
    """
    settings = read_build_record(path)["asked"]
    record = read_sources_record(path)
    if record is not None and record.asked == settings and record.changed_archive() is None:
        return read_stored_corpus(path, header, record)

    corpus = recreate_corpus(settings)
    if plan_store(corpus, StoreOutput(path=path, spec=header.spec, dtype=header.layout.dtype)) != header:
        raise StoreError(
            f"{path}: was planned from other clips, lists or classes than are there now; "
            f"put back what {path / 'build.json'} says it was built from"
        )
    return corpus
