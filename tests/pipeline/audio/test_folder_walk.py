"""A search of a folder finds every sound, and tells what it leaves out; one bad folder or name costs itself alone."""

import os
from pathlib import Path

import pytest

from pipeline.audio.container_kinds import CONTAINER_SUFFIXES
from pipeline.audio.folder_walk import LeftOut, walk_sounds_and_archives
from pipeline.audio.sources import find_sounds
from pipeline.datasets.sound_folder import SoundFolder
from pipeline.errors import InputError


def walk(folder):
    """The names that are found, and the sentences about the rest."""
    left_out = LeftOut()
    return list(walk_sounds_and_archives(folder, left_out)), list(left_out.describe())


def make_files(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def test_every_suffix_of_a_container_is_found(tmp_path):
    """In any capitals."""
    make_files(tmp_path, *(f"a{suffix.upper()}" for suffix in CONTAINER_SUFFIXES))
    assert len(walk(tmp_path)[0]) == len(CONTAINER_SUFFIXES)


def test_what_is_left_out_is_told_by_suffix_and_count(tmp_path):
    """A tidy folder is told nothing; the note is the same for loose sounds, for a user's folder and in a dry run."""
    make_files(tmp_path, "a.wav", "b/c.flac")
    assert walk(tmp_path) == (["a.wav", "b/c.flac"], [])
    make_files(tmp_path, *(f"{n}.TXT" for n in range(3)), "b/x.jpg", "b/README")
    note = "left out, since by their names they are no sounds: 3 .txt, 1 .jpg, 1 without suffix"
    assert walk(tmp_path) == (["a.wav", "b/c.flac"], [note])
    assert find_sounds([tmp_path]).notes == (note,)
    assert SoundFolder.scan_folder(tmp_path)[1] == [note]


def test_a_folder_that_cannot_be_listed_costs_itself_alone(tmp_path, monkeypatch):
    """A disk error in one folder of thousands; the folder that was given must be readable."""
    make_files(tmp_path, "a/1.wav", "b/2.wav", "c/3.wav")
    real = os.scandir

    def scandir(path):
        if os.fspath(path) == broken:
            raise OSError(5, "Input/output error", broken)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    broken = str(tmp_path / "b")
    names, notes = walk(tmp_path)
    assert names == ["a/1.wav", "c/3.wav"]
    assert notes == [f"{broken!a}: cannot be listed (Input/output error), so left out"]
    broken = str(tmp_path)
    with pytest.raises(InputError, match="cannot be listed"):
        walk(tmp_path)


def test_links_that_lead_nowhere_or_in_circles_end(tmp_path):
    """A link to its own folder is entered once, a link to itself not at all; a dangling one is a missing sound."""
    make_files(tmp_path, "a/1.wav")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "gone.wav").symlink_to("nothing")
    assert walk(tmp_path)[0] == ["gone.wav", "a/1.wav"]


def test_a_name_that_is_no_utf8_costs_itself_alone(tmp_path):
    """Names of sounds go into tables, which hold text."""
    make_files(tmp_path, "a.wav", os.fsdecode(b"b\xff.wav"), os.fsdecode(b"d\xe9/c.wav"))
    names, notes = walk(tmp_path)
    assert names == ["a.wav"]
    assert len(notes) == 2
    assert all("not UTF-8, so left out" in note and note.isascii() for note in notes)


@pytest.mark.parametrize("name", ["x.zarr", "x.zarr.staging", "plain"])
def test_a_store_below_the_sounds_is_not_searched(tmp_path, name):
    """It may lie beside the sounds it was made from, and has hundreds of thousands of files."""
    make_files(tmp_path, "a.wav", f"{name}/zarr.json", f"{name}/mel/c/0/b.wav")
    names, notes = walk(tmp_path)
    assert names == ["a.wav"]
    assert notes == [f"{str(tmp_path / name)!a}: a store, not searched for sounds"]


def test_a_store_that_is_given_itself_has_no_sounds(tmp_path):
    """It is searched, since it was asked for."""
    assert walk(make_files(tmp_path, "zarr.json", "a.wav"))[0] == ["a.wav"]


def test_a_single_file_is_found_by_its_name(tmp_path):
    """Whatever its suffix."""
    assert walk(make_files(tmp_path, "a.bin") / "a.bin")[0] == ["a.bin"]
    with pytest.raises(InputError, match="no such folder"):
        walk(Path(tmp_path / "gone"))
