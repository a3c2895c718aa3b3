"""Finetune: what decides a run that trains a classifier, from a pre-trained encoder or from nothing."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from ajepa.classifier import ClassifierSpec
from ajepa.optimiser import AdamW
from ajepa.recipes import CropName
from ajepa.schedules import one_cycle, warmup_cosine
from pipeline.augment import Augment

LossName = Literal["auto", "bce", "ce"]
HeadName = Literal["random", "probe"]
SamplingName = Literal["shuffle", "balanced", "balanced-once", "repeated"]
RateName = Literal["cosine", "one-cycle", "constant"]
WeightsName = Literal["ast", "passt", "panns"]
RATE_CLIPS = 256  # a base rate is for so many clips a step, and grows in proportion


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetune:
    """What decides a fine-tuning run, beside its task, its store and what it starts from.

    base_lr      peak rate for 256 clips a step
    rate         cosine: straight up during `warmup_epochs`, then down by half a cosine; one-cycle: half a cosine up,
                 from a 25th, and one down; constant: the peak from the first step to the last
    layer_decay  the rate of each layer below the head is so many times that of the one above it
    head         random: drawn anew; probe: where training starts from an encoder, the linear probe on it, so that the
                 first step stands where `ajepa-train evaluate` ends
    loss         bce: of every class by itself; ce: cross-entropy over all; auto: ce where clips have one label each
    sampling     shuffle: every clip once an epoch. balanced: drawn with replacement, a clip as often as the sum over
                 its labels says (`weights`, a scheme of `pipeline.weights`); balanced-once: so, but none twice an
                 epoch. repeated: the clips of each class repeated until they are half as many as the largest class's
    clips_per_epoch  0: as many as there are to train on
    ema          above 0: what is measured is a moving average of the weights that keeps so much of itself a step,
                 less in the first steps: (1 + step) / (10 + step) at most
    steps        0: as many as `epochs` take, which is known when the store is; written into the run
    evaluations  times at which the held-out clips are measured, evenly spread; the last one is the end
    """

    name: str
    mel: str
    model: ClassifierSpec
    base_lr: float
    epochs: int
    warmup_epochs: int
    clips_per_step: int
    head: HeadName = "random"
    loss: LossName = "auto"
    sampling: SamplingName = "shuffle"
    weights: WeightsName = "ast"
    clips_per_epoch: int = 0
    augment: Augment = Augment()  # noqa: RUF009  (frozen)
    rate: RateName = "cosine"
    end_lr: float = 1e-6
    layer_decay: float = 0.75
    ema: float = 0.0
    optimiser: AdamW = AdamW(weight_decay=1e-4)
    crop: CropName = "random"
    seed: int = 0
    steps: int = 0
    evaluations: int = 10
    log_every: int = 10  # steps
    checkpoint_every: int = 1_000  # steps
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        counts = (self.epochs, self.clips_per_step, self.evaluations, self.log_every, self.checkpoint_every)
        if min(*counts, self.keep_checkpoints) < 1 or min(self.steps, self.clips_per_epoch) < 0:
            raise ValueError(
                "epochs, clips and intervals must be at least 1, steps and clips_per_epoch 0 or more"
            )
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"the warm-up must end before the run: {self.warmup_epochs} of {self.epochs} epochs"
            )
        if not (min(self.base_lr, self.end_lr) >= 0 and 0 < self.layer_decay <= 1 and 0 <= self.ema < 1):
            told = f"{self.base_lr}, {self.end_lr}, {self.layer_decay} and {self.ema}"
            raise ValueError(
                f"rates of 0 or more, layer_decay in (0, 1], ema in [0, 1) are expected, got {told}"
            )
        words = ((self.loss, LossName), (self.sampling, SamplingName), (self.weights, WeightsName))
        for value, known in (*words, (self.rate, RateName), (self.crop, CropName), (self.head, HeadName)):
            if value not in get_args(known):
                raise ValueError(f"expected one of {', '.join(get_args(known))}, got {value!r}")

    def of_epochs(self, steps_per_epoch: int) -> "Finetune":
        """The recipe with as many steps as its epochs take, unless it says how many."""
        return self if self.steps else replace(self, steps=self.epochs * steps_per_epoch)

    def lr(self, step: int) -> float:
        """The head's rate of the update after `step` steps; `of_epochs` comes first."""
        peak = self.base_lr * self.clips_per_step / RATE_CLIPS
        if self.rate == "constant":
            return peak
        warmup_steps = self.steps * self.warmup_epochs // self.epochs
        if self.rate == "one-cycle":
            return one_cycle(step, steps=self.steps, warmup_steps=warmup_steps, peak=peak, end=self.end_lr)
        return warmup_cosine(step, steps=self.steps, warmup_steps=warmup_steps, peak=peak, end=self.end_lr)

    def evaluated(self, done: int) -> bool:
        """Whether the held-out clips are measured after so many steps."""
        return done * self.evaluations // self.steps > (done - 1) * self.evaluations // self.steps
