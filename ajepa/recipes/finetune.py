"""Recipes of fine-tuning: a recipe is a frozen value with a name that sets everything about training a classifier.

The papers' recipes are A-JEPA's (arXiv 2311.15830), which follow Audio-MAE (arXiv 2207.06405). A-JEPA's table gives no
layer decay; 0.75 is the default of Audio-MAE's released code. Costs are estimated as in `recipes/pretrain.py`, for a
ViT-B.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from ajepa.model.classifier import ClassifierSpec, VitSpec
from ajepa.model.patches import PatchGrid
from ajepa.model.vit import EncoderSpec, a_jepa_encoder
from ajepa.recipes.optimiser import AdamW, one_cycle, warmup_cosine
from ajepa.recipes.pretrain import CropName, refuse_two_lengths
from pipeline.loading.augment import Augment

ClassLossName = Literal["auto", "bce", "ce"]

HeadInitName = Literal["random", "probe"]

SamplingName = Literal["shuffle", "balanced", "balanced-once", "repeated"]

RateName = Literal["cosine", "one-cycle", "constant"]

ClassWeightsName = Literal["ast", "passt", "panns"]

# A base rate is the rate for this many clips per step; the rate is proportional to the clips per step.
BASE_RATE_CLIPS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetune:
    """The recipe of a fine-tuning run; the task, the store and the pretrained encoder are arguments, not part of it.

    base_lr      peak learning rate for 256 clips per step
    rate         schedule of the learning rate. cosine: linear up during `warmup_epochs`, then half a cosine down.
                 one-cycle: half a cosine up from a 25th of the peak, then half a cosine down. constant: always the
                 peak
    layer_decay  factor of the learning rate from each layer to the layer below it, starting at the head
    head         initial weights of the head. random: drawn anew. probe: the weights of a linear probe on the
                 pretrained encoder, so that training starts from the result of `ajepa-train evaluate`; random still
                 where the probe has the higher loss on clips as training shows them
    loss         bce: binary cross-entropy of each class. ce: cross-entropy over all classes. auto: ce if every clip
                 has one label, else bce
    sampling     order of the clips. shuffle: every clip once per epoch. balanced: drawn with replacement; the
                 probability of a clip is proportional to the sum of its labels' weights (`weights`, a scheme of
                 `pipeline.loading.class_weights`). balanced-once: the same, but no clip twice per epoch. repeated:
                 the clips of each class are repeated until the class has half the clips of the largest class
    clips_per_epoch  clips in an epoch; 0: the number of training clips
    ema          momentum per step of a moving average of the weights, which is then evaluated in their place; 0: no
                 average. In the first steps the momentum is at most (1 + step) / (10 + step)
    steps        training steps; 0: the steps of `epochs` epochs, computed when the store is opened and written into
                 the run
    evaluations  number of evaluations on the held-out clips, evenly spaced over the run; the last is at its end
    """

    name: str
    mel: str
    model: ClassifierSpec
    base_lr: float
    epochs: int
    warmup_epochs: int
    clips_per_step: int
    head: HeadInitName = "random"
    loss: ClassLossName = "auto"
    sampling: SamplingName = "shuffle"
    weights: ClassWeightsName = "ast"
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
        # Counts.
        counts = (self.epochs, self.clips_per_step, self.evaluations, self.log_every, self.checkpoint_every)
        if min(*counts, self.keep_checkpoints) < 1 or min(self.steps, self.clips_per_epoch) < 0:
            raise ValueError(
                "epochs, clips and intervals must be at least 1, steps and clips_per_epoch 0 or more"
            )
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"the warm-up must end before the run: {self.warmup_epochs} of {self.epochs} epochs"
            )

        # Rates.
        if not (min(self.base_lr, self.end_lr) >= 0 and 0 < self.layer_decay <= 1 and 0 <= self.ema < 1):
            raise ValueError(
                "rates of 0 or more, layer_decay in (0, 1], ema in [0, 1) are expected, "
                f"got {self.base_lr}, {self.end_lr}, {self.layer_decay} and {self.ema}"
            )

        # Choices.
        for value, known in (
            (self.loss, ClassLossName),
            (self.sampling, SamplingName),
            (self.weights, ClassWeightsName),
            (self.rate, RateName),
            (self.crop, CropName),
            (self.head, HeadInitName),
        ):
            if value not in get_args(known):
                raise ValueError(f"expected one of {', '.join(get_args(known))}, got {value!r}")

    def with_step_count(self, steps_per_epoch: int) -> "Finetune":
        """Return the recipe with `steps` set to the steps of its epochs, unless `steps` is already set."""
        return self if self.steps else replace(self, steps=self.epochs * steps_per_epoch)

    def learning_rate(self, step: int) -> float:
        """Return the head's learning rate of the update after `step` steps; call `with_step_count` before."""
        peak = self.base_lr * self.clips_per_step / BASE_RATE_CLIPS
        if self.rate == "constant":
            return peak
        warmup_steps = self.steps * self.warmup_epochs // self.epochs
        if self.rate == "one-cycle":
            return one_cycle(step, steps=self.steps, warmup_steps=warmup_steps, peak=peak, end=self.end_lr)
        return warmup_cosine(step, steps=self.steps, warmup_steps=warmup_steps, peak=peak, end=self.end_lr)

    def is_evaluation_step(self, done: int) -> bool:
        """Return whether the model is evaluated on the held-out clips after `done` steps."""
        return done * self.evaluations // self.steps > (done - 1) * self.evaluations // self.steps


