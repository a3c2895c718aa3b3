"""Probes on frozen features: nearest neighbours, an attentive probe over tokens; the linear one has its own file."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ajepa.evaluate.features import ClipFeatures
from ajepa.evaluate.linear_probe import selection_metric
from ajepa.model.pooling import inverse_deviation_D
from pipeline.errors import RunError

NEIGHBOUR_COUNT = 15

ATTENTIVE_HEADS = 4

ATTENTIVE_CLIPS_PER_STEP = 128

MAX_ATTENTIVE_STEPS, MIN_ATTENTIVE_STEPS, MAX_ATTENTIVE_EPOCHS = 600, 120, 150

ATTENTIVE_PEAK_LR, ATTENTIVE_WEIGHT_DECAY = 3e-3, 0.01

# Validation passes spread over the attentive probe's training; the best one sets the number of steps.
ATTENTIVE_VALIDATIONS = 12

CLIPS_PER_FORWARD = 1_024


def standardise_features(train_ND: np.ndarray, *others_ND: np.ndarray) -> tuple[Tensor, ...]:
    """Standardise all features by the train rows' mean and deviation; a constant feature becomes 0, not nan."""
    mean_D, scale_D = feature_mean_and_scale(train_ND)
    return tuple(torch.from_numpy((rows_ND - mean_D) * scale_D) for rows_ND in (train_ND, *others_ND))


