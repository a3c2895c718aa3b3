"""The plan of a pre-training run in words: its length, its schedule, and what another batch changes."""

from collections.abc import Iterator

from ajepa.model.masking import Curriculum
from ajepa.recipes.pretrain import PRETRAIN_RECIPES, Pretrain
from pipeline.loading.sampling import RowOrder


def describe_plan(recipe: Pretrain, order: RowOrder, *, usual_clips: int) -> Iterator[str]:
    """Yield the plan as lines for the user; `recipe` has its number of steps.

    usual_clips  clips per step before they were replaced, of a recipe that has no name in PRETRAIN_RECIPES
    """
    # The length, in steps, clips and epochs.
    clips = recipe.steps * recipe.clips_per_step
    epochs = recipe.steps / order.steps_per_epoch
    yield (
        f"plan: {recipe.steps:,} steps of {recipe.clips_per_step} clips, {clips:,} clips in all, "
        f"{epochs:,.4g} epochs of {order.clips_per_epoch:,} clips{_describe_curriculum(recipe)}"
    )

    # The schedule.
    schedule = recipe.schedule
    start_momentum, end_momentum = (
        schedule.teacher_momentum(step, recipe.steps, clips=recipe.clips_per_step)
        for step in (0, recipe.steps)
    )
    yield (
        f"plan: {schedule.warmup_steps(recipe.steps):,} steps of warm-up from rate {schedule.start_lr:.3g} to "
        f"{peak_rate(recipe):.3g}, then half a cosine to {schedule.end_lr:.3g}; the teacher's momentum "
        f"rises from {start_momentum:.5g} to {end_momentum:.5g}, {schedule.ema_curve}"
    )

    # Another batch than the recipe's.
    if recipe.name in PRETRAIN_RECIPES:
        usual_clips = PRETRAIN_RECIPES[recipe.name]().clips_per_step
    if usual_clips != recipe.clips_per_step:
        yield describe_batch(recipe, usual_clips)


def describe_batch(recipe: Pretrain, usual_clips: int) -> str:
    """What other clips per step than the recipe's change in rate and momentum, and how to have them scaled."""
    schedule = recipe.schedule
    clips = recipe.clips_per_step
    effects = []
    advice = []

    # The peak rate.
    if schedule.base_clips:
        effects.append(f"the peak rate is {schedule.peak_lr:.3g} x {clips}/{schedule.base_clips}")
    else:
        effects.append(f"the peak rate stays {schedule.peak_lr:.3g}")
        advice.append(f"--set schedule.base_clips={usual_clips} (rate x {clips}/{usual_clips})")

    # The momentum.
    if schedule.ema_base_clips:
        effects.append(f"the momentum is {schedule.ema_start:.5g}^({clips}/{schedule.ema_base_clips})")
    else:
        effects.append(
            f"the momentum stays {schedule.ema_start:.5g} a step, so the teacher averages over "
            f"{clips / usual_clips:.3g} times the clips"
        )
        advice.append(f"--set schedule.ema_base_clips={usual_clips} (momentum^({clips}/{usual_clips}))")
    scaling = f"; to scale: {' '.join(advice)}" if advice else ""
    return f"batch {clips} instead of {usual_clips}: {' and '.join(effects)}{scaling}"


def peak_rate(recipe: Pretrain) -> float:
    """The learning rate after the warm-up, at the recipe's clips per step."""
    schedule = recipe.schedule
    warmup_steps = schedule.warmup_steps(recipe.steps)
    return schedule.learning_rate(warmup_steps, recipe.steps, clips=recipe.clips_per_step)


def _describe_curriculum(recipe: Pretrain) -> str:
    """That the masks change over the whole run, where they do."""
    return "; the masks change over all of them" if isinstance(recipe.masks, Curriculum) else ""
