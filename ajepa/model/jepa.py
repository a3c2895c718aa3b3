"""The joint-embedding predictive architecture: context encoder, target encoder, predictor and loss.

The method of I-JEPA (arXiv 2301.08243, section 3), on patches of a log-mel spectrogram as in A-JEPA (arXiv 2311.15830)
and Audio-JEPA (arXiv 2507.02915). For one clip x, with context tokens K and groups G of target tokens q:

    context       z   = f(x, K)                            the encoder sees only the patches in K
    prediction    p_q = g(z, K, G)_q                       the predictor predicts each group separately
    targets       h   = f'(x)                              the target encoder sees the whole clip
                  t_q = (h_q - mean h_q) / sqrt(var h_q + 1e-5)       normalised over the width D of the token
    loss          L   = 1/|S| sum over S of d(p_q, t_q)    S: all targets of the batch that are not padding
                  d(p, t) = |p - t| / sqrt(D)              A-JEPA's; for the other distances see `token_loss`
    after a step  f' <- m f' + (1 - m) f                   `Jepa.update_target`, momentum m

I-JEPA averages the summed squared distance of each target block. Here every scored token has the same weight. Because
of the division by D, a predictor that outputs zeros has loss 1 at any width.
"""

import copy
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ajepa.model.patches import slow_cosine_basis, valid_token_mask
from ajepa.model.transformer import compile_blocks
from ajepa.model.vit import Encoder, EncoderSpec, Predictor, PredictorSpec, gather_tokens

TokenLossName = Literal["l2", "squared_l2", "cosine"]

TargetName = Literal["teacher", "cosines"]

# Keeps quotients of variances finite when the variance is 0.
DIVISOR_FLOOR = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class JepaSpec:
    """The shape of the model, and its training loss.

    loss           distance between a prediction and its target (`token_loss`)
    targets        what the predictor predicts for a hidden patch.
                   `teacher`: the target encoder's features of the patch, as in the papers.
                   `cosines`: coefficients of the patch's own log-mel values on slow cosines: the `target_cosines`
                   slowest along time times the same number along frequency, without the constant cosine (the level).
                   They leave out fine detail, which cannot be predicted. They need no forward pass of the teacher and
                   are useful from the first step, so they suit runs that are too short to train a teacher
    target_layers  teacher layers that give the targets. 1: the last layer, after its norm. K: the mean of the last K
                   blocks, each normalised over the features (data2vec, arXiv 2202.03555)
    clip_weight    weight of a second objective; 0: none. It is the distance between a prediction for the whole clip
                   and the normalised mean of the targets of all tokens of the clip. The prediction is linear in the
                   mean of the context (utterance objective of EAT, arXiv 2401.03497, without a class token)
    """

    encoder: EncoderSpec
    predictor: PredictorSpec
    loss: TokenLossName = "l2"
    targets: TargetName = "teacher"
    target_layers: int = 1
    target_cosines: int = 6
    clip_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.targets not in get_args(TargetName):
            raise ValueError(f"targets must be {' or '.join(get_args(TargetName))}, got {self.targets!r}")
        if self.loss not in get_args(TokenLossName):
            raise ValueError(f"loss must be one of {', '.join(get_args(TokenLossName))}, got {self.loss!r}")

        # Cosine targets do not use the teacher, so its layers cannot be chosen.
        depth = self.encoder.depth if self.targets == "teacher" else 1
        if not 1 <= self.target_layers <= depth:
            raise ValueError(
                f"target_layers must lie in 1 to {depth}, the depth of the teacher (1 where there is none), "
                f"got {self.target_layers}"
            )

        # A patch has one cosine for each of its frames and one for each of its bands.
        shorter_side = min(self.encoder.grid.patch_frames, self.encoder.grid.patch_bands)
        if self.targets == "cosines" and not 2 <= self.target_cosines <= shorter_side:
            raise ValueError(
                f"target_cosines must lie in 2 to {shorter_side}, a patch's shorter side, got {self.target_cosines}"
            )
        if self.clip_weight < 0:
            raise ValueError(f"clip_weight must not be negative, got {self.clip_weight}")

    @property
    def target_width(self) -> int:
        """The number of values in a target."""
        return self.encoder.width if self.targets == "teacher" else self.target_cosines**2 - 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class JepaOutput:
    """Loss and health figures of one batch: scalar tensors on the model's device, all but `loss` detached.

    loss            mean loss over the scored targets of all mask sets, plus the weighted `clip_loss`
    clip_loss       mean over the clips whose context is not all padding; 0 without `clip_weight`
    scored          number of scored targets: those that are not padding. With 0 the loss is 0 without a meaning;
                    the caller must refuse that batch
    target_std      standard deviation of the target features over the scored tokens, before normalisation, mean over
                    the dimensions. 0: the features of all tokens are equal
    prediction_std  the same figure of the predictions, whose targets are normalised
    cosine          mean cosine similarity between a prediction and its target
    explained       share of the targets' variance about their mean that the predictions explain, after all
                    predictions are scaled by one best factor (the cosine loss does not fix their scale).
                    1: all variance; 0: no more than a constant prediction explains
    """

    loss: Tensor
    clip_loss: Tensor
    scored: Tensor
    target_std: Tensor
    prediction_std: Tensor
    cosine: Tensor
    explained: Tensor


