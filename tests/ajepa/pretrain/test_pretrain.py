"""The loop: exact resume, nothing half-made, no update from a bad step."""

import math
import os
import signal
import threading
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from dying import pretrain_until_killed
from forked import start_forked
from identities import run_identity
from tiny import tiny, tiny_views

from ajepa.model.randomness import step_rng
from ajepa.pretrain.pretrain import input_scale, pretrain
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.recipes.catalogue import recipe_to_json
from ajepa.recipes.pretrain import audio_jepa_recipe
from ajepa.training.devices import hardware_precision, pick_device
from ajepa.training.loop import run_training_loop
from ajepa.training.run import Run
from pipeline.errors import BrokenClipError, InputError, RunError, StopSignal
from pipeline.loading.loader import Batch, PlainLoader, View
from pipeline.loading.sampling import RowOrder
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import EVAL_SPLIT, train_splits

TIMINGS = ("clips_per_s", "data_wait")

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


def pretrain_quietly(store_path, run_path, recipe=None, **options) -> Run:
    return pretrain(store_path, recipe or tiny(), run_path, device="cpu", say=lambda line: None, **options)


def logged(run: Run) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in run.read_metrics()]


def assert_same(run: Run, other: Run) -> None:
    """Weights, moments and metrics bit for bit; only timings may differ."""
    assert run.newest_step == other.newest_step
    assert logged(run) == logged(other)
    one, two = run.load_checkpoint().parts, other.load_checkpoint().parts
    assert one.keys() == two.keys() >= {"encoder", "target", "predictor", "optimiser"}
    for part in one:
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part])


@pytest.fixture(scope="module")
def uninterrupted(store_path, tmp_path_factory) -> Run:
    """Thirty steps without a break."""
    return pretrain_quietly(store_path, tmp_path_factory.mktemp("runs") / "whole")


def test_thirty_steps_are_fifteen_then_kill_9_then_fifteen_bit_for_bit(store_path, tmp_path, uninterrupted):
    """What a power cut takes is the time since the last checkpoint, and nothing else; across loaders too."""
    arguments = (store_path, tmp_path / "run", torch.get_num_threads())
    killed = start_forked(
        pretrain_until_killed, *arguments, output=tmp_path / "output", environment=os.environ
    )
    killed.join()
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / "output").read_text()
    left = Run.open(tmp_path / "run")
    assert left.newest_step == 15
    assert left.read_metrics()[-1]["step"] == 17  # logged but never committed: must be taken back
    assert_same(pretrain_quietly(store_path, tmp_path / "run", loader="plain"), uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_the_same_command_carries_on(
    store_path, tmp_path, uninterrupted, monkeypatch, number
):
    """A cluster's time limit costs no step at all."""
    log = Run.log_metrics

    def log_and_ask(run, line):
        log(run, line)
        if line["step"] == 8:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Run, "log_metrics", log_and_ask)
    handler, lines = signal.getsignal(number), []
    with pytest.raises(StopSignal):
        pretrain(store_path, tiny(), tmp_path / "run", device="cpu", say=lines.append)
    assert signal.getsignal(number) is handler
    assert Run.open(tmp_path / "run").newest_step == 8
    assert lines[-1].endswith("checkpoint written at step 8 of 30")
    monkeypatch.undo()
    assert_same(pretrain_quietly(store_path, tmp_path / "run"), uninterrupted)


@pytest.fixture(scope="module")
def uninterrupted_views(store_path, tmp_path_factory) -> Run:
    """Ten steps of views and both objectives without a break."""
    return pretrain_quietly(store_path, tmp_path_factory.mktemp("runs") / "views", tiny_views(), steps=10)


