"""Embeddings: of files, arrays and store rows alike; at any rate and length; of nothing but the sound."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sounds import babble, write
from tiny import tiny

import ajepa
from ajepa.embed.embedder import Embedder
from ajepa.embed.pretrained import PretrainedEncoder
from ajepa.evaluate.features import ClipViews, clip_vectors
from ajepa.model.pooling import EncoderLayer
from ajepa.model.vit import Encoder
from ajepa.pretrain.pretrain import pretrain
from pipeline.audio.mel_spec import PASST, preset_mel_spec
from pipeline.errors import AudioError, RunError
from pipeline.store.feature_store import FeatureStore

RATE_HZ = 32_000


@pytest.fixture(scope="module")
def run_path(store_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    return pretrain(store_path, tiny(), path, steps=2, device="cpu", say=lambda line: None).path


@pytest.fixture(scope="module")
def model(run_path) -> Embedder:
    return ajepa.load(run_path, device="cpu")


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_importing_the_package_loads_no_heavy_library():
    """`import ajepa` belongs into anybody's script; torch comes when a model is loaded."""
    heavy = "{'torch', 'numpy', 'polars', 'zarr'}"
    code = f"import ajepa, pipeline, sys; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_store_is_a_name_of_its_package():
    """`pipeline.FeatureStore.open(...)`, and nothing else by accident."""
    import pipeline

    assert pipeline.FeatureStore is FeatureStore
    with pytest.raises(AttributeError, match="no attribute 'FeatureStor'"):
        _ = pipeline.FeatureStor


def test_a_files_embedding_is_that_of_its_row_in_the_store(model, store, corpus):
    """Same decoder, same mel, same normalisation: the store differs by its rounding to float16 alone."""
    rows_N = store.good_rows()[:6]
    paths = [corpus / "audio" / store.manifest["source"][int(row)] for row in rows_N]
    whole = [index for index, row in enumerate(rows_N) if "cut" not in store.manifest["flags"][int(row)]]
    assert len(whole) > 2
    files = model.embed([paths[index] for index in whole])
    rows = list(model.embed_store(store, rows_N[whole]))
    for file, row in zip(files.each, rows, strict=True):
        close(file.clip_D, row.clip_D, 2e-3)
        close(file.frames_TD, row.frames_TD, 2e-2)


def test_without_overlap_the_clip_is_what_evaluate_measures(run_path, store):
    """Scores in evaluation.json speak of vectors that a user can have."""
    model = ajepa.load(run_path, device="cpu", overlap=0)
    rows_N = store.good_rows()[:5]
    views = ClipViews(store=store, frames=64, mean=model.model.mean, std=model.model.std)
    expected_ND = torch.from_numpy(clip_vectors(views, rows_N, model.encoder))
    close(torch.stack([one.clip_D for one in model.embed_store(store, rows_N)]), expected_ND)


def chord(seconds: float, rate_hz: int, *, lowest_hz: float) -> np.ndarray:
    """Five tones that swell and fade, each a formula: the same sound at every rate above 7 kHz."""
    time_S = np.arange(round(seconds * rate_hz)) / rate_hz
    tones = [
        np.sin(2 * np.pi * lowest_hz * k * time_S) * (1 + np.sin(2 * np.pi * k * time_S)) for k in range(1, 6)
    ]
    return 0.05 * np.sum(tones, axis=0)


