"""The monitor: health, probes and cost mean what their names say, change nothing, and a collapse ends the run."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from tiny import tiny, tiny_views
from tqdm import tqdm

from ajepa.evaluate.features import ClipViews, clip_vectors
from ajepa.evaluate.linear_probe import linear_probe_scores_NC
from ajepa.evaluate.metrics import mean_average_precision
from ajepa.evaluate.probes import knn_scores_NC, standardise_features
from ajepa.model.jepa import Jepa
from ajepa.model.masking import Fixed, RandomPatches
from ajepa.pretrain import monitor
from ajepa.pretrain.monitor import (
    COLLAPSE_PATIENCE,
    HEALTH_CLIPS,
    MIN_HEALTHY_CONTENT,
    MIN_HEALTHY_RANK,
    MIN_HEALTHY_SPREAD,
    PROBE_L2,
    HealthBatch,
    collapse_signs,
    count_trailing_collapses,
    draw_health_rows,
    effective_rank,
    feature_statistics,
    measure_health,
    open_training_probe,
)
from ajepa.pretrain.pretrain import pretrain
from ajepa.recipes.optimiser import Schedule
from ajepa.recipes.pretrain import Pretrain
from ajepa.report.pictures import draw_training_curves
from ajepa.training.checkpoints import STATE_FILE
from ajepa.training.loop import PROGRESS_FORMAT, SCORE_METRIC, progress_postfix
from ajepa.training.meter import read_compute_costs
from ajepa.training.run import Run
from ajepa.training.trained_run import CHOSEN_ON_EVAL_CLIPS, TrainedRun
from pipeline.errors import BrokenClipError, RunError, StopSignal
from pipeline.loading.loader import Batch
from pipeline.messages import count_phrase
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import train_splits

ALL_VALID = torch.ones(6, 5, dtype=torch.bool)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(clips: int = 6, valid: int = 64) -> HealthBatch:
    mel_BTF = noise(clips, 64, 128)
    mel_BTF[:, valid:] = 0.0
    batch = Batch(
        mel_BTF=mel_BTF,
        n_frames_B=torch.full((clips,), valid),
        rows_B=np.arange(clips),
        labels_BC=None,
    )
    return HealthBatch.from_batch(batch, tiny())


@pytest.mark.parametrize("directions", [1, 3, 8])
@pytest.mark.parametrize("shape", [(64, 8), (8, 64)], ids=["tall", "wide"])
def test_the_rank_of_equally_strong_directions_is_their_number(directions, shape):
    """RankMe (arXiv 2210.02885): the entropy of equal shares; whichever Gram matrix is the smaller."""
    left = torch.linalg.qr(noise(shape[0], 8))[0][:, :directions]
    right = torch.linalg.qr(noise(shape[1], 8, seed=1))[0][:, :directions]
    assert effective_rank(5.0 * left @ right.T).item() == pytest.approx(directions, rel=1e-3)


def test_the_rank_is_that_of_the_singular_values():
    """By the paper's own formula, from torch's singular value decomposition."""
    x_ND = noise(50, 12) * torch.logspace(0, -4, 12)
    share_D = torch.linalg.svdvals(x_ND.double())
    share_D = share_D / share_D.sum() + 1e-7
    assert effective_rank(x_ND).item() == pytest.approx(
        (-(share_D * share_D.log()).sum()).exp().item(), rel=1e-6
    )


def test_features_that_are_all_alike_have_rank_1_and_no_dimension_that_lives():
    """Collapse as it is drawn in papers; what rounding leaves counts as nothing."""
    alike_BPD = noise(8).expand(6, 5, 8) + 1e-6 * noise(6, 5, 8, seed=1)
    statistics = feature_statistics(alike_BPD, ALL_VALID)
    assert statistics["rank"].item() == pytest.approx(1, abs=1e-3)
    assert statistics["spread"].item() == pytest.approx(0, abs=1e-5)
    assert statistics["rank_clips"].item() == pytest.approx(1, abs=1e-3)
    assert statistics["dead"].item() == 1.0


def test_content_is_what_position_does_not_tell():
    """0 where every clip says the same of a position; all but the mean's share where positions say nothing."""
    position_PD = noise(5, 8)
    assert feature_statistics(position_PD.expand(6, 5, 8), ALL_VALID)["content"].item() == pytest.approx(
        0, abs=1e-9
    )
    assert feature_statistics(noise(6, 1, 8).expand(6, 5, 8), ALL_VALID)["content"].item() == pytest.approx(1)
    sound_BPD = noise(400, 5, 8, seed=2)
    mixed = feature_statistics(sound_BPD + 3 * position_PD, torch.ones(400, 5, dtype=torch.bool))[
        "content"
    ].item()
    spread = 9 * (position_PD - position_PD.mean(0)).square().mean().item()
    assert mixed == pytest.approx(1 / (1 + spread), rel=0.1)


