"""What is decoded are the seconds that the movie's clock names, whatever is wrong with the file."""

import re
import struct

import numpy as np
import pytest
import soundfile
from spoken_seconds import SILENT, decode, heard, heard_seconds, tone_seconds, write_stream

from pipeline.audio.decode import AudioPolicy, stream_wave
from pipeline.audio.sources import SoundLocator
from pipeline.errors import AudioError

SECONDS = 9

WHOLE = list(range(SECONDS))

HOLE = [0, 1, 2, *[SILENT] * 3, 6, 7, 8]

# Containers with a clock: codec, FFmpeg's name, sampling rate.
CLOCKS = {
    ".m4a": ("aac", "ipod", 22_050),
    ".mov": ("aac", "mov", 22_050),
    ".webm": ("libopus", "webm", 48_000),
    ".mka": ("aac", "matroska", 22_050),
    ".flv": ("libmp3lame", "flv", 22_050),
    ".ts": ("aac", "mpegts", 22_050),
    ".mpg": ("mp2", "mpeg", 22_050),
    ".wma": ("wmav2", "asf", 22_050),
    ".avi": ("libmp3lame", "avi", 22_050),
    ".opus": ("libopus", "ogg", 48_000),
}

NO_LATE_START = {
    ".ts",
    ".mpg",
}  # their clocks begin anywhere, so only another stream tells that sound is late

WITH_FILM = (".m4a", ".mka", ".ts", ".mpg", ".wma", ".avi")


def write_defect(folder, suffix, **defects):
    codec, kind, rate_hz = CLOCKS[suffix]
    return write_stream(
        folder / f"x{suffix}", tone_seconds(SECONDS, rate_hz), rate_hz, codec, kind, **defects
    )


@pytest.mark.parametrize("suffix", CLOCKS)
def test_a_hole_in_the_time_stamps_is_silence(tmp_path, suffix):
    """Lost packets and pauses of a recorder must not move what follows."""
    path = write_defect(tmp_path, suffix, holes=[(3, 6)])
    clip = decode(path)
    assert heard_seconds(clip.wave_S, clip.rate_hz) == HOLE
    assert set(clip.flags) <= {"gaps", "shorter"}
    assert "gaps" in clip.flags
    cut = decode(path, 5, 9, exact=True)
    assert heard_seconds(cut.wave_S, cut.rate_hz) == HOLE[5:9]
    assert "gaps" in cut.flags
    assert "gaps" not in decode(path, 6.5, 8.5, exact=True).flags


@pytest.mark.parametrize("suffix", [s for s in CLOCKS if s not in NO_LATE_START])
def test_sound_that_begins_late_begins_late(tmp_path, suffix):
    """Two seconds of silence stand before it, in a whole decode and in a segment."""
    path = write_defect(tmp_path, suffix, late_seconds=2.0)
    assert heard(path) == [SILENT, SILENT, *WHOLE]
    assert heard(path, 6, 10) == [4, 5, 6, 7]
    assert decode(path, 6, 10).source_seconds == pytest.approx(11, abs=0.15)


@pytest.mark.parametrize("suffix", WITH_FILM)
def test_sound_is_late_beside_its_film(tmp_path, suffix):
    """The film begins at 0, the sound two seconds later."""
    path = write_defect(tmp_path, suffix, late_seconds=2.0, video_seconds=11)
    assert heard(path) == [SILENT, SILENT, *WHOLE]
    assert heard(path, 6, 10, exact=True) == [4, 5, 6, 7]


@pytest.mark.parametrize("suffix", [".m4a", ".webm", ".flv", ".ts", ".opus"])
def test_a_clock_that_began_long_before_the_recording_is_no_late_start(tmp_path, suffix):
    """A recording of a live stream has the stream's own clock."""
    path = write_defect(tmp_path, suffix, late_seconds=5_000.0)
    assert heard(path) == WHOLE
    assert heard(path, 5, 9) == [5, 6, 7, 8]
    assert decode(path).flags == ("shorter",)


