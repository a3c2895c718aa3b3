"""Frozen features and their probes: right means, right penalties, honest comparisons."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tiny import tiny

from ajepa.evaluate.evaluate import evaluate_run
from ajepa.evaluate.features import RANDOM, STATISTICS, TRAINED, ClipViews, clip_vectors, compared_encoders
from ajepa.evaluate.probe_splits import ProbeSplits, probe_rows
from ajepa.evaluate.probes import choose_l2, knn_scores_NC, linear_probe_scores_NC, standardise_features
from ajepa.evaluate.result import Evaluation
from ajepa.model.jepa import Jepa
from ajepa.pretrain.pretrain import pretrain
from ajepa.recipes.catalogue import recipe_from_json
from ajepa.training.run import Run
from ajepa.training.trained_run import TrainedRun
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.errors import RunError


@pytest.fixture(scope="module")
def run(store_path, tmp_path_factory) -> Run:
    path = tmp_path_factory.mktemp("runs") / "run"
    return pretrain(store_path, tiny(), path, steps=6, device="cpu", say=lambda line: None)


@pytest.fixture(scope="module")
def evaluation(store_path, run) -> Evaluation:
    return evaluate_run(store_path, run.path, device="cpu")


class SomeClips:
    """What `Views` needs of a store: twelve clips of 100 stored frames, of which `valid` are sound."""

    frames, scale, offset = 100, 1.0, 0.0

    def __init__(self, valid: list[int], *, past_the_end: float = 0.0) -> None:
        rng = np.random.default_rng(3)
        self.mel_BTF = rng.standard_normal((len(valid), 100, 128)).astype(np.float32)
        self.n_frames_N = np.array(valid, np.int32)
        self.mel_BTF[np.arange(100) >= self.n_frames_N[:, None]] = past_the_end

    def read(self, rows_B):
        return self.mel_BTF[rows_B].copy()


def encoded(clips: SomeClips, *, encoder=None) -> np.ndarray:
    views = ClipViews(store=clips, frames=64, mean=0.0, std=1.0)
    return clip_vectors(views, np.arange(len(clips.n_frames_N)), encoder)


@pytest.fixture(scope="module")
def encoder():
    return Jepa(tiny().model, seed=1).target.eval()


@pytest.mark.parametrize("kind", ["encoder", "statistics"])
def test_what_lies_past_a_clips_end_never_reaches_its_features(encoder, kind):
    """Padding in a mean would tell short clips from long ones, and nothing else."""
    chosen = encoder if kind == "encoder" else None
    valid = [100, 64, 63, 30, 1]
    quiet, loud = (encoded(SomeClips(valid, past_the_end=value), encoder=chosen) for value in (0.0, 9e3))
    assert np.array_equal(quiet, loud)


def test_a_clips_features_are_the_mean_over_the_valid_tokens_of_all_its_views(encoder):
    """100 frames in views of 64: 4 columns of 8 tokens, then 3 columns that begin before frame 100."""
    clips = SomeClips([100])
    mel_TF = torch.from_numpy(clips.mel_BTF[0])
    last_TF = torch.cat([mel_TF[64:], torch.zeros(28, 128)])
    with torch.inference_mode():
        valid_BP = torch.arange(32)[None] < 24
        first_PD, last_PD = encoder(mel_TF[None, :64])[0], encoder(last_TF[None], valid_BP=valid_BP)[0][:24]
    expected_D = torch.cat([first_PD, last_PD]).mean(0)
    np.testing.assert_allclose(encoded(clips, encoder=encoder)[0], expected_D, rtol=1e-5, atol=1e-6)


def test_statistics_are_mean_and_deviation_of_every_band_over_valid_frames():
    """The baseline to beat must not be weaker than it says."""
    clips = SomeClips([100, 37])
    expected = [np.concatenate([m.mean(0), m.std(0)]) for m in (clips.mel_BTF[0], clips.mel_BTF[1][:37])]
    np.testing.assert_allclose(encoded(clips), expected, rtol=1e-4, atol=1e-5)


def test_a_constant_feature_becomes_zero_instead_of_nan():
    """A dead dimension is no reason to lose a probe."""
    train_ND = np.array([[1.0, 5.0], [3.0, 5.0]], np.float32)
    train, evaluated = standardise_features(train_ND, train_ND + 1)
    assert train.tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert evaluated.tolist() == [[0.0, 0.0], [2.0, 0.0]]


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_the_linear_probe_is_scikit_learns_logistic_regression_class_by_class(l2):
    """One L-BFGS over all classes at once, for speed, must find what one-versus-rest finds."""
    rng = np.random.default_rng(0)
    train_ND, eval_ND = (rng.standard_normal((count, 6)).astype(np.float32) for count in (80, 20))
    labels_NC = (train_ND[:, :3] + rng.standard_normal((80, 3)) > 0.3).astype(np.float32)
    scores_NC = linear_probe_scores_NC(
        torch.from_numpy(train_ND), labels_NC, torch.from_numpy(eval_ND), l2=l2
    )
    for index in range(3):
        reference = LogisticRegression(C=1 / (l2 * 80), max_iter=1000, tol=1e-8).fit(
            train_ND, labels_NC[:, index]
        )
        np.testing.assert_allclose(scores_NC[:, index], reference.decision_function(eval_ND), atol=2e-2)


@pytest.mark.parametrize("single", [False, True])
def test_a_class_without_a_train_clip_scores_lowest_everywhere(single):
    """It must neither break the probe nor be ranked by accident, nor be said."""
    rng = np.random.default_rng(0)
    train_ND = torch.from_numpy(rng.standard_normal((20, 3)).astype(np.float32))
    first_N = (np.arange(20) % 2).astype(np.float32)
    labels_NC = np.stack([first_N, np.zeros(20), 1 - first_N], axis=1).astype(np.float32)
    scores_NC = linear_probe_scores_NC(train_ND, labels_NC, train_ND, l2=0.1, single=single)
    assert scores_NC[:, 1].tolist() == [scores_NC.min()] * 20


def test_of_single_labels_the_linear_probe_is_scikit_learns_multinomial_regression():
    """One regression over all classes: its weights are free up to what all classes share."""
    rng = np.random.default_rng(0)
    train_ND, eval_ND = (rng.standard_normal((count, 6)).astype(np.float32) for count in (90, 30))
    class_N = (train_ND[:, :3] + rng.standard_normal((90, 3))).argmax(1)
    labels_NC = np.eye(3, dtype=np.float32)[class_N]
    train, measured = torch.from_numpy(train_ND), torch.from_numpy(eval_ND)
    scores_NC = linear_probe_scores_NC(train, labels_NC, measured, l2=1e-2, single=True)
    reference = LogisticRegression(C=1 / (1e-2 * 90), max_iter=1000, tol=1e-8).fit(train_ND, class_N)
    expected_NC = reference.decision_function(eval_ND)
    centred_NC = scores_NC - scores_NC.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(centred_NC, expected_NC - expected_NC.mean(axis=1, keepdims=True), atol=2e-2)


@pytest.mark.parametrize("single", [False, True])
def test_with_more_features_than_clips_the_probe_is_the_same(single):
    """Frequency pooling has thousands of features: what lies off the clips' span is never touched."""
    rng = np.random.default_rng(0)
    train_ND, eval_ND = (rng.standard_normal((count, 70)).astype(np.float32) for count in (40, 20))
    class_N = train_ND[:, :3].argmax(1)
    labels_NC = np.eye(3, dtype=np.float32)[class_N]
    train, measured = torch.from_numpy(train_ND), torch.from_numpy(eval_ND)
    scores_NC = linear_probe_scores_NC(train, labels_NC, measured, l2=0.1, single=single)
    if single:
        reference = LogisticRegression(C=1 / (0.1 * 40), max_iter=1000, tol=1e-8).fit(train_ND, class_N)
        expected_NC = reference.decision_function(eval_ND)
        scores_NC = scores_NC - scores_NC.mean(axis=1, keepdims=True)
    else:
        fits = [
            LogisticRegression(C=1 / (0.1 * 40), tol=1e-8).fit(train_ND, labels_N) for labels_N in labels_NC.T
        ]
        expected_NC = np.stack([fit.decision_function(eval_ND) for fit in fits], axis=1)
    np.testing.assert_allclose(scores_NC, expected_NC, atol=2e-2)


