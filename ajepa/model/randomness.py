"""Randomness: the generator of a training step, and ways to make torch draw from it.

Functions take NumPy generators. Modules of torch that draw from its global generators are lent a seed for a while.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The name of the stream in a seed, so that augmentation, which has another, draws other numbers.
MASK_STREAM = int.from_bytes(b"masks")

CPU_DEVICE = torch.device("cpu")


def step_rng(seed: int, step: int) -> np.random.Generator:
    """Return the generator of one training step, of all ranks together: masks, drop path, patchout."""
    return np.random.default_rng([seed, step, MASK_STREAM])


class MicroBatchRng(np.random.Generator):
    """The generator of a step for a pass over some of its clips: they get the numbers that they get in the whole batch.

    The object takes over `rng`, a fresh generator of NumPy's default kind. `random` draws numbers of the pass's clips
    (the first axis of its size) and skips those of the clips before and after; a number is float64, which is one step
    of the generator.
    """

    def __init__(self, rng: np.random.Generator, first_clip: int, batch_clips: int) -> None:
        super().__init__(rng.bit_generator)
        self.first_clip = first_clip
        self.batch_clips = batch_clips

    def random(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:
        """Draw uniform numbers of shape `size`, whose first axis are the pass's clips."""
        clips, *shape_per_clip = size
        numbers_per_clip = math.prod(shape_per_clip)

        # Not every bit generator can advance; PCG64, NumPy's default, can.
        advance = self.bit_generator.advance  # type: ignore[attr-defined]
        advance(self.first_clip * numbers_per_clip)
        numbers = super().random(size, dtype, out)
        advance((self.batch_clips - self.first_clip - clips) * numbers_per_clip)
        return numbers


@contextmanager
def fork_seeded_rng(seed: int, device: torch.device = CPU_DEVICE) -> Iterator[None]:
    """Start torch's global generators of the CPU and of `device` at `seed`; restore them afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for cuda in devices:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(seed)
        yield


def draw_torch_seed(rng: np.random.Generator | None) -> int:
    """Draw a seed for torch from the generator of the step; ValueError where there is none."""
    if rng is None:
        raise ValueError("training draws from the generator of the step: give `rng`")
    return int(rng.integers(2**62))


def torch_generator(rng: np.random.Generator | None, device: torch.device) -> torch.Generator:
    """Return a generator on the device, seeded by the generator of the step; ValueError where there is none."""
    return torch.Generator(device).manual_seed(draw_torch_seed(rng))


def apply_dropout(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """Set a random `share` of the values to 0 and multiply the others by 1/(1 - share); without generator, none."""
    if generator is None or not share:
        return x
    return x * torch.empty_like(x).bernoulli_(1 - share, generator=generator).div_(1 - share)
