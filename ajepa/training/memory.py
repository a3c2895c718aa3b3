"""How much memory a recipe needs, before its first step: an estimate, and the refusal of what cannot fit."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ajepa.model.classifier import MODELS, VitSpec, model_name
from ajepa.model.transformer import Stack
from ajepa.model.vit import EncoderSpec, PredictorSpec, stack_of
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.distributed import ALONE, World
from ajepa.training.flops import Seen, of_one_clip, seen_of
from pipeline.errors import RunError

GB = 1e9

FP32, BF16 = 4, 2  # bytes

MEMINFO = Path("/proc/meminfo")

DRAWS = 20  # of masks, to see how many tokens they may leave


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes at the peak of a step. `activations` grows with the clips of a pass, the rest does not."""

    weights: int  # of all models: encoder, teacher, predictor; a classifier and its average
    gradients: int
    moments: int  # AdamW's two
    batch: int  # spectrograms of all the clips of this rank's step
    activations: int  # kept for the backward pass, and the largest that is passing through

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.batch + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "moments", "batch", "activations")
        told = ", ".join(f"{name} {getattr(self, name) / GB:.2f}" for name in parts)
        return f"{self.total / GB:.2f} GB ({told})"


def pretrain_memory(
    recipe: Pretrain,
    *,
    bf16: bool,
    written_out: bool = False,
    recompute: bool = False,
    clips: int | None = None,
    micro_clips: int | None = None,
) -> Memory:
    """What a step of the recipe needs at most, from the sizes of what autograd keeps.

    `clips`: of a step on one rank; None: the recipe's. `micro_clips`: of those that pass through the model at
    once. `bf16`: or fp16. `written_out`: attention keeps its probabilities (bf16 on CPUs). Token counts are
    the most that some draws of the masks gave, from the first step to the last.
    """
    encoder, predictor = recipe.model.encoder, recipe.model.predictor
    clips = clips or recipe.clips_per_step
    encoder_count = encoder_parameters(encoder)
    model = recipe.model
    trained = encoder_count + predictor_parameters(
        predictor, encoder.width, model.clip_weight > 0, target_width=model.target_width
    )
    kept = max(
        _activations(
            recipe,
            *shape,
            clips=min(micro_clips or clips, clips),
            bf16=bf16,
            written_out=written_out,
            recompute=recompute,
        )
        for shape in mask_shapes(recipe)
    )
    copies = BF16 * trained if bf16 else 0  # autocast keeps the weights it has cast until the backward pass
    return Memory(
        weights=FP32 * (trained + encoder_count),
        gradients=FP32 * trained,
        moments=2 * FP32 * trained,
        batch=clips * encoder.grid.tokens * encoder.grid.patch_values * FP32,
        activations=kept + copies,
    )


def mask_shapes(recipe: Pretrain) -> set[tuple[int, int, int]]:
    """Context tokens, target groups and tokens of a group that some draws over the whole run gave."""
    shapes, grid = set(), recipe.model.encoder.grid
    for draw in range(DRAWS):
        step = draw * (recipe.steps - 1) // (DRAWS - 1)
        rng = np.random.default_rng([recipe.seed, step, draw])
        masks = recipe.masks.maker(step, rng).sample(rng, grid, batch=min(recipe.clips_per_step, 16))
        shapes.add((masks.context_BK.shape[1], *masks.targets_BGQ.shape[1:]))
    return shapes


