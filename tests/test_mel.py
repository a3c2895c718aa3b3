"""What a log-mel value means, against torchaudio's Kaldi front end."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torchaudio

from pipeline.errors import InputError
from pipeline.mel import DECODING, PRESETS, MelSpec, log_mel, mel_filters_NF, mel_spec

SPEC = PRESETS["a-jepa"]
TOLERANCE_NAT = 2e-3


def reference(wave_S, spec, **settings):
    """One clip through torchaudio, as `mel_TF`."""
    return torchaudio.compliance.kaldi.fbank(
        wave_S[None],
        sample_frequency=spec.sample_rate_hz,
        frame_length=1000 * spec.window_samples / spec.sample_rate_hz,
        frame_shift=1000 * spec.hop_samples / spec.sample_rate_hz,
        num_mel_bins=spec.mel_bands,
        low_freq=spec.low_hz,
        high_freq=spec.high_hz,
        preemphasis_coefficient=spec.preemphasis,
        remove_dc_offset=spec.remove_dc,
        window_type="hanning",
        dither=0.0,
        use_energy=False,
        **settings,
    )


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
    "faint noise on a large offset": lambda spec: 0.5 + noise(spec, level=1e-4),
    "full-scale tone": lambda spec: tone(1_000.0, spec, level=1.0),
    "16-bit tone": lambda spec: tone(3_000.0, spec, level=1.0).mul(32_767).round().div(32_768),
    "square wave": lambda spec: tone(100.3, spec).sign(),
    "chirp": chirp,
    "click": click,
    "beyond full scale": lambda spec: noise(spec, level=5.0),
}


def assert_agree(mel_TF, reference_TF, spec):
    above_TF = (mel_TF > spec.floor_log + 1e-5) | (reference_TF > spec.floor_log + 1e-5)
    assert mel_TF.shape == reference_TF.shape
    assert above_TF.any()
    assert (mel_TF - reference_TF)[above_TF].abs().max() < TOLERANCE_NAT


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_value_is_torchaudios(name, signal):
    """Models trained on Kaldi features see the same numbers, also beside a full-scale tone near the floor."""
    spec = PRESETS[name]
    wave_S = SIGNALS[signal](spec)
    assert_agree(log_mel(wave_S[None], spec)[0], reference(wave_S, spec), spec)


@pytest.mark.parametrize(
    "change",
    [{"preemphasis": 0.0}, {"remove_dc": False}, {"low_hz": 300.0, "high_hz": 7_000.0}, {"mel_bands": 40}],
)
def test_a_changed_field_changes_what_it_says(change):
    """A spec is honoured beyond the presets."""
    spec = replace(SPEC, **change)
    wave_S = 0.1 + noise(spec, seconds=0.5)
    mel_TF = log_mel(wave_S[None], spec)[0]
    assert_agree(mel_TF, reference(wave_S, spec), spec)
    assert mel_TF.shape[1] != 128 or not torch.allclose(mel_TF, log_mel(wave_S[None], SPEC)[0], atol=0.1)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(threads):
    """A store built on many small machines is the store built on one large one."""
    before = torch.get_num_threads()
    wave_S = noise(SPEC, seconds=10.0)
    try:
        torch.set_num_threads(threads)
        assert_agree(log_mel(wave_S[None], SPEC)[0], reference(wave_S, SPEC), SPEC)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("hz", [440.0, 1_760.0, 7_040.0])
def test_a_pure_tone_lights_the_band_that_covers_it(name, hz):
    """The loudest band is the one whose filter is highest at the tone."""
    spec = PRESETS[name]
    nearest_bin = round(hz * spec.fft_samples / spec.sample_rate_hz)
    covering = mel_filters_NF(spec)[nearest_bin].argmax()
    assert (log_mel(tone(hz, spec)[None], spec)[0].argmax(1) - covering).abs().max() <= 1


@pytest.mark.parametrize("name", PRESETS)
def test_digital_silence_is_the_floor(name):
    """Padding a short clip with `floor_log` is padding it with silence."""
    spec = PRESETS[name]
    assert (log_mel(torch.zeros(1, spec.clip_samples), spec) == spec.floor_log).all()


def test_an_offset_changes_nothing():
    """DC is removed frame by frame, so subtracting a clip's mean first, as others do, changes nothing."""
    wave_S = noise(SPEC)
    shifted, plain = log_mel(torch.stack([wave_S + 0.25, wave_S]), SPEC)
    assert (shifted - plain).abs().max() < 0.02  # a quarter added rounds a sample by up to 1.5e-8
    assert (shifted - plain).abs().mean() < 1e-4


def test_twice_the_amplitude_is_two_ln_2_more():
    """Values are natural logarithms of power."""
    once, twice = log_mel(torch.stack([noise(SPEC), 2 * noise(SPEC)]), SPEC)
    assert torch.allclose(twice - once, torch.tensor(2 * math.log(2)), atol=1e-5)


def test_a_clip_in_a_batch_is_the_clip_alone():
    """Bit for bit: how clips are grouped into shards must not show in a store."""
    waves_BS = torch.stack([noise(SPEC, seed=seed, seconds=10.0) for seed in range(3)])
    assert torch.equal(log_mel(waves_BS, SPEC)[1], log_mel(waves_BS[1:2], SPEC)[0])


