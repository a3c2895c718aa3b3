"""A file is recognised by its first bytes, and its header says how long it is."""

import os
import struct

import av
import numpy as np
import pytest
import soundfile
from sounds import ENCODERS, SUBTYPES, babble, write

from pipeline.audio.containers import CONTAINER_KINDS, AudioContainer, recognise_container
from pipeline.audio.decode import load_clip_audio
from pipeline.audio.sources import SOUND_EXTENSIONS, SoundLocator
from pipeline.errors import AudioError

KIND_OF = {
    ".wav": "wav",
    ".flac": "flac",
    ".mp3": "mp3",
    ".bare.mp3": "mp3",
    ".ogg": "ogg",
    ".opus": "ogg",
    ".m4a": "mp4",
    ".fast.m4a": "mp4",
    ".mp4": "mp4",
    ".alac.m4a": "mp4",
    ".mka": "matroska",
    ".webm": "matroska",
    ".live.webm": "matroska",
    ".aac": "aac",
    ".ts": "mpegts",
    ".wv": "wavpack",
    ".tta": "tta",
    ".aiff": "aiff",
    ".au": "au",
    ".caf": "caf",
    ".w64": "w64",
}


def wav_bytes(*, data_bytes, actual_bytes, tag=1, order="<", chunks=b""):
    """A mono 16-bit wav at 8 kHz whose header declares `data_bytes`."""
    fmt = struct.pack(f"{order}4sIHHIIHH", b"fmt ", 16, tag, 1, 8_000, 16_000, 2, 16)
    data = struct.pack(f"{order}4sI", b"data", data_bytes) + bytes(actual_bytes)
    name = b"RIFF" if order == "<" else b"RIFX"
    return struct.pack(f"{order}4sI4s", name, 36 + data_bytes & 0xFFFF_FFFF, b"WAVE") + chunks + fmt + data


@pytest.mark.parametrize("suffix", [*ENCODERS, *SUBTYPES, ".wav"])
def test_the_first_bytes_tell_the_container_whatever_the_name(tmp_path, suffix):
    """AudioSet copies are full of flac named wav and mp3 named wav."""
    path = write(tmp_path / f"sound{suffix}", babble(0.3, 48_000), 48_000)
    kind = CONTAINER_KINDS[KIND_OF[suffix]]
    assert recognise_container(path).demuxer == kind.demuxer
    assert not recognise_container(path).is_misnamed(path)
    renamed = path.rename(tmp_path / "sound.xyz")
    assert recognise_container(renamed).demuxer == kind.demuxer
    assert not recognise_container(renamed).is_misnamed(renamed)
    assert recognise_container(renamed).is_misnamed(renamed.with_suffix(".amr"))


def test_every_suffix_of_a_container_is_looked_for():
    """A list of its own would forget some: their clips would be missing without a word."""
    suffixes = sorted(suffix for kind in CONTAINER_KINDS.values() for suffix in kind.suffixes)
    assert suffixes == sorted(f".{extension}" for extension in SOUND_EXTENSIONS)


@pytest.mark.parametrize(
    ("form", "subtype", "endian"),
    [
        ("NIST", "PCM_16", "LITTLE"),
        ("NIST", "PCM_16", "BIG"),
        ("NIST", "ULAW", "FILE"),
        ("VOC", "PCM_16", "FILE"),
        ("IRCAM", "PCM_16", "LITTLE"),
        ("IRCAM", "PCM_16", "BIG"),
        ("IRCAM", "FLOAT", "BIG"),
    ],
)
def test_formats_of_old_speech_corpora_are_read(tmp_path, form, subtype, endian):
    """TIMIT and others come in SPHERE. Half a file is truncated, or shorter where its header states no length."""
    wave_S = babble(2.0, 16_000)
    path = tmp_path / "sound.xyz"
    soundfile.write(path, wave_S, 16_000, format=form, subtype=subtype, endian=endian)
    locator = SoundLocator.from_path(path)
    audio = load_clip_audio(locator, start_seconds=0, end_seconds=2)
    assert (audio.rate_hz, audio.flags) == (16_000, ())
    np.testing.assert_allclose(audio.wave_S, wave_S, atol=0.01 if subtype == "ULAW" else 1e-4)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if form == "NIST":
        with pytest.raises(AudioError, match="of the declared") as raised:
            load_clip_audio(locator, start_seconds=0, end_seconds=2)
        assert raised.value.reason == "truncated"
    else:
        assert load_clip_audio(locator, start_seconds=0, end_seconds=2).flags == ("shorter",)


@pytest.mark.parametrize("name", CONTAINER_KINDS)
def test_ffmpeg_knows_every_demuxer_by_its_name(name):
    """Without its demuxer in the wheel, every file of a kind would be unreadable."""
    assert av.ContainerFormat(CONTAINER_KINDS[name].demuxer, "r").is_input


