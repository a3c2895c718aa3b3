"""The monitor of a pre-training run: health of the encoder, collapse, probes on labelled clips, and cost.

The monitor looks at the model as it learns and changes nothing of it: a monitored run has the same weights, bit for
bit, as one without a monitor.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ajepa.evaluate.features import ClipViews, clip_vectors
from ajepa.evaluate.linear_probe import linear_probe_scores_NC
from ajepa.evaluate.metrics import mean_average_precision
from ajepa.evaluate.probe_splits import (
    MAX_CROSS_VALIDATED_CLIPS,
    MIN_CLIPS_TO_SELECT,
    VALIDATION_SHARE,
    hold_back_sounds,
    train_and_val_splits,
)
from ajepa.evaluate.probes import knn_scores_NC, standardise_features
from ajepa.model.jepa import DIVISOR_FLOOR, Jepa
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.flops import pretrain_step_cost
from ajepa.training.loop import SCORE_METRIC
from ajepa.training.meter import ComputeMeter
from ajepa.training.run import Json, Run
from ajepa.training.run_identity import RunIdentity
from pipeline.errors import BrokenClipError, RunError
from pipeline.loading.loader import NO_AUGMENTATION, Batch, PlainLoader, View
from pipeline.loading.sampling import RowOrder
from pipeline.store.joined_store import AnyStore
from pipeline.store.splits import FOLD_PATTERN, evaluation_splits, train_splits

HEALTH_CLIPS = 32

# A dimension is dead if it deviates by less than this share of the features' root mean square.
DEAD_SHARE = 0.01

RANK_EPSILON = 1e-7  # of RankMe (arXiv 2210.02885), added to each share

# Takes the place of the step in the generator of draws that are the same for a whole run: no run gets that far.
FIXED_DRAW_STEP = 2**31

# The streams of a recipe's seed that draw the clips to train a probe on, and those to measure it on.
TRAIN_DRAW = 0
VAL_DRAW = 2


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HealthBatch:
    """Clips and masks that stay the same for a whole run, on the model's device."""

    mel_BTF: Tensor
    n_frames_B: Tensor  # on the CPU, where the model wants it
    context_BK: Tensor
    targets_BGQ: Tensor

    @classmethod
    def from_batch(cls, batch: Batch, recipe: Pretrain) -> "HealthBatch":
        """The clips of a batch, under masks of the kind that the run ends with."""
        rng = np.random.default_rng([recipe.seed, FIXED_DRAW_STEP])
        mask_maker = recipe.masks.mask_maker_at(recipe.steps - 1, rng)
        masks = mask_maker.sample(rng, recipe.sound_grid, batch=len(batch.rows_B))
        device = batch.mel_BTF.device
        return cls(
            mel_BTF=batch.mel_BTF[:, : recipe.sound_grid.frames],
            n_frames_B=batch.n_frames_B,
            context_BK=torch.from_numpy(masks.context_BK).to(device),
            targets_BGQ=torch.from_numpy(masks.targets_BGQ).to(device),
        )


def draw_health_rows(store: AnyStore, seed: int) -> np.ndarray:
    """At most HEALTH_CLIPS good rows, drawn by `seed`: held-out clips, or training clips where there are none."""
    held_out_splits = evaluation_splits(store)
    rows_N = store.good_rows(held_out_splits) if held_out_splits else np.empty(0, np.int64)
    if not len(rows_N):
        rows_N = store.good_rows(train_splits(store))
    return np.sort(np.random.default_rng([seed, FIXED_DRAW_STEP]).permutation(rows_N)[:HEALTH_CLIPS])


