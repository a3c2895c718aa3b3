"""The plan of a store on its disk: which clip is which row, and where its sound is. Later runs need no lists or walks.

    plan.parquet     the columns of PLAN_SCHEMA, `mids` and `duplicate` (`pipeline.store.plan_file`)
    sources.parquet  the place of each row's sound (SOURCES_SCHEMA, absolute paths) and, in the schema's metadata, a
                     `SourcesRecord`; as build.json, it differs between equal builds. `--rescan` writes it anew

A store that has no such files, because an older version made it, gets them from its next build.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import polars as pl

from pipeline.audio.sources import SOURCES_SCHEMA, ClipSources
from pipeline.datasets.catalogue import list_files
from pipeline.datasets.corpus import Corpus, StoredPlan
from pipeline.errors import StoreError
from pipeline.object_store import is_remote_url, object_versions
from pipeline.store.header import StoreHeader
from pipeline.store.manifest import PLAN_SCHEMA
from pipeline.store.plan_file import PLAN_FILE, PLAN_FILE_COLUMNS, SOURCES_FILE
from pipeline.tables import frame_digest, read_table, read_table_schema, write_table


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcesRecord:
    """What sources.parquet says of its corpus besides the places: JSON values, a format of the disk.

    plan_digest   that of the store's header: the places are those of its rows
    asked         `Corpus.dataset_settings`
    clip_seconds  `Corpus.clip_seconds`
    notes         `Corpus.notes`
    sounds        `Corpus.sound_counts`
    lists         SHA-256 of each list or table that decides the plan, by its path
    archives      version of each file that contains several sounds, by its path or URL; a place in another version of
                  the archive may be that of another sound
    requested     `Corpus.requested_settings`
    """

    plan_digest: str
    asked: dict[str, Any]
    clip_seconds: float | None
    notes: tuple[str, ...]
    sounds: dict[str, Any]
    lists: dict[str, str]
    archives: dict[str, str]
    requested: dict[str, Any] | None = None

    @classmethod
    def of_corpus(cls, corpus: Corpus, plan_digest: str) -> Self:
        """Return the record of a corpus whose lists and archives are on the disk now."""
        digests = {str(path): digest_list(path) for path in list_files(corpus.dataset_settings)}
        in_archives = pl.col("kind") != "file"
        archives = corpus.sources.frame.filter(in_archives)["path"].unique().sort()
        return cls(
            plan_digest=plan_digest,
            asked=corpus.dataset_settings,
            clip_seconds=corpus.clip_seconds,
            notes=corpus.notes,
            sounds=corpus.sound_counts,
            lists={path: digest for path, digest in digests.items() if digest is not None},
            archives=archive_versions(map(absolute_location, archives)),
            requested=corpus.requested_settings,
        )

    def changed_list(self) -> str | None:
        """Return a list or table that is there and no longer what it was; None if there is none."""
        for path, digest in self.lists.items():
            if digest_list(Path(path)) not in (digest, None):
                return path
        return None

    def changed_archive(self) -> str | None:
        """Return an archive that is there and no longer what it was; None if there is none.

        Of a dataset that was fetched from the hub also one that is gone: the hub's cache may have been emptied.
        """
        versions = archive_versions(self.archives)
        changed = [path for path, version in versions.items() if self.archives[path] != version]
        if self.asked.get("revision") is not None:
            changed += [path for path in self.archives if path not in versions]
        return next(iter(changed), None)


def digest_list(path: Path) -> str | None:
    """Return the SHA-256 of a list; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def archive_versions(locations: Iterable[str]) -> dict[str, str]:
    """Return the version of every archive that is there: size and time of change, or what an object store calls it."""
    versions: dict[str, str] = {}
    versions_by_folder: dict[str, dict[str, str]] = {}
    for location in locations:
        if is_remote_url(location):
            # One request for all archives of a folder.
            folder, _, name = location.rpartition("/")
            if folder not in versions_by_folder:
                versions_by_folder[folder] = object_versions(folder)
            if name in versions_by_folder[folder]:
                versions[location] = versions_by_folder[folder][name]
            continue
        try:
            status = os.stat(location)
        except OSError:
            continue
        versions[location] = f"{status.st_size} {status.st_mtime_ns}"
    return versions


def absolute_location(path: str) -> str:
    """Return a path as an absolute one; a URL is returned unchanged."""
    return path if is_remote_url(path) else os.path.abspath(path)


def write_sources_file(folder: Path, corpus: Corpus, plan_digest: str) -> None:
    """Write sources.parquet for the store whose header has this digest of the plan.

    Raises InputError if an object store with archives does not answer.
    """
    # Relative paths count from the folder in which this command runs; the next one may run elsewhere.
    path = pl.col("path")
    is_absolute = path.str.starts_with("/") | path.str.contains("://", literal=True)
    here = pl.lit(f"{os.getcwd()}/")
    frame = corpus.sources.frame.with_columns(path=pl.when(is_absolute).then(path).otherwise(here + path))
    record = SourcesRecord.of_corpus(corpus, plan_digest)
    write_table(folder / SOURCES_FILE, frame.select(*SOURCES_SCHEMA), asdict(record))


def read_sources_record(store: Path) -> SourcesRecord | None:
    """Return the record in sources.parquet; None if a store lacks it or the plan, or they cannot be read."""
    try:
        plan_schema, _ = read_table_schema(store / PLAN_FILE)
        sources_schema, values = read_table_schema(store / SOURCES_FILE)
        record = SourcesRecord(**values | {"notes": tuple(values["notes"])})
    except (StoreError, TypeError, KeyError):
        return None
    has_columns = list(plan_schema) == list(PLAN_FILE_COLUMNS) and dict(sources_schema) == SOURCES_SCHEMA
    return record if has_columns else None


def read_stored_corpus(store: Path, header: StoreHeader, record: SourcesRecord) -> Corpus:
    """Return the corpus of a store from its own files; StoreError if one of them is damaged.

    Its plan lacks `mids`, which take a third of the memory, and which `plan_with_labels` adds where they are needed.
    """
    plan, _ = read_table(store / PLAN_FILE, [name for name in PLAN_FILE_COLUMNS if name != "mids"])
    frame, _ = read_table(store / SOURCES_FILE)
    digests = {record.plan_digest, frame_digest(plan.select(*PLAN_SCHEMA)), header.plan_digest}
    if len(digests) > 1 or frame.height != plan.height:
        raise StoreError(
            f"{store}: {PLAN_FILE} or {SOURCES_FILE} is not of this store; delete both, and build again"
        )
    return Corpus(
        plan=plan,
        sources=ClipSources(frame=frame, sound_count=record.sounds["audio_files"]),
        classes=header.classes,
        dataset_settings=record.asked,
        requested_settings=record.requested,
        clip_seconds=record.clip_seconds,
        notes=record.notes,
        stored_plan=StoredPlan(store=store, header=header, sound_counts=record.sounds),
    )


def plan_with_labels(corpus: Corpus) -> pl.DataFrame:
    """Return the plan of a corpus with `mids`, which are read if the corpus was read from a store."""
    if corpus.stored_plan is None:
        return corpus.plan
    mids, _ = read_table(corpus.stored_plan.store / PLAN_FILE, ["mids"])
    return corpus.plan.with_columns(mids["mids"])
