"""A run after a bad step: carried on with other settings, which it records, or past the step, which it counts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch
from ranks import run_on_ranks
from tiny import tiny

from ajepa.pretrain.pretrain import pretrain
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.recipes.catalogue import override_recipe
from ajepa.training import bad_steps
from ajepa.training.bad_steps import BadSteps
from ajepa.training.distributed import SINGLE_PROCESS
from ajepa.training.meter import read_compute_costs
from ajepa.training.run import Run
from ajepa.training.trained_run import TrainedRun
from pipeline.errors import RunError

TIMINGS = ("clips_per_s", "data_wait")


def train(store_path: Path, run_path: Path, recipe=None, lines: list | None = None, **options) -> Run:
    say = (lambda line: None) if lines is None else lines.append
    options = {"steps": 12, "loader": "plain", "precision": "fp32", **options}
    return pretrain(store_path, recipe or tiny(), run_path, device="cpu", say=say, **options)


def logged(run: Run) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in run.read_metrics()]


@pytest.fixture
def nan_at(monkeypatch):
    """Let a value of these steps, counted from 1, be nan."""

    def spoil(*steps: int) -> None:
        start_step = PretrainTrainer.start_step

        def spoilt_step(trainer, step, batch):
            if step + 1 in steps:
                batch.mel_BTF[2, 3, 4] = torch.nan
            return start_step(trainer, step, batch)

        monkeypatch.setattr(PretrainTrainer, "start_step", spoilt_step)

    return spoil


def test_after_a_bad_step_a_run_goes_on_with_a_lower_rate_and_says_from_where(
    store_path, tmp_path, nan_at, monkeypatch
):
    """A run that stops at step 80,000 must not be lost: what changed, and where, stands in its record."""
    nan_at(7)
    with pytest.raises(RunError, match=r"step 7: loss is nan.*--on-bad-step skip"):
        train(store_path, tmp_path / "run")
    assert Run.open(tmp_path / "run").newest_step == 5
    assert [folder.name for folder in Run.open(tmp_path / "run").bad_step_folders()] == ["bad-step-00000007"]

    # The rate is another one from the checkpoint on, in the schedule of the same length.
    monkeypatch.undo()
    lines: list[str] = []
    lower = override_recipe(tiny(), ["schedule.peak_lr=1e-4", "max_gradient_norm=0.5"])
    run = train(store_path, tmp_path / "run", lower, lines)
    assert any("from step 5 on with recipe.schedule.peak_lr: was 0.001, now 0.0001" in line for line in lines)
    assert [phase.first_step for phase in run.phases] == [0, 5]
    rates = {line["step"]: line["lr"] for line in run.read_metrics()}
    recipes = tiny().with_counts(steps=12), lower.with_counts(steps=12)
    for step, recipe in ((5, recipes[0]), (6, recipes[1]), (12, recipes[1])):
        assert rates[step] == recipe.schedule.learning_rate(step - 1, 12)

    # The step is passed: nothing may change any more.
    with pytest.raises(RunError, match="is another run"):
        train(store_path, tmp_path / "run", replace(lower, max_gradient_norm=0.1))


def test_a_bad_step_that_is_passed_over_changes_nothing_and_is_counted(store_path, tmp_path, nan_at):
    """No weight, no moment and no teacher moves; the run goes on with the next step's clips."""
    nan_at(6, 7)
    run = train(store_path, tmp_path / "run", on_bad_step="skip")
    counted = {line["step"]: line for line in run.read_metrics() if "bad_steps" in line}
    assert list(counted) == [6, 7]
    assert all(line["bad_steps"] == 1 and "loss" not in line for line in counted.values())
    assert [cost.bad_steps for cost in read_compute_costs(run.path)] == [0, 2, 2]
    assert run.newest_step == 12
    assert json.loads((run.path / "bad-step-00000006" / "rank-0.json").read_text())["step"] == 6

    # The weights after step 7 are those after step 5.
    stopped = train(
        store_path, tmp_path / "seven", tiny(checkpoint_every=1, keep_checkpoints=12), on_bad_step="skip"
    )
    before, after = (stopped.load_checkpoint(at=step).parts for step in (5, 7))
    for part in before:
        assert all(torch.equal(before[part][name], after[part][name]) for name in before[part])
    moved = stopped.load_checkpoint("encoder", at=8).parts["encoder"]
    assert any(not torch.equal(before["encoder"][name], moved[name]) for name in moved)


