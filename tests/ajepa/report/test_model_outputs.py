"""The distance between prediction and target: every patch once, as the loss would see it, silence left out."""

import numpy as np
import torch
from tiny import tiny

from ajepa.model.jepa import Jepa
from ajepa.report.model_outputs import prediction_distance_BP

MODEL = Jepa(tiny().model, seed=3).eval()

GRID = MODEL.spec.encoder.grid

MEL_BTF = torch.from_numpy(np.random.default_rng(0).normal(size=(3, GRID.frames, GRID.bands))).float()

FULL_B = torch.full((3,), GRID.frames)


def test_the_mean_over_a_fold_is_what_the_model_reports_of_the_same_masks():
    """The picture and the logged cosine must be the same quantity."""
    distance_BP = prediction_distance_BP(MODEL, MEL_BTF, FULL_B, hiding_rounds=2, seed=5)
    order_P = np.random.default_rng([5, GRID.tokens]).permutation(GRID.tokens)
    for hidden_Q in np.array_split(order_P, 2):
        hidden_Q = np.sort(hidden_Q)
        context_K = np.setdiff1d(order_P, hidden_Q)
        context_BK, targets_BQ = (
            torch.from_numpy(np.tile(tokens, (3, 1))) for tokens in (context_K, hidden_Q)
        )
        report = MODEL(MEL_BTF, context_BK, targets_BQ[:, None], FULL_B)
        assert torch.allclose(1 - distance_BP[:, hidden_Q].mean(), report.cosine, atol=1e-5)


def test_every_patch_of_sound_has_a_distance_and_no_other_one_has():
    """Padding is not audio: it is neither predicted nor shown."""
    half_B = torch.tensor([GRID.frames, GRID.frames // 2, GRID.patch_frames])
    distance_BRC = prediction_distance_BP(MODEL, MEL_BTF, half_B).reshape(3, GRID.cols, GRID.rows)
    known_BRC = torch.isfinite(distance_BRC)
    assert known_BRC[0].all()
    assert known_BRC[1, : GRID.cols // 2].all()
    assert not known_BRC[1, GRID.cols // 2 :].any()
    assert known_BRC[2].sum() == GRID.rows
    assert (distance_BRC[known_BRC] >= 0).all()
    assert (distance_BRC[known_BRC] <= 2).all()


def test_the_prediction_of_a_patch_does_not_depend_on_the_patch():
    """A hidden patch that the predictor saw would make every prediction right."""
    other_BTF = MEL_BTF.clone()
    other_BTF[:, : GRID.patch_frames, : GRID.patch_bands] += 5.0  # the first token
    distance_BP = distances_to_fixed_targets(MEL_BTF)
    other_distance_BP = distances_to_fixed_targets(other_BTF)
    assert torch.equal(distance_BP[:, 0], other_distance_BP[:, 0])
    assert not torch.equal(distance_BP[:, 1:], other_distance_BP[:, 1:])


def distances_to_fixed_targets(mel_BTF: torch.Tensor) -> torch.Tensor:
    """The distances of predictions by a model whose targets do not depend on the sound."""
    model = Jepa(tiny().model, seed=3).eval()
    with torch.no_grad():
        target_PD = torch.linspace(-1, 1, GRID.tokens * model.spec.encoder.width).view(GRID.tokens, -1).sin()
    model.target_features = lambda mel_BTF, valid_BP=None: target_PD.expand(len(mel_BTF), -1, -1)
    return prediction_distance_BP(model, mel_BTF, FULL_B)
