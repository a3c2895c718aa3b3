"""Probes on frozen features: standardisation, a linear probe, nearest neighbours. All deterministic.

The attentive probe: learnt queries look over a clip's tokens, a linear layer says what they find.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ajepa.evaluate.features import ClipFeatures
from ajepa.evaluate.metrics import mean_average_precision
from ajepa.model.pooling import inverse_deviation_D
from pipeline.errors import RunError

NEIGHBOUR_COUNT = 15

L2_GRID = (1.0, 0.1, 0.01, 1e-3, 1e-4)  # penalties on squared weights beside the mean loss of a clip


def standardise_features(train_ND: np.ndarray, *others_ND: np.ndarray) -> tuple[Tensor, ...]:
    """All with the train rows' mean and deviation taken out; a constant feature becomes 0, not nan."""
    mean_D, std_D = train_ND.mean(0), train_ND.std(0)
    scale_D = inverse_deviation_D(std_D).astype(np.float32)
    return tuple(torch.from_numpy((rows_ND - mean_D) * scale_D) for rows_ND in (train_ND, *others_ND))


def selection_metric(labels_NC: np.ndarray, scores_NC: np.ndarray, *, single: bool) -> float:
    """What settings are chosen by: accuracy where every clip has one class, else mAP."""
    if single:
        return float((labels_NC.argmax(1) == scores_NC.argmax(1)).mean())
    return mean_average_precision(labels_NC, scores_NC).value


def choose_l2(
    train_ND: Tensor, train_NC: np.ndarray, val_ND: Tensor, val_NC: np.ndarray, *, single: bool = False
) -> float:
    """The penalty of `L2_GRID` whose probe, trained on the train clips, says best what the others are."""
    probe = LinearProbe.from_train_clips(train_ND, train_NC, single=single)
    told = [selection_metric(val_NC, probe.fit_scores_NC(val_ND, l2=l2), single=single) for l2 in L2_GRID]
    return L2_GRID[int(np.argmax(told))]


def linear_probe_scores_NC(
    train_ND: Tensor, train_NC: np.ndarray, eval_ND: Tensor, *, l2: float, single: bool = False
) -> np.ndarray:
    """Scores of a linear probe (`LinearProbe`)."""
    return LinearProbe.from_train_clips(train_ND, train_NC, single=single).fit_scores_NC(eval_ND, l2=l2)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearProbe:
    """Train clips, turned once for every penalty: by their principal axes `axes_DR`, of `variance_R` each.

    Logistic regressions, one per class, or one over all classes where every clip has one (`single`). A class
    without a train clip is not among `seen_C`.
    """

    rotated_NR: Tensor
    labels_NC: Tensor
    present_C: np.ndarray
    classes: int
    axes_DR: Tensor
    variance_R: Tensor
    single: bool

    @classmethod
    def from_train_clips(
        cls, train_ND: Tensor, train_NC: np.ndarray, *, single: bool = False
    ) -> "LinearProbe":
        seen_C, (axes_DR, variance_R) = np.flatnonzero(train_NC.any(axis=0)), principal_axes(train_ND)
        return cls(
            rotated_NR=train_ND @ axes_DR,
            labels_NC=torch.from_numpy(train_NC[:, seen_C]).to(train_ND.device),
            present_C=seen_C,
            classes=train_NC.shape[1],
            axes_DR=axes_DR,
            variance_R=variance_R,
            single=single,
        )

    def fit_scores_NC(self, eval_ND: Tensor, *, l2: float) -> np.ndarray:
        """Scores of the probe with this penalty, fitted to all clips at once by L-BFGS.

        Minimises the mean over clips of the (summed binary) cross-entropy plus `l2`/2 times the squared weights
        (in scikit-learn's terms C = 1/(l2 N)). A class that is not seen has the lowest score of all, everywhere:
        it can neither rank nor be said.

        Weights are sought along the principal axes, each divided by the root of its curvature (variance times
        p (1 - p), about 1/8, plus `l2`), so that the loss curves about alike in every direction. Sought to the end:
        stopped at a hundred times this gradient, mAP of 150 clips by 2,048 features moved by .006 with the number
        of threads.
        """
        scale_R1 = (self.variance_R / 8 + l2).rsqrt()[:, None]
        device = self.rotated_NR.device
        weight_RC = torch.zeros(len(scale_R1), len(self.present_C), device=device, requires_grad=True)
        bias_C = torch.zeros(len(self.present_C), device=device, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weight_RC, bias_C],
            max_iter=1000,
            max_eval=2000,
            history_size=20,
            tolerance_grad=1e-6,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def penalised_loss() -> Tensor:
            solver.zero_grad()
            scores_NC = self.rotated_NR @ (scale_R1 * weight_RC) + bias_C
            penalty = l2 / 2 * (scale_R1 * weight_RC).square().sum()
            value = (linear_probe_loss(scores_NC, self.labels_NC, single=self.single) + penalty) / len(
                self.present_C
            )
            value.backward()
            return value

        solver.step(penalised_loss)
        with torch.no_grad():
            told_NC = eval_ND @ (self.axes_DR @ (scale_R1 * weight_RC)) + bias_C
        scores_NC = np.full((len(eval_ND), self.classes), float(told_NC.min()), np.float32)
        scores_NC[:, self.present_C] = told_NC.cpu().numpy()
        return scores_NC


