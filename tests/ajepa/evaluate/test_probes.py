"""Probes: scikit-learn's regressions with the right penalty; neighbours by direction; attention to valid tokens."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from ajepa.evaluate.features import ClipFeatures
from ajepa.evaluate.probes import (
    AttentiveProbe,
    AttentiveScores,
    attentive_steps,
    choose_l2,
    knn_scores_NC,
    linear_probe_scores_NC,
    standardise_features,
    token_statistics,
    train_attentive_probe,
)
from pipeline.errors import RunError

CPU = torch.device("cpu")


def test_a_constant_feature_becomes_zero_instead_of_nan():
    """One dead dimension must not make every score nan."""
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
    np.testing.assert_allclose(centred_NC, expected_NC - expected_NC.mean(axis=1, keepdims=True), atol=2e-2)


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
    np.testing.assert_allclose(scores_NC, expected_NC, atol=2e-2)


def test_noise_is_penalised_more_than_informative_features():
    """Held-out train clips select the penalty, so it depends on how informative features are, not on their number."""
    rng = np.random.default_rng(0)
    labels_NC = (rng.random((200, 3)) < 0.5).astype(np.float32)
    noise_ND = rng.standard_normal((200, 60)).astype(np.float32)
    mixed_ND = noise_ND + np.pad(0.8 * labels_NC, ((0, 0), (0, 57)))
    telling_ND = noise_ND[:, :4] + np.pad(2 * labels_NC, ((0, 0), (0, 1)))
    features = [torch.from_numpy(rows_ND) for rows_ND in (mixed_ND, telling_ND)]
    mixed_l2, telling_l2 = (choose_l2(f[:160], labels_NC[:160], f[160:], labels_NC[160:]) for f in features)
    assert mixed_l2 > telling_l2


def test_neighbours_vote_by_direction_not_by_length():
    """The cosine is taken over features; normalised over clips, near and far clips would mix."""
    train_ND = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 1.0], [0.1, 5.0]])
    labels_NC = np.array([[1, 0], [1, 1], [0, 1], [0, 0]], np.float32)
    scores_NC = knn_scores_NC(train_ND, labels_NC, torch.tensor([[0.01, 0.0], [0.0, 70.0]]), neighbours=2)
    assert scores_NC.tolist() == [[1.0, 0.5], [0.0, 0.5]]


def needles(rng, clips: int, *, single: bool = False, valid: int = 10) -> tuple[ClipFeatures, np.ndarray]:
    """Clips of ten noise tokens of 8 features; a single token shows each class that the clip has."""
    classes = 3
    labels_NC = (rng.random((clips, classes)) < 0.4).astype(np.float32)
    if single:
        labels_NC = np.eye(classes, dtype=np.float32)[rng.integers(0, classes, clips)]
    tokens_NMD = rng.standard_normal((clips, 10, 8))
    for index in range(classes):
        place_N = rng.integers(0, valid, clips)
        tokens_NMD[np.arange(clips), place_N, index] += 4 * labels_NC[:, index]
    valid_NM = np.broadcast_to(np.arange(10) < valid, (clips, 10))
    vectors_ND = tokens_NMD[:, :valid].mean(axis=1).astype(np.float32)
    return ClipFeatures(
        vectors_ND=vectors_ND, tokens_NMD=tokens_NMD.astype(np.float16), valid_NM=valid_NM
    ), labels_NC


def trained_scores(
    *, single: bool = False, loud_padding: bool = False
) -> tuple[AttentiveScores, np.ndarray, ClipFeatures]:
    """The scores of a probe trained on needles, the labels of the clips that it scored, and their features."""
    rng = np.random.default_rng(0)
    parts = [needles(rng, clips, single=single, valid=6) for clips in (400, 100, 200)]
    if loud_padding:
        for features, _ in parts:
            features.tokens_NMD[:, 6:] = 60_000
    (train, train_NC), (val, val_NC), (evaluated, true_NC) = parts
    scores = train_attentive_probe(train, train_NC, val, val_NC, evaluated, seed=0, single=single, device=CPU)
    return scores, true_NC, evaluated


def test_the_attentive_probe_finds_the_informative_token_that_is_lost_in_the_mean():
    """One of several tokens is informative, and a query learns to attend to such tokens."""
    scores, true_NC, evaluated = trained_scores()
    mean = average_precision_score(true_NC, evaluated.vectors_ND[:, :3], average="macro")
    assert average_precision_score(true_NC, scores.scores_NC, average="macro") > mean + 0.02


def test_of_single_labels_the_attentive_probe_predicts_one_class():
    """It is trained with one cross-entropy over the classes; accuracy selects the number of steps."""
    scores, true_NC, _ = trained_scores(single=True)
    assert (scores.scores_NC.argmax(1) == true_NC.argmax(1)).mean() > 0.85


def test_padding_tokens_get_no_attention():
    """Their content does not matter: the scores stay the same to the bit."""
    assert np.array_equal(trained_scores()[0].scores_NC, trained_scores(loud_padding=True)[0].scores_NC)


def test_the_attentive_probe_repeats_itself():
    """A number that changes from run to run cannot be compared."""
    first, second = trained_scores()[0], trained_scores()[0]
    assert np.array_equal(first.scores_NC, second.scores_NC)
    assert first.steps == second.steps
    assert first.steps % (attentive_steps(400) // 12) == 0


def test_the_attentive_probe_starts_as_a_linear_probe_on_the_mean_of_the_valid_tokens():
    """Queries of zeros attend to all valid tokens equally."""
    rng = np.random.default_rng(0)
    tokens_BMD = torch.from_numpy(rng.standard_normal((2, 5, 8)).astype(np.float32))
    valid_BM = torch.arange(5) < torch.tensor([[5], [2]])
    probe = AttentiveProbe(8, 3)
    with torch.no_grad():
        probe.weight_DC.copy_(torch.eye(8)[:, :3])
        expected = torch.stack([tokens_BMD[0].mean(0), tokens_BMD[1, :2].mean(0)])[:, :3]
        torch.testing.assert_close(probe(tokens_BMD, valid_BM), expected)


def test_tokens_are_standardised_over_the_valid_ones():
    """Mean and deviation of the train clips; a constant feature becomes 0."""
    features, _ = needles(np.random.default_rng(0), 50, valid=4)
    features.tokens_NMD[:, :, 7] = 3
    features.tokens_NMD[:, 4:] = 1e4
    mean_D, scale_D = token_statistics(features)
    valid_ND = features.tokens_NMD[:, :4].reshape(-1, 8).astype(np.float64)
    np.testing.assert_allclose(mean_D, valid_ND.mean(0), atol=1e-5)
    np.testing.assert_allclose(scale_D[:7], 1 / valid_ND.std(0)[:7], rtol=1e-5)
    assert scale_D[7] == 0


@pytest.mark.parametrize(("clips", "steps"), [(30, 144), (200, 300), (20_000, 600)])
def test_the_attentive_probe_is_trained_for_a_bounded_time(clips, steps):
    """Few clips are not repeated a thousand times, and of very many clips not all are used."""
    assert attentive_steps(clips) == steps


def test_features_without_tokens_are_refused():
    """Log-mel statistics have none."""
    none = ClipFeatures(vectors_ND=np.zeros((4, 8), np.float32))
    labels_NC = np.ones((4, 1), np.float32)
    with pytest.raises(RunError, match="needs tokens"):
        train_attentive_probe(none, labels_NC, none, labels_NC, none, seed=0, single=False, device=CPU)
