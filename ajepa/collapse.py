"""Collapse: an encoder that says nearly the same of everything, told from its signs of health."""

from collections.abc import Sequence
from itertools import takewhile

from ajepa.run import Json

LEAST_SPREAD, LEAST_RANK, LEAST_CONTENT = 0.2, 4.0, 0.02
PATIENCE = 3  # looks in a row: healthy runs may pass through a dip
ADVICE = (
    "try a lower schedule.peak_lr, a slower teacher (schedule.ema_start nearer 1), model.loss=l2 or "
    "model.targets=cosines"
)


def signs(look: Json) -> list[str]:
    """What of `health.health` means collapse, in words; nothing where all is well.

    Seen in some dozen runs of 120 to 300 steps, of widths 32 and 64 (one of 96), on the tests' clips and on 2,000
    others (L2, squared L2 and cosine, teacher and fixed targets, random patches and curricula, seeds 0 to 2). Wider
    encoders were not tried: of a large run that is stopped, look at the curves, and use `--on-collapse warn`.

    health_spread   random init 0.60 to 0.91, healthy 0.33 or more (the least is a dip of the tests' `tiny`),
                    collapsed 0.09 to 0.2 (no lag between teacher and student, squared L2, lr 3e-3)
    health_rank     random init 12 to 34, healthy 8.4 or more, collapsed 2.7 to 5; it still tells when a
                    collapsed run has found its size again (0.3 to 0.5), at 2.8 to 3.8
    health_content  random init 0.28 to 0.95, healthy 0.20 or more; no run was made that lost the sound and kept
                    the positions, so this threshold is a tenth of the least seen and no more
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
