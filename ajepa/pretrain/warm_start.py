"""Warm start: a pre-training run that begins with the weights of another encoder, from a run, an export or the hub."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from safetensors.torch import save
from torch import Tensor

from ajepa.embed.pretrained import PretrainedEncoder, load_pretrained
from ajepa.model.sigreg import ClipObjective
from ajepa.model.vit import EncoderSpec, PredictorSpec
from ajepa.pretrain.trainer import JEPA_PARTS, PROJECTOR_PART
from ajepa.recipes.catalogue import recipe_from_json, recipe_to_json
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.run import RECIPE_FILE, Json, Run, setting_differences
from ajepa.training.run_identity import RunIdentity, WarmStartIdentity
from ajepa.training.trained_run import INITIAL_CHECKPOINT
from ajepa.training.trained_stores import TrainedStore
from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import RunError
from pipeline.store.joined_store import AnyStore

ENCODER_PART, TARGET_PART, PREDICTOR_PART = JEPA_PARTS

# Fields of a spec that weights do not depend on: how they are drawn, how they are trained, how long a clip is.
FREE_FIELDS = ("init", "drop_path", "grid.cols")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WarmStart:
    """The weights that a run begins with, by part of a checkpoint, and what is known of them.

    left_out    parts of the source that do not fit the recipe, each with the reason in words
    mel         front end that the source was trained on
    mean, std   by which the source's clips were normalised, and those of the run are too
    provenance  location, checkpoint and origin of the source, as plain values for recipe.json
    trained_stores  stores that trained the weights, if the source is a run that says so
    """

    weights: dict[str, dict[str, Tensor]]
    left_out: tuple[str, ...]
    mel: MelSpec
    mean: float
    std: float
    step: int | None
    provenance: Json
    trained_stores: tuple[TrainedStore, ...] = ()

    @classmethod
    def open(cls, location: Path | str, at: str | int, recipe: Pretrain) -> Self:
        """The parts of a source that fit the recipe: of a pre-trained run all of them, else the encoder, twice.

        The encoder must fit: RunError names the fields that differ. RunError too where there is no such source.
        """
        source = load_pretrained(location, at)
        refuse_other_encoder(location, source.spec, recipe)
        weights = {ENCODER_PART: source.weights, TARGET_PART: source.weights}

        # Of a pre-trained run, student, predictor and projector too; before its first step there are none.
        left_out: list[str] = []
        trained_stores: tuple[TrainedStore, ...] = ()
        path = Path(location)
        if (path / RECIPE_FILE).is_file() and at != INITIAL_CHECKPOINT:
            run = Run.open(path)
            trained_stores = run.trained_stores
            trained = recipe_from_json(run.recipe)
            if isinstance(trained, Pretrain):
                left_out = describe_unfit_parts(trained, recipe)
                unfit = {reason.partition(" ")[0] for reason in left_out}
                checkpoint = run.load_checkpoint(at=source.origin["step"])
                wanted = [name for name in (*JEPA_PARTS, PROJECTOR_PART) if name not in unfit]
                weights = {name: checkpoint.parts[name] for name in wanted if name in checkpoint.parts}
        return cls(
            weights=weights,
            left_out=tuple(left_out),
            mel=source.mel,
            mean=source.mean,
            std=source.std,
            step=source.origin.get("step"),
            provenance=describe_source(location, at, source),
            trained_stores=trained_stores,
        )

    def identity(self) -> WarmStartIdentity:
        """What is compared when the run is carried on."""
        digest = hashlib.sha256()
        for name, tensors in self.weights.items():
            digest.update(name.encode() + save({key: x.contiguous() for key, x in tensors.items()}))
        return WarmStartIdentity(parts=tuple(self.weights), step=self.step, sha256=digest.hexdigest())

    def adapt_identity(self, identity: RunIdentity, store: AnyStore) -> RunIdentity:
        """The identity of a run on this store that begins here: clips are normalised as the source's were.

        Other numbers would be another input to the same weights. RunError where the store has another front end.
        """
        location = self.provenance["location"]
        if not store.spec.same_front_end(self.mel):
            raise RunError(
                f"{location}: was trained on mel spec {self.mel.name} ({self.mel.spec_id}), "
                f"{store.location} holds {store.spec.name} ({store.spec_id}); build a store with --spec {self.mel.name}"
            )
        return replace(identity, mean=self.mean, std=self.std, warm_start=self.identity())

    def describe(self) -> str:
        """The line for the user: which parts are taken from where, and which are drawn anew."""
        step = "" if self.step is None else f" at step {self.step}"
        new = f"; drawn anew: {', '.join(self.left_out)}" if self.left_out else ""
        return (
            f"begins with {', '.join(self.weights)} of {self.provenance['location']}{step}{new}; "
            "clips are normalised as there, the optimiser starts afresh"
        )


def describe_source(location: Path | str, at: str | int, source: PretrainedEncoder) -> Json:
    """Location, checkpoint and origin of a source, for recipe.json."""
    return {
        "location": str(location),
        "checkpoint": str(at),
        "model_id": source.model_id,
        "origin": source.origin,
    }


def refuse_other_encoder(location: Path | str, trained: EncoderSpec, recipe: Pretrain) -> None:
    """RunError, naming the fields, where the weights of an encoder do not fit the recipe's."""
    differences = spec_differences(trained, recipe.model.encoder)
    if differences:
        raise RunError(
            f"{location}: its encoder does not fit recipe {recipe.name} ({'; '.join(differences)}); "
            "choose the recipe that trained it, or set these fields: --set model.encoder.FIELD=VALUE"
        )


