"""Fine-tuning: a task on a store learnt by a classifier, from a pre-trained encoder or from nothing, and measured."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ajepa.assignment import Assignment, assigned
from ajepa.classifier import Vit, VitSpec
from ajepa.classifier_cost import refuse_too_large, step_cost
from ajepa.compute import Meter
from ajepa.devices import PrecisionName, pick_device, pick_precision
from ajepa.devices import precision as hardware_precision
from ajepa.distributed import ALONE, joined
from ajepa.evaluation import EVALUATION, Evaluation
from ajepa.features import Views
from ajepa.finetuner import AVERAGE, CLASSIFIER, Finetuner, refuse_parts
from ajepa.finetuning import Finetune
from ajepa.learnt import splits_of_run
from ajepa.loop import asked_to_stop, begun, quiet, train
from ajepa.models import of_frames
from ajepa.probed_head import probed_head
from ajepa.recipes import to_json
from ajepa.run import Json, Run
from ajepa.scores import Held, judged, logits_of, measured_at_its_end, protocol
from ajepa.start import Start
from ajepa.tasks.task import Task
from pipeline.dali import open_loader
from pipeline.errors import Interrupted, RunError
from pipeline.loader import View
from pipeline.melspec import mel_spec
from pipeline.store import FeatureStore
from pipeline.terminal import to_stderr


def finetune(
    store: Path | str | FeatureStore,
    task: Task,
    recipe: Finetune,
    run_path: Path,
    *,
    start: Start | None = None,
    label_set: str = "raw",
    fold: int | None = None,
    micro_batch: int | None = None,
    device: str = "auto",
    precision: PrecisionName = "auto",
    loader: Literal["dali", "plain"] = "dali",
    recompute: bool = False,
    on_broken: Literal["raise", "skip"] = "raise",
    progress: bool = False,
    say: Callable[[str], None] = to_stderr,
) -> Run:
    """Train `recipe` on the task's clips of the store and measure the held-out ones; the finished run at `run_path`.

    The encoder is `start`'s, whose recipe `Start.adopted` has made this one of; without it training starts from
    nothing. What is measured at the end lies in RUN/evaluation.json, on the way in the metrics. `fold`: which of
    the store's folds is measured. Carried on, interrupted, dealt to ranks and to passes of `micro_batch` clips as
    `pretrain` is, `precision` and `recompute` as there; rank 0 alone measures. RunError or StoreError where task,
    store, start, recipe, device and memory do not fit, before anything is written.
    """
    with joined() as world:
        tell = say if world.main else quiet
        store = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
        who = f"{start.run.path} was trained on" if start else f"recipe {recipe.name} needs"
        store.refuse_other_front_end(start.mel if start else mel_spec(recipe.mel), who)
        on = pick_device(device, world.local_rank if world.size > 1 else None)
        numbers = pick_precision(precision, on)
        assignment = assigned(task, store, label_set=label_set, fold=fold)
        refuse_seen(start, store, assignment.eval_splits)
        recipe = fitted(recipe, assignment, start)
        refuse_parts(recipe, world=world, micro_clips=micro_batch, recompute=recompute)
        order = assignment.order(recipe, world)
        recipe = recipe.of_epochs(order.steps_per_epoch)
        identity = assignment.identity() | {"from": start.identity() if start else None}
        view, classes = view_of(recipe, identity), len(assignment.classes)
        with open_loader(store, order, view, kind=loader, device=on, on_broken=on_broken, say=say) as batches:
            how: dict[str, Any] = {"recompute": recompute, "micro_clips": micro_batch}
            refuse_too_large(recipe, classes, on, half=numbers.half, world=world, **how)
            with begun(world, run_path, to_json(recipe), identity) as (run, done):
                if done >= recipe.steps and (not world.main or measured_at_its_end(run)):
                    tell(f"{run.path}: already at its last step, {done}")
                    return run
                how |= {"precision": numbers, "world": world if done < recipe.steps else ALONE}
                trainer = trainer_of(run, recipe, assignment, on, start, at=done, **how)
                told(run, assignment, trainer, done, tell)
                watch = Measuring(run, trainer, assignment, identity) if world.main else None
                if done < recipe.steps:
                    with asked_to_stop() as stop:
                        steps = batches.batches(done, recipe.steps)
                        done = train(run, trainer, steps, stop, progress=progress, watch=watch, world=world)
                if watch and done >= recipe.steps:
                    watch.evaluation().save(run.path / EVALUATION)
                trainer.world.wait()  # who ends first has the others terminated, also while they measure
        if done < recipe.steps:
            tell(f"{run.path}: checkpoint written at step {done} of {recipe.steps}")
            raise Interrupted
        return run


class Measuring:
    """What measures the held-out clips on the way, and counts what training costs; `loop.Watch`."""

    def __init__(self, run: Run, trainer: Finetuner, assignment: Assignment, identity: Json) -> None:
        self.run, self.trainer, self.assignment = run, trainer, assignment
        self.views = views_of(assignment, trainer.recipe, identity)
        self.last: Held | None = None
        self.cost = step_cost(trainer.recipe, len(assignment.classes), recompute=trainer.recompute)
        self.meter = Meter(trainer.device, ranks=trainer.world.size)
        self.meter.resume(run.path, run.step)

    def after(self, done: int) -> Json:
        """The metric on each label set, at the steps at which the recipe measures."""
        self.meter.step(self.cost)
        self.last = self.measure() if self.trainer.recipe.evaluated(done) else None
        return self.last.logged() if self.last else {}

    def saving(self) -> None:
        """Write down what the run has cost up to the checkpoint that is about to be written."""
        self.meter.save(self.run.path)

    def ill(self) -> None:
        """Labels keep a model from collapsing; what does not learn is seen in what is measured."""

    def measure(self) -> Held:
        """What the classifier says of them as its weights are now, in the precision that `evaluate` measures in."""
        trainer, rows_N = self.trainer, self.assignment.eval_N
        bf16, _ = hardware_precision(trainer.device)
        logits_NC = logits_of(trainer.measured, self.views, rows_N, trainer.device, bf16=bf16)
        return Held(assignment=self.assignment, logits_NC=logits_NC)

    def evaluation(self) -> Evaluation:
        """The scores of a finished run, with their protocol."""
        run, trainer = self.run, self.trainer
        part = CLASSIFIER if trainer.average is None else AVERAGE
        weights = trainer.measured.state_dict()
        told = protocol(
            run, [self.assignment], step=run.step, weights=weights, part=part, device=trainer.device
        )
        return judged(told, [self.last or self.measure()])


def trainer_of(
    run: Run,
    recipe: Finetune,
    assignment: Assignment,
    device: torch.device,
    start: Start | None,
    *,
    at: int,
    **how: Any,
) -> Finetuner:
    """The trainer where the run stands: at its checkpoint of step `at`, or with the encoder that it starts from.

    And with its probed head, if the recipe asks for one. `how` is the rest of what a Finetuner is told.
    """
    merge_SC = torch.from_numpy(assignment.merge_SC)
    trainer = Finetuner(recipe, merge_SC, device, single=assignment.single, **how)
    if at:
        trainer.restore(run.load(at=at))
    elif start and trainer.world.main:
        trainer.take(start.weights())
        if recipe.head == "probe" and isinstance(trainer.model, Vit):
            views = views_of(assignment, recipe, run.identity)
            weight_CD, bias_C = probed_head(
                trainer.model, views, assignment, recipe.seed, single=trainer.over_all
            )
            trainer.take({"head.weight": weight_CD, "head.bias": bias_C})
    for model in trainer.parts.values():
        trainer.world.align(model)
    return trainer


def views_of(assignment: Assignment, recipe: Finetune, identity: Json) -> Views:
    """Whole clips in views of the model's length."""
    mean, std = identity["mean"], identity["std"]
    return Views(store=assignment.store, frames=recipe.model.frames, mean=mean, std=std)


