"""HEAR and X-ARES: every check of their own validators, and checks that these lack."""

import io
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch
from sounds import babble
from tiny import tiny
from xares_task import write_task

import ajepa
from ajepa import hear
from ajepa.embed.export import export_encoder
from ajepa.embed.pretrained import PretrainedEncoder
from ajepa.model.vit import Encoder
from ajepa.xares_encoder import MODEL, AjepaEncoder
from pipeline.audio.mel_spec import A_JEPA, A_JEPA_16K, AUDIO_JEPA
from pipeline.errors import RunError


@pytest.fixture(scope="module", params=[A_JEPA, A_JEPA_16K, AUDIO_JEPA], ids=lambda spec: spec.name)
def exported(request, tmp_path_factory):
    """The folder of an exported, untrained encoder of each front end."""
    spec = tiny().model.encoder
    weights = Encoder(spec, seed=1).state_dict()
    pretrained = PretrainedEncoder(
        spec=spec, mel=request.param, mean=-7.0, std=4.0, weights=weights, origin={}
    )
    folder = tmp_path_factory.mktemp("models") / "model"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ajepa.embed.export.load_pretrained", lambda location, at: pretrained)
        export_encoder("unused", folder)
    return folder


@pytest.fixture(scope="module")
def model(exported) -> hear.HearModel:
    return hear.load_model(str(exported))


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
    """float32, one time a vector, the centre of its column, in ms, never past the end, at most 50 ms apart."""
    frames_BTD, times_ms_BT = hear.get_timestamp_embeddings(noise(3, seconds, model.sample_rate), model)
    assert frames_BTD.dtype == torch.float32
    assert frames_BTD.shape == (3, times_ms_BT.shape[1], model.timestamp_embedding_size)
    gaps_ms = times_ms_BT.diff()
    assert (gaps_ms - gaps_ms.mean()).abs().max() < 1e-3
    assert 0 < gaps_ms.mean() <= 50
    assert (times_ms_BT[0] == times_ms_BT[1]).all()
    assert times_ms_BT.min() > 0
    assert seconds * 1e3 - gaps_ms.mean() < times_ms_BT.max() <= seconds * 1e3


@pytest.mark.parametrize("seconds", [0.6, 3.74])
def test_hears_scenes_are_a_vector_a_sound_whatever_else_is_in_the_batch(model, seconds):
    """float32, as many as sounds, as wide as the model says; alone as in company."""
    audio_BS = noise(4, seconds, model.sample_rate)
    scenes_BD = hear.get_scene_embeddings(audio_BS, model)
    assert scenes_BD.dtype == torch.float32
    assert scenes_BD.shape == (4, model.scene_embedding_size)
    alone_BD = hear.get_scene_embeddings(audio_BS[1:2], model)
    torch.testing.assert_close(alone_BD, scenes_BD[1:2], atol=1e-4, rtol=1e-4)


def test_hear_takes_pooling_and_layer_as_options(exported):
    """`--model-options` of heareval; scenes have the deviation over time, timestamps have none."""
    model = hear.load_model(str(exported), pooling="moments", layer="concat-all")
    audio_BS = noise(2, 1.3, model.sample_rate)
    scenes_BD = hear.get_scene_embeddings(audio_BS, model)
    frames_BTD, _ = hear.get_timestamp_embeddings(audio_BS, model)
    assert scenes_BD.shape[1] == model.scene_embedding_size == 2 * model.timestamp_embedding_size
    assert frames_BTD.shape[2] == model.timestamp_embedding_size == 8 * 2 * 32


def test_a_click_is_found_at_its_time(model):
    """Timestamps mean something: the vectors that differ from silence's lie around the click."""
    silence = torch.zeros(1, 3 * model.sample_rate)
    click = silence.clone()
    click[:, int(1.5 * model.sample_rate)] = 0.9
    quiet_BTD, times_ms_BT = hear.get_timestamp_embeddings(silence, model)
    loud_BTD, _ = hear.get_timestamp_embeddings(click, model)
    loudest = (loud_BTD - quiet_BTD).norm(dim=-1)[0].argmax()
    assert abs(times_ms_BT[0, loudest] - 1_500) < model.embedder.column_ms


