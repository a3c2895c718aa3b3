"""One step of pre-training: masks, views, teacher, losses; on one of several ranks, in one or several passes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ajepa.model.jepa import BatchTotals, DropPathFactors, Jepa, JepaOutput, Targets
from ajepa.model.randomness import step_rng
from ajepa.model.sigreg import ClipLoss, ClipObjective, Projector, clip_loss, draw_directions
from ajepa.model.views import InputScale, ViewBatch, ViewDraws, draw_views, make_views
from ajepa.recipes.optimiser import build_adamw
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.devices import Precision
from ajepa.training.distributed import SINGLE_PROCESS, World
from ajepa.training.flops import StepShape
from ajepa.training.run import Json
from ajepa.training.steps_ahead import StepsAhead
from ajepa.training.trainer import Figures, StartedStep, Trainer, micro_batches
from pipeline.errors import RunError
from pipeline.loading.loader import Batch
from pipeline.loading.transfer import copy_to_device, pin_for_device

JEPA_PARTS = ("encoder", "target", "predictor")  # of a checkpoint

PROJECTOR_PART = "projector"  # of a checkpoint, where the recipe has a clip objective

HEALTH_FIELDS = (
    "target_std",
    "prediction_std",
    "cosine",
    "explained",
)  # of `JepaOutput`, logged with the loss


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepDraws:
    """The random draws for some clips: masks, on the CPU, drop path, and the changes of views.

    context_NK    int64, a row for each clip, view and mask set
    targets_MGQ   int64, a row for each clip and mask set, of the clip's first view
    views         None for a recipe without views
    direction_PK  of the clip objective, the same for all clips; None without one
    shape         of the whole step
    """

    clips: int
    context_NK: Tensor
    targets_MGQ: Tensor
    drop_path_factors: DropPathFactors
    shape: StepShape
    views: ViewDraws | None = None
    direction_PK: Tensor | None = None

    def select_clips(self, clips: slice) -> "StepDraws":
        """The draws of these clips alone."""

        def rows_of_clips(rows: int) -> slice:
            rows_per_clip = rows // self.clips
            return slice(clips.start * rows_per_clip, clips.stop * rows_per_clip)

        # Drop path has a row for each row of the encoder, and of the predictor: each target group.
        encoder_L2N, predictor_L2R = self.drop_path_factors
        if encoder_L2N is not None:
            encoder_L2N = encoder_L2N[:, :, rows_of_clips(encoder_L2N.shape[2])]
        if predictor_L2R is not None:
            predictor_L2R = predictor_L2R[:, :, rows_of_clips(predictor_L2R.shape[2])]

        views = self.views
        if views is not None:
            views = views.select_views(rows_of_clips(len(views.speed_V)))
        return StepDraws(
            clips=clips.stop - clips.start,
            context_NK=self.context_NK[rows_of_clips(len(self.context_NK))],
            targets_MGQ=self.targets_MGQ[rows_of_clips(len(self.targets_MGQ))],
            drop_path_factors=(encoder_L2N, predictor_L2R),
            shape=self.shape,
            views=views,
            direction_PK=self.direction_PK,
        )

    def pin(self, device: torch.device) -> "StepDraws":
        """The same draws in memory that is copied to `device` without waiting."""
        return replace(
            self,
            context_NK=pin_for_device(self.context_NK, device),
            targets_MGQ=pin_for_device(self.targets_MGQ, device),
            direction_PK=None if self.direction_PK is None else pin_for_device(self.direction_PK, device),
        )


class PretrainTrainer(Trainer):
    """Model and optimiser of one recipe on one device: what a step changes, and what a checkpoint holds.

    Masks, views and drop path are drawn for the global batch; the loss of tokens is divided by the number of targets
    scored in all of it, and the clip objective sees the views of all of it. `step_shape` is the shape of the last
    step; `input_scale` says what the values of a batch mean.
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
        input_scale: InputScale = InputScale(),
    ) -> None:
        # The model: encoder, predictor, and the teacher, a copy of the encoder.
        model = Jepa(recipe.model, seed=recipe.seed).to(device)
        if recompute:
            model.enable_recompute()
        if compiled:
            model.compile_stacks()
        parts: dict[str, nn.Module] = {name: getattr(model, name) for name in JEPA_PARTS}

        # The projector of the clip objective. It sees the views of all ranks, so it is not a part of the model, whose
        # gradients are means over the ranks.
        self.projector: Projector | None = None
        weights = list(model.parameters())
        if recipe.model.clip is not None:
            width = recipe.model.encoder.width
            self.projector = Projector(width, recipe.model.clip, seed=recipe.seed + 2).to(device)
            parts[PROJECTOR_PART] = self.projector
            weights += self.projector.parameters()

        # Its optimiser, and the parts of a checkpoint.
        super().__init__(
            recipe,
            model,
            build_adamw(weights, recipe.optimiser),
            device,
            parts=parts,
            world=world,
            micro_clips=micro_clips,
            precision=precision,
        )
        self.max_gradient_norm = recipe.max_gradient_norm
        self.input_scale = input_scale
        self.clip_figures: ClipLoss | None = None
        self.draws_ahead = StepsAhead(self.draw_for_rank, recipe.steps)

    def trained_weights(self) -> Iterator[nn.Parameter]:
        """Yield the weights of encoder, predictor and projector."""
        yield from super().trained_weights()
        if self.projector is not None:
            yield from self.projector.parameters()

    def start_step(self, step: int, batch: Batch) -> StartedStep:
        """Queue one update, from `step` to `step + 1`, on the device, without waiting for anything on it."""
        recipe = self.recipe

        # Masks, views and drop path, a function of seed and step: a thread has drawn them during the step before.
        draws = self.draws_ahead.take(step)
        self.step_shape = draws.shape
        views = self.make_views(batch, draws)

        # Count on the host the targets on sound in the global batch: the loss of tokens is divided by their number.
        scored, has_sound_N = self.model.find_scored(
            draws.context_NK, draws.targets_MGQ, views.n_frames_V, views.mel_VTF.shape[1]
        )
        silent_rows = int(np.count_nonzero(~has_sound_N.numpy()))
        scored_targets, all_silent_rows = map(int, self.world.sum_over_ranks(scored, silent_rows))
        if not scored_targets:
            rows = batch.rows_B.tolist()
            raise RunError(
                f"step {step + 1}: no target lies on sound; rows {rows} are too short for the masks: raise --batch"
            )

        # Forward and backward, pass by pass.
        has_sound_A = self.has_sound_on_all_ranks(has_sound_N, all_silent_rows)
        figures = self.compute_gradients(views, draws, scored_targets, has_sound_A)

        # Update encoder, predictor and projector. The teacher follows the encoder, unless that was left as it was.
        lr = recipe.schedule.learning_rate(step, recipe.steps, clips=recipe.clips_per_step)
        figures, is_updated = self.update_weights(figures, lr)
        momentum = recipe.schedule.teacher_momentum(step, recipe.steps, clips=recipe.clips_per_step)
        self.model.update_target(momentum, is_updated)

        # Once the figures are there: the draws go with a bad step.
        def finish(metrics: Json) -> Json:
            metrics = self.read_update(metrics, step, batch, lr, debug_tensors(draws))
            return {**metrics, "momentum": momentum}

        return StartedStep(figures, finish)

    def has_sound_on_all_ranks(self, has_sound_N: Tensor, silent_rows: int) -> Tensor:
        """Which rows of all ranks have a context with sound, bool `A` on the CPU; `silent_rows` of them have none."""
        if not silent_rows:
            return torch.ones(len(has_sound_N) * self.world.size, dtype=torch.bool)
        return self.world.gather_from_ranks(has_sound_N.to(torch.uint8)).bool()

    def draw_for_rank(self, step: int) -> StepDraws:
        """Masks, views and drop path of this rank: its slice of those of the global batch. Changes nothing here."""
        recipe = self.recipe
        grid = recipe.sound_grid
        rng = step_rng(recipe.seed, step)

        # Draw masks for all clips of the step, whoever computes them. Tokens are predicted in the first views.
        clips = recipe.clips_per_step
        rows = clips * recipe.crops * recipe.mask_sets
        masks = recipe.masks.mask_maker_at(step, rng).sample(rng, grid, batch=rows)
        context_NK = torch.from_numpy(masks.context_BK)
        targets_NGQ = torch.from_numpy(masks.targets_BGQ)
        _, groups, tokens_per_group = targets_NGQ.shape
        targets_MGQ = targets_NGQ.unflatten(0, (clips, recipe.crops, -1))[:, 0].flatten(0, 1)

        # Draw drop path, views and directions.
        views = None
        direction_PK = None
        if recipe.views is not None:
            views = draw_views(recipe.views, recipe.seed, step, clips=clips, bands=grid.bands)
        if recipe.model.clip is not None:
            direction_PK = draw_directions(recipe.model.clip, recipe.seed, step)
        draws_of_all = StepDraws(
            clips=clips,
            context_NK=context_NK,
            targets_MGQ=targets_MGQ,
            drop_path_factors=self.model.draw_training_drop_path(rng, rows, len(targets_MGQ) * groups),
            shape=StepShape(
                clips=clips,
                context_tokens=context_NK.shape[1],
                target_groups=groups,
                tokens_per_group=tokens_per_group,
            ),
            views=views,
            direction_PK=direction_PK,
        )

        # Take this rank's clips.
        first = self.world.rank * self.clips_of_rank
        return draws_of_all.select_clips(slice(first, first + self.clips_of_rank)).pin(self.device)

    def make_views(self, batch: Batch, draws: StepDraws) -> ViewBatch:
        """The views of this rank's clips, of the columns that a clip can fill; without views, the clips as they are."""
        frames = self.recipe.sound_grid.frames
        if draws.views is None:
            mel_BTF = batch.mel_BTF[:, :frames]
            return ViewBatch(clean_BTF=mel_BTF, mel_VTF=mel_BTF, n_frames_V=batch.n_frames_B, crops=1)
        return make_views(
            batch.mel_BTF,
            batch.n_frames_B,
            draws.views,
            frames=frames,
            crops=self.recipe.crops,
            scale=self.input_scale,
        )

    def compute_gradients(
        self, views: ViewBatch, draws: StepDraws, scored_targets: int, has_sound_A: Tensor
    ) -> Figures:
        """Compute the gradients of the global batch's loss; the figures of the loss.

        The losses are those of the global batch. The signs of health are means over ranks and passes, weighted by
        their scored targets. `has_sound_A` says on the CPU which rows of all ranks have a context with sound.
        """
        spec = self.recipe.model
        crops = views.crops
        rows_per_clip = crops * self.recipe.mask_sets
        targets = self.compute_targets(views)

        # In one pass, the clip objective is computed in it. In several, the mean context tokens of all passes are
        # computed before the first one, because the objective is a function of all of them.
        clip_gradient_ND: Tensor | None = None
        if spec.clip is not None and self.micro_clips < self.clips_of_rank:
            mean_ND = self.context_means_of_passes(views, draws)
            clip_gradient_ND = self.compute_clip_gradient(spec.clip, draws, mean_ND, has_sound_A)

        def loss_of_pass(clips: slice) -> tuple[Tensor, Tensor]:
            # Forward, on the views of these clips and their rows of the masks.
            pass_draws = draws.select_clips(clips)
            batch_totals = BatchTotals(
                scored_targets=scored_targets, drop_path_factors=pass_draws.drop_path_factors
            )
            view_slice = slice(clips.start * crops, clips.stop * crops)
            with self.precision.autocast(self.device):
                output: JepaOutput = self.ddp_model(
                    views.mel_VTF[view_slice],
                    copy_to_device(pass_draws.context_NK, self.device),
                    copy_to_device(pass_draws.targets_MGQ, self.device),
                    views.n_frames_V[view_slice],
                    batch_totals=batch_totals,
                    targets=targets and targets.select_clips(clips),
                )

            # The clip objective adds its gradient at the mean context tokens, by a product that has that gradient.
            loss = spec.token_weight * output.loss
            if spec.clip is not None:
                mean_ND = output.context_mean_ND
                gradient_ND = clip_gradient_ND
                if gradient_ND is None:
                    gradient_ND = self.compute_clip_gradient(spec.clip, draws, mean_ND.detach(), has_sound_A)
                rows = slice(clips.start * rows_per_clip, clips.stop * rows_per_clip)
                loss = loss + (mean_ND * gradient_ND[rows]).sum()

            # What the pass adds to the metrics of the step.
            health_N = torch.stack([getattr(output, name) for name in HEALTH_FIELDS])
            return loss, torch.cat([output.loss.detach()[None], health_N * (output.scored / scored_targets)])

        token_loss, *health = self.accumulate_gradients(loss_of_pass).unbind()
        figures = {"loss": spec.token_weight * token_loss, **dict(zip(HEALTH_FIELDS, health, strict=True))}
        if spec.clip is not None and self.clip_figures is not None:
            clip_loss = self.clip_figures.loss.detach().double()
            figures["loss"] = figures["loss"] + spec.clip.weight * clip_loss
            figures["token_loss"] = token_loss
            figures["clip_loss"] = clip_loss
            for name in ("normality", "disagreement", "z_std"):
                figures[name] = getattr(self.clip_figures, name).double()
        return figures

    @torch.no_grad()
    def compute_targets(self, views: ViewBatch) -> Targets | None:
        """The targets of this rank's clips, normalised over the step; None where the model computes them in its pass.

        Positions have means over all clips of a step, and clean crops differ from the student's views: the teacher
        passes over them first.
        """
        spec = self.recipe.model
        if self.recipe.views is None and spec.target_norm == "token":
            return None
        features = []
        frames = views.clean_BTF.shape[1]
        valid_BP = self.model.valid_mask_if_padded(views.n_frames_B, self.device, frames)
        for clips, _ in micro_batches(self.clips_of_rank, self.micro_clips):
            pass_valid_BP = None if valid_BP is None else valid_BP[clips]
            with self.precision.autocast(self.device):
                features.append(self.model.target_features(views.clean_BTF[clips], pass_valid_BP).float())
        return self.model.normalise_targets(torch.cat(features), valid_BP, self.world.sum_tensor_over_ranks)

    def context_means_of_passes(self, views: ViewBatch, draws: StepDraws) -> Tensor:
        """The mean context tokens of all rows of this rank, `ND`, computed pass by pass without a gradient."""
        means = []
        for clips, _ in micro_batches(self.clips_of_rank, self.micro_clips):
            pass_draws = draws.select_clips(clips)
            view_slice = slice(clips.start * views.crops, clips.stop * views.crops)
            with self.precision.autocast(self.device):
                mean_ND = self.model.context_means(
                    views.mel_VTF[view_slice],
                    copy_to_device(pass_draws.context_NK, self.device),
                    views.n_frames_V[view_slice],
                    pass_draws.drop_path_factors[0],
                )
            means.append(mean_ND)
        return torch.cat(means)

    def compute_clip_gradient(
        self, objective: ClipObjective, draws: StepDraws, mean_ND: Tensor, has_sound_A: Tensor
    ) -> Tensor:
        """The gradient of the weighted clip objective at this rank's mean context tokens, `ND`.

        Every rank computes the objective of all ranks' views, in fp32, and gives the projector its gradient.
        """
        assert self.projector is not None
        assert draws.direction_PK is not None

        # The mean context tokens of all views of the step.
        all_ND = self.world.gather_from_ranks(mean_ND).requires_grad_()

        # The loss, and its gradients. The projector gets a view: hooks on modules, such as those of PyTorch's FLOP
        # counter, refuse inputs that gradients are asked for directly.
        with torch.autocast(self.device.type, enabled=False):
            self.clip_figures = clip_loss(
                self.projector,
                all_ND.view_as(all_ND),
                has_sound_A,
                copy_to_device(draws.direction_PK, self.device),
                views=self.recipe.crops * self.recipe.mask_sets,
                sigreg_share=objective.sigreg_share,
            )
        weights = list(self.projector.parameters())
        gradient_AD, *weight_gradients = torch.autograd.grad(
            objective.weight * self.clip_figures.loss, [all_ND, *weights]
        )

        # Ranks agree to the bit: the mean of what they computed. The optimiser expects the scale of the loss.
        for weight, gradient in zip(weights, weight_gradients, strict=True):
            mean_gradient = self.world.sum_tensor_over_ranks(gradient) / self.world.size
            weight.grad = self.scaler.scale(mean_gradient)
        first = self.world.rank * len(mean_ND)
        return gradient_AD[first : first + len(mean_ND)]


def debug_tensors(draws: StepDraws) -> dict[str, Tensor]:
    """The draws of a step, as tensors that are kept beside a bad one."""
    tensors = {"context_NK": draws.context_NK, "targets_MGQ": draws.targets_MGQ}
    if draws.views is not None:
        for name in ViewDraws.__slots__:
            tensors[name] = torch.from_numpy(getattr(draws.views, name))
    return tensors