def told(run: Run, assignment: Assignment, trainer: Finetuner, done: int, say: Callable[[str], None]) -> None:
    """What is trained on what, and what is odd about it."""
    for note in assignment.notes:
        say(f"{assignment.store.place}: {note}")
    rows = f"{len(assignment.train_N)} clips of {', '.join(assignment.train_splits)}"
    kept = f"{len(assignment.eval_N)} of {', '.join(assignment.eval_splits)} to measure"
    classes = f"{len(assignment.classes)} classes, {'one' if assignment.single else 'several'} to a clip"
    ranks = f" on {trainer.world.size} ranks" if trainer.world.size > 1 else ""
    numbers = f"{trainer.precision.told}{ranks}"
    say(f"{run.path}: step {done} of {trainer.recipe.steps}, {rows}, {kept}, {classes}, {numbers}")


def fitted(recipe: Finetune, assignment: Assignment, start: Start | None) -> Finetune:
    """The recipe for this store: `own` shows views no longer than its clips.

    RunError where bands or loss do not fit, or where nobody has told the encoder of its bands.
    """
    store = assignment.store
    if start is None and isinstance(recipe.model, VitSpec) and recipe.model.encoder.band_norm:
        raise RunError(
            f"recipe {recipe.name}: band_norm is learnt in pre-training; leave it false, or give --from"
        )
    if recipe.model.bands != store.bands:
        raise RunError(
            f"{store.place}: holds {store.bands} bands, recipe {recipe.name} takes {recipe.model.bands}"
        )
    if recipe.loss == "ce" and not assignment.single:
        raise RunError(
            f"{store.place}: clips have several labels, which --set loss=ce cannot learn; leave it at bce or auto"
        )
    if assignment.task.classes is None and recipe.model.frames > store.frames:
        return replace(recipe, model=of_frames(recipe.model, store.frames))
    return recipe


def view_of(recipe: Finetune, identity: Json) -> View:
    """How clips are shown in training: cut, changed, mixed; normalised as the run will remember."""
    return View(
        frames=recipe.model.frames,
        mean=identity["mean"],
        std=identity["std"],
        crop=recipe.crop,
        label_set=identity["label_set"],
        seed=recipe.seed,
        augment=recipe.augment,
    )


def refuse_seen(start: Start | None, store: FeatureStore, measured: Sequence[str]) -> None:
    """RunError where the start learnt the labels of clips that are to be measured."""
    trained = splits_of_run(start.run, store) if start and start.run.finetuned else None
    if start and trained and (seen := [split for split in measured if split in trained[0]]):
        told = f"was fine-tuned on {', '.join(seen)}, which is to be measured here"
        raise RunError(f"{start.run.path}: {told}; start from a pre-trained run")
