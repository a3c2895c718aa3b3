"""What others would use to put log-mel features on disk: two processes each, one array a clip.

Each is written as its documentation has it, with the settings of the mel spec `a-jepa`: mono, 32 kHz, 128 bands, 25 ms
every 10 ms. The processes have started, imported and worked before the clock does.
"""

import multiprocessing as mp
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

PROCESSES = 2

RATE_HZ, BANDS = 32_000, 128

WINDOW_SAMPLES, HOP_SAMPLES, FFT_SAMPLES = 800, 320, 1024


@dataclass(frozen=True, slots=True)
class Peer:
    """`prepare(paths)` makes what is not timed; `work(prepared, out, pool)` is."""

    name: str
    prepare: Callable[[Sequence[Path]], object]
    work: Callable[..., object]
    unreadable: Callable[[], tuple[type[Exception], ...]]


def lhotse_cuts(paths: Sequence[Path]):
    """A CutSet of the first channels: its down-mixing would decode every file twice."""
    from lhotse import CutSet, Recording, RecordingSet

    recordings = RecordingSet.from_recordings(Recording.from_file(path) for path in paths)
    cuts = CutSet.from_manifests(recordings=recordings.resample(RATE_HZ))
    return CutSet.from_cuts(cut.to_mono()[0] for cut in cuts).to_eager()


def lhotse_features(cuts, out: Path, pool: ProcessPoolExecutor) -> None:
    from lhotse import Fbank, FbankConfig, NumpyFilesWriter

    cuts.compute_and_store_features(
        Fbank(FbankConfig(sampling_rate=RATE_HZ, num_filters=BANDS)),
        storage_path=out,
        num_jobs=PROCESSES,
        storage_type=NumpyFilesWriter,
        executor=pool,
        progress_bar=False,
    )


def lhotse_unreadable() -> tuple[type[Exception], ...]:
    from lhotse.audio.backend import AudioLoadingError

    return (AudioLoadingError,)


def one_by_one(
    clip: Callable[..., None], paths: Sequence[Path], out: Path, pool: ProcessPoolExecutor
) -> None:
    """The loop of a script: every path to whoever is free."""
    for _ in pool.map(partial(clip, out=out), paths, chunksize=4):
        pass


def torchaudio_clip(path: Path, out: Path) -> None:
    """libsndfile, and PyAV for what it cannot read; torchaudio itself no longer decodes."""
    import soundfile
    import torchaudio

    try:
        wave_SC, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
        wave_CS = torch.from_numpy(wave_SC.T)
    except soundfile.LibsndfileError:
        wave_CS, rate_hz = decoded_by_av(path)
    wave_S = resampler(rate_hz)(wave_CS.mean(0))
    mel_TF = torchaudio.compliance.kaldi.fbank(
        wave_S[None], sample_frequency=RATE_HZ, num_mel_bins=BANDS, window_type="hanning", htk_compat=True
    )
    np.save(out / path.stem, mel_TF.numpy())


def decoded_by_av(path: Path) -> tuple[torch.Tensor, int]:
    import av

    with av.open(path) as file:
        pieces = [frame.to_ndarray() for frame in file.decode(audio=0)]
        return torch.from_numpy(np.concatenate(pieces, axis=1)), file.streams.audio[0].rate


@lru_cache
def resampler(rate_hz: int) -> torch.nn.Module:
    """Made once a rate: making its kernel takes longer than using it."""
    import torchaudio

    return torchaudio.transforms.Resample(rate_hz, RATE_HZ)


def librosa_clip(path: Path, out: Path) -> None:
    import librosa

    wave_S, _ = librosa.load(path, sr=RATE_HZ)
    np.save(out / path.stem, librosa_mel(wave_S))


def librosa_mel(wave_S: np.ndarray) -> np.ndarray:
    """Log-mel in decibels, `[band, frame]`."""
    import librosa

    return librosa.power_to_db(
        librosa.feature.melspectrogram(
            y=wave_S,
            sr=RATE_HZ,
            n_fft=FFT_SAMPLES,
            win_length=WINDOW_SAMPLES,
            hop_length=HOP_SAMPLES,
            n_mels=BANDS,
            fmin=20.0,
        )
    )


def script_unreadable() -> tuple[type[Exception], ...]:
    import audioread
    import av

    return (audioread.NoBackendError, av.FFmpegError)


PEERS = (
    Peer("lhotse", lhotse_cuts, lhotse_features, lhotse_unreadable),
    Peer("torchaudio", list, partial(one_by_one, torchaudio_clip), script_unreadable),
    Peer("librosa", list, partial(one_by_one, librosa_clip), script_unreadable),
)


class RunningPeer:
    """A peer whose processes are up; `start_seconds` tells how long that took."""

    def __init__(self, peer: Peer) -> None:
        began = time.perf_counter()
        context = mp.get_context("spawn")
        self.name, self._peer = peer.name, peer
        self._pool = ProcessPoolExecutor(
            PROCESSES,
            mp_context=context,
            initializer=_ready,
            initargs=(context.Barrier(PROCESSES), peer.name),
        )
        list(self._pool.map(abs, range(2 * PROCESSES)))
        self.start_seconds = time.perf_counter() - began

    def speed(self, paths: Sequence[Path], out: Path) -> float:
        """Clips/s, their features written below the new folder `out`; 0 where it cannot read them."""
        out.mkdir()
        try:
            prepared = self._peer.prepare(paths)
            began = time.perf_counter()
            self._peer.work(prepared, out, self._pool)
            took = time.perf_counter() - began
        except self._peer.unreadable():
            return 0.0
        written = sum(1 for _ in out.rglob("*.npy"))
        if written != len(paths):
            raise RuntimeError(f"{self.name}: {written} arrays for {len(paths)} clips")
        return len(paths) / took

    def close(self) -> None:
        self._pool.shutdown()


def _ready(barrier, name: str) -> None:
    """One thread, the library imported, and no sooner at work than the other process."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders complain there
    __import__(name)
    barrier.wait()
