"""Which masking a step uses."""

import numpy as np
import pytest

from ajepa.curriculum import PLANS, Curriculum, Fixed, mask_plan
from ajepa.masking import RandomBlocks, RandomPatches, TimeFrequencyAware, TimeSpans
from pipeline.errors import RunError

A_JEPA = Curriculum(earlier=RandomBlocks(), later=TimeFrequencyAware(), steps=1_000)


def share_of_later(plan: Curriculum, step: int) -> float:
    rng = np.random.default_rng(step)
    return float(np.mean([plan.maker(step, rng) is plan.later for _ in range(4_000)]))


@pytest.mark.parametrize(("step", "share"), [(0, 0.01), (250, 0.5), (500, 0.707), (810, 0.9), (1_000, 1.0)])
def test_the_later_masking_is_drawn_as_often_as_the_paper_says(step, share):
    """Bernoulli(f(s)): 4,000 draws put the observed share within 2.5 points of f."""
    assert share_of_later(A_JEPA, step) == pytest.approx(share, abs=0.025)


def test_the_inverse_curriculum_is_the_same_with_the_two_exchanged():
    """The ablation differs in the order of difficulty and in nothing else."""
    inverse = mask_plan("inverse", 1_000)
    for step in range(0, 1_000, 50):
        forth, back = (plan.maker(step, np.random.default_rng(step)) for plan in (A_JEPA, inverse))
        assert {forth, back} == {A_JEPA.earlier, A_JEPA.later}


def test_the_same_generator_gives_the_same_masking():
    """A resumed run draws what the uninterrupted one would have drawn."""
    first, again = (
        [A_JEPA.maker(step, np.random.default_rng([7, step])) for step in range(200)] for _ in range(2)
    )
    assert first == again


def test_a_fixed_plan_leaves_the_generator_alone():
    """So its masks are those of the masking by itself."""
    rng = np.random.default_rng(0)
    assert Fixed(masking=RandomPatches()).maker(3, rng) == RandomPatches()
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 10, "first_share": 1.5}])
def test_a_curriculum_that_cannot_be_is_refused(wrong):
    """At its construction, not at its first step."""
    with pytest.raises(ValueError, match="a curriculum needs"):
        Curriculum(earlier=RandomBlocks(), later=TimeFrequencyAware(), **wrong)


def test_the_plans_of_the_ablation_have_names():
    """curriculum, inverse and the fixed ones, all for a run of any length."""
    assert mask_plan("curriculum", 1_000) == A_JEPA
    assert mask_plan("blocks", 5) == Fixed(masking=RandomBlocks())
    assert mask_plan("time-frequency", 5) == Fixed(masking=TimeFrequencyAware())
    assert mask_plan("patches", 5) == Fixed(masking=RandomPatches())
    assert mask_plan("spans", 5) == Fixed(masking=TimeSpans())
    assert {name for name in PLANS if isinstance(mask_plan(name, 7), Curriculum)} == {"curriculum", "inverse"}
    with pytest.raises(RunError, match="masks 'inverted' are unknown; did you mean 'inverse'"):
        mask_plan("inverted", 5)


def test_the_share_of_the_later_masking_begins_at_a_hundredth_and_averages_two_thirds():
    """f(0) = .01, f(S) = 1, and .667 of all steps: counted over a whole run, one draw a step."""
    assert share_of_later(A_JEPA, 0) == pytest.approx(0.01, abs=0.01)
    assert share_of_later(A_JEPA, 1_000) == 1.0
    plan = mask_plan("curriculum", 20_000)
    later = [plan.maker(step, np.random.default_rng([0, step])) is plan.later for step in range(20_000)]
    assert np.mean(later) == pytest.approx(0.667, abs=0.01)
