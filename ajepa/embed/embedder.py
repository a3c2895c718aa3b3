"""Embedding: what is told of one sound, and how it comes together from windows.

Embedder: audio in, embeddings out: of files, arrays and stores, at any length and rate.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ajepa.embed.pretrained import LAST_CHECKPOINT, PretrainedEncoder, load_pretrained
from ajepa.embed.windows import (
    SoundStream,
    SoundWindow,
    cut_windows,
    drop_frames,
    open_ahead,
    window_hop_columns,
)
from ajepa.model.patches import valid_token_mask
from ajepa.model.pooling import DEFAULT_POOLING, LAST_LAYER, EncoderLayer, PoolingName, pool_tokens
from ajepa.training.devices import pick_device
from pipeline.audio.decode import (
    MAX_USABLE_PEAK,
    AudioPolicy,
    describe_bad_samples,
    peak_magnitude,
    resample_blocks,
    stream_wave,
)
from pipeline.audio.sources import SoundLocator
from pipeline.errors import AudioError, RunError
from pipeline.store.feature_store import FeatureStore


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Embedding:
    """One sound's vectors, float32 on the CPU.

    clip_D      mean of the vectors of all time columns that begin inside the sound
    frames_TD   one vector a column, for those whose centre lies inside the sound; at least one
    times_ms_T  where those centres lie, float64, evenly spaced. A sound that ends before its first centre
                has one frame, told at its middle
    seconds     length of the sound
    """

    clip_D: Tensor
    frames_TD: Tensor
    times_ms_T: Tensor
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Embeddings:
    """Those of several sounds: `clips_BD`, `width` values wide, and for each its `Embedding`."""

    per_sound: tuple[Embedding, ...]
    width: int

    @property
    def clips_BD(self) -> Tensor:
        """One vector a sound, float32 on the CPU."""
        return torch.stack([torch.zeros(self.width), *(one.clip_D for one in self.per_sound)])[
            1:
        ]  # of none, too

    def __len__(self) -> int:
        return len(self.per_sound)

    def __getitem__(self, index: int) -> Embedding:
        return self.per_sound[index]


class EmbeddingBuilder:
    """What is known so far of one sound."""

    def __init__(self, keep_frames: bool) -> None:
        self.keep_frames, self.is_open, self.seconds = keep_frames, True, 0.0
        self.expected_windows, self.received_windows, self.column_count = 0, 0, 0
        self.sum_D: Tensor | float = 0.0
        self.frames: list[Tensor] = []
        self.failure: AudioError | None = None

    @property
    def is_done(self) -> bool:
        return not self.is_open and (
            self.failure is not None or self.received_windows == self.expected_windows
        )

    def add_columns(self, columns_CD: Tensor) -> None:
        """The next window's columns."""
        self.received_windows, self.column_count = (
            self.received_windows + 1,
            self.column_count + len(columns_CD),
        )
        self.sum_D = self.sum_D + columns_CD.double().sum(0)
        if self.keep_frames:
            self.frames.append(columns_CD)

    def build_embedding(self, first_centre_ms: float, column_ms: float) -> Embedding:
        clip_D = torch.as_tensor(self.sum_D / self.column_count).float()
        frames_TD = torch.cat([*self.frames, clip_D.new_zeros(0, len(clip_D))])
        times_ms_T = first_centre_ms + column_ms * torch.arange(len(frames_TD), dtype=torch.float64)
        inside_T = times_ms_T <= self.seconds * 1e3
        if self.keep_frames and not inside_T.any():
            frames_TD, times_ms_T = frames_TD[:1], torch.tensor([self.seconds * 500], dtype=torch.float64)
        else:
            frames_TD, times_ms_T = frames_TD[inside_T], times_ms_T[inside_T]
        return Embedding(clip_D=clip_D, frames_TD=frames_TD, times_ms_T=times_ms_T, seconds=self.seconds)


def require_embeddings(outcomes: Iterable[Embedding | AudioError], width: int) -> Embeddings:
    """Every sound's; raises the AudioError of the first that could not be used."""
    each = []
    for one in outcomes:
        if isinstance(one, AudioError):
            raise one
        each.append(one)
    return Embeddings(per_sound=tuple(each), width=width)


WINDOW_OVERLAP = (
    0.5  # of a window: every column of a long sound has a quarter of a window on either side, or its end
)

WINDOWS_PER_BATCH = 32  # encoded at a time

ARRAY_PIECE_SAMPLES = 2**20  # of an array at a time

