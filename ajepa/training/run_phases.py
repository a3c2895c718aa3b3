"""Phases of a run: the steps that were trained by one recipe in one precision, and what may change between two."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from ajepa.recipes.catalogue import upgrade_recipe_json

# Fields of a recipe that may change from one phase to the next: the rate, and the length of a gradient.
CHANGEABLE_FIELDS = (
    "schedule.peak_lr",
    "schedule.start_lr",
    "schedule.end_lr",
    "max_gradient_norm",
    "base_lr",
    "end_lr",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPhase:
    """The steps of a run after `first_step`, up to the first one of the next phase.

    precision  fp32, bf16 or fp16; None: not recorded, by a version before there were phases
    versions   of the software at its beginning
    """

    first_step: int
    recipe: dict[str, Any]
    precision: str | None
    versions: dict[str, Any]

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The phase that `to_json` wrote, its recipe as this version writes it."""
        return cls(**{**record, "recipe": upgrade_recipe_json(record["recipe"])})

    def to_json(self) -> dict[str, Any]:
        """The phase as plain values."""
        return asdict(self)

    def trains_like(self, other: "RunPhase") -> bool:
        """Whether both have the same recipe and precision."""
        return (self.recipe, self.precision) == (other.recipe, other.precision)


def append_phase(phases: tuple[RunPhase, ...], new: RunPhase) -> tuple[RunPhase, ...]:
    """The phases with a new one, which takes the place of those that would begin where it does, or after it.

    A phase that goes on like the one before it is no new phase.
    """
    kept = tuple(phase for phase in phases if phase.first_step < new.first_step)
    if kept and kept[-1].trains_like(new):
        return kept
    return (*kept, new)
