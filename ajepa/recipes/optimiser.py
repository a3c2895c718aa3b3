"""AdamW and schedules: their fields in a recipe, the schedule functions, and torch's optimiser with its state.

A schedule is a pure function of the step, so a resumed run needs no counters.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

MomentumCurve = Literal["linear", "cosine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW:
    """AdamW, Adam with decoupled weight decay (arXiv 1711.05101); biases, norms and mask tokens are not decayed."""

    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.weight_decay >= 0):
            raise ValueError(f"AdamW needs betas in [0, 1) and a weight decay of 0 or more, got {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Learning rate and teacher momentum over a run of any length: lengths are shares of its steps, not counts.

    base_clips      number of clips per step to which `peak_lr` refers: the peak is proportional to the clips per
                    step, like the "base learning rates" of papers (256). 0: the peak does not depend on them
    ema_curve       how the teacher's momentum rises from `ema_start` to `ema_end` (`ema_momentum`)
    ema_base_clips  number of clips per step to which the momentum refers: with k times as many it is m^k, so that the
                    teacher averages over as many clips (arXiv 2307.13813). 0: it does not depend on them
    """

    peak_lr: float
    start_lr: float = 1e-6
    end_lr: float = 0.0
    warmup_share: float = 0.01
    ema_start: float = 0.996
    ema_end: float = 1.0
    base_clips: int = 0
    ema_curve: MomentumCurve = "linear"
    ema_base_clips: int = 0

    def __post_init__(self) -> None:
        if not (min(self.peak_lr, self.start_lr, self.end_lr) >= 0 and 0 <= self.warmup_share < 1):
            raise ValueError(f"a schedule needs rates of 0 or more and a warm-up share in [0, 1), got {self}")
        if min(self.base_clips, self.ema_base_clips) < 0:
            raise ValueError(
                "base_clips and ema_base_clips must not be negative, "
                f"got {self.base_clips} and {self.ema_base_clips}"
            )
        if self.ema_curve not in get_args(MomentumCurve):
            raise ValueError(f"ema_curve must be linear or cosine, got {self.ema_curve!r}")
        if not (0 <= self.ema_start <= 1 and 0 <= self.ema_end <= 1):
            raise ValueError(f"the teacher's momentum must lie in [0, 1], got {self}")

    def learning_rate(self, step: int, steps: int, *, clips: int | None = None) -> float:
        """Return the learning rate of the update after `step` of `steps` steps (`warmup_cosine`).

        `clips` is the number of clips per step; it is required if `base_clips` is above 0.
        """
        return warmup_cosine(
            step,
            steps=steps,
            warmup_steps=self.warmup_steps(steps),
            peak=self.peak_lr * self._share_of_clips(self.base_clips, clips),
            start=self.start_lr,
            end=self.end_lr,
        )

    def warmup_steps(self, steps: int) -> int:
        """Return the number of steps of the warm-up of a run of `steps` steps."""
        return int(self.warmup_share * steps)

    def teacher_momentum(self, step: int, steps: int, *, clips: int | None = None) -> float:
        """Return the momentum of the target encoder at the update after `step` of `steps` steps (`ema_momentum`).

        `clips` is the number of clips per step; it is required if `ema_base_clips` is above 0.
        """
        momentum = ema_momentum(
            step, steps=steps, start=self.ema_start, end=self.ema_end, curve=self.ema_curve
        )
        return momentum ** self._share_of_clips(self.ema_base_clips, clips)

    def _share_of_clips(self, base_clips: int, clips: int | None) -> float:
        """Return the clips of a step as a multiple of the number that a value refers to; 1 if it refers to none."""
        if not base_clips:
            return 1.0
        if clips is None:
            raise ValueError(f"the schedule depends on the clips of a step: give `clips` to {self}")
        return clips / base_clips


def warmup_cosine(
    step: int, *, steps: int, warmup_steps: int, peak: float, start: float = 0.0, end: float = 0.0
) -> float:
    """Return the rate: linear from `start` to `peak` over the warm-up, then half a cosine down to `end` at `steps`.

    Audio-JEPA (arXiv 2507.02915): 1e-6 to 3e-4 in 1,000 steps, then to 0 at step 100,000.
    """
    if not 0 <= warmup_steps < steps:
        raise ValueError(f"the warm-up must end before the run: {warmup_steps} of {steps} steps")
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (steps - warmup_steps))
    return end + (peak - end) * (1 + math.cos(math.pi * progress)) / 2


def one_cycle(step: int, *, steps: int, warmup_steps: int, peak: float, end: float = 0.0) -> float:
    """Return the rate: half a cosine from `peak`/25 up to `peak` over the warm-up, then one down to `end` at `steps`.

    Smith and Topin (arXiv 1708.07120), in the form of torch's OneCycleLR.
    """
    if not 0 <= warmup_steps < steps:
        raise ValueError(f"the warm-up must end before the run: {warmup_steps} of {steps} steps")
    if step < warmup_steps:
        return peak / 25 + (peak - peak / 25) * (1 - math.cos(math.pi * step / warmup_steps)) / 2
    return warmup_cosine(step, steps=steps, warmup_steps=warmup_steps, peak=peak, end=end)


def ema_momentum(
    step: int, *, steps: int, start: float = 0.996, end: float = 1.0, curve: MomentumCurve = "linear"
) -> float:
    """Return the momentum of the target encoder: from `start` to `end` over *all* steps.

    linear  in equal steps, as in I-JEPA (arXiv 2301.08243)
    cosine  by half a cosine, end - (end - start) (cos(pi step / steps) + 1) / 2, as in BYOL (arXiv 2006.07733)
    """
    progress = min(1.0, step / steps)
    if curve == "cosine":
        return end - (end - start) * (math.cos(math.pi * progress) + 1) / 2
    return start + (end - start) * progress


def build_adamw(weights: Iterable[nn.Parameter], settings: AdamW) -> torch.optim.AdamW:
    """Return fused AdamW over the trainable weights; biases, norms and single vectors are not decayed."""
    trained = [weight for weight in weights if weight.requires_grad]
    groups = [
        {"params": [weight for weight in trained if weight.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [weight for weight in trained if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(settings.beta1, settings.beta2), fused=True)


def optimiser_moments(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state of each weight by `NUMBER.KEY` (weight number, state key), for a checkpoint."""
    state = optimiser.state_dict()["state"]
    return {f"{index}.{key}": value for index, moments in state.items() for key, value in moments.items()}


def restore_moments(optimiser: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    """Restore the optimiser's state from the tensors that `optimiser_moments` returned."""
    packed = optimiser.state_dict()
    for name, value in moments.items():
        index, key = name.split(".")
        packed["state"].setdefault(int(index), {})[key] = value
    optimiser.load_state_dict(packed)
