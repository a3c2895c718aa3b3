"""Pre-training: what a step of it is, and what must fit before the first one."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ajepa.devices import pick_device, precision
from ajepa.jepa import Jepa
from ajepa.loop import asked_to_stop, train
from ajepa.masking import Masks
from ajepa.memory import refuse_too_large
from ajepa.optimiser import adamw
from ajepa.recipes import Pretrain, to_json
from ajepa.run import Checkpoint, Json, Run
from ajepa.training_set import TrainingSet, splits_told
from pipeline.dali import open_loader
from pipeline.errors import Interrupted, RunError
from pipeline.loader import Batch, View, to_stderr
from pipeline.store import FeatureStore

MODELS = ("encoder", "target", "predictor")


def pretrain(
    trained_on: Path | str | FeatureStore | TrainingSet,
    recipe: Pretrain,
    run_path: Path,
    *,
    steps: int | None = None,
    batch: int | None = None,
    device: str = "auto",
    loader: Literal["dali", "plain"] = "dali",
    recompute: bool = False,
    compiled: bool = False,
    on_broken: Literal["raise", "skip"] = "raise",
    progress: bool = False,
    say: Callable[[str], None] = to_stderr,
) -> Run:
    """Train `recipe` on every split of a store, or of a training set's, but `eval`; the finished run at `run_path`.

    A run that is there is carried on with, exactly: on a CPU and with equal versions, weights and metrics are
    bit for bit those of a run that was never interrupted. `steps` and `batch` (clips per step) replace the
    recipe's; `recompute` and `compiled` are `Jepa`'s. With `on_broken="skip"` another clip of its step stands in
    for one that cannot be read; `skipped` in the metrics counts them, since the line before. SIGINT, SIGTERM
    and SIGUSR1 end the step at hand, write a checkpoint and raise Interrupted. Nothing is written before store, recipe,
    device and memory fit: RunError or StoreError says what does not.
    """
    recipe = recipe.resized(steps=steps, clips_per_step=batch)
    on = pick_device(device)
    asked = trained_on if isinstance(trained_on, TrainingSet) else TrainingSet(stores=(trained_on,))
    store = asked.opened(recipe)
    order, identity = asked.order(store, recipe), asked.identity(store)
    view = view_of(identity, recipe)
    with open_loader(store, order, view, kind=loader, device=on, on_broken=on_broken, say=say) as batches:
        refuse_too_large(recipe, on, bf16=precision(on)[0], recompute=recompute)
        run = Run.start(run_path, recipe=to_json(recipe), identity=identity)
        with run.locked():
            run.rewind()
            if run.finished:
                say(f"{run.path}: already at its last step, {run.step}")
                return run
            trainer = Trainer(recipe, on, recompute=recompute, compiled=compiled)
            if run.step:
                trainer.restore(run.load())
            else:
                trainer.model.know_bands(*asked.bands(store))
            for line in asked.told(store, order):
                say(line)
            say(
                f"{run.path}: step {run.step} of {recipe.steps}, {len(order.rows_N)} clips of "
                f"{splits_told(store)}, {trainer.precision}"
            )
            with asked_to_stop() as stop:
                train(run, trainer, batches.batches(run.step, recipe.steps), stop, progress=progress)
    if not run.finished:
        say(f"{run.path}: checkpoint written at step {run.step} of {recipe.steps}; run me again to carry on")
        raise Interrupted
    return run


class Trainer:
    """Model and optimiser of one recipe on one device: what a step changes, and what a checkpoint holds."""

    def __init__(
        self, recipe: Pretrain, device: torch.device, *, recompute: bool = False, compiled: bool = False
    ) -> None:
        self.recipe, self.device = recipe, device
        self.model = Jepa(recipe.model, seed=recipe.seed).to(device)
        if recompute:
            self.model.recompute()
        if compiled:
            self.model.compiled()
        self.optimiser = adamw(self.model.parameters(), recipe.optimiser)
        self.bf16, self.precision = precision(device)

    def step(self, step: int, batch: Batch) -> Json:
        """One update, from `step` to `step + 1`; what there is to log. RunError instead of a bad update."""
        recipe, model = self.recipe, self.model
        rng = np.random.default_rng([recipe.seed, step, 0])  # 0: the rank
        count = len(batch.rows_B) * recipe.mask_sets
        masks = recipe.masks.maker(step, rng).sample(rng, recipe.model.encoder.grid, batch=count)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            output = model(batch.mel_BTF, *on_device(masks, self.device), batch.n_frames_B.cpu(), rng)
        output.loss.backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        told = {
            "loss": output.loss.item(),
            "gradient_norm": torch.nn.utils.get_total_norm(gradients).item(),
            "target_std": output.target_std.item(),
            "prediction_std": output.prediction_std.item(),
            "cosine": output.cosine.item(),
            "explained": output.explained.item(),
        }
        if recipe.model.clip_weight:
            told["clip_loss"] = output.clip_loss.item()
        refuse_bad_step(told, output.scored.item(), step, batch)
        lr, momentum = recipe.schedule.lr(step, recipe.steps), recipe.schedule.momentum(step, recipe.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
        self.optimiser.zero_grad()
        model.update_target(momentum)
        return {**told, "lr": lr, "momentum": momentum}

    def checkpoint(self, step: int) -> Checkpoint:
        """Everything that the next step stands on."""
        parts = {name: getattr(self.model, name).state_dict() for name in MODELS}
        return Checkpoint(step=step, parts={**parts, "optimiser": self._moments()})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Stand where `checkpoint` was written."""
        for name in MODELS:
            getattr(self.model, name).load_state_dict(checkpoint.parts[name])
        packed = self.optimiser.state_dict()
        for name, value in checkpoint.parts["optimiser"].items():
            index, key = name.split(".")
            packed["state"].setdefault(int(index), {})[key] = value
        self.optimiser.load_state_dict(packed)

    def _moments(self) -> dict[str, Tensor]:
        state = self.optimiser.state_dict()["state"]
        return {f"{index}.{key}": value for index, moments in state.items() for key, value in moments.items()}


def view_of(identity: Json, recipe: Pretrain) -> View:
    """How the recipe looks at clips, normalised as the run will remember."""
    return View(
        frames=recipe.view_frames,
        crop=recipe.crop,
        mean=identity["mean"],
        std=identity["std"],
        seed=recipe.seed,
    )


def on_device(masks: Masks, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(masks.context_BK).to(device), torch.from_numpy(masks.targets_BGQ).to(device)


def refuse_bad_step(told: Json, scored: float, step: int, batch: Batch) -> None:
    """RunError, naming step and rows, where loss or gradient is no number or no target was scored."""
    if not scored:
        rows = f"rows {batch.rows_B.tolist()}"
        raise RunError(
            f"step {step + 1}: no target lies on sound; {rows} are too short for the masks: raise --batch"
        )
    bad = [f"{name} is {told[name]}" for name in ("loss", "gradient_norm") if not math.isfinite(told[name])]
    if not bad:
        return
    broken_B = ~torch.isfinite(batch.mel_BTF).flatten(1).all(1).cpu().numpy()
    if broken_B.any():
        cause = f"rows {batch.rows_B[broken_B].tolist()} of the store hold nan or inf: rebuild it"
    else:
        cause = f"rows {batch.rows_B.tolist()} are finite: lower the learning rate"
    raise RunError(f"step {step + 1}: {', '.join(bad)}; stopped before the update; {cause}")
