"""Pre-training: what must fit before the first step, and the run from there to its last."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ajepa.pretrain.monitor import OnCollapse, open_pretrain_monitor
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.pretrain.training_set import TrainingSet
from ajepa.recipes.catalogue import recipe_to_json
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.devices import PrecisionName, pick_device, pick_precision
from ajepa.training.distributed import join_ranks
from ajepa.training.loop import catch_stop_signals, open_run, run_training_loop, say_nothing
from ajepa.training.memory import refuse_large_pretrain
from ajepa.training.run import Json, Run
from pipeline.errors import StopSignal
from pipeline.loading.dali import open_loader
from pipeline.loading.loader import View
from pipeline.messages import print_to_stderr
from pipeline.store.feature_store import FeatureStore
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
    """Train `recipe` on every split of a store, or of a training set's, but `eval`; the finished run at `run_path`.

    A run that is there is carried on with, exactly: on a CPU, in one process and with equal versions, weights and
    metrics are bit for bit those of a run that was never interrupted. Under torchrun every rank calls this: the
    clips of a step are dealt to them, and rank 0 writes. `steps` and `batch` (clips per step, of all ranks)
    replace the recipe's; `micro_batch` is how many of its clips a rank takes at once: less memory, the same
    result but for rounding. `precision` is `pick_precision`'s; `recompute` and `compiled` are `Jepa`'s. With
    `on_broken="skip"` another clip of its rank's step stands in for one that cannot be read; `skipped` in the
    metrics counts them, since the line before. A run that collapses (`collapse.py`) writes a checkpoint
    and ends with RunError, unless `on_collapse` is warn. SIGINT, SIGTERM and SIGUSR1 to any rank end the step at
    hand, write a checkpoint and raise Interrupted. Nothing is written before store, recipe, device and memory fit:
    RunError or StoreError says what does not.
    """
    with join_ranks() as world:
        recipe = recipe.with_counts(steps=steps, clips_per_step=batch)
        on = pick_device(device, world.local_rank if world.size > 1 else None)
        numbers = pick_precision(precision, on)
        tell = say if world.is_main else say_nothing
        asked = (
            training_data if isinstance(training_data, TrainingSet) else TrainingSet(stores=(training_data,))
        )
        store = asked.open_stores(recipe)
        order, identity = asked.clip_order(store, recipe, world), asked.data_identity(store)
        view = pretrain_view(identity, recipe)
        with open_loader(store, order, view, kind=loader, device=on, on_broken=on_broken, say=say) as batches:
            refuse_large_pretrain(
                recipe, on, half=numbers.is_half, recompute=recompute, micro_clips=micro_batch, world=world
            )
            with open_run(world, run_path, recipe_to_json(recipe), identity) as (run, first):
                if first >= recipe.steps:
                    tell(f"{run.path}: already at its last step, {first}")
                    return run
                trainer = PretrainTrainer(
                    recipe,
                    on,
                    world=world,
                    micro_clips=micro_batch,
                    precision=numbers,
                    recompute=recompute,
                    compiled=compiled,
                )
                if first:
                    trainer.restore_checkpoint(run.load_checkpoint(at=first))
                else:
                    trainer.model.set_band_statistics(*asked.band_statistics(store))
                for line in asked.told(store, order):
                    tell(line)
                ranks = f" on {world.size} ranks" if world.size > 1 else ""
                tell(
                    f"{run.path}: step {first} of {recipe.steps}, {len(order.rows_N)} clips of "
                    f"{describe_splits(store)}, {numbers.description}{ranks}"
                )
                watch = None
                if world.is_main:
                    watch = open_pretrain_monitor(
                        run,
                        trainer,
                        store,
                        view,
                        on_broken=on_broken,
                        on_collapse=on_collapse,
                        say=say,
                    )
                with catch_stop_signals() as stop:
                    done = run_training_loop(
                        run,
                        trainer,
                        batches.batches(first, recipe.steps),
                        stop,
                        progress=progress,
                        monitor=watch,
                        keep_every=recipe.keep_every,
                        world=world,
                    )
        if done < recipe.steps:
            tell(f"{run.path}: checkpoint written at step {done} of {recipe.steps}")
            raise StopSignal
        return run


def pretrain_view(identity: Json, recipe: Pretrain) -> View:
    """How the recipe looks at clips, normalised as the run will remember."""
    return View(
        frames=recipe.view_frames,
        crop=recipe.crop,
        mean=identity["mean"],
        std=identity["std"],
        seed=recipe.seed,
    )
