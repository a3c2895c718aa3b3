"""Pre-training: a recipe trained on stores, from the checks before the first step to the last one."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ajepa.model.views import InputScale
from ajepa.pretrain.monitor import OnCollapse, open_pretrain_monitor
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.pretrain.training_set import TrainingSet
from ajepa.recipes.catalogue import recipe_to_json
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.devices import PrecisionName, pick_device, pick_precision
from ajepa.training.distributed import join_ranks
from ajepa.training.loop import catch_stop_signals, open_run, run_training_loop
from ajepa.training.memory import refuse_large_pretrain
from ajepa.training.run import Run
from ajepa.training.run_identity import RunIdentity
from pipeline.errors import StopSignal
from pipeline.loading.dali import open_loader
from pipeline.loading.loader import View
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
    batch: int | None = None,
    micro_batch: int | None = None,
    device: str = "auto",
    precision: PrecisionName = "auto",
    loader: Literal["dali", "plain"] = "dali",
    recompute: bool = False,
    compiled: bool = False,
    on_broken: Literal["raise", "skip"] = "raise",
    on_collapse: OnCollapse = "stop",
    progress: bool = False,
    say: Callable[[str], None] = print_to_stderr,
) -> Run:
    """Train `recipe` on the training splits of a store or of a training set; the finished run at `run_path`.

    A run that is there is carried on exactly: on a CPU, in one process and with equal versions, weights and metrics
    are bit for bit those of a run that was never interrupted. Under torchrun every rank calls this: the clips of a
    step are dealt to them, and rank 0 writes.

    steps, batch  replace the recipe's steps, and its clips per step (of all ranks)
    micro_batch   clips of its share that a rank takes at once: less memory, the same result but for rounding
    precision     see `pick_precision`
    recompute     see `Jepa.enable_recompute`
    compiled      see `Jepa.compile_stacks`
    on_broken     skip: another clip of its rank's step stands in for one that cannot be read; `skipped` in the
                  metrics counts them since the line before
    on_collapse   stop: a run that collapses (see `collapse_signs`) writes a checkpoint and ends with RunError

    SIGINT, SIGTERM and SIGUSR1 to any rank end the step at hand, write a checkpoint and raise StopSignal. RunError
    or StoreError says where store, recipe, device and memory do not fit, before anything is written.
    """
    with join_ranks() as world:
        tell = world.main_rank_only(say)
        recipe = recipe.with_counts(steps=steps, clips_per_step=batch)

        # Choose what computes: a device, one for each rank, and the numbers that it is fast in.
        torch_device = pick_device(device, world.gpu_index)
        numbers = pick_precision(precision, torch_device)

        # Open the stores; they decide the order of the clips, and how clips are normalised.
        if not isinstance(training_data, TrainingSet):
            training_data = TrainingSet(stores=(training_data,))
        store = training_data.open_stores(recipe)
        order = training_data.clip_order(store, recipe, world)
        identity = training_data.data_identity(store)
        view = pretrain_view(identity, recipe)

        with open_loader(
            store, order, view, kind=loader, device=torch_device, on_broken=on_broken, say=say
        ) as batches:
            # Refuse what cannot fit, before the run's folder is made.
            refuse_large_pretrain(
                recipe,
                torch_device,
                half=numbers.is_half,
                recompute=recompute,
                micro_clips=micro_batch,
                world=world,
            )
            with open_run(world, run_path, recipe_to_json(recipe), identity) as (run, first_step):
                if first_step >= recipe.steps:
                    tell(f"{run.path}: already at its last step, {first_step}")
                    return run

                # Build model and optimiser: as the checkpoint left them, or new ones that know the bands.
                trainer = PretrainTrainer(
                    recipe,
                    torch_device,
                    world=world,
                    micro_clips=micro_batch,
                    precision=numbers,
                    recompute=recompute,
                    compiled=compiled,
                    input_scale=input_scale(identity),
                )
                if first_step:
                    trainer.restore_checkpoint(run.load_checkpoint(at=first_step))
                else:
                    trainer.model.set_band_statistics(*training_data.band_statistics(store))

                # Say what is trained on which clips.
                for line in training_data.describe_order(store, order):
                    tell(line)
                tell(describe_start(run, trainer, first_step, order, store))

                # Train, and look at the model on the way.
                monitor = None
                if world.is_main:
                    monitor = open_pretrain_monitor(
                        run,
                        trainer,
                        store,
                        view,
                        on_broken=on_broken,
                        on_collapse=on_collapse,
                        say=say,
                    )
                with catch_stop_signals() as stop:
                    steps_done = run_training_loop(
                        run,
                        trainer,
                        batches.batches(first_step, recipe.steps),
                        stop,
                        progress=progress,
                        monitor=monitor,
                        keep_every=recipe.keep_every,
                        world=world,
                    )

        # A run that was interrupted ends as one, once its folder is unlocked.
        if steps_done < recipe.steps:
            tell(f"{run.path}: checkpoint written at step {steps_done} of {recipe.steps}")
            raise StopSignal
        return run


def pretrain_view(identity: RunIdentity, recipe: Pretrain) -> View:
    """How the recipe looks at clips, normalised by the mean and deviation in the run's identity."""
    return View(
        frames=recipe.source_frames,
        crop=recipe.crop,
        crops=recipe.crops,
        mean=identity.mean,
        std=identity.std,
        seed=recipe.seed,
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
