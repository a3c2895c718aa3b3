"""Hdf5: the packed clips of the PANNs and PaSST code bases; the only door to h5py, which is an optional extra."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.errors import AudioError, InputError, archive_error, first_error_line

PANNS_RATE_HZ = 32_000  # PANNs' own, where the file states none

HDF5_FAULTS = (
    OSError,
    KeyError,
    RuntimeError,
    ValueError,
    TypeError,
)  # h5py's, for what HDF5's library complains of

SOUND_DATASETS = {
    "waveform": "int16 [clip, sample]",
    "mp3": "bytes [clip]",
}  # dataset of the sounds: what it must be


def open_hdf5(path: Path) -> Any:
    """The file; InputError where h5py is not installed. Unlocked: copies often lie on disks that cannot lock."""
    try:
        import h5py
    except ModuleNotFoundError:
        raise InputError(f"{path}: reading HDF5 needs h5py; pip install 'ajepa[hdf5]'") from None
    return h5py.File(path, "r", locking=False)


def list_hdf5_rows(path: Path) -> tuple[pl.DataFrame, str | None]:
    """`member` (its name) and `row` of every row, and what is wrong with the file."""
    schema = {"member": pl.String, "row": pl.Int64}
    try:
        with open_hdf5(path) as file:
            kind = find_sound_dataset(file)
            if kind is None or "audio_name" not in file:
                there = ", ".join(file)
                return pl.DataFrame(schema=schema), (
                    f"is not packed as PANNs or PaSST do it (datasets: {there}; expected audio_name, and waveform "
                    f"as {SOUND_DATASETS['waveform']} or mp3 as {SOUND_DATASETS['mp3']}); its rows are not used"
                )
            rows = min(len(file["audio_name"]), len(file[kind]))
            names = [decode_name(name) for name in file["audio_name"][:rows]]
    except HDF5_FAULTS as error:
        fault = f"is no HDF5 file that can be read ({first_error_line(error, path)}); fetch it again"
        return pl.DataFrame(schema=schema), fault
    return pl.DataFrame({"member": names, "row": range(rows)}, schema=schema), None


def find_sound_dataset(file: Any) -> str | None:
    """Which dataset holds the sounds; None where there is none of the kinds known."""
    if "waveform" in file and file["waveform"].dtype == np.int16 and file["waveform"].ndim == 2:
        return "waveform"
    if "mp3" in file and file["mp3"].ndim == 1:
        inner = (file["mp3"].dtype.metadata or {}).get("vlen")
        return "mp3" if inner is not None and np.dtype(inner).itemsize == 1 else None
    return None


def decode_name(name: bytes | str) -> str:
    """A name as it can be shown."""
    return name.decode(errors="backslashreplace") if isinstance(name, bytes) else str(name)


def read_hdf5_sound(path: Path, row: int) -> bytes:
    """One row as the bytes of a wav or mp3 file.

    AudioError missing where the row was never filled (the packers leave zeros for a clip they could not find),
    unreadable where the file is damaged.
    """
    try:
        with open_hdf5(path) as file:
            kind = find_sound_dataset(file)
            if kind is None:
                raise ValueError("no sounds")
            sound_S = np.asarray(file[kind][row])
            rate_hz = int(file.attrs.get("sample_rate", PANNS_RATE_HZ))
    except HDF5_FAULTS as error:
        raise archive_error(path, error) from None
    if not sound_S.any():
        raise AudioError(
            "missing", f"row {row} of {path.name} holds zeros only: the clip was missing when packed"
        )
    return wav_file_bytes(sound_S, rate_hz) if kind == "waveform" else sound_S.tobytes()


def wav_file_bytes(wave_S: np.ndarray, rate_hz: int) -> bytes:
    """Mono 16-bit samples as a file."""
    sound = wave_S.astype("<i2").tobytes()
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate_hz % 2**32, 2 * rate_hz % 2**32, 2, 16)
    head = struct.pack("<4sI4s", b"RIFF", 36 + len(sound), b"WAVE")
    return head + fmt + struct.pack("<4sI", b"data", len(sound)) + sound