def test_spread_is_the_share_of_the_features_that_is_not_common_to_all():
    """1 about a mean of 0; a mean as large as the deviation makes it the root of a half."""
    noise_BPD = noise(400, 5, 8)
    valid_BP = torch.ones(400, 5, dtype=torch.bool)
    for mean, spread in ((0.0, 1.0), (1.0, 0.5**0.5), (3.0, 0.1**0.5)):
        assert feature_statistics(noise_BPD + mean, valid_BP)["spread"].item() == pytest.approx(
            spread, rel=0.03
        )


def test_a_dimension_is_dead_if_it_hardly_deviates():
    """Constant is dead whatever its value; small is not dead if it is no smaller than a hundredth of the rest."""
    x_BPD = noise(6, 5, 8)
    x_BPD[..., 0], x_BPD[..., 1] = 7.0, 0.0
    x_BPD[..., 2] *= 0.1
    assert feature_statistics(x_BPD, ALL_VALID)["dead"].item() == 2 / 8


def test_tokens_past_a_clips_end_do_not_count():
    """What comes out at padding means nothing, and must not make features look rich."""
    feature_BPD, valid_BP = (
        noise(6, 5, 8),
        torch.arange(5).expand(6, 5) < torch.tensor([[5], [4], [5], [2], [3], [5]]),
    )
    other_BPD = torch.where(valid_BP[..., None], feature_BPD, 1e3 * noise(6, 5, 8, seed=1))
    one, other = feature_statistics(feature_BPD, valid_BP), feature_statistics(other_BPD, valid_BP)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_measuring_health_changes_nothing_and_gives_the_same_twice():
    """Neither weights, nor mode, nor any generator: a monitored run is the run without a monitor."""
    model, batch = Jepa(tiny().model), batch_of(valid=40)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    metrics = measure_health(model, batch)
    assert metrics == measure_health(model, batch)
    assert model.training
    assert model.encoder.training
    assert not model.target.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_health_holds_the_models_own_loss_and_signs_on_the_fixed_clips():
    """The loss and its signs are `Jepa`'s own; teacher and student are one at the start, and part with it."""
    model, batch = Jepa(tiny().model), batch_of()
    metrics = measure_health(model, batch)
    output = model.eval()(batch.mel_BTF, batch.context_BK, batch.targets_BGQ, batch.n_frames_B)
    for name in ("loss", "explained", "target_std", "prediction_std"):
        assert metrics[f"health_{name}"] == pytest.approx(getattr(output, name).item())
    assert metrics["health_teacher_cosine"] == pytest.approx(1)
    with torch.no_grad():
        model.encoder.embed.weight.mul_(-1)
    assert measure_health(model, batch)["health_teacher_cosine"] < 0.9


def test_the_masks_are_of_the_kind_that_the_run_ends_with():
    """One plan for the whole curve; a curriculum's first masks would say nothing of its last."""
    assert batch_of().targets_BGQ.shape[1] == 1  # random patches, one group: tiny's curriculum ends so
    assert torch.equal(batch_of().context_BK, batch_of().context_BK)


