"""Fine-tuning: a classifier trained on a task's clips, from a pre-trained encoder or from random weights, and measured.

The head may start as the linear probe on the frozen encoder, before any step (`fit_probed_head`).
"""

from collections.abc import Callable, Sequence
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
)
from ajepa.evaluate.features import ClipViews, clip_vectors
from ajepa.evaluate.linear_probe import L2_GRID, LinearProbe, linear_probe_loss
from ajepa.evaluate.overlap import measure_overlap
from ajepa.evaluate.probe_splits import hold_back_sounds
from ajepa.evaluate.probes import feature_mean_and_scale
from ajepa.evaluate.result import EVALUATION_FILE, Evaluation
from ajepa.evaluate.task_data import TaskData
from ajepa.evaluate.tasks import Task
from ajepa.finetune.setup import (
    FinetuneSetup,
    finetune_stores,
    finetune_view,
    open_finetune_loader,
    prepare_finetune,
    refuse_large_finetune,
)
from ajepa.finetune.trainer import FinetuneTrainer
from ajepa.model.classifier import ENCODER_PREFIX, VitClassifier
from ajepa.recipes.catalogue import recipe_to_json
from ajepa.recipes.finetune import Finetune
from ajepa.training.bad_steps import OnBadStep, refuse_unknown_choice
from ajepa.training.devices import Precision, PrecisionName, pick_measuring_precision
from ajepa.training.distributed import SINGLE_PROCESS, join_ranks
from ajepa.training.flops import classifier_step_cost
from ajepa.training.loggers import refuse_missing_loggers
from ajepa.training.loop import (
    TrainingMonitor,
    catch_stop_signals,
    open_run,
    raise_if_interrupted,
    run_training_loop,
)
from ajepa.training.meter import ComputeMeter
from ajepa.training.run import Json, Run
from ajepa.training.run_identity import RunIdentity
from ajepa.training.trained_run import AVERAGE_PART, CLASSIFIER_PART, TrainedRun, describe_choice
from pipeline.loading.loader import Loader, PlainLoader
from pipeline.messages import print_to_stderr
from pipeline.store.feature_store import FeatureStore

HEAD_PROBE_CLIPS = 20_000  # the most clips that a head is probed on
HEAD_CHECK_CLIPS = (
    256  # the first clips of the training, on which the probed head is compared with a random one
)
HEAD_CHECK_PASS = 16  # clips that pass through the model at once there

# Streams of a recipe's seed, for the two draws of a probed head.
HEAD_CLIPS_DRAW = 0
HEAD_PENALTY_DRAW = 1


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
    on_bad_step: OnBadStep = "stop",
    loggers: Sequence[str] = (),
    progress: bool = False,
    say: Callable[[str], None] = print_to_stderr,
) -> Run:
    """Train `recipe` on the task's clips of the store and measure the held-out ones; the finished run at `run_path`.

    start      a run whose encoder training starts from, after `start.adapt_recipe` has fitted the recipe to it;
               None: from random weights
    label_set  the labels to train on
    fold       which of the store's folds is measured

    Scores on the way are in the run's metrics, those at the end in RUN/evaluation.json. The run is carried on,
    interrupted, and dealt to ranks and to passes of `micro_batch` clips as `pretrain` says, where the other options
    are explained too; rank 0 alone measures. RunError or StoreError where task, store, start, recipe, device and
    memory do not fit, before anything is written.
    """
    with join_ranks() as world:
        tell = world.main_rank_only(say)
        refuse_unknown_choice(on_bad_step)
        refuse_missing_loggers(loggers)

        # Fit data, recipe and device to each other; what does not fit is refused before the run's folder is made.
        setup = prepare_finetune(
            store,
            task,
            recipe,
            start,
            label_set=label_set,
            fold=fold,
            device=device,
            precision=precision,
            world=world,
            micro_clips=micro_batch,
            recompute=recompute,
        )
        with open_finetune_loader(setup, kind=loader, on_broken=on_broken, say=say) as batches:
            refuse_large_finetune(setup)

            # Train and measure while no other process can write to the run.
            recipe_json = recipe_to_json(setup.recipe)
            with open_run(
                world,
                run_path,
                recipe_json,
                setup.identity,
                precision=setup.precision.name,
                trained_stores=finetune_stores(setup),
            ) as (run, first_step):
                steps_done = train_and_measure(
                    setup,
                    run,
                    first_step,
                    batches,
                    on_bad_step=on_bad_step,
                    loggers=loggers,
                    progress=progress,
                    say=tell,
                )

        # A run that was interrupted ends as one, once its folder is unlocked.
        raise_if_interrupted(run, steps_done, setup.recipe.steps, tell)
        return run