def test_noise_is_penalised_more_than_features_that_tell():
    """The penalty is chosen on held-out train clips, so it follows the features not how many they are."""
    rng = np.random.default_rng(0)
    labels_NC = (rng.random((200, 3)) < 0.5).astype(np.float32)
    noise_ND = rng.standard_normal((200, 60)).astype(np.float32)
    mixed_ND = noise_ND + np.pad(0.8 * labels_NC, ((0, 0), (0, 57)))
    telling_ND = noise_ND[:, :4] + np.pad(2 * labels_NC, ((0, 0), (0, 1)))
    told = [torch.from_numpy(rows_ND) for rows_ND in (mixed_ND, telling_ND)]
    mixed, telling = (choose_l2(f[:160], labels_NC[:160], f[160:], labels_NC[160:]) for f in told)
    assert mixed > telling


def test_neighbours_vote_by_direction_not_by_length():
    """Cosine along the features: normalised along the clips, near and far would mix."""
    train_ND = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 1.0], [0.1, 5.0]])
    labels_NC = np.array([[1, 0], [1, 1], [0, 1], [0, 0]], np.float32)
    scores_NC = knn_scores_NC(train_ND, labels_NC, torch.tensor([[0.01, 0.0], [0.0, 70.0]]), neighbours=2)
    assert scores_NC.tolist() == [[1.0, 0.5], [0.0, 0.5]]


