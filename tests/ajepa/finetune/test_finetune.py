"""Fine-tuning: exact resume, one line for what does not fit, and that something is learnt."""

import json
import os
import re
import shutil
import signal
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dying import finetune_until_killed
from forked import start_forked
from tiny import tiny, tiny_finetune

from ajepa.evaluate.classifier_scores import predict_logits_NC
from ajepa.evaluate.evaluate import evaluate_run
from ajepa.evaluate.features import STATISTICS, clip_vectors
from ajepa.evaluate.linear_probe import linear_probe_scores_NC
from ajepa.evaluate.metrics import mean_average_precision
from ajepa.evaluate.probes import standardise_features
from ajepa.evaluate.result import EVALUATION_FILE, Evaluation, Score
from ajepa.evaluate.task_data import select_task_data
from ajepa.evaluate.tasks import TASKS
from ajepa.finetune.cross_validation import cross_validate
from ajepa.finetune.finetune import (
    FinetuneMonitor,
    build_finetune_trainer,
    choose_head_penalty,
    finetune,
    fit_probed_head,
    held_back_places,
    whole_clip_views,
)
from ajepa.finetune.setup import finetune_view, refuse_few_head_clips
from ajepa.finetune.trainer import FinetuneTrainer
from ajepa.model.classifier import build_classifier
from ajepa.pretrain.pretrain import pretrain
from ajepa.recipes.catalogue import finetune_recipe
from ajepa.recipes.finetune import finetune_with_counts
from ajepa.training.devices import FP32
from ajepa.training.meter import read_compute_costs
from ajepa.training.run import Run
from ajepa.training.trained_run import TrainedRun
from ajepa.training.trainer import StartedStep
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.errors import InputError, RunError
from pipeline.loading.augment import Augment
from pipeline.loading.loader import Batch, PlainLoader
from pipeline.store.feature_store import FeatureStore

OWN, TIMINGS = TASKS["own"], ("clips_per_s", "data_wait")

CPU = torch.device("cpu")


def finetune_quietly(store_path, run_path, recipe=None, task=OWN, **options) -> Run:
    recipe = recipe or tiny_finetune()
    return finetune(store_path, task, recipe, run_path, device="cpu", say=lambda line: None, **options)


def logged(run: Run) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in run.read_metrics()]


def scores_of(run: Run) -> tuple[Score, ...]:
    return Evaluation.read_json(run.path / EVALUATION_FILE).scores


@pytest.fixture(scope="module")
def pretrained(store_path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pretrained") / "run"
    encoder = replace(tiny().model.encoder, depth=2)
    recipe = tiny(model=replace(tiny().model, encoder=encoder)).with_counts(steps=6)
    pretrain(store_path, recipe, path, device="cpu", say=lambda line: None)
    return path


@pytest.fixture(scope="module")
def start(pretrained) -> TrainedRun:
    return TrainedRun.open(pretrained)


@pytest.fixture(scope="module")
def uninterrupted(store_path, start, tmp_path_factory) -> Run:
    """Twenty steps without a break, from a pre-trained encoder."""
    return finetune_quietly(store_path, tmp_path_factory.mktemp("runs") / "whole", start=start)


def test_twenty_steps_are_ten_then_kill_9_then_ten_bit_for_bit(
    store_path, tmp_path, uninterrupted, pretrained, start
):
    """With mixup, masking, drop path, masks and an average of the weights: all of it drawn anew, the same."""
    arguments = (store_path, tmp_path / "run", pretrained, torch.get_num_threads())
    killed = start_forked(
        finetune_until_killed, *arguments, output=tmp_path / "output", environment=os.environ
    )
    killed.join()
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / "output").read_text()
    left = Run.open(tmp_path / "run")
    assert left.newest_step == 10
    run = finetune_quietly(store_path, tmp_path / "run", start=start, loader="plain")
    assert logged(run) == logged(uninterrupted)
    assert scores_of(run) == scores_of(uninterrupted)
    one, two = run.load_checkpoint().parts, uninterrupted.load_checkpoint().parts
    assert one.keys() == two.keys() == {"classifier", "average", "optimiser"}
    for part in one:
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part])


