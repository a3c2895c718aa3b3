"""Embedder: a frozen encoder that turns sounds of any length and rate into embeddings, window by window."""

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

# The share of a window that the next one repeats: every column of a long sound then has a quarter of a window on
# either side of it, or the sound's end.
WINDOW_OVERLAP = 0.5

# So many windows are encoded at a time.
WINDOWS_PER_BATCH = 32

# An array is resampled and transformed in pieces of so many samples.
ARRAY_PIECE_SAMPLES = 2**20

# Which files can be embedded: silent ones too, and of any length.
EMBEDDING_POLICY = AudioPolicy(keep_silent=True, max_seconds=float("inf"))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Embedding:
    """The vectors of one sound, float32 on the CPU.

    clip_D      mean of the vectors of all time columns that begin inside the sound
    frames_TD   one vector for each column whose centre lies inside the sound; at least one
    times_ms_T  where these centres lie, float64, evenly spaced. A sound that ends before its first centre has one
                frame, placed at the middle of the sound
    seconds     length of the sound
    """

    clip_D: Tensor
    frames_TD: Tensor
    times_ms_T: Tensor
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Embeddings:
    """The embeddings of several sounds: an `Embedding` for each, and all clips as `clips_BD`, `width` values wide."""

    per_sound: tuple[Embedding, ...]
    width: int

    @property
    def clips_BD(self) -> Tensor:
        """One vector a sound, float32 on the CPU; `[0, D]` where there is no sound."""
        if not self.per_sound:
            return torch.zeros(0, self.width)
        return torch.stack([embedding.clip_D for embedding in self.per_sound])

    def __len__(self) -> int:
        return len(self.per_sound)

    def __getitem__(self, index: int) -> Embedding:
        return self.per_sound[index]


def load(location: str | Path, *, at: str | int = LAST_CHECKPOINT, **options: Any) -> "Embedder":
    """Load the encoder of a run folder, an exported folder or file, or ORG/NAME[@REVISION] of the Hugging Face hub.

    `at` is the checkpoint of a run: last, best (by probe), or a step that was kept. The other keywords are those of
    `Embedder`: device, pooling, layer, overlap. RunError where nothing is found there, the files are damaged, or
    there is no such checkpoint or device.
    """
    return Embedder(load_pretrained(location, at), **options)


