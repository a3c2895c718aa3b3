"""Probes: neighbours by direction; attention to valid tokens."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from ajepa.evaluate.features import ClipFeatures
from ajepa.evaluate.probes import (
    AttentiveProbe,
    AttentiveScores,
    attentive_steps,
    knn_scores_NC,
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
