"""A run of eight steps in which something may happen to the last rank in step 6: alone, or under torchrun."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny

from ajepa.distributed import world_here
from ajepa.pretrain import pretrain
from ajepa.run import Json, Run
from ajepa.trainer import Trainer
from pipeline.command_line import run_app
from pipeline.errors import BrokenClip
from pipeline.loader import Batch

STEP = Trainer.step


def train(store: Path | str, run: Path, what: str = "train") -> Run:
    """`what` happens: train (nothing), micro (passes of three clips), stop, die, nan or broken."""
    world = world_here()

    def step(trainer: Trainer, at: int, batch: Batch) -> Json:
        if (at, world.rank) == (5, world.size - 1):
            if what in ("stop", "die"):
                os.kill(os.getpid(), signal.SIGTERM if what == "stop" else signal.SIGKILL)
            if what == "nan":
                batch.mel_BTF[2, 3, 4] = float("nan")
            if what == "broken":
                raise BrokenClip(7, "row 7 cannot be read")
        seen = [at, batch.rows_B.tolist(), trainer.draw(at).targets_NGQ.tolist()]
        with (run / f"seen-{world.rank}.jsonl").open("a") as handle:
            handle.write(f"{seen}\n")
        return STEP(trainer, at, batch)

    recipe = replace(tiny().resized(steps=8), mask_sets=2, checkpoint_every=4)
    micro = 3 if what == "micro" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        return pretrain(store, recipe, run, device="cpu", precision="fp32", micro_batch=micro)


if __name__ == "__main__":
    run_app(lambda: train(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