def train_and_measure(
    setup: FinetuneSetup,
    run: Run,
    first_step: int,
    batches: Loader,
    *,
    on_bad_step: OnBadStep,
    loggers: Sequence[str] = (),
    progress: bool,
    say: Callable[[str], None],
) -> int:
    """Take the steps from `first_step` on and measure the held-out clips; the steps done, all or up to a stop signal.

    After the last step the scores are in the run's evaluation.json.
    """
    # A run that is trained but not measured is left to the main rank.
    is_main = setup.world.is_main
    is_trained = first_step >= setup.recipe.steps
    if is_trained and (not is_main or has_final_evaluation(run)):
        say(f"{run.path}: already at its last step, {first_step}")
        return first_step

    # Build classifier and optimiser: as the checkpoint left them, or new ones.
    trainer = build_finetune_trainer(
        run,
        setup.recipe,
        setup.task_data,
        setup.device,
        setup.start,
        at=first_step,
        world=SINGLE_PROCESS if is_trained else setup.world,
        micro_clips=setup.micro_clips,
        precision=setup.precision,
        recompute=setup.recompute,
        say=say,
    )
    log_training_start(run, setup.task_data, trainer, first_step, say)
    if first_step == run.first_step and (phase := run.describe_phase()):
        say(f"{run.path}: {phase}")

    # Train, and measure the held-out clips on the way.
    monitor = FinetuneMonitor(run, trainer, setup.task_data, setup.identity) if is_main else None
    steps_done = first_step
    if not is_trained:
        steps_done = take_remaining_steps(
            run,
            trainer,
            first_step,
            batches,
            monitor,
            on_bad_step=on_bad_step,
            loggers=loggers,
            progress=progress,
        )

    # Keep the scores of the last step. torchrun terminates all ranks when one ends: the others wait.
    if monitor and steps_done >= setup.recipe.steps:
        monitor.final_evaluation().save_json(run.path / EVALUATION_FILE)
    trainer.world.wait_for_ranks()
    return steps_done


def take_remaining_steps(
    run: Run,
    trainer: FinetuneTrainer,
    first_step: int,
    batches: Loader,
    monitor: TrainingMonitor | None,
    *,
    on_bad_step: OnBadStep,
    loggers: Sequence[str] = (),
    progress: bool,
) -> int:
    """Run the training loop from `first_step` to the recipe's last step or a stop signal; the steps done."""
    with catch_stop_signals() as stop:
        return run_training_loop(
            run,
            trainer,
            batches.batches(first_step, trainer.recipe.steps),
            stop,
            progress=progress,
            monitor=monitor,
            on_bad_step=on_bad_step,
            loggers=loggers,
            world=trainer.world,
        )


class FinetuneMonitor:
    """The `loop.TrainingMonitor` of fine-tuning: measures the held-out clips on the way, and counts the cost."""

    def __init__(
        self, run: Run, trainer: FinetuneTrainer, task_data: TaskData, identity: RunIdentity
    ) -> None:
        self.run = run
        self.trainer = trainer
        self.task_data = task_data
        self.views = whole_clip_views(task_data, trainer.recipe, identity)
        self.last_scores: HeldOutScores | None = None  # of the last step that was taken, if it was measured

        # Every step costs the same.
        self.step_cost = classifier_step_cost(
            trainer.recipe, len(task_data.classes), recompute=trainer.recompute
        )
        self.meter = ComputeMeter(trainer.device, ranks=trainer.world.size)
        self.meter.resume_counts(run.path, run.newest_step)

    def after_step(self, steps_done: int) -> Json:
        """The primary metric on each label set, at the recipe's steps; else an empty line."""
        self.meter.count_step(self.step_cost)
        self.last_scores = None
        if not self.trainer.recipe.is_evaluation_step(steps_done):
            return {}
        self.last_scores = self.measure_held_out()
        return self.last_scores.primary_metrics()

    def count_bad_step(self) -> None:
        """Count a step that was passed over in the cost of the run."""
        self.meter.count_bad_step()

    @property
    def measuring_precision(self) -> Precision:
        """The precision of the network that is measured; `evaluate` takes the same."""
        return pick_measuring_precision("auto", self.trainer.device, self.trainer.precision.name)

    @property
    def scored_clips(self) -> None:
        """None: the last checkpoint is the result, so that none is chosen by a score."""

    def before_checkpoint(self) -> None:
        """Write the cost of the run up to the checkpoint that is about to be written."""
        self.meter.save_costs(self.run.path)

    def stop_reason(self) -> None:
        """None: labels keep a classifier from collapsing, and its scores show whether it learns."""

    def measure_held_out(self) -> HeldOutScores:
        """The classifier's logits for the held-out clips as it is now, in the precision that `evaluate` takes."""
        trainer = self.trainer
        logits_NC = predict_logits_NC(
            trainer.evaluated_model,
            self.views,
            self.task_data.eval_N,
            trainer.device,
            precision=self.measuring_precision,
        )
        return HeldOutScores(task_data=self.task_data, logits_NC=logits_NC)

    def final_evaluation(self) -> Evaluation:
        """The scores of a finished run, with their protocol."""
        trainer = self.trainer
        protocol = classifier_protocol(
            self.run,
            [self.task_data],
            step=self.run.newest_step,
            weights=trainer.evaluated_model.state_dict(),
            weights_name=CLASSIFIER_PART if trainer.weight_average is None else AVERAGE_PART,
            device=trainer.device,
            precision=self.measuring_precision,
            chosen_by=describe_choice(self.run, "last"),
            overlap=measure_overlap(self.run, self.task_data.store, self.task_data.eval_N),
        )
        return classifier_evaluation(protocol, [self.last_scores or self.measure_held_out()])


