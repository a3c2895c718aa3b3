"""What a step of a classifier takes: operations, and memory before its first step."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ajepa.blocks import Stack
from ajepa.classifier import VitSpec
from ajepa.compute import Spent, blocks_flop, product, unneeded
from ajepa.distributed import World
from ajepa.finetuning import Finetune
from ajepa.memory import BF16, FP32, Memory, Ways, block_bytes, block_parameters, refuse_more_than_free
from ajepa.models import MODELS, built, model_name
from ajepa.passt import TOKENS, PasstSpec
from ajepa.vit import stack_of

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


def step_cost(recipe: Finetune, classes: int, *, recompute: bool = False) -> Spent:
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


def estimate(
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


def refuse_too_large(
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
    needed = estimate(
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
