"""Sounds packed as people pack them: the same names and bytes in a tar, in Parquet, in HDF5."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

AUDIO = pa.struct({"bytes": pa.binary(), "path": pa.string()})  # Hugging Face's Audio feature


def write_tar(path: Path, files: Mapping[str, bytes], *, form: int = tarfile.PAX_FORMAT) -> Path:
    """As webdataset's writers do: members one after another, no folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form, errors="surrogateescape") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_parquet(
    path: Path, files: Mapping[str, bytes | None], *, group: int = 3, **columns: Sequence
) -> Path:
    """A struct column `audio` of path and bytes, `group` rows in a row group, and other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sounds = [{"bytes": content, "path": name} for name, content in files.items()]
    table = pa.table({**columns, "audio": pa.array(sounds, AUDIO)})
    pq.write_table(table, path, row_group_size=group)
    return path


def write_panns(path: Path, waves: Mapping[str, np.ndarray], *, rate_hz: int | None = 32_000) -> Path:
    """`waveform` int16 [clip, sample] and `audio_name`, as the PANNs code base packs its clips."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["waveform"] = np.stack(list(waves.values())).astype(np.int16)
        file["audio_name"] = np.array([name.encode() for name in waves], "S40")
        if rate_hz is not None:
            file.attrs["sample_rate"] = rate_hz
    return path


def write_passt(path: Path, files: Mapping[str, bytes]) -> Path:
    """`mp3`, variable lengths of bytes, and `audio_name`, as the PaSST code base packs its clips."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        sounds = file.create_dataset("mp3", (len(files),), h5py.vlen_dtype(np.uint8))
        for row, content in enumerate(files.values()):
            sounds[row] = np.frombuffer(content, np.uint8)
        file["audio_name"] = np.array([name.encode() for name in files], "S40")
    return path