def build_finetune_trainer(
    run: Run,
    recipe: Finetune,
    task_data: TaskData,
    device: torch.device,
    start: TrainedRun | None,
    *,
    at: int,
    say: Callable[[str], None] = print_to_stderr,
    **trainer_options: Any,
) -> FinetuneTrainer:
    """The trainer as the run's checkpoint of step `at` left it; at 0 a new one, with the encoder of `start`.

    A new one also gets a probed head, if the recipe asks for it and the head is better than a random one
    (`load_probed_head`). `trainer_options` go to `FinetuneTrainer`.
    """
    merge_SC = torch.from_numpy(task_data.merge_SC)
    trainer = FinetuneTrainer(recipe, merge_SC, device, single_label=task_data.single, **trainer_options)
    if at:
        trainer.restore_checkpoint(run.load_checkpoint(at=at))
    elif start and trainer.world.is_main:
        # The encoder first: the head is probed on it.
        encoder = {f"{ENCODER_PREFIX}{name}": weight for name, weight in start.encoder_weights().items()}
        trainer.load_weights(encoder)
        if recipe.head == "probe" and isinstance(trainer.model, VitClassifier):
            load_probed_head(trainer, trainer.model, task_data, run.identity, say)

    # All ranks start from the same weights.
    for model in trainer.parts.values():
        trainer.world.copy_from_main_rank(model)
    return trainer


def load_probed_head(
    trainer: FinetuneTrainer,
    model: VitClassifier,
    task_data: TaskData,
    identity: RunIdentity,
    say: Callable[[str], None],
) -> None:
    """Let the head start as a linear probe, unless its loss on clips as training shows them is above a random head's.

    The probe is fitted to whole, clean clips. Features of an encoder that has learnt next to nothing hardly differ
    between such clips, its weights for them are huge, and a masked stretch of time moves the features further than any
    other clip does: a loss of 300 was seen, where a random head has 0.7. Such a head would pull the encoder apart.
    """
    recipe = trainer.recipe
    random_head = {f"head.{name}": weight.clone() for name, weight in model.head.state_dict().items()}
    random_loss = first_clips_loss(trainer, model, task_data, identity)

    views = whole_clip_views(task_data, recipe, identity)
    weight_CD, bias_C = fit_probed_head(model, views, task_data, recipe.seed, single=trainer.has_softmax_loss)
    trainer.load_weights({"head.weight": weight_CD, "head.bias": bias_C})
    probed_loss = first_clips_loss(trainer, model, task_data, identity)
    if not probed_loss <= random_loss:
        trainer.load_weights(random_head)
        say(
            f"the head begins at random: as a probe it has a loss of {probed_loss:.3g} on clips as training shows "
            f"them, a random one {random_loss:.3g}; longer pre-training may help"
        )


