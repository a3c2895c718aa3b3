"""Pre-training recipes: values that survive JSON, stretch to any length, and give their cost."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny, tiny_views

from ajepa.model.masking import Curriculum, Fixed, RandomPatches
from ajepa.model.sigreg import NORMALITY_SCALE
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.recipes.catalogue import override_recipe, pretrain_recipe, recipe_from_json, recipe_to_json
from ajepa.recipes.pretrain import PRETRAIN_RECIPES, a_jepa_recipe, audio_jepa_recipe, smoke_recipe
from ajepa.training.devices import pick_precision
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.errors import RunError
from pipeline.loading.augment import Augment
from pipeline.loading.loader import Batch

NAMES = sorted(PRETRAIN_RECIPES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_comes_back_from_json_as_it_was(name):
    """A run folder must rebuild the very model and masks that it was trained with, years later."""
    recipe = pretrain_recipe(name)
    assert recipe.name == name
    assert recipe_from_json(json.loads(json.dumps(recipe_to_json(recipe)))) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_of_a_recipe_has_its_cost_and_its_expected_result(name):
    """Whoever starts a run wants to know first whether it takes a minute or a month."""
    docstring = PRETRAIN_RECIPES[name].__doc__
    assert "Cost" in docstring
    assert "Expected" in docstring


@pytest.mark.parametrize("name", NAMES)
def test_the_view_of_a_recipe_holds_the_bands_of_its_mel_preset(name):
    """A grid that does not fit its features would fail only at the first batch."""
    recipe = pretrain_recipe(name)
    assert recipe.model.encoder.grid.bands == preset_mel_spec(recipe.mel).mel_bands


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 30, 1_000_000])
def test_every_schedule_ends_with_the_run_whatever_its_length(name, steps):
    """--steps must move every horizon with it; tied to another length, the teacher never settles."""
    recipe = pretrain_recipe(name).with_counts(steps=steps)
    schedule = recipe.schedule
    assert schedule.learning_rate(steps, steps) == pytest.approx(schedule.end_lr)
    assert schedule.teacher_momentum(steps, steps) == schedule.ema_end
    rates = [schedule.learning_rate(step, steps) for step in (0, steps // 50, steps // 10)]
    assert max(rates) <= schedule.peak_lr
    if isinstance(recipe.masks, Curriculum):
        assert recipe.masks.steps == steps


def test_a_curriculum_of_another_length_than_its_run_is_refused():
    """With two lengths in one recipe, one of them would be wrong without a word."""
    with pytest.raises(ValueError, match="a curriculum over 20 steps in a run of 40"):
        replace(smoke_recipe(), steps=40)


def test_audio_jepa_warms_up_for_a_thousand_steps_to_its_peak():
    """Audio-JEPA (arXiv 2507.02915): 1e-6 to 3e-4 in 1 k steps, then a cosine to 0 at 100 k."""
    schedule, steps = audio_jepa_recipe().schedule, audio_jepa_recipe().steps
    rates = [schedule.learning_rate(step, steps) for step in (0, 1_000, 50_500, 100_000)]
    assert rates == pytest.approx([1e-6, 3e-4, 1.5e-4, 0.0], abs=1e-12)


def test_audio_jepas_teacher_slows_down_as_byols_does():
    """ "As in BYOL": half a cosine over all steps. A straight line is another schedule under the paper's name."""
    schedule, steps = audio_jepa_recipe().schedule, audio_jepa_recipe().steps
    momenta = [schedule.teacher_momentum(step, steps) for step in (0, 25_000, 50_000, 100_000)]
    assert momenta == pytest.approx([0.996, 0.9965858, 0.998, 1.0], abs=1e-7)


def test_a_jepa_is_trained_as_its_paper_says():
    """Squared distance, as in I-JEPA; another start and up to 6 dB in every step; the norm is left as an option."""
    recipe = a_jepa_recipe()
    assert recipe.model.loss == "squared_l2"
    assert recipe.augment == Augment(roll=True, gain_db=6.0)
    assert override_recipe(recipe, ["model.loss=l2", "augment.roll=false"]).model.loss == "l2"
    assert "32 kHz, where the paper has 16" in " ".join(a_jepa_recipe.__doc__.split())