def test_clips_are_held_out_where_there_are_any(store):
    """Measured on what is trained on, memory would pass for understanding."""
    eval_N = store.good_rows(["eval"])
    assert np.array_equal(draw_health_rows(store, 0), eval_N)
    assert len(eval_N) < HEALTH_CLIPS


class TrainOnly:
    """A store of a hundred clips without a split to measure on."""

    def __init__(self, manifest) -> None:
        self.split_names = tuple(manifest["split"].unique())

    def good_rows(self, splits):
        assert splits == train_splits(self)
        return np.arange(100)


def test_without_held_out_clips_a_fixed_batch_of_the_others_is_taken(store):
    """Ascending, no row twice, the same for a seed."""
    only = TrainOnly(store.manifest.filter(store.manifest["split"] != "eval"))
    rows_N = draw_health_rows(only, 0)
    assert len(set(rows_N.tolist())) == HEALTH_CLIPS
    assert (np.diff(rows_N) > 0).all()
    assert np.array_equal(rows_N, draw_health_rows(only, 0))
    assert not np.array_equal(rows_N, draw_health_rows(only, 1))


MONITORED = {"health_every": 4, "probe_every": 8, "probe_clips": 20}


def monitored_recipe(**changes) -> Pretrain:
    return tiny(**MONITORED, **changes)


def pretrain_quietly(store_path, run_path, recipe, **options) -> Run:
    return pretrain(store_path, recipe, run_path, device="cpu", **{"say": lambda line: None} | options)


@pytest.fixture(scope="module")
def uninterrupted(store_path, tmp_path_factory) -> Run:
    """Thirty steps, monitored, without a break."""
    return pretrain_quietly(store_path, tmp_path_factory.mktemp("runs") / "whole", monitored_recipe())


def assert_same_weights(one: Run, other: Run) -> None:
    parts, others = one.load_checkpoint().parts, other.load_checkpoint().parts
    for part, tensors in parts.items():
        assert all(torch.equal(value, others[part][name]) for name, value in tensors.items())


def seen(run: Run, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in run.read_metrics() if name in line}


def test_monitoring_changes_neither_weights_nor_losses_by_a_bit(store_path, tmp_path, uninterrupted):
    """Else nobody could say how the run would have gone without a monitor."""
    alone = pretrain_quietly(store_path, tmp_path / "run", tiny(health_every=0))
    assert_same_weights(alone, uninterrupted)
    for name in ("loss", "gradient_norm", "explained"):
        assert seen(alone, name) == seen(uninterrupted, name)
    assert not [
        key for line in alone.read_metrics() for key in line if key.startswith(("health", "val_probe"))
    ]


def test_looks_are_taken_at_their_steps_and_after_the_last(uninterrupted):
    """The end of a run is what is kept, so it is measured whatever its length."""
    assert list(seen(uninterrupted, "health_rank")) == [4, 8, 12, 16, 20, 24, 28, 30]
    assert list(seen(uninterrupted, "val_probe_linear_raw")) == [8, 16, 24, 30]
    assert set(seen(uninterrupted, SCORE_METRIC)) == {8, 16, 24, 30}


def test_the_best_checkpoint_is_that_of_the_best_probe(uninterrupted):
    """The number that the loop compares is the mean of all that were probed."""
    scores = seen(uninterrupted, SCORE_METRIC)
    line = next(line for line in uninterrupted.read_metrics() if SCORE_METRIC in line)
    probes = [value for key, value in line.items() if key.startswith(("val_probe_linear", "val_probe_knn"))]
    assert len(probes) == 4  # two probes on two label sets
    assert line[SCORE_METRIC] == pytest.approx(np.mean(probes))
    assert uninterrupted.best_checkpoint.score == max(scores.values())
    assert scores[uninterrupted.best_checkpoint.step] == uninterrupted.best_checkpoint.score


