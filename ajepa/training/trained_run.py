"""TrainedRun: a run opened at one of its checkpoints, with the weights that count; its encoder, its classifier."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ajepa.model.classifier import ENCODER_PREFIX, Classifier, VitSpec, build_classifier
from ajepa.model.vit import EncoderSpec
from ajepa.recipes.catalogue import recipe_from_json
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.checkpoints import STATE_FILE
from ajepa.training.run import Json, Run
from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import RunError

CLASSIFIER_PART, AVERAGE_PART, TARGET_PART = "classifier", "average", "target"  # parts of a checkpoint


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainedRun:
    """A run at a checkpoint: the weights that it is measured by, and how to make networks of them.

    part     of the checkpoint that counts: `target`, the EMA encoder of a pre-trained run; of a fine-tuned run the
             moving `average` of the classifier, or the `classifier` where the recipe keeps no average
    weights  of that part, on the CPU
    """

    run: Run
    recipe: Pretrain | Finetune
    step: int
    part: str
    weights: dict[str, Tensor]

    @classmethod
    def open(cls, run: Run | Path, at: str | int = "last") -> Self:
        """Read the checkpoint `at`: last, best (by probe), or a step that is kept. RunError where there is none."""
        if isinstance(run, Path):
            run = Run.open(run)
        recipe = recipe_from_json(run.recipe)
        part = part_that_counts(recipe)
        checkpoint = run.load_checkpoint(part, at=at)
        return cls(run=run, recipe=recipe, step=checkpoint.step, part=part, weights=checkpoint.parts[part])

    @property
    def mel(self) -> MelSpec:
        """How the clips were made that the run was trained on."""
        return MelSpec.from_json(self.run.identity["mel"])

    @property
    def finetune_recipe(self) -> Finetune:
        """The recipe of a fine-tuned run; RunError where the run is a pre-trained one."""
        if not isinstance(self.recipe, Finetune):
            raise RunError(f"{self.run.path}: was pre-trained and has no classifier; fine-tune it first")
        return self.recipe

    def encoder_spec(self, purpose: str) -> EncoderSpec:
        """The encoder's shape; RunError, ending with the purpose, where the run trained another kind of network."""
        model = self.recipe.model
        if isinstance(self.recipe, Finetune) and not isinstance(model, VitSpec):
            raise RunError(f"{self.run.path}: its {type(model).__name__} has no encoder {purpose}")
        spec: EncoderSpec = model.encoder  # type: ignore[union-attr]
        return spec

    def encoder_weights(self) -> dict[str, Tensor]:
        """The encoder's weights, named as in an `Encoder`."""
        if self.part == TARGET_PART:
            return self.weights
        return {
            name.removeprefix(ENCODER_PREFIX): weight
            for name, weight in self.weights.items()
            if name.startswith(ENCODER_PREFIX)
        }

    def classifier(self, device: torch.device) -> Classifier:
        """The classifier of a fine-tuned run, on that device."""
        recipe = self.finetune_recipe
        model = build_classifier(recipe.model, len(self.run.identity["classes"]), recipe.seed).to(device)
        model.load_state_dict(self.weights)
        return model

    def checkpoint_identity(self) -> Json:
        """Step and digest of the weights: a run that was started from them is not carried on from others."""
        state = json.loads((self.run.checkpoint_folder(self.step) / STATE_FILE).read_text())
        return {"step": state["step"], "sha256": state["sha256"][self.part]}

    def adapt_recipe(self, recipe: Finetune) -> Finetune:
        """The recipe with this run's encoder and mel spec; views, drop path and masking stay the recipe's.

        RunError where the recipe trains another kind of model, or the run has no encoder.
        """
        if not isinstance(recipe.model, VitSpec):
            raise RunError(
                f"recipe {recipe.name} trains a {type(recipe.model).__name__}: it cannot start from {self.run.path}; "
                "leave out --from"
            )
        its = self.encoder_spec("to start from")
        mine = recipe.model.encoder
        cols = -(-mine.grid.frames // its.grid.patch_frames)
        encoder = replace(its, grid=replace(its.grid, cols=cols), drop_path=mine.drop_path)
        return replace(recipe, mel=self.recipe.mel, model=replace(recipe.model, encoder=encoder))


def part_that_counts(recipe: Pretrain | Finetune) -> str:
    """Which part of a checkpoint is measured, embedded with and started from: a moving average where there is one."""
    if isinstance(recipe, Pretrain):
        return TARGET_PART
    return AVERAGE_PART if recipe.ema else CLASSIFIER_PART
