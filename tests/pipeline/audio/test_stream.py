"""A sound decoded in pieces is the sound decoded at once, sample for sample, and is checked as strictly."""

import numpy as np
import pytest
from sounds import babble, write

from pipeline.audio.decode import AudioPolicy, load_clip_audio, stream_wave
from pipeline.audio.sources import SoundLocator
from pipeline.errors import AudioError


def stream(path, rate_hz=32_000, **policy) -> np.ndarray:
    return np.concatenate(
        list(stream_wave(SoundLocator.from_path(path), rate_hz, policy=AudioPolicy(**policy)))
    )


@pytest.mark.parametrize("rate_hz", [8_000, 32_000, 44_100])
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".m4a", ".webm", ".aac", ".ogg"])
def test_pieces_joined_are_the_whole_sound(tmp_path, suffix, rate_hz):
    """Decoders and resampler keep their state from one piece to the next."""
    own_hz = 48_000 if suffix == ".webm" else rate_hz
    path = write(tmp_path / f"a{suffix}", np.stack([babble(3.1, own_hz)] * 2, 1), own_hz)
    at_once = load_clip_audio(SoundLocator.from_path(path), start_seconds=0, end_seconds=100).resample_wave(
        32_000
    )
    in_pieces = stream(path)
    assert len(in_pieces) == len(at_once)
    np.testing.assert_allclose(in_pieces, at_once, atol=1e-6)


def test_pieces_are_small_beside_a_long_sound(tmp_path):
    """Ten minutes are never in memory at once."""
    path = write(tmp_path / "long.flac", np.tile(babble(10, 16_000), 60), 16_000)
    sizes = [len(piece) for piece in stream_wave(SoundLocator.from_path(path), 32_000)]
    assert sum(sizes) == 600 * 32_000
    assert max(sizes) < 70 * 32_000


@pytest.mark.parametrize(
    ("reason", "wave_S", "policy"),
    [
        ("silent", np.zeros(16_000), {}),
        ("silent", np.full(16_000, -0.25), {}),
        ("too_short", np.ones(100) * 0.1, {}),
        ("non_finite", np.full(16_000, np.nan), {}),
        ("too_long", babble(2.0, 16_000), {"max_seconds": 1.0}),
    ],
)
def test_an_unusable_sound_is_refused_for_the_same_reason(tmp_path, reason, wave_S, policy):
    """Both ways check a sound with the same function."""
    path = write(tmp_path / "a.wav", wave_S, 16_000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"a\.wav: ") as at_once:
        load_clip_audio(
            SoundLocator.from_path(path), start_seconds=0, end_seconds=100, policy=AudioPolicy(**policy)
        )
    with pytest.raises(AudioError, match=r"a\.wav: ") as in_pieces:
        stream(path, **policy)
    assert in_pieces.value.reason == at_once.value.reason == reason
    assert str(in_pieces.value) == str(at_once.value)


def test_a_sound_that_ends_early_is_refused_at_its_end(tmp_path):
    """Only at the end is it known that the header declared more samples."""
    path = write(tmp_path / "a.wav", babble(4.0, 16_000), 16_000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    pieces = stream_wave(SoundLocator.from_path(path), 32_000)
    assert len(next(pieces))
    with pytest.raises(AudioError, match=r"can be decoded; .* with --accept-truncated$") as error:
        list(pieces)
    assert error.value.reason == "truncated"
    assert len(stream(path, accept_truncated=True)) == pytest.approx(64_000, rel=0.01)
