"""Predictor: a fine-tuned classifier that scores sounds of any length, whole and over time, in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf

from ajepa.embed.embedding import describe_errors
from ajepa.embed.head import activation_of, apply_activation, names_of_classes
from ajepa.embed.pretrained import LAST_CHECKPOINT, PretrainedEncoder, load_export
from ajepa.embed.windows import SoundStream, open_ahead
from ajepa.model.classifier import Classifier
from ajepa.training.devices import pick_device
from ajepa.training.run import RECIPE_FILE
from ajepa.training.trained_run import TrainedRun
from pipeline.audio.decode import AudioPolicy, stream_wave
from pipeline.audio.mel_spec import MelSpec
from pipeline.audio.sources import SoundLocator
from pipeline.errors import AudioError, InputError, RunError
from pipeline.store.feature_store import FeatureStore

# The number of views that are scored in one forward pass.
VIEWS_PER_BATCH = 32

# Checks on files that are scored: silent files are accepted, and any length.
PREDICTION_POLICY = AudioPolicy(keep_silent=True, max_seconds=float("inf"))

SHOWN_CLASSES = 3  # in a short text


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prediction:
    """The scores of one sound, float32 in [0, 1], in the order of `class_names`.

    scores_C   of the whole sound; nan if it could not be used
    spans_W2   begin and end in seconds of each stretch, float64 `[W, 2]`; empty unless a hop was asked for
    scores_WC  scores of each stretch
    error      why the sound could not be used; None: it could
    """

    class_names: tuple[str, ...]
    scores_C: np.ndarray
    spans_W2: np.ndarray
    scores_WC: np.ndarray
    seconds: float | None
    error: AudioError | None = None

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """The names and scores of the classes with the highest scores, the highest first; none if it has an error."""
        return [] if self.error else top_classes(self.class_names, self.scores_C, count)

    def __repr__(self) -> str:
        if self.error:
            return f"Prediction({self.error})"
        shown = ", ".join(f"{name} {score:.2f}" for name, score in self.top(SHOWN_CLASSES))
        return f"Prediction({shown}; {len(self.class_names)} classes, {self.seconds:.1f} s)"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions:
    """The scores of several sounds, one `Prediction` each, and together as `scores_BC`.

    names   of the sounds, for messages: the path of a file
    """

    per_sound: tuple[Prediction, ...]
    class_names: tuple[str, ...]
    names: tuple[str, ...] = ()

    @property
    def scores_BC(self) -> np.ndarray:
        """One row per sound, float32; nan in the rows of sounds that could not be used."""
        rows = [prediction.scores_C for prediction in self.per_sound]
        return np.array(rows, np.float32).reshape(len(rows), len(self.class_names))

    @property
    def errors(self) -> Mapping[int, AudioError]:
        """Why sounds could not be used, by their number; empty if all could (`Embeddings.errors`)."""
        return {
            number: prediction.error
            for number, prediction in enumerate(self.per_sound)
            if prediction.error is not None
        }

    def top(self, count: int = 5) -> list[list[tuple[str, float]]]:
        """The best classes of every sound (`Prediction.top`)."""
        return [prediction.top(count) for prediction in self.per_sound]

    def __len__(self) -> int:
        return len(self.per_sound)

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.per_sound)

    def __getitem__(self, index: int) -> Prediction:
        return self.per_sound[index]

    def __repr__(self) -> str:
        failed = f", {describe_errors(self)}" if self.errors else ""
        return f"Predictions({len(self)} sounds, {len(self.class_names)} classes{failed})"


def top_classes(names: Sequence[str], scores_C: np.ndarray, count: int) -> list[tuple[str, float]]:
    """The names and scores of the `count` highest scores, the highest first; equal ones in the order of classes."""
    best_K = np.argsort(-scores_C, kind="stable")[:count]
    return [(names[place], float(scores_C[place])) for place in best_K]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictor:
    """A fine-tuned classifier, the front end of its input, and the names of its classes; `load_predictor` makes one.

    Sounds are resampled and transformed as for `Embedder`. A sound is cut into views of the model's length, one after
    the other; its logits are the mean over them, weighted by their frames, as in `ajepa-train evaluate`. Everything is
    computed in float32.

    frames      length of a view
    mean, std   of the run's training clips, which normalise log-mel
    activation  softmax: the scores of a sound sum to 1; sigmoid: each class by itself
    model_id    identifies weights and classes
    """

    model: Classifier
    mel: MelSpec
    frames: int
    mean: float
    std: float
    class_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    activation: str
    model_id: str
    device: torch.device

    @classmethod
    def from_pretrained(cls, pretrained: PretrainedEncoder, device: torch.device) -> "Predictor":
        """The classifier of an encoder with a head; RunError if it has none."""
        head = pretrained.head
        if head is None:
            raise RunError(
                f"model {pretrained.recipe_name}: was pre-trained and has no classes to predict; fine-tune it: "
                "ajepa-train finetune --store STORE --task own --from THIS-RUN --run NEW-RUN"
            )
        return cls(
            model=head.build_classifier(pretrained.spec, pretrained.weights, device),
            mel=pretrained.mel,
            frames=pretrained.spec.grid.frames,
            mean=pretrained.mean,
            std=pretrained.std,
            class_ids=head.class_ids,
            class_names=head.class_names,
            activation=head.activation,
            model_id=f"{pretrained.model_id}-{head.head_id}",
            device=device,
        )

    @classmethod
    def from_run(cls, trained: TrainedRun, device: torch.device) -> "Predictor":
        """The classifier of a fine-tuned run, of any kind of network."""
        run = trained.run
        class_ids = run.task_identity.classes
        model = trained.classifier(device)
        model.train(False)
        return cls(
            model=model,
            mel=trained.mel,
            frames=trained.finetune_recipe.model.frames,
            mean=run.identity.mean,
            std=run.identity.std,
            class_ids=class_ids,
            class_names=names_of_classes(class_ids),
            activation=activation_of(trained),
            model_id=trained.checkpoint_identity().sha256[:16],
            device=device,
        )

    @property
    def sample_rate_hz(self) -> int:
        """The sample rate of the front end; all sounds are resampled to it."""
        return self.mel.sample_rate_hz

    @property
    def frame_seconds(self) -> float:
        """Seconds from one frame to the next."""
        return self.mel.hop_samples / self.mel.sample_rate_hz

    def predict_openers(
        self,
        openers: Iterable[Callable[[], SoundStream]],
        *,
        hop_seconds: float | None = None,
        batch: int = VIEWS_PER_BATCH,
        workers: int = 0,
    ) -> Iterator[Prediction]:
        """Yield the prediction of each sound, in order; the views of several sounds go through the model together.

        With `hop_seconds` a stretch of the sound begins every so many seconds and is scored like a sound: it is as
        long as the hop, or as a view if that is longer, and the last one ends with the sound. `workers` threads open
        sounds in advance. InputError for a hop that is shorter than a frame.
        """
        hop_frames = self._hop_frames(hop_seconds)
        builders: deque[PredictionBuilder] = deque()
        pending: list[tuple[list[LogitMean], Tensor]] = []
        for opener in open_ahead(openers, workers):
            builder = PredictionBuilder(self.frames, hop_frames)
            builders.append(builder)

            # Cut the sound into views, and score a batch as soon as it is full.
            try:
                sound = opener()
                for view in builder.iterate_views(sound):
                    pending.append(view)
                    if len(pending) == batch:
                        self._score_views(pending)
                        pending = []
            except AudioError as error:
                builder.error = error
            builder.is_open = False
            while builders and builders[0].is_done:
                yield self._prediction(builders.popleft())

        # The last batch may be smaller.
        if pending:
            self._score_views(pending)
        for builder in builders:
            yield self._prediction(builder)

    def file_opener(self, locator: SoundLocator) -> Callable[[], SoundStream]:
        """Return a function that opens the file as a stream."""

        def open_file() -> SoundStream:
            waves = stream_wave(locator, self.sample_rate_hz, policy=PREDICTION_POLICY)
            return SoundStream.from_waves(waves, self.mel)

        return open_file

    def row_opener(self, store: FeatureStore, row: int) -> Callable[[], SoundStream]:
        """Return a function that opens a row of a store as a stream."""

        def open_row() -> SoundStream:
            frames = int(store.n_frames_N[row])
            mel_TF = torch.from_numpy(store.to_log_mel(store.read(np.array([row]))[0, :frames]))
            return SoundStream([mel_TF], self.mel.samples_of(frames) / self.sample_rate_hz)

        return open_row

    def _hop_frames(self, hop_seconds: float | None) -> int | None:
        if hop_seconds is None:
            return None
        hop_frames = round(hop_seconds / self.frame_seconds)
        if hop_frames < 1:
            raise InputError(
                f"hop_seconds {hop_seconds:g}: expected at least a frame, {self.frame_seconds:g} s; "
                f"a view is {self.frames * self.frame_seconds:.2f} s"
            )
        return hop_frames

    @torch.inference_mode()
    def _score_views(self, pending: Sequence[tuple[list["LogitMean"], Tensor]]) -> None:
        """Score views, and add their logits to the means that they belong to."""
        # Normalised, and padded with zeros to the model's length.
        n_frames_N = torch.tensor([len(mel_TF) for _, mel_TF in pending])
        mel_NTF = torch.stack(
            [
                nnf.pad((mel_TF - self.mean) / self.std, (0, 0, 0, self.frames - len(mel_TF)))
                for _, mel_TF in pending
            ]
        )
        logits_NC = self.model(mel_NTF.to(self.device), n_frames_N).float().cpu().double()
        for (means, mel_TF), logits_C in zip(pending, logits_NC, strict=True):
            for mean in means:
                mean.add(logits_C, len(mel_TF))

    def _prediction(self, builder: "PredictionBuilder") -> Prediction:
        classes = len(self.class_ids)
        if builder.error is not None:
            return Prediction(
                class_names=self.class_names,
                scores_C=np.full(classes, np.nan, np.float32),
                spans_W2=np.zeros((0, 2)),
                scores_WC=np.zeros((0, classes), np.float32),
                seconds=None,
                error=builder.error,
            )
        spans = [
            (start * self.frame_seconds, min(end * self.frame_seconds, builder.seconds))
            for start, end in builder.spans
        ]
        if spans:
            spans[-1] = (spans[-1][0], builder.seconds)
        stretches = [self._scores(mean) for mean in builder.stretch_means]
        return Prediction(
            class_names=self.class_names,
            scores_C=self._scores(builder.sound_mean),
            spans_W2=np.array(spans, np.float64).reshape(-1, 2),
            scores_WC=np.array(stretches, np.float32).reshape(-1, classes),
            seconds=builder.seconds,
        )

    def _scores(self, mean: "LogitMean") -> np.ndarray:
        logits_C = (mean.sum_C / mean.frames).float()
        scores_C: np.ndarray = apply_activation(logits_C, self.activation).numpy()
        return scores_C


@dataclass(kw_only=True, slots=True)
class LogitMean:
    """The mean of the logits of views, weighted by their frames, while they come in."""

    sum_C: Tensor = field(default_factory=lambda: torch.zeros(()))
    frames: int = 0

    def add(self, logits_C: Tensor, frames: int) -> None:
        self.sum_C = self.sum_C + logits_C * frames
        self.frames += frames


class PredictionBuilder:
    """Cuts one sound into views, and collects their logits: for the whole sound and for each stretch of it."""

    def __init__(self, view_frames: int, hop_frames: int | None) -> None:
        self.view_frames = view_frames
        self.hop_frames = hop_frames
        self.is_open = True
        self.seconds = 0.0
        self.error: AudioError | None = None
        self.expected_frames = 0

        # The means that views add to, and the frames [start, end) of each stretch.
        self.sound_mean = LogitMean()
        self.stretch_means: list[LogitMean] = []
        self.spans: list[tuple[int, int]] = []

    @property
    def is_done(self) -> bool:
        """Whether the result is final: every view is scored, or the sound has failed."""
        if self.is_open:
            return False
        frames = self.sound_mean.frames + sum(mean.frames for mean in self.stretch_means)
        return self.error is not None or frames == self.expected_frames

    def iterate_views(self, sound: SoundStream) -> Iterator[tuple[list[LogitMean], Tensor]]:
        """Yield the views of the sound with the means that they belong to; AudioError if it has no frame."""
        whole = StretchCutter(self.view_frames, self.view_frames)
        stretches = None
        if self.hop_frames is not None:
            stretches = StretchCutter(max(self.hop_frames, self.view_frames), self.hop_frames)

        # Both cuts of the sound, piece by piece.
        for mel_TF in sound.mels:
            yield from self._views_of(whole.push(mel_TF), stretches.push(mel_TF) if stretches else [])
        yield from self._views_of(whole.finish(), stretches.finish() if stretches else [])
        self.seconds = sound.seconds
        if not self.expected_frames:
            raise AudioError(
                "too_short", f"{sound.seconds:.4f} s are less than one frame; give a longer sound"
            )

    def _views_of(
        self, views: list[tuple[int, Tensor]], stretches: list[tuple[int, Tensor]]
    ) -> Iterator[tuple[list[LogitMean], Tensor]]:
        for _, mel_TF in views:
            self.expected_frames += len(mel_TF)
            yield [self.sound_mean], mel_TF
        for start, stretch_TF in stretches:
            mean = LogitMean()
            self.stretch_means.append(mean)
            self.spans.append((start, start + len(stretch_TF)))
            for view_TF in stretch_TF.split(self.view_frames):
                self.expected_frames += len(view_TF)
                yield [mean], view_TF


class StretchCutter:
    """Cuts a spectrogram that comes in pieces into stretches of `frames` frames that start `hop_frames` apart.

    The last stretch is the first that reaches the end; it may be shorter. A hop is no longer than a stretch. No more
    than a piece and a stretch are in memory.
    """

    def __init__(self, frames: int, hop_frames: int) -> None:
        self.frames = frames
        self.hop_frames = hop_frames
        self.start = 0
        self.tail_TF: Tensor | None = None

    def push(self, mel_TF: Tensor) -> list[tuple[int, Tensor]]:
        """The first frame and the frames of each stretch that ends before the sound does, as far as is known."""
        tail_TF = mel_TF if self.tail_TF is None else torch.cat((self.tail_TF, mel_TF))
        stretches = []
        while len(tail_TF) > self.frames:
            stretches.append((self.start, tail_TF[: self.frames]))
            tail_TF = tail_TF[self.hop_frames :]
            self.start += self.hop_frames
        self.tail_TF = tail_TF
        return stretches

    def finish(self) -> list[tuple[int, Tensor]]:
        """The last stretch; none if the sound has no frame."""
        if self.tail_TF is None or not len(self.tail_TF):
            return []
        return [(self.start, self.tail_TF)]


def load_predictor(
    location: str | Path, *, at: str | int = LAST_CHECKPOINT, device: str = "auto"
) -> Predictor:
    """Load the classifier of a fine-tuned run, an export or ORG/NAME of the hub; RunError says what to do if none."""
    path = Path(location)
    torch_device = pick_device(device)
    if (path / RECIPE_FILE).is_file():
        trained = TrainedRun.open(path, at)
        if not trained.run.is_finetuned:
            raise RunError(
                f"{path}: was pre-trained and has no classes to predict; fine-tune it: "
                f"ajepa-train finetune --store STORE --task own --from {path} --run NEW-RUN"
            )
        return Predictor.from_run(trained, torch_device)
    if (path / "fold1" / RECIPE_FILE).is_file():
        raise RunError(
            f"{path}: holds a run for each fold; give one of them, such as {path / 'fold1'}, or fine-tune one run "
            "on a store whose splits are not folds"
        )
    if at != LAST_CHECKPOINT:
        raise RunError(f"{location}: is no run, and only a run has several checkpoints; leave out {at!r}")
    return Predictor.from_pretrained(load_export(location), torch_device)


def refuse_errors(predictions: Iterable[Prediction], errors: Literal["row", "raise"]) -> list[Prediction]:
    """The predictions; with errors="raise", or if every sound failed, the first AudioError is raised."""
    collected = []
    for prediction in predictions:
        if prediction.error is not None and errors == "raise":
            raise prediction.error
        collected.append(prediction)
    failures = [prediction.error for prediction in collected if prediction.error is not None]
    if failures and len(failures) == len(collected):
        raise failures[0]
    return collected
