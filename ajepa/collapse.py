"""Collapse: an encoder that says nearly the same of everything, told from its signs of health."""

from collections.abc import Sequence
from itertools import takewhile

from ajepa.run import Json

LEAST_SPREAD, LEAST_RANK, LEAST_CONTENT = 0.2, 4.0, 0.02
PATIENCE = 3  # looks in a row: healthy runs may pass through a dip
ADVICE = (
    "try a lower schedule.peak_lr, a slower teacher (schedule.ema_start nearer 1), model.loss=l2 or "
    "model.targets=projection"
)


def signs(look: Json) -> list[str]:
    """What of `health.health` means collapse, in words; nothing where all is well.

    spread under LEAST_SPREAD    PLACEHOLDER
    """
    found = []
    if (spread := look["health_spread"]) < LEAST_SPREAD:
        found.append(f"features deviate by {spread:.0%} of their size (healthy: over {LEAST_SPREAD:.0%})")
    if (rank := look["health_rank"]) < LEAST_RANK:
        found.append(f"their effective rank is {rank:.1f} (over {LEAST_RANK:g})")
    if (content := look["health_content"]) < LEAST_CONTENT:
        found.append(f"{content:.1%} of their variance is not position (over {LEAST_CONTENT:.0%})")
    return found


def in_a_row(looks: Sequence[Json]) -> int:
    """How many of the last looks at a run's health, without a break, found it collapsed."""
    return len(list(takewhile(signs, reversed(looks))))
