"""Losses: how far predictions lie from their targets, token by token.

Context encoder, teacher, predictor, loss.
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

TokenLossName = Literal["l2", "squared_l2", "smooth_l1", "cosine"]


def normalise_features(feature_BGQD: Tensor) -> Tensor:
    """Each token's vector with mean 0 and variance 1 over its width: the target of the prediction."""
    return F.layer_norm(feature_BGQD, feature_BGQD.shape[-1:])


def token_loss(prediction_BGQD: Tensor, target_BGQD: Tensor, loss: TokenLossName) -> Tensor:
    """The distance of each token as `BGQ`, with p the prediction and t the target of width D.

    l2          |p - t| / sqrt(D)                    A-JEPA's L2; its gradient is as large near as far
    squared_l2  |p - t|^2 / D                        Audio-JEPA's paper; I-JEPA's formula
    smooth_l1   mean over D of e^2 / 2 where |e| < 1, |e| - 1/2 elsewhere, e = p - t
    cosine      1 - p t / (|p| |t|)                  Audio-JEPA's code

    Dividing by the width makes 1 the score of predicting nothing (p = 0, t normalised) for all but smooth_l1.
    """
    match loss:
        case "l2":
            return (
                torch.linalg.vector_norm(prediction_BGQD - target_BGQD, dim=-1) / target_BGQD.shape[-1] ** 0.5
            )
        case "squared_l2":
            return (prediction_BGQD - target_BGQD).square().mean(dim=-1)
        case "smooth_l1":
            return F.smooth_l1_loss(prediction_BGQD, target_BGQD, reduction="none").mean(dim=-1)
        case "cosine":
            return 1 - F.cosine_similarity(prediction_BGQD, target_BGQD, dim=-1)


TargetName = Literal["teacher", "cosines"]