@pytest.mark.parametrize(
    ("by_seconds", "expected"), [(4.0, [0, 1, 2, 3, *[SILENT] * 4, 4, 5, 6, 7, 8]), (1_000.0, WHOLE)]
)
def test_a_clock_that_jumps_far_in_a_broadcast_is_another_clock(tmp_path, by_seconds, expected):
    """Four seconds are a hole; a quarter of an hour is a splice."""
    assert heard(write_defect(tmp_path, ".ts", jumps=[(4, by_seconds)])) == expected


def test_pieces_of_a_sound_have_the_holes_too(tmp_path):
    """Embeddings decode in pieces."""
    path = write_defect(tmp_path, ".webm", holes=[(3, 6)])
    wave_S = np.concatenate(list(stream_wave(SoundLocator.from_path(path), 16_000)))
    assert heard_seconds(wave_S, 16_000) == HOLE


def test_a_hole_of_a_day_does_not_fill_the_memory(tmp_path):
    """A damaged stamp may name any time: a sound longer than allowed is refused."""
    path = write_defect(tmp_path, ".webm", jumps=[(4, 40_000.0)])
    assert heard(path, 0, 6, exact=True) == [0, 1, 2, 3, SILENT, SILENT]
    with pytest.raises(AudioError, match="s long, more than") as raised:
        list(stream_wave(SoundLocator.from_path(path), 16_000, policy=AudioPolicy(max_seconds=100)))
    assert raised.value.reason == "too_long"


def three_parts(folder, suffix, rates_hz, codec=None, kind=None, **options):
    """Three sounds of three seconds each, as bytes; the second one is stereo."""
    parts = []
    for number, rate_hz in enumerate(rates_hz):
        wave_SC = tone_seconds(3, rate_hz, first=3 * number, channels=1 + number % 2)
        path = folder / f"part{number}{suffix}"
        if codec:
            write_stream(path, wave_SC, rate_hz, codec, kind, options=options)
        else:
            with soundfile.SoundFile(path, "w", rate_hz, wave_SC.shape[1], **options) as file:
                for begin in range(0, len(wave_SC), 1024):
                    file.write(wave_SC[begin : begin + 1024])
        parts.append(path.read_bytes())
    return parts


SAME = (22_050, 22_050, 22_050)

OTHER = (22_050, 16_000, 48_000)

# Suffix, rates of the parts, and how they are written.
CHAINS = {
    "vorbis": (".ogg", SAME, {"format": "OGG", "subtype": "VORBIS"}),
    "vorbis of other rates": (".ogg", OTHER, {"format": "OGG", "subtype": "VORBIS"}),
    "opus": (".opus", (48_000,) * 3, {"codec": "libopus", "kind": "ogg"}),
    "ogg flac of other rates": (".oga", OTHER, {"codec": "flac", "kind": "ogg"}),
    "flac": (".flac", SAME, {"format": "FLAC"}),
    "flac of other rates": (".flac", OTHER, {"format": "FLAC"}),
    "mp3": (".mp3", SAME, {"codec": "libmp3lame", "kind": "mp3"}),
    "mp3 of other rates": (".mp3", OTHER, {"codec": "libmp3lame", "kind": "mp3"}),
    "mp3 without Xing": (".mp3", OTHER, {"codec": "libmp3lame", "kind": "mp3", "write_xing": "0"}),
    "ADTS": (".aac", SAME, {"codec": "aac", "kind": "adts"}),
    "MPEG-TS": (".ts", SAME, {"codec": "aac", "kind": "mpegts"}),
    "MPEG": (".mpg", SAME, {"codec": "mp2", "kind": "mpeg"}),
}


@pytest.mark.parametrize("case", CHAINS)
def test_streams_joined_end_to_end_are_heard_to_their_end(tmp_path, case):
    """Radio recorders chain Ogg, and `cat` joins everything; rates and channels may change on the way."""
    suffix, rates_hz, options = CHAINS[case]
    path = tmp_path / f"joined{suffix}"
    path.write_bytes(b"".join(three_parts(tmp_path, suffix, rates_hz, **options)))
    assert heard(path) == WHOLE
    assert heard(path, 3, 7, exact=True) == [3, 4, 5, 6]
    assert heard(path, 5, 9) == [5, 6, 7, 8]
    assert decode(path).source_seconds == pytest.approx(9, abs=0.2)