@pytest.mark.parametrize("options", [{"micro_batch": 3}, {"recompute": True}, {"precision": "bf16"}], ids=str)
def test_a_run_in_parts_or_other_numbers_is_carried_on_with_bit_for_bit(
    store_path, tmp_path, monkeypatch, options
):
    """Stopped between two checkpoints, with the same options; what it cost is counted as if it had never been."""
    recipe, start_step = tiny_finetune(steps=8, checkpoint_every=3), FinetuneTrainer.start_step

    def step(trainer: FinetuneTrainer, at: int, batch: Batch) -> StartedStep:
        if at == 5:
            raise RunError("stopped")
        return start_step(trainer, at, batch)

    undisturbed = finetune_quietly(store_path, tmp_path / "whole", recipe, **options)
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "start_step", step)
        with pytest.raises(RunError, match="stopped"):
            finetune_quietly(store_path, tmp_path / "run", recipe, **options)
    assert Run.open(tmp_path / "run").newest_step == 3
    run = finetune_quietly(store_path, tmp_path / "run", recipe, **options)
    assert logged(run) == logged(undisturbed)
    one, two = run.load_checkpoint().parts, undisturbed.load_checkpoint().parts
    assert all(torch.equal(one[part][name], two[part][name]) for part in one for name in one[part])
    costs = [
        [(spent.step, spent.clips, spent.flop) for spent in read_compute_costs(each.path)]
        for each in (run, undisturbed)
    ]
    assert costs[0] == costs[1]
    assert [(step, clips) for step, clips, _ in costs[0]] == [(3, 24), (6, 48), (8, 64)]


def test_what_does_not_fit_into_memory_is_refused_before_anything_is_written(
    store_path, tmp_path, monkeypatch
):
    """In one line; so is a model that cannot be trained in parts."""
    monkeypatch.setattr("ajepa.training.memory.free_memory_bytes", lambda device: 1_000_000)
    with pytest.raises(
        RunError, match=r"recipe tiny needs about .* for 8 clips at once, cpu has 0\.00 GB free"
    ):
        finetune_quietly(store_path, tmp_path / "run")
    monkeypatch.undo()
    recipe = finetune_with_counts(finetune_recipe("cnn6-small"), steps=1, clips_per_step=8)
    with pytest.raises(RunError, match="--micro-batch 2: a cnn6 normalises each clip by all 8 of its step"):
        finetune_quietly(store_path, tmp_path / "run", recipe, micro_batch=2)
    with pytest.raises(RunError, match="--precision fp16: computes on CUDA devices only"):
        finetune_quietly(store_path, tmp_path / "run", precision="fp16")
    assert not (tmp_path / "run").exists()
    run = finetune_quietly(store_path, tmp_path / "run", recipe, micro_batch=8)
    assert read_compute_costs(run.path)[-1].flop > 0 == read_compute_costs(run.path)[-1].context_tokens


def test_a_finished_run_is_left_alone_and_measured_again_only_where_its_scores_are_gone(
    store_path, uninterrupted, start, tmp_path
):
    """A crash between the last checkpoint and the scores costs nothing: they are what they would have been."""
    shutil.copytree(uninterrupted.path, tmp_path / "run")
    lines = []
    finetune(store_path, OWN, tiny_finetune(), tmp_path / "run", start=start, device="cpu", say=lines.append)
    assert lines == [f"{tmp_path / 'run'}: already at its last step, 20"]
    (tmp_path / "run" / "evaluation.json").unlink()
    assert scores_of(finetune_quietly(store_path, tmp_path / "run", start=start)) == scores_of(uninterrupted)