def test_every_features_probe_and_label_set_is_scored_and_kept(evaluation, run, store):
    """The table, the value and the file say the same; labels are measured on themselves."""
    names = {(s.features, s.probe, s.label_set) for s in evaluation.scores}
    kinds = [(f, p) for f in (TRAINED, RANDOM, STATISTICS) for p in ("linear", "knn", "attentive")]
    kinds.remove((STATISTICS, "attentive"))  # they are no tokens
    assert names == {(f, p, s) for f, p in kinds for s in store.label_sets}
    assert store.label_sets == ("raw", "unambiguous")
    kept = Evaluation.read_json(run.path / "evaluation.json")
    assert (kept.scores, kept.classes) == (evaluation.scores, evaluation.classes)
    assert kept.protocol == json.loads(json.dumps(evaluation.protocol))
    for score in evaluation.scores:
        told = score.metrics["map"]
        assert f"{told.value:5.3f} [{told.low:5.3f} {told.high:5.3f}]" in evaluation.table()
        assert told.low <= told.value <= told.high
        assert score.classes + score.skipped == len(store.classes.mids)
        assert np.mean([p for p in score.per_class_ap if p is not None]) == pytest.approx(score.map, abs=1e-5)
    assert max(len(line) for line in evaluation.table().splitlines()) <= 80


def test_clips_without_a_label_neither_train_nor_measure(evaluation, store):
    """No label is no statement: fine-tuning leaves them out, and so must what it is compared with."""
    rows_N = store.good_rows(["eval"])
    labelled = int(store.labels_BC(rows_N).any(axis=1).sum())
    told = evaluation.protocol
    assert (told["eval_clips"], told["left_out"]) == (labelled, len(rows_N) - labelled)
    train_N = store.good_rows(["a_train"])
    assert told["probes"]["train_clips"] == int(store.labels_BC(train_N).any(axis=1).sum()) < len(train_N)


def test_a_store_without_labels_is_refused(store):
    """There is nothing to learn from it, or to measure."""
    silent = SimpleNamespace(
        location="some.zarr", labels_BC=lambda rows_N, label_set: np.zeros((len(rows_N), 3))
    )
    with pytest.raises(RunError, match=r"some.zarr: no clip to train on has a label"):
        ProbeSplits.from_store(store, 0, 100).drop_unlabelled(silent)


