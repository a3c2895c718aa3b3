"""The processes that torchrun starts: their ranks, the sums that they agree on, and how they end together."""

import inspect
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import RUN_AGAIN_STATUS, STOP_SIGNALS, InputError, RunError, StopSignal

RANK_TIMEOUT = timedelta(hours=2)  # how long ranks wait for one that probes, or writes a checkpoint

REPORTED_KEY = "ajepa/reported"  # in the store that all ranks share: how many of them have met an error


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Which of `size` processes this one is. Each takes an equal share of every step.

    `local_rank` and `local_size` count the processes of this machine alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    @property
    def gpu_index(self) -> int | None:
        """The GPU of this process, where several processes of a machine take one each; None for a single process."""
        return self.local_rank if self.size > 1 else None

    @property
    def ranks_note(self) -> str:
        """The end of the line about a run that starts: ` on 8 ranks`, or nothing for a single process."""
        return f" on {self.size} ranks" if self.size > 1 else ""

    def main_rank_only(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """`say` on the main rank; on the others a function that does nothing, so that a line appears once."""
        return say if self.is_main else lambda line: None

    def clips_per_rank(self, clips: int) -> int:
        """How many clips of a step each rank takes; RunError where they cannot be dealt evenly."""
        if clips % self.size:
            # Advise the nearest batches that divide evenly; fewer clips than ranks have none below.
            lower = clips // self.size * self.size
            batches = f"{lower} or {lower + self.size}" if lower else f"{self.size}"
            raise RunError(
                f"{clips} clips a step cannot be dealt to {self.size} ranks evenly; "
                f"choose --batch {batches}, or another number of ranks"
            )
        return clips // self.size

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Each value summed over all ranks, exact for whole numbers; RunError where a rank has ended."""
        if self.size == 1:
            return list(values)
        total_N = torch.tensor(values, dtype=torch.float64)  # on the CPU: no rank waits for its GPU
        with naming_lost_ranks():
            dist.all_reduce(total_N)
        return total_N.tolist()

    def sum_tensor_over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all ranks, on its device; RunError where a rank has ended."""
        if self.size > 1:
            with naming_lost_ranks():
                dist.all_reduce(x)
        return x

    def gather_from_ranks(self, x_ND: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, in the order of the ranks, which all have as many; RunError where a rank has ended."""
        if self.size == 1:
            return x_ND
        all_ND = x_ND.new_empty((self.size * len(x_ND), *x_ND.shape[1:]))
        with naming_lost_ranks():
            dist.all_gather_into_tensor(all_ND, x_ND.contiguous())
        return all_ND

    def copy_from_main_rank(self, model: nn.Module) -> None:
        """Give the model of every rank the main rank's weights and buffers; RunError where a rank has ended."""
        if self.size == 1:
            return
        for value in model.state_dict().values():
            with naming_lost_ranks():
                dist.broadcast(value, 0)

    def wait_for_ranks(self) -> None:
        """Wait until every rank has come to this line."""
        self.sum_over_ranks(0)

    def wrap_in_ddp(self, model: nn.Module) -> nn.Module:
        """The model, with gradients that are means over the ranks after each backward pass.

        DistributedDataParallel rather than one all-reduce afterwards: the same result, but it sums each 25 MB of
        gradients while the rest is still being computed, which on GPUs hides most of the time that it takes.
        """
        if self.size == 1:
            return model

        # Buffers are constants here. torch 2.14 renamed the option that says so, and warns of the old name.
        parameters = inspect.signature(DistributedDataParallel).parameters
        sync_option = "broadcast_buffers"
        if "forward_sync_buffers" in parameters:
            sync_option = "forward_sync_buffers"
        options: dict[str, Any] = {sync_option: False, "gradient_as_bucket_view": True}
        return DistributedDataParallel(model, **options)


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Turn torch's error about a rank that has ended into a RunError that says where to look."""
    try:
        yield
    except RuntimeError:  # gloo has no other kind
        raise RunError(
            "another rank has ended: its own message says why, without one it was killed; "
            "run the same command again"
        ) from None


SINGLE_PROCESS = World()


def world_from_environment() -> World:
    """The world that torchrun's environment variables describe; without them a single process.

    RunError if only some of them describe several processes: each of these would train alone on everything.
    """
    variables = {
        "rank": "RANK",
        "size": "WORLD_SIZE",
        "local_rank": "LOCAL_RANK",
        "local_size": "LOCAL_WORLD_SIZE",
    }
    # torchrun sets all of them; srun and other launchers may set some.
    missing = [variable for variable in variables.values() if variable not in os.environ]
    if missing:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise RunError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {' and '.join(missing)} not set: start the ranks "
                "by torchrun, which sets all; under srun, LOCAL_RANK is SLURM_LOCALID and LOCAL_WORLD_SIZE the number "
                "of tasks of a node"
            )
        return SINGLE_PROCESS
    return World(**{field: int(os.environ[variable]) for field, variable in variables.items()})


@contextmanager
def join_ranks() -> Iterator[World]:
    """Connect the ranks that torchrun started, by gloo between CPUs and NCCL between GPUs, for a `with` block.

    The first rank that meets an error of ours, or a stop signal, raises it; the others end without a message and
    with the same exit status. Within another such block, and in a single process, nothing is connected.
    """
    world = world_from_environment()
    if world.size == 1 or dist.is_initialized():
        yield world
        return

    # Connect.
    store, _, _ = next(dist.rendezvous("env://"))
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backends, store=store, rank=world.rank, world_size=world.size, timeout=RANK_TIMEOUT
    )

    # Run the block; of all ranks that fail, one reports.
    try:
        yield world
    except (InputError, OSError, StopSignal) as error:
        # The shared count lets exactly one rank be the first.
        ignore_stop_signals()
        is_first = store.add(REPORTED_KEY, 1) == 1
        if is_first:
            raise

        # The others end with the status that the first one's error gives.
        status = 1
        if isinstance(error, StopSignal):
            status = RUN_AGAIN_STATUS
        raise SystemExit(status) from None

    # Only here: after an error this could wait for messages that no rank will send, and the process ends anyway.
    dist.destroy_process_group()


def ignore_stop_signals() -> None:
    """Ignore stop signals from now on: torchrun terminates all ranks when one ends, and this one ends by itself."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
