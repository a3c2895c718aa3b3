"""What a run has cost: clips, tokens, hours, memory, and floating-point operations by an exact formula."""

import json
import resource
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ajepa.training.run import Json
from pipeline.files import replacing

COMPUTE = "compute.json"

STATUS = Path("/proc/self/status")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
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

    def plus(self, one: "Spent") -> "Spent":
        """The cost of a step added; the clock's and the memory's are the meter's own."""
        counts = ("step", "clips", "context_tokens", "predicted_tokens", "teacher_tokens", "flop")
        return replace(self, **{name: getattr(self, name) + getattr(one, name) for name in counts})


class Meter:
    """Counts a run's steps as they are taken, and keeps the counts in its folder, one for each checkpoint.

    compute.json  {"device", "ranks", then the fields of `Spent` at the newest checkpoint, "flop_per_s",
                  "earlier": `Spent` at those before}
    """

    def __init__(self, device: torch.device, *, ranks: int = 1) -> None:
        self.device, self.ranks = device, ranks
        self.earlier: list[Spent] = []
        self.start(Spent())

    def start(self, spent: Spent) -> None:
        """Count on from `spent`, its clock beginning now."""
        self.spent, self.before, self.began = spent, spent, time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def resume(self, folder: Path, step: int) -> None:
        """Count on from what the run's folder says of its checkpoint at `step`; from 0 if it says nothing."""
        kept = read(folder)
        self.earlier = [spent for spent in kept if spent.step <= step]
        self.start(next((spent for spent in kept if spent.step == step), Spent(step=step)))

    def step(self, cost: Spent) -> None:
        """One step was taken."""
        self.spent = self.spent.plus(cost)

    def now(self) -> Spent:
        """What has been spent so far."""
        hours = self.before.hours + (time.perf_counter() - self.began) / 3600
        peak_gb = max(self.before.peak_memory_gb, peak_bytes(self.device) / 1e9)
        return replace(self.spent, hours=hours, peak_memory_gb=peak_gb)

    def save(self, folder: Path) -> None:
        """Write what was spent up to now, beside what it was at earlier checkpoints."""
        now = self.now()
        told: Json = {"device": told_of(self.device), "ranks": self.ranks, **asdict(now)}
        told["flop_per_s"] = now.flop / (3600 * now.hours)
        told["earlier"] = [asdict(spent) for spent in self.earlier]
        with replacing(folder / COMPUTE) as scratch:
            scratch.write_text(json.dumps(told, indent=1) + "\n")
        self.earlier.append(now)


def read(folder: Path) -> list[Spent]:
    """What a run had spent at each of its checkpoints, oldest first; nothing where it has none."""
    if not (folder / COMPUTE).exists():
        return []
    told = json.loads((folder / COMPUTE).read_text())
    fields = Spent.__dataclass_fields__
    return [Spent(**{name: each[name] for name in fields}) for each in (*told["earlier"], told)]


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held: on a GPU of torch's own, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024  # not ru_maxrss: it begins with the size of who started us


def told_of(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