def feature_mean_and_scale(train_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each feature over the rows, and the factor that makes its deviation 1; 0 for a constant feature."""
    return train_ND.mean(0), inverse_deviation_D(train_ND.std(0)).astype(np.float32)


def knn_scores_NC(
    train_ND: Tensor, train_NC: np.ndarray, eval_ND: Tensor, *, neighbours: int = NEIGHBOUR_COUNT
) -> np.ndarray:
    """For each class, its share among the most similar train clips (by the cosine of standardised features)."""
    train_unit_ND = nnf.normalize(train_ND, dim=1)
    count = min(neighbours, len(train_ND))
    scores = []
    for eval_unit_ND in nnf.normalize(eval_ND, dim=1).split(
        1024
    ):  # 80 MB of similarities to 20 k train clips
        nearest_NK = (eval_unit_ND @ train_unit_ND.T).topk(count, dim=1).indices
        scores.append(train_NC[nearest_NK.cpu().numpy()].mean(axis=1))
    return np.concatenate(scores)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentiveScores:
    """Scores of an attentive probe after `steps` steps, the number at which it predicted the val clips best."""

    scores_NC: np.ndarray
    steps: int


class AttentiveProbe(nn.Module):
    """A probe whose heads average tokens by attention; each head has a learnt query and its own share of the features.

    A head's weights over a clip's valid tokens are softmax(tokens . query). A linear layer over the averages of all
    heads gives the logits. All parameters start at 0: the probe starts as a linear probe on the mean token, and its
    initial weights need no random numbers.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.query_HD = nn.Parameter(torch.zeros(ATTENTIVE_HEADS, width))
        self.weight_DC = nn.Parameter(torch.zeros(width, classes))
        self.bias_C = nn.Parameter(torch.zeros(classes))

    def forward(self, tokens_BMD: Tensor, valid_BM: Tensor) -> Tensor:
        """Logits `BC` of clips of M tokens, of which only the valid ones count."""
        # Each head's weights over the tokens
        affinity_BMH = tokens_BMD @ self.query_HD.T / math.sqrt(tokens_BMD.shape[-1])
        attention_BMH = affinity_BMH.masked_fill(~valid_BM[..., None], -torch.inf).softmax(1)

        # Each head averages its share of the features by its weights
        parts_BMHE = tokens_BMD.unflatten(2, (ATTENTIVE_HEADS, -1))
        pooled_BD = torch.einsum("bmh,bmhe->bhe", attention_BMH, parts_BMHE).flatten(1)
        return pooled_BD @ self.weight_DC + self.bias_C


@dataclass(frozen=True, kw_only=True, slots=True)
class _TokenScorer:
    """An attentive probe, the standardisation of its tokens, and its device."""

    probe: AttentiveProbe
    mean_D: Tensor
    scale_D: Tensor

    def logits_BC(self, clips: ClipFeatures, clips_B: np.ndarray) -> Tensor:
        tokens_BMD, valid_BM = select_tokens(clips, clips_B)
        tokens = torch.from_numpy(tokens_BMD).to(self.mean_D.device).float()
        valid = torch.from_numpy(valid_BM).to(self.mean_D.device)
        return self.probe((tokens - self.mean_D) * self.scale_D, valid)

    @torch.inference_mode()
    def scores_NC(self, clips: ClipFeatures) -> np.ndarray:
        count = len(clips.vectors_ND)
        passes = np.split(np.arange(count), range(CLIPS_PER_FORWARD, count, CLIPS_PER_FORWARD))
        return torch.cat([self.logits_BC(clips, clips_B) for clips_B in passes]).cpu().numpy()


def train_attentive_probe(
    train_features: ClipFeatures,
    train_NC: np.ndarray,
    val_features: ClipFeatures,
    val_NC: np.ndarray,
    eval_features: ClipFeatures,
    *,
    seed: int,
    single: bool,
    device: torch.device,
) -> AttentiveScores:
    """Train the probe with AdamW for `attentive_steps`; the val clips select the step whose scores are returned.

    Tokens are standardised with the mean and deviation of the train clips' valid tokens. Deterministic on a CPU.
    """
    if train_features.tokens_NMD is None or train_features.tokens_NMD.shape[-1] % ATTENTIVE_HEADS:
        raise RunError(f"an attentive probe needs tokens whose width is a multiple of {ATTENTIVE_HEADS}")

    # The probe, its optimiser, and the clips' order
    clips, classes = train_NC.shape
    mean_D, scale_D = token_statistics(train_features)
    probe = AttentiveProbe(train_features.tokens_NMD.shape[-1], classes).to(device)
    scorer = _TokenScorer(probe=probe, mean_D=mean_D.to(device), scale_D=scale_D.to(device))
    solver = torch.optim.AdamW(probe.parameters(), lr=ATTENTIVE_PEAK_LR, weight_decay=ATTENTIVE_WEIGHT_DECAY)
    rng = np.random.default_rng([seed, 3])
    steps = attentive_steps(clips)

    best_value = -1.0
    best = AttentiveScores(scores_NC=np.zeros((0, classes)), steps=0)
    for step in range(1, steps + 1):
        # One step, on a cosine schedule
        solver.param_groups[0]["lr"] = ATTENTIVE_PEAK_LR * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        clips_B = rng.choice(clips, min(ATTENTIVE_CLIPS_PER_STEP, clips), replace=False)
        labels_BC = torch.from_numpy(train_NC[clips_B]).to(device)
        loss = attentive_probe_loss(scorer.logits_BC(train_features, clips_B), labels_BC, single=single)
        solver.zero_grad()
        loss.backward()
        solver.step()

        # If the probe predicts the val clips better than before, its scores of the eval clips are kept
        if step % (steps // ATTENTIVE_VALIDATIONS) == 0:
            value = selection_metric(val_NC, scorer.scores_NC(val_features), single=single)
            if value > best_value:
                best_value = value
                best = AttentiveScores(scores_NC=scorer.scores_NC(eval_features), steps=step)
    return best


def attentive_steps(clips: int) -> int:
    """The steps of 150 epochs over `clips` clips, limited to 120 to 600; a multiple of `ATTENTIVE_VALIDATIONS`."""
    steps = MAX_ATTENTIVE_EPOCHS * -(-clips // ATTENTIVE_CLIPS_PER_STEP)
    bounded_steps = int(np.clip(steps, MIN_ATTENTIVE_STEPS, MAX_ATTENTIVE_STEPS))
    return bounded_steps // ATTENTIVE_VALIDATIONS * ATTENTIVE_VALIDATIONS


def attentive_probe_loss(scores_BC: Tensor, labels_BC: Tensor, *, single: bool) -> Tensor:
    """Mean cross-entropy over all classes (`single`), or mean binary cross-entropy of every class."""
    if single:
        return nnf.cross_entropy(scores_BC, labels_BC.argmax(1))
    return nnf.binary_cross_entropy_with_logits(scores_BC, labels_BC)


def token_statistics(train: ClipFeatures) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation of every feature over the valid tokens, `[D]`; 0 for the inverse if it is constant."""
    # Sum over all valid tokens in float64, some clips at a time
    clips_N = np.arange(len(train.vectors_ND))
    total_D = 0.0
    square_D = 0.0
    count = 0
    for start in range(0, len(clips_N), CLIPS_PER_FORWARD):
        tokens_BMD, valid_BM = select_tokens(train, clips_N[start : start + CLIPS_PER_FORWARD])
        valid_ND = tokens_BMD[valid_BM].astype(np.float64)
        total_D = total_D + valid_ND.sum(0)
        square_D = square_D + np.square(valid_ND).sum(0)
        count += len(valid_ND)

    # Mean and deviation
    mean_D = total_D / count
    std_D = np.sqrt(np.maximum(square_D / count - np.square(mean_D), 0))
    scale_D = inverse_deviation_D(std_D)
    return torch.from_numpy(mean_D).float(), torch.from_numpy(scale_D).float()


def select_tokens(clips: ClipFeatures, clips_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of some clips, `BMD`, and which are valid, `BM`; RunError where the features have no tokens."""
    if clips.tokens_NMD is None or clips.valid_NM is None:
        raise RunError("these features were computed without tokens; compute them with tokens=True")
    return clips.tokens_NMD[clips_B], clips.valid_NM[clips_B]
