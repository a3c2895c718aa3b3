"""What a run has cost: clips, tokens, hours, memory, and floating-point operations by an exact formula."""

import json
import resource
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ajepa.training.run import Json
from pipeline.files import replacing_file

COMPUTE_COST_FILE = "compute.json"

PROC_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeCost:
    """What the weights behind `step` steps have cost; what a kill threw away is not in it, nor is watching.

    clips             as often as they were seen, of all ranks
    context_tokens    that the encoder saw, of all mask sets; 0 where a classifier has no tokens
    predicted_tokens  in all groups, those past a clip's end among them; 0 in fine-tuning
    teacher_tokens    that the target encoder saw; 0 where there is no teacher
    flop              `step_flop`, or `classifier_cost.step_cost`, summed
    hours             of the wall, from the first batch, checkpoints and watching included
    peak_memory_gb    10^9 bytes, of one process: resident on a CPU, allocated by torch on a GPU
    """

    step: int = 0
    clips: int = 0
    context_tokens: int = 0
    predicted_tokens: int = 0
    teacher_tokens: int = 0
    flop: int = 0
    hours: float = 0.0
    peak_memory_gb: float = 0.0

    def plus_step(self, step_cost: "ComputeCost") -> "ComputeCost":
        """The cost of a step added; the clock's and the memory's are the meter's own."""
        counts = ("step", "clips", "context_tokens", "predicted_tokens", "teacher_tokens", "flop")
        return replace(self, **{name: getattr(self, name) + getattr(step_cost, name) for name in counts})


class ComputeMeter:
    """Counts a run's steps as they are taken, and keeps the counts in its folder, one for each checkpoint.

    compute.json  {"device", "ranks", then the fields of `Spent` at the newest checkpoint, "flop_per_s",
                  "earlier": `Spent` at those before}
    """

    def __init__(self, device: torch.device, *, ranks: int = 1) -> None:
        self.device, self.ranks = device, ranks
        self.earlier_costs: list[ComputeCost] = []
        self.count_from(ComputeCost())

    def count_from(self, cost: ComputeCost) -> None:
        """Count on from `spent`, its clock beginning now."""
        self.cost, self.cost_at_start, self.start_seconds = cost, cost, time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def resume_counts(self, folder: Path, step: int) -> None:
        """Count on from what the run's folder says of its checkpoint at `step`; from 0 if it says nothing."""
        kept = read_compute_costs(folder)
        self.earlier_costs = [spent for spent in kept if spent.step <= step]
        self.count_from(next((spent for spent in kept if spent.step == step), ComputeCost(step=step)))

    def count_step(self, cost: ComputeCost) -> None:
        """One step was taken."""
        self.cost = self.cost.plus_step(cost)

    def current_cost(self) -> ComputeCost:
        """What has been spent so far."""
        hours = self.cost_at_start.hours + (time.perf_counter() - self.start_seconds) / 3600
        peak_gb = max(self.cost_at_start.peak_memory_gb, peak_memory_bytes(self.device) / 1e9)
        return replace(self.cost, hours=hours, peak_memory_gb=peak_gb)

    def save_costs(self, folder: Path) -> None:
        """Write what was spent up to now, beside what it was at earlier checkpoints."""
        now = self.current_cost()
        told: Json = {"device": describe_device(self.device), "ranks": self.ranks, **asdict(now)}
        told["flop_per_s"] = now.flop / (3600 * now.hours)
        told["earlier"] = [asdict(spent) for spent in self.earlier_costs]
        with replacing_file(folder / COMPUTE_COST_FILE) as scratch:
            scratch.write_text(json.dumps(told, indent=1) + "\n")
        self.earlier_costs.append(now)


def read_compute_costs(folder: Path) -> list[ComputeCost]:
    """What a run had spent at each of its checkpoints, oldest first; nothing where it has none."""
    if not (folder / COMPUTE_COST_FILE).exists():
        return []
    told = json.loads((folder / COMPUTE_COST_FILE).read_text())
    fields = ComputeCost.__dataclass_fields__
    return [ComputeCost(**{name: each[name] for name in fields}) for each in (*told["earlier"], told)]


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: on a GPU of torch's own, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not PROC_STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes
    lines = dict(line.split(":", 1) for line in PROC_STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024  # not ru_maxrss: it begins with the size of who started us


def describe_device(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
