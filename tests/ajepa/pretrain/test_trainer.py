"""A step is that of its global batch, in however many passes; what it refuses, it keeps to be looked at."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny, tiny_views

from ajepa.model.views import ViewDraws
from ajepa.pretrain.pretrain import pretrain
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.recipes.optimiser import Schedule
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.devices import Precision, pick_precision
from ajepa.training.distributed import SINGLE_PROCESS, World
from ajepa.training.run import Run
from ajepa.training.trainer import BadStep
from pipeline.errors import RunError
from pipeline.loading.loader import Batch, PlainLoader, View
from pipeline.loading.sampling import RowOrder
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import train_splits

CPU = torch.device("cpu")

FP32 = pick_precision("fp32", CPU)


def batch_of(store, step: int = 0, recipe: Pretrain | None = None) -> Batch:
    """The step's batch as the recipe, by default `tiny`, wants it."""
    recipe = recipe or tiny()
    order = RowOrder(rows_N=store.good_rows(train_splits(store)), clips=8, seed=0)
    mean, std = store.mean_and_std(train_splits(store))
    view = View(frames=recipe.source_frames, mean=mean, std=std, crops=recipe.crops)
    return PlainLoader(store, order, view).make_batch(step)


def shortened(batch: Batch) -> Batch:
    """Crops of all lengths, from one column of patches to four."""
    n_frames_B = torch.tensor([64, 5, 40, 64, 17, 33, 64, 50]).repeat(len(batch.mel_BTF) // 8)
    frames = batch.mel_BTF.shape[1]
    mel_BTF = batch.mel_BTF * (torch.arange(frames) < n_frames_B[:, None])[..., None]
    return replace(batch, mel_BTF=mel_BTF, n_frames_B=n_frames_B)


def varied(recipe: Pretrain):
    """Whatever draws: drop path, and two mask sets."""
    model = recipe.model
    encoder, predictor = (replace(spec, drop_path=0.3, depth=2) for spec in (model.encoder, model.predictor))
    return replace(recipe, mask_sets=2, model=replace(model, encoder=encoder, predictor=predictor))


RECIPES = {"papers": varied(tiny()), "views": varied(tiny_views())}

for_every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@for_every_recipe
@pytest.mark.parametrize("micro_clips", [1, 3, 4])
@pytest.mark.parametrize("change", [lambda batch: batch, shortened], ids=["full", "padded"])
def test_a_step_in_several_passes_is_that_in_one(store, recipe, micro_clips, change):
    """The mean over all scored targets is not the mean of the passes' means where clips are short.

    Nor is the normality of all views the mean of that of the passes' views.
    """
    whole = PretrainTrainer(recipe, CPU, precision=FP32)
    parts = PretrainTrainer(recipe, CPU, precision=FP32, micro_clips=micro_clips)
    for step in (20, 21, 22):
        batch = change(batch_of(store, step, recipe=recipe))
        one, several = whole.train_step(step, batch), parts.train_step(step, batch)
        assert set(one) == set(several)
        # Deviations are means of those of the passes.
        for name in one.keys() - {"target_std", "prediction_std", "explained"}:
            assert several[name] == pytest.approx(one[name], rel=3e-4, abs=1e-6), name

    # AdamW makes a step of full size of a gradient that is nothing but rounding, so its first moments are compared too.
    tolerance = 1e-4 if recipe.views else 2e-5
    for weight, other in zip(whole.trained_weights(), parts.trained_weights(), strict=True):
        torch.testing.assert_close(other, weight, rtol=1e-3, atol=tolerance)
        if weight.requires_grad:
            moment, other_moment = (
                trainer.optimiser.state[each]["exp_avg"]
                for trainer, each in ((whole, weight), (parts, other))
            )
            torch.testing.assert_close(other_moment, moment, rtol=1e-3, atol=1e-5 * one["gradient_norm"])


def test_the_mean_of_the_passes_means_would_be_another_loss(store):
    """What the test above would not see, were clips equally long."""
    trainer, batch = PretrainTrainer(tiny(), CPU, precision=FP32), shortened(batch_of(store))
    draws = trainer.draw_for_rank(20)
    losses, counts = [], []
    for clip in range(8):
        clip_draws = draws.select_clips(slice(clip, clip + 1))
        masks, n_frames_B = (clip_draws.context_NK, clip_draws.targets_MGQ), batch.n_frames_B[clip : clip + 1]
        output = trainer.model(batch.mel_BTF[clip : clip + 1], *masks, n_frames_B)
        losses.append(output.loss.item())
        counts.append(trainer.model.find_scored(*masks, n_frames_B)[0])
        assert counts[-1] == output.scored
    assert min(counts) < 0.5 * max(counts)
    right = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert trainer.train_step(20, batch)["loss"] == pytest.approx(right, rel=1e-5)
    assert abs(sum(losses) / 8 - right) > 1e-4 * right


@for_every_recipe
def test_ranks_draw_different_masks_that_together_are_those_of_one_process(recipe):
    """One mask generator shared by all ranks was a published mistake; so would be one that knows its rank."""
    whole = PretrainTrainer(recipe, CPU, precision=FP32).draw_for_rank(7)
    parts = []
    for rank in range(4):
        trainer = PretrainTrainer(recipe, CPU, precision=FP32)
        trainer.world, trainer.clips_of_rank = World(rank=rank, size=4), 2
        parts.append(trainer.draw_for_rank(7))
    assert torch.equal(torch.cat([part.context_NK for part in parts]), whole.context_NK)
    assert torch.equal(torch.cat([part.targets_MGQ for part in parts]), whole.targets_MGQ)
    for each in range(2):
        assert torch.equal(
            torch.cat([part.drop_path_factors[each] for part in parts], dim=2), whole.drop_path_factors[each]
        )
    if whole.views is not None:
        for name in ViewDraws.__slots__:
            drawn = np.concatenate([getattr(part.views, name) for part in parts])
            np.testing.assert_array_equal(drawn, getattr(whole.views, name))
    targets = [part.targets_MGQ for part in parts]
    assert not any(torch.equal(targets[0], other) for other in targets[1:])


@pytest.mark.parametrize(
    ("clips", "size", "message_part"), [(60, 8, "--batch 56 or 64"), (3, 8, "--batch 8")]
)
def test_a_batch_that_cannot_be_dealt_evenly_is_refused(clips, size, message_part):
    """A rank with fewer clips would weigh them more, or wait for ever."""
    with pytest.raises(
        RunError, match=f"{clips} clips a step cannot be dealt to {size} ranks evenly.*{message_part}"
    ):
        World(size=size).clips_per_rank(clips)
    assert SINGLE_PROCESS.clips_per_rank(clips) == clips


def test_a_gradient_longer_than_allowed_is_shortened_and_logged_as_it_was(store):
    """Half as long in the same direction: AdamW's first moment is a tenth of (1 - beta1) what it gets."""
    free, limited = (
        PretrainTrainer(tiny(max_gradient_norm=norm), CPU, precision=FP32) for norm in (0.0, 1e-3)
    )
    batch = batch_of(store)
    metrics, limited_metrics = free.train_step(20, batch), limited.train_step(20, batch)
    assert metrics["gradient_norm"] == limited_metrics["gradient_norm"] > 1e-3
    ratio = 1e-3 / metrics["gradient_norm"]
    for weight, limited_weight in zip(free.model.parameters(), limited.model.parameters(), strict=True):
        if weight.requires_grad:
            moment, limited_moment = (
                trainer.optimiser.state[each]["exp_avg"]
                for trainer, each in ((free, weight), (limited, limited_weight))
            )
            torch.testing.assert_close(limited_moment, ratio * moment, rtol=1e-3, atol=1e-9)


def test_a_base_rate_grows_with_the_clips_of_a_step(store):
    """Papers print the rate for 256 clips; who trains with 8 takes a 32nd of it."""
    schedule = Schedule(peak_lr=1e-3, warmup_share=0.0, base_clips=256)
    assert schedule.learning_rate(0, 100, clips=256) == pytest.approx(1e-3)
    assert schedule.learning_rate(0, 100, clips=512) == pytest.approx(2e-3)
    assert replace(schedule, base_clips=0).learning_rate(0, 100, clips=512) == pytest.approx(1e-3)
    metrics = PretrainTrainer(tiny(schedule=schedule), CPU).train_step(0, batch_of(store))
    assert metrics["lr"] == pytest.approx(1e-3 / 32)
    with pytest.raises(ValueError, match="give `clips`"):
        schedule.learning_rate(0, 100)
    with pytest.raises(ValueError, match="base_clips must not be negative"):
        replace(schedule, base_clips=-1)


def test_fp16_needs_a_gpu_and_names_of_precisions_are_known():
    """On CPUs it is emulated, without the range that bf16 has."""
    with pytest.raises(RunError, match="--precision fp16: computes on CUDA devices only"):
        pick_precision("fp16", CPU)
    with pytest.raises(RunError, match="expected auto, fp32, bf16, fp16"):
        pick_precision("half", CPU)
    assert pick_precision("fp16", torch.device("cuda")).has_scaled_loss
    assert (pick_precision("fp32", CPU).is_half, pick_precision("bf16", CPU).is_half) == (False, True)


def scaled_trainer() -> PretrainTrainer:
    """What `--precision fp16` makes, on the CPU."""
    return PretrainTrainer(tiny(), CPU, precision=Precision(dtype=torch.float16, description="fp16"))


def test_a_scaled_loss_that_overflows_costs_its_step_and_lowers_the_scale(store):
    """Fp16 ends at 65,504: the scale is found by trying, and no update is made of what does not fit."""
    trainer, batch = scaled_trainer(), batch_of(store)
    first = trainer.scaler.get_scale()
    trainer.train_step(20, batch)
    assert trainer.optimiser.state  # updated
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**60})
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    metrics = trainer.train_step(21, batch)
    assert metrics["overflowed"] == 1
    assert "gradient_norm" not in metrics  # it is no number
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.scaler.get_scale() == 2.0**59
    carried_on = scaled_trainer()
    assert carried_on.scaler.get_scale() == first
    carried_on.restore_checkpoint(trainer.make_checkpoint(22))
    assert carried_on.scaler.state_dict() == trainer.scaler.state_dict()


