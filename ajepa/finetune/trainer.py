"""One step of fine-tuning: layer-wise learning rates, the loss of the task, the average of the weights."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ajepa.model.classifier import (
    CLASSIFIER_KINDS,
    Classifier,
    VitClassifier,
    build_classifier,
    classifier_kind_name,
)
from ajepa.model.jepa import move_average
from ajepa.model.randomness import MicroBatchRng, step_rng
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.optimiser import AdamW
from ajepa.training.devices import Precision
from ajepa.training.distributed import SINGLE_PROCESS, World
from ajepa.training.run import Json
from ajepa.training.trained_run import AVERAGE_PART, CLASSIFIER_PART
from ajepa.training.trainer import StartedStep, Trainer
from pipeline.errors import RunError
from pipeline.loading.loader import Batch


class FinetuneTrainer(Trainer):
    """Classifier and optimiser of one recipe on one device: what a step changes, and what a checkpoint holds.

    The random numbers of a step are drawn for the global batch, of which this rank's clips begin at `first_clip`.

    merge_SC      from the store's classes to those of the task
    single_label  whether each clip has one class
    """

    recipe: Finetune

    def __init__(
        self,
        recipe: Finetune,
        merge_SC: Tensor,
        device: torch.device,
        *,
        single_label: bool,
        world: World = SINGLE_PROCESS,
        micro_clips: int | None = None,
        precision: Precision | None = None,
        recompute: bool = False,
    ) -> None:
        # The classes of the task.
        self.single_label = single_label
        self.merge_SC = None if is_identity_matrix(merge_SC) else merge_SC.to(device)

        # The classifier, and the moving average of its weights.
        self.recompute = recompute
        self.classifier: Classifier = build_classifier(recipe.model, merge_SC.shape[1], recipe.seed).to(
            device
        )
        if recompute and isinstance(self.classifier, VitClassifier):
            self.classifier.encoder.recompute = True
        self.weight_average: Classifier | None = copy.deepcopy(self.classifier) if recipe.ema else None

        # Its optimiser, and the parts of a checkpoint.
        parts: dict[str, nn.Module] = {CLASSIFIER_PART: self.classifier}
        if self.weight_average is not None:
            parts[AVERAGE_PART] = self.weight_average
        super().__init__(
            recipe,
            self.classifier,
            layerwise_adamw(self.classifier.weights_by_depth(), recipe.optimiser, recipe.layer_decay),
            device,
            parts=parts,
            world=world,
            micro_clips=micro_clips,
            precision=precision,
        )
        self.first_clip = world.rank * self.clips_of_rank

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Replace some weights, such as those of a pre-trained encoder; the others stay as they were drawn."""
        for model in self.parts.values():
            model.load_state_dict({**model.state_dict(), **weights})

    @property
    def evaluated_model(self) -> Classifier:
        """The model to measure: the moving average of the weights where the recipe has one."""
        return self.classifier if self.weight_average is None else self.weight_average

    def start_step(self, step: int, batch: Batch) -> StartedStep:
        """Queue one update, from `step` to `step + 1`, on the device, without waiting for anything on it."""
        recipe = self.recipe
        n_frames_B = batch.n_frames_B
        task_labels_BC = self.labels_BC(batch)
        self.model.train()

        def loss_of_pass(clips: slice) -> tuple[Tensor, Tensor]:
            # Forward, with these clips' share of the numbers drawn for the global batch.
            first_clip = self.first_clip + clips.start
            rng = MicroBatchRng(step_rng(recipe.seed, step), first_clip, recipe.clips_per_step)
            with self.precision.autocast(self.device):
                logits_BC = self.ddp_model(batch.mel_BTF[clips], n_frames_B[clips], rng)

            # Their share of the mean over the global batch.
            share = len(logits_BC) / recipe.clips_per_step
            loss = share * self.loss(logits_BC.float(), task_labels_BC[clips])
            return loss, loss.detach()[None]

        # Forward and backward, pass by pass.
        (loss,) = self.accumulate_gradients(loss_of_pass).unbind()

        # Update the classifier, each layer at its share of the rate.
        lr = recipe.learning_rate(step)
        figures, is_updated = self.update_weights({"loss": loss}, lr)

        # The average follows, in the first steps faster, so that it forgets its random start.
        if self.weight_average is not None:
            momentum = min(recipe.ema, (1 + step) / (10 + step))
            update_weight_average(self.weight_average, self.classifier, momentum, is_updated)

        # Once the figures are there: the labels go with a bad step.
        def finish(metrics: Json) -> Json:
            return self.read_update(metrics, step, batch, lr, {"labels_BC": task_labels_BC})

        return StartedStep(figures, finish)

    def labels_BC(self, batch: Batch) -> Tensor:
        """The shares of the task's classes in each clip, mixed as the clips are."""
        assert batch.labels_BC is not None
        if self.merge_SC is None:
            return batch.labels_BC
        return (batch.labels_BC @ self.merge_SC).clamp(max=1.0)

    @property
    def has_softmax_loss(self) -> bool:
        """Whether the loss is one over all classes, rather than one for each class."""
        return self.recipe.loss == "ce" or (self.recipe.loss == "auto" and self.single_label)

    def loss(self, logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
        """Mean over the clips, and for `bce` over the classes too."""
        if self.has_softmax_loss:
            return F.cross_entropy(logits_BC, labels_BC)
        return F.binary_cross_entropy_with_logits(logits_BC, labels_BC)


def refuse_unsplittable_model(
    recipe: Finetune, *, world: World, micro_clips: int | None, recompute: bool
) -> None:
    """RunError where the recipe's model cannot be recomputed, or cannot be trained in parts, and is to be."""
    name = classifier_kind_name(recipe.model)
    clips = recipe.clips_per_step
    if recompute and name != "vit":
        raise RunError(
            f"--recompute: a {name} keeps what its blocks compute, only a vit can do without; leave it out"
        )

    # Batch norms use the statistics of all clips of a step: a part has others, and another gradient.
    is_split = world.size > 1 or (micro_clips or clips) < clips
    if CLASSIFIER_KINDS[name].has_batch_norm and is_split:
        parts = f"{world.size} ranks" if world.size > 1 else f"--micro-batch {micro_clips}"
        raise RunError(
            f"{parts}: a {name} normalises each clip by all {clips} of its step, which must pass through together; "
            "use one process without --micro-batch, or --model vit or passt"
        )


def layerwise_adamw(
    layers: list[list[torch.nn.Parameter]], settings: AdamW, layer_decay: float
) -> torch.optim.AdamW:
    """AdamW whose rate falls with the distance from the last layer, by the factor `layer_decay` a layer.

    Each parameter group says in `share` which part of the rate it learns at: 1 for the last of `layers`. Biases,
    norms and single vectors have no weight decay.
    """
    groups = []
    for depth, weights in enumerate(layers):
        share = layer_decay ** (len(layers) - 1 - depth)
        matrices = [weight for weight in weights if weight.ndim > 1]
        vectors = [weight for weight in weights if weight.ndim <= 1]
        for params, weight_decay in ((matrices, settings.weight_decay), (vectors, 0.0)):
            if params:
                groups.append({"params": params, "weight_decay": weight_decay, "share": share})
    return torch.optim.AdamW(groups, lr=0.0, betas=(settings.beta1, settings.beta2), fused=True)


def update_weight_average(
    average: Classifier, model: Classifier, momentum: float, is_updated: Tensor | None = None
) -> None:
    """`average = momentum * average + (1 - momentum) * model`; whole numbers, such as counts of batches, are copied.

    `is_updated` as in `Jepa.update_target`.
    """
    averaged = average.state_dict()
    current = model.state_dict()
    floats = [name for name, value in averaged.items() if value.is_floating_point()]
    move_average(
        [averaged[name] for name in floats], [current[name] for name in floats], momentum, is_updated
    )
    for name in averaged.keys() - set(floats):
        averaged[name].copy_(current[name])


def is_identity_matrix(merge_SC: Tensor) -> bool:
    """Whether the task's classes are those of the store, in the same order."""
    rows, columns = merge_SC.shape
    return rows == columns and torch.equal(merge_SC, torch.eye(rows))