EMBEDDING_POLICY = AudioPolicy(keep_silent=True, max_seconds=float("inf"))


class Embedder:
    """A frozen encoder that takes sounds; `ajepa.load` makes one.

    Sounds are mixed to mono, resampled to `sample_rate_hz` by soxr, turned into the log-mel that the encoder was
    trained on and normalised with its run's mean and deviation. What is longer than the encoder's view goes
    through it in windows that share `overlap` of their length (0: one after the other, as `evaluate` has it).
    Frames past a sound's end are neither attended to nor in any mean, so neighbours in a batch do not matter.
    All in float32: results differ in the last bits between devices and batch sizes.

    pooling  of a column's tokens: `mean`, or `frequency`, band by band, `grid.rows` times as wide
    layer    whose tokens (`pooling.Layer`, or its name: last, mean-4, block-2)
    """

    def __init__(
        self,
        model: PretrainedEncoder,
        *,
        device: str = "auto",
        pooling: PoolingName = DEFAULT_POOLING,
        layer: EncoderLayer | str = LAST_LAYER,
        overlap: float = WINDOW_OVERLAP,
    ) -> None:
        if pooling == "moments":
            raise RunError(
                "pooling moments is of whole clips and has no frames; embed with mean or frequency"
            )
        self.model, self.device = model, pick_device(device)
        self.encoder = model.build_encoder(self.device)
        self.pooling, self.overlap = pooling, overlap
        self.layer = EncoderLayer.from_name(layer) if isinstance(layer, str) else layer
        self.grid, self.mel = model.spec.grid, model.mel
        self._hop_columns = window_hop_columns(self.grid, overlap)

    @property
    def sample_rate_hz(self) -> int:
        """Of the front end; sounds of any other rate are resampled to it."""
        return self.mel.sample_rate_hz

    @property
    def width(self) -> int:
        """Values of an embedding."""
        return self.model.spec.width * (self.grid.rows if self.pooling == "frequency" else 1)

    @property
    def column_ms(self) -> float:
        """From one frame's embedding to the next."""
        return self.grid.patch_frames * self.mel.hop_samples / self.sample_rate_hz * 1e3

    @property
    def first_centre_ms(self) -> float:
        """Where the middle of the first column lies, from the first sample that it sees to its last."""
        reach_samples = self.mel.window_samples if self.mel.framing == "kaldi" else 0
        samples = (self.grid.patch_frames - 1) * self.mel.hop_samples + reach_samples
        return samples / 2 / self.sample_rate_hz * 1e3

    def embed(
        self, sounds: str | Path | Sequence[str | Path], *, batch: int = WINDOWS_PER_BATCH, workers: int = 2
    ) -> Embeddings:
        """Files of any container, rate, channels and length; AudioError names the first that cannot be used.

        `batch` windows are encoded at a time; `workers` threads decode ahead.
        """
        sounds = [sounds] if isinstance(sounds, str | Path) else sounds
        locators = [SoundLocator.from_path(Path(sound)) for sound in sounds]
        told = self.iterate_embeddings(map(self.file_opener, locators), batch=batch, workers=workers)
        return require_embeddings(told, self.width)

    def embed_audio(
        self,
        wave_BS: np.ndarray | Tensor,
        rate_hz: int,
        *,
        samples_B: Sequence[int] | None = None,
        shifts: int = 1,
        batch: int = WINDOWS_PER_BATCH,
    ) -> Embeddings:
        """Mono waves `[B, S]` or `[S]`, floats in [-1, 1]; of each the first `samples_B`, all if not given.

        With `shifts` of K (a divisor of the grid's patch_frames) every sound goes through K times, each time
        begun a K-th of a column later, and there are K frames a column; the clip's vector stays the same.
        AudioError where a wave is shorter than one frame of the spectrogram, not finite or absurdly loud; RunError
        where these are no such waves, lengths or rate.
        """
        wave_BS = float_waves_BS(wave_BS)
        if not rate_hz > 0:
            raise RunError(f"audio at {rate_hz} Hz: expected a rate above 0")
        if shifts < 1 or self.grid.patch_frames % shifts:
            raise RunError(f"shifts {shifts}: expected a divisor of {self.grid.patch_frames}")
        lengths = [wave_BS.shape[1]] * len(wave_BS) if samples_B is None else list(samples_B)
        if len(lengths) != len(wave_BS) or not all(0 <= length <= wave_BS.shape[1] for length in lengths):
            told = f"a length for each of {len(wave_BS)} waves, of at most {wave_BS.shape[1]} samples"
            raise RunError(f"samples_B {lengths[:8]}: expected {told}")
        waves = [wave_S[:length].numpy() for wave_S, length in zip(wave_BS, lengths, strict=True)]
        step = self.grid.patch_frames // shifts
        made = [
            list(
                self.iterate_embeddings(
                    (self._array_opener(w, rate_hz, step * shift) for w in waves), batch=batch
                )
            )
            for shift in range(shifts)
        ]
        return self._interleave_shifts(made)

    def embed_store(
        self, store: FeatureStore, rows_N: np.ndarray, *, batch: int = WINDOWS_PER_BATCH
    ) -> Iterator[Embedding]:
        """Rows of a store, in their order; RunError where it holds features of another front end."""
        store.refuse_other_front_end(self.mel, "the model needs")
        for told in self.iterate_embeddings(
            (self.row_opener(store, int(row)) for row in rows_N), batch=batch
        ):
            assert isinstance(told, Embedding)  # a store's rows are sounds, or a StoreError
            yield told

    def iterate_embeddings(
        self,
        openers: Iterable[Callable[[], SoundStream]],
        *,
        frames: bool = True,
        batch: int = WINDOWS_PER_BATCH,
        workers: int = 0,
    ) -> Iterator[Embedding | AudioError]:
        """What becomes of each sound, in their order, as windows of several are encoded together.

        Without `frames` their vectors are not kept: then memory does not grow with a sound. `workers` threads open
        sounds ahead of their turn.
        """
        if batch < 1:
            raise RunError(f"batch {batch}: expected 1 window or more at a time")
        waiting: deque[EmbeddingBuilder] = deque()
        pending: list[tuple[EmbeddingBuilder, SoundWindow]] = []
        for opened in open_ahead(openers, workers):
            making = EmbeddingBuilder(frames)
            waiting.append(making)
            try:
                sound = opened()
                for window in cut_windows(sound.mels, self.grid, self._hop_columns):
                    pending.append((making, window))
                    making.expected_windows += 1
                    if len(pending) == batch:
                        self._encode_windows(pending)
                        pending = []
                making.seconds = sound.seconds
                if not making.expected_windows:
                    told = f"{sound.seconds:.4f} s are less than one frame; give a longer sound"
                    raise AudioError("too_short", told)
            except AudioError as error:
                making.failure = error
            making.is_open = False
            while waiting and waiting[0].is_done:
                yield self._embedding_or_error(waiting.popleft())
        if pending:
            self._encode_windows(pending)
        for making in waiting:
            yield self._embedding_or_error(making)

    def file_opener(self, locator: SoundLocator) -> Callable[[], SoundStream]:
        """How to open a file."""
        return lambda: SoundStream.from_waves(
            stream_wave(locator, self.sample_rate_hz, policy=EMBEDDING_POLICY), self.mel
        )

    def row_opener(self, store: FeatureStore, row: int) -> Callable[[], SoundStream]:
        """How to open a row of a store."""

        def open_row() -> SoundStream:
            frames = int(store.n_frames_N[row])
            mel_TF = torch.from_numpy(store.read(np.array([row]))[0, :frames]).float()
            seconds = self.mel.samples_of(frames) / self.sample_rate_hz  # a hop less than it had, or nearer
            return SoundStream([mel_TF * store.scale + store.offset], seconds)

        return open_row

    def _array_opener(self, wave_S: np.ndarray, rate_hz: int, skip_frames: int) -> Callable[[], SoundStream]:
        def open_array() -> SoundStream:
            if len(wave_S) and not peak_magnitude(wave_S) <= MAX_USABLE_PEAK:
                raise AudioError("non_finite", f"{describe_bad_samples(wave_S)}; expected floats in [-1, 1]")
            pieces = (
                wave_S[at : at + ARRAY_PIECE_SAMPLES] for at in range(0, len(wave_S), ARRAY_PIECE_SAMPLES)
            )
            at_rate = (
                pieces
                if rate_hz == self.sample_rate_hz
                else resample_blocks(pieces, rate_hz, self.sample_rate_hz)
            )
            sound = SoundStream.from_waves(at_rate, self.mel)
            sound.mels = drop_frames(sound.mels, skip_frames)
            return sound

        return open_array

    @torch.inference_mode()
    def _encode_windows(self, pending: Sequence[tuple["EmbeddingBuilder", SoundWindow]]) -> None:
        """Run windows through the encoder and hand each sound the columns that are its."""
        mel_NTF = torch.zeros(len(pending), self.grid.frames, self.grid.bands)
        n_frames_N = torch.tensor([len(window.mel_TF) for _, window in pending])
        for place_TF, (_, window) in zip(mel_NTF, pending, strict=True):
            place_TF[: len(window.mel_TF)] = (window.mel_TF - self.model.mean) / self.model.std
        columns_NCD = self.column_vectors(mel_NTF, n_frames_N).cpu()
        for (making, window), columns_CD in zip(pending, columns_NCD, strict=True):
            making.add_columns(
                columns_CD[
                    window.first_column - window.start_column : window.end_column - window.start_column
                ]
            )

    def column_vectors(self, mel_NTF: Tensor, n_frames_N: Tensor) -> Tensor:
        """Normalised views -> one vector for each time column, `NCD`; past a view's frames they mean nothing."""
        valid_NP = valid_token_mask(n_frames_N, self.grid)
        told = None if valid_NP.all() else valid_NP.to(self.device)
        tokens_NPD = self.layer.encode_tokens(self.encoder, mel_NTF.to(self.device), told)
        return pool_columns(tokens_NPD, self.grid.rows, self.pooling)

    def _embedding_or_error(self, builder: "EmbeddingBuilder") -> Embedding | AudioError:
        if builder.failure is not None:
            return builder.failure
        return builder.build_embedding(self.first_centre_ms, self.column_ms)

    def _interleave_shifts(self, results_by_shift: Sequence[Sequence[Embedding | AudioError]]) -> Embeddings:
        """The frames of several shifts in the order of their times, with the clip's vector of the first."""
        first, each = require_embeddings(results_by_shift[0], self.width), []
        for index, base in enumerate(first.per_sound):
            frames, times_ms = [base.frames_TD], [base.times_ms_T]
            for shift, told in enumerate(shifted[index] for shifted in results_by_shift[1:]):
                if isinstance(told, AudioError) or base.seconds * 1e3 < self.first_centre_ms:
                    continue  # it has ended before
                later_ms_T = told.times_ms_T + self.column_ms * (shift + 1) / len(results_by_shift)
                inside_T = later_ms_T <= base.seconds * 1e3
                frames.append(told.frames_TD[inside_T])
                times_ms.append(later_ms_T[inside_T])
            times_ms_T, order_T = torch.cat(times_ms).sort()
            each.append(replace(base, frames_TD=torch.cat(frames)[order_T], times_ms_T=times_ms_T))
        return Embeddings(per_sound=tuple(each), width=self.width)


