"""How much memory a recipe needs, before its first step: an estimate, and the refusal of what cannot fit."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ajepa.model.classifier import CLASSIFIER_KINDS, VitSpec, classifier_kind_name
from ajepa.model.transformer import TransformerSpec
from ajepa.model.vit import EncoderSpec, PredictorSpec, transformer_spec_of
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.distributed import SINGLE_PROCESS, World
from ajepa.training.flops import TransformerShape, measure_clip_cost, transformer_shape
from pipeline.errors import RunError

BYTES_PER_GB = 1e9

FP32_BYTES, BF16_BYTES = 4, 2  # bytes

PROC_MEMINFO = Path("/proc/meminfo")

MASK_DRAWS = 20  # of masks, to see how many tokens they may leave


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """Bytes at the peak of a step. `activations` grows with the clips of a pass, the rest does not."""

    weights: int  # of all models: encoder, teacher, predictor; a classifier and its average
    gradients: int
    moments: int  # AdamW's two
    batch: int  # spectrograms of all the clips of this rank's step
    activations: int  # kept for the backward pass, and the largest that is passing through

    @property
    def total_bytes(self) -> int:
        return self.weights + self.gradients + self.moments + self.batch + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "moments", "batch", "activations")
        told = ", ".join(f"{name} {getattr(self, name) / BYTES_PER_GB:.2f}" for name in parts)
        return f"{self.total_bytes / BYTES_PER_GB:.2f} GB ({told})"


def pretrain_memory(
    recipe: Pretrain,
    *,
    bf16: bool,
    written_out: bool = False,
    recompute: bool = False,
    clips: int | None = None,
    micro_clips: int | None = None,
) -> StepMemory:
    """What a step of the recipe needs at most, from the sizes of what autograd keeps.

    `clips`: of a step on one rank; None: the recipe's. `micro_clips`: of those that pass through the model at
    once. `bf16`: or fp16. `written_out`: attention keeps its probabilities (bf16 on CPUs). Token counts are
    the most that some draws of the masks gave, from the first step to the last.
    """
    encoder, predictor = recipe.model.encoder, recipe.model.predictor
    clips = clips or recipe.clips_per_step
    encoder_count = encoder_weight_count(encoder)
    model = recipe.model
    trained = encoder_count + predictor_weight_count(
        predictor, encoder.width, model.clip_weight > 0, target_width=model.target_width
    )
    kept = max(
        _activation_bytes(
            recipe,
            *shape,
            clips=min(micro_clips or clips, clips),
            bf16=bf16,
            written_out=written_out,
            recompute=recompute,
        )
        for shape in mask_shapes(recipe)
    )
    copies = (
        BF16_BYTES * trained if bf16 else 0
    )  # autocast keeps the weights it has cast until the backward pass
    return StepMemory(
        weights=FP32_BYTES * (trained + encoder_count),
        gradients=FP32_BYTES * trained,
        moments=2 * FP32_BYTES * trained,
        batch=clips * encoder.grid.tokens * encoder.grid.patch_values * FP32_BYTES,
        activations=kept + copies,
    )


def mask_shapes(recipe: Pretrain) -> set[tuple[int, int, int]]:
    """Context tokens, target groups and tokens of a group that some draws over the whole run gave."""
    shapes, grid = set(), recipe.model.encoder.grid
    for draw in range(MASK_DRAWS):
        step = draw * (recipe.steps - 1) // (MASK_DRAWS - 1)
        rng = np.random.default_rng([recipe.seed, step, draw])
        masks = recipe.masks.mask_maker_at(step, rng).sample(rng, grid, batch=min(recipe.clips_per_step, 16))
        shapes.add((masks.context_BK.shape[1], *masks.targets_BGQ.shape[1:]))
    return shapes


def _activation_bytes(
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
    encoder, predictor = transformer_spec_of(model.encoder), transformer_spec_of(model.predictor)
    numbers, blocks, kept = {"bf16": bf16, "written_out": written_out}, list[int](), 0
    length = context + queries
    for stack, sequences, tokens, last in (
        (encoder, rows, context, context),
        (predictor, rows * groups, length, queries),
    ):
        inputs = sequences * tokens * FP32_BYTES * stack.width
        whole = sequences * block_activation_bytes(stack, tokens, tokens, **numbers)
        final = sequences * block_activation_bytes(stack, tokens, last, **numbers)
        kept += stack.depth * inputs if recompute else (stack.depth - 1) * whole + final
        kept += 3 * inputs  # embedding and last norm
        blocks.append(whole if stack.depth > 1 else final)
    scored = rows * groups * queries * model.target_width * FP32_BYTES
    kept += 5 * scored + 2 * clips * grid.tokens * grid.patch_values * FP32_BYTES  # loss; patches
    again = 2.25 if recompute else 0.5  # a block computed again, and gradients: measured
    passing = max(blocks) * again
    teacher = (
        clips * grid.tokens * encoder.width * (8 * BF16_BYTES + 3 * FP32_BYTES if bf16 else 11 * FP32_BYTES)
    )
    if model.targets == "cosines":
        teacher = clips * grid.tokens * model.target_width * FP32_BYTES
    elif model.target_layers > 1:
        teacher += 2 * model.target_layers * clips * grid.tokens * encoder.width * FP32_BYTES
    return int(kept + max(passing, teacher))


def block_activation_bytes(
    stack: TransformerSpec, length: int, query_tokens: int, *, bf16: bool, written_out: bool
) -> int:
    """What autograd keeps of one sequence of `length` tokens in one block, of which so many ask and come out.

    In fp32, in widths. Of every token: what enters (1), normalised (1), keys and values (2). Of those that ask:
    queries (1), mixed (1), the sum (1), normalised (1), the MLP before and after GELU (8). In bf16 all but what
    enters and the sum is half as large, and attention written out keeps the scaled queries, and each probability
    in fp32 and in bf16.
    """
    size, rope = (
        BF16_BYTES if bf16 else FP32_BYTES,
        2 * FP32_BYTES if stack.positions == "rope" else 0,
    )  # halves of queries, of keys
    seen = FP32_BYTES + 3 * size + rope
    asked = FP32_BYTES + 11 * size + rope + (2 * size if stack.layer_scale else 0)
    probabilities = (
        stack.heads * length * (FP32_BYTES + BF16_BYTES) + stack.width * size if written_out else 0
    )
    return stack.width * (length * seen + query_tokens * asked) + query_tokens * probabilities


def block_weight_count(stack: TransformerSpec) -> int:
    """Weights of one block: four matrices of attention, eight of the MLP, their biases, two norms, scales."""
    return 12 * stack.width**2 + 13 * stack.width + (2 * stack.width if stack.layer_scale else 0)


def encoder_weight_count(spec: EncoderSpec) -> int:
    """Weights of an encoder."""
    return (spec.grid.patch_values + 3) * spec.width + spec.depth * block_weight_count(
        transformer_spec_of(spec)
    )


def predictor_weight_count(
    spec: PredictorSpec, encoder_width: int, clip_head: bool = False, *, target_width: int | None = None
) -> int:
    """Weights of a predictor on an encoder of that width, of targets as wide unless told otherwise."""
    target_width = target_width or encoder_width
    ends = (encoder_width + target_width) * spec.width + 4 * spec.width + target_width
    head = (encoder_width + 1) * target_width if clip_head else 0
    return ends + head + spec.depth * block_weight_count(transformer_spec_of(spec))


def free_memory_bytes(device: torch.device) -> int | None:
    """What the device has free, on CPUs what Linux says is available; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not PROC_MEMINFO.exists():
        return None
    lines = dict(line.split(":", 1) for line in PROC_MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def refuse_large_pretrain(
    recipe: Pretrain,
    device: torch.device,
    *,
    half: bool,
    recompute: bool = False,
    micro_clips: int | None = None,
    world: World = SINGLE_PROCESS,
) -> None:
    """RunError where a pass of `micro_clips` (None: a rank's whole share) needs more than is free.

    It has the figures, and what to lower. Ranks of one machine share its memory, but each has a GPU of its own.
    All ranks have looked before this returns in any.
    """
    clips = world.clips_per_rank(recipe.clips_per_step)
    passed = min(micro_clips or clips, clips)
    needed = pretrain_memory(
        recipe,
        bf16=half,
        written_out=half and device.type == "cpu",
        recompute=recompute,
        clips=clips,
        micro_clips=passed,
    )
    refuse_over_free_memory(
        f"recipe {recipe.name}", needed, passed, device, world, SmallerOptions(recompute=not recompute)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallerOptions:
    """What there is to make a step smaller: its options, and the fields of its model."""

    recompute: bool
    batch_option: str = "--micro-batch"
    model_fields: str = "model.encoder.width, model.encoder.depth"


def refuse_over_free_memory(
    recipe_label: str,
    needed: StepMemory,
    clips: int,
    device: torch.device,
    world: World,
    options: SmallerOptions,
) -> None:
    """RunError where `clips` at once need more than is free to this rank, after all ranks have looked."""
    free = free_memory_bytes(device)
    world.wait_for_ranks()
    if free is None:
        return
    sharing = world.local_size if device.type == "cpu" else 1
    free //= sharing
    if needed.total_bytes <= free:
        return
    each = f" for each of {sharing} ranks" if sharing > 1 else ""
    told = f"{recipe_label} needs about {needed} for {clips} clips at once"
    raise RunError(
        f"{told}, {device.type} has {free / BYTES_PER_GB:.2f} GB free{each}; {suggest_smaller_step(clips, needed, free, options)}"
    )


def suggest_smaller_step(clips: int, needed: StepMemory, free: int, options: SmallerOptions) -> str:
    """What would fit."""
    room = free - (needed.total_bytes - needed.activations)
    fewer = int(clips * room / needed.activations)
    smaller = f"a smaller model (--set {options.model_fields})"
    again = "--recompute, or " if options.recompute else ""
    if fewer < 1:
        return f"not one clip would fit: try {again}{smaller}"
    return f"try {again}{options.batch_option} {fewer}, or {smaller}"


def classifier_memory(
    recipe: Finetune,
    classes: int,
    *,
    bf16: bool,
    written_out: bool = False,
    recompute: bool = False,
    clips: int | None = None,
    micro_clips: int | None = None,
) -> StepMemory:
    """What a step needs at most; the options are those of `memory.estimate`."""
    clips = clips or recipe.clips_per_step
    passed, seen, spec = min(micro_clips or clips, clips), transformer_shape(recipe), recipe.model
    if seen is None:
        one = measure_clip_cost(recipe, classes)
        weights, size = one.weights, 0.6 if bf16 else 1.0  # norms stay as they are
        activations = int((passed * (one.saved_bytes + 2 * one.largest_saved_bytes)) * size)
    else:
        weights = transformer_weight_count(seen, classes)
        activations = passed * clip_activation_bytes(
            seen, bf16=bf16, written_out=written_out, recompute=recompute
        )
    return StepMemory(
        weights=FP32_BYTES * weights * (2 if recipe.ema else 1),
        gradients=FP32_BYTES * weights,
        moments=2 * FP32_BYTES * weights,
        batch=clips * spec.frames * spec.bands * FP32_BYTES,
        activations=activations + (BF16_BYTES * weights if bf16 else 0),
    )


def transformer_weight_count(shape: TransformerShape, classes: int) -> int:
    """Weights of a transformer, but for single vectors."""
    ends = (shape.patch_values + 3) * shape.stack.width + (shape.head_inputs + 1) * classes
    return ends + shape.stack.depth * block_weight_count(shape.stack)


def clip_activation_bytes(shape: TransformerShape, *, bf16: bool, written_out: bool, recompute: bool) -> int:
    """What autograd keeps of one clip, and the most that is passing through."""
    stack = shape.stack
    inputs = shape.tokens * FP32_BYTES * stack.width
    block = block_activation_bytes(stack, shape.tokens, shape.tokens, bf16=bf16, written_out=written_out)
    kept = stack.depth * (inputs if recompute else block) + 3 * inputs  # embedding and last norm
    kept += shape.patches * shape.patch_values * FP32_BYTES
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
    clips, model = (
        world.clips_per_rank(recipe.clips_per_step),
        CLASSIFIER_KINDS[classifier_kind_name(recipe.model)],
    )
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
    ways = SmallerOptions(
        recompute=isinstance(recipe.model, VitSpec) and not recompute,
        batch_option="--batch" if model.has_batch_norm else "--micro-batch",
        model_fields=model.size_fields,
    )
    refuse_over_free_memory(f"recipe {recipe.name}", needed, passed, device, world, ways)
