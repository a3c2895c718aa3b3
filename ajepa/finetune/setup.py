"""FinetuneSetup: the data, recipe and device of a fine-tuning, fitted to each other or refused before a run is made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Unpack

import numpy as np
import torch

from ajepa.evaluate.classifier_scores import run_splits_in_store
from ajepa.evaluate.probe_splits import MIN_CLIPS_TO_SELECT
from ajepa.evaluate.task_data import TaskData, select_task_data
from ajepa.evaluate.tasks import Task
from ajepa.finetune.trainer import refuse_unsplittable_model
from ajepa.model.classifier import VitSpec, spec_for_frames
from ajepa.recipes.finetune import Finetune, own_small_recipe
from ajepa.training.devices import Precision, PrecisionName, pick_device, pick_precision
from ajepa.training.distributed import World
from ajepa.training.memory import refuse_large_classifier
from ajepa.training.run_identity import RunIdentity
from ajepa.training.trained_run import TrainedRun
from ajepa.training.trained_stores import TrainedStore
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.errors import RunError
from pipeline.loading.dali import open_loader
from pipeline.loading.loader import BrokenClipOptions, Loader, View
from pipeline.loading.sampling import RowOrder
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import sound_numbers_N

# The papers' recipes are for ViT-S (this width) and larger; `own-small` was tuned for narrower encoders.
PAPER_ENCODER_WIDTH = 384


def choose_recipe_for_start(task_recipe: Finetune, start: TrainedRun) -> tuple[Finetune, str]:
    """The recipe for an encoder where the user names none, before `adapt_recipe`; and a line that says why.

    An encoder that is narrower than the papers' gets `own-small`, with the task's loss. Its views, and those of
    `own`, are as long as in pre-training, and no longer than the task's.
    """
    # Which recipe, by the width of the encoder.
    encoder = start.encoder_spec("to start from")
    recipe = task_recipe
    reason = f"the encoder is {encoder.width} wide, as the papers' are"
    if encoder.width < PAPER_ENCODER_WIDTH:
        recipe = replace(own_small_recipe(), loss=task_recipe.loss)
        reason = (
            f"the encoder is {encoder.width} wide, {task_recipe.name} is for {PAPER_ENCODER_WIDTH} and more"
        )

    # How long its views are.
    if recipe.name != task_recipe.name or recipe.name == "own":
        frames = min(encoder.grid.frames, task_recipe.model.frames)
        recipe = replace(recipe, model=spec_for_frames(recipe.model, frames))
    view_seconds = start.mel.samples_of(recipe.model.frames) / start.mel.sample_rate_hz
    note = f"recipe {recipe.name}: {reason}; views of {view_seconds:.1f} s; --recipe takes another"
    return recipe, note


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FinetuneSetup:
    """All that is settled before a run is opened: data, recipe and device, which fit each other.

    recipe       for the store and the task, with its number of steps
    order        in which this rank reads the clips to train on
    identity     of the run: store, task and start
    micro_clips  clips that pass through the model at once; None: this rank's whole share of a step
    recompute    see `FinetuneTrainer`
    """

    start: TrainedRun | None
    task_data: TaskData
    recipe: Finetune
    order: RowOrder
    identity: RunIdentity
    device: torch.device
    precision: Precision
    world: World
    micro_clips: int | None
    recompute: bool


def prepare_finetune(
    store: Path | str | FeatureStore,
    task: Task,
    recipe: Finetune,
    start: TrainedRun | None,
    *,
    label_set: str,
    fold: int | None,
    device: str,
    precision: PrecisionName,
    world: World,
    micro_clips: int | None,
    recompute: bool,
) -> FinetuneSetup:
    """Fit the recipe to store, task, start and device, or refuse them; options and errors are those of `finetune`."""
    # Open the store: its features must be those of the start, or of the recipe.
    store = open_matching_store(store, recipe, start)

    # Choose what computes: a device, one for each rank, and the numbers that it is fast in.
    torch_device = pick_device(device, world.gpu_index)
    numbers = pick_precision(precision, torch_device)

    # Find the task's clips and classes on the store, and fit the recipe to them.
    task_data = select_task_data(task, store, label_set=label_set, fold=fold)
    refuse_label_leak(start, store, task_data.eval_splits)
    recipe = recipe_for_store(recipe, task_data, start)
    if start is not None and recipe.head == "probe" and isinstance(recipe.model, VitSpec):
        refuse_few_head_clips(task_data)
    refuse_unsplittable_model(recipe, world=world, micro_clips=micro_clips, recompute=recompute)

    # The order of the clips decides how many steps an epoch has.
    order = task_data.order(recipe, world)
    return FinetuneSetup(
        start=start,
        task_data=task_data,
        recipe=recipe.with_step_count(order.steps_per_epoch),
        order=order,
        identity=task_data.identity(start.checkpoint_identity() if start else None),
        device=torch_device,
        precision=numbers,
        world=world,
        micro_clips=micro_clips,
        recompute=recompute,
    )


def open_matching_store(
    store: Path | str | FeatureStore, recipe: Finetune, start: TrainedRun | None
) -> FeatureStore:
    """Open the store; RunError where its mel spec is not that of the start, or of the recipe."""
    if not isinstance(store, FeatureStore):
        store = FeatureStore.open(store)
    if start is None:
        store.refuse_other_front_end(preset_mel_spec(recipe.mel), f"recipe {recipe.name} needs")
    else:
        store.refuse_other_front_end(start.mel, f"{start.run.path} was trained on")
    return store


def recipe_for_store(recipe: Finetune, task_data: TaskData, start: TrainedRun | None) -> Finetune:
    """The recipe for this store; in a task without classes of its own, with views no longer than the store's clips.

    RunError where bands or loss do not fit, or where the encoder has no band statistics.
    """
    store = task_data.store
    if start is None and isinstance(recipe.model, VitSpec) and recipe.model.encoder.band_norm:
        raise RunError(
            f"recipe {recipe.name}: band_norm is learnt in pre-training; leave it false, or give --from"
        )
    if recipe.model.bands != store.bands:
        raise RunError(
            f"{store.location}: holds {store.bands} bands, recipe {recipe.name} takes {recipe.model.bands}"
        )
    if recipe.loss == "ce" and not task_data.single:
        raise RunError(
            f"{store.location}: clips have several labels, which --set loss=ce cannot learn; leave it at bce or auto"
        )
    if task_data.task.classes is None and recipe.model.frames > store.frames:
        return replace(recipe, model=spec_for_frames(recipe.model, store.frames))
    return recipe


def refuse_few_head_clips(task_data: TaskData) -> None:
    """RunError where too few clips, or sounds, could choose the penalty of a head that starts as a probe."""
    clips = len(task_data.train_N)
    sounds = len(np.unique(sound_numbers_N(task_data.store.manifest[task_data.train_N])))
    if clips < MIN_CLIPS_TO_SELECT or sounds < 2:
        raise RunError(
            f"{task_data.store.location}: {clips} clips of {sounds} sounds to train on; a head that starts as a probe "
            f"needs {MIN_CLIPS_TO_SELECT} clips and 2 sounds to choose its penalty: label more, "
            "or use --set head=random"
        )


def refuse_label_leak(start: TrainedRun | None, store: FeatureStore, eval_splits: Sequence[str]) -> None:
    """RunError where the start has been trained on the labels of clips that are to be measured."""
    if start is None or not start.run.is_finetuned:
        return
    splits = run_splits_in_store(start.run, store)
    if splits is None:
        return
    train_splits, _ = splits
    leaked = [split for split in eval_splits if split in train_splits]
    if leaked:
        raise RunError(
            f"{start.run.path}: was fine-tuned on {', '.join(leaked)}, which is to be measured here; "
            "start from a pre-trained run"
        )


def finetune_stores(setup: FinetuneSetup) -> list[TrainedStore]:
    """The stores that train the classifier: those of the start, if it was trained, and the task's."""
    task_data = setup.task_data
    own = TrainedStore.from_store(task_data.store, task_data.train_splits, task_data.label_set)
    if setup.start is None or not setup.start.step:
        return [own]
    return [*setup.start.run.trained_stores, own]


def open_finetune_loader(
    setup: FinetuneSetup, *, kind: Literal["dali", "plain"], **broken_clips: Unpack[BrokenClipOptions]
) -> Loader:
    """A loader of the clips to train on, as this rank sees them; to be used in a `with` block."""
    view = finetune_view(setup.task_data, setup.recipe, setup.identity)
    return open_loader(
        setup.task_data.store, setup.order, view, kind=kind, device=setup.device, **broken_clips
    )


def refuse_large_finetune(setup: FinetuneSetup) -> None:
    """RunError where a step needs more memory than is free."""
    refuse_large_classifier(
        setup.recipe,
        len(setup.task_data.classes),
        setup.device,
        half=setup.precision.is_half,
        recompute=setup.recompute,
        micro_clips=setup.micro_clips,
        world=setup.world,
    )


def finetune_view(task_data: TaskData, recipe: Finetune, identity: RunIdentity) -> View:
    """How clips are shown in training: cut, augmented, mixed; normalised as the run's identity says."""
    return View(
        frames=recipe.model.frames,
        mean=identity.mean,
        std=identity.std,
        crop=recipe.crop,
        label_set=task_data.label_set,
        seed=recipe.seed,
        augment=recipe.augment,
    )
