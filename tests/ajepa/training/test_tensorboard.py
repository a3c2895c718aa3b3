"""Metrics as TensorBoard reads them, by TensorBoard's own reader."""

import subprocess
import sys

import pytest
from tensorboard.backend.event_processing import event_accumulator

from ajepa.training.tensorboard import open_event_writer, write_scalars


def read_curves(folder) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of everything that TensorBoard would draw."""
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    return {
        name: [(point.step, point.value) for point in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_the_numbers_of_a_line_are_curves_of_their_names(tmp_path):
    """Words are no curve, nor is the step."""
    with open_event_writer(tmp_path / "board", 1) as events:
        write_scalars(events, 1, {"step": 1, "loss": 0.5, "skipped": 0, "note": "first"})
        write_scalars(events, 100_000, {"step": 100_000, "loss": 0.25, "skipped": 3})
    assert read_curves(tmp_path / "board") == {
        "loss": [(1, 0.5), (100_000, 0.25)],
        "skipped": [(1, 0.0), (100_000, 3.0)],
    }


def test_steps_taken_again_replace_those_that_were_lost(tmp_path):
    """After a kill at step 4 with a checkpoint at 2, a curve must not go back in time."""
    for first_step, losses in ((1, {1: 0.1, 2: 0.2, 3: 0.9, 4: 0.9}), (3, {3: 0.3, 4: 0.4, 5: 0.5})):
        with open_event_writer(tmp_path, first_step) as events:
            for step, loss in losses.items():
                write_scalars(events, step, {"loss": loss})
    (curve,) = read_curves(tmp_path).values()
    assert curve == [(step, pytest.approx(step / 10)) for step in range(1, 6)]


KILLED_AFTER_A_FLUSH = """
import os, signal, sys
from ajepa.training.tensorboard import open_event_writer, write_scalars

events = open_event_writer(sys.argv[1], 1)
write_scalars(events, 1, {"loss": 1.0})
events.flush()
write_scalars(events, 2, {"loss": 2.0})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_the_curves_up_to_the_checkpoint(tmp_path):
    """The loop flushes them before each checkpoint; later steps are taken again anyway."""
    subprocess.run([sys.executable, "-c", KILLED_AFTER_A_FLUSH, str(tmp_path)], check=False)
    assert read_curves(tmp_path)["loss"][0] == (1, 1.0)


def test_curves_of_an_older_version_come_before_those_of_this_one(tmp_path):
    """Its file names began with twenty digits of nanoseconds: TensorBoard reads files in the order of their names."""
    with open_event_writer(tmp_path / "old", 1) as events:
        for step in (1, 2, 3):
            write_scalars(events, step, {"loss": 0.9})
    (file,) = (tmp_path / "old").iterdir()
    file.rename(tmp_path / "events.out.tfevents.01795993526358202430.host.4711")
    (tmp_path / "old").rmdir()
    with open_event_writer(tmp_path, 2) as events:
        write_scalars(events, 2, {"loss": 0.2})
    assert read_curves(tmp_path)["loss"] == [(1, pytest.approx(0.9)), (2, pytest.approx(0.2))]


def test_tensorboard_is_loaded_by_training_alone(tmp_path):
    """It takes more than a second: every other command would wait for nothing."""
    program = "import sys; import ajepa.training.loop; sys.exit('tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
