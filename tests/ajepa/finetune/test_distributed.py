"""Fine-tuning by several processes: the steps of one, one that measures, one end."""

import json
from pathlib import Path

import pytest
import ranks
import torch
from ranks import run_on_ranks, steps_of_rank
from tiny import tiny

from ajepa.evaluate.result import EVALUATION_FILE, Evaluation
from ajepa.pretrain.pretrain import pretrain
from ajepa.training.run import Run
from pipeline.errors import StopSignal


def assert_near(run: Run, other: Run) -> None:
    """Equal up to the order in which floats are added, as in `test_distributed`."""
    one, two = run.load_checkpoint().parts, other.load_checkpoint().parts
    for part in ("classifier", "average"):
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=2e-3, atol=4e-4)
    for line, of_other in zip(run.read_metrics(), other.read_metrics(), strict=True):
        for name in ("loss", "gradient_norm"):
            assert of_other[name] == pytest.approx(line[name], rel=2e-3), (line["step"], name)
    one_found, two_found = (Evaluation.read_json(each.path / EVALUATION_FILE) for each in (run, other))
    for score, of_other in zip(one_found.scores, two_found.scores, strict=True):
        assert of_other.primary_estimate.value == pytest.approx(score.primary_estimate.value, abs=0.02)


@pytest.fixture(scope="module")
def pretrained(store_path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain(store_path, tiny().with_counts(steps=2), path, device="cpu", say=lambda line: None)
    return path


@pytest.fixture(scope="module")
def single_process(store_path, pretrained, tmp_path_factory) -> Run:
    """Eight steps in one process, this one."""
    path = tmp_path_factory.mktemp("ranks") / "alone"
    return ranks.train_classifier(store_path, path, "train", str(pretrained))


def test_two_ranks_take_the_steps_of_one_process(store_path, tmp_path, single_process, pretrained):
    """Rows, mixtures, masks: all of them from the same probed head. One of them measures, writes and tells."""
    status, lines = run_on_ranks(store_path, tmp_path / "run", "train", str(pretrained), stage="finetune")
    assert status == 0, lines
    run = Run.open(tmp_path / "run")
    assert_near(single_process, run)
    assert run.recipe == single_process.recipe
    for both, first, second in zip(
        steps_of_rank(single_process.path, 0),
        steps_of_rank(run.path, 0),
        steps_of_rank(run.path, 1),
        strict=True,
    ):
        assert both == [both[0], first[1] + second[1], 0]
        assert (first[2], second[2]) == (0, 4)
    *notes, start_line = [line for line in lines if line]  # no warning, and no word of the other rank
    assert [str(store_path) in note for note in notes] == [True] * len(set(notes))
    assert start_line.startswith(f"{run.path}: step 0 of 8")
    assert start_line.endswith("on 2 ranks")
    cost, of_alone = (
        json.loads((path / "compute.json").read_text()) for path in (run.path, single_process.path)
    )
    assert (cost["ranks"], of_alone["ranks"]) == (2, 1)
    assert (cost["step"], cost["clips"], cost["flop"]) == (8, 64, of_alone["flop"])


def test_one_process_is_carried_on_by_two_in_passes(store_path, tmp_path, single_process, pretrained):
    """The batch is the recipe's, whoever computes it, and in however many passes."""
    with pytest.raises(StopSignal):
        ranks.train_classifier(store_path, tmp_path / "run", "stop", str(pretrained))
    assert Run.open(tmp_path / "run").newest_step == 6
    status, lines = run_on_ranks(store_path, tmp_path / "run", "micro", str(pretrained), stage="finetune")
    assert status == 0, lines
    assert_near(single_process, Run.open(tmp_path / "run"))


def test_a_signal_to_one_rank_stops_all_at_the_same_step_with_a_checkpoint(
    store_path, tmp_path, single_process, pretrained
):
    """And one process carries on; nothing was measured that is not the end."""
    status, lines = run_on_ranks(store_path, tmp_path / "run", "stop", str(pretrained), stage="finetune")
    assert status != 0
    run = Run.open(tmp_path / "run")
    assert run.newest_step == run.read_metrics()[-1]["step"] == 6
    assert [len(steps_of_rank(run.path, rank)) for rank in range(2)] == [6, 6]
    assert sum("checkpoint written at step 6 of 8" in line for line in lines) == 1
    assert sum("interrupted; nothing is lost" in line for line in lines) == 1
    assert not (run.path / "evaluation.json").exists()
    assert_near(single_process, ranks.train_classifier(store_path, run.path, "train", str(pretrained)))


def test_nan_on_one_rank_ends_all_with_one_message_and_is_kept(store_path, tmp_path):
    """By every rank its own clips."""
    status, lines = run_on_ranks(store_path, tmp_path / "run", "nan", stage="finetune")
    assert status != 0
    (error,) = [line for line in lines if "error: " in line]
    rows = steps_of_rank(tmp_path / "run", 1)[5][1]
    assert "error: step 6: loss is nan, gradient_norm is nan; stopped before the update; rows [" in error
    assert error.endswith(f"its clips and draws are kept in {tmp_path / 'run' / 'bad-step-00000006'}")
    files = sorted(file.name for file in (tmp_path / "run" / "bad-step-00000006").iterdir())
    assert files == [f"rank-{rank}.{kind}" for rank in range(2) for kind in ("json", "safetensors")]
    record = json.loads((tmp_path / "run" / "bad-step-00000006" / "rank-1.json").read_text())
    assert (record["first_clip"], record["rows"]) == (4, rows)
    assert Run.open(tmp_path / "run").newest_step == 4


def test_folds_are_trained_by_all_ranks_and_reported_by_one(folds_path, tmp_path):
    """One after the other, each with the scores of one process; finished ones are left alone."""
    status, lines = run_on_ranks(folds_path, tmp_path / "run", stage="folds")
    assert status == 0, lines
    assert sum("mean over 2 folds" in line for line in lines) == 1
    assert (tmp_path / "run" / EVALUATION_FILE).exists()
    ranks.train_folds(folds_path, tmp_path / "alone")
    for fold in ("fold1", "fold2"):
        two, one = (Run.open(tmp_path / name / fold) for name in ("run", "alone"))
        assert_near(one, two)
    assert run_on_ranks(folds_path, tmp_path / "run", stage="folds")[0] == 0


def test_ranks_refuse_with_one_message_what_cannot_be_dealt(store_path, tmp_path):
    """Three ranks for eight clips; nothing is written."""
    status, lines = run_on_ranks(store_path, tmp_path / "run", stage="finetune", ranks=3)
    assert status != 0
    (error,) = [line for line in lines if "error: " in line]
    assert "8 clips a step cannot be dealt to 3 ranks evenly" in error
    assert not (tmp_path / "run").exists()