@pytest.mark.parametrize("loader", ["dali", "plain"])
def test_views_are_carried_on_bit_for_bit(store_path, tmp_path, uninterrupted_views, monkeypatch, loader):
    """Crops, their changes and the directions are functions of seed and step; the projector is in the checkpoint."""
    log = Run.log_metrics

    def log_and_ask(run, line):
        log(run, line)
        if line["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log_metrics", log_and_ask)
    with pytest.raises(StopSignal):
        pretrain_quietly(store_path, tmp_path / "run", tiny_views(), steps=10)
    monkeypatch.undo()
    assert "projector" in Run.open(tmp_path / "run").load_checkpoint().parts
    carried_on = pretrain_quietly(store_path, tmp_path / "run", tiny_views(), steps=10, loader=loader)
    assert_same(carried_on, uninterrupted_views)


def test_a_view_knows_the_floor_and_the_scale_of_its_store(store, uninterrupted_views):
    """A gain of 6 dB must be 6 dB, whatever the deviation of a store."""
    scale = input_scale(uninterrupted_views.identity)
    assert (scale.mean, scale.std) == store.mean_and_std(train_splits(store))
    assert scale.floor == pytest.approx(math.log(store.spec.floor))
    stored_TF = store.read(store.good_rows()[:8])
    assert store.to_log_mel(stored_TF).min() >= scale.floor - 0.01


def test_a_finished_run_says_so_and_is_left_alone(store_path, uninterrupted):
    """The same command once more must neither train on nor complain."""
    files = {path: path.stat().st_mtime_ns for path in uninterrupted.path.rglob("*.safetensors")}
    lines = []
    pretrain(store_path, tiny(), uninterrupted.path, device="cpu", say=lines.append)
    assert lines == [f"{uninterrupted.path}: already at its last step, 30"]
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.path.rglob("*.safetensors")} == files


@pytest.mark.parametrize(
    ("options", "message_part"),
    [
        ({"steps": 40}, "recipe.masks.steps: was 30, now 40; recipe.steps: was 30, now 40"),
        ({"batch": 4}, "recipe.clips_per_step: was 8, now 4"),
    ],
)
def test_a_run_is_not_carried_on_with_other_settings(store_path, uninterrupted, options, message_part):
    """Its schedules would jump, and its name would stand for two things."""
    with pytest.raises(RunError, match=message_part):
        pretrain_quietly(store_path, uninterrupted.path, **options)


