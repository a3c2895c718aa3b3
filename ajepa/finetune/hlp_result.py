"""The study of label propagation as numbers: scores of every training, differences paired by seed, the table."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from ajepa.training.run import Json

RAW, PROPAGATED, POSTHOC = "raw", "propagated", "raw, scores propagated"

ARMS = (RAW, PROPAGATED, POSTHOC)

SHOWN = 10  # classes in the printed table; all are in the JSON


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """mAP against one kind of labels, over the classes that have a positive there; the others are None."""

    labels: str
    map: float
    chance: float
    per_class: tuple[float | None, ...]

    @property
    def counted(self) -> int:
        return sum(value is not None for value in self.per_class)


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What one training reached; `arm` says on which labels, or that its scores were propagated afterwards."""

    model: str
    arm: str
    seed: int
    scores: tuple[Score, ...]

    def of(self, labels: str) -> Score:
        return next(score for score in self.scores if score.labels == labels)

    @classmethod
    def from_json(cls, told: Json) -> Self:
        scores = [Score(**score | {"per_class": tuple(score["per_class"])}) for score in told["scores"]]
        return cls(**told | {"scores": tuple(scores)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Mean and sample deviation of one number over seeds, and in how many it is above 0; no deviation of one."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def up(self) -> int:
        return sum(value > 0 for value in self.values)

    def __format__(self, sign: str) -> str:
        told = f"{self.mean:{sign}.3f}"
        return told if math.isnan(self.deviation) else f"{told} ± {self.deviation:.3f}"

    def to_json(self) -> Json:
        deviation = None if math.isnan(self.deviation) else self.deviation
        return {"mean": self.mean, "deviation": deviation, "up": self.up, "values": list(self.values)}


@dataclass(frozen=True, kw_only=True, slots=True)
class GainingClass:
    """A class that propagation gives more clips to train on: what that changes in its average precision."""

    name: str
    clips_before: int
    clips_after: int
    raw: Spread
    propagated: Spread
    difference: Spread


@dataclass(frozen=True, kw_only=True, slots=True)
class HlpResult:
    """Every training of a study, with the protocol that produced it.

    classes           names, in the order of each score's classes (of the store, not of FSD50K)
    clips_before      clips to train on that have each class by their raw labels; `clips_after`: by propagated ones
    """

    protocol: Json
    classes: tuple[str, ...]
    clips_before: tuple[int, ...]
    clips_after: tuple[int, ...]
    trainings: tuple[Training, ...]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(training.model for training in self.trainings))

    @property
    def measured(self) -> list[str]:
        """The kinds of labels that scores are of."""
        return [score.labels for score in self.trainings[0].scores]

    def arm(self, model: str, arm: str) -> list[Training]:
        """Trainings of a model on an arm, by seed."""
        mine = [t for t in self.trainings if (t.model, t.arm) == (model, arm)]
        return sorted(mine, key=lambda training: training.seed)

    def maps(self, model: str, arm: str, labels: str) -> Spread:
        return Spread(values=tuple(training.of(labels).map for training in self.arm(model, arm)))

    def difference(self, model: str, arm: str, labels: str) -> Spread:
        """mAP of an arm less that of training on raw labels, seed by seed: what both share falls out."""
        pairs = zip(self.arm(model, arm), self.arm(model, RAW), strict=True)
        return Spread(values=tuple(one.of(labels).map - raw.of(labels).map for one, raw in pairs))

    def gains(self, index: int) -> bool:
        return self.clips_after[index] > self.clips_before[index]

    def gaining(self, model: str) -> list[GainingClass]:
        """Classes that gain clips and can be measured, by propagated labels; the greatest difference first."""
        raw, propagated = (self.per_class(model, arm) for arm in (RAW, PROPAGATED))
        made = [
            GainingClass(
                name=self.classes[index],
                clips_before=self.clips_before[index],
                clips_after=self.clips_after[index],
                raw=raw[index],
                propagated=propagated[index],
                difference=less(propagated[index], raw[index]),
            )
            for index in raw
            if self.gains(index)
        ]
        return sorted(made, key=lambda one: -one.difference.mean)

    def per_class(self, model: str, arm: str) -> dict[int, Spread]:
        """Average precision of each class that can be measured by propagated labels."""
        per_class_SC = [training.of(PROPAGATED).per_class for training in self.arm(model, arm)]
        columns = enumerate(zip(*per_class_SC, strict=True))
        return {index: Spread(values=values) for index, values in columns if None not in values}

    def mean_difference(self, model: str, *, gaining: bool) -> Spread | None:
        """Mean over the classes that gain, or over those that do not, seed by seed; None: there are none."""
        raw, propagated = (self.per_class(model, arm) for arm in (RAW, PROPAGATED))
        mine = [less(propagated[index], raw[index]) for index in raw if self.gains(index) is gaining]
        if not mine:
            return None
        by_seed = zip(*(difference.values for difference in mine), strict=True)
        return Spread(values=tuple(statistics.fmean(values) for values in by_seed))

    def table(self) -> str:
        """mAP of every model and arm, what propagation changes, and the classes it changes most; 80 columns."""
        told = self.protocol
        lines = [
            f"mAP, mean ± deviation over {len(told['seeds'])} seeds; {told['train_clips']} clips to train on, "
            f"{told['eval_clips']} measured",
            f"{'':26}" + "".join(f"{labels + ' labels':>18}" for labels in self.measured),
        ]
        for model in self.models:
            lines += [model, *self.block(model)]
        lines.append(f"{'chance':26}" + "".join(f"{self.chance(labels):18.3f}" for labels in self.measured))
        for model in self.models:
            lines += ["", *self.classes_block(model)]
        return "\n".join(lines)

    def block(self, model: str) -> list[str]:
        """A model's rows: each arm, and below it how it differs from training on raw labels."""
        lines = []
        for arm in ARMS:
            cells = [f"{self.maps(model, arm, labels):}" for labels in self.measured]
            lines.append(row(arm if arm == POSTHOC else f"trained on {arm}", cells))
            if arm != RAW:
                changes = [self.difference(model, arm, labels) for labels in self.measured]
                lines.append(row("  difference", [f"{change:+}" for change in changes]))
                lines.append(row("  seeds with more", [f"{c.up} of {len(c.values)}" for c in changes]))
        return lines

    def classes_block(self, model: str) -> list[str]:
        """Where the difference comes from: classes that gain clips against the others, and the first of them."""
        gaining = self.gaining(model)
        lines = [f"{model}: difference by propagated labels, mean over"]
        for name, gains in (("gain clips to train on", True), ("gain none", False)):
            mean = self.mean_difference(model, gaining=gains)
            count = sum(self.gains(index) is gains for index in self.per_class(model, RAW))
            lines.append(
                row(f"{count} classes that {name}", ["-" if mean is None else f"{mean:+}"], width=40)
            )
        if gaining:
            lines.append(f"  {'class':28}{'clips':>14}{'AP raw':>8}{'prop.':>8}{'difference':>18}")
        for one in gaining[:SHOWN]:
            clips = f"{one.clips_before} -> {one.clips_after}"
            aps = f"{one.raw.mean:8.3f}{one.propagated.mean:8.3f}"
            lines.append(f"  {one.name[:27]:28}{clips:>14}{aps}{f'{one.difference:+}':>18}")
        return lines

    def chance(self, labels: str) -> float:
        return self.trainings[0].of(labels).chance

    def to_json(self) -> Json:
        """Everything, and the summary that the table prints."""
        summary = {
            model: {
                "map": {a: {m: self.maps(model, a, m).to_json() for m in self.measured} for a in ARMS},
                "difference": {
                    a: {m: self.difference(model, a, m).to_json() for m in self.measured} for a in ARMS[1:]
                },
                "gaining_classes": [class_json(one) for one in self.gaining(model)],
            }
            for model in self.models
        }
        return asdict(self) | {"summary": summary}

    @classmethod
    def from_json(cls, told: Json) -> Self:
        return cls(
            protocol=told["protocol"],
            classes=tuple(told["classes"]),
            clips_before=tuple(told["clips_before"]),
            clips_after=tuple(told["clips_after"]),
            trainings=tuple(Training.from_json(training) for training in told["trainings"]),
        )


def less(one: Spread, other: Spread) -> Spread:
    """The difference, seed by seed."""
    return Spread(values=tuple(a - b for a, b in zip(one.values, other.values, strict=True)))


def row(name: str, cells: Sequence[str], *, width: int = 24) -> str:
    return f"  {name:{width}}" + "".join(f"{cell:>18}" for cell in cells)


def class_json(one: GainingClass) -> Json:
    told: dict[str, Any] = {"name": one.name, "clips": [one.clips_before, one.clips_after]}
    spreads = {"raw": one.raw, "propagated": one.propagated, "difference": one.difference}
    return told | {name: spread.to_json() for name, spread in spreads.items()}
