"""Long work says how far it is, on a terminal and in a log."""

import io
import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from stores import build
from tqdm import tqdm

from pipeline import progress
from pipeline.build.recompute import compare_with_audio
from pipeline.build.verify import find_faults
from pipeline.cli.build import decoding_progress
from pipeline.progress import ProgressLines, clock_phrase, open_progress, rate_phrase, track_progress


@pytest.fixture
def often(monkeypatch):
    """Lines in quick succession: a test does not wait 30 s."""
    defaults = {"initial": 0, "seconds_to_first": 0.01, "seconds_between": 0.01}
    monkeypatch.setattr(ProgressLines.__init__, "__kwdefaults__", defaults)


def slowly(items):
    for item in items:
        time.sleep(0.03)
        yield item


def test_a_log_gets_lines_with_count_rate_and_time_left(often, capsys):
    """A job's log is all that its owner sees; a bar's carriage returns would make one endless line of it."""
    with open_progress(2_000, label="decode", unit="clip", initial=500) as lines:
        lines.update(500)
        lines.set_postfix_str("loss 0.5")
        time.sleep(0.05)
        lines.update(1_000)
    said = capsys.readouterr().err
    assert "\r" not in said
    first, *_, last = said.splitlines()
    assert re.fullmatch(r"decode: 1,000 of 2,000 clips, [\d,.e+]+ clips/s, 0:00 left, loss 0\.5", first), (
        first
    )
    assert re.fullmatch(r"decode: 2,000 of 2,000 clips, [\d,.e+]+ clips/s, after 0:00, loss 0\.5", last), last


def test_the_first_line_comes_after_5_s_and_then_one_every_30_s(monkeypatch, capsys):
    """Half a minute of silence looks like a command that hangs; a line every 5 s would fill the log."""

    class FakeClock:
        """Time passes when the thread waits; the work ends at second 70."""

        seconds = 0.0

        def wait(self, timeout):
            self.seconds = min(70.0, self.seconds + timeout)
            return self.seconds == 70.0

        def set(self):
            pass

    clock = FakeClock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    lines = ProgressLines(2, label="probes", unit="probe")
    lines._ended = clock
    with lines:
        lines._thread.join()
    said = re.findall(r"after (\d:\d\d)", capsys.readouterr().err)
    assert said == ["0:05", "0:35", "1:05", "1:10"]


def test_a_single_unit_that_takes_long_is_seen_to_go_on(often, capsys):
    """A probe may take minutes: the lines do not wait for its end."""
    assert list(track_progress(slowly([1]), 1, label="probes", unit="probe")) == [1]
    assert "probes: 0 of 1 probe, after 0:00" in capsys.readouterr().err


def test_work_that_ends_at_once_says_nothing(capsys):
    """Most commands are short; their logs hold results alone."""
    assert list(track_progress(range(3), 3, label="verify", unit="shard")) == [0, 1, 2]
    with open_progress(3, label="verify", unit="shard", shown=False) as hidden:
        hidden.update(3)
    assert capsys.readouterr().err == ""


def test_the_end_is_told_once(capsys):
    """Where a line has told that everything is done, as after workers took five seconds to start, none follows."""
    with ProgressLines(1, label="decode", unit="clip", seconds_to_first=0.01, seconds_between=100.0) as lines:
        lines.update()
        time.sleep(0.1)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_failure_is_no_reason_to_hang(often):
    """The thread that prints ends with the work, however that ends."""
    with pytest.raises(ValueError, match="broken"), open_progress(1, label="x", unit="clip") as lines:
        raise ValueError("broken")
    assert not lines._thread.is_alive()


def test_a_terminal_gets_a_bar(monkeypatch):
    """As before: there a bar tells more than lines."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = open_progress(3, label="verify", unit="shard", leave=False)
    assert isinstance(bar, tqdm)
    bar.close()


@pytest.mark.parametrize(
    ("per_second", "phrase"),
    [(12_345.6, "12,346 clips/s"), (35.21, "35.2 clips/s"), (0.5, "30 clips/min"), (0.001, "3.6 clips/h")],
)
def test_a_rate_is_told_in_numbers_that_can_be_read(per_second, phrase):
    """Nobody multiplies 0.0003 a second."""
    assert rate_phrase(per_second, "clip") == phrase


def test_durations_are_clocks():
    assert (clock_phrase(59.6), clock_phrase(3_661)) == ("1:00", "1:01:01")


def test_every_long_command_of_stage_one_uses_the_same_lines(corpus, tmp_path, monkeypatch):
    """Build, verification and comparison with the sounds: what, how many, and in which unit."""
    opened = []
    real = progress.open_progress

    def record(total, *, label, unit, shown=True, **options):
        if shown:
            opened.append((label, total, unit))
        return real(total, label=label, unit=unit, shown=False, **options)

    monkeypatch.setattr(progress, "open_progress", record)
    assert list(decoding_progress(2, iter([4, 5]))) == [4, 5]
    build(corpus, tmp_path / "s.zarr")
    assert list(find_faults(tmp_path / "s.zarr", progress=True)) == []
    rows = list(compare_with_audio(tmp_path / "s.zarr", 2, progress=True))
    assert len(rows) == 2
    assert opened == [("decode", 2, "clip"), ("verify", 3, "shard"), ("compare", 2, "row")]
    assert np.isfinite([row.difference_nat for row in rows]).all()
