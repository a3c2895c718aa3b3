"""Every named recipe of fine-tuning: what decides such a run, as one frozen value.

The papers' are A-JEPA's, which follows Audio-MAE (arXiv 2207.06405); its table gives no layer decay, 0.75 is the
default of Audio-MAE's released program. Costs are reckoned as in `recipes.py`, for a ViT-B.
"""

import difflib
from collections.abc import Callable
from dataclasses import replace

from ajepa.classifier import VitSpec
from ajepa.finetuning import Finetune
from ajepa.models import MODELS, model_name
from ajepa.patches import PatchGrid
from ajepa.recipes import PIECES, RECIPES
from ajepa.regularised import RegularisedMasking
from ajepa.supervised_recipes import SUPERVISED
from ajepa.vit import EncoderSpec, encoder_spec
from pipeline.augment import Augment
from pipeline.errors import RunError


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

    Pooled by moments, which probes of small encoders gained most from (`bench/finetune.py`).
    Cost: a ViT-B needs a GPU; 1,000 clips of 10 s take 1.6e16 FLOP, two H100 minutes. Expected: depends on the clips;
    measure against `ajepa-train evaluate`, which trains nothing but probes.
    """
    model = replace(vit_b(1024), pooling="moments")
    return replace(audioset_20k(), name="own", model=model, loss="auto", head="probe")


def own_small() -> Finetune:
    """The same for the encoder of `small` and two CPU cores, on 2.5 s at a time, as that was pre-trained.

    Cost: 4 CPU minutes for 450 clips of 10 s. Expected: mAP .785 on the demo corpus, where the probe it starts from has
    .771 and the same from random weights .761 (`bench/finetune.py`).
    """
    encoder = EncoderSpec(grid=PatchGrid.of(256, 128), width=128, depth=4, heads=2)
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
    **SUPERVISED,
}

FINETUNE_PIECES: dict[str, type] = PIECES | {
    piece.__name__: piece
    for piece in (Finetune, Augment, RegularisedMasking, *(model.spec for model in MODELS.values()))
}


def finetune_recipe(name: str) -> Finetune:
    """The recipe of that name; RunError names the nearest and all there are."""
    if name in FINETUNES:
        return FINETUNES[name]()
    if name in RECIPES:
        told = f"recipe {name!r} pre-trains: ajepa-train pretrain --recipe {name}"
        raise RunError(f"{told}; to fine-tune there are: {', '.join(FINETUNES)}")
    nearest = difflib.get_close_matches(name, FINETUNES, n=1, cutoff=0.0)[0]
    raise RunError(
        f"fine-tuning recipe {name!r} is unknown; did you mean {nearest!r}? There are: {', '.join(FINETUNES)}"
    )


def resized(
    recipe: Finetune,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    clips_per_step: int | None = None,
    seed: int | None = None,
) -> Finetune:
    """The same recipe with other counts: the warm-up keeps its share, and the rate follows the clips of a step.

    Epochs take the place of a recipe's steps, steps that of its epochs.
    """
    seed, clips = recipe.seed if seed is None else seed, clips_per_step or recipe.clips_per_step
    if epochs and (epochs != recipe.epochs or recipe.steps):
        warmup = recipe.warmup_epochs * epochs // recipe.epochs
        recipe = replace(recipe, epochs=epochs, warmup_epochs=warmup, steps=0)
    if steps:
        recipe = replace(recipe, steps=steps)
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
