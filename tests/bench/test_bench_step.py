"""The benchmark's other side does the same sum: else its ratio would compare two different steps."""

import numpy as np
import pytest
import torch
from tiny import tiny

from ajepa.model.masking import Fixed, RandomBlocks, RandomPatches
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.training.devices import pick_precision
from bench.step import masks_of, noise
from bench.step_baseline import PublishedStep, collated

CPU = torch.device("cpu")


@pytest.mark.parametrize("fused", [False, True], ids=["written out", "PyTorch's attention"])
@pytest.mark.parametrize("masking", [RandomBlocks(), RandomPatches()], ids=["four groups", "one group"])
def test_the_published_step_learns_what_ours_learns(masking, fused):
    """Loss for loss over five updates: one model, one set of masks, one optimiser, one teacher."""
    recipe = tiny(masks=Fixed(masking=masking))
    ours = PretrainTrainer(recipe, CPU, precision=pick_precision("fp32", CPU))
    plain = PublishedStep(recipe, ours.model, CPU, bf16=False, fused=fused)
    batch, losses = noise(recipe, CPU), []
    for step in range(10, 15):
        lr, momentum = (
            recipe.schedule.learning_rate(step, recipe.steps),
            recipe.schedule.teacher_momentum(step, recipe.steps),
        )
        told = plain.step(batch.mel_BTF, masks_of(recipe, step), lr=lr, momentum=momentum)
        losses.append((float(ours.train_step(step, batch)["loss"]), told))
    assert losses[0][0] != pytest.approx(losses[-1][0], rel=1e-2)
    for mine, theirs in losses:
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_collation_cuts_every_clip_to_the_shortest():
    """As the published collation does; ours are equally long to begin with, so nothing is lost here."""
    masks = RandomBlocks().sample(np.random.default_rng(0), tiny().model.encoder.grid, batch=3)
    context_BK, groups = collated(masks, CPU)
    assert np.array_equal(context_BK, masks.context_BK)
    assert np.array_equal(torch.stack(groups, dim=1), masks.targets_BGQ)
