"""What a notebook hands over: paths, arrays of any layout, odd rates, bad files: vectors, or one clear line."""

import numpy as np
import pytest
import torch
from sounds import babble, write
from tiny import tiny

from ajepa.embed.embedder import Embedder
from ajepa.embed.pretrained import PretrainedEncoder
from ajepa.embed.sound_inputs import ArraySound, read_sound_inputs
from ajepa.model.vit import Encoder
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.errors import AudioError, InputError, RunError

RATE_HZ = 32_000


@pytest.fixture(scope="module")
def model() -> Embedder:
    spec = tiny().model.encoder
    weights = Encoder(spec, seed=3).state_dict()
    mel = preset_mel_spec("a-jepa")
    pretrained = PretrainedEncoder(spec=spec, mel=mel, mean=-5.0, std=3.0, weights=weights, origin={})
    return Embedder(pretrained, device="cpu")


def wave_of(sounds, rate_hz=RATE_HZ) -> np.ndarray:
    """The only sound of an input, as a mono wave."""
    (sound,), _ = read_sound_inputs(sounds, rate_hz)
    assert isinstance(sound, ArraySound)
    return sound.wave_S


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
@pytest.mark.parametrize("dtype", ["float64", "float32", "int16", "int32", "uint8"])
def test_samples_of_every_type_are_one_wave(dtype, kind):
    """Full scale is 1.0, 32768, 2^31, or 128 around 128: what soundfile, torchaudio and scipy return."""
    wave_S = babble(0.1, RATE_HZ).astype(np.float64)
    scale, middle = {"int16": (2**15, 0), "int32": (2**31, 0), "uint8": (2**7, 128)}.get(dtype, (1, 0))
    samples = (wave_S * scale + middle).astype(dtype)
    np.testing.assert_allclose(wave_of(kind(samples)), wave_S, atol=1 / 127)
    assert wave_of(kind(samples)).dtype == np.float32


def test_the_shorter_axis_is_the_channels():
    """torchaudio has [channels, samples], soundfile [samples, channels]: the same mono wave."""
    left_S = babble(0.1, RATE_HZ)
    right_S = babble(0.1, RATE_HZ, seed=1)
    for stereo in (np.stack([left_S, right_S]), np.stack([left_S, right_S], axis=1)):
        np.testing.assert_allclose(wave_of(stereo), (left_S + right_S) / 2, atol=1e-7)
    np.testing.assert_array_equal(wave_of(left_S[None]), left_S)


