"""Schedules: learning rate, teacher momentum and curriculum depend on the step alone."""

import math

import pytest

from ajepa.model.masking import curriculum_share
from ajepa.recipes.optimiser import Schedule, ema_momentum, warmup_cosine

AUDIO_JEPA = {"steps": 100_000, "warmup_steps": 1_000, "start": 1e-6, "peak": 3e-4}


@pytest.mark.parametrize(
    ("step", "lr"),
    [(0, 1e-6), (500, 1.505e-4), (1_000, 3e-4), (50_500, 1.5e-4), (100_000, 0.0), (100_001, 0.0)],
)
def test_the_learning_rate_of_audio_jepa(step, lr):
    """Linear to the peak in 1,000 steps, half of it midway through the cosine, 0 at the last step and after."""
    assert warmup_cosine(step, **AUDIO_JEPA) == pytest.approx(lr, abs=1e-12)


def test_the_learning_rate_rises_once_and_falls_once():
    """There is no jump where warm-up meets cosine."""
    rates = [warmup_cosine(step, steps=200, warmup_steps=20, peak=1.0, end=0.1) for step in range(201)]
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert max(rates) == rates[20] == 1.0
    assert rates[200] == pytest.approx(0.1)


def test_a_run_without_warm_up_starts_at_the_peak():
    """Zero warm-up steps is a setting, not a division by zero."""
    assert warmup_cosine(0, steps=10, warmup_steps=0, peak=2.0) == 2.0


def test_a_warm_up_longer_than_the_run_is_refused():
    """It would never reach its peak, without a word."""
    with pytest.raises(ValueError, match="warm-up must end before the run: 10 of 10"):
        warmup_cosine(0, steps=10, warmup_steps=10, peak=1.0)


@pytest.mark.parametrize("steps", [30, 100_000])
def test_the_teacher_slows_to_a_halt_over_the_whole_run(steps):
    """.996 to 1 over all steps of this run: Audio-JEPA's code ties the horizon to another length."""
    assert ema_momentum(0, steps=steps) == 0.996
    assert ema_momentum(steps // 2, steps=steps) == pytest.approx(0.998)
    assert ema_momentum(steps, steps=steps) == 1.0


@pytest.mark.parametrize("steps", [40, 100_000])
def test_byols_momentum_rises_by_half_a_cosine(steps):
    """1 - (1 - .996) (cos(pi k / K) + 1) / 2 (arXiv 2006.07733): slow at both ends, half of the way in the middle."""
    momenta = [ema_momentum(step, steps=steps, curve="cosine") for step in (0, steps // 4, steps // 2, steps)]
    quarter = 1 - 0.004 * (math.cos(math.pi / 4) + 1) / 2
    assert momenta == pytest.approx([0.996, quarter, 0.998, 1.0], abs=1e-12)
    assert ema_momentum(steps // 4, steps=steps) > momenta[1]


def test_with_k_times_the_clips_the_momentum_is_to_the_power_of_k():
    """The scaling rule of arXiv 2307.13813: one step of 1,024 clips moves a teacher as four steps of 256 do."""
    schedule = Schedule(peak_lr=1e-3, ema_start=0.99, ema_end=0.99, ema_base_clips=256)
    one = schedule.teacher_momentum(5, 100, clips=256)
    assert one == 0.99
    assert schedule.teacher_momentum(5, 100, clips=1024) == pytest.approx(one**4)
    assert schedule.teacher_momentum(5, 100, clips=128) == pytest.approx(one**0.5)
    with pytest.raises(ValueError, match="give `clips`"):
        schedule.teacher_momentum(5, 100)
    assert Schedule(peak_lr=1e-3).teacher_momentum(0, 100, clips=1024) == 0.996


def test_a_curve_of_the_momentum_that_does_not_exist_is_refused():
    """A misspelt curve would be the other one."""
    with pytest.raises(ValueError, match="ema_curve must be linear or cosine, got 'cos'"):
        Schedule(peak_lr=1e-3, ema_curve="cos")


def test_the_curriculum_begins_at_one_in_a_hundred_and_ends_at_one():
    """f(0) = c0 and f(S) = 1, growing throughout."""
    shares = [curriculum_share(step, steps=500) for step in range(501)]
    assert shares[0] == pytest.approx(0.01)
    assert shares[-1] == 1.0
    assert shares == sorted(shares)
    assert curriculum_share(501, steps=500) == 1.0


def test_over_a_run_two_steps_in_three_are_the_later_masking():
    """The integral of f is 2/3 (1 - c0^3) / (1 - c0^2) = 0.667."""
    steps = 10_000
    mean = sum(curriculum_share(step, steps=steps) for step in range(steps)) / steps
    assert mean == pytest.approx(0.667, abs=5e-4)
