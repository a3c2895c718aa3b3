"""The doctor: a healthy machine passes every check, and a fault is named together with its remedy."""

import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

import ajepa.cli.doctor
import pipeline.cli.doctor
from ajepa.cli.doctor import training_findings
from pipeline.cli.doctor import (
    build_trial_store,
    check_codecs,
    check_data_machine,
    check_free_space,
    check_trial_build,
    report_checks,
    run_machine_check,
)
from pipeline.errors import InputError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Path:
    """A folder in which the small store has been built."""
    folder = tmp_path_factory.mktemp("trial")
    build_trial_store(folder)
    return folder


def test_a_machine_that_can_run_these_tests_can_build(trial):
    """A check that fails on a healthy machine would be useless."""
    assert [
        finding.state for finding in check_data_machine(Path("."), trial) if finding.name != "room"
    ] == 4 * ["ok"]


def test_a_machine_that_can_run_these_tests_can_train(trial):
    """The checks of stage two pass: DALI and the plain loader agree, a few steps run, a checkpoint is read."""
    findings = {finding.name: finding for finding in training_findings(trial)}
    assert findings.pop("device").state == ("ok" if torch.cuda.is_available() else "slow")
    assert {finding.state for finding in findings.values()} == {"ok"}


def test_a_decoder_that_gives_another_sound_is_named(tmp_path, monkeypatch):
    """A codec that decodes wrongly is worse than a missing codec."""
    load = pipeline.cli.doctor.load_clip_audio

    def load_wrong_aac(*arguments, **options):
        audio = load(*arguments, **options)
        if audio.codec == "aac":
            audio.wave_S[:] = np.sin(np.arange(len(audio.wave_S)))
        return audio

    monkeypatch.setattr(pipeline.cli.doctor, "load_clip_audio", load_wrong_aac)
    finding = run_machine_check("codecs", lambda: check_codecs(tmp_path), "pip install x")
    assert finding.state == "broken"
    assert finding.message.startswith("m4a: a tone of 440 Hz comes back as")


def test_a_store_that_is_damaged_is_named(trial, tmp_path):
    """The trial compares the values that were written with the values that are read."""
    shutil.copytree(trial / "trial.zarr", tmp_path / "trial.zarr")
    shard = next((tmp_path / "trial.zarr" / "mel").rglob("c/*/*/*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises((RuntimeError, InputError), match="trial"):
        check_trial_build(tmp_path)


def test_a_loader_that_differs_is_named(trial, monkeypatch):
    """If the loaders gave different batches, results could not be reproduced."""
    monkeypatch.setattr(ajepa.cli.doctor, "LOADER_TOLERANCE", -1.0)
    findings = {finding.name: finding for finding in training_findings(trial)}
    assert findings["loaders"].state == "broken"
    assert findings["training"].state == "ok"  # one fault does not hide what follows


def test_little_free_space_is_reported_but_is_no_fault(monkeypatch, tmp_path):
    """A small store may still fit."""
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(2e9, 1e9, 1e9))
    assert check_free_space(tmp_path).state == "slow"
    assert "--place" in check_free_space(tmp_path).remedy


def raise_two_lines() -> str:
    raise OSError("no such\nthing")


def test_a_fault_is_reported_with_its_remedy_and_ends_with_status_1():
    """Every line comes out before the command fails, each within 80 columns."""
    findings = [
        run_machine_check("first", lambda: "a word " * 30, "nothing"),
        run_machine_check("second", raise_two_lines, "apt install thing"),
    ]
    lines = report_checks(findings)
    first, second = next(lines), next(lines)
    assert first.startswith("ok     first: a word")
    assert second.splitlines() == ["broken second: no such", "       -> apt install thing"]
    assert max(len(line) for line in first.splitlines()) <= 80
    with pytest.raises(InputError, match="broken: second"):
        next(lines)
