"""The study of label propagation as numbers: scores of every training, differences paired by seed, the table."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from ajepa.training.run import Json

RAW_LABELS, PROPAGATED_LABELS, POSTHOC_SCORES = "raw", "propagated", "raw, scores propagated"

STUDY_ARMS = (RAW_LABELS, PROPAGATED_LABELS, POSTHOC_SCORES)

SHOWN_HLP_CLASSES = 10  # classes in the printed table; all are in the JSON


@dataclass(frozen=True, kw_only=True, slots=True)
class HlpScore:
    """mAP against one kind of labels, over the classes that have a positive there; the others are None."""

    labels: str
    map: float
    chance: float
    per_class: tuple[float | None, ...]

    @property
    def scored_class_count(self) -> int:
        return sum(value is not None for value in self.per_class)


@dataclass(frozen=True, kw_only=True, slots=True)
class HlpTraining:
    """What one training reached; `arm` says on which labels, or that its scores were propagated afterwards."""

    model: str
    arm: str
    seed: int
    scores: tuple[HlpScore, ...]

    def score_against(self, labels: str) -> HlpScore:
        return next(score for score in self.scores if score.labels == labels)

    @classmethod
    def from_json(cls, record: Json) -> Self:
        scores = [HlpScore(**score | {"per_class": tuple(score["per_class"])}) for score in record["scores"]]
        return cls(**record | {"scores": tuple(scores)})


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedSpread:
    """Mean and sample deviation of one number over seeds, and in how many it is above 0; no deviation of one."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def positive_count(self) -> int:
        return sum(value > 0 for value in self.values)

    def __format__(self, sign: str) -> str:
        told = f"{self.mean:{sign}.3f}"
        return told if math.isnan(self.deviation) else f"{told} ± {self.deviation:.3f}"

    def to_json(self) -> Json:
        deviation = None if math.isnan(self.deviation) else self.deviation
        return {
            "mean": self.mean,
            "deviation": deviation,
            "up": self.positive_count,
            "values": list(self.values),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class GainingClass:
    """A class that propagation gives more clips to train on: what that changes in its average precision."""

    name: str
    clips_before: int
    clips_after: int
    raw: SeedSpread
    propagated: SeedSpread
    difference: SeedSpread


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
    trainings: tuple[HlpTraining, ...]

    @property
    def model_names(self) -> list[str]:
        return list(dict.fromkeys(training.model for training in self.trainings))

    @property
    def label_kinds(self) -> list[str]:
        """The kinds of labels that scores are of."""
        return [score.labels for score in self.trainings[0].scores]

    def arm_trainings(self, model: str, arm: str) -> list[HlpTraining]:
        """Trainings of a model on an arm, by seed."""
        mine = [t for t in self.trainings if (t.model, t.arm) == (model, arm)]
        return sorted(mine, key=lambda training: training.seed)

    def map_spread(self, model: str, arm: str, labels: str) -> SeedSpread:
        return SeedSpread(
            values=tuple(training.score_against(labels).map for training in self.arm_trainings(model, arm))
        )

    def map_difference(self, model: str, arm: str, labels: str) -> SeedSpread:
        """mAP of an arm less that of training on raw labels, seed by seed: what both share falls out."""
        pairs = zip(self.arm_trainings(model, arm), self.arm_trainings(model, RAW_LABELS), strict=True)
        return SeedSpread(
            values=tuple(one.score_against(labels).map - raw.score_against(labels).map for one, raw in pairs)
        )

    def has_more_clips(self, index: int) -> bool:
        return self.clips_after[index] > self.clips_before[index]

    def gaining_classes(self, model: str) -> list[GainingClass]:
        """Classes that gain clips and can be measured, by propagated labels; the greatest difference first."""
        raw, propagated = (self.class_spreads(model, arm) for arm in (RAW_LABELS, PROPAGATED_LABELS))
        made = [
            GainingClass(
                name=self.classes[index],
                clips_before=self.clips_before[index],
                clips_after=self.clips_after[index],
                raw=raw[index],
                propagated=propagated[index],
                difference=subtract_spreads(propagated[index], raw[index]),
            )
            for index in raw
            if self.has_more_clips(index)
        ]
        return sorted(made, key=lambda one: -one.difference.mean)

    def class_spreads(self, model: str, arm: str) -> dict[int, SeedSpread]:
        """Average precision of each class that can be measured by propagated labels."""
        per_class_SC = [
            training.score_against(PROPAGATED_LABELS).per_class for training in self.arm_trainings(model, arm)
        ]
        columns = enumerate(zip(*per_class_SC, strict=True))
        return {index: SeedSpread(values=values) for index, values in columns if None not in values}

    def mean_difference(self, model: str, *, gaining: bool) -> SeedSpread | None:
        """Mean over the classes that gain, or over those that do not, seed by seed; None: there are none."""
        raw, propagated = (self.class_spreads(model, arm) for arm in (RAW_LABELS, PROPAGATED_LABELS))
        mine = [
            subtract_spreads(propagated[index], raw[index])
            for index in raw
            if self.has_more_clips(index) is gaining
        ]
        if not mine:
            return None
        by_seed = zip(*(difference.values for difference in mine), strict=True)
        return SeedSpread(values=tuple(statistics.fmean(values) for values in by_seed))

    def format_table(self) -> str:
        """mAP of every model and arm, what propagation changes, and the classes it changes most; 80 columns."""
        told = self.protocol
        lines = [
            f"mAP, mean ± deviation over {len(told['seeds'])} seeds; {told['train_clips']} clips to train on, "
            f"{told['eval_clips']} measured",
            f"{'':26}" + "".join(f"{labels + ' labels':>18}" for labels in self.label_kinds),
        ]
        for model in self.model_names:
            lines += [model, *self.format_model_rows(model)]
        lines.append(
            f"{'chance':26}" + "".join(f"{self.chance_map(labels):18.3f}" for labels in self.label_kinds)
        )
        for model in self.model_names:
            lines += ["", *self.format_class_rows(model)]
        return "\n".join(lines)

    def format_model_rows(self, model: str) -> list[str]:
        """A model's rows: each arm, and below it how it differs from training on raw labels."""
        lines = []
        for arm in STUDY_ARMS:
            cells = [f"{self.map_spread(model, arm, labels):}" for labels in self.label_kinds]
            lines.append(format_table_row(arm if arm == POSTHOC_SCORES else f"trained on {arm}", cells))
            if arm != RAW_LABELS:
                changes = [self.map_difference(model, arm, labels) for labels in self.label_kinds]
                lines.append(format_table_row("  difference", [f"{change:+}" for change in changes]))
                lines.append(
                    format_table_row(
                        "  seeds with more", [f"{c.positive_count} of {len(c.values)}" for c in changes]
                    )
                )
        return lines

    def format_class_rows(self, model: str) -> list[str]:
        """Where the difference comes from: classes that gain clips against the others, and the first of them."""
        gaining = self.gaining_classes(model)
        lines = [f"{model}: difference by propagated labels, mean over"]
        for name, gains in (("gain clips to train on", True), ("gain none", False)):
            mean = self.mean_difference(model, gaining=gains)
            count = sum(
                self.has_more_clips(index) is gains for index in self.class_spreads(model, RAW_LABELS)
            )
            lines.append(
                format_table_row(
                    f"{count} classes that {name}", ["-" if mean is None else f"{mean:+}"], width=40
                )
            )
        if gaining:
            lines.append(f"  {'class':28}{'clips':>14}{'AP raw':>8}{'prop.':>8}{'difference':>18}")
        for one in gaining[:SHOWN_HLP_CLASSES]:
            clips = f"{one.clips_before} -> {one.clips_after}"
            aps = f"{one.raw.mean:8.3f}{one.propagated.mean:8.3f}"
            lines.append(f"  {one.name[:27]:28}{clips:>14}{aps}{f'{one.difference:+}':>18}")
        return lines

    def chance_map(self, labels: str) -> float:
        return self.trainings[0].score_against(labels).chance

    def to_json(self) -> Json:
        """Everything, and the summary that the table prints."""
        summary = {
            model: {
                "map": {
                    a: {m: self.map_spread(model, a, m).to_json() for m in self.label_kinds}
                    for a in STUDY_ARMS
                },
                "difference": {
                    a: {m: self.map_difference(model, a, m).to_json() for m in self.label_kinds}
                    for a in STUDY_ARMS[1:]
                },
                "gaining_classes": [gaining_class_json(one) for one in self.gaining_classes(model)],
            }
            for model in self.model_names
        }
        return asdict(self) | {"summary": summary}

    @classmethod
    def from_json(cls, record: Json) -> Self:
        return cls(
            protocol=record["protocol"],
            classes=tuple(record["classes"]),
            clips_before=tuple(record["clips_before"]),
            clips_after=tuple(record["clips_after"]),
            trainings=tuple(HlpTraining.from_json(training) for training in record["trainings"]),
        )


def subtract_spreads(one: SeedSpread, other: SeedSpread) -> SeedSpread:
    """The difference, seed by seed."""
    return SeedSpread(values=tuple(a - b for a, b in zip(one.values, other.values, strict=True)))


def format_table_row(name: str, cells: Sequence[str], *, width: int = 24) -> str:
    return f"  {name:{width}}" + "".join(f"{cell:>18}" for cell in cells)


def gaining_class_json(one: GainingClass) -> Json:
    told: dict[str, Any] = {"name": one.name, "clips": [one.clips_before, one.clips_after]}
    spreads = {"raw": one.raw, "propagated": one.propagated, "difference": one.difference}
    return told | {name: spread.to_json() for name, spread in spreads.items()}
