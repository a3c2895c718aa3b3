"""One step of pre-training: masks, views, teacher, losses; on one of several ranks, in one or several passes."""

from collections.abc import Iterator
from dataclasses import dataclass

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
from ajepa.training.trainer import Trainer, micro_batches
from pipeline.errors import RunError
from pipeline.loading.loader import Batch

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

    context_NK   int64, a row for each clip, view and mask set
    targets_MGQ  int64, a row for each clip and mask set, of the clip's first view
    views        None for a recipe without views
    """

    clips: int
    context_NK: Tensor
    targets_MGQ: Tensor
    drop_path_factors: DropPathFactors
    views: ViewDraws | None = None

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
            views=views,
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

    def trained_weights(self) -> Iterator[nn.Parameter]:
        """Yield the weights of encoder, predictor and projector."""
        yield from super().trained_weights()
        if self.projector is not None:
            yield from self.projector.parameters()

    def train_step(self, step: int, batch: Batch) -> Json:
        """Take one update, from `step` to `step + 1`; its metrics. BadStep instead of a bad update."""
        recipe = self.recipe

        # Draw masks, views and drop path, a function of seed and step.
        draws = self.draw_for_rank(step)
        views = self.make_views(batch, draws)

        # Count the targets on sound in the global batch: the loss of tokens is divided by their number.
        scored, has_sound_N = self.model.find_scored(draws.context_NK, draws.targets_MGQ, views.n_frames_V)
        (scored_targets,) = map(int, self.world.sum_over_ranks(scored))
        if not scored_targets:
            rows = batch.rows_B.tolist()
            raise RunError(
                f"step {step + 1}: no target lies on sound; rows {rows} are too short for the masks: raise --batch"
            )

        # Forward and backward, pass by pass.
        metrics = self.compute_gradients(step, views, draws, scored_targets, has_sound_N)

        # Update encoder, predictor and projector; the draws go with a bad step.
        lr = recipe.schedule.learning_rate(step, recipe.steps, clips=recipe.clips_per_step)
        update_metrics = self.update_weights(step, batch, metrics, lr, debug_tensors(draws))

        # The teacher follows the encoder, unless an overflow of fp16 has left that as it was.
        momentum = recipe.schedule.teacher_momentum(step, recipe.steps, clips=recipe.clips_per_step)
        if "overflowed" not in update_metrics:
            self.model.update_target(momentum)
        return {**metrics, **update_metrics, "momentum": momentum}

    def draw_for_rank(self, step: int) -> StepDraws:
        """Masks, views and drop path of this rank: its slice of those of the global batch."""
        recipe = self.recipe
        grid = recipe.model.encoder.grid
        rng = step_rng(recipe.seed, step)

        # Draw masks for all clips of the step, whoever computes them. Tokens are predicted in the first views.
        clips = recipe.clips_per_step
        rows = clips * recipe.crops * recipe.mask_sets
        masks = recipe.masks.mask_maker_at(step, rng).sample(rng, grid, batch=rows)
        context_NK = torch.from_numpy(masks.context_BK)
        targets_NGQ = torch.from_numpy(masks.targets_BGQ)
        _, groups, tokens_per_group = targets_NGQ.shape
        targets_MGQ = targets_NGQ.unflatten(0, (clips, recipe.crops, -1))[:, 0].flatten(0, 1)

        # Draw drop path and views.
        views = None
        if recipe.views is not None:
            views = draw_views(recipe.views, recipe.seed, step, clips=clips, bands=grid.bands)
        draws_of_all = StepDraws(
            clips=clips,
            context_NK=context_NK,
            targets_MGQ=targets_MGQ,
            drop_path_factors=self.model.draw_drop_path(rng, rows, len(targets_MGQ) * groups),
            views=views,
        )
        self.step_shape = StepShape(
            clips=clips,
            context_tokens=context_NK.shape[1],
            target_groups=groups,
            tokens_per_group=tokens_per_group,
        )

        # Take this rank's clips.
        first = self.world.rank * self.clips_of_rank
        return draws_of_all.select_clips(slice(first, first + self.clips_of_rank))

    def make_views(self, batch: Batch, draws: StepDraws) -> ViewBatch:
        """The views of this rank's clips; without views in the recipe, the clips themselves."""
        n_frames_V = batch.n_frames_B.cpu()
        if draws.views is None:
            return ViewBatch(clean_BTF=batch.mel_BTF, mel_VTF=batch.mel_BTF, n_frames_V=n_frames_V, crops=1)
        return make_views(
            batch.mel_BTF,
            n_frames_V,
            draws.views,
            frames=self.recipe.model.encoder.grid.frames,
            crops=self.recipe.crops,
            scale=self.input_scale,
        )

    def compute_gradients(
        self, step: int, views: ViewBatch, draws: StepDraws, scored_targets: int, has_sound_N: Tensor
    ) -> Json:
        """Compute the gradients of the global batch's loss; the metrics of the loss.

        The losses are those of the global batch. The signs of health are means over ranks and passes, weighted by
        their scored targets.
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
            clip_gradient_ND = self.compute_clip_gradient(spec.clip, step, mean_ND, has_sound_N)

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
                    pass_draws.context_NK.to(self.device),
                    pass_draws.targets_MGQ.to(self.device),
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
                    gradient_ND = self.compute_clip_gradient(spec.clip, step, mean_ND.detach(), has_sound_N)
                rows = slice(clips.start * rows_per_clip, clips.stop * rows_per_clip)
                loss = loss + (mean_ND * gradient_ND[rows]).sum()

            # What the pass adds to the metrics of the step.
            health_N = torch.stack([getattr(output, name) for name in HEALTH_FIELDS])
            return loss, torch.cat([output.loss.detach()[None], health_N * (output.scored / scored_targets)])

        token_loss, *health = self.accumulate_gradients(loss_of_pass)
        metrics = {"loss": spec.token_weight * token_loss, **dict(zip(HEALTH_FIELDS, health, strict=True))}
        if spec.clip is not None and self.clip_figures is not None:
            figures = self.clip_figures
            metrics["loss"] += spec.clip.weight * figures.loss.item()
            metrics["token_loss"] = token_loss
            metrics["clip_loss"] = figures.loss.item()
            metrics["normality"] = figures.normality.item()
            metrics["disagreement"] = figures.disagreement.item()
            metrics["z_std"] = figures.z_std.item()
        return metrics

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
        valid_BP = self.model.valid_mask_if_padded(views.n_frames_B, self.device)
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
                    pass_draws.context_NK.to(self.device),
                    views.n_frames_V[view_slice],
                    pass_draws.drop_path_factors[0],
                )
            means.append(mean_ND)
        return torch.cat(means)

    def compute_clip_gradient(
        self, objective: ClipObjective, step: int, mean_ND: Tensor, has_sound_N: Tensor
    ) -> Tensor:
        """The gradient of the weighted clip objective at this rank's mean context tokens, `ND`.

        Every rank computes the objective of all ranks' views, in fp32, and gives the projector its gradient.
        """
        assert self.projector is not None

        # The mean context tokens of all views of the step.
        all_ND = self.world.gather_from_ranks(mean_ND).requires_grad_()
        has_sound_A = self.world.gather_from_ranks(has_sound_N.to(self.device).to(torch.uint8)).bool()

        # The loss, and its gradients.
        with torch.autocast(self.device.type, enabled=False):
            self.clip_figures = clip_loss(
                self.projector,
                all_ND,
                has_sound_A,
                draw_directions(objective, self.recipe.seed, step).to(self.device),
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
