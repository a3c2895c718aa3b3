"""The objective on whole views: its statistic, its gradient, and that it does what it is for."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from ajepa.model.sigreg import ClipObjective, Projector, clip_loss, draw_directions, normality_distance

OBJECTIVE = ClipObjective(hidden=32, width=8, directions=64)

DIRECTIONS = draw_directions(OBJECTIVE, 0, 0)


def normal(rows: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def loss_of(mean_ND: torch.Tensor, views: int = 4, sound_N: torch.Tensor | None = None, projector=None):
    """Return the loss of the vectors themselves, or of what a projector makes of them."""
    if sound_N is None:
        sound_N = torch.ones(len(mean_ND), dtype=torch.bool)
    projector = projector or (lambda x_ND: x_ND)
    return clip_loss(projector, mean_ND, sound_N, DIRECTIONS, views=views, sigreg_share=0.02)


def test_the_statistic_is_the_integral_that_its_paper_states():
    """Epps and Pulley's, by adaptive quadrature over the same range, for each direction."""
    z_NP = 0.5 + 1.5 * normal(50)

    def integrand(t: float, projected_N: np.ndarray) -> float:
        empirical = np.exp(1j * t * projected_N).mean()
        return abs(empirical - math.exp(-(t**2) / 2)) ** 2 * math.exp(-(t**2) / 2)

    by_quadrature = [
        quad(integrand, -3, 3, args=(projected_N,))[0]
        for projected_N in (z_NP.double() @ DIRECTIONS.double()).T.numpy()
    ]
    assert normality_distance(z_NP, DIRECTIONS).item() == pytest.approx(np.mean(by_quadrature), rel=2e-3)


def test_of_all_distributions_the_standard_normal_is_the_least():
    """Collapsed, wider, shifted, two-valued and one-dimensional vectors are all further from it."""
    z_NP = normal(4_000)
    least = normality_distance(z_NP, DIRECTIONS)
    assert least < 1e-3
    others = {
        "collapsed": torch.zeros_like(z_NP),
        "wide": 2 * z_NP,
        "shifted": z_NP + 0.5,
        "signs": z_NP.sign(),
        "one dimension": z_NP[:, :1].expand(-1, 8),
    }
    for name, other_NP in others.items():
        assert normality_distance(other_NP, DIRECTIONS) > 3 * least, name


def test_agreement_is_the_squared_distance_from_the_mean_of_the_clip():
    """By hand, for three clips of four views, one of which has no sound."""
    z_NP = normal(12)
    sound_N = torch.ones(12, dtype=torch.bool)
    sound_N[6] = False
    output = loss_of(z_NP, sound_N=sound_N)
    by_hand = []
    for clip in range(3):
        views_NP = z_NP[4 * clip : 4 * clip + 4][sound_N[4 * clip : 4 * clip + 4]]
        by_hand.append((views_NP - views_NP.mean(0)).square())
    agreement = torch.cat(by_hand).mean()
    normality = normality_distance(z_NP[sound_N], DIRECTIONS)
    torch.testing.assert_close(output.loss, 0.98 * agreement + 0.02 * 256 * normality)
    torch.testing.assert_close(output.normality, normality)


def test_disagreement_is_nothing_for_equal_views_and_near_one_for_unrelated_ones():
    """With four views of a clip, unrelated ones lie at three quarters of the variance from their mean."""
    equal_NP = normal(256).repeat_interleave(4, dim=0)
    assert loss_of(equal_NP).disagreement < 1e-6
    assert loss_of(normal(1_024)).disagreement == pytest.approx(0.75, abs=0.03)


def test_views_without_sound_get_no_gradient_and_change_nothing():
    """Their mean context token is a vector of zeros that says nothing."""
    mean_ND = normal(16, 24)
    sound_N = torch.ones(16, dtype=torch.bool)
    sound_N[[3, 8]] = False
    outcomes = []
    for filler in (0.0, 50.0):
        filled_ND = torch.where(sound_N[:, None], mean_ND, filler).requires_grad_()
        output = loss_of(filled_ND, sound_N=sound_N, projector=Projector(24, OBJECTIVE, seed=1))
        output.loss.backward()
        outcomes.append((output.loss, filled_ND.grad))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    assert not outcomes[0][1][~sound_N].any()
    assert outcomes[0][1][sound_N].abs().sum(1).min() > 0


def test_it_spreads_collapsed_vectors_and_gathers_views():
    """A linear encoder of noisy views: from nearly one point to a normal cloud in which views of a clip are close."""
    torch.manual_seed(0)
    clip_BD = torch.randn(64, 16)
    view_ND = clip_BD.repeat_interleave(4, dim=0) + 0.3 * torch.randn(256, 16)
    encoder = torch.nn.Linear(16, 24)
    torch.nn.init.normal_(encoder.weight, std=1e-3)
    projector = Projector(24, OBJECTIVE, seed=1)
    optimiser = torch.optim.Adam([*encoder.parameters(), *projector.parameters()], lr=3e-3)
    outputs = []
    for _ in range(300):
        optimiser.zero_grad()
        outputs.append(loss_of(encoder(view_ND), projector=projector))
        outputs[-1].loss.backward()
        optimiser.step()
    first, last = outputs[0], outputs[-1]
    assert last.normality < 0.2 * first.normality
    assert last.disagreement < 0.3
    assert 0.7 < last.z_std < 1.3


def test_directions_are_unit_vectors_that_depend_on_seed_and_step_alone():
    """New ones each step, the same ones on resume."""
    torch.testing.assert_close(DIRECTIONS.norm(dim=0), torch.ones(64))
    assert torch.equal(DIRECTIONS, draw_directions(OBJECTIVE, 0, 0))
    assert not torch.equal(DIRECTIONS, draw_directions(OBJECTIVE, 0, 1))
    assert not torch.equal(DIRECTIONS, draw_directions(OBJECTIVE, 1, 0))


def test_the_projector_standardises_over_the_batch_and_is_a_function_of_its_seed():
    """A common scale and shift of all vectors changes nothing."""
    projector = Projector(24, OBJECTIVE, seed=1)
    mean_ND = normal(64, 24)
    torch.testing.assert_close(projector(5 * mean_ND + 3), projector(mean_ND), atol=1e-4, rtol=1e-3)
    same, other = (Projector(24, OBJECTIVE, seed=seed).state_dict() for seed in (1, 2))
    for name, weight in projector.state_dict().items():
        assert torch.equal(weight, same[name])
    assert not torch.equal(same["out.weight"], other["out.weight"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": 0.0}, "a weight above 0"),
        ({"sigreg_share": 1.0}, "a share in"),
        ({"hidden": 0}, "at least 1"),
    ],
)
def test_an_impossible_objective_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(OBJECTIVE, **wrong)