@torch.inference_mode()
def first_clips_loss(
    trainer: FinetuneTrainer, model: VitClassifier, task_data: TaskData, identity: RunIdentity
) -> float:
    """The mean loss on the first clips of the training, cut, augmented and mixed as there; the model draws nothing."""
    recipe = trainer.recipe
    order = task_data.order(recipe)
    loader = PlainLoader(task_data.store, order, finetune_view(task_data, recipe, identity), trainer.device)
    model.train(False)
    losses = []
    for batch in loader.batches(0, max(1, min(order.steps_per_epoch, HEAD_CHECK_CLIPS // order.clips))):
        labels_BC = trainer.labels_BC(batch)
        for first in range(0, order.clips, HEAD_CHECK_PASS):
            clips = slice(first, first + HEAD_CHECK_PASS)
            logits_BC = model(batch.mel_BTF[clips], batch.n_frames_B[clips])
            losses += [trainer.loss(logits_BC, labels_BC[clips])] * len(logits_BC)
    return float(torch.stack(losses).mean())


def fit_probed_head(
    model: VitClassifier, views: ClipViews, task_data: TaskData, seed: int, *, single: bool
) -> tuple[Tensor, Tensor]:
    """Weight `CD` and bias `C` of a linear probe on the frozen encoder, trained on the task's training clips.

    `single`: one loss over all classes, else one for each; the same as in fine-tuning afterwards.

    First the probe, then fine-tuning (arXiv 2202.10054): a head drawn at random pulls at the encoder until it has
    learnt what the encoder already knows. Of more than HEAD_PROBE_CLIPS clips so many are drawn. A class that none
    of them has starts at the lowest score that the probe gives to any of them.
    """
    # Draw the clips, and encode them.
    drawn_N = np.random.default_rng([seed, HEAD_CLIPS_DRAW]).permutation(task_data.train_N)
    rows_N = np.sort(drawn_N[:HEAD_PROBE_CLIPS])
    labels_NC = task_data.labels_NC(rows_N)
    plain_ND = clip_vectors(views, rows_N, model.encoder.eval(), pooling=model.spec.pooling)

    # Fit the probe to standardised features, on the device that trains.
    mean_D, scale_D = feature_mean_and_scale(plain_ND)
    train_ND = torch.from_numpy((plain_ND - mean_D) * scale_D).to(model.head.weight.device)
    held_N = held_back_places(task_data, rows_N, seed)
    l2 = choose_head_penalty(train_ND, labels_NC, held_N, single=single)
    probe = LinearProbe.from_train_clips(train_ND, labels_NC, single=single)
    weights = probe.fit(l2)

    # The weights of the features as the head gets them, of the classes that have a clip.
    classes = labels_NC.shape[1]
    weight_CD = torch.zeros(classes, plain_ND.shape[1])
    weight_CD[probe.present_C] = probe.feature_weights_DC(weights).T.cpu() * torch.from_numpy(scale_D)
    bias_C = torch.zeros(classes)
    bias_C[probe.present_C] = weights.bias_C.cpu() - weight_CD[probe.present_C] @ torch.from_numpy(mean_D)

    # A class without a clip begins no higher than the clips' lowest score; weights of 0 are free to rise from there.
    lowest = probe.score_clips(weights, train_ND).min()
    bias_C[np.setdiff1d(np.arange(classes), probe.present_C)] = float(lowest)
    return weight_CD, bias_C


def held_back_places(task_data: TaskData, rows_N: np.ndarray, seed: int) -> np.ndarray:
    """Which of some rows choose the penalty of a probed head, bool `N`: a fifth of them, in whole sounds."""
    order_N = np.random.default_rng([seed, HEAD_PENALTY_DRAW]).permutation(rows_N)
    held_N, _ = hold_back_sounds(order_N, task_data.store.manifest)
    return np.isin(rows_N, held_N)


def choose_head_penalty(
    train_ND: Tensor, labels_NC: np.ndarray, is_held_N: np.ndarray, *, single: bool
) -> float:
    """The penalty of the probe with the lowest loss on the held-back clips, trained on the others.

    The loss is the cross-entropy: mAP does not mind weights however large, and training goes on from these.
    """
    held_N = np.flatnonzero(is_held_N)
    fit_N = np.flatnonzero(~is_held_N)
    probe = LinearProbe.from_train_clips(train_ND[fit_N], labels_NC[fit_N], single=single)
    held_NC = torch.from_numpy(labels_NC[held_N][:, probe.present_C])
    losses = []
    for weights in probe.fit_penalties(L2_GRID):
        scores_NC = torch.from_numpy(probe.score_clips(weights, train_ND[held_N])[:, probe.present_C])
        losses.append(linear_probe_loss(scores_NC, held_NC, single=single).item())
    return L2_GRID[int(np.argmin(losses))]


def whole_clip_views(task_data: TaskData, recipe: Finetune, identity: RunIdentity) -> ClipViews:
    """The store's clips, each whole, in views of the model's length."""
    return ClipViews(store=task_data.store, frames=recipe.model.frames, mean=identity.mean, std=identity.std)


def log_training_start(
    run: Run, task_data: TaskData, trainer: FinetuneTrainer, steps_done: int, say: Callable[[str], None]
) -> None:
    """Say what is unusual about the task's data, then what is trained on which clips."""
    for note in task_data.notes:
        say(f"{task_data.store.location}: {note}")
    say(
        f"{run.path}: step {steps_done} of {trainer.recipe.steps}, "
        f"{len(task_data.train_N)} clips of {', '.join(task_data.train_splits)}, "
        f"{len(task_data.eval_N)} of {', '.join(task_data.eval_splits)} to measure, "
        f"{len(task_data.classes)} classes, {'one' if task_data.single else 'several'} to a clip, "
        f"{trainer.precision.description}{trainer.world.ranks_note}"
    )
