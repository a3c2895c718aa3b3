"""Frozen features: padding never reaches them, means are over valid tokens, baselines are as documented."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny

from ajepa.evaluate.features import RANDOM, STATISTICS, TRAINED, ClipViews, clip_vectors, compared_encoders
from ajepa.model.jepa import Jepa
from ajepa.pretrain.pretrain import pretrain
from ajepa.recipes.catalogue import recipe_from_json
from ajepa.training.run import Run
from ajepa.training.trained_run import TrainedRun
from pipeline.store.feature_store import LEAST_STD_SHARE


@pytest.fixture(scope="module")
def run(store_path, tmp_path_factory) -> Run:
    path = tmp_path_factory.mktemp("runs") / "run"
    return pretrain(store_path, tiny(), path, steps=2, device="cpu", say=lambda line: None)


class SomeClips:
    """The part of a store that `ClipViews` reads: clips of `frames` stored frames, of which `valid` are not padding."""

    def __init__(self, valid: list[int], *, past_the_end: float = 0.0, frames: int = 100) -> None:
        rng = np.random.default_rng(3)
        self.frames = frames
        self.mel_BTF = np.full((len(valid), frames, 128), past_the_end, np.float32)
        self.mel_BTF[:, :100] = rng.standard_normal((len(valid), 100, 128))
        self.n_frames_N = np.array(valid, np.int32)
        self.mel_BTF[np.arange(frames) >= self.n_frames_N[:, None]] = past_the_end

    def read(self, rows_B):
        return self.mel_BTF[rows_B].copy()

    def to_log_mel(self, stored):
        return stored


def vectors_of(clips: SomeClips, *, encoder=None, pooling="mean") -> np.ndarray:
    views = ClipViews(store=clips, frames=64, mean=0.0, std=1.0)
    return clip_vectors(views, np.arange(len(clips.n_frames_N)), encoder, pooling=pooling)


@pytest.fixture(scope="module")
def encoder():
    return Jepa(tiny().model, seed=1).target.eval()


@pytest.mark.parametrize("kind", ["encoder", "statistics"])
def test_frames_past_a_clips_end_never_reach_its_features(encoder, kind):
    """With padding in the mean, features would reveal the length of the clip."""
    used_encoder = encoder if kind == "encoder" else None
    valid = [100, 64, 63, 30, 1]
    quiet, loud = (
        vectors_of(SomeClips(valid, past_the_end=value), encoder=used_encoder) for value in (0.0, 9e3)
    )
    assert np.array_equal(quiet, loud)


def test_a_clips_features_are_the_mean_over_the_valid_tokens_of_all_its_views(encoder):
    """100 frames in views of 64: 4 columns of 8 tokens, then 3 columns that begin before frame 100."""
    clips = SomeClips([100])
    mel_TF = torch.from_numpy(clips.mel_BTF[0])
    last_TF = torch.cat([mel_TF[64:], mel_TF[-1:].expand(28, -1)])  # the last frame is repeated
    with torch.inference_mode():
        valid_BP = torch.arange(32)[None] < 24
        first_PD, last_PD = encoder(mel_TF[None, :64])[0], encoder(last_TF[None], valid_BP=valid_BP)[0][:24]
    expected_D = torch.cat([first_PD, last_PD]).mean(0)
    np.testing.assert_allclose(vectors_of(clips, encoder=encoder)[0], expected_D, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "moments"])
def test_the_length_at_which_a_store_keeps_its_clips_does_not_matter(encoder, pooling):
    """A short clip in a store of long ones is the same sound; it ends as if its last frame filled its patch."""
    valid = [100, 65, 30, 1]
    shorter, longer = (
        vectors_of(SomeClips(valid, frames=n), encoder=encoder, pooling=pooling) for n in (100, 333)
    )
    np.testing.assert_allclose(shorter, longer, rtol=1e-5, atol=1e-6)
    filled = SomeClips(valid)
    for mel_TF, frames in zip(filled.mel_BTF, valid, strict=True):
        mel_TF[frames:] = mel_TF[frames - 1]
    filled.n_frames_N = -(-filled.n_frames_N // 16) * 16
    filled.n_frames_N[0] = 100  # the store ends here
    np.testing.assert_allclose(
        vectors_of(filled, encoder=encoder, pooling=pooling), shorter, rtol=1e-5, atol=1e-6
    )


def test_statistics_are_mean_and_deviation_of_every_band_over_valid_frames():
    """A baseline that is weaker than documented would flatter the encoder."""
    clips = SomeClips([100, 37])
    expected = [np.concatenate([m.mean(0), m.std(0)]) for m in (clips.mel_BTF[0], clips.mel_BTF[1][:37])]
    np.testing.assert_allclose(vectors_of(clips), expected, rtol=1e-4, atol=1e-5)


def test_the_random_encoder_is_the_run_before_its_first_step(run):
    """The comparison is with what training started from: same seed, same architecture."""
    recipe = recipe_from_json(run.recipe)
    target = run.load_checkpoint("target").parts["target"]
    compared = compared_encoders(TrainedRun.open(run), torch.device("cpu"))
    start = Jepa(recipe.model, seed=recipe.seed).encoder.state_dict()
    assert all(torch.equal(value, start[name]) for name, value in compared[RANDOM].state_dict().items())
    trained = compared[TRAINED].state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in target.items())
    assert not torch.equal(trained["embed.weight"], start["embed.weight"])
    assert compared[STATISTICS] is None


def test_with_band_norm_the_random_encoder_standardises_as_the_trained_one(store, tmp_path):
    """Both standardise bands by the statistics of the run's store, so only the learnt weights differ."""
    recipe = tiny().with_counts(steps=1)
    encoder = replace(recipe.model.encoder, band_norm=True)
    recipe = replace(recipe, model=replace(recipe.model, encoder=encoder))
    run = pretrain(store, recipe, tmp_path / "run", loader="plain")
    compared = compared_encoders(TrainedRun.open(run), torch.device("cpu"))
    mean_F, std_F = compared[TRAINED].bands_2F
    assert torch.equal(compared[RANDOM].bands_2F, compared[TRAINED].bands_2F)
    rows_N = store.good_rows(["a_train"])
    clips = [store.read(np.array([row]))[0, : store.n_frames_N[row]] for row in rows_N]
    values_NF = (np.concatenate(clips).astype(np.float64) - run.identity.mean) / run.identity.std
    np.testing.assert_allclose(mean_F, values_NF.mean(0), atol=1e-3)
    expected_F = values_NF.std(0)
    np.testing.assert_allclose(std_F, np.maximum(expected_F, LEAST_STD_SHARE * expected_F.mean()), rtol=1e-3)