@pytest.mark.parametrize(("rate_hz", "channels"), [(8_000, 1), (44_100, 2), (48_000, 2), (22_050, 1)])
def test_a_sound_at_another_rate_is_near_itself(model, tmp_path, rate_hz, channels):
    """What lies below half the lower rate is not changed by resampling; another sound is far."""
    wave_S = chord(3.0, rate_hz, lowest_hz=300)
    near = write(tmp_path / "near.wav", np.repeat(wave_S[:, None], channels, 1), rate_hz, subtype="FLOAT")
    same, other = (
        write(tmp_path / f"{hz}.wav", chord(3.0, RATE_HZ, lowest_hz=hz), RATE_HZ, subtype="FLOAT")
        for hz in (300, 430)
    )
    told = model.embed([near, same, other])
    far = (told[1].clip_D - told[2].clip_D).norm()
    assert (told[0].clip_D - told[1].clip_D).norm() < 0.1 * far
    assert told[0].seconds == pytest.approx(3.0, abs=1e-4)
    assert told[0].frames_TD.shape == told[1].frames_TD.shape


def test_neighbours_in_a_batch_do_not_matter(model):
    """Alone, in company, in small batches or large: the same vector."""
    waves = [babble(seconds, RATE_HZ, seed=seed) for seed, seconds in enumerate((2.0, 0.3, 7.1, 1.0))]
    alone = [model.embed_audio(wave_S, RATE_HZ)[0] for wave_S in waves]
    longest = max(map(len, waves))
    together_BS = np.stack([np.pad(w, (0, longest - len(w)), constant_values=0.7) for w in waves])
    for batch in (1, 3, 32):
        told = model.embed_audio(together_BS, RATE_HZ, samples_B=[len(w) for w in waves], batch=batch)
        for one, other in zip(alone, told.each, strict=True):
            close(one.clip_D, other.clip_D)
            close(one.frames_TD, other.frames_TD)
            assert one.times_ms_T.tolist() == other.times_ms_T.tolist()


def test_padding_reaches_no_mean(model):
    """The mean is over the columns that begin in the sound, attending to sound alone."""
    wave_S = babble(0.5, RATE_HZ)
    told = model.embed_audio(wave_S, RATE_HZ)[0]
    frames = model.mel.frames_of(len(wave_S))
    columns = -(-frames // 16)
    from pipeline.audio.mel import log_mel

    mel_TF = (log_mel(torch.from_numpy(wave_S)[None], model.mel)[0] - model.model.mean) / model.model.std
    loud_TF = torch.full((64, 128), 50.0)
    loud_TF[:frames] = mel_TF
    valid_BP = torch.arange(32)[None] < columns * 8
    loud_TF[frames : columns * 16] = 0  # what the last patch sees past the end is the mean, as in training
    with torch.inference_mode():
        tokens_PD = model.encoder(loud_TF[None], valid_BP=valid_BP)[0]
    close(told.clip_D, tokens_PD[: columns * 8].mean(0), 1e-4)


def test_every_column_of_a_long_sound_is_told_once_with_context_on_both_sides(model):
    """Twenty windows, overlapping by half: as many frames as columns, evenly spaced, none past the end."""
    told = model.embed_audio(babble(7.03, RATE_HZ), RATE_HZ)[0]
    gaps_ms = told.times_ms_T.diff()
    assert gaps_ms.sub(160.0).abs().max() < 1e-6
    assert told.times_ms_T[0] == pytest.approx((15 * 320 + 800) / 2 / 32)
    assert 7_030 - 160 < told.times_ms_T[-1] <= 7_030
    assert len(told.frames_TD) == len(told.times_ms_T) == 1 + int((7_030 - 87.5) // 160)


def test_shifts_lay_frames_between_frames_and_leave_the_rest(model):
    """Four begun a quarter of a column apart: 40 ms instead of 160; each fourth is the old one."""
    wave_BS = np.stack([babble(2.0, RATE_HZ), babble(2.0, RATE_HZ, seed=1)])
    plain, fine = model.embed_audio(wave_BS, RATE_HZ), model.embed_audio(wave_BS, RATE_HZ, shifts=4)
    for one, four in zip(plain.each, fine.each, strict=True):
        assert four.times_ms_T.diff().sub(40.0).abs().max() < 1e-6
        assert four.times_ms_T[-1] <= 2_000
        close(four.frames_TD[::4], one.frames_TD)
        close(four.clip_D, one.clip_D)
        later = model.embed_audio(wave_BS[0, 4 * 320 :], RATE_HZ)[0]
    close(fine[0].frames_TD[1::4][:3], later.frames_TD[:3], 1e-4)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".m4a", ".opus"])
