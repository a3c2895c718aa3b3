"""Losses: how far predictions lie from their targets, token by token."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

LossName = Literal["l2", "squared_l2", "smooth_l1", "cosine"]


def normalise(feature_BGQD: Tensor) -> Tensor:
    """Each token's vector with mean 0 and variance 1 over its width: the target of the prediction."""
    return F.layer_norm(feature_BGQD, feature_BGQD.shape[-1:])


def token_loss(prediction_BGQD: Tensor, target_BGQD: Tensor, loss: LossName) -> Tensor:
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
