"""The published step makes the same updates as ours: otherwise the benchmark would compare two different steps."""

import numpy as np
import pytest
import torch
from tiny import tiny

from ajepa.model.masking import Fixed, RandomBlocks, RandomPatches
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.training.devices import pick_precision
from bench.step import draw_masks, noise_batch
from bench.step_baseline import PublishedStep, collate_masks

CPU = torch.device("cpu")


@pytest.mark.parametrize("fused", [False, True], ids=["written out", "PyTorch's attention"])
@pytest.mark.parametrize("masking", [RandomBlocks(), RandomPatches()], ids=["four groups", "one group"])
def test_the_published_step_learns_what_ours_learns(masking, fused):
    """Loss for loss over five updates: the same model, masks, optimiser and teacher."""
    recipe = tiny(masks=Fixed(masking=masking))
    ours = PretrainTrainer(recipe, CPU, precision=pick_precision("fp32", CPU))
    published = PublishedStep(recipe, ours.model, CPU, bf16=False, fused=fused)
    batch = noise_batch(recipe, CPU)
    our_losses, published_losses = [], []
    for step in range(10, 15):
        lr = recipe.schedule.learning_rate(step, recipe.steps)
        momentum = recipe.schedule.teacher_momentum(step, recipe.steps)
        masks = draw_masks(recipe, step)
        published_losses.append(published.step(batch.mel_BTF, masks, lr=lr, momentum=momentum))
        our_losses.append(float(ours.train_step(step, batch)["loss"]))
    assert our_losses[0] != pytest.approx(our_losses[-1], rel=1e-2)
    assert our_losses == pytest.approx(published_losses, rel=1e-4)


def test_collation_cuts_every_clip_to_the_shortest():
    """The published collation does so; our masks are equally long to begin with, so nothing is lost here."""
    masks = RandomBlocks().sample(np.random.default_rng(0), tiny().model.encoder.grid, batch=3)
    context_BK, groups = collate_masks(masks, CPU)
    assert np.array_equal(context_BK, masks.context_BK)
    assert np.array_equal(torch.stack(groups, dim=1), masks.targets_BGQ)
