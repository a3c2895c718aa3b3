"""Probes on frozen features: a linear probe, nearest neighbours, an attentive probe over tokens; all deterministic."""

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

# Penalties on the squared weights of the linear probe, relative to the mean loss per clip.
L2_GRID = (1.0, 0.1, 0.01, 1e-3, 1e-4)

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
    mean_D = train_ND.mean(0)
    scale_D = inverse_deviation_D(train_ND.std(0)).astype(np.float32)
    return tuple(torch.from_numpy((rows_ND - mean_D) * scale_D) for rows_ND in (train_ND, *others_ND))


def selection_metric(labels_NC: np.ndarray, scores_NC: np.ndarray, *, single: bool) -> float:
    """The metric that selects settings: accuracy if every clip has exactly one class (`single`), else mAP."""
    if single:
        return float((labels_NC.argmax(1) == scores_NC.argmax(1)).mean())
    return mean_average_precision(labels_NC, scores_NC).value


def choose_l2(
    train_ND: Tensor, train_NC: np.ndarray, val_ND: Tensor, val_NC: np.ndarray, *, single: bool = False
) -> float:
    """The penalty of `L2_GRID` with which a probe of the train clips predicts the val clips best."""
    probe = LinearProbe.from_train_clips(train_ND, train_NC, single=single)
    values = [selection_metric(val_NC, probe.fit_scores_NC(val_ND, l2=l2), single=single) for l2 in L2_GRID]
    return L2_GRID[int(np.argmax(values))]


def linear_probe_scores_NC(
    train_ND: Tensor, train_NC: np.ndarray, eval_ND: Tensor, *, l2: float, single: bool = False
) -> np.ndarray:
    """The eval clips' scores from a linear probe that is trained on the train clips with this penalty."""
    return LinearProbe.from_train_clips(train_ND, train_NC, single=single).fit_scores_NC(eval_ND, l2=l2)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearProbe:
    """Logistic regressions: one per class, or one over all classes if every clip has exactly one class (`single`).

    The features of the train clips are rotated to their principal axes once, for all penalties.

    rotated_NR  the rotated features of the train clips
    axes_DR     the principal axes
    variance_R  the train clips' variance along each axis
    classes     number of classes
    present_C   indices of the classes that a train clip has
    labels_NC   the train clips' labels of the present classes
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
        """The probe of these train clips, without fitted weights."""
        present_C = np.flatnonzero(train_NC.any(axis=0))
        axes_DR, variance_R = principal_axes(train_ND)
        return cls(
            rotated_NR=train_ND @ axes_DR,
            labels_NC=torch.from_numpy(train_NC[:, present_C]).to(train_ND.device),
            present_C=present_C,
            classes=train_NC.shape[1],
            axes_DR=axes_DR,
            variance_R=variance_R,
            single=single,
        )

    def fit_scores_NC(self, eval_ND: Tensor, *, l2: float) -> np.ndarray:
        """Scores of the probe with this penalty, fitted to all train clips at once by L-BFGS.

        The fit minimises the mean over clips of the (summed binary) cross-entropy plus `l2`/2 times the squared
        weights (in scikit-learn's terms C = 1/(l2 N)). A class without a train clip gets the lowest score for every
        eval clip, so it neither ranks clips nor is predicted.
        """
        # Weights are optimised along the principal axes. Each is divided by the root of the curvature along its axis
        # (variance times p (1 - p), about 1/8, plus l2), so that the loss has about equal curvature in all directions.
        scale_R1 = (self.variance_R / 8 + l2).rsqrt()[:, None]
        device = self.rotated_NR.device
        weight_RC = torch.zeros(len(scale_R1), len(self.present_C), device=device, requires_grad=True)
        bias_C = torch.zeros(len(self.present_C), device=device, requires_grad=True)

        # The tolerance is deliberately tight: at a hundred times this gradient mAP (150 clips, 2,048 features) still
        # varied by .006 with the number of threads.
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
            loss = linear_probe_loss(scores_NC, self.labels_NC, single=self.single)
            mean_loss = (loss + penalty) / len(self.present_C)
            mean_loss.backward()
            return mean_loss

        # Fit, then score the eval clips; a class without a train clip gets the lowest score
        solver.step(penalised_loss)
        with torch.no_grad():
            present_NC = eval_ND @ (self.axes_DR @ (scale_R1 * weight_RC)) + bias_C
        scores_NC = np.full((len(eval_ND), self.classes), float(present_NC.min()), np.float32)
        scores_NC[:, self.present_C] = present_NC.cpu().numpy()
        return scores_NC


def linear_probe_loss(scores_NC: Tensor, labels_NC: Tensor, *, single: bool) -> Tensor:
    """Mean loss per clip: the cross-entropy over all classes (`single`), or the sum of the classes' binary ones."""
    if single:
        return nnf.cross_entropy(scores_NC, labels_NC)
    return nnf.binary_cross_entropy_with_logits(scores_NC, labels_NC, reduction="sum") / len(scores_NC)


def principal_axes(train_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The principal axes of the training rows, orthonormal, `DR`, and the rows' variance along each axis, `R`.

    The optimal weights lie in the span of the training rows, so with N < D rows at most N axes are needed.
    The smaller of the two product matrices, `D x D` or `N x N`, is decomposed.
    """
    # At least as many rows as features: D axes
    count, width = train_ND.shape
    if count >= width:
        variance_R, axes_DR = torch.linalg.eigh(train_ND.T @ train_ND / count)
        return axes_DR, variance_R.clamp(min=0)

    # Fewer rows than features: N axes, without those along which the rows do not vary
    variance_R, clips_NR = torch.linalg.eigh(train_ND @ train_ND.T / count)
    is_spanned = variance_R > 1e-6 * variance_R[-1]
    variance_R, clips_NR = variance_R[is_spanned], clips_NR[:, is_spanned]
    return train_ND.T @ clips_NR * (variance_R * count).rsqrt(), variance_R


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
