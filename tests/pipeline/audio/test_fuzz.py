"""Damage to a file costs its clip and no more; `just fuzz 2000` tries more of it."""

import warnings

import pytest
from fuzz_sounds import SUFFIXES, outcome, run, spoilt, table, whole_files

from pipeline.store.manifest import FAILURE_REASONS


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_files(tmp_path_factory.mktemp("whole"))


ONCE_FATAL = (2_423,)  # an MPEG-TS in which a further stream appears: PyAV raises an IndexError at its end


@pytest.mark.parametrize("seed", [*range(2 * len(SUFFIXES)), *ONCE_FATAL])
def test_damage_costs_a_clip_and_no_more(whole, tmp_path, seed, capfd):
    """The result is a finite clip or a reason, without a warning and without output on the terminal."""
    suffix, damage, content = spoilt(seed, whole)
    (path := tmp_path / f"{damage}{suffix}").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert outcome(path, seed) in {"good", *FAILURE_REASONS}
    assert capfd.readouterr() == ("", "")


def test_the_long_run_counts_every_file_once(tmp_path):
    """It uses a build's pool of workers, so that a crashed decoder is counted in the table."""
    rows = run(len(SUFFIXES), tmp_path, workers=1)
    assert sorted(int(seed) for seed, *_ in rows) == list(range(len(SUFFIXES)))
    assert {row[1] for row in rows} == set(SUFFIXES)
    last = table(rows).splitlines()[len(SUFFIXES) + 1].split()
    assert last[0] == "all"
    assert sum(map(int, last[1:])) == len(SUFFIXES)