def linear_probe_loss(scores_NC: Tensor, labels_NC: Tensor, *, single: bool) -> Tensor:
    """Mean over clips of the cross-entropy: over all classes, or summed over every class's own."""
    if single:
        return nnf.cross_entropy(scores_NC, labels_NC)
    return nnf.binary_cross_entropy_with_logits(scores_NC, labels_NC, reduction="sum") / len(scores_NC)


def principal_axes(train_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal axes `DR` that the rows lie along, and their variance along each, `R`.

    Weights have no reason to leave the rows' span: with fewer rows than features there are as many axes as rows,
    found at the cost of the smaller side.
    """
    count, width = train_ND.shape
    if count >= width:
        variance_R, axes_DR = torch.linalg.eigh(train_ND.T @ train_ND / count)
        return axes_DR, variance_R.clamp(min=0)
    variance_R, clips_NR = torch.linalg.eigh(train_ND @ train_ND.T / count)
    there = variance_R > 1e-6 * variance_R[-1]
    variance_R, clips_NR = variance_R[there], clips_NR[:, there]
    return train_ND.T @ clips_NR * (variance_R * count).rsqrt(), variance_R


def knn_scores_NC(
    train_ND: Tensor, train_NC: np.ndarray, eval_ND: Tensor, *, neighbours: int = NEIGHBOUR_COUNT
) -> np.ndarray:
    """Share of the most similar train clips (cosine of standardised features) that carry each class."""
    known_ND, count = nnf.normalize(train_ND, dim=1), min(neighbours, len(train_ND))
    scores = []
    for asked_ND in nnf.normalize(eval_ND, dim=1).split(1024):  # 80 MB of similarities to 20 k train clips
        nearest_NK = (asked_ND @ known_ND.T).topk(count, dim=1).indices
        scores.append(train_NC[nearest_NK.cpu().numpy()].mean(axis=1))
    return np.concatenate(scores)


ATTENTIVE_HEADS = 4

MAX_ATTENTIVE_STEPS, MIN_ATTENTIVE_STEPS, MAX_ATTENTIVE_EPOCHS, ATTENTIVE_CLIPS_PER_STEP = 600, 120, 150, 128

VALIDATION_COUNT = 12  # times that the clips to choose with are looked at

ATTENTIVE_PEAK_LR, ATTENTIVE_WEIGHT_DECAY = 3e-3, 0.01

CLIPS_PER_FORWARD = 1_024


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentiveScores:
    """What the probe says of the clips to measure on, as it was after `steps` steps: the best of all looks."""

    scores_NC: np.ndarray
    steps: int


class AttentiveProbe(nn.Module):
    """Each head has a query: its share of the features is averaged with softmax(tokens . query) over valid tokens.

    Everything starts at 0: as a linear probe on the mean of the tokens, without a random number.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.query_HD = nn.Parameter(torch.zeros(ATTENTIVE_HEADS, width))
        self.weight_DC = nn.Parameter(torch.zeros(width, classes))
        self.bias_C = nn.Parameter(torch.zeros(classes))

    def forward(self, tokens_BMD: Tensor, valid_BM: Tensor) -> Tensor:
        told_BMH = tokens_BMD @ self.query_HD.T / math.sqrt(tokens_BMD.shape[-1])
        share_BMH = told_BMH.masked_fill(~valid_BM[..., None], -torch.inf).softmax(1)
        parts_BMHE = tokens_BMD.unflatten(2, (ATTENTIVE_HEADS, -1))
        found_BD = torch.einsum("bmh,bmhe->bhe", share_BMH, parts_BMHE).flatten(1)
        return found_BD @ self.weight_DC + self.bias_C


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
    """Train the probe with AdamW for `steps_for` steps; the clips of `val` choose how many of these are kept.

    Tokens are standardised with the mean and deviation of the train clips' valid tokens. Deterministic on a CPU.
    """
    if train_features.tokens_NMD is None or train_features.tokens_NMD.shape[-1] % ATTENTIVE_HEADS:
        raise RunError(f"an attentive probe needs tokens of a width that {ATTENTIVE_HEADS} divides")
    mean_D, scale_D = (told.to(device) for told in token_statistics(train_features))
    classes = train_NC.shape[1]
    probe = AttentiveProbe(train_features.tokens_NMD.shape[-1], classes).to(device)
    solver = torch.optim.AdamW(probe.parameters(), lr=ATTENTIVE_PEAK_LR, weight_decay=ATTENTIVE_WEIGHT_DECAY)
    rng, steps = np.random.default_rng([seed, 3]), attentive_steps(len(train_NC))

    def probe_logits(clips: ClipFeatures, clips_B: np.ndarray) -> Tensor:
        tokens_BMD, valid_BM = (torch.from_numpy(a).to(device) for a in select_tokens(clips, clips_B))
        return probe((tokens_BMD.float() - mean_D) * scale_D, valid_BM)

    def score_clips_NC(clips: ClipFeatures) -> np.ndarray:
        count = len(clips.vectors_ND)
        passes = np.split(np.arange(count), range(CLIPS_PER_FORWARD, count, CLIPS_PER_FORWARD))
        with torch.inference_mode():
            return torch.cat([probe_logits(clips, clips_B) for clips_B in passes]).cpu().numpy()

    best, kept = -1.0, AttentiveScores(scores_NC=np.zeros((0, classes)), steps=0)
    for step in range(1, steps + 1):
        solver.param_groups[0]["lr"] = ATTENTIVE_PEAK_LR * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        clips_B = rng.choice(len(train_NC), min(ATTENTIVE_CLIPS_PER_STEP, len(train_NC)), replace=False)
        loss = attentive_probe_loss(
            probe_logits(train_features, clips_B),
            torch.from_numpy(train_NC[clips_B]).to(device),
            single=single,
        )
        solver.zero_grad()
        loss.backward()
        solver.step()
        if (
            step % (steps // VALIDATION_COUNT) == 0
            and (now := selection_metric(val_NC, score_clips_NC(val_features), single=single)) > best
        ):
            best, kept = now, AttentiveScores(scores_NC=score_clips_NC(eval_features), steps=step)
    return kept


def attentive_steps(clips: int) -> int:
    """150 epochs of so many clips, but 120 steps at least and 600 at most; a multiple of the looks."""
    epochs = MAX_ATTENTIVE_EPOCHS * -(-clips // ATTENTIVE_CLIPS_PER_STEP)
    return (
        int(np.clip(epochs, MIN_ATTENTIVE_STEPS, MAX_ATTENTIVE_STEPS)) // VALIDATION_COUNT * VALIDATION_COUNT
    )


def attentive_probe_loss(scores_BC: Tensor, labels_BC: Tensor, *, single: bool) -> Tensor:
    """Cross-entropy of the one class, or of every class by itself."""
    if single:
        return nnf.cross_entropy(scores_BC, labels_BC.argmax(1))
    return nnf.binary_cross_entropy_with_logits(scores_BC, labels_BC)


def token_statistics(train: ClipFeatures) -> tuple[Tensor, Tensor]:
    """Mean of every feature over the valid tokens, and one over its deviation (0 where it is constant)."""
    total_D = square_D = count = 0.0
    for start in range(0, len(train.vectors_ND), CLIPS_PER_FORWARD):
        tokens_BMD, valid_BM = select_tokens(
            train, np.arange(len(train.vectors_ND))[start : start + CLIPS_PER_FORWARD]
        )
        held_ND = tokens_BMD[valid_BM].astype(np.float64)
        total_D, square_D = total_D + held_ND.sum(0), square_D + np.square(held_ND).sum(0)
        count += len(held_ND)
    mean_D = total_D / count
    std_D = np.sqrt(np.maximum(square_D / count - np.square(mean_D), 0))
    scale_D = inverse_deviation_D(std_D)
    return torch.from_numpy(mean_D).float(), torch.from_numpy(scale_D).float()


def select_tokens(clips: ClipFeatures, clips_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of some clips, and which are valid; only of features that have any."""
    if clips.tokens_NMD is None or clips.valid_NM is None:
        raise RunError("these features were computed without tokens; ask for them")
    return clips.tokens_NMD[clips_B], clips.valid_NM[clips_B]