# Drop path's factors for the rows of encoder and predictor, `L2N` and `L2M`; None without drop path.
DropPathFactors = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BatchTotals:
    """Counts of a whole batch, for a pass over a part of it; with them the losses of all parts add up to the batch's.

    scored_targets     number of targets in the whole batch that are not padding
    rows_with_sound    number of rows (clips times mask sets) of the whole batch whose context is not all padding
    drop_path_factors  drop path's factors for the rows of this part in encoder and predictor; they are drawn for the
                       whole batch and then cut
    """

    scored_targets: int
    rows_with_sound: int
    drop_path_factors: DropPathFactors


class Jepa(nn.Module):
    """Predicts the features of hidden patches, computed by a moving average of the encoder, from the visible patches.

    `target`, the teacher, is that moving average of `encoder`. It sees the whole clip, has no gradient and stays in
    eval mode. The initial weights are a function of `spec` and `seed`.
    """

    cosines_ND: Tensor | None

    def __init__(self, spec: JepaSpec, *, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec.encoder, seed=seed)
        self.predictor = Predictor(
            spec.predictor,
            spec.encoder.width,
            spec.encoder.grid,
            seed=seed + 1,
            clip_head=spec.clip_weight > 0,
            target_width=spec.target_width,
        )

        # The teacher starts as a copy of the encoder.
        self.target = copy.deepcopy(self.encoder).requires_grad_(False).eval()

        cosines_ND = None
        if spec.targets == "cosines":
            cosines_ND = slow_cosine_basis(spec.encoder.grid, spec.target_cosines)
        self.register_buffer("cosines_ND", cosines_ND, persistent=False)

    def forward(
        self,
        mel_BTF: Tensor,
        context_NK: Tensor,
        targets_NGQ: Tensor,
        n_frames_B: Tensor,
        rng: np.random.Generator | None = None,
        batch_totals: BatchTotals | None = None,
    ) -> JepaOutput:
        """Return the loss of one batch: normalised `mel_BTF`, int64 masks, and the number of valid frames of each clip.

        N is B or a multiple of B: several mask sets of a clip, one after the other, share one pass of the teacher.
        Padding tokens (past a clip's valid frames) are neither attended to nor scored. Keep `n_frames_B` on the CPU:
        attention masks are skipped if every token is valid, and checking that on a GPU would synchronise it.
        Drop path draws from `rng`, which is needed only in training and only if the spec has drop path.
        `batch_totals` already contains drop path's factors. With it, `loss` and `clip_loss` are the contributions of
        these rows to the loss of the whole batch; the other figures describe these rows only.
        """
        rows, groups, _ = targets_NGQ.shape

        # Valid tokens (not padding) of each clip and of each row; None if all are valid.
        valid_BP = self.valid_mask_if_padded(n_frames_B, mel_BTF.device)
        valid_NP = None if valid_BP is None else valid_BP.repeat_interleave(rows // len(mel_BTF), dim=0)

        # Drop path: drawn here, or taken from the totals when this pass is a part of a larger batch.
        keep = (
            self.draw_drop_path(rng, rows, groups) if batch_totals is None else batch_totals.drop_path_factors
        )
        keep_L2N, keep_L2M = (None if factors is None else factors.to(mel_BTF.device) for factors in keep)

        # Context and prediction: z = f(x, K), p = g(z, K, G).
        context_NKD = self.encoder(mel_BTF, context_NK, valid_NP, keep_L2N)
        prediction_NGQD = self.predictor(context_NKD, context_NK, targets_NGQ, valid_NP, keep_L2M)

        # Targets: h = f'(x), computed once for each clip; each row selects its own target tokens from h.
        feature_BPD = self.target_features(mel_BTF, valid_BP)
        feature_NGQD = gather_tokens(feature_BPD, targets_NGQ.flatten(1)).unflatten(1, targets_NGQ.shape[1:])

        # Loss: the mean distance over the targets that are not padding.
        scored_NGQ = torch.ones(targets_NGQ.shape, device=mel_BTF.device)
        if valid_NP is not None:
            scored_NGQ = valid_NP.gather(1, targets_NGQ.flatten(1)).view_as(targets_NGQ).float()
        output = _score_predictions(
            prediction_NGQD.float(), feature_NGQD.float(), scored_NGQ, self.spec.loss, batch_totals
        )
        if self.predictor.clip_head is None:
            return output

        # The second objective: the whole clip.
        clip_loss = self._clip_loss(
            self.predictor.clip_head, context_NKD, context_NK, feature_BPD, valid_BP, batch_totals
        )
        loss = output.loss + self.spec.clip_weight * clip_loss
        return replace(output, loss=loss, clip_loss=clip_loss.detach())

    @torch.no_grad()
    def target_features(self, mel_BTF: Tensor, valid_BP: Tensor | None = None) -> Tensor:
        """Return the features of every token that the predictor must predict, `BPD`, not yet normalised."""
        if self.cosines_ND is not None:
            return self.target.input_patches(mel_BTF) @ self.cosines_ND
        if self.spec.target_layers == 1:
            return self.target(mel_BTF, valid_BP=valid_BP)
        layers = self.target.top_block_outputs(mel_BTF, self.spec.target_layers, valid_BP=valid_BP)
        return torch.stack([normalise_features(layer_BPD.float()) for layer_BPD in layers]).mean(dim=0)

    def _clip_loss(
        self,
        clip_head: nn.Linear,
        context_NKD: Tensor,
        context_NK: Tensor,
        feature_BPD: Tensor,
        valid_BP: Tensor | None,
        batch_totals: BatchTotals | None,
    ) -> Tensor:
        """Return the mean distance between the prediction for each clip and the normalised mean of its targets."""
        if valid_BP is None:
            valid_BP = torch.ones(feature_BPD.shape[:2], dtype=torch.bool, device=feature_BPD.device)

        # The prediction: linear in the mean of the context tokens that are not padding.
        audible_NK = gather_tokens(valid_BP, context_NK)
        guess_ND = clip_head(mean_valid_tokens(context_NKD.float(), audible_NK))

        # The target: the normalised mean of the clip's features; all mask sets of a clip have the same target.
        clip_BD = normalise_features(mean_valid_tokens(feature_BPD.float(), valid_BP))
        clip_ND = clip_BD.repeat_interleave(len(context_NK) // len(valid_BP), 0)

        # The mean over the rows whose context is not all padding.
        has_sound_N = audible_NK.any(dim=1)
        loss_N = token_loss(guess_ND.float(), clip_ND, self.spec.loss) * has_sound_N
        if batch_totals is None:
            return loss_N.sum() / has_sound_N.sum().clamp(min=1)
        return loss_N.sum() / max(1, batch_totals.rows_with_sound)

    def valid_mask_if_padded(self, n_frames_B: Tensor, device: torch.device) -> Tensor | None:
        """Return which tokens are valid (not padding), as bool `BP` on `device`, or None if all are valid."""
        valid_BP = valid_token_mask(n_frames_B, self.spec.encoder.grid)
        return None if valid_BP.all() else valid_BP.to(device)

    def count_scored(self, context_NK: Tensor, targets_NGQ: Tensor, n_frames_B: Tensor) -> tuple[int, int]:
        """Return `scored_targets` and `rows_with_sound` of `BatchTotals`; all tensors are on the CPU."""
        valid_BP = valid_token_mask(n_frames_B, self.spec.encoder.grid)
        if valid_BP.all():
            return targets_NGQ.numel(), len(context_NK)
        valid_NP = valid_BP.repeat_interleave(len(context_NK) // len(valid_BP), dim=0)
        scored = valid_NP.gather(1, targets_NGQ.flatten(1)).sum()
        has_sound_N = valid_NP.gather(1, context_NK).any(1)
        return int(scored), int(has_sound_N.sum())

    def draw_drop_path(self, rng: np.random.Generator | None, rows: int, groups: int) -> DropPathFactors:
        """Draw drop path's factors for `rows` rows: first the encoder's, then the predictor's for each group.

        Nothing is drawn if neither has drop path. ValueError if a training pass needs `rng` and it is None.
        """
        encoder = self.encoder.transformer_spec
        predictor = self.predictor.transformer_spec
        if not self.training or not (encoder.drop_path or predictor.drop_path):
            return None, None
        if rng is None:
            raise ValueError("drop path draws from the generator of the step: give `rng`")
        return encoder.draw_drop_path(rng, rows), predictor.draw_drop_path(rng, rows * groups)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Update the teacher's weights and buffers: `f' <- momentum f' + (1 - momentum) f`."""
        torch._foreach_lerp_(
            _weights_and_buffers(self.target), _weights_and_buffers(self.encoder), 1.0 - momentum
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


# The loss.


def normalise_features(feature_BGQD: Tensor) -> Tensor:
    """Return the features normalised to targets: each token's vector has mean 0 and variance 1 over its width."""
    return F.layer_norm(feature_BGQD, feature_BGQD.shape[-1:])


def token_loss(prediction_BGQD: Tensor, target_BGQD: Tensor, loss: TokenLossName) -> Tensor:
    """Return the distance of each prediction p from its target t of width D, as `BGQ`.

    l2          |p - t| / sqrt(D)      A-JEPA's L2; its gradient has the same length at any distance
    squared_l2  |p - t|^2 / D          Audio-JEPA's paper; I-JEPA's formula
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
    prediction_NGQD: Tensor,
    feature_NGQD: Tensor,
    scored_NGQ: Tensor,
    loss: TokenLossName,
    batch_totals: BatchTotals | None,
) -> JepaOutput:
    """Return the loss and the health figures over the scored targets (1 in `scored_NGQ`; 0: not scored)."""
    # The normalised targets, and the number of scored ones.
    target_NGQD = normalise_features(feature_NGQD)
    scored = scored_NGQ.sum()

    # The weight of each target in the mean over these rows, and its weight in the loss of the whole batch.
    share_NGQ = scored_NGQ / scored.clamp(min=1)
    loss_share_NGQ = share_NGQ
    if batch_totals is not None:
        loss_share_NGQ = scored_NGQ / batch_totals.scored_targets
    loss_value = (token_loss(prediction_NGQD, target_NGQD, loss) * loss_share_NGQ).sum()

    # Health figures, without gradients.
    with torch.no_grad():
        return JepaOutput(
            loss=loss_value,
            clip_loss=torch.zeros_like(loss_value),
            scored=scored,
            target_std=_weighted_variance_D(feature_NGQD, share_NGQ).sqrt().mean(),
            prediction_std=_weighted_variance_D(prediction_NGQD, share_NGQ).sqrt().mean(),
            cosine=(share_NGQ * F.cosine_similarity(prediction_NGQD, target_NGQD, dim=-1)).sum(),
            explained=_explained_variance(prediction_NGQD, target_NGQD, share_NGQ),
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


def _weights_and_buffers(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
