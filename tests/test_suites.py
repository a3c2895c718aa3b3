"""HEAR and X-ARES: every check of their own validators, and what these do not check."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from sounds import babble
from tiny import tiny

from ajepa import hear
from ajepa.export import export
from ajepa.trained import Trained
from ajepa.vit import Encoder
from ajepa.xares_encoder import MODEL, AjepaEncoder
from pipeline.errors import RunError
from pipeline.melspec import A_JEPA, A_JEPA_16K, AUDIO_JEPA


@pytest.fixture(scope="module", params=[A_JEPA, A_JEPA_16K, AUDIO_JEPA], ids=lambda spec: spec.name)
def place(request, tmp_path_factory):
    """An exported encoder of each front end, at its first step."""
    spec = tiny().model.encoder
    weights = Encoder(spec, seed=1).state_dict()
    model = Trained(spec=spec, mel=request.param, mean=-7.0, std=4.0, weights=weights, origin={})
    folder = tmp_path_factory.mktemp("models") / "model"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ajepa.export.trained", lambda place: model)
        export("unused", folder)
    return folder


@pytest.fixture(scope="module")
def model(place) -> hear.HearModel:
    return hear.load_model(str(place))


def noise(batch: int, seconds: float, rate_hz: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, int(seconds * rate_hz), generator=generator) * 2 - 1


def test_hear_finds_a_torch_module_with_its_attributes(model):
    """A rate that the API allows, sizes that are plain whole numbers."""
    assert isinstance(model, torch.nn.Module)
    assert model.sample_rate in (16_000, 22_050, 44_100, 48_000)
    assert type(model.scene_embedding_size) is type(model.timestamp_embedding_size) is int


@pytest.mark.parametrize("seconds", [1.07, 1.98, 2.74, 4.0])
def test_hears_timestamps_are_even_and_inside_the_sound(model, seconds):
    """float32, one time a vector, centred in what the vector tells, in ms, never past the end, at most 50 ms apart."""
    told_BTD, times_ms_BT = hear.get_timestamp_embeddings(noise(3, seconds, model.sample_rate), model)
    assert told_BTD.dtype == torch.float32
    assert told_BTD.shape == (3, times_ms_BT.shape[1], model.timestamp_embedding_size)
    gaps_ms = times_ms_BT.diff()
    assert (gaps_ms - gaps_ms.mean()).abs().max() < 1e-3
    assert 0 < gaps_ms.mean() <= 50
    assert (times_ms_BT[0] == times_ms_BT[1]).all()
    assert times_ms_BT.min() > 0
    assert seconds * 1e3 - gaps_ms.mean() < times_ms_BT.max() <= seconds * 1e3


@pytest.mark.parametrize("seconds", [0.6, 3.74])
def test_hears_scenes_are_a_vector_a_sound_whatever_else_is_in_the_batch(model, seconds):
    """float32, as many as sounds, as wide as told; alone as in company."""
    audio_BS = noise(4, seconds, model.sample_rate)
    told_BD = hear.get_scene_embeddings(audio_BS, model)
    assert told_BD.dtype == torch.float32
    assert told_BD.shape == (4, model.scene_embedding_size)
    alone_BD = hear.get_scene_embeddings(audio_BS[1:2], model)
    torch.testing.assert_close(alone_BD, told_BD[1:2], atol=1e-4, rtol=1e-4)


def test_a_click_is_found_at_its_time(model):
    """Timestamps mean something: the vectors that differ from silence's lie around the click."""
    silence = torch.zeros(1, 3 * model.sample_rate)
    click = silence.clone()
    click[:, int(1.5 * model.sample_rate)] = 0.9
    quiet_BTD, times_ms_BT = hear.get_timestamp_embeddings(silence, model)
    loud_BTD, _ = hear.get_timestamp_embeddings(click, model)
    loudest = (loud_BTD - quiet_BTD).norm(dim=-1)[0].argmax()
    assert abs(times_ms_BT[0, loudest] - 1_500) < model.embedder.column_ms


def test_hears_own_validator_agrees(place, monkeypatch, capsys):
    """The package hearvalidator, if it is there; TensorFlow, of which it asks one class, need not be."""
    pytest.importorskip("hearvalidator", reason="hearvalidator is not installed")
    tensorflow = ModuleType("tensorflow")
    tensorflow.Module = type("Module", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    from hearvalidator.validate import ValidateModel

    ValidateModel("ajepa.hear", str(place), device="cpu")()
    assert "Received embedding of shape" in capsys.readouterr().out


@pytest.fixture(scope="module")
def encoder(place) -> AjepaEncoder:
    return AjepaEncoder(str(place))


def test_xares_finds_an_encoder_with_its_attributes(encoder):
    """What `check_audio_encoder` asks for; the hop says how many vectors come."""
    assert type(encoder).__name__.endswith("Encoder")
    assert isinstance(encoder, torch.nn.Module)
    told_BTD = encoder(torch.randn(2, 50_000) * 0.1)
    assert told_BTD.shape[::2] == (2, encoder.output_dim)
    seconds = 50_000 / encoder.sampling_rate
    assert abs(told_BTD.shape[1] - seconds * 1e3 / encoder.hop_size_in_ms) <= 1


def test_xares_mean_over_a_padded_batch_is_that_of_the_sound(encoder):
    """Its batches are filled up with zeros, and it means over all frames: a neighbour's length must not matter."""
    rate_hz = encoder.sampling_rate
    short_S, long_S = (torch.from_numpy(babble(seconds, rate_hz)) for seconds in (1.1, 4.0))
    padded_S = torch.nn.functional.pad(short_S, (0, len(long_S) - len(short_S)))
    alone_TD = encoder(short_S[None])[0]
    together_BTD = encoder(torch.stack([padded_S, long_S]))
    assert together_BTD.shape[1] == encoder(long_S[None]).shape[1]
    torch.testing.assert_close(together_BTD[0].mean(0), alone_TD.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together_BTD[0, : len(alone_TD)], alone_TD, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together_BTD[1], encoder(long_S[None])[0], atol=1e-4, rtol=1e-4)


def test_xares_may_ask_for_minutes_and_for_silence(encoder):
    """Long sounds go through in windows; a silent one has vectors, too, and a very short one has one."""
    long_S = np.tile(babble(5.0, encoder.sampling_rate), 12)
    told_BTD = encoder(torch.from_numpy(long_S)[None])
    assert abs(told_BTD.shape[1] - 60_000 / encoder.hop_size_in_ms) <= 1
    assert told_BTD.isfinite().all()
    assert encoder(torch.zeros(2, encoder.sampling_rate)).isfinite().all()
    assert encoder(torch.zeros(1, encoder.shortest_samples)).shape[1] == 1


def test_xares_makes_its_encoder_without_arguments(place, monkeypatch):
    """Where the model lies is told by the environment, or the mistake by one line."""
    monkeypatch.setenv(MODEL, str(place))
    assert AjepaEncoder().output_dim == 32
    monkeypatch.delenv(MODEL)
    with pytest.raises(RunError, match="AJEPA_MODEL is not set"):
        AjepaEncoder()


def test_xares_own_checker_agrees(place, monkeypatch):
    """The package xares, if it is there; it takes the one class of the file whose name ends with Encoder."""
    checker = pytest.importorskip("xares.audio_encoder_checker", reason="xares is not installed")
    from xares.utils import attr_from_py_path

    monkeypatch.setenv(MODEL, str(place))
    found = attr_from_py_path("ajepa/xares_encoder.py", endswith="Encoder")
    assert checker.check_audio_encoder(found())
