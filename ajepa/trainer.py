"""Trainer: one step of pre-training, on one of several ranks and in one or several passes."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ajepa.bad_step import BadStep
from ajepa.compute import StepShape
from ajepa.curriculum import step_rng
from ajepa.devices import Precision, pick_precision
from ajepa.distributed import ALONE, World
from ajepa.jepa import Jepa, JepaOutput, Keep, Part
from ajepa.optimiser import adamw
from ajepa.recipes import Pretrain
from ajepa.run import Checkpoint, Json
from pipeline.errors import RunError
from pipeline.loader import Batch

MODELS = ("encoder", "target", "predictor")
SIGNS = ("target_std", "prediction_std", "cosine", "explained")  # of health, see JepaOutput
LEAST_SCALE = 1.0  # of a loss in fp16: if gradients overflow even unscaled, it is not the scale


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Draws:
    """What is drawn for some rows (clips times mask sets): masks on the CPU, and drop path."""

    context_NK: Tensor
    targets_NGQ: Tensor
    keep: Keep

    def of(self, rows: slice) -> "Draws":
        """Those of the rows."""
        groups = self.targets_NGQ.shape[1]
        encoder_L2N, predictor_L2M = self.keep
        if encoder_L2N is not None:
            encoder_L2N = encoder_L2N[:, :, rows]
        if predictor_L2M is not None:
            predictor_L2M = predictor_L2M[:, :, rows.start * groups : rows.stop * groups]
        return Draws(
            context_NK=self.context_NK[rows],
            targets_NGQ=self.targets_NGQ[rows],
            keep=(encoder_L2N, predictor_L2M),
        )


class Trainer:
    """Model and optimiser of one recipe on one device: what a step changes, and what a checkpoint holds.

    The global batch is the recipe's; this rank has its share of the clips and takes `micro_clips` of them at a
    time. Masks and drop path are drawn for the global batch, and every loss is divided by the targets scored
    in all of it, so neither ranks nor passes change a step by more than rounding. `shape` is that of the last step.
    """

    shape: StepShape

    def __init__(
        self,
        recipe: Pretrain,
        device: torch.device,
        *,
        world: World = ALONE,
        micro_clips: int | None = None,
        precision: Precision | None = None,
        recompute: bool = False,
        compiled: bool = False,
    ) -> None:
        self.recipe, self.device, self.world = recipe, device, world
        self.clips = world.share(recipe.clips_per_step)
        self.micro_clips = min(micro_clips or self.clips, self.clips)
        self.precision = precision or pick_precision("auto", device)
        self.model = Jepa(recipe.model, seed=recipe.seed).to(device)
        if recompute:
            self.model.recompute()
        if compiled:
            self.model.compiled()
        self.spread = world.spread(self.model)
        self.optimiser = adamw(self.model.parameters(), recipe.optimiser)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision.scaled)

    def step(self, step: int, batch: Batch) -> Json:
        """One update, from `step` to `step + 1`; what there is to log. BadStep instead of a bad update."""
        recipe = self.recipe
        draws, n_frames_B = self.draw(step), batch.n_frames_B.cpu()
        counts = self.model.counts(draws.context_NK, draws.targets_NGQ, n_frames_B)
        scored, heard = (int(count) for count in self.world.sum(*counts))
        if not scored:
            short = f"rows {batch.rows_B.tolist()} are too short for the masks"
            raise RunError(f"step {step + 1}: no target lies on sound; {short}: raise --batch")
        told = self.backward(batch, n_frames_B, draws, scored, heard)
        self.scaler.unscale_(self.optimiser)
        trained = [weight for weight in self.model.parameters() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in trained if weight.grad is not None])
        told["gradient_norm"] = norm.item()
        overflowed = self.scaler.is_enabled() and self.overflowed(told)
        if not overflowed:
            self.refuse_bad(told, step, batch, draws)
        if recipe.max_gradient_norm and not overflowed:
            torch.nn.utils.clip_grads_with_norm_(trained, recipe.max_gradient_norm, norm)
        lr = recipe.schedule.lr(step, recipe.steps, clips=recipe.clips_per_step)
        momentum = recipe.schedule.momentum(step, recipe.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimiser)  # which passes over a step that overflowed
        self.scaler.update()
        self.optimiser.zero_grad()
        if overflowed:
            del told["gradient_norm"]
            return {**told, "overflowed": 1, "lr": lr, "momentum": momentum}
        self.model.update_target(momentum)
        return {**told, "lr": lr, "momentum": momentum}

    def draw(self, step: int) -> Draws:
        """Masks and drop path of this rank: its slice of those of the global batch."""
        recipe, rng = self.recipe, step_rng(self.recipe.seed, step)
        rows_of_all = recipe.clips_per_step * recipe.mask_sets
        masks = recipe.masks.maker(step, rng).sample(rng, recipe.model.encoder.grid, batch=rows_of_all)
        of_all = Draws(
            context_NK=torch.from_numpy(masks.context_BK),
            targets_NGQ=torch.from_numpy(masks.targets_BGQ),
            keep=self.model.draw_keep(rng, rows_of_all, masks.targets_BGQ.shape[1]),
        )
        (_, context), (_, groups, queries) = masks.context_BK.shape, masks.targets_BGQ.shape
        self.shape = StepShape(clips=recipe.clips_per_step, context=context, groups=groups, queries=queries)
        rows = self.clips * recipe.mask_sets
        return of_all.of(slice(self.world.rank * rows, (self.world.rank + 1) * rows))

    def backward(self, batch: Batch, n_frames_B: Tensor, draws: Draws, scored: int, heard: int) -> Json:
        """Gradients of the global batch's loss, and what there is to log of it.

        Loss and clip loss are the global batch's; the signs of health are means over ranks and passes, weighted
        by their scored targets.
        """
        told_N = torch.zeros(2 + len(SIGNS), device=self.device)
        for clips, last in passes(len(n_frames_B), self.micro_clips):
            mine = draws.of(slice(clips.start * self.recipe.mask_sets, clips.stop * self.recipe.mask_sets))
            with self.summing(last):
                with self.precision.autocast(self.device):
                    output: JepaOutput = self.spread(
                        batch.mel_BTF[clips],
                        mine.context_NK.to(self.device),
                        mine.targets_NGQ.to(self.device),
                        n_frames_B[clips],
                        part=Part(scored=scored, heard=heard, keep=mine.keep),
                    )
                # DistributedDataParallel divides what it sums by the number of ranks
                self.scaler.scale(output.loss * self.world.size).backward()
            signs_N = torch.stack([getattr(output, name) for name in SIGNS])
            losses_N = torch.stack([output.loss.detach(), output.clip_loss])
            told_N += torch.cat([losses_N, signs_N * (output.scored / scored)])
        loss, clip_loss, *signs = self.world.sum(*told_N.tolist())
        told = {"loss": loss, **dict(zip(SIGNS, signs, strict=True))}
        return {**told, "clip_loss": clip_loss} if self.recipe.model.clip_weight else told

    def summing(self, last: bool) -> AbstractContextManager[None]:
        """Ranks exchange gradients once a step, in its last pass."""
        if isinstance(self.spread, DistributedDataParallel) and not last:
            return self.spread.no_sync()
        return nullcontext()

    def overflowed(self, told: Json) -> bool:
        """Whether the scaled gradients, and they alone, left the range of fp16: the scale is lowered then."""
        lost = math.isfinite(told["loss"]) and not math.isfinite(told["gradient_norm"])
        return lost and self.scaler.get_scale() > LEAST_SCALE

    def refuse_bad(self, told: Json, step: int, batch: Batch, draws: Draws) -> None:
        """BadStep, naming step and rows, where loss or gradient is no number."""
        bad = [
            f"{name} is {told[name]}" for name in ("loss", "gradient_norm") if not math.isfinite(told[name])
        ]
        if not bad:
            return
        finite_B = torch.isfinite(batch.mel_BTF).flatten(1).all(1).cpu().numpy()
        broken = self.of_all_ranks(batch.rows_B[~finite_B])
        if broken:
            cause = f"rows {broken} of the store hold nan or inf: build it again"
        else:
            cause = (
                "its clips are finite: lower the learning rate, or set max_gradient_norm "
                "(the steps before: metrics.jsonl)"
            )
        raise BadStep(
            f"step {step + 1}: {', '.join(bad)}; stopped before the update; {cause}",
            step=step,
            rank=self.world.rank,
            told={
                "step": step + 1,
                "seed": self.recipe.seed,
                **{name: value if math.isfinite(value) else str(value) for name, value in told.items()},
                "rows": batch.rows_B.tolist(),
                "rows_with_nan_or_inf": broken,
            },
            tensors={
                "mel_BTF": batch.mel_BTF,
                "n_frames_B": batch.n_frames_B,
                "rows_B": torch.from_numpy(batch.rows_B),
                "context_NK": draws.context_NK,
                "targets_NGQ": draws.targets_NGQ,
            },
        )

    def of_all_ranks(self, rows_N: np.ndarray) -> list[int]:
        """The rows of the store that any rank names."""
        places_N = np.zeros(self.world.size * self.clips)
        first = self.world.rank * self.clips
        places_N[first : first + len(rows_N)] = rows_N + 1
        return [int(place) - 1 for place in self.world.sum(*places_N.tolist()) if place]

    def checkpoint(self, step: int) -> Checkpoint:
        """Everything that the next step stands on; the same on every rank."""
        parts = {name: getattr(self.model, name).state_dict() for name in MODELS}
        parts["optimiser"] = moments_of(self.optimiser)
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            parts["scaler"] = {
                name: torch.tensor(float(state[name])) for name in ("scale", "_growth_tracker")
            }
        return Checkpoint(step=step, parts=parts)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Stand where `checkpoint` was written, by however many ranks."""
        for name in MODELS:
            getattr(self.model, name).load_state_dict(checkpoint.parts[name])
        packed = self.optimiser.state_dict()
        for name, value in checkpoint.parts["optimiser"].items():
            index, key = name.split(".")
            packed["state"].setdefault(int(index), {})[key] = value
        self.optimiser.load_state_dict(packed)
        if self.scaler.is_enabled() and "scaler" in checkpoint.parts:
            told = checkpoint.parts["scaler"]
            state = {"scale": told["scale"].item(), "_growth_tracker": int(told["_growth_tracker"])}
            self.scaler.load_state_dict(self.scaler.state_dict() | state)


def passes(clips: int, most: int) -> Iterator[tuple[slice, bool]]:
    """The clips of each pass, `most` at a time, and whether it is the last."""
    for first in range(0, clips, most):
        yield slice(first, min(first + most, clips)), first + most >= clips


def moments_of(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimiser.state_dict()["state"]
    return {f"{index}.{key}": value for index, moments in state.items() for key, value in moments.items()}
