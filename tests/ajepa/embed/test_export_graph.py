"""Graphs: the model's own embeddings and log-mel, from one file, for every mel spec, at every length and rate."""

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from own_specs import OWN, own_spec
from sounds import babble
from tiny import tiny

from ajepa.embed.embedder import Embedder
from ajepa.embed.export import LONG_SOUND_LINES
from ajepa.embed.export_graph import (
    GRAPH_INPUTS,
    GRAPH_OUTPUTS,
    ONNX_OPSET,
    AudioGraph,
    FrontEnd,
    Resampler,
    write_onnx,
    write_program,
)
from ajepa.embed.pretrained import PretrainedEncoder
from ajepa.model.patches import PatchGrid
from ajepa.model.vit import Encoder, EncoderSpec
from pipeline.audio.decode import resample_blocks
from pipeline.audio.mel import log_mel
from pipeline.audio.mel_spec import A_JEPA, MEL_PRESETS, MelSpec
from pipeline.errors import RunError

RATE_HZ = 32_000

# Together the graphs below have every kind of encoder, pooling, layer and front end.
ENCODER_OPTIONS = {"passt": {"band_norm": True, "positions": "rope"}}
POOLINGS = {"passt": {"pooling": "moments", "layer": "concat-all"}}


def make_embedder(mel: MelSpec, **options: object) -> Embedder:
    grid = PatchGrid.from_size(64, mel.mel_bands)
    spec = EncoderSpec(grid=grid, width=32, depth=1, heads=2, **ENCODER_OPTIONS.get(mel.name, {}))
    encoder = Encoder(spec, seed=1)
    encoder.set_band_statistics(
        torch.linspace(-0.5, 0.5, mel.mel_bands), torch.linspace(0.5, 1.5, mel.mel_bands)
    )
    pretrained = PretrainedEncoder(
        spec=spec, mel=mel, mean=-9.0, std=4.0, weights=encoder.state_dict(), origin={}
    )
    return Embedder(pretrained, device="cpu", **options)


def three_waves(samples: int) -> np.ndarray:
    """Three kinds of sound; in the bands beside a full-scale tone the values are rounding alone."""
    noise_S = np.random.default_rng(0).uniform(-1, 1, samples)
    tone_S = np.sin(2 * np.pi * 440 / RATE_HZ * np.arange(samples))
    return np.stack([babble(4.0, RATE_HZ)[:samples], noise_S, tone_S]).astype(np.float32)


@pytest.mark.parametrize("name", ["a-jepa-16k", "passt"])
def test_onnx_gives_what_the_model_gives(name, tmp_path):
    """To 1e-3, any batch, full windows and short ones; audio past a sound's end is not heard.

    Resampled Kaldi frames into the default encoder, and centred frames after pre-emphasis into one with every option.
    """
    pytest.importorskip("onnxscript", reason="ONNX is an extra: pip install 'ajepa[export]'")
    onnx = pytest.importorskip("onnx", reason="ONNX is an extra")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX is an extra")
    model = make_embedder(MEL_PRESETS[name], **POOLINGS.get(name, {}))
    graph = AudioGraph(model)
    file = tmp_path / "a.onnx"
    write_onnx(graph, file)

    # The file says which opset, model, rate and window it has.
    assert [opset.version for opset in onnx.load(file).opset_import if not opset.domain] == [ONNX_OPSET]
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["model_id"] == model.pretrained.model_id
    assert (int(metadata["sample_rate_hz"]), int(metadata["samples"])) == (RATE_HZ, graph.samples)

    # A batch of full windows and a short one.
    audio_BS = three_waves(graph.samples)
    lengths_B = np.array([graph.samples, 12_345, graph.samples], np.int64)
    expected = model.embed_audio(audio_BS, RATE_HZ, samples_B=lengths_B.tolist())
    audio_BS[1, 12_345:] = np.nan
    clip_BD, frames_BCD, count_B = session.run(None, {"audio": audio_BS, "samples": lengths_B})
    # A row beside a tone is rounding; the mean over rows hides it.
    frame_tolerance = 1e-3 if model.pooling == "mean" else 5e-3
    np.testing.assert_allclose(clip_BD, expected.clips_BD, atol=frame_tolerance)
    sound_tolerance = 2e-5 if model.pooling == "mean" else 5e-4
    np.testing.assert_allclose(clip_BD[:2], expected.clips_BD[:2], atol=sound_tolerance)
    for frames_CD, count, embedding in zip(frames_BCD, count_B, expected.per_sound, strict=True):
        # The centre of a last column may lie past the end of the sound.
        frames = len(embedding.frames_TD)
        assert 0 <= count - frames <= 1
        np.testing.assert_allclose(frames_CD[:frames], embedding.frames_TD, atol=frame_tolerance)

    # The short one alone.
    alone_BD = session.run(["clip"], {"audio": audio_BS[1:2], "samples": lengths_B[1:2]})[0]
    np.testing.assert_allclose(alone_BD[0], clip_BD[1], atol=1e-6)


