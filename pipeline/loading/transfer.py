"""Copies between the host and a GPU for which neither waits: a door, so that no step is ever held up by a copy.

A GPU works through a queue. The host fills it ahead and must not ask for a result on the way: that would empty the
queue. Copies from pageable memory wait, so everything that goes to a GPU goes through pinned memory.
"""

import numpy as np
import torch
from torch import Tensor


def copy_to_device(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Return the values on `device`; a copy to a GPU is queued on its current stream, and the host goes on."""
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values)
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)

    # PyTorch keeps the pinned memory until the copy is done.
    return values.pin_memory().to(device, non_blocking=True)


def use_device(device: torch.device) -> None:
    """Make `device` the current one of a new thread, which begins with the first GPU whatever its process uses."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def pin_for_device(values: Tensor, device: torch.device) -> Tensor:
    """Return the values in memory from which `copy_to_device` copies to `device` without another copy on the host."""
    return values.pin_memory() if device.type == "cuda" else values


class HostCopy:
    """Values of a device as they are now, on their way to the host; the device goes on meanwhile."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if not values.is_cuda:
            self._values = values.detach().clone()
            return

        # Queue the copy after the work that makes the values, and mark its end.
        self._values = torch.empty_like(values, device="cpu", pin_memory=True)
        self._values.copy_(values.detach(), non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(values.device))

    def wait(self) -> Tensor:
        """Wait for the copy, and return the values on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
