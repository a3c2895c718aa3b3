"""The linear probe: logistic regressions on standardised features, fitted exactly and for several penalties in turn.

For N train clips with features z, the fit minimises, over weights w and bias b of each class,

    mean over clips of loss(z w + b, label) + l2/2 |w|^2            in scikit-learn's terms C = 1/(l2 N)

by Newton's method: each step solves H d = -gradient by conjugate gradients, for all classes at once, and is halved for
a class until its loss falls. Weights are those of the train clips' principal axes, along which the Hessian is almost
diagonal, `variance x mean of p (1 - p) + l2`, so that few products with the features are enough. A class that has
converged is left out of the products that follow. All penalties of `L2_GRID` take some 240 products with the features
and their transpose, 8e12 floating-point operations for 20,000 clips of 768 features and 527 classes. L-BFGS over all
classes at once took three times as many (2,000 clips, 384 features, 64 classes) and five times as long, and at small
penalties stopped so far from the minimum that mAP was off by .005.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from ajepa.evaluate.metrics import mean_average_precision

# Penalties on the squared weights, relative to the mean loss per clip. The largest is first, and each fit starts from
# the one before.
L2_GRID = (1.0, 0.1, 0.01, 1e-3, 1e-4)

# A class has converged once a whole Newton step changes its scores by less than this, as a root mean square over the
# clips (weighted by p (1 - p)); that step is still taken, and leaves an error of some 1e-4 in scores of the order of 1
# to 10.
SCORE_TOLERANCE = 3e-3

MAX_NEWTON_STEPS = 40

# Conjugate gradients end where the residual is this share of the gradient.
RESIDUAL_SHARE = 0.05
MAX_GRADIENT_STEPS = 100

MAX_HALVINGS = 20

# A loss may rise by this share through rounding.
LOSS_ROUNDING = 1e-6

LEAST_REST_VARIANCE = 1e-6

LEAST_CURVATURE = 1e-12

# Classes that are fitted at once, if they do not depend on each other.
CLASSES_PER_FIT = 128

# At most so many features or clips are decomposed into principal axes, which costs the cube of their number: 4,096 take
# 10 s on two cores, 12,288 (moments of a ViT-B) took minutes.
MAX_AXES = 4_096

# The number of clips whose principal axes stand for those of all clips, where there are more than MAX_AXES.
CLIPS_FOR_AXES = 2_048


def selection_metric(labels_NC: np.ndarray, scores_NC: np.ndarray, *, single: bool) -> float:
    """The metric that selects settings: accuracy if every clip has exactly one class (`single`), else mAP."""
    if single:
        return float((labels_NC.argmax(1) == scores_NC.argmax(1)).mean())
    return mean_average_precision(labels_NC, scores_NC).value


def choose_l2(probe: "LinearProbe", val_ND: Tensor, val_NC: np.ndarray) -> float:
    """The penalty of `L2_GRID` with which the probe predicts the val clips best; of equal ones the largest."""
    values = [
        selection_metric(val_NC, probe.score_clips(weights, val_ND), single=probe.single)
        for weights in probe.fit_penalties(L2_GRID)
    ]
    return L2_GRID[int(np.argmax(values))]


def linear_probe_scores_NC(
    train_ND: Tensor, train_NC: np.ndarray, eval_ND: Tensor, *, l2: float, single: bool = False
) -> np.ndarray:
    """The eval clips' scores from a linear probe that is trained on the train clips with this penalty."""
    probe = LinearProbe.from_train_clips(train_ND, train_NC, single=single)
    return probe.score_clips(probe.fit(l2), eval_ND)


