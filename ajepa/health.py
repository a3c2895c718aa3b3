"""Signs of health: what an encoder says of a fixed batch of held-out clips, in numbers that a loss does not show."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ajepa.jepa import TINY, Jepa
from ajepa.recipes import Pretrain
from ajepa.run import Json
from ajepa.training_set import kept_splits, train_splits
from pipeline.joined import AnyStore
from pipeline.loader import Batch

HEALTH_CLIPS = 32
DEAD_SHARE = (
    0.01  # a dimension is dead if it deviates by less than this share of the features' root mean square
)
RANK_EPSILON = 1e-7  # of RankMe (arXiv 2210.02885), added to each share
FIXED = 2**31  # stands for the step in the generator of what is fixed: no run gets there


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HealthBatch:
    """Clips and masks that stay the same for a whole run, on the model's device."""

    mel_BTF: Tensor
    n_frames_B: Tensor  # on the CPU, as the model asks for it
    context_BK: Tensor
    targets_BGQ: Tensor

    @classmethod
    def of(cls, batch: Batch, recipe: Pretrain) -> "HealthBatch":
        """The clips of a batch under masks of the kind that the run ends with."""
        rng = np.random.default_rng([recipe.seed, FIXED])
        maker = recipe.masks.maker(recipe.steps - 1, rng)
        masks = maker.sample(rng, recipe.model.encoder.grid, batch=len(batch.rows_B))
        device = batch.mel_BTF.device
        return cls(
            mel_BTF=batch.mel_BTF,
            n_frames_B=batch.n_frames_B.cpu(),
            context_BK=torch.from_numpy(masks.context_BK).to(device),
            targets_BGQ=torch.from_numpy(masks.targets_BGQ).to(device),
        )


def health_rows(store: AnyStore, seed: int) -> np.ndarray:
    """At most HEALTH_CLIPS good rows, drawn by `seed`: of the splits kept to measure on, or else of the others."""
    kept = kept_splits(store)
    rows_N = store.good_rows(kept) if kept else np.empty(0, np.int64)
    if not len(rows_N):
        rows_N = store.good_rows(train_splits(store))
    return np.sort(np.random.default_rng([seed, FIXED]).permutation(rows_N)[:HEALTH_CLIPS])


@torch.no_grad()
def health(model: Jepa, batch: HealthBatch) -> Json:
    """How the model stands on `batch`, in fp32 and without compiled code; nothing of the model is changed.

    health_loss            the loss, on clips and masks that never change
    health_explained       share of the targets' variance that the predictions account for
    health_target_std      `JepaOutput.target_std`: the deviation of the targets over the tokens, before their norm
    health_prediction_std  the same of the predictions
    health_rank            effective rank of the target encoder's features, one for each valid token of the whole
                           clips: RankMe (arXiv 2210.02885), at most the encoder's width
    health_rank_clips      the same of each clip's mean, at most the number of clips
    health_spread          how far these features lie from their mean, as a share of how far from 0 (root mean
                           squares): 0 if all are alike
    health_content         share of the features' variance that is left once each position's mean is taken
                           away: 0 if a token tells where it lies and nothing of the sound
    health_dead            share of the features' dimensions that deviate by less than DEAD_SHARE of their root
                           mean square
    health_teacher_cosine  between target and context encoder, token by token, of the whole clips
    """
    training = model.training
    model.eval()
    with uncompiled(model):
        output = model(batch.mel_BTF, batch.context_BK, batch.targets_BGQ, batch.n_frames_B)
        valid_BP = model.validity(batch.n_frames_B, batch.mel_BTF.device)
        teacher_BPD, student_BPD = (
            encoder(batch.mel_BTF, valid_BP=valid_BP).float() for encoder in (model.target, model.encoder)
        )
    model.train(training)
    if valid_BP is None:
        valid_BP = torch.ones(teacher_BPD.shape[:2], dtype=torch.bool, device=teacher_BPD.device)
    cosine_BP = F.cosine_similarity(teacher_BPD, student_BPD, dim=-1)
    told = {
        "loss": output.loss,
        "explained": output.explained,
        "target_std": output.target_std,
        "prediction_std": output.prediction_std,
        **features_told(teacher_BPD, valid_BP),
        "teacher_cosine": cosine_BP[valid_BP].mean(),
    }
    return {f"health_{name}": float(value) for name, value in told.items()}


def uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Where its blocks run as they are written: another batch size would be compiled for in vain."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()  # the other one takes seconds to import


def features_told(feature_BPD: Tensor, valid_BP: Tensor) -> dict[str, Tensor]:
    """What is told of the features of the valid tokens; see `health`."""
    feature_BPD = torch.where(valid_BP[..., None], feature_BPD.double(), 0.0)
    token_ND = feature_BPD[valid_BP]
    clip_BD = feature_BPD.sum(1) / valid_BP.sum(1, keepdim=True)
    position_PD = feature_BPD.sum(0) / valid_BP.sum(0).clamp(min=1)[:, None]
    about_D = token_ND - token_ND.mean(0)
    within = (feature_BPD - position_PD)[valid_BP].square().sum()
    deviation_D = about_D.square().mean(0).sqrt()
    size = token_ND.square().mean().sqrt()
    return {
        "spread": about_D.square().mean().sqrt() / size.clamp(min=TINY),
        "rank": effective_rank(token_ND),
        "rank_clips": effective_rank(clip_BD),
        "content": within / about_D.square().sum().clamp(min=TINY),
        "dead": (deviation_D < DEAD_SHARE * size).double().mean(),
    }


def effective_rank(x_ND: Tensor) -> Tensor:
    """RankMe (arXiv 2210.02885): the exponential of the entropy of the singular values' shares of their sum.

    From the eigenvalues of the smaller Gram matrix, in float64: those of a value of 1e-7 of the largest count still.
    """
    x_ND = x_ND.double()
    gram = x_ND @ x_ND.T if len(x_ND) < x_ND.shape[1] else x_ND.T @ x_ND
    value_D = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share_D = value_D / value_D.sum().clamp(min=TINY) + RANK_EPSILON
    return (-(share_D * share_D.log()).sum()).exp()
