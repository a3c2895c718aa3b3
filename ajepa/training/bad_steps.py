"""Bad steps of a run: whether it ends at the first one, or passes over them, and how many it may pass over."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ajepa.training.distributed import World
from pipeline.errors import RunError

OnBadStep = Literal["stop", "skip"]

# The key of a metrics line that counts the bad steps since the line before; absent where there was none.
BAD_STEPS_METRIC = "bad_steps"

# The most bad steps that a run passes over: without a good one in between, and in all. More are no accident.
MAX_BAD_STEPS_IN_A_ROW = 10
MAX_BAD_STEPS = 100

# The clips and draws of so many are kept, for each is as large as the clips of a step.
MAX_KEPT_BAD_STEPS = 3


def refuse_unknown_choice(on_bad_step: str) -> None:
    """RunError where bad steps shall neither stop a run nor be passed over."""
    if on_bad_step not in get_args(OnBadStep):
        raise RunError(f"on_bad_step must be {' or '.join(get_args(OnBadStep))}, got {on_bad_step!r}")


@dataclass(kw_only=True, slots=True)
class BadSteps:
    """The bad steps of a run so far; the same on every rank.

    on_bad_step  stop: the run ends at its first bad step; skip: bad steps are passed over, up to the limits
    """

    on_bad_step: OnBadStep = "stop"
    in_all: int = 0
    in_a_row: int = 0

    def __post_init__(self) -> None:
        refuse_unknown_choice(self.on_bad_step)

    def resume_counts(self, metrics: Sequence[dict[str, Any]], steps_done: int, world: World) -> None:
        """Count on from the metrics of the steps done, which have a line for every bad one; only of the main rank."""
        bad = [line["step"] for line in metrics if BAD_STEPS_METRIC in line]
        in_a_row = 0
        while steps_done - in_a_row in bad:
            in_a_row += 1

        # The other ranks add nothing to the counts of the main one.
        counts = (len(bad), in_a_row) if world.is_main else (0, 0)
        self.in_all, self.in_a_row = map(int, world.sum_over_ranks(*counts))

    def count_bad_step(self) -> None:
        """Count a step that was not taken."""
        self.in_all += 1
        self.in_a_row += 1

    def count_good_step(self) -> None:
        """Count a step that was taken."""
        self.in_a_row = 0

    @property
    def keeps_clips(self) -> bool:
        """Whether the clips and draws of the newest bad step are kept."""
        return self.stop_reason() is not None or self.in_all <= MAX_KEPT_BAD_STEPS

    def stop_reason(self, *, has_broken_clips: bool = False) -> str | None:
        """Why the run ends at its newest bad step, and what to do next; None where it is passed over.

        has_broken_clips  the clips of the step hold nan, which no other setting mends
        """
        skip = "pass over bad steps: --on-bad-step skip"
        change = (
            "carry on with a lower rate or a shorter gradient (--set), or --precision fp32, which is recorded"
        )
        if self.on_bad_step == "stop":
            return f"or {skip}" if has_broken_clips else f"{change}; or {skip}"
        if self.in_a_row >= MAX_BAD_STEPS_IN_A_ROW:
            return f"the {self.in_a_row}th bad step in a row is no accident; {change}"
        if self.in_all >= MAX_BAD_STEPS:
            return f"the {self.in_all}th bad step of the run, more than are passed over; {change}"
        return None
