"""What the predictor believes: every patch once, as the loss would see it, silence left out."""

import numpy as np
import torch
from tiny import tiny

from ajepa.model.jepa import Jepa
from ajepa.report.page import prediction_distance_BP

MODEL = Jepa(tiny().model, seed=3).eval()

GRID = MODEL.spec.encoder.grid

MEL_BTF = torch.from_numpy(np.random.default_rng(0).normal(size=(3, GRID.frames, GRID.bands))).float()

FULL_B = torch.full((3,), GRID.frames)


def test_the_mean_over_a_fold_is_what_the_model_reports_of_the_same_masks():
    """The picture and the logged cosine must be the same quantity."""
    apart_BP = prediction_distance_BP(MODEL, MEL_BTF, FULL_B, hiding_rounds=2, seed=5)
    order_P = np.random.default_rng([5, GRID.tokens]).permutation(GRID.tokens)
    for hidden_Q in np.array_split(order_P, 2):
        hidden_Q, seen_K = np.sort(hidden_Q), np.setdiff1d(order_P, hidden_Q)
        context_BK, targets_BGQ = (torch.from_numpy(np.tile(t, (3, 1))) for t in (seen_K, hidden_Q))
        told = MODEL(MEL_BTF, context_BK, targets_BGQ[:, None], FULL_B)
        assert torch.allclose(1 - apart_BP[:, hidden_Q].mean(), told.cosine, atol=1e-5)


def test_every_patch_of_sound_has_a_distance_and_no_other_one_has():
    """Padding is not audio: it is neither predicted nor shown."""
    half_B = torch.tensor([GRID.frames, GRID.frames // 2, GRID.patch_frames])
    apart_BC = prediction_distance_BP(MODEL, MEL_BTF, half_B).reshape(3, GRID.cols, GRID.rows)
    known_BC = torch.isfinite(apart_BC)
    assert known_BC[0].all()
    assert known_BC[1, : GRID.cols // 2].all()
    assert not known_BC[1, GRID.cols // 2 :].any()
    assert known_BC[2].sum() == GRID.rows
    assert (apart_BC[known_BC] >= 0).all()
    assert (apart_BC[known_BC] <= 2).all()


def test_what_a_patch_holds_is_not_what_its_prediction_is_made_of():
    """A hidden patch that were seen would make every belief come true."""
    other_BTF = MEL_BTF.clone()
    other_BTF[:, : GRID.patch_frames, : GRID.patch_bands] += 5.0  # the first token
    one = guesses(MEL_BTF)
    two = guesses(other_BTF)
    assert torch.equal(one[:, 0], two[:, 0])
    assert not torch.equal(one[:, 1:], two[:, 1:])


def guesses(mel_BTF: torch.Tensor) -> torch.Tensor:
    """What is predicted, by a model whose targets do not depend on the sound."""
    model = Jepa(tiny().model, seed=3).eval()
    with torch.no_grad():
        target_PD = torch.linspace(-1, 1, GRID.tokens * model.spec.encoder.width).view(GRID.tokens, -1).sin()
    model.target_features = lambda mel_BTF, valid_BP=None: target_PD.expand(len(mel_BTF), -1, -1)
    return prediction_distance_BP(model, mel_BTF, FULL_B)
