"""Phases of a run: what may change after a bad step, what may not, and what the record keeps of it."""

import copy
import json
from pathlib import Path

import pytest
import torch
from identities import run_identity
from tiny import tiny, tiny_finetune

from ajepa.recipes.catalogue import recipe_to_json
from ajepa.training.checkpoints import Checkpoint
from ajepa.training.run import Run
from pipeline.errors import RunError

RECIPE = recipe_to_json(tiny())


def changed(recipe: dict = RECIPE, **fields) -> dict:
    """The recipe with these fields, `schedule__peak_lr` standing for a dotted path."""
    recipe = copy.deepcopy(recipe)
    for path, value in fields.items():
        *parents, name = path.split("__")
        piece = recipe
        for parent in parents:
            piece = piece[parent]
        piece[name] = value
    return recipe


def started(path: Path, recipe: dict = RECIPE, precision: str = "bf16") -> Run:
    """The run at `path`, made or carried on as a training stage does it."""
    run = Run.create_or_open(path, recipe=recipe, identity=run_identity(), precision=precision)
    return run.begin_phase(recipe, precision)


def save(run: Run, step: int) -> None:
    run.save_checkpoint(Checkpoint(step=step, parts={"encoder": {"w": torch.zeros(1)}}), keep=2)


def bad_step(run: Run, step: int) -> None:
    (run.path / f"bad-step-{step:08d}").mkdir()


LOWER = changed(schedule__peak_lr=1e-4, max_gradient_norm=1.0)


def test_a_run_without_a_bad_step_keeps_its_rate(tmp_path):
    """Its schedule would jump for no reason; the line says what else there is."""
    save(started(tmp_path), 5)
    with pytest.raises(RunError, match=r"schedule.peak_lr: was 0.001, now 0.0001.*--from") as refused:
        started(tmp_path, LOWER)
    assert "\n" not in str(refused.value)


def test_after_a_bad_step_rate_and_gradient_norm_may_change_and_both_phases_are_kept(tmp_path):
    """The whole history can be read: which steps were trained how."""
    save(started(tmp_path), 5)
    bad_step(Run.open(tmp_path), 8)
    run = started(tmp_path, LOWER)
    assert run == Run.open(tmp_path)
    assert [phase.first_step for phase in run.phases] == [0, 5]
    assert [phase.recipe for phase in run.phases] == [RECIPE, LOWER]
    assert run.describe_phase() == (
        "from step 5 on with recipe.schedule.peak_lr: was 0.001, now 0.0001; "
        "recipe.max_gradient_norm: was 0.0, now 1.0"
    )
    record = json.loads((tmp_path / "recipe.json").read_text())
    assert record["recipe"] == LOWER
    assert record["first_step"] == 5
    assert record["earlier_phases"][0]["recipe"] == RECIPE

    # Past the bad step the run is as any other: the same command carries on, and another is refused.
    save(run, 10)
    assert started(tmp_path, LOWER) == run
    with pytest.raises(RunError, match="is another run"):
        started(tmp_path, RECIPE)


@pytest.mark.parametrize(
    "recipe",
    [
        changed(LOWER, model__encoder__width=64),
        changed(LOWER, seed=1),
        changed(LOWER, clips_per_step=4),
        changed(LOWER, schedule__ema_start=0.5),
    ],
    ids=["width", "seed", "batch", "momentum"],
)
def test_nothing_else_may_change_after_a_bad_step(tmp_path, recipe):
    """Other weights, clips or masks are another run."""
    save(started(tmp_path), 5)
    bad_step(Run.open(tmp_path), 8)
    with pytest.raises(RunError, match="is another run"):
        started(tmp_path, recipe)


def test_a_phase_that_took_no_step_to_a_checkpoint_leaves_no_trace(tmp_path):
    """The second attempt begins where the first did, and the first trained nothing that is left."""
    save(started(tmp_path), 5)
    bad_step(Run.open(tmp_path), 8)
    started(tmp_path, LOWER)
    lowest = changed(schedule__peak_lr=1e-5)
    assert [phase.recipe for phase in started(tmp_path, lowest).phases] == [RECIPE, lowest]

    # Back to the first recipe: one phase.
    back = started(tmp_path, RECIPE)
    assert [(phase.first_step, phase.recipe) for phase in back.phases] == [(0, RECIPE)]


def test_a_bad_step_before_the_first_checkpoint_begins_the_only_phase(tmp_path):
    """No weight is left of the phase before."""
    bad_step(started(tmp_path), 3)
    run = started(tmp_path, LOWER)
    assert [(phase.first_step, phase.recipe) for phase in run.phases] == [(0, LOWER)]


def test_another_precision_is_a_phase_of_its_own(tmp_path):
    """Runs are carried on where the hardware lets them; which steps were computed how must not be lost."""
    save(started(tmp_path), 5)
    run = started(tmp_path, precision="fp32")
    assert [(phase.first_step, phase.precision) for phase in run.phases] == [(0, "bf16"), (5, "fp32")]
    assert run.describe_phase() == "from step 5 on with precision: was bf16, now fp32"


def test_the_rate_of_a_fine_tuned_run_may_change_too(tmp_path):
    """It has other names for it."""
    recipe = recipe_to_json(tiny_finetune())
    bad_step(started(tmp_path, recipe), 3)
    assert started(tmp_path, changed(recipe, base_lr=1e-3)).recipe["base_lr"] == 1e-3


def test_a_run_of_format_1_is_carried_on_as_it_is_and_rewritten_only_by_a_change(tmp_path):
    """The version before wrote neither phases nor precision; its folder stays readable to it."""
    save(started(tmp_path), 5)
    old_recipe = changed()
    for field in ("epochs", "augment"):
        del old_recipe[field]
    for field in ("ema_curve", "ema_base_clips"):
        del old_recipe["schedule"][field]
    record = json.loads((tmp_path / "recipe.json").read_text())
    old = {"format": 1, "recipe": old_recipe, "identity": record["identity"], "versions": record["versions"]}
    (tmp_path / "recipe.json").write_text(json.dumps(old))
    run = started(tmp_path)
    assert (run.run_format, run.precision, run.recipe) == (1, None, RECIPE)
    assert json.loads((tmp_path / "recipe.json").read_text()) == old

    # Carried on with a change, it has the format of today.
    bad_step(run, 8)
    run = started(tmp_path, LOWER)
    assert [(phase.first_step, phase.precision) for phase in run.phases] == [(0, None), (5, "bf16")]
    assert json.loads((tmp_path / "recipe.json").read_text())["format"] == 2