def float_waves_BS(wave_BS: np.ndarray | Tensor) -> Tensor:
    """Float32 on the CPU, `[B, S]`; RunError where they are whole numbers, whose full scale nobody can know."""
    if not isinstance(wave_BS, Tensor):
        wave_BS = torch.from_numpy(np.ascontiguousarray(wave_BS))
    if not wave_BS.is_floating_point():
        raise RunError(
            f"audio of {wave_BS.dtype}: expected floats in [-1, 1]; divide 16-bit samples by 32768"
        )
    wave_BS = wave_BS[None] if wave_BS.ndim == 1 else wave_BS
    if wave_BS.ndim != 2:
        raise RunError(f"audio of shape {tuple(wave_BS.shape)}: expected [B, S] or [S], mono")
    return wave_BS.detach().to("cpu", torch.float32)


def pool_columns(tokens_NPD: Tensor, rows: int, pooling: PoolingName) -> Tensor:
    """Each time column of each view by itself, `NCD`: the pooling of a clip that has no other column."""
    columns_MRD = tokens_NPD.unflatten(1, (-1, rows)).flatten(0, 1)
    everyone_M = torch.arange(len(columns_MRD), device=columns_MRD.device)
    valid_MR = torch.ones(columns_MRD.shape[:2], dtype=torch.bool, device=columns_MRD.device)
    pooled_MD = pool_tokens(
        columns_MRD, valid_MR, everyone_M, clips=len(columns_MRD), rows=rows, pooling=pooling
    )
    return pooled_MD.unflatten(0, (len(tokens_NPD), -1))


def load(place: str | Path, *, at: str | int = LAST_CHECKPOINT, **options: Any) -> Embedder:
    """The encoder of a run folder, an exported folder or file, or ORG/NAME[@REVISION] of the Hugging Face hub.

    `at` says which checkpoint of a run: last, best (by probe), or a step that is kept. Other keywords are
    `Embedder`'s: device, pooling, layer, overlap. RunError: nothing there, damaged, no such checkpoint or device.
    """
    return Embedder(load_pretrained(place, at), **options)
