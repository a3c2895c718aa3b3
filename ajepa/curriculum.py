"""step -> MaskMaker; the plans that have a name."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ajepa.masking import MaskMaker, RandomBlocks, RandomPatches, TimeFrequencyAware, TimeSpans
from ajepa.schedules import curriculum_share
from pipeline.errors import RunError

MASKS = int.from_bytes(b"masks")  # names the stream, as `pipeline.augment.draws` names its own


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The randomness of one training step, of all ranks together: masks, drop path, patchout."""
    return np.random.default_rng([seed, step, MASKS])


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

    `f` is `schedules.curriculum_share`, `steps` the length of the whole run.
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


def a_jepa_curriculum(steps: int) -> Curriculum:
    """Random blocks that give way to time-frequency aware masks (arXiv 2311.15830)."""
    return Curriculum(earlier=RandomBlocks(), later=TimeFrequencyAware(), steps=steps)


def inverse_curriculum(steps: int) -> Curriculum:
    """The same with the two exchanged: the paper's ablation."""
    return Curriculum(earlier=TimeFrequencyAware(), later=RandomBlocks(), steps=steps)


PLANS: dict[str, Callable[[int], MaskPlan]] = {
    "curriculum": a_jepa_curriculum,
    "inverse": inverse_curriculum,
    "blocks": lambda steps: Fixed(masking=RandomBlocks()),
    "time-frequency": lambda steps: Fixed(masking=TimeFrequencyAware()),
    "patches": lambda steps: Fixed(masking=RandomPatches()),
    "spans": lambda steps: Fixed(masking=TimeSpans()),
}


def mask_plan(name: str, steps: int) -> MaskPlan:
    """The plan of that name for a run of `steps`; RunError names the nearest and all there are."""
    if name in PLANS:
        return PLANS[name](steps)
    nearest = difflib.get_close_matches(name, PLANS, n=1, cutoff=0.0)[0]
    raise RunError(f"masks {name!r} are unknown; did you mean {nearest!r}? There are: {', '.join(PLANS)}")
