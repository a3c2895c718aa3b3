"""Embedder: a frozen encoder that computes embeddings of sounds of any length and sample rate, window by window."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ajepa.embed.embedding import (
    Embedding,
    EmbeddingBuilder,
    Embeddings,
    collect_embeddings,
    describe_errors,
    require_embeddings,
)
from ajepa.embed.module import EncoderModule
from ajepa.embed.predictor import Predictions, Predictor, refuse_errors
from ajepa.embed.pretrained import LAST_CHECKPOINT, PretrainedEncoder, load_pretrained
from ajepa.embed.sound_inputs import (
    ArraySound,
    Sound,
    check_rate_hz,
    cut_waves,
    float_waves_BS,
    read_sound_inputs,
)
from ajepa.embed.windows import (
    SoundStream,
    SoundWindow,
    column_ms,
    cut_windows,
    drop_frames,
    first_centre_ms,
    open_ahead,
    window_hop_columns,
)
from ajepa.model.patches import repeat_last_frame, valid_token_mask
from ajepa.model.pooling import VECTORS_PER_CLIP, EncoderLayer, PoolingName, column_pooling, pool_columns
from ajepa.training.devices import pick_device
from ajepa.training.feature_choice import resolve_features
from pipeline.audio.decode import AudioPolicy, resample_blocks, stream_wave
from pipeline.audio.levels import SampleRange, describe_bad_samples
from pipeline.audio.sources import SoundLocator
from pipeline.errors import AudioError, RunError
from pipeline.messages import print_to_stderr
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


def load(
    location: str | Path,
    *,
    at: str | int = LAST_CHECKPOINT,
    device: str = "auto",
    pooling: PoolingName | None = None,
    layer: EncoderLayer | str | None = None,
    overlap: float = WINDOW_OVERLAP,
) -> "Embedder":
    """Load the encoder of a run folder, an exported folder or file, or ORG/NAME[@REVISION] of the Hugging Face hub.

    `at` is the checkpoint of a run: last, best (by probe), init (random, before the first step), or the step of a kept
    checkpoint. The other keywords are those of `Embedder`. RunError if the location has no encoder, the files are
    damaged, or the checkpoint or device does not exist. A line says so where no probe has chosen pooling and layer.
    """
    loaded = Embedder(
        load_pretrained(location, at), device=device, pooling=pooling, layer=layer, overlap=overlap
    )
    if loaded.features.is_fallback:
        print_to_stderr(f"{location}: vectors are {loaded.features.description}")
    return loaded


class Embedder:
    """A frozen encoder that embeds sounds; `ajepa.load` makes one.

    Sounds are mixed to mono, resampled to `sample_rate_hz` by soxr, transformed to the log-mel that the encoder was
    trained on, and normalised with the mean and deviation of its run. Sounds longer than the encoder's view are encoded
    in windows that share `overlap` of their length (0: windows do not overlap, as in `evaluate`). The last frame of a
    sound is repeated to the end of its column. Columns past it are not attended to and are in no mean, so the other
    sounds of a batch have no influence.
    Everything is computed in float32; results differ in the last bits between devices and batch sizes.

    features  pooling and layer, and why they are these. Unless others are asked for, they are those that probes found
              best when the run was trained, or else a fixed fallback (`resolve_features`)

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
        pooling: PoolingName | None = None,
        layer: EncoderLayer | str | None = None,
        overlap: float = WINDOW_OVERLAP,
    ) -> None:
        # The network, and its input features.
        self.pretrained = pretrained
        self.device = pick_device(device)
        self.encoder = pretrained.build_encoder(self.device)
        self.grid = pretrained.spec.grid
        self.mel = pretrained.mel

        # The layer and the pooling that turn tokens into vectors.
        self.features = resolve_features(pretrained.spec, pretrained.features, pooling, layer)
        self.pooling: PoolingName = self.features.pooling
        self.layer = self.features.layer
        self.overlap = overlap
        self._hop_columns = window_hop_columns(self.grid, overlap)

    def __repr__(self) -> str:
        origin = f"{self.pretrained.recipe_name}, step {self.pretrained.origin.get('step')}"
        return (
            f"Embedder({origin}, model {self.pretrained.model_id}, {self.sample_rate_hz} Hz -> {self.width} values: "
            f"{self.features.description}; {self.device})"
        )

    @cached_property
    def module(self) -> EncoderModule:
        """The encoder as a network of its own, from log-mel to tokens; it shares its weights with this embedder."""
        return EncoderModule(self.pretrained, self.encoder, self.features, self._hop_columns)

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
        return column_ms(self.grid, self.mel)

    @property
    def first_centre_ms(self) -> float:
        """The middle of the first column in milliseconds: half-way between its first and its last sample."""
        return first_centre_ms(self.grid, self.mel)

    def embed(
        self,
        sounds: Sound | Sequence[Sound],
        *,
        rate_hz: float | None = None,
        errors: Literal["row", "raise"] = "row",
        batch: int = WINDOWS_PER_BATCH,
        workers: int = 2,
    ) -> Embeddings:
        """Return the embeddings of sounds: a path or an array is one sound, a list of them several, a folder all in it.

        Files may have any format and length. An array is [samples], [channels, samples] or [samples, channels]: the
        shorter axis is the channels, which are mixed to mono. Floats are in [-1, 1]; int16, int32 and uint8 are scaled.
        `rate_hz` is the rate of the arrays. A value of a Hugging Face audio column (`array`, `sampling_rate`) has its
        own.

        A sound that cannot be used gets a row with its error and a vector of nan, and a line says so
        (`Embeddings.errors`); if all fail, or with errors="raise", the first AudioError is raised. `batch` windows are
        encoded per forward pass; `workers` threads open sounds in advance. RunError for what is no sound.
        """
        inputs, names = read_sound_inputs(sounds, rate_hz)
        refuse_other_errors(errors)
        results = self.iterate_embeddings(self._sound_openers(inputs), batch=batch, workers=workers)
        if errors == "raise":
            return require_embeddings(results, self.width, names)
        found = collect_embeddings(results, width=self.width, frame_width=self.frame_width, names=names)
        if found.errors:
            print_to_stderr(f"{describe_errors(found)}; the row is nan, see .errors")
        return found

    def predict(
        self,
        sounds: Sound | Sequence[Sound],
        *,
        rate_hz: float | None = None,
        hop_seconds: float | None = None,
        errors: Literal["row", "raise"] = "row",
        batch: int = WINDOWS_PER_BATCH,
        workers: int = 2,
    ) -> Predictions:
        """Return the scores of a fine-tuned classifier for sounds: a path or a wave is one sound, a list several.

        Scores are those of softmax if every clip of the run has one class, else of sigmoid. With `hop_seconds` also of
        a stretch every so many seconds (`Predictor.predict_openers`). Sounds and `rate_hz` are those of `embed`. A
        sound that cannot be used has its error and scores of nan, and a line says so (`Predictions.errors`); if all
        fail, or with errors="raise", the first AudioError is raised. RunError if the model was not fine-tuned.
        """
        inputs, names = read_sound_inputs(sounds, rate_hz)
        refuse_other_errors(errors)
        openers = self._sound_openers(inputs)
        found = self.predictor.predict_openers(openers, hop_seconds=hop_seconds, batch=batch, workers=workers)
        predictions = Predictions(
            per_sound=tuple(refuse_errors(found, errors)),
            class_names=self.predictor.class_names,
            names=tuple(names),
        )
        if predictions.errors:
            print_to_stderr(f"{describe_errors(predictions)}; the row is nan, see .errors")
        return predictions

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes that `predict` scores; RunError if the model was not fine-tuned."""
        return self.predictor.class_names

    @cached_property
    def predictor(self) -> Predictor:
        """The classifier of a fine-tuned model; RunError if there is none."""
        return Predictor.from_pretrained(self.pretrained, self.device)

    def _sound_openers(self, inputs: Sequence[SoundLocator | ArraySound]) -> list[Callable[[], SoundStream]]:
        """Return an opener for each file or wave."""
        return [
            self._array_opener(given.wave_S, given.rate_hz, 0)
            if isinstance(given, ArraySound)
            else self.file_opener(given)
            for given in inputs
        ]

    def embed_audio(
        self,
        wave_BS: np.ndarray | Tensor,
        rate_hz: float,
        *,
        samples_B: Sequence[int] | None = None,
        shifts: int = 1,
        batch: int = WINDOWS_PER_BATCH,
    ) -> Embeddings:
        """Return the embeddings of a batch of mono waves, `[B, S]` or `[S]`; integers are scaled as in `embed`.

        Only the first `samples_B` samples of each wave are embedded; by default all. With `shifts` = K (a divisor of
        the grid's patch_frames), every sound is encoded K times, each time starting 1/K of a column later. The result
        then has K frames per column; the clip vector is the same.
        AudioError if a wave is shorter than one frame of the spectrogram, not finite or absurdly loud; RunError if
        the shapes, lengths, rate or shifts are impossible.
        """
        # Check the arguments.
        wave_BS = float_waves_BS(wave_BS)
        whole_rate_hz = check_rate_hz(rate_hz)
        if shifts < 1 or self.grid.patch_frames % shifts:
            raise RunError(f"shifts {shifts}: expected a divisor of {self.grid.patch_frames}")
        waves = cut_waves(wave_BS, samples_B)

        # Embed all sounds once for each shift.
        shift_frames = self.grid.patch_frames // shifts
        results_by_shift = []
        for shift in range(shifts):
            openers = [self._array_opener(wave_S, whole_rate_hz, shift_frames * shift) for wave_S in waves]
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
            if not len(wave_S):
                raise AudioError("too_short", "the array is empty; expected samples")
            if not SampleRange.from_wave(wave_S).is_usable:
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


def refuse_other_errors(errors: str) -> None:
    """Raise RunError for a value of `errors` that there is not."""
    if errors not in ("row", "raise"):
        raise RunError(f"errors must be row or raise, got {errors!r}")
