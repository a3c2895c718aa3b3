"""The list of all recipes for the command line: steps, memory, cost, and expected result."""

import textwrap
from collections.abc import Callable

from ajepa.model.classifier import classifier_kind_name
from ajepa.recipes.catalogue import FINETUNE_RECIPES
from ajepa.recipes.pretrain import PRETRAIN_RECIPES, Pretrain
from ajepa.training.memory import BYTES_PER_GB, pretrain_memory


def list_recipes() -> str:
    """Return each recipe's name, steps, clips per step and docstring, and the memory of a pre-training step."""
    blocks = ["To pre-train:"]
    for name, make_pretrain in PRETRAIN_RECIPES.items():
        pretrain = make_pretrain()
        length = f"{pretrain.epochs} epochs in steps" if pretrain.epochs else f"{pretrain.steps:,} steps"
        head = f"{name}: {length} of {pretrain.clips_per_step} clips, mel spec {pretrain.mel}"
        blocks.append(f"{head}\n{wrapped_docstring(make_pretrain)}\n  {step_memory_line(pretrain)}")

    # A recipe without a number of steps has a number of epochs; its steps then depend on the store.
    blocks.append("To fine-tune (ajepa-train finetune):")
    for name, make_finetune in FINETUNE_RECIPES.items():
        finetune = make_finetune()
        length = f"{finetune.steps:,} steps" if finetune.steps else f"{finetune.epochs} epochs in steps"
        head = (
            f"{name}: {classifier_kind_name(finetune.model)}, {length} of {finetune.clips_per_step} clips, "
            f"mel spec {finetune.mel}"
        )
        blocks.append(f"{head}\n{wrapped_docstring(make_finetune)}")
    return "\n\n".join(blocks)


def wrapped_docstring(recipe: Callable[[], object]) -> str:
    """Return the docstring of a recipe, wrapped to the width of a terminal."""
    lines = (line.strip() for line in (recipe.__doc__ or "").strip().splitlines())
    text = " ".join(line for line in lines if line)
    return textwrap.fill(text, width=78, initial_indent="  ", subsequent_indent="  ")


def step_memory_line(recipe: Pretrain) -> str:
    """Return the memory of a step in each precision, and the least memory, which is bf16 with `--recompute`."""
    fp32_gb = pretrain_memory(recipe, bf16=False).total_bytes / BYTES_PER_GB
    bf16_gb = pretrain_memory(recipe, bf16=True).total_bytes / BYTES_PER_GB
    least_gb = pretrain_memory(recipe, bf16=True, recompute=True).total_bytes / BYTES_PER_GB
    return (
        f"Memory: {fp32_gb:.3g} GB in fp32, {bf16_gb:.3g} in bf16, {least_gb:.3g} in bf16 with --recompute."
    )
