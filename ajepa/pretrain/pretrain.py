"""Pre-training: what must fit before the first step, and the run from there to its last."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ajepa.pretrain.monitor import OnCollapse, open_watch
from ajepa.pretrain.trainer import Trainer
from ajepa.pretrain.training_set import TrainingSet
from ajepa.recipes.catalogue import to_json
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.devices import PrecisionName, pick_device, pick_precision
from ajepa.training.distributed import joined
from ajepa.training.loop import asked_to_stop, begun, quiet, train
from ajepa.training.memory import refuse_large_pretraining
from ajepa.training.run import Json, Run
from pipeline.errors import Interrupted
from pipeline.loading.dali import open_loader
from pipeline.loading.loader import View
from pipeline.messages import to_stderr
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import splits_told


def pretrain(
    trained_on: Path | str | FeatureStore | TrainingSet,
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
    say: Callable[[str], None] = to_stderr,
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
    with joined() as world:
        recipe = recipe.resized(steps=steps, clips_per_step=batch)
        on = pick_device(device, world.local_rank if world.size > 1 else None)
        numbers = pick_precision(precision, on)
        tell = say if world.main else quiet
        asked = trained_on if isinstance(trained_on, TrainingSet) else TrainingSet(stores=(trained_on,))
        store = asked.opened(recipe)
        order, identity = asked.order(store, recipe, world), asked.identity(store)
        view = view_of(identity, recipe)
        with open_loader(store, order, view, kind=loader, device=on, on_broken=on_broken, say=say) as batches:
            refuse_large_pretraining(
                recipe, on, half=numbers.half, recompute=recompute, micro_clips=micro_batch, world=world
            )
            with begun(world, run_path, to_json(recipe), identity) as (run, first):
                if first >= recipe.steps:
                    tell(f"{run.path}: already at its last step, {first}")
                    return run
                trainer = Trainer(
                    recipe,
                    on,
                    world=world,
                    micro_clips=micro_batch,
                    precision=numbers,
                    recompute=recompute,
                    compiled=compiled,
                )
                if first:
                    trainer.restore(run.load(at=first))
                else:
                    trainer.model.know_bands(*asked.bands(store))
                for line in asked.told(store, order):
                    tell(line)
                ranks = f" on {world.size} ranks" if world.size > 1 else ""
                tell(
                    f"{run.path}: step {first} of {recipe.steps}, {len(order.rows_N)} clips of "
                    f"{splits_told(store)}, {numbers.told}{ranks}"
                )
                watch = None
                if world.main:
                    watch = open_watch(
                        run,
                        trainer,
                        store,
                        view,
                        on_broken=on_broken,
                        on_collapse=on_collapse,
                        say=say,
                    )
                with asked_to_stop() as stop:
                    done = train(
                        run,
                        trainer,
                        batches.batches(first, recipe.steps),
                        stop,
                        progress=progress,
                        watch=watch,
                        keep_every=recipe.keep_every,
                        world=world,
                    )
        if done < recipe.steps:
            tell(f"{run.path}: checkpoint written at step {done} of {recipe.steps}")
            raise Interrupted
        return run


def view_of(identity: Json, recipe: Pretrain) -> View:
    """How the recipe looks at clips, normalised as the run will remember."""
    return View(
        frames=recipe.view_frames,
        crop=recipe.crop,
        mean=identity["mean"],
        std=identity["std"],
        seed=recipe.seed,
    )
