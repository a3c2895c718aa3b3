"""Probes on frozen features: standardisation, a linear probe, nearest neighbours. All deterministic."""

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from ajepa.metrics import mean_average_precision

NEIGHBOURS = 15
L2_GRID = (1.0, 0.1, 0.01, 1e-3, 1e-4)  # penalties on squared weights beside the mean loss of a clip


def standardised(train_ND: np.ndarray, eval_ND: np.ndarray) -> tuple[Tensor, Tensor]:
    """Both with the train rows' mean and deviation taken out; a constant feature becomes 0, not nan."""
    mean_D, std_D = train_ND.mean(0), train_ND.std(0)
    scale_D = np.where(std_D > 1e-6, 1 / np.maximum(std_D, 1e-6), 0).astype(np.float32)
    train, evaluated = ((split_ND - mean_D) * scale_D for split_ND in (train_ND, eval_ND))
    return torch.from_numpy(train), torch.from_numpy(evaluated)


def chosen_l2(train_ND: Tensor, train_NC: np.ndarray, seed: int) -> float:
    """The penalty of `L2_GRID` whose probe, trained on 80 % of the train clips, ranks the other 20 % best."""
    order_N = np.random.default_rng([seed, 1]).permutation(len(train_ND))
    held_N, kept_N = np.split(order_N, [len(order_N) // 5])
    maps = [
        mean_average_precision(
            train_NC[held_N], linear_NC(train_ND[kept_N], train_NC[kept_N], train_ND[held_N], l2=l2)
        ).value
        for l2 in L2_GRID
    ]
    return L2_GRID[int(np.argmax(maps))]


def linear_NC(train_ND: Tensor, train_NC: np.ndarray, eval_ND: Tensor, *, l2: float) -> np.ndarray:
    """Scores of one logistic regression per class, fitted to all clips at once by L-BFGS.

    Minimises the mean over clips of the summed binary cross-entropies plus `l2`/2 times the squared weights
    (in scikit-learn's terms C = 1/(l2 N)). A class without a train clip scores 0 everywhere: it cannot rank.
    """
    seen_C = np.flatnonzero(train_NC.any(axis=0))
    labels_NC = torch.from_numpy(train_NC[:, seen_C])
    basis_DD = preconditioner(train_ND, l2)
    design_ND, rotated_DC = (
        train_ND @ basis_DD,
        torch.zeros(train_ND.shape[1], len(seen_C), requires_grad=True),
    )
    bias_C = torch.zeros(len(seen_C), requires_grad=True)
    solver = torch.optim.LBFGS(
        [rotated_DC, bias_C],
        max_iter=100,
        history_size=20,
        tolerance_grad=1e-4,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        scores_NC = design_ND @ rotated_DC + bias_C
        entropy = nnf.binary_cross_entropy_with_logits(scores_NC, labels_NC, reduction="sum") / len(train_ND)
        value = (entropy + l2 / 2 * (basis_DD @ rotated_DC).square().sum()) / len(seen_C)
        value.backward()
        return value

    solver.step(loss)
    scores_NC = np.zeros((len(eval_ND), train_NC.shape[1]), np.float32)
    scores_NC[:, seen_C] = (eval_ND @ basis_DD @ rotated_DC + bias_C).detach().numpy()
    return scores_NC


def preconditioner(train_ND: Tensor, l2: float) -> Tensor:
    """A basis of the weights in which the logistic loss curves about alike in every direction.

    Principal axes, each divided by the root of its curvature (variance times p (1 - p), about 1/8, plus `l2`).
    On 600 clips of 256 features L-BFGS then needs 60 steps where it had not arrived after 200.
    """
    variance_D, axes_DD = torch.linalg.eigh(train_ND.T @ train_ND / len(train_ND))
    return axes_DD * (variance_D.clamp(min=0) / 8 + l2).rsqrt()


def knn_NC(
    train_ND: Tensor, train_NC: np.ndarray, eval_ND: Tensor, *, neighbours: int = NEIGHBOURS
) -> np.ndarray:
    """Share of the most similar train clips (cosine of standardised features) that carry each class."""
    known_ND, count = nnf.normalize(train_ND, dim=1), min(neighbours, len(train_ND))
    scores = []
    for asked_ND in nnf.normalize(eval_ND, dim=1).split(1024):  # 80 MB of similarities to 20 k train clips
        nearest_NK = (asked_ND @ known_ND.T).topk(count, dim=1).indices
        scores.append(train_NC[nearest_NK.numpy()].mean(axis=1))
    return np.concatenate(scores)