@pytest.mark.parametrize("suffix", [".mp3", ".flac", ".aac"])
def test_an_id3_tag_is_skipped(tmp_path, suffix):
    """A cover picture of 100 kB precedes the sound."""
    path = write(tmp_path / f"sound{suffix}", babble(0.3, 48_000), 48_000)
    tag = b"ID3\x04\x00\x00" + bytes([0, 6, 13, 32]) + bytes(100_000)
    path.write_bytes(tag + path.read_bytes())
    assert recognise_container(path).demuxer == CONTAINER_KINDS[KIND_OF[suffix]].demuxer


def test_zeros_before_an_mp3_are_skipped(tmp_path):
    """Some recorders pad the beginning."""
    path = write(tmp_path / "sound.mp3", babble(0.3, 48_000), 48_000)
    path.write_bytes(bytes(100) + path.read_bytes())
    assert recognise_container(path).demuxer == "mp3"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"data_bytes": 8_000, "actual_bytes": 2_000}, 4_000),
        ({"data_bytes": 2_000, "actual_bytes": 2_000}, 1_000),
        ({"data_bytes": 0xFFFF_FFFF, "actual_bytes": 2_000}, None),
        ({"data_bytes": 0x7FFF_F000, "actual_bytes": 2_000}, None),
        ({"data_bytes": 0, "actual_bytes": 0}, 0),
        ({"data_bytes": 8_000, "actual_bytes": 2_000, "order": ">"}, 4_000),
        ({"data_bytes": 8_000, "actual_bytes": 2_000, "chunks": b"LIST\x03\0\0\0abc\0"}, 4_000),
    ],
)
def test_a_wav_declares_its_frames_or_says_that_it_does_not_know(tmp_path, header, expected):
    """libsndfile cuts the declared length to the samples that are present, so a loss would not be noticed."""
    path = tmp_path / "sound.wav"
    path.write_bytes(wav_bytes(**header))
    assert recognise_container(path).declared_frames == expected
    assert recognise_container(path).uses_libsndfile


def test_an_rf64_declares_its_frames_in_64_bits(tmp_path):
    """Long recordings do not fit the 32 bits of a wav."""
    sizes = struct.pack("<4sIQQQI", b"ds64", 28, 0, 8_000, 4_000, 0)
    path = tmp_path / "sound.wav"
    path.write_bytes(b"RF64" + wav_bytes(data_bytes=0xFFFF_FFFF, actual_bytes=8_000, chunks=sizes)[4:])
    assert recognise_container(path).declared_frames == 4_000


@pytest.mark.parametrize(
    "header",
    [{"data_bytes": 0, "actual_bytes": 2_000}, {"data_bytes": 2_000, "actual_bytes": 2_000, "tag": 0x55}],
)
def test_a_wav_that_libsndfile_would_misread_goes_to_ffmpeg(tmp_path, header):
    """Such files have a size that was never filled in, or contain mp3."""
    path = tmp_path / "sound.wav"
    path.write_bytes(wav_bytes(**header))
    assert not recognise_container(path).uses_libsndfile


def test_a_flac_of_unknown_length_goes_to_ffmpeg(tmp_path):
    """In a flac written to a pipe the number of samples stays 0; libsndfile then says 2^63 - 1. Frames have numbers."""
    path = write(tmp_path / "sound.flac", babble(0.3, 48_000), 48_000)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    container = recognise_container(path)
    assert (container.uses_libsndfile, container.length_kind) == (False, "found")
    assert container.declared_frames == 14_400


def test_only_a_lame_header_states_the_length_of_an_mp3(tmp_path):
    """Without such a header FFmpeg guesses from the bit rate, which means nothing if the rate varies."""
    stated = write(tmp_path / "sound.mp3", babble(0.3, 48_000), 48_000)
    unstated = write(tmp_path / "sound.bare.mp3", babble(0.3, 48_000), 48_000)
    assert recognise_container(stated).length_kind == "declared"
    assert recognise_container(unstated).length_kind == "guessed"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Not Found</html>", "is text (begins '<!DOCTYPE html>"),
        (b"#EXTM3U\n/etc/passwd\n", "is text"),
        (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "is text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "begins with the bytes 89 50 4e 47"),
        (bytes(5_000), "begins with the bytes 00 00"),
        ("\ufeffnot a sound".encode("utf-16"), "begins with the bytes ff fe"),
        (b"RIFF", "is text"),
    ],
)
def test_a_file_that_is_no_audio_is_described(tmp_path, content, message):
    """A web page saved as m4a is the commonest broken download; a playlist must never be followed."""
    path = tmp_path / "sound.m4a"
    path.write_bytes(content)
    with pytest.raises(AudioError) as error:
        recognise_container(path)
    assert error.value.reason == "unreadable"
    assert message in str(error.value)


