"""Every kind of classifier by name: what shapes it, and what makes it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ajepa.classifier import Classifier, ClassifierSpec, Vit, VitSpec
from ajepa.cnn6 import Cnn6, Cnn6Spec
from ajepa.convnext import ConvNext, ConvNextSpec
from ajepa.passt import Passt, PasstSpec
from pipeline.errors import RunError


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A kind of classifier: `build(spec, classes, seed)` makes one of a spec of that type.

    smaller     the fields of a recipe that make it smaller
    batch_norm  whether what it says of a clip in training depends on the others that pass through with it
    """

    spec: type
    build: Callable[[Any, int, int], Classifier]
    smaller: str
    batch_norm: bool = False


MODELS: dict[str, Model] = {
    "vit": Model(spec=VitSpec, build=Vit, smaller="model.encoder.width, model.encoder.depth"),
    "cnn6": Model(spec=Cnn6Spec, build=Cnn6, smaller="model.width", batch_norm=True),
    "convnext": Model(spec=ConvNextSpec, build=ConvNext, smaller="model.size", batch_norm=True),
    "passt": Model(spec=PasstSpec, build=Passt, smaller="model.width, model.depth"),
}


def model_name(spec: ClassifierSpec) -> str:
    """The name of the kind of classifier that a spec shapes."""
    return next(name for name, model in MODELS.items() if isinstance(spec, model.spec))


def built(spec: ClassifierSpec, classes: int, seed: int) -> Classifier:
    """The classifier of a spec, with weights that `seed` decides."""
    return MODELS[model_name(spec)].build(spec, classes, seed)


def of_frames(spec: ClassifierSpec, frames: int) -> ClassifierSpec:
    """The same shape for clips of so many frames; a vit's are rounded up to whole patches."""
    if isinstance(spec, VitSpec):
        grid = spec.encoder.grid
        cols = -(-frames // grid.patch_frames)
        return replace(spec, encoder=replace(spec.encoder, grid=replace(grid, cols=cols)))
    try:
        return replace(spec, frames=frames)  # type: ignore[type-var]  # every other has it as a field
    except ValueError as error:
        raise RunError(f"clips of {frames} frames are too short for this model: {error}") from None
