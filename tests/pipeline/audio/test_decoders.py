"""Which samples of a file are decoded, where sound begins, how long it is, and how much damage costs."""

import numpy as np
import pytest
import soundfile
from sounds import ENCODERS, babble, lag, write

from pipeline.audio.containers import recognise_container
from pipeline.audio.decode import VideoSegment, decode_segment, mix_down
from pipeline.audio.decoders import FfmpegDecoder
from pipeline.errors import AudioError

RATE_HZ = 48_000

VIDEO_SECONDS = 40.0

WITHIN_SAMPLES = {".webm": 48, ".live.webm": 48, ".mka": 48}  # matroska counts milliseconds

CONTAINERS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", *WITHIN_SAMPLES)


def decode(path, start_seconds, end_seconds, **settings):
    segment = VideoSegment(start_seconds, end_seconds)
    return decode_segment(path, recognise_container(path), segment, **{"max_seconds": 1e4} | settings)


@pytest.fixture(scope="module")
def video_S():
    return babble(VIDEO_SECONDS, RATE_HZ)


@pytest.fixture(scope="module")
def videos(video_S, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {s: write(folder / f"video{s}", video_S, RATE_HZ) for s in CONTAINERS}


@pytest.mark.parametrize("start_seconds", [0.0, 1.5, 17.3, 30.0])
@pytest.mark.parametrize("suffix", CONTAINERS)
def test_a_whole_video_is_cut_at_its_segment(videos, video_S, suffix, start_seconds):
    """The cut is exact to the sample, whether the decoder seeks or decodes up to it; in matroska to the millisecond."""
    decoded = decode(videos[suffix], start_seconds, start_seconds + 10)
    first = round(start_seconds * RATE_HZ)
    assert decoded.facts.is_cut
    assert decoded.source_seconds == pytest.approx(VIDEO_SECONDS, abs=0.05)
    assert abs(len(decoded.wave_S) - 10 * RATE_HZ) <= WITHIN_SAMPLES.get(suffix, 0)
    assert abs(lag(decoded.wave_S, video_S[first : first + 10 * RATE_HZ])) <= WITHIN_SAMPLES.get(suffix, 0)


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_a_file_that_does_not_reach_the_segment_is_used_from_its_first_second(videos, video_S, suffix):
    """For a 40 s excerpt of an hour there is no better guess; the clip gets the flag `longer`."""
    decoded = decode(videos[suffix], 110, 120)
    assert not decoded.facts.is_cut
    assert lag(decoded.wave_S, video_S[: 10 * RATE_HZ]) == 0


@pytest.mark.parametrize(
    ("start_seconds", "source_seconds", "whole"),
    [
        (30, 10.0, False),
        (30, 10.1, False),  # ten seconds and an encoder's delay
        (30, 39.0, False),
        (30, 39.6, True),  # the last segment of a video, its end rounded up
        (30, 400.0, True),
        (0, 10.0, False),
        (0, 10.6, True),
        (0.4, 10.0, False),  # a clip, not a video of which half a second is missing
    ],
)
def test_a_whole_video_is_longer_than_the_clip_and_reaches_its_end(start_seconds, source_seconds, whole):
    """Both to within 5 % of the segment."""
    assert VideoSegment(start_seconds, start_seconds + 10).is_part_of(source_seconds) == whole


@pytest.mark.parametrize(("start_seconds", "end_seconds"), [(5, 5), (5, 4), (-1, 9), (0, float("nan"))])
def test_a_segment_without_length_or_start_is_refused(start_seconds, end_seconds):
    """Lists are checked earlier, so such a segment is a bug."""
    with pytest.raises(ValueError, match="no segment"):
        VideoSegment(start_seconds, end_seconds)


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_the_channels_are_averaged(tmp_path, channels):
    """The mean is plain, whatever loudspeaker a channel is for; a mono sound keeps its samples bit for bit."""
    waves_SC = np.stack([babble(0.5, 16_000, seed=seed) for seed in range(channels)], axis=1)
    decoded = decode(write(tmp_path / "sound.wav", waves_SC, 16_000, subtype="FLOAT"), 0, 0.5)
    assert decoded.facts.channels == channels
    np.testing.assert_allclose(decoded.wave_S, waves_SC.mean(1), atol=1e-7)
    assert channels > 1 or np.array_equal(decoded.wave_S, waves_SC[:, 0])


@pytest.mark.parametrize(
    ("subtype", "step"), [("PCM_16", 2**-15), ("PCM_24", 2**-23), ("FLOAT", 0), ("PCM_U8", 2**-7)]
)
def test_samples_are_decoded_as_they_were_written(tmp_path, subtype, step):
    """Full scale is 1 for every width of integers."""
    wave_S = babble(0.5, 16_000)
    decoded = decode(write(tmp_path / "sound.wav", wave_S, 16_000, subtype=subtype), 0, 0.5)
    assert np.abs(decoded.wave_S - wave_S).max() <= step


def test_one_channel_beyond_full_scale_is_noticed_though_the_mean_is_not():
    """The flag describes the source, not the mean."""
    loud_CS = np.array([[0.5, -1.5], [0.0, 0.0]], np.float32)
    wave_S, exceeds = mix_down([loud_CS])
    assert (wave_S.tolist(), exceeds) == ([0.25, -0.75], True)
    assert mix_down([loud_CS / 2])[1] is False


def test_the_samples_before_the_damage_of_a_flac_are_kept(tmp_path):
    """libsndfile cannot get past the damage; the declared length stays, so that missing samples can be counted."""
    path = write(tmp_path / "sound.flac", babble(10, RATE_HZ), RATE_HZ)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    decoded = decode(path, 0, 10)
    assert decoded.facts.expected_samples == 10 * RATE_HZ
    assert 3 * RATE_HZ < len(decoded.wave_S) < 7 * RATE_HZ
    assert decoded.source_seconds == len(decoded.wave_S) / RATE_HZ


def test_a_source_over_the_limit_is_refused_before_it_is_decoded(videos, monkeypatch):
    """The header is enough to know its length."""
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_: pytest.fail("was decoded"))
    for suffix in (".wav", ".flac", ".m4a", ".opus", ".live.webm"):
        with pytest.raises(AudioError, match="40 s long, more than 39") as error:
            decode(videos[suffix], 0, 10, max_seconds=39)
        assert error.value.reason == "too_long"


