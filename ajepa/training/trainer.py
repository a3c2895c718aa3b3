"""One update of the weights from a step's clips, dealt to ranks and passes: the part that all stages share."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
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
from ajepa.training.run import BAD_STEP_PREFIX, Json
from pipeline.errors import RunError
from pipeline.files import replacing_file
from pipeline.loading.loader import Batch
from pipeline.loading.transfer import HostCopy

OPTIMISER_PART = "optimiser"  # of a checkpoint

SCALER_PART = "scaler"  # of a checkpoint, in fp16 alone

SCALER_FIELDS = ("scale", "_growth_tracker")  # of torch's GradScaler: the two that change from step to step

SCALE_FIGURE = "loss_scale"  # of a step, in fp16 alone; not logged

SMALLEST_LOSS_SCALE = 1.0  # in fp16: gradients that overflow at this scale would overflow without any


class BadStep(RunError):
    """A step whose update must not happen; `record` and `tensors` of this rank explain it."""

    def __init__(
        self, text: str, *, step: int, rank: int, record: dict[str, Any], tensors: dict[str, Tensor]
    ):
        super().__init__(text)
        self.step = step
        self.rank = rank
        self.record = record
        self.tensors = tensors

    @property
    def has_broken_clips(self) -> bool:
        """Whether clips of the step, of any rank, hold nan or inf."""
        return bool(self.record.get("rows_with_nan_or_inf"))

    def write_to_run(self, run_path: Path) -> Path:
        """Write record and tensors to the run's `bad-step-STEP/`, a pair of files for each rank; that folder."""
        # The number of the step as it would be logged, counted from 1.
        folder = run_path / f"{BAD_STEP_PREFIX}{self.step + 1:08d}"
        folder.mkdir(exist_ok=True)
        with replacing_file(folder / f"rank-{self.rank}.safetensors") as scratch:
            write_safetensors(scratch, self.tensors)
        with replacing_file(folder / f"rank-{self.rank}.json") as scratch:
            scratch.write_text(json.dumps(self.record, indent=1) + "\n")
        return folder


Figures = dict[str, Tensor]  # metrics of a step that are still being computed: float64 scalars on the device


class StartedStep:
    """A step whose work is queued on the device. `read_metrics` waits for it; until then the host may go on.

    Its update has not happened and never will, where the device has found loss or gradient to be no number.
    """

    def __init__(self, figures: Figures, finish: Callable[[Json], Json]) -> None:
        self._names = list(figures)
        self._values = HostCopy(torch.stack(list(figures.values())))
        self._finish: Callable[[Json], Json] | None = finish
        self._metrics: Json = {}

    def read_metrics(self) -> Json:
        """Wait for the end of the step; its metrics, `loss` among them. BadStep where its update was refused."""
        if self._finish is not None:
            values = self._values.wait().tolist()
            self._metrics = self._finish(dict(zip(self._names, values, strict=True)))
            self._finish = None  # holds the step's clips
        return self._metrics