def describe_unfit_parts(trained: Pretrain, recipe: Pretrain) -> list[str]:
    """The parts beside the encoder that differ in shape, or that only one of the recipes has, with the reason."""
    lines = []
    differences = spec_differences(trained.model.predictor, recipe.model.predictor)
    if differences:
        lines.append(f"{PREDICTOR_PART} ({'; '.join(differences)})")

    # Only the widths of a projector are a matter of shape.
    theirs, ours = (projector_widths(each.model.clip) for each in (trained, recipe))
    if ours is not None and theirs != ours:
        was = "absent" if theirs is None else f"widths {theirs}"
        lines.append(f"{PROJECTOR_PART} (was {was}, now widths {ours})")
    if ours is None and theirs is not None:
        lines.append(f"{PROJECTOR_PART} (the recipe has none)")
    return lines


def projector_widths(objective: ClipObjective | None) -> tuple[int, int] | None:
    """The widths of the projector of a clip objective; None where there is none."""
    return None if objective is None else (objective.hidden, objective.width)


def spec_differences(trained: EncoderSpec | PredictorSpec, wanted: EncoderSpec | PredictorSpec) -> list[str]:
    """The differences between two specs that the shape or the meaning of the weights depends on, in words."""
    return setting_differences(*(remove_fields(recipe_to_json(spec)) for spec in (trained, wanted)))


def remove_fields(spec_json: Mapping[str, Any], path: str = "") -> Json:
    """A spec as JSON without the FREE_FIELDS."""
    kept: Json = {}
    for key, value in spec_json.items():
        if f"{path}{key}" not in FREE_FIELDS:
            kept[key] = remove_fields(value, f"{path}{key}.") if isinstance(value, Mapping) else value
    return kept


def recorded_start(run_path: Path, location: Path | str | None, at: str | int) -> Run | None:
    """The run at `run_path` if it has begun from this very source, and keeps the weights itself; else None.

    Such a run is carried on without the source, which may have changed or be gone. RunError where the run has begun
    from a source, and none is given.
    """
    if not (run_path / RECIPE_FILE).is_file():
        return None
    run = Run.open(run_path)
    if run.warm_start is None:
        return None
    if location is None:
        raise RunError(f"{run_path}: began from {run.warm_start['location']}; give it again, as --from")
    is_same = (run.warm_start["location"], run.warm_start["checkpoint"]) == (str(location), str(at))
    return run if is_same and run.checkpoint_folders() else None