class Embedder:
    """A frozen encoder that embeds sounds; `ajepa.load` makes one.

    Sounds are mixed to mono, resampled to `sample_rate_hz` by soxr, turned into the log-mel that the encoder was
    trained on, and normalised with the mean and deviation of its run. Sounds longer than the encoder's view go
    through it in windows that share `overlap` of their length (0: one after the other, as in `evaluate`). Frames past
    the end of a sound are not attended to and enter no mean, so that the other sounds of a batch do not matter.
    All is computed in float32; results differ in the last bits between devices and batch sizes.

    pooling  of the tokens of a column: `mean`, or `frequency`, band by band, `grid.rows` times as wide
    layer    the layer that gives the tokens (`pooling.EncoderLayer`, or its name: last, mean-4, block-2)
    """

    def __init__(
        self,
        pretrained: PretrainedEncoder,
        *,
        device: str = "auto",
        pooling: PoolingName = DEFAULT_POOLING,
        layer: EncoderLayer | str = LAST_LAYER,
        overlap: float = WINDOW_OVERLAP,
    ) -> None:
        if pooling == "moments":
            raise RunError(
                "pooling moments describes whole clips and has no frames; embed with mean or frequency"
            )

        # The network, and the features that it takes.
        self.pretrained = pretrained
        self.device = pick_device(device)
        self.encoder = pretrained.build_encoder(self.device)
        self.grid = pretrained.spec.grid
        self.mel = pretrained.mel

        # How its tokens become vectors.
        self.pooling = pooling
        self.layer = EncoderLayer.from_name(layer) if isinstance(layer, str) else layer
        self.overlap = overlap
        self._hop_columns = window_hop_columns(self.grid, overlap)

    @property
    def sample_rate_hz(self) -> int:
        """The rate of the front end, to which all sounds are resampled."""
        return self.mel.sample_rate_hz

    @property
    def width(self) -> int:
        """The number of values of an embedding."""
        vectors = self.grid.rows if self.pooling == "frequency" else 1
        return self.pretrained.spec.width * vectors

    @property
    def column_ms(self) -> float:
        """The time from one frame's embedding to the next."""
        return self.grid.patch_frames * self.mel.hop_samples / self.sample_rate_hz * 1e3

    @property
    def first_centre_ms(self) -> float:
        """The middle of the first column, which reaches from the first sample that it sees to its last."""
        reach_samples = self.mel.window_samples if self.mel.framing == "kaldi" else 0
        samples = (self.grid.patch_frames - 1) * self.mel.hop_samples + reach_samples
        return samples / 2 / self.sample_rate_hz * 1e3

    def embed(
        self, sounds: str | Path | Sequence[str | Path], *, batch: int = WINDOWS_PER_BATCH, workers: int = 2
    ) -> Embeddings:
        """Embed files of any container, rate, channels and length; AudioError names the first unusable one.

        `batch` windows are encoded at a time; `workers` threads decode ahead.
        """
        paths = [sounds] if isinstance(sounds, str | Path) else sounds
        locators = [SoundLocator.from_path(Path(path)) for path in paths]
        results = self.iterate_embeddings(map(self.file_opener, locators), batch=batch, workers=workers)
        return require_embeddings(results, self.width)

    def embed_audio(
        self,
        wave_BS: np.ndarray | Tensor,
        rate_hz: int,
        *,
        samples_B: Sequence[int] | None = None,
        shifts: int = 1,
        batch: int = WINDOWS_PER_BATCH,
    ) -> Embeddings:
        """Embed mono waves `[B, S]` or `[S]`, floats in [-1, 1]: the first `samples_B` samples of each, or all.

        With `shifts` of K (a divisor of the grid's patch_frames) every sound goes through the encoder K times, each
        time starting 1/K of a column later. There are then K frames a column; the vector of the clip stays the same.
        AudioError where a wave is shorter than one frame of the spectrogram, not finite or absurdly loud; RunError
        where the shapes, lengths, rate or shifts are impossible.
        """
        # Check what was given.
        wave_BS = float_waves_BS(wave_BS)
        if not rate_hz > 0:
            raise RunError(f"audio at {rate_hz} Hz: expected a rate above 0")
        if shifts < 1 or self.grid.patch_frames % shifts:
            raise RunError(f"shifts {shifts}: expected a divisor of {self.grid.patch_frames}")
        waves = cut_waves(wave_BS, samples_B)

        # Embed all sounds, once for each shift.
        shift_frames = self.grid.patch_frames // shifts
        results_by_shift = []
        for shift in range(shifts):
            openers = [self._array_opener(wave_S, rate_hz, shift_frames * shift) for wave_S in waves]
            results_by_shift.append(list(self.iterate_embeddings(openers, batch=batch)))
        return self._interleave_shifts(results_by_shift)

    def iterate_embeddings(
        self,
        openers: Iterable[Callable[[], SoundStream]],
        *,
        frames: bool = True,
        batch: int = WINDOWS_PER_BATCH,
        workers: int = 0,
    ) -> Iterator[Embedding | AudioError]:
        """Yield the embedding of each sound in order, or why there is none; windows of several are encoded together.

        Without `frames` the vectors of columns are not kept, and memory does not grow with the length of a sound.
        `workers` threads open sounds ahead of their turn.
        """
        if batch < 1:
            raise RunError(f"batch {batch}: expected 1 window or more at a time")

        # Sounds that are not handed out yet, and their windows that are not encoded yet.
        builders: deque[EmbeddingBuilder] = deque()
        pending: list[tuple[EmbeddingBuilder, SoundWindow]] = []
        for opener in open_ahead(openers, workers):
            builder = EmbeddingBuilder(frames)
            builders.append(builder)

            # Cut the sound into windows; a batch is encoded as soon as it is full.
            try:
                sound = opener()
                for window in cut_windows(sound.mels, self.grid, self._hop_columns):
                    pending.append((builder, window))
                    builder.expected_windows += 1
                    if len(pending) == batch:
                        self._encode_windows(pending)
                        pending = []
                builder.seconds = sound.seconds
                if not builder.expected_windows:
                    shortfall = f"{sound.seconds:.4f} s are less than one frame"
                    raise AudioError("too_short", f"{shortfall}; give a longer sound")
            except AudioError as error:
                builder.failure = error
            builder.is_open = False

            # Hand out the sounds whose windows are all encoded, in order.
            while builders and builders[0].is_done:
                yield self._embedding_or_error(builders.popleft())

        # The last batch may be smaller.
        if pending:
            self._encode_windows(pending)
        for builder in builders:
            yield self._embedding_or_error(builder)

    def file_opener(self, locator: SoundLocator) -> Callable[[], SoundStream]:
        """Return the function that opens a file."""

        def open_file() -> SoundStream:
            waves = stream_wave(locator, self.sample_rate_hz, policy=EMBEDDING_POLICY)
            return SoundStream.from_waves(waves, self.mel)

        return open_file

    def row_opener(self, store: FeatureStore, row: int) -> Callable[[], SoundStream]:
        """Return the function that opens a row of a store."""

        def open_row() -> SoundStream:
            frames = int(store.n_frames_N[row])
            stored_TF = store.read(np.array([row]))[0, :frames]
            mel_TF = torch.from_numpy(store.to_log_mel(stored_TF))

            # The sound ended here, or less than a hop later.
            seconds = self.mel.samples_of(frames) / self.sample_rate_hz
            return SoundStream([mel_TF], seconds)

        return open_row

    def _array_opener(self, wave_S: np.ndarray, rate_hz: int, skip_frames: int) -> Callable[[], SoundStream]:
        """Return the function that opens a wave at its frame number `skip_frames`."""

        def open_array() -> SoundStream:
            if len(wave_S) and not peak_magnitude(wave_S) <= MAX_USABLE_PEAK:
                raise AudioError("non_finite", f"{describe_bad_samples(wave_S)}; expected floats in [-1, 1]")

            # The wave in pieces, at the encoder's rate.
            starts = range(0, len(wave_S), ARRAY_PIECE_SAMPLES)
            pieces: Iterator[np.ndarray] = (wave_S[start : start + ARRAY_PIECE_SAMPLES] for start in starts)
            if rate_hz != self.sample_rate_hz:
                pieces = resample_blocks(pieces, rate_hz, self.sample_rate_hz)

            sound = SoundStream.from_waves(pieces, self.mel)
            sound.mels = drop_frames(sound.mels, skip_frames)
            return sound

        return open_array

    @torch.inference_mode()
    def _encode_windows(self, pending: Sequence[tuple["EmbeddingBuilder", SoundWindow]]) -> None:
        """Encode windows, and give each sound the columns that its windows own."""
        # Normalised views, padded with zeros to the encoder's length.
        mel_NTF = torch.zeros(len(pending), self.grid.frames, self.grid.bands)
        n_frames_N = torch.tensor([len(window.mel_TF) for _, window in pending])
        for view_TF, (_, window) in zip(mel_NTF, pending, strict=True):
            normalised_TF = (window.mel_TF - self.pretrained.mean) / self.pretrained.std
            view_TF[: len(window.mel_TF)] = normalised_TF

        # Neighbouring windows overlap: each gives its own columns alone.
        columns_NCD = self.encode_columns(mel_NTF, n_frames_N).cpu()
        for (builder, window), columns_CD in zip(pending, columns_NCD, strict=True):
            first = window.first_column - window.start_column
            end = window.end_column - window.start_column
            builder.add_columns(columns_CD[first:end])

    def encode_columns(self, mel_NTF: Tensor, n_frames_N: Tensor) -> Tensor:
        """Return one vector for each time column of normalised views, `NCD`; those past a view's frames are void."""
        valid_NP = valid_token_mask(n_frames_N, self.grid)

        # Full windows need no mask.
        mask_NP = None if valid_NP.all() else valid_NP.to(self.device)
        tokens_NPD = self.layer.encode_tokens(self.encoder, mel_NTF.to(self.device), mask_NP)
        return pool_columns(tokens_NPD, self.grid.rows, self.pooling)

    def _embedding_or_error(self, builder: "EmbeddingBuilder") -> Embedding | AudioError:
        if builder.failure is not None:
            return builder.failure
        return builder.build_embedding(self.first_centre_ms, self.column_ms)

    def _interleave_shifts(self, results_by_shift: Sequence[Sequence[Embedding | AudioError]]) -> Embeddings:
        """Return the frames of all shifts in the order of their times, with the unshifted sound's clip vector."""
        unshifted = require_embeddings(results_by_shift[0], self.width)
        interleaved = []
        for index, base in enumerate(unshifted.per_sound):
            frames = [base.frames_TD]
            times_ms = [base.times_ms_T]
            for shift, results in enumerate(results_by_shift[1:], start=1):
                shifted = results[index]

                # The sound may end before the shifted one has a frame.
                if isinstance(shifted, AudioError) or base.seconds * 1e3 < self.first_centre_ms:
                    continue

                # The times of the shifted sound count from its own beginning.
                later_ms_T = shifted.times_ms_T + self.column_ms * shift / len(results_by_shift)
                inside_T = later_ms_T <= base.seconds * 1e3
                frames.append(shifted.frames_TD[inside_T])
                times_ms.append(later_ms_T[inside_T])

            times_ms_T, order_T = torch.cat(times_ms).sort()
            interleaved.append(replace(base, frames_TD=torch.cat(frames)[order_T], times_ms_T=times_ms_T))
        return Embeddings(per_sound=tuple(interleaved), width=self.width)