def test_a_file_that_streams_is_the_array_it_decodes_to(model, tmp_path, suffix):
    """Decoded, resampled and transformed in pieces, and all at once: the same frames."""
    from pipeline.audio.decode import load_clip_audio
    from pipeline.audio.sources import SoundLocator

    rate_hz = 48_000 if suffix == ".opus" else 44_100
    path = write(tmp_path / f"a{suffix}", np.stack([babble(21.3, rate_hz)] * 2, 1), rate_hz)
    audio = load_clip_audio(SoundLocator.from_path(path), start_seconds=0, end_seconds=60)
    array = model.embed_audio(audio.resample_wave(RATE_HZ), RATE_HZ)[0]
    file = model.embed(path)[0]
    assert file.seconds == pytest.approx(array.seconds, abs=2e-4)
    close(file.frames_TD, array.frames_TD)
    close(file.clip_D, array.clip_D)


def test_another_front_end_is_streamed_as_well(store_path):
    """Centred frames reach back and ahead, and over the ends: pieces must not show."""
    grid = replace(tiny().model.encoder.grid)
    spec = replace(tiny().model.encoder, grid=grid)
    encoder = Encoder(spec, seed=3)
    trained = PretrainedEncoder(
        spec=spec, mel=PASST, mean=-5.0, std=3.0, weights=encoder.state_dict(), origin={}
    )
    model = Embedder(trained, device="cpu")
    wave_S = babble(30.0, RATE_HZ)
    whole = model.embed_audio(wave_S, RATE_HZ)[0]
    from pipeline.audio.mel import log_mel

    mel_TF = log_mel(torch.from_numpy(wave_S)[None], PASST)[0]
    from ajepa.embed.windows import SoundStream

    (once,) = model.iterate_embeddings([lambda: SoundStream([mel_TF], 30.0)])
    close(whole.frames_TD, once.frames_TD)
    assert whole.times_ms_T[0] == pytest.approx(7.5 * 10)


def test_frequency_pooling_keeps_the_rows_apart_and_their_mean_is_the_mean(run_path):
    """Eight rows, eight times as wide."""
    mean, rows = (ajepa.load(run_path, device="cpu", pooling=name) for name in ("mean", "frequency"))
    wave_S = babble(3.0, RATE_HZ)
    one, wide = mean.embed_audio(wave_S, RATE_HZ)[0], rows.embed_audio(wave_S, RATE_HZ)[0]
    assert wide.clip_D.shape == (rows.width,) == (8 * mean.width,)
    close(wide.clip_D.unflatten(0, (8, -1)).mean(0), one.clip_D)


def test_what_cannot_be_used_says_why(model, tmp_path, store_path):
    """Each mistake in one line; a silent file is a sound like others."""
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(AudioError, match=r"text\.wav"):
        model.embed([tmp_path / "text.wav"])
    with pytest.raises(AudioError, match="less than one frame"):
        model.embed_audio(np.zeros(100, np.float32), RATE_HZ)
    with pytest.raises(AudioError, match="NaN"):
        model.embed_audio(np.full(32_000, np.nan, np.float32), RATE_HZ)
    with pytest.raises(RunError, match=r"expected \[B, S\]"):
        model.embed_audio(np.zeros((1, 2, 100), np.float32), RATE_HZ)
    silent = write(tmp_path / "silent.wav", np.zeros(32_000), RATE_HZ)
    assert model.embed(str(silent)).clips_BD.isfinite().all()


