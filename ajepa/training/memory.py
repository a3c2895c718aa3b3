"""The memory that a step needs, estimated before the first one, and the refusal of recipes that cannot fit.

Estimates follow the sizes of the tensors that autograd keeps. The tests compare them with the resident peak of real
processes, and find them within a factor of 1.5.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch

from ajepa.model.classifier import CLASSIFIER_KINDS, VitSpec, classifier_kind_name
from ajepa.model.sigreg import KNOTS as SIGREG_KNOTS
from ajepa.model.sigreg import ClipObjective
from ajepa.model.transformer import TransformerSpec
from ajepa.model.vit import EncoderSpec, PredictorSpec, transformer_spec_of
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.distributed import SINGLE_PROCESS, World
from ajepa.training.flops import TransformerShape, measure_clip_cost, transformer_shape
from pipeline.errors import RunError

BYTES_PER_GB = 1e9
FP32_BYTES = 4
BF16_BYTES = 2

PROC_MEMINFO = Path("/proc/meminfo")

MASK_DRAWS = 20  # draws of the masks, to see how many tokens they may leave

# Memory that passes through while a block's gradients are computed, in what a block keeps; measured.
PASSING_BLOCKS = 0.5
PASSING_BLOCKS_PRETRAIN_RECOMPUTED = 2.25
PASSING_BLOCKS_CLASSIFIER_RECOMPUTED = 1.75

# The share of a convolutional network's fp32 activations that is left in bf16: norms stay in fp32.
HALF_SHARE_CONVOLUTIONS = 0.6


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """Bytes at the peak of a step. `activations` grows with the clips of a pass, the rest does not."""

    weights: int  # of all models: encoder, teacher and predictor, or a classifier and its average
    gradients: int
    moments: int  # AdamW's two
    batch: int  # spectrograms of all the clips of this rank's step
    activations: int  # kept for the backward pass, and the largest that is passing through

    @classmethod
    def from_counts(
        cls, *, trained: int, averaged: int, batch_values: int, activations: int, bf16: bool
    ) -> Self:
        """The memory of a step that trains `trained` weights by AdamW, beside `averaged` ones without a gradient.

        In bf16, autocast keeps the weights that it has cast until the backward pass.
        """
        cast_bytes = BF16_BYTES * trained if bf16 else 0
        return cls(
            weights=FP32_BYTES * (trained + averaged),
            gradients=FP32_BYTES * trained,
            moments=2 * FP32_BYTES * trained,
            batch=FP32_BYTES * batch_values,
            activations=activations + cast_bytes,
        )

    @property
    def total_bytes(self) -> int:
        return self.weights + self.gradients + self.moments + self.batch + self.activations

    def __str__(self) -> str:
        """In GB, all and each."""
        names = ("weights", "gradients", "moments", "batch", "activations")
        parts = ", ".join(f"{name} {getattr(self, name) / BYTES_PER_GB:.2f}" for name in names)
        return f"{self.total_bytes / BYTES_PER_GB:.2f} GB ({parts})"


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationSizes:
    """How a step computes, as far as it decides how much autograd keeps.

    bf16         or fp16: most activations are half as large
    written_out  attention keeps its probabilities, as it does in bf16 on CPUs
    recompute    a block keeps only its input, and is computed again in the backward pass
    """

    bf16: bool
    written_out: bool
    recompute: bool

    def block_bytes(self, stack: TransformerSpec, length: int, output_tokens: int) -> int:
        """Bytes kept of one sequence of `length` tokens in one block that outputs `output_tokens` of them.

        In fp32, in widths. Of every token: its input (1), normalised (1), keys and values (2). Of every output
        token: query (1), attention's result (1), the sum (1), normalised (1), the MLP before and after GELU (8).
        In bf16 all but input and sum is half as large, and attention written out keeps the scaled queries, and
        each probability in fp32 and in bf16.
        """
        # Of every token, and of every output token: the sums in fp32, all else in the size of the precision.
        size = BF16_BYTES if self.bf16 else FP32_BYTES
        per_token = FP32_BYTES + 3 * size
        per_output = FP32_BYTES + 11 * size

        # Rotary positions keep two halves of the keys, and two of the queries.
        if stack.positions == "rope":
            per_token += 2 * FP32_BYTES
            per_output += 2 * FP32_BYTES

        # LayerScale keeps its two inputs.
        if stack.layer_scale:
            per_output += 2 * size
        total = stack.width * (length * per_token + output_tokens * per_output)

        # Attention that is written out keeps the scaled queries, and the probabilities of every head.
        if self.written_out:
            probabilities = stack.heads * length * (FP32_BYTES + BF16_BYTES)
            total += output_tokens * (probabilities + stack.width * size)
        return total

    def stack_bytes(self, stack: TransformerSpec, length: int, last_tokens: int) -> tuple[int, int]:
        """Bytes kept of one sequence by all blocks, embedding and last norm; and by the largest of the blocks.

        The last block outputs `last_tokens` of the `length` tokens.
        """
        input_bytes = length * FP32_BYTES * stack.width
        full_block = self.block_bytes(stack, length, length)
        last_block = self.block_bytes(stack, length, last_tokens)

        # The last block is the smallest, and the largest where it is the only one.
        largest_block = last_block
        if stack.depth > 1:
            largest_block = full_block

        # A block that is computed again keeps its input alone.
        blocks = (stack.depth - 1) * full_block + last_block
        if self.recompute:
            blocks = stack.depth * input_bytes
        return blocks + 3 * input_bytes, largest_block


def pretrain_memory(
    recipe: Pretrain,
    *,
    bf16: bool,
    written_out: bool = False,
    recompute: bool = False,
    clips: int | None = None,
    micro_clips: int | None = None,
) -> StepMemory:
    """The most memory that a step of pre-training needs; `ActivationSizes` says what the first three options are.

    `clips`: of a step on one rank; None: the recipe's. `micro_clips`: the clips that pass through the model at once.
    Token counts are the largest that some draws of the masks gave, from the first step to the last.
    """
    # How many clips, and how they are computed.
    model = recipe.model
    clips = clips or recipe.clips_per_step
    clips_at_once = min(micro_clips or clips, clips)
    sizes = ActivationSizes(bf16=bf16, written_out=written_out, recompute=recompute)

    # How many weights: encoder, predictor and projector are trained, the teacher follows.
    encoder_weights = encoder_weight_count(model.encoder)
    other_weights = predictor_weight_count(model.predictor, model.encoder.width)
    if model.clip is not None:
        other_weights += projector_weight_count(model.clip, model.encoder.width)

    # The masks that leave the most to keep decide.
    return StepMemory.from_counts(
        trained=encoder_weights + other_weights,
        averaged=encoder_weights,
        batch_values=_pretrain_batch_values(recipe, clips),
        activations=max(
            _pretrain_activation_bytes(recipe, *shape, clips=clips_at_once, sizes=sizes)
            for shape in mask_shapes(recipe)
        ),
        bf16=bf16,
    )


def _pretrain_batch_values(recipe: Pretrain, clips: int) -> int:
    """Values of the clips of a step: as they come, as views, and their targets where these are computed first."""
    grid = recipe.model.encoder.grid
    if recipe.views is None:
        return clips * grid.frames * grid.bands
    crop_values = (recipe.source_frames + 3 * grid.frames) * grid.bands  # two copies pass through
    return clips * (recipe.crops * crop_values + 2 * grid.tokens * recipe.model.encoder.width)


def mask_shapes(recipe: Pretrain) -> set[tuple[int, int, int]]:
    """Context tokens, target groups and tokens of a group that some draws over the whole run gave."""
    # The draws are spread over the whole run, because masks may grow with the step.
    grid = recipe.sound_grid
    clips = min(recipe.clips_per_step, 16)
    shapes = set()
    for draw in range(MASK_DRAWS):
        step = draw * (recipe.steps - 1) // (MASK_DRAWS - 1)
        rng = np.random.default_rng([recipe.seed, step, draw])
        masks = recipe.masks.mask_maker_at(step, rng).sample(rng, grid, batch=clips)
        shapes.add((masks.context_BK.shape[1], *masks.targets_BGQ.shape[1:]))
    return shapes


def _pretrain_activation_bytes(
    recipe: Pretrain, context: int, groups: int, queries: int, *, clips: int, sizes: ActivationSizes
) -> int:
    """Bytes of a pass of `clips` with these masks: kept for the backward pass, and the most that passes through."""
    model = recipe.model
    grid = model.encoder.grid
    rows = clips * recipe.mask_sets
    targets = rows * groups * queries

    # Encoder on the context, predictor on context and targets of each group.
    encoder_kept, encoder_block = sizes.stack_bytes(transformer_spec_of(model.encoder), context, context)
    predictor_kept, predictor_block = sizes.stack_bytes(
        transformer_spec_of(model.predictor), context + queries, queries
    )
    view_rows = rows * recipe.crops
    kept_bytes = view_rows * encoder_kept + rows * groups * predictor_kept

    # The losses, and the patches of the clips.
    kept_bytes += 5 * targets * model.encoder.width * FP32_BYTES
    kept_bytes += 2 * clips * recipe.crops * grid.tokens * grid.patch_values * FP32_BYTES
    if model.clip is not None:
        kept_bytes += 6 * view_rows * model.clip.directions * SIGREG_KNOTS * FP32_BYTES

    # Either a block's gradients pass through, or the teacher's pass, never both at once.
    largest_block = max(view_rows * encoder_block, rows * groups * predictor_block)
    passing_blocks = PASSING_BLOCKS
    if sizes.recompute:
        passing_blocks = PASSING_BLOCKS_PRETRAIN_RECOMPUTED
    passing_bytes = largest_block * passing_blocks
    return int(kept_bytes + max(passing_bytes, _teacher_bytes(recipe, clips, bf16=sizes.bf16)))


def _teacher_bytes(recipe: Pretrain, clips: int, *, bf16: bool) -> int:
    """Bytes of the targets' forward pass on whole clips, nothing of which is kept."""
    model = recipe.model
    tokens = clips * model.encoder.grid.tokens

    # Eleven values of every token and width in one block; in bf16 three of them stay in fp32.
    value_bytes = 11 * FP32_BYTES
    if bf16:
        value_bytes = 8 * BF16_BYTES + 3 * FP32_BYTES
    teacher_bytes = tokens * model.encoder.width * value_bytes

    # The outputs of all the layers that are averaged.
    if model.target_layers > 1:
        teacher_bytes += 2 * model.target_layers * tokens * model.encoder.width * FP32_BYTES
    return teacher_bytes


