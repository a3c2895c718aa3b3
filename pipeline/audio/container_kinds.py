"""The kinds of sound files: the suffixes, the decoder and the first bytes of each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioContainer:
    """One kind of sound file, with the facts that the header of a file states.

    demuxer          FFmpeg's name of the kind. FFmpeg is not left to probe: it could take a text for a playlist and
                     follow its links
    uses_libsndfile  True: libsndfile decodes the file, and FFmpeg if it gives up; False: the other way round
    is_seekable      True: the file has time stamps, so a second is found without decoding the sound before it
    clock            movie: time stamps are seconds of the movie; broadcast: seconds from an origin of their own, with
                     jumps; chunks: the number of a chunk (avi_chunks.py); none: samples are counted
    length_kind      source of FFmpeg's duration. declared: the header; found: the end of the file, so that a missing
                     end is not noticed; guessed: the bit rate, so that the duration is useless; doubtful:
                     declared, but some writers state a wrong one; it is compared with the packets
    declared_frames  samples per channel that the header declares; None: unknown, or reported by the decoder anyway
    present_share    of the declared bytes of sound, under 1 if the file is cut short
    skip_bytes       tags and junk before the sound, which decoders do not expect
    parts            offset and size of every stream if several are joined end to end
    """

    suffixes: tuple[str, ...]
    demuxer: str
    uses_libsndfile: bool = False
    is_seekable: bool = False
    clock: Literal["movie", "broadcast", "chunks", "none"] = "none"
    length_kind: Literal["declared", "found", "guessed", "doubtful"] = "declared"
    declared_frames: int | None = None
    present_share: float = 1.0
    skip_bytes: int = 0
    parts: tuple[tuple[int, int], ...] = ()

    def is_misnamed(self, name: str) -> bool:
        """Whether the extension of `name` belongs to another kind; an unknown extension belongs to none."""
        return Path(name).suffix.lower() in CONTAINER_SUFFIXES - set(self.suffixes)


CONTAINER_KINDS = {
    "wav": AudioContainer(suffixes=(".wav", ".wave", ".bwf", ".rf64"), demuxer="wav", uses_libsndfile=True),
    "flac": AudioContainer(suffixes=(".flac",), demuxer="flac", uses_libsndfile=True, clock="movie"),
    "mp3": AudioContainer(suffixes=(".mp3", ".mp2", ".mpga", ".m2a", ".mpa"), demuxer="mp3"),
    "aac": AudioContainer(suffixes=(".aac", ".adts"), demuxer="aac", length_kind="guessed"),
    "loas": AudioContainer(suffixes=(".loas", ".latm"), demuxer="loas", length_kind="guessed"),
    "ogg": AudioContainer(
        suffixes=(".ogg", ".oga", ".opus", ".spx", ".ogv", ".ogx", ".ogm"),
        demuxer="ogg",
        length_kind="found",
        is_seekable=True,
        clock="movie",
    ),
    "mp4": AudioContainer(
        suffixes=(".m4a", ".mp4", ".m4v", ".m4b", ".m4r", ".mov", ".qt", ".f4v", ".3gp", ".3g2", ".f4a"),
        demuxer="mov",
        is_seekable=True,
        clock="movie",
    ),
    "matroska": AudioContainer(
        suffixes=(".webm", ".mkv", ".mka", ".weba", ".mk3d"),
        demuxer="matroska",
        is_seekable=True,
        clock="movie",
    ),
    "aiff": AudioContainer(suffixes=(".aiff", ".aif", ".aifc"), demuxer="aiff"),
    "au": AudioContainer(suffixes=(".au", ".snd"), demuxer="au", length_kind="doubtful"),
    "au_little": AudioContainer(suffixes=(), demuxer="au", uses_libsndfile=True),
    "caf": AudioContainer(suffixes=(".caf",), demuxer="caf"),
    "w64": AudioContainer(suffixes=(".w64",), demuxer="w64"),
    "avi": AudioContainer(suffixes=(".avi", ".divx"), demuxer="avi", clock="chunks"),
    "asf": AudioContainer(suffixes=(".wma", ".wmv", ".asf"), demuxer="asf", clock="movie"),
    "flv": AudioContainer(suffixes=(".flv",), demuxer="flv", clock="movie"),
    "mpegts": AudioContainer(
        suffixes=(".ts", ".mts", ".m2ts", ".m2t", ".tp"),
        demuxer="mpegts",
        length_kind="guessed",
        clock="broadcast",
    ),
    "mpeg": AudioContainer(
        suffixes=(".mpg", ".mpeg", ".vob", ".mpe", ".m2p", ".evo"),
        demuxer="mpeg",
        length_kind="guessed",
        clock="broadcast",
    ),
    "nut": AudioContainer(suffixes=(".nut",), demuxer="nut", clock="movie"),
    "mxf": AudioContainer(suffixes=(".mxf",), demuxer="mxf"),
    "wtv": AudioContainer(suffixes=(".wtv",), demuxer="wtv", length_kind="guessed", clock="broadcast"),
    "rm": AudioContainer(
        suffixes=(".rm", ".ra", ".rmvb"), demuxer="rm", length_kind="guessed", clock="movie"
    ),
    "amr": AudioContainer(suffixes=(".amr", ".awb"), demuxer="amr", length_kind="guessed"),
    "ac3": AudioContainer(suffixes=(".ac3",), demuxer="ac3", length_kind="guessed"),
    "eac3": AudioContainer(suffixes=(".eac3", ".ec3"), demuxer="eac3", length_kind="guessed"),
    "dts": AudioContainer(suffixes=(".dts",), demuxer="dts", length_kind="guessed"),
    "dtshd": AudioContainer(suffixes=(".dtshd",), demuxer="dtshd", length_kind="guessed"),
    "mlp": AudioContainer(suffixes=(".mlp",), demuxer="mlp", length_kind="guessed"),
    "truehd": AudioContainer(suffixes=(".thd",), demuxer="truehd", length_kind="guessed"),
    "wavpack": AudioContainer(suffixes=(".wv",), demuxer="wv", clock="movie"),
    "tta": AudioContainer(suffixes=(".tta",), demuxer="tta", clock="movie"),
    "ape": AudioContainer(suffixes=(".ape",), demuxer="ape"),
    "tak": AudioContainer(suffixes=(".tak",), demuxer="tak"),
    "shorten": AudioContainer(suffixes=(".shn",), demuxer="shn", length_kind="guessed"),
    "musepack": AudioContainer(suffixes=(".mpc", ".mpp"), demuxer="mpc"),
    "musepack8": AudioContainer(suffixes=(), demuxer="mpc8"),
    "dsf": AudioContainer(suffixes=(".dsf",), demuxer="dsf"),
    "iff": AudioContainer(suffixes=(".dff", ".8svx", ".svx"), demuxer="iff", length_kind="guessed"),
    "nist": AudioContainer(suffixes=(".sph", ".nist"), demuxer="nistsphere"),
    "voc": AudioContainer(suffixes=(".voc",), demuxer="voc", length_kind="guessed"),
    "ircam": AudioContainer(suffixes=(".sf", ".ircam"), demuxer="ircam", length_kind="guessed"),
    "sox": AudioContainer(suffixes=(".sox",), demuxer="sox", length_kind="guessed"),
    "qcp": AudioContainer(suffixes=(".qcp",), demuxer="qcp", length_kind="guessed"),
    "oma": AudioContainer(suffixes=(".oma", ".aa3"), demuxer="oma", length_kind="guessed"),
    "dss": AudioContainer(suffixes=(".dss", ".ds2"), demuxer="dss", length_kind="guessed"),
    "avr": AudioContainer(suffixes=(".avr",), demuxer="avr", uses_libsndfile=True),
    "pvf": AudioContainer(suffixes=(".pvf",), demuxer="pvf", uses_libsndfile=True),
    "paf": AudioContainer(suffixes=(".paf",), demuxer="epaf", uses_libsndfile=True),
    # Without its suffix: most .mat files hold tables.
    "mat": AudioContainer(suffixes=(), demuxer="wav", uses_libsndfile=True),
    "sds": AudioContainer(suffixes=(".sds",), demuxer="sds", uses_libsndfile=True),
    "wve": AudioContainer(suffixes=(".wve",), demuxer="wve", uses_libsndfile=True),
    "xi": AudioContainer(suffixes=(".xi",), demuxer="xa", uses_libsndfile=True),
}

CONTAINER_SUFFIXES = {suffix for kind in CONTAINER_KINDS.values() for suffix in kind.suffixes}

# Offset, bytes at this offset, kind.
CONTAINER_SIGNATURES = (
    (0, b"fLaC", "flac"),
    (0, b"OggS", "ogg"),
    (0, b"\x1aE\xdf\xa3", "matroska"),
    *((4, atom, "mp4") for atom in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp")),
    *((4, atom, "mp4") for atom in (b"moof", b"sidx")),
    (8, b"AIFF", "aiff"),
    (8, b"AIFC", "aiff"),
    (8, b"AVI ", "avi"),
    (8, b"8SVX", "iff"),
    (8, b"16SV", "iff"),
    (8, b"QLCM", "qcp"),
    (0, b".snd", "au"),
    (0, b"dns.", "au_little"),
    (0, b"caff", "caf"),
    (0, b"riff\x2e\x91\xcf\x11", "w64"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "asf"),
    (0, b"FLV\x01", "flv"),
    (0, b"\x00\x00\x01\xba", "mpeg"),
    (0, b"#!AMR", "amr"),
    (0, b"\x0bw", "ac3"),
    (0, b"wvpk", "wavpack"),
    (0, b"TTA1", "tta"),
    (0, b"MAC ", "ape"),
    (0, b"tBaK", "tak"),
    (0, b"ajkg", "shorten"),
    (0, b"MP+", "musepack"),
    (0, b"MPCK", "musepack8"),
    (0, b"DSD ", "dsf"),
    (0, b"FRM8", "iff"),
    (0, b"\x7f\xfe\x80\x01", "dts"),
    (0, b"\xfe\x7f\x01\x80", "dts"),
    (0, b"\x1f\xff\xe8\x00", "dts"),
    (0, b"\xff\x1f\x00\xe8", "dts"),
    (0, b"DTSHDHDR", "dtshd"),
    (4, b"\xf8\x72\x6f\xbb", "mlp"),
    (4, b"\xf8\x72\x6f\xba", "truehd"),
    (0, b".RMF", "rm"),
    (0, b".ra\xfd", "rm"),
    (0, b"nut/multimedia container\0", "nut"),
    (0, b"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02", "mxf"),
    (0, b"\xb7\xd8\x00\x20\x37\x49\xda\x11", "wtv"),
    (0, b"EA3\x01", "oma"),
    (0, b"ea3\x03", "oma"),
    (0, b"\x02dss", "dss"),
    (0, b"\x03ds2", "dss"),
    (0, b".SoX", "sox"),
    (0, b"XoS.", "sox"),
    (0, b"NIST_1A\n", "nist"),
    (0, b"Creative Voice File\x1a", "voc"),
    *((0, bytes((0x64, 0xA3, machine, 0)), "ircam") for machine in (1, 2, 3, 4)),
    *((0, bytes((0, machine, 0xA3, 0x64)), "ircam") for machine in (1, 2, 3, 4)),
    (0, b"2BIT", "avr"),
    (0, b"PVF1\n", "pvf"),
    (0, b"ALawSoundFile**", "wve"),
    (0, b" paf", "paf"),
    (0, b"fap ", "paf"),
    (0, b"MATLAB 5.0 MAT-file", "mat"),
    (0, b"\xf0\x7e\x00\x01", "sds"),
    (0, b"Extended Instrument: ", "xi"),
)
