"""One sound is the same sound wherever it lies."""

import pickle
import struct
import tarfile
import tracemalloc

import numpy as np
import polars as pl
import pytest
from archives import write_panns, write_parquet, write_passt, write_tar
from sounds import ENCODERS, SUBTYPES, babble, write

from pipeline import layouts
from pipeline.audio import load
from pipeline.errors import AudioError
from pipeline.locators import SOURCES_SCHEMA, Locator, Sources

RATE_HZ = 48_000
CONTAINERS = (*ENCODERS, *SUBTYPES, ".wav")


def locators_of(*places):
    """Of every sound below some places, by the name of the sound."""
    sounds = layouts.find(places).sounds
    some = Sources(frame=sounds.select(*SOURCES_SCHEMA)).locators(range(sounds.height))
    return {locator.name: locator for locator in some}


def heard(locator, start_seconds=1.0, end_seconds=3.0):
    return load(locator, start_seconds=start_seconds, end_seconds=end_seconds)


def refusal(locator):
    with pytest.raises(AudioError) as error:
        heard(locator)
    return error.value.reason, str(error.value)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A sound in every container, by name."""
    folder = tmp_path_factory.mktemp("files")
    sound_SC = np.stack([babble(4, RATE_HZ, seed=seed) for seed in range(2)], axis=1)
    return {f"sound{s}": write(folder / f"sound{s}", sound_SC, RATE_HZ) for s in CONTAINERS}


@pytest.fixture(scope="module")
def packed(files, tmp_path_factory):
    """The same sounds in archives: layout -> name -> locator."""
    folder = tmp_path_factory.mktemp("packed")
    content = {name: path.read_bytes() for name, path in files.items()}
    return {
        "tar": locators_of(write_tar(folder / "x.tar", content)),
        "parquet": locators_of(write_parquet(folder / "x.parquet", content)),
    }


@pytest.mark.parametrize("layout", ["tar", "parquet"])
@pytest.mark.parametrize("name", [f"sound{suffix}" for suffix in CONTAINERS])
@pytest.mark.parametrize("segment", [(0.0, 4.0), (1.5, 2.5)])
def test_a_sound_is_the_same_from_a_file_from_a_tar_and_from_parquet(files, packed, layout, name, segment):
    """Every sample, length, codec and flag: what lies where must not change what is learnt."""
    loose, member = heard(Locator.of(files[name]), *segment), heard(packed[layout][name], *segment)
    assert np.array_equal(loose.wave_S, member.wave_S)
    facts = ("rate_hz", "channels", "codec", "seconds", "digest", "flags", "peak_dbfs", "rms_dbfs")
    assert [getattr(loose, fact) for fact in facts] == [getattr(member, fact) for fact in facts]


@pytest.mark.parametrize("layout", ["tar", "parquet"])
def test_damage_is_the_same_wherever_it_lies(files, tmp_path, layout, capfd):
    """Half of every file: the same reason and the same words, and nothing on the terminal."""
    halves = {name: path.read_bytes()[: path.stat().st_size // 2] for name, path in files.items()}
    make = {"tar": write_tar, "parquet": write_parquet}[layout]
    members = locators_of(make(tmp_path / f"x.{layout}", halves))
    for name, content in halves.items():
        (tmp_path / name).write_bytes(content)
        assert outcome(members[name]) == outcome(Locator.of(tmp_path / name)), name
    assert capfd.readouterr() == ("", "")


def outcome(locator):
    try:
        return heard(locator, 0.0, 4.0).digest
    except AudioError as error:
        return error.reason, str(error)


def test_a_row_of_panns_is_the_wave_that_was_packed(tmp_path):
    """int16 samples go through the one decoding path as a wav in memory."""
    pytest.importorskip("h5py")
    wave_S = np.round(babble(10, 32_000) * 32767).astype(np.int16)
    path = write_panns(tmp_path / "eval.h5", {"Yabcdefghijk.wav": wave_S, "Ybcdefghijkl.wav": 0 * wave_S})
    there, absent = locators_of(path).values()
    clip = heard(there, 30.0, 40.0)
    assert np.array_equal(clip.wave_S, wave_S / np.float32(2**15))
    assert (clip.rate_hz, clip.codec, clip.flags) == (32_000, "pcm_16", ())
    assert refusal(absent) == (
        "missing",
        "Ybcdefghijkl.wav: row 1 of eval.h5 holds zeros only: the clip was missing when packed",
    )


def test_a_row_of_passt_is_the_mp3_that_was_packed(files, tmp_path):
    """A row that was never filled is a clip that is missing."""
    pytest.importorskip("h5py")
    path = write_passt(tmp_path / "x.hdf5", {"sound.mp3": files["sound.mp3"].read_bytes(), "no.mp3": b""})
    there, absent = locators_of(path).values()
    assert heard(there).digest == heard(Locator.of(files["sound.mp3"])).digest
    assert refusal(absent)[0] == "missing"


def test_a_row_of_parquet_without_bytes_is_missing(tmp_path):
    """Hugging Face writes null where a file could not be had."""
    (locator,) = locators_of(write_parquet(tmp_path / "x.parquet", {"a.wav": None})).values()
    assert refusal(locator) == ("missing", "a.wav: row 0 of row group 0 of x.parquet holds no sound")


@pytest.mark.parametrize("suffix", ["tar", "parquet", "h5"])
def test_an_archive_that_changes_under_a_build_costs_its_clips(files, tmp_path, suffix):
    """Removed it is missing, overwritten unreadable; neither is an exception that ends the build."""
    if suffix == "h5":
        pytest.importorskip("h5py")
    make = {"tar": write_tar, "parquet": write_parquet, "h5": write_passt}[suffix]
    path = make(tmp_path / f"x.{suffix}", {"sound.mp3": files["sound.mp3"].read_bytes()})
    (locator,) = locators_of(path).values()
    path.write_bytes(b"<html>" * 20_000)
    assert refusal(locator)[0] == "unreadable"
    path.unlink()
    reason, text = refusal(locator)
    assert reason == "missing"
    assert str(tmp_path) not in text
    assert "\n" not in text


def test_a_member_of_gigabytes_is_not_loaded(tmp_path):
    """Ten seconds are cut from a day of sound in a tar with no more memory than they need."""
    wave_S = babble(2, RATE_HZ)
    day_bytes = 2 * RATE_HZ * 40_000
    head = bytearray(write(tmp_path / "a.wav", wave_S, RATE_HZ).read_bytes())
    struct.pack_into("<I", head, head.index(b"data") + 4, day_bytes)
    member = tarfile.TarInfo("a.wav")
    member.size = 44 + day_bytes
    with (tmp_path / "x.tar").open("wb") as file:  # sparse: 3.8 GB of nothing behind the sound
        file.write(member.tobuf() + head)
        file.truncate(512 + -(-member.size // 512) * 512 + 1024)
    (locator,) = locators_of(tmp_path / "x.tar").values()
    tracemalloc.start()
    clip = heard(locator, 1.0, 2.0)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (clip.seconds, clip.flags) == (40_000.0, ("cut",))
    np.testing.assert_allclose(clip.wave_S, wave_S[RATE_HZ:], atol=2**-15)
    assert peak_bytes < 2**23


def test_locators_are_small_and_travel(packed, files):
    """A task of a thousand clips goes to a worker through a pipe."""
    for locator in (*packed["tar"].values(), *packed["parquet"].values(), Locator.of(files["sound.wav"])):
        assert pickle.loads(pickle.dumps(locator)) == locator
        assert len(pickle.dumps(locator)) < 600


def test_sources_give_the_locators_of_some_rows_and_none_for_nowhere():
    """Two million rows are columns; objects are made for a shard at a time."""
    rows = {
        "kind": ["file", None, "tar"],
        "path": ["a", None, "x.tar"],
        "source": ["a", None, "x.tar::m/b.wav"],
    }
    frame = pl.DataFrame(rows | {"offset": [None, None, 512], "size": [None, None, 9]}).with_columns(
        group=None, row=None, exact=False
    )
    _, nowhere, member = Sources(frame=frame.select(*SOURCES_SCHEMA).cast(SOURCES_SCHEMA)).locators(
        range(0, 3)
    )
    assert nowhere is None
    assert (member.kind, member.offset, member.size, member.name) == ("tar", 512, 9, "b.wav")
    assert len(Sources(frame=frame.select(*SOURCES_SCHEMA).cast(SOURCES_SCHEMA)).locators(range(1, 2))) == 1
