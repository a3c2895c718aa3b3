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
    HeldOutScores,
    classifier_evaluation,
    classifier_protocol,
    has_final_evaluation,
    predict_logits_NC,
    run_splits_in_store,
)
from ajepa.evaluate.features import ClipViews, clip_vectors
from ajepa.evaluate.probe_splits import VALIDATION_SHARE
from ajepa.evaluate.probes import (
    L2_GRID,
    LinearProbe,
    linear_probe_loss,
    linear_probe_scores_NC,
    standardise_features,
)
from ajepa.evaluate.result import EVALUATION_FILE, Evaluation
from ajepa.evaluate.task_data import TaskData, select_task_data
from ajepa.evaluate.tasks import Task
from ajepa.finetune.trainer import FinetuneTrainer, refuse_unsplittable_model
from ajepa.model.classifier import ENCODER_PREFIX, VitClassifier, VitSpec, spec_for_frames
from ajepa.recipes.catalogue import recipe_to_json
from ajepa.recipes.finetune import Finetune
from ajepa.training.devices import PrecisionName, pick_device, pick_precision
from ajepa.training.distributed import SINGLE_PROCESS, join_ranks
from ajepa.training.flops import classifier_step_cost
from ajepa.training.loop import catch_stop_signals, open_run, run_training_loop, say_nothing
from ajepa.training.memory import refuse_large_classifier
from ajepa.training.meter import ComputeMeter
from ajepa.training.run import Json, Run
from ajepa.training.trained_run import AVERAGE_PART, CLASSIFIER_PART, TrainedRun
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.errors import RunError, StopSignal
from pipeline.loading.dali import open_loader
from pipeline.loading.loader import View
from pipeline.messages import print_to_stderr
from pipeline.store.feature_store import FeatureStore

HEAD_PROBE_CLIPS = 20_000  # to probe on at most


def fit_probed_head(
    model: VitClassifier, views: ClipViews, task_data: TaskData, seed: int, *, single: bool
) -> tuple[Tensor, Tensor]:
    """Weight `CD` and bias `C` of the probe on the frozen encoder, trained on the clips to train on alone.

    `single`: over all classes at once, else each by itself; as fine-tuning will go on.

    Probing first and fine-tuning then (arXiv 2202.10054): a head drawn at random pulls at the encoder until it has
    learnt what the encoder already knows. Of more than 20,000 clips so many are drawn; a class that none of these
    has begins at the lowest that the probe says of any of them.
    """
    drawn_N = np.random.default_rng([seed, 0]).permutation(task_data.train_N)[:HEAD_PROBE_CLIPS]
    rows_N = np.sort(drawn_N)
    labels_NC = task_data.labels_NC(rows_N)
    plain_ND = clip_vectors(views, rows_N, model.encoder.eval(), pooling=model.spec.pooling)
    width = plain_ND.shape[1]
    asked_ND = np.concatenate([np.zeros((1, width)), np.eye(width)]).astype(np.float32)
    train_ND, at_ND = standardise_features(
        plain_ND, asked_ND
    )  # features that tell the probe's bias and weights
    l2 = choose_head_penalty(train_ND, labels_NC, seed, single=single)
    scores_NC = torch.from_numpy(linear_probe_scores_NC(train_ND, labels_NC, at_ND, l2=l2, single=single))
    weight_CD, bias_C = (scores_NC[1:] - scores_NC[:1]).T.contiguous(), scores_NC[0]
    seen_C = torch.from_numpy(labels_NC.any(axis=0))
    told_NC = torch.from_numpy(plain_ND) @ weight_CD[seen_C].T + bias_C[seen_C]
    bias_C[~seen_C] = told_NC.min()
    return weight_CD, bias_C


