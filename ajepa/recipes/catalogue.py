"""`--set KEY=VALUE`: single fields of a recipe replaced, checked against what the recipe is made of."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ajepa.model.classifier import CLASSIFIER_KINDS, RegularisedMasking, classifier_kind_name
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
    audioset_2m_recipe,
    audioset_20k_recipe,
    esc50_recipe,
    fsd50k_recipe,
    own_labels_recipe,
    own_small_recipe,
    speech_commands_v1_recipe,
    speech_commands_v2_recipe,
    voxceleb1_sid_recipe,
)
from ajepa.recipes.optimiser import AdamW, Schedule
from ajepa.recipes.pretrain import PRETRAIN_RECIPES, Pretrain
from ajepa.recipes.supervised import SUPERVISED_RECIPES
from pipeline.errors import RunError
from pipeline.loading.augment import Augment


def pretrain_recipe(name: str) -> Pretrain:
    """The recipe of that name; RunError names the nearest and all there are."""
    if name in PRETRAIN_RECIPES:
        return PRETRAIN_RECIPES[name]()
    if name in FINETUNE_RECIPES:
        told = f"recipe {name!r} fine-tunes: ajepa-train finetune --recipe {name}"
        raise RunError(f"{told}; to pre-train there are: {', '.join(PRETRAIN_RECIPES)}")
    nearest = difflib.get_close_matches(name, PRETRAIN_RECIPES, n=1, cutoff=0.0)[0]
    raise RunError(
        f"recipe {name!r} is unknown; did you mean {nearest!r}? There are: {', '.join(PRETRAIN_RECIPES)}"
    )


PRETRAIN_PIECES: dict[str, type] = {
    piece.__name__: piece
    for piece in (
        *(Pretrain, AdamW, Schedule, JepaSpec, EncoderSpec, PredictorSpec, PatchGrid),
        *(Curriculum, Fixed, RandomPatches, RandomBlocks, TimeFrequencyAware, TimeSpans, BlockSize),
        *(Finetune, Augment, RegularisedMasking, *(model.spec_type for model in CLASSIFIER_KINDS.values())),
    )
}


def recipe_to_json(piece: Any) -> Any:
    """A recipe, or any piece of one, as plain JSON values; each object says under `type` what it is."""
    if not is_dataclass(piece):
        return piece
    return {"type": type(piece).__name__} | {
        f.name: recipe_to_json(getattr(piece, f.name)) for f in fields(piece)
    }


def recipe_from_json(json_value: Any) -> Any:
    """The recipe, or the piece of one, that `to_json` was given; RunError where this version knows no such piece."""
    if not isinstance(json_value, Mapping):
        return json_value
    values = {key: recipe_from_json(value) for key, value in json_value.items() if key != "type"}
    try:
        return PRETRAIN_PIECES[json_value["type"]](**values)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"a recipe's {json_value.get('type', 'piece')} cannot be read ({error}); update ajepa"
        ) from None


DEPENDENT_FIELDS = {"masks.steps": "steps"}  # fields that another decides

TYPE_DESCRIPTIONS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}

BOOL_WORDS = {"true": True, "false": False}

Recipe = TypeVar("Recipe")


def override_recipe(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with each `KEY=VALUE` of `settings` set, in their order.

    KEY is a path of field names (`model.encoder.depth`); `masks` takes the name of a plan (`curriculum.PLANS`).
    The new recipe is made when all are set, so that two may be needed to make sense. RunError: an unknown
    field, a value of another type, or what the constructor says of a value that cannot be.
    """
    told = recipe_to_json(recipe)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise RunError(f"--set {setting}: expected KEY=VALUE, such as schedule.peak_lr=1e-4")
        _set_field(told, key.strip(), value.strip())
    if "steps" in told.get("masks", {}):
        told["masks"]["steps"] = told["steps"]
    try:
        made: Recipe = _build_piece(told)
        return made
    except ValueError as error:
        raise RunError(f"--set {' '.join(settings)}: {error}") from None