def test_what_is_measured_on_the_way_is_logged_and_the_end_is_kept(uninterrupted, store):
    """Twice in twenty steps; the last line and the file say the same."""
    names = [f"eval_map_{label_set}" for label_set in store.label_sets]
    measured = {
        line["step"]: [line[name] for name in names]
        for line in uninterrupted.read_metrics()
        if names[0] in line
    }
    assert list(measured) == [10, 20]
    assert measured[20] == pytest.approx(
        [score.primary_estimate.value for score in scores_of(uninterrupted)], rel=1e-5
    )
    start = Evaluation.read_json(uninterrupted.path / EVALUATION_FILE).protocol.classifier.start
    assert start == uninterrupted.task_identity.start.to_json()
    assert set(start) == {"step", "sha256"}


def test_what_is_measured_is_the_average_of_the_weights(store, uninterrupted, start):
    """The checkpoint's average gives the scores in the file; the weights themselves give others."""
    recipe = replace(tiny_finetune(), steps=20)
    task_data = select_task_data(OWN, store)
    trainer = build_finetune_trainer(uninterrupted, recipe, task_data, CPU, start, at=20)
    measuring = FinetuneMonitor(uninterrupted, trainer, task_data, uninterrupted.identity)
    assert measuring.final_evaluation().scores == scores_of(uninterrupted)
    rows_N = task_data.eval_N
    averaged_NC = predict_logits_NC(trainer.evaluated_model, measuring.views, rows_N, CPU, precision=FP32)
    trainer.weight_average = None
    assert not np.allclose(
        predict_logits_NC(trainer.evaluated_model, measuring.views, rows_N, CPU, precision=FP32), averaged_NC
    )


def test_training_starts_from_the_pre_trained_encoder_and_its_average_too(
    store, start, uninterrupted, tmp_path
):
    """The EMA encoder, which is what probes are made on; a head of its own."""
    task_data, recipe = select_task_data(OWN, store), start.adapt_recipe(tiny_finetune())
    new = Run(path=tmp_path, recipe={}, identity=task_data.identity(), versions={})
    trainer, untrained = (
        build_finetune_trainer(new, recipe, task_data, CPU, one, at=0) for one in (start, None)
    )
    target = start.run.load_checkpoint("target").parts["target"]
    for model in (trainer.model, trainer.weight_average):
        encoder = model.encoder.state_dict()
        assert all(torch.equal(value, encoder[name]) for name, value in target.items())
        assert torch.equal(model.head.weight, untrained.model.head.weight)
    assert not torch.equal(untrained.model.encoder.embed.weight, target["embed.weight"])
    again = TrainedRun.open(uninterrupted.path)
    assert again.part == "average"
    average = uninterrupted.load_checkpoint("average").parts["average"]
    assert all(
        torch.equal(value, average[f"encoder.{name}"]) for name, value in again.encoder_weights().items()
    )
    assert "embed.weight" in again.encoder_weights()


@pytest.mark.parametrize("pooling", ["mean", "moments"])
def test_a_probed_head_is_the_linear_probe_before_the_first_step(store, start, tmp_path, pooling):
    """What it says of held-out clips is what the probe on frozen features says: the same logits, the same mAP."""
    task_data = select_task_data(OWN, store)
    recipe = start.adapt_recipe(
        tiny_finetune(1024, head="probe")
    )  # one view: means over views weigh by frames
    recipe = replace(recipe, model=replace(recipe.model, pooling=pooling))
    new = Run(path=tmp_path, recipe={}, identity=task_data.identity(), versions={})
    trainer = build_finetune_trainer(new, recipe, task_data, CPU, start, at=0)
    views = whole_clip_views(task_data, recipe, new.identity)
    pairs = (
        clip_vectors(views, rows_N, trainer.model.encoder, pooling=pooling)
        for rows_N in (task_data.train_N, task_data.eval_N)
    )
    train_ND, eval_ND = standardise_features(*pairs)
    labels_NC = task_data.labels_NC(task_data.train_N)
    held_N = held_back_places(task_data, task_data.train_N, recipe.seed)
    l2 = choose_head_penalty(train_ND, labels_NC, held_N, single=False)
    probed_NC = linear_probe_scores_NC(train_ND, labels_NC, eval_ND, l2=l2)
    told_NC = predict_logits_NC(trainer.evaluated_model, views, task_data.eval_N, CPU, precision=FP32)
    np.testing.assert_allclose(told_NC, probed_NC, rtol=1e-3, atol=2e-2)


