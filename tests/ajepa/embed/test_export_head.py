"""Exports of fine-tuned runs: classes and scores stay with the weights, in every format."""

import json
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from soundfile import read
from sounds import babble

import ajepa
from ajepa.cli import app
from ajepa.embed.embedder import Embedder
from ajepa.embed.export import LONG_SCORES_LINES, export_encoder
from ajepa.embed.export_graph import GRAPH_INPUTS, AudioGraph, write_program
from ajepa.embed.hub import EXPORT_FILES
from ajepa.embed.predictor import load_predictor
from ajepa.embed.pretrained import EXPORT_METADATA_KEY, load_pretrained
from pipeline.errors import RunError

RATE_HZ = 32_000


@pytest.fixture(scope="module")
def folder(tones, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "model"
    export_encoder(tones.tuned, out)
    return out


def sounds_of(tones) -> list:
    return sorted(tones.sounds.rglob("*.wav"))[:6]


def test_an_export_predicts_what_its_run_predicts(tones, folder, tmp_path):
    """Folder, single file, exported again, by Python and by the command's own path: one set of scores."""
    expected = ajepa.load(tones.tuned, device="cpu").predict(sounds_of(tones)).scores_BC
    shutil.copy(folder / "model.safetensors", tmp_path / "renamed.safetensors")
    export_encoder(folder, tmp_path / "again")
    for location in (folder, tmp_path / "renamed.safetensors", tmp_path / "again"):
        model = ajepa.load(location, device="cpu")
        assert model.class_names == ("high", "low")
        np.testing.assert_array_equal(model.predict(sounds_of(tones)).scores_BC, expected)
        assert load_predictor(location, device="cpu").class_ids == ("high", "low")
    assert {file.name for file in folder.iterdir()} == set(EXPORT_FILES)


def test_the_vectors_of_an_export_have_one_identity_with_and_without_a_head(tones, folder):
    """A table of embeddings is that of the encoder; the head is identified by itself."""
    pretrained = load_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert pretrained.model_id == load_pretrained(tones.tuned).model_id == config["model_id"]
    assert config["head"]["class_names"] == ["high", "low"]
    assert config["head"]["activation"] == "softmax"
    assert config["head"]["pooling"] == "moments"
    assert not [name for name in pretrained.weights if name.startswith("head")]


def test_a_head_that_was_changed_is_refused(folder, tmp_path):
    """A swapped class is worse than none."""
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())

    def saved(name, weights, config):
        save_file(weights, tmp_path / name, metadata={EXPORT_METADATA_KEY: json.dumps(config)})
        return tmp_path / name

    changed = saved("a.safetensors", {**weights, "head.bias": weights["head.bias"] + 1}, config)
    head = config["head"] | {"class_ids": ["low", "high"]}
    swapped = saved("b.safetensors", weights, config | {"head": head})
    lost = saved("c.safetensors", {k: v for k, v in weights.items() if k != "head.bias"}, config)
    for file in (changed, swapped):
        with pytest.raises(RunError, match="the head is damaged"):
            load_pretrained(file)
    with pytest.raises(RunError, match=r"c\.safetensors"):
        load_pretrained(lost)


def test_exports_of_before_are_still_read(folder, tmp_path):
    """Format 1 had no head."""
    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("head.")}
    config = json.loads((folder / "config.json").read_text())
    del config["head"]
    save_file(
        weights,
        tmp_path / "a.safetensors",
        metadata={EXPORT_METADATA_KEY: json.dumps(config | {"format": 1})},
    )
    old = load_pretrained(tmp_path / "a.safetensors")
    assert (old.head, old.model_id) == (None, config["model_id"])
    save_file(
        weights,
        tmp_path / "b.safetensors",
        metadata={EXPORT_METADATA_KEY: json.dumps(config | {"format": 3})},
    )
    with pytest.raises(RunError, match="export format 3, this version reads up to 2; update ajepa"):
        load_pretrained(tmp_path / "b.safetensors")