@pytest.mark.parametrize("samples", [0, 799, 800, 1_119, 1_120, 50_000])
def test_a_shorter_clip_has_the_first_frames_of_the_longer(samples):
    """A frame lies wholly inside the clip, and what follows it does not touch it."""
    wave_BS = noise(SPEC)[None]
    frames = SPEC.frames_of(samples)
    short_BTF = log_mel(wave_BS[:, :samples], SPEC)
    assert short_BTF.shape == (1, frames, 128)
    assert torch.allclose(short_BTF, log_mel(wave_BS, SPEC)[:, :frames], atol=1e-5)


def test_values_are_finite_far_beyond_full_scale():
    """Float files with 16-bit numbers in them are found in the wild."""
    assert log_mel(noise(SPEC, level=1e6)[None], SPEC).isfinite().all()


def test_only_the_16k_preset_has_an_empty_band():
    """At 32 kHz every triangle holds a bin of the spectrum; at 16 kHz one of 128 is too narrow."""
    empty = {name: int((mel_filters_NF(spec).sum(0) == 0).sum()) for name, spec in PRESETS.items()}
    assert empty == {"a-jepa": 0, "a-jepa-16k": 1, "audio-jepa": 0}


def test_autocast_and_inference_mode_leave_no_trace():
    """Half precision would overflow on loud clips, and cached filters must stay usable for training."""
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
def test_a_gpu_gives_the_values_of_the_cpu():
    """Embedding on a GPU and building on a CPU use one definition."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    wave_BS = torch.stack([noise(SPEC, seed=seed, seconds=10.0) for seed in range(2)])
    on_gpu_BTF = log_mel(wave_BS.cuda(), SPEC).cpu()
    assert (on_gpu_BTF - log_mel(wave_BS, SPEC)).abs().max() < TOLERANCE_NAT


@pytest.mark.parametrize(
    ("name", "frames", "bands"), [("a-jepa", 998, 128), ("a-jepa-16k", 998, 128), ("audio-jepa", 254, 128)]
)
def test_ten_seconds_have_the_published_shape(name, frames, bands):
    """998 is used as 1024, 254 as 256."""
    spec = mel_spec(name)
    assert (spec.frames, spec.mel_bands) == (frames, bands)
    assert log_mel(torch.zeros(1, spec.clip_samples), spec).shape == (1, frames, bands)


CHANGES = {
    "sample_rate_hz": 44_100,
    "window_samples": 801,
    "hop_samples": 321,
    "fft_samples": 2048,
    "high_hz": 15_000.0,
    "low_hz": 21.0,
    "mel_bands": 64,
    "clip_seconds": 5.0,
    "remove_dc": False,
    "preemphasis": 0.9,
    "floor": 1e-10,
    "decoding": "2: something else",
}


@pytest.mark.parametrize("field", CHANGES)
def test_the_id_depends_on_everything_that_changes_a_value(field):
    """Two stores with one id may be mixed."""
    assert replace(SPEC, **{field: CHANGES[field]}).spec_id != SPEC.spec_id


def test_every_field_is_tried_above_or_has_one_value_only():
    """A field added later must be added to the list."""
    only = {"name", "framing", "window", "filters", "flooring"}
    assert set(SPEC.to_json()) == set(CHANGES) | only


def test_the_id_does_not_depend_on_the_name_or_on_how_a_number_is_written():
    """10 and 10.0 seconds are the same clip."""
    other = replace(SPEC, name="mine", clip_seconds=10, high_hz=16_000, low_hz=20)
    assert other.spec_id == SPEC.spec_id


def test_the_ids_of_the_presets_stay():
    """Whoever changes these makes every existing store foreign; do it knowingly."""
    assert DECODING.startswith("1:")
    ids = {name: spec.spec_id for name, spec in PRESETS.items()}
    assert ids == {"a-jepa": "ff4c3612e71f", "a-jepa-16k": "b9f7a3829ee3", "audio-jepa": "664876e95222"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_spec_survives_json(name):
    """Stores and checkpoints carry it as text."""
    spec = PRESETS[name]
    assert MelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"dither": 1.0}, "dither"),
        ({"window": "hann_periodic"}, "hann_periodic"),
        ({"hop_samples": 0}, "hop_samples"),
    ],
)
def test_a_spec_that_cannot_be_made_is_refused_by_name(change, names):
    """A store of a newer version must not be read as something else."""
    with pytest.raises(InputError, match=names):
        MelSpec.from_json(SPEC.to_json() | change)


def test_a_spec_that_lacks_a_field_is_refused():
    """A truncated zarr.json is no spec."""
    values = SPEC.to_json()
    del values["hop_samples"]
    with pytest.raises(InputError, match="hop_samples"):
        MelSpec.from_json(values)


@pytest.mark.parametrize(
    "change",
    [
        {"fft_samples": 512},
        {"high_hz": 16_001.0},
        {"low_hz": 16_000.0},
        {"preemphasis": 1.0},
        {"floor": 0.0},
        {"clip_seconds": 0.02},
        {"mel_bands": 0},
    ],
)
def test_nonsense_is_refused_at_the_door(change):
    """Past the constructor nothing is checked again."""
    with pytest.raises(ValueError, match=r"\d"):
        replace(SPEC, **change)


def test_an_unknown_preset_is_answered_with_the_nearest():
    """A typing error costs one look."""
    with pytest.raises(InputError, match="did you mean 'a-jepa-16k'") as error:
        mel_spec("ajepa-16k")
    assert all(name in str(error.value) for name in PRESETS)