DIVISOR_FLOOR = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class JepaSpec:
    """Everything that shapes the model and its loss; `token_loss` says what each loss is.

    targets        what is predicted of a hidden patch. `teacher`: what the target encoder says of it (both
                   papers). `cosines`: its own coarse pattern without its level, as the `target_cosines` slowest
                   cosines along time times as many along frequency, less the constant one. That leaves out
                   the grain, which nobody can predict; it costs no second pass and is there from the first
                   step: for runs too short to raise a teacher
    target_layers  1: the teacher's last layer after its norm; K: the mean of its last K blocks, each normalised
                   over the features (data2vec, arXiv 2202.03555)
    clip_weight    above 0: so many times the distance between a guess at the whole clip, linear in the mean of
                   the context, and the mean of what is predicted of all its tokens, normalised, is added to
                   the loss (the utterance objective of EAT, arXiv 2401.03497, without a class token)
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
        depth = self.encoder.depth if self.targets == "teacher" else 1
        if not 1 <= self.target_layers <= depth:
            raise ValueError(
                f"target_layers must lie in 1 to {depth}, the depth of the teacher (1 where there is none), "
                f"got {self.target_layers}"
            )
        sides = (self.encoder.grid.patch_frames, self.encoder.grid.patch_bands)
        if self.targets == "cosines" and not 2 <= self.target_cosines <= min(sides):
            raise ValueError(
                f"target_cosines must lie in 2 to {min(sides)}, a patch's shorter side, got {self.target_cosines}"
            )
        if self.clip_weight < 0:
            raise ValueError(f"clip_weight must not be negative, got {self.clip_weight}")

    @property
    def target_width(self) -> int:
        """Values of a target."""
        return self.encoder.width if self.targets == "teacher" else self.target_cosines**2 - 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class JepaOutput:
    """Loss and signs of health of one batch: scalar tensors on the model's device, all but `loss` detached.

    loss            mean over the scored targets, of all mask sets alike, plus the weighted `clip_loss`
    clip_loss       mean over the clips that have sound in their context; 0 without `clip_weight`
    scored          how many targets lie on sound; with 0 the loss is 0 and means nothing: refuse such a batch
    target_std      standard deviation of the target encoder's features over the scored tokens, before they
                    are normalised, mean over the dimensions; 0: the teacher says the same of everything
    prediction_std  the same of the predictions, which aim at normalised targets
    cosine          between a prediction and its target, mean
    explained       share of the targets' variance about their mean that the predictions account for, up to
                    one factor for all (the cosine loss leaves their scale open); 1: all of it, 0: no more
                    than a constant would
    """

    loss: Tensor
    clip_loss: Tensor
    scored: Tensor
    target_std: Tensor
    prediction_std: Tensor
    cosine: Tensor
    explained: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BatchTotals:
    """What a part of a batch is told of the whole, so that the losses of all parts add up to that of the whole."""

    scored_targets: int  # targets on sound in the whole batch
    rows_with_sound: int  # its rows, clips times mask sets, with sound in their context
    drop_path_keep: (
        "DropPathKeep"  # drop path of this part's rows in encoder and predictor, drawn for the whole batch
    )


DropPathKeep = tuple[Tensor | None, Tensor | None]


class Jepa(nn.Module):
    """Predict, from the patches one can see, how a slow copy of the encoder describes those one cannot.

    A-JEPA (arXiv 2311.15830) and Audio-JEPA (arXiv 2507.02915). `target` is a moving average of `encoder`: it
    sees the whole clip, has no gradient and stays in eval mode. Weights are a function of `spec` and `seed`.
    """

    cosines_ND: Tensor | None

    def __init__(self, spec: JepaSpec, *, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec.encoder, seed=seed)
        width, grid = spec.encoder.width, spec.encoder.grid
        clip_head = spec.clip_weight > 0
        self.predictor = Predictor(
            spec.predictor, width, grid, seed=seed + 1, clip_head=clip_head, target_width=spec.target_width
        )
        self.target = copy.deepcopy(self.encoder).requires_grad_(False).eval()
        cosines_ND = slow_cosine_basis(grid, spec.target_cosines) if spec.targets == "cosines" else None
        self.register_buffer("cosines_ND", cosines_ND, persistent=False)

    def set_band_statistics(self, mean_F: Tensor, std_F: Tensor) -> None:
        """`Encoder.know_bands`, of encoder and teacher alike."""
        for encoder in (self.encoder, self.target):
            encoder.set_band_statistics(mean_F, std_F)

    def enable_recompute(self) -> "Jepa":
        """Keep one vector per token and block for the backward pass and compute the rest again; same results."""
        self.encoder.recompute = self.predictor.recompute = True
        return self

    def compile_stacks(self) -> "Jepa":
        """Compile the blocks: the teacher's for its one shape, the others for any number of tokens.

        How many tokens are visible and predicted changes from step to step: `a_jepa` has 125 shapes in 150 steps,
        so a compilation for each would never end, and padded to one shape six tenths of the context (of random
        patches a sixth) would be computed for nothing. One dynamic graph for each stack takes any count. On two
        CPU cores `small` started after 137 s and then took 458 ms a step instead of 517.
        """
        compile_blocks(self.target.blocks, dynamic=False)
        compile_blocks([*self.encoder.blocks, *self.predictor.blocks], dynamic=True)
        return self

    def train(self, mode: bool = True) -> "Jepa":
        super().train(mode)
        self.target.eval()
        return self

    def forward(
        self,
        mel_BTF: Tensor,
        context_NK: Tensor,
        targets_NGQ: Tensor,
        n_frames_B: Tensor,
        rng: np.random.Generator | None = None,
        batch_totals: BatchTotals | None = None,
    ) -> JepaOutput:
        """Loss of one batch: normalised `mel_BTF`, int64 masks, and how many frames of each clip are sound.

        N is B, or a multiple: several mask sets of each clip, one after the other, share one pass of the
        teacher. Tokens past a clip's valid frames are neither attended to nor scored. Leave `n_frames_B` on the
        CPU: where every token is valid the masks are skipped, and asking a GPU would make it wait. `rng` is
        what drop path draws from: needed where the spec has one, in training only. With `part`, which brings
        its own, `loss` and `clip_loss` are what these rows add to those of the whole batch; all else is theirs.
        """
        rows, groups, _ = targets_NGQ.shape
        valid_BP = self.valid_mask_if_padded(n_frames_B, mel_BTF.device)
        valid_NP = None if valid_BP is None else valid_BP.repeat_interleave(rows // len(mel_BTF), dim=0)
        keep = self.draw_drop_path(rng, rows, groups) if batch_totals is None else batch_totals.drop_path_keep
        keep_L2N, keep_L2M = (None if each is None else each.to(mel_BTF.device) for each in keep)
        context_NKD = self.encoder(mel_BTF, context_NK, valid_NP, keep_L2N)
        prediction_NGQD = self.predictor(context_NKD, context_NK, targets_NGQ, valid_NP, keep_L2M)
        feature_BPD = self.target_features(mel_BTF, valid_BP)
        feature_NGQD = gather_tokens(feature_BPD, targets_NGQ.flatten(1)).unflatten(1, targets_NGQ.shape[1:])
        scored_NGQ = torch.ones(targets_NGQ.shape, device=mel_BTF.device)
        if valid_NP is not None:
            scored_NGQ = valid_NP.gather(1, targets_NGQ.flatten(1)).view_as(targets_NGQ).float()
        of_all = None if batch_totals is None else batch_totals.scored_targets
        told = _score_predictions(
            prediction_NGQD.float(), feature_NGQD.float(), scored_NGQ, self.spec.loss, of_all
        )
        if self.predictor.clip_head is None:
            return told
        if valid_BP is None:
            valid_BP = torch.ones(feature_BPD.shape[:2], dtype=torch.bool, device=mel_BTF.device)
        seen_NK = gather_tokens(valid_BP, context_NK)
        guess_ND = self.predictor.clip_head(mean_valid_tokens(context_NKD.float(), seen_NK))
        clip_ND = normalise_features(mean_valid_tokens(feature_BPD.float(), valid_BP)).repeat_interleave(
            rows // len(mel_BTF), 0
        )
        heard_N = seen_NK.any(dim=1)
        clip_loss_N = token_loss(guess_ND.float(), clip_ND, self.spec.loss) * heard_N
        clip_loss = clip_loss_N.sum() / (
            heard_N.sum().clamp(min=1) if batch_totals is None else max(1, batch_totals.rows_with_sound)
        )
        return replace(told, loss=told.loss + self.spec.clip_weight * clip_loss, clip_loss=clip_loss.detach())

    def valid_mask_if_padded(self, n_frames_B: Tensor, device: torch.device) -> Tensor | None:
        """Which tokens hold sound, as bool `BP` on `device`, or None where all do."""
        valid_BP = valid_token_mask(n_frames_B, self.spec.encoder.grid)
        return None if valid_BP.all() else valid_BP.to(device)

    @torch.no_grad()
    def target_features(self, mel_BTF: Tensor, valid_BP: Tensor | None = None) -> Tensor:
        """What is to be predicted of every token, from the whole clip: `BPD`, not yet normalised."""
        if self.cosines_ND is not None:
            return self.target.input_patches(mel_BTF) @ self.cosines_ND
        if self.spec.target_layers == 1:
            return self.target(mel_BTF, valid_BP=valid_BP)
        layers = self.target.top_block_outputs(mel_BTF, self.spec.target_layers, valid_BP=valid_BP)
        return torch.stack([normalise_features(layer_BPD.float()) for layer_BPD in layers]).mean(dim=0)

    def count_scored(self, context_NK: Tensor, targets_NGQ: Tensor, n_frames_B: Tensor) -> tuple[int, int]:
        """Targets on sound, and rows with sound in their context: what `Part` sums up; all on the CPU."""
        valid_BP = valid_token_mask(n_frames_B, self.spec.encoder.grid)
        if valid_BP.all():
            return targets_NGQ.numel(), len(context_NK)
        valid_NP = valid_BP.repeat_interleave(len(context_NK) // len(valid_BP), dim=0)
        scored, heard_N = (
            valid_NP.gather(1, targets_NGQ.flatten(1)).sum(),
            valid_NP.gather(1, context_NK).any(1),
        )
        return int(scored), int(heard_N.sum())

    def draw_drop_path(self, rng: np.random.Generator | None, rows: int, groups: int) -> DropPathKeep:
        """What drop path leaves of each branch for so many rows; nothing is drawn where there is none of it."""
        encoder, predictor = self.encoder.transformer_spec, self.predictor.transformer_spec
        if not self.training or not (encoder.drop_path or predictor.drop_path):
            return None, None
        if rng is None:
            raise ValueError("drop path draws from the generator of the step: give `rng`")
        return encoder.draw_drop_path(rng, rows), predictor.draw_drop_path(rng, rows * groups)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """`target = momentum * target + (1 - momentum) * encoder`; buffers, should there be any, likewise."""
        torch._foreach_lerp_(
            _weights_and_buffers(self.target), _weights_and_buffers(self.encoder), 1.0 - momentum
        )


def mean_valid_tokens(x_NPD: Tensor, valid_NP: Tensor) -> Tensor:
    """Mean of the valid tokens' vectors, `ND`; 0 where none is valid."""
    share_NP1 = (valid_NP / valid_NP.sum(1, keepdim=True).clamp(min=1))[..., None]
    return torch.where(valid_NP[..., None], x_NPD, 0).mul(share_NP1).sum(dim=1)