@torch.no_grad()
def measure_health(model: Jepa, batch: HealthBatch) -> Json:
    """The model's health on `batch`, as metrics, in fp32 and without compiled code; the model is not changed.

    health_loss            the loss, on clips and masks that never change
    health_explained       share of the targets' variance that the predictions account for
    health_target_std      `JepaOutput.target_std`: the deviation of the targets over the tokens, before their norm
    health_prediction_std  the same of the predictions
    health_rank            effective rank of the target encoder's features, one for each valid token of the whole
                           clips: RankMe (arXiv 2210.02885), at most the encoder's width
    health_rank_clips      the same of each clip's mean, at most the number of clips
    health_spread          root mean square of the features about their mean, as a share of that about 0: 0 if all
                           features are alike
    health_content         share of the features' variance that is left once each position's mean is taken
                           away: 0 if a token tells its position and nothing of the sound
    health_dead            share of the features' dimensions that deviate by less than DEAD_SHARE of their root
                           mean square
    health_teacher_cosine  cosine between target and context encoder, token by token, of the whole clips
    """
    # Loss under the masks, and both encoders' features of the whole clips.
    was_training = model.training
    model.eval()
    with force_eager_mode(model):
        output = model(batch.mel_BTF, batch.context_BK, batch.targets_BGQ, batch.n_frames_B)
        frames = batch.mel_BTF.shape[1]
        valid_BP = model.valid_mask_if_padded(batch.n_frames_B, batch.mel_BTF.device, frames)
        teacher_BPD, student_BPD = (
            encoder(batch.mel_BTF, valid_BP=valid_BP).float() for encoder in (model.target, model.encoder)
        )
    model.train(was_training)

    # Numbers that the loss does not show, over the tokens that hold sound.
    if valid_BP is None:
        valid_BP = torch.ones(teacher_BPD.shape[:2], dtype=torch.bool, device=teacher_BPD.device)
    cosine_BP = F.cosine_similarity(teacher_BPD, student_BPD, dim=-1)
    metrics = {
        "loss": output.loss,
        "explained": output.explained,
        "target_std": output.target_std,
        "prediction_std": output.prediction_std,
        **feature_statistics(teacher_BPD, valid_BP),
        "teacher_cosine": cosine_BP[valid_BP].mean(),
    }
    return {f"health_{name}": float(value) for name, value in metrics.items()}


def force_eager_mode(model: nn.Module) -> AbstractContextManager[object]:
    """The context in which a model's blocks run uncompiled: its own batch size would cost a compilation."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()  # torch.compiler takes seconds to import


def feature_statistics(feature_BPD: Tensor, valid_BP: Tensor) -> dict[str, Tensor]:
    """Spread, ranks, content and dead share of the valid tokens' features; `measure_health` says what they mean."""
    # Means over all valid tokens, over a clip's, and over those of a position.
    feature_BPD = torch.where(valid_BP[..., None], feature_BPD.double(), 0.0)
    token_ND = feature_BPD[valid_BP]
    clip_BD = feature_BPD.sum(1) / valid_BP.sum(1, keepdim=True)
    position_PD = feature_BPD.sum(0) / valid_BP.sum(0).clamp(min=1)[:, None]

    # Deviations from them.
    centred_ND = token_ND - token_ND.mean(0)
    square_within_positions = (feature_BPD - position_PD)[valid_BP].square().sum()
    deviation_D = centred_ND.square().mean(0).sqrt()
    size = token_ND.square().mean().sqrt()
    return {
        "spread": centred_ND.square().mean().sqrt() / size.clamp(min=DIVISOR_FLOOR),
        "rank": effective_rank(token_ND),
        "rank_clips": effective_rank(clip_BD),
        "content": square_within_positions / centred_ND.square().sum().clamp(min=DIVISOR_FLOOR),
        "dead": (deviation_D < DEAD_SHARE * size).double().mean(),
    }


def effective_rank(x_ND: Tensor) -> Tensor:
    """RankMe (arXiv 2210.02885): the exponential of the entropy of the singular values' shares of their sum.

    Singular values are the roots of the eigenvalues of the smaller Gram matrix, in float64, which resolves values
    down to 1e-7 of the largest.
    """
    x_ND = x_ND.double()
    gram = x_ND @ x_ND.T if len(x_ND) < x_ND.shape[1] else x_ND.T @ x_ND
    value_D = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share_D = value_D / value_D.sum().clamp(min=DIVISOR_FLOOR) + RANK_EPSILON
    return (-(share_D * share_D.log()).sum()).exp()


# `collapse_signs` says which runs these thresholds come from.
MIN_HEALTHY_SPREAD = 0.2
MIN_HEALTHY_RANK = 4.0
MIN_HEALTHY_CONTENT = 0.02

# The widest encoder that the thresholds were calibrated on: with `auto`, wider ones are warned of and not stopped.
CALIBRATED_WIDTH = 96

COLLAPSE_PATIENCE = 3  # looks in a row: healthy runs may pass through a dip

COLLAPSE_ADVICE = (
    "try a lower schedule.peak_lr, a slower teacher (schedule.ema_start nearer 1), model.loss=l2, or a recipe with a "
    "clip objective, which cannot collapse (small, base)"
)


