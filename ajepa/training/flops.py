"""What a step of a classifier takes: operations, and memory before its first step."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ajepa.model.classifier import VitSpec, build_classifier
from ajepa.model.passt import SPECIAL_TOKENS, PasstSpec
from ajepa.model.transformer import TransformerSpec
from ajepa.model.vit import transformer_spec_of
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.meter import ComputeCost


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """How many tokens a step handles: `clips` of all ranks, and the masks of each of their mask sets."""

    clips: int
    context_tokens: int  # tokens that the context encoder sees of a row
    target_groups: int  # of targets
    tokens_per_group: int  # targets in a group


def pretrain_step_flop(recipe: Pretrain, shape: StepShape, *, recompute: bool = False) -> int:
    """Floating-point operations of the matrix products of a step, a multiplication and an addition each.

    Attention's two products are among them, and those of the backward pass: two for each of the forward pass,
    but one for the patch embedding, whose input needs no gradient. With `recompute`, blocks run forward once
    more, but for their last product, which nothing needs. Left out are norms, activations, softmax, loss,
    optimiser and moving average, which are no such products, and the scores that a fused attention kernel
    computes a second time.
    """
    model, rows = recipe.model, shape.clips * recipe.mask_sets
    encoder, predictor, grid = (
        transformer_spec_of(model.encoder),
        transformer_spec_of(model.predictor),
        model.encoder.grid,
    )
    sequences, length = rows * shape.target_groups, shape.context_tokens + shape.tokens_per_group
    passes = 3  # forward, and a gradient for each of the two that a product is of
    flop = passes * matmul_flop(rows * shape.context_tokens, encoder.width, predictor.width)
    flop += passes * matmul_flop(sequences * shape.tokens_per_group, predictor.width, model.target_width)
    flop += (passes - 1) * matmul_flop(rows * shape.context_tokens, grid.patch_values, encoder.width)
    for stack, count, tokens, last in (
        (encoder, rows, shape.context_tokens, shape.context_tokens),
        (predictor, sequences, length, shape.tokens_per_group),
    ):
        flop += (passes + recompute) * blocks_flop(stack, count, tokens, last)
        if recompute:
            flop -= skipped_product_flop(stack, count * (tokens * (stack.depth - 1) + last))
    if model.clip_weight:
        flop += passes * matmul_flop(rows, encoder.width, model.target_width)
    flop += matmul_flop(
        shape.clips * grid.tokens, grid.patch_values, model.target_width
    )  # teacher or cosines
    if model.targets == "teacher":
        flop += blocks_flop(encoder, shape.clips, grid.tokens, grid.tokens)
    return flop


def matmul_flop(rows: int, inner: int, columns: int) -> int:
    """Operations of one matrix product."""
    return 2 * rows * inner * columns


def blocks_flop(stack: TransformerSpec, sequences: int, length: int, last_tokens: int) -> int:
    """Operations of all blocks, forward, on so many sequences of `length` tokens; of the last block `last` come out.

    A block has four square matrices in attention and eight in its MLP, and the two products of each token with
    every token of its sequence. Two of the matrices, keys and values, see all tokens of the last block.
    """

    def one_block_flop(asking: int) -> int:
        seen = 2 * matmul_flop(sequences * length, stack.width, stack.width)
        matrices = 10 * matmul_flop(sequences * asking, stack.width, stack.width)
        return seen + matrices + 2 * matmul_flop(sequences * asking, stack.width, length)

    return (stack.depth - 1) * one_block_flop(length) + one_block_flop(last_tokens)


def skipped_product_flop(stack: TransformerSpec, tokens: int) -> int:
    """The last product of the blocks: autograd does not ask for it again unless something multiplies it."""
    multiplied = stack.layer_scale or stack.drop_path
    return 0 if multiplied else matmul_flop(tokens, 4 * stack.width, stack.width)


def pretrain_step_cost(recipe: Pretrain, shape: StepShape, *, recompute: bool) -> ComputeCost:
    """What one step of pre-training takes."""
    rows, tokens = shape.clips * recipe.mask_sets, recipe.model.encoder.grid.tokens
    return ComputeCost(
        step=1,
        clips=shape.clips,
        context_tokens=rows * shape.context_tokens,
        predicted_tokens=rows * shape.target_groups * shape.tokens_per_group,
        teacher_tokens=shape.clips * tokens if recipe.model.targets == "teacher" else 0,
        flop=pretrain_step_flop(recipe, shape, recompute=recompute),
    )


MATMUL_PASSES = 3  # forward, and a gradient for each of the two that a product is of


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerShape:
    """What a transformer makes of a clip in training: its blocks, patches, tokens with others, inputs of its head."""

    stack: TransformerSpec
    patches: int
    patch_values: int
    tokens: int
    head_inputs: int


def transformer_shape(recipe: Finetune) -> TransformerShape | None:
    """None for what is no transformer."""
    spec = recipe.model
    if isinstance(spec, VitSpec):
        grid = spec.encoder.grid
        values = grid.patch_values
        return TransformerShape(
            stack=transformer_spec_of(spec.encoder),
            patches=grid.tokens,
            patch_values=values,
            tokens=grid.tokens,
            head_inputs=spec.clip_vector_width,
        )
    if not isinstance(spec, PasstSpec):
        return None
    stack = TransformerSpec(
        width=spec.width,
        depth=spec.depth,
        heads=spec.heads,
        positions="sincos",
        layer_scale=0.0,
        drop_path=0.0,
    )
    shown = (spec.rows - spec.drop_rows) * (spec.cols - spec.drop_cols)
    return TransformerShape(
        stack=stack,
        patches=shown,
        patch_values=spec.patch**2,
        tokens=shown + SPECIAL_TOKENS,
        head_inputs=spec.width,
    )


def classifier_step_cost(recipe: Finetune, classes: int, *, recompute: bool = False) -> ComputeCost:
    """What one step takes; operations as `compute.step_flop` counts them, of what is no transformer as torch does."""
    clips, seen = recipe.clips_per_step, transformer_shape(recipe)
    if seen is None:
        return ComputeCost(step=1, clips=clips, flop=clips * measure_clip_cost(recipe, classes).flop)
    stack, width = seen.stack, seen.stack.width
    flop = (MATMUL_PASSES - 1) * matmul_flop(clips * seen.patches, seen.patch_values, width)
    flop += (MATMUL_PASSES + recompute) * blocks_flop(stack, clips, seen.tokens, seen.tokens)
    flop += MATMUL_PASSES * matmul_flop(clips, seen.head_inputs, classes)
    if recompute and not has_token_masking(recipe):
        flop -= skipped_product_flop(stack, clips * seen.tokens * stack.depth)
    return ComputeCost(step=1, clips=clips, context_tokens=clips * seen.tokens, flop=flop)


def has_token_masking(recipe: Finetune) -> bool:
    """Whether masking multiplies what blocks compute."""
    spec = recipe.model
    return isinstance(spec, VitSpec) and spec.masking.share > 0 and spec.masking.reading == "tokens"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipCost:
    """What a clip takes of a model that has no formula: what autograd keeps of it, and the largest piece of that."""

    weights: int
    saved_bytes: int
    largest_saved_bytes: int
    flop: int


@cache
def measure_clip_cost(recipe: Finetune, classes: int) -> ClipCost:
    """Seen by running one forward and backward on the CPU in fp32."""
    spec, kept = recipe.model, dict[int, int]()
    model = build_classifier(spec, classes, 0)
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def record_storage(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    mel_BTF, n_frames_B = torch.zeros(1, spec.frames, spec.bands), torch.tensor([spec.frames])
    model.train()
    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(record_storage, lambda value: value):
            logits_BC = model(mel_BTF, n_frames_B, np.random.default_rng(0))
        logits_BC.sum().backward()
    weights = sum(weight.numel() for weight in model.parameters())
    return ClipCost(
        weights=weights,
        saved_bytes=sum(kept.values()),
        largest_saved_bytes=max(kept.values()),
        flop=counter.get_total_flops(),
    )
