"""A file becomes one clip, or one reason why it cannot be used."""

import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
import torch
from sounds import babble, write

from pipeline.audio.decode import AudioPolicy, load_clip_audio
from pipeline.audio.mel import log_mel
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.audio.sources import SoundLocator
from pipeline.errors import AudioError

SPEC = preset_mel_spec("a-jepa")

CORPUS = Path(__file__).parents[4] / "shared" / "corpus"

LOSSLESS = (".wav", ".flac", ".alac.m4a", ".aiff")

LOSSY = (".mp3", ".ogg", ".opus", ".webm", ".m4a", ".mka")


def load(path, *, start_seconds=30.0, end_seconds=40.0, rate_hz=32_000, **policy):
    clip = load_clip_audio(
        SoundLocator.from_path(path),
        start_seconds=start_seconds,
        end_seconds=end_seconds,
        policy=AudioPolicy(**policy),
    )
    return replace(clip, wave_S=clip.resample_wave(rate_hz))


def refusal(path, **policy):
    """Reason and sentence of a file that cannot be used."""
    with pytest.raises(AudioError) as error:
        load(path, **policy)
    return error.value.reason, str(error.value)


def tone(hz, rate_hz, *, level=0.5, seconds=10.0):
    return level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)


def level_db(wave_S, reference=0.5):
    """RMS of the middle against that of a sine of amplitude `reference`."""
    middle_S = wave_S[len(wave_S) // 4 : -len(wave_S) // 4].astype(np.float64)
    return 20 * np.log10(np.sqrt(2 * np.mean(middle_S**2)) / reference)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000, 7_919])
@pytest.mark.parametrize("to_hz", [32_000, 16_000])
def test_a_full_segment_has_exactly_the_samples_of_the_spec(tmp_path, rate_hz, to_hz):
    """One missing sample would cost a frame."""
    clip = load(write(tmp_path / "sound.wav", tone(440, rate_hz), rate_hz), rate_hz=to_hz)
    assert clip.wave_S.shape == (10 * to_hz,)
    assert clip.wave_S.dtype == np.float32
    assert (clip.rate_hz, clip.source_seconds, clip.flags) == (rate_hz, 10.0, ())


@pytest.mark.parametrize(
    ("hz", "least_db", "most_db"), [(1_000, -0.01, 0.01), (14_000, -0.05, 0.05), (18_000, -250, -100)]
)
def test_a_tone_keeps_its_level_or_is_gone(tmp_path, hz, least_db, most_db):
    """From 48 to 32 kHz an 18 kHz tone must not come back at 14 kHz, as it does from a resampler without filter."""
    clip = load(write(tmp_path / "sound.wav", tone(hz, 48_000), 48_000, subtype="FLOAT"))
    assert least_db <= max(level_db(clip.wave_S), -250) <= most_db


def test_the_right_rate_is_not_resampled(tmp_path):
    """The wave stays the same bit for bit."""
    wave_S = babble(10, 32_000)
    clip = load(write(tmp_path / "sound.wav", wave_S, 32_000, subtype="FLOAT"))
    assert np.array_equal(clip.wave_S, wave_S)


def test_one_sound_has_one_spectrogram_in_every_container(tmp_path):
    """Lossless containers agree to the last of 16 bits, the others as closely as their codecs allow."""
    sound_S = babble(10, 48_000)
    mels = {}
    for suffix in (*LOSSLESS, *LOSSY):
        clip = load(write(tmp_path / f"sound{suffix}", sound_S, 48_000))
        mels[suffix] = log_mel(torch.from_numpy(clip.wave_S)[None], SPEC)[0]
        assert mels[suffix].shape == (998, 128)
    voiced = mels[".wav"] > SPEC.floor_log + 8
    for suffix in LOSSLESS:
        assert (mels[suffix] - mels[".wav"])[voiced].abs().mean() < 0.005
    for suffix in LOSSY:
        assert (mels[suffix] - mels[".wav"])[voiced].abs().mean() < 0.3


def test_a_clip_records_its_source(tmp_path):
    """The manifest keeps this, so that a strange result can be traced without the audio."""
    path = write(tmp_path / "sound.flac", np.stack([tone(440, 44_100)] * 2, axis=1), 44_100)
    clip = load(path)
    assert (clip.codec, clip.rate_hz, clip.channels, clip.source_seconds) == ("flac", 44_100, 2, 10.0)
    assert clip.peak_dbfs == pytest.approx(-6.02, abs=0.01)
    assert clip.rms_dbfs == pytest.approx(-9.03, abs=0.01)
    assert clip.flags == ("mixed_down",)


def test_the_digest_is_of_the_sound_not_of_the_file(tmp_path):
    """The same recording under another name, in another lossless container, is found to be the same."""
    sound_S = (20_000 * babble(10, 32_000)).astype(np.int16)
    for name in ("a.wav", "b.flac"):
        soundfile.write(tmp_path / name, sound_S, 32_000)
    soundfile.write(tmp_path / "c.wav", sound_S[::-1], 32_000)
    first, second, third = (load(tmp_path / name).digest for name in ("a.wav", "b.flac", "c.wav"))
    assert first == second != third
    assert len(first) == 32
    assert int(first, 16)


