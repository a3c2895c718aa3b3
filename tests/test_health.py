"""Signs of health: numbers that mean what their names say, on clips that a run never trains on."""

import numpy as np
import pytest
import torch
from tiny import tiny

from ajepa.health import HEALTH_CLIPS, HealthBatch, effective_rank, features_told, health, health_rows
from ajepa.jepa import Jepa
from ajepa.training_set import train_splits
from pipeline.loader import Batch

ALL_VALID = torch.ones(6, 5, dtype=torch.bool)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(clips: int = 6, valid: int = 64) -> HealthBatch:
    mel_BTF = noise(clips, 64, 128)
    mel_BTF[:, valid:] = 0.0
    made = Batch(
        mel_BTF=mel_BTF,
        n_frames_B=torch.full((clips,), valid),
        rows_B=np.arange(clips),
        labels_BC=None,
        weights_B=torch.ones(clips),
    )
    return HealthBatch.of(made, tiny())


@pytest.mark.parametrize("directions", [1, 3, 8])
@pytest.mark.parametrize("shape", [(64, 8), (8, 64)], ids=["tall", "wide"])
def test_the_rank_of_equally_strong_directions_is_their_number(directions, shape):
    """RankMe (arXiv 2210.02885): the entropy of equal shares; whichever Gram matrix is the smaller."""
    left = torch.linalg.qr(noise(shape[0], 8))[0][:, :directions]
    right = torch.linalg.qr(noise(shape[1], 8, seed=1))[0][:, :directions]
    assert effective_rank(5.0 * left @ right.T).item() == pytest.approx(directions, rel=1e-3)


def test_the_rank_is_that_of_the_singular_values():
    """By the paper's own formula, from torch's singular value decomposition."""
    x_ND = noise(50, 12) * torch.logspace(0, -4, 12)
    share_D = torch.linalg.svdvals(x_ND.double())
    share_D = share_D / share_D.sum() + 1e-7
    assert effective_rank(x_ND).item() == pytest.approx(
        (-(share_D * share_D.log()).sum()).exp().item(), rel=1e-6
    )


def test_features_that_are_all_alike_have_rank_1_and_no_dimension_that_lives():
    """Collapse as it is drawn in papers; what rounding leaves counts as nothing."""
    alike_BPD = noise(8).expand(6, 5, 8) + 1e-6 * noise(6, 5, 8, seed=1)
    told = features_told(alike_BPD, ALL_VALID)
    assert told["rank"].item() == pytest.approx(1, abs=1e-3)
    assert told["spread"].item() == pytest.approx(0, abs=1e-5)
    assert told["rank_clips"].item() == pytest.approx(1, abs=1e-3)
    assert told["dead"].item() == 1.0


def test_content_is_what_position_does_not_tell():
    """0 where every clip says the same of a position; all but the mean's share where positions say nothing."""
    position_PD = noise(5, 8)
    assert features_told(position_PD.expand(6, 5, 8), ALL_VALID)["content"].item() == pytest.approx(
        0, abs=1e-9
    )
    assert features_told(noise(6, 1, 8).expand(6, 5, 8), ALL_VALID)["content"].item() == pytest.approx(1)
    sound_BPD = noise(400, 5, 8, seed=2)
    mixed = features_told(sound_BPD + 3 * position_PD, torch.ones(400, 5, dtype=torch.bool))["content"].item()
    spread = 9 * (position_PD - position_PD.mean(0)).square().mean().item()
    assert mixed == pytest.approx(1 / (1 + spread), rel=0.1)


def test_spread_is_the_share_of_the_features_that_is_not_common_to_all():
    """1 about a mean of 0; a mean as large as the deviation makes it the root of a half."""
    noise_BPD = noise(400, 5, 8)
    valid_BP = torch.ones(400, 5, dtype=torch.bool)
    for mean, spread in ((0.0, 1.0), (1.0, 0.5**0.5), (3.0, 0.1**0.5)):
        assert features_told(noise_BPD + mean, valid_BP)["spread"].item() == pytest.approx(spread, rel=0.03)


def test_a_dimension_is_dead_if_it_hardly_deviates():
    """Constant is dead whatever its value; small is not dead if it is no smaller than a hundredth of the rest."""
    x_BPD = noise(6, 5, 8)
    x_BPD[..., 0], x_BPD[..., 1] = 7.0, 0.0
    x_BPD[..., 2] *= 0.1
    assert features_told(x_BPD, ALL_VALID)["dead"].item() == 2 / 8


def test_tokens_past_a_clips_end_do_not_count():
    """What comes out at padding means nothing, and must not make features look rich."""
    feature_BPD, valid_BP = (
        noise(6, 5, 8),
        torch.arange(5).expand(6, 5) < torch.tensor([[5], [4], [5], [2], [3], [5]]),
    )
    other_BPD = torch.where(valid_BP[..., None], feature_BPD, 1e3 * noise(6, 5, 8, seed=1))
    one, other = features_told(feature_BPD, valid_BP), features_told(other_BPD, valid_BP)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_looking_changes_nothing_and_says_the_same_twice():
    """Neither weights, nor mode, nor any generator: a run that is watched is the run that is not."""
    model, batch = Jepa(tiny().model), batch_of(valid=40)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    told = health(model, batch)
    assert told == health(model, batch)
    assert model.training
    assert model.encoder.training
    assert not model.target.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_told_of_the_step_is_what_the_model_says_of_these_clips():
    """The loss and its signs are `Jepa`'s own; teacher and student are one at the start, and part with it."""
    model, batch = Jepa(tiny().model), batch_of()
    told = health(model, batch)
    output = model.eval()(batch.mel_BTF, batch.context_BK, batch.targets_BGQ, batch.n_frames_B)
    for name in ("loss", "explained", "target_std", "prediction_std"):
        assert told[f"health_{name}"] == pytest.approx(getattr(output, name).item())
    assert told["health_teacher_cosine"] == pytest.approx(1)
    with torch.no_grad():
        model.encoder.embed.weight.mul_(-1)
    assert health(model, batch)["health_teacher_cosine"] < 0.9


def test_the_masks_are_of_the_kind_that_the_run_ends_with():
    """One plan for the whole curve; a curriculum's first masks would say nothing of its last."""
    assert batch_of().targets_BGQ.shape[1] == 1  # random patches, one group: tiny's curriculum ends so
    assert torch.equal(batch_of().context_BK, batch_of().context_BK)


def test_clips_are_held_out_where_there_are_any(store):
    """Measured on what is trained on, memory would pass for understanding."""
    eval_N = store.good_rows(["eval"])
    assert np.array_equal(health_rows(store, 0), eval_N)
    assert len(eval_N) < HEALTH_CLIPS


class TrainOnly:
    """A store of a hundred clips without a split to measure on."""

    def __init__(self, manifest) -> None:
        self.manifest = manifest

    def good_rows(self, splits):
        assert splits == train_splits(self)
        return np.arange(100)


def test_without_held_out_clips_a_fixed_batch_of_the_others_is_taken(store):
    """Ascending, no row twice, the same for a seed."""
    only = TrainOnly(store.manifest.filter(store.manifest["split"] != "eval"))
    rows_N = health_rows(only, 0)
    assert len(set(rows_N.tolist())) == HEALTH_CLIPS
    assert (np.diff(rows_N) > 0).all()
    assert np.array_equal(rows_N, health_rows(only, 0))
    assert not np.array_equal(rows_N, health_rows(only, 1))
