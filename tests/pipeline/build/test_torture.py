"""Weeks are lost where a crash means starting again, or worse, a store that looks whole."""

from torture import torture


def test_builds_killed_anywhere_end_in_the_same_bytes(tmp_path):
    """A few kills by the clock and at steps to the disk, the window between rename and ledger included."""
    assert torture(tmp_path, kills=4, seed=0) >= 1
