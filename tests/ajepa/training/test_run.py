"""A run folder: whole or absent, refusing what does not belong, and forgetting what it did not commit."""

import json
from pathlib import Path

import pytest
import torch
from identities import run_identity
from safetensors import SafetensorError

from ajepa.training.checkpoints import Checkpoint, CheckpointScore, write_safetensors
from ajepa.training.run import Run
from pipeline.errors import RunError
from pipeline.files import DISK_FULL_ERRNOS

RECIPE = {"steps": 30, "optimiser": {"lr": 1e-3, "betas": [0.9, 0.95]}}

IDENTITY = run_identity(store_id="abc")


def started(path: Path, recipe=RECIPE, identity=IDENTITY) -> Run:
    return Run.create_or_open(path, recipe=recipe, identity=identity)


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step=step, parts={"encoder": {"w": torch.full((3,), float(step))}, "optimiser": {}})


def test_a_run_that_exists_is_opened_again_by_the_same_recipe_and_store(tmp_path):
    """The same command carries on; nothing is asked, nothing is overwritten."""
    first = started(tmp_path / "run")
    assert started(tmp_path / "run") == first == Run.open(tmp_path / "run")


@pytest.mark.parametrize(
    ("recipe", "identity", "message_part"),
    [
        ({**RECIPE, "steps": 40}, IDENTITY, "recipe.steps: was 30, now 40"),
        (
            {"steps": 30, "optimiser": {"lr": 1e-3, "betas": [0.9, 0.99]}},
            IDENTITY,
            "recipe.optimiser.betas.1: was 0.95, now 0.99",
        ),
        ({"steps": 30}, IDENTITY, "recipe.optimiser.lr: was 0.001, now absent"),
        (RECIPE, run_identity(store_id="xyz"), "identity.store_id: was abc, now xyz"),
    ],
)
def test_another_recipe_or_store_is_refused_with_the_difference_in_one_line(
    tmp_path, recipe, identity, message_part
):
    """A run continued with other settings would be neither the old one nor the new."""
    started(tmp_path)
    with pytest.raises(RunError) as refused:
        started(tmp_path, recipe, identity)
    assert message_part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_many_differences_are_counted_rather_than_listed(tmp_path):
    """One line stays one line, however much was changed."""
    started(tmp_path, {str(key): 0 for key in range(10)})
    with pytest.raises(RunError, match=r"recipe\.3: was 0, now 1; and 6 more"):
        started(tmp_path, {str(key): 1 for key in range(10)})


def test_a_folder_that_is_not_a_run_is_refused_and_left_as_it_is(tmp_path):
    """A mistyped --run must not fill somebody's folder."""
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"not a run .*holds thesis\.tex"):
        started(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunError, match="is a file"):
        started(tmp_path / "thesis.tex")


def test_the_debris_of_a_crash_before_the_first_write_does_not_block_the_run(tmp_path):
    """Killed between making the folder and naming the recipe, the same command must work again."""
    (tmp_path / "recipe.json.4711.partial").write_text("{")
    assert started(tmp_path).newest_step == 0


def test_opening_what_is_no_run_says_what_to_give(tmp_path):
    """evaluate and report name the folder and the missing file."""
    with pytest.raises(RunError, match=r"not a run \(no recipe\.json\)"):
        Run.open(tmp_path)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(RunError, match=r"recipe\.json: damaged"):
        Run.open(tmp_path)


def test_a_run_written_by_a_later_format_is_refused(tmp_path):
    """Half-understood files are worse than none."""
    started(tmp_path)
    record = json.loads((tmp_path / "recipe.json").read_text())
    (tmp_path / "recipe.json").write_text(json.dumps({**record, "format": 3}))
    with pytest.raises(RunError, match="run format 3, this version reads 1 and 2"):
        Run.open(tmp_path)


def test_the_newest_checkpoint_comes_back_bit_for_bit_and_older_ones_go(tmp_path):
    """Retention keeps what was asked for; numbers are sorted as numbers."""
    run = started(tmp_path)
    for step in (9, 10, 100):
        run.save_checkpoint(checkpoint(step), keep=2)
    assert [folder.name for folder in run.checkpoint_folders()] == ["step-00000010", "step-00000100"]
    assert run.newest_step == 100
    loaded = run.load_checkpoint()
    assert loaded.step == 100
    assert torch.equal(loaded.parts["encoder"]["w"], torch.full((3,), 100.0))
    assert list(run.load_checkpoint("encoder").parts) == ["encoder"]


def steps(run: Run) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in run.checkpoint_folders()]


def test_checkpoints_at_round_steps_stay_for_good(tmp_path):
    """A curve of probes over training needs its points."""
    run = started(tmp_path)
    for step in (3, 4, 8, 9, 12, 14, 15):
        run.save_checkpoint(checkpoint(step), keep=2, keep_every=4)
    assert steps(run) == [4, 8, 12, 14, 15]


