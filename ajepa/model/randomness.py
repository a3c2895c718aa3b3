"""Randomness for modules of torch, which would draw from its global generators: lent seeded, or handed in."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

MASK_STREAM = int.from_bytes(b"masks")  # names the stream, as `pipeline.augment.draws` names its own


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The randomness of one training step, of all ranks together: masks, drop path, patchout."""
    return np.random.default_rng([seed, step, MASK_STREAM])


CPU_DEVICE = torch.device("cpu")


class MicroBatchRng(np.random.Generator):
    """The generator of a step for who holds only some of its clips: they draw what they would among all of them.

    It takes over `rng`, a fresh generator of NumPy's default kind. `random`, asked for numbers of each of the pass's
    clips (the first axis), passes over those of the others; they are float64, one step of the generator each.
    """

    def __init__(self, rng: np.random.Generator, first_clip: int, batch_clips: int) -> None:
        super().__init__(rng.bit_generator)
        self.first_clip, self.batch_clips = first_clip, batch_clips

    def random(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:
        clips, *of_each = size
        steps = math.prod(of_each)
        self.bit_generator.advance(self.first_clip * steps)  # type: ignore[attr-defined]  # PCG64 has it
        drawn = super().random(size, dtype, out)
        self.bit_generator.advance((self.batch_clips - self.first_clip - clips) * steps)  # type: ignore[attr-defined]
        return drawn


@contextmanager
def fork_seeded_rng(seed: int, device: torch.device = CPU_DEVICE) -> Iterator[None]:
    """The global generators of the CPU and of `device` start at `seed`; afterwards they stand as they stood."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for cuda in devices:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(seed)
        yield


def draw_torch_seed(rng: np.random.Generator | None) -> int:
    """A seed for torch, from the generator of the step; ValueError where there is none."""
    if rng is None:
        raise ValueError("training draws from the generator of the step: give `rng`")
    return int(rng.integers(2**62))


def torch_generator(rng: np.random.Generator | None, device: torch.device) -> torch.Generator:
    """A generator on the device, started by the generator of the step; ValueError where there is none."""
    return torch.Generator(device).manual_seed(draw_torch_seed(rng))


def apply_dropout(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """Dropout: a random `share` of the values becomes 0, the others 1/(1 - share) as much; None: all stay."""
    if generator is None or not share:
        return x
    return x * torch.empty_like(x).bernoulli_(1 - share, generator=generator).div_(1 - share)
