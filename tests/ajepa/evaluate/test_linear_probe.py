"""The linear probe is scikit-learn's regression to its exact minimum, with the right penalty, in a few steps."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ajepa.evaluate import linear_probe
from ajepa.evaluate.linear_probe import (
    L2_GRID,
    LinearProbe,
    NewtonFit,
    PrincipalAxes,
    choose_l2,
    linear_probe_scores_NC,
)


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_the_linear_probe_is_scikit_learns_logistic_regression_class_by_class(l2):
    """All classes are fitted side by side, and must find what one-versus-rest finds."""
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
        np.testing.assert_allclose(scores_NC[:, index], reference.decision_function(eval_ND), atol=2e-3)


@pytest.mark.parametrize("single", [False, True])
def test_a_class_without_a_train_clip_scores_lowest_everywhere(single):
    """It must neither break the probe nor be ranked or predicted by accident."""
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
    train, evaluated = torch.from_numpy(train_ND), torch.from_numpy(eval_ND)
    scores_NC = linear_probe_scores_NC(train, labels_NC, evaluated, l2=1e-2, single=True)
    reference = LogisticRegression(C=1 / (1e-2 * 90), max_iter=1000, tol=1e-8).fit(train_ND, class_N)
    expected_NC = reference.decision_function(eval_ND)
    centred_NC = scores_NC - scores_NC.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(centred_NC, expected_NC - expected_NC.mean(axis=1, keepdims=True), atol=2e-3)


@pytest.mark.parametrize("single", [False, True])
def test_with_more_features_than_clips_the_probe_is_the_same(single):
    """Frequency pooling has thousands of features; the weights stay in the span of the train clips."""
    rng = np.random.default_rng(0)
    train_ND, eval_ND = (rng.standard_normal((count, 70)).astype(np.float32) for count in (40, 20))
    class_N = train_ND[:, :3].argmax(1)
    labels_NC = np.eye(3, dtype=np.float32)[class_N]
    train, evaluated = torch.from_numpy(train_ND), torch.from_numpy(eval_ND)
    scores_NC = linear_probe_scores_NC(train, labels_NC, evaluated, l2=0.1, single=single)
    if single:
        reference = LogisticRegression(C=1 / (0.1 * 40), max_iter=1000, tol=1e-8).fit(train_ND, class_N)
        expected_NC = reference.decision_function(eval_ND)
        scores_NC = scores_NC - scores_NC.mean(axis=1, keepdims=True)
    else:
        fits = [
            LogisticRegression(C=1 / (0.1 * 40), tol=1e-8).fit(train_ND, labels_N) for labels_N in labels_NC.T
        ]
        expected_NC = np.stack([fit.decision_function(eval_ND) for fit in fits], axis=1)
    np.testing.assert_allclose(scores_NC, expected_NC, atol=2e-3)


def test_noise_is_penalised_more_than_informative_features():
    """Held-out train clips select the penalty, so it depends on how informative features are, not on their number."""
    rng = np.random.default_rng(0)
    labels_NC = (rng.random((200, 3)) < 0.5).astype(np.float32)
    noise_ND = rng.standard_normal((200, 60)).astype(np.float32)
    mixed_ND = noise_ND + np.pad(0.8 * labels_NC, ((0, 0), (0, 57)))
    telling_ND = noise_ND[:, :4] + np.pad(2 * labels_NC, ((0, 0), (0, 1)))
    features = [torch.from_numpy(rows_ND) for rows_ND in (mixed_ND, telling_ND)]
    mixed_l2, telling_l2 = (
        choose_l2(LinearProbe.from_train_clips(f[:160], labels_NC[:160]), f[160:], labels_NC[160:])
        for f in features
    )
    assert mixed_l2 > telling_l2


def correlated_clips(clips: int = 240, width: int = 48, classes: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Features like an encoder's, most of their variance in a few directions, and classes of which some are rare."""
    rng = np.random.default_rng(0)
    latent_ND = rng.standard_normal((clips, width))
    mixing_DD = np.linalg.qr(rng.standard_normal((width, width)))[0]
    features_ND = latent_ND / (1 + np.arange(width)) @ mixing_DD
    features_ND = (features_ND - features_ND.mean(0)) / features_ND.std(0)
    logits_NC = latent_ND[:, :8] @ rng.standard_normal((8, classes)) + rng.standard_normal((clips, classes))
    share_C = 0.3 / (1 + np.arange(classes))
    threshold_C = [
        np.quantile(logits_N, 1 - share) for logits_N, share in zip(logits_NC.T, share_C, strict=True)
    ]
    return features_ND.astype(np.float32), (logits_NC > threshold_C).astype(np.float32)