@pytest.mark.parametrize("layer", ["last", "concat-all"])
def test_a_graph_gives_scores_beside_embeddings(tones, tmp_path, layer):
    """Of one pass where both read the last layer; the head's pooling is its own."""
    model = ajepa.load(tones.tuned, device="cpu", layer=layer)
    graph = AudioGraph(model)
    assert graph.outputs == ("clip", "frames", "frame_count", "scores")
    write_program(graph, tmp_path / "a.pt2")
    program = torch.export.load(tmp_path / "a.pt2").module()
    audio_BS = torch.from_numpy(np.random.default_rng(0).uniform(-0.1, 0.1, (3, graph.samples))).float()
    lengths = [graph.samples, graph.samples, 9_000]
    with torch.inference_mode():
        clip_BD, _, _, scores_BC = program(audio_BS, torch.tensor(lengths))
    waves = [wave_S[:length] for wave_S, length in zip(audio_BS, lengths, strict=True)]
    expected = model.predict(waves, rate_hz=RATE_HZ).scores_BC
    np.testing.assert_allclose(scores_BC, expected, atol=1e-3)
    vectors = model.embed_audio(audio_BS, RATE_HZ, samples_B=lengths).clips_BD
    torch.testing.assert_close(clip_BD, vectors, atol=2e-3, rtol=0)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_cards_windows_give_the_packages_scores_of_a_sound_of_any_length(tones, activation):
    """To 1e-3: shorter than a window, one window, a frame more, two and a part, 5 s; classes together or each alone."""
    model = ajepa.load(tones.tuned, device="cpu")
    assert model.pretrained.head is not None
    head = replace(model.pretrained.head, activation=activation)
    model = Embedder(replace(model.pretrained, head=head), device="cpu")
    graph = AudioGraph(model)

    def run(names, inputs):
        with torch.inference_mode():
            outputs = graph(*(torch.from_numpy(inputs[name]) for name in GRAPH_INPUTS))
        return [outputs[graph.outputs.index(name)].numpy() for name in names]

    columns = SimpleNamespace(shape=["batch", graph.grid.cols, "values"])
    names = {
        "np": np,
        "metadata": {key: str(value) for key, value in graph.metadata.items()},
        "session": SimpleNamespace(run=run, get_outputs=lambda: [None, columns, None, None]),
        "window": graph.samples,
    }
    exec("\n".join(LONG_SCORES_LINES).partition("```python\n")[2].partition("```")[0], names)

    # Low, then high: windows whose scores differ.
    files = ["low/0.wav", "low/2.wav", "high/1.wav", "low/4.wav", "high/3.wav"]
    wave_S = np.concatenate([read(tones.sounds / file, dtype="float32")[0] for file in files])
    sound_S = np.repeat(wave_S, 2)
    window = graph.samples
    scores = []
    for samples in (2_000, window, window + 320, 2 * window + 9_000, len(sound_S)):
        expected_C = model.predict(sound_S[:samples], rate_hz=RATE_HZ)[0].scores_C
        scores.append(names["predict_long"](sound_S[:samples]))
        np.testing.assert_allclose(scores[-1], expected_C, atol=1e-3)
    assert np.ptp(np.array(scores), axis=0).max() > 0.01
    with pytest.raises(ValueError, match="shorter than a frame"):
        names["predict_long"](sound_S[:100])


def test_the_command_keeps_the_classes_and_the_card_says_how_to_call_it(tones, tmp_path, monkeypatch, capsys):
    """One ONNX file from audio to scores, with its class names; the card's own example is run."""
    pytest.importorskip("onnxscript", reason="ONNX is an extra: pip install 'ajepa[export]'")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX is an extra")
    monkeypatch.chdir(tmp_path)
    words = ["export", tones.tuned, "--out", "model", "--onnx", "a.onnx"]
    monkeypatch.setattr(sys, "argv", ["ajepa-train", *map(str, words)])
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code
    session = runtime.InferenceSession("a.onnx", providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == ["high", "low"]
    assert metadata["activation"] == "softmax"
    model = ajepa.load("model", device="cpu")
    window = int(metadata["samples"])
    wave_S = np.random.default_rng(1).uniform(-0.1, 0.1, window).astype(np.float32)
    inputs = {"audio": wave_S[None], "samples": np.array([window])}
    (scores_BC,) = session.run(["scores"], inputs)
    np.testing.assert_allclose(scores_BC, model.predict(wave_S, rate_hz=RATE_HZ).scores_BC, atol=1e-3)

    # Every input and output of the file is in the card, with its axes.
    card = (tmp_path / "model" / "README.md").read_text()
    for name, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for value in values:
            (row,) = re.findall(rf"\| {name} {value.name} \| \w+ \[([^\]]*)\] \|", card)
            axes = [axis.rpartition("= ")[2] for axis in row.split(", ")]
            assert axes == [str(axis) for axis in value.shape]
    assert "pipeline_tag: audio-classification" in card
    assert "This model scores 2 classes: high, low. Scores are in [0, 1] (softmax: they sum to 1)." in card
    code = re.findall(r"```python\n(import json.*?)```", card, flags=re.DOTALL)
    capsys.readouterr()
    names = {}
    exec(code[0], names)
    assert capsys.readouterr().out.strip() in ("high", "low")
    assert card.count("## Audio in") == 1

    # The card's own code for sounds longer than a window.
    (long_code,) = re.findall(r"```python\n(def embed_long.*?)```", card, flags=re.DOTALL)
    exec(long_code, names)
    sound_S = babble(7.0, RATE_HZ)
    expected_D = model.embed(sound_S, rate_hz=RATE_HZ)[0].clip_D
    np.testing.assert_allclose(names["embed_long"](sound_S), expected_D, atol=1e-3)
    (scores_code,) = re.findall(r"```python\n(def predict_long.*?)```", card, flags=re.DOTALL)
    exec(scores_code, names)
    expected_C = model.predict(sound_S, rate_hz=RATE_HZ)[0].scores_C
    np.testing.assert_allclose(names["predict_long"](sound_S), expected_C, atol=1e-3)
    for name, value in (("pooling", model.pooling), ("layer", str(model.layer))):
        assert metadata[name] == value
    assert f"| the vector of the sound: pooling `{model.pooling}`, layer `{model.layer}` |" in card
    assert "model.safetensors needs this package; without it use the ONNX file or the torch program" in card
