"""Trainer: one step of pre-training, on one of several ranks and in one or several passes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ajepa.model.jepa import BatchTotals, DropPathKeep, Jepa, JepaOutput
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

JEPA_PARTS = ("encoder", "target", "predictor")

HEALTH_FIELDS = ("target_std", "prediction_std", "cosine", "explained")  # of health, see JepaOutput


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepDraws:
    """What is drawn for some rows (clips times mask sets): masks on the CPU, and drop path."""

    context_NK: Tensor
    targets_NGQ: Tensor
    drop_path_keep: DropPathKeep

    def select_rows(self, rows: slice) -> "StepDraws":
        """Those of the rows."""
        groups = self.targets_NGQ.shape[1]
        encoder_L2N, predictor_L2M = self.drop_path_keep
        if encoder_L2N is not None:
            encoder_L2N = encoder_L2N[:, :, rows]
        if predictor_L2M is not None:
            predictor_L2M = predictor_L2M[:, :, rows.start * groups : rows.stop * groups]
        return StepDraws(
            context_NK=self.context_NK[rows],
            targets_NGQ=self.targets_NGQ[rows],
            drop_path_keep=(encoder_L2N, predictor_L2M),
        )


class PretrainTrainer(Trainer):
    """Model and optimiser of one recipe on one device: what a step changes, and what a checkpoint holds.

    Masks and drop path are drawn for the global batch, and every loss is divided by the targets scored in all of
    it. `shape` is that of the last step.
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
        model = Jepa(recipe.model, seed=recipe.seed).to(device)
        if recompute:
            model.enable_recompute()
        if compiled:
            model.compile_stacks()
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
        """One update, from `step` to `step + 1`; what there is to log. BadStep instead of a bad update."""
        recipe = self.recipe
        draws, n_frames_B = self.draw_for_rank(step), batch.n_frames_B.cpu()
        counts = self.model.count_scored(draws.context_NK, draws.targets_NGQ, n_frames_B)
        scored, heard = (int(count) for count in self.world.sum_over_ranks(*counts))
        if not scored:
            short = f"rows {batch.rows_B.tolist()} are too short for the masks"
            raise RunError(f"step {step + 1}: no target lies on sound; {short}: raise --batch")
        told = self.compute_gradients(batch, n_frames_B, draws, scored, heard)
        lr = recipe.schedule.learning_rate(step, recipe.steps, clips=recipe.clips_per_step)
        momentum = recipe.schedule.teacher_momentum(step, recipe.steps)
        masks = {"context_NK": draws.context_NK, "targets_NGQ": draws.targets_NGQ}
        made = self.update_weights(step, batch, told, lr, masks)
        if "overflowed" not in made:
            self.model.update_target(momentum)
        return {**told, **made, "momentum": momentum}

    def draw_for_rank(self, step: int) -> StepDraws:
        """Masks and drop path of this rank: its slice of those of the global batch."""
        recipe, rng = self.recipe, step_rng(self.recipe.seed, step)
        rows_of_all = recipe.clips_per_step * recipe.mask_sets
        masks = recipe.masks.mask_maker_at(step, rng).sample(
            rng, recipe.model.encoder.grid, batch=rows_of_all
        )
        of_all = StepDraws(
            context_NK=torch.from_numpy(masks.context_BK),
            targets_NGQ=torch.from_numpy(masks.targets_BGQ),
            drop_path_keep=self.model.draw_drop_path(rng, rows_of_all, masks.targets_BGQ.shape[1]),
        )
        (_, context), (_, groups, queries) = masks.context_BK.shape, masks.targets_BGQ.shape
        self.step_shape = StepShape(
            clips=recipe.clips_per_step,
            context_tokens=context,
            target_groups=groups,
            tokens_per_group=queries,
        )
        rows = self.clips_of_rank * recipe.mask_sets
        return of_all.select_rows(slice(self.world.rank * rows, (self.world.rank + 1) * rows))

    def compute_gradients(
        self, batch: Batch, n_frames_B: Tensor, draws: StepDraws, scored_targets: int, rows_with_sound: int
    ) -> Json:
        """Gradients of the global batch's loss, and what there is to log of it.

        Loss and clip loss are the global batch's; the signs of health are means over ranks and passes, weighted
        by their scored targets.
        """

        def loss_of_pass(clips: slice) -> tuple[Tensor, Tensor]:
            mine = draws.select_rows(
                slice(clips.start * self.recipe.mask_sets, clips.stop * self.recipe.mask_sets)
            )
            with self.precision.autocast(self.device):
                output: JepaOutput = self.ddp_model(
                    batch.mel_BTF[clips],
                    mine.context_NK.to(self.device),
                    mine.targets_NGQ.to(self.device),
                    n_frames_B[clips],
                    batch_totals=BatchTotals(
                        scored_targets=scored_targets,
                        rows_with_sound=rows_with_sound,
                        drop_path_keep=mine.drop_path_keep,
                    ),
                )
            signs_N = torch.stack([getattr(output, name) for name in HEALTH_FIELDS])
            losses_N = torch.stack([output.loss.detach(), output.clip_loss])
            return output.loss, torch.cat([losses_N, signs_N * (output.scored / scored_targets)])

        loss, clip_loss, *signs = self.accumulate_gradients(loss_of_pass)
        told = {"loss": loss, **dict(zip(HEALTH_FIELDS, signs, strict=True))}
        return {**told, "clip_loss": clip_loss} if self.recipe.model.clip_weight else told