def _score_predictions(
    prediction: Tensor, feature: Tensor, scored_BGQ: Tensor, loss: TokenLossName, scored_in_batch: int | None
) -> JepaOutput:
    target, count = normalise_features(feature), scored_BGQ.sum()
    share_BGQ = scored_BGQ / count.clamp(min=1)
    share_of_all_BGQ = share_BGQ if scored_in_batch is None else scored_BGQ / scored_in_batch
    loss_value = (token_loss(prediction, target, loss) * share_of_all_BGQ).sum()
    with torch.no_grad():
        return JepaOutput(
            loss=loss_value,
            clip_loss=torch.zeros_like(loss_value),
            scored=count,
            target_std=_weighted_variance_D(feature, share_BGQ).sqrt().mean(),
            prediction_std=_weighted_variance_D(prediction, share_BGQ).sqrt().mean(),
            cosine=(share_BGQ * F.cosine_similarity(prediction, target, dim=-1)).sum(),
            explained=_explained_variance(prediction, target, share_BGQ),
        )


def _explained_variance(prediction: Tensor, target: Tensor, share_BGQ: Tensor) -> Tensor:
    pt, pp, tt = (
        (share_BGQ * (x * y).mean(dim=-1)).sum()
        for x, y in ((prediction, target), (prediction, prediction), (target, target))
    )
    missed = tt - pt.square() / pp.clamp(min=DIVISOR_FLOOR)  # the least of |a p - t|^2 over a
    return 1 - missed / _weighted_variance_D(target, share_BGQ).mean().clamp(min=DIVISOR_FLOOR)


def _weighted_variance_D(x_BGQD: Tensor, share_BGQ: Tensor) -> Tensor:
    """Variance of each dimension over the tokens, weighted by `share_BGQ`, which sums to 1."""
    x_ND, share_N = x_BGQD.flatten(0, -2), share_BGQ.flatten()
    return share_N @ (x_ND - share_N @ x_ND).square()


def _weights_and_buffers(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