def test_a_rate_that_no_sound_has_is_refused(tmp_path):
    """Memory is allocated by the rate: four billion samples a second would be 160 GB for a clip."""
    path = write(tmp_path / "sound.wav", babble(0.5, 16_000), 16_000)
    content = bytearray(path.read_bytes())
    content[24:28] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    with pytest.raises(AudioError, match="claims 2147483647 samples a second"):
        decode(path, 0, 10)


AAC_DELAY, MP3_DELAY = 1_024, 1_105  # samples, FFmpeg's and LAME's encoders

LATE = {".aac": AAC_DELAY, ".ts": AAC_DELAY, ".mp4": AAC_DELAY, ".bare.mp3": MP3_DELAY}

SUFFIXES = (*ENCODERS, ".mp3", ".ogg")


def read_channels(path, seconds=10):
    """All channels of the first seconds, and the decoder."""
    with FfmpegDecoder.open_file(path, recognise_container(path)) as decoder:
        return np.concatenate(list(decoder.read_blocks(0, seconds * RATE_HZ)), axis=1), decoder


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sound_begins_at_its_first_sample_if_the_container_states_the_delay(tmp_path, suffix):
    """A delay that the file states is removed to the sample; any other is left in, and its size is known."""
    sound_S = babble(2, RATE_HZ)
    wave_CS, _ = read_channels(write(tmp_path / f"sound{suffix}", sound_S, RATE_HZ))
    assert lag(wave_CS[0], sound_S) == LATE.get(suffix, 0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_length_is_right_whether_declared_or_measured(tmp_path, suffix):
    """It is right up to the encoder's delay and padding, also where FFmpeg would guess it from the bit rate."""
    _, decoder = read_channels(write(tmp_path / f"sound{suffix}", babble(2, RATE_HZ), RATE_HZ))
    assert decoder.seconds == pytest.approx(2, abs=0.06)
    assert decoder.has_declared_length == (
        suffix not in {".aac", ".bare.mp3", ".ts", ".opus", ".ogg", ".live.webm"}
    )


@pytest.mark.parametrize("channels", [1, 2, 6, 16])
@pytest.mark.parametrize("suffix", [".webm", ".wv"])
def test_every_channel_arrives(tmp_path, suffix, channels):
    """With more than eight planes PyAV would read beyond its table, and sometimes crash."""
    waves_SC = np.stack([babble(0.5, RATE_HZ, seed=seed) for seed in range(channels)], axis=1)
    wave_CS, decoder = read_channels(write(tmp_path / f"sound{suffix}", waves_SC, RATE_HZ))
    assert decoder.channels == len(wave_CS) == channels
    if suffix == ".wv":
        assert np.abs(wave_CS.T - waves_SC).max() <= 2**-7


def test_damaged_packets_cost_themselves_only(tmp_path):
    """Damage in the middle of an mp3 is a gap, not the end of the clip."""
    path = write(tmp_path / "sound.mp3", babble(10, RATE_HZ), RATE_HZ)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 1_000] = bytes(1_000)
    path.write_bytes(content)
    wave_CS, _ = read_channels(path)
    assert 9.7 * RATE_HZ < wave_CS.shape[1] <= 10 * RATE_HZ


def test_nothing_is_printed_about_damage(tmp_path, capfd):
    """A build reads thousands of damaged packets; its report summarises the failures."""
    rng = np.random.default_rng(0)
    for suffix in (".mp3", ".m4a", ".opus", ".ogg", ".aac", ".webm"):
        path = write(tmp_path / f"sound{suffix}", babble(2, RATE_HZ), RATE_HZ)
        content = bytearray(path.read_bytes())
        for position in rng.integers(len(content) // 2, len(content) - 2_000, 40):
            content[position] = 0
        path.write_bytes(content)
        read_channels(path)
    assert capfd.readouterr() == ("", "")


def test_a_file_without_sound_says_so(tmp_path):
    """An example is a video whose audio was removed."""
    av = pytest.importorskip("av")
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(stream.encode(None))
    with pytest.raises(AudioError, match="no stream of sound") as error:
        read_channels(path)
    assert error.value.reason == "unreadable"
