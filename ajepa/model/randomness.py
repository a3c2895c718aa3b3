"""Randomness: the generator of a training step, and functions that make torch draw from it.

Functions take NumPy generators. For torch modules that draw from the global generators, these are seeded temporarily.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The number of this random stream in the seed; augmentation has another stream, so its numbers are independent.
MASK_STREAM = int.from_bytes(b"masks")

CPU_DEVICE = torch.device("cpu")


def step_rng(seed: int, step: int) -> np.random.Generator:
    """Return the generator of a training step for masks, drop path and patchout; it is the same on all ranks."""
    return np.random.default_rng([seed, step, MASK_STREAM])


class MicroBatchRng(np.random.Generator):
    """The generator of a step for a pass over a part of its clips: they get the same numbers as in the whole batch.

    The object takes over `rng`, a fresh generator of NumPy's default kind. `random` draws the numbers of the clips of
    this pass (the first axis of `size`) and skips the numbers of the clips before and after them. A number is a float64
    and advances the generator by one step.
    """

    def __init__(self, rng: np.random.Generator, first_clip: int, batch_clips: int) -> None:
        super().__init__(rng.bit_generator)
        self.first_clip = first_clip
        self.batch_clips = batch_clips

    def random(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:
        """Draw uniform numbers of shape `size`; the first axis is the clips of this pass."""
        clips, *shape_per_clip = size
        numbers_per_clip = math.prod(shape_per_clip)

        # Only some bit generators have `advance`; PCG64, NumPy's default, has it.
        advance = self.bit_generator.advance  # type: ignore[attr-defined]
        advance(self.first_clip * numbers_per_clip)
        numbers = super().random(size, dtype, out)
        advance((self.batch_clips - self.first_clip - clips) * numbers_per_clip)
        return numbers


@contextmanager
def fork_seeded_rng(seed: int, device: torch.device = CPU_DEVICE) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of `device` with `seed`; restore their states afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for cuda in devices:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(seed)
        yield


def draw_torch_seed(rng: np.random.Generator | None) -> int:
    """Draw a seed for torch from the generator of the step; ValueError if `rng` is None."""
    if rng is None:
        raise ValueError("training draws from the generator of the step: give `rng`")
    return int(rng.integers(2**62))


def torch_generator(rng: np.random.Generator | None, device: torch.device) -> torch.Generator:
    """Return a torch generator on the device, seeded from the generator of the step; ValueError if `rng` is None."""
    return torch.Generator(device).manual_seed(draw_torch_seed(rng))


def apply_dropout(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """Set a random `share` of the values to 0 and scale the others by 1/(1 - share); no dropout without generator."""
    if generator is None or not share:
        return x
    return x * torch.empty_like(x).bernoulli_(1 - share, generator=generator).div_(1 - share)
