"""The joint-embedding predictive architecture: context encoder, target encoder, predictor and loss.

The method of I-JEPA (arXiv 2301.08243, section 3), on patches of a log-mel spectrogram as in A-JEPA (arXiv 2311.15830)
and Audio-JEPA (arXiv 2507.02915). For one clip x, with context tokens K and groups G of target tokens q:

    context       z   = f(x, K)                            the encoder sees only the patches in K
    prediction    p_q = g(z, K, G)_q                       the predictor predicts each group separately
    targets       h   = f'(x)                              the target encoder sees the whole clip
                  t_q = (h_q - mean h_q) / sqrt(var h_q + 1e-5)       normalised over the width D of the token
    loss          L   = 1/|S| sum over S of d(p_q, t_q)    S: all targets of the batch that are not padding
                  d(p, t) = |p - t|^2 / D                  I-JEPA's formula; for the other distances see `token_loss`
    after a step  f' <- m f' + (1 - m) f                   `Jepa.update_target`, momentum m

I-JEPA averages the summed squared distance of each target block. Here every scored token has the same weight. Because
of the division by D, a predictor that outputs zeros has loss 1 at any width. With `target_norm` position the targets
are centred by position instead (`centre_by_position`). A second objective, on whole views, is in sigreg.py.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ajepa.model.patches import has_no_padding, valid_token_mask
from ajepa.model.sigreg import ClipObjective
from ajepa.model.transformer import compile_blocks
from ajepa.model.vit import Encoder, EncoderSpec, Predictor, PredictorSpec, gather_tokens
from pipeline.loading.transfer import copy_to_device

TokenLossName = Literal["l2", "squared_l2", "cosine"]

TargetNormName = Literal["token", "position"]

# Keeps quotients of variances finite when the variance is 0.
DIVISOR_FLOOR = 1e-12

# Features whose root mean square is smaller are not scaled up to 1.
SMALLEST_SIZE = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class JepaSpec:
    """The shape of the model, and its training loss.

    loss           distance between a prediction and its target (`token_loss`)
    target_layers  teacher layers that give the targets. 1: the last layer, after its norm. K: the mean of the last K
                   blocks, each normalised over the features (data2vec, arXiv 2202.03555)
    target_norm    how targets are normalised. `token`: each token over its features, as in the papers. `position`:
                   the mean over the step's clips is taken away at each position, and each feature is divided by its
                   root mean square, so that a target says how a clip differs from others at that place
    token_weight   weight of the prediction of tokens beside the clip objective
    clip           the objective on whole views (sigreg.py); None: there is none
    """

    encoder: EncoderSpec
    predictor: PredictorSpec
    loss: TokenLossName = "l2"
    target_layers: int = 1
    target_norm: TargetNormName = "token"
    token_weight: float = 1.0
    clip: ClipObjective | None = None

    def __post_init__(self) -> None:
        if self.loss not in get_args(TokenLossName):
            raise ValueError(f"loss must be one of {', '.join(get_args(TokenLossName))}, got {self.loss!r}")
        if self.target_norm not in get_args(TargetNormName):
            raise ValueError(
                f"target_norm must be {' or '.join(get_args(TargetNormName))}, got {self.target_norm!r}"
            )
        if not 1 <= self.target_layers <= self.encoder.depth:
            raise ValueError(
                f"target_layers must lie in 1 to {self.encoder.depth}, the depth of the teacher, "
                f"got {self.target_layers}"
            )
        if not (self.token_weight > 0 or (self.token_weight == 0 and self.clip is not None)):
            raise ValueError(
                f"token_weight must be above 0, or 0 beside a clip objective, got {self.token_weight}"
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class JepaOutput:
    """Loss and health figures of one batch: scalars on the model's device; all but the first two are detached.

    All are computed in fp32 from predictions and targets, whatever autocast these were computed under.

    loss             mean loss over the scored targets of all mask sets
    context_mean_ND  float32, mean context token of each row, over the tokens that are not padding (0 without one);
                     the input of the clip objective
    scored           number of scored targets: those that are not padding. With 0 the loss is 0 without a meaning;
                     the caller must refuse that batch
    target_std       standard deviation of the target features over the scored tokens, before normalisation, mean
                     over the dimensions. 0: the features of all tokens are equal
    prediction_std   the same figure of the predictions, whose targets are normalised
    cosine           mean cosine similarity between a prediction and its target
    explained        share of the targets' variance about their mean that the predictions explain, after all
                     predictions are scaled by one best factor (the cosine loss does not fix their scale).
                     1: all variance; 0: no more than a constant prediction explains
    """

    loss: Tensor
    context_mean_ND: Tensor
    scored: Tensor
    target_std: Tensor
    prediction_std: Tensor
    cosine: Tensor
    explained: Tensor


# Drop path's factors for the rows of encoder and predictor, `L2N` and `L2M`; None without drop path.
DropPathFactors = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BatchTotals:
    """Figures of a whole batch, for a pass over a part of it; with them the losses of all parts add up to the batch's.

    scored_targets     number of targets in the whole batch that are not padding
    drop_path_factors  drop path's factors for the rows of this part in encoder and predictor; they are drawn for the
                       whole batch and then cut
    """

    scored_targets: int
    drop_path_factors: DropPathFactors


class Jepa(nn.Module):
    """Predicts the features of hidden patches, computed by a moving average of the encoder, from the visible patches.

    `target`, the teacher, is that moving average of `encoder`. It sees the whole clip, has no gradient and stays in
    eval mode. The initial weights are a function of `spec` and `seed`.
    """

    def __init__(self, spec: JepaSpec, *, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec.encoder, seed=seed)
        self.predictor = Predictor(spec.predictor, spec.encoder.width, spec.encoder.grid, seed=seed + 1)

        # The teacher starts as a copy of the encoder.
        self.target = copy.deepcopy(self.encoder).requires_grad_(False).eval()

    def forward(
        self,
        mel_VTF: Tensor,
        context_NK: Tensor,
        targets_MGQ: Tensor,
        n_frames_V: Tensor,
        rng: np.random.Generator | None = None,
        batch_totals: BatchTotals | None = None,
        targets: "Targets | None" = None,
    ) -> JepaOutput:
        """Return the loss of one batch: normalised `mel_VTF`, int64 masks, and the number of valid frames of each view.

        Views have the frames of the grid, or of its first columns where the masks have no token past these.
        N is V or a multiple of V: several mask sets of a view, one after the other, share one pass of the teacher.
        With `targets`, of B clips, the V views are those of the clips, one after the other, and tokens are predicted
        in the first view of each clip: M = B N / V. Without, every view is a clip, the teacher computes the targets
        from it here, and M = N. Padding tokens (past a view's valid frames) are neither attended to nor scored. Keep
        `n_frames_V` on the CPU: attention masks are skipped if every token is valid, and checking that on a GPU would
        synchronise it. Drop path draws from `rng`, which is needed only in training and only if the spec has drop
        path. `batch_totals` already contains drop path's factors. With it, `loss` is the contribution of these rows
        to the loss of the whole batch; the other figures describe these rows only.
        """
        rows, groups, _ = targets_MGQ.shape
        views = len(mel_VTF)
        mask_sets = len(context_NK) // views

        # Valid tokens (not padding) of each view and of each row; None if all are valid.
        valid_VP = self.valid_mask_if_padded(n_frames_V, mel_VTF.device, mel_VTF.shape[1])
        valid_NP = None if valid_VP is None else valid_VP.repeat_interleave(mask_sets, dim=0)

        # Drop path: drawn here, or taken from the totals when this pass is a part of a larger batch.
        if batch_totals is None:
            keep = self.draw_drop_path(rng, len(context_NK), rows * groups)
        else:
            keep = batch_totals.drop_path_factors
        keep_L2N, keep_L2R = (
            None if factors is None else copy_to_device(factors, mel_VTF.device) for factors in keep
        )

        # Context: z = f(x, K).
        context_NKD = self.encoder(mel_VTF, context_NK, valid_NP, keep_L2N)
        mean_ND = mean_context_tokens(context_NKD, context_NK, valid_NP)

        # Targets: h = f'(x), computed once for each clip; each row selects its own target tokens from h.
        if targets is None:
            targets = self.compute_targets(mel_VTF, valid_VP)
        feature_MGQD, target_MGQD = (
            gather_tokens(x_BPD, targets_MGQ.flatten(1)).unflatten(1, targets_MGQ.shape[1:])
            for x_BPD in (targets.feature_BPD, targets.target_BPD)
        )

        # Prediction, in the first view of each clip: p = g(z, K, G).
        views_per_clip = views // len(targets.target_BPD)
        first_MKD, first_MK = (
            _rows_of_first_view(x, views_per_clip, mask_sets) for x in (context_NKD, context_NK)
        )
        valid_MP = None if valid_NP is None else _rows_of_first_view(valid_NP, views_per_clip, mask_sets)
        prediction_MGQD = self.predictor(first_MKD, first_MK, targets_MGQ, valid_MP, keep_L2R)

        # Loss: the mean distance over the targets that are not padding.
        scored_MGQ = torch.ones(targets_MGQ.shape, device=mel_VTF.device)
        if valid_MP is not None:
            scored_MGQ = valid_MP.gather(1, targets_MGQ.flatten(1)).view_as(targets_MGQ).float()
        with torch.autocast(mel_VTF.device.type, enabled=False):
            return _score_predictions(
                prediction_MGQD.float(),
                target_MGQD.float(),
                feature_MGQD.float(),
                scored_MGQ,
                mean_ND,
                self.spec.loss,
                batch_totals,
            )

    @torch.no_grad()
    def target_features(self, mel_BTF: Tensor, valid_BP: Tensor | None = None) -> Tensor:
        """Return the teacher's features of every token, `BPD`, not yet normalised."""
        if self.spec.target_layers == 1:
            return self.target(mel_BTF, valid_BP=valid_BP)
        layers = self.target.top_block_outputs(mel_BTF, self.spec.target_layers, valid_BP=valid_BP)
        return torch.stack([normalise_features(layer_BPD.float()) for layer_BPD in layers]).mean(dim=0)

    def compute_targets(self, mel_BTF: Tensor, valid_BP: Tensor | None = None) -> "Targets":
        """Return the targets of a whole batch of clips."""
        return self.normalise_targets(self.target_features(mel_BTF, valid_BP), valid_BP)

    @torch.no_grad()
    def normalise_targets(
        self,
        feature_BPD: Tensor,
        valid_BP: Tensor | None,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> "Targets":
        """Return features and targets; `sum_over_ranks` adds the sums that other ranks have of their clips."""
        feature_BPD = feature_BPD.float()
        if self.spec.target_norm == "token":
            target_BPD = normalise_features(feature_BPD)
        else:
            target_BPD = centre_by_position(feature_BPD, valid_BP, sum_over_ranks)
        return Targets(feature_BPD=feature_BPD, target_BPD=target_BPD)

    @torch.no_grad()
    def context_means(
        self, mel_VTF: Tensor, context_NK: Tensor, n_frames_V: Tensor, keep_L2N: Tensor | None
    ) -> Tensor:
        """Return `JepaOutput.context_mean_ND` of these views, without a gradient."""
        valid_VP = self.valid_mask_if_padded(n_frames_V, mel_VTF.device, mel_VTF.shape[1])
        valid_NP = None
        if valid_VP is not None:
            valid_NP = valid_VP.repeat_interleave(len(context_NK) // len(mel_VTF), dim=0)
        keep_L2N = None if keep_L2N is None else copy_to_device(keep_L2N, mel_VTF.device)
        context_NKD = self.encoder(mel_VTF, context_NK, valid_NP, keep_L2N)
        return mean_context_tokens(context_NKD, context_NK, valid_NP)

    def valid_mask_if_padded(
        self, n_frames_B: Tensor, device: torch.device, frames: int | None = None
    ) -> Tensor | None:
        """Return which tokens are valid (not padding), as bool `BP` on `device`, or None if all are valid.

        `frames`: those of the views; None: as many as the grid has.
        """
        grid = self.spec.encoder.grid
        grid = grid.first_columns(frames or grid.frames)
        if has_no_padding(n_frames_B, grid.first_frame_of_last_column + 1):
            return None
        return copy_to_device(valid_token_mask(n_frames_B, grid), device)

    def find_scored(
        self, context_NK: Tensor, targets_MGQ: Tensor, n_frames_V: Tensor, frames: int | None = None
    ) -> tuple[int, Tensor]:
        """Return the number of scored targets, and which rows have a context with sound, bool `N`; all on the CPU.

        `frames` as in `valid_mask_if_padded`.
        """
        views = len(n_frames_V)
        grid = self.spec.encoder.grid
        grid = grid.first_columns(frames or grid.frames)
        if has_no_padding(n_frames_V, grid.first_frame_of_last_column + 1):
            return targets_MGQ.numel(), torch.ones(len(context_NK), dtype=torch.bool)

        # Rows of all views, and of the first view of each clip.
        mask_sets = len(context_NK) // views
        valid_NP = valid_token_mask(n_frames_V, grid).repeat_interleave(mask_sets, dim=0)
        valid_MP = _rows_of_first_view(valid_NP, len(context_NK) // len(targets_MGQ), mask_sets)
        scored = int(np.count_nonzero(valid_MP.gather(1, targets_MGQ.flatten(1)).numpy()))
        return scored, valid_NP.gather(1, context_NK).any(1)

    def draw_drop_path(
        self, rng: np.random.Generator | None, encoder_rows: int, predictor_rows: int
    ) -> DropPathFactors:
        """Draw drop path's factors: first the encoder's, then the predictor's, which has a row for each target group.

        Nothing is drawn if neither has drop path. ValueError if a training pass needs `rng` and it is None.
        """
        encoder = self.encoder.transformer_spec
        predictor = self.predictor.transformer_spec
        if not self.training or not (encoder.drop_path or predictor.drop_path):
            return None, None
        if rng is None:
            raise ValueError("drop path draws from the generator of the step: give `rng`")
        return self.draw_training_drop_path(rng, encoder_rows, predictor_rows)

    def draw_training_drop_path(
        self, rng: np.random.Generator, encoder_rows: int, predictor_rows: int
    ) -> DropPathFactors:
        """Draw drop path's factors as in training, whatever mode the model is in: a thread may call this."""
        encoder = self.encoder.transformer_spec
        predictor = self.predictor.transformer_spec
        return encoder.draw_drop_path(rng, encoder_rows), predictor.draw_drop_path(rng, predictor_rows)

    def update_target(self, momentum: float, is_updated: Tensor | None = None) -> None:
        """Update the teacher's weights and buffers: `f' <- momentum f' + (1 - momentum) f`.

        `is_updated`, 1 or 0 on the device: with 0 nothing changes. None: 1.
        """
        move_average(
            _weights_and_buffers(self.target), _weights_and_buffers(self.encoder), momentum, is_updated
        )

    def train(self, mode: bool = True) -> "Jepa":
        """Set training or eval mode of encoder and predictor; the teacher stays in eval mode."""
        super().train(mode)
        self.target.eval()
        return self

    def set_band_statistics(self, mean_F: Tensor, std_F: Tensor) -> None:
        """Set the band statistics of encoder and teacher (`Encoder.set_band_statistics`)."""
        for encoder in (self.encoder, self.target):
            encoder.set_band_statistics(mean_F, std_F)

    def enable_recompute(self) -> "Jepa":
        """Keep one vector per token and block for the backward pass and recompute the rest; results do not change."""
        self.encoder.recompute = self.predictor.recompute = True
        return self

    def compile_stacks(self) -> "Jepa":
        """Compile the teacher's blocks for their single shape, the other blocks for any number of tokens.

        The numbers of visible and predicted tokens change from step to step: `a_jepa` has 125 shapes in 150 steps,
        too many to compile each of them. Padding to one shape would waste six tenths of the computed context (one
        sixth with random patches). One dynamic graph for each stack accepts any number of tokens. On two CPU cores
        `small` started after 137 s and then took 458 ms a step instead of 517.
        """
        compile_blocks(self.target.blocks, dynamic=False)
        compile_blocks([*self.encoder.blocks, *self.predictor.blocks], dynamic=True)
        return self


# Targets.


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Targets:
    """The teacher's features of every token of some clips, and the targets that they become; both float32 `BPD`."""

    feature_BPD: Tensor
    target_BPD: Tensor

    def select_clips(self, clips: slice) -> "Targets":
        """Those of these clips alone."""
        return Targets(feature_BPD=self.feature_BPD[clips], target_BPD=self.target_BPD[clips])


def centre_by_position(
    feature_BPD: Tensor, valid_BP: Tensor | None, sum_over_ranks: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the features less their mean at each position, divided by the root mean square of each dimension.

    Means are over the clips of the step whose token at that position is valid; targets of padding are meaningless.
    """
    if valid_BP is None:
        valid_BP = feature_BPD.new_ones(feature_BPD.shape[:2], dtype=torch.bool)
    valid_BP1 = valid_BP[..., None].float()

    # The mean of each position.
    sum_PE = torch.cat(((feature_BPD * valid_BP1).sum(0), valid_BP1.sum(0)), dim=1)
    sum_PE = sum_over_ranks(sum_PE)
    count_P1 = sum_PE[:, -1:]
    centred_BPD = feature_BPD - sum_PE[:, :-1] / count_P1.clamp(min=1)

    # The root mean square of each dimension, over all tokens.
    power_D = sum_over_ranks((centred_BPD * valid_BP1).square().sum((0, 1)))
    size_D = (power_D / count_P1.sum().clamp(min=1)).sqrt()
    return centred_BPD / size_D.clamp(min=SMALLEST_SIZE)


def mean_context_tokens(context_NKD: Tensor, context_NK: Tensor, valid_NP: Tensor | None) -> Tensor:
    """Return the mean of the context tokens of each row that are not padding, float32 `ND`; 0 if there are none."""
    if valid_NP is None:
        return context_NKD.float().mean(dim=1)
    return mean_valid_tokens(context_NKD.float(), valid_NP.gather(1, context_NK))


def _rows_of_first_view(x_N: Tensor, views: int, mask_sets: int) -> Tensor:
    """Return the rows of the first view of each clip; rows are ordered by clip, view and mask set."""
    if views == 1:
        return x_N
    return x_N.unflatten(0, (-1, views, mask_sets))[:, 0].flatten(0, 1)


# The loss.


def normalise_features(feature_BGQD: Tensor) -> Tensor:
    """Return the features normalised to targets: each token's vector has mean 0 and variance 1 over its width."""
    return F.layer_norm(feature_BGQD, feature_BGQD.shape[-1:])


def token_loss(prediction_BGQD: Tensor, target_BGQD: Tensor, loss: TokenLossName) -> Tensor:
    """Return the distance of each prediction p from its target t of width D, as `BGQ`.

    squared_l2  |p - t|^2 / D          I-JEPA's formula of its "average L2", so A-JEPA's too; Audio-JEPA's paper
    l2          |p - t| / sqrt(D)      the norm, not squared; its gradient has the same length at any distance
    cosine      1 - p t / (|p| |t|)    Audio-JEPA's code

    Because of the division by the width, the prediction p = 0 has loss 1 (t is normalised).
    """
    match loss:
        case "l2":
            distance_BGQ = torch.linalg.vector_norm(prediction_BGQD - target_BGQD, dim=-1)
            return distance_BGQ / target_BGQD.shape[-1] ** 0.5
        case "squared_l2":
            return (prediction_BGQD - target_BGQD).square().mean(dim=-1)
        case "cosine":
            return 1 - F.cosine_similarity(prediction_BGQD, target_BGQD, dim=-1)


def mean_valid_tokens(x_NPD: Tensor, valid_NP: Tensor) -> Tensor:
    """Return the mean vector of the valid tokens of each row, `ND`; 0 if a row has no valid token."""
    share_NP1 = (valid_NP / valid_NP.sum(1, keepdim=True).clamp(min=1))[..., None]
    return torch.where(valid_NP[..., None], x_NPD, 0).mul(share_NP1).sum(dim=1)


def _score_predictions(
    prediction_MGQD: Tensor,
    target_MGQD: Tensor,
    feature_MGQD: Tensor,
    scored_MGQ: Tensor,
    context_mean_ND: Tensor,
    loss: TokenLossName,
    batch_totals: BatchTotals | None,
) -> JepaOutput:
    """Return the loss and the health figures over the scored targets (1 in `scored_MGQ`; 0: not scored)."""
    scored = scored_MGQ.sum()

    # The weight of each target in the mean over these rows, and its weight in the loss of the whole batch.
    share_MGQ = scored_MGQ / scored.clamp(min=1)
    loss_share_MGQ = share_MGQ
    if batch_totals is not None:
        loss_share_MGQ = scored_MGQ / batch_totals.scored_targets
    loss_value = (token_loss(prediction_MGQD, target_MGQD, loss) * loss_share_MGQ).sum()

    # Health figures, without gradients.
    with torch.no_grad():
        return JepaOutput(
            loss=loss_value,
            context_mean_ND=context_mean_ND,
            scored=scored,
            target_std=_weighted_variance_D(feature_MGQD, share_MGQ).sqrt().mean(),
            prediction_std=_weighted_variance_D(prediction_MGQD, share_MGQ).sqrt().mean(),
            cosine=(share_MGQ * F.cosine_similarity(prediction_MGQD, target_MGQD, dim=-1)).sum(),
            explained=_explained_variance(prediction_MGQD, target_MGQD, share_MGQ),
        )


# Health figures.


def _explained_variance(prediction_NGQD: Tensor, target_NGQD: Tensor, share_NGQ: Tensor) -> Tensor:
    """Return `1 - min over a of E|a p - t|^2 / Var t`, with p the predictions and t the targets."""

    def mean_product(x_NGQD: Tensor, y_NGQD: Tensor) -> Tensor:
        return (share_NGQ * (x_NGQD * y_NGQD).mean(dim=-1)).sum()

    pt = mean_product(prediction_NGQD, target_NGQD)
    pp = mean_product(prediction_NGQD, prediction_NGQD)
    tt = mean_product(target_NGQD, target_NGQD)

    # E|a p - t|^2 has its minimum at a = pt / pp.
    missed = tt - pt.square() / pp.clamp(min=DIVISOR_FLOOR)
    return 1 - missed / _weighted_variance_D(target_NGQD, share_NGQ).mean().clamp(min=DIVISOR_FLOOR)


def _weighted_variance_D(x_NGQD: Tensor, share_NGQ: Tensor) -> Tensor:
    """Return the variance of each dimension over the tokens, weighted by `share_NGQ`, which sums to 1."""
    x_ND = x_NGQD.flatten(0, -2)
    share_N = share_NGQ.flatten()
    return share_N @ (x_ND - share_N @ x_ND).square()


@torch.no_grad()
def move_average(
    averages: list[Tensor], values: list[Tensor], momentum: float, is_updated: Tensor | None
) -> None:
    """Move each average to `momentum * average + (1 - momentum) * value`; `is_updated` as in `Jepa.update_target`."""
    if is_updated is None:
        torch._foreach_lerp_(averages, values, 1.0 - momentum)
        return

    # The share is on the device, which knows whether there is an update; no foreach function takes it from there.
    share = is_updated * (1.0 - momentum)
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value, share)


def _weights_and_buffers(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