def test_a_folder_is_all_its_sounds(model, tmp_path):
    """As for the command: those in folders of it too, named by their paths; one without a sound is refused."""
    for name in ("dog/b.wav", "dog/more/c.wav", "a.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, babble(0.5, RATE_HZ, seed=len(name)), RATE_HZ)
    found = model.embed(tmp_path / "dog")
    assert found.names == (str(tmp_path / "dog/b.wav"), str(tmp_path / "dog/more/c.wav"))
    several = model.embed([tmp_path / "a.wav", str(tmp_path / "dog")])
    torch.testing.assert_close(several.clips_BD[1:], found.clips_BD, rtol=1e-4, atol=1e-4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: holds no sound; expected audio files"):
        model.embed(tmp_path / "empty")


def test_a_sound_is_the_same_from_a_file_an_array_and_a_datasets_value(model, tmp_path):
    """In one call, in their order; a value of a Hugging Face audio column has its own rate."""
    wave_S = babble(1.0, 44_100)
    path = write(tmp_path / "a.wav", wave_S, 44_100, subtype="FLOAT")
    value = {"array": wave_S.tolist(), "sampling_rate": 44_100, "path": None}
    found = model.embed([str(path), wave_S, torch.tensor(wave_S), value], rate_hz=44_100)
    assert found.clips_BD.shape == (4, model.width)
    torch.testing.assert_close(found.clips_BD, found.clips_BD[:1].expand(4, -1), rtol=1e-4, atol=1e-4)
    alone = model.embed(value)
    assert torch.equal(alone.clips_BD[0], found.clips_BD[3])


def test_one_bad_file_is_a_row_with_its_reason(model, tmp_path, capsys):
    """A folder of a thousand sounds has one that is broken; the others are what the user came for."""
    good = write(tmp_path / "good.wav", babble(0.5, RATE_HZ), RATE_HZ)
    text = tmp_path / "text.wav"
    text.write_text("no sound")
    found = model.embed([good, text, tmp_path / "gone.wav"])
    assert found.is_good_B.tolist() == [True, False, False]
    assert found.clips_BD[0].isfinite().all()
    assert found.clips_BD[1:].isnan().all()
    assert {number: error.reason for number, error in found.errors.items()} == {
        1: "unreadable",
        2: "missing",
    }
    assert found[1].error is found.errors[1]
    assert len(found[1].frames_TD) == 0
    line = capsys.readouterr().err
    assert "2 of 3 failed: " in line
    assert "text.wav: unreadable" in line

    # On request, and where nothing is left, the first reason is raised.
    with pytest.raises(AudioError, match=r"text\.wav"):
        model.embed([good, text], errors="raise")
    with pytest.raises(AudioError, match=r"text\.wav"):
        model.embed(text)


@pytest.mark.parametrize(
    ("sounds", "rate_hz", "message"),
    [
        (
            np.zeros(32_000),
            None,
            r"sounds\[0\] is an array: say its rate, such as embed\(wave, rate_hz=44100\)",
        ),
        (
            np.zeros(32_000),
            44.1,
            "audio at 44.1 Hz: expected a whole number from 1,000 to 768,000; 44.1 kHz is rate_hz=44100",
        ),
        (np.zeros(32_000), -1, "audio at -1 Hz"),
        (np.zeros(32_000), "44100", "audio at '44100': expected a rate in Hz"),
        ("a.wav", 44_100, "rate_hz=44100: is for arrays, and all sounds are files"),
        (np.zeros((40, 32_000)), 32_000, r"of shape \[40, 32000\]: .*; give several sounds as a list"),
        (np.zeros((3, 3)), 32_000, r"of shape \[3, 3\]: expected one sound"),
        (np.zeros((1, 2, 9)), 32_000, r"of shape \[1, 2, 9\]"),
        (np.zeros(9, np.int64), 32_000, r"sounds\[0\] of int64: expected floats"),
        (np.zeros(9, complex), 32_000, r"sounds\[0\] of complex128"),
        ((np.zeros(9), 32_000), 32_000, r"sounds\[1\] is int 32000: .* the rate of arrays goes to rate_hz="),
        (
            [[0.1, 0.2]],
            32_000,
            r"sounds\[0\] is list \[0.1, 0.2\]: expected a path, a NumPy array or a tensor",
        ),
        (None, None, r"sounds\[0\] is NoneType None"),
    ],
)
def test_what_is_no_sound_is_refused_in_one_line(model, sounds, rate_hz, message):
    """Each of these was a traceback, or numbers that mean nothing."""
    with pytest.raises(RunError, match=message):
        model.embed(sounds, rate_hz=rate_hz)


@pytest.mark.parametrize("shape", [(0,), (0, 2), (2, 0)])
def test_an_empty_array_is_said_to_be_empty(model, shape):
    """It has no samples that could be NaN; among others it is a row like other bad sounds."""
    with pytest.raises(AudioError, match=r"^the array is empty; expected samples$"):
        model.embed(np.zeros(shape, np.int16), rate_hz=RATE_HZ)
    found = model.embed([np.zeros(shape, np.int16), babble(1.0, RATE_HZ)], rate_hz=RATE_HZ)
    assert {number: error.reason for number, error in found.errors.items()} == {0: "too_short"}


def test_a_notebook_shows_a_line_for_each_thing(model):
    """A cell that ends in a model or a result prints no tensors."""
    found = model.embed(babble(1.0, RATE_HZ), rate_hz=RATE_HZ)
    assert repr(found) == f"Embeddings(clips_BD [1, {model.width}])"
    assert repr(found[0]).startswith(f"Embedding(1.00 s, clip_D [{model.width}], frames_TD [")
    assert f"32000 Hz -> {model.width} values: moments of layer mean-1 (the fixed default" in repr(model)
    assert [sound.seconds for sound in found] == [1.0]