def collapse_signs(health_line: Json) -> list[str]:
    """The metrics of `measure_health` that mean collapse, in words; an empty list for a healthy encoder.

    The thresholds come from some dozen runs of 120 to 300 steps, of widths 32 and 64 (one of 96), on the tests' clips
    and on 2,000 others (L2, squared L2 and cosine, teacher and fixed targets, random patches and curricula, seeds 0
    to 2). Encoders wider than CALIBRATED_WIDTH were not tried: they are warned of, and stopped only on request.

    health_spread   random init 0.60 to 0.91, healthy 0.33 or more (the least is a dip of the tests' `tiny`),
                    collapsed 0.09 to 0.2 (no lag between teacher and student, squared L2, lr 3e-3)
    health_rank     random init 12 to 34, healthy 8.4 or more, collapsed 2.7 to 5; when a collapsed run's features
                    have grown again (spread 0.3 to 0.5), the rank still shows the collapse, at 2.8 to 3.8
    health_content  random init 0.28 to 0.95, healthy 0.20 or more; no run was made that lost the sound and kept
                    the positions, so this threshold is a tenth of the least seen and no more
    """
    signs = []
    if (spread := health_line["health_spread"]) < MIN_HEALTHY_SPREAD:
        signs.append(
            f"features deviate by {spread:.0%} of their size (healthy: over {MIN_HEALTHY_SPREAD:.0%})"
        )
    if (rank := health_line["health_rank"]) < MIN_HEALTHY_RANK:
        signs.append(f"their effective rank is {rank:.1f} (over {MIN_HEALTHY_RANK:g})")
    if (content := health_line["health_content"]) < MIN_HEALTHY_CONTENT:
        signs.append(f"{content:.1%} of their variance is not position (over {MIN_HEALTHY_CONTENT:.0%})")
    return signs


def count_trailing_collapses(health_history: Sequence[Json]) -> int:
    """How many looks at a run's health found it collapsed, counted back from the last one without a break."""
    return len(list(takewhile(collapse_signs, reversed(health_history))))


PROBE_L2 = 0.1  # the second of `linear_probe.L2_GRID`: a fixed penalty, where a search would cost ten fits