@pytest.mark.parametrize(
    ("pooling", "layer", "rate_hz"),
    [("frequency", "last", 48_000), ("moments", "concat-all", RATE_HZ), ("mean", "mean-1", RATE_HZ)],
)
def test_a_torch_program_gives_what_the_model_gives(tmp_path, pooling, layer, rate_hz):
    """Loaded without this package's code; a view of a centred front end, of audio at another rate; a short sound."""
    model = make_embedder(MEL_PRESETS["panns"], pooling=pooling, layer=layer)
    graph = AudioGraph(model, rate_hz)
    write_program(graph, tmp_path / "a.pt2")
    files = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=files).module()
    metadata = json.loads(files["metadata.json"])
    assert (metadata["pooling"], metadata["layer"]) == (pooling, layer)
    audio_BS = torch.from_numpy(babble(1.0, rate_hz)[None, : graph.samples]).repeat(2, 1)
    samples = [graph.samples, 13_000]
    with torch.inference_mode():
        clip_BD, frames_BCD, _ = program(audio_BS, torch.tensor(samples))
    expected = model.embed_audio(audio_BS, rate_hz, samples_B=samples)
    assert (clip_BD.shape[1], frames_BCD.shape[2]) == (model.width, model.frame_width)
    torch.testing.assert_close(clip_BD, expected.clips_BD, atol=2e-4, rtol=0)
    for frames_CD, embedding in zip(frames_BCD, expected.per_sound, strict=True):
        frames = len(embedding.frames_TD)
        torch.testing.assert_close(frames_CD[:frames], embedding.frames_TD, atol=2e-4, rtol=0)


