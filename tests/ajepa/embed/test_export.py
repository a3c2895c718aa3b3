"""Exports: the same model from a run, a folder, a file and the hub, at any checkpoint, without pickle."""

import json
import os
import shutil
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from forked import run_command
from local_hub import local_hub
from safetensors.torch import load_file, save_file
from sounds import babble
from tiny import tiny

import ajepa
from ajepa.cli import app
from ajepa.embed import export_graph, hub
from ajepa.embed.export import export_encoder, licence_lines
from ajepa.embed.pretrained import EXPORT_METADATA_KEY, load_pretrained
from ajepa.pretrain.pretrain import pretrain
from ajepa.recipes.catalogue import finetune_recipe, recipe_from_json, recipe_to_json
from ajepa.training.checkpoints import Checkpoint, CheckpointScore
from ajepa.training.run import Run
from pipeline.errors import RunError

RATE_HZ = 32_000


@pytest.fixture(scope="module")
def run_path(store_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    return pretrain(store_path, tiny(), path, steps=10, device="cpu", say=lambda line: None).path


@pytest.fixture(scope="module")
def folder(run_path, tmp_path_factory):
    metrics = {"map": {"value": 0.25, "low": 0.2, "high": 0.31}}
    scores = [{"probe": "linear", "metrics": metrics, "chance": 0.125, "per_class_ap": [0.25, None]}]
    evaluation = {"protocol": {"step": 10, "train_clips": 30}, "scores": scores}
    (run_path / "evaluation.json").write_text(json.dumps(evaluation))
    (run_path / "compute.json").write_text(json.dumps({"clips": 16, "flop": 1e12}))
    out = tmp_path_factory.mktemp("export") / "model"
    export_encoder(run_path, out, licence="cc-by-4.0")
    return out


def test_an_export_is_the_run_wherever_it_lies(run_path, folder, tmp_path):
    """Folder, single file and run: one identity, one vector."""
    single_file = tmp_path / "renamed.safetensors"
    shutil.copy(folder / "model.safetensors", single_file)
    wave_S = babble(2.0, RATE_HZ)
    models = [ajepa.load(location, device="cpu") for location in (run_path, folder, single_file)]
    assert len({model.pretrained.model_id for model in models}) == 1
    vectors = [model.embed_audio(wave_S, RATE_HZ).clips_BD for model in models]
    assert all(torch.equal(vectors[0], vector) for vector in vectors)
    assert models[2].pretrained.licence == "cc-by-4.0"


def test_a_run_is_loaded_at_the_checkpoint_that_is_asked_for(run_path, folder, tmp_path):
    """In the words of `evaluate --checkpoint`; an export states its step and shows no other step's scores."""
    run = Run.open(run_path)
    for at, step in (("last", 10), (5, 5), ("5", 5)):
        pretrained = ajepa.load(run_path, at=at, device="cpu").pretrained
        assert pretrained.origin["step"] == step
        target = run.load_checkpoint("target", at=step).parts["target"]
        assert all(torch.equal(pretrained.weights[name], weight) for name, weight in target.items())
    with pytest.raises(RunError, match="no checkpoint was probed, so none is the best"):
        ajepa.load(run_path, at="best")
    with pytest.raises(RunError, match="no checkpoint 7; expected last, best, or a step of 5, 10"):
        ajepa.load(run_path, at=7)
    with pytest.raises(RunError, match="is no run, and only a run has several checkpoints; leave out 'best'"):
        ajepa.load(folder, at="best")
    earlier = export_encoder(run_path, tmp_path / "earlier", at=5)
    assert load_pretrained(tmp_path / "earlier").model_id == earlier.model_id
    assert load_pretrained(run_path).model_id != earlier.model_id
    card = (tmp_path / "earlier" / "README.md").read_text()
    assert "| checkpoint | step 5 |" in card
    assert "## Scores" not in card


def test_the_best_checkpoint_is_that_of_the_highest_score(run_path, tmp_path):
    """Not the newest, nor the first."""
    source = Run.open(run_path)
    weights = source.load_checkpoint("target").parts["target"]
    run = Run.create_or_open(tmp_path / "run", recipe=source.recipe, identity=source.identity)
    for step, score in ((1, 0.1), (2, 0.3), (3, 0.2)):
        target = {name: weight + step for name, weight in weights.items()}
        scored = CheckpointScore(value=score, clips="9 clips")
        run.save_checkpoint(Checkpoint(step=step, parts={"target": target}), keep=3, score=scored)
    assert ajepa.load(run.path, at="best", device="cpu").pretrained.origin["step"] == 2


def test_a_fine_tuned_run_gives_its_encoder(run_path, tmp_path):
    """From the average of the classifier where there is one, without its head; another network is refused by name."""
    # A fine-tuned run whose average has the encoder of the pre-trained one.
    source = Run.open(run_path)
    weights = source.load_checkpoint("target").parts["target"]
    encoder = recipe_from_json(source.recipe["model"]["encoder"])
    recipe = finetune_recipe("own")
    recipe = replace(recipe, ema=0.9, model=replace(recipe.model, encoder=encoder))
    run = Run.create_or_open(tmp_path / "fine", recipe=recipe_to_json(recipe), identity=source.identity)
    average = {f"encoder.{name}": weight for name, weight in weights.items()} | {"head.bias": torch.zeros(3)}
    classifier = {name: weight + 1 for name, weight in average.items()}
    checkpoint = Checkpoint(step=3, parts={"classifier": classifier, "average": average})
    run.save_checkpoint(checkpoint, keep=1)
    loaded = load_pretrained(run.path)
    assert loaded.model_id == load_pretrained(run_path).model_id
    assert loaded.recipe_name == "own"

    # A run of a CNN.
    cnn = Run.create_or_open(
        tmp_path / "cnn", recipe=recipe_to_json(finetune_recipe("cnn6-small")), identity=source.identity
    )
    cnn.save_checkpoint(checkpoint, keep=1)
    with pytest.raises(RunError, match="Cnn6Spec has no encoder"):
        load_pretrained(tmp_path / "cnn")


def test_the_card_states_what_a_user_must_know(folder, run_path):
    """Licence, mel spec, data, training, compute, scores; nothing that the run does not know."""
    card = (folder / "README.md").read_text()
    identity = json.loads((run_path / "recipe.json").read_text())["identity"]
    for line in (
        "license: cc-by-4.0",
        f"| store_id | {identity['store_id']} |",
        f"| mean | {identity['mean']} |",
        "| hop_samples | 320 |",
        "| checkpoint | step 10 |",
        "| clips | 16 |",
        "| probe | chance | map |\n| --- | --- | --- |\n| linear | 0.125 | 0.25 (0.2 to 0.31) |",
        "| train_clips | 30 |",
    ):
        assert line in card
    config = json.loads((folder / "config.json").read_text())
    assert config["model_id"] == load_pretrained(folder).model_id


def test_a_licence_that_is_not_stated_is_not_invented(run_path, folder, tmp_path):
    """It is its owner's to state; exported again, what was stated stays."""
    export_encoder(run_path, tmp_path / "bare")
    card = (tmp_path / "bare" / "README.md").read_text()
    assert "license:" not in card
    assert "not stated" in card
    export_encoder(folder, tmp_path / "again")
    assert load_pretrained(tmp_path / "again").licence == "cc-by-4.0"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(RunError, match=r"holds notes\.txt, which belongs to no export"):
        export_encoder(run_path, tmp_path / "other")


def test_anything_but_an_encoder_is_refused(folder, tmp_path, store_path):
    """Changed weights, another's safetensors, a file of anything, a folder of anything."""
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    weights["norm.bias"][0] += 1
    save_file(weights, tmp_path / "changed.safetensors", metadata={EXPORT_METADATA_KEY: json.dumps(config)})
    save_file(weights, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    for location, message in (
        (tmp_path / "changed.safetensors", "damaged"),
        (tmp_path / "other.safetensors", "holds no encoder of ajepa"),
        (tmp_path / "text.safetensors", "cannot be read as safetensors"),
        (store_path, r"holds neither recipe\.json nor model\.safetensors"),
        (tmp_path / "absent", "no such run or file"),
    ):
        with pytest.raises(RunError, match=message):
            ajepa.load(location)


@pytest.fixture
def hub_cache(folder, tmp_path, monkeypatch):
    """The hub's cache of this machine, with a model in it as a download leaves it; no network."""
    pytest.importorskip("huggingface_hub", reason="the hub is an extra: pip install 'ajepa[export]'")
    from huggingface_hub import constants

    cached = tmp_path / "cache" / "models--org--tiny"
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_comes_from_the_hubs_cache_without_a_network(hub_cache, folder):
    """ORG/NAME, and with a revision; the error of an absent model is one line."""
    assert ajepa.load("org/tiny", device="cpu").pretrained.model_id == load_pretrained(folder).model_id
    assert load_pretrained("org/tiny@main").model_id == load_pretrained(folder).model_id
    with pytest.raises(RunError, match="org/absent: no such run or file here, and the hub did not give it"):
        ajepa.load("org/absent")
    (hub_cache / "runs").mkdir()
    with pytest.raises(RunError, match="runs/b: no such run or file"):
        ajepa.load("runs/b")


def test_the_load_command_describes_a_model_and_keeps_its_files(hub_cache, monkeypatch, capsys):
    """With its licence; the three files of an export."""
    monkeypatch.setattr(sys, "argv", ["ajepa-train", "load", "org/tiny", "--out", "mine"])
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "licence   cc-by-4.0" in printed
    assert sorted(path.name for path in (hub_cache / "mine").iterdir()) == sorted(hub.EXPORT_FILES)
    assert ajepa.load("mine", device="cpu").pretrained.licence == "cc-by-4.0"


def test_a_model_that_is_pushed_can_be_loaded_by_its_name(folder, tmp_path, monkeypatch):
    """The commands, huggingface_hub and HTTP between them: three files go, and come back as they were."""
    pytest.importorskip("huggingface_hub", reason="the hub is an extra: pip install 'ajepa[export]'")
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "private.txt").touch()
    with local_hub() as server:
        env = {
            **os.environ,
            "HF_ENDPOINT": server.address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": "hf_x",
        }
        run_here = partial(run_command, folder=tmp_path, environment=env)
        pushed = run_here("push", "model", "org/tiny", "--private")
        assert pushed.stdout == f"{server.address}/org/tiny: load it with ajepa.load('org/tiny')\n", (
            pushed.stderr
        )
        assert sorted(server.files) == sorted(hub.EXPORT_FILES)
        loaded = run_here("load", "org/tiny", "--out", "mine")
        assert f"model id  {load_pretrained(folder).model_id}" in loaded.stdout, loaded.stderr
        for name in hub.EXPORT_FILES:
            assert (tmp_path / "mine" / name).read_bytes() == (folder / name).read_bytes()
        (tmp_path / "model" / "README.md").write_text("---\nlicense: my own\n---\n")
        refused = run_here("push", "model", "org/tiny")
        assert refused.stderr.startswith(
            "error: org/tiny: the hub refuses the name or the model card (Invalid metadata in README.md"
        )
        assert refused.stderr.count("\n") == 1


def test_a_push_of_something_else_is_refused(folder, tmp_path):
    """Before the hub is asked."""
    with pytest.raises(RunError, match="lacks model"):
        hub.push_to_hub(tmp_path, "org/tiny")
    with pytest.raises(RunError, match="expected ORG/NAME"):
        hub.push_to_hub(folder, "tiny")


@pytest.mark.parametrize(
    ("licence", "lines"),
    [
        (None, []),
        ("cc-by-4.0", ["license: cc-by-4.0"]),
        ('Mine: "all rights"', ["license: other", r'license_name: "Mine: \"all rights\""']),
    ],
)
def test_a_licence_is_written_as_the_hub_reads_it(licence, lines):
    """A short name as it is; any other text under a name of its own, and never as broken YAML."""
    assert licence_lines(licence) == lines


def test_a_missing_extra_is_named(folder, monkeypatch):
    """With the command that installs it."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RunError, match=r"pip install 'ajepa\[export\]'"):
        hub.push_to_hub(folder, "org/tiny")


def test_the_export_command_writes_every_kind_of_file(run_path, tmp_path, monkeypatch, capsys):
    """One command, and a line for each file with the inputs that it takes."""
    written = []

    def record_graph(graph, out):
        written.append((graph.pooling, str(graph.layer), graph.samples, out.name))

    for name in ("write_onnx", "write_program"):
        monkeypatch.setattr(export_graph, name, record_graph)
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    files = ["--onnx", "a.onnx", "--torch-export", "a.pt2", "--pooling", "moments", "--layer", "concat-1"]
    files += ["--audio-hz", "16000", "--checkpoint", "5"]
    monkeypatch.setattr(
        sys, "argv", ["ajepa-train", "export", str(run_path), "--out", str(tmp_path / "model"), *files]
    )
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code
    assert written == [("moments", "concat-1", 10480, name) for name in ("a.onnx", "a.pt2")]
    assert load_pretrained(tmp_path / "model").origin["step"] == 5
    printed = capsys.readouterr().out
    assert "windows of 10480 samples at 16000 Hz, any batch" in printed
    assert f"Next: ajepa-train push {tmp_path / 'model'} ORG/NAME" in printed
