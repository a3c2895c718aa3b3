"""Embeddings: alike from files, arrays and store rows, at any rate and length, and of nothing but the sound."""

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
import pipeline
from ajepa.embed.embedder import Embedder, Embedding
from ajepa.embed.pretrained import PretrainedEncoder
from ajepa.embed.table import EmbeddingJob
from ajepa.embed.windows import SoundStream
from ajepa.evaluate.features import ClipViews, clip_vectors
from ajepa.model.patches import PatchGrid
from ajepa.model.pooling import EncoderLayer
from ajepa.model.vit import Encoder
from ajepa.pretrain.pretrain import pretrain
from pipeline.audio.decode import load_clip_audio
from pipeline.audio.mel import log_mel
from pipeline.audio.mel_spec import PASST, preset_mel_spec
from pipeline.audio.sources import SoundLocator
from pipeline.errors import AudioError, RunError
from pipeline.loading.loader import PlainLoader, View
from pipeline.loading.sampling import RowOrder
from pipeline.store.feature_store import FeatureStore

RATE_HZ = 32_000


@pytest.fixture(scope="module")
def run_path(store_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    return pretrain(store_path, tiny(), path, steps=2, device="cpu", say=lambda line: None).path


@pytest.fixture(scope="module")
def model(run_path) -> Embedder:
    return ajepa.load(run_path, device="cpu", pooling="mean", layer="last")


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def embed_rows(model: Embedder, store: FeatureStore, rows_N: np.ndarray) -> list[Embedding]:
    return list(model.iterate_embeddings(model.row_opener(store, int(row)) for row in rows_N))


def test_importing_the_package_loads_no_heavy_library():
    """`import ajepa` belongs into anybody's script; torch comes when a model is loaded."""
    heavy = "{'torch', 'numpy', 'polars', 'zarr'}"
    code = f"import ajepa, pipeline, sys; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_store_is_a_name_of_its_package():
    """`pipeline.FeatureStore.open(...)`, and nothing else by accident."""
    assert pipeline.FeatureStore is FeatureStore
    with pytest.raises(AttributeError, match="no attribute 'FeatureStor'"):
        _ = pipeline.FeatureStor


def test_a_files_embedding_is_that_of_its_row_in_the_store(model, store, corpus):
    """Same decoder, same mel, same normalisation: the store differs by its rounding to float16 alone."""
    # A clip that the store cut out of a longer file is not the file.
    rows_N = store.good_rows()[:6]
    is_whole_N = np.array(["cut" not in store.manifest["flags"][int(row)] for row in rows_N])
    rows_N = rows_N[is_whole_N]
    assert len(rows_N) > 2

    paths = [corpus / "audio" / store.manifest["source"][int(row)] for row in rows_N]
    from_files = model.embed(paths)
    from_rows = embed_rows(model, store, rows_N)
    for file, row in zip(from_files.per_sound, from_rows, strict=True):
        assert_close(file.clip_D, row.clip_D, 2e-3)
        assert_close(file.frames_TD, row.frames_TD, 2e-2)


@pytest.mark.parametrize("layer", ["last", "concat-all"])
@pytest.mark.parametrize("pooling", ["mean", "frequency", "moments"])
def test_without_overlap_the_clip_is_what_evaluate_measures(run_path, store, pooling, layer):
    """Scores in evaluation.json speak of vectors that a user can have."""
    model = ajepa.load(run_path, device="cpu", pooling=pooling, layer=layer, overlap=0)
    rows_N = store.good_rows()[:5]
    views = ClipViews(store=store, frames=64, mean=model.pretrained.mean, std=model.pretrained.std)
    expected_ND = torch.from_numpy(
        clip_vectors(views, rows_N, model.encoder, pooling=pooling, layer=EncoderLayer.from_name(layer))
    )
    clips_ND = torch.stack([embedding.clip_D for embedding in embed_rows(model, store, rows_N)])
    assert expected_ND.shape[1] == model.width
    assert_close(clips_ND, expected_ND)


def test_a_clip_that_a_loader_made_has_the_columns_of_its_row(model, store):
    """Training, evaluation and embedding see the same end of a sound; this encoder sees whole clips."""
    spec = replace(model.pretrained.spec, grid=PatchGrid.from_size(1024, 128))
    embedder = Embedder(replace(model.pretrained, spec=spec), device="cpu", pooling="mean", layer="last")
    view = View(frames=1024, mean=model.pretrained.mean, std=model.pretrained.std)
    order = RowOrder(rows_N=store.good_rows()[:8], clips=8, seed=0)
    batch = PlainLoader(store, order, view).make_batch(0)
    assert (batch.n_frames_B % 16 > 0).any()
    columns_BCD = embedder.encode_columns(batch.mel_BTF, batch.n_frames_B)
    embeddings = embed_rows(embedder, store, batch.rows_B)
    for columns_CD, frames, embedding in zip(columns_BCD, batch.n_frames_B, embeddings, strict=True):
        columns = -(-int(frames) // 16)
        assert_close(embedding.clip_D, columns_CD[:columns].mean(0))


def chord(seconds: float, rate_hz: int, *, lowest_hz: float) -> np.ndarray:
    """Five tones that swell and fade, each a formula: the same sound at every rate above 7 kHz."""
    time_S = np.arange(round(seconds * rate_hz)) / rate_hz
    tones = [
        np.sin(2 * np.pi * lowest_hz * k * time_S) * (1 + np.sin(2 * np.pi * k * time_S)) for k in range(1, 6)
    ]
    return 0.05 * np.sum(tones, axis=0)


@pytest.mark.parametrize(("rate_hz", "channels"), [(8_000, 1), (44_100, 2), (48_000, 2), (22_050, 1)])
def test_a_sound_at_another_rate_has_nearly_the_same_embedding(model, tmp_path, rate_hz, channels):
    """Sound below half the lower rate is not changed by resampling; another sound is far."""
    wave_S = chord(3.0, rate_hz, lowest_hz=300)
    resampled = write(
        tmp_path / "resampled.wav", np.repeat(wave_S[:, None], channels, 1), rate_hz, subtype="FLOAT"
    )
    same, different = (
        write(tmp_path / f"{hz}.wav", chord(3.0, RATE_HZ, lowest_hz=hz), RATE_HZ, subtype="FLOAT")
        for hz in (300, 430)
    )
    embeddings = model.embed([resampled, same, different])
    far = (embeddings[1].clip_D - embeddings[2].clip_D).norm()
    assert (embeddings[0].clip_D - embeddings[1].clip_D).norm() < 0.1 * far
    assert embeddings[0].seconds == pytest.approx(3.0, abs=1e-4)
    assert embeddings[0].frames_TD.shape == embeddings[1].frames_TD.shape


def test_neighbours_in_a_batch_do_not_matter(model):
    """Alone, in company, in small batches or large: the same vector."""
    waves = [babble(seconds, RATE_HZ, seed=seed) for seed, seconds in enumerate((2.0, 0.3, 7.1, 1.0))]
    alone = [model.embed_audio(wave_S, RATE_HZ)[0] for wave_S in waves]
    lengths = [len(wave_S) for wave_S in waves]
    together_BS = np.stack(
        [np.pad(wave_S, (0, max(lengths) - len(wave_S)), constant_values=0.7) for wave_S in waves]
    )
    for batch in (1, 3, 32):
        together = model.embed_audio(together_BS, RATE_HZ, samples_B=lengths, batch=batch)
        for expected, actual in zip(alone, together.per_sound, strict=True):
            assert_close(expected.clip_D, actual.clip_D)
            assert_close(expected.frames_TD, actual.frames_TD)
            assert expected.times_ms_T.tolist() == actual.times_ms_T.tolist()


def test_padding_enters_no_mean(model):
    """The mean is over the columns that begin in the sound, attending to sound alone; its last frame fills the last."""
    wave_S = babble(0.47, RATE_HZ)
    embedding = model.embed_audio(wave_S, RATE_HZ)[0]
    frames = model.mel.frames_of(len(wave_S))
    columns = -(-frames // 16)
    mel_TF = log_mel(torch.from_numpy(wave_S)[None], model.mel)[0]

    # A view that is loud after its last column; what the last patch sees past the end is the last frame.
    view_TF = torch.full((64, 128), 50.0)
    view_TF[:frames] = (mel_TF - model.pretrained.mean) / model.pretrained.std
    view_TF[frames : columns * 16] = view_TF[frames - 1].clone()
    assert frames % 16
    valid_BP = torch.arange(32)[None] < columns * 8
    with torch.inference_mode():
        tokens_PD = model.encoder(view_TF[None], valid_BP=valid_BP)[0]
    assert_close(embedding.clip_D, tokens_PD[: columns * 8].mean(0), 1e-4)

    # The same sound with its last frame repeated to the end of the column.
    longer_TF = torch.cat((mel_TF, mel_TF[-1:].expand(columns * 16 - frames, -1)))
    (longer,) = model.iterate_embeddings([lambda: SoundStream([longer_TF], 0.47)])
    assert_close(embedding.clip_D, longer.clip_D)


def test_every_column_of_a_long_sound_is_embedded_once(model):
    """Twenty windows, overlapping by half: as many frames as columns, evenly spaced, none past the end."""
    embedding = model.embed_audio(babble(7.03, RATE_HZ), RATE_HZ)[0]
    gaps_ms = embedding.times_ms_T.diff()
    assert gaps_ms.sub(160.0).abs().max() < 1e-6
    assert embedding.times_ms_T[0] == pytest.approx((15 * 320 + 800) / 2 / 32)
    assert 7_030 - 160 < embedding.times_ms_T[-1] <= 7_030
    assert len(embedding.frames_TD) == len(embedding.times_ms_T) == 1 + int((7_030 - 87.5) // 160)


def test_shifts_lay_frames_between_frames_and_leave_the_rest(model):
    """Four begun a quarter of a column apart: 40 ms instead of 160; each fourth is the old one."""
    wave_BS = np.stack([babble(2.0, RATE_HZ), babble(2.0, RATE_HZ, seed=1)])
    coarse = model.embed_audio(wave_BS, RATE_HZ)
    fine = model.embed_audio(wave_BS, RATE_HZ, shifts=4)
    for unshifted, interleaved in zip(coarse.per_sound, fine.per_sound, strict=True):
        assert interleaved.times_ms_T.diff().sub(40.0).abs().max() < 1e-6
        assert interleaved.times_ms_T[-1] <= 2_000
        assert_close(interleaved.frames_TD[::4], unshifted.frames_TD)
        assert_close(interleaved.clip_D, unshifted.clip_D)
    later = model.embed_audio(wave_BS[0, 4 * 320 :], RATE_HZ)[0]
    assert_close(fine[0].frames_TD[1::4][:3], later.frames_TD[:3], 1e-4)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".m4a", ".opus"])
def test_a_file_that_streams_is_the_array_it_decodes_to(model, tmp_path, suffix):
    """Decoded, resampled and transformed in pieces, and all at once: the same frames."""
    rate_hz = 48_000 if suffix == ".opus" else 44_100
    path = write(tmp_path / f"a{suffix}", np.stack([babble(21.3, rate_hz)] * 2, 1), rate_hz)
    audio = load_clip_audio(SoundLocator.from_path(path), start_seconds=0, end_seconds=60)
    from_array = model.embed_audio(audio.resample_wave(RATE_HZ), RATE_HZ)[0]
    from_file = model.embed(path)[0]
    assert from_file.seconds == pytest.approx(from_array.seconds, abs=2e-4)
    assert_close(from_file.frames_TD, from_array.frames_TD)
    assert_close(from_file.clip_D, from_array.clip_D)


def test_pieces_do_not_show_with_centred_frames(store_path):
    """Centred frames reach back and ahead, and over the ends of the sound."""
    spec = tiny().model.encoder
    weights = Encoder(spec, seed=3).state_dict()
    pretrained = PretrainedEncoder(spec=spec, mel=PASST, mean=-5.0, std=3.0, weights=weights, origin={})
    model = Embedder(pretrained, device="cpu")
    wave_S = babble(30.0, RATE_HZ)
    in_pieces = model.embed_audio(wave_S, RATE_HZ)[0]
    mel_TF = log_mel(torch.from_numpy(wave_S)[None], PASST)[0]
    (at_once,) = model.iterate_embeddings([lambda: SoundStream([mel_TF], 30.0)])
    assert_close(in_pieces.frames_TD, at_once.frames_TD)
    assert in_pieces.times_ms_T[0] == pytest.approx(7.5 * 10)


def test_frequency_pooling_keeps_the_rows_apart_and_their_mean_is_the_mean(run_path):
    """Eight rows, eight times as wide."""
    by_mean, by_row = (
        ajepa.load(run_path, device="cpu", pooling=name, layer="last") for name in ("mean", "frequency")
    )
    wave_S = babble(3.0, RATE_HZ)
    mean = by_mean.embed_audio(wave_S, RATE_HZ)[0]
    rows = by_row.embed_audio(wave_S, RATE_HZ)[0]
    assert rows.clip_D.shape == (by_row.width,) == (8 * by_mean.width,)
    assert_close(rows.clip_D.unflatten(0, (8, -1)).mean(0), mean.clip_D)


def test_moments_of_a_long_sound_are_those_of_all_its_columns(run_path):
    """Windows overlap, and every column counts once; the frames are those of frequency pooling."""
    by_row, by_moments = (
        ajepa.load(run_path, device="cpu", pooling=name, layer="concat-all")
        for name in ("frequency", "moments")
    )
    wave_S = babble(8.0, RATE_HZ)
    rows = by_row.embed_audio(wave_S, RATE_HZ)[0]
    moments = by_moments.embed_audio(wave_S, RATE_HZ)[0]
    assert torch.equal(moments.frames_TD, rows.frames_TD)
    assert rows.frames_TD.shape[1] == by_moments.frame_width == by_row.width == 8 * 2 * 32
    assert by_moments.width == 2 * by_moments.frame_width
    mean_D, std_D = moments.clip_D.chunk(2)
    assert torch.equal(mean_D, rows.clip_D)

    # The centre of the last column is inside this sound, so no column is missing from the frames.
    assert len(rows.frames_TD) == -(-by_row.mel.frames_of(len(wave_S)) // 16)
    assert_close(std_D, rows.frames_TD.std(0, correction=0), 1e-4)

    # Without its frames, in shifted copies, in other company: the same vector.
    opener = by_moments._array_opener(wave_S, RATE_HZ, 0)
    (without_frames,) = by_moments.iterate_embeddings([opener], frames=False, batch=3)
    assert_close(without_frames.clip_D, moments.clip_D)
    shifted = by_moments.embed_audio(wave_S, RATE_HZ, shifts=2)[0]
    assert_close(shifted.clip_D, moments.clip_D)
    assert by_moments.embed([]).clips_BD.shape == (0, by_moments.width)


def test_an_unusable_sound_says_why(model, tmp_path, store_path):
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
    ("wave", "options", "message"),
    [
        (
            np.full(32_000, 1_000, np.int64),
            {},
            r"audio of int64: expected floats in \[-1, 1\], int16, int32 or",
        ),
        (np.full(32_000, 1e30, np.float32), {}, "up to 1e\\+30 times full scale"),
        (np.zeros(32_000), {"samples_B": [32_001]}, "a length for each of 1 waves, of at most 32000 samples"),
        (np.zeros((2, 32_000)), {"samples_B": [9_000]}, "a length for each of 2 waves"),
        (np.zeros(32_000), {"samples_B": [-1]}, r"samples_B \[-1\]"),
        (
            np.zeros((44_100, 2), np.int16),
            {},
            r"\[44100, 2\]: is read as 44100 sounds of 2 samples, \[B, S\]; embed\(audio, rate_hz=...\) takes",
        ),
        (np.zeros(0), {}, "the array is empty; expected samples"),
        (np.zeros(32_000), {"batch": 0}, "batch 0: expected 1 window or more"),
        (np.zeros(32_000), {"rate_hz": 0}, "audio at 0 Hz: expected a whole number from 1,000 to 768,000"),
    ],
)
def test_impossible_waves_are_refused(model, wave, options, message):
    """Each would give numbers, or take all memory, and nobody would know why."""
    with pytest.raises((RunError, AudioError), match=message):
        model.embed_audio(wave, **{"rate_hz": RATE_HZ, **options})


def test_odd_waves_and_files_are_sounds_like_others(model, run_path, tmp_path):
    """Backwards in memory, six channels, a rate of its own, no sound at all."""
    wave_S = babble(2.0, RATE_HZ)
    backwards_S = np.ascontiguousarray(wave_S[::-1])[::-1]
    assert_close(
        model.embed_audio(backwards_S, RATE_HZ).clips_BD, model.embed_audio(wave_S, RATE_HZ).clips_BD
    )
    six_channels = write(tmp_path / "six.wav", np.stack([wave_S] * 6, 1), RATE_HZ)
    one_channel = write(tmp_path / "one.wav", wave_S, RATE_HZ)
    odd_rate = write(tmp_path / "odd.wav", babble(2.0, 12_345), 12_345)
    embeddings = model.embed([six_channels, one_channel, odd_rate])
    assert_close(embeddings[0].clip_D, embeddings[1].clip_D, 1e-4)
    assert embeddings[2].seconds == pytest.approx(2.0, abs=1e-4)
    assert model.embed([]).clips_BD.shape == (0, model.width)


def test_a_layer_may_be_given_by_its_name(run_path):
    """As on the command line."""
    wave_S = babble(2.0, RATE_HZ)
    by_name, by_value = (
        ajepa.load(run_path, device="cpu", layer=layer) for layer in ("block-1", EncoderLayer(block_number=1))
    )
    assert_close(
        by_name.embed_audio(wave_S, RATE_HZ).clips_BD, by_value.embed_audio(wave_S, RATE_HZ).clips_BD
    )


@pytest.mark.parametrize("spec", [PASST, preset_mel_spec("a-jepa")], ids=lambda spec: spec.name)
def test_a_row_of_a_store_ends_where_its_sound_did_and_not_after_it(model, spec):
    """To less than a hop; of centred frames the last one looks half a window past the end of the sound."""
    embedder = Embedder(replace(model.pretrained, mel=spec), device="cpu")
    samples = 3 * RATE_HZ + 77
    frames = spec.frames_of(samples)
    store = SimpleNamespace(
        n_frames_N=np.array([frames]),
        read=lambda rows_N: np.zeros((1, frames, 128)),
        to_log_mel=lambda stored: stored,
    )
    seconds = embedder.row_opener(store, 0)().seconds
    assert 0 <= samples / RATE_HZ - seconds < spec.hop_samples / RATE_HZ


def test_a_store_of_another_front_end_is_refused(model, store):
    """A network fed with other mels answers, and answers wrongly; shorter clips of the same are welcome."""
    other = FeatureStore(store.path, store.header, store.manifest, store.store_id)
    other.spec = replace(preset_mel_spec("a-jepa"), hop_samples=400)
    with pytest.raises(RunError, match="the model needs a-jepa"):
        EmbeddingJob.from_store(other, model)
    other.spec = replace(preset_mel_spec("a-jepa"), clip_seconds=5.0)
    assert len(EmbeddingJob.from_store(other, model).rows) == len(store.good_rows())


def test_a_layer_that_the_encoder_lacks_is_refused_when_it_is_loaded(run_path):
    """Before a long table is begun."""
    with pytest.raises(RunError, match="layer concat-2: the encoder has 1 blocks"):
        ajepa.load(run_path, layer="concat-2")