def choose_head_penalty(train_ND: Tensor, labels_NC: np.ndarray, seed: int, *, single: bool) -> float:
    """That of the probe which loses least on a fifth of the clips, drawn by the seed; all of them train it then.

    Cross-entropy and not mAP, which does not mind weights however large: training begins where this ends.
    """
    order_N = np.random.default_rng([seed, 1]).permutation(len(train_ND))
    held_N, kept_N = np.split(order_N, [int(len(order_N) * VALIDATION_SHARE)])
    probe = LinearProbe.from_train_clips(train_ND[kept_N], labels_NC[kept_N], single=single)
    held_NC = torch.from_numpy(labels_NC[held_N][:, probe.present_C])

    def held_out_loss(l2: float) -> float:
        scores_NC = probe.fit_scores_NC(train_ND[held_N], l2=l2)[:, probe.present_C]
        return linear_probe_loss(torch.from_numpy(scores_NC), held_NC, single=single).item()

    return min(L2_GRID, key=held_out_loss)


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
    say: Callable[[str], None] = print_to_stderr,
) -> Run:
    """Train `recipe` on the task's clips of the store and measure the held-out ones; the finished run at `run_path`.

    The encoder is `start`'s, and `start.adapt_recipe` has fitted the recipe to it; without it training starts from
    nothing. What is measured at the end lies in RUN/evaluation.json, on the way in the metrics. `fold`: which of
    the store's folds is measured. Carried on, interrupted, dealt to ranks and to passes of `micro_batch` clips as
    `pretrain` is, `precision` and `recompute` as there; rank 0 alone measures. RunError or StoreError where task,
    store, start, recipe, device and memory do not fit, before anything is written.
    """
    with join_ranks() as world:
        tell = say if world.is_main else say_nothing
        store = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
        who = f"{start.run.path} was trained on" if start else f"recipe {recipe.name} needs"
        store.refuse_other_front_end(start.mel if start else preset_mel_spec(recipe.mel), who)
        on = pick_device(device, world.local_rank if world.size > 1 else None)
        numbers = pick_precision(precision, on)
        assignment = select_task_data(task, store, label_set=label_set, fold=fold)
        refuse_label_leak(start, store, assignment.eval_splits)
        recipe = recipe_for_store(recipe, assignment, start)
        refuse_unsplittable_model(recipe, world=world, micro_clips=micro_batch, recompute=recompute)
        order = assignment.order(recipe, world)
        recipe = recipe.with_step_count(order.steps_per_epoch)
        identity = assignment.identity() | {"from": start.checkpoint_identity() if start else None}
        view, classes = finetune_view(recipe, identity), len(assignment.classes)
        with open_loader(store, order, view, kind=loader, device=on, on_broken=on_broken, say=say) as batches:
            how: dict[str, Any] = {"recompute": recompute, "micro_clips": micro_batch}
            refuse_large_classifier(recipe, classes, on, half=numbers.is_half, world=world, **how)
            with open_run(world, run_path, recipe_to_json(recipe), identity) as (run, done):
                if done >= recipe.steps and (not world.is_main or has_final_evaluation(run)):
                    tell(f"{run.path}: already at its last step, {done}")
                    return run
                how |= {"precision": numbers, "world": world if done < recipe.steps else SINGLE_PROCESS}
                trainer = build_finetune_trainer(run, recipe, assignment, on, start, at=done, **how)
                log_training_start(run, assignment, trainer, done, tell)
                watch = FinetuneMonitor(run, trainer, assignment, identity) if world.is_main else None
                if done < recipe.steps:
                    with catch_stop_signals() as stop:
                        steps = batches.batches(done, recipe.steps)
                        done = run_training_loop(
                            run, trainer, steps, stop, progress=progress, monitor=watch, world=world
                        )
                if watch and done >= recipe.steps:
                    watch.final_evaluation().save_json(run.path / EVALUATION_FILE)
                trainer.world.wait_for_ranks()  # who ends first has the others terminated, also while they measure
        if done < recipe.steps:
            tell(f"{run.path}: checkpoint written at step {done} of {recipe.steps}")
            raise StopSignal
        return run


class FinetuneMonitor:
    """What measures the held-out clips on the way, and counts what training costs; `loop.Watch`."""

    def __init__(self, run: Run, trainer: FinetuneTrainer, task_data: TaskData, identity: Json) -> None:
        self.run, self.trainer, self.task_data = run, trainer, task_data
        self.views = whole_clip_views(task_data, trainer.recipe, identity)
        self.last_scores: HeldOutScores | None = None
        self.step_cost = classifier_step_cost(
            trainer.recipe, len(task_data.classes), recompute=trainer.recompute
        )
        self.meter = ComputeMeter(trainer.device, ranks=trainer.world.size)
        self.meter.resume_counts(run.path, run.newest_step)

    def after_step(self, steps_done: int) -> Json:
        """The metric on each label set, at the steps at which the recipe measures."""
        self.meter.count_step(self.step_cost)
        self.last_scores = (
            self.measure_held_out() if self.trainer.recipe.is_evaluation_step(steps_done) else None
        )
        return self.last_scores.primary_metrics() if self.last_scores else {}

    def before_checkpoint(self) -> None:
        """Write down what the run has cost up to the checkpoint that is about to be written."""
        self.meter.save_costs(self.run.path)

    def stop_reason(self) -> None:
        """Labels keep a model from collapsing; what does not learn is seen in what is measured."""

    def measure_held_out(self) -> HeldOutScores:
        """What the classifier says of them as its weights are now, in the precision that `evaluate` measures in."""
        trainer, rows_N = self.trainer, self.task_data.eval_N
        bf16 = pick_precision("auto", trainer.device).is_half
        logits_NC = predict_logits_NC(trainer.evaluated_model, self.views, rows_N, trainer.device, bf16=bf16)
        return HeldOutScores(task_data=self.task_data, logits_NC=logits_NC)

    def final_evaluation(self) -> Evaluation:
        """The scores of a finished run, with their protocol."""
        run, trainer = self.run, self.trainer
        part = CLASSIFIER_PART if trainer.weight_average is None else AVERAGE_PART
        weights = trainer.evaluated_model.state_dict()
        told = classifier_protocol(
            run,
            [self.task_data],
            step=run.newest_step,
            weights=weights,
            weights_name=part,
            device=trainer.device,
        )
        return classifier_evaluation(told, [self.last_scores or self.measure_held_out()])


