"""Randomness for modules of torch, which would draw from its global generators: lent seeded, or handed in."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """The global generators of the CPU and of `device` start at `seed`; afterwards they stand as they stood."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for cuda in devices:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(seed)
        yield


def drawn_seed(rng: np.random.Generator | None) -> int:
    """A seed for torch, from the generator of the step; ValueError where there is none."""
    if rng is None:
        raise ValueError("training draws from the generator of the step: give `rng`")
    return int(rng.integers(2**62))


def torch_generator(rng: np.random.Generator | None, device: torch.device) -> torch.Generator:
    """A generator on the device, started by the generator of the step; ValueError where there is none."""
    return torch.Generator(device).manual_seed(drawn_seed(rng))


def dropped(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """Dropout: a random `share` of the values becomes 0, the others 1/(1 - share) as much; None: all stay."""
    if generator is None or not share:
        return x
    return x * torch.empty_like(x).bernoulli_(1 - share, generator=generator).div_(1 - share)
