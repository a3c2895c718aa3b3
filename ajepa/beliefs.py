"""What a predictor believes: how far its guess at every patch lies from what the teacher says of it."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ajepa.jepa import Jepa
from ajepa.losses import normalise

FOLDS = 4  # a quarter of the patches is hidden at a time


@torch.inference_mode()
def distances(
    model: Jepa, mel_BTF: Tensor, n_frames_B: Tensor, *, folds: int = FOLDS, seed: int = 0
) -> Tensor:
    """Cosine distance of prediction and target of every token, `BP` in [0, 2]; nan where a token holds no sound.

    Every token is predicted once, from all that lie in other folds; which lie together is drawn by `seed`.
    """
    grid, device = model.spec.encoder.grid, mel_BTF.device
    valid_BP = model.validity(n_frames_B, device)
    target_BPD = normalise(model.describe(mel_BTF, valid_BP).float())
    order_P = np.random.default_rng([seed, grid.tokens]).permutation(grid.tokens)
    apart_BP = torch.full((len(mel_BTF), grid.tokens), float("nan"), device=device)
    for hidden_Q in np.array_split(order_P, folds):
        targets_BGQ = every(np.sort(hidden_Q), mel_BTF)[:, None]
        context_BK = every(np.setdiff1d(order_P, hidden_Q), mel_BTF)
        context_BKD = model.encoder(mel_BTF, context_BK, valid_BP)
        guess_BQD = model.predictor(context_BKD, context_BK, targets_BGQ, valid_BP)[:, 0].float()
        tokens_Q = targets_BGQ[0, 0]
        apart_BP[:, tokens_Q] = 1 - F.cosine_similarity(guess_BQD, target_BPD[:, tokens_Q], dim=-1)
    return apart_BP if valid_BP is None else apart_BP.masked_fill(~valid_BP, float("nan"))


def every(tokens_N: np.ndarray, mel_BTF: Tensor) -> Tensor:
    """The same tokens for every clip, `BN`."""
    return torch.from_numpy(tokens_N).to(mel_BTF.device).expand(len(mel_BTF), -1).contiguous()
