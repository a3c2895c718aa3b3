"""Files written whole or not at all."""

import os

import pytest

from pipeline.errors import InputError
from pipeline.files import scratch_path


def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    """A process with the rights could otherwise replace /dev/stdout or /dev/null by a file."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: is a device or a pipe; expected the name of a file"):
        scratch_path(tmp_path / "pipe")