FLAGGED = {
    "shorter": (".wav", babble(2, 32_000)),
    "longer": (".wav", babble(30, 32_000)),
    "mixed_down": (".wav", np.stack([babble(10, 32_000)] * 3, axis=1)),
    "beyond_full_scale": (".float.wav", 8 * babble(10, 32_000)),
}


@pytest.mark.parametrize("flag", FLAGGED)
def test_an_odd_clip_is_used_and_flagged(tmp_path, flag):
    """The clip is used, and the report says how many clips were odd."""
    suffix, wave_SC = FLAGGED[flag]
    subtype = "FLOAT" if "float" in suffix else "PCM_16"
    assert load(write(tmp_path / f"sound{suffix}", wave_SC, 32_000, subtype=subtype)).flags == (flag,)


def test_a_shorter_clip_has_the_samples_it_has(tmp_path):
    """The loader pads clips, after normalisation."""
    clip = load(write(tmp_path / "sound.wav", babble(2.5, 44_100), 44_100))
    assert (len(clip.wave_S), clip.source_seconds) == (80_000, 2.5)


def test_a_video_is_cut_and_says_so(tmp_path):
    """A tone that sounds in the segment only fills it."""
    wave_S = np.concatenate([np.zeros(30 * 8_000), tone(440, 8_000), np.zeros(20 * 8_000)])
    clip = load(write(tmp_path / "video.wav", wave_S, 8_000))
    assert (clip.flags, clip.source_seconds, len(clip.wave_S)) == (("cut",), 60.0, 320_000)
    assert np.abs(clip.wave_S[:200]).max() > 0.4
    assert np.abs(clip.wave_S[-200:]).max() > 0.4


def test_samples_beyond_full_scale_are_not_clipped(tmp_path):
    """Clipping would add harmonics that nobody recorded."""
    path = write(tmp_path / "sound.wav", tone(440, 32_000, level=8.0), 32_000, subtype="FLOAT")
    assert np.abs(load(path).wave_S).max() == pytest.approx(8, rel=1e-3)


def test_a_wrong_extension_is_flagged_and_content_decides(tmp_path):
    """A flac named wav is a flac."""
    path = write(tmp_path / "sound.flac", babble(10, 32_000), 32_000).rename(tmp_path / "sound.wav")
    assert (load(path).codec, load(path).flags) == ("flac", ("wrong_extension",))


def cut_file(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".webm", ".fast.m4a", ".aiff"])
def test_a_truncated_file_is_refused_unless_it_is_accepted(tmp_path, suffix):
    """Decoders return the samples that are present without an error; only the declared length shows the loss."""
    path = cut_file(write(tmp_path / f"sound{suffix}", babble(10, 48_000), 48_000), 0.5)
    reason, text = refusal(path)
    assert reason == "truncated"
    assert "of the declared 10.0" in text
    clip = load(path, accept_truncated=True)
    assert clip.flags == ("shorter", "truncated")
    assert 3 < clip.source_seconds < 7
    assert len(clip.wave_S) == pytest.approx(clip.source_seconds * 32_000, abs=1)


def test_a_file_that_lacks_less_than_a_twentieth_is_whole(tmp_path):
    """Many tools drop the last packet."""
    nearly_whole = cut_file(write(tmp_path / "a.wav", babble(10, 48_000), 48_000), 0.96)
    assert load(nearly_whole).flags == ("shorter",)
    shorter = cut_file(write(tmp_path / "b.wav", babble(10, 48_000), 48_000), 0.94)
    assert refusal(shorter)[0] == "truncated"


def test_a_video_that_ends_before_its_segment_is_truncated_whatever_the_policy(tmp_path):
    """The file has no sample of the clip, so no option is named that would keep it."""
    path = cut_file(write(tmp_path / "video.wav", babble(60, 8_000), 8_000), 0.4)
    reason, text = refusal(path)
    assert reason == "truncated"
    assert text.endswith("0.00 s of the segment's 10.00 s can be decoded; fetch it again")
    assert refusal(path, accept_truncated=True) == (reason, text)
    assert load(path, start_seconds=5, end_seconds=15).flags == ("cut",)


NO_FILE = {
    "nothing": (lambda path: path, "no such file"),
    "a folder": (lambda path: path.mkdir() or path, "a folder"),
    "a dangling link": (lambda path: path.symlink_to("gone") or path, "a link to 'gone'"),
}


