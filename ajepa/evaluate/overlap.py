"""How many measured clips have the same sound as clips that the run was trained on, told by digests of the audio."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ajepa.training.run import Json, Run
from ajepa.training.trained_stores import TrainedStore
from pipeline.errors import InputError
from pipeline.object_store import is_remote_url
from pipeline.store.feature_store import FeatureStore


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOverlap:
    """The number of measured clips whose sound, sample for sample, is that of a clip that the run was trained on.

    with_labels       clips whose sound was trained on with labels
    without_labels    the others, whose sound was trained on without
    unchecked_stores  names of stores that the run was trained on, and that are no longer where they were
    compared          whether any store could be compared; False: the counts are 0 and say nothing
    """

    with_labels: int
    without_labels: int
    unchecked_stores: tuple[str, ...] = ()
    compared: bool = True

    @classmethod
    def from_json(cls, record: Json) -> "TrainingOverlap":
        return cls(**{**record, "unchecked_stores": tuple(record["unchecked_stores"])})

    def to_json(self) -> Json:
        """The value under `training_overlap` in evaluation.json; `compared` is there only where it is false."""
        record = asdict(self) | {"unchecked_stores": list(self.unchecked_stores)}
        if self.compared:
            del record["compared"]
        return record

    def describe(self, eval_clips: int) -> Iterator[str]:
        """Yield a phrase for each kind of overlap, or that there is none; then the stores that were not compared."""
        for clips, meaning in (
            (self.with_labels, "with their labels: its scores on these clips mean nothing"),
            (self.without_labels, "without labels: scores may be a little high"),
        ):
            if clips:
                yield (
                    f"{clips} of {eval_clips} measured clips have the same sound as clips that the run was trained on, "
                    f"{meaning}"
                )
        if self.compared and not (self.with_labels or self.without_labels):
            yield f"none of the {eval_clips} measured clips has the sound of a clip that trained the run"
        if self.unchecked_stores:
            which = "it is" if len(self.unchecked_stores) == 1 else "each is"
            yield (
                f"not compared with {', '.join(self.unchecked_stores)}, which trained the run: {which} no longer where "
                "it was, or at a URL"
            )


def measure_overlap(
    run: Run, store: FeatureStore, eval_N: np.ndarray, *, is_own_store_told: bool = False
) -> TrainingOverlap | None:
    """Compare the sounds of some rows of a store with those that the run, and what it started from, was trained on.

    `is_own_store_told`: the user knows already that the run was trained on this very store, which is left out. None
    where there is nothing to compare: the run does not say where its stores lie, or this store alone trained it.
    """
    measured = store.manifest_columns("digest")[eval_N].with_row_index("place")
    is_seen = {with_labels: np.zeros(len(eval_N), bool) for with_labels in (True, False)}
    unchecked = []
    checked = 0
    for trained in run.trained_stores:
        is_own = trained.store_id == store.store_id
        if is_own and is_own_store_told:
            continue
        try:
            trained_store = store if is_own else open_trained_store(trained)
            digests = trained_digests(trained, trained_store) if trained_store is not None else None
        except (InputError, OSError):
            digests = None
        if digests is None:
            unchecked.append(Path(trained.location).name)
            continue

        # A hash table of the measured digests is small; clips without a digest are equal to none.
        checked += 1
        shared = digests.join(measured, on="digest", how="semi")
        seen = measured.join(shared, on="digest", how="semi")["place"]
        is_seen[trained.label_set is not None][seen.to_numpy()] = True
    if not checked and not unchecked:
        return None
    return TrainingOverlap(
        with_labels=int(is_seen[True].sum()),
        without_labels=int((is_seen[False] & ~is_seen[True]).sum()),
        unchecked_stores=tuple(dict.fromkeys(unchecked)),
        compared=bool(checked),
    )


def open_trained_store(trained: TrainedStore) -> FeatureStore | None:
    """The store that a run was trained on; None where it is at a URL, or another store is in its place."""
    if is_remote_url(trained.location):
        return None
    store = FeatureStore.open(trained.location)
    return store if store.store_id == trained.store_id else None


def trained_digests(trained: TrainedStore, store: FeatureStore) -> pl.DataFrame:
    """The column `digest` of the clips that trained; of labels, the clips that have one."""
    rows_N = store.good_rows(trained.splits)
    if trained.label_set is not None:
        _, offsets_N = store.flat_labels(trained.label_set)
        rows_N = rows_N[np.diff(offsets_N)[rows_N] > 0]
    return store.manifest_columns("digest")[rows_N]


def add_overlaps(overlaps: Iterable[TrainingOverlap | None]) -> TrainingOverlap | None:
    """The overlap of several folds' clips together; None where one of them is not known."""
    known = []
    for overlap in overlaps:
        if overlap is None:
            return None
        known.append(overlap)
    return TrainingOverlap(
        with_labels=sum(overlap.with_labels for overlap in known),
        without_labels=sum(overlap.without_labels for overlap in known),
        unchecked_stores=tuple(dict.fromkeys(name for overlap in known for name in overlap.unchecked_stores)),
        compared=all(overlap.compared for overlap in known),
    )
