"""`--set KEY=VALUE`: single fields of a recipe replaced, checked against what the recipe is made of."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ajepa.model.classifier import MODELS, RegularisedMasking, model_name
from ajepa.model.jepa import JepaSpec
from ajepa.model.masking import (
    BlockSize,
    Curriculum,
    Fixed,
    RandomBlocks,
    RandomPatches,
    TimeFrequencyAware,
    TimeSpans,
    mask_plan,
)
from ajepa.model.patches import PatchGrid
from ajepa.model.vit import EncoderSpec, PredictorSpec
from ajepa.recipes.finetune import (
    Finetune,
    audioset_2m,
    audioset_20k,
    esc50,
    fsd50k,
    own,
    own_small,
    speech_commands_v1,
    speech_commands_v2,
    voxceleb1_sid,
)
from ajepa.recipes.optimiser import AdamW, Schedule
from ajepa.recipes.pretrain import RECIPES, Pretrain
from ajepa.recipes.supervised import SUPERVISED
from pipeline.errors import RunError
from pipeline.loading.augment import Augment


def recipe(name: str) -> Pretrain:
    """The recipe of that name; RunError names the nearest and all there are."""
    if name in RECIPES:
        return RECIPES[name]()
    if name in FINETUNES:
        told = f"recipe {name!r} fine-tunes: ajepa-train finetune --recipe {name}"
        raise RunError(f"{told}; to pre-train there are: {', '.join(RECIPES)}")
    nearest = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
    raise RunError(f"recipe {name!r} is unknown; did you mean {nearest!r}? There are: {', '.join(RECIPES)}")


PIECES: dict[str, type] = {
    piece.__name__: piece
    for piece in (
        *(Pretrain, AdamW, Schedule, JepaSpec, EncoderSpec, PredictorSpec, PatchGrid),
        *(Curriculum, Fixed, RandomPatches, RandomBlocks, TimeFrequencyAware, TimeSpans, BlockSize),
        *(Finetune, Augment, RegularisedMasking, *(model.spec for model in MODELS.values())),
    )
}


def to_json(piece: Any) -> Any:
    """A recipe, or any piece of one, as plain JSON values; each object says under `type` what it is."""
    if not is_dataclass(piece):
        return piece
    return {"type": type(piece).__name__} | {f.name: to_json(getattr(piece, f.name)) for f in fields(piece)}


def from_json(told: Any) -> Any:
    """The recipe, or the piece of one, that `to_json` was given; RunError where this version knows no such piece."""
    if not isinstance(told, Mapping):
        return told
    values = {key: from_json(value) for key, value in told.items() if key != "type"}
    try:
        return PIECES[told["type"]](**values)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"a recipe's {told.get('type', 'piece')} cannot be read ({error}); update ajepa"
        ) from None


FOLLOWING = {"masks.steps": "steps"}  # fields that another decides

WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}

BOOLS = {"true": True, "false": False}

Recipe = TypeVar("Recipe")


def overridden(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with each `KEY=VALUE` of `settings` set, in their order.

    KEY is a path of field names (`model.encoder.depth`); `masks` takes the name of a plan (`curriculum.PLANS`).
    The new recipe is made when all are set, so that two may be needed to make sense. RunError: an unknown
    field, a value of another type, or what the constructor says of a value that cannot be.
    """
    told = to_json(recipe)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise RunError(f"--set {setting}: expected KEY=VALUE, such as schedule.peak_lr=1e-4")
        _set(told, key.strip(), value.strip())
    if "steps" in told.get("masks", {}):
        told["masks"]["steps"] = told["steps"]
    try:
        made: Recipe = _made(told)
        return made
    except ValueError as error:
        raise RunError(f"--set {' '.join(settings)}: {error}") from None


def _set(told: dict[str, Any], key: str, value: str) -> None:
    """Put a value in its place in a recipe as `to_json` tells it."""
    if key in FOLLOWING:
        raise RunError(f"--set {key}: follows {FOLLOWING[key]}; set that")
    if key == "masks" and key in told:
        told["masks"] = to_json(mask_plan(value, told["steps"]))
        return
    *path, last = key.split(".")
    piece = told
    for depth, name in enumerate([*path, last]):
        here = ".".join([*path, last][:depth])
        if not isinstance(piece, dict):
            raise RunError(f"--set {key}: {here} is a single value, {piece!r}; it has no field {name!r}")
        known = [field for field in piece if field != "type"]
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            owner = f"{here} ({piece['type']})" if here else "a recipe"
            raise RunError(
                f"--set {key}: {owner} has no field {name!r}; did you mean {nearest!r}? "
                f"There are: {', '.join(known)}"
            )
        if depth < len(path):
            piece = piece[name]
    if isinstance(piece[last], dict):
        fields = ", ".join(f"{key}.{field}" for field in piece[last] if field != "type")
        raise RunError(
            f"--set {key}: has fields of its own ({piece[last]['type']}); set one of them: {fields}"
        )
    piece[last] = _typed(key, value, get_type_hints(PIECES[piece["type"]])[last])


def _typed(key: str, value: str, kind: Any) -> int | float | str | bool:
    """A value as its field has it; RunError says what is expected."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise RunError(f"--set {key}={value}: expected one of {', '.join(get_args(kind))}")
        return value
    try:
        typed = BOOLS[value] if kind is bool else kind(value)
    except (ValueError, KeyError):
        raise RunError(f"--set {key}={value}: expected {WORDS[kind]}") from None
    if kind is float and not math.isfinite(typed):
        raise RunError(f"--set {key}={value}: expected {WORDS[kind]}, and a finite one")
    return typed


def _made(told: Any) -> Any:
    if not isinstance(told, dict):
        return told
    values = {name: _made(value) for name, value in told.items() if name != "type"}
    return PIECES[told["type"]](**values)


FINETUNES: dict[str, Callable[[], Finetune]] = {
    "audioset-20k": audioset_20k,
    "audioset-2m": audioset_2m,
    "esc50": esc50,
    "speech-commands-v2": speech_commands_v2,
    "speech-commands-v1": speech_commands_v1,
    "voxceleb1-sid": voxceleb1_sid,
    "fsd50k": fsd50k,
    "own": own,
    "own-small": own_small,
    **SUPERVISED,
}


def finetune_recipe(name: str) -> Finetune:
    """The recipe of that name; RunError names the nearest and all there are."""
    if name in FINETUNES:
        return FINETUNES[name]()
    if name in RECIPES:
        told = f"recipe {name!r} pre-trains: ajepa-train pretrain --recipe {name}"
        raise RunError(f"{told}; to fine-tune there are: {', '.join(FINETUNES)}")
    nearest = difflib.get_close_matches(name, FINETUNES, n=1, cutoff=0.0)[0]
    raise RunError(
        f"fine-tuning recipe {name!r} is unknown; did you mean {nearest!r}? There are: {', '.join(FINETUNES)}"
    )


def recipe_of(model: str | None, name: str | None, task_recipe: str) -> Finetune:
    """The recipe asked for by name; else the task's own, which trains a vit; else the one named as its model is.

    RunError where there is no such model, or the recipe is one of another.
    """
    if model is not None and model not in MODELS:
        raise RunError(f"model {model!r} is unknown; there are: {', '.join(MODELS)}")
    own_name = task_recipe if model in (None, "vit") else model
    made = finetune_recipe(name or own_name or task_recipe)
    if model not in (None, model_name(made.model)):
        raise RunError(
            f"recipe {made.name} trains a {model_name(made.model)}, not a {model}; leave out one of them"
        )
    return made
