"""Probed head: a classifier's head as the linear probe on its frozen encoder has it, before any step.

Fine-tuning: a task on a store learnt by a classifier, from a pre-trained encoder or from nothing, and measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ajepa.evaluate.classifier_scores import (
    Held,
    judged,
    logits_of,
    measured_at_its_end,
    protocol,
    splits_of_run,
)
from ajepa.evaluate.features import Views, features
from ajepa.evaluate.probe_splits import HELD_SHARE
from ajepa.evaluate.probes import L2_GRID, LinearProbe, linear_NC, linear_probe_loss, standardised
from ajepa.evaluate.result import EVALUATION, Evaluation
from ajepa.evaluate.task_data import Assignment, assigned
from ajepa.evaluate.tasks import Task
from ajepa.finetune.trainer import Finetuner, refuse_parts
from ajepa.model.classifier import ENCODER, Vit, VitSpec, of_frames
from ajepa.recipes.catalogue import to_json
from ajepa.recipes.finetune import Finetune
from ajepa.training.devices import PrecisionName, pick_device, pick_precision
from ajepa.training.devices import precision as hardware_precision
from ajepa.training.distributed import ALONE, joined
from ajepa.training.flops import classifier_step_cost
from ajepa.training.loop import asked_to_stop, begun, quiet, train
from ajepa.training.memory import refuse_large_classifier
from ajepa.training.meter import Meter
from ajepa.training.run import Json, Run
from ajepa.training.trained_run import AVERAGE, CLASSIFIER, TrainedRun
from pipeline.audio.mel_spec import mel_spec
from pipeline.errors import Interrupted, RunError
from pipeline.loading.dali import open_loader
from pipeline.loading.loader import View
from pipeline.messages import to_stderr
from pipeline.store.feature_store import FeatureStore

CLIPS = 20_000  # to probe on at most


def probed_head(
    model: Vit, views: Views, assignment: Assignment, seed: int, *, single: bool
) -> tuple[Tensor, Tensor]:
    """Weight `CD` and bias `C` of the probe on the frozen encoder, trained on the clips to train on alone.

    `single`: over all classes at once, else each by itself; as fine-tuning will go on.

    Probing first and fine-tuning then (arXiv 2202.10054): a head drawn at random pulls at the encoder until it has
    learnt what the encoder already knows. Of more than 20,000 clips so many are drawn; a class that none of these
    has begins at the lowest that the probe says of any of them.
    """
    drawn_N = np.random.default_rng([seed, 0]).permutation(assignment.train_N)[:CLIPS]
    rows_N = np.sort(drawn_N)
    labels_NC = assignment.labels_NC(rows_N)
    plain_ND = features(views, rows_N, model.encoder.eval(), pooling=model.spec.pooling)
    width = plain_ND.shape[1]
    asked_ND = np.concatenate([np.zeros((1, width)), np.eye(width)]).astype(np.float32)
    train_ND, at_ND = standardised(plain_ND, asked_ND)  # features that tell the probe's bias and weights
    l2 = penalty(train_ND, labels_NC, seed, single=single)
    scores_NC = torch.from_numpy(linear_NC(train_ND, labels_NC, at_ND, l2=l2, single=single))
    weight_CD, bias_C = (scores_NC[1:] - scores_NC[:1]).T.contiguous(), scores_NC[0]
    seen_C = torch.from_numpy(labels_NC.any(axis=0))
    told_NC = torch.from_numpy(plain_ND) @ weight_CD[seen_C].T + bias_C[seen_C]
    bias_C[~seen_C] = told_NC.min()
    return weight_CD, bias_C


def penalty(train_ND: Tensor, labels_NC: np.ndarray, seed: int, *, single: bool) -> float:
    """That of the probe which loses least on a fifth of the clips, drawn by the seed; all of them train it then.

    Cross-entropy and not mAP, which does not mind weights however large: training begins where this ends.
    """
    order_N = np.random.default_rng([seed, 1]).permutation(len(train_ND))
    held_N, kept_N = np.split(order_N, [int(len(order_N) * HELD_SHARE)])
    probe = LinearProbe.of(train_ND[kept_N], labels_NC[kept_N], single=single)
    held_NC = torch.from_numpy(labels_NC[held_N][:, probe.seen_C])

    def loss(l2: float) -> float:
        scores_NC = probe.scores_NC(train_ND[held_N], l2=l2)[:, probe.seen_C]
        return linear_probe_loss(torch.from_numpy(scores_NC), held_NC, single=single).item()

    return min(L2_GRID, key=loss)


def finetune(
    store: Path | str | FeatureStore,
    task: Task,
    recipe: Finetune,
    run_path: Path,
    *,
    start: TrainedRun | None = None,
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

    The encoder is `start`'s, and `start.adapt_recipe` has fitted the recipe to it; without it training starts from
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
        identity = assignment.identity() | {"from": start.checkpoint_identity() if start else None}
        view, classes = view_of(recipe, identity), len(assignment.classes)
        with open_loader(store, order, view, kind=loader, device=on, on_broken=on_broken, say=say) as batches:
            how: dict[str, Any] = {"recompute": recompute, "micro_clips": micro_batch}
            refuse_large_classifier(recipe, classes, on, half=numbers.half, world=world, **how)
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
        self.cost = classifier_step_cost(trainer.recipe, len(assignment.classes), recompute=trainer.recompute)
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
    start: TrainedRun | None,
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
        trainer.take({f"{ENCODER}{name}": weight for name, weight in start.encoder_weights().items()})
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


def fitted(recipe: Finetune, assignment: Assignment, start: TrainedRun | None) -> Finetune:
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


def refuse_seen(start: TrainedRun | None, store: FeatureStore, measured: Sequence[str]) -> None:
    """RunError where the start learnt the labels of clips that are to be measured."""
    trained = splits_of_run(start.run, store) if start and start.run.finetuned else None
    if start and trained and (seen := [split for split in measured if split in trained[0]]):
        told = f"was fine-tuned on {', '.join(seen)}, which is to be measured here"
        raise RunError(f"{start.run.path}: {told}; start from a pre-trained run")
