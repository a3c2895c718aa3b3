"""Several processes: one batch, one run folder, one message, one end.

torchrun itself starts them where all goes well; elsewhere they are forked, which is quicker, and ended as it ends them.
"""

import pytest
import ranks
import torch
from ranks import run_on_ranks, steps_of_rank, torchrun

from ajepa.training.distributed import SINGLE_PROCESS, World, join_ranks, world_from_environment
from ajepa.training.run import Run
from pipeline.errors import RunError, StopSignal


def assert_near(run: Run, other: Run, *, at: int | str = "last", tolerance: float = 2e-4) -> None:
    """Equal up to the order in which floats are added, which AdamW makes as large as rate times steps at worst.

    That is 8e-3 here, for weights whose gradient is nothing but rounding, such as the biases of keys.
    """
    one, two = run.load_checkpoint(at=at).parts, other.load_checkpoint(at=at).parts
    for part in ("encoder", "target", "predictor"):
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=1e-3, atol=tolerance)
    for line, of_other in zip(run.read_metrics(), other.read_metrics(), strict=False):
        for name in ("loss", "gradient_norm", "cosine"):
            assert of_other[name] == pytest.approx(line[name], rel=1e-3), (line["step"], name)


@pytest.fixture(scope="module")
def single_process(store_path, tmp_path_factory) -> Run:
    """Eight steps in one process, this one."""
    return ranks.train(store_path, tmp_path_factory.mktemp("ranks") / "alone")


def test_two_ranks_take_the_steps_of_one_process(store_path, tmp_path, single_process):
    """The same rows and masks, half on each, and so the same weights; one of them writes and tells."""
    status, lines = torchrun(store_path, tmp_path / "run")
    assert status == 0, lines
    run = Run.open(tmp_path / "run")
    assert_near(single_process, run)
    assert [line["step"] for line in run.read_metrics()] == list(range(1, 9))
    assert run.recipe == single_process.recipe
    for both, first, second in zip(
        steps_of_rank(single_process.path, 0),
        steps_of_rank(run.path, 0),
        steps_of_rank(run.path, 1),
        strict=True,
    ):
        assert both == [both[0], first[1] + second[1], first[2] + second[2]]
        assert first[2] != second[2]
        assert not set(first[1]) & set(second[1])
    *plan, start_line = [line for line in lines if line]  # no warning, and no word of the other rank
    assert [line.partition("plan: ")[2][:7] for line in plan] == ["8 steps", "0 steps"]
    assert start_line.startswith(f"{run.path}: step 0 of 8")
    assert start_line.endswith("on 2 ranks")
    assert len(list((run.path / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize("event", ["train", "micro"])
def test_the_clip_objective_sees_the_views_of_all_ranks(store_path, tmp_path, event):
    """Normality is that of all views, and positions have the mean of all clips, in one pass of a rank or several."""
    alone = ranks.train_views(store_path, tmp_path / "alone")
    status, lines = run_on_ranks(store_path, tmp_path / "run", event, stage="views")
    assert status == 0, lines
    run = Run.open(tmp_path / "run")
    assert_near(alone, run, tolerance=1e-3)
    for line, of_ranks in zip(alone.read_metrics(), run.read_metrics(), strict=True):
        for name in ("token_loss", "clip_loss", "normality", "disagreement", "z_std"):
            assert of_ranks[name] == pytest.approx(line[name], rel=1e-3), (line["step"], name)
    one, two = (each.load_checkpoint().parts["projector"] for each in (alone, run))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-4)


def test_one_process_is_carried_on_by_two_in_the_middle_of_an_epoch(store_path, tmp_path, single_process):
    """The batch is the recipe's, whoever computes it, and in however many passes."""
    with pytest.raises(StopSignal):
        ranks.train(store_path, tmp_path / "run", "stop")
    assert Run.open(tmp_path / "run").newest_step == 6
    status, lines = run_on_ranks(store_path, tmp_path / "run", "micro")
    assert status == 0, lines
    assert_near(single_process, Run.open(tmp_path / "run"))


def test_a_signal_to_one_rank_stops_all_at_the_same_step_with_a_checkpoint(
    store_path, tmp_path, single_process
):
    """A rank that stopped by itself would leave the others waiting for its gradients."""
    status, lines = run_on_ranks(store_path, tmp_path / "run", "stop")
    assert status != 0
    run = Run.open(tmp_path / "run")
    assert run.newest_step == run.read_metrics()[-1]["step"] == 6
    assert [len(steps_of_rank(run.path, rank)) for rank in range(2)] == [6, 6]
    assert sum("checkpoint written at step 6 of 8" in line for line in lines) == 1
    assert sum("interrupted; nothing is lost" in line for line in lines) == 1
    assert_near(single_process, ranks.train(store_path, run.path))


@pytest.mark.parametrize(
    ("event", "message_part"),
    [
        ("broken", "error: row 7 cannot be read"),
        ("nan", "error: step 6: loss is nan, gradient_norm is nan; stopped before the update; rows ["),
        ("die", "error: another rank has ended"),
    ],
)
def test_what_ends_one_rank_ends_all_with_one_message(store_path, tmp_path, event, message_part):
    """Whoever met the error says it; the others neither hang nor add theirs."""
    status, lines = run_on_ranks(store_path, tmp_path / "run", event)
    assert status != 0
    errors = [line for line in lines if "error: " in line]
    assert len(errors) == 1, lines
    assert message_part in errors[0]
    assert Run.open(tmp_path / "run").newest_step == 4
    if event == "nan":
        files = sorted(file.name for file in (tmp_path / "run" / "bad-step-00000006").iterdir())
        assert files == [f"rank-{rank}.{kind}" for rank in range(2) for kind in ("json", "safetensors")]
        rows = steps_of_rank(tmp_path / "run", 1)[5][1]
        assert f"rows [{rows[2]}] of the store hold nan or inf" in errors[0]


def test_ranks_refuse_with_one_message_what_none_of_them_can_do(store_path, tmp_path):
    """All find the same fault at the same time."""
    status, lines = run_on_ranks(store_path, tmp_path / "run", ranks=3)
    assert status != 0
    advice = "choose --batch 6 or 9, or another number of ranks"
    message = f"error: 8 clips a step cannot be dealt to 3 ranks evenly; {advice}"
    assert [line for line in lines if "error: " in line] == [message]
    assert not (tmp_path / "run").exists()


def test_without_torchrun_a_process_is_alone(monkeypatch):
    """No group is made and nothing is waited for; torchrun's variables say who one is."""
    with join_ranks() as world:
        assert world == SINGLE_PROCESS
        assert world.sum_over_ranks(3, 0.5) == [3, 0.5]
        world.wait_for_ranks()
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() == World(rank=5, size=8, local_rank=1, local_size=4)
    assert not world_from_environment().is_main


def test_a_world_of_which_something_is_missing_is_refused(monkeypatch):
    """Each rank would take itself for the only one, and train on everything."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert world_from_environment() == SINGLE_PROCESS
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(
        RunError, match=r"WORLD_SIZE is 8, but LOCAL_RANK and LOCAL_WORLD_SIZE not set: .*torchrun"
    ):
        world_from_environment()
