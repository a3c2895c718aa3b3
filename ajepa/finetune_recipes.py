"""Every named recipe of fine-tuning: what decides such a run, as one frozen value.

The papers' are A-JEPA's, which follows Audio-MAE (arXiv 2207.06405); its table gives no layer decay, 0.75 is the
default of Audio-MAE's released program. Costs are reckoned as in `recipes.py`, for a ViT-B.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ajepa.classifier import ClassifierSpec, VitSpec
from ajepa.models import MODELS, model_name
from ajepa.optimiser import AdamW
from ajepa.patches import PatchGrid
from ajepa.recipes import PIECES, CropName
from ajepa.regularised import RegularisedMasking
from ajepa.schedules import warmup_cosine
from ajepa.vit import EncoderSpec, encoder_spec
from pipeline.augment import Augment
from pipeline.errors import RunError

LossName = Literal["auto", "bce", "ce"]
HeadName = Literal["random", "probe"]
SamplingName = Literal["shuffle", "balanced", "balanced-once", "repeated"]
RATE_CLIPS = 256  # a base rate is for so many clips a step, and grows in proportion


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetune:
    """What decides a fine-tuning run, beside its task, its store and what it starts from.

    base_lr      peak rate for 256 clips a step; it is reached after `warmup_epochs` and falls by half a cosine
    layer_decay  the rate of each layer below the head is so many times that of the one above it
    head         random: drawn anew; probe: where training starts from an encoder, the linear probe on it, so that the
                 first step stands where `ajepa-train evaluate` ends
    loss         bce: of every class by itself; ce: cross-entropy over all; auto: ce where clips have one label each
    sampling     shuffle: every clip once an epoch. balanced: drawn with replacement, a clip as often as the sum over
                 its labels of 1000/(clips + 0.01); balanced-once: so, but none twice an epoch. repeated: the clips
                 of each class repeated until they are half as many as the largest class's
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
    clips_per_epoch: int = 0
    augment: Augment = Augment()  # noqa: RUF009  (frozen)
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
        names = (
            (self.head, HeadName),
            (self.loss, LossName),
            (self.sampling, SamplingName),
            (self.crop, CropName),
        )
        for value, known in names:
            if value not in get_args(known):
                raise ValueError(f"expected one of {', '.join(get_args(known))}, got {value!r}")

    def of_epochs(self, steps_per_epoch: int) -> "Finetune":
        """The recipe with as many steps as its epochs take, unless it says how many."""
        return self if self.steps else replace(self, steps=self.epochs * steps_per_epoch)

    def lr(self, step: int) -> float:
        """The head's rate of the update after `step` steps; `of_epochs` comes first."""
        return warmup_cosine(
            step,
            steps=self.steps,
            warmup_steps=self.steps * self.warmup_epochs // self.epochs,
            peak=self.base_lr * self.clips_per_step / RATE_CLIPS,
            end=self.end_lr,
        )

    def evaluated(self, done: int) -> bool:
        """Whether the held-out clips are measured after so many steps."""
        return done * self.evaluations // self.steps > (done - 1) * self.evaluations // self.steps


def vit_b(frames: int) -> VitSpec:
    """A ViT-B on so many frames of 128 bands, drop path 0.1, a tenth of the tokens masked in each layer."""
    return VitSpec(encoder=replace(encoder_spec("b", PatchGrid.of(frames, 128)), drop_path=0.1))


def audioset_20k() -> Finetune:
    """AudioSet's balanced 20k clips (A-JEPA's AS-20K), 1024 frames.

    Cost: 60 epochs of 22,160 clips, 3.5e17 FLOP, half an H100 hour. Expected (paper, ViT-B): mAP 38.4; not reproduced
    here yet.
    """
    return Finetune(
        name="audioset-20k",
        mel="a-jepa",
        model=vit_b(1024),
        base_lr=1e-3,
        epochs=60,
        warmup_epochs=4,
        clips_per_step=32,
        loss="bce",
        augment=Augment(roll=True, gain_db=3.0, time_mask_frames=192, band_mask_bands=48, mixup_share=0.5),
    )


def audioset_2m() -> Finetune:
    """All of AudioSet (A-JEPA's AS-2M): epochs of 200,000 clips drawn by class weights, none twice.

    Cost: 100 epochs, 5.2e18 FLOP, 7 H100 hours. Expected (paper, ViT-B): mAP 48.6, without regularised masking 48.1;
    not reproduced here yet.
    """
    return replace(
        audioset_20k(),
        name="audioset-2m",
        base_lr=2e-4,
        epochs=100,
        warmup_epochs=20,
        clips_per_step=512,
        sampling="balanced-once",
        clips_per_epoch=200_000,
    )


def esc50() -> Finetune:
    """ESC-50, one fold of five, 512 frames.

    Cost: 60 epochs of 1,600 clips, 1.3e16 FLOP, one H100 minute a fold. Expected (paper, ViT-B): accuracy 96.3, mean
    of the folds; not reproduced here yet.
    """
    return replace(
        audioset_20k(),
        name="esc50",
        model=vit_b(512),
        clips_per_step=64,
        loss="ce",
        augment=Augment(time_mask_frames=96, band_mask_bands=24),
    )


def speech_commands_v2() -> Finetune:
    """Speech Commands v2, 35 words (A-JEPA's SPC-2), 128 frames.

    Cost: 60 epochs of 84,843 clips, 1.7e17 FLOP, a quarter of an H100 hour. Expected (paper, ViT-B): accuracy 98.5;
    not reproduced here yet.
    """
    return replace(
        audioset_20k(),
        name="speech-commands-v2",
        model=vit_b(128),
        clips_per_step=256,
        augment=Augment(time_mask_frames=48, band_mask_bands=48, mixup_share=0.5),
    )


