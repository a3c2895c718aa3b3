"""What others would use to make batches of stored log-mel: the same clips, normalised and padded alike.

Each is written as its documentation has it. A clip is cut to its valid frames, normalised, padded, and stacked by
PyTorch's DataLoader, whose processes live on from epoch to epoch.
"""

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
import webdataset

from pipeline.loading.loader import View
from pipeline.store.feature_store import FeatureStore

CLIPS_IN_A_TAR = 64

SHUFFLE_BUFFER = 1_000  # clips; what webdataset's documentation has


@dataclass(frozen=True)
class Normalise:
    """A clip's stored values to what a model is shown."""

    view: View
    scale: float
    offset: float

    def __call__(self, stored_TF: np.ndarray, n_frames: int) -> torch.Tensor:
        audio_TF = torch.from_numpy(stored_TF[:n_frames]).float()
        mel_TF = torch.zeros(self.view.frames, audio_TF.shape[1])
        mel_TF[:n_frames] = (audio_TF * self.scale + self.offset - self.view.mean) / self.view.std
        return mel_TF


class StoreClips(torch.utils.data.Dataset):
    """Clips of our store, one at a time."""

    def __init__(self, store: FeatureStore, normalise: Normalise) -> None:
        self.store, self.normalise = store, normalise

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.normalise(self.store.read(np.array([row]))[0], int(self.store.n_frames_N[row]))


class Hdf5Clips(torch.utils.data.Dataset):
    """Clips of an HDF5 file, chunked by clip; every process opens it for itself."""

    def __init__(self, path: Path, normalise: Normalise) -> None:
        self.path, self.normalise, self.file = path, normalise, None

    def __getitem__(self, row: int) -> torch.Tensor:
        if self.file is None:
            self.file = h5py.File(self.path)
        return self.normalise(self.file["mel"][row], int(self.file["n_frames"][row]))


def data_loader(clips: torch.utils.data.Dataset, rows_N: np.ndarray, batch: int, processes: int):
    """Random access, in the order of `rows_N`."""
    return torch.utils.data.DataLoader(
        clips,
        batch_size=batch,
        sampler=rows_N.tolist(),
        num_workers=processes,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )


@dataclass(frozen=True)
class FromTar:
    """A sample of webdataset to what a model is shown."""

    normalise: Normalise

    def __call__(self, sample: dict) -> torch.Tensor:
        stored_TF = np.load(io.BytesIO(sample["npy"]))
        return self.normalise(stored_TF, len(stored_TF))


def web_loader(folder: Path, normalise: Normalise, batch: int, processes: int):
    """Tars in random order, clips through a shuffle buffer."""
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    clips = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(SHUFFLE_BUFFER)
    return torch.utils.data.DataLoader(
        clips.map(FromTar(normalise)),
        batch_size=batch,
        num_workers=processes,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )


def write_hdf5(store: FeatureStore, path: Path) -> None:
    """The store's spectrograms, row for row."""
    with h5py.File(path, "w") as file:
        shape = (len(store.n_frames_N), store.frames, store.bands)
        mel = file.create_dataset("mel", shape, store.dtype, chunks=(1, *shape[1:]))
        for row in range(len(mel)):
            mel[row] = store.read(np.array([row]))[0]
        file["n_frames"] = store.n_frames_N


def write_tars(store: FeatureStore, folder: Path) -> None:
    """The valid frames of every row as `.npy`, 64 to a tar."""
    folder.mkdir()
    for first in range(0, len(store.n_frames_N), CLIPS_IN_A_TAR):
        with tarfile.open(folder / f"{first:08}.tar", "w") as tar:
            for row in range(first, min(first + CLIPS_IN_A_TAR, len(store.n_frames_N))):
                content = io.BytesIO()
                np.save(content, store.read(np.array([row]))[0, : store.n_frames_N[row]])
                member = tarfile.TarInfo(f"{row:08}.npy")
                member.size = content.tell()
                content.seek(0)
                tar.addfile(member, content)