def _activations(
    recipe: Pretrain,
    context: int,
    groups: int,
    queries: int,
    *,
    clips: int,
    bf16: bool,
    written_out: bool,
    recompute: bool,
) -> int:
    model = recipe.model
    grid, rows = model.encoder.grid, clips * recipe.mask_sets
    encoder, predictor = stack_of(model.encoder), stack_of(model.predictor)
    numbers, blocks, kept = {"bf16": bf16, "written_out": written_out}, list[int](), 0
    length = context + queries
    for stack, sequences, tokens, last in (
        (encoder, rows, context, context),
        (predictor, rows * groups, length, queries),
    ):
        inputs = sequences * tokens * FP32 * stack.width
        whole = sequences * block_bytes(stack, tokens, tokens, **numbers)
        final = sequences * block_bytes(stack, tokens, last, **numbers)
        kept += stack.depth * inputs if recompute else (stack.depth - 1) * whole + final
        kept += 3 * inputs  # embedding and last norm
        blocks.append(whole if stack.depth > 1 else final)
    scored = rows * groups * queries * model.target_width * FP32
    kept += 5 * scored + 2 * clips * grid.tokens * grid.patch_values * FP32  # loss; patches
    again = 2.25 if recompute else 0.5  # a block computed again, and gradients: measured
    passing = max(blocks) * again
    teacher = clips * grid.tokens * encoder.width * (8 * BF16 + 3 * FP32 if bf16 else 11 * FP32)
    if model.targets == "cosines":
        teacher = clips * grid.tokens * model.target_width * FP32
    elif model.target_layers > 1:
        teacher += 2 * model.target_layers * clips * grid.tokens * encoder.width * FP32
    return int(kept + max(passing, teacher))


def block_bytes(stack: Stack, length: int, asking: int, *, bf16: bool, written_out: bool) -> int:
    """What autograd keeps of one sequence of `length` tokens in one block, of which so many ask and come out.

    In fp32, in widths. Of every token: what enters (1), normalised (1), keys and values (2). Of those that ask:
    queries (1), mixed (1), the sum (1), normalised (1), the MLP before and after GELU (8). In bf16 all but what
    enters and the sum is half as large, and attention written out keeps the scaled queries, and each probability
    in fp32 and in bf16.
    """
    size, rope = (
        BF16 if bf16 else FP32,
        2 * FP32 if stack.positions == "rope" else 0,
    )  # halves of queries, of keys
    seen = FP32 + 3 * size + rope
    asked = FP32 + 11 * size + rope + (2 * size if stack.layer_scale else 0)
    probabilities = stack.heads * length * (FP32 + BF16) + stack.width * size if written_out else 0
    return stack.width * (length * seen + asking * asked) + asking * probabilities


def block_parameters(stack: Stack) -> int:
    """Weights of one block: four matrices of attention, eight of the MLP, their biases, two norms, scales."""
    return 12 * stack.width**2 + 13 * stack.width + (2 * stack.width if stack.layer_scale else 0)


def encoder_parameters(spec: EncoderSpec) -> int:
    """Weights of an encoder."""
    return (spec.grid.patch_values + 3) * spec.width + spec.depth * block_parameters(stack_of(spec))


def predictor_parameters(
    spec: PredictorSpec, encoder_width: int, clip_head: bool = False, *, target_width: int | None = None
) -> int:
    """Weights of a predictor on an encoder of that width, of targets as wide unless told otherwise."""
    target_width = target_width or encoder_width
    ends = (encoder_width + target_width) * spec.width + 4 * spec.width + target_width
    head = (encoder_width + 1) * target_width if clip_head else 0
    return ends + head + spec.depth * block_parameters(stack_of(spec))


