"""`--set KEY=VALUE`: single fields of a recipe replaced, checked against what the recipe is made of."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ajepa.curriculum import mask_plan
from ajepa.recipes import PIECES, to_json
from pipeline.errors import RunError

FOLLOWING = {"masks.steps": "steps"}  # fields that another decides
WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
BOOLS = {"true": True, "false": False}
Recipe = TypeVar("Recipe")


def overridden(recipe: Recipe, settings: Sequence[str], pieces: Mapping[str, type] = PIECES) -> Recipe:
    """The recipe, which is made of these pieces, with each `KEY=VALUE` of `settings` set, in their order.

    KEY is a path of field names (`model.encoder.depth`); `masks` takes the name of a plan (`curriculum.PLANS`).
    The new recipe is made when all are set, so that two may be needed to make sense. RunError: an unknown
    field, a value of another type, or what the constructor says of a value that cannot be.
    """
    told = to_json(recipe)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise RunError(f"--set {setting}: expected KEY=VALUE, such as schedule.peak_lr=1e-4")
        _set(told, key.strip(), value.strip(), pieces)
    if "steps" in told.get("masks", {}):
        told["masks"]["steps"] = told["steps"]
    try:
        made: Recipe = _made(told, pieces)
        return made
    except ValueError as error:
        raise RunError(f"--set {' '.join(settings)}: {error}") from None


def _set(told: dict[str, Any], key: str, value: str, pieces: Mapping[str, type]) -> None:
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
    piece[last] = _typed(key, value, get_type_hints(pieces[piece["type"]])[last])


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


def _made(told: Any, pieces: Mapping[str, type]) -> Any:
    if not isinstance(told, dict):
        return told
    values = {name: _made(value, pieces) for name, value in told.items() if name != "type"}
    return pieces[told["type"]](**values)
