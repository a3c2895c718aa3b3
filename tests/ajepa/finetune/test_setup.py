"""The recipe that fits an encoder, where nobody names one."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from ajepa.finetune.setup import choose_recipe_for_start
from ajepa.model.vit import EncoderSpec
from ajepa.recipes.catalogue import finetune_recipe
from ajepa.recipes.pretrain import a_jepa_recipe, base_recipe, small_recipe
from pipeline.audio.mel_spec import preset_mel_spec


def start_of(encoder: EncoderSpec) -> SimpleNamespace:
    return SimpleNamespace(encoder_spec=lambda purpose: encoder, mel=preset_mel_spec("a-jepa"))


@pytest.mark.parametrize(
    ("pretrained", "task", "chosen", "frames"),
    [
        (small_recipe(), "own", "own-small", 256),
        (small_recipe(), "audioset-20k", "own-small", 256),
        (small_recipe(), "speech-commands-v2", "own-small", 128),
        (base_recipe(), "own", "own", 512),
        (a_jepa_recipe(), "own", "own", 1024),
        (base_recipe(), "audioset-20k", "audioset-20k", 1024),
        (a_jepa_recipe("s"), "esc50", "esc50", 512),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_width_and_views_of_the_encoder_decide(pretrained, task, chosen, frames):
    """The papers' rates are for their widths; views of another length than in pre-training were never seen."""
    recipe, note = choose_recipe_for_start(finetune_recipe(task), start_of(pretrained.model.encoder))
    assert (recipe.name, recipe.model.frames) == (chosen, frames)
    assert recipe.loss == finetune_recipe(task).loss
    assert note.startswith(f"recipe {chosen}: the encoder is {pretrained.model.encoder.width} wide, ")
    assert note.endswith("; --recipe takes another")


def test_the_line_says_what_the_other_recipe_is_for():
    """So that the choice can be judged, and undone."""
    encoder = replace(small_recipe().model.encoder)
    _, note = choose_recipe_for_start(finetune_recipe("own"), start_of(encoder))
    assert note == (
        "recipe own-small: the encoder is 128 wide, own is for 384 and more; views of 2.6 s; --recipe takes another"
    )