class EmbeddingBuilder:
    """The embedding of one sound in the making; `is_open` until the last window of the sound has been cut."""

    def __init__(self, keep_frames: bool) -> None:
        # The sound, and how many of its windows were cut and encoded.
        self.is_open = True
        self.seconds = 0.0
        self.failure: AudioError | None = None
        self.expected_windows = 0
        self.received_windows = 0

        # The columns of these windows: their sum in float64, and each one where frames are wanted.
        self.keep_frames = keep_frames
        self.column_count = 0
        self.sum_D: Tensor | float = 0.0
        self.frames: list[Tensor] = []

    @property
    def is_done(self) -> bool:
        """Whether nothing more can come: all windows are encoded, or the sound has failed."""
        if self.is_open:
            return False
        return self.failure is not None or self.received_windows == self.expected_windows

    def add_columns(self, columns_CD: Tensor) -> None:
        """Add the columns of the next window."""
        self.received_windows += 1
        self.column_count += len(columns_CD)
        self.sum_D = self.sum_D + columns_CD.double().sum(0)
        if self.keep_frames:
            self.frames.append(columns_CD)

    def build_embedding(self, first_centre_ms: float, column_ms: float) -> Embedding:
        """Return the embedding, given the centre of the first column and the time from one column to the next."""
        clip_D = torch.as_tensor(self.sum_D / self.column_count).float()

        # Frames whose centre lies inside the sound; none where they were not kept.
        frames_TD = torch.cat([*self.frames, clip_D.new_zeros(0, len(clip_D))])
        times_ms_T = first_centre_ms + column_ms * torch.arange(len(frames_TD), dtype=torch.float64)
        inside_T = times_ms_T <= self.seconds * 1e3
        if self.keep_frames and not inside_T.any():
            # The sound ends before its first centre: one frame, at the middle of the sound.
            frames_TD = frames_TD[:1]
            times_ms_T = torch.tensor([self.seconds * 1e3 / 2], dtype=torch.float64)
        else:
            frames_TD = frames_TD[inside_T]
            times_ms_T = times_ms_T[inside_T]
        return Embedding(clip_D=clip_D, frames_TD=frames_TD, times_ms_T=times_ms_T, seconds=self.seconds)


