"""Fine-tuning: a task on a store learnt by a classifier, from a pre-trained encoder or from nothing, and measured."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from ajepa.assignment import Assignment, assigned
from ajepa.classifier import Vit
from ajepa.devices import pick_device
from ajepa.evaluation import EVALUATION, Evaluation
from ajepa.features import Views
from ajepa.finetuner import AVERAGE, CLASSIFIER, Finetuner
from ajepa.finetuning import Finetune
from ajepa.loop import asked_to_stop, train
from ajepa.models import of_frames
from ajepa.probed_head import probed_head
from ajepa.recipes import to_json
from ajepa.run import Json, Run
from ajepa.scores import Held, judged, logits_of, measured_at_its_end, protocol
from ajepa.start import Start
from ajepa.tasks.task import Task
from pipeline.dali import open_loader
from pipeline.errors import Interrupted, RunError
from pipeline.loader import View, to_stderr
from pipeline.melspec import MelSpec, mel_spec
from pipeline.store import FeatureStore


def finetune(
    store: Path | str | FeatureStore,
    task: Task,
    recipe: Finetune,
    run_path: Path,
    *,
    start: Start | None = None,
    label_set: str = "raw",
    fold: int | None = None,
    device: str = "auto",
    loader: Literal["dali", "plain"] = "dali",
    on_broken: Literal["raise", "skip"] = "raise",
    progress: bool = False,
    say: Callable[[str], None] = to_stderr,
) -> Run:
    """Train `recipe` on the task's clips of the store and measure the held-out ones; the finished run at `run_path`.

    The encoder is `start`'s, whose recipe `Start.adopted` has made this one of; without it training starts from
    nothing. What is measured at the end lies in RUN/evaluation.json, on the way in the metrics. `fold`: which of
    the store's folds is measured. Carried on and interrupted as `pretrain` is; RunError or StoreError where task,
    store, start and recipe do not fit, before anything is written.
    """
    store = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    refuse_other_mel(store, recipe, start)
    on, assignment = pick_device(device), assigned(task, store, label_set=label_set, fold=fold)
    recipe = fitted(recipe, assignment)
    order = assignment.order(recipe)
    recipe = recipe.of_epochs(order.steps_per_epoch)
    identity = assignment.identity() | {"from": start.identity() if start else None}
    view = view_of(recipe, identity)
    with open_loader(store, order, view, kind=loader, device=on, on_broken=on_broken, say=say) as batches:
        run = Run.start(run_path, recipe=to_json(recipe), identity=identity)
        with run.locked():
            run.rewind()
            if run.finished and measured_at_its_end(run):
                say(f"{run.path}: already at its last step, {run.step}")
                return run
            trainer = trainer_of(run, recipe, assignment, on, start)
            watch = Measuring(trainer, assignment, identity)
            told(run, recipe, assignment, trainer, say)
            if not run.finished:
                with asked_to_stop() as stop:
                    steps = batches.batches(run.step, recipe.steps)
                    train(run, trainer, steps, stop, progress=progress, watch=watch)
            if run.finished:
                watch.evaluation(run).save(run.path / EVALUATION)
    if not run.finished:
        say(f"{run.path}: checkpoint written at step {run.step} of {recipe.steps}; run me again to carry on")
        raise Interrupted
    return run


class Measuring:
    """What measures the held-out clips on the way; `loop.Watch`."""

    def __init__(self, trainer: Finetuner, assignment: Assignment, identity: Json) -> None:
        self.trainer, self.assignment = trainer, assignment
        self.views = views_of(assignment, trainer.recipe, identity)
        self.last: Held | None = None

    def after(self, done: int) -> Json:
        """The metric on each label set, at the steps at which the recipe measures."""
        self.last = self.measure() if self.trainer.recipe.evaluated(done) else None
        return self.last.logged() if self.last else {}

    def saving(self) -> None:
        """Nothing of what is measured is carried on with."""

    def ill(self) -> None:
        """Labels keep a model from collapsing; what does not learn is seen in what is measured."""

    def measure(self) -> Held:
        """What the classifier says of them as its weights are now."""
        trainer, rows_N = self.trainer, self.assignment.eval_N
        logits_NC = logits_of(trainer.measured, self.views, rows_N, trainer.device, bf16=trainer.bf16)
        return Held(assignment=self.assignment, logits_NC=logits_NC)

    def evaluation(self, run: Run) -> Evaluation:
        """The scores of a finished run, with their protocol."""
        trainer = self.trainer
        part = CLASSIFIER if trainer.average is None else AVERAGE
        weights = trainer.measured.state_dict()
        told = protocol(
            run, [self.assignment], step=run.step, weights=weights, part=part, device=trainer.device
        )
        return judged(told, [self.last or self.measure()])


def trainer_of(
    run: Run, recipe: Finetune, assignment: Assignment, device: torch.device, start: Start | None
) -> Finetuner:
    """The trainer where the run stands: at its newest checkpoint, or with the encoder that it starts from.

    And with its probed head, if the recipe asks for one.
    """
    merge_SC = torch.from_numpy(assignment.merge_SC)
    trainer = Finetuner(recipe, merge_SC, device, single=assignment.single)
    if run.step:
        trainer.restore(run.load())
    elif start:
        trainer.take(start.weights())
        if recipe.head == "probe" and isinstance(trainer.model, Vit):
            views = views_of(assignment, recipe, run.identity)
            weight_CD, bias_C = probed_head(trainer.model, views, assignment, recipe.seed)
            trainer.take({"head.weight": weight_CD, "head.bias": bias_C})
    return trainer


def views_of(assignment: Assignment, recipe: Finetune, identity: Json) -> Views:
    """Whole clips in views of the model's length."""
    mean, std = identity["mean"], identity["std"]
    return Views(store=assignment.store, frames=recipe.model.frames, mean=mean, std=std)


def told(
    run: Run, recipe: Finetune, assignment: Assignment, trainer: Finetuner, say: Callable[[str], None]
) -> None:
    """What is trained on what, and what is odd about it."""
    for note in assignment.notes:
        say(f"{assignment.store.place}: {note}")
    rows = f"{len(assignment.train_N)} clips of {', '.join(assignment.train_splits)}"
    kept = f"{len(assignment.eval_N)} of {', '.join(assignment.eval_splits)} to measure"
    classes = f"{len(assignment.classes)} classes, {'one' if assignment.single else 'several'} to a clip"
    say(f"{run.path}: step {run.step} of {recipe.steps}, {rows}, {kept}, {classes}, {trainer.precision}")


def fitted(recipe: Finetune, assignment: Assignment) -> Finetune:
    """The recipe for this store: `own` shows views no longer than its clips.

    RunError where bands or loss do not fit.
    """
    store = assignment.store
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


def refuse_other_mel(store: FeatureStore, recipe: Finetune, start: Start | None) -> None:
    """RunError where the store's features are not those that the start was trained on, or the recipe was made for.

    The length of a clip is no matter.
    """
    wanted = start.mel if start else mel_spec(recipe.mel)
    if of_length(wanted, store.spec).spec_id == store.spec.spec_id:
        return
    held, asked = (f"{spec.name} ({spec.mel_bands} bands, {spec.spec_id})" for spec in (store.spec, wanted))
    who = f"{start.run.path} was trained on" if start else f"recipe {recipe.name} needs"
    raise RunError(
        f"{store.place}: holds mel spec {held}, {who} {asked}; build a store with --spec {wanted.name}"
    )


def of_length(spec: MelSpec, other: MelSpec) -> MelSpec:
    """The spec with clips as long as those of another."""
    return replace(spec, clip_seconds=other.clip_seconds)
