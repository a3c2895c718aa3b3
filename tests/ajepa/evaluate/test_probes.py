"""The attentive probe: it looks where the sound is, chooses on clips of its own, and repeats itself."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from ajepa.evaluate.features import ClipFeatures
from ajepa.evaluate.probes import AttentiveProbe, attentive_steps, token_statistics, train_attentive_probe
from pipeline.errors import RunError

CPU = torch.device("cpu")


def needles(rng, clips: int, *, single: bool = False, valid: int = 10) -> tuple[ClipFeatures, np.ndarray]:
    """Clips of ten tokens of noise, 8 features, of which one token alone tells each class that the clip has."""
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


def said(rng_seed: int = 0, *, single: bool = False, spoil: bool = False):
    rng = np.random.default_rng(rng_seed)
    parts = [needles(rng, clips, single=single, valid=6) for clips in (400, 100, 200)]
    if spoil:
        for found, _ in parts:
            found.tokens_NMD[:, 6:] = 60_000
    (train, train_NC), (val, val_NC), (measured, true_NC) = parts
    told = train_attentive_probe(train, train_NC, val, val_NC, measured, seed=0, single=single, device=CPU)
    return told, true_NC, measured


def test_it_finds_the_token_that_tells_where_the_mean_drowns_it():
    """What attention is for: one of six tokens is of use, and a query learns to look for its like."""
    told, true_NC, measured = said()
    mean = average_precision_score(true_NC, measured.vectors_ND[:, :3], average="macro")
    assert average_precision_score(true_NC, told.scores_NC, average="macro") > mean + 0.02


def test_of_single_labels_it_says_one_class():
    """Trained with one cross-entropy over the classes, chosen by accuracy."""
    told, true_NC, _ = said(single=True)
    assert (told.scores_NC.argmax(1) == true_NC.argmax(1)).mean() > 0.85


def test_tokens_that_hold_no_sound_are_never_looked_at():
    """Whatever they say: the scores stay the same to the bit."""
    assert np.array_equal(said()[0].scores_NC, said(spoil=True)[0].scores_NC)


def test_the_same_clips_give_the_same_scores():
    """A figure that moves by itself cannot be compared."""
    one, two = said()[0], said()[0]
    assert np.array_equal(one.scores_NC, two.scores_NC)
    assert one.steps == two.steps
    assert one.steps % (attentive_steps(400) // 12) == 0


def test_it_starts_as_a_linear_probe_on_the_mean_of_the_valid_tokens():
    """Queries of zeros look everywhere alike."""
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
    found, _ = needles(np.random.default_rng(0), 50, valid=4)
    found.tokens_NMD[:, :, 7] = 3
    found.tokens_NMD[:, 4:] = 1e4
    mean_D, scale_D = token_statistics(found)
    held_ND = found.tokens_NMD[:, :4].reshape(-1, 8).astype(np.float64)
    np.testing.assert_allclose(mean_D, held_ND.mean(0), atol=1e-5)
    np.testing.assert_allclose(scale_D[:7], 1 / held_ND.std(0)[:7], rtol=1e-5)
    assert scale_D[7] == 0


@pytest.mark.parametrize(("clips", "steps"), [(30, 144), (200, 300), (20_000, 600)])
def test_it_is_trained_for_a_bounded_time(clips, steps):
    """Few clips are not shown a thousand times, many not all."""
    assert attentive_steps(clips) == steps


def test_features_without_tokens_are_refused():
    """Log-mel statistics have none."""
    none = ClipFeatures(vectors_ND=np.zeros((4, 8), np.float32))
    labels_NC = np.ones((4, 1), np.float32)
    with pytest.raises(RunError, match="needs tokens"):
        train_attentive_probe(none, labels_NC, none, labels_NC, none, seed=0, single=False, device=CPU)
