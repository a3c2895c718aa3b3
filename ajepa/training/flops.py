"""What a step of a classifier takes: operations, and memory before its first step."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ajepa.model.classifier import VitSpec, built
from ajepa.model.passt import TOKENS, PasstSpec
from ajepa.model.transformer import Stack
from ajepa.model.vit import stack_of
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.meter import Spent


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """How many tokens a step handles: `clips` of all ranks, and the masks of each of their mask sets."""

    clips: int
    context: int  # tokens that the context encoder sees of a row
    groups: int  # of targets
    queries: int  # targets in a group


def step_flop(recipe: Pretrain, shape: StepShape, *, recompute: bool = False) -> int:
    """Floating-point operations of the matrix products of a step, a multiplication and an addition each.

    Attention's two products are among them, and those of the backward pass: two for each of the forward pass,
    but one for the patch embedding, whose input needs no gradient. With `recompute`, blocks run forward once
    more, but for their last product, which nothing needs. Left out are norms, activations, softmax, loss,
    optimiser and moving average, which are no such products, and the scores that a fused attention kernel
    computes a second time.
    """
    model, rows = recipe.model, shape.clips * recipe.mask_sets
    encoder, predictor, grid = stack_of(model.encoder), stack_of(model.predictor), model.encoder.grid
    sequences, length = rows * shape.groups, shape.context + shape.queries
    passes = 3  # forward, and a gradient for each of the two that a product is of
    flop = passes * product(rows * shape.context, encoder.width, predictor.width)
    flop += passes * product(sequences * shape.queries, predictor.width, model.target_width)
    flop += (passes - 1) * product(rows * shape.context, grid.patch_values, encoder.width)
    for stack, count, tokens, last in (
        (encoder, rows, shape.context, shape.context),
        (predictor, sequences, length, shape.queries),
    ):
        flop += (passes + recompute) * blocks_flop(stack, count, tokens, last)
        if recompute:
            flop -= unneeded(stack, count * (tokens * (stack.depth - 1) + last))
    if model.clip_weight:
        flop += passes * product(rows, encoder.width, model.target_width)
    flop += product(shape.clips * grid.tokens, grid.patch_values, model.target_width)  # teacher or cosines
    if model.targets == "teacher":
        flop += blocks_flop(encoder, shape.clips, grid.tokens, grid.tokens)
    return flop


def product(rows: int, inner: int, columns: int) -> int:
    """Operations of one matrix product."""
    return 2 * rows * inner * columns


def blocks_flop(stack: Stack, sequences: int, length: int, last: int) -> int:
    """Operations of all blocks, forward, on so many sequences of `length` tokens; of the last block `last` come out.

    A block has four square matrices in attention and eight in its MLP, and the two products of each token with
    every token of its sequence. Two of the matrices, keys and values, see all tokens of the last block.
    """

    def block(asking: int) -> int:
        seen = 2 * product(sequences * length, stack.width, stack.width)
        matrices = 10 * product(sequences * asking, stack.width, stack.width)
        return seen + matrices + 2 * product(sequences * asking, stack.width, length)

    return (stack.depth - 1) * block(length) + block(last)


def unneeded(stack: Stack, tokens: int) -> int:
    """The last product of the blocks: autograd does not ask for it again unless something multiplies it."""
    multiplied = stack.layer_scale or stack.drop_path
    return 0 if multiplied else product(tokens, 4 * stack.width, stack.width)


def pretrain_step_cost(recipe: Pretrain, shape: StepShape, *, recompute: bool) -> Spent:
    """What one step of pre-training takes."""
    rows, tokens = shape.clips * recipe.mask_sets, recipe.model.encoder.grid.tokens
    return Spent(
        step=1,
        clips=shape.clips,
        context_tokens=rows * shape.context,
        predicted_tokens=rows * shape.groups * shape.queries,
        teacher_tokens=shape.clips * tokens if recipe.model.targets == "teacher" else 0,
        flop=step_flop(recipe, shape, recompute=recompute),
    )


PASSES = 3  # forward, and a gradient for each of the two that a product is of


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a transformer makes of a clip in training: its blocks, patches, tokens with others, inputs of its head."""

    stack: Stack
    patches: int
    patch_values: int
    tokens: int
    pooled: int


def seen_of(recipe: Finetune) -> Seen | None:
    """None for what is no transformer."""
    spec = recipe.model
    if isinstance(spec, VitSpec):
        grid = spec.encoder.grid
        values = grid.patch_values
        return Seen(
            stack=stack_of(spec.encoder),
            patches=grid.tokens,
            patch_values=values,
            tokens=grid.tokens,
            pooled=spec.pooled,
        )
    if not isinstance(spec, PasstSpec):
        return None
    stack = Stack(
        width=spec.width,
        depth=spec.depth,
        heads=spec.heads,
        positions="sincos",
        layer_scale=0.0,
        drop_path=0.0,
    )
    shown = (spec.rows - spec.drop_rows) * (spec.cols - spec.drop_cols)
    return Seen(
        stack=stack, patches=shown, patch_values=spec.patch**2, tokens=shown + TOKENS, pooled=spec.width
    )


def classifier_step_cost(recipe: Finetune, classes: int, *, recompute: bool = False) -> Spent:
    """What one step takes; operations as `compute.step_flop` counts them, of what is no transformer as torch does."""
    clips, seen = recipe.clips_per_step, seen_of(recipe)
    if seen is None:
        return Spent(step=1, clips=clips, flop=clips * of_one_clip(recipe, classes).flop)
    stack, width = seen.stack, seen.stack.width
    flop = (PASSES - 1) * product(clips * seen.patches, seen.patch_values, width)
    flop += (PASSES + recompute) * blocks_flop(stack, clips, seen.tokens, seen.tokens)
    flop += PASSES * product(clips, seen.pooled, classes)
    if recompute and not masks_tokens(recipe):
        flop -= unneeded(stack, clips * seen.tokens * stack.depth)
    return Spent(step=1, clips=clips, context_tokens=clips * seen.tokens, flop=flop)


def masks_tokens(recipe: Finetune) -> bool:
    """Whether masking multiplies what blocks compute."""
    spec = recipe.model
    return isinstance(spec, VitSpec) and spec.masking.share > 0 and spec.masking.reading == "tokens"


@dataclass(frozen=True, kw_only=True, slots=True)
class OneClip:
    """What a clip takes of a model that has no formula: what autograd keeps of it, and the largest piece of that."""

    weights: int
    kept_bytes: int
    largest_bytes: int
    flop: int


@cache
def of_one_clip(recipe: Finetune, classes: int) -> OneClip:
    """Seen by running one forward and backward on the CPU in fp32."""
    spec, kept = recipe.model, dict[int, int]()
    model = built(spec, classes, 0)
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    mel_BTF, n_frames_B = torch.zeros(1, spec.frames, spec.bands), torch.tensor([spec.frames])
    model.train()
    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(keep, lambda value: value):
            logits_BC = model(mel_BTF, n_frames_B, np.random.default_rng(0))
        logits_BC.sum().backward()
    weights = sum(weight.numel() for weight in model.parameters())
    return OneClip(
        weights=weights,
        kept_bytes=sum(kept.values()),
        largest_bytes=max(kept.values()),
        flop=counter.get_total_flops(),
    )