def test_a_chunk_table_without_end_is_given_up(tmp_path):
    """A gigabyte of zeros after a wav header must not cost a hundred million reads."""
    path = tmp_path / "sound.wav"
    path.write_bytes(b"RIFF\0\0\0\0WAVE" + bytes(1_000_000))
    assert recognise_container(path) == CONTAINER_KINDS["wav"]


def test_an_error_for_an_absent_file_says_why_it_is_absent(tmp_path):
    """A missing file, a folder and a broken link need different fixes."""
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "link.wav").symlink_to("gone.wav")
    for name, message in {
        "none.wav": "no such file",
        "folder.wav": "a folder",
        "link.wav": "a link to 'gone.wav'",
    }.items():
        with pytest.raises(AudioError, match=message) as error:
            recognise_container(tmp_path / name)
        assert error.value.reason == "missing"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_read_permission_is_reported(tmp_path):
    """One wrong permission among two million files costs one row."""
    path = write(tmp_path / "sound.wav", np.zeros(100), 8_000)
    path.chmod(0)
    with pytest.raises(AudioError, match="Permission denied") as error:
        recognise_container(path)
    assert error.value.reason == "unreadable"


def test_a_name_without_a_known_extension_names_nothing(tmp_path):
    """`<id>_30.000_40.000` has no extension, although it contains dots."""
    wav = AudioContainer(suffixes=(".wav",), demuxer="wav")
    assert not wav.is_misnamed(tmp_path / "abcdefghijk_30.000_40.000")
    assert not wav.is_misnamed(tmp_path / "abcdefghijk")
    assert not wav.is_misnamed(tmp_path / "abcdefghijk.WAV")
    assert wav.is_misnamed(tmp_path / "abcdefghijk.FLAC")


@pytest.mark.parametrize(("size", "frames"), [(24 + 2 * 7, 7), (0, None), (2**63 - 1, None)])
def test_a_w64_declares_its_frames_or_says_that_it_does_not_know(tmp_path, size, frames):
    """FFmpeg's own duration covers the present sound only; a size that was never filled in declares nothing."""
    path = write(tmp_path / "sound.w64", babble(0.1, 8_000), 8_000)
    assert recognise_container(path).declared_frames == 800
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, content.index(b"data\xf3\xac\xd3\x11") + 16, size)
    path.write_bytes(content)
    assert recognise_container(path).declared_frames == frames


@pytest.mark.parametrize(("size", "frames"), [(4 + 2 * 7, 7), (-1, None), (0, None)])
def test_a_caf_declares_its_frames_or_says_that_it_does_not_know(tmp_path, size, frames):
    """A size of -1 means: to the end of the file."""
    path = write(tmp_path / "sound.caf", babble(0.1, 8_000), 8_000)
    assert recognise_container(path).declared_frames == 800
    content = bytearray(path.read_bytes())
    struct.pack_into(">q", content, content.index(b"data") + 4, size)
    path.write_bytes(content)
    assert recognise_container(path).declared_frames == frames


@pytest.mark.parametrize("suffix", [".w64", ".caf"])
def test_a_chunk_larger_than_any_file_is_the_last(tmp_path, suffix):
    """A seek beyond 2^63 bytes fails, and damage may request such a seek."""
    path = write(tmp_path / f"sound{suffix}", babble(0.1, 8_000), 8_000)
    content = bytearray(path.read_bytes())
    place = content.index(b"fmt " if suffix == ".w64" else b"desc")
    size = struct.pack("<Q", 2**64 - 9) if suffix == ".w64" else struct.pack(">q", 2**63 - 1)
    start = place + (16 if suffix == ".w64" else 4)
    content[start : start + 8] = size
    path.write_bytes(content)
    assert recognise_container(path).declared_frames is None


def test_a_stream_of_a_camera_has_a_time_before_each_packet(tmp_path):
    """.m2ts: packets of 192 bytes."""
    path = write(tmp_path / "sound.ts", babble(1.0, 48_000), 48_000)
    content = path.read_bytes()
    expected = load_clip_audio(SoundLocator.from_path(path), start_seconds=0, end_seconds=1)
    packets = [content[first : first + 188] for first in range(0, len(content), 188)]
    camera = tmp_path / "sound.m2ts"
    camera.write_bytes(b"".join(bytes(4) + packet for packet in packets))
    audio = load_clip_audio(SoundLocator.from_path(camera), start_seconds=0, end_seconds=1)
    assert (audio.digest, audio.flags) == (expected.digest, expected.flags)
