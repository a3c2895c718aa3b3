"""Files written whole or not at all, and locks."""

import errno
import os

import pytest

from pipeline.errors import InputError, StoreError
from pipeline.files import lock_output_file, lock_store, lock_when_free, scratch_path


def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    """A process with the rights could otherwise replace /dev/stdout or /dev/null by a file."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: is a device or a pipe; expected the name of a file"):
        scratch_path(tmp_path / "pipe")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    "lock",
    [lock_store, lambda folder: lock_output_file(folder / "x"), lambda folder: lock_when_free(folder / "x")],
    ids=["store", "file", "waiting"],
)
def test_a_disk_without_locks_is_one_line_that_says_what_to_do(tmp_path, monkeypatch, number, lock):
    """Lustre and NFS are often mounted so; a build without locks would let two writers meet."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with (
        pytest.raises(StoreError, match=rf"^{tmp_path}: its file system has no locks .*another disk"),
        lock(tmp_path),
    ):
        raise AssertionError("locked without a lock")
    assert not list(tmp_path.iterdir())