def test_a_gradient_that_overflows_unscaled_is_a_bad_step(store):
    """The scale would fall for ever, and no step would count."""
    trainer, batch = scaled_trainer(), batch_of(store)
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 1.0})
    with torch.no_grad():
        trainer.model.encoder.embed.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(BadStep, match="gradient_norm is"):
        trainer.train_step(20, batch)


def test_a_store_with_nan_ends_the_run_with_its_rows_and_leaves_what_explains_it(
    store_path, tmp_path, monkeypatch
):
    """Rows, masks and spectrograms of the step, without pickle; the weights are those before it."""
    read, bad = FeatureStore.read, int(FeatureStore.open(store_path).good_rows()[3])

    def with_nan(store, rows_B, **options):
        stored_BTF = read(store, rows_B, **options)
        stored_BTF[rows_B == bad] = math.nan
        return stored_BTF

    monkeypatch.setattr(FeatureStore, "read", with_nan)
    with pytest.raises(RunError) as refused:
        pretrain(store_path, tiny(), tmp_path / "run", device="cpu", loader="plain", say=lambda line: None)
    message, (folder,) = str(refused.value), list((tmp_path / "run").glob("bad-step-*"))
    assert "\n" not in message
    assert f"stopped before the update; rows [{bad}] of the store hold nan or inf: build it again" in message
    assert message.endswith(f"its clips and draws are kept in {folder}")
    step = int(folder.name.removeprefix("bad-step-"))
    assert message.startswith(f"step {step}: loss is nan")
    record, tensors = (
        json.loads((folder / "rank-0.json").read_text()),
        load_file(folder / "rank-0.safetensors"),
    )
    assert (record["step"], record["loss"], record["rows_with_nan_or_inf"]) == (step, "nan", [bad])
    assert tensors["rows_B"].tolist() == record["rows"]
    assert tensors["mel_BTF"][tensors["rows_B"] == bad].isnan().all()
    draws = PretrainTrainer(tiny(), CPU).draw_for_rank(step - 1)
    assert torch.equal(tensors["context_NK"], draws.context_NK)
    assert torch.equal(tensors["targets_MGQ"], draws.targets_MGQ)
    assert Run.open(tmp_path / "run").newest_step < step