PROBE_VAL_SHARE = 0.5  # clips to measure on, at most, for each clip to train on


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingProbe:
    """Labelled clips that stay the same for a whole run, few enough to be probed often, and their label sets.

    The probes learn from `train_N` and are measured on `val_N`, other clips that no result is measured on: of a split
    named val, or else a fifth of the training clips, in whole sounds. The encoder may have seen both, unlabelled.

    val_probe_linear_SET  mAP of a linear probe with the penalty PROBE_L2, trained and measured on that label set
    val_probe_knn_SET     mAP of nearest neighbours on that label set
    val_probe_map         the mean of them all, by which the best checkpoint is chosen (`loop.SCORE_METRIC`)

    scored_clips  the clips that are measured, in words
    """

    views: ClipViews
    train_N: np.ndarray
    val_N: np.ndarray
    label_sets: tuple[str, ...]
    scored_clips: str
    on_broken: Literal["raise", "skip"] = "raise"
    broken_rows: set[int] = field(default_factory=set)  # rows that turned out to be unreadable

    def measure_scores(self, model: Jepa) -> Json:
        """mAP of the model's target encoder as it is now, in fp32; no generator is drawn from, no weight changes."""
        # Frozen features of both parts.
        with force_eager_mode(model):
            train_N, plain_train_ND = self.readable_features(model, self.train_N)
            val_N, plain_val_ND = self.readable_features(model, self.val_N)
        train_ND, val_ND = standardise_features(plain_train_ND, plain_val_ND)

        # Both probes on every label set.
        store = self.views.store
        scores: Json = {}
        for name in self.label_sets:
            train_NC = store.labels_BC(train_N, name)
            val_NC = store.labels_BC(val_N, name)
            linear_NC = linear_probe_scores_NC(train_ND, train_NC, val_ND, l2=PROBE_L2)
            knn_NC = knn_scores_NC(train_ND, train_NC, val_ND)
            scores[f"val_probe_linear_{name}"] = mean_average_precision(val_NC, linear_NC).value
            scores[f"val_probe_knn_{name}"] = mean_average_precision(val_NC, knn_NC).value
        return {**scores, SCORE_METRIC: float(np.mean(list(scores.values())))}

    def readable_features(self, model: Jepa, rows_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows that can be read, and a vector for each; BrokenClipError where none may be left out."""
        while True:
            rows_N = rows_N[~np.isin(rows_N, list(self.broken_rows))]
            try:
                return rows_N, clip_vectors(self.views, rows_N, model.target)
            except BrokenClipError as error:
                if self.on_broken == "raise":
                    raise
                self.broken_rows.add(error.row)


def open_training_probe(
    store: AnyStore,
    recipe: Pretrain,
    identity: RunIdentity,
    on_broken: Literal["raise", "skip"],
    say: Callable[[str], None],
) -> TrainingProbe | None:
    """The recipe's probe; None where it has none. Also None, with a line that says why, where no clips could be probed.

    Clips to train on and to measure on are drawn by the recipe's seed.
    """
    if not recipe.probe_every:
        return None

    # In a store of folds every clip is measured in its turn, so that none may choose a checkpoint.
    if is_measured_in_folds(store):
        say(f"{store.location}: no probe while training: each of its folds is to be measured")
        return None
    train_N, val_N, scored_clips = draw_probe_clips(store, recipe.seed, recipe.probe_clips)
    if len(train_N) + len(val_N) < MIN_CLIPS_TO_SELECT or not len(train_N) or not len(val_N):
        say(
            f"{store.location}: no probe while training: {len(train_N)} labelled clips to train it and {len(val_N)} of "
            f"other sounds to measure it; it needs {MIN_CLIPS_TO_SELECT} in all"
        )
        return None

    # Keep the label sets that these clips can be measured by.
    label_sets = tuple(name for name in store.label_sets if store.labels_BC(val_N, name).any())
    views = ClipViews(store=store, frames=recipe.view_frames, mean=identity.mean, std=identity.std)
    return TrainingProbe(
        views=views,
        train_N=train_N,
        val_N=val_N,
        label_sets=label_sets,
        scored_clips=scored_clips,
        on_broken=on_broken,
    )


def is_measured_in_folds(store: AnyStore) -> bool:
    """Whether `evaluate` measures every clip of a store by what others train: named folds, or folds of its sounds."""
    if evaluation_splits(store):
        return False
    splits = store.split_names
    named_folds = [split for split in splits if FOLD_PATTERN.fullmatch(split)]
    return len(named_folds) > 1 or len(store.good_rows(splits)) <= MAX_CROSS_VALIDATED_CLIPS


def draw_probe_clips(store: AnyStore, seed: int, probe_clips: int) -> tuple[np.ndarray, np.ndarray, str]:
    """The labelled rows that train a probe, and those that measure it; the latter also in words.

    At most `probe_clips` train and half as many measure. No clip of an evaluation split is among them.
    """
    train_names, val_names = train_and_val_splits(store)
    most_val = int(PROBE_VAL_SHARE * probe_clips)
    order_N = draw_labelled_rows(store, train_names, [seed, TRAIN_DRAW])
    if val_names:
        val_N = draw_labelled_rows(store, val_names, [seed, VAL_DRAW])[:most_val]
        where = f"clips of {', '.join(val_names)}"
    else:
        # Of more clips than are needed no fifth is drawn.
        needed = math.ceil(most_val / VALIDATION_SHARE)
        val_N, order_N = hold_back_sounds(order_N[:needed], store.manifest)
        where = f"held-back clips of {', '.join(train_names)}"
    return np.sort(order_N[:probe_clips]), np.sort(val_N), f"{len(val_N)} {where}"


def draw_labelled_rows(store: AnyStore, splits: Sequence[str], draw: Sequence[int]) -> np.ndarray:
    """The good rows of some splits that have a raw label, in the random order of a draw."""
    rows_N = store.good_rows(list(splits))
    _, offsets_N = store.flat_labels("raw")
    is_labelled_N = np.diff(offsets_N)[rows_N] > 0
    return np.random.default_rng(draw).permutation(rows_N[is_labelled_N])


# auto: stop where the signs of collapse are calibrated, else warn.
OnCollapse = Literal["auto", "stop", "warn"]


@dataclass(kw_only=True, slots=True)
class PretrainMonitor:
    """The `loop.TrainingMonitor` of pre-training; on resume its metrics are the same to the bit."""

    run: Run
    trainer: PretrainTrainer
    meter: ComputeMeter
    health_batch: HealthBatch | None
    probe: TrainingProbe | None
    on_collapse: OnCollapse
    say: Callable[[str], None]
    health_history: list[Json]  # the last COLLAPSE_PATIENCE looks at the model's health

    def after_step(self, steps_done: int) -> Json:
        """Health and probes, at their steps and after the last one; else an empty line."""
        recipe = self.trainer.recipe
        model = self.trainer.model
        recompute = model.encoder.recompute
        self.meter.count_step(pretrain_step_cost(recipe, self.trainer.step_shape, recompute=recompute))
        metrics: Json = {}
        if self.health_batch is not None and self.is_due(steps_done, recipe.health_every):
            metrics |= measure_health(model, self.health_batch)
            self.check_collapse({"step": steps_done, **metrics})
        if self.probe is not None and self.is_due(steps_done, recipe.probe_every):
            metrics |= self.probe.measure_scores(model)
        return metrics

    @property
    def encoder_width(self) -> int:
        """The width of the encoder that is trained."""
        return self.trainer.recipe.model.encoder.width

    @property
    def stops_at_collapse(self) -> bool:
        """Whether a collapse ends the run."""
        if self.on_collapse == "auto":
            return self.encoder_width <= CALIBRATED_WIDTH
        return self.on_collapse == "stop"

    @property
    def scored_clips(self) -> str | None:
        """The clips that the probes are measured on, in words; None where there is no probe."""
        return None if self.probe is None else self.probe.scored_clips

    def is_due(self, steps_done: int, every: int) -> bool:
        """Whether something that is measured every so often is measured now; always after the last step."""
        return steps_done % every == 0 or steps_done == self.trainer.recipe.steps

    def check_collapse(self, health_line: Json) -> None:
        """Remember a look at the model's health, and warn if it is the first to find a collapse."""
        self.health_history = [*self.health_history, health_line][-COLLAPSE_PATIENCE:]
        if count_trailing_collapses(self.health_history) != 1:
            return
        signs = ", ".join(collapse_signs(health_line))
        warning = f"{self.run.path}: step {health_line['step']}: collapsing: {signs}"
        if self.stops_at_collapse:
            warning += f"; the run stops if {COLLAPSE_PATIENCE} looks in a row find it"
        elif self.on_collapse == "auto":
            warning += (
                f"; the run goes on, for these signs are calibrated on encoders up to {CALIBRATED_WIDTH} wide and this "
                f"one is {self.encoder_width}: look at its curves; --on-collapse stop ends such a run"
            )
        self.say(warning)

    def count_bad_step(self) -> None:
        """Count a step that was passed over in the cost of the run."""
        self.meter.count_bad_step()

    def before_checkpoint(self) -> None:
        """Write the cost of the run up to the checkpoint that is about to be written."""
        self.meter.save_costs(self.run.path)

    def stop_reason(self) -> str | None:
        """That the run has collapsed, by which signs, and what to try; None while it may go on."""
        if not self.stops_at_collapse or count_trailing_collapses(self.health_history) < COLLAPSE_PATIENCE:
            return None
        last_look = self.health_history[-1]
        signs = ", ".join(collapse_signs(last_look))
        return (
            f"collapsed: {signs}, at {COLLAPSE_PATIENCE} looks in a row; seen in the checkpoint of step "
            f"{last_look['step']}; {COLLAPSE_ADVICE}, in another --run, or go on with --on-collapse warn"
        )


def open_pretrain_monitor(
    run: Run,
    trainer: PretrainTrainer,
    store: AnyStore,
    view: View,
    *,
    on_broken: Literal["raise", "skip"],
    on_collapse: OnCollapse,
    say: Callable[[str], None],
) -> PretrainMonitor:
    """The monitor of a run from its newest checkpoint on; RunError where that has collapsed.

    It looks at single, unchanged views, whatever `view` trains on.
    """
    if on_collapse not in get_args(OnCollapse):
        raise RunError(f"on_collapse must be {', '.join(get_args(OnCollapse))}, got {on_collapse!r}")
    recipe = trainer.recipe

    # Clips and masks to look at the model's health with.
    health_batch = None
    if recipe.health_every:
        rows_N = draw_health_rows(store, recipe.seed)
        view = replace(view, frames=recipe.view_frames, crops=1, augment=NO_AUGMENTATION)
        order = RowOrder(rows_N=rows_N, clips=len(rows_N), seed=recipe.seed)
        loader = PlainLoader(store, order, view, trainer.device, on_broken=on_broken, say=say)
        health_batch = HealthBatch.from_batch(loader.make_batch(0), recipe)

    # Costs and looks so far.
    meter = ComputeMeter(trainer.device, ranks=trainer.world.size)
    meter.resume_counts(run.path, run.newest_step)
    looks = [line for line in run.read_metrics() if "health_spread" in line]
    monitor = PretrainMonitor(
        run=run,
        trainer=trainer,
        meter=meter,
        health_batch=health_batch,
        probe=open_training_probe(store, recipe, run.identity, on_broken, say),
        on_collapse=on_collapse,
        say=say,
        health_history=looks[-COLLAPSE_PATIENCE:],
    )

    # A run that has collapsed does not go on by being started again.
    if reason := monitor.stop_reason():
        raise RunError(f"{run.path}: {reason}")
    return monitor
