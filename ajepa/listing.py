"""Every recipe as the command line lists it: steps, memory, cost, and what to expect."""

import textwrap

from ajepa.memory import GB, estimate
from ajepa.recipes import RECIPES, Pretrain


def listing() -> str:
    """Each recipe's name, steps and clips per step, what a step needs in memory, and its docstring."""
    blocks = []
    for name, made in ((name, make()) for name, make in RECIPES.items()):
        lines = (line.strip() for line in (RECIPES[name].__doc__ or "").strip().splitlines())
        head = f"{name}: {made.steps:,} steps of {made.clips_per_step} clips, mel spec {made.mel}"
        text = textwrap.fill(
            " ".join(line for line in lines if line), width=78, initial_indent="  ", subsequent_indent="  "
        )
        blocks.append(f"{head}\n{text}\n  {memory_line(made)}")
    return "\n\n".join(blocks)


def memory_line(recipe: Pretrain) -> str:
    """What a step of it needs, in each precision, and the least."""
    fp32, bf16, least = (
        estimate(recipe, bf16=half, recompute=recompute).total / GB
        for half, recompute in ((False, False), (True, False), (True, True))
    )
    return f"Memory: {fp32:.3g} GB in fp32, {bf16:.3g} in bf16, {least:.3g} in bf16 with --recompute."