def speech_commands_v1() -> Finetune:
    """Speech Commands v1, ten commands and unknown (A-JEPA's SPC-1, but for its silence), 128 frames.

    Cost: 10 epochs of 195,000 clips with repetitions, 6e16 FLOP, 5 H100 minutes. Expected (paper, ViT-B, 12 classes):
    accuracy 97.7; not reproduced here yet.
    """
    made = speech_commands_v2()
    return replace(made, name="speech-commands-v1", epochs=10, warmup_epochs=1, sampling="repeated")


def voxceleb1_sid() -> Finetune:
    """VoxCeleb1's 1,251 speakers, 1024 frames.

    Cost: 60 epochs of 138,361 clips, 2.2e18 FLOP, 3 H100 hours. Expected (paper, ViT-B): accuracy 95.8; not
    reproduced here yet.
    """
    return replace(
        audioset_20k(),
        name="voxceleb1-sid",
        clips_per_step=64,
        loss="ce",
        augment=Augment(time_mask_frames=192, band_mask_bands=48),
    )


def fsd50k() -> Finetune:
    """FSD50K, 1024 frames, as AudioSet's 20k clips, to which it is nearest: A-JEPA does not report it.

    Cost: 60 epochs of 36,796 clips, 5.8e17 FLOP, 50 H100 minutes. Expected: nothing published with this recipe.
    """
    return replace(audioset_20k(), name="fsd50k")


def own() -> Finetune:
    """Any labels of your own: AudioSet's 20k recipe on views as long as the store's clips, from a probed head.

    Cost: a ViT-B needs a GPU; 1,000 clips of 10 s take 1.6e16 FLOP, two H100 minutes. Expected: depends on the clips;
    measure against `ajepa-train evaluate`, which trains nothing but probes.
    """
    return replace(audioset_20k(), name="own", loss="auto", head="probe")


def own_small() -> Finetune:
    """The same for the encoder of `small` and two CPU cores, few epochs, milder changes.

    Whole clips, for that is what labels are of and what is measured: on views of 256 frames, two and a half of the
    demo's ten seconds, five epochs took mAP from the probe's 0.60 down to 0.55.
    Cost: 0.13 s of a CPU core for a clip of 10 s; 6 epochs of 450 clips take minutes on two cores. Expected: not
    settled; `bench/finetune.py` measures it against frozen probes.
    """
    encoder = EncoderSpec(grid=PatchGrid.of(1024, 128), width=128, depth=4, heads=2)
    return Finetune(
        name="own-small",
        mel="a-jepa",
        model=VitSpec(encoder=encoder, masking=RegularisedMasking()),
        base_lr=4e-3,
        epochs=6,
        warmup_epochs=1,
        clips_per_step=16,
        head="probe",
        augment=Augment(roll=True, time_mask_frames=96, band_mask_bands=16, mixup_share=0.5),
        ema=0.99,
        evaluations=3,
        checkpoint_every=100,
    )


FINETUNES: dict[str, Callable[[], Finetune]] = {
    "audioset-20k": audioset_20k,
    "audioset-2m": audioset_2m,
    "esc50": esc50,
    "speech-commands-v2": speech_commands_v2,
    "speech-commands-v1": speech_commands_v1,
    "voxceleb1-sid": voxceleb1_sid,
    "fsd50k": fsd50k,
    "own": own,
    "own-small": own_small,
}

FINETUNE_PIECES: dict[str, type] = PIECES | {
    piece.__name__: piece
    for piece in (Finetune, Augment, RegularisedMasking, *(model.spec for model in MODELS.values()))
}


def finetune_recipe(name: str) -> Finetune:
    """The recipe of that name; RunError names the nearest and all there are."""
    if name in FINETUNES:
        return FINETUNES[name]()
    nearest = difflib.get_close_matches(name, FINETUNES, n=1, cutoff=0.0)[0]
    raise RunError(
        f"fine-tuning recipe {name!r} is unknown; did you mean {nearest!r}? There are: {', '.join(FINETUNES)}"
    )


def resized(
    recipe: Finetune, *, epochs: int | None = None, clips_per_step: int | None = None, seed: int | None = None
) -> Finetune:
    """The same recipe with other counts: the warm-up keeps its share, and the rate follows the clips of a step."""
    seed, clips = recipe.seed if seed is None else seed, clips_per_step or recipe.clips_per_step
    if epochs and epochs != recipe.epochs:
        warmup = recipe.warmup_epochs * epochs // recipe.epochs
        recipe = replace(recipe, epochs=epochs, warmup_epochs=warmup)
    return replace(recipe, seed=seed, clips_per_step=clips)


def recipe_of(model: str | None, name: str | None, task_recipe: str) -> Finetune:
    """The recipe asked for by name; else the task's own, which trains a vit; else the one named as its model is.

    RunError where there is no such model, or the recipe is one of another.
    """
    if model is not None and model not in MODELS:
        raise RunError(f"model {model!r} is unknown; there are: {', '.join(MODELS)}")
    own_name = task_recipe if model in (None, "vit") else model
    made = finetune_recipe(name or own_name or task_recipe)
    if model not in (None, model_name(made.model)):
        raise RunError(
            f"recipe {made.name} trains a {model_name(made.model)}, not a {model}; leave out one of them"
        )
    return made
