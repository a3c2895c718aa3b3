"""The plan of a run: what it will cost and do, before it starts."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny

from ajepa.pretrain.monitor import HealthBatch
from ajepa.pretrain.plan import describe_plan
from ajepa.pretrain.pretrain import pretrain, recipe_as_begun
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.recipes.catalogue import override_recipe, recipe_to_json
from ajepa.recipes.pretrain import a_jepa_recipe, audio_jepa_recipe
from ajepa.training.run import Run
from pipeline.loading.augment import NATS_PER_DB, Augment
from pipeline.loading.sampling import RowOrder


def plan_of(recipe, clips: int) -> list[str]:
    order = RowOrder(rows_N=range(clips), clips=recipe.clips_per_step, seed=0)
    return list(describe_plan(recipe.with_step_count(order.steps_per_epoch), order, usual_clips=8))


def test_the_plan_of_a_jepa_on_20_k_clips_is_its_24_epochs():
    """It would have been 2,501 epochs without a word."""
    length, schedule = plan_of(a_jepa_recipe(), 20_000)
    assert length == (
        "plan: 936 steps of 512 clips, 479,232 clips in all, 24 epochs of 20,000 clips; "
        "the masks change over all of them"
    )
    assert schedule == (
        "plan: 9 steps of warm-up from rate 1e-06 to 0.0002, then half a cosine to 0; "
        "the teacher's momentum rises from 0.996 to 1, linear"
    )


def test_the_plan_of_audio_jepa_says_how_often_it_sees_20_k_clips():
    """Its paper counts steps; 1,282 epochs are the user's to accept."""
    assert (
        "100,000 steps of 256 clips, 25,600,000 clips in all, 1,282 epochs"
        in plan_of(audio_jepa_recipe(), 20_000)[0]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            [],
            "batch 64 instead of 512: the peak rate stays 0.0002 and the momentum stays 0.996 a step, so the teacher "
            "averages over 0.125 times the clips; to scale: --set schedule.base_clips=512 (rate x 64/512) "
            "--set schedule.ema_base_clips=512 (momentum^(64/512))",
        ),
        (
            ["schedule.base_clips=512", "schedule.ema_base_clips=512"],
            "batch 64 instead of 512: the peak rate is 0.0002 x 64/512 and the momentum is 0.996^(64/512)",
        ),
    ],
    ids=["kept", "scaled"],
)
def test_another_batch_says_what_it_does_to_rate_and_momentum(settings, message):
    """Both are values of a step, and the steps are others now."""
    recipe = override_recipe(a_jepa_recipe(), settings).with_counts(clips_per_step=64)
    *_, schedule, batch = plan_of(recipe, 20_000)
    assert batch == message
    assert ("to 2.5e-05, then" in schedule) == bool(settings)
    assert ("from 0.9995 to 1" in schedule) == bool(settings)


def test_a_run_counts_its_epochs_and_tells_the_plan_before_its_first_step(store_path, tmp_path):
    """The steps of the epochs on this store are those of the run, and of its record."""
    lines: list[str] = []
    options = {"device": "cpu", "loader": "plain", "say": lines.append}
    run = pretrain(store_path, tiny(), tmp_path / "run", epochs=2, batch=4, **options)
    steps = 2 * (int(lines[0].partition("epochs of ")[2].split()[0]) // 4)
    assert run.newest_step == run.recipe["steps"] == run.recipe["masks"]["steps"] == steps
    assert lines[0].startswith(
        f"{run.path}: plan: {steps} steps of 4 clips, {4 * steps} clips in all, 2 epochs"
    )
    assert lines[2].startswith(f"{run.path}: batch 4 instead of 8: the peak rate stays 0.001")
    assert lines[3].startswith(f"{run.path}: step 0 of {steps}")

    # The same command finds the same run.
    pretrain(store_path, tiny(), tmp_path / "run", epochs=2, batch=4, **options)
    assert lines[-1] == f"{run.path}: already at its last step, {steps}"


def test_a_run_of_the_version_before_keeps_the_recipe_that_it_was_begun_with(tmp_path, monkeypatch):
    """`--recipe a-jepa` has another loss and counts epochs today; a run under way goes on as it began."""
    begun = override_recipe(a_jepa_recipe(), ["model.loss=l2", "augment.roll=false", "steps=97702"])
    (tmp_path / "recipe.json").touch()
    fields = {"recipe": recipe_to_json(begun), "is_finetuned": False}
    lines: list[str] = []
    for run_format, expected in ((1, begun), (2, a_jepa_recipe())):
        stub = SimpleNamespace(run_format=run_format, **fields)
        monkeypatch.setattr(Run, "open", lambda path, stub=stub: stub)
        assert recipe_as_begun(tmp_path, a_jepa_recipe(), lines.append) == expected
        assert recipe_as_begun(tmp_path, audio_jepa_recipe(), lines.append) == audio_jepa_recipe()
    assert len(lines) == 1
    assert (
        "carried on with recipe a-jepa as it was begun with (model.loss: was l2, now squared_l2; epochs: was 0"
        in lines[0]
    )


def test_clips_are_augmented_in_training_and_health_looks_at_them_as_they_are(
    store_path, tmp_path, monkeypatch
):
    """A-JEPA's random start and gain; a look at the model's health must not move with the level of its clips."""
    looked_at = []
    trained_on = []
    start_step = PretrainTrainer.start_step

    def recorded_step(trainer, step, batch):
        trained_on.append(batch.mel_BTF.clone())
        return start_step(trainer, step, batch)

    def recorded_batch(batch, recipe):
        looked_at.append(batch.mel_BTF.clone())
        return HealthBatch(
            mel_BTF=batch.mel_BTF,
            n_frames_B=batch.n_frames_B,
            context_BK=torch.arange(8).expand(len(batch.rows_B), 8),
            targets_BGQ=torch.arange(8, 16).expand(len(batch.rows_B), 1, 8),
        )

    monkeypatch.setattr(PretrainTrainer, "start_step", recorded_step)
    monkeypatch.setattr(HealthBatch, "from_batch", recorded_batch)
    options = {"device": "cpu", "loader": "plain", "precision": "fp32", "steps": 1, "say": lambda line: None}
    for name, augment in (("plain", Augment()), ("louder", Augment(gain_db=6.0))):
        run = pretrain(store_path, tiny(augment=augment), tmp_path / name, **options)
    assert torch.equal(*looked_at)
    (plain_BTF, louder_BTF), std = trained_on, run.identity.std
    gain_B = (louder_BTF - plain_BTF)[:, 0, 0]
    torch.testing.assert_close(louder_BTF - plain_BTF, gain_B[:, None, None].expand_as(plain_BTF))
    assert 0 < gain_B.abs().max() * std <= 6 * NATS_PER_DB