def linear_probe_loss(scores_NC: Tensor, labels_NC: Tensor, *, single: bool) -> Tensor:
    """Mean loss per clip: the cross-entropy over all classes (`single`), or the sum of the classes' binary ones."""
    if single:
        return nnf.cross_entropy(scores_NC, labels_NC)
    return nnf.binary_cross_entropy_with_logits(scores_NC, labels_NC, reduction="sum") / len(scores_NC)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProbeWeights:
    """Fitted weights along the principal axes, `RC`, and the bias of each class, of the classes with a train clip."""

    weight_RC: Tensor
    bias_C: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearProbe:
    """Logistic regressions: one per class, or one over all classes if every clip has exactly one class (`single`).

    The features of the train clips are rotated to their principal axes once, for all penalties.

    inputs_NR  the features of the train clips along the axes, or as they are if some axes are not known
    axes       the principal axes
    classes    number of classes
    present_C  indices of the classes that a train clip has
    labels_NC  the train clips' labels of the present classes
    """

    inputs_NR: Tensor
    labels_NC: Tensor
    present_C: np.ndarray
    classes: int
    axes: "PrincipalAxes"
    single: bool

    @classmethod
    def from_train_clips(
        cls,
        train_ND: Tensor,
        train_NC: np.ndarray,
        *,
        single: bool = False,
        axes: "PrincipalAxes | None" = None,
    ) -> "LinearProbe":
        """The probe of these train clips, without fitted weights; `axes` are theirs, if they are known already."""
        present_C = np.flatnonzero(train_NC.any(axis=0))
        axes = axes or PrincipalAxes.from_features(train_ND)
        return cls(
            inputs_NR=train_ND @ axes.axes_DR if axes.are_complete else train_ND,
            labels_NC=torch.from_numpy(train_NC[:, present_C]).to(train_ND.device),
            present_C=present_C,
            classes=train_NC.shape[1],
            axes=axes,
            single=single,
        )

    def fit_penalties(self, penalties: Sequence[float]) -> Iterator[ProbeWeights]:
        """Yield the weights fitted with each penalty; each fit starts from the one before."""
        weights: ProbeWeights | None = None
        for l2 in penalties:
            weights = self.fit(l2, weights)
            yield weights

    def fit(self, l2: float, start: ProbeWeights | None = None) -> ProbeWeights:
        """The weights that minimise the loss with this penalty (see the top of this file), found from a start."""
        if start is None:
            start = self.initial_weights()
        weight_RC = start.weight_RC.clone()
        bias_C = start.bias_C.clone()

        # Classes of one loss are fitted together, others in blocks.
        present = len(self.present_C)
        block = present if self.single else CLASSES_PER_FIT
        for first in range(0, present, block):
            classes = slice(first, first + block)
            fit = NewtonFit(
                inputs_NR=self.inputs_NR,
                axes=self.axes,
                labels_NC=self.labels_NC[:, classes],
                single=self.single,
                l2=l2,
            )
            weight_RC[:, classes], bias_C[classes] = fit.minimise(weight_RC[:, classes], bias_C[classes])
        return ProbeWeights(weight_RC=weight_RC, bias_C=bias_C)

    def initial_weights(self) -> ProbeWeights:
        """Weights of 0, and the bias that gives each class its share of the train clips."""
        clips = len(self.labels_NC)
        share_C = self.labels_NC.mean(0).clamp(0.5 / clips, 1 - 0.5 / clips)
        bias_C = share_C.log() - share_C.log().mean() if self.single else share_C.logit()
        weight_RC = self.labels_NC.new_zeros(self.inputs_NR.shape[1], len(self.present_C))
        return ProbeWeights(weight_RC=weight_RC, bias_C=bias_C)

    def feature_weights_DC(self, weights: ProbeWeights) -> Tensor:
        """The weights of the features themselves, of the classes with a train clip."""
        return self.axes.axes_DR @ weights.weight_RC if self.axes.are_complete else weights.weight_RC

    def score_clips(self, weights: ProbeWeights, eval_ND: Tensor) -> np.ndarray:
        """Scores `NC` of clips for all classes.

        A class without a train clip gets the lowest score for every clip, so it neither ranks clips nor is predicted.
        """
        present_NC = eval_ND @ self.feature_weights_DC(weights) + weights.bias_C
        scores_NC = np.full((len(eval_ND), self.classes), float(present_NC.min()), np.float32)
        scores_NC[:, self.present_C] = present_NC.cpu().numpy()
        return scores_NC


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NewtonFit:
    """The fit of some classes with one penalty; see the top of this file.

    Classes of separate losses are separate problems, solved side by side: sums over weights are one value for each
    class. Under one loss over all classes (`single`) they are one problem, and the sums are over all classes.
    """

    inputs_NR: Tensor
    labels_NC: Tensor
    axes: "PrincipalAxes"
    single: bool
    l2: float

    @torch.no_grad()
    def minimise(self, weight_RC: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and bias at the minimum, from these."""
        weight_RC = weight_RC.clone()
        bias_C = bias_C.clone()
        scores_NC = self.inputs_NR @ weight_RC + bias_C
        active_C = torch.arange(len(bias_C), device=bias_C.device)
        for _ in range(MAX_NEWTON_STEPS):
            # A step of the classes that have not converged.
            step = self.newton_step(scores_NC[:, active_C], weight_RC[:, active_C], active_C)
            weight_RC[:, active_C] += step.length_C * step.weight_RC
            bias_C[active_C] += step.length_C * step.bias_C
            scores_NC[:, active_C] += step.length_C * step.change_NC

            # Go on with those whose step was still large.
            active_C = active_C[~step.is_small_C]
            if not len(active_C):
                break
        return weight_RC, bias_C

    def newton_step(self, scores_NC: Tensor, weight_RC: Tensor, active_C: Tensor) -> "NewtonStep":
        """The Newton step of some classes from their scores and weights, and how much of it lowers their loss."""
        # Gradient of the loss, and the mean curvature p (1 - p) of each class.
        labels_NC = self.labels_NC[:, active_C]
        clips = len(labels_NC)
        error_NC, slope_NC = self.errors_and_slopes(scores_NC, labels_NC)
        gradient = torch.cat(
            (self.inputs_NR.T @ error_NC / clips + self.l2 * weight_RC, error_NC.mean(0)[None])
        )
        curvature_C = slope_NC.mean(0).clamp(min=LEAST_CURVATURE)

        # Solve H d = -gradient.
        step, change_NC = self.solve(slope_NC, labels_NC, gradient, curvature_C)
        decrease_C = -self.sum_over_weights(gradient * step)

        # Halve the step of a class until its loss does not rise.
        before_C = self.loss_C(scores_NC, labels_NC, weight_RC)
        length_C = self.find_length(before_C, scores_NC, change_NC, labels_NC, weight_RC, step[:-1])

        # The step is the last one if it hardly changes the scores, or the loss by no more than rounding does.
        mean_curvature = curvature_C.mean() if self.single else curvature_C
        is_small_C = (decrease_C <= SCORE_TOLERANCE**2 * mean_curvature) & (length_C == 1)
        is_small_C |= (decrease_C <= LOSS_ROUNDING * before_C) | (length_C == 0)
        return NewtonStep(
            weight_RC=step[:-1],
            bias_C=step[-1],
            change_NC=change_NC,
            length_C=length_C,
            is_small_C=is_small_C,
        )

    def errors_and_slopes(self, scores_NC: Tensor, labels_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Probability p less label, and p (1 - p), or p under one loss over all classes; exact where p is near 1."""
        if self.single:
            share_NC = scores_NC.softmax(1)
            others_NC = share_NC * (1 - labels_NC)
            return others_NC - labels_NC * others_NC.sum(1, keepdim=True), share_NC
        share_NC = scores_NC.sigmoid()
        missing_NC = (-scores_NC).sigmoid()
        return torch.where(labels_NC > 0, -missing_NC, share_NC), share_NC * missing_NC

    def solve(
        self, slope_NC: Tensor, labels_NC: Tensor, gradient: Tensor, curvature_C: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The solution d of H d = -gradient, weights above the bias, and the change of the scores that it makes."""
        # Conjugate gradients, scaled by about the inverse of H; all vectors have the bias as their last row.
        solution = torch.zeros_like(gradient)
        change_NC = torch.zeros_like(slope_NC)
        residual = -gradient
        direction = self.scale_by_curvature(residual, curvature_C)
        size_C = self.sum_over_weights(residual * direction)
        end_C = RESIDUAL_SHARE**2 * size_C
        for _ in range(MAX_GRADIENT_STEPS):
            moved_NC = self.inputs_NR @ direction[:-1] + direction[-1]
            product = self.hessian_product(slope_NC, labels_NC, moved_NC, direction)
            bend_C = self.sum_over_weights(direction * product)

            # A class that is solved takes no more steps.
            is_open_C = (size_C > end_C) & (bend_C > 0)
            step_C = torch.where(is_open_C, size_C / bend_C, 0.0)
            solution += step_C * direction
            change_NC += step_C * moved_NC
            residual -= step_C * product
            scaled = self.scale_by_curvature(residual, curvature_C)
            new_size_C = self.sum_over_weights(residual * scaled)
            if not (is_open_C & (new_size_C > end_C)).any():
                break
            direction = scaled + torch.where(is_open_C, new_size_C / size_C, 0.0) * direction
            size_C = torch.where(is_open_C, new_size_C, size_C)
        return solution, change_NC

    def hessian_product(
        self, slope_NC: Tensor, labels_NC: Tensor, moved_NC: Tensor, direction: Tensor
    ) -> Tensor:
        """The Hessian times a direction that moves the scores by `moved_NC`."""
        if self.single:
            # Movements about that of a clip's own class, whose p may be near 1.
            moved_NC = moved_NC - (labels_NC * moved_NC).sum(1, keepdim=True)
            moved_NC = moved_NC - (slope_NC * moved_NC).sum(1, keepdim=True)
        weighted_NC = slope_NC * moved_NC / len(slope_NC)
        weight_product_RC = self.inputs_NR.T @ weighted_NC + self.l2 * direction[:-1]
        return torch.cat((weight_product_RC, weighted_NC.sum(0)[None]))

    def scale_by_curvature(self, vector: Tensor, curvature_C: Tensor) -> Tensor:
        """About the inverse of the Hessian times a vector: exact if all clips had the same curvature p (1 - p)."""
        axes = self.axes
        along_RC = axes.variance_R[:, None] * curvature_C + self.l2
        bias_C = vector[-1] / curvature_C
        if axes.are_complete:
            return torch.cat((vector[:-1] / along_RC, bias_C[None]))

        # Features that are not rotated: the known axes, and the mean variance of what they leave.
        rest_C = axes.rest_variance * curvature_C + self.l2
        known_RC = axes.axes_DR.T @ vector[:-1]
        scaled_DC = vector[:-1] / rest_C + axes.axes_DR @ (known_RC * (1 / along_RC - 1 / rest_C))
        return torch.cat((scaled_DC, bias_C[None]))

    def find_length(
        self,
        before_C: Tensor,
        scores_NC: Tensor,
        change_NC: Tensor,
        labels_NC: Tensor,
        weight_RC: Tensor,
        step_RC: Tensor,
    ) -> Tensor:
        """The share of each class's step, 1, 1/2, 1/4 ..., that does not raise its loss; 0 if none was found."""
        length_C = torch.ones_like(scores_NC[0])
        for _ in range(MAX_HALVINGS):
            after_C = self.loss_C(scores_NC + length_C * change_NC, labels_NC, weight_RC + length_C * step_RC)
            rises_C = ~(after_C <= before_C + LOSS_ROUNDING * before_C.abs())
            if not rises_C.any():
                return length_C
            length_C = torch.where(rises_C, length_C / 2, length_C)
        return torch.where(rises_C, 0.0, length_C)

    def loss_C(self, scores_NC: Tensor, labels_NC: Tensor, weight_RC: Tensor) -> Tensor:
        """The penalised loss of each class, float64; under one loss over all classes the same for all."""
        penalty_C = self.l2 / 2 * self.sum_over_weights(weight_RC.square()).double()
        if self.single:
            loss_N = nnf.cross_entropy(scores_NC, labels_NC, reduction="none")
            return loss_N.double().mean() + penalty_C
        loss_NC = nnf.softplus(torch.where(labels_NC > 0, -scores_NC, scores_NC))
        return loss_NC.sum(0, dtype=torch.float64) / len(loss_NC) + penalty_C

    def sum_over_weights(self, x_RC: Tensor) -> Tensor:
        """The sum over the weights of each problem, `C`: of a class, or of all classes if they are one problem."""
        sums_C = x_RC.sum(0)
        return sums_C.sum().expand_as(sums_C) if self.single else sums_C


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NewtonStep:
    """A step of some classes: its weights and bias, the change of the scores, and the share of it that is taken.

    is_small_C  whether the step is the last one that a class needs
    """

    weight_RC: Tensor
    bias_C: Tensor
    change_NC: Tensor
    length_C: Tensor
    is_small_C: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PrincipalAxes:
    """Principal axes of the training rows, orthonormal, `DR`, and the rows' variance along each axis, `R`.

    rest_variance  mean variance along the other axes, where some are not known; 0: all axes along which rows vary
                   are known
    """

    axes_DR: Tensor
    variance_R: Tensor
    rest_variance: float = 0.0

    @property
    def are_complete(self) -> bool:
        """Whether the rows vary along no other axis."""
        return self.rest_variance == 0

    @classmethod
    def from_features(cls, train_ND: Tensor) -> "PrincipalAxes":
        """The axes of these rows: all of them, or those of CLIPS_FOR_AXES rows if there are more than MAX_AXES."""
        count, width = train_ND.shape
        if min(count, width) <= MAX_AXES:
            return cls._decompose(train_ND)

        # The axes of some rows, spread evenly; the variance of all rows along them, and what is left of it.
        place_N = torch.linspace(0, count - 1, CLIPS_FOR_AXES).long().to(train_ND.device)
        axes_DR = cls._decompose(train_ND[place_N]).axes_DR
        variance_R = (train_ND @ axes_DR).square().mean(0)
        rest = float(train_ND.square().mean(0).sum() - variance_R.sum()) / (width - len(variance_R))
        return cls(axes_DR=axes_DR, variance_R=variance_R, rest_variance=max(rest, LEAST_REST_VARIANCE))

    @classmethod
    def _decompose(cls, train_ND: Tensor) -> "PrincipalAxes":
        """All axes of these rows, from the smaller of the two product matrices, `D x D` or `N x N`."""
        # At least as many rows as features: D axes.
        count, width = train_ND.shape
        if count >= width:
            variance_R, axes_DR = torch.linalg.eigh(train_ND.T @ train_ND / count)
            return cls(axes_DR=axes_DR, variance_R=variance_R.clamp(min=0))

        # Fewer rows than features: the optimal weights lie in the span of the rows, so at most N axes are needed.
        variance_R, clips_NR = torch.linalg.eigh(train_ND @ train_ND.T / count)
        is_spanned = variance_R > 1e-6 * variance_R[-1]
        variance_R, clips_NR = variance_R[is_spanned], clips_NR[:, is_spanned]
        return cls(axes_DR=train_ND.T @ clips_NR * (variance_R * count).rsqrt(), variance_R=variance_R)