@pytest.mark.parametrize(
    ("wave", "how", "told"),
    [
        (np.full(32_000, 1_000, np.int16), {}, r"torch\.int16: expected floats in \[-1, 1\]; divide 16-bit"),
        (np.full(32_000, 1e30, np.float32), {}, "up to 1e\\+30 times full scale"),
        (np.zeros(32_000), {"samples_B": [32_001]}, "a length for each of 1 waves, of at most 32000 samples"),
        (np.zeros((2, 32_000)), {"samples_B": [9_000]}, "a length for each of 2 waves"),
        (np.zeros(32_000), {"samples_B": [-1]}, r"samples_B \[-1\]"),
        (np.zeros(32_000), {"batch": 0}, "batch 0: expected 1 window or more"),
        (np.zeros(32_000), {"rate_hz": 0}, "audio at 0 Hz: expected a rate above 0"),
    ],
)
def test_waves_that_are_none_are_refused(model, wave, how, told):
    """Each would give numbers, or take all memory, and nobody would know why."""
    with pytest.raises((RunError, AudioError), match=told):
        model.embed_audio(wave, **{"rate_hz": RATE_HZ, **how})


def test_odd_waves_and_files_are_sounds_like_others(model, run_path, tmp_path):
    """Backwards in memory, six channels, a rate of its own, no sound at all; a layer by its name."""
    wave_S = babble(2.0, RATE_HZ)
    backwards_S = np.ascontiguousarray(wave_S[::-1])[::-1]
    close(model.embed_audio(backwards_S, RATE_HZ).clips_BD, model.embed_audio(wave_S, RATE_HZ).clips_BD)
    six = write(tmp_path / "six.wav", np.stack([wave_S] * 6, 1), RATE_HZ)
    one = write(tmp_path / "one.wav", wave_S, RATE_HZ)
    odd = write(tmp_path / "odd.wav", babble(2.0, 12_345), 12_345)
    told = model.embed([six, one, odd])
    close(told[0].clip_D, told[1].clip_D, 1e-4)
    assert told[2].seconds == pytest.approx(2.0, abs=1e-4)
    assert model.embed([]).clips_BD.shape == (0, model.width)
    named, meant = (
        ajepa.load(run_path, device="cpu", layer=layer) for layer in ("block-1", EncoderLayer(block_number=1))
    )
    close(named.embed_audio(wave_S, RATE_HZ).clips_BD, meant.embed_audio(wave_S, RATE_HZ).clips_BD)


@pytest.mark.parametrize("spec", [PASST, preset_mel_spec("a-jepa")], ids=lambda spec: spec.name)
def test_a_row_of_a_store_ends_where_its_sound_did_and_not_after_it(model, spec):
    """To less than a hop; of centred frames the last one looks half a window past the end of the sound."""
    other = Embedder(replace(model.model, mel=spec), device="cpu")
    samples = 3 * RATE_HZ + 77
    frames = spec.frames_of(samples)
    row = SimpleNamespace(
        n_frames_N=np.array([frames]), read=lambda rows_N: np.zeros((1, frames, 128)), scale=1, offset=0
    )
    seconds = other.row_opener(row, 0)().seconds
    assert 0 <= samples / RATE_HZ - seconds < spec.hop_samples / RATE_HZ


def test_a_store_of_another_front_end_is_refused(model, store):
    """A network fed with other mels answers, and answers wrongly; shorter clips of the same are welcome."""
    other = FeatureStore(store.path, store.header, store.manifest, store.store_id)
    other.spec = replace(preset_mel_spec("a-jepa"), hop_samples=400)
    with pytest.raises(RunError, match="the model needs a-jepa"):
        list(model.embed_store(other, np.array([0])))
    other.spec = replace(preset_mel_spec("a-jepa"), clip_seconds=5.0)
    other.refuse_other_front_end(model.mel, "the model needs")


def test_a_pooling_over_time_is_refused(run_path):
    """Moments are of a whole clip: its frames would have none."""
    with pytest.raises(RunError, match="embed with mean or frequency"):
        ajepa.load(run_path, pooling="moments")
