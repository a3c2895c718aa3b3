"""A trained run, opened at one of its checkpoints: the weights that it is measured by, its encoder, its classifier."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save
from torch import Tensor

from ajepa.model.classifier import ENCODER_PREFIX, Classifier, VitSpec, build_classifier
from ajepa.model.vit import Encoder, EncoderSpec
from ajepa.recipes.catalogue import recipe_from_json
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.checkpoints import STATE_FILE, read_checkpoint_state
from ajepa.training.devices import PRECISION_NAMES, Precision, PrecisionName, pick_measuring_precision
from ajepa.training.run import Run
from ajepa.training.run_identity import StartCheckpoint
from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import RunError

# Parts of a checkpoint that may be the one to measure.
CLASSIFIER_PART = "classifier"
AVERAGE_PART = "average"
TARGET_PART = "target"

# Stands for the weights before the first step, where a checkpoint is chosen.
INITIAL_CHECKPOINT = "init"

# What chose the best checkpoint of a run that began before clips were held back for it.
CHOSEN_ON_EVAL_CLIPS = "probes on clips of the evaluation splits (checkpoint format 1)"

# Name of the band statistics among an encoder's weights.
BAND_STATISTICS = "bands_2F"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainedRun:
    """A run at a checkpoint: the weights that it is measured by, and the networks that they make.

    part       the part of the checkpoint that is measured: `target`, the EMA encoder of a pre-trained run; the moving
               `average` of a fine-tuned run's classifier, or the `classifier` where the recipe keeps no average
    weights    of that part, on the CPU
    precision  the numbers that the steps before the checkpoint, or in place of init the newest one, were computed in;
               None: not recorded
    chosen_by  what chose the checkpoint, in words
    """

    run: Run
    recipe: Pretrain | Finetune
    step: int
    part: str
    weights: dict[str, Tensor]
    precision: PrecisionName | None = None
    chosen_by: str | None = None

    @classmethod
    def open(cls, run: Run | Path, at: str | int = "last") -> Self:
        """The run at a checkpoint: last, best (by probe), init, or a step that was kept. RunError where there is none.

        init is the run before its first step (`initial_weights`): of a warm-started run, the warm start.
        """
        if isinstance(run, Path):
            run = Run.open(run)

        # Read only the part that is measured: the optimiser's is twice as large.
        recipe = recipe_from_json(run.recipe)
        part = measured_part(recipe)
        if at == INITIAL_CHECKPOINT:
            weights = initial_weights(run, recipe)
            newest_state = read_checkpoint_state(run.checkpoint_folder("last")) if run.newest_step else {}
            return cls(
                run=run,
                recipe=recipe,
                step=0,
                part=part,
                weights=weights,
                precision=recorded_precision(newest_state.get("precision")),
                chosen_by="nothing: before step 1",
            )
        checkpoint = run.load_checkpoint(part, at=at)
        return cls(
            run=run,
            recipe=recipe,
            step=checkpoint.step,
            part=part,
            weights=checkpoint.parts[part],
            precision=recorded_precision(checkpoint.precision),
            chosen_by=describe_choice(run, at),
        )

    def pick_precision(self, device: torch.device, name: PrecisionName = "auto") -> Precision:
        """The precision to measure in; `auto` follows the training (`pick_measuring_precision`)."""
        return pick_measuring_precision(name, device, self.precision)

    @property
    def mel(self) -> MelSpec:
        """The mel spec of the clips that the run was trained on."""
        return self.run.identity.mel

    @property
    def finetune_recipe(self) -> Finetune:
        """The recipe of a fine-tuned run; RunError where the run was pre-trained."""
        if not isinstance(self.recipe, Finetune):
            raise RunError(f"{self.run.path}: was pre-trained and has no classifier; fine-tune it first")
        return self.recipe

    def encoder_spec(self, purpose: str) -> EncoderSpec:
        """The encoder's shape; RunError, naming the purpose, where the run trained another kind of network."""
        model = self.recipe.model
        if isinstance(self.recipe, Finetune) and not isinstance(model, VitSpec):
            raise RunError(f"{self.run.path}: its {type(model).__name__} has no encoder {purpose}")
        spec: EncoderSpec = model.encoder  # type: ignore[union-attr]
        return spec

    def encoder_weights(self) -> dict[str, Tensor]:
        """The encoder's weights, by their names in an `Encoder`."""
        # The target of pre-training is an encoder; in a classifier the encoder's names have a prefix.
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
        model = build_classifier(recipe.model, len(self.run.task_identity.classes), recipe.seed).to(device)
        model.load_state_dict(self.weights)
        return model

    def checkpoint_identity(self) -> StartCheckpoint:
        """Step and digest of the weights, which are part of the identity of a run that starts from them."""
        # No file holds the weights before the first step.
        if self.step == 0:
            return StartCheckpoint(step=0, sha256=hashlib.sha256(save(self.weights)).hexdigest())
        state = json.loads((self.run.checkpoint_folder(self.step) / STATE_FILE).read_text())
        return StartCheckpoint(step=state["step"], sha256=state["sha256"][self.part])

    def adapt_recipe(self, recipe: Finetune) -> Finetune:
        """The recipe with this run's encoder and mel spec; views, drop path and masking stay the recipe's.

        RunError where the recipe trains another kind of model, or the run has no encoder.
        """
        # Only a ViT has an encoder to start from.
        if not isinstance(recipe.model, VitSpec):
            raise RunError(
                f"recipe {recipe.name} trains a {type(recipe.model).__name__}: it cannot start from {self.run.path}; "
                "leave out --from"
            )
        trained = self.encoder_spec("to start from")
        wanted = recipe.model.encoder

        # As many columns of the trained encoder's patches as the recipe's views need.
        cols = -(-wanted.grid.frames // trained.grid.patch_frames)
        encoder = replace(trained, grid=replace(trained.grid, cols=cols), drop_path=wanted.drop_path)
        return replace(recipe, mel=self.recipe.mel, model=replace(recipe.model, encoder=encoder))


def recorded_precision(recorded: str | None) -> PrecisionName | None:
    """The precision of that name in a checkpoint; None for a checkpoint of before it was recorded."""
    return next((name for name in PRECISION_NAMES.values() if name == recorded), None)


def describe_choice(run: Run, at: str | int) -> str:
    """What chose the checkpoint `at` of a run, in words; for the best, the clips that its score was measured on."""
    if at == "last":
        return "nothing: the last step"
    if at != "best":
        return "its step"
    state = read_checkpoint_state(run.checkpoint_folder(at))
    return f"probes on {state['scored_on']}" if state.get("scored_on") else CHOSEN_ON_EVAL_CLIPS


def initial_weights(run: Run, recipe: Pretrain | Finetune) -> dict[str, Tensor]:
    """The weights that are measured, as they were before the first step: drawn by the seed, or the warm start's.

    The statistics of the bands, which training does not change, are those of the run. RunError where the run fine-tuned
    another run's encoder.
    """
    if isinstance(recipe, Finetune):
        identity = run.task_identity
        if identity.start is not None:
            raise RunError(
                f"{run.path}: started from another run's encoder; give that run, or another checkpoint"
            )
        return build_classifier(recipe.model, len(identity.classes), recipe.seed).state_dict()

    # The run keeps its warm start as a checkpoint of step 0.
    part = measured_part(recipe)
    if run.identity.warm_start is not None:
        return run.load_checkpoint(part, at=0).parts[part]

    # The statistics are in every checkpoint.
    statistics_2F = None
    if recipe.model.encoder.band_norm:
        statistics_2F = run.load_checkpoint(part).parts[part][BAND_STATISTICS]
    return build_initial_encoder(recipe.model.encoder, recipe.seed, statistics_2F).state_dict()


def build_initial_encoder(spec: EncoderSpec, seed: int, statistics_2F: Tensor | None) -> Encoder:
    """The encoder that training starts from: drawn by the seed; `statistics_2F` are mean and deviation of the bands."""
    encoder = Encoder(spec, seed=seed)
    if statistics_2F is not None:
        encoder.set_band_statistics(*statistics_2F)
    return encoder


def measured_part(recipe: Pretrain | Finetune) -> str:
    """The part of a checkpoint to measure, to embed with, and to start from: a moving average where there is one."""
    if isinstance(recipe, Pretrain):
        return TARGET_PART
    if recipe.ema:
        return AVERAGE_PART
    return CLASSIFIER_PART
