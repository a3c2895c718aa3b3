"""Clips packed in HDF5, as the code of PANNs and PaSST packs them; the only import of h5py, an optional extra."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.errors import AudioError, InputError, archive_error, first_error_line

PANNS_RATE_HZ = 32_000  # if the file states no rate

# Datasets that may contain the sounds, and the type and axes that each must have.
SOUND_DATASETS = {"waveform": "int16 [clip, sample]", "mp3": "bytes [clip]"}

# Errors that h5py raises for a file which HDF5's library cannot read.
HDF5_FAULTS = (OSError, KeyError, RuntimeError, ValueError, TypeError)


def open_hdf5(path: Path) -> Any:
    """Open the file for reading, without a lock: copies are often on disks that cannot lock.

    InputError if h5py is not installed.
    """
    try:
        import h5py
    except ModuleNotFoundError:
        raise InputError(f"{path}: reading HDF5 needs h5py; pip install 'ajepa[hdf5]'") from None
    return h5py.File(path, "r", locking=False)


def list_hdf5_rows(path: Path) -> tuple[pl.DataFrame, str | None]:
    """The name (`member`) and number (`row`) of every row, and the fault of the file, or None."""
    schema = {"member": pl.String, "row": pl.Int64}
    no_rows = pl.DataFrame(schema=schema)
    try:
        with open_hdf5(path) as file:
            dataset = find_sound_dataset(file)
            if dataset is None or "audio_name" not in file:
                return no_rows, (
                    f"is not packed as PANNs or PaSST do it (datasets: {', '.join(file)}; expected audio_name, and "
                    f"waveform as {SOUND_DATASETS['waveform']} or mp3 as {SOUND_DATASETS['mp3']}); "
                    "its rows are not used"
                )
            row_count = min(len(file["audio_name"]), len(file[dataset]))
            names = [decode_name(name) for name in file["audio_name"][:row_count]]
    except HDF5_FAULTS as error:
        reason = first_error_line(error, path)
        return no_rows, f"is no HDF5 file that can be read ({reason}); fetch it again"
    return pl.DataFrame({"member": names, "row": range(row_count)}, schema=schema), None


def find_sound_dataset(file: Any) -> str | None:
    """The name of the dataset that contains the sounds (a key of SOUND_DATASETS); None if there is no such dataset."""
    if "waveform" in file and file["waveform"].dtype == np.int16 and file["waveform"].ndim == 2:
        return "waveform"
    if "mp3" in file and file["mp3"].ndim == 1:
        # The bytes of one mp3 file per clip: rows of variable length.
        element = (file["mp3"].dtype.metadata or {}).get("vlen")
        return "mp3" if element is not None and np.dtype(element).itemsize == 1 else None
    return None


def decode_name(name: bytes | str) -> str:
    """A name as text; bytes that are not UTF-8 are written as `\\xff`."""
    return name.decode(errors="backslashreplace") if isinstance(name, bytes) else str(name)


def read_hdf5_sound(path: Path, row: int) -> bytes:
    """One row as the bytes of a wav or mp3 file.

    AudioError: missing if the row was never filled (the packers leave zeros for a clip that they could not find),
    unreadable if the file is damaged.
    """
    # Read the row: a wave, or the bytes of a file.
    try:
        with open_hdf5(path) as file:
            dataset = find_sound_dataset(file)
            if dataset is None:
                raise ValueError("no sounds")
            sound_S = np.asarray(file[dataset][row])
            rate_hz = int(file.attrs.get("sample_rate", PANNS_RATE_HZ))
    except HDF5_FAULTS as error:
        raise archive_error(path, error) from None

    # Zeros mean that the packer could not find the clip; a silent clip would have the same samples.
    if not sound_S.any():
        raise AudioError(
            "missing", f"row {row} of {path.name} holds zeros only: the clip was missing when packed"
        )
    if dataset == "waveform":
        return wav_file_bytes(sound_S, rate_hz)
    return sound_S.tobytes()


def wav_file_bytes(wave_S: np.ndarray, rate_hz: int) -> bytes:
    """Mono 16-bit samples as a wav file."""
    # Three chunks: the head of the file, the sample format (PCM, one channel, 16 bits), the samples.
    samples = wave_S.astype("<i2").tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate_hz % 2**32, 2 * rate_hz % 2**32, 2, 16)
    head = struct.pack("<4sI4s", b"RIFF", 36 + len(samples), b"WAVE")
    return head + form + struct.pack("<4sI", b"data", len(samples)) + samples