def block_weight_count(stack: TransformerSpec) -> int:
    """Weights of one block: four matrices of attention, eight of the MLP, their biases, two norms, scales."""
    scales = 2 * stack.width if stack.layer_scale else 0
    return 12 * stack.width**2 + 13 * stack.width + scales


def encoder_weight_count(spec: EncoderSpec) -> int:
    """Weights of an encoder."""
    blocks = spec.depth * block_weight_count(transformer_spec_of(spec))
    return (spec.grid.patch_values + 3) * spec.width + blocks


def predictor_weight_count(spec: PredictorSpec, encoder_width: int) -> int:
    """Weights of a predictor on an encoder of that width."""
    ends = 2 * encoder_width * spec.width + 4 * spec.width + encoder_width
    return ends + spec.depth * block_weight_count(transformer_spec_of(spec))


def projector_weight_count(objective: ClipObjective, encoder_width: int) -> int:
    """Weights of the projector of a clip objective on an encoder of that width."""
    return (encoder_width + 2) * objective.hidden + (objective.hidden + 1) * objective.width


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
    """The most memory that a step of a classifier needs; the options are those of `pretrain_memory`."""
    # How many clips pass through the model at once.
    clips = clips or recipe.clips_per_step
    clips_at_once = min(micro_clips or clips, clips)
    shape = transformer_shape(recipe)
    if shape is None:
        # A convolutional network has no formula: one clip is measured, in fp32.
        cost = measure_clip_cost(recipe, classes)
        weights = cost.weights
        activations = clips_at_once * (cost.saved_bytes + 2 * cost.largest_saved_bytes)
        if bf16:
            activations = int(activations * HALF_SHARE_CONVOLUTIONS)
    else:
        sizes = ActivationSizes(bf16=bf16, written_out=written_out, recompute=recompute)
        weights = transformer_weight_count(shape, classes)
        activations = clips_at_once * _classifier_activation_bytes(shape, sizes)
    return StepMemory.from_counts(
        trained=weights,
        averaged=weights if recipe.ema else 0,
        batch_values=clips * recipe.model.frames * recipe.model.bands,
        activations=activations,
        bf16=bf16,
    )


