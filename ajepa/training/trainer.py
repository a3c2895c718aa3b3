"""A step without a usable loss or gradient: what is said of it, and what is kept to look at.

Stepper: one update of the weights from a step's clips, dealt to ranks and passes; what every stage's trainer is.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ajepa.recipes.optimiser import optimiser_moments, restore_moments
from ajepa.training.checkpoints import Checkpoint, write_safetensors
from ajepa.training.devices import Precision, pick_precision
from ajepa.training.distributed import World
from ajepa.training.run import Json
from pipeline.errors import RunError
from pipeline.files import replacing_file
from pipeline.loading.loader import Batch


class BadStep(RunError):
    """The update of a step must not happen; `told` and `tensors` are what explains it, of this rank."""

    def __init__(
        self, text: str, *, step: int, rank: int, record: dict[str, Any], tensors: dict[str, Tensor]
    ):
        super().__init__(text)
        self.step, self.rank, self.record, self.tensors = step, rank, record, tensors

    def write_to_run(self, run_path: Path) -> Path:
        """Write it to `bad-step-STEP/` of the run, a pair of files for each rank; returns that folder."""
        folder = run_path / f"bad-step-{self.step + 1:08d}"
        folder.mkdir(exist_ok=True)
        with replacing_file(folder / f"rank-{self.rank}.safetensors") as scratch:
            write_safetensors(scratch, self.tensors)
        with replacing_file(folder / f"rank-{self.rank}.json") as scratch:
            scratch.write_text(json.dumps(self.record, indent=1) + "\n")
        return folder


SMALLEST_LOSS_SCALE = 1.0  # of a loss in fp16: if gradients overflow even unscaled, it is not the scale

OPTIMISER_PART, SCALER_PART = "optimiser", "scaler"  # parts of a checkpoint


class StepRecipe(Protocol):
    """What a recipe says of its steps."""

    @property
    def seed(self) -> int: ...
    @property
    def clips_per_step(self) -> int: ...


class Trainer:
    """Model and optimiser of a recipe on one device: the half of `loop.Trainer` that no stage has for itself.

    The global batch is the recipe's; this rank has its share of the clips and takes `micro_clips` of them at a
    time. A stage draws what is random for the global batch and divides every loss by all of it, so that neither
    ranks nor passes change a step by more than rounding.

    parts              whose weights a checkpoint holds under which name
    remedy             what to do about a step that is no number on finite clips
    max_gradient_norm  longer gradients are shortened to this; 0: none is
    """

    remedy = "lower the learning rate"
    max_gradient_norm = 0.0

    def __init__(
        self,
        recipe: StepRecipe,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        device: torch.device,
        *,
        parts: dict[str, nn.Module],
        world: World,
        micro_clips: int | None,
        precision: Precision | None,
    ) -> None:
        self.recipe, self.model, self.device, self.world = recipe, model, device, world
        self.parts = parts
        self.clips_of_rank = world.clips_per_rank(recipe.clips_per_step)
        self.micro_clips = min(micro_clips or self.clips_of_rank, self.clips_of_rank)
        self.precision = precision or pick_precision("auto", device)
        self.ddp_model = world.wrap_in_ddp(model)
        self.optimiser = optimiser
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision.has_scaled_loss)

    def accumulate_gradients(self, loss_of_pass: Callable[[slice], tuple[Tensor, Tensor]]) -> list[float]:
        """Have the weights' gradients be those of the global batch's loss; what is told of it.

        `part` is given the clips of a pass, of this rank's, and says what they add to the loss of the global batch,
        and to all that is told, a vector.
        """
        told_N = torch.zeros(())
        for clips, last in micro_batches(self.clips_of_rank, self.micro_clips):
            with self.gradient_sync(last):
                loss, added_N = loss_of_pass(clips)
                # DistributedDataParallel divides what it sums by the number of ranks
                self.scaler.scale(loss * self.world.size).backward()
            told_N = added_N if clips.start == 0 else told_N + added_N
        return self.world.sum_over_ranks(*told_N.tolist())

    def gradient_sync(self, last: bool) -> AbstractContextManager[None]:
        """Ranks exchange gradients once a step, in its last pass."""
        if isinstance(self.ddp_model, DistributedDataParallel) and not last:
            return self.ddp_model.no_sync()
        return nullcontext()

    def update_weights(
        self, step: int, batch: Batch, metrics: Json, lr: float, debug_tensors: dict[str, Tensor]
    ) -> Json:
        """Change the weights by their gradients; what there is to log of that. BadStep instead of a bad update.

        `told` of the step, `loss` among it; `kept` is what a BadStep keeps beside the batch. With `overflowed` in
        what is returned, nothing was changed.
        """
        self.scaler.unscale_(self.optimiser)
        trained = [weight for weight in self.model.parameters() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in trained if weight.grad is not None])
        metrics = {**metrics, "gradient_norm": norm.item()}
        has_overflowed = self.scaler.is_enabled() and self.overflowed(metrics)
        if not has_overflowed:
            self.refuse_bad_step(metrics, step, batch, debug_tensors)
        if self.max_gradient_norm and not has_overflowed:
            torch.nn.utils.clip_grads_with_norm_(trained, self.max_gradient_norm, norm)
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group.get("share", 1.0)
        self.scaler.step(self.optimiser)  # which passes over a step that overflowed
        self.scaler.update()
        self.optimiser.zero_grad()
        return {"overflowed": 1, "lr": lr} if has_overflowed else {"gradient_norm": norm.item(), "lr": lr}

    def overflowed(self, told: Json) -> bool:
        """Whether the scaled gradients, and they alone, left the range of fp16: the scale is lowered then."""
        lost = math.isfinite(told["loss"]) and not math.isfinite(told["gradient_norm"])
        return lost and self.scaler.get_scale() > SMALLEST_LOSS_SCALE

    def refuse_bad_step(
        self, metrics: Json, step: int, batch: Batch, debug_tensors: dict[str, Tensor]
    ) -> None:
        """BadStep, naming step and rows, where loss or gradient is no number."""
        bad = [
            f"{name} is {metrics[name]}"
            for name in ("loss", "gradient_norm")
            if not math.isfinite(metrics[name])
        ]
        if not bad:
            return
        finite_B = torch.isfinite(batch.mel_BTF).flatten(1).all(1).cpu().numpy()
        broken = self.rows_of_all_ranks(batch.rows_B[~finite_B])
        if broken:
            cause = f"rows {broken} of the store hold nan or inf: build it again"
        else:
            cause = f"its clips are finite: {self.remedy} (the steps before: metrics.jsonl)"
        shown = {"mel_BTF": batch.mel_BTF, "n_frames_B": batch.n_frames_B}
        raise BadStep(
            f"step {step + 1}: {', '.join(bad)}; stopped before the update; {cause}",
            step=step,
            rank=self.world.rank,
            record={
                "step": step + 1,
                "seed": self.recipe.seed,
                "first_clip": self.world.rank * self.clips_of_rank,
                "clips_per_step": self.recipe.clips_per_step,
                **{name: value if math.isfinite(value) else str(value) for name, value in metrics.items()},
                "rows": batch.rows_B.tolist(),
                "rows_with_nan_or_inf": broken,
            },
            tensors={**shown, "rows_B": torch.from_numpy(batch.rows_B), **debug_tensors},
        )

    def rows_of_all_ranks(self, rows_N: np.ndarray) -> list[int]:
        """The rows of the store that any rank names."""
        places_N = np.zeros(self.world.size * self.clips_of_rank)
        first = self.world.rank * self.clips_of_rank
        places_N[first : first + len(rows_N)] = rows_N + 1
        return [int(place) - 1 for place in self.world.sum_over_ranks(*places_N.tolist()) if place]

    def make_checkpoint(self, step: int) -> Checkpoint:
        """Everything that the next step stands on; the same on every rank."""
        held = {name: model.state_dict() for name, model in self.parts.items()}
        held[OPTIMISER_PART] = optimiser_moments(self.optimiser)
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            held[SCALER_PART] = {
                name: torch.tensor(float(state[name])) for name in ("scale", "_growth_tracker")
            }
        return Checkpoint(step=step, parts=held)

    def restore_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Stand where `checkpoint` was written, by however many ranks."""
        for name, model in self.parts.items():
            model.load_state_dict(checkpoint.parts[name])
        restore_moments(self.optimiser, checkpoint.parts[OPTIMISER_PART])
        if self.scaler.is_enabled() and SCALER_PART in checkpoint.parts:
            told = checkpoint.parts[SCALER_PART]
            state = {"scale": told["scale"].item(), "_growth_tracker": int(told["_growth_tracker"])}
            self.scaler.load_state_dict(self.scaler.state_dict() | state)


def micro_batches(clips: int, micro_clips: int) -> Iterator[tuple[slice, bool]]:
    """The clips of each pass, `most` at a time, and whether it is the last."""
    for first in range(0, clips, micro_clips):
        yield slice(first, min(first + micro_clips, clips)), first + micro_clips >= clips
