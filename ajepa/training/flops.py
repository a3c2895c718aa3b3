"""The cost of a training step: tokens, and floating-point operations by formula, of every kind of model.

Counted are the matrix products, a multiplication and an addition each: those of the forward pass, attention's two
among them, and two of the same size for each in the backward pass. Not counted are norms, activations, softmax,
loss, optimiser and moving averages, which are no matrix products, and the scores that a fused attention kernel
computes a second time.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ajepa.model.classifier import VitSpec, build_classifier
from ajepa.model.passt import SPECIAL_TOKENS, PasstSpec
from ajepa.model.transformer import TransformerSpec
from ajepa.model.vit import transformer_spec_of
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.meter import ComputeCost

MATMUL_PASSES = 3  # forward, and in the backward pass a gradient for each of the two factors


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """How many tokens a step of pre-training handles: its clips, of all ranks, and the masks of each mask set."""

    clips: int
    context_tokens: int  # that the context encoder sees of a row
    target_groups: int
    tokens_per_group: int  # targets in a group


def pretrain_step_cost(recipe: Pretrain, shape: StepShape, *, recompute: bool) -> ComputeCost:
    """The cost of one step of pre-training."""
    rows = shape.clips * recipe.mask_sets
    return ComputeCost(
        step=1,
        clips=shape.clips,
        context_tokens=rows * recipe.crops * shape.context_tokens,
        predicted_tokens=rows * shape.target_groups * shape.tokens_per_group,
        teacher_tokens=shape.clips * recipe.sound_grid.tokens,
        flop=pretrain_step_flop(recipe, shape, recompute=recompute),
    )


def pretrain_step_flop(recipe: Pretrain, shape: StepShape, *, recompute: bool = False) -> int:
    """Floating-point operations of a step of pre-training, forward and backward; see the top of this file."""
    model = recipe.model
    grid = recipe.sound_grid
    encoder = transformer_spec_of(model.encoder)
    predictor = transformer_spec_of(model.predictor)
    rows = shape.clips * recipe.mask_sets
    groups = rows * shape.target_groups

    # Context encoder, on all views. The patch embedding has one gradient less: its input needs none.
    view_rows = rows * recipe.crops
    flop = (MATMUL_PASSES - 1) * matmul_flop(
        view_rows * shape.context_tokens, grid.patch_values, encoder.width
    )
    flop += trained_blocks_flop(
        encoder, view_rows, shape.context_tokens, shape.context_tokens, recompute=recompute
    )

    # Predictor: its way in, blocks over context and targets together, and the targets' way out.
    length = shape.context_tokens + shape.tokens_per_group
    flop += MATMUL_PASSES * matmul_flop(rows * shape.context_tokens, encoder.width, predictor.width)
    flop += trained_blocks_flop(predictor, groups, length, shape.tokens_per_group, recompute=recompute)
    flop += MATMUL_PASSES * matmul_flop(groups * shape.tokens_per_group, predictor.width, encoder.width)

    # Clip objective: the projector's two layers, and the directions, which need no gradient.
    if (clip := model.clip) is not None:
        flop += MATMUL_PASSES * matmul_flop(view_rows, encoder.width, clip.hidden)
        flop += MATMUL_PASSES * matmul_flop(view_rows, clip.hidden, clip.width)
        flop += (MATMUL_PASSES - 1) * matmul_flop(view_rows, clip.width, clip.directions)

    # Targets: the teacher's forward pass on whole clips.
    flop += matmul_flop(shape.clips * grid.tokens, grid.patch_values, encoder.width)
    flop += blocks_flop(encoder, shape.clips, grid.tokens, grid.tokens)
    return flop


def matmul_flop(rows: int, inner: int, columns: int) -> int:
    """Operations of one matrix product."""
    return 2 * rows * inner * columns


def blocks_flop(stack: TransformerSpec, sequences: int, length: int, last_tokens: int) -> int:
    """Operations of all blocks, forward, on `sequences` of `length` tokens; the last block outputs `last_tokens` each.

    A block has four square matrices in attention and eight in its MLP, and two products of each token with every
    token of its sequence. Two of the matrices, keys and values, see all tokens of the last block.
    """

    def one_block_flop(output_tokens: int) -> int:
        keys_and_values = 2 * matmul_flop(sequences * length, stack.width, stack.width)
        other_matrices = 10 * matmul_flop(sequences * output_tokens, stack.width, stack.width)
        attention = 2 * matmul_flop(sequences * output_tokens, stack.width, length)
        return keys_and_values + other_matrices + attention

    return (stack.depth - 1) * one_block_flop(length) + one_block_flop(last_tokens)


def trained_blocks_flop(
    stack: TransformerSpec,
    sequences: int,
    length: int,
    last_tokens: int,
    *,
    recompute: bool,
    is_output_masked: bool = False,
) -> int:
    """Operations of all blocks in a training step: forward, backward, and with `recompute` forward once more.

    A recomputed block leaves out its last product, whose result no gradient needs, unless that result is multiplied
    by something: a layer's scale, drop path, or a mask (`is_output_masked`).
    """
    # All products, in each of the passes.
    flop = (MATMUL_PASSES + recompute) * blocks_flop(stack, sequences, length, last_tokens)

    # Less the second product of each MLP, where recomputing can stop before it.
    is_output_multiplied = stack.layer_scale or stack.drop_path or is_output_masked
    if recompute and not is_output_multiplied:
        output_tokens = sequences * (length * (stack.depth - 1) + last_tokens)
        flop -= matmul_flop(output_tokens, 4 * stack.width, stack.width)
    return flop


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerShape:
    """A classifier's transformer on one clip in training."""

    stack: TransformerSpec
    patches: int
    patch_values: int
    tokens: int  # patches, and special tokens beside them
    head_inputs: int


