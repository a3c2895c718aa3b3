"""Loggers: what W&B and MLflow are told of a run, through stand-ins of their libraries that keep every call."""

import importlib
import json
import os
import signal
import sys

import pytest
from tiny import tiny

from ajepa.pretrain.pretrain import pretrain
from ajepa.training.loggers import LOGGER_IDS_FILE, refuse_missing_loggers
from ajepa.training.run import Run
from pipeline.errors import RunError, StopSignal

WANDB = """
class Error(Exception):
    pass

calls = []
fails = False

class Run:
    def log(self, numbers, step):
        calls.append(("log", step, numbers))

    def finish(self):
        calls.append(("finish",))

def init(**settings):
    if fails:
        raise Error("api_key not configured.\\nmore")
    calls.append(("init", settings))
    return Run()
"""

MLFLOW = """
from types import SimpleNamespace

class MlflowException(Exception):
    pass

calls = []

def set_experiment(name):
    calls.append(("experiment", name))

def start_run(run_id=None, run_name=None):
    calls.append(("start", run_id, run_name))
    return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "m1"))

def log_params(params):
    calls.append(("params", params))

def log_metrics(numbers, step):
    calls.append(("metrics", step, numbers))

def end_run():
    calls.append(("end",))
"""


@pytest.fixture
def services(tmp_path, monkeypatch):
    """Modules named wandb and mlflow, found before any that is installed."""
    for name in ("wandb", "mlflow"):
        (tmp_path / "site").mkdir(exist_ok=True)
        (tmp_path / "site" / f"{name}.py").write_text({"wandb": WANDB, "mlflow": MLFLOW}[name])
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delenv(
            {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}[name], raising=False
        )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield importlib.import_module("wandb"), importlib.import_module("mlflow")
    for name in ("wandb", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def train(store_path, run_path, steps, **options) -> Run:
    recipe = tiny(log_every=1)
    return pretrain(store_path, recipe, run_path, steps=steps, device="cpu", say=lambda line: None, **options)


def test_every_logged_line_goes_to_every_logger(services, store_path, tmp_path):
    """With its step and its numbers, the run's name, and the whole recipe; each is told that the run has ended."""
    wandb, mlflow = services
    run = train(store_path, tmp_path / "mine", 2, loggers=("wandb", "mlflow", "tensorboard", "wandb"))
    lines = run.read_metrics()
    (opened, *logged, ended) = wandb.calls
    settings = opened[1]
    assert (settings["project"], settings["name"], settings["resume"]) == ("ajepa", "mine", "allow")
    assert settings["config"]["recipe"]["model"]["encoder"]["width"] == 32
    assert [(step, numbers["loss"]) for _, step, numbers in logged] == [
        (line["step"], line["loss"]) for line in lines
    ]
    assert all(isinstance(value, float) for value in logged[0][2].values())
    assert "step" not in logged[0][2]
    assert ended == ("finish",)

    # MLflow: parameters by their paths, few enough at a time.
    assert mlflow.calls[:2] == [("experiment", "ajepa"), ("start", None, "mine")]
    batches = [call[1] for call in mlflow.calls if call[0] == "params"]
    assert {name: value for batch in batches for name, value in batch.items()}["model.encoder.width"] == "32"
    assert max(map(len, batches)) <= 100
    assert [call[1] for call in mlflow.calls if call[0] == "metrics"] == [1, 2]
    assert mlflow.calls[-1] == ("end",)
    assert list((run.path / "tensorboard").iterdir())


def test_a_run_that_is_carried_on_goes_on_in_the_same_place(services, store_path, tmp_path, monkeypatch):
    """Two curves of one run would be compared as if they were two."""
    wandb, mlflow = services
    log_metrics = Run.log_metrics

    def log_and_interrupt(run, line):
        log_metrics(run, line)
        if line["step"] == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patches:
        patches.setattr(Run, "log_metrics", log_and_interrupt)
        with pytest.raises(StopSignal):
            train(store_path, tmp_path / "run", 12, loggers=("wandb", "mlflow"))
    assert wandb.calls[-1] == ("finish",)
    ids = json.loads((tmp_path / "run" / LOGGER_IDS_FILE).read_text())
    assert ids == {"wandb": wandb.calls[0][1]["id"], "mlflow": "m1"}
    first_calls = len(mlflow.calls)
    train(store_path, tmp_path / "run", 12, loggers=("wandb", "mlflow"))
    assert [call[1]["id"] for call in wandb.calls if call[0] == "init"] == [ids["wandb"]] * 2
    assert mlflow.calls[first_calls:][:2] == [("experiment", "ajepa"), ("start", "m1", None)]
    assert not [call for call in mlflow.calls[first_calls:] if call[0] == "params"]
    steps = [call[1] for call in wandb.calls if call[0] == "log"]
    assert steps == list(range(1, 13))


def test_what_is_missing_unknown_or_refused_is_one_line_before_training(
    services, store_path, tmp_path, monkeypatch
):
    """With the command that mends it, and without a run that has begun."""
    wandb, _ = services
    wandb.fails = True
    with pytest.raises(RunError, match=r"--logger wandb: api_key not configured; run `wandb login`"):
        train(store_path, tmp_path / "a", 1, loggers=("wandb",))
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(RunError, match=r"--logger mlflow needs mlflow; run: pip install 'ajepa\[mlflow\]'"):
        train(store_path, tmp_path / "b", 1, loggers=("mlflow",))
    assert not (tmp_path / "b").exists()
    with pytest.raises(RunError, match="logger 'wanb' is unknown; did you mean 'wandb'"):
        refuse_missing_loggers(["wanb"])
