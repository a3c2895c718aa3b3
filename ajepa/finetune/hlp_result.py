"""The study of label propagation as numbers: scores of every training, differences paired by seed, the table."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

from ajepa.training.run import Json

# Kinds of labels, and the arms of the study: trained on the first, on the second, or on the first with the scores
# propagated afterwards.
RAW_LABELS = "raw"
PROPAGATED_LABELS = "propagated"
POSTHOC_SCORES = "raw, scores propagated"

FSD50K_LABELS = "FSD50K"  # a kind of labels that is only measured

STUDY_ARMS = (RAW_LABELS, PROPAGATED_LABELS, POSTHOC_SCORES)

SHOWN_HLP_CLASSES = 10  # classes in the printed table; all are in the JSON


@dataclass(frozen=True, kw_only=True, slots=True)
class HlpScore:
    """mAP against one kind of labels, and the average precision of each class; None where no clip has the class."""

    labels: str
    map: float
    chance: float
    per_class: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class HlpTraining:
    """The scores of one training on an arm of the study."""

    model: str
    arm: str
    seed: int
    scores: tuple[HlpScore, ...]

    def score_against(self, labels: str) -> HlpScore:
        """The score by one kind of labels."""
        return next(score for score in self.scores if score.labels == labels)

    @classmethod
    def from_json(cls, record: Json) -> Self:
        scores = [HlpScore(**score | {"per_class": tuple(score["per_class"])}) for score in record["scores"]]
        return cls(**record | {"scores": tuple(scores)})


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedSpread:
    """One number for each seed: mean, sample deviation (nan for a single seed), and how many are above 0."""

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
        """`mean ± deviation`, the mean with a sign where `sign` is +; the mean alone for a single seed."""
        mean = f"{self.mean:{sign}.3f}"
        return mean if math.isnan(self.deviation) else f"{mean} ± {self.deviation:.3f}"

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
    """A class that propagation gives more clips to train on, and its average precision on either kind of labels."""

    name: str
    clips_before: int
    clips_after: int
    raw: SeedSpread
    propagated: SeedSpread
    difference: SeedSpread


@dataclass(frozen=True, kw_only=True, slots=True)
class HlpResult:
    """Every training of a study, with the protocol that produced it.

    classes       names, in the order of each score's classes (of the store, not of FSD50K)
    clips_before  clips to train on that have each class by their raw labels
    clips_after   the same by propagated labels
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
        """The kinds of labels that there are scores for."""
        return [score.labels for score in self.trainings[0].scores]

    def arm_trainings(self, model: str, arm: str) -> list[HlpTraining]:
        """Trainings of a model on an arm, by seed."""
        of_arm = [training for training in self.trainings if (training.model, training.arm) == (model, arm)]
        return sorted(of_arm, key=lambda training: training.seed)

    def map_spread(self, model: str, arm: str, labels: str) -> SeedSpread:
        """mAP of an arm, seed by seed."""
        return SeedSpread(
            values=tuple(training.score_against(labels).map for training in self.arm_trainings(model, arm))
        )

    def map_difference(self, model: str, arm: str, labels: str) -> SeedSpread:
        """mAP of an arm less that of training on raw labels, seed by seed: easy and hard seeds cancel out."""
        return subtract_spreads(
            self.map_spread(model, arm, labels), self.map_spread(model, RAW_LABELS, labels)
        )

    def has_more_clips(self, index: int) -> bool:
        """Whether propagation gives the class more clips to train on."""
        return self.clips_after[index] > self.clips_before[index]

    def gaining_classes(self, model: str) -> list[GainingClass]:
        """The classes that gain clips and can be measured by propagated labels; the greatest difference first."""
        raw = self.class_spreads(model, RAW_LABELS)
        propagated = self.class_spreads(model, PROPAGATED_LABELS)
        gaining = [
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
        return sorted(gaining, key=lambda gained: -gained.difference.mean)

    def class_spreads(self, model: str, arm: str) -> dict[int, SeedSpread]:
        """Average precision of each class that can be measured by propagated labels, by the class's index."""
        per_class_of_seed = [
            training.score_against(PROPAGATED_LABELS).per_class for training in self.arm_trainings(model, arm)
        ]
        values_of_class = enumerate(zip(*per_class_of_seed, strict=True))
        return {index: SeedSpread(values=values) for index, values in values_of_class if None not in values}

    def mean_difference(self, model: str, *, gaining: bool) -> SeedSpread | None:
        """Mean over the classes that gain, or over those that do not, seed by seed; None: there are none."""
        raw = self.class_spreads(model, RAW_LABELS)
        propagated = self.class_spreads(model, PROPAGATED_LABELS)
        differences = [
            subtract_spreads(propagated[index], raw[index])
            for index in raw
            if self.has_more_clips(index) is gaining
        ]
        if not differences:
            return None
        by_seed = zip(*(difference.values for difference in differences), strict=True)
        return SeedSpread(values=tuple(statistics.fmean(values) for values in by_seed))

    def format_table(self) -> str:
        """mAP of every model and arm, what propagation changes, and the classes it changes most; 80 columns."""
        # Head: how it was measured, and a column for each kind of labels.
        protocol = self.protocol
        lines = [
            f"mAP, mean ± deviation over {len(protocol['seeds'])} seeds; {protocol['train_clips']} clips to train on, "
            f"{protocol['eval_clips']} measured",
            f"{'':26}" + "".join(f"{labels + ' labels':>18}" for labels in self.label_kinds),
        ]

        # mAP of every model, and of guessing.
        for model in self.model_names:
            lines += [model, *self.format_model_rows(model)]
        chances = "".join(f"{self.chance_map(labels):18.3f}" for labels in self.label_kinds)
        lines.append(f"{'chance':26}{chances}")

        # The classes behind the differences.
        for model in self.model_names:
            lines += ["", *self.format_class_rows(model)]
        return "\n".join(lines)

    def format_model_rows(self, model: str) -> list[str]:
        """A model's rows: each arm, and below it its difference from training on raw labels."""
        rows = []
        for arm in STUDY_ARMS:
            spreads = [f"{self.map_spread(model, arm, labels):}" for labels in self.label_kinds]
            rows.append(format_table_row(arm if arm == POSTHOC_SCORES else f"trained on {arm}", spreads))
            if arm != RAW_LABELS:
                changes = [self.map_difference(model, arm, labels) for labels in self.label_kinds]
                seeds = [f"{change.positive_count} of {len(change.values)}" for change in changes]
                rows.append(format_table_row("  difference", [f"{change:+}" for change in changes]))
                rows.append(format_table_row("  seeds with more", seeds))
        return rows

    def format_class_rows(self, model: str) -> list[str]:
        """A model's rows about classes: those that gain clips against the others, and the first of those."""
        # Means over both groups of classes.
        rows = [f"{model}: difference by propagated labels, mean over"]
        measured = self.class_spreads(model, RAW_LABELS)
        for gain, is_gaining in (("gain clips to train on", True), ("gain none", False)):
            count = sum(self.has_more_clips(index) is is_gaining for index in measured)
            mean = self.mean_difference(model, gaining=is_gaining)
            cell = "-" if mean is None else f"{mean:+}"
            rows.append(format_table_row(f"{count} classes that {gain}", [cell], width=40))

        # Single classes.
        gaining = self.gaining_classes(model)
        if gaining:
            rows.append(f"  {'class':28}{'clips':>14}{'AP raw':>8}{'prop.':>8}{'difference':>18}")
        for gained in gaining[:SHOWN_HLP_CLASSES]:
            clips = f"{gained.clips_before} -> {gained.clips_after}"
            precisions = f"{gained.raw.mean:8.3f}{gained.propagated.mean:8.3f}"
            difference = f"{gained.difference:+}"
            rows.append(f"  {gained.name[:27]:28}{clips:>14}{precisions}{difference:>18}")
        return rows

    def chance_map(self, labels: str) -> float:
        """mAP of guessing, by one kind of labels."""
        return self.trainings[0].score_against(labels).chance

    def to_json(self) -> Json:
        """All fields, and the summary that the table prints."""
        return asdict(self) | {"summary": {model: self.model_summary(model) for model in self.model_names}}

    def model_summary(self, model: str) -> Json:
        """A model's mAP and differences by arm and kind of labels, and the classes that gain clips."""
        return {
            "map": {
                arm: {labels: self.map_spread(model, arm, labels).to_json() for labels in self.label_kinds}
                for arm in STUDY_ARMS
            },
            "difference": {
                arm: {
                    labels: self.map_difference(model, arm, labels).to_json() for labels in self.label_kinds
                }
                for arm in STUDY_ARMS
                if arm != RAW_LABELS
            },
            "gaining_classes": [gaining_class_json(gained) for gained in self.gaining_classes(model)],
        }

    @classmethod
    def from_json(cls, record: Json) -> Self:
        return cls(
            protocol=record["protocol"],
            classes=tuple(record["classes"]),
            clips_before=tuple(record["clips_before"]),
            clips_after=tuple(record["clips_after"]),
            trainings=tuple(HlpTraining.from_json(training) for training in record["trainings"]),
        )


def subtract_spreads(spread: SeedSpread, other: SeedSpread) -> SeedSpread:
    """`spread` less `other`, seed by seed."""
    pairs = zip(spread.values, other.values, strict=True)
    return SeedSpread(values=tuple(value - other_value for value, other_value in pairs))


def format_table_row(name: str, cells: Sequence[str], *, width: int = 24) -> str:
    """A row of the table: its name, and cells of 18 columns."""
    return f"  {name:{width}}" + "".join(f"{cell:>18}" for cell in cells)


def gaining_class_json(gained: GainingClass) -> Json:
    """A class that gains clips, for the summary."""
    return {
        "name": gained.name,
        "clips": [gained.clips_before, gained.clips_after],
        "raw": gained.raw.to_json(),
        "propagated": gained.propagated.to_json(),
        "difference": gained.difference.to_json(),
    }
