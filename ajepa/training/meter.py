"""The cost of a run: clips, tokens, hours, memory, and floating-point operations by an exact formula."""

import json
import resource
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ajepa.training.run import Json
from pipeline.files import replacing_file
from pipeline.messages import count_phrase

COMPUTE_COST_FILE = "compute.json"

PROC_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeCost:
    """The cost of the weights after `step` steps, without steps that a kill threw away and without the monitor.

    clips             each as often as it was seen, of all ranks
    context_tokens    tokens that the encoder saw, of all mask sets; 0 where a classifier has no tokens
    predicted_tokens  tokens in all target groups, also past a clip's end; 0 in fine-tuning
    teacher_tokens    tokens that the target encoder saw; 0 where there is no teacher
    flop              the sum of `pretrain_step_cost` or `classifier_step_cost` over the steps
    bad_steps         steps that were passed over and changed no weight; their clips and floating-point operations count
    hours             by the clock, from the first batch, with checkpoints and the monitor
    peak_memory_gb    10^9 bytes, of one process: resident on a CPU, allocated by torch on a GPU
    """

    step: int = 0
    clips: int = 0
    context_tokens: int = 0
    predicted_tokens: int = 0
    teacher_tokens: int = 0
    flop: int = 0
    bad_steps: int = 0
    hours: float = 0.0
    peak_memory_gb: float = 0.0

    def plus_step(self, step_cost: "ComputeCost") -> "ComputeCost":
        """The cost with the counts of a step added; hours and memory stay, for the meter measures them."""
        counts = ("step", "clips", "context_tokens", "predicted_tokens", "teacher_tokens", "flop")
        return replace(self, **{name: getattr(self, name) + getattr(step_cost, name) for name in counts})


class ComputeMeter:
    """Counts a run's steps as they are taken, and keeps the counts in its folder, one record for each checkpoint.

    compute.json  {"device", "ranks", the fields of `ComputeCost` at the newest checkpoint, "flop_per_s",
                  "earlier": a `ComputeCost` for each checkpoint before it}
    """

    def __init__(self, device: torch.device, *, ranks: int = 1) -> None:
        self.device = device
        self.ranks = ranks
        self.earlier_costs: list[ComputeCost] = []
        self.count_from(ComputeCost())

    def count_from(self, cost: ComputeCost) -> None:
        """Count on from `cost`; its clock begins now."""
        self.cost = cost
        self.cost_at_start = cost
        self.start_seconds = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def resume_counts(self, folder: Path, step: int) -> None:
        """Count on from the cost that the run's folder has for the checkpoint at `step`; from 0 if it has none."""
        # Costs past that step belong to weights that a kill threw away.
        costs = read_compute_costs(folder)
        self.earlier_costs = [cost for cost in costs if cost.step <= step]
        self.count_from(next((cost for cost in costs if cost.step == step), ComputeCost(step=step)))

    def count_step(self, cost: ComputeCost) -> None:
        """Add the cost of a step that was taken."""
        self.cost = self.cost.plus_step(cost)

    def count_bad_step(self) -> None:
        """Add a step that was passed over; its cost is added as that of any other."""
        self.cost = replace(self.cost, bad_steps=self.cost.bad_steps + 1)

    def current_cost(self) -> ComputeCost:
        """The cost up to now, with hours and memory."""
        # Both count on from the processes before this one: hours add up, of peaks the highest stays.
        hours = self.cost_at_start.hours + (time.perf_counter() - self.start_seconds) / 3600
        peak_gb = max(self.cost_at_start.peak_memory_gb, peak_memory_bytes(self.device) / 1e9)
        return replace(self.cost, hours=hours, peak_memory_gb=peak_gb)

    def save_costs(self, folder: Path) -> None:
        """Write the cost up to now, beside the costs at earlier checkpoints."""
        # The newest cost lies on top, so that a reader of the file need not look for it.
        cost = self.current_cost()
        record: Json = {"device": describe_device(self.device), "ranks": self.ranks, **asdict(cost)}
        record["flop_per_s"] = cost.flop / (3600 * cost.hours)
        record["earlier"] = [asdict(earlier) for earlier in self.earlier_costs]
        with replacing_file(folder / COMPUTE_COST_FILE) as scratch:
            scratch.write_text(json.dumps(record, indent=1) + "\n")
        self.earlier_costs.append(cost)


def read_compute_costs(folder: Path) -> list[ComputeCost]:
    """The cost of a run at each of its checkpoints, oldest first; an empty list where its folder has none."""
    if not (folder / COMPUTE_COST_FILE).exists():
        return []
    record = json.loads((folder / COMPUTE_COST_FILE).read_text())
    # Files of earlier versions lack the counts that came later, which are 0 there.
    fields = ComputeCost.__dataclass_fields__
    entries = (*record["earlier"], record)
    return [ComputeCost(**{name: entry[name] for name in fields if name in entry}) for entry in entries]


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: on a GPU as allocated by torch, on a CPU resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not PROC_STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes

    # Not ru_maxrss, which begins with the size of the process that started this one.
    lines = dict(line.split(":", 1) for line in PROC_STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def describe_device(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {count_phrase(torch.get_num_threads(), 'thread')}"
