"""Rows: what an audit looks at: every clip of a store, which of them are in use, and which splits are held out."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

from pipeline.audit_copies import recordings
from pipeline.errors import StoreError
from pipeline.holdout import measured_splits
from pipeline.labels import OntologyGone, ontology_of
from pipeline.ontology import ClassList, Ontology
from pipeline.propagation import RULES
from pipeline.report import GOOD
from pipeline.store import FeatureStore
from pipeline.tables import read_table


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """A manifest, labels.parquet beside it, and what each row counts as."""

    manifest: pl.DataFrame
    labels: pl.DataFrame
    provenance: dict[str, Any]  # of the label sets, as labels.parquet has it
    classes: ClassList
    recording: pl.Series  # what each clip was cut from
    excluded_N: np.ndarray  # marked by an exclude list
    lists: tuple[tuple[str, str, int], ...]  # the exclude lists: name, sha256, clips
    splits: tuple[str, ...]  # in the order of the manifest
    measured: tuple[str, ...]  # those held out
    ontologies: dict[str, Ontology]  # of the propagated sets, where they can be had

    @classmethod
    def of(cls, store: FeatureStore, measured: Sequence[str] = ()) -> Self:
        """All of a store; held out are the splits named, or else those named eval or test. StoreError."""
        labels, provenance = read_table(store.path / "labels.parquet")
        splits = tuple(store.manifest["split"].unique(maintain_order=True))
        if unknown := sorted(set(measured) - set(splits)):
            raise StoreError(f"{store.path}: no split {unknown[0]!r}; it has: {', '.join(splits)}")
        return cls(
            manifest=store.manifest,
            labels=labels,
            provenance=provenance,
            classes=store.classes,
            recording=recordings(store.manifest, _dataset(store)),
            excluded_N=store.excluded.marks_N(store.manifest),
            lists=tuple(store.excluded.lists()),
            splits=splits,
            measured=tuple(measured) or measured_splits(splits),
            ontologies=dict(_ontologies(store.path, provenance)),
        )

    @property
    def good_N(self) -> np.ndarray:
        return self.manifest.select(GOOD).to_series().to_numpy()

    @property
    def use_N(self) -> np.ndarray:
        """Good, and not excluded: what loaders draw from."""
        return self.good_N & ~self.excluded_N

    @property
    def split_N(self) -> np.ndarray:
        """The index of each row's split."""
        enum = pl.Enum(list(self.splits))
        return self.manifest["split"].cast(enum).to_physical().to_numpy().astype(np.int64)

    @property
    def measured_S(self) -> np.ndarray:
        """Whether each split is held out."""
        return np.isin(self.splits, self.measured)

    def clips(self) -> pl.DataFrame:
        """The clips in use, as `audit_copies.copies` wants them. One silence is like another: it is not compared."""
        audio = pl.when(~pl.col("flags").list.contains("silent")).then("digest")
        return self.manifest.select(
            "clip_id",
            audio=audio,
            row=pl.int_range(pl.len(), dtype=pl.Int64),
            split=pl.Series(self.split_N),
            recording=self.recording,
            raw=self.labels["raw"],
        ).filter(self.use_N)


def _ontologies(store: Path, provenance: dict[str, Any]) -> Iterator[tuple[str, Ontology]]:
    """Of each propagated label set; a set that does not say which, or whose is gone, is left out."""
    for name, by in provenance.items():
        if isinstance(by, dict) and by.get("rule") in RULES and "ontology" in by:
            with suppress(OntologyGone):
                yield name, ontology_of(store, by["rule"], by["ontology"])


def _dataset(store: FeatureStore) -> str | None:
    """What build.json says the store was built from; None where it does not say."""
    try:
        asked = json.loads((store.path / "build.json").read_text())["asked"]
        return asked["dataset"] if isinstance(asked, dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
