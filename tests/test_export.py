"""Exports: the same model wherever it lies, without pickle; and as one graph from audio to embeddings."""

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sounds import babble
from tiny import tiny

import ajepa
from ajepa import cli, graph, hub
from ajepa.embed import Embedder
from ajepa.export import export
from ajepa.pretrain import pretrain
from ajepa.run import Checkpoint, Run
from ajepa.trained import METADATA_KEY, trained
from pipeline.errors import RunError
from pipeline.mel import log_mel
from pipeline.melspec import AUDIO_JEPA, PASST

RATE_HZ = 32_000


@pytest.fixture(scope="module")
def run_path(store_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    return pretrain(store_path, tiny(), path, steps=2, device="cpu", say=lambda line: None).path


@pytest.fixture(scope="module")
def folder(run_path, tmp_path_factory):
    metrics = {"map": {"value": 0.25, "low": 0.2, "high": 0.31}}
    scores = [{"probe": "linear", "metrics": metrics, "chance": 0.125, "per_class_ap": [0.25, None]}]
    told = {"protocol": {"train_clips": 30}, "scores": scores}
    (run_path / "evaluation.json").write_text(json.dumps(told))
    (run_path / "compute.json").write_text(json.dumps({"clips": 16, "flop": 1e12}))
    out = tmp_path_factory.mktemp("export") / "model"
    export(run_path, out, licence="cc-by-4.0")
    return out


def test_an_export_is_the_run_wherever_it_lies(run_path, folder, tmp_path):
    """Folder, single file and run: one identity, one vector."""
    alone = tmp_path / "renamed.safetensors"
    shutil.copy(folder / "model.safetensors", alone)
    wave_S = babble(2.0, RATE_HZ)
    models = [ajepa.load(place, device="cpu") for place in (run_path, folder, alone)]
    assert len({model.model.model_id for model in models}) == 1
    vectors = [model.embed_audio(wave_S, RATE_HZ).clips_BD for model in models]
    assert all(torch.equal(vectors[0], vector) for vector in vectors)
    assert models[2].model.licence == "cc-by-4.0"


def test_a_fine_tuned_run_gives_its_encoder(run_path, tmp_path):
    """The average of the classifier where there is one, without its head; another network is refused by name."""
    before = Run.open(run_path)
    weights = before.load("target").parts["target"]
    recipe = {"type": "Finetune", "name": "own", "steps": 3, "model": {"type": "VitSpec"}}
    recipe["model"]["encoder"] = before.recipe["model"]["encoder"]
    run = Run.start(tmp_path / "fine", recipe=recipe, identity=before.identity)
    named = {f"encoder.{name}": weight for name, weight in weights.items()} | {"head.bias": torch.zeros(3)}
    other = {name: weight + 1 for name, weight in named.items()}
    run.save(Checkpoint(step=3, parts={"classifier": other, "average": named}), keep=1)
    loaded = trained(run.path)
    assert loaded.model_id == trained(run_path).model_id
    assert loaded.recipe_name == "own"
    recipe["model"] = {"type": "Cnn6Spec"}
    Run.start(tmp_path / "cnn", recipe=recipe, identity=before.identity)
    with pytest.raises(RunError, match="Cnn6Spec has no encoder"):
        trained(tmp_path / "cnn")


def test_the_card_states_what_a_user_must_know(folder, run_path):
    """Licence, mel spec, data, training, compute, scores; nothing that the run does not know."""
    card = (folder / "README.md").read_text()
    identity = json.loads((run_path / "recipe.json").read_text())["identity"]
    for told in (
        "license: cc-by-4.0",
        f"| store_id | {identity['store_id']} |",
        f"| mean | {identity['mean']} |",
        "| hop_samples | 320 |",
        "| checkpoint | step 2 |",
        "| clips | 16 |",
        "| probe | chance | map |\n| --- | --- | --- |\n| linear | 0.125 | 0.25 (0.2 to 0.31) |",
        "| train_clips | 30 |",
    ):
        assert told in card
    config = json.loads((folder / "config.json").read_text())
    assert config["model_id"] == trained(folder).model_id


def test_a_licence_that_is_not_stated_is_not_invented(run_path, folder, tmp_path):
    """It is its owner's to state; exported again, what was stated stays."""
    export(run_path, tmp_path / "bare")
    card = (tmp_path / "bare" / "README.md").read_text()
    assert "license:" not in card
    assert "not stated" in card
    export(folder, tmp_path / "again")
    assert trained(tmp_path / "again").licence == "cc-by-4.0"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(RunError, match=r"holds notes\.txt, which is no export's"):
        export(run_path, tmp_path / "other")


def test_what_is_no_encoder_is_refused(folder, tmp_path, store_path):
    """Changed weights, another's safetensors, a file of anything, a folder of anything."""
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    weights["norm.bias"][0] += 1
    save_file(weights, tmp_path / "changed.safetensors", metadata={METADATA_KEY: json.dumps(config)})
    save_file(weights, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    for place, told in (
        (tmp_path / "changed.safetensors", "damaged"),
        (tmp_path / "other.safetensors", "no encoder of ajepa's"),
        (tmp_path / "text.safetensors", "cannot be read as safetensors"),
        (store_path, r"holds neither recipe\.json nor model\.safetensors"),
        (tmp_path / "absent", "no such run or file"),
    ):
        with pytest.raises(RunError, match=told):
            ajepa.load(place)


@pytest.fixture
def hub_cache(folder, tmp_path, monkeypatch):
    """The hub's cache of this machine, with a model in it as a download leaves it; no network."""
    pytest.importorskip("huggingface_hub", reason="the hub is an extra: pip install 'ajepa[export]'")
    from huggingface_hub import constants

    place = tmp_path / "cache" / "models--org--tiny"
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_comes_from_the_hubs_cache_without_a_network(hub_cache, folder):
    """ORG/NAME, and with a revision; what is not there is one line."""
    assert ajepa.load("org/tiny", device="cpu").model.model_id == trained(folder).model_id
    assert trained("org/tiny@main").model_id == trained(folder).model_id
    with pytest.raises(RunError, match="org/absent: neither here nor to be had from the hub"):
        ajepa.load("org/absent")
    (hub_cache / "runs").mkdir()
    with pytest.raises(RunError, match="runs/b: no such run or file"):
        ajepa.load("runs/b")


def test_the_load_command_tells_and_keeps(hub_cache, monkeypatch, capsys):
    """What it is, its licence, and its three files."""
    monkeypatch.setattr(sys, "argv", ["ajepa-train", "load", "org/tiny", "--out", "mine"])
    monkeypatch.setattr("signal.signal", lambda *told: None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    said = capsys.readouterr().out
    assert "licence   cc-by-4.0" in said
    assert sorted(path.name for path in (hub_cache / "mine").iterdir()) == sorted(hub.FILES)
    assert ajepa.load("mine", device="cpu").model.licence == "cc-by-4.0"


def test_a_push_sends_the_three_files_and_nothing_else(folder, tmp_path, monkeypatch):
    """To a place that is made if need be."""
    hugging = pytest.importorskip("huggingface_hub", reason="the hub is an extra")
    asked = []
    monkeypatch.setattr(hugging, "create_repo", lambda *what, **how: asked.append((what, how)))
    monkeypatch.setattr(hugging, "upload_folder", lambda **how: asked.append(how))
    assert hub.push(folder, "org/tiny", private=True) == "https://huggingface.co/org/tiny"
    assert asked == [
        (("org/tiny",), {"private": True, "exist_ok": True}),
        {"repo_id": "org/tiny", "folder_path": folder, "allow_patterns": list(hub.FILES)},
    ]
    with pytest.raises(RunError, match="lacks model"):
        hub.push(tmp_path, "org/tiny")
    with pytest.raises(RunError, match="expected ORG/NAME"):
        hub.push(folder, "tiny")


@pytest.mark.parametrize("name", ["huggingface_hub"])
def test_an_extra_that_is_missing_is_named(folder, monkeypatch, name):
    """With the command that installs it."""
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RunError, match=r"pip install 'ajepa\[export\]'"):
        hub.push(folder, "org/tiny")


@pytest.mark.parametrize("spec", [None, AUDIO_JEPA])
def test_the_graphs_log_mel_is_the_pipelines(folder, spec):
    """One convolution and one product against frame by frame; near the floor beside a tone, rounding shows."""
    model = ajepa.load(folder, device="cpu")
    if spec is not None:
        model = Embedder(replace(model.model, mel=spec), device="cpu")
    made = graph.AudioGraph(model)
    wave_BS = torch.from_numpy(np.stack([babble(6.0, RATE_HZ, seed=s)[: made.samples] for s in range(2)]))
    expected_BTF = log_mel(wave_BS, model.mel)
    assert made.log_mel(wave_BS).shape == expected_BTF.shape == (2, 64, 128)
    torch.testing.assert_close(made.log_mel(wave_BS), expected_BTF, atol=2e-3, rtol=0)


def test_a_front_end_that_no_graph_is_made_of_is_named(folder):
    """Rather than computed otherwise."""
    model = Embedder(replace(ajepa.load(folder, device="cpu").model, mel=PASST), device="cpu")
    with pytest.raises(RunError, match="passt is centred"):
        graph.AudioGraph(model)


@pytest.fixture(scope="module")
def graphs(folder, tmp_path_factory):
    """The commands' own files, made once: torch's exporter takes its time."""
    pytest.importorskip("onnxscript", reason="ONNX is an extra: pip install 'ajepa[export]'")
    model = ajepa.load(folder, device="cpu")
    out = tmp_path_factory.mktemp("graphs")
    graph.write_onnx(model, out / "a.onnx")
    graph.write_program(model, out / "a.pt2")
    return SimpleNamespace(model=model, onnx=out / "a.onnx", program=out / "a.pt2")


def test_onnx_gives_what_the_model_gives(graphs):
    """Any batch, full windows and short ones; audio past a sound's end is not heard."""
    runtime = pytest.importorskip("onnxruntime", reason="ONNX is an extra: pip install 'ajepa[export]'")
    session = runtime.InferenceSession(graphs.onnx, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["model_id"] == graphs.model.model.model_id
    samples = int(facts["samples"])
    audio_BS = np.stack([babble(1.0, RATE_HZ, seed=seed)[:samples] for seed in range(3)])
    lengths_B = np.array([samples, 12_345, 5_000], np.int64)
    clip_BD, frames_BCD, count_B = session.run(None, {"audio": audio_BS, "samples": lengths_B})
    expected = graphs.model.embed_audio(audio_BS, RATE_HZ, samples_B=lengths_B.tolist())
    np.testing.assert_allclose(clip_BD, expected.clips_BD, atol=1e-3)
    for frames_CD, count, one in zip(frames_BCD, count_B, expected.each, strict=True):
        assert 0 <= count - len(one.frames_TD) <= 1  # a last column whose centre lies past the end
        np.testing.assert_allclose(frames_CD[: len(one.frames_TD)], one.frames_TD, atol=1e-3)
    audio_BS[2, 5_000:] = 0.9
    again_BD = session.run(["clip"], {"audio": audio_BS[2:], "samples": lengths_B[2:]})[0]
    np.testing.assert_allclose(again_BD[0], clip_BD[2], atol=1e-6)


def test_a_torch_program_gives_what_the_model_gives(graphs):
    """Loaded without this package's code."""
    program = torch.export.load(graphs.program).module()
    samples = graph.AudioGraph(graphs.model).samples
    audio_BS = torch.from_numpy(babble(1.0, RATE_HZ)[None, :samples])
    with torch.inference_mode():
        clip_BD, _, _ = program(audio_BS, torch.tensor([samples]))
    torch.testing.assert_close(
        clip_BD, graphs.model.embed_audio(audio_BS, RATE_HZ).clips_BD, atol=1e-4, rtol=0
    )


def test_the_export_command_writes_them_all(run_path, tmp_path, monkeypatch, capsys):
    """One command, each file told with what it takes."""
    told = []
    monkeypatch.setattr(graph, "write_onnx", lambda model, out: told.append((model.pooling, out.name)))
    monkeypatch.setattr(graph, "write_program", lambda model, out: told.append((model.pooling, out.name)))
    monkeypatch.setattr("signal.signal", lambda *told: None)
    files = ["--onnx", "a.onnx", "--torch-export", "a.pt2", "--pooling", "frequency"]
    monkeypatch.setattr(
        sys, "argv", ["ajepa-train", "export", str(run_path), "--out", str(tmp_path / "model"), *files]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert told == [("frequency", "a.onnx"), ("frequency", "a.pt2")]
    said = capsys.readouterr().out
    assert "windows of 20960 samples at 32000 Hz, any batch" in said
    assert f"Next: ajepa-train push {tmp_path / 'model'} ORG/NAME" in said