def test_a_class_that_the_probe_did_not_see_is_still_to_be_learnt(store, start):
    """Of many clips a few are probed on; what lies far below all that these say would never come up again."""
    uninterrupted, recipe = select_task_data(OWN, store), start.adapt_recipe(tiny_finetune(1024))
    some = replace(
        uninterrupted,
        train_N=uninterrupted.train_N[uninterrupted.labels_NC(uninterrupted.train_N)[:, 0] == 0],
    )
    model, views = (
        build_classifier(recipe.model, len(uninterrupted.classes), 0),
        whole_clip_views(uninterrupted, recipe, uninterrupted.identity()),
    )
    model.encoder.load_state_dict(start.run.load_checkpoint("target").parts["target"])
    weight_CD, bias_C = fit_probed_head(model, views, some, 0, single=False)
    vectors_ND = torch.from_numpy(clip_vectors(views, some.train_N, model.encoder))
    told_NC = vectors_ND @ weight_CD.T + bias_C
    assert not weight_CD[0].any()
    assert bias_C[0] == pytest.approx(told_NC[:, 1:].min().item(), abs=1e-4)


def test_a_probed_head_of_12288_features_needs_no_square_of_them(store, monkeypatch):
    """Moments of a ViT-B: scores of 12,288 unit vectors took 2.4 GB and a product of 12,288 x 12,288 on one core."""
    task_data = select_task_data(OWN, store)
    vectors_ND = np.random.default_rng(0).standard_normal((len(task_data.train_N), 12_288)).astype(np.float32)
    monkeypatch.setattr("ajepa.finetune.finetune.clip_vectors", lambda *args, **options: vectors_ND)
    model = build_classifier(tiny_finetune().model, len(task_data.classes), 0)
    tracemalloc.start()
    weight_CD, bias_C = fit_probed_head(model, None, task_data, 0, single=False)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100e6
    assert weight_CD.shape == (len(task_data.classes), 12_288)
    labels_NC = task_data.labels_NC(task_data.train_N)
    scores_NC = torch.from_numpy(vectors_ND) @ weight_CD.T + bias_C
    assert mean_average_precision(labels_NC, scores_NC.numpy()).value > 0.9


def test_a_head_that_starts_as_a_probe_needs_five_clips_and_two_sounds(store, start):
    """Else nothing is left to choose its penalty on; the error comes before the run's folder is made."""
    task_data = select_task_data(OWN, store)
    with pytest.raises(
        RunError, match=r"4 clips of 4 sounds to train on; a head that starts as a probe needs 5"
    ):
        refuse_few_head_clips(replace(task_data, train_N=task_data.train_N[:4]))
    refuse_few_head_clips(replace(task_data, train_N=task_data.train_N[:5]))


@pytest.mark.parametrize("frames", [16, 256])
def test_an_encoder_of_64_frames_is_fine_tuned_on_other_lengths(store_path, start, tmp_path, frames):
    """Positions are made for the length of the task; weights know none. Views cover the whole clip either way."""
    recipe = start.adapt_recipe(tiny_finetune(frames, steps=2, checkpoint_every=2))
    assert recipe.model.encoder.grid.frames == frames
    run = finetune_quietly(store_path, tmp_path / "run", recipe, start=start)
    assert 0 < scores_of(run)[0].primary_estimate.value < 1