def test_the_best_checkpoint_stays_until_a_better_one_is_there(tmp_path):
    """Which is best is written with it, whole or not at all; of two equal ones it is the later."""
    run = started(tmp_path)
    for step, score, steps_left, best_step in [
        (1, None, [1], None),
        (2, 0.30, [2], 2),
        (3, None, [2, 3], 2),
        (4, 0.25, [2, 4], 2),
        (5, 0.31, [5], 5),
        (6, None, [5, 6], 5),
        (7, 0.31, [7], 7),
    ]:
        scored = None if score is None else CheckpointScore(value=score, clips="9 clips")
        run.save_checkpoint(checkpoint(step), keep=1, score=scored)
        assert steps(run) == steps_left
        assert (run.best_checkpoint.step if run.best_checkpoint else None) == best_step
    run.save_checkpoint(checkpoint(8), keep=1)
    assert run.load_checkpoint(at="best").step == 7
    assert run.load_checkpoint().step == run.load_checkpoint(at="last").step == 8
    assert run.load_checkpoint(at="7").step == run.load_checkpoint("encoder", at=7).step == 7


@pytest.mark.parametrize(
    ("at", "message_part"),
    [
        ("best", "no checkpoint was probed, so none is the best; take last"),
        (4, "no checkpoint 4; expected last, best, or a step of 3, 5"),
        ("frist", "no checkpoint 'frist'; expected last, best, or a step of 3, 5"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(tmp_path, at, message_part):
    """Another one in its place would be measured under its name."""
    run = started(tmp_path)
    for step in (3, 5):
        run.save_checkpoint(checkpoint(step), keep=2)
    with pytest.raises(RunError, match=message_part):
        run.load_checkpoint(at=at)


def test_a_flipped_bit_in_a_checkpoint_is_refused_by_name(tmp_path):
    """A damaged weight would train on without a word."""
    run = started(tmp_path)
    run.save_checkpoint(checkpoint(5), keep=2)
    file = run.checkpoint_folders()[0] / "encoder.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"step-00000005/encoder\.safetensors: damaged"):
        run.load_checkpoint()


def test_who_may_read_a_recipe_may_read_the_weights(tmp_path):
    """A lab shares its runs; safetensors by itself shuts out all but the owner."""
    write_safetensors(tmp_path / "weights.safetensors", {"a": torch.ones(2)})
    (tmp_path / "other").touch()
    modes = {(tmp_path / name).stat().st_mode for name in ("weights.safetensors", "other")}
    assert len(modes) == 1


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """A full disk costs the steps since the last checkpoint, never that checkpoint."""
    run = started(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 8})())
    with pytest.raises(RunError, match=r"no space for the checkpoint \(step 3 needs 0 MB, 0 MB are free\)"):
        run.save_checkpoint(checkpoint(3), keep=1)
    assert run.newest_step == 0


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    """Evaluating before the first checkpoint is a user's mistake, not a bug."""
    with pytest.raises(RunError, match="holds no checkpoint yet"):
        started(tmp_path).load_checkpoint()


def test_lines_past_the_checkpoint_are_forgotten_and_so_is_debris(tmp_path):
    """After a kill the file must end up as if it had never happened."""
    run = started(tmp_path)
    run.log_metrics({"step": 5, "loss": 1.0})
    run.save_checkpoint(checkpoint(5), keep=2)
    run.log_metrics({"step": 6, "loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 7, "lo')
    (tmp_path / "checkpoints" / "step-00000007.99.partial").mkdir()
    run.rewind_to_checkpoint()
    assert run.read_metrics() == [{"step": 5, "loss": 1.0}]
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def test_a_run_without_a_checkpoint_rewinds_to_nothing(tmp_path):
    """Killed before the first checkpoint, a run starts over, and so do its metrics."""
    run = started(tmp_path)
    run.log_metrics({"step": 1, "loss": 1.0})
    run.rewind_to_checkpoint()
    assert run.read_metrics() == []


def test_two_processes_cannot_train_one_run(tmp_path):
    """Two writers would interleave their metrics and overwrite each other's checkpoints."""
    run = started(tmp_path)
    with (
        run.writing_lock(),
        pytest.raises(RunError, match="another process is training this run"),
        run.writing_lock(),
    ):
        pass
    with run.writing_lock():
        pass


def test_a_full_disk_is_the_same_error_for_weights_as_for_other_files(tmp_path, monkeypatch):
    """Both command lines know what to say of that, and nothing of safetensors' own kind of error."""

    def full(*_values):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("ajepa.training.checkpoints.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as refused:
        write_safetensors(tmp_path / "x.safetensors", {"weight": torch.zeros(2)})
    assert refused.value.errno in DISK_FULL_ERRNOS
