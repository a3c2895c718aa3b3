"""Every kind of broken input, and the reason that the manifest gives for it."""

import struct

import numpy as np
import pytest
from archives import write_parquet, write_tar
from sounds import ENCODERS, SUBTYPES, babble, write

from pipeline.audio import sources
from pipeline.audio.decode import load_clip_audio
from pipeline.audio.sources import SOURCES_SCHEMA, ClipSources, SoundLocator
from pipeline.errors import AudioError, InputError, UnexpectedAudioError
from pipeline.store.manifest import FAILURE_REASONS

RATE_HZ = 48_000

SECONDS = 3.0

GIVEN_ELSEWHERE = {"timed_out", "crashed", "duplicate"}  # by the pool of workers and by the plan

BYTES, SHARES = (40, 200), (0.3, 0.6, 0.9, 0.99)

UNREADABLE, TRUNCATED, SHORTER, WHOLE = "unreadable", "truncated", "shorter", "whole"

INDEX_LAST = (UNREADABLE,) * 6  # an mp4's index stands at its end, and nothing decodes without it

DECLARED = (UNREADABLE, UNREADABLE, TRUNCATED, TRUNCATED, TRUNCATED, WHOLE)  # its length, before the sound

RAW = (UNREADABLE, TRUNCATED, TRUNCATED, TRUNCATED, TRUNCATED, WHOLE)  # the first samples are there early

STREAM = (UNREADABLE, UNREADABLE, SHORTER, SHORTER, SHORTER, WHOLE)  # nothing tells that there was more