@pytest.fixture(scope="module")
def mp3(tmp_path_factory):
    path = tmp_path_factory.mktemp("mp3") / "x.mp3"
    return write_stream(path, tone_seconds(SECONDS, 22_050), 22_050, "libmp3lame", "mp3").read_bytes()


@pytest.mark.parametrize("frames", [0, 1, 50, 100_000])
def test_a_wrong_number_of_frames_in_an_mp3_is_not_believed(tmp_path, mp3, frames):
    """The frames are there, and none is cut."""
    content = bytearray(mp3)
    place = max(content.find(b"Xing", 0, 4096), content.find(b"Info", 0, 4096))
    struct.pack_into(">I", content, place + 8, frames)
    (path := tmp_path / "x.mp3").write_bytes(content)
    assert heard(path) == WHOLE
    assert heard(path, 5, 9) == [5, 6, 7, 8]


ID3 = b"ID3\x04\0\0\0\0\x08\0" + bytes(1024)

APE = b"APETAGEX" + struct.pack("<4I", 2_000, 40, 1, 0xA000_0000) + bytes(8 + 40)

# What stands before or behind the sound.
SURROUNDINGS = {
    "three ID3 tags": (ID3 * 3, b""),
    "an APE tag": (APE, b""),
    "both": (APE + ID3, b""),
    "junk": (np.random.default_rng(0).bytes(5_000), b""),
    "an HTTP header": (b"HTTP/1.1 200 OK\r\nContent-Type: audio\r\n\r\n", b""),
    "a tag at the end": (b"", b"TAG" + bytes(125)),
    "an APE tag at the end": (b"", APE + b"TAG" + bytes(125)),
    "zeros at the end": (b"", bytes(60_000)),
}


@pytest.fixture(scope="module")
def three_seconds(tmp_path_factory):
    """Three seconds in containers that begin with a frame or a signature, as bytes."""
    folder = tmp_path_factory.mktemp("three")
    wave_SC = tone_seconds(3, 22_050)
    write_stream(folder / "x.mp3", wave_SC, 22_050, "libmp3lame", "mp3")
    write_stream(folder / "x.aac", wave_SC, 22_050, "aac", "adts")
    soundfile.write(folder / "x.flac", wave_SC, 22_050)
    soundfile.write(folder / "x.ogg", wave_SC, 22_050)
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", [".mp3", ".aac", ".flac", ".ogg"])
@pytest.mark.parametrize("case", SURROUNDINGS)
def test_tags_and_junk_around_a_sound_are_no_sound(tmp_path, three_seconds, suffix, case):
    """Streams that were cut from a file or saved with what came over the wire."""
    before, behind = SURROUNDINGS[case]
    (path := tmp_path / f"x{suffix}").write_bytes(before + three_seconds[suffix] + behind)
    assert heard(path) == [0, 1, 2]
    assert heard(path, 1, 3, exact=True) == [1, 2]


@pytest.mark.parametrize("suffix", [".flac", ".ogg"])
def test_a_chain_behind_a_tag_is_heard_to_its_end(tmp_path, three_seconds, suffix):
    """Its streams are counted from the tag on."""
    (path := tmp_path / f"x{suffix}").write_bytes(ID3 + three_seconds[suffix] * 2)
    assert heard(path) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("suffix", [".mp3", ".aac"])
