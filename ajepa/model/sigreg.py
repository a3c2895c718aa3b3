"""SIGReg: the objective on whole views that keeps an encoder from collapse without a teacher.

LeJEPA (arXiv 2511.08544) asks for two things of the vectors z of all views: those of one clip are equal, and all of
them together are distributed as a standard normal, which is the distribution of least risk for an unknown later task.
A distribution is normal if all its projections on a line are, so random directions a are tested each step, with the
statistic of Epps and Pulley (Biometrika 70, 1983), which compares characteristic functions. For N views of B clips:

    vector      z    = MLP(mean of the context tokens)                        P values (`Projector`)
    agreement   A    = mean of (z - mean of the clip's z)^2                   over all values
    normality   T(a) = integral of |mean of exp(i t a z) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt    over -3 .. 3
    loss             = (1 - s) A + s 256 mean of T over the directions        s: `sigreg_share`

LeJEPA multiplies T by N. Here a constant takes its place, so that the number of clips does not change the weight.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.loading.transfer import copy_to_device

# The number of this random stream in the seed.
DIRECTION_STREAM = int.from_bytes(b"directions")

KNOTS = 17  # of the trapezoidal rule over t; the integrand is even, so half of the range is enough

HIGHEST_T = 3.0

NORMALITY_SCALE = 256.0  # N of LeJEPA's statistic

VARIANCE_FLOOR = 1e-5  # added to a variance before its root is taken


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipObjective:
    """The objective on whole views, and the projector that it looks through.

    weight        of this objective beside the prediction of tokens
    hidden        width of the projector's hidden layer
    width         number of values of z
    directions    random directions that each step tests
    sigreg_share  share of the loss that asks for the normal distribution; the rest asks for agreement
    """

    weight: float = 1.0
    hidden: int = 512
    width: int = 64
    directions: int = 256
    sigreg_share: float = 0.02

    def __post_init__(self) -> None:
        if not (self.weight > 0 and 0 < self.sigreg_share < 1):
            raise ValueError(f"a clip objective needs a weight above 0 and a share in (0, 1), got {self}")
        if min(self.hidden, self.width, self.directions) < 1:
            raise ValueError(f"widths and directions must be at least 1, got {self}")


class Projector(nn.Module):
    """Linear, standardised over the batch, GELU, linear; initial weights are Xavier's, a function of `seed`.

    A batch is all views of a step that contain sound, of all ranks and passes: no running statistics are kept.
    """

    def __init__(self, input_width: int, objective: ClipObjective, *, seed: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(input_width, objective.hidden, bias=False)  # standardising takes a bias away
        self.scale_H = nn.Parameter(torch.ones(objective.hidden))
        self.shift_H = nn.Parameter(torch.zeros(objective.hidden))
        self.out = nn.Linear(objective.hidden, objective.width)
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.hidden, self.out):
            nn.init.xavier_normal_(layer.weight, generator=generator)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return z, `NP`."""
        hidden_NH = self.hidden(x_ND)
        centred_NH = hidden_NH - hidden_NH.mean(0)
        deviation_H = (centred_NH.square().mean(0) + VARIANCE_FLOOR).sqrt()
        return self.out(F.gelu(centred_NH / deviation_H * self.scale_H + self.shift_H))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipLoss:
    """The loss and its parts; all but `loss` are detached.

    loss         see the top of this file
    normality    mean of T over the directions
    disagreement  A as a share of the variance of z: 0 if the views of a clip are alike, 1 if no more than those of any
                 two clips
    z_std        standard deviation of z, the mean over its values; 1 for a standard normal
    """

    loss: Tensor
    normality: Tensor
    disagreement: Tensor
    z_std: Tensor


def draw_directions(objective: ClipObjective, seed: int, step: int) -> Tensor:
    """Draw the directions of a step, unit vectors `PK`."""
    rng = np.random.default_rng([seed, step, DIRECTION_STREAM])
    direction_PK = rng.standard_normal((objective.width, objective.directions))
    return torch.from_numpy(direction_PK / np.linalg.norm(direction_PK, axis=0)).float()


def normality_distance(z_NP: Tensor, direction_PK: Tensor) -> Tensor:
    """Return the mean of T over the directions: 0 for a standard normal distribution."""
    # Knots, their weights in the trapezoidal rule over -3 .. 3, and the characteristic function of the normal.
    t_T = torch.linspace(0, HIGHEST_T, KNOTS, device=z_NP.device)
    weight_T = torch.full_like(t_T, 2 * HIGHEST_T / (KNOTS - 1))
    weight_T[0] /= 2
    weight_T[-1] /= 2
    normal_T = torch.exp(-t_T.square() / 2)

    # The empirical characteristic function: its real and its imaginary part.
    angle_NKT = (z_NP @ direction_PK)[..., None] * t_T
    distance_KT = (angle_NKT.cos().mean(0) - normal_T).square() + angle_NKT.sin().mean(0).square()
    return (distance_KT @ (weight_T * normal_T)).mean()


def clip_loss(
    projector: Callable[[Tensor], Tensor],
    mean_ND: Tensor,
    has_sound_N: Tensor,
    direction_PK: Tensor,
    *,
    views: int,
    sigreg_share: float,
) -> ClipLoss:
    """Return the loss of all views of a step, from the mean context token of each; `views` of a clip are adjacent.

    Views without a token of sound (`has_sound_N`, bool on the CPU) are left out.
    """
    # Views with sound, the clip of each, and their number in each clip: found on the host, where it costs no wait.
    clips = len(mean_ND) // views
    sound_N = np.flatnonzero(has_sound_N.numpy())
    count_B = np.bincount(sound_N // views, minlength=clips).clip(min=1)
    clip_N = copy_to_device(sound_N // views, mean_ND.device)
    if len(sound_N) < len(mean_ND):
        mean_ND = mean_ND[copy_to_device(sound_N, mean_ND.device)]
    z_NP = projector(mean_ND)

    # Agreement: the distance from the mean of the clip's vectors.
    count_B1 = copy_to_device(count_B, mean_ND.device)[:, None]
    centre_BP = z_NP.new_zeros(clips, z_NP.shape[1]).index_add(0, clip_N, z_NP) / count_B1
    agreement = (z_NP - centre_BP[clip_N]).square().mean()

    # Normality, and the sum.
    normality = normality_distance(z_NP, direction_PK)
    loss = (1 - sigreg_share) * agreement + sigreg_share * NORMALITY_SCALE * normality

    # Figures of health.
    variance = z_NP.detach().var(0, correction=0)
    return ClipLoss(
        loss=loss,
        normality=normality.detach(),
        disagreement=agreement.detach() / variance.mean().clamp(min=VARIANCE_FLOOR),
        z_std=variance.sqrt().mean(),
    )
