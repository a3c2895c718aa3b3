"""Order: which rows in which order, a pure function of seed, step, rank and world."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.errors import InputError
from pipeline.sampling import FULL_SHUFFLE, Sampling


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Order:
    """Epochs of `rows_N` as `sampling` takes them, dealt to `world` ranks, `clips` rows to each a step.

    One step of all ranks takes `clips * world` places of the epoch, whoever they are dealt to: worlds with equal
    products see the same rows at the same step. What does not fill a last step is dropped, other rows each epoch.
    Raises InputError where an epoch does not fill a single step.
    """

    rows_N: np.ndarray
    clips: int
    seed: int
    rank: int = 0
    world: int = 1
    sampling: Sampling = FULL_SHUFFLE

    def __post_init__(self) -> None:
        if self.clips < 1 or not 0 <= self.rank < self.world:
            raise ValueError(
                f"clips must be 1 or more and rank in [0, {self.world}), got {self.clips}, {self.rank}"
            )
        if not self.steps_per_epoch:
            raise InputError(
                f"{self.clips_per_epoch} clips do not fill one step of {self.clips} clips"
                f"{f' on each of {self.world} ranks' if self.world > 1 else ''}; "
                "choose fewer clips per step (--batch), or more splits"
            )

    @property
    def clips_of_all_ranks(self) -> int:
        return self.clips * self.world

    @property
    def clips_per_epoch(self) -> int:
        return self.sampling.length(len(self.rows_N))

    @property
    def steps_per_epoch(self) -> int:
        return self.clips_per_epoch // self.clips_of_all_ranks

    def rows(self, step: int) -> np.ndarray:
        """The rows of this rank at a step counted from the start of training, int64 `rows_B`."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        first = step_of_epoch * self.clips_of_all_ranks + self.rank * self.clips
        places_N = _places(self.sampling, len(self.rows_N), self.seed, epoch)
        return np.asarray(self.rows_N, np.int64)[places_N[first : first + self.clips]]


# Four: training and validation, each with the epoch that the prefetch has begun; 16 MB at 2 M rows
@lru_cache(maxsize=4)
def _places(sampling: Sampling, rows: int, seed: int, epoch: int) -> np.ndarray:
    places_N = sampling.places(rows, seed, epoch)
    places_N.flags.writeable = False  # the cache hands out the same array again
    return places_N