def vit_b_spec(frames: int) -> VitSpec:
    """Return a ViT-B for `frames` frames of 128 bands: drop path 0.1, a tenth of the tokens masked in each layer."""
    return VitSpec(encoder=replace(a_jepa_encoder("b", PatchGrid.from_size(frames, 128)), drop_path=0.1))


def audioset_20k_recipe() -> Finetune:
    """AudioSet's balanced 20k clips (A-JEPA's AS-20K), 1024 frames.

    Cost: 60 epochs of 22,160 clips, 3.5e17 FLOP, half an H100 hour. Expected (paper, ViT-B): mAP 38.4; not reproduced
    here yet.
    """
    return Finetune(
        name="audioset-20k",
        mel="a-jepa",
        model=vit_b_spec(1024),
        base_lr=1e-3,
        epochs=60,
        warmup_epochs=4,
        clips_per_step=32,
        loss="bce",
        augment=Augment(roll=True, gain_db=3.0, time_mask_frames=192, band_mask_bands=48, mixup_share=0.5),
    )


def audioset_2m_recipe() -> Finetune:
    """All of AudioSet (A-JEPA's AS-2M): epochs of 200,000 clips drawn by class weights, no clip twice per epoch.

    Cost: 100 epochs, 5.2e18 FLOP, 7 H100 hours. Expected (paper, ViT-B): mAP 48.6 (48.1 without regularised masking);
    not reproduced here yet.
    """
    return replace(
        audioset_20k_recipe(),
        name="audioset-2m",
        base_lr=2e-4,
        epochs=100,
        warmup_epochs=20,
        clips_per_step=512,
        sampling="balanced-once",
        clips_per_epoch=200_000,
    )


def esc50_recipe() -> Finetune:
    """ESC-50, one fold of five, 512 frames.

    Cost: 60 epochs of 1,600 clips, 1.3e16 FLOP, one H100 minute a fold. Expected (paper, ViT-B): accuracy 96.3, mean
    of the folds; not reproduced here yet.
    """
    return replace(
        audioset_20k_recipe(),
        name="esc50",
        model=vit_b_spec(512),
        clips_per_step=64,
        loss="ce",
        augment=Augment(time_mask_frames=96, band_mask_bands=24),
    )


def speech_commands_v2_recipe() -> Finetune:
    """Speech Commands v2, 35 words (A-JEPA's SPC-2), 128 frames.

    Cost: 60 epochs of 84,843 clips, 1.7e17 FLOP, a quarter of an H100 hour. Expected (paper, ViT-B): accuracy 98.5;
    not reproduced here yet.
    """
    return replace(
        audioset_20k_recipe(),
        name="speech-commands-v2",
        model=vit_b_spec(128),
        clips_per_step=256,
        augment=Augment(time_mask_frames=48, band_mask_bands=48, mixup_share=0.5),
    )


