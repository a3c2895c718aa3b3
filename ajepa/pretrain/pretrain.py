"""Pre-training: a recipe trained on stores, from the checks before the first step to the last one."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ajepa.evaluate.feature_selection import choose_features
from ajepa.model.views import InputScale
from ajepa.pretrain.monitor import OnCollapse, is_measured_in_folds, open_pretrain_monitor
from ajepa.pretrain.plan import describe_plan
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.pretrain.training_set import TrainingSet
from ajepa.pretrain.warm_start import WarmStart, recorded_start
from ajepa.recipes.catalogue import recipe_from_json, recipe_to_json
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.bad_steps import OnBadStep, refuse_unknown_choice
from ajepa.training.devices import Precision, PrecisionName, pick_device, pick_precision
from ajepa.training.distributed import World, join_ranks
from ajepa.training.feature_choice import FEATURES_FILE, write_feature_choice
from ajepa.training.loggers import refuse_missing_loggers
from ajepa.training.loop import catch_stop_signals, open_run, raise_if_interrupted, run_training_loop
from ajepa.training.memory import refuse_large_pretrain
from ajepa.training.run import RECIPE_FILE, RUN_FORMAT, Run, setting_differences
from ajepa.training.run_identity import RunIdentity
from pipeline.errors import RunError
from pipeline.loading.dali import open_loader
from pipeline.loading.loader import Loader, View
from pipeline.loading.sampling import RowOrder
from pipeline.messages import print_to_stderr
from pipeline.store.feature_store import FeatureStore
from pipeline.store.joined_store import AnyStore
from pipeline.store.splits import describe_splits


def pretrain(
    training_data: Path | str | FeatureStore | TrainingSet,
    recipe: Pretrain,
    run_path: Path,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    start: Path | str | None = None,
    start_checkpoint: str | int = "last",
    micro_batch: int | None = None,
    device: str = "auto",
    precision: PrecisionName = "auto",
    loader: Literal["dali", "plain"] = "dali",
    recompute: bool = False,
    compiled: bool = False,
    on_broken: Literal["raise", "skip"] = "raise",
    on_bad_step: OnBadStep = "stop",
    on_collapse: OnCollapse = "auto",
    loggers: Sequence[str] = (),
    progress: bool = False,
    say: Callable[[str], None] = print_to_stderr,
) -> Run:
    """Train `recipe` on the training splits of a store or of a training set; the finished run at `run_path`.

    A run that is there is carried on exactly: on a CPU, in one process and with equal versions, weights and metrics
    are bit for bit those of a run that was never interrupted. Under torchrun every rank calls this: the clips of a
    step are dealt to them, and rank 0 writes.

    steps, epochs     one of them replaces the recipe's length
    batch             replaces the recipe's clips per step (of all ranks)
    start             a run, an export, or ORG/NAME on the hub whose weights the run begins with (`WarmStart`), at
                      `start_checkpoint`, if it is a run; None: from random weights
    micro_batch       clips of its share that a rank takes at once: less memory, the same result but for rounding
    precision         see `pick_precision`
    recompute         see `Jepa.enable_recompute`
    compiled          see `Jepa.compile_stacks`
    on_broken         skip: another clip of its rank's step stands in for one that cannot be read; `skipped` in the
                      metrics counts them since the line before
    on_bad_step       skip: a step whose loss or gradient is no number changes nothing and is passed over, up to the
                      limits of `BadSteps`; stop: it ends the run, which may then be carried on with another rate,
                      gradient norm or precision
    on_collapse       stop: a run that collapses (see `collapse_signs`) writes a checkpoint and ends with RunError;
                      warn: it goes on; auto: stop, but warn for encoders wider than those that the signs are
                      calibrated on
    loggers           wandb, mlflow: also send the metrics there (`ajepa.training.loggers`)

    SIGINT, SIGTERM and SIGUSR1 to any rank end the step at hand, write a checkpoint and raise StopSignal. RunError
    or StoreError says where store, recipe, device and memory do not fit, before anything is written.
    """
    with join_ranks() as world:
        tell = world.main_rank_only(say)
        refuse_unknown_choice(on_bad_step)
        refuse_missing_loggers(loggers)

        # Fit data, recipe and device to each other; what does not fit is refused before the run's folder is made.
        setup = prepare_pretrain(
            training_data,
            recipe.with_counts(steps=steps, epochs=epochs, clips_per_step=batch),
            run_path,
            usual_clips=recipe.clips_per_step,
            start=start,
            start_checkpoint=start_checkpoint,
            device=device,
            precision=precision,
            world=world,
            micro_clips=micro_batch,
            recompute=recompute,
            compiled=compiled,
        )
        with open_loader(
            setup.store,
            setup.order,
            setup.view,
            kind=loader,
            device=setup.device,
            on_broken=on_broken,
            say=say,
        ) as batches:
            refuse_large_pretrain(
                setup.recipe,
                setup.device,
                half=setup.precision.is_half,
                recompute=recompute,
                micro_clips=micro_batch,
                world=world,
            )

            # Train while no other process can write to the run.
            with open_run(
                world,
                run_path,
                recipe_to_json(setup.recipe),
                setup.identity,
                precision=setup.precision.name,
                warm_start=setup.warm_start.provenance if setup.warm_start else None,
                trained_stores=(
                    *(setup.warm_start.trained_stores if setup.warm_start else ()),
                    *setup.training_set.trained_stores(setup.store),
                ),
            ) as (run, first_step):
                steps_done = take_remaining_steps(
                    setup,
                    run,
                    first_step,
                    batches,
                    on_broken=on_broken,
                    on_bad_step=on_bad_step,
                    on_collapse=on_collapse,
                    loggers=loggers,
                    progress=progress,
                    say=say,
                )
                if steps_done >= setup.recipe.steps:
                    store_feature_choice(setup, run, say)

        # A run that was interrupted ends as one, once its folder is unlocked.
        raise_if_interrupted(run, steps_done, setup.recipe.steps, tell)
        return run


def recipe_as_begun(run_path: Path, recipe: Pretrain, say: Callable[[str], None]) -> Pretrain:
    """The recipe as the run at `run_path` was begun with it, where an earlier version did so; else `recipe` itself.

    A recipe of the same name may have changed since: the run is carried on as it was begun, which `say` is told.
    """
    if not (run_path / RECIPE_FILE).is_file():
        return recipe
    run = Run.open(run_path)
    if run.run_format >= RUN_FORMAT or run.is_finetuned or run.recipe["name"] != recipe.name:
        return recipe
    begun: Pretrain = recipe_from_json(run.recipe)
    changes = setting_differences(run.recipe, recipe_to_json(recipe))
    if changes:
        say(f"{run_path}: carried on with recipe {recipe.name} as it was begun with ({'; '.join(changes)})")
    return begun


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PretrainSetup:
    """All that is settled before a run is opened: data, recipe and device, which fit each other.

    recipe       with its number of steps
    usual_clips  clips per step of the recipe before they were replaced
    order        in which this rank reads the clips
    identity     of the run: its data, and how they are normalised
    view         what of a clip is read
    warm_start   weights that a new run begins with; None: random ones, or those that the run has kept

    The last three fields are options of `PretrainTrainer`.
    """

    training_set: TrainingSet
    store: AnyStore
    recipe: Pretrain
    usual_clips: int
    order: RowOrder
    identity: RunIdentity
    view: View
    warm_start: WarmStart | None
    device: torch.device
    precision: Precision
    world: World
    micro_clips: int | None
    recompute: bool
    compiled: bool


def prepare_pretrain(
    training_data: Path | str | FeatureStore | TrainingSet,
    recipe: Pretrain,
    run_path: Path,
    *,
    usual_clips: int,
    start: Path | str | None,
    start_checkpoint: str | int,
    device: str,
    precision: PrecisionName,
    world: World,
    micro_clips: int | None,
    recompute: bool,
    compiled: bool,
) -> PretrainSetup:
    """Open the data and choose the device; options and errors are those of `pretrain`."""
    # Choose what computes: a device, one for each rank, and the numbers that it is fast in.
    torch_device = pick_device(device, world.gpu_index)
    numbers = pick_precision(precision, torch_device)
    refuse_few_clips(recipe, world)

    # Open the stores; they decide the order of the clips, and how clips are normalised.
    if not isinstance(training_data, TrainingSet):
        training_data = TrainingSet(stores=(training_data,))
    store = training_data.open_stores(recipe)
    identity = training_data.data_identity(store)
    order = training_data.clip_order(store, recipe, world)

    # Begin with the weights of a source. A run that has begun with them keeps them itself.
    warm_start = None
    if begun := recorded_start(run_path, start, start_checkpoint):
        begun_from = begun.identity
        identity = replace(
            identity, mean=begun_from.mean, std=begun_from.std, warm_start=begun_from.warm_start
        )
    elif start is not None:
        warm_start = WarmStart.open(start, start_checkpoint, recipe)
        identity = warm_start.adapt_identity(identity, store)
    return PretrainSetup(
        training_set=training_data,
        store=store,
        recipe=recipe.with_step_count(order.steps_per_epoch),
        usual_clips=usual_clips,
        order=order,
        identity=identity,
        view=pretrain_view(identity, recipe),
        warm_start=warm_start,
        device=torch_device,
        precision=numbers,
        world=world,
        micro_clips=micro_clips,
        recompute=recompute,
        compiled=compiled,
    )


def refuse_few_clips(recipe: Pretrain, world: World) -> None:
    """RunError where a step has too few clips for targets by position, or a rank has no pairs of clips to mix."""
    clips = world.clips_per_rank(recipe.clips_per_step)
    if recipe.model.target_norm == "position" and recipe.clips_per_step < 2:
        raise RunError(
            f"recipe {recipe.name} compares the clips of a step, and there is {recipe.clips_per_step}; "
            "choose --batch 2 or more"
        )
    if recipe.views is not None and world.size > 1 and clips % 2:
        raise RunError(
            f"views mix pairs of clips, and {clips} clips of each of {world.size} ranks is an odd number; "
            f"choose --batch a multiple of {2 * world.size}, or another number of ranks"
        )


def take_remaining_steps(
    setup: PretrainSetup,
    run: Run,
    first_step: int,
    batches: Loader,
    *,
    on_broken: Literal["raise", "skip"],
    on_bad_step: OnBadStep,
    on_collapse: OnCollapse,
    loggers: Sequence[str],
    progress: bool,
    say: Callable[[str], None],
) -> int:
    """Take the steps from `first_step` on, and look at the model on the way; the steps done, all or up to a signal."""
    tell = setup.world.main_rank_only(say)
    if first_step >= setup.recipe.steps:
        tell(f"{run.path}: already at its last step, {first_step}")
        return first_step

    # Build model and optimiser, and say what is trained on which clips.
    trainer = build_trainer(setup, run, first_step)
    if first_step == run.first_step and (phase := run.describe_phase()):
        tell(f"{run.path}: {phase}")
    if setup.warm_start and not first_step:
        tell(f"{run.path}: {setup.warm_start.describe()}")
    for line in setup.training_set.describe_order(setup.store, setup.order):
        tell(line)
    for line in describe_plan(setup.recipe, setup.order, usual_clips=setup.usual_clips):
        tell(f"{run.path}: {line}")
    tell(describe_start(run, trainer, first_step, setup.order, setup.store))

    # The main rank looks at the model.
    monitor = None
    if setup.world.is_main:
        monitor = open_pretrain_monitor(
            run,
            trainer,
            setup.store,
            setup.view,
            on_broken=on_broken,
            on_collapse=on_collapse,
            say=say,
        )

    # Train.
    with catch_stop_signals() as stop:
        return run_training_loop(
            run,
            trainer,
            batches.batches(first_step, setup.recipe.steps),
            stop,
            progress=progress,
            monitor=monitor,
            keep_every=setup.recipe.keep_every,
            on_bad_step=on_bad_step,
            loggers=loggers,
            world=setup.world,
        )


def store_feature_choice(setup: PretrainSetup, run: Run, say: Callable[[str], None]) -> None:
    """Choose pooling and layer of a finished run by probes, once, and say which; nothing for a recipe without probes.

    The main rank does so while the others wait. Where all clips are to be measured, none may choose.
    """
    is_wanted = (
        setup.recipe.probe_every
        and not (run.path / FEATURES_FILE).is_file()
        and not is_measured_in_folds(setup.store)
    )
    if setup.world.is_main and is_wanted:
        began = time.monotonic()
        choice = choose_features(run, setup.store, setup.device, say=say)
        if choice is not None:
            write_feature_choice(run.path, choice)
            seconds = time.monotonic() - began
            say(
                f"{run.path}: vectors are {choice.chosen.title} from now on: {choice.reason} ({seconds:.0f} s); "
                "--pooling and --layer take others"
            )
    setup.world.wait_for_ranks()


def build_trainer(setup: PretrainSetup, run: Run, first_step: int) -> PretrainTrainer:
    """Model and optimiser: as the checkpoint of `first_step` left them, or new ones.

    New ones know the store's bands, or have the weights of the warm start, of which the run keeps a copy first.
    """
    trainer = PretrainTrainer(
        setup.recipe,
        setup.device,
        world=setup.world,
        micro_clips=setup.micro_clips,
        precision=setup.precision,
        recompute=setup.recompute,
        compiled=setup.compiled,
        input_scale=input_scale(setup.identity),
    )
    if first_step:
        trainer.restore_checkpoint(run.load_checkpoint(at=first_step))
        return trainer
    trainer.model.set_band_statistics(*setup.training_set.band_statistics(setup.store))

    # The parts of the warm start, from its source, or from the run's own copy.
    if setup.warm_start is not None:
        trainer.load_parts(setup.warm_start.weights)
        if setup.world.is_main:
            run.save_checkpoint(trainer.make_checkpoint(0), keep=setup.recipe.keep_checkpoints)
    elif setup.identity.warm_start is not None:
        trainer.load_parts(run.load_checkpoint(*trainer.parts, at=0).parts)
    return trainer


def pretrain_view(identity: RunIdentity, recipe: Pretrain) -> View:
    """How the recipe looks at clips, normalised by the mean and deviation in the run's identity."""
    return View(
        frames=recipe.source_frames,
        crop=recipe.crop,
        crops=recipe.crops,
        mean=identity.mean,
        std=identity.std,
        seed=recipe.seed,
        augment=recipe.augment,
    )


def input_scale(identity: RunIdentity) -> InputScale:
    """What the values of a batch mean: the run's normalisation, and the lowest log-mel of its mel spec."""
    return InputScale(mean=identity.mean, std=identity.std, floor=math.log(identity.mel.floor))


def describe_start(
    run: Run, trainer: PretrainTrainer, first_step: int, order: RowOrder, store: AnyStore
) -> str:
    """The line that says where training starts, on which clips, and in which precision."""
    return (
        f"{run.path}: step {first_step} of {trainer.recipe.steps}, {len(order.rows_N)} clips of "
        f"{describe_splits(store)}, {trainer.precision.description}{trainer.world.ranks_note}"
    )