@pytest.mark.parametrize("case", NO_FILE)
def test_a_path_that_leads_to_no_file_says_why_in_one_line(tmp_path, case):
    """What may be wrong with the content of a file is in test_broken.py."""
    make, message = NO_FILE[case]
    reason, text = refusal(make(tmp_path / "sound.wav"))
    assert reason == "missing"
    assert text.startswith("sound.wav: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("suffix", [".m4a", ".webm", ".mp3", ".ogg", ".flac", ".wav", ".aac"])
def test_the_first_hundred_bytes_alone_are_unreadable(tmp_path, suffix):
    """The download was interrupted; an m4a then also lacks the index at its end."""
    path = write(tmp_path / f"sound{suffix}", babble(1, 48_000), 48_000)
    path.write_bytes(path.read_bytes()[:100])
    reason, text = refusal(path, accept_truncated=True)
    assert reason in {"unreadable", "too_short"}
    assert str(tmp_path) not in text


def test_silence_can_be_kept(tmp_path):
    """A silent clip is a constant, and normalisation per clip gives finite values."""
    clip = load(write(tmp_path / "sound.wav", np.zeros(80_000), 8_000), keep_silent=True)
    assert (clip.flags, clip.peak_dbfs, clip.rms_dbfs) == (("silent",), -200.0, -200.0)
    assert not clip.wave_S.any()


def test_a_constant_is_silence_and_a_sound_beside_it_is_none(tmp_path):
    """A recorder whose microphone is not plugged in writes its offset."""
    constant_S = np.full(80_000, 0.3)
    reason, sentence = refusal(write(tmp_path / "a.wav", constant_S, 8_000, subtype="FLOAT"))
    assert (reason, sentence) == (
        "silent",
        "a.wav: nothing but a constant of 0.3; fetch it again, or keep silent clips",
    )
    sound_S = constant_S + tone(440, 8_000, level=1e-3)[:80_000]
    assert load(write(tmp_path / "b.wav", sound_S, 8_000, subtype="FLOAT")).flags == ()


def test_a_whisper_of_minus_80_db_is_not_silence(tmp_path):
    """The border is -90 dBFS."""
    assert load(write(tmp_path / "a.wav", tone(440, 8_000, level=1e-4), 8_000, subtype="FLOAT")).flags == ()
    quiet = write(tmp_path / "b.wav", tone(440, 8_000, level=3e-5), 8_000, subtype="FLOAT")
    assert refusal(quiet)[0] == "silent"


def test_channels_that_cancel_are_silent_and_the_sentence_says_mean(tmp_path):
    """One microphone wired the wrong way round."""
    wave_S = babble(10, 32_000)
    path = write(tmp_path / "sound.wav", np.stack([wave_S, -wave_S], axis=1), 32_000, subtype="FLOAT")
    assert refusal(path) == (
        "silent",
        "sound.wav: peak -200 dBFS (the mean of 2 channels), under -90; fetch it again, or keep silent clips",
    )


@pytest.mark.parametrize(
    "name", [b"a\xffb.wav", b"a\nb.wav", b"-c.wav", b"pipe:0.mp3", b"http:x.mp3", "音.ogg".encode()]
)
def test_any_name_a_file_system_allows_is_read(tmp_path, name):
    """Names may contain bytes that are not text, line breaks, and prefixes that FFmpeg takes for a protocol."""
    plain = write(tmp_path / f"plain{Path(os.fsdecode(name)).suffix}", babble(10, 32_000), 32_000)
    path = tmp_path / os.fsdecode(name)
    shutil.copy(plain, path)
    folder_before = Path.cwd()
    try:
        os.chdir(tmp_path)
        assert load(Path(path.name)).digest == load(plain).digest
    finally:
        os.chdir(folder_before)
    path.write_bytes(b"nothing")
    text = refusal(path)[1]
    assert text.isascii()
    assert "\n" not in text


def test_a_wav_in_a_stream_without_sizes_is_read_to_its_end(tmp_path):
    """ffmpeg and sox write such headers to a pipe."""
    path = write(tmp_path / "sound.wav", babble(10, 32_000), 32_000)
    plain = load(path).digest
    content = bytearray(path.read_bytes())
    for size in (0xFFFF_FFFF, 0x7FFF_F000, 0):
        struct.pack_into("<I", content, content.index(b"data") + 4, size)
        path.write_bytes(content)
        assert (load(path).digest, load(path).flags) == (plain, ())


@pytest.mark.skipif(not CORPUS.exists(), reason="the corpus of real clips is not beside the project")
def test_every_real_clip_is_read_as_it_was_made():
    """Eighty recordings in eight containers have the rate, channels and length they were made with, and no odd flag."""
    truth = pl.read_csv(CORPUS / "truth.csv").filter(pl.col("kind") == "clip")
    for row in truth.iter_rows(named=True):
        clip = load(CORPUS / row["file"])
        rate_hz = 48_000 if clip.codec == "opus" else int(row["rate"])  # opus has one rate
        assert (clip.rate_hz, clip.channels) == (rate_hz, int(row["channels"])), row["file"]
        assert clip.source_seconds == pytest.approx(10, abs=0.12)
        assert len(clip.wave_S) == 320_000
        assert set(clip.flags) <= {"mixed_down", "beyond_full_scale"}
