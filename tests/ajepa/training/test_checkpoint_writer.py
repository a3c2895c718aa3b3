"""Checkpoints are written behind the run: as the weights were at their step, in order, and none without a word."""

import threading

import pytest
import torch
from identities import run_identity
from tiny import tiny

from ajepa.pretrain.pretrain import pretrain
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.recipes.catalogue import recipe_to_json
from ajepa.training.checkpoint_writer import CheckpointWriter
from ajepa.training.checkpoints import Checkpoint
from ajepa.training.run import Run
from pipeline.errors import RunError

SECONDS = 60  # after which a wait in these tests is a hang

HOW = {"keep": 2, "keep_every": 0, "score": None}


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create_or_open(tmp_path / "run", recipe=recipe_to_json(tiny()), identity=run_identity())


def checkpoint(step: int, weight: torch.Tensor) -> Checkpoint:
    return Checkpoint(step=step, parts={"encoder": {"weight": weight}})


def test_what_is_written_is_what_was_there_at_the_step(run, monkeypatch):
    """The weights change while the disk is slow."""
    may_write = threading.Event()
    save = Run.save_checkpoint

    def save_slowly(*arguments, **options):
        assert may_write.wait(SECONDS)
        save(*arguments, **options)

    monkeypatch.setattr(Run, "save_checkpoint", save_slowly)
    weight = torch.zeros(3)
    with CheckpointWriter(run) as writer:
        writer.start(checkpoint(1, weight), **HOW)
        weight += 1
        writer.raise_failure()
        assert run.newest_step == 0  # a kill now would leave what was there before
        may_write.set()
    assert run.load_checkpoint().parts["encoder"]["weight"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("when", ["raise_failure", "start", "end"])
def test_an_error_in_writing_ends_the_run(run, monkeypatch, when):
    """A full disk is told at the next chance: training on without checkpoints would be lost work."""
    has_failed = threading.Event()

    def fail(*_, **__):
        has_failed.set()
        raise RunError("no space for the checkpoint")

    monkeypatch.setattr(Run, "save_checkpoint", fail)

    def write_and_go_on() -> None:
        with CheckpointWriter(run) as writer:
            writer.start(checkpoint(1, torch.zeros(1)), **HOW)
            assert has_failed.wait(SECONDS)
            if when == "start":
                writer.start(checkpoint(2, torch.zeros(1)), **HOW)
            while when == "raise_failure":
                writer.raise_failure()

    with pytest.raises(RunError, match="no space"):
        write_and_go_on()


def test_another_error_is_told_and_the_checkpoint_that_was_begun_is_finished(run):
    """Whatever ends a run, the newest checkpoint is whole."""

    def write_and_fail() -> None:
        with CheckpointWriter(run) as writer:
            writer.start(checkpoint(4, torch.ones(2)), **HOW)
            raise RunError("bad step")

    with pytest.raises(RunError, match="bad step"):
        write_and_fail()
    assert run.newest_step == 4


def test_training_goes_on_while_a_checkpoint_is_written(store_path, tmp_path, monkeypatch):
    """The first checkpoint, at step 5, is written no sooner than step 7 has begun; the last one before the run ends."""
    is_at_step_7 = threading.Event()
    start_step = PretrainTrainer.start_step
    save = Run.save_checkpoint

    def start_and_tell(trainer, step, batch):
        if step == 7:
            is_at_step_7.set()
        return start_step(trainer, step, batch)

    def save_later(run, checkpoint, **options):
        assert is_at_step_7.wait(SECONDS)
        save(run, checkpoint, **options)

    monkeypatch.setattr(PretrainTrainer, "start_step", start_and_tell)
    monkeypatch.setattr(Run, "save_checkpoint", save_later)
    run = pretrain(store_path, tiny(), tmp_path / "run", steps=10, device="cpu", say=lambda line: None)
    monkeypatch.undo()
    assert run.newest_step == 10
    undisturbed = pretrain(
        store_path, tiny(), tmp_path / "other", steps=10, device="cpu", say=lambda line: None
    )
    for at in (5, 10):
        one, two = run.load_checkpoint(at=at).parts, undisturbed.load_checkpoint(at=at).parts
        assert all(torch.equal(one[part][name], two[part][name]) for part in one for name in one[part])