def test_the_last_probe_is_that_of_the_last_checkpoint(store, uninterrupted):
    """Two ways that must agree: under way, and from the weights that were kept."""
    recipe = monitored_recipe()
    encoder = Jepa(recipe.model).target
    encoder.load_state_dict(uninterrupted.load_checkpoint("target").parts["target"])
    probe = open_training_probe(store, recipe, uninterrupted.identity, "raise", print)
    views = ClipViews(
        store=store, frames=64, mean=uninterrupted.identity.mean, std=uninterrupted.identity.std
    )
    assert len(probe.train_N) == 20
    assert 0 < len(probe.val_N) <= 10
    train_ND, val_ND = standardise_features(
        clip_vectors(views, probe.train_N, encoder), clip_vectors(views, probe.val_N, encoder)
    )
    for name in ("raw", "unambiguous"):
        train_NC, val_NC = store.labels_BC(probe.train_N, name), store.labels_BC(probe.val_N, name)
        linear = linear_probe_scores_NC(train_ND, train_NC, val_ND, l2=PROBE_L2)
        nearest = knn_scores_NC(train_ND, train_NC, val_ND)
        for kind, scores in (("linear", linear), ("knn", nearest)):
            expected = mean_average_precision(val_NC, scores).value
            assert uninterrupted.read_metrics()[-1][f"val_probe_{kind}_{name}"] == pytest.approx(
                expected, abs=1e-6
            )


def test_an_interrupted_run_sees_the_same_and_has_cost_the_same(
    store_path, tmp_path, uninterrupted, monkeypatch
):
    """Health, probes and counts are those of a run that was never stopped; only hours may differ."""
    log = Run.log_metrics

    def log_and_ask(run, line):
        log(run, line)
        if line["step"] == 14:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log_metrics", log_and_ask)
    with pytest.raises(StopSignal):
        pretrain_quietly(store_path, tmp_path / "run", monitored_recipe())
    monkeypatch.undo()
    assert [spent.step for spent in read_compute_costs(tmp_path / "run")] == [5, 8, 10, 14]
    run = pretrain_quietly(store_path, tmp_path / "run", monitored_recipe())
    for name in ("health_rank", "health_content", SCORE_METRIC, "val_probe_knn_raw"):
        assert seen(run, name) == seen(uninterrupted, name)
    one, other = (
        {spent.step: replace(spent, hours=0, peak_memory_gb=0) for spent in read_compute_costs(each.path)}
        for each in (run, uninterrupted)
    )
    assert other[30] == one[30]
    assert all(one[step] == other[step] for step in other if step in one)


def test_what_a_run_has_cost_is_in_its_folder(uninterrupted):
    """Clips and tokens are the recipe's arithmetic; the newest checkpoint's counts come first."""
    record = json.loads((uninterrupted.path / "compute.json").read_text())
    assert (record["step"], record["clips"], record["teacher_tokens"]) == (30, 240, 240 * 32)
    assert 0 < record["context_tokens"] < 240 * 32
    assert record["flop_per_s"] == pytest.approx(record["flop"] / record["hours"] / 3600)
    assert 0.05 < record["peak_memory_gb"] < 50
    assert record["device"] == f"CPU, {count_phrase(torch.get_num_threads(), 'thread')}"
    steps = [spent["step"] for spent in record["earlier"]]
    assert steps == sorted(steps)
    assert {5, 10, 15, 20, 25} <= set(steps)


def test_counts_after_a_kill_are_those_of_the_checkpoint_that_is_left(store_path, tmp_path, uninterrupted):
    """compute.json is written before the checkpoint: what it says beyond that never happened."""
    path = tmp_path / "run"
    pretrain_quietly(store_path, path, monitored_recipe(), say=lambda line: None)
    for folder in Run.open(path).checkpoint_folders()[-1:]:
        folder.rename(tmp_path / "lost")
    assert Run.open(path).newest_step < 30
    run = pretrain_quietly(store_path, path, monitored_recipe())
    assert read_compute_costs(run.path)[-1].flop == read_compute_costs(uninterrupted.path)[-1].flop
    assert [spent.step for spent in read_compute_costs(run.path)].count(30) == 1