@pytest.mark.parametrize("l2", L2_GRID)
def test_every_penalty_is_fitted_to_the_minimum(l2):
    """L-BFGS over all classes at once stopped short at small penalties: scores were off by .3, and mAP by .005."""
    features_ND, labels_NC = correlated_clips()
    train_ND, eval_ND = torch.from_numpy(features_ND[:180]), torch.from_numpy(features_ND[180:])
    scores_NC = linear_probe_scores_NC(train_ND, labels_NC[:180], eval_ND, l2=l2)
    expected_NC = scores_NC.copy()
    for index in np.flatnonzero(labels_NC[:180].any(axis=0)):
        reference = LogisticRegression(C=1 / (l2 * 180), solver="newton-cholesky", tol=1e-10)
        reference.fit(features_ND[:180].astype(np.float64), labels_NC[:180, index])
        expected_NC[:, index] = reference.decision_function(features_ND[180:])
    np.testing.assert_allclose(scores_NC, expected_NC, atol=2e-3)
    value, expected = (
        linear_probe.selection_metric(labels_NC[180:], scores, single=False)
        for scores in (scores_NC, expected_NC)
    )
    assert value == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("single", [False, True])
def test_a_fit_that_starts_from_another_penaltys_ends_where_any_does(single):
    """Warm starts save steps; a result that depended on them would depend on the grid."""
    features_ND, labels_NC = correlated_clips()
    if single:
        labels_NC = np.eye(12, dtype=np.float32)[labels_NC.argmax(1)]
    probe = LinearProbe.from_train_clips(torch.from_numpy(features_ND), labels_NC, single=single)
    for l2, weights in zip(L2_GRID, probe.fit_penalties(L2_GRID), strict=True):
        cold = probe.fit(l2)
        scores = [probe.inputs_NR @ each.weight_RC + each.bias_C for each in (weights, cold)]
        centred = [x_NC - x_NC.mean(1, keepdim=True) if single else x_NC for x_NC in scores]
        torch.testing.assert_close(*centred, atol=0.03, rtol=0)


def test_all_penalties_need_a_few_hundred_products_with_the_features(monkeypatch):
    """Products are the cost: 20,000 clips x 527 classes took tens of minutes. A class that has converged makes none."""
    columns = []
    product = NewtonFit.hessian_product

    def counted(fit, slope_NC, *others):
        columns.append(slope_NC.shape[1])
        return product(fit, slope_NC, *others)

    monkeypatch.setattr(NewtonFit, "hessian_product", counted)
    features_ND, labels_NC = correlated_clips()
    probe = LinearProbe.from_train_clips(torch.from_numpy(features_ND), labels_NC)
    list(probe.fit_penalties(L2_GRID))
    assert sum(columns) / len(probe.present_C) < 300
    assert min(columns) < len(probe.present_C)


def test_the_number_of_threads_changes_no_score():
    """150 clips of 2,048 features, where mAP once varied by .006; rounding is all that is left."""
    rng = np.random.default_rng(0)
    train_ND = torch.from_numpy(rng.standard_normal((150, 2_048)).astype(np.float32))
    labels_NC = (rng.random((150, 6)) < 0.2).astype(np.float32)
    threads = torch.get_num_threads()
    scores = []
    for count in (1, 2):
        torch.set_num_threads(count)
        scores.append(linear_probe_scores_NC(train_ND, labels_NC, train_ND[:50], l2=1e-4))
    torch.set_num_threads(threads)
    np.testing.assert_allclose(*scores, atol=2e-3)


@pytest.mark.parametrize("single", [False, True])
def test_axes_of_a_part_of_many_clips_change_no_score(monkeypatch, single):
    """12,288 features of 20,000 clips are not decomposed: known axes speed the fit up, and do not decide it."""
    features_ND, labels_NC = correlated_clips()
    if single:
        labels_NC = np.eye(12, dtype=np.float32)[labels_NC.argmax(1)]
    train_ND = torch.from_numpy(features_ND)
    whole_NC = linear_probe_scores_NC(train_ND, labels_NC, train_ND, l2=1e-3, single=single)
    monkeypatch.setattr(linear_probe, "MAX_AXES", 40)
    monkeypatch.setattr(linear_probe, "CLIPS_FOR_AXES", 20)
    axes = PrincipalAxes.from_features(train_ND)
    assert (len(axes.variance_R), axes.are_complete) == (20, False)
    part_NC = linear_probe_scores_NC(train_ND, labels_NC, train_ND, l2=1e-3, single=single)
    np.testing.assert_allclose(part_NC - part_NC.mean(), whole_NC - whole_NC.mean(), atol=0.02)
