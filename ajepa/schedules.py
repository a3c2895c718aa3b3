"""step -> number."""

import math


def warmup_cosine(
    step: int, *, steps: int, warmup_steps: int, peak: float, start: float = 0.0, end: float = 0.0
) -> float:
    """Linear from `start` to `peak` over the warm-up, then half a cosine down to `end`, reached at `steps`.

    Audio-JEPA (arXiv 2507.02915): 1e-6 to 3e-4 in 1,000 steps, then to 0 at step 100,000.
    """
    if not 0 <= warmup_steps < steps:
        raise ValueError(f"the warm-up must end before the run: {warmup_steps} of {steps} steps")
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    done = min(1.0, (step - warmup_steps) / (steps - warmup_steps))
    return end + (peak - end) * (1 + math.cos(math.pi * done)) / 2


def one_cycle(step: int, *, steps: int, warmup_steps: int, peak: float, end: float = 0.0) -> float:
    """Half a cosine from a 25th of `peak` up to it over the warm-up, then half a cosine down to `end` at `steps`.

    Smith and Topin (arXiv 1708.07120), in the shape that torch's OneCycleLR gives it.
    """
    if not 0 <= warmup_steps < steps:
        raise ValueError(f"the warm-up must end before the run: {warmup_steps} of {steps} steps")
    if step < warmup_steps:
        return peak / 25 + (peak - peak / 25) * (1 - math.cos(math.pi * step / warmup_steps)) / 2
    return warmup_cosine(step, steps=steps, warmup_steps=warmup_steps, peak=peak, end=end)


def ema_momentum(step: int, *, steps: int, start: float = 0.996, end: float = 1.0) -> float:
    """The share of itself that the target encoder keeps: linear from `start` to `end` over *all* steps."""
    return start + (end - start) * min(1.0, step / steps)


def curriculum_share(step: int, *, steps: int, first: float = 0.01) -> float:
    """How often the later masking is drawn: `f(s) = min(1, sqrt(s (1 - c0^2) / S + c0^2))`, c0 = `first`.

    A-JEPA (arXiv 2311.15830). It grows fast and early: over a run two steps in three are the later masking.
    """
    return min(1.0, math.sqrt(step * (1 - first**2) / steps + first**2))