def test_a_stream_that_begins_inside_a_frame_is_decoded_from_the_next_one_on(tmp_path, mp3, suffix):
    """What is missing in front is missing; the rest is there."""
    content = mp3
    if suffix == ".aac":
        path = tmp_path / "y.aac"
        content = write_stream(path, tone_seconds(SECONDS, 22_050), 22_050, "aac", "adts").read_bytes()
    (path := tmp_path / f"x{suffix}").write_bytes(content[2 * len(content) // SECONDS + 77 :])
    assert heard(path)[1:6] == [3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def flac(tmp_path_factory):
    path = tmp_path_factory.mktemp("flac") / "x.flac"
    soundfile.write(path, tone_seconds(SECONDS, 22_050), 22_050)
    return path.read_bytes()


@pytest.mark.parametrize("samples", [0, 1, 100_000, SECONDS * 22_050 + 50_000, 2**36 - 1])
def test_a_wrong_number_of_samples_in_a_flac_is_not_believed(tmp_path, flac, samples):
    """The last frame is there, whole, and has a number."""
    word = int.from_bytes(flac[18:26]) >> 36 << 36 | samples
    (path := tmp_path / "x.flac").write_bytes(flac[:18] + word.to_bytes(8) + flac[26:])
    clip = decode(path)
    assert heard_seconds(clip.wave_S, clip.rate_hz) == WHOLE
    assert (clip.source_seconds, clip.flags) == (9.0, ("shorter",))
    assert heard(path, 5, 9) == [5, 6, 7, 8]


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("samples", [0, SECONDS * 22_050])
@pytest.mark.parametrize("sizes", [(16, 4_608), (4_608, 4_608), (16, 65_535)])
def test_a_wrong_size_of_frames_in_a_flac_is_not_believed(tmp_path, flac, sizes, samples, damaged):
    """The numbers of frames count frames of the first one's size, whatever the header says they have."""
    content = bytearray(flac)
    content[8:12] = sizes[0].to_bytes(2) + sizes[1].to_bytes(2)
    content[18:26] = (int.from_bytes(flac[18:26]) >> 36 << 36 | samples).to_bytes(8)
    if damaged:
        middle = len(content) // 2
        content[middle : middle + 50] = bytes(50)
    (path := tmp_path / "x.flac").write_bytes(content)
    clip = decode(path)
    assert heard_seconds(clip.wave_S, clip.rate_hz) == WHOLE
    assert len(clip.wave_S) == SECONDS * 22_050
    assert ("gaps" in clip.flags) == damaged


def test_a_flac_without_a_size_of_frames_is_read(tmp_path, flac):
    """FFmpeg refuses it, libsndfile does not."""
    (path := tmp_path / "x.flac").write_bytes(flac[:8] + bytes(4) + flac[12:])
    assert heard(path) == WHOLE


def test_sound_behind_damage_of_a_flac_is_decoded_in_its_place(tmp_path, flac):
    """libsndfile gives up there; FFmpeg goes on, and the frame that is lost is silent."""
    content = bytearray(flac)
    middle = len(content) // 2
    content[middle : middle + 2_000] = bytes(2_000)
    (path := tmp_path / "x.flac").write_bytes(content)
    assert heard(path) == WHOLE
    assert "gaps" in decode(path).flags


def damage_bytes(content: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """A file with damage behind its header: some bits, or a stretch of up to 8,000 bytes."""
    damaged = bytearray(content)
    begin = int(rng.integers(200, len(content)))
    count = int(rng.integers(1, 8_000))
    if kind == "flipped bits":
        for place in rng.integers(200, len(content), size=5).tolist():
            damaged[place] ^= 1 << int(rng.integers(8))
    elif kind == "zeros":
        damaged[begin : begin + count] = bytes(len(damaged[begin : begin + count]))
    elif kind == "lost bytes":
        del damaged[begin : begin + count]
    elif kind == "foreign bytes":
        damaged[begin:begin] = rng.bytes(count)
    return bytes(damaged)


# Containers of codecs whose frames have checksums: codec, FFmpeg's name and format; none: written by libsndfile.
CHECKED = {
    ".flac": None,
    ".oga": ("flac", "ogg", "s16"),
    ".wv": ("wavpack", "wv", "s16p"),
    ".tta": ("tta", "tta", "s16"),
}


@pytest.mark.parametrize("suffix", CHECKED)
@pytest.mark.parametrize("kind", ["flipped bits", "zeros", "lost bytes", "foreign bytes"])
def test_every_sample_of_a_damaged_sound_is_right_or_silent(tmp_path, kind, suffix):
    """A frame of flac is 0.2 s long, a page of an Ogg and a frame of TTA 1 s.

    FFmpeg alone would count on behind a lost frame, put the next page in the place of a lost one, and make noise of
    what is left of a frame.
    """
    rng = np.random.default_rng(0)
    path = tmp_path / f"x{suffix}"
    rate_hz = 22_050
    wave_SC = rng.normal(0, 0.1, (SECONDS * rate_hz, 2)).astype(np.float32)
    if encoder := CHECKED[suffix]:
        write_stream(path, wave_SC, rate_hz, *encoder[:2], sample_format=encoder[2])
    else:
        soundfile.write(path, wave_SC, rate_hz)
    content = path.read_bytes()
    true_S = decode(path).wave_S

    decoded = 0
    for _ in range(8):
        path.write_bytes(damage_bytes(content, kind, rng))
        for begin, end, exact in ((0, 10, False), (3, 5, True)):
            try:
                clip = decode(path, begin, end, exact=exact, policy=AudioPolicy(accept_truncated=True))
            except AudioError:  # nothing of it is left
                continue
            decoded += 1
            part_S = true_S[begin * rate_hz :][: len(clip.wave_S)]
            is_silent_S = clip.wave_S == 0
            assert np.abs(np.where(is_silent_S, 0, clip.wave_S - part_S)).max() < 1e-4
            assert ("gaps" in clip.flags) == (is_silent_S.sum() > rate_hz // 100)
    assert decoded >= 12


@pytest.mark.parametrize("subtype", ["OPUS", "VORBIS"])
def test_a_lost_page_of_an_ogg_is_silent_and_nothing_else_is_moved(tmp_path, subtype):
    """FFmpeg puts the first packet of the next page where the lost one began."""
    rate_hz = 48_000
    noise_S = np.random.default_rng(0).normal(0, 0.1, SECONDS * rate_hz)
    path = tmp_path / "x.ogg"
    soundfile.write(
        path, np.convolve(noise_S, np.hanning(40) / 8, "same"), rate_hz, format="OGG", subtype=subtype
    )
    true_S = decode(path).wave_S
    content = bytearray(path.read_bytes())
    pages = [match.start() for match in re.finditer(b"OggS", content)]
    content[pages[5] + 300] ^= 1
    path.write_bytes(content)

    clip = decode(path)
    (silent_N,) = np.nonzero(clip.wave_S == 0)
    begin, end = silent_N[0], silent_N[-1] + 1
    assert "gaps" in clip.flags
    assert 0.3 * rate_hz < len(silent_N) <= end - begin < 2.1 * rate_hz
    assert len(clip.wave_S) == len(true_S)
    for place in range(0, len(true_S) - 960, 480):
        heard = slice(place, place + 480)
        if (
            end + 960 > place > begin - 480 - 300
        ):  # a decoder begins anew behind a hole, and hears of it before
            continue
        assert np.corrcoef(clip.wave_S[heard], true_S[heard])[0, 1] > 0.9


@pytest.mark.parametrize(
    ("suffix", "codec", "kind"), [(".tta", "tta", "tta"), (".m4a", "alac", "ipod"), (".m4b", "aac", "ipod")]
)
def test_a_packet_that_does_not_decode_leaves_a_hole_of_its_own_length(tmp_path, suffix, codec, kind):
    """What follows is not moved: a packet of TTA has 1.04 s, one of AAC 0.05 s, and several may be lost."""
    rng = np.random.default_rng(0)
    rate_hz = 22_050
    wave_S = np.convolve(rng.normal(0, 0.1, SECONDS * rate_hz), np.hanning(40) / 8, "same")
    path = write_stream(tmp_path / f"x{suffix}", wave_S[:, None].astype(np.float32), rate_hz, codec, kind)
    content = path.read_bytes()
    true_S = decode(path).wave_S

    # Bits of the sound's first half: the table of an mp4 stands at its end, and the second half shows the place.
    holes = 0
    for _ in range(10):
        damaged = bytearray(content)
        for place in rng.integers(2_000, len(content) // 2, size=20).tolist():
            damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        clip = decode(path)
        holes += "gaps" in clip.flags
        assert len(clip.wave_S) == len(true_S)
        half = len(true_S) // 2 + 2 * rate_hz
        assert np.corrcoef(clip.wave_S[half:], true_S[half:])[0, 1] > 0.9
    assert holes


def test_a_flac_of_32_bits_is_read(tmp_path):
    """libsndfile does not know it, FFmpeg does."""
    av = pytest.importorskip("av")
    path = tmp_path / "x.flac"
    wave_SC = tone_seconds(3, 22_050)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=22_050, layout="mono", options={"strict": "experimental"})
        stream.format = "s32"
        stream.codec_context.options = {"strict": "experimental"}
        samples = (wave_SC.T.astype(np.float64) * 2**31).astype(np.int32)
        frame = av.AudioFrame.from_ndarray(samples, format="s32", layout="mono")
        frame.sample_rate = 22_050
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    assert heard(path) == [0, 1, 2]


def wav_bytes(wave_SC, *, align=None, data_bytes=None, chunks=b"", form=b"RIFF"):
    """A wav of 16 bits at 16 kHz, with fields of its header as given."""
    channels = wave_SC.shape[1]
    data = (wave_SC * 32_767).astype("<i2").tobytes()
    align = 2 * channels if align is None else align
    size = len(data) if data_bytes is None else data_bytes
    spec = struct.pack("<IHHIIHH", 16, 1, channels, 16_000, 16_000 * align, align, 16)
    body = b"WAVE" + chunks + b"fmt " + spec + b"data" + struct.pack("<I", size) + data
    return form + struct.pack("<I", len(body) if form == b"RIFF" else 2**32 - 1) + body


WAV_BYTES = 2 * SECONDS * 16_000

WAV_HEADERS = {
    **{f"BlockAlign {align}": {"align": align} for align in (0, 1, 4, 8)},
    **{f"{size:#x} bytes": {"data_bytes": size} for size in (0, 0xFFFF_FFFF, 0x7FFF_F000, 0xFFFF_FFDB)},
    "fact": {"chunks": b"fact" + struct.pack("<II", 4, 5)},
    **{
        f"RF64 of {size} bytes": {
            "form": b"RF64",
            "data_bytes": 2**32 - 1,
            "chunks": b"ds64" + struct.pack("<IQQQI", 28, WAV_BYTES + 72, size, size // 2, 0),
        }
        for size in (WAV_BYTES, 0, 1)
    },
}


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("case", WAV_HEADERS)
def test_a_wav_with_a_wrong_header_is_read_as_players_read_it(tmp_path, case, channels):
    """Recorder apps write such BlockAligns, and programs that write to a pipe such sizes."""
    if "RF64 of 288000" in case and channels == 2:
        pytest.skip("half of the sound is declared")
    path = tmp_path / "x.wav"
    path.write_bytes(wav_bytes(tone_seconds(SECONDS, 16_000, channels=channels), **WAV_HEADERS[case]))
    clip = decode(path)
    assert heard_seconds(clip.wave_S, clip.rate_hz) == WHOLE
    assert set(clip.flags) <= {"shorter", "mixed_down"}
    assert clip.source_seconds == 9.0
    assert heard(path, 5, 9) == [5, 6, 7, 8]


@pytest.mark.parametrize("codec", ["adpcm_ms", "libmp3lame"])
def test_a_wrong_fact_of_a_packed_wav_is_not_believed(tmp_path, codec):
    """Its packets tell how long it is."""
    path = write_stream(tmp_path / "x.wav", tone_seconds(SECONDS, 16_000), 16_000, codec, "wav")
    content = bytearray(path.read_bytes())
    for samples in (0, 5, 1_000, 10**8, 2**32 - 1):
        struct.pack_into("<I", content, content.index(b"fact") + 8, samples)
        path.write_bytes(content)
        assert heard(path)[:SECONDS] == WHOLE
        assert heard(path, 5, 9) == [5, 6, 7, 8]


@pytest.mark.parametrize("field", ["frames", "bytes"])
@pytest.mark.parametrize("value", [0, 5, 2**32 - 1])
def test_a_wrong_length_of_an_aiff_is_not_believed(tmp_path, field, value):
    """The sound chunk says how many samples there are, and where it does not, the file does."""
    path = tmp_path / "x.aiff"
    soundfile.write(path, tone_seconds(SECONDS, 16_000), 16_000)
    content = bytearray(path.read_bytes())
    if field == "frames":
        struct.pack_into(">I", content, content.index(b"COMM") + 10, value)
    else:
        struct.pack_into(">I", content, content.index(b"SSND") + 4, value)
    path.write_bytes(content)
    if (field, value) == ("bytes", 5):
        pytest.skip("a chunk of five bytes that no reader believes")
    assert heard(path) == WHOLE
    assert heard(path, 5, 9) == [5, 6, 7, 8]
