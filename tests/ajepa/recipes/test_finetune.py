"""Fine-tuning recipes: the papers' table, values that survive JSON, rates of the clips in a step."""

import json
from dataclasses import replace

import pytest

from ajepa.recipes.catalogue import (
    FINETUNE_RECIPES,
    choose_finetune_recipe,
    finetune_recipe,
    override_recipe,
    recipe_from_json,
    recipe_to_json,
)
from ajepa.recipes.finetune import finetune_with_counts
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.errors import RunError

NAMES = sorted(FINETUNE_RECIPES)

# A-JEPA's table: base rate, warm-up and epochs, batch, masks in time and frequency, mixup, loss, frames.
TABLE = {
    "audioset-2m": (2e-4, 20, 100, 512, 192, 48, 0.5, "bce", 1024),
    "audioset-20k": (1e-3, 4, 60, 32, 192, 48, 0.5, "bce", 1024),
    "esc50": (1e-3, 4, 60, 64, 96, 24, 0.0, "ce", 512),
    "speech-commands-v2": (1e-3, 4, 60, 256, 48, 48, 0.5, "bce", 128),
    "speech-commands-v1": (1e-3, 1, 10, 256, 48, 48, 0.5, "bce", 128),
    "voxceleb1-sid": (1e-3, 4, 60, 64, 192, 48, 0.0, "ce", 1024),
}


@pytest.mark.parametrize("name", sorted(TABLE))
def test_the_papers_recipes_are_those_of_its_table(name):
    """With drop path 0.1, AdamW .9/.95 with decay 1e-4, a tenth of the tokens masked, all of them."""
    recipe = finetune_recipe(name)
    augment = recipe.augment
    row = (
        recipe.base_lr,
        recipe.warmup_epochs,
        recipe.epochs,
        recipe.clips_per_step,
        augment.time_mask_frames,
    )
    row += (augment.band_mask_bands, augment.mixup_share, recipe.loss, recipe.model.frames)
    assert row == TABLE[name]
    optimiser = recipe.optimiser
    assert (optimiser.beta1, optimiser.beta2, optimiser.weight_decay) == (0.9, 0.95, 1e-4)
    assert (recipe.model.encoder.drop_path, recipe.model.masking.share, recipe.end_lr) == (0.1, 0.1, 1e-6)
    assert (recipe.sampling, recipe.clips_per_epoch) == {
        "audioset-2m": ("balanced-once", 200_000),
        "speech-commands-v1": ("repeated", 0),
    }.get(name, ("shuffle", 0))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_comes_back_from_json_and_its_docstring_has_its_cost(name):
    """A run folder must rebuild the very model, years later; whoever starts a run wants to know how long it takes."""
    recipe = finetune_recipe(name)
    assert recipe.name == name
    assert recipe_from_json(json.loads(json.dumps(recipe_to_json(recipe)))) == recipe
    assert recipe.model.bands == preset_mel_spec(recipe.mel).mel_bands
    assert "Cost" in FINETUNE_RECIPES[name].__doc__
    assert "Expected" in FINETUNE_RECIPES[name].__doc__


def test_the_rate_grows_with_the_clips_of_a_step_and_ends_at_its_floor():
    """1e-3 for 256 clips is 1.25e-4 for 32; half a cosine down to 1e-6 after the warm-up."""
    recipe = finetune_recipe("audioset-20k").with_step_count(100)
    assert recipe.steps == 6_000
    rates = [recipe.learning_rate(step) for step in (0, 200, 400, 3_200, 6_000)]
    assert rates == pytest.approx([0.0, 6.25e-5, 1.25e-4, (1.25e-4 + 1e-6) / 2, 1e-6])
    assert finetune_with_counts(recipe, clips_per_step=64).learning_rate(400) == pytest.approx(2.5e-4)


def test_other_epochs_keep_the_share_of_the_warm_up():
    """A fifth of ten epochs is two, and the steps follow the epochs."""
    recipe = finetune_with_counts(finetune_recipe("audioset-2m"), epochs=10, seed=3)
    assert (recipe.epochs, recipe.warmup_epochs, recipe.seed) == (10, 2, 3)
    assert recipe.with_step_count(7).steps == 70


def test_measurements_are_spread_over_the_run_and_the_last_is_its_end():
    """Three of thirty steps at 10, 20, 30; also where the steps cannot be divided evenly."""
    recipe = replace(finetune_recipe("own-small"), epochs=6, warmup_epochs=1, evaluations=3).with_step_count(
        5
    )
    assert recipe.steps == 30
    assert [done for done in range(1, 31) if recipe.is_evaluation_step(done)] == [10, 20, 30]
    uneven = replace(recipe, evaluations=4)
    assert [done for done in range(1, 31) if uneven.is_evaluation_step(done)] == [8, 15, 23, 30]


def test_settings_reach_every_piece_and_true_and_false_are_words():
    """`bool("false")` is true: words are read as words."""
    settings = ["augment.roll=false", "model.masking.reading=tokens", "model.encoder.drop_path=0", "loss=ce"]
    recipe = override_recipe(finetune_recipe("audioset-20k"), settings)
    assert recipe.augment.roll is False
    assert recipe.model.masking.reading == "tokens"
    assert recipe.model.encoder.drop_path == 0
    assert recipe.loss == "ce"
    with pytest.raises(RunError, match="roll=no: expected true or false"):
        override_recipe(recipe, ["augment.roll=no"])
    with pytest.raises(RunError, match="a recipe has no field 'masks'"):
        override_recipe(recipe, ["masks=inverse"])


@pytest.mark.parametrize(
    "setting", ["warmup_epochs=60", "layer_decay=0", "ema=1", "epochs=0", "model.masking.share=1"]
)
def test_a_setting_that_cannot_be_is_refused(setting):
    """The constructors check the recipe, and the message begins with the setting."""
    with pytest.raises(RunError, match=f"--set {setting}: "):
        override_recipe(finetune_recipe("audioset-20k"), [setting])


def test_the_recipe_of_a_training_is_its_tasks_unless_named():
    """A model that there is not is refused, with the nearest that there is."""
    assert choose_finetune_recipe(None, None, "esc50").name == "esc50"
    assert choose_finetune_recipe("vit", None, "esc50").name == "esc50"
    assert choose_finetune_recipe("vit", "own-small", "esc50").name == "own-small"
    with pytest.raises(RunError, match=r"model 'cnn' is unknown; did you mean 'cnn6'\? There are: vit, cnn6"):
        choose_finetune_recipe("cnn", None, "esc50")