def test_no_clip_that_is_measured_chooses_a_checkpoint(store, uninterrupted):
    """The best checkpoint was that of the best mAP on eval clips: a result on them was the highest of many draws."""
    probe = open_training_probe(store, monitored_recipe(), uninterrupted.identity, "raise", print)
    trained_N = store.good_rows(train_splits(store))
    assert set(probe.train_N) | set(probe.val_N) <= set(trained_N)
    assert not set(probe.train_N) & set(probe.val_N)
    assert store.labels_BC(probe.val_N).any(axis=1).all()
    trained = TrainedRun.open(uninterrupted, "best")
    assert trained.chosen_by == f"probes on {len(probe.val_N)} held-back clips of a_train"
    assert TrainedRun.open(uninterrupted).chosen_by == "nothing: the last step"


class Labelled:
    """A store as `open_training_probe` reads it: splits of these sizes, of which every clip has the only label."""

    location = "here.zarr"
    label_sets = ("raw",)

    def __init__(self, labelled: bool = True, **sizes: int) -> None:
        names = [name for name, size in sizes.items() for _ in range(size)]
        ids = [f"sound {number}" for number in range(len(names))]
        self.manifest = pl.DataFrame({"clip_id": ids, "split": names})
        self.split_names = tuple(sizes)
        self.labelled = labelled

    def good_rows(self, splits):
        return np.flatnonzero(self.manifest["split"].is_in(list(splits)).to_numpy())

    def flat_labels(self, label_set):
        rows = len(self.manifest) if self.labelled else 0
        return np.zeros(rows, int), np.minimum(np.arange(len(self.manifest) + 1), rows)

    def labels_BC(self, rows_B, label_set):
        return np.full((len(rows_B), 1), self.labelled, np.float32)


def test_a_split_named_val_chooses_where_there_is_one(uninterrupted):
    """It is made for that; the eval split is left alone, whatever it is called."""
    store = Labelled(train=50, dev=30, test=40)
    probe = open_training_probe(store, monitored_recipe(), uninterrupted.identity, "raise", print)
    assert set(store.manifest["split"].to_numpy()[probe.val_N]) == {"dev"}
    assert set(store.manifest["split"].to_numpy()[probe.train_N]) == {"train"}
    assert probe.scored_clips == "10 clips of dev"


@pytest.mark.parametrize(
    ("store", "message_part"),
    [
        (Labelled(fold1=20, fold2=20), "each of its folds is to be measured"),
        (Labelled(labelled=False, train=40, eval=9), "0 labelled clips to train it and 0 of other sounds"),
        (
            Labelled(train=4, eval=9),
            "4 labelled clips to train it and 0 of other sounds to measure it; it needs 5",
        ),
    ],
    ids=["folds", "unlabelled", "few"],
)
def test_a_store_that_cannot_be_probed_is_reported_once(store, message_part):
    """Pre-training needs no labels; that a curve will be missing is said before the first step."""
    lines = []
    assert open_training_probe(store, monitored_recipe(), {}, "raise", lines.append) is None
    assert len(lines) == 1
    assert lines[0].startswith("here.zarr: no probe while training: ")
    assert message_part in lines[0]
    assert open_training_probe(store, tiny(probe_every=0), {}, "raise", lines.append) is None
    assert len(lines) == 1


def test_a_run_that_chose_by_eval_clips_is_carried_on_by_held_back_ones(store_path, tmp_path):
    """Its scores of before are kept for what they are: they count until there is an honest one, however high."""
    recipe = monitored_recipe(keep_checkpoints=9)
    started = recipe.with_counts(steps=30)
    run = pretrain_until(store_path, tmp_path / "run", started, last_step=9)
    for folder in run.checkpoint_folders():
        state = json.loads((folder / STATE_FILE).read_text())
        del state["scored_on"], state["precision"]
        score = 0.99 if state["score"] is not None else None
        (folder / STATE_FILE).write_text(json.dumps(state | {"format": 1, "score": score}))
    old = TrainedRun.open(run, "best")
    assert (old.step, old.chosen_by) == (8, CHOSEN_ON_EVAL_CLIPS)
    finished = pretrain_quietly(store_path, tmp_path / "run", started)
    assert finished.newest_step == 30
    best = TrainedRun.open(finished, "best")
    assert best.step > 8
    assert "held-back" in best.chosen_by


