"""A recipe that trains in milliseconds a step, for tests of everything around the model."""

from dataclasses import replace
from typing import Any

from ajepa.curriculum import Curriculum
from ajepa.jepa import JepaSpec
from ajepa.masking import RandomBlocks, RandomPatches
from ajepa.optimiser import Schedule
from ajepa.patches import PatchGrid
from ajepa.recipes import Pretrain
from ajepa.vit import EncoderSpec, PredictorSpec


def tiny(**changes: Any) -> Pretrain:
    """Width 32, depth 1, views of 64 frames; 30 steps of 8 clips, a checkpoint every fifth."""
    grid = PatchGrid.of(64, 128)
    model = JepaSpec(
        encoder=EncoderSpec(grid=grid, width=32, depth=1, heads=2),
        predictor=PredictorSpec(width=16, depth=1, heads=2),
    )
    made = Pretrain(
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
    return replace(made, **changes)
