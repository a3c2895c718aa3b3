"""Recipes that train in milliseconds a step, for tests of everything around the model."""

from dataclasses import replace
from typing import Any

from ajepa.model.classifier import RegularisedMasking, VitSpec
from ajepa.model.jepa import JepaSpec
from ajepa.model.masking import Curriculum, Fixed, RandomBlocks, RandomPatches
from ajepa.model.patches import PatchGrid
from ajepa.model.sigreg import ClipObjective
from ajepa.model.views import Views
from ajepa.model.vit import EncoderSpec, PredictorSpec
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.optimiser import Schedule
from ajepa.recipes.pretrain import Pretrain
from pipeline.loading.augment import Augment


def tiny(**changes: Any) -> Pretrain:
    """Width 32, depth 1, views of 64 frames; 30 steps of 8 clips, a checkpoint every fifth."""
    grid = PatchGrid.from_size(64, 128)
    model = JepaSpec(
        encoder=EncoderSpec(grid=grid, width=32, depth=1, heads=2),
        predictor=PredictorSpec(width=16, depth=1, heads=2),
    )
    recipe = Pretrain(
        name="tiny",
        mel="a-jepa",
        model=model,
        masks=Curriculum(earlier=RandomBlocks(), later=RandomPatches(), steps=30),
        schedule=Schedule(peak_lr=1e-3, warmup_share=0.1, ema_start=0.9),
        steps=30,
        clips_per_step=8,
        log_every=1,
        checkpoint_every=5,
    )
    return replace(recipe, **changes)


def tiny_views(**changes: Any) -> Pretrain:
    """`tiny` with everything that `small` has: two views, a clip objective, targets of several layers by position."""
    masking = RandomPatches(ratio_low=0.5, ratio_high=0.5, target_share=0.45)
    recipe = tiny(masks=Fixed(masking=masking), views=Views(shift_bands=2), mask_sets=2)
    grid = PatchGrid(rows=2, cols=16, patch_frames=4, patch_bands=64)
    model = replace(
        recipe.model,
        encoder=replace(recipe.model.encoder, grid=grid, depth=2, band_norm=True, init="xavier"),
        predictor=replace(recipe.model.predictor, init="xavier"),
        loss="squared_l2",
        target_layers=2,
        target_norm="position",
        token_weight=0.3,
        clip=ClipObjective(hidden=48, width=16, directions=32),
    )
    return replace(recipe, model=model, **changes)


def tiny_finetune(frames: int = 64, **changes: Any) -> Finetune:
    """`tiny`'s encoder in a classifier, with augmentation and masking; 20 steps, a checkpoint every fifth."""
    encoder = replace(tiny().model.encoder, grid=PatchGrid.from_size(frames, 128), drop_path=0.1, depth=2)
    recipe = Finetune(
        name="tiny",
        mel="a-jepa",
        model=VitSpec(encoder=encoder, masking=RegularisedMasking(share=0.2)),
        base_lr=3e-2,
        epochs=5,
        warmup_epochs=1,
        clips_per_step=8,
        augment=Augment(roll=True, gain_db=3, time_mask_frames=8, band_mask_bands=8, mixup_share=0.5),
        ema=0.9,
        steps=20,
        evaluations=2,
        log_every=1,
        checkpoint_every=5,
    )
    return replace(recipe, **changes)
