"""`--set`: the recipe that it makes, and its messages about settings that cannot be."""

import json
from dataclasses import replace

import pytest
from tiny import tiny

from ajepa.model.masking import Fixed, RandomPatches, mask_plan
from ajepa.recipes.catalogue import override_recipe, recipe_from_json, recipe_to_json, upgrade_recipe_json
from ajepa.recipes.pretrain import PRETRAIN_RECIPES, a_jepa_recipe, small_recipe
from pipeline.errors import RunError
from pipeline.loading.augment import Augment


def test_single_fields_are_replaced_at_any_depth_and_nothing_else_is():
    """Three settings, three differences."""
    recipe = override_recipe(
        a_jepa_recipe(), ["optimiser.weight_decay=0.1", "schedule.peak_lr=1e-4", "model.encoder.depth=4"]
    )
    before = a_jepa_recipe()
    by_hand = replace(
        before,
        optimiser=replace(before.optimiser, weight_decay=0.1),
        schedule=replace(before.schedule, peak_lr=1e-4),
        model=replace(before.model, encoder=replace(before.model.encoder, depth=4)),
    )
    assert recipe == by_hand
    assert recipe_from_json(json.loads(json.dumps(recipe_to_json(recipe)))) == recipe


@pytest.mark.parametrize("name", sorted(PRETRAIN_RECIPES))
def test_nothing_set_is_the_recipe_itself(name):
    """And with every field set to its own value, as in its JSON, it is the recipe again."""
    recipe = PRETRAIN_RECIPES[name]()
    assert override_recipe(recipe, []) == recipe
    settings = [line for line in leaves(recipe_to_json(recipe)) if not line.startswith("masks.steps=")]
    assert len(settings) > 30
    assert override_recipe(recipe, settings) == recipe


def leaves(recipe_json: dict, path: str = "") -> list[str]:
    """Return every single value of a recipe as a setting, `KEY=VALUE`."""
    settings = []
    for key, value in recipe_json.items():
        if isinstance(value, dict):
            settings += leaves(value, f"{path}{key}.")
        elif key != "type":
            settings.append(f"{path}{key}={value if isinstance(value, str) else json.dumps(value)}")
    return settings


def test_the_masks_of_the_ablation_are_set_by_name_and_then_by_field():
    """Later settings see earlier ones; both ends of a range may change at once."""
    recipe = override_recipe(
        tiny(), ["masks=patches", "masks.masking.ratio_low=0.7", "masks.masking.ratio_high=0.8"]
    )
    assert recipe.masks == Fixed(masking=RandomPatches(ratio_low=0.7, ratio_high=0.8))
    assert override_recipe(small_recipe(), ["masks=inverse", "steps=77"]).masks == mask_plan("inverse", 77)


def test_a_curriculum_is_stretched_with_the_steps():
    """With two lengths in one recipe, one would be wrong."""
    assert override_recipe(tiny(), ["steps=40"]) == tiny().with_counts(steps=40)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "schedule.peak_l=1",
            r"schedule \(Schedule\) has no field 'peak_l'; did you mean 'peak_lr'\?.*warmup_s",
        ),
        (
            "optimizer.beta1=1",
            r"a recipe has no field 'optimizer'; did you mean 'optimiser'\? There are: name",
        ),
        ("model.encoder.width.x=1", "model.encoder.width is a single value, 32; it has no field 'x'"),
        (
            "model.encoder=3",
            r"has fields of its own \(EncoderSpec\); set one of them: model.encoder.grid, mo",
        ),
        ("model.encoder.depth=2.5", "depth=2.5: expected a whole number"),
        ("schedule.peak_lr=fast", "peak_lr=fast: expected a number"),
        ("schedule.peak_lr=nan", "peak_lr=nan: expected a number, and a finite one"),
        ("model.loss=l3", "loss=l3: expected one of l2, squared_l2, cosine"),
        ("crop=middle", "crop=middle: expected one of random, start"),
        ("model.encoder.heads=5", "width must be a multiple of heads"),
        ("schedule.warmup_share=1.5", "a warm-up share in \\[0, 1\\)"),
        ("optimiser.beta2=2", "betas in \\[0, 1\\)"),
        ("masks.earlier.count=0", "masks need at least one target"),
        ("masks.steps=3", "masks.steps: follows steps; set that"),
        (
            "masks=invers",
            r"masks 'invers' are unknown; did you mean 'inverse'\? There are: curriculum, inverse",
        ),
        ("steps", "--set steps: expected KEY=VALUE, such as"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_line(setting, message):
    """The setting as it was typed, the mistake, and the expectation."""
    with pytest.raises(RunError, match=message) as refusal:
        override_recipe(tiny(), [setting])
    assert "\n" not in str(refusal.value)


def earlier_json(recipe_json: dict, **retired) -> dict:
    """Return a recipe's JSON as the version before views, epochs and augmentation wrote it."""
    new_fields = {"Pretrain": {"views", "epochs", "augment"}, "Schedule": {"ema_curve", "ema_base_clips"}}
    new_fields |= {"JepaSpec": {"target_norm", "token_weight", "clip"}}
    new_fields |= {"EncoderSpec": {"init"}, "PredictorSpec": {"init"}}
    earlier = {}
    for key, value in recipe_json.items():
        if key not in new_fields.get(recipe_json["type"], ()):
            earlier[key] = earlier_json(value, **retired) if isinstance(value, dict) else value
    if recipe_json["type"] == "JepaSpec":
        earlier |= {"targets": "teacher", "target_cosines": 6, "clip_weight": 0.0, **retired}
    return earlier


@pytest.mark.parametrize("name", ["smoke", "audio-jepa", "a-jepa"])
def test_a_recipe_of_the_version_before_views_is_read_as_what_it_was(name):
    """A run that was begun before is opened and carried on: in steps, without augmentation, with a linear momentum."""
    recipe = PRETRAIN_RECIPES[name]()
    recipe = replace(
        recipe, epochs=0, augment=Augment(), schedule=replace(recipe.schedule, ema_curve="linear")
    )
    recipe_json = recipe_to_json(recipe)
    earlier = earlier_json(recipe_json)
    assert earlier != recipe_json
    assert upgrade_recipe_json(earlier) == recipe_json
    assert upgrade_recipe_json(recipe_json) == recipe_json
    assert recipe_from_json(upgrade_recipe_json(earlier)) == recipe


@pytest.mark.parametrize("retired", [{"targets": "cosines"}, {"clip_weight": 0.5}], ids=str)
def test_what_a_retired_field_asked_for_is_not_forgotten(retired):
    """An objective that is gone must not silently become another."""
    earlier = earlier_json(recipe_to_json(PRETRAIN_RECIPES["smoke"]()), **retired)
    with pytest.raises(RunError, match="written by another version of ajepa: use that one"):
        recipe_from_json(upgrade_recipe_json(earlier))
