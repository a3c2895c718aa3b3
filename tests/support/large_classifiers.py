"""Classifiers whose step takes enough memory to be measured."""

from dataclasses import replace

from ajepa.model.cnn6 import Cnn6Spec
from ajepa.model.convnext import ConvNextSpec
from ajepa.recipes.catalogue import finetune_recipe, override_recipe
from ajepa.recipes.finetune import Finetune


def large_recipe(model: str, **changes) -> Finetune:
    """A recipe whose step takes some hundred MB, far more than what libraries hold."""
    if model == "vit":
        recipe = override_recipe(finetune_recipe("own-small"), ["model.encoder.grid.cols=32"])
        recipe = replace(recipe, clips_per_step=32)
    elif model == "passt":
        spec = replace(finetune_recipe("passt-small").model, frames=400, drop_cols=9)
        recipe = replace(finetune_recipe("passt-small"), model=spec, clips_per_step=32)
    elif model == "cnn6":
        recipe = replace(finetune_recipe("cnn6-small"), model=Cnn6Spec(frames=128, bands=128, width=16))
    else:
        spec = ConvNextSpec(frames=256, bands=64, size="atto", drop_path=0.1)
        recipe = replace(finetune_recipe("cnn6-small"), model=spec, clips_per_step=24)
    return replace(recipe, ema=0.9, steps=10, **changes)
