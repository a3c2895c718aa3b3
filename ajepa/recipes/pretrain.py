"""Recipes of pre-training: a recipe is a frozen value with a name that sets everything about a run.

Costs marked as measured are measured; all others are estimates. The FLOP are those of the matrix products of a step
(`training/flops.py`) times the steps; GPU hours assume 200 TFLOP/s, a fifth of an H100's bf16 peak.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ajepa.model.jepa import JepaSpec
from ajepa.model.masking import Curriculum, Fixed, MaskPlan, RandomPatches, a_jepa_curriculum
from ajepa.model.patches import PatchGrid
from ajepa.model.sigreg import ClipObjective
from ajepa.model.views import Views
from ajepa.model.vit import A_JEPA_PREDICTOR, EncoderSpec, PredictorSpec, a_jepa_encoder
from ajepa.recipes.optimiser import AdamW, Schedule
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.errors import RunError
from pipeline.loading.augment import Augment

CropName = Literal["random", "start"]

# Masks of `small` and `base`: 30 % of a view is shown, and 45 % of what is hidden is predicted.
SPARSE_PATCHES = RandomPatches(ratio_low=0.7, ratio_high=0.7, target_share=0.45)

# Rows in AudioSet's segment lists; not all of these clips can still be downloaded.
CLIPS_AS2M = 2_084_320


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrain:
    """The recipe of a pre-training run; the paths of store and run, and the device, are arguments, not part of it.

    mel                name of the log-mel preset that the store must have
    steps              training steps; with `epochs`, the number of steps of all AudioSet until the store is opened
    epochs             training epochs, which then decide on `steps` (`with_step_count`); 0: `steps` counts
    mask_sets          number of mask sets per view; those of a clip share one forward pass of the teacher
    crop               how the position of a view in a longer clip is chosen
    augment            random changes of each clip in each step; none with `views`, which change clips themselves
    views              several changed crops of each clip; None: one crop, unchanged
    keep_checkpoints   number of newest checkpoints that are kept; the best checkpoint by probe is kept as well
    keep_every         interval in steps of checkpoints that are never deleted; 0: none
    max_gradient_norm  gradients with a larger norm are scaled down to this norm; 0: no limit
    health_every       steps between measurements of the model's health, with one at the end; 0: never
    probe_every        steps between probes, with one at the end; 0: never
    probe_clips        maximum number of clips that train a probe; half as many test it
    """

    name: str
    mel: str
    model: JepaSpec
    masks: MaskPlan
    schedule: Schedule
    steps: int
    clips_per_step: int
    epochs: int = 0
    mask_sets: int = 1
    optimiser: AdamW = AdamW()
    crop: CropName = "random"
    augment: Augment = Augment()  # noqa: RUF009  (frozen)
    views: Views | None = None
    seed: int = 0
    log_every: int = 10  # steps
    checkpoint_every: int = 1_000  # steps
    keep_checkpoints: int = 2
    keep_every: int = 0
    max_gradient_norm: float = 0.0
    health_every: int = 100
    probe_every: int = 0
    probe_clips: int = 2_000

    def __post_init__(self) -> None:
        # Counts.
        counts = (
            self.steps,
            self.clips_per_step,
            self.mask_sets,
            self.log_every,
            self.checkpoint_every,
            self.keep_checkpoints,
        )
        if min(counts) < 1:
            raise ValueError(f"steps, clips and intervals must be at least 1, got {counts}")
        if self.epochs < 0:
            raise ValueError(f"epochs must be 0 or more, got {self.epochs}")
        if not (self.keep_every >= 0 and self.max_gradient_norm >= 0):
            raise ValueError(
                "keep_every and max_gradient_norm must be 0 or more, "
                f"got {self.keep_every} and {self.max_gradient_norm}"
            )
        if min(self.health_every, self.probe_every, self.probe_clips - 2) < 0:
            raise ValueError(
                f"health_every and probe_every must be 0 or more and probe_clips 2 or more, got {self}"
            )

        # Choices.
        if self.crop not in get_args(CropName):
            raise ValueError(f"crop must be {' or '.join(get_args(CropName))}, got {self.crop!r}")
        if self.views is not None and self.crop != "random":
            raise ValueError(f"views are random crops: crop must be random, got {self.crop!r}")
        if self.views is not None and self.augment != Augment():
            raise ValueError("views change the clips themselves: leave augment off, or set views=none")
        if isinstance(self.masks, Curriculum) and self.masks.steps != self.steps:
            raise ValueError(f"a curriculum over {self.masks.steps} steps in a run of {self.steps}")

    @property
    def view_frames(self) -> int:
        """The number of frames in a view: the length of the model's input."""
        return self.model.encoder.grid.frames

    @property
    def sound_grid(self) -> PatchGrid:
        """The columns of the model's grid that a clip can fill; masks are drawn in them, and no token lies past them.

        A clip of 10 s has 998 frames, which fill 62.4 of the 64 columns of 1,024 frames. With the last column every
        batch would have padding, and attention with a mask has no fast kernel.
        """
        grid = self.model.encoder.grid
        clip_columns = -(-preset_mel_spec(self.mel).frames // grid.patch_frames)
        return grid.first_columns(clip_columns * grid.patch_frames)

    @property
    def crops(self) -> int:
        """The number of views of each clip in a step."""
        return 1 if self.views is None else self.views.crops

    @property
    def source_frames(self) -> int:
        """The number of frames of a clip that a view is made from."""
        return self.view_frames if self.views is None else self.views.source_frames(self.view_frames)

    def with_counts(
        self,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        clips_per_step: int | None = None,
        seed: int | None = None,
    ) -> "Pretrain":
        """Return the recipe with other counts; every schedule is scaled to the new length.

        Given steps replace the recipe's epochs, and given epochs its steps; RunError if both are given.
        """
        refuse_two_lengths(steps, epochs)
        recipe = self if steps is None else self._with_steps(steps, epochs=0)
        return replace(
            recipe,
            epochs=epochs or recipe.epochs,
            clips_per_step=clips_per_step or recipe.clips_per_step,
            seed=recipe.seed if seed is None else seed,
        )

    def with_step_count(self, steps_per_epoch: int) -> "Pretrain":
        """Return the recipe with `steps` set to those of its epochs, if it counts epochs."""
        return self._with_steps(self.epochs * steps_per_epoch, epochs=self.epochs) if self.epochs else self

    def _with_steps(self, steps: int, *, epochs: int) -> "Pretrain":
        """Return the recipe with this length; a curriculum has the length of its run."""
        masks = self.masks
        if isinstance(masks, Curriculum):
            masks = replace(masks, steps=steps)
        return replace(self, steps=steps, epochs=epochs, masks=masks)


def refuse_two_lengths(steps: int | None, epochs: int | None) -> None:
    """Raise RunError if a run is given both a number of steps and a number of epochs."""
    if steps and epochs:
        raise RunError(f"steps {steps} and epochs {epochs} are two lengths of one run; give one of them")


def smoke_recipe() -> Pretrain:
    """A test that the whole training runs, with any `a-jepa` store.

    Cost: seconds on two CPU cores. Expected: the model learns nothing.
    """
    grid = PatchGrid.from_size(256, 128)
    model = JepaSpec(
        encoder=EncoderSpec(grid=grid, width=64, depth=2, heads=2),
        predictor=PredictorSpec(width=32, depth=1, heads=2),
    )
    return Pretrain(
        name="smoke",
        mel="a-jepa",
        model=model,
        masks=a_jepa_curriculum(20),
        schedule=Schedule(peak_lr=1e-3, warmup_share=0.1),
        steps=20,
        clips_per_step=8,
        # Short intervals, so that a run of 20 steps logs, saves, measures health and probes.
        log_every=1,
        checkpoint_every=10,
        health_every=10,
        probe_every=20,
        probe_clips=100,
    )


def small_recipe() -> Pretrain:
    """A small JEPA that learns from any `a-jepa` store on a laptop: SIGReg on whole views, a teacher for tokens.

    Two changed crops of 2.6 s of each clip, each seen through two masks that show 30 % of it. The vectors of the four
    agree and are spread by SIGReg (sigreg.py); in the first crop, tokens predict the teacher's, which sees it
    unchanged. A patch is 80 ms of 32 bands: longer ones lose speech, and those of all bands lose what moments
    tell of each part of the spectrum. No view is moved in pitch, which cost octaves.
    Cost: measured, 11 to 13 CPU minutes (fp32, AVX2) or 3 to 4 (bf16, AMX), for any number of clips.
    Expected: pooled by moments from all layers (`--pooling moments --layer concat-all`), above a random encoder and
    log-mel statistics on the store's labels, and on vowels and voices of other sources; by neighbours on drums and
    octaves too; about level on other sounds (bench/README.md).
    """
    grid = PatchGrid(rows=4, cols=32, patch_frames=8, patch_bands=32)
    model = JepaSpec(
        encoder=EncoderSpec(grid=grid, width=128, depth=4, heads=2, band_norm=True, init="xavier"),
        predictor=PredictorSpec(width=128, depth=1, heads=2, init="xavier"),
        loss="squared_l2",
        target_layers=4,
        target_norm="position",
        token_weight=0.3,
        clip=ClipObjective(),
    )
    return Pretrain(
        name="small",
        mel="a-jepa",
        model=model,
        masks=Fixed(masking=SPARSE_PATCHES),
        views=Views(),
        mask_sets=2,
        schedule=Schedule(peak_lr=1e-3, warmup_share=0.08, ema_start=0.99, ema_end=0.999),
        steps=650,
        clips_per_step=32,
        max_gradient_norm=3.0,
        checkpoint_every=325,
        health_every=130,
        probe_every=325,
        probe_clips=240,
    )


def base_recipe(size: Literal["s", "b"] = "b") -> Pretrain:
    """The objective of small at the size of the papers' encoders, for one GPU and from some 20,000 to 2 M clips.

    ViT-B, or ViT-S as base-s, on 5.1 s of a clip.
    Cost: about 5.6e18 FLOP for 100,000 steps of 256 clips, 8 H100 hours.
    Expected: not run yet, for no GPU was to be had; small learns by the same objective.
    """
    grid = PatchGrid(rows=4, cols=64, patch_frames=8, patch_bands=32)
    encoder = replace(a_jepa_encoder(size, grid), band_norm=True, init="xavier")
    model = JepaSpec(
        encoder=encoder,
        predictor=PredictorSpec(width=384, depth=4, heads=6, init="xavier"),
        loss="squared_l2",
        target_layers=8,
        target_norm="position",
        token_weight=0.3,
        clip=ClipObjective(hidden=2048, width=128, directions=1024),
    )
    return Pretrain(
        name="base" if size == "b" else f"base-{size}",
        mel="a-jepa",
        model=model,
        masks=Fixed(masking=SPARSE_PATCHES),
        views=Views(),
        mask_sets=2,
        schedule=Schedule(peak_lr=5e-4, warmup_share=0.05, ema_start=0.996, ema_end=0.9999),
        steps=100_000,
        clips_per_step=256,
        max_gradient_norm=3.0,
        health_every=500,
        probe_every=10_000,
    )


def base_s_recipe() -> Pretrain:
    """The objective of small with ViT-S, see base. Cost: 1.7e18 FLOP, 2.3 H100 hours. Expected: not run yet."""
    return base_recipe("s")


def audio_jepa_recipe() -> Pretrain:
    """Audio-JEPA as in its paper (arXiv 2507.02915), ViT-B on 256 frames x 128 bands at 39 ms hop, 32 kHz.

    From the paper: sizes, masks, squared distance, batch, rates, weight decay, and the teacher's momentum, from .996
    to 1 by half a cosine over all steps, as in BYOL. The length is the paper's 100,000 steps, whatever the number of
    clips: 12 epochs of AudioSet-2M, but 1,155 of its balanced 22,160. Ours: mean and deviation of the training clips
    normalise the features.
    Cost: about 1.6e18 FLOP for 100,000 steps of 256 clips, 2.3 H100 hours.
    Expected: the X-ARES probe scores of the paper; not reproduced here yet.
    """
    return Pretrain(
        name="audio-jepa",
        mel="audio-jepa",
        model=JepaSpec(
            encoder=a_jepa_encoder("b", PatchGrid.from_size(256, 128)),
            predictor=PredictorSpec(),
            loss="squared_l2",
        ),
        masks=Fixed(masking=RandomPatches()),
        schedule=Schedule(peak_lr=3e-4, ema_curve="cosine"),
        steps=100_000,
        clips_per_step=256,
        health_every=500,
        probe_every=10_000,
        crop="start",
    )


def audio_jepa_repo_recipe() -> Pretrain:
    """Audio-JEPA with the loss of its code: audio-jepa with the cosine distance.

    Left out of its code: it gives each waveform the mean 0 and the peak 1 and takes no statistics of the data, where
    here mean and deviation of the training clips normalise the features, for runs, probes and embeddings alike; its
    clipping of gradients at the quantile .9 of the last 1,000 norms (here: --set max_gradient_norm); and what its
    later versions changed (AdEMAMix, 2,000 steps up to 1e-3 and down to 1e-5). Its errors (one mask generator on all
    ranks, weights that are never initialised, a momentum over another length than the run's) are not copied.
    Cost: that of audio-jepa. Expected: close to audio-jepa; not tried here yet.
    """
    recipe = audio_jepa_recipe()
    return replace(recipe, name="audio-jepa-repo", model=replace(recipe.model, loss="cosine"))


def a_jepa_recipe(size: Literal["s", "b", "l"] = "b") -> Pretrain:
    """A-JEPA (arXiv 2311.15830), ViT-B on 1024 x 128: 24 epochs of the store's clips in steps of 512.

    From the paper: sizes, curriculum, epochs, batch, rate, and the change of each clip in each step: another start,
    round which the 10 s are rotated, and a gain of up to 6 dB up or down. Readings: its "average L2" is I-JEPA's
    squared distance (the norm: --set model.loss=l2); frames are rotated, not samples, and a shorter clip is padded,
    not repeated. Ours: 32 kHz, where the paper has 16 (its rate: a store of spec a-jepa-16k, --set mel=a-jepa-16k).
    Not stated in the paper: the momentum, here I-JEPA's (.996 to 1, linear), and warm-up and decay, here Audio-JEPA's.
    Cost: on AudioSet-2M about 1.9e19 FLOP, 26 H100 hours, more than half of it for the predictor, which processes each
    target group separately. Expected after fine-tuning (paper): mAP 48.6 on AS-2M, 38.4 on AS-20K; not reproduced
    here yet.
    """
    steps = 24 * CLIPS_AS2M // 512
    return Pretrain(
        name="a-jepa" if size == "b" else f"a-jepa-{size}",
        mel="a-jepa",
        model=JepaSpec(
            encoder=a_jepa_encoder(size, PatchGrid.from_size(1024, 128)),
            predictor=A_JEPA_PREDICTOR,
            loss="squared_l2",
        ),
        masks=a_jepa_curriculum(steps),
        # The learning rate is the paper's, the momentum I-JEPA's, the rest of the schedule Audio-JEPA's.
        schedule=Schedule(peak_lr=2e-4),
        steps=steps,
        epochs=24,
        clips_per_step=512,
        augment=Augment(roll=True, gain_db=6.0),
        health_every=500,
        probe_every=10_000,
    )


def a_jepa_s_recipe() -> Pretrain:
    """A-JEPA with ViT-S, see a-jepa. Cost: two thirds of a-jepa's. Expected: mAP 46.1 on AS-2M, 33.7 on AS-20K."""
    return a_jepa_recipe("s")


def a_jepa_l_recipe() -> Pretrain:
    """A-JEPA with ViT-L, see a-jepa. Cost: twice a-jepa's. Expected: mAP 48.8 on AS-2M, 38.8 on AS-20K."""
    return a_jepa_recipe("l")


PRETRAIN_RECIPES: dict[str, Callable[[], Pretrain]] = {
    "smoke": smoke_recipe,
    "small": small_recipe,
    "base": base_recipe,
    "base-s": base_s_recipe,
    "audio-jepa": audio_jepa_recipe,
    "audio-jepa-repo": audio_jepa_repo_recipe,
    "a-jepa": a_jepa_recipe,
    "a-jepa-s": a_jepa_s_recipe,
    "a-jepa-l": a_jepa_l_recipe,
}