def transformer_shape(recipe: Finetune) -> TransformerShape | None:
    """The transformer of a ViT or PaSST; None for a convolutional network."""
    # A ViT sees every patch and has no other tokens.
    spec = recipe.model
    if isinstance(spec, VitSpec):
        grid = spec.encoder.grid
        return TransformerShape(
            stack=transformer_spec_of(spec.encoder),
            patches=grid.tokens,
            patch_values=grid.patch_values,
            tokens=grid.tokens,
            head_inputs=spec.clip_vector_width,
        )

    # CNN6 and ConvNeXt have none.
    if not isinstance(spec, PasstSpec):
        return None

    # PaSST drops whole rows and columns of patches while it trains.
    patches = (spec.rows - spec.drop_rows) * (spec.cols - spec.drop_cols)
    stack = TransformerSpec(
        width=spec.width,
        depth=spec.depth,
        heads=spec.heads,
        positions="sincos",
        layer_scale=0.0,
        drop_path=0.0,
    )
    return TransformerShape(
        stack=stack,
        patches=patches,
        patch_values=spec.patch**2,
        tokens=patches + SPECIAL_TOKENS,
        head_inputs=spec.width,
    )


def classifier_step_cost(recipe: Finetune, classes: int, *, recompute: bool = False) -> ComputeCost:
    """The cost of one step of a classifier; a convolutional network's operations are counted by torch."""
    # Every clip of a convolutional network costs the same: one is measured.
    clips = recipe.clips_per_step
    shape = transformer_shape(recipe)
    if shape is None:
        return ComputeCost(step=1, clips=clips, flop=clips * measure_clip_cost(recipe, classes).flop)

    # Patch embedding (its input needs no gradient), blocks, head.
    flop = (MATMUL_PASSES - 1) * matmul_flop(clips * shape.patches, shape.patch_values, shape.stack.width)
    flop += trained_blocks_flop(
        shape.stack,
        clips,
        shape.tokens,
        shape.tokens,
        recompute=recompute,
        is_output_masked=has_token_masking(recipe),
    )
    flop += MATMUL_PASSES * matmul_flop(clips, shape.head_inputs, classes)
    return ComputeCost(step=1, clips=clips, context_tokens=clips * shape.tokens, flop=flop)


def has_token_masking(recipe: Finetune) -> bool:
    """Whether masking multiplies the output of blocks."""
    spec = recipe.model
    return isinstance(spec, VitSpec) and spec.masking.share > 0 and spec.masking.reading == "tokens"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipCost:
    """The measured cost of one clip: operations, bytes that autograd keeps, and the largest tensor among them."""

    weights: int
    saved_bytes: int
    largest_saved_bytes: int
    flop: int


@cache
def measure_clip_cost(recipe: Finetune, classes: int) -> ClipCost:
    """The cost of a clip for a model without a formula, from one forward and backward pass on the CPU in fp32."""
    # The values of clip and weights do not matter, their sizes do.
    spec = recipe.model
    model = build_classifier(spec, classes, 0)
    mel_BTF = torch.zeros(1, spec.frames, spec.bands)
    n_frames_B = torch.tensor([spec.frames])

    # Note every piece of memory that autograd keeps, but not the weights, which are there anyway.
    weight_addresses = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved_bytes: dict[int, int] = {}

    def record_storage(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weight_addresses:
            saved_bytes[storage.data_ptr()] = storage.nbytes()
        return value

    # Forward and backward, counted by torch. Its counter imports triton, which takes half a second.
    from torch.utils.flop_counter import FlopCounterMode

    model.train()
    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(record_storage, lambda value: value):
            logits_BC = model(mel_BTF, n_frames_B, np.random.default_rng(0))
        logits_BC.sum().backward()
    return ClipCost(
        weights=sum(weight.numel() for weight in model.parameters()),
        saved_bytes=sum(saved_bytes.values()),
        largest_saved_bytes=max(saved_bytes.values()),
        flop=counter.get_total_flops(),
    )
