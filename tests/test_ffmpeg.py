"""What FFmpeg makes of a file: where sound begins, how long it is, and how much damage costs."""

import numpy as np
import pytest
from sounds import ENCODERS, babble, lag, write

from pipeline.containers import recognise
from pipeline.errors import AudioError
from pipeline.ffmpeg import Ffmpeg

RATE_HZ = 48_000
AAC_DELAY, MP3_DELAY = 1_024, 1_105  # samples, FFmpeg's and LAME's encoders
LATE = {".aac": AAC_DELAY, ".ts": AAC_DELAY, ".mp4": AAC_DELAY, ".bare.mp3": MP3_DELAY}
SUFFIXES = (*ENCODERS, ".mp3", ".ogg")


def wave_of(path, seconds=10):
    """All channels of the first seconds, and the source."""
    with Ffmpeg.opened(path, recognise(path)) as source:
        return np.concatenate(list(source.blocks(0, seconds * RATE_HZ)), axis=1), source


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sound_begins_where_it_began_if_the_container_knows(tmp_path, suffix):
    """Delay that is stated is removed to the sample; where nothing states it, it is left, and known."""
    sound_S = babble(2, RATE_HZ)
    wave_CS, _ = wave_of(write(tmp_path / f"sound{suffix}", sound_S, RATE_HZ))
    assert lag(wave_CS[0], sound_S) == LATE.get(suffix, 0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_length_is_right_whether_declared_or_measured(tmp_path, suffix):
    """To within an encoder's delay and padding, also where FFmpeg alone would guess by the bit rate."""
    _, source = wave_of(write(tmp_path / f"sound{suffix}", babble(2, RATE_HZ), RATE_HZ))
    assert source.seconds == pytest.approx(2, abs=0.06)
    assert source.declared == (suffix not in {".aac", ".bare.mp3", ".ts", ".opus", ".ogg", ".live.webm"})


@pytest.mark.parametrize("channels", [1, 2, 6, 16])
@pytest.mark.parametrize("suffix", [".webm", ".wv"])
def test_every_channel_arrives(tmp_path, suffix, channels):
    """Of more than eight planes PyAV would read past the table, and sometimes crash."""
    waves_SC = np.stack([babble(0.5, RATE_HZ, seed=seed) for seed in range(channels)], axis=1)
    wave_CS, source = wave_of(write(tmp_path / f"sound{suffix}", waves_SC, RATE_HZ))
    assert source.channels == len(wave_CS) == channels
    if suffix == ".wv":
        assert np.abs(wave_CS.T - waves_SC).max() <= 2**-7


def test_damaged_packets_cost_themselves_only(tmp_path):
    """A scratch in the middle of an mp3 is a scratch, not the end of the clip."""
    path = write(tmp_path / "sound.mp3", babble(10, RATE_HZ), RATE_HZ)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 1_000] = bytes(1_000)
    path.write_bytes(content)
    wave_CS, _ = wave_of(path)
    assert 9.7 * RATE_HZ < wave_CS.shape[1] <= 10 * RATE_HZ


def test_nothing_is_printed_about_damage(tmp_path, capfd):
    """A build meets thousands of scratches; what matters is in its report."""
    rng = np.random.default_rng(0)
    for suffix in (".mp3", ".m4a", ".opus", ".ogg", ".aac", ".webm"):
        path = write(tmp_path / f"sound{suffix}", babble(2, RATE_HZ), RATE_HZ)
        content = bytearray(path.read_bytes())
        for position in rng.integers(len(content) // 2, len(content) - 2_000, 40):
            content[position] = 0
        path.write_bytes(content)
        wave_of(path)
    assert capfd.readouterr() == ("", "")


def test_a_file_without_sound_says_so(tmp_path):
    """A video whose audio was stripped."""
    av = pytest.importorskip("av")
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(stream.encode(None))
    with pytest.raises(AudioError, match="no stream of sound") as error:
        wave_of(path)
    assert error.value.reason == "unreadable"