# The outcome of three seconds cut to 40 and 200 bytes, then to shares of the file.
CUTS = {
    ".wav": RAW,
    ".aiff": RAW,
    ".w64": RAW,
    ".au": (TRUNCATED, *RAW[1:]),
    ".caf": DECLARED,
    ".flac": (*DECLARED[:5], SHORTER),  # FFmpeg decodes up to the damaged frame of 4,096 samples
    ".wv": (UNREADABLE, UNREADABLE, UNREADABLE, TRUNCATED, TRUNCATED, TRUNCATED),  # blocks of a second
    ".tta": (UNREADABLE, UNREADABLE, UNREADABLE, TRUNCATED, TRUNCATED, TRUNCATED),  # as well
    ".m4a": INDEX_LAST,
    ".alac.m4a": INDEX_LAST,
    ".fast.m4a": DECLARED,
    ".mp4": DECLARED,
    ".mka": DECLARED,
    ".webm": DECLARED,
    ".mp3": DECLARED,
    ".bare.mp3": STREAM,
    ".live.webm": STREAM,
    ".aac": STREAM,
    ".ts": STREAM,
    ".opus": STREAM,
    ".ogg": (UNREADABLE, UNREADABLE, UNREADABLE, UNREADABLE, SHORTER, SHORTER),  # pages of more than a second
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three seconds in every container, as bytes."""
    folder = tmp_path_factory.mktemp("whole")
    wave_S = babble(SECONDS, RATE_HZ)
    return {suffix: write(folder / f"sound{suffix}", wave_S, RATE_HZ).read_bytes() for suffix in CUTS}


def decode(locator):
    return load_clip_audio(locator, start_seconds=30, end_seconds=30 + SECONDS)


def decode_outcome(locator):
    """The reason of the failure, or whether the clip is whole or shorter."""
    try:
        clip = decode(locator)
    except AudioError as error:
        return error.reason
    assert np.isfinite(clip.wave_S).all()
    return SHORTER if "shorter" in clip.flags else WHOLE


@pytest.mark.parametrize("suffix", CUTS)
def test_a_file_cut_short_has_the_reason_that_its_container_allows(whole, tmp_path, suffix):
    """A length that is declared is held against what decodes; where none is, the flag `shorter` is all there is."""
    content = whole[suffix]
    path = tmp_path / f"sound{suffix}"
    outcomes = []
    for size in (*BYTES, *(int(share * len(content)) for share in SHARES)):
        path.write_bytes(content[:size])
        outcomes.append(decode_outcome(SoundLocator.from_path(path)))
    assert tuple(outcomes) == CUTS[suffix]
    path.write_bytes(content)
    assert decode_outcome(SoundLocator.from_path(path)) == WHOLE


def test_every_container_that_the_tests_write_is_cut():
    """A new one must not be forgotten here."""
    assert set(CUTS) == {*ENCODERS, *SUBTYPES, ".wav"}


def float_wav(path, value):
    wave_S = babble(SECONDS, RATE_HZ)
    wave_S[1_000:1_005] = value
    return write(path, wave_S, RATE_HZ, subtype="FLOAT").read_bytes()


def pcm_wav(path, samples):
    return write(path, babble(SECONDS, RATE_HZ)[:samples], RATE_HZ).read_bytes()


def cut_wav(path):
    return pcm_wav(path, -1)[:50_000]


def day_long_wav(path):
    """A header that declares 24 hours."""
    content = bytearray(pcm_wav(path, -1))
    struct.pack_into("<I", content, content.index(b"data") + 4, 2 * 8_000 * 86_400)
    struct.pack_into("<I", content, 24, 8_000)
    return bytes(content)


# What is wrong with a sound: its reason, its bytes, and words of the sentence beside the reason.
BROKEN = {
    "nothing": ("unreadable", lambda path: b"", "is empty"),
    "a web page": ("unreadable", lambda path: b"<!DOCTYPE html>", "<!DOCTYPE html>"),
    "zeros": ("unreadable", lambda path: bytes(100_000), "begins with the bytes 00 00"),
    "noise": ("unreadable", lambda path: np.random.default_rng(0).bytes(100_000), "no known audio"),
    "a header alone": ("unreadable", lambda path: pcm_wav(path, 0), "not one sample"),
    "a rate of nought": (
        "unreadable",
        lambda path: pcm_wav(path, -1)[:24] + bytes(4) + pcm_wav(path, -1)[28:],
        "no wav file that can be decoded",
    ),
    "no channels": (
        "unreadable",
        lambda path: pcm_wav(path, -1)[:22] + bytes(2) + pcm_wav(path, -1)[24:],
        "Channel count is zero",
    ),
    "a third": ("truncated", cut_wav, "of the declared 3.00 s"),
    "ten samples": ("too_short", lambda path: pcm_wav(path, 10), "0.0002 s"),
    "silence": (
        "silent",
        lambda path: write(path, np.zeros(RATE_HZ), RATE_HZ).read_bytes(),
        "peak -200 dBFS",
    ),
    "NaN": (
        "non_finite",
        lambda path: float_wav(path, np.nan),
        "5 of 144000 samples are NaN or infinite, the first at 1000",
    ),
    "infinity": ("non_finite", lambda path: float_wav(path, -np.inf), "5 of 144000 samples"),
    "absurdly loud": (
        "non_finite",
        lambda path: float_wav(path, 1e30),
        "samples up to 1e+30 times full scale",
    ),
    "a day": ("too_long", day_long_wav, "86400 s long"),
}


@pytest.mark.parametrize("layout", ["file", "tar", "parquet"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_sounds_have_the_same_reason_in_every_layout(tmp_path, layout, case):
    """The words of the manifest, by what is wrong and not by where it lies; the sentence helps who fetches it again."""
    reason, make, message = BROKEN[case]
    content = make(tmp_path / "made.wav")
    folder = tmp_path / "clips"
    folder.mkdir()
    if layout == "file":
        (folder / "sound.wav").write_bytes(content)
    else:
        {"tar": write_tar, "parquet": write_parquet}[layout](folder / f"x.{layout}", {"sound.wav": content})
    sounds = sources.find_sounds([folder]).sounds
    (locator,) = ClipSources(frame=sounds.select(*SOURCES_SCHEMA)).locators_of_rows(range(1))
    with pytest.raises(AudioError) as error:
        decode(locator)
    assert (locator.kind, error.value.reason) == (layout, reason)
    assert str(error.value).startswith("sound.wav: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_reason_that_decoding_can_give_is_given_here(tmp_path):
    """`missing` is a file that is gone since the folder was searched."""
    assert decode_outcome(SoundLocator.from_path(tmp_path / "gone.wav")) == "missing"
    reasons = {reason for reason, _, _ in BROKEN.values()}
    assert {*reasons, "missing"} | GIVEN_ELSEWHERE == set(FAILURE_REASONS)


def wav_bytes(samples, bits, *, form=b"RIFF"):
    """A mono wav at 16 kHz, with the sizes in a chunk of their own where 32 bits are not enough for them."""
    data = samples.tobytes()
    long_sizes = b""
    if form != b"RIFF":
        long_sizes = b"ds64" + struct.pack("<IQQQI", 28, len(data) + 72, len(data), len(samples), 0)
    size = len(data) + 36 if form == b"RIFF" else 2**32 - 1
    data_size = len(data) if form == b"RIFF" else 2**32 - 1
    spec = struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 16_000 * bits // 8, bits // 8, bits)
    head = form + struct.pack("<I", size) + b"WAVE" + long_sizes + b"fmt " + spec
    return head + b"data" + struct.pack("<I", data_size) + data


@pytest.mark.parametrize(
    ("kind", "bits", "form"), [("<i8", 64, b"RIFF"), ("<i2", 16, b"BW64"), ("<i2", 16, b"RF64")], ids=str
)
def test_what_libsndfile_cannot_read_is_read_by_ffmpeg(tmp_path, kind, bits, form):
    """64-bit integers, and BW64, which the EBU made of RF64."""
    wave_S = babble(1.0, 16_000)
    path = tmp_path / "x.wav"
    path.write_bytes(wav_bytes((wave_S * 2.0 ** (bits - 1)).astype(kind), bits, form=form))
    audio = load_clip_audio(SoundLocator.from_path(path), start_seconds=0, end_seconds=1)
    np.testing.assert_allclose(audio.wave_S, wave_S, atol=2.0**-14)


def test_no_reason_names_a_place_in_memory(tmp_path):
    """A reason is written to the manifest, which is the same for the same sounds, from a file and from an archive."""
    content = wav_bytes(np.zeros(16_000, "<i2"), 16)
    content = content[:22] + bytes(2) + content[24:]  # no channel
    (tmp_path / "x.wav").write_bytes(content)
    write_tar(tmp_path / "x.tar", {"x.wav": content})
    found = sources.find_sounds([tmp_path]).sounds.select(*SOURCES_SCHEMA)
    reasons = set()
    for locator in ClipSources(frame=found).locators_of_rows(range(2)):
        with pytest.raises(AudioError, match=r"^x\.wav: no wav file that can be decoded") as raised:
            load_clip_audio(locator, start_seconds=0, end_seconds=1)
        reasons.add(str(raised.value))
    assert len(reasons) == 1


def test_a_segment_shorter_than_a_sample_is_too_short(tmp_path):
    """Rounding in a list makes such segments."""
    for suffix in (".wav", ".mp3"):
        path = write(tmp_path / f"x{suffix}", babble(3.0, 48_000), 48_000)
        locator = SoundLocator(path=str(path), source=path.name, exact=True)
        with pytest.raises(AudioError, match="has no sample; correct its list") as raised:
            load_clip_audio(locator, start_seconds=1.0, end_seconds=1.000001)
        assert raised.value.reason == "too_short"


@pytest.mark.parametrize(
    "error", [TypeError("odd"), ValueError("odd"), MemoryError(), RecursionError("odd")], ids=repr
)
def test_whatever_a_decoder_raises_costs_its_clip(tmp_path, monkeypatch, error):
    """Libraries raise what their authors did not foresee, too; the sound's name and the exception's are told."""

    def fail(*_):
        raise error

    monkeypatch.setattr("pipeline.audio.decode.read_segment", fail)
    path = write(tmp_path / "x.wav", babble(1.0, 16_000), 16_000)
    with pytest.raises(UnexpectedAudioError, match=rf"^x\.wav: .*{type(error).__name__}") as raised:
        load_clip_audio(SoundLocator.from_path(path), start_seconds=0, end_seconds=1)
    assert (raised.value.reason, raised.value.fault) == ("unreadable", type(error).__name__)


def test_a_server_that_fails_costs_no_clip(tmp_path, monkeypatch):
    """The clip may be whole: the run ends, and carries on later."""

    def fail(*_):
        raise InputError("s3://there: does not answer")

    monkeypatch.setattr("pipeline.audio.decode.read_segment", fail)
    path = write(tmp_path / "x.wav", babble(1.0, 16_000), 16_000)
    with pytest.raises(InputError, match=r"^s3://there: does not answer$"):
        load_clip_audio(SoundLocator.from_path(path), start_seconds=0, end_seconds=1)
