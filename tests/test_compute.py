"""What a run has cost: operations as torch counts them, and counts that survive a kill."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny
from torch.utils.flop_counter import FlopCounterMode

from ajepa.attention import written_out_attention
from ajepa.compute import StepShape, step_flop
from ajepa.curriculum import Fixed
from ajepa.jepa import Jepa
from ajepa.masking import RandomBlocks, RandomPatches
from ajepa.recipes import Pretrain

CLIPS = 6


def counted(recipe: Pretrain, monkeypatch, *, recompute: bool) -> tuple[int, StepShape]:
    """What torch counts in a step's forward and backward pass, and the step's shape.

    Attention is written out, for torch counts nothing in its fused kernel on CPUs; the signs of health are left
    out, which are products with a vector.
    """
    monkeypatch.setattr("ajepa.attention.attention_for", lambda device, dtype: written_out_attention)
    monkeypatch.setattr("ajepa.jepa._variance_D", lambda x, share: (x.flatten(0, -2) - 1).square().mean(0))
    model, grid = Jepa(recipe.model), recipe.model.encoder.grid
    if recompute:
        model.recompute()
    rng = np.random.default_rng(3)
    masks = recipe.masks.maker(0, rng).sample(rng, grid, batch=CLIPS * recipe.mask_sets)
    mel_BTF = torch.randn(CLIPS, grid.frames, grid.bands)
    context_BK, targets_BGQ = torch.from_numpy(masks.context_BK), torch.from_numpy(masks.targets_BGQ)
    with FlopCounterMode(display=False) as counter:
        model(mel_BTF, context_BK, targets_BGQ, torch.full((CLIPS,), grid.frames), rng).loss.backward()
    _, groups, queries = targets_BGQ.shape
    shape = StepShape(clips=CLIPS, context=context_BK.shape[1], groups=groups, queries=queries)
    return counter.get_total_flops(), shape


def options(**changes) -> Pretrain:
    """The tiny recipe, its model changed, of depth 2."""
    model = tiny().model
    encoder = replace(model.encoder, depth=2, **changes.pop("encoder", {}))
    return tiny(model=replace(model, encoder=encoder, **changes))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "recipe",
    [
        options(),
        options(targets="cosines"),
        options(target_layers=2),
        options(clip_weight=0.5),
        options(encoder={"positions": "rope"}),
        options(encoder={"layer_scale": 0.1}),
        options(encoder={"drop_path": 0.1}),
        replace(options(), mask_sets=3),
        replace(options(), masks=Fixed(masking=RandomPatches())),
        replace(options(), masks=Fixed(masking=RandomBlocks())),
    ],
    ids=["plain", "cosines", "layers", "clip", "rope", "scale", "drop", "sets", "patches", "blocks"],
)
def test_the_formula_counts_what_torch_counts(recipe, recompute, monkeypatch):
    """To the last operation, whatever the options: a cost that is off by a third compares nothing."""
    seen, shape = counted(recipe, monkeypatch, recompute=recompute)
    assert step_flop(recipe, shape, recompute=recompute) == seen
