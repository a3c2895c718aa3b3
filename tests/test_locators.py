"""One sound is the same sound wherever it lies."""


import numpy as np
import pytest
from archives import write_parquet, write_tar
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
