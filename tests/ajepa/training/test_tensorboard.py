"""Metrics as TensorBoard reads them, by TensorBoard's own reader."""

import pytest

from ajepa.training.tensorboard import EventFileWriter

accumulators = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard to read with"
)


def curves(folder) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of all that TensorBoard would draw."""
    read = accumulators.EventAccumulator(str(folder)).Reload()
    return {tag: [(s.step, s.value) for s in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_numbers_of_a_line_are_curves_of_their_names(tmp_path):
    """What is no number is no curve; steps of more than seven bits are steps, too."""
    events = EventFileWriter(tmp_path / "board", 1)
    events.write_scalars(1, {"step": 1, "loss": 0.5, "skipped": 0, "note": "first"})
    events.write_scalars(100_000, {"step": 100_000, "loss": 0.25, "skipped": 3})
    assert curves(tmp_path / "board") == {
        "loss": [(1, 0.5), (100_000, 0.25)],
        "skipped": [(1, 0.0), (100_000, 3.0)],
    }


def test_steps_taken_again_replace_those_that_were_lost(tmp_path):
    """After a kill at step 4 with a checkpoint at 2, a curve must not go back in time."""
    for first, values in ((1, {1: 0.1, 2: 0.2, 3: 0.9, 4: 0.9}), (3, {3: 0.3, 4: 0.4, 5: 0.5})):
        events = EventFileWriter(tmp_path, first)
        for step, value in values.items():
            events.write_scalars(step, {"loss": value})
    (loss,) = curves(tmp_path).values()
    assert loss == [(step, pytest.approx(step / 10)) for step in range(1, 6)]


def test_what_was_written_survives_a_kill_in_the_middle_of_a_record(tmp_path):
    """The lines before it are read; nothing waits in memory."""
    events = EventFileWriter(tmp_path, 1)
    events.write_scalars(1, {"loss": 1.0})
    events.write_scalars(2, {"loss": 2.0})
    events.path.write_bytes(events.path.read_bytes()[:-5])
    assert curves(tmp_path) == {"loss": [(1, 1.0)]}