class TrainRecipe(Protocol):
    """The fields of a recipe that every stage needs: its steps, and when something is written."""

    @property
    def seed(self) -> int: ...
    @property
    def clips_per_step(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def log_every(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def keep_checkpoints(self) -> int: ...


class Trainer(ABC):
    """Model and optimiser of a recipe on one device: the half of `loop.StageTrainer` that is the same in every stage.

    The global batch is the recipe's. This rank has its share of the clips and takes `micro_clips` of them at a
    time. A stage draws its random numbers for the global batch and divides every loss by all of it, so that neither
    ranks nor passes change a step by more than rounding.

    parts              the modules whose weights a checkpoint holds, by the name of the part
    remedy             advice for a step whose loss or gradient is no number although its clips are finite
    max_gradient_norm  longer gradients are shortened to this; 0: none is
    """

    remedy = "lower the learning rate"
    max_gradient_norm = 0.0

    def __init__(
        self,
        recipe: TrainRecipe,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        device: torch.device,
        *,
        parts: dict[str, nn.Module],
        world: World,
        micro_clips: int | None,
        precision: Precision | None,
    ) -> None:
        self.recipe = recipe
        self.model = model
        self.optimiser = optimiser
        self.device = device
        self.parts = parts

        # This rank's share of a step, and how much of it passes through the model at once.
        self.world = world
        self.clips_of_rank = world.clips_per_rank(recipe.clips_per_step)
        self.micro_clips = min(micro_clips or self.clips_of_rank, self.clips_of_rank)
        self.ddp_model = world.wrap_in_ddp(model)

        # The numbers of its forward and backward pass.
        self.precision = precision or pick_precision("auto", device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision.has_scaled_loss)

    @abstractmethod
    def start_step(self, step: int, batch: Batch) -> StartedStep:
        """Queue one update, from `step` to `step + 1`, on the device, without waiting for anything on it."""

    def train_step(self, step: int, batch: Batch) -> Json:
        """Take one update, from `step` to `step + 1`; its metrics. BadStep instead of a bad update."""
        return self.start_step(step, batch).read_metrics()

    def accumulate_gradients(self, loss_of_pass: Callable[[slice], tuple[Tensor, Tensor]]) -> Tensor:
        """Give the weights the gradients of the global batch's loss; values to log, summed over passes and ranks, `N`.

        `loss_of_pass` takes the clips of a pass, a slice of this rank's, and returns two things: their share of the
        global batch's loss, and a vector of values to sum.
        """
        sum_N = torch.zeros(())
        for clips, is_last in micro_batches(self.clips_of_rank, self.micro_clips):
            with self.gradient_sync(is_last):
                loss, value_N = loss_of_pass(clips)
                # DistributedDataParallel divides the sum of the gradients by the number of ranks: undo that.
                self.scaler.scale(loss * self.world.size).backward()
            sum_N = value_N if clips.start == 0 else sum_N + value_N
        return self.world.sum_tensor_over_ranks(sum_N.double())

    def gradient_sync(self, is_last_pass: bool) -> AbstractContextManager[None]:
        """The context of a backward pass: ranks exchange gradients once a step, in its last pass."""
        if isinstance(self.ddp_model, DistributedDataParallel) and not is_last_pass:
            return self.ddp_model.no_sync()
        return nullcontext()

    def update_weights(self, figures: Figures, lr: float) -> tuple[Figures, Tensor]:
        """Change the weights by their gradients at rate `lr`, unless the step's loss or a gradient is no number.

        Returns the figures with those of the update, and on the device 1, or 0 where nothing was changed. `figures`
        hold the step's `loss`.
        """
        # Measure the gradient, as it is without the scale of the loss.
        self.scaler.unscale_(self.optimiser)
        trained = [weight for weight in self.trained_weights() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in trained if weight.grad is not None])
        figures = {**figures, "gradient_norm": norm.double()}
        if self.scaler.is_enabled():
            figures[SCALE_FIGURE] = self.scaler.scale(torch.ones_like(norm)).double()

        # Refuse a step without a usable loss or gradient: the device decides, for the host does not know them yet.
        is_updated = (figures["loss"].isfinite() & norm.isfinite()).float()

        # Shorten the gradient.
        if self.max_gradient_norm:
            torch.nn.utils.clip_grads_with_norm_(trained, self.max_gradient_norm, norm)

        # Take the step. A fused optimiser leaves all as it is where its `found_inf` is 1; scalers tell it so too.
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group.get("share", 1.0)
        self.optimiser.found_inf = 1 - is_updated  # type: ignore[attr-defined]
        self.optimiser.step()
        self.scaler.update()
        self.optimiser.zero_grad()
        return figures, is_updated

    def read_update(
        self, metrics: Json, step: int, batch: Batch, lr: float, debug_tensors: dict[str, Tensor]
    ) -> Json:
        """Metrics of the update, from those of the step once they are there; BadStep where there was none.

        A BadStep keeps `debug_tensors` beside the batch. Metrics with `overflowed` are those of a step that changed
        nothing but the scale of the loss.
        """
        scale = metrics.pop(SCALE_FIGURE, None)
        if scale is not None and has_scale_overflow(metrics, scale):
            del metrics["gradient_norm"]
            return {**metrics, "overflowed": 1, "lr": lr}
        self.refuse_bad_step(metrics, step, batch, debug_tensors)
        return {**metrics, "lr": lr}

    def trained_weights(self) -> Iterator[nn.Parameter]:
        """Yield every weight that a step may change."""
        yield from self.model.parameters()

    def refuse_bad_step(
        self, metrics: Json, step: int, batch: Batch, debug_tensors: dict[str, Tensor]
    ) -> None:
        """BadStep, naming step and rows, where loss or gradient is no number."""
        not_finite = [name for name in ("loss", "gradient_norm") if not math.isfinite(metrics[name])]
        if not not_finite:
            return

        # Tell broken data from a diverging model.
        is_finite_V = torch.isfinite(batch.mel_BTF).flatten(1).all(1)
        is_finite_B = is_finite_V.view(len(batch.rows_B), -1).all(1).cpu().numpy()
        broken_rows = self.rows_of_all_ranks(batch.rows_B[~is_finite_B])
        if broken_rows:
            cause = f"rows {broken_rows} of the store hold nan or inf: build it again"
        else:
            cause = f"its clips are finite: {self.remedy} (the steps before: metrics.jsonl)"

        # Keep everything that computes this loss again. JSON has no nan: such values are written as words.
        numbers = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        record = {
            "step": step + 1,
            "seed": self.recipe.seed,
            "first_clip": self.world.rank * self.clips_of_rank,
            "clips_per_step": self.recipe.clips_per_step,
            **numbers,
            "rows": batch.rows_B.tolist(),
            "rows_with_nan_or_inf": broken_rows,
        }
        tensors = {
            "mel_BTF": batch.mel_BTF,
            "n_frames_B": batch.n_frames_B,
            "rows_B": torch.from_numpy(batch.rows_B),
            **debug_tensors,
        }
        values = ", ".join(f"{name} is {metrics[name]}" for name in not_finite)
        raise BadStep(
            f"step {step + 1}: {values}; stopped before the update; {cause}",
            step=step,
            rank=self.world.rank,
            record=record,
            tensors=tensors,
        )

    def rows_of_all_ranks(self, rows_N: np.ndarray) -> list[int]:
        """The rows of the store that any rank names; every rank calls this with its own."""
        # Each rank fills its own slots of a vector. 0 is an empty slot, so rows are counted from 1 in it.
        slots_N = np.zeros(self.world.size * self.clips_of_rank)
        first = self.world.rank * self.clips_of_rank
        slots_N[first : first + len(rows_N)] = rows_N + 1
        return [int(slot) - 1 for slot in self.world.sum_over_ranks(*slots_N.tolist()) if slot]

    def make_checkpoint(self, step: int) -> Checkpoint:
        """Everything that the next step depends on; the same on every rank."""
        # Weights, their averages, and what the optimiser remembers of their gradients.
        tensors = {name: model.state_dict() for name, model in self.parts.items()}
        tensors[OPTIMISER_PART] = optimiser_moments(self.optimiser)

        # In fp16, the scale of the loss.
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            tensors[SCALER_PART] = {name: torch.tensor(float(state[name])) for name in SCALER_FIELDS}
        return Checkpoint(step=step, parts=tensors, precision=self.precision.name)

    def load_parts(self, weights: Mapping[str, dict[str, Tensor]]) -> None:
        """Give these parts these weights; the other parts, and the optimiser, stay as they are."""
        for name, tensors in weights.items():
            self.parts[name].load_state_dict(tensors)

    def restore_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Go back to where `checkpoint` was written, by any number of ranks."""
        for name, model in self.parts.items():
            model.load_state_dict(checkpoint.parts[name])
        restore_moments(self.optimiser, checkpoint.parts[OPTIMISER_PART])

        # A run that is carried on in fp16 may have begun without a scale, in another precision.
        if self.scaler.is_enabled() and SCALER_PART in checkpoint.parts:
            saved = checkpoint.parts[SCALER_PART]
            state = {"scale": saved["scale"].item(), "_growth_tracker": int(saved["_growth_tracker"])}
            self.scaler.load_state_dict(self.scaler.state_dict() | state)


def has_scale_overflow(metrics: Json, scale: float) -> bool:
    """Whether the scaled gradients, and they alone, left the range of fp16: the scale is lowered then."""
    is_gradient_lost = math.isfinite(metrics["loss"]) and not math.isfinite(metrics["gradient_norm"])
    return is_gradient_lost and scale > SMALLEST_LOSS_SCALE


def micro_batches(clips: int, micro_clips: int) -> Iterator[tuple[slice, bool]]:
    """Yield the clips of each pass, `micro_clips` at a time, and whether the pass is the last."""
    for first in range(0, clips, micro_clips):
        end = first + micro_clips
        yield slice(first, min(end, clips)), end >= clips