def test_propagated_labels_are_trained_on_and_both_sets_are_measured(store_path, tmp_path):
    """What is trained on stands first; the run says which it was."""
    run = finetune_quietly(store_path, tmp_path / "run", tiny_finetune(steps=2), label_set="unambiguous")
    assert [score.label_set for score in scores_of(run)] == ["unambiguous", "raw"]
    assert run.task_identity.label_set == "unambiguous"
    with pytest.raises(RunError, match=r"identity.label_set: was unambiguous, now raw"):
        finetune_quietly(store_path, tmp_path / "run", tiny_finetune(steps=2))


def test_a_run_is_not_carried_on_from_another_start(store_path, uninterrupted):
    """Nor with another task; both would make one name stand for two things."""
    with pytest.raises(RunError, match=r"is another run \(identity.from.step: was 6, now absent"):
        finetune_quietly(store_path, uninterrupted.path)


@pytest.mark.parametrize(
    ("task", "options", "message_part"),
    [
        (
            "esc50",
            {},
            "task esc50 has 50 classes, the store 527: 50 of the task's are missing, such as dog, ",
        ),
        (
            "fsd50k",
            {},
            "task fsd50k has 200 classes, the store 527: 8 of the task's are missing.*335 of the st",
        ),
        ("own", {"fold": 1}, "--fold 1: task own has no folds; the store's splits are a_train, eval"),
        ("own", {"label_set": "dominators"}, "no label set 'dominators'"),
        (
            "own",
            {"recipe": tiny_finetune(loss="ce")},
            "clips have several labels, which --set loss=ce cannot",
        ),
        ("own", {"recipe": tiny_finetune(mel="panns")}, "holds mel spec a-jepa.*recipe tiny needs panns"),
        ("own", {"recipe": tiny_finetune(clips_per_step=4000)}, "do not fill one step of 4000 clips"),
        ("own", {"recipe": tiny_finetune(clips_per_epoch=9)}, "clips_per_epoch is for balanced sampling"),
        (
            "own",
            {"recipe": tiny_finetune(sampling="balanced-once", clips_per_epoch=2000)},
            "2000 clips an epoch without replacement, but only",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(store_path, tmp_path, task, options, message_part):
    """Task, store, recipe: looked at before the first file is written."""
    with pytest.raises(InputError, match=message_part) as refused:
        finetune_quietly(store_path, tmp_path / "run", task=TASKS[task], **options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_band_norm_without_a_start_is_refused(store, tmp_path):
    """Only pre-training tells an encoder of its bands: it would be a switch that does nothing."""
    recipe = tiny_finetune()
    model = replace(recipe.model, encoder=replace(recipe.model.encoder, band_norm=True))
    with pytest.raises(RunError, match="band_norm is learnt in pre-training"):
        finetune(store, OWN, replace(recipe, model=model), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_start_of_other_features_is_refused(store_path, pretrained, tmp_path):
    """A network fed with other mels answers, and answers wrongly; the length of a clip is no matter."""
    shutil.copytree(pretrained, tmp_path / "start")
    record = json.loads((pretrained / "recipe.json").read_text())
    record["identity"]["mel"] = preset_mel_spec("audio-jepa").to_json()
    (tmp_path / "start" / "recipe.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"holds mel spec a-jepa .*start was trained on audio-jepa"):
        finetune_quietly(store_path, tmp_path / "run", start=TrainedRun.open(tmp_path / "start"))
    record["identity"]["mel"] = replace(preset_mel_spec("a-jepa"), clip_seconds=3.0).to_json()
    (tmp_path / "start" / "recipe.json").write_text(json.dumps(record))
    finetune_quietly(
        store_path, tmp_path / "run", tiny_finetune(steps=1), start=TrainedRun.open(tmp_path / "start")
    )


def test_a_start_without_a_checkpoint_is_refused(pretrained, tmp_path):
    """In one line, before the store is read."""
    (tmp_path / "recipe.json").write_text((pretrained / "recipe.json").read_text())
    with pytest.raises(RunError, match="holds no checkpoint yet"):
        TrainedRun.open(tmp_path)
    with pytest.raises(RunError, match="not a run"):
        TrainedRun.open(tmp_path / "nowhere")


def test_after_a_bad_step_fine_tuning_goes_on_past_it_or_with_a_lower_rate(store_path, tmp_path, monkeypatch):
    """The same two ways on as in pre-training; the record says which steps had which rate."""
    start_step = FinetuneTrainer.start_step

    def spoilt_step(trainer, step, batch):
        if step == 2:
            batch.mel_BTF[0, 0, 0] = torch.nan
        return start_step(trainer, step, batch)

    recipe = tiny_finetune(steps=4, checkpoint_every=2, evaluations=1)
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "start_step", spoilt_step)
        skipping = finetune_quietly(store_path, tmp_path / "skip", recipe, loader="plain", on_bad_step="skip")
        with pytest.raises(RunError, match="step 3: loss is nan"):
            finetune_quietly(store_path, tmp_path / "run", recipe, loader="plain")
    assert [line["step"] for line in skipping.read_metrics() if "bad_steps" in line] == [3]
    assert read_compute_costs(skipping.path)[-1].bad_steps == 1
    run = finetune_quietly(store_path, tmp_path / "run", replace(recipe, base_lr=1e-3), loader="plain")
    assert [(phase.first_step, phase.recipe["base_lr"]) for phase in run.phases] == [(0, 3e-2), (2, 1e-3)]


def test_a_batch_with_nan_stops_the_run_before_the_update_and_names_the_rows(store, tmp_path):
    """Checked after the update, the weights would be lost with it."""
    trainer, batch = fresh(store), first_batch(store)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    batch.mel_BTF[3, 5, 7] = torch.nan
    with pytest.raises(RunError, match=rf"step 5: loss is nan.*rows \[{batch.rows_B[3]}\] of the store"):
        trainer.train_step(4, batch)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def fresh(store) -> FinetuneTrainer:
    merge_SC = torch.from_numpy(select_task_data(OWN, store).merge_SC)
    return FinetuneTrainer(tiny_finetune(), merge_SC, CPU, single_label=False)


def first_batch(store) -> Batch:
    task_data = select_task_data(OWN, store)
    view = finetune_view(task_data, tiny_finetune(), task_data.identity())
    return PlainLoader(store, task_data.order(tiny_finetune()), view).make_batch(0)


def test_a_pre_trained_run_is_probed_on_clips_of_another_length(folds_path, pretrained, tmp_path):
    """It was trained on ten seconds, these last one: the same features, so the same encoder hears them."""
    evaluation = evaluate_run(
        folds_path, pretrained, device="cpu", probes=("knn",), out=tmp_path / "some.json"
    )
    assert (evaluation.protocol.folds, evaluation.protocol.eval_clips) == (2, 40)
    assert evaluation.find_score(STATISTICS, "knn", "raw").primary_estimate.value > 0.9


def test_tones_are_learnt_fold_by_fold(folds_path, tmp_path):
    """One label to a clip: cross-entropy, accuracy, every fold measured once after training on the others."""
    store = FeatureStore.open(folds_path)
    recipe = tiny_finetune(
        1024, steps=40, clips_per_step=10, base_lr=0.1, augment=Augment(), checkpoint_every=40
    )
    evaluation = cross_validate(store, OWN, recipe, tmp_path / "run", device="cpu", say=lambda line: None)
    runs = [Run.open(tmp_path / "run" / fold) for fold in ("fold1", "fold2")]
    assert [run.task_identity.eval_splits for run in runs] == [("fold1",), ("fold2",)]
    assert all(run.task_identity.single_label for run in runs)
    assert runs[0].recipe["model"]["encoder"]["grid"]["cols"] == 7  # 98 frames, not 1024
    assert Evaluation.read_json(tmp_path / "run" / EVALUATION_FILE).scores == evaluation.scores
    (score,), each = evaluation.scores, [scores_of(run)[0] for run in runs]
    assert score.by_fold["accuracy"] == pytest.approx([one.primary_estimate.value for one in each])
    assert score.primary_estimate.value == pytest.approx(np.mean(score.by_fold["accuracy"]))
    assert min(score.by_fold["accuracy"]) > 0.9 > 0.5 == score.chance
    assert (evaluation.protocol.folds, evaluation.protocol.eval_clips) == (2, 40)
    assert evaluation.protocol.eval_splits == ("fold1", "fold2")
    again = evaluate_run(folds_path, runs[0].path, device="cpu")
    assert (again.protocol.eval_splits, again.scores) == (("fold1",), scores_of(runs[0]))
    probed = evaluate_run(folds_path, runs[0].path, device="cpu", probes=("knn",)).protocol
    assert (probed.probes.train_splits, probed.eval_splits) == (("fold2",), ("fold1",))
    assert f"{score.fold_deviation:5.3f}" in evaluation.format_table().split("deviation over 2 folds")[1]
    with pytest.raises(RunError, match="fold 3: expected one of 1 to 2"):
        finetune_quietly(folds_path, tmp_path / "other", recipe, fold=3)
    start, leak = TrainedRun.open(runs[0].path), tmp_path / "leak"  # it learnt fold 2 by heart
    with pytest.raises(RunError, match="fold1: was fine-tuned on fold2, which is to be measured here"):
        finetune_quietly(folds_path, leak, start.adapt_recipe(recipe), start=start, fold=2)
    with pytest.raises(RunError, match="fold1: was fine-tuned on fold2, which is to be measured here"):
        cross_validate(store, OWN, start.adapt_recipe(recipe), leak, start=start, device="cpu")
    assert not leak.exists()
    with pytest.raises(RunError, match="fold1: is a run by itself"):
        cross_validate(store, OWN, recipe, runs[0].path, device="cpu")


def probed_trainer(
    folds_path, recipe, start, tmp_path, say
) -> tuple[FinetuneTrainer, dict[str, torch.Tensor]]:
    """The trainer with a head that may start as a probe, and the head that it would have at random."""
    task_data = select_task_data(OWN, FeatureStore.open(folds_path), fold=1)
    new = Run(path=tmp_path, recipe={}, identity=task_data.identity(), versions={})
    drawn, probed = (
        build_finetune_trainer(new, replace(recipe, head=head), task_data, CPU, start, at=0, say=say)
        for head in ("random", "probe")
    )
    return probed, drawn.model.head.state_dict()


def test_a_probed_head_that_is_worse_than_a_random_one_is_not_taken(folds_path, pretrained, tmp_path):
    """Features of an encoder before its first step hardly differ: the probe's weights blow up what masks change."""
    encoder = TrainedRun.open(pretrained, "init")
    weights = {
        name: weight * 1e-3 if name == "embed.weight" else weight for name, weight in encoder.weights.items()
    }
    start = replace(encoder, weights=weights)
    recipe = start.adapt_recipe(tiny_finetune(112, head="probe", loss="ce"))
    said: list[str] = []
    trainer, drawn = probed_trainer(folds_path, recipe, start, tmp_path, said.append)
    assert len(said) == 1
    assert re.fullmatch(
        r"the head begins at random: as a probe it has a loss of \S+ on clips as training shows them, "
        r"a random one 0\.\d+; longer pre-training may help",
        said[0],
    )
    for model in (trainer.model, trainer.weight_average):
        assert all(torch.equal(model.head.state_dict()[name], weight) for name, weight in drawn.items())

    # Of clips as they are, it is better than a random one.
    plain = replace(recipe, augment=Augment())
    said.clear()
    trainer, drawn = probed_trainer(folds_path, plain, start, tmp_path, said.append)
    assert said == []
    assert not torch.equal(trainer.model.head.weight, drawn["weight"])