def test_propagated_labels_have_more_classes_to_rank_than_raw_ones(evaluation):
    """Each label set brings its own eval positives, and so its own chance level."""
    raw, propagated = (evaluation.of(STATISTICS, "knn", name) for name in ("raw", "unambiguous"))
    assert propagated.classes > raw.classes
    assert 0 < raw.chance < 1


def test_evaluating_twice_gives_the_same_numbers(store_path, run, evaluation):
    """A figure that moves by itself cannot be compared."""
    assert evaluate_run(store_path, run.path, device="cpu").scores == evaluation.scores


def test_probes_learn_from_train_clips_only_and_from_no_more_than_asked(store):
    """The eval split is measured whole; a cap draws the same rows every time."""
    train_N, eval_N = probe_rows(store, 0, 10)
    assert len(train_N) == 10
    assert np.array_equal(eval_N, store.good_rows(["eval"]))
    assert not set(train_N) & set(eval_N)
    assert np.array_equal(train_N, probe_rows(store, 0, 10)[0])
    assert not np.array_equal(train_N, probe_rows(store, 1, 10)[0])


def test_a_run_is_not_evaluated_on_another_kind_of_features(store_path, tmp_path, run):
    """A network fed with other mels answers, and answers wrongly."""
    told = json.loads((run.path / "recipe.json").read_text())
    told["identity"]["mel"] = preset_mel_spec("audio-jepa").to_json()
    (tmp_path / "recipe.json").write_text(json.dumps(told))
    with pytest.raises(RunError, match=r"holds mel spec a-jepa .* was trained on audio-jepa"):
        evaluate_run(store_path, tmp_path)


def test_a_run_without_a_checkpoint_cannot_be_evaluated(store_path, tmp_path, run):
    """Said before the store is read through, in one line."""
    (tmp_path / "recipe.json").write_text((run.path / "recipe.json").read_text())
    with pytest.raises(RunError, match="holds no checkpoint yet"):
        evaluate_run(store_path, tmp_path)


def test_the_random_encoder_is_the_run_before_its_first_step(run):
    """The comparison is with what training started from: same seed, same architecture."""
    recipe, checkpoint = recipe_from_json(run.recipe), run.load("target")
    compared = compared_encoders(TrainedRun.open(run), torch.device("cpu"))
    start = Jepa(recipe.model, seed=recipe.seed).encoder.state_dict()
    assert all(torch.equal(value, start[name]) for name, value in compared[RANDOM].state_dict().items())
    trained = compared[TRAINED].state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in checkpoint.parts["target"].items())
    assert not torch.equal(trained["embed.weight"], start["embed.weight"])
    assert compared[STATISTICS] is None


def test_with_band_norm_the_random_encoder_hears_as_the_trained_one(store, tmp_path):
    """Both standardise bands as the store's clips were: the comparison is of what was learnt."""
    made = tiny().with_counts(steps=1)
    encoder = replace(made.model.encoder, band_norm=True)
    made = replace(made, model=replace(made.model, encoder=encoder))
    run = pretrain(store, made, tmp_path / "run", loader="plain")
    compared = compared_encoders(TrainedRun.open(run), torch.device("cpu"))
    mean_F, std_F = compared[TRAINED].bands_2F
    assert torch.equal(compared[RANDOM].bands_2F, compared[TRAINED].bands_2F)
    rows_N = store.good_rows(["a_train"])
    audio = [store.read(np.array([row]))[0, : store.n_frames_N[row]] for row in rows_N]
    values_NF = (np.concatenate(audio).astype(np.float64) - run.identity["mean"]) / run.identity["std"]
    np.testing.assert_allclose(mean_F, values_NF.mean(0), atol=1e-3)
    np.testing.assert_allclose(std_F, values_NF.std(0), rtol=1e-3)