def speech_commands_v1_recipe() -> Finetune:
    """Speech Commands v1, ten commands and `unknown` (A-JEPA's SPC-1 without its class `silence`), 128 frames.

    Cost: 10 epochs of 195,000 clips with repetitions, 6e16 FLOP, 5 H100 minutes. Expected (paper, ViT-B, 12 classes):
    accuracy 97.7; not reproduced here yet.
    """
    return replace(
        speech_commands_v2_recipe(),
        name="speech-commands-v1",
        epochs=10,
        warmup_epochs=1,
        sampling="repeated",
    )


def voxceleb1_sid_recipe() -> Finetune:
    """VoxCeleb1's 1,251 speakers, 1024 frames.

    Cost: 60 epochs of 138,361 clips, 2.2e18 FLOP, 3 H100 hours. Expected (paper, ViT-B): accuracy 95.8; not
    reproduced here yet.
    """
    return replace(
        audioset_20k_recipe(),
        name="voxceleb1-sid",
        clips_per_step=64,
        loss="ce",
        augment=Augment(time_mask_frames=192, band_mask_bands=48),
    )


def fsd50k_recipe() -> Finetune:
    """FSD50K, 1024 frames, with the settings of AudioSet-20k, the most similar task: A-JEPA does not report FSD50K.

    Cost: 60 epochs of 36,796 clips, 5.8e17 FLOP, 50 H100 minutes. Expected: nothing published with this recipe.
    """
    return replace(audioset_20k_recipe(), name="fsd50k")


def own_labels_recipe() -> Finetune:
    """Your own labels: the AudioSet-20k recipe on views as long as the store's clips; the head starts as a probe.

    Pooling is by moments, which improved probes of small encoders most (`bench/finetune.py`).
    Cost: a ViT-B needs a GPU; 1,000 clips of 10 s take 1.6e16 FLOP, two H100 minutes. Expected: depends on the clips;
    compare with `ajepa-train evaluate`, which trains only probes.
    """
    model = replace(vit_b_spec(1024), pooling="moments")
    return replace(audioset_20k_recipe(), name="own", model=model, loss="auto", head="probe")


def own_small_recipe() -> Finetune:
    """The `own` recipe for the encoder of `small` and two CPU cores, on views of 2.5 s as in its pre-training.

    Cost: 4 CPU minutes for 450 clips of 10 s. Expected: mAP .785 on the demo corpus; the probe at its start has .771,
    and the same recipe from random weights .761 (`bench/finetune.py`).
    """
    encoder = EncoderSpec(grid=PatchGrid.from_size(256, 128), width=128, depth=4, heads=2)
    return Finetune(
        name="own-small",
        mel="a-jepa",
        model=VitSpec(encoder=encoder, pooling="moments"),
        base_lr=1.6e-2,
        epochs=36,
        warmup_epochs=6,
        clips_per_step=16,
        head="probe",
        augment=Augment(roll=True, time_mask_frames=96, band_mask_bands=16, mixup_share=0.5),
        ema=0.99,
        evaluations=3,
        checkpoint_every=100,
    )


def finetune_with_counts(
    recipe: Finetune,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    clips_per_step: int | None = None,
    seed: int | None = None,
) -> Finetune:
    """Return the recipe with other counts: the warm-up keeps its share, and the rate is scaled by the clips per step.

    Given epochs replace a number of steps in the recipe, and given steps replace its epochs; RunError if both are
    given.
    """
    refuse_two_lengths(steps, epochs)

    # Given epochs replace a number of steps, even if they equal the recipe's epochs.
    if epochs and (epochs != recipe.epochs or recipe.steps):
        warmup = recipe.warmup_epochs * epochs // recipe.epochs
        recipe = replace(recipe, epochs=epochs, warmup_epochs=warmup, steps=0)
    if steps:
        recipe = replace(recipe, steps=steps)

    # `learning_rate` scales the rate by the clips per step; nothing to change here.
    return replace(
        recipe,
        seed=recipe.seed if seed is None else seed,
        clips_per_step=clips_per_step or recipe.clips_per_step,
    )