def embed_long_of(graph: AudioGraph) -> Callable[[np.ndarray], np.ndarray]:
    """The function of the model card, with a graph where the ONNX file would be."""

    def run(names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        with torch.inference_mode():
            outputs = graph(*(torch.from_numpy(inputs[name]) for name in GRAPH_INPUTS))
        return [outputs[GRAPH_OUTPUTS.index(name)].numpy() for name in names]

    columns = SimpleNamespace(shape=["batch", graph.grid.cols, "values"])
    names = {
        "np": np,
        "metadata": {key: str(value) for key, value in graph.metadata.items()},
        "session": SimpleNamespace(run=run, get_outputs=lambda: [None, columns, None]),
        "window": graph.samples,
    }
    exec("\n".join(LONG_SOUND_LINES).partition("```python\n")[2].partition("```")[0], names)
    return names["embed_long"]


@pytest.mark.parametrize(
    ("pooling", "layer"), [("mean", "last"), ("frequency", "mean-1"), ("moments", "concat-all")]
)
def test_the_cards_windows_give_the_packages_vector_of_a_sound_of_any_length(pooling, layer):
    """To 1e-3: shorter than a window, one sample more, a last window that overlaps by more, 7 s."""
    model = make_embedder(A_JEPA, pooling=pooling, layer=layer)
    graph = AudioGraph(model)
    assert "which give the vector of the package." in graph.describe_interface()[-1]
    embed_long = embed_long_of(graph)
    sound_S = babble(7.0, RATE_HZ)
    for samples in (900, 12_345, graph.samples, graph.samples + 320, 60_001, len(sound_S)):
        expected_D = model.embed(sound_S[:samples], rate_hz=RATE_HZ)[0].clip_D
        np.testing.assert_allclose(embed_long(sound_S[:samples]), expected_D, atol=1e-3)
    with pytest.raises(ValueError, match="shorter than a frame"):
        embed_long(sound_S[:799])


@pytest.mark.parametrize("name", ["a-jepa-16k", "panns", "passt"])
def test_windows_that_hear_their_own_ends_are_said_to_be_close_only(name):
    """Resampled or mirrored window by window, a long sound has another vector, but not by much."""
    model = make_embedder(MEL_PRESETS[name], pooling="mean", layer="last")
    graph = AudioGraph(model)
    assert "close to the vector of the package, but not to the last digit" in graph.describe_interface()[-1]
    sound_S = babble(7.0, RATE_HZ)
    difference_D = embed_long_of(graph)(sound_S) - model.embed(sound_S, rate_hz=RATE_HZ)[0].clip_D.numpy()
    assert np.abs(difference_D).max() < 0.01


def test_a_graph_too_large_for_onnx_is_refused(tmp_path, monkeypatch):
    """Before anything is written; torch.export has no limit."""
    pytest.importorskip("onnxscript", reason="ONNX is an extra: pip install 'ajepa[export]'")
    monkeypatch.setattr("ajepa.embed.export_graph.MAX_ONNX_BYTES", 1e5)
    with pytest.raises(RunError, match="GB of weights do not fit an ONNX file; use --torch-export"):
        write_onnx(AudioGraph(make_embedder(MEL_PRESETS["a-jepa"])), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_the_graph_of_a_recipe_sees_as_much_as_its_encoder():
    """998 frames of A-JEPA are cut to whole patches, and the window to these."""
    assert AudioGraph(make_embedder(MEL_PRESETS["a-jepa"])).samples == (tiny().view_frames - 1) * 320 + 800


FRAMES = 24


def expected_mel_TF(wave_S: np.ndarray, spec: MelSpec, rate_hz: int) -> torch.Tensor:
    """The log-mel with which files and arrays are embedded."""
    if rate_hz != spec.sample_rate_hz:
        wave_S = np.concatenate(list(resample_blocks(iter([wave_S]), rate_hz, spec.sample_rate_hz)))
    return log_mel(torch.from_numpy(wave_S)[None], spec)[0]


def lengths_to_hear(front_end: FrontEnd) -> list[int]:
    """Two full windows, part of one, a single frame and one sample less."""
    window = front_end.samples
    noise_S = np.zeros(window, np.float32)
    shortest = next(n for n in range(1, 9_999) if len(expected_mel_TF(noise_S[:n], front_end.spec, RATE_HZ)))
    return [window, window, window * 2 // 3 + 1, shortest, shortest - 1]


def cut_waves(samples: int, lengths: list[int]) -> np.ndarray:
    """Noise, babble and noise again, with nan past the end of each."""
    noise_S = np.random.default_rng(0).uniform(-1, 1, samples).astype(np.float32)
    audio_BS = np.stack([noise_S, babble(4.0, RATE_HZ)[:samples], *[noise_S] * 3])
    for wave_S, length in zip(audio_BS, lengths, strict=True):
        wave_S[length:] = np.nan
    return audio_BS


def assert_hears(
    spec: MelSpec,
    audio_BS: np.ndarray,
    lengths: list[int],
    mel_BTF: torch.Tensor,
    frames_B: torch.Tensor,
    tolerance: float = 1e-2,
) -> None:
    """Compare log-mel and numbers of frames with those of files and arrays."""
    assert mel_BTF.shape == (5, FRAMES, spec.mel_bands)
    assert frames_B[[0, 1, -2, -1]].tolist() == [FRAMES, FRAMES, 1, 0]
    for mel_TF, frames, wave_S, length in zip(mel_BTF, frames_B, audio_BS, lengths, strict=True):
        expected_TF = expected_mel_TF(wave_S[:length], spec, RATE_HZ)[:FRAMES]
        assert len(expected_TF) == frames
        if frames:
            # In bands without sound, beside loud ones, all is rounding.
            difference_TF = (mel_TF[:frames] - expected_TF).abs()
            assert difference_TF.quantile(0.98) < tolerance
            assert difference_TF.max() < 0.1


@pytest.mark.parametrize("name", [*MEL_PRESETS, *OWN])
def test_every_mel_spec_has_its_values_at_every_length(name, tmp_path):
    """Full windows, part of one, a single frame and none; what lies past the end, even nan, has no influence."""
    spec = MEL_PRESETS.get(name) or own_spec(name, tmp_path)
    front_end = FrontEnd(spec, FRAMES, RATE_HZ)
    lengths = lengths_to_hear(front_end)
    audio_BS = cut_waves(front_end.samples, lengths)
    assert_hears(spec, audio_BS, lengths, *front_end(torch.from_numpy(audio_BS), torch.tensor(lengths)))


class FrontEnds(torch.nn.Module):
    """Front ends beside each other, as one graph: what each costs to export is little beside what an export costs."""

    metadata: ClassVar[dict[str, object]] = {}

    def __init__(self, specs: list[MelSpec]) -> None:
        super().__init__()
        self.front_ends = torch.nn.ModuleList(FrontEnd(spec, FRAMES, RATE_HZ) for spec in specs)
        self.front_end = self.front_ends[0]
        self.samples = max(front_end.samples for front_end in self.front_ends)
        self.outputs = [f"{kind} of {spec.name}" for spec in specs for kind in ("mel", "frames")]

    def forward(self, audio_BS: torch.Tensor, samples_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(
            output
            for front_end in self.front_ends
            for output in front_end(audio_BS[:, : front_end.samples], samples_B)
        )


def test_every_kind_of_front_end_has_its_values_in_onnx(tmp_path):
    """The presets that no whole graph above has, and a rate that shares few divisors with that of the audio."""
    pytest.importorskip("onnxscript", reason="ONNX is an extra: pip install 'ajepa[export]'")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX is an extra")
    specs = [MEL_PRESETS[name] for name in ("a-jepa", "audio-jepa", "panns")]
    graph = FrontEnds([*specs, own_spec("cd-rate", tmp_path)])
    write_onnx(graph, tmp_path / "a.onnx")
    session = runtime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    for front_end in graph.front_ends:
        lengths = lengths_to_hear(front_end)
        audio_BS = cut_waves(graph.samples, lengths)
        inputs = {"audio": audio_BS, "samples": np.array(lengths, np.int64)}
        names = [f"{kind} of {front_end.spec.name}" for kind in ("mel", "frames")]
        mel_BTF, frames_B = (torch.from_numpy(values) for values in session.run(names, inputs))
        # One frame at the rate of a CD has more bands in which all is rounding.
        assert_hears(front_end.spec, audio_BS, lengths, mel_BTF, frames_B, tolerance=2e-2)


@pytest.mark.parametrize(
    ("from_hz", "to_hz"), [(32_000, 16_000), (8_000, 32_000), (44_100, 32_000), (32_000, 44_100)]
)
def test_audio_at_another_rate_is_resampled_as_soxr_does(from_hz, to_hz):
    """No other filter: sample for sample what soxr gives, beginning and end included."""
    spec = replace(A_JEPA, sample_rate_hz=to_hz, high_hz=to_hz / 2)
    front_end = FrontEnd(spec, FRAMES, from_hz)
    wave_S = np.random.default_rng(0).uniform(-1, 1, front_end.samples).astype(np.float32)
    for length in (front_end.samples, front_end.samples // 2 + 1):
        expected_S = np.concatenate(list(resample_blocks(iter([wave_S[:length]]), from_hz, to_hz)))
        actual_BS, samples_B = front_end.resampler(torch.from_numpy(wave_S)[None], torch.tensor([length]))
        assert samples_B.tolist() == [len(expected_S)]
        np.testing.assert_allclose(actual_BS[0, : len(expected_S)], expected_S, atol=2e-6)


def test_a_window_is_the_shortest_sound_that_fills_the_view():
    """A sample less, and the last frame is gone."""
    for spec in MEL_PRESETS.values():
        samples = FrontEnd(spec, FRAMES, spec.sample_rate_hz).samples
        assert (spec.frames_of(samples), spec.frames_of(samples - 1)) == (FRAMES, FRAMES - 1)


def test_rates_without_a_common_measure_are_refused():
    """22,051 to 32,000 Hz would be a filter for each of 32,000 phases."""
    with pytest.raises(RunError, match=r"32000/22051, would be too large; choose --audio-hz 32000"):
        Resampler(22_051, 32_000, 10_000)


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """The numbers as a tensor core takes them: 10 bits after the leading one, rounded."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Tf32Mode(torch.overrides.TorchFunctionMode):
    """Computes convolutions and matrix products as a GPU does that multiplies float32 as TF32."""

    ROUNDED = (torch.conv1d, torch.nn.functional.conv1d, torch.Tensor.matmul, torch.Tensor.__matmul__)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.ROUNDED:
            args = (round_to_tf32(args[0]), round_to_tf32(args[1]), *args[2:])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rate_hz", [RATE_HZ, 48_000], ids=["own rate", "resampled"])
def test_a_loud_tone_does_not_hide_quiet_bands_where_hardware_multiplies_as_tf32(rate_hz):
    """Bands far from a 1-kHz tone over noise of -80 dB were wrong by 3.3 nat: 11 bits reach no deeper than -66 dB."""
    front_end = FrontEnd(A_JEPA, FRAMES, rate_hz)
    time_S = np.arange(front_end.samples) / rate_hz
    noise_S = 1e-4 * np.random.default_rng(0).standard_normal(front_end.samples)
    wave_S = (0.5 * np.sin(2 * np.pi * 1_000 * time_S) + noise_S).astype(np.float32)
    samples_B = torch.tensor([front_end.samples])
    with Tf32Mode():
        mel_BTF, _ = front_end(torch.from_numpy(wave_S)[None], samples_B)
    expected_TF = expected_mel_TF(wave_S, A_JEPA, rate_hz)[:FRAMES]
    assert (mel_BTF[0] - expected_TF).abs().max() < 0.02


@pytest.mark.gpu
def test_the_front_end_is_as_exact_on_a_gpu_as_on_a_cpu():
    """PyTorch's default lets convolutions use TF32 there."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    front_end = FrontEnd(A_JEPA, FRAMES, 48_000)
    time_S = np.arange(front_end.samples) / 48_000
    noise_S = 1e-4 * np.random.default_rng(0).standard_normal(front_end.samples)
    wave_BS = torch.from_numpy(0.5 * np.sin(2 * np.pi * 1_000 * time_S) + noise_S).float()[None]
    samples_B = torch.tensor([front_end.samples])
    expected_BTF, _ = front_end(wave_BS, samples_B)
    mel_BTF, _ = front_end.to("cuda")(wave_BS.to("cuda"), samples_B.to("cuda"))
    assert (mel_BTF.cpu() - expected_BTF).abs().max() < 0.02