def test_a_step_leaves_the_teacher_where_the_momentum_says(store):
    """The target is an average of encoders, updated after the optimiser, and never by a gradient."""
    trainer, batch = PretrainTrainer(tiny(), torch.device("cpu")), first_batch(store)
    before = {name: value.clone() for name, value in trainer.model.target.named_parameters()}
    metrics = trainer.train_step(20, batch)
    after = dict(trainer.model.encoder.named_parameters())
    for name, value in trainer.model.target.named_parameters():
        expected = metrics["momentum"] * before[name] + (1 - metrics["momentum"]) * after[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def test_every_weight_is_trained_and_only_matrices_decay(store):
    """A weight that no group holds, or that gets no gradient, would stay as it was drawn."""
    trainer = PretrainTrainer(tiny(), torch.device("cpu"))
    decayed, not_decayed = (group["params"] for group in trainer.optimiser.param_groups)
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert {id(weight) for weight in trained} == {id(weight) for weight in decayed + not_decayed}
    assert {weight.ndim for weight in decayed} == {2}
    assert {weight.ndim for weight in not_decayed} == {1}
    before = [weight.detach().clone() for weight in trained]
    for step in (20, 21):  # at the first step half of them wait for others: norms and biases behind zeros
        trainer.train_step(step, first_batch(store))
    assert not [weight.shape for weight, old in zip(trained, before, strict=True) if torch.equal(weight, old)]


def first_batch(store) -> Batch:
    order = RowOrder(rows_N=store.good_rows(train_splits(store)), clips=8, seed=0)
    stats = store.stats["all"]
    return PlainLoader(store, order, View(frames=64, mean=stats["mean"], std=stats["std"])).make_batch(0)


def test_a_batch_with_nan_stops_the_run_before_the_update_and_names_the_rows(store):
    """Checked after the update, the weights would be lost with it."""
    trainer, batch = PretrainTrainer(tiny(), torch.device("cpu")), first_batch(store)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    batch.mel_BTF[3, 5, 7] = torch.nan
    with pytest.raises(RunError) as refused:
        trainer.train_step(4, batch)
    message = (
        f"step 5: loss is nan, gradient_norm is nan; stopped before the update; rows [{batch.rows_B[3]}] of"
    )
    assert str(refused.value).startswith(message)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_a_diverging_model_is_distinguished_from_broken_data(store):
    """Finite rows, infinite loss: the advice is another one."""
    trainer, batch = PretrainTrainer(tiny(), torch.device("cpu")), first_batch(store)
    with torch.no_grad():
        trainer.model.predictor.out.bias.fill_(torch.inf)
    with pytest.raises(RunError, match="its clips are finite: lower the learning rate"):
        trainer.train_step(0, batch)


def test_a_step_in_which_no_target_lies_on_sound_is_refused(store):
    """Its loss of 0 would be a perfect score for nothing."""
    batch = first_batch(store)
    shortest = replace(batch, n_frames_B=torch.zeros_like(batch.n_frames_B))
    with pytest.raises(RunError, match="step 1: no target lies on sound"):
        PretrainTrainer(tiny(), torch.device("cpu")).train_step(0, shortest)


def test_eval_clips_are_never_trained_on(store):
    """A measure on seen clips measures memory."""
    assert EVAL_SPLIT not in train_splits(store)
    assert not set(store.good_rows(train_splits(store))) & set(store.good_rows([EVAL_SPLIT]))


def test_what_a_run_logs_says_where_the_time_went(uninterrupted):
    """Waiting for data is a share of the step, and speed is positive; both stand in every line."""
    assert [line["step"] for line in uninterrupted.read_metrics()] == list(range(1, 31))
    assert all(
        0 <= line["data_wait"] <= 1 and line["clips_per_s"] > 0 for line in uninterrupted.read_metrics()
    )


def test_clips_that_cannot_be_read_end_the_run_or_are_skipped_and_counted(store_path, tmp_path, monkeypatch):
    """Whether a run may leave clips out is asked of its user; if so, its metrics say how many."""
    read, bad = FeatureStore.read, set(FeatureStore.open(store_path).good_rows()[:5].tolist())

    def damaged(store, rows_B, **options):
        for row in set(rows_B.tolist()) & bad:
            raise BrokenClipError(row, f"row {row} cannot be read")
        return read(store, rows_B, **options)

    monkeypatch.setattr(FeatureStore, "read", damaged)
    with pytest.raises(BrokenClipError, match="cannot be read"):
        pretrain_quietly(store_path, tmp_path / "strict")
    lines: list[str] = []
    run = pretrain(
        store_path, tiny(), tmp_path / "run", device="cpu", on_broken="skip", say=lines.append, steps=8
    )
    skipped_lines = [line for line in lines if line.startswith("skipped: row")]
    assert len(set(skipped_lines)) == len(skipped_lines) == 5
    assert sum(line["skipped"] for line in run.read_metrics()) >= 5


def test_a_run_remembers_how_its_features_were_normalised(uninterrupted, store):
    """Embedding other clips years later needs the mel spec and the two numbers, not the store."""
    assert uninterrupted.identity.mel == store.spec
    assert uninterrupted.identity.store_id == store.store_id
    assert (uninterrupted.identity.mean, uninterrupted.identity.std) == store.mean_and_std(
        train_splits(store)
    )


@pytest.mark.parametrize(
    ("change", "message_part"),
    [
        (
            {"recipe": audio_jepa_recipe()},
            r"holds mel spec a-jepa \(998 x 128, .*needs audio-jepa \(254 x 128",
        ),
        ({"batch": 10_000}, "do not fill one step of 10000 clips"),
        pytest.param({"device": "cuda"}, "no CUDA device here", marks=NO_CUDA),
        ({"recipe": tiny_views(), "batch": 1}, "compares the clips of a step.*choose --batch 2 or more"),
        ({"on_broken": "ignore"}, "on_broken must be raise or skip, got 'ignore'"),
        ({"loader": "fast"}, "loader must be dali or plain, got 'fast'"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(store_path, tmp_path, change, message_part):
    """Store, recipe, counts and device are looked at before the first file is written."""
    options = {"recipe": tiny(), "device": "cpu", **change}
    with pytest.raises(InputError, match=message_part):
        pretrain(store_path, options.pop("recipe"), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_bf16_is_used_where_the_hardware_has_it_and_the_run_says_which():
    """Emulated bf16 is slower than fp32; a CPU without AMX or AVX512-BF16 stays with fp32."""
    bf16, description = hardware_precision(torch.device("cpu"))
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if flags:
        assert bf16 == ("avx512_bf16" in flags or "amx_tile" in flags)
    assert description.startswith("bf16 autocast" if bf16 else "fp32: this CPU has neither")


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_a_device_is_picked_by_name(name):
    """auto never fails; a name that means nothing is refused."""
    assert pick_device(name).type == ("cuda" if name == "auto" and torch.cuda.is_available() else "cpu")
    with pytest.raises(RunError, match="expected auto, cpu or cuda"):
        pick_device("gpu")


def test_masks_are_the_same_on_resume_and_another_at_every_step():
    """The generator is a function of seed and step alone."""
    recipe = tiny()

    def drawn(step):
        rng = step_rng(recipe.seed, step)
        return (
            recipe.masks.mask_maker_at(step, rng).sample(rng, recipe.model.encoder.grid, batch=4).context_BK
        )

    assert np.array_equal(drawn(3), drawn(3))
    assert not np.array_equal(drawn(3)[:, :4], drawn(4)[:, :4])


def test_metrics_of_the_monitor_are_logged_at_their_step(store_path, tmp_path):
    """A probe between two logged steps must not be lost."""
    recipe = tiny(steps=6, masks=replace(tiny().masks, steps=6), log_every=4)
    run = Run.create_or_open(tmp_path / "run", recipe=recipe_to_json(recipe), identity=run_identity())

    class EveryThird:
        scored_clips = "9 clips"

        def after_step(self, steps_done: int) -> dict:
            return {} if steps_done % 3 else {"val_probe_map": steps_done / 10}

        def before_checkpoint(self) -> None: ...

        def stop_reason(self) -> None: ...

    trainer, batch = PretrainTrainer(recipe, torch.device("cpu")), first_batch(FeatureStore.open(store_path))
    run_training_loop(run, trainer, repeat(batch), threading.Event(), progress=False, monitor=EveryThird())
    probe_maps = {line["step"]: line.get("val_probe_map") for line in run.read_metrics()}
    assert probe_maps == {3: 0.3, 4: None, 6: 0.6}


def test_the_best_step_by_the_monitors_probe_has_a_checkpoint_that_stays(store_path, tmp_path):
    """Wherever the probe came, and whatever is dropped after it; a tie is not better."""
    recipe = tiny(steps=9, masks=replace(tiny().masks, steps=9), keep_checkpoints=1)
    run = Run.create_or_open(tmp_path / "run", recipe=recipe_to_json(recipe), identity=run_identity())

    class Probes:
        scored_clips = "9 clips"

        def after_step(self, steps_done: int) -> dict:
            score_at = {1: 0.1, 3: 0.4, 6: 0.4, 8: 0.3}
            return {"val_probe_map": score_at[steps_done]} if steps_done in score_at else {}

        def before_checkpoint(self) -> None: ...
        def stop_reason(self) -> None: ...

    trainer, batch = PretrainTrainer(recipe, torch.device("cpu")), first_batch(FeatureStore.open(store_path))
    options = {"progress": False, "monitor": Probes(), "keep_every": 7}
    assert run_training_loop(run, trainer, repeat(batch), threading.Event(), **options) == 9
    assert [folder.name[-1] for folder in run.checkpoint_folders()] == ["3", "7", "9"]
    assert run.best_checkpoint is not None
    assert (run.best_checkpoint.step, run.best_checkpoint.score) == (3, 0.4)