def test_a_jepa_sees_audioset_24_times():
    """24 epochs of 2,084,320 clips, 512 at a time."""
    recipe = a_jepa_recipe()
    assert recipe.steps * recipe.clips_per_step == pytest.approx(24 * 2_084_320, rel=1e-4)
    assert recipe.with_step_count(2_084_320 // 512).steps == pytest.approx(recipe.steps, rel=1e-3)


@pytest.mark.parametrize("name", ["a-jepa", "a-jepa-s", "a-jepa-l"])
def test_a_recipe_of_epochs_has_as_many_on_any_store(name):
    """The steps of AudioSet-2M are 2,501 epochs of 20,000 clips; the curriculum follows the length."""
    recipe = pretrain_recipe(name).with_step_count(20_000 // 512)
    assert (recipe.steps, recipe.epochs) == (24 * 39, 24)
    assert isinstance(recipe.masks, Curriculum)
    assert recipe.masks.steps == 24 * 39
    two_epochs = pretrain_recipe(name).with_counts(epochs=2, clips_per_step=64).with_step_count(312)
    assert (two_epochs.steps, two_epochs.masks.steps) == (624, 624)


def test_given_steps_are_the_length_of_a_recipe_of_epochs():
    """--steps, and --set steps=; both lengths at once are refused."""
    for recipe in (
        a_jepa_recipe().with_counts(steps=77),
        override_recipe(a_jepa_recipe(), ["steps=77"]),
    ):
        assert recipe.epochs == 0
        assert recipe.with_step_count(39) == recipe
        assert recipe.masks.steps == recipe.steps == 77
    assert audio_jepa_recipe().with_step_count(39) == audio_jepa_recipe()
    assert audio_jepa_recipe().with_counts(epochs=3).with_step_count(39).steps == 117
    with pytest.raises(RunError, match="steps 5 and epochs 2 are two lengths of one run"):
        a_jepa_recipe().with_counts(steps=5, epochs=2)


def test_views_and_augmentation_exclude_each_other():
    """Both change the level of a clip; one of them would be forgotten."""
    with pytest.raises(ValueError, match="views change the clips themselves: leave augment off"):
        tiny_views(augment=Augment(gain_db=3.0))


@pytest.mark.parametrize(
    ("typed", "meant"), [("smal", "small"), ("ajepa", "a-jepa"), ("audiojepa", "audio-jepa")]
)
def test_a_misspelt_recipe_is_answered_with_the_nearest(typed, meant):
    """One line: the word as typed, the nearest recipe, and all there are."""
    with pytest.raises(RunError, match=f"did you mean '{meant}'.*There are: smoke, small"):
        pretrain_recipe(typed)


def test_a_piece_that_this_version_does_not_know_is_refused():
    """A run of a later version names its missing piece instead of failing somewhere inside."""
    recipe_json = recipe_to_json(smoke_recipe())
    with pytest.raises(RunError, match="recipe's WholeSpectra cannot be read"):
        recipe_from_json({**recipe_json, "masks": {"type": "WholeSpectra"}})


@pytest.mark.parametrize("name", NAMES)
def test_masks_of_a_recipe_fit_its_grid_from_the_first_step_to_the_last(name):
    """At every stage of a run the masks can be drawn on the recipe's own grid."""
    recipe = pretrain_recipe(name)
    for step in (0, recipe.steps // 2, recipe.steps - 1):
        rng = np.random.default_rng(step)
        masks = recipe.masks.mask_maker_at(step, rng).sample(rng, recipe.model.encoder.grid, batch=4)
        assert not set(masks.context_BK[0]) & set(masks.targets_BGQ[0].ravel())


def test_three_steps_of_the_tiny_recipe_are_those_of_the_first_version(monkeypatch):
    """Options that are off change nothing: the losses, in fp32 and for the same masks, are as before there were any."""
    monkeypatch.setattr(
        "ajepa.pretrain.trainer.step_rng", lambda seed, step: np.random.default_rng([seed, step, 0])
    )
    cpu = torch.device("cpu")
    generator = torch.Generator().manual_seed(3)
    trainer = PretrainTrainer(tiny(), cpu, precision=pick_precision("fp32", cpu))
    losses = []
    for step in range(3):
        batch = Batch(
            mel_BTF=torch.randn(8, 64, 128, generator=generator),
            n_frames_B=torch.tensor([64] * 6 + [32, 20]),
            rows_B=np.arange(8),
            labels_BC=None,
        )
        losses.append(trainer.train_step(step, batch)["loss"])
    assert losses == pytest.approx([1.0123282670974731, 1.0111634731292725, 1.0073821544647217], rel=1e-5)


def test_several_mask_sets_are_drawn_for_every_clip(monkeypatch):
    """`mask_sets` of a recipe reaches the step; one is the default, and none is refused."""
    batches = []
    sample = RandomPatches.sample

    def record_batch(maker, rng, grid, *, batch):
        batches.append(batch)
        return sample(maker, rng, grid, batch=batch)

    monkeypatch.setattr(RandomPatches, "sample", record_batch)
    recipe = tiny(masks=Fixed(masking=RandomPatches()), mask_sets=3, clips_per_step=4)
    batch = Batch(
        mel_BTF=torch.randn(4, 64, 128),
        n_frames_B=torch.full((4,), 64),
        rows_B=np.arange(4),
        labels_BC=None,
    )
    metrics = PretrainTrainer(recipe, torch.device("cpu")).train_step(0, batch)
    assert batches[0] == 12  # the next step's are drawn in the meantime
    assert 0.5 < metrics["loss"] < 2
    with pytest.raises(ValueError, match="must be at least 1"):
        tiny(mask_sets=0)


def test_both_objectives_are_logged_and_the_loss_is_their_weighted_sum():
    """A second objective that nobody sees could be all of the loss."""
    batch = Batch(
        mel_BTF=torch.randn(16, 74, 128),
        n_frames_B=torch.full((16,), 74),
        rows_B=np.arange(8),
        labels_BC=None,
    )
    recipe = tiny_views()
    assert recipe.source_frames == 74
    metrics = PretrainTrainer(recipe, torch.device("cpu")).train_step(0, batch)
    assert metrics["loss"] == pytest.approx(0.3 * metrics["token_loss"] + metrics["clip_loss"], rel=1e-6)
    share = recipe.model.clip.sigreg_share
    assert metrics["clip_loss"] > share * NORMALITY_SCALE * metrics["normality"] > 0
    assert 0 < metrics["disagreement"] < 1.2
    assert metrics["z_std"] > 0