def test_hears_own_validator_agrees(exported, monkeypatch, capsys):
    """The package hearvalidator, if it is installed; TensorFlow, of which it uses one class, need not be."""
    pytest.importorskip("hearvalidator", reason="hearvalidator is not installed")
    tensorflow = ModuleType("tensorflow")
    tensorflow.Module = type("Module", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    from hearvalidator.validate import ValidateModel

    ValidateModel("ajepa.hear", str(exported), device="cpu")()
    assert "Received embedding of shape" in capsys.readouterr().out


@pytest.fixture(scope="module")
def encoder(exported) -> AjepaEncoder:
    return AjepaEncoder(str(exported))


def test_xares_finds_an_encoder_with_its_attributes(encoder):
    """Those that `check_audio_encoder` asks for; the hop says how many vectors come."""
    assert type(encoder).__name__.endswith("Encoder")
    assert isinstance(encoder, torch.nn.Module)
    frames_BTD = encoder(torch.randn(2, 50_000) * 0.1)
    assert frames_BTD.shape[::2] == (2, encoder.output_dim)
    seconds = 50_000 / encoder.sampling_rate
    assert abs(frames_BTD.shape[1] - seconds * 1e3 / encoder.hop_size_in_ms) <= 1


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
    frames_BTD = encoder(torch.from_numpy(long_S)[None])
    assert abs(frames_BTD.shape[1] - 60_000 / encoder.hop_size_in_ms) <= 1
    assert frames_BTD.isfinite().all()
    assert encoder(torch.zeros(2, encoder.sampling_rate)).isfinite().all()
    for samples in (encoder.shortest_samples, 100, 1):
        frames_BTD = encoder(torch.full((1, samples), 0.1))
        assert frames_BTD.shape[1] == 1
        assert frames_BTD.isfinite().all()


def test_xares_makes_its_encoder_without_arguments(exported, monkeypatch):
    """The environment says where the model lies, or one line says that it does not."""
    monkeypatch.setenv(MODEL, str(exported))
    encoder = AjepaEncoder()
    assert encoder.output_dim == encoder.embedder.width == 2 * 8 * 32
    monkeypatch.delenv(MODEL)
    with pytest.raises(RunError, match="AJEPA_MODEL is not set"):
        AjepaEncoder()


@pytest.mark.parametrize("exported", [A_JEPA], indirect=True, ids=["a-jepa"])
def test_xares_mean_of_moments_has_the_deviation_of_the_sound(exported, monkeypatch):
    """Options come from the environment too; padding in the batch changes neither half of the mean."""
    monkeypatch.setenv(MODEL, str(exported))
    monkeypatch.setenv("AJEPA_POOLING", "moments")
    monkeypatch.setenv("AJEPA_LAYER", "concat-all")
    encoder = AjepaEncoder()
    wave_S = torch.from_numpy(babble(1.1, encoder.sampling_rate))
    frames_TD = encoder(torch.nn.functional.pad(wave_S, (0, 50_000))[None])[0]
    embedding = encoder.embedder.embed_audio(wave_S, encoder.sampling_rate)[0]
    mean_D, deviation_D = frames_TD.mean(0).chunk(2)
    assert frames_TD.shape[1] == encoder.output_dim == encoder.embedder.width
    torch.testing.assert_close(mean_D, embedding.frames_TD.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(deviation_D, embedding.clip_D.chunk(2)[1], atol=1e-4, rtol=1e-4)


def hisses(count: int, seed: int, rates_hz: Sequence[int]) -> Iterator[tuple[str, bytes, int]]:
    """Noise of four levels, half a second to two seconds; the level is the label."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        label, rate_hz = number % 4, rates_hz[number // 4 % len(rates_hz)]
        wave_S = 0.2 * 0.1**label * rng.standard_normal(round(rng.uniform(0.5, 2) * rate_hz))
        file = io.BytesIO()
        soundfile.write(file, wave_S.astype(np.float32), rate_hz, format="WAV", subtype="FLOAT")
        yield f"{seed}-{number}", file.getvalue(), label


@pytest.mark.parametrize("exported", [A_JEPA], indirect=True, ids=["a-jepa"])
def test_xares_runs_a_task_from_its_tars_to_its_scores(exported, tmp_path):
    """`python -m xares.run` as a user types it; it scores the vectors that `ajepa.load` gives."""
    pytest.importorskip("xares", reason="xares is not installed")
    torchaudio = pytest.importorskip(
        "torchaudio", reason="torchaudio, by which xares reads sounds, is missing"
    )
    soundfile.write(tmp_path / "a.wav", np.zeros(1_000, np.float32), 16_000)
    try:
        torchaudio.load(tmp_path / "a.wav")
    except (ImportError, RuntimeError):
        pytest.skip("torchaudio, by which xares reads sounds, reads none here: it lacks torchcodec or FFmpeg")

    # Train, valid and test sounds at two rates, and a run of the task on them.
    model = ajepa.load(exported, device="cpu")
    rates_hz = (model.sample_rate_hz, 44_100)
    sounds = {
        split: list(hisses(count, seed, rates_hz))
        for seed, (split, count) in enumerate({"train": 96, "valid": 16, "test": 32}.items())
    }
    task = write_task(tmp_path, "hiss", sounds, classes=4, epochs=60)
    done = subprocess.run(
        [sys.executable, "-m", "xares.run", "ajepa/xares_encoder.py", task.name, "--max-jobs", "0"],
        cwd=tmp_path,
        env={**os.environ, MODEL: str(exported)},
        capture_output=True,
        text=True,
        check=False,
    )

    # Both probes tell the four levels apart, far above the chance of 0.25.
    scores = re.search(r"^ *hiss +([\d.]+) +([\d.]+) ", done.stdout, flags=re.MULTILINE)
    assert scores, (done.stdout + done.stderr)[-2_000:]
    assert min(map(float, scores.groups())) >= 0.7

    # X-ARES has a resampler of its own: only sounds at the model's rate have the same vectors.
    scored = stored_means(tmp_path / "env" / "hiss" / "embeddings" / "AjepaEncoder")
    for key, wav, _ in sounds["test"]:
        wave_S, rate_hz = soundfile.read(io.BytesIO(wav), dtype="float32")
        if rate_hz == model.sample_rate_hz:
            expected_D = model.embed_audio(wave_S, rate_hz)[0].frames_TD.mean(0)
            np.testing.assert_allclose(scored[key], expected_D, atol=1e-4)


def stored_means(folder: Path) -> dict[str, np.ndarray]:
    """The mean over time of each sound that X-ARES has encoded, which it scores."""
    means = {}
    for path in folder.glob("wds-encoded-test*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if not member.name.endswith(".npy"):
                    continue
                frames_TD = np.load(io.BytesIO(tar.extractfile(member).read()))

                # The last digit of the name is the batch.
                key = member.name.removesuffix(".npy")[:-1]
                means[key] = frames_TD.mean(0)
    return means


def test_xares_own_checker_agrees(exported, monkeypatch):
    """The package xares, if it is installed; it takes the one class of the file whose name ends with Encoder."""
    checker = pytest.importorskip("xares.audio_encoder_checker", reason="xares is not installed")
    from xares.utils import attr_from_py_path

    monkeypatch.setenv(MODEL, str(exported))
    encoder_class = attr_from_py_path("ajepa/xares_encoder.py", endswith="Encoder")
    assert checker.check_audio_encoder(encoder_class())
