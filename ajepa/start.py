"""Start: the run that fine-tuning starts from: its encoder, how its clips were made, which checkpoint it is."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from torch import Tensor

from ajepa.checkpoints import STATE
from ajepa.classifier import ENCODER, VitSpec
from ajepa.finetune_recipes import FINETUNE_PIECES
from ajepa.finetuner import AVERAGE, CLASSIFIER
from ajepa.finetuning import Finetune
from ajepa.recipes import Pretrain, from_json
from ajepa.run import Json, Run
from ajepa.vit import EncoderSpec
from pipeline.errors import RunError
from pipeline.melspec import MelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """The newest checkpoint of a pre-trained or fine-tuned run, looked at before anything is read."""

    run: Run
    recipe: Pretrain | Finetune

    @classmethod
    def of(cls, run_path: Path) -> Self:
        """The run at `run_path`; RunError where there is none, or none with an encoder and a checkpoint."""
        run = Run.open(run_path)
        recipe = from_json(run.recipe, FINETUNE_PIECES)
        if not run.checkpoints():
            raise RunError(f"{run_path}: holds no checkpoint yet; train it first")
        if isinstance(recipe, Finetune) and not isinstance(recipe.model, VitSpec):
            raise RunError(f"{run_path}: its {type(recipe.model).__name__} has no encoder to start from")
        return cls(run=run, recipe=recipe)

    @property
    def part(self) -> str:
        """What of the checkpoint holds the encoder: the moving average wherever there is one."""
        if isinstance(self.recipe, Finetune):
            return AVERAGE if self.recipe.ema else CLASSIFIER
        return "target"

    @property
    def encoder(self) -> EncoderSpec:
        model = self.recipe.model
        assert not isinstance(self.recipe, Finetune) or isinstance(model, VitSpec)
        spec: EncoderSpec = model.encoder  # type: ignore[union-attr]
        return spec

    @property
    def mel(self) -> MelSpec:
        """How its clips were made."""
        return MelSpec.from_json(self.run.identity["mel"])

    def identity(self) -> Json:
        """Step and digest of what is started from: a run is not carried on from another."""
        state = json.loads((self.run.checkpoints()[-1] / STATE).read_text())
        return {"step": state["step"], "sha256": state["sha256"][self.part]}

    def weights(self) -> dict[str, Tensor]:
        """The encoder's, named as in a classifier; RunError where the checkpoint is damaged."""
        held = self.run.load(self.part).parts[self.part]
        if self.part == "target":
            return {f"{ENCODER}{name}": value for name, value in held.items()}
        return {name: value for name, value in held.items() if name.startswith(ENCODER)}

    def adopted(self, recipe: Finetune) -> Finetune:
        """The recipe with this encoder and its mel spec; views, drop path and masking stay the recipe's.

        RunError where the recipe trains another kind of model.
        """
        if not isinstance(recipe.model, VitSpec):
            raise RunError(
                f"recipe {recipe.name} trains a {type(recipe.model).__name__}: it cannot start from {self.run.path}; "
                "leave out --from"
            )
        mine, its = recipe.model.encoder, self.encoder
        cols = -(-mine.grid.frames // its.grid.patch_frames)
        encoder = replace(its, grid=replace(its.grid, cols=cols), drop_path=mine.drop_path)
        return replace(recipe, mel=self.recipe.mel, model=replace(recipe.model, encoder=encoder))
