"""step -> MaskMaker."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ajepa.masking import MaskMaker
from ajepa.schedules import curriculum_share


class MaskPlan(Protocol):
    """Which masking a step uses. `rng` is the generator of that step; the same one then draws the masks."""

    def maker(self, step: int, rng: np.random.Generator) -> MaskMaker: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """The same masking at every step; draws nothing from the generator."""

    masking: MaskMaker

    def maker(self, step: int, rng: np.random.Generator) -> MaskMaker:
        return self.masking


@dataclass(frozen=True, kw_only=True, slots=True)
class Curriculum:
    """From one masking to another: at step `s` the later one with probability `f(s)`.

    A-JEPA (arXiv 2311.15830) goes from `RandomBlocks` to `TimeFrequencyAware`; the inverse of its ablation is
    the same with the two exchanged. `f` is `schedules.curriculum_share`, `steps` the length of the whole run.
    """

    earlier: MaskMaker
    later: MaskMaker
    steps: int
    first_share: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.first_share <= 1:
            raise ValueError(f"a curriculum needs steps >= 1 and a first share in [0, 1], got {self}")

    def maker(self, step: int, rng: np.random.Generator) -> MaskMaker:
        share = curriculum_share(step, steps=self.steps, first=self.first_share)
        return self.later if rng.random() < share else self.earlier
