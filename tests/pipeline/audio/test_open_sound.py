"""A sound that stays open gives every clip what the clip alone gives, and is decoded once."""

from pathlib import Path

import numpy as np
import pytest
from spoken_seconds import tone_seconds, write_stream

from pipeline.audio import ffmpeg_decoder
from pipeline.audio.decode import AudioPolicy, ClipAudio, load_clip_audio
from pipeline.audio.open_sound import OpenSound
from pipeline.audio.sources import SoundLocator
from pipeline.errors import AudioError

SECONDS = 12

# Suffix: codec, FFmpeg's name, sampling rate.
KINDS = {
    ".mp3": ("libmp3lame", "mp3", 22_050),
    ".aac": ("aac", "adts", 22_050),
    ".ts": ("aac", "mpegts", 22_050),
    ".wma": ("wmav2", "asf", 22_050),
    ".avi": ("libmp3lame", "avi", 22_050),
    ".flv": ("libmp3lame", "flv", 22_050),
    ".m4a": ("aac", "ipod", 22_050),
    ".opus": ("libopus", "ogg", 48_000),
}

EVERY_FRAME_IS_DECODED = (".mp3", ".aac", ".ts", ".wma", ".avi", ".flv")

ORDERS = {
    "apart": [(0, 3), (3, 6), (6, 9), (9, 12)],
    "overlapping": [(0, 4), (2, 6), (4, 8), (6, 10), (8, 12)],
    "gaps": [(1, 2.5), (4.25, 6), (9.5, 11)],
    "twice": [(2, 5), (2, 5), (2, 5)],
    "backwards": [(6, 9), (0, 3), (3, 6)],
    "beyond": [(6, 9), (10, 14), (20, 24), (0, 3)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A sound of every kind; where the kind has a clock, three of its seconds are missing."""
    folder = tmp_path_factory.mktemp("sounds")
    for suffix, (codec, kind, rate_hz) in KINDS.items():
        holes = [] if suffix in (".mp3", ".aac") else [(4.5, 5.5)]
        write_stream(folder / f"x{suffix}", tone_seconds(SECONDS, rate_hz), rate_hz, codec, kind, holes=holes)
    return folder


def locate(path: Path) -> SoundLocator:
    return SoundLocator(path=str(path), source=path.name, exact=True)


def load(path: Path, span: tuple[float, float], open_sound: OpenSound | None = None) -> ClipAudio | str:
    """A clip of a sound, or the reason why there is none."""
    start, end = span
    policy = AudioPolicy(accept_truncated=True)
    try:
        return load_clip_audio(
            locate(path), start_seconds=start, end_seconds=end, policy=policy, open_sound=open_sound
        )
    except AudioError as error:
        return f"{error.reason}: {error}"


def assert_same_clip(clip: ClipAudio | str, other: ClipAudio | str) -> None:
    if isinstance(clip, str) or isinstance(other, str):
        assert clip == other
        return
    np.testing.assert_array_equal(clip.wave_S, other.wave_S)
    assert (clip.flags, clip.digest) == (other.flags, other.digest)
    assert (clip.source_seconds, clip.codec) == (other.source_seconds, other.codec)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("suffix", KINDS)
def test_a_clip_is_the_same_whatever_was_read_before_it(folder, suffix, order):
    """To the last sample, with its flags, in any order, up to the end of the sound and beyond."""
    path = folder / f"x{suffix}"
    with OpenSound() as open_sound:
        for span in ORDERS[order]:
            assert_same_clip(load(path, span, open_sound), load(path, span))


def test_sounds_and_errors_in_turn_leave_nothing_open(folder, tmp_path):
    """Another sound closes the one before it, and so does an error."""
    (tmp_path / "junk.mp3").write_bytes(b"\xff\xfb\x90\x00" + bytes(4000))
    paths = [
        folder / "x.mp3",
        folder / "x.ts",
        tmp_path / "junk.mp3",
        tmp_path / "none.mp3",
        folder / "x.mp3",
    ]
    with OpenSound() as open_sound:
        for path in paths:
            for span in ((0, 3), (3, 6)):
                assert_same_clip(load(path, span, open_sound), load(path, span))


@pytest.mark.parametrize("suffix", EVERY_FRAME_IS_DECODED)
def test_a_long_sound_is_decoded_once(folder, suffix, monkeypatch):
    """Frames are counted: those of twelve clips are those of the whole sound."""
    decoded, decode_frames = [], ffmpeg_decoder.OpenStream.decode_frames

    def count_frames(stream):
        for frame in decode_frames(stream):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(ffmpeg_decoder.OpenStream, "decode_frames", count_frames)
    path = folder / f"x{suffix}"
    load(path, (0, SECONDS))
    whole = len(decoded)
    decoded.clear()
    with OpenSound() as open_sound:
        for second in range(SECONDS):
            load(path, (second, second + 1), open_sound)
    assert len(decoded) <= whole + 1


@pytest.mark.parametrize("suffix", EVERY_FRAME_IS_DECODED)
def test_a_sound_that_ends_with_its_clip_is_not_kept(folder, suffix):
    """Its frames would take time and memory, and no clip follows."""
    path = folder / f"x{suffix}"
    with OpenSound() as open_sound:
        load(path, (0, SECONDS / 2), open_sound)
        assert open_sound._kept is not None
        load(path, (SECONDS / 2, SECONDS), open_sound)
        assert open_sound._kept is None
