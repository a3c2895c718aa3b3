"""Every recipe as the command line lists it: steps, memory, cost, and what to expect."""

import textwrap
from collections.abc import Callable

from ajepa.model.classifier import classifier_kind_name
from ajepa.recipes.catalogue import FINETUNE_RECIPES
from ajepa.recipes.pretrain import PRETRAIN_RECIPES, Pretrain
from ajepa.training.memory import BYTES_PER_GB, pretrain_memory


def list_recipes() -> str:
    """Each recipe's name, steps and clips per step, what a step needs in memory, and its docstring."""
    blocks = ["To pre-train:"]
    for name, made in ((name, make()) for name, make in PRETRAIN_RECIPES.items()):
        head = f"{name}: {made.steps:,} steps of {made.clips_per_step} clips, mel spec {made.mel}"
        blocks.append(f"{head}\n{wrapped_docstring(PRETRAIN_RECIPES[name])}\n  {step_memory_line(made)}")
    blocks.append("To fine-tune (ajepa-train finetune):")
    for name, tune in ((name, make()) for name, make in FINETUNE_RECIPES.items()):
        length = f"{tune.steps:,} steps" if tune.steps else f"{tune.epochs} epochs in steps"
        counts = f"{length} of {tune.clips_per_step} clips"
        blocks.append(
            f"{name}: {classifier_kind_name(tune.model)}, {counts}, mel spec {tune.mel}\n{wrapped_docstring(FINETUNE_RECIPES[name])}"
        )
    return "\n\n".join(blocks)


def wrapped_docstring(recipe: Callable[[], object]) -> str:
    """What its docstring says, filled to the width of a terminal."""
    lines = (line.strip() for line in (recipe.__doc__ or "").strip().splitlines())
    text = " ".join(line for line in lines if line)
    return textwrap.fill(text, width=78, initial_indent="  ", subsequent_indent="  ")


def step_memory_line(recipe: Pretrain) -> str:
    """What a step of it needs, in each precision, and the least."""
    fp32, bf16, least = (
        pretrain_memory(recipe, bf16=half, recompute=recompute).total_bytes / BYTES_PER_GB
        for half, recompute in ((False, False), (True, False), (True, True))
    )
    return f"Memory: {fp32:.3g} GB in fp32, {bf16:.3g} in bf16, {least:.3g} in bf16 with --recompute."
