"""Collapse: an encoder that says nearly the same of everything, told from its signs of health."""

from collections.abc import Sequence
from itertools import takewhile

from ajepa.run import Json

LEAST_RANK = 4.0  # effective; `health_rank`
LEAST_CONTENT = 0.02  # `health_content`
MOST_DEAD = 0.5  # `health_dead`
PATIENCE = 3  # looks in a row: some healthy runs pass through a dip of one

ADVICE = (
    "try a lower schedule.peak_lr, a slower teacher (schedule.ema_start nearer 1), model.loss=l2, or "
    "model.targets=projection"
)


def signs(line: Json) -> list[str]:
    """What in a logged line with `health_...` values means collapse, in words; nothing where all is well.

    The thresholds stand apart from what was seen (250 steps of `smoke` on 2,000 clips, and of the tests' tiny
    recipe): PLACEHOLDER
    """
    found = []
    if line["health_rank"] < LEAST_RANK:
        found.append(f"effective rank {line['health_rank']:.1f} (under {LEAST_RANK:g})")
    if line["health_content"] < LEAST_CONTENT:
        found.append(
            f"{line['health_content']:.1%} of the variance is not position (under {LEAST_CONTENT:.0%})"
        )
    if line["health_dead"] > MOST_DEAD:
        found.append(f"{line['health_dead']:.0%} of the dimensions are dead (over {MOST_DEAD:.0%})")
    return found


def in_a_row(looks: Sequence[Json]) -> int:
    """How many of the last looks at a run's health, without a break, found it collapsed."""
    return len(list(takewhile(signs, reversed(looks))))
