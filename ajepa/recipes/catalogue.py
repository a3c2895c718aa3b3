"""Recipes: looked up by name, converted to and from JSON, and with single fields replaced (`--set KEY=VALUE`)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
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
from ajepa.model.sigreg import ClipObjective
from ajepa.model.views import Views
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
from pipeline.messages import suggest_known

# Recipes by name.

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


def pretrain_recipe(name: str) -> Pretrain:
    """Return the pre-training recipe with this name; RunError names the most similar name and all names."""
    if name in PRETRAIN_RECIPES:
        return PRETRAIN_RECIPES[name]()
    if name in FINETUNE_RECIPES:
        raise RunError(
            f"recipe {name!r} fine-tunes: ajepa-train finetune --recipe {name}; "
            f"to pre-train there are: {', '.join(PRETRAIN_RECIPES)}"
        )
    raise RunError(f"recipe {name!r} is unknown; {suggest_known(name, PRETRAIN_RECIPES)}")


def finetune_recipe(name: str) -> Finetune:
    """Return the fine-tuning recipe with this name; RunError names the most similar name and all names."""
    if name in FINETUNE_RECIPES:
        return FINETUNE_RECIPES[name]()
    if name in PRETRAIN_RECIPES:
        raise RunError(
            f"recipe {name!r} pre-trains: ajepa-train pretrain --recipe {name}; "
            f"to fine-tune there are: {', '.join(FINETUNE_RECIPES)}"
        )
    raise RunError(f"fine-tuning recipe {name!r} is unknown; {suggest_known(name, FINETUNE_RECIPES)}")


def choose_finetune_recipe(model: str | None, name: str | None, task_recipe: str) -> Finetune:
    """Return the recipe with the given name, or the default recipe of the task or of the kind of model.

    The default for a vit is the task's recipe; for every other kind of model it is the recipe named like the kind.
    RunError if the kind does not exist, or if the named recipe trains another kind.
    """
    if model is not None and model not in CLASSIFIER_KINDS:
        raise RunError(f"model {model!r} is unknown; {suggest_known(model, CLASSIFIER_KINDS)}")

    # The name that was given, or the default.
    default_name = task_recipe if model in (None, "vit") else model
    recipe = finetune_recipe(name or default_name or task_recipe)

    # Refuse a recipe that trains another kind of model.
    recipe_model = classifier_kind_name(recipe.model)
    if model not in (None, recipe_model):
        raise RunError(f"recipe {recipe.name} trains a {recipe_model}, not a {model}; leave out one of them")
    return recipe


# Recipes as JSON: every class that a recipe.json may contain, by name.

RECIPE_PIECES: dict[str, type] = {
    piece.__name__: piece
    for piece in (
        *(Pretrain, AdamW, Schedule, JepaSpec, EncoderSpec, PredictorSpec, PatchGrid, ClipObjective, Views),
        *(Curriculum, Fixed, RandomPatches, RandomBlocks, TimeFrequencyAware, TimeSpans, BlockSize),
        *(Finetune, Augment, RegularisedMasking, *(kind.spec_type for kind in CLASSIFIER_KINDS.values())),
    )
}


def recipe_to_json(piece: Any) -> Any:
    """Return a recipe, or a piece of a recipe, as plain JSON values; the key `type` of an object names its class."""
    if not is_dataclass(piece):
        return piece
    values = {field.name: recipe_to_json(getattr(piece, field.name)) for field in fields(piece)}
    return {"type": type(piece).__name__} | values


def recipe_from_json(json_value: Any) -> Any:
    """Return the recipe, or piece of a recipe, from the JSON values of `recipe_to_json`.

    RunError if this version has no class of that name, or if the class refuses the values.
    """
    if not isinstance(json_value, Mapping):
        return json_value
    values = {key: recipe_from_json(value) for key, value in json_value.items() if key != "type"}
    try:
        return RECIPE_PIECES[json_value["type"]](**values)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"a recipe's {json_value.get('type', 'piece')} cannot be read ({error}); "
            "it was written by another version of ajepa: use that one"
        ) from None


# Fields that recipes no longer have, by class, with the values that asked for nothing; None: any value.
RETIRED_FIELDS: dict[str, dict[str, Any]] = {
    "JepaSpec": {"targets": "teacher", "clip_weight": 0.0, "target_cosines": None}
}


def upgrade_recipe_json(json_value: Any) -> Any:
    """Return the JSON of a recipe of an earlier version as this version writes it.

    Fields that came later get their defaults, which ask for what was done before there were such fields. A retired
    field is left out if its value asked for nothing; else it stays, and `recipe_from_json` refuses it.
    """
    if not isinstance(json_value, Mapping) or json_value.get("type") not in RECIPE_PIECES:
        return json_value
    piece = RECIPE_PIECES[json_value["type"]]

    # Leave out what asked for nothing.
    retired = RETIRED_FIELDS.get(json_value["type"], {})
    upgraded = {
        key: upgrade_recipe_json(value)
        for key, value in json_value.items()
        if not (key in retired and retired[key] in (None, value))
    }
    if any(key in retired for key in upgraded):
        return dict(json_value)

    # Add what came later.
    for field in fields(piece):
        if field.name not in upgraded and field.default is not MISSING:
            upgraded[field.name] = recipe_to_json(field.default)
    return upgraded


# Single fields are replaced in the JSON of a recipe; then the recipe is built again from the JSON.

# Fields whose values are derived from other fields.
DEPENDENT_FIELDS = {"masks.steps": "steps"}

TYPE_DESCRIPTIONS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}

NOTHING_WORDS = ("none", "null")  # the latter as in JSON

BOOL_WORDS = {"true": True, "false": False}

Recipe = TypeVar("Recipe")


def override_recipe(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Return the recipe with each `KEY=VALUE` of `settings` set, in their order.

    KEY is a path of field names (`model.encoder.depth`); `masks` takes the name of a plan (`masking.MASK_PLANS`).
    The new recipe is built after all fields are set, because two settings may be valid only together. RunError for an
    unknown field, for a value of another type, and for a value that a constructor refuses.
    """
    # Set the fields in the recipe's JSON, which is not checked before all fields are set.
    recipe_json = recipe_to_json(recipe)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise RunError(f"--set {setting}: expected KEY=VALUE, such as schedule.peak_lr=1e-4")
        _set_field(recipe_json, key.strip(), value.strip())

    # Given steps replace the recipe's epochs. A curriculum has the length of its run.
    keys = [setting.partition("=")[0].strip() for setting in settings]
    if "steps" in keys and "epochs" not in keys and "masks" in recipe_json:
        recipe_json["epochs"] = 0
    if "steps" in recipe_json.get("masks", {}):
        recipe_json["masks"]["steps"] = recipe_json["steps"]

    # Build the recipe; the constructors check the values.
    try:
        changed_recipe: Recipe = _build_piece(recipe_json)
        return changed_recipe
    except ValueError as error:
        raise RunError(f"--set {' '.join(settings)}: {error}") from None