def pretrain_until(store_path, run_path, recipe, *, last_step: int) -> Run:
    """The run as a signal at a step leaves it."""
    log = Run.log_metrics

    def log_and_ask(run, line):
        log(run, line)
        if line["step"] == last_step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Run, "log_metrics", log_and_ask)
        with pytest.raises(StopSignal):
            pretrain_quietly(store_path, run_path, recipe)
    return Run.open(run_path)


def test_clips_that_cannot_be_read_are_left_out_of_probes_where_that_is_allowed(
    store, uninterrupted, monkeypatch
):
    """As the loaders do; and only then."""
    read_rows = FeatureStore.read
    recipe = replace(monitored_recipe(), probe_clips=100)
    bad = open_training_probe(store, recipe, uninterrupted.identity, "raise", print).val_N[1]

    def damaged(store, rows_B, **options):
        if bad in rows_B:
            raise BrokenClipError(int(bad), f"row {bad} cannot be read")
        return read_rows(store, rows_B, **options)

    monkeypatch.setattr(FeatureStore, "read", damaged)
    model = Jepa(tiny().model)
    strict, lenient = (
        open_training_probe(store, recipe, uninterrupted.identity, options, print)
        for options in ("raise", "skip")
    )
    assert bad in strict.val_N
    with pytest.raises(BrokenClipError):
        strict.measure_scores(model)
    scores = lenient.measure_scores(model)
    assert lenient.broken_rows == {bad}
    assert 0 < scores["val_probe_knn_raw"] < 1


def collapsing() -> Pretrain:
    """No lag between teacher and student, and steps three times as long: all features alike after 60 of 300."""
    return tiny(
        model=replace(tiny().model, loss="squared_l2"),
        masks=replace(tiny().masks, steps=300),
        schedule=Schedule(peak_lr=3e-3, warmup_share=0.1, ema_start=0.0, ema_end=0.0),
        steps=300,
        checkpoint_every=1_000,
        health_every=20,
    )


def test_a_collapse_is_reported_then_saved_then_ends_the_run(store_path, tmp_path, monkeypatch):
    """The rest of it would be heat; the same command does not go on, unless it is told to."""
    lines: list[str] = []
    with pytest.raises(RunError) as refused:
        pretrain_quietly(store_path, tmp_path / "run", collapsing(), say=lines.append)
    run, message = Run.open(tmp_path / "run"), str(refused.value)
    warnings = [line for line in lines if "collapsing: " in line]
    looks = [line for line in run.read_metrics() if "health_spread" in line]
    assert warnings
    assert all("the run stops if 3 looks in a row find it" in line for line in warnings)
    assert count_trailing_collapses(looks) == COLLAPSE_PATIENCE
    assert run.newest_step == looks[-1]["step"] < 200
    assert message.startswith(
        f"{run.path}: step {run.newest_step}: collapsed: {collapse_signs(looks[-1])[0]}"
    )
    assert f"seen in the checkpoint of step {run.newest_step}; try a lower schedule.peak_lr" in message
    assert "\n" not in message
    assert read_compute_costs(run.path)[-1].step == run.newest_step
    with pytest.raises(RunError, match="run: collapsed: "):
        pretrain_quietly(store_path, tmp_path / "run", collapsing())
    assert run.newest_step == looks[-1]["step"]
    monkeypatch.setattr(Run, "log_metrics", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StopSignal):
        pretrain_quietly(store_path, tmp_path / "run", collapsing(), on_collapse="warn")
    assert run.newest_step == looks[-1]["step"] + 1