def _set_field(recipe_json: dict[str, Any], key: str, value: str) -> None:
    """Put a value in its place in a recipe as `to_json` tells it."""
    if key in DEPENDENT_FIELDS:
        raise RunError(f"--set {key}: follows {DEPENDENT_FIELDS[key]}; set that")
    if key == "masks" and key in recipe_json:
        recipe_json["masks"] = recipe_to_json(mask_plan(value, recipe_json["steps"]))
        return
    *path, last = key.split(".")
    piece = recipe_json
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
    piece[last] = _parse_field_value(key, value, get_type_hints(PRETRAIN_PIECES[piece["type"]])[last])


def _parse_field_value(key: str, value: str, field_type: Any) -> int | float | str | bool:
    """A value as its field has it; RunError says what is expected."""
    if get_origin(field_type) is Literal:
        if value not in get_args(field_type):
            raise RunError(f"--set {key}={value}: expected one of {', '.join(get_args(field_type))}")
        return value
    try:
        typed = BOOL_WORDS[value] if field_type is bool else field_type(value)
    except (ValueError, KeyError):
        raise RunError(f"--set {key}={value}: expected {TYPE_DESCRIPTIONS[field_type]}") from None
    if field_type is float and not math.isfinite(typed):
        raise RunError(f"--set {key}={value}: expected {TYPE_DESCRIPTIONS[field_type]}, and a finite one")
    return typed


def _build_piece(json_value: Any) -> Any:
    if not isinstance(json_value, dict):
        return json_value
    values = {name: _build_piece(value) for name, value in json_value.items() if name != "type"}
    return PRETRAIN_PIECES[json_value["type"]](**values)


FINETUNE_RECIPES: dict[str, Callable[[], Finetune]] = {
    "audioset-20k": audioset_20k_recipe,
    "audioset-2m": audioset_2m_recipe,
    "esc50": esc50_recipe,
    "speech-commands-v2": speech_commands_v2_recipe,
    "speech-commands-v1": speech_commands_v1_recipe,
    "voxceleb1-sid": voxceleb1_sid_recipe,
    "fsd50k": fsd50k_recipe,
    "own": own_labels_recipe,
    "own-small": own_small_recipe,
    **SUPERVISED_RECIPES,
}


def finetune_recipe(name: str) -> Finetune:
    """The recipe of that name; RunError names the nearest and all there are."""
    if name in FINETUNE_RECIPES:
        return FINETUNE_RECIPES[name]()
    if name in PRETRAIN_RECIPES:
        told = f"recipe {name!r} pre-trains: ajepa-train pretrain --recipe {name}"
        raise RunError(f"{told}; to fine-tune there are: {', '.join(FINETUNE_RECIPES)}")
    nearest = difflib.get_close_matches(name, FINETUNE_RECIPES, n=1, cutoff=0.0)[0]
    raise RunError(
        f"fine-tuning recipe {name!r} is unknown; did you mean {nearest!r}? There are: {', '.join(FINETUNE_RECIPES)}"
    )


def choose_finetune_recipe(model: str | None, name: str | None, task_recipe: str) -> Finetune:
    """The recipe asked for by name; else the task's own, which trains a vit; else the one named as its model is.

    RunError where there is no such model, or the recipe is one of another.
    """
    if model is not None and model not in CLASSIFIER_KINDS:
        raise RunError(f"model {model!r} is unknown; there are: {', '.join(CLASSIFIER_KINDS)}")
    own_name = task_recipe if model in (None, "vit") else model
    made = finetune_recipe(name or own_name or task_recipe)
    if model not in (None, classifier_kind_name(made.model)):
        raise RunError(
            f"recipe {made.name} trains a {classifier_kind_name(made.model)}, not a {model}; leave out one of them"
        )
    return made
