"""Files written whole or not at all, and locks."""

import errno
import os
import socket

import pytest

from pipeline.errors import InputError, StoreError
from pipeline.files import (
    BuildPart,
    lock_if_free,
    lock_output_file,
    lock_store,
    lock_when_free,
    make_folders,
    scratch_path,
)


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
def test_a_disk_without_locks_is_locked_by_a_file_that_names_its_process(tmp_path, monkeypatch, number, lock):
    """Lustre and NFS are often mounted so; a build without locks would let two writers meet."""
    refuse_flock(monkeypatch, number)
    with lock(tmp_path):
        (holder,) = tmp_path.glob("*.held")
        assert holder.read_text().startswith(f"process {os.getpid()} on {socket.gethostname()}, begun at ")
        with lock_if_free(holder.with_suffix("")) as is_ours:
            assert not is_ours
    assert not list(tmp_path.glob("*.held"))


def refuse_flock(monkeypatch, number: int = errno.ENOSYS) -> None:
    """Let every lock of the kernel fail as on a file system that has none."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)


def test_two_writers_do_not_meet_on_a_disk_without_locks(tmp_path, monkeypatch):
    """Whole builds exclude each other and every part; parts of one division do not."""
    refuse_flock(monkeypatch)
    with lock_store(tmp_path, BuildPart(0, 2)), lock_store(tmp_path, BuildPart(1, 2)):
        for part in (BuildPart(0, 2), BuildPart(0, 1), BuildPart(2, 3)):
            with pytest.raises(StoreError, match=f"is being written by process {os.getpid()} on "):
                lock_store(tmp_path, part).__enter__()
    with lock_store(tmp_path):
        pass


@pytest.mark.parametrize(
    "text",
    ["process 4194305 on {host}, begun at ", "process {pid} on {host}, begun at 1"],
    ids=["gone", "another"],
)
def test_the_lock_file_of_a_dead_process_is_taken_away(tmp_path, monkeypatch, text):
    """A number of a process is used again; its start is not."""
    refuse_flock(monkeypatch)
    (tmp_path / "build.lock.held").write_text(text.format(host=socket.gethostname(), pid=os.getpid()))
    with lock_store(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_file_of_another_machine_is_left_and_named(tmp_path, monkeypatch):
    """Only that machine knows whether its process still runs; a person may remove the file."""
    refuse_flock(monkeypatch)
    holder = tmp_path / "build.lock.held"
    holder.write_text("process 7 on elsewhere, begun at 12")
    with pytest.raises(StoreError, match=f"if that process is gone, remove {holder}"):
        lock_store(tmp_path).__enter__()
    assert holder.exists()


def test_new_folders_are_forced_to_the_disk_with_their_names(tmp_path, monkeypatch):
    """A shard that was fsynced is lost in a power cut if the folder above has no entry for its folder."""
    synced = []
    monkeypatch.setattr("pipeline.files.sync_to_disk", synced.append)
    make_folders(tmp_path / "a" / "b")
    make_folders(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