def test_a_run_that_passes_over_bad_steps_is_carried_on_exactly(store_path, tmp_path, nan_at, monkeypatch):
    """Stopped at step 8 of 12, it ends with the same weights and the same count."""
    nan_at(4, 9)
    whole = train(store_path, tmp_path / "whole", on_bad_step="skip")
    with monkeypatch.context() as patch:
        log = Run.log_metrics

        def log_and_fail(run, line):
            log(run, line)
            if line["step"] == 8:
                raise KeyboardInterrupt

        patch.setattr(Run, "log_metrics", log_and_fail)
        with pytest.raises(KeyboardInterrupt):
            train(store_path, tmp_path / "run", on_bad_step="skip")
    run = train(store_path, tmp_path / "run", on_bad_step="skip")
    assert logged(run) == logged(whole)
    one, two = (each.load_checkpoint().parts for each in (run, whole))
    assert all(torch.equal(one[part][name], two[part][name]) for part in one for name in one[part])
    assert read_compute_costs(run.path)[-1].bad_steps == 2


def test_bad_steps_without_end_end_the_run(store_path, tmp_path, nan_at, monkeypatch):
    """A model that is broken for good must not burn a week; of its many steps only a few keep their clips."""
    monkeypatch.setattr(bad_steps, "MAX_BAD_STEPS_IN_A_ROW", 5)
    nan_at(*range(3, 13))
    with pytest.raises(RunError, match=r"step 7: .*the 5th bad step in a row is no accident"):
        train(store_path, tmp_path / "run", on_bad_step="skip")
    kept = [folder.name[-1] for folder in Run.open(tmp_path / "run").bad_step_folders()]
    assert kept == ["3", "4", "5", "7"]

    # Carried on, it counts on from its checkpoint.
    with pytest.raises(RunError, match=r"step 7: .*the 5th bad step in a row"):
        train(store_path, tmp_path / "run", on_bad_step="skip")


def test_bad_steps_are_limited_in_all_too():
    """Now and then a good step does not make a run sound."""
    counts = BadSteps(on_bad_step="skip")
    lines = [{"step": step, "bad_steps": 1} for step in range(2, 200, 2)]
    counts.resume_counts(lines, 199, SINGLE_PROCESS)
    assert (counts.in_all, counts.in_a_row) == (99, 0)  # step 199 was good, and not logged
    counts.resume_counts(lines, 198, SINGLE_PROCESS)
    assert (counts.in_all, counts.in_a_row) == (99, 1)
    counts.count_good_step()
    assert counts.stop_reason() is None
    counts.count_bad_step()
    assert "the 100th bad step of the run" in (counts.stop_reason() or "")


def test_an_unknown_choice_leaves_nothing(store_path, tmp_path):
    """Refused before the run's folder is made."""
    with pytest.raises(RunError, match="on_bad_step must be stop or skip, got 'ignore'"):
        train(store_path, tmp_path / "run", on_bad_step="ignore")
    assert not (tmp_path / "run").exists()


def test_two_ranks_pass_over_a_step_that_is_bad_on_one_of_them(store_path, tmp_path):
    """All agree on it, or their weights would part."""
    status, lines = run_on_ranks(store_path, tmp_path / "two", "skip")
    assert status == 0, lines
    ranks.train(store_path, tmp_path / "one", "skip")
    two, one = (TrainedRun.open(tmp_path / name) for name in ("two", "one"))
    assert [line["step"] for line in two.run.read_metrics() if "bad_steps" in line] == [6]
    for name, weight in one.weights.items():
        torch.testing.assert_close(two.weights[name], weight, rtol=1e-4, atol=1e-6)
