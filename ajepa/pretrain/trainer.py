"""One step of pre-training: masks, teacher, predictor, loss; on one of several ranks, in one or several passes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ajepa.model.jepa import BatchTotals, DropPathFactors, Jepa, JepaOutput
from ajepa.model.randomness import step_rng
from ajepa.recipes.optimiser import build_adamw
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.devices import Precision
from ajepa.training.distributed import SINGLE_PROCESS, World
from ajepa.training.flops import StepShape
from ajepa.training.run import Json
from ajepa.training.trainer import Trainer
from pipeline.errors import RunError
from pipeline.loading.loader import Batch

JEPA_PARTS = ("encoder", "target", "predictor")  # of a checkpoint

HEALTH_FIELDS = (
    "target_std",
    "prediction_std",
    "cosine",
    "explained",
)  # of `JepaOutput`, logged with the loss


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepDraws:
    """The random draws for some rows (clips times mask sets): masks, on the CPU, and drop path."""

    context_NK: Tensor
    targets_NGQ: Tensor
    drop_path_factors: DropPathFactors

    def select_rows(self, rows: slice) -> "StepDraws":
        """The draws of these rows alone. The predictor has a row for each target group of each of them."""
        groups = self.targets_NGQ.shape[1]
        encoder_L2N, predictor_L2M = self.drop_path_factors
        if encoder_L2N is not None:
            encoder_L2N = encoder_L2N[:, :, rows]
        if predictor_L2M is not None:
            predictor_L2M = predictor_L2M[:, :, rows.start * groups : rows.stop * groups]
        return StepDraws(
            context_NK=self.context_NK[rows],
            targets_NGQ=self.targets_NGQ[rows],
            drop_path_factors=(encoder_L2N, predictor_L2M),
        )


class PretrainTrainer(Trainer):
    """Model and optimiser of one recipe on one device: what a step changes, and what a checkpoint holds.

    Masks and drop path are drawn for the global batch, and every loss is divided by the number of targets scored in
    all of it. `step_shape` is the shape of the last step.
    """

    recipe: Pretrain
    model: Jepa
    step_shape: StepShape
    remedy = "lower the learning rate, or set max_gradient_norm"

    def __init__(
        self,
        recipe: Pretrain,
        device: torch.device,
        *,
        world: World = SINGLE_PROCESS,
        micro_clips: int | None = None,
        precision: Precision | None = None,
        recompute: bool = False,
        compiled: bool = False,
    ) -> None:
        # The model: encoder, predictor, and the teacher, a copy of the encoder.
        model = Jepa(recipe.model, seed=recipe.seed).to(device)
        if recompute:
            model.enable_recompute()
        if compiled:
            model.compile_stacks()

        # Its optimiser, and the parts of a checkpoint.
        super().__init__(
            recipe,
            model,
            build_adamw(model.parameters(), recipe.optimiser),
            device,
            parts={name: getattr(model, name) for name in JEPA_PARTS},
            world=world,
            micro_clips=micro_clips,
            precision=precision,
        )
        self.max_gradient_norm = recipe.max_gradient_norm

    def train_step(self, step: int, batch: Batch) -> Json:
        """Take one update, from `step` to `step + 1`; its metrics. BadStep instead of a bad update."""
        recipe = self.recipe

        # Draw masks and drop path, a function of seed and step.
        draws = self.draw_for_rank(step)

        # Count the targets on sound in the global batch: every loss is divided by their number.
        n_frames_B = batch.n_frames_B.cpu()
        counts = self.model.count_scored(draws.context_NK, draws.targets_NGQ, n_frames_B)
        scored_targets, rows_with_sound = (int(count) for count in self.world.sum_over_ranks(*counts))
        if not scored_targets:
            rows = batch.rows_B.tolist()
            raise RunError(
                f"step {step + 1}: no target lies on sound; rows {rows} are too short for the masks: raise --batch"
            )

        # Forward and backward, pass by pass.
        metrics = self.compute_gradients(batch, n_frames_B, draws, scored_targets, rows_with_sound)

        # Update encoder and predictor; the masks go with a bad step.
        lr = recipe.schedule.learning_rate(step, recipe.steps, clips=recipe.clips_per_step)
        masks = {"context_NK": draws.context_NK, "targets_NGQ": draws.targets_NGQ}
        update_metrics = self.update_weights(step, batch, metrics, lr, masks)

        # The teacher follows the encoder, unless an overflow of fp16 has left that as it was.
        momentum = recipe.schedule.teacher_momentum(step, recipe.steps)
        if "overflowed" not in update_metrics:
            self.model.update_target(momentum)
        return {**metrics, **update_metrics, "momentum": momentum}

    def draw_for_rank(self, step: int) -> StepDraws:
        """Masks and drop path of this rank: its slice of those of the global batch."""
        recipe = self.recipe
        rng = step_rng(recipe.seed, step)

        # Draw for all clips of the step, whoever computes them.
        rows_of_all = recipe.clips_per_step * recipe.mask_sets
        mask_maker = recipe.masks.mask_maker_at(step, rng)
        masks = mask_maker.sample(rng, recipe.model.encoder.grid, batch=rows_of_all)
        _, context_tokens = masks.context_BK.shape
        _, groups, tokens_per_group = masks.targets_BGQ.shape
        draws_of_all = StepDraws(
            context_NK=torch.from_numpy(masks.context_BK),
            targets_NGQ=torch.from_numpy(masks.targets_BGQ),
            drop_path_factors=self.model.draw_drop_path(rng, rows_of_all, groups),
        )
        self.step_shape = StepShape(
            clips=recipe.clips_per_step,
            context_tokens=context_tokens,
            target_groups=groups,
            tokens_per_group=tokens_per_group,
        )

        # Take this rank's rows.
        rows = self.clips_of_rank * recipe.mask_sets
        return draws_of_all.select_rows(slice(self.world.rank * rows, (self.world.rank + 1) * rows))

    def compute_gradients(
        self, batch: Batch, n_frames_B: Tensor, draws: StepDraws, scored_targets: int, rows_with_sound: int
    ) -> Json:
        """Compute the gradients of the global batch's loss; the metrics of the loss.

        Loss and clip loss are those of the global batch. The signs of health are means over ranks and passes,
        weighted by their scored targets.
        """
        mask_sets = self.recipe.mask_sets

        def loss_of_pass(clips: slice) -> tuple[Tensor, Tensor]:
            # Forward, on these clips and their rows of the masks.
            pass_draws = draws.select_rows(slice(clips.start * mask_sets, clips.stop * mask_sets))
            batch_totals = BatchTotals(
                scored_targets=scored_targets,
                rows_with_sound=rows_with_sound,
                drop_path_factors=pass_draws.drop_path_factors,
            )
            with self.precision.autocast(self.device):
                output: JepaOutput = self.ddp_model(
                    batch.mel_BTF[clips],
                    pass_draws.context_NK.to(self.device),
                    pass_draws.targets_NGQ.to(self.device),
                    n_frames_B[clips],
                    batch_totals=batch_totals,
                )

            # What the pass adds to the metrics of the step.
            losses_N = torch.stack([output.loss.detach(), output.clip_loss])
            health_N = torch.stack([getattr(output, name) for name in HEALTH_FIELDS])
            return output.loss, torch.cat([losses_N, health_N * (output.scored / scored_targets)])

        loss, clip_loss, *health = self.accumulate_gradients(loss_of_pass)
        metrics = {"loss": loss, **dict(zip(HEALTH_FIELDS, health, strict=True))}
        if self.recipe.model.clip_weight:
            metrics["clip_loss"] = clip_loss
        return metrics