def transformer_weight_count(shape: TransformerShape, classes: int) -> int:
    """Weights of a classifier's transformer, without some single vectors."""
    ends = (shape.patch_values + 3) * shape.stack.width + (shape.head_inputs + 1) * classes
    return ends + shape.stack.depth * block_weight_count(shape.stack)


def _classifier_activation_bytes(shape: TransformerShape, sizes: ActivationSizes) -> int:
    """Bytes of one clip: kept for the backward pass, and the most that passes through."""
    kept_bytes, block_bytes = sizes.stack_bytes(shape.stack, shape.tokens, shape.tokens)
    kept_bytes += shape.patches * shape.patch_values * FP32_BYTES
    passing_blocks = PASSING_BLOCKS
    if sizes.recompute:
        passing_blocks = PASSING_BLOCKS_CLASSIFIER_RECOMPUTED
    return kept_bytes + int(block_bytes * passing_blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallerOptions:
    """The options that make a step of a recipe smaller, for the error that advises them."""

    recompute: bool  # whether --recompute would help
    batch_option: str = "--micro-batch"
    model_fields: str = "model.encoder.width, model.encoder.depth"


def refuse_large_pretrain(
    recipe: Pretrain,
    device: torch.device,
    *,
    half: bool,
    recompute: bool = False,
    micro_clips: int | None = None,
    world: World = SINGLE_PROCESS,
) -> None:
    """RunError where a pass of `micro_clips` (None: a rank's whole share) needs more memory than is free."""
    refuse_over_free_memory(
        recipe,
        partial(pretrain_memory, recipe),
        device,
        SmallerOptions(recompute=not recompute),
        half=half,
        recompute=recompute,
        micro_clips=micro_clips,
        world=world,
    )


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
    """RunError where a pass of `micro_clips` (None: a rank's whole share) needs more memory than is free."""
    # Only a ViT can be recomputed, and batch norm needs all clips of a step at once.
    kind = CLASSIFIER_KINDS[classifier_kind_name(recipe.model)]
    options = SmallerOptions(
        recompute=isinstance(recipe.model, VitSpec) and not recompute,
        batch_option="--batch" if kind.has_batch_norm else "--micro-batch",
        model_fields=kind.size_fields,
    )
    refuse_over_free_memory(
        recipe,
        partial(classifier_memory, recipe, classes),
        device,
        options,
        half=half,
        recompute=recompute,
        micro_clips=micro_clips,
        world=world,
    )


def refuse_over_free_memory(
    recipe: Pretrain | Finetune,
    estimate: Callable[..., StepMemory],
    device: torch.device,
    options: SmallerOptions,
    *,
    half: bool,
    recompute: bool,
    micro_clips: int | None,
    world: World,
) -> None:
    """RunError, with figures and the options to lower, where a pass needs more memory than is free to this rank.

    Ranks of one machine share its memory, but each has a GPU of its own. All ranks have looked at their memory
    before any of them goes on, and takes some.
    """
    # Estimate what a pass needs.
    clips = world.clips_per_rank(recipe.clips_per_step)
    clips_at_once = min(micro_clips or clips, clips)
    needed = estimate(
        bf16=half,
        written_out=half and device.type == "cpu",
        recompute=recompute,
        clips=clips,
        micro_clips=clips_at_once,
    )

    # Look at what is free, before any rank takes some.
    free = free_memory_bytes(device)
    world.wait_for_ranks()
    if free is None:
        return

    # Ranks on CPUs share the memory of their machine.
    for_each = ""
    if device.type == "cpu" and world.local_size > 1:
        free //= world.local_size
        for_each = f" for each of {world.local_size} ranks"
    if needed.total_bytes <= free:
        return

    # Refuse, with figures and advice.
    raise RunError(
        f"recipe {recipe.name} needs about {needed} for {clips_at_once} clips at once, "
        f"{device.type} has {free / BYTES_PER_GB:.2f} GB free{for_each}; "
        f"{suggest_smaller_step(clips_at_once, needed, free, options)}"
    )


def free_memory_bytes(device: torch.device) -> int | None:
    """The free memory of a GPU, or the memory that Linux calls available; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not PROC_MEMINFO.exists():
        return None
    lines = dict(line.split(":", 1) for line in PROC_MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def suggest_smaller_step(clips: int, needed: StepMemory, free: int, options: SmallerOptions) -> str:
    """The end of the error: the options, and the number of clips, with which a step would fit."""
    # Activations alone grow with the clips: they may take what the rest leaves.
    room = free - (needed.total_bytes - needed.activations)
    fitting_clips = int(clips * room / needed.activations)
    smaller_model = f"a smaller model (--set {options.model_fields})"

    # Name the options from the cheapest to the one that changes the result.
    recompute = "--recompute, or " if options.recompute else ""
    if fitting_clips < 1:
        return f"not one clip would fit: try {recompute}{smaller_model}"
    return f"try {recompute}{options.batch_option} {fitting_clips}, or {smaller_model}"