def test_an_encoder_wider_than_the_calibration_is_warned_of_and_not_ended(store_path, tmp_path, monkeypatch):
    """The thresholds come from encoders of 32 to 96: a ViT-B that they do not fit would lose its night."""
    monkeypatch.setattr(monitor, "CALIBRATED_WIDTH", 31)
    monkeypatch.setattr(monitor, "MIN_HEALTHY_RANK", 1e9)
    lines: list[str] = []
    recipe = tiny(health_every=5).with_counts(steps=20)
    run = pretrain_quietly(store_path, tmp_path / "run", recipe, say=lines.append)
    (warning,) = [line for line in lines if "collapsing" in line]
    assert run.newest_step == 20
    assert (
        "the run goes on, for these signs are calibrated on encoders up to 31 wide and this one is 32"
        in warning
    )
    with pytest.raises(RunError, match="collapsed"):
        pretrain_quietly(store_path, tmp_path / "stopped", recipe, on_collapse="stop")


HEALTHY = {
    "tiny": {},
    "slow teacher": {"schedule": Schedule(peak_lr=1e-3, warmup_share=0.1, ema_start=0.99)},
    "cosine": {"model": replace(tiny().model, loss="cosine")},
    "views": {name: getattr(tiny_views(), name) for name in ("model", "views", "masks", "mask_sets")},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_give_no_alarm(store_path, tmp_path, name):
    """From the first steps of a random encoder on: a false alarm would cost a night."""
    changes = {
        "steps": 24,
        "masks": Fixed(masking=RandomPatches()),
        "checkpoint_every": 1_000,
        **HEALTHY[name],
    }
    lines: list[str] = []
    run = pretrain_quietly(store_path, tmp_path / "run", tiny(**changes, health_every=2), say=lines.append)
    assert not [line for line in lines if "collapsing" in line]
    assert len(seen(run, "health_spread")) == 12


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("health_spread", MIN_HEALTHY_SPREAD),
        ("health_rank", MIN_HEALTHY_RANK),
        ("health_content", MIN_HEALTHY_CONTENT),
    ],
)
def test_each_sign_by_itself_is_enough(name, least):
    """Alike, flat, or blind to the sound: an encoder is lost in each of three ways."""
    well = {"health_spread": 0.6, "health_rank": 20.0, "health_content": 0.5}
    assert collapse_signs(well) == []
    assert collapse_signs({**well, name: least}) == []
    assert len(collapse_signs({**well, name: 0.9 * least})) == 1
    assert count_trailing_collapses([{**well, name: 0.0}, well, {**well, name: 0.0}]) == 1


def test_what_to_do_at_a_collapse_is_one_of_two(store_path, tmp_path):
    """Another word is no silent default."""
    with pytest.raises(RunError, match="on_collapse must be auto, stop, warn, got 'cry'"):
        pretrain_quietly(store_path, tmp_path / "run", tiny(), on_collapse="cry")


def test_the_curves_show_rank_and_probes(uninterrupted):
    """A picture without them would be of a run without a monitor."""
    figure = draw_training_curves(uninterrupted.read_metrics(), monitored_recipe())
    titles = [axes.get_title() for axes in figure.axes]
    assert any("rank" in title for title in titles)
    assert any("mAP" in title for title in titles)


def test_the_progress_line_fits_80_columns():
    """Also in the longest run of the largest model, with time left and a bar."""
    line = {"loss": 0.1234, "health_rank": 1023.7, "clips_per_s": 12345.6, "data_wait": 1.0}
    assert progress_postfix(line) == "loss 0.123, rank 1024, 12346 clips/s, wait 100%"
    text = tqdm.format_meter(
        100_000,
        200_000,
        100_000,
        ncols=80,
        bar_format=PROGRESS_FORMAT,
        postfix=progress_postfix(line),
        ascii=True,
    )
    assert text == "100000/200000|##  |ETA 27:46:40, loss 0.123, rank 1024, 12346 clips/s, wait 100%"
    assert len(text) <= 80
    del line["health_rank"]
    assert progress_postfix(line) == "loss 0.123, 12346 clips/s, wait 100%"
