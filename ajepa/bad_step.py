"""A step without a usable loss or gradient: what is said of it, and what is kept to look at."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ajepa.checkpoints import write_tensors
from pipeline.errors import RunError
from pipeline.files import replacing


class BadStep(RunError):
    """The update of a step must not happen; `told` and `tensors` are what explains it, of this rank."""

    def __init__(self, text: str, *, step: int, rank: int, told: dict[str, Any], tensors: dict[str, Tensor]):
        super().__init__(text)
        self.step, self.rank, self.told, self.tensors = step, rank, told, tensors

    def keep(self, run_path: Path) -> Path:
        """Write it to `bad-step-STEP/` of the run, a pair of files for each rank; returns that folder."""
        folder = run_path / f"bad-step-{self.step + 1:08d}"
        folder.mkdir(exist_ok=True)
        with replacing(folder / f"rank-{self.rank}.safetensors") as scratch:
            write_tensors(scratch, self.tensors)
        with replacing(folder / f"rank-{self.rank}.json") as scratch:
            scratch.write_text(json.dumps(self.told, indent=1) + "\n")
        return folder
