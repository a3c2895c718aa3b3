"""TrainedStore: a store that a run was trained on, by its place on the disk; `trained_stores` in recipe.json."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pipeline.object_store import is_remote_url
from pipeline.store.feature_store import FeatureStore


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedStore:
    """Where a store lay when a run was trained on it, and which of its clips trained; no part of the run's identity.

    location   absolute path, or URL
    splits     whose good clips trained
    label_set  the labels that were learnt; None: no labels
    """

    location: str
    store_id: str
    splits: tuple[str, ...]
    label_set: str | None = None

    @classmethod
    def from_store(cls, store: FeatureStore, splits: Sequence[str], label_set: str | None = None) -> Self:
        """The record of an open store, of which a run is trained on some splits, or on those of them that it has."""
        location = store.location
        return cls(
            location=location if is_remote_url(location) else str(Path(location).absolute()),
            store_id=store.store_id,
            splits=tuple(split for split in splits if split in store.split_names),
            label_set=label_set,
        )

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The store that `to_json` wrote."""
        return cls(**{**record, "splits": tuple(record["splits"])})

    def to_json(self) -> dict[str, Any]:
        """Location, id, splits and label set as plain values."""
        return asdict(self) | {"splits": list(self.splits)}