def require_embeddings(results: Iterable[Embedding | AudioError], width: int) -> Embeddings:
    """Return the embeddings of all sounds; raises the AudioError of the first sound that could not be used."""
    embeddings = []
    for result in results:
        if isinstance(result, AudioError):
            raise result
        embeddings.append(result)
    return Embeddings(per_sound=tuple(embeddings), width=width)


def float_waves_BS(wave_BS: np.ndarray | Tensor) -> Tensor:
    """Return waves `[B, S]` or `[S]` as float32 `[B, S]` on the CPU; RunError where they are no mono floats."""
    if not isinstance(wave_BS, Tensor):
        wave_BS = torch.from_numpy(np.ascontiguousarray(wave_BS))

    # Nobody can know the full scale of whole numbers.
    if not wave_BS.is_floating_point():
        raise RunError(
            f"audio of {wave_BS.dtype}: expected floats in [-1, 1]; divide 16-bit samples by 32768"
        )

    if wave_BS.ndim == 1:
        wave_BS = wave_BS[None]
    if wave_BS.ndim != 2:
        raise RunError(f"audio of shape {tuple(wave_BS.shape)}: expected [B, S] or [S], mono")
    return wave_BS.detach().to("cpu", torch.float32)


def cut_waves(wave_BS: Tensor, samples_B: Sequence[int] | None) -> list[np.ndarray]:
    """Return each wave up to its length in samples, all of it by default; RunError where the lengths do not fit."""
    waves, samples = wave_BS.shape
    lengths = [samples] * waves if samples_B is None else list(samples_B)
    if len(lengths) != waves or not all(0 <= length <= samples for length in lengths):
        raise RunError(
            f"samples_B {lengths[:8]}: expected a length for each of {waves} waves, of at most {samples} samples"
        )
    return [wave_S[:length].numpy() for wave_S, length in zip(wave_BS, lengths, strict=True)]


def pool_columns(tokens_NPD: Tensor, rows: int, pooling: PoolingName) -> Tensor:
    """Return each time column of each view pooled by itself, `NCD`, as the pooling of a clip of one column."""
    columns_MRD = tokens_NPD.unflatten(1, (-1, rows)).flatten(0, 1)
    clip_M = torch.arange(len(columns_MRD), device=columns_MRD.device)
    valid_MR = torch.ones(columns_MRD.shape[:2], dtype=torch.bool, device=columns_MRD.device)
    pooled_MD = pool_tokens(columns_MRD, valid_MR, clip_M, clips=len(columns_MRD), rows=rows, pooling=pooling)
    return pooled_MD.unflatten(0, (len(tokens_NPD), -1))
