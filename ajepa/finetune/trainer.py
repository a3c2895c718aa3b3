"""Finetuner: one step of fine-tuning: rates by depth, the average of the weights, what a checkpoint holds."""

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from ajepa.model.classifier import MODELS, Classifier, Vit, built, model_name
from ajepa.model.randomness import PassRng, step_rng
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.optimiser import AdamW
from ajepa.training.devices import Precision
from ajepa.training.distributed import ALONE, World
from ajepa.training.run import Json
from ajepa.training.trained_run import AVERAGE, CLASSIFIER
from ajepa.training.trainer import Stepper
from pipeline.errors import RunError
from pipeline.loading.loader import Batch


class Finetuner(Stepper):
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
        single: bool,
        world: World = ALONE,
        micro_clips: int | None = None,
        precision: Precision | None = None,
        recompute: bool = False,
    ) -> None:
        self.single, self.recompute = single, recompute
        self.merge_SC = None if is_identity(merge_SC) else merge_SC.to(device)
        model = built(recipe.model, merge_SC.shape[1], recipe.seed).to(device)
        if recompute and isinstance(model, Vit):
            model.encoder.recompute = True
        self.classifier: Classifier = model
        self.average: Classifier | None = copy.deepcopy(model) if recipe.ema else None
        super().__init__(
            recipe,
            model,
            layered_adamw(model.layers(), recipe.optimiser, recipe.layer_decay),
            device,
            parts={CLASSIFIER: model} | ({AVERAGE: self.average} if self.average else {}),
            world=world,
            micro_clips=micro_clips,
            precision=precision,
        )
        self.first = world.rank * self.clips

    def take(self, weights: dict[str, Tensor]) -> None:
        """Take over some weights, such as a pre-trained encoder's; the others stay as they were drawn."""
        for model in self.parts.values():
            model.load_state_dict({**model.state_dict(), **weights})

    @property
    def measured(self) -> Classifier:
        """What is evaluated: the moving average of the weights where the recipe has one."""
        return self.classifier if self.average is None else self.average

    def step(self, step: int, batch: Batch) -> Json:
        """One update, from `step` to `step + 1`; what there is to log. BadStep instead of a bad update."""
        n_frames_B, labels_BC = batch.n_frames_B.cpu(), self.labels_BC(batch)
        self.model.train()

        def part(clips: slice) -> tuple[Tensor, Tensor]:
            rng = PassRng(
                step_rng(self.recipe.seed, step), self.first + clips.start, self.recipe.clips_per_step
            )
            with self.precision.autocast(self.device):
                logits_BC = self.spread(batch.mel_BTF[clips], n_frames_B[clips], rng)
            share = len(logits_BC) / self.recipe.clips_per_step
            loss = share * self.loss(logits_BC.float(), labels_BC[clips])
            return loss, loss.detach()[None]

        (loss,) = self.gradients(part)
        made = self.update(step, batch, {"loss": loss}, self.recipe.lr(step), {"labels_BC": labels_BC})
        if self.average is not None and "overflowed" not in made:
            follow(self.average, self.classifier, min(self.recipe.ema, (1 + step) / (10 + step)))
        return {"loss": loss, **made}

    def labels_BC(self, batch: Batch) -> Tensor:
        """The shares of the task's classes in each clip, mixed as the clips are."""
        assert batch.labels_BC is not None
        return batch.labels_BC if self.merge_SC is None else (batch.labels_BC @ self.merge_SC).clamp(max=1.0)

    @property
    def over_all(self) -> bool:
        """Whether the loss is one over all classes, not of each by itself."""
        return self.recipe.loss == "ce" or (self.recipe.loss == "auto" and self.single)

    def loss(self, logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
        """Mean over the clips, and for `bce` over the classes too."""
        if self.over_all:
            return F.cross_entropy(logits_BC, labels_BC)
        return F.binary_cross_entropy_with_logits(logits_BC, labels_BC)


def refuse_parts(recipe: Finetune, *, world: World, micro_clips: int | None, recompute: bool) -> None:
    """RunError where the recipe's model cannot be trained in parts, or not as is asked."""
    name, clips = model_name(recipe.model), recipe.clips_per_step
    if recompute and name != "vit":
        raise RunError(
            f"--recompute: a {name} keeps what its blocks compute, only a vit can do without; leave it out"
        )
    if not MODELS[name].batch_norm or (world.size == 1 and (micro_clips or clips) >= clips):
        return
    asked = f"{world.size} ranks" if world.size > 1 else f"--micro-batch {micro_clips}"
    raise RunError(
        f"{asked}: a {name} normalises each clip by all {clips} of its step, which must pass through together; "
        "use one process without --micro-batch, or --model vit or passt"
    )


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
