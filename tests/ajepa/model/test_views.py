"""Views: each change does what it says, the clean crop stays clean, and draws are those of seed and step."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ajepa.model.views import InputScale, ViewDraws, Views, draw_views, make_views
from pipeline.loading.augment import NATS_PER_DB

OFF = Views(
    crops=2, stretch=0, shift_bands=0, mix_share=0, gain_db=0, curve_db=0, low_pass_share=0, noise_share=0
)

EVERY_CHANGE = Views(shift_bands=4)

SCALE = InputScale(mean=-6.0, std=4.0)

FRAMES = 32

CLIPS = 6


def source(views: Views, seed: int = 0) -> torch.Tensor:
    """Return normalised crops, all above the floor."""
    shape = (CLIPS * views.crops, views.source_frames(FRAMES), 16)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def made(views: Views, source_VTF: torch.Tensor, n_frames_V: torch.Tensor | None = None, step: int = 0):
    """Return the draws of a step, and the views that they make."""
    draws = draw_views(views, 0, step, clips=CLIPS, bands=16)
    if n_frames_V is None:
        n_frames_V = torch.full((len(source_VTF),), source_VTF.shape[1])
    return draws, make_views(source_VTF, n_frames_V, draws, frames=FRAMES, crops=views.crops, scale=SCALE)


def test_without_any_change_a_view_is_its_crop():
    source_VTF = source(OFF)
    _, views = made(OFF, source_VTF)
    assert torch.equal(views.mel_VTF, source_VTF)
    assert torch.equal(views.clean_BTF, source_VTF[::2])
    assert views.n_frames_V.tolist() == [FRAMES] * 12
    assert views.n_frames_B.tolist() == [FRAMES] * 6


def test_stretching_takes_frames_at_another_speed_and_shortens_the_valid_part():
    """Frame t of a view is frame t times speed of its source; the clean crop has the same speed."""
    stretched = replace(OFF, stretch=0.3)
    source_VTF = source(stretched)
    frames = source_VTF.shape[1]
    n_frames_V = torch.tensor([frames, 20] * 6)
    draws, views = made(stretched, source_VTF, n_frames_V)
    assert draws.speed_V.min() < 0.95
    assert draws.speed_V.max() > 1.05
    for view, speed in enumerate(draws.speed_V):
        at_T = [min(int(t * speed), int(n_frames_V[view]) - 1) for t in range(FRAMES)]
        assert torch.equal(views.mel_VTF[view], source_VTF[view][at_T])
        assert views.n_frames_V[view] == sum(int(t * speed) < n_frames_V[view] for t in range(FRAMES))
    assert torch.equal(views.clean_BTF, views.mel_VTF[::2])
    assert frames == int((FRAMES - 1) * math.exp(0.3)) + 1


def test_shifting_moves_the_bands_and_repeats_the_outermost():
    shifted = replace(OFF, shift_bands=3)
    source_VTF = source(shifted)
    draws, views = made(shifted, source_VTF)
    assert set(draws.shift_V) <= set(range(-3, 4))
    assert len(set(draws.shift_V)) > 3
    for view, shift in enumerate(draws.shift_V):
        bands = np.clip(np.arange(16) + shift, 0, 15)
        assert torch.equal(views.mel_VTF[view], source_VTF[view][:, bands])


def test_mixing_adds_the_partners_same_crop_so_many_decibels_weaker():
    """The larger of the two powers, against the logarithm of their sum: never more than 3 dB apart."""
    mixed = replace(OFF, mix_share=0.5)
    source_VTF = source(mixed)
    draws, views = made(mixed, source_VTF)
    is_mixed_V = np.isfinite(draws.mix_V)
    assert 2 < is_mixed_V.sum() < 10
    decibels_V = draws.mix_V[is_mixed_V] / NATS_PER_DB
    assert decibels_V.min() >= 3 - 1e-4
    assert decibels_V.max() <= 20 + 1e-4
    for view in range(12):
        clip, crop = divmod(view, 2)
        partner_TF = source_VTF[2 * (clip ^ 1) + crop]
        if not is_mixed_V[view]:
            assert torch.equal(views.mel_VTF[view], source_VTF[view])
            continue
        own_TF = SCALE.mean + SCALE.std * source_VTF[view]
        other_TF = SCALE.mean + SCALE.std * partner_TF - float(draws.mix_V[view])
        sum_TF = torch.logaddexp(own_TF, other_TF)
        difference_TF = sum_TF - (SCALE.mean + SCALE.std * views.mel_VTF[view])
        assert difference_TF.min() > -1e-4
        assert difference_TF.max() < 3.02 * NATS_PER_DB
    assert torch.equal(views.clean_BTF, source_VTF[::2])


def test_gain_is_one_number_of_decibels_for_a_whole_view():
    louder = replace(OFF, gain_db=6)
    source_VTF = source(louder)
    draws, views = made(louder, source_VTF)
    gain_V = (views.mel_VTF - source_VTF).flatten(1) * SCALE.std / NATS_PER_DB
    assert gain_V.std(1).max() < 1e-4
    assert gain_V.abs().max() < 6
    assert gain_V.mean(1).std() > 1
    np.testing.assert_allclose(gain_V.mean(1), draws.colour_VF[:, 0] / NATS_PER_DB, atol=1e-4)
    assert torch.equal(views.clean_BTF, source_VTF[::2])


def test_a_curve_is_smooth_over_the_bands_and_as_strong_as_it_says():
    """Over many draws, the variance of the five cosines: half of 4 (1 + 1/2 + ... + 1/5)."""
    draws = draw_views(replace(OFF, curve_db=2), 0, 0, clips=2_000, bands=64)
    curve_VF = draws.colour_VF / NATS_PER_DB
    variance = 4 * sum(1 / k for k in range(1, 6)) / 2
    assert curve_VF.var() == pytest.approx(variance, rel=0.05)
    assert np.abs(np.diff(curve_VF, axis=1)).mean() < 0.2 * curve_VF.std()


def test_a_low_pass_silences_the_bands_above_a_cut_in_the_upper_half():
    filtered = replace(OFF, low_pass_share=0.5)
    draws, views = made(filtered, source(filtered))
    floor = (SCALE.floor - SCALE.mean) / SCALE.std
    silent_VF = (views.mel_VTF == floor).all(1)
    assert torch.equal(silent_VF, torch.from_numpy(draws.colour_VF < -10))
    assert not silent_VF[:, :8].any()
    assert 2 <= silent_VF[:, 15].sum() < 12
    for silent_F in silent_VF:
        assert torch.equal(silent_F, silent_F.sort()[0])


def test_a_noise_floor_lies_at_most_so_far_above_the_lowest_value():
    noisy = replace(OFF, noise_share=0.5, noise_db=30)
    quiet_VTF = torch.full_like(source(noisy), (SCALE.floor - SCALE.mean) / SCALE.std)
    draws, views = made(noisy, quiet_VTF)
    raised_V = (views.mel_VTF - quiet_VTF).amax((1, 2)) * SCALE.std / NATS_PER_DB
    assert 2 < (raised_V > 0.1).sum() < 12
    assert raised_V.max() < 30
    np.testing.assert_allclose(raised_V, draws.noise_V / NATS_PER_DB, atol=1e-3)
    assert torch.equal(views.clean_BTF, quiet_VTF[::2])


def test_draws_depend_on_seed_and_step_alone_and_are_cut_by_views():
    whole = draw_views(EVERY_CHANGE, 3, 7, clips=CLIPS, bands=16)
    again, other_step, other_seed = (
        draw_views(EVERY_CHANGE, seed, step, clips=CLIPS, bands=16) for seed, step in ((3, 7), (3, 8), (4, 7))
    )
    part = whole.select_views(slice(4, 8))
    for name in ViewDraws.__slots__:
        np.testing.assert_array_equal(getattr(whole, name), getattr(again, name))
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[4:8])
        assert not np.array_equal(getattr(whole, name), getattr(other_step, name))
        assert not np.array_equal(getattr(whole, name), getattr(other_seed, name))


def test_half_of_the_clips_make_the_views_that_they_make_among_all():
    """A rank has its own clips alone: partners are neighbours."""
    source_VTF = source(EVERY_CHANGE)
    n_frames_V = torch.full((12,), source_VTF.shape[1])
    draws, whole = made(EVERY_CHANGE, source_VTF)
    half = make_views(
        source_VTF[8:],
        n_frames_V[8:],
        draws.select_views(slice(8, 12)),
        frames=FRAMES,
        crops=2,
        scale=SCALE,
    )
    assert torch.equal(half.mel_VTF, whole.mel_VTF[8:])
    assert torch.equal(half.clean_BTF, whole.clean_BTF[4:])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crops": 0}, "crops must be 1 or more"),
        ({"gain_db": -1.0}, "finite and 0 or more"),
        ({"stretch": math.inf}, "finite and 0 or more"),
        ({"mix_share": 1.5}, "shares up to 1"),
        ({"mix_high_db": 30.0}, "mix_high_db <= mix_low_db"),
    ],
)
def test_impossible_views_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(OFF, **wrong)
