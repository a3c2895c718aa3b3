"""FeatureChoice: the pooling and the layer that a run's probes found best, and those used if none are asked for.

RUN/features.json is a `FeatureChoice` as JSON; an export carries the same under `features`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ajepa.model.pooling import VECTORS_PER_CLIP, EncoderLayer, PoolingName, is_pooling_name
from ajepa.model.vit import EncoderSpec
from pipeline.errors import RunError
from pipeline.files import replacing_file

FEATURES_FILE = "features.json"

FEATURES_FORMAT = 1

# Used where no probe has chosen: rows apart with their deviation over time, of the mean of the last blocks. It is as
# wide as the last layer alone. bench/README.md has its scores beside those of the other choices.
FALLBACK_POOLING: PoolingName = "moments"
FALLBACK_BLOCKS = 4

# A wider vector is chosen only if its score is higher than that of a narrower one by more than this.
MIN_GAIN_OF_WIDER = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureCandidate:
    """A pooling and a layer, the width of their vectors, and the scores of two probes on held-back training clips."""

    pooling: PoolingName
    layer: EncoderLayer
    width: int
    knn: float
    linear: float

    @property
    def score(self) -> float:
        """The mean of both probes' scores, by which candidates are compared."""
        return (self.knn + self.linear) / 2

    @property
    def title(self) -> str:
        """Pooling and layer in words: `moments of concat-all`."""
        return f"{self.pooling} of {self.layer}"

    def to_json(self) -> dict[str, Any]:
        """The candidate as plain values."""
        return {
            "pooling": self.pooling,
            "layer": str(self.layer),
            "width": self.width,
            "knn": self.knn,
            "linear": self.linear,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The candidate that `to_json` wrote; KeyError for a missing key, RunError for an unknown pooling or layer."""
        if not is_pooling_name(record["pooling"]):
            raise RunError(f"pooling {record['pooling']!r} is unknown; update ajepa")
        return cls(
            pooling=record["pooling"],
            layer=EncoderLayer.from_name(record["layer"]),
            width=record["width"],
            knn=record["knn"],
            linear=record["linear"],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureChoice:
    """All candidates that were probed at a step, and on which clips; `chosen` is the one to use.

    metric      of the scores: mAP, or accuracy where every clip has one label
    fit_clips   training clips that trained the probes
    held_clips  training clips of other sounds, on which the probes were measured
    classes     the most frequent classes of these clips, which were measured
    """

    step: int
    store_id: str
    metric: str
    fit_clips: int
    held_clips: int
    classes: int
    candidates: tuple[FeatureCandidate, ...]

    @property
    def chosen(self) -> FeatureCandidate:
        """The narrowest candidate of those within MIN_GAIN_OF_WIDER of the best score; of equals the best."""
        best = max(candidate.score for candidate in self.candidates)
        good = [candidate for candidate in self.candidates if candidate.score >= best - MIN_GAIN_OF_WIDER]
        return min(good, key=lambda candidate: (candidate.width, -candidate.score))

    @property
    def reason(self) -> str:
        """Why `chosen` is used, as a clause."""
        clips = f"{self.held_clips} held-back training clips at step {self.step}"
        return f"best by kNN and linear probe on {clips}: {self.metric} {self.chosen.score:.3f}"

    def to_json(self) -> dict[str, Any]:
        """The choice as plain values; `pooling` and `layer` are those of `chosen`."""
        return {
            "format": FEATURES_FORMAT,
            "pooling": self.chosen.pooling,
            "layer": str(self.chosen.layer),
            "step": self.step,
            "store_id": self.store_id,
            "metric": self.metric,
            "fit_clips": self.fit_clips,
            "held_clips": self.held_clips,
            "classes": self.classes,
            "candidates": [candidate.to_json() for candidate in self.candidates],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], location: str) -> Self:
        """The choice that `to_json` wrote; RunError, with the location, for another format or a missing key."""
        if record.get("format") != FEATURES_FORMAT:
            raise RunError(
                f"{location}: feature format {record.get('format')}, this version reads {FEATURES_FORMAT}; update ajepa"
            )
        try:
            return cls(
                step=record["step"],
                store_id=record["store_id"],
                metric=record["metric"],
                fit_clips=record["fit_clips"],
                held_clips=record["held_clips"],
                classes=record["classes"],
                candidates=tuple(map(FeatureCandidate.from_json, record["candidates"])),
            )
        except KeyError as error:
            raise RunError(
                f"{location}: {error} is missing; delete the file, and give --pooling and --layer"
            ) from None


def read_feature_choice(run: Path) -> FeatureChoice | None:
    """The choice that is stored in a run; None if there is none. RunError if the file is damaged."""
    path = run / FEATURES_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except ValueError:
        raise RunError(
            f"{path}: damaged (not JSON); delete it, and run the same pretrain command again"
        ) from None
    return FeatureChoice.from_json(record, str(path))


def write_feature_choice(run: Path, choice: FeatureChoice) -> None:
    """Store the choice in a run."""
    with replacing_file(run / FEATURES_FILE) as scratch:
        scratch.write_text(json.dumps(choice.to_json(), indent=1) + "\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorFeatures:
    """The pooling and the layer of the vectors of an encoder, and why they are these: a clause for people."""

    pooling: PoolingName
    layer: EncoderLayer
    reason: str
    is_fallback: bool = False

    @property
    def description(self) -> str:
        """All of it in one line."""
        return f"{self.pooling} of layer {self.layer} ({self.reason})"

    def width(self, spec: EncoderSpec) -> int:
        """The number of values of the vector of a clip."""
        return vector_width(self.pooling, self.layer, spec)


def vector_width(pooling: PoolingName, layer: EncoderLayer, spec: EncoderSpec) -> int:
    """The number of values of the vector of a clip, by this pooling of this layer."""
    return spec.width * layer.vectors_per_token(spec.depth) * VECTORS_PER_CLIP[pooling](spec.grid.rows)


def resolve_features(
    spec: EncoderSpec,
    choice: FeatureChoice | None,
    pooling: PoolingName | None = None,
    layer: EncoderLayer | str | None = None,
) -> VectorFeatures:
    """The pooling and the layer to use: those asked for, else those that were chosen, else a fixed fallback.

    Pooling and layer are resolved one by one: to ask for one leaves the other as it was chosen. RunError for an unknown
    name, or a layer that the encoder does not have.
    """
    # What is used where nothing is asked for.
    usual_pooling = FALLBACK_POOLING
    usual_layer = EncoderLayer(last_blocks=min(FALLBACK_BLOCKS, spec.depth))
    usual_reason = "the fixed default: no probe has chosen"
    if choice is not None:
        usual_pooling = choice.chosen.pooling
        usual_layer = choice.chosen.layer
        usual_reason = choice.reason

    # What is asked for.
    if pooling is not None and not is_pooling_name(pooling):
        raise RunError(f"pooling {pooling!r} is unknown; expected mean, frequency or moments")
    if isinstance(layer, str):
        layer = EncoderLayer.from_name(layer)
    if layer is not None:
        layer.refuse_missing_blocks(spec.depth)

    # Say of both where they come from.
    if pooling is not None and layer is not None:
        reason = "as asked"
    elif pooling is not None:
        reason = f"pooling as asked, layer {usual_reason}"
    elif layer is not None:
        reason = f"layer as asked, pooling {usual_reason}"
    else:
        reason = usual_reason
    return VectorFeatures(
        pooling=pooling or usual_pooling,
        layer=layer or usual_layer,
        reason=reason,
        is_fallback=choice is None and (pooling is None or layer is None),
    )
