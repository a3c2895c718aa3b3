"""Finetuner: one step of fine-tuning: rates by depth, the average of the weights, what a checkpoint holds."""

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from ajepa.model.classifier import (
    CLASSIFIER_KINDS,
    Classifier,
    VitClassifier,
    build_classifier,
    classifier_kind_name,
)
from ajepa.model.randomness import MicroBatchRng, step_rng
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.optimiser import AdamW
from ajepa.training.devices import Precision
from ajepa.training.distributed import SINGLE_PROCESS, World
from ajepa.training.run import Json
from ajepa.training.trained_run import AVERAGE_PART, CLASSIFIER_PART
from ajepa.training.trainer import Trainer
from pipeline.errors import RunError
from pipeline.loading.loader import Batch


class FinetuneTrainer(Trainer):
    """Classifier and optimiser of one recipe on one device; `loop.Trainer`.

    What is random about a model is drawn for the global batch: this rank's part of it begins at `first`.

    merge_SC  from the store's classes to those of the task; `single`: each clip has one of them
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
        self.single_label, self.recompute = single_label, recompute
        self.merge_SC = None if is_identity_matrix(merge_SC) else merge_SC.to(device)
        model = build_classifier(recipe.model, merge_SC.shape[1], recipe.seed).to(device)
        if recompute and isinstance(model, VitClassifier):
            model.encoder.recompute = True
        self.classifier: Classifier = model
        self.weight_average: Classifier | None = copy.deepcopy(model) if recipe.ema else None
        super().__init__(
            recipe,
            model,
            layerwise_adamw(model.weights_by_depth(), recipe.optimiser, recipe.layer_decay),
            device,
            parts={CLASSIFIER_PART: model}
            | ({AVERAGE_PART: self.weight_average} if self.weight_average else {}),
            world=world,
            micro_clips=micro_clips,
            precision=precision,
        )
        self.first_clip = world.rank * self.clips_of_rank

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take over some weights, such as a pre-trained encoder's; the others stay as they were drawn."""
        for model in self.parts.values():
            model.load_state_dict({**model.state_dict(), **weights})

    @property
    def evaluated_model(self) -> Classifier:
        """What is evaluated: the moving average of the weights where the recipe has one."""
        return self.classifier if self.weight_average is None else self.weight_average

    def train_step(self, step: int, batch: Batch) -> Json:
        """One update, from `step` to `step + 1`; what there is to log. BadStep instead of a bad update."""
        n_frames_B, task_labels_BC = batch.n_frames_B.cpu(), self.labels_BC(batch)
        self.model.train()

        def loss_of_pass(clips: slice) -> tuple[Tensor, Tensor]:
            rng = MicroBatchRng(
                step_rng(self.recipe.seed, step), self.first_clip + clips.start, self.recipe.clips_per_step
            )
            with self.precision.autocast(self.device):
                logits_BC = self.ddp_model(batch.mel_BTF[clips], n_frames_B[clips], rng)
            share = len(logits_BC) / self.recipe.clips_per_step
            mean_loss = share * self.loss(logits_BC.float(), task_labels_BC[clips])
            return mean_loss, mean_loss.detach()[None]

        (loss,) = self.accumulate_gradients(loss_of_pass)
        made = self.update_weights(
            step, batch, {"loss": loss}, self.recipe.learning_rate(step), {"labels_BC": task_labels_BC}
        )
        if self.weight_average is not None and "overflowed" not in made:
            update_weight_average(
                self.weight_average, self.classifier, min(self.recipe.ema, (1 + step) / (10 + step))
            )
        return {"loss": loss, **made}

    def labels_BC(self, batch: Batch) -> Tensor:
        """The shares of the task's classes in each clip, mixed as the clips are."""
        assert batch.labels_BC is not None
        return batch.labels_BC if self.merge_SC is None else (batch.labels_BC @ self.merge_SC).clamp(max=1.0)

    @property
    def has_softmax_loss(self) -> bool:
        """Whether the loss is one over all classes, not of each by itself."""
        return self.recipe.loss == "ce" or (self.recipe.loss == "auto" and self.single_label)

    def loss(self, logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
        """Mean over the clips, and for `bce` over the classes too."""
        if self.has_softmax_loss:
            return F.cross_entropy(logits_BC, labels_BC)
        return F.binary_cross_entropy_with_logits(logits_BC, labels_BC)


def refuse_unsplittable_model(
    recipe: Finetune, *, world: World, micro_clips: int | None, recompute: bool
) -> None:
    """RunError where the recipe's model cannot be trained in parts, or not as is asked."""
    name, clips = classifier_kind_name(recipe.model), recipe.clips_per_step
    if recompute and name != "vit":
        raise RunError(
            f"--recompute: a {name} keeps what its blocks compute, only a vit can do without; leave it out"
        )
    if not CLASSIFIER_KINDS[name].has_batch_norm or (world.size == 1 and (micro_clips or clips) >= clips):
        return
    asked = f"{world.size} ranks" if world.size > 1 else f"--micro-batch {micro_clips}"
    raise RunError(
        f"{asked}: a {name} normalises each clip by all {clips} of its step, which must pass through together; "
        "use one process without --micro-batch, or --model vit or passt"
    )


def layerwise_adamw(
    layers: list[list[torch.nn.Parameter]], settings: AdamW, layer_decay: float
) -> torch.optim.AdamW:
    """AdamW whose groups say in `share` what part of the rate is theirs: 1 for the last layer, `decay` of it below.

    Biases, norms and single vectors are not decayed.
    """
    groups = []
    for depth, weights in enumerate(layers):
        share = layer_decay ** (len(layers) - 1 - depth)
        for matrices, weight_decay in ((True, settings.weight_decay), (False, 0.0)):
            mine = [weight for weight in weights if (weight.ndim > 1) is matrices]
            if mine:
                groups.append({"params": mine, "weight_decay": weight_decay, "share": share})
    return torch.optim.AdamW(groups, lr=0.0, betas=(settings.beta1, settings.beta2), fused=True)


@torch.no_grad()
def update_weight_average(average: Classifier, model: Classifier, momentum: float) -> None:
    """`average = momentum * average + (1 - momentum) * model`; whole numbers, such as counts of batches, are copied."""
    mine, its = average.state_dict(), model.state_dict()
    floats = [name for name, value in mine.items() if value.is_floating_point()]
    torch._foreach_lerp_([mine[name] for name in floats], [its[name] for name in floats], 1.0 - momentum)
    for name in mine.keys() - set(floats):
        mine[name].copy_(its[name])


def is_identity_matrix(merge_SC: Tensor) -> bool:
    rows, columns = merge_SC.shape
    return rows == columns and torch.equal(merge_SC, torch.eye(rows))