def _set_field(recipe_json: dict[str, Any], key: str, value: str) -> None:
    """Set the field at the path `key` in the JSON of a recipe to a value."""
    if key in DEPENDENT_FIELDS:
        raise RunError(f"--set {key}: follows {DEPENDENT_FIELDS[key]}; set that")
    if key == "masks" and key in recipe_json:
        recipe_json["masks"] = recipe_to_json(mask_plan(value, recipe_json["steps"]))
        return

    # Follow the path to the piece that has the field.
    *path, name = key.split(".")
    piece = recipe_json
    for depth, step in enumerate(path):
        _check_field(piece, step, key, owner=".".join(path[:depth]))
        piece = piece[step]
    _check_field(piece, name, key, owner=".".join(path))

    # A piece that a recipe can do without is left out by `none`.
    field_type = get_type_hints(RECIPE_PIECES[piece["type"]])[name]
    if value in NOTHING_WORDS and type(None) in get_args(field_type):
        piece[name] = None
        return

    # The field must contain a single value, not a piece.
    if isinstance(piece[name], dict):
        nested_keys = ", ".join(f"{key}.{field}" for field in piece[name] if field != "type")
        raise RunError(
            f"--set {key}: has fields of its own ({piece[name]['type']}); set one of them: {nested_keys}"
        )
    if piece[name] is None:
        raise RunError(f"--set {key}: this recipe has none; choose a recipe that has, and set its fields")
    piece[name] = _parse_field_value(key, value, field_type)


def _check_field(piece: Any, name: str, key: str, *, owner: str) -> None:
    """Raise RunError if `piece`, at the path `owner` of a recipe, has no field with this name."""
    if not isinstance(piece, dict):
        raise RunError(f"--set {key}: {owner} is a single value, {piece!r}; it has no field {name!r}")
    known = [field for field in piece if field != "type"]
    if name not in known:
        described = f"{owner} ({piece['type']})" if owner else "a recipe"
        raise RunError(f"--set {key}: {described} has no field {name!r}; {suggest_known(name, known)}")


def _parse_field_value(key: str, value: str, field_type: Any) -> int | float | str | bool:
    """Return a value converted to the type of its field; RunError names the values that are expected."""
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
    """Return the piece of a recipe, as `recipe_from_json` does, but do not catch the constructors' ValueErrors."""
    if not isinstance(json_value, dict):
        return json_value
    values = {name: _build_piece(value) for name, value in json_value.items() if name != "type"}
    return RECIPE_PIECES[json_value["type"]](**values)
