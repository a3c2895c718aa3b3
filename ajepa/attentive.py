"""The attentive probe: learnt queries look over a clip's tokens, a linear layer says what they find."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ajepa.features import Features
from ajepa.probes import goodness
from pipeline.errors import RunError

HEADS = 4
STEPS, CLIPS_PER_STEP, LOOKS = 600, 128, 12  # twelve times the clips to choose with are looked at
PEAK_LR, WEIGHT_DECAY = 3e-3, 0.01
CLIPS_PER_PASS = 1_024


@dataclass(frozen=True, kw_only=True, slots=True)
class Attended:
    """What the probe says of the clips to measure on, as it was after `steps` steps: the best of all looks."""

    scores_NC: np.ndarray
    steps: int


class AttentiveProbe(nn.Module):
    """Each head has a query: its share of the features is averaged with softmax(tokens . query) over valid tokens.

    Everything starts at 0: as a linear probe on the mean of the tokens, without a random number.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.query_HD = nn.Parameter(torch.zeros(HEADS, width))
        self.weight_DC = nn.Parameter(torch.zeros(width, classes))
        self.bias_C = nn.Parameter(torch.zeros(classes))

    def forward(self, tokens_BMD: Tensor, valid_BM: Tensor) -> Tensor:
        told_BMH = tokens_BMD @ self.query_HD.T / math.sqrt(tokens_BMD.shape[-1])
        share_BMH = told_BMH.masked_fill(~valid_BM[..., None], -torch.inf).softmax(1)
        parts_BMHE = tokens_BMD.unflatten(2, (HEADS, -1))
        found_BD = torch.einsum("bmh,bmhe->bhe", share_BMH, parts_BMHE).flatten(1)
        return found_BD @ self.weight_DC + self.bias_C


def attended(
    train: Features,
    train_NC: np.ndarray,
    val: Features,
    val_NC: np.ndarray,
    measured: Features,
    *,
    seed: int,
    single: bool,
    device: torch.device,
) -> Attended:
    """Train the probe with AdamW for `STEPS` steps; the clips of `val` choose how many of these are kept.

    Tokens are standardised with the mean and deviation of the train clips' valid tokens. Deterministic on a CPU.
    """
    if train.tokens_NMD is None or train.tokens_NMD.shape[-1] % HEADS:
        raise RunError(f"an attentive probe needs tokens of a width that {HEADS} divides")
    mean_D, scale_D = (told.to(device) for told in token_scale(train))
    classes = train_NC.shape[1]
    probe = AttentiveProbe(train.tokens_NMD.shape[-1], classes).to(device)
    solver = torch.optim.AdamW(probe.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    rng = np.random.default_rng([seed, 3])

    def said(clips: Features, clips_B: np.ndarray) -> Tensor:
        tokens_BMD, valid_BM = (torch.from_numpy(a).to(device) for a in tokens_of(clips, clips_B))
        return probe((tokens_BMD.float() - mean_D) * scale_D, valid_BM)

    def scores_NC(clips: Features) -> np.ndarray:
        count = len(clips.vectors_ND)
        passes = np.split(np.arange(count), range(CLIPS_PER_PASS, count, CLIPS_PER_PASS))
        with torch.inference_mode():
            return torch.cat([said(clips, clips_B) for clips_B in passes]).cpu().numpy()

    best, kept = -1.0, Attended(scores_NC=np.zeros((0, classes)), steps=0)
    for step in range(1, STEPS + 1):
        solver.param_groups[0]["lr"] = PEAK_LR * (1 + math.cos(math.pi * (step - 1) / STEPS)) / 2
        clips_B = rng.choice(len(train_NC), min(CLIPS_PER_STEP, len(train_NC)), replace=False)
        loss = entropy(said(train, clips_B), torch.from_numpy(train_NC[clips_B]).to(device), single=single)
        solver.zero_grad()
        loss.backward()
        solver.step()
        if step % (STEPS // LOOKS) == 0 and (now := goodness(val_NC, scores_NC(val), single=single)) > best:
            best, kept = now, Attended(scores_NC=scores_NC(measured), steps=step)
    return kept


def entropy(scores_BC: Tensor, labels_BC: Tensor, *, single: bool) -> Tensor:
    """Cross-entropy of the one class, or of every class by itself."""
    if single:
        return nnf.cross_entropy(scores_BC, labels_BC.argmax(1))
    return nnf.binary_cross_entropy_with_logits(scores_BC, labels_BC)


def token_scale(train: Features) -> tuple[Tensor, Tensor]:
    """Mean of every feature over the valid tokens, and one over its deviation (0 where it is constant)."""
    total_D = square_D = count = 0.0
    for start in range(0, len(train.vectors_ND), CLIPS_PER_PASS):
        tokens_BMD, valid_BM = tokens_of(
            train, np.arange(len(train.vectors_ND))[start : start + CLIPS_PER_PASS]
        )
        held_ND = tokens_BMD[valid_BM].astype(np.float64)
        total_D, square_D = total_D + held_ND.sum(0), square_D + np.square(held_ND).sum(0)
        count += len(held_ND)
    mean_D = total_D / count
    std_D = np.sqrt(np.maximum(square_D / count - np.square(mean_D), 0))
    scale_D = np.where(std_D > 1e-6, 1 / np.maximum(std_D, 1e-6), 0)
    return torch.from_numpy(mean_D).float(), torch.from_numpy(scale_D).float()


def tokens_of(clips: Features, clips_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of some clips, and which are valid; only of features that have any."""
    if clips.tokens_NMD is None or clips.valid_NM is None:
        raise RunError("these features were computed without tokens; ask for them")
    return clips.tokens_NMD[clips_B], clips.valid_NM[clips_B]
