"""Finetuner: one step of fine-tuning: rates by depth, the average of the weights, what a checkpoint holds."""

import copy
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ajepa.classifier import Classifier
from ajepa.curriculum import step_rng
from ajepa.devices import precision
from ajepa.finetuning import Finetune
from ajepa.models import built
from ajepa.optimiser import AdamW, moments_of, restore_moments
from ajepa.run import Checkpoint, Json
from pipeline.errors import RunError
from pipeline.loader import Batch

CLASSIFIER, AVERAGE, OPTIMISER = "classifier", "average", "optimiser"  # parts of a checkpoint


class Finetuner:
    """Classifier and optimiser of one recipe on one device; `loop.Trainer`.

    merge_SC  from the store's classes to those of the task; `single`: each clip has one of them
    """

    def __init__(self, recipe: Finetune, merge_SC: Tensor, device: torch.device, *, single: bool) -> None:
        self.recipe, self.device, self.single = recipe, device, single
        self.merge_SC = None if is_identity(merge_SC) else merge_SC.to(device)
        self.model: Classifier = built(recipe.model, merge_SC.shape[1], recipe.seed).to(device)
        self.average: Classifier | None = copy.deepcopy(self.model) if recipe.ema else None
        self.optimiser = layered_adamw(self.model.layers(), recipe.optimiser, recipe.layer_decay)
        self.bf16, self.precision = precision(device)

    def take(self, weights: dict[str, Tensor]) -> None:
        """Take over some weights, such as a pre-trained encoder's; the others stay as they were drawn."""
        for model in (self.model, self.average):
            if model is not None:
                model.load_state_dict({**model.state_dict(), **weights})

    @property
    def measured(self) -> Classifier:
        """What is evaluated: the moving average of the weights where the recipe has one."""
        return self.model if self.average is None else self.average

    def step(self, step: int, batch: Batch) -> Json:
        """One update, from `step` to `step + 1`; what there is to log. RunError instead of a bad update."""
        rng = step_rng(self.recipe.seed, step)
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits_BC = self.model(batch.mel_BTF, batch.n_frames_B.cpu(), rng)
        loss = self.loss(logits_BC.float(), self.labels_BC(batch))
        loss.backward()
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        told = {
            "loss": loss.item(),
            "gradient_norm": torch.nn.utils.get_total_norm(gradients).item(),
            "lr": self.recipe.lr(step),
        }
        refuse_bad_step(told, step, batch)
        for group in self.optimiser.param_groups:
            group["lr"] = told["lr"] * group["share"]
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.average is not None:
            follow(self.average, self.model, min(self.recipe.ema, (1 + step) / (10 + step)))
        return told

    def labels_BC(self, batch: Batch) -> Tensor:
        """The shares of the task's classes in each clip, mixed as the clips are."""
        assert batch.labels_BC is not None
        return batch.labels_BC if self.merge_SC is None else (batch.labels_BC @ self.merge_SC).clamp(max=1.0)

    def loss(self, logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
        """Mean over the clips, and for `bce` over the classes too."""
        ce = self.recipe.loss == "ce" or (self.recipe.loss == "auto" and self.single)
        if ce:
            return F.cross_entropy(logits_BC, labels_BC)
        return F.binary_cross_entropy_with_logits(logits_BC, labels_BC)

    def checkpoint(self, step: int) -> Checkpoint:
        """Everything that the next step stands on."""
        parts = {CLASSIFIER: self.model.state_dict(), OPTIMISER: moments_of(self.optimiser)}
        if self.average is not None:
            parts[AVERAGE] = self.average.state_dict()
        return Checkpoint(step=step, parts=parts)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Stand where `checkpoint` was written."""
        self.model.load_state_dict(checkpoint.parts[CLASSIFIER])
        if self.average is not None:
            self.average.load_state_dict(checkpoint.parts[AVERAGE])
        restore_moments(self.optimiser, checkpoint.parts[OPTIMISER])


def layered_adamw(layers: list[list[torch.nn.Parameter]], told: AdamW, decay: float) -> torch.optim.AdamW:
    """AdamW whose groups say in `share` what part of the rate is theirs: 1 for the last layer, `decay` of it below.

    Biases, norms and single vectors are not decayed.
    """
    groups = []
    for depth, weights in enumerate(layers):
        share = decay ** (len(layers) - 1 - depth)
        for matrices, weight_decay in ((True, told.weight_decay), (False, 0.0)):
            mine = [weight for weight in weights if (weight.ndim > 1) is matrices]
            if mine:
                groups.append({"params": mine, "weight_decay": weight_decay, "share": share})
    return torch.optim.AdamW(groups, lr=0.0, betas=(told.beta1, told.beta2), fused=True)


@torch.no_grad()
def follow(average: Classifier, model: Classifier, momentum: float) -> None:
    """`average = momentum * average + (1 - momentum) * model`; whole numbers, such as counts of batches, are copied."""
    mine, its = average.state_dict(), model.state_dict()
    floats = [name for name, value in mine.items() if value.is_floating_point()]
    torch._foreach_lerp_([mine[name] for name in floats], [its[name] for name in floats], 1.0 - momentum)
    for name in mine.keys() - set(floats):
        mine[name].copy_(its[name])


def is_identity(merge_SC: Tensor) -> bool:
    rows, columns = merge_SC.shape
    return rows == columns and torch.equal(merge_SC, torch.eye(rows))


def refuse_bad_step(told: Json, step: int, batch: Batch) -> None:
    """RunError, naming step and rows, where loss or gradient is no number."""
    bad = [f"{name} is {told[name]}" for name in ("loss", "gradient_norm") if not math.isfinite(told[name])]
    if not bad:
        return
    broken_B = ~torch.isfinite(batch.mel_BTF).flatten(1).all(1).cpu().numpy()
    if broken_B.any():
        cause = f"rows {batch.rows_B[broken_B].tolist()} of the store hold nan or inf: rebuild it"
    else:
        cause = f"rows {batch.rows_B.tolist()} are finite: lower the learning rate"
    raise RunError(f"step {step + 1}: {', '.join(bad)}; stopped before the update; {cause}")