def free_bytes(device: torch.device) -> int | None:
    """What the device has free, on CPUs what Linux says is available; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not MEMINFO.exists():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def refuse_large_pretraining(
    recipe: Pretrain,
    device: torch.device,
    *,
    half: bool,
    recompute: bool = False,
    micro_clips: int | None = None,
    world: World = ALONE,
) -> None:
    """RunError where a pass of `micro_clips` (None: a rank's whole share) needs more than is free.

    It has the figures, and what to lower. Ranks of one machine share its memory, but each has a GPU of its own.
    All ranks have looked before this returns in any.
    """
    clips = world.share(recipe.clips_per_step)
    passed = min(micro_clips or clips, clips)
    needed = pretrain_memory(
        recipe,
        bf16=half,
        written_out=half and device.type == "cpu",
        recompute=recompute,
        clips=clips,
        micro_clips=passed,
    )
    refuse_more_than_free(
        f"recipe {recipe.name}", needed, passed, device, world, Ways(recompute=not recompute)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Ways:
    """What there is to make a step smaller: its options, and the fields of its model."""

    recompute: bool
    fewer: str = "--micro-batch"
    fields: str = "model.encoder.width, model.encoder.depth"


def refuse_more_than_free(
    who: str, needed: Memory, clips: int, device: torch.device, world: World, ways: Ways
) -> None:
    """RunError where `clips` at once need more than is free to this rank, after all ranks have looked."""
    free = free_bytes(device)
    world.wait()
    if free is None:
        return
    sharing = world.local_size if device.type == "cpu" else 1
    free //= sharing
    if needed.total <= free:
        return
    each = f" for each of {sharing} ranks" if sharing > 1 else ""
    told = f"{who} needs about {needed} for {clips} clips at once"
    raise RunError(
        f"{told}, {device.type} has {free / GB:.2f} GB free{each}; {advice(clips, needed, free, ways)}"
    )


def advice(clips: int, needed: Memory, free: int, ways: Ways) -> str:
    """What would fit."""
    room = free - (needed.total - needed.activations)
    fewer = int(clips * room / needed.activations)
    smaller = f"a smaller model (--set {ways.fields})"
    again = "--recompute, or " if ways.recompute else ""
    if fewer < 1:
        return f"not one clip would fit: try {again}{smaller}"
    return f"try {again}{ways.fewer} {fewer}, or {smaller}"


def classifier_memory(
    recipe: Finetune,
    classes: int,
    *,
    bf16: bool,
    written_out: bool = False,
    recompute: bool = False,
    clips: int | None = None,
    micro_clips: int | None = None,
) -> Memory:
    """What a step needs at most; the options are those of `memory.estimate`."""
    clips = clips or recipe.clips_per_step
    passed, seen, spec = min(micro_clips or clips, clips), seen_of(recipe), recipe.model
    if seen is None:
        one = of_one_clip(recipe, classes)
        weights, size = one.weights, 0.6 if bf16 else 1.0  # norms stay as they are
        activations = int((passed * (one.kept_bytes + 2 * one.largest_bytes)) * size)
    else:
        weights = weights_of(seen, classes)
        activations = passed * clip_bytes(seen, bf16=bf16, written_out=written_out, recompute=recompute)
    return Memory(
        weights=FP32 * weights * (2 if recipe.ema else 1),
        gradients=FP32 * weights,
        moments=2 * FP32 * weights,
        batch=clips * spec.frames * spec.bands * FP32,
        activations=activations + (BF16 * weights if bf16 else 0),
    )


def weights_of(seen: Seen, classes: int) -> int:
    """Weights of a transformer, but for single vectors."""
    ends = (seen.patch_values + 3) * seen.stack.width + (seen.pooled + 1) * classes
    return ends + seen.stack.depth * block_parameters(seen.stack)


def clip_bytes(seen: Seen, *, bf16: bool, written_out: bool, recompute: bool) -> int:
    """What autograd keeps of one clip, and the most that is passing through."""
    stack = seen.stack
    inputs = seen.tokens * FP32 * stack.width
    block = block_bytes(stack, seen.tokens, seen.tokens, bf16=bf16, written_out=written_out)
    kept = stack.depth * (inputs if recompute else block) + 3 * inputs  # embedding and last norm
    kept += seen.patches * seen.patch_values * FP32
    return kept + int(block * (1.75 if recompute else 0.5))  # a block computed again, and gradients: measured


def refuse_large_classifier(
    recipe: Finetune,
    classes: int,
    device: torch.device,
    *,
    half: bool,
    recompute: bool,
    micro_clips: int | None,
    world: World,
) -> None:
    """RunError where a pass of `micro_clips` (None: a rank's whole share) needs more than is free; as in `memory`."""
    clips, model = world.share(recipe.clips_per_step), MODELS[model_name(recipe.model)]
    passed = min(micro_clips or clips, clips)
    needed = classifier_memory(
        recipe,
        classes,
        bf16=half,
        written_out=half and device.type == "cpu",
        recompute=recompute,
        clips=clips,
        micro_clips=passed,
    )
    ways = Ways(
        recompute=isinstance(recipe.model, VitSpec) and not recompute,
        fewer="--batch" if model.batch_norm else "--micro-batch",
        fields=model.smaller,
    )
    refuse_more_than_free(f"recipe {recipe.name}", needed, passed, device, world, ways)
