"""Log-mel values are those of torchaudio, librosa and PaSST's own package."""

import functools
import math
import warnings
from dataclasses import replace

import librosa
import numpy as np
import pytest
import torch

from bench.mel import mel_spectrogram, reference
from pipeline.audio.mel import log_mel, mel_filters_NF
from pipeline.audio.mel_spec import MEL_PRESETS

SPEC = MEL_PRESETS["a-jepa"]

CENTRED = [name for name, spec in MEL_PRESETS.items() if spec.framing == "centred"]

SLANEY = [name for name, spec in MEL_PRESETS.items() if spec.filters == "slaney"]

TOLERANCE_NAT = 2e-3

# So far below a frame's strongest bin, a value is the rounding of a float32 FFT, different in each library.
FLOAT32_NAT = 24


def noise(spec, *, level=0.1, seconds=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return level * torch.randn(round(seconds * spec.sample_rate_hz), generator=generator)


def tone(hz, spec, *, level=0.5, seconds=2.0):
    time_S = torch.arange(round(seconds * spec.sample_rate_hz), dtype=torch.float64) / spec.sample_rate_hz
    return (level * torch.sin(2 * math.pi * hz * time_S)).float()


def chirp(spec):
    time_S = torch.arange(2 * spec.sample_rate_hz, dtype=torch.float64) / spec.sample_rate_hz
    return torch.sin(2 * math.pi * (20 * time_S + spec.high_hz / 4 * time_S**2)).float()


def click(spec):
    return torch.zeros(2 * spec.sample_rate_hz).index_fill(0, torch.tensor([spec.sample_rate_hz]), 1.0)


SIGNALS = {
    "noise": noise,
    "quiet noise": lambda spec: noise(spec, level=1e-4),
    "faint noise on a large offset": lambda spec: 0.5 + noise(spec, level=1e-4),
    "full-scale tone": lambda spec: tone(1_000.0, spec, level=1.0),
    "low tone on a bin": lambda spec: tone(62.5, spec, level=0.99),
    "high tone on a bin": lambda spec: tone(7_000.0, spec, level=0.99),
    "16-bit tone": lambda spec: tone(3_000.0, spec, level=1.0).mul(32_767).round().div(32_768),
    "square wave": lambda spec: tone(100.3, spec).sign(),
    "chirp": chirp,
    "click": click,
    "beyond full scale": lambda spec: noise(spec, level=5.0),
    "a tenth of a second": lambda spec: noise(spec, seconds=0.1),
}


def assert_agree(mel_TF, reference_TF, spec, floor_T1=-math.inf):
    above_TF = (mel_TF > spec.floor_log + 1e-5) | (reference_TF > spec.floor_log + 1e-5)
    above_TF &= torch.maximum(mel_TF, reference_TF) > floor_T1
    assert mel_TF.shape == reference_TF.shape
    assert above_TF.any()
    assert (mel_TF - reference_TF)[above_TF].abs().max() < TOLERANCE_NAT


@functools.cache
def librosa_filters_NF(spec):
    """Librosa's filters, without its warning that some are empty."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Empty filters", UserWarning)
        filters_FN = librosa.filters.mel(
            sr=spec.sample_rate_hz,
            n_fft=spec.fft_samples,
            n_mels=spec.mel_bands,
            fmin=spec.low_hz,
            fmax=spec.high_hz,
        )
    return torch.from_numpy(filters_FN).T


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("name", MEL_PRESETS)
def test_every_value_is_torchaudios(name, signal):
    """Models trained on these features see the same numbers, also beside a full-scale tone near the floor.

    The slaney filters are librosa's, as in PANNs; for torchaudio's own see below.
    """
    spec = MEL_PRESETS[name]
    wave_S = SIGNALS[signal](spec)
    expected_TF = reference(wave_S[None], spec)
    if name in SLANEY:
        power_TN = mel_spectrogram(spec).spectrogram(wave_S[None])[0].T
        expected_TF = (power_TN @ librosa_filters_NF(spec)).clamp(min=spec.floor).log()
    assert_agree(log_mel(wave_S[None], spec)[0], expected_TF, spec)


# The values of faint noise on a large offset are nothing but rounding.
@pytest.mark.parametrize("signal", sorted(SIGNALS.keys() - {"faint noise on a large offset"}))
@pytest.mark.parametrize("name", SLANEY)
def test_every_slaney_value_is_librosas(name, signal):
    """Another library's FFT rounds differently: values that consist of rounding errors only are left out."""
    spec = MEL_PRESETS[name]
    wave_S = SIGNALS[signal](spec)
    power_NT = (
        np.abs(
            librosa.stft(
                wave_S.numpy(), n_fft=spec.fft_samples, hop_length=spec.hop_samples, pad_mode="reflect"
            )
        )
        ** 2
    )
    mel_TF = torch.from_numpy(power_NT.T) @ librosa_filters_NF(spec)
    strongest_T1 = torch.from_numpy(power_NT.max(0)).log()[:, None]
    expected_TF = mel_TF.clamp(min=spec.floor).log()
    assert_agree(log_mel(wave_S[None], spec)[0], expected_TF, spec, strongest_T1 - FLOAT32_NAT)


@pytest.mark.parametrize("name", SLANEY)
def test_slaney_filters_are_librosas_and_within_a_percent_torchaudios(name):
    """torchaudio makes them in float32, so the faint ends of its triangles are up to 0.9 % off."""
    spec = MEL_PRESETS[name]
    ours_NF = mel_filters_NF(spec)
    theirs_NF = mel_spectrogram(spec).mel_scale.fb
    torch.testing.assert_close(ours_NF, librosa_filters_NF(spec), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(ours_NF, theirs_NF, rtol=0.01, atol=0.0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("signal", SIGNALS)
def test_every_passt_value_is_that_of_its_own_package(signal):
    """Its `(x + 4.5) / 5` undone: normalisation is not stored."""
    preprocess = pytest.importorskip("hear21passt.models.preprocess", reason="needs pip install hear21passt")
    front_end = preprocess.AugmentMelSTFT(
        fmin_aug_range=10, fmax_aug_range=2000
    ).eval()  # as its base.py has it
    spec = MEL_PRESETS["passt"]
    wave_S = SIGNALS[signal](spec)
    assert_agree(log_mel(wave_S[None], spec)[0], 5 * front_end(wave_S[None])[0].T - 4.5, spec)


def by_definition(wave_S, spec):
    """The log-mel that MelSpec's docstring defines, in float64, a frame at a time."""
    wave_S, samples = wave_S.double().numpy(), spec.window_samples
    if spec.framing == "centred":
        wave_S = wave_S[1:] - spec.preemphasis * wave_S[:-1] if spec.preemphasis else wave_S
        wave_S = np.pad(wave_S, ((samples + 1) // 2, samples // 2), mode="reflect")
    window_N = np.hanning(samples + 1)[:-1] if spec.window == "hann_periodic" else np.hanning(samples)
    rows = []
    for start in range(0, len(wave_S) - samples + 1, spec.hop_samples):
        frame_N = wave_S[start : start + samples]
        if spec.framing == "kaldi":
            frame_N = frame_N - frame_N.mean() * spec.remove_dc
            frame_N = frame_N - spec.preemphasis * np.concatenate([frame_N[:1], frame_N[:-1]])
        rows.append(np.abs(np.fft.rfft(frame_N * window_N, spec.fft_samples)) ** 2)
    power_TF = np.stack(rows) @ mel_filters_NF(spec).double().numpy()
    floored_TF = power_TF + spec.floor if spec.flooring == "add" else np.maximum(power_TF, spec.floor)
    return torch.from_numpy(np.log(floored_TF)).float()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"preemphasis": 0.0},
        {"remove_dc": False},
        {"low_hz": 300.0, "high_hz": 7_000.0},
        {"mel_bands": 40},
        {"window": "hann_periodic"},
        {"filters": "slaney"},
        {"flooring": "add", "floor": 1e-3},
        {"framing": "centred", "remove_dc": False},
        {"framing": "centred", "remove_dc": False, "preemphasis": 0.0},
        {"framing": "centred", "remove_dc": False, "window_samples": 801, "hop_samples": 333},
    ],
)
def test_a_changed_field_changes_the_values_as_its_docstring_says(change):
    """Specs other than the presets are computed too, in any combination."""
    spec = replace(SPEC, **change)
    wave_S = 0.01 + noise(spec, seconds=0.5)
    mel_TF = log_mel(wave_S[None], spec)[0]
    assert_agree(mel_TF, by_definition(wave_S, spec), spec)
    plain_TF = log_mel(wave_S[None], SPEC)[0]
    assert not change or mel_TF.shape != plain_TF.shape or (mel_TF - plain_TF).abs().max() > 0.02


@pytest.mark.parametrize("samples", [3, 100, 401, 512, 513, 640])
@pytest.mark.parametrize("name", CENTRED)
def test_a_wave_shorter_than_its_reflection_goes_back_and_forth(name, samples):
    """NumPy pads like this; torch and librosa refuse such a wave."""
    spec = MEL_PRESETS[name]
    wave_S = noise(spec)[: samples + (spec.preemphasis > 0)]
    mel_TF = log_mel(wave_S[None], spec)[0]
    assert mel_TF.shape == (1 + samples // spec.hop_samples, spec.mel_bands)
    expected_TF = by_definition(wave_S, spec)
    assert_agree(mel_TF, expected_TF, spec, expected_TF.max(1, keepdim=True).values - FLOAT32_NAT)


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("name", CENTRED)
def test_a_sample_or_two_make_one_finite_frame(name, samples):
    """These are the shortest waves, before or after pre-emphasis."""
    mel_BTF = log_mel(torch.full((1, samples), 0.5), MEL_PRESETS[name])
    assert mel_BTF.shape[1] == 1
    assert mel_BTF.isfinite().all()


@pytest.mark.parametrize("samples", [0, 1])
def test_no_sound_has_no_frame(samples):
    """Neither has a single sample, because pre-emphasis removes it."""
    spec = MEL_PRESETS["passt"]
    assert log_mel(torch.zeros(2, samples), spec).shape == (2, 0, 128)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["a-jepa", "passt"])
def test_the_number_of_threads_changes_nothing(name, threads):
    """A store built on many small machines is the store built on one large one."""
    spec = MEL_PRESETS[name]
    threads_before = torch.get_num_threads()
    wave_BS = noise(spec, seconds=10.0)[None]
    try:
        torch.set_num_threads(threads)
        assert_agree(log_mel(wave_BS, spec)[0], reference(wave_BS, spec), spec)
    finally:
        torch.set_num_threads(threads_before)


@pytest.mark.parametrize("name", MEL_PRESETS)
@pytest.mark.parametrize("hz", [440.0, 1_760.0, 7_040.0])
def test_a_pure_tone_lights_the_band_that_covers_it(name, hz):
    """The loudest band is the one whose filter is highest at the tone."""
    spec = MEL_PRESETS[name]
    nearest_bin = round(hz * spec.fft_samples / spec.sample_rate_hz)
    covering = mel_filters_NF(spec)[nearest_bin].argmax()
    inner_TF = log_mel(tone(hz, spec)[None], spec)[0, 2:-2]  # mirrored at its ends, a tone is none
    assert (inner_TF.argmax(1) - covering).abs().max() <= 1


@pytest.mark.parametrize("name", MEL_PRESETS)
def test_digital_silence_is_the_floor(name):
    """Padding a short clip with `floor_log` is padding it with silence."""
    spec = MEL_PRESETS[name]
    assert (log_mel(torch.zeros(1, spec.clip_samples), spec) == spec.floor_log).all()


def test_an_offset_changes_nothing():
    """DC is removed frame by frame, so subtracting a clip's mean first, as others do, changes nothing."""
    wave_S = noise(SPEC)
    shifted, plain = log_mel(torch.stack([wave_S + 0.25, wave_S]), SPEC)
    assert (shifted - plain).abs().max() < 0.02  # a quarter added rounds a sample by up to 1.5e-8
    assert (shifted - plain).abs().mean() < 1e-4


@pytest.mark.parametrize("gain_db", [-12.0, 6.0, 20.0])
@pytest.mark.parametrize("name", MEL_PRESETS)
def test_a_decibel_is_a_constant_number_of_nats(name, gain_db):
    """Louder by g dB is g / 4.343 more in every band above the floor: values are natural logarithms of power."""
    spec = MEL_PRESETS[name]
    wave_S = noise(spec)
    plain_TF, louder_TF = log_mel(torch.stack([wave_S, 10 ** (gain_db / 20) * wave_S]), spec)
    if spec.flooring == "add":  # without what was added
        plain_TF, louder_TF = ((mel_TF.double().exp() - spec.floor).log() for mel_TF in (plain_TF, louder_TF))
    filled_F = mel_filters_NF(spec).any(0)
    loud_TF = (torch.minimum(plain_TF, louder_TF) > spec.floor_log + 4) & filled_F
    assert loud_TF.float().mean() > 0.8
    assert ((louder_TF - plain_TF)[loud_TF] - gain_db / 4.342945).abs().max() < TOLERANCE_NAT


@pytest.mark.parametrize("name", MEL_PRESETS)
def test_a_hop_later_is_a_frame_later(name):
    """Time runs along the frames, and a frame does not depend on its position in the clip."""
    spec = MEL_PRESETS[name]
    wave_S = noise(spec)
    early_TF, late_TF = (log_mel(w_S[None], spec)[0] for w_S in (wave_S, wave_S[spec.hop_samples :]))
    inner = slice(3, -3)  # mirrored ends are not shifted
    assert len(early_TF) == len(late_TF) + 1
    assert_agree(early_TF[1:][inner], late_TF[inner], spec)


@pytest.mark.parametrize("name", MEL_PRESETS)
def test_a_clip_in_a_batch_is_the_clip_alone(name):
    """Bit for bit: how clips are grouped into shards must not show in a store."""
    spec = MEL_PRESETS[name]
    waves_BS = torch.stack([noise(spec, seed=seed) for seed in range(3)])
    assert torch.equal(log_mel(waves_BS, spec)[1], log_mel(waves_BS[1:2], spec)[0])


@pytest.mark.parametrize("samples", [0, 799, 800, 1_119, 1_120, 50_000])
def test_a_shorter_clip_has_the_first_frames_of_the_longer(samples):
    """A frame is wholly inside the clip, and later samples do not change it."""
    wave_BS = noise(SPEC)[None]
    frames = SPEC.frames_of(samples)
    short_BTF = log_mel(wave_BS[:, :samples], SPEC)
    assert short_BTF.shape == (1, frames, 128)
    assert torch.allclose(short_BTF, log_mel(wave_BS, SPEC)[:, :frames], atol=1e-5)


def test_values_are_finite_far_beyond_full_scale():
    """Float files that contain 16-bit numbers exist."""
    assert log_mel(noise(SPEC, level=1e6)[None], SPEC).isfinite().all()


def test_bands_too_narrow_to_hold_a_bin_are_known():
    """Such a band is always at the floor; there is one among the 128 bands at 16 kHz."""
    empty = {name: int((mel_filters_NF(spec).sum(0) == 0).sum()) for name, spec in MEL_PRESETS.items()}
    assert empty == {"a-jepa": 0, "a-jepa-16k": 1, "audio-jepa": 0, "panns": 0, "convnext": 0, "passt": 0}


def test_autocast_and_inference_mode_leave_no_trace():
    """Half precision would overflow on loud clips, and cached filters must remain usable for training."""
    spec = replace(SPEC, name="not cached before", low_hz=30.0)
    wave_BS = noise(spec, seconds=0.2)[None]
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside_BTF = log_mel(wave_BS, spec).clone()
    outside_BTF = log_mel(wave_BS, spec)
    weight = torch.ones(128, requires_grad=True)
    (outside_BTF * weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(inside_BTF, outside_BTF)


@pytest.mark.gpu
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("name", MEL_PRESETS)
def test_a_gpu_gives_the_values_of_the_cpu(name, signal):
    """Embedding on a GPU and building on a CPU use one definition; beyond float32's rounding they may differ."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    spec = MEL_PRESETS[name]
    wave_S = SIGNALS[signal](spec)
    on_gpu_TF = log_mel(wave_S[None].cuda(), spec)[0].cpu()
    on_cpu_TF = log_mel(wave_S[None], spec)[0]
    assert_agree(on_gpu_TF, on_cpu_TF, spec, on_cpu_TF.max(1, keepdim=True).values - FLOAT32_NAT)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MEL_PRESETS)
def test_silence_on_a_gpu_is_the_floor(name):
    """To the bit: short clips are padded with it."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    spec = MEL_PRESETS[name]
    assert (log_mel(torch.zeros(1, spec.clip_samples, device="cuda"), spec) == spec.floor_log).all()
