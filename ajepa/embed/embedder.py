"""Embedder: a frozen encoder that computes embeddings of sounds of any length and sample rate, window by window."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ajepa.embed.predictor import Predictions, Predictor, refuse_errors
from ajepa.embed.pretrained import LAST_CHECKPOINT, PretrainedEncoder, load_pretrained
from ajepa.embed.windows import (
    SoundStream,
    SoundWindow,
    cut_windows,
    drop_frames,
    open_ahead,
    window_hop_columns,
)
from ajepa.model.patches import repeat_last_frame, valid_token_mask
from ajepa.model.pooling import (
    DEFAULT_POOLING,
    LAST_LAYER,
    VECTORS_PER_CLIP,
    EncoderLayer,
    PoolingName,
    pool_tokens,
    pooled_deviation,
)
from ajepa.training.devices import pick_device
from pipeline.audio.decode import AudioPolicy, resample_blocks, stream_wave
from pipeline.audio.levels import SampleRange, describe_bad_samples
from pipeline.audio.sources import SoundLocator
from pipeline.errors import AudioError, RunError
from pipeline.store.feature_store import FeatureStore

# The share of a window that the next window repeats. With one half, every column of a long sound has a quarter of a
# window of context on either side, or the sound ends there.
WINDOW_OVERLAP = 0.5

# The number of windows that are encoded in one forward pass.
WINDOWS_PER_BATCH = 32

# An array is resampled and transformed to log-mel in pieces of this many samples.
ARRAY_PIECE_SAMPLES = 2**20

# Checks on files that are embedded: silent files are accepted, and any length.
EMBEDDING_POLICY = AudioPolicy(keep_silent=True, max_seconds=float("inf"))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Embedding:
    """The vectors of one sound, float32 on the CPU.

    clip_D      mean of the vectors of all time columns that begin inside the sound; pooled by `moments` it is followed
                by their standard deviation
    frames_TD   one vector for each column whose centre is inside the sound; at least one
    times_ms_T  times of these centres in milliseconds, float64, evenly spaced. A sound that ends before the first
                centre has one frame, at the middle of the sound
    seconds     length of the sound in seconds
    """

    clip_D: Tensor
    frames_TD: Tensor
    times_ms_T: Tensor
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Embeddings:
    """The embeddings of several sounds: an `Embedding` for each, and the clip vectors together as `clips_BD`."""

    per_sound: tuple[Embedding, ...]
    width: int

    @property
    def clips_BD(self) -> Tensor:
        """One vector per sound, float32 on the CPU; shape `[0, D]` if there are no sounds."""
        if not self.per_sound:
            return torch.zeros(0, self.width)
        return torch.stack([embedding.clip_D for embedding in self.per_sound])

    def __len__(self) -> int:
        return len(self.per_sound)

    def __getitem__(self, index: int) -> Embedding:
        return self.per_sound[index]


def load(location: str | Path, *, at: str | int = LAST_CHECKPOINT, **options: Any) -> "Embedder":
    """Load the encoder of a run folder, an exported folder or file, or ORG/NAME[@REVISION] of the Hugging Face hub.

    `at` is the checkpoint of a run: last, best (by probe), init (random, before the first step), or the step of a kept
    checkpoint. The other keywords are those of `Embedder`: device, pooling, layer, overlap. RunError if the location
    has no encoder, the files are damaged, or the checkpoint or device does not exist.
    """
    return Embedder(load_pretrained(location, at), **options)


class Embedder:
    """A frozen encoder that embeds sounds; `ajepa.load` makes one.

    Sounds are mixed to mono, resampled to `sample_rate_hz` by soxr, transformed to the log-mel that the encoder was
    trained on, and normalised with the mean and deviation of its run. Sounds longer than the encoder's view are encoded
    in windows that share `overlap` of their length (0: windows do not overlap, as in `evaluate`). The last frame of a
    sound is repeated to the end of its column. Columns past it are not attended to and are in no mean, so the other
    sounds of a batch have no influence.
    Everything is computed in float32; results differ in the last bits between devices and batch sizes.

    pooling  `mean`: mean of the tokens of a column; `frequency`: rows concatenated, `grid.rows` times as wide;
             `moments`: frames as by `frequency`, and the vector of a clip is their mean and their standard deviation,
             `2 grid.rows` times as wide
    layer    the layer whose output is used (`pooling.EncoderLayer`, or its name: last, mean-4, block-2, concat-all)
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
        # The network, and its input features.
        self.pretrained = pretrained
        self.device = pick_device(device)
        self.encoder = pretrained.build_encoder(self.device)
        self.grid = pretrained.spec.grid
        self.mel = pretrained.mel

        # The layer and the pooling that turn tokens into vectors.
        self.pooling = pooling
        self.layer = EncoderLayer.from_name(layer) if isinstance(layer, str) else layer
        self.layer.refuse_missing_blocks(pretrained.spec.depth)
        self.overlap = overlap
        self._hop_columns = window_hop_columns(self.grid, overlap)

    @property
    def sample_rate_hz(self) -> int:
        """The sample rate of the front end in Hz; all sounds are resampled to it."""
        return self.mel.sample_rate_hz

    @property
    def width(self) -> int:
        """The number of values of the vector of a clip."""
        return self._token_width * VECTORS_PER_CLIP[self.pooling](self.grid.rows)

    @property
    def frame_width(self) -> int:
        """The number of values of the vector of a column; half of `width` with pooling `moments`."""
        return self._token_width * VECTORS_PER_CLIP[column_pooling(self.pooling)](self.grid.rows)

    @property
    def _token_width(self) -> int:
        spec = self.pretrained.spec
        return spec.width * self.layer.vectors_per_token(spec.depth)

    @property
    def column_ms(self) -> float:
        """The time between the centres of adjacent frames of an embedding, in milliseconds."""
        return self.grid.patch_frames * self.mel.hop_samples / self.sample_rate_hz * 1e3

    @property
    def first_centre_ms(self) -> float:
        """The middle of the first column in milliseconds: half-way between its first and its last sample."""
        reach_samples = self.mel.window_samples if self.mel.framing == "kaldi" else 0
        samples = (self.grid.patch_frames - 1) * self.mel.hop_samples + reach_samples
        return samples / 2 / self.sample_rate_hz * 1e3

    def embed(
        self, sounds: str | Path | Sequence[str | Path], *, batch: int = WINDOWS_PER_BATCH, workers: int = 2
    ) -> Embeddings:
        """Return the embeddings of files of any format and length; AudioError names the first unusable file.

        `batch` windows are encoded per forward pass; `workers` threads decode files in advance.
        """
        paths = [sounds] if isinstance(sounds, str | Path) else sounds
        locators = [SoundLocator.from_path(Path(path)) for path in paths]
        results = self.iterate_embeddings(map(self.file_opener, locators), batch=batch, workers=workers)
        return require_embeddings(results, self.width)

    def predict(
        self,
        sounds: str | Path | np.ndarray | Tensor | Sequence[str | Path | np.ndarray | Tensor],
        *,
        rate_hz: int | None = None,
        hop_seconds: float | None = None,
        errors: Literal["row", "raise"] = "row",
        batch: int = WINDOWS_PER_BATCH,
        workers: int = 2,
    ) -> Predictions:
        """Return the scores of a fine-tuned classifier for sounds: a path or a wave is one sound, a list several.

        Scores are those of softmax if every clip of the run has one class, else of sigmoid. With `hop_seconds` also of
        a stretch every so many seconds (`Predictor.predict_openers`). `rate_hz` is the rate of waves, `[S]`. A sound
        that cannot be used has its error and scores of nan; if all fail, or with errors="raise", the first AudioError
        is raised. RunError if the model was not fine-tuned.
        """
        openers = self._sound_openers(sounds, rate_hz)
        found = self.predictor.predict_openers(openers, hop_seconds=hop_seconds, batch=batch, workers=workers)
        per_sound = tuple(refuse_errors(found, errors))
        return Predictions(per_sound=per_sound, class_names=self.predictor.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes that `predict` scores; RunError if the model was not fine-tuned."""
        return self.predictor.class_names

    @cached_property
    def predictor(self) -> Predictor:
        """The classifier of a fine-tuned model; RunError if there is none."""
        return Predictor.from_pretrained(self.pretrained, self.device)

    def _sound_openers(
        self,
        sounds: str | Path | np.ndarray | Tensor | Sequence[str | Path | np.ndarray | Tensor],
        rate_hz: int | None,
    ) -> list[Callable[[], SoundStream]]:
        """Return an opener for each sound; RunError for waves without a rate."""
        openers = []
        for sound in [sounds] if isinstance(sounds, str | Path | np.ndarray | Tensor) else sounds:
            if isinstance(sound, str | Path):
                openers.append(self.file_opener(SoundLocator.from_path(Path(sound))))
                continue
            if not rate_hz:
                raise RunError("a wave needs its rate in Hz: predict(wave, rate_hz=44100)")
            for wave_S in cut_waves(float_waves_BS(sound), None):
                openers.append(self._array_opener(wave_S, rate_hz, 0))
        return openers

    def embed_audio(
        self,
        wave_BS: np.ndarray | Tensor,
        rate_hz: int,
        *,
        samples_B: Sequence[int] | None = None,
        shifts: int = 1,
        batch: int = WINDOWS_PER_BATCH,
    ) -> Embeddings:
        """Return the embeddings of mono waves `[B, S]` or `[S]`, floats in [-1, 1].

        Only the first `samples_B` samples of each wave are embedded; by default all. With `shifts` = K (a divisor of
        the grid's patch_frames), every sound is encoded K times, each time starting 1/K of a column later. The result
        then has K frames per column; the clip vector is the same.
        AudioError if a wave is shorter than one frame of the spectrogram, not finite or absurdly loud; RunError if
        the shapes, lengths, rate or shifts are impossible.
        """
        # Check the arguments.
        wave_BS = float_waves_BS(wave_BS)
        if not rate_hz > 0:
            raise RunError(f"audio at {rate_hz} Hz: expected a rate above 0")
        if shifts < 1 or self.grid.patch_frames % shifts:
            raise RunError(f"shifts {shifts}: expected a divisor of {self.grid.patch_frames}")
        waves = cut_waves(wave_BS, samples_B)

        # Embed all sounds once for each shift.
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
        """Yield, in order, each sound's embedding or its AudioError; windows of several sounds are encoded together.

        Without `frames` the vectors of columns are not kept, and memory does not grow with the length of a sound.
        `workers` threads open sounds in advance.
        """
        if batch < 1:
            raise RunError(f"batch {batch}: expected 1 window or more at a time")

        # Sounds that are not yielded yet, and their windows that are not encoded yet.
        builders: deque[EmbeddingBuilder] = deque()
        pending: list[tuple[EmbeddingBuilder, SoundWindow]] = []
        for opener in open_ahead(openers, workers):
            builder = EmbeddingBuilder(self.pooling, keep_frames=frames)
            builders.append(builder)

            # Cut the sound into windows, and encode a batch as soon as it is full.
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

            # Yield, in order, the sounds whose windows are all encoded.
            while builders and builders[0].is_done:
                yield self._embedding_or_error(builders.popleft())

        # Encode the last batch, which may be smaller.
        if pending:
            self._encode_windows(pending)
        for builder in builders:
            yield self._embedding_or_error(builder)

    def file_opener(self, locator: SoundLocator) -> Callable[[], SoundStream]:
        """Return a function that opens the file as a stream."""

        def open_file() -> SoundStream:
            waves = stream_wave(locator, self.sample_rate_hz, policy=EMBEDDING_POLICY)
            return SoundStream.from_waves(waves, self.mel)

        return open_file

    def row_opener(self, store: FeatureStore, row: int) -> Callable[[], SoundStream]:
        """Return a function that opens a row of a store as a stream."""

        def open_row() -> SoundStream:
            frames = int(store.n_frames_N[row])
            stored_TF = store.read(np.array([row]))[0, :frames]
            mel_TF = torch.from_numpy(store.to_log_mel(stored_TF))

            # The length of the sound follows from its frames; the true end is here or less than a hop later.
            seconds = self.mel.samples_of(frames) / self.sample_rate_hz
            return SoundStream([mel_TF], seconds)

        return open_row

    def _array_opener(self, wave_S: np.ndarray, rate_hz: int, skip_frames: int) -> Callable[[], SoundStream]:
        """Return a function that opens a wave as a stream without its first `skip_frames` frames."""

        def open_array() -> SoundStream:
            if len(wave_S) and not SampleRange.from_wave(wave_S).is_usable:
                raise AudioError("non_finite", f"{describe_bad_samples(wave_S)}; expected floats in [-1, 1]")

            # Resample the wave to the encoder's rate, in pieces.
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
        """Encode windows, and add to each sound the columns that its windows own."""
        # Normalise the views; shorter ones end in zeros, which `encode_columns` replaces.
        mel_NTF = torch.zeros(len(pending), self.grid.frames, self.grid.bands)
        n_frames_N = torch.tensor([len(window.mel_TF) for _, window in pending])
        for view_TF, (_, window) in zip(mel_NTF, pending, strict=True):
            normalised_TF = (window.mel_TF - self.pretrained.mean) / self.pretrained.std
            view_TF[: len(window.mel_TF)] = normalised_TF

        # Windows overlap: each window contributes only the columns that it owns.
        columns_NCD = self.encode_columns(mel_NTF, n_frames_N).cpu()
        for (builder, window), columns_CD in zip(pending, columns_NCD, strict=True):
            first = window.first_column - window.start_column
            end = window.end_column - window.start_column
            builder.add_columns(columns_CD[first:end])

    def encode_columns(self, mel_NTF: Tensor, n_frames_N: Tensor) -> Tensor:
        """Return one vector for each time column of normalised views, `NCD`; those of padding are meaningless.

        Frames past the end of a sound are not read: its last frame is repeated (`repeat_last_frame`).
        """
        mel_NTF = repeat_last_frame(mel_NTF, n_frames_N)
        valid_NP = valid_token_mask(n_frames_N, self.grid)

        # If all windows are full, attention needs no mask.
        mask_NP = None if valid_NP.all() else valid_NP.to(self.device)
        tokens_NPD = self.layer.encode_tokens(self.encoder, mel_NTF.to(self.device), mask_NP)
        return pool_columns(tokens_NPD, self.grid.rows, column_pooling(self.pooling))

    def _embedding_or_error(self, builder: "EmbeddingBuilder") -> Embedding | AudioError:
        if builder.failure is not None:
            return builder.failure
        return builder.build_embedding(self.first_centre_ms, self.column_ms)

    def _interleave_shifts(self, results_by_shift: Sequence[Sequence[Embedding | AudioError]]) -> Embeddings:
        """Return embeddings with the frames of all shifts sorted by time, and the unshifted sound's clip vector."""
        unshifted = require_embeddings(results_by_shift[0], self.width)
        interleaved = []
        for index, base in enumerate(unshifted.per_sound):
            frames = [base.frames_TD]
            times_ms = [base.times_ms_T]
            for shift, results in enumerate(results_by_shift[1:], start=1):
                shifted = results[index]

                # A short sound may have no frame after the shift.
                if isinstance(shifted, AudioError) or base.seconds * 1e3 < self.first_centre_ms:
                    continue

                # The times of a shifted sound are relative to its own start: add the shift.
                later_ms_T = shifted.times_ms_T + self.column_ms * shift / len(results_by_shift)
                inside_T = later_ms_T <= base.seconds * 1e3
                frames.append(shifted.frames_TD[inside_T])
                times_ms.append(later_ms_T[inside_T])

            times_ms_T, order_T = torch.cat(times_ms).sort()
            interleaved.append(replace(base, frames_TD=torch.cat(frames)[order_T], times_ms_T=times_ms_T))
        return Embeddings(per_sound=tuple(interleaved), width=self.width)


class EmbeddingBuilder:
    """Collects the columns of one sound for its embedding; `is_open` until the last window of the sound is cut."""

    def __init__(self, pooling: PoolingName, *, keep_frames: bool) -> None:
        # The state of the sound, and the numbers of its windows that were cut and encoded.
        self.is_open = True
        self.seconds = 0.0
        self.failure: AudioError | None = None
        self.expected_windows = 0
        self.received_windows = 0

        # The columns of these windows: their sum and that of their squares in float64; every column if frames are kept.
        self.pooling = pooling
        self.keep_frames = keep_frames
        self.column_count = 0
        self.sum_D: Tensor | float = 0.0
        self.square_D: Tensor | float = 0.0
        self.frames: list[Tensor] = []

    @property
    def is_done(self) -> bool:
        """Whether the result is final: all windows are encoded, or the sound has failed."""
        if self.is_open:
            return False
        return self.failure is not None or self.received_windows == self.expected_windows

    def add_columns(self, columns_CD: Tensor) -> None:
        """Add the columns of the next window."""
        self.received_windows += 1
        self.column_count += len(columns_CD)
        exact_CD = columns_CD.double()
        self.sum_D = self.sum_D + exact_CD.sum(0)
        if self.pooling == "moments":
            self.square_D = self.square_D + exact_CD.square().sum(0)
        if self.keep_frames:
            self.frames.append(columns_CD)

    def build_embedding(self, first_centre_ms: float, column_ms: float) -> Embedding:
        """Return the embedding; the arguments are the centre of the first column and the time between columns."""
        # The vector of the clip: the mean over its columns, and their deviation if the pooling has it.
        mean_D = torch.as_tensor(self.sum_D / self.column_count)
        clip_D = mean_D.float()
        if self.pooling == "moments":
            variance_D = self.square_D / self.column_count - mean_D.square()
            clip_D = torch.cat((mean_D, pooled_deviation(variance_D))).float()

        # Select the frames whose centre is inside the sound; there are none if frames were not kept.
        frames_TD = torch.cat([*self.frames, clip_D.new_zeros(0, len(mean_D))])
        times_ms_T = first_centre_ms + column_ms * torch.arange(len(frames_TD), dtype=torch.float64)
        inside_T = times_ms_T <= self.seconds * 1e3
        if self.keep_frames and not inside_T.any():
            # The sound ends before the first centre: keep one frame, at the middle of the sound.
            frames_TD = frames_TD[:1]
            times_ms_T = torch.tensor([self.seconds * 1e3 / 2], dtype=torch.float64)
        else:
            frames_TD = frames_TD[inside_T]
            times_ms_T = times_ms_T[inside_T]
        return Embedding(clip_D=clip_D, frames_TD=frames_TD, times_ms_T=times_ms_T, seconds=self.seconds)


def require_embeddings(results: Iterable[Embedding | AudioError], width: int) -> Embeddings:
    """Return the embeddings of all sounds; raise the AudioError of the first sound that could not be used."""
    embeddings = []
    for result in results:
        if isinstance(result, AudioError):
            raise result
        embeddings.append(result)
    return Embeddings(per_sound=tuple(embeddings), width=width)


def float_waves_BS(wave_BS: np.ndarray | Tensor) -> Tensor:
    """Return waves `[B, S]` or `[S]` as float32 `[B, S]` on the CPU; RunError if they are not mono floats."""
    if not isinstance(wave_BS, Tensor):
        wave_BS = torch.from_numpy(np.ascontiguousarray(wave_BS))

    # The full scale of integer samples is not known.
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
    """Return each wave cut to its length in samples, by default uncut; RunError if the lengths do not fit the waves."""
    waves, samples = wave_BS.shape
    lengths = [samples] * waves if samples_B is None else list(samples_B)
    if len(lengths) != waves or not all(0 <= length <= samples for length in lengths):
        raise RunError(
            f"samples_B {lengths[:8]}: expected a length for each of {waves} waves, of at most {samples} samples"
        )
    return [wave_S[:length].numpy() for wave_S, length in zip(wave_BS, lengths, strict=True)]


def column_pooling(pooling: PoolingName) -> PoolingName:
    """Return the pooling of a single column: a column has no deviation over time."""
    return "frequency" if pooling == "moments" else pooling


def pool_columns(tokens_NPD: Tensor, rows: int, pooling: PoolingName) -> Tensor:
    """Return one vector for each time column of each view, `NCD`; a column is pooled like a clip of one column."""
    columns_MRD = tokens_NPD.unflatten(1, (-1, rows)).flatten(0, 1)
    clip_M = torch.arange(len(columns_MRD), device=columns_MRD.device)
    valid_MR = torch.ones(columns_MRD.shape[:2], dtype=torch.bool, device=columns_MRD.device)
    pooled_MD = pool_tokens(columns_MRD, valid_MR, clip_M, clips=len(columns_MRD), rows=rows, pooling=pooling)
    return pooled_MD.unflatten(0, (len(tokens_NPD), -1))
