"""The recipes of supervised training are those of their papers, where these give them."""

import numpy as np
import pytest
import torch

from ajepa.finetune.trainer import layerwise_adamw
from ajepa.model.classifier import CLASSIFIER_KINDS, build_classifier, spec_for_frames
from ajepa.recipes.catalogue import choose_finetune_recipe, finetune_recipe, override_recipe
from ajepa.recipes.finetune import finetune_with_counts
from ajepa.recipes.optimiser import one_cycle
from ajepa.recipes.supervised import SUPERVISED_RECIPES
from pipeline.errors import RunError


def test_cnn6_is_trained_as_panns():
    """Adam at 1e-3 from the first step to the last, 32 clips, balanced by class, all mixed, 2 x 64 and 2 x 8 masked."""
    recipe = finetune_recipe("cnn6")
    augment = recipe.augment
    assert {recipe.learning_rate(step) for step in (0, 1, 300_000, 599_999)} == {1e-3}
    assert (recipe.mel, recipe.clips_per_step, recipe.loss) == ("panns", 32, "bce")
    assert (recipe.sampling, recipe.weights) == ("balanced", "panns")
    assert (augment.time_mask_frames, augment.band_mask_bands, augment.masks_each) == (64, 8, 2)
    assert augment.mixup_share == 1
    assert (recipe.optimiser.beta1, recipe.optimiser.beta2, recipe.optimiser.weight_decay) == (0.9, 0.999, 0)


def test_convnext_is_trained_in_one_cycle():
    """75,000 steps on 224 bands; the rate rises for 30 % of them."""
    recipe = finetune_recipe("convnext")
    assert (recipe.steps, recipe.mel, recipe.model.bands, recipe.model.size) == (
        75_000,
        "convnext",
        224,
        "tiny",
    )
    rates = [recipe.learning_rate(step) for step in range(0, 75_000, 500)]
    assert np.argmax(rates) == 45
    assert rates[0] == pytest.approx(max(rates) / 25)


def test_passt_is_trained_with_structured_patchout():
    """AdamW at 2e-5 for 12 clips, decay 1e-4, 40 columns and 4 rows left out, 192/48 masked, mixtures of 0.3."""
    recipe = finetune_recipe("passt").with_step_count(100)
    assert max(recipe.learning_rate(step) for step in range(recipe.steps)) == pytest.approx(2e-5)
    assert (recipe.clips_per_step, recipe.optimiser.weight_decay) == (12, 1e-4)
    assert (recipe.model.drop_cols, recipe.model.drop_rows) == (40, 4)
    augment = recipe.augment
    assert (augment.time_mask_frames, augment.band_mask_bands, augment.mixup_alpha) == (192, 48, 0.3)


def test_one_cycle_is_torchs():
    """Step for step, except at the very end, which torch reaches a step earlier."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([weight], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=0.4, total_steps=1_001, pct_start=301 / 1_001
    )
    for step in range(1_000):
        rate = one_cycle(step, steps=1_000, warmup_steps=300, peak=0.4, end=0.4 / 25e4)
        assert rate == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-6)
        optimiser.step()
        torchs.step()
    with pytest.raises(ValueError, match="the warm-up must end before the run"):
        one_cycle(0, steps=5, warmup_steps=5, peak=1.0)


def test_each_model_has_a_recipe_of_its_name():
    """So that `--model cnn6` is enough."""
    for name in set(CLASSIFIER_KINDS) - {"vit"}:
        assert choose_finetune_recipe(name, None, "audioset-20k").name == name
    assert choose_finetune_recipe("cnn6", "cnn6-small", "own").name == "cnn6-small"
    with pytest.raises(RunError, match="recipe cnn6-small trains a cnn6, not a passt"):
        choose_finetune_recipe("passt", "cnn6-small", "own")


def test_steps_take_the_place_of_epochs_and_epochs_that_of_steps():
    """The count that was given last decides; the cycle keeps its shape."""
    recipe = finetune_recipe("cnn6-small")
    assert finetune_with_counts(recipe, steps=60).with_step_count(1_000).steps == 60
    assert finetune_with_counts(recipe, epochs=3).with_step_count(28).steps == 84
    assert finetune_with_counts(recipe, steps=60) == override_recipe(recipe, ["steps=60"])
    with pytest.raises(RunError, match="steps 60 and epochs 3 are two lengths of one run"):
        finetune_with_counts(recipe, steps=60, epochs=3)
    assert finetune_with_counts(recipe, steps=60).learning_rate(18) == pytest.approx(3e-3)


@pytest.mark.parametrize("name", sorted(SUPERVISED_RECIPES))
def test_all_layers_learn_at_one_rate(name):
    """Rates that fall with depth are for encoders that are pre-trained."""
    recipe = finetune_recipe(name)
    assert recipe.layer_decay == 1
    if name.endswith("small"):
        groups = layerwise_adamw(
            build_classifier(recipe.model, 5, 0).weights_by_depth(), recipe.optimiser, recipe.layer_decay
        ).param_groups
        assert {group["share"] for group in groups} == {1.0}


def test_clips_too_short_for_a_model_are_refused():
    """One line, with the size that the model needs."""
    assert spec_for_frames(finetune_recipe("passt").model, 500).cols == 49
    with pytest.raises(RunError, match=r"clips of 98 frames are too short for this model: .*40 columns"):
        spec_for_frames(finetune_recipe("passt").model, 98)


def test_a_field_of_a_model_can_be_set():
    """`--set` reaches the spec of every kind of classifier."""
    recipe = override_recipe(finetune_recipe("convnext"), ["model.size=atto", "model.drop_path=0"])
    assert (recipe.model.size, recipe.model.drop_path) == ("atto", 0)
