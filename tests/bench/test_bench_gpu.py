"""The script for a GPU machine runs through on a CPU, so that it works on the day that there is a GPU."""

import sys
import time
from pathlib import Path

import pytest

from bench import gpu, gpu_speed
from bench.gpu import Job


def tiny_job(work: Path, store: Path | None, seconds: float = 240) -> Job:
    return Job(work=work, end_seconds=time.monotonic() + seconds, tiny=True, store=store)


def test_steps_of_every_side_are_measured_and_a_model_learns(store_path, tmp_path, monkeypatch, capsys):
    """Stored clips through DALI, the published step, and probes; sizes are alike in the tiny form."""
    first_rows = [*gpu_speed.ROWS[:2], gpu_speed.ROWS[-1]]
    monkeypatch.setattr(gpu_speed, "ROWS", first_rows)
    job = tiny_job(tmp_path, store_path)
    assert gpu.run_speed_rows(job, 0) == 0
    lines = capsys.readouterr().out.splitlines()
    for row in first_rows:
        (line,) = [line for line in lines if line.startswith(str(row))]
        clips, steps_per_s, clips_per_s = map(float, line.removeprefix(str(row)).split()[:3])
        assert clips_per_s == pytest.approx(clips * steps_per_s, rel=0.05, abs=0.1)
    assert any("the draws of a step" in line for line in lines)
    assert gpu.run_learning(job) == 0
    assert "random" in capsys.readouterr().out


def test_the_tests_for_a_gpu_run_on_a_cpu(tmp_path):
    """Two of them, by the command that runs all: `just gpu --tiny` takes minutes.

    One is that no step reads a value on its way: on a CPU `item`, `tolist`, `cpu` and their like raise.
    """
    assert gpu.run_tests(tiny_job(tmp_path, None), "-k", "no_number or no_step_waits") == 0


def test_what_fails_or_hangs_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capfd):
    """A machine with a GPU is there for minutes: one broken part must not cost the others."""
    programs = {
        "tests": "raise SystemExit(3)",
        "speed-rows": "import time; time.sleep(100)",
        "learning": "print('learnt')",
    }
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(gpu, "own_command", lambda name, job: [sys.executable, "-S", "-c", programs[name]])
    status = gpu.run_sections(["tests", "speed", "learning"], 0.05, work=tmp_path, tiny=True, store=tmp_path)
    text = capfd.readouterr().out
    assert status == 1
    assert "tests: FAILED, status 3" in text
    assert f"FAILED {gpu_speed.ROWS[0]}: out of time" in text
    assert "learnt\n== learning: done" in text.replace("\n\n", "\n")
    assert text.endswith("not whole: tests, speed\n")


ROW_PROGRAM = """
import sys, time
row = int(sys.argv[-1])
(note,) = sys.argv[1:2]
open(note, "w").write(f"{row} {time.monotonic()}")
print("row", row)
if row == 0:
    raise SystemExit(9)
if row == 1:
    time.sleep(100)
"""


def test_a_row_that_fails_or_hangs_costs_that_row(tmp_path, monkeypatch, capfd):
    """An error of CUDA spoils its process: the next rows get another one."""
    monkeypatch.setattr(gpu_speed, "row_seconds", lambda number: 0.5)
    command = [sys.executable, "-S", "-c", ROW_PROGRAM, str(tmp_path / "row-begun")]
    monkeypatch.setattr(gpu, "own_command", lambda name, job: command)
    assert gpu.run_speed(tiny_job(tmp_path, tmp_path)) == 1
    text = capfd.readouterr().out
    assert f"FAILED {gpu_speed.ROWS[0]}: status 9" in text
    assert f"FAILED {gpu_speed.ROWS[1]}: out of time" in text
    assert [line for line in text.splitlines() if line.startswith("row")] == ["row 0", "row 1", "row 2"]


def test_every_file_with_a_test_for_a_gpu_is_run_by_the_script():
    """A file that is not named there would never see a GPU."""
    marked = {
        str(path.relative_to(gpu.ROOT))
        for path in (gpu.ROOT / "tests").rglob("test_*.py")
        if "mark.gpu\n" in path.read_text() or "mark.gpu," in path.read_text()
    }
    assert marked - {"tests/bench/test_bench_gpu.py"} == set(gpu.GPU_TEST_FILES)
