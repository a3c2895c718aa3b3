"""EmbeddingJob: the sounds of which `embed` and `predict` make a table, from files, folders and archives or a store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ajepa.embed.sound_inputs import directory_entry, path_as_given, sound_path, sounds_at_location
from ajepa.embed.sound_rows import SoundRow, digest_as_given, digest_paths
from ajepa.embed.windows import SoundStream
from ajepa.training.run import Json
from pipeline.audio.mel_spec import MelSpec
from pipeline.audio.sources import SoundLocator
from pipeline.errors import InputError, RunError
from pipeline.store.feature_store import FeatureStore

# A folder that contains this file is a store.
STORE_MARKER_FILE = "zarr.json"


class SoundReader(Protocol):
    """A model as its jobs see it: `Embedder` or `Predictor`, each of which reads sounds with its own front end."""

    @property
    def mel(self) -> MelSpec: ...
    def file_opener(self, locator: SoundLocator) -> Callable[[], SoundStream]: ...
    def row_opener(self, store: FeatureStore, row: int) -> Callable[[], SoundStream]: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EmbeddingJob:
    """The rows of a table in order, a function that opens the sound of a row, and the identity of all sounds."""

    rows: Sequence[SoundRow]
    row_opener: Callable[[int], Callable[[], SoundStream]]
    source_identity: Json

    @classmethod
    def from_store(cls, store: FeatureStore, model: SoundReader) -> "EmbeddingJob":
        """Return the job for all good clips of a store; RunError if there are none or the mel spec does not match."""
        store.refuse_other_front_end(model.mel, "the model needs")
        rows_N = store.good_rows()
        if not len(rows_N):
            raise RunError(f"{store.location}: has no good clip to embed; ajepa-data report tells why")

        # Collect the names of each clip's raw labels.
        clips = store.manifest[rows_N]
        indices_N, offsets_N = store.flat_labels()
        labels = [
            tuple(store.classes.names[index] for index in indices_N[offsets_N[row] : offsets_N[row + 1]])
            for row in rows_N.tolist()
        ]

        # The exclusion list is part of the identity: a table begun before an exclusion is not carried on.
        identity = {"store_id": store.store_id, "rows": len(rows_N)}
        if store.exclusions.digest is not None:
            identity["excluded"] = store.exclusions.digest
        columns = zip(clips["clip_id"], clips["source"], labels, strict=True)
        return cls(
            rows=[SoundRow(clip_id=clip_id, path=path, labels=names) for clip_id, path, names in columns],
            row_opener=lambda number: model.row_opener(store, int(rows_N[number])),
            source_identity=identity,
        )

    @classmethod
    def from_locations(cls, locations: Sequence[str], model: SoundReader) -> "EmbeddingJob":
        """Return the job for files and all sounds in folders and archives; InputError if a location has none.

        A sound to which several locations lead is one row, with its path from the first of them. The identity is that
        of the absolute paths; the one of a table (`identity_for`) also has that of the paths as given.
        """
        locators: dict[str, SoundLocator] = {}
        rows: list[SoundRow] = []
        for location in locations:
            for locator in sounds_at_location(location):
                entry = sound_path(locator, directory_entry(locator.path))
                if locators.setdefault(entry, locator) is locator:
                    path = path_as_given(locator, location)
                    rows.append(SoundRow(clip_id=path, path=path, absolute_path=sound_path(locator)))

        found = list(locators.values())
        return cls(
            rows=rows,
            row_opener=lambda number: model.file_opener(found[number]),
            source_identity={"sounds": digest_paths(map(sound_path, found)), "rows": len(rows)},
        )

    def identity_for(self, table: Path) -> Json:
        """Return the identity of all sounds for the plan of the table at a path, with which it may move."""
        given = digest_as_given(self.rows, table)
        return self.source_identity if given is None else self.source_identity | {"given": given}


def make_embedding_job(locations: Sequence[str], model: SoundReader, **store_options: Any) -> EmbeddingJob:
    """Return the job for one store, opened with its options, or for files, folders and archives; raises InputError."""
    stores = [location for location in locations if is_store(location)]
    if stores and len(locations) > 1:
        raise InputError(f"{stores[0]}: is a store; embed each store in a command of its own")
    if stores:
        return EmbeddingJob.from_store(FeatureStore.open(stores[0], **store_options), model)
    return EmbeddingJob.from_locations(locations, model)


def is_store(location: str) -> bool:
    """Return whether a location is a feature store: its name ends in .zarr, or it contains STORE_MARKER_FILE."""
    return location.rstrip("/").endswith(".zarr") or (Path(location) / STORE_MARKER_FILE).is_file()
