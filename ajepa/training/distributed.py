"""Rank, number of ranks, what they agree on, and how they end together: the processes of `torchrun`."""

import inspect
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import RUN_AGAIN_STATUS, STOP_SIGNALS, InputError, RunError, StopSignal

RANK_TIMEOUT = timedelta(hours=2)  # of ranks that wait for one that probes, or writes a checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Which of `size` processes this one is; each takes an equal share of every step.

    `local_rank` and `local_size` count those of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and tells."""
        return self.rank == 0

    def clips_per_rank(self, clips: int) -> int:
        """Clips of each rank; RunError where they cannot be dealt evenly."""
        if clips % self.size:
            near = clips // self.size * self.size
            told = f"{clips} clips a step cannot be dealt to {self.size} ranks evenly"
            fits = f"{near} or {near + self.size}" if near else f"{self.size}"
            raise RunError(f"{told}; choose --batch {fits}, or another number of ranks")
        return clips // self.size

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Each value summed over all ranks, exact for whole numbers; RunError where a rank is no more."""
        if self.size == 1:
            return list(values)
        total_N = torch.tensor(values, dtype=torch.float64)  # on the CPU: no GPU is waited for
        with naming_lost_ranks():
            dist.all_reduce(total_N)
        return total_N.tolist()

    def copy_from_main_rank(self, model: nn.Module) -> None:
        """Have the model of every rank hold what the main rank's holds; RunError where that is no more."""
        for value in model.state_dict().values() if self.size > 1 else ():
            with naming_lost_ranks():
                dist.broadcast(value, 0)

    def wait_for_ranks(self) -> None:
        """Until every rank is here."""
        self.sum_over_ranks(0)

    def wrap_in_ddp(self, model: nn.Module) -> nn.Module:
        """The model, with gradients that are means over the ranks after each backward pass.

        DistributedDataParallel rather than one all-reduce after it: the same result, but it sums each 25 MB of
        gradients while the rest is still being computed, which on GPUs hides most of the time it takes. One
        process needs no wrapper, and buffers are constants.
        """
        if self.size == 1:
            return model
        # torch 2.14 has another name for it, and warns of the old one
        named = inspect.signature(DistributedDataParallel).parameters
        synced = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
        how: dict[str, Any] = {synced: False, "gradient_as_bucket_view": True}
        return DistributedDataParallel(model, **how)


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """RunError where a rank that others wait for is no more."""
    try:
        yield
    except RuntimeError:  # gloo's only kind
        raise RunError(
            "another rank is no more: its message says why, without one it was killed; run the same command again"
        ) from None


SINGLE_PROCESS = World()


def world_from_environment() -> World:
    """What torchrun's environment variables say; without them, one process alone."""
    names = {
        "rank": "RANK",
        "size": "WORLD_SIZE",
        "local_rank": "LOCAL_RANK",
        "local_size": "LOCAL_WORLD_SIZE",
    }
    if not all(name in os.environ for name in names.values()):
        return SINGLE_PROCESS
    return World(**{field: int(os.environ[name]) for field, name in names.items()})


@contextmanager
def join_ranks() -> Iterator[World]:
    """The ranks that torchrun started, connected: gloo between CPUs, NCCL between GPUs; within it, itself.

    The first rank that ends with an error of ours, or interrupted, says so; the others end without a word and
    with the same status.
    """
    world = world_from_environment()
    if world.size == 1 or dist.is_initialized():
        yield world
        return
    store, _, _ = next(dist.rendezvous("env://"))
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backends, store=store, rank=world.rank, world_size=world.size, timeout=RANK_TIMEOUT
    )
    try:
        yield world
    except (InputError, OSError, StopSignal) as end:
        ignore_stop_signals()
        if store.add("ajepa/told", 1) == 1:
            raise
        raise SystemExit(RUN_AGAIN_STATUS if isinstance(end, StopSignal) else 1) from None
    # only here: after an error it could wait for what others will never send; the process ends anyway
    dist.destroy_process_group()


def ignore_stop_signals() -> None:
    """This process ends by itself now; torchrun, which terminates all ranks when one has ended, need not."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
