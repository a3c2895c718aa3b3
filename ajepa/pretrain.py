"""The pre-training loop: batches in, steps taken, checkpoints and metrics out."""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ajepa.devices import pick_device, precision
from ajepa.jepa import Jepa
from ajepa.masking import Masks
from ajepa.memory import refuse_too_large
from ajepa.recipes import Pretrain, to_json
from ajepa.run import Checkpoint, Json, Run
from ajepa.training_set import TrainingSet, splits_told
from pipeline.dali import open_loader
from pipeline.errors import STOP_SIGNALS, Interrupted, RunError
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


def train(
    run: Run, trainer: "Trainer", batches: Iterator[Batch], stop: threading.Event, *, progress: bool
) -> None:
    """Every step after the run's checkpoint, up to the recipe's last or until asked to stop."""
    recipe, clock, first = trainer.recipe, Clock(), run.step
    with bar_of(first, recipe.steps, shown=progress) as bar:
        for step in range(first, recipe.steps):
            with clock.waiting():
                batch = next(batches)
            line = trainer.step(step, batch)
            clock.clips += len(batch.rows_B)
            clock.skipped += batch.skipped
            done, last = step + 1, step + 1 == recipe.steps
            if done % recipe.log_every == 0 or last:
                line = {"step": done, **line, **clock.read()}
                run.log(line)
                bar.set_postfix_str(postfix(line), refresh=False)
            bar.update()
            stopping = stop.is_set()
            if done % recipe.checkpoint_every == 0 or last or stopping:
                run.save(trainer.checkpoint(done), keep=recipe.keep_checkpoints)
            if stopping:
                return


def bar_of(first: int, steps: int, *, shown: bool) -> tqdm:
    """A progress line with time left; where stderr is a file, one line in 15 seconds."""
    every = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(
        total=steps, initial=first, unit="step", disable=not shown, dynamic_ncols=True, mininterval=every
    )


def postfix(line: Json) -> str:
    """What the progress line shows beside steps and time left."""
    return f"loss {line['loss']:.3f}, {line['clips_per_s']:.0f} clips/s, wait {line['data_wait']:.0%}"


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
        self.optimiser = adamw(self.model, recipe)
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


def adamw(model: Jepa, recipe: Pretrain) -> torch.optim.AdamW:
    """Fused AdamW; biases, norms and single vectors are not decayed."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {
            "params": [weight for weight in weights if weight.ndim > 1],
            "weight_decay": recipe.optimiser.weight_decay,
        },
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = recipe.optimiser.beta1, recipe.optimiser.beta2
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


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


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """An event that STOP_SIGNALS set; a second signal acts at once. Only in the main thread."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Clock:
    """Clips per second, how many were skipped, and the share of time spent waiting for data, since last read."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.started, self.waited_seconds, self.clips, self.skipped = time.perf_counter(), 0.0, 0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited_seconds += time.perf_counter() - began

    def read(self) -> Json:
        seconds = time.perf_counter() - self.started
        told = {
            "clips_per_s": round(self.clips / seconds, 2),
            "data_wait": round(self.waited_seconds / seconds, 4),
            "skipped": self.skipped,
        }
        self.reset()
        return told