def build_finetune_trainer(
    run: Run,
    recipe: Finetune,
    task_data: TaskData,
    device: torch.device,
    start: TrainedRun | None,
    *,
    at: int,
    **how: Any,
) -> FinetuneTrainer:
    """The trainer where the run stands: at its checkpoint of step `at`, or with the encoder that it starts from.

    And with its probed head, if the recipe asks for one. `how` is the rest of what a Finetuner is told.
    """
    merge_SC = torch.from_numpy(task_data.merge_SC)
    trainer = FinetuneTrainer(recipe, merge_SC, device, single_label=task_data.single, **how)
    if at:
        trainer.restore_checkpoint(run.load_checkpoint(at=at))
    elif start and trainer.world.is_main:
        trainer.load_weights(
            {f"{ENCODER_PREFIX}{name}": weight for name, weight in start.encoder_weights().items()}
        )
        if recipe.head == "probe" and isinstance(trainer.model, VitClassifier):
            views = whole_clip_views(task_data, recipe, run.identity)
            weight_CD, bias_C = fit_probed_head(
                trainer.model, views, task_data, recipe.seed, single=trainer.has_softmax_loss
            )
            trainer.load_weights({"head.weight": weight_CD, "head.bias": bias_C})
    for model in trainer.parts.values():
        trainer.world.copy_from_main_rank(model)
    return trainer


def whole_clip_views(task_data: TaskData, recipe: Finetune, identity: Json) -> ClipViews:
    """Whole clips in views of the model's length."""
    mean, std = identity["mean"], identity["std"]
    return ClipViews(store=task_data.store, frames=recipe.model.frames, mean=mean, std=std)


def log_training_start(
    run: Run, task_data: TaskData, trainer: FinetuneTrainer, steps_done: int, say: Callable[[str], None]
) -> None:
    """What is trained on what, and what is odd about it."""
    for note in task_data.notes:
        say(f"{task_data.store.location}: {note}")
    rows = f"{len(task_data.train_N)} clips of {', '.join(task_data.train_splits)}"
    kept = f"{len(task_data.eval_N)} of {', '.join(task_data.eval_splits)} to measure"
    classes = f"{len(task_data.classes)} classes, {'one' if task_data.single else 'several'} to a clip"
    ranks = f" on {trainer.world.size} ranks" if trainer.world.size > 1 else ""
    numbers = f"{trainer.precision.description}{ranks}"
    say(f"{run.path}: step {steps_done} of {trainer.recipe.steps}, {rows}, {kept}, {classes}, {numbers}")


def recipe_for_store(recipe: Finetune, task_data: TaskData, start: TrainedRun | None) -> Finetune:
    """The recipe for this store: `own` shows views no longer than its clips.

    RunError where bands or loss do not fit, or where nobody has told the encoder of its bands.
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


def finetune_view(recipe: Finetune, identity: Json) -> View:
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


def refuse_label_leak(start: TrainedRun | None, store: FeatureStore, eval_splits: Sequence[str]) -> None:
    """RunError where the start learnt the labels of clips that are to be measured."""
    trained = run_splits_in_store(start.run, store) if start and start.run.is_finetuned else None
    if start and trained and (seen := [split for split in eval_splits if split in trained[0]]):
        told = f"was fine-tuned on {', '.join(seen)}, which is to be measured here"
        raise RunError(f"{start.run.path}: {told}; start from a pre-trained run")
