"""HEAR 2021's common API: `hear-validator ajepa.hear -m RUN`, and heareval with `ajepa.hear` as its module.

https://hearbenchmark.com/hear-api.html
"""

from typing import Any

import torch
from torch import Tensor, nn

from ajepa.embed.embedder import Embedder, load

RATES_HZ = (16_000, 22_050, 44_100, 48_000)  # the sample rates that the API allows

SPACING_MS = 50.0  # the most that the API suggests between two timestamps


class HearModel(nn.Module):
    """An encoder with the attributes that HEAR asks for; it computes on the device that it is moved to."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder
        self.encoder = embedder.encoder
        # The lowest allowed rate that keeps all that the encoder hears; the embedder resamples from it.
        high_enough = [rate for rate in RATES_HZ if rate >= embedder.sample_rate_hz]
        self.sample_rate = min(high_enough, default=max(RATES_HZ))
        self.scene_embedding_size = embedder.width
        self.timestamp_embedding_size = embedder.frame_width

    @property
    def shifts(self) -> int:
        """How many shifted copies of a sound to encode, for timestamps at most 50 ms apart if columns allow it."""
        patch = self.embedder.grid.patch_frames
        divisors = [shifts for shifts in range(1, patch + 1) if patch % shifts == 0]
        dense_enough = [shifts for shifts in divisors if self.embedder.column_ms / shifts <= SPACING_MS]
        return min(dense_enough, default=patch)


def load_model(model_file_path: str = "", **options: Any) -> HearModel:
    """The model of a run folder, an exported folder or file, or ORG/NAME on the hub; on the CPU until it is moved.

    `options` are those of `ajepa.load`: at, pooling, layer, overlap; heareval takes them as `--model-options` in JSON.
    """
    return HearModel(load(model_file_path, device="cpu", **options))


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """One vector a sound, float32 `[B, D]`, on the audio's device; `audio` is `[B, S]` at `model.sample_rate`."""
    embeddings = on_its_device(model).embed_audio(audio, model.sample_rate)
    return embeddings.clips_BD.to(audio.device)


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Vectors `[B, T, D]` and the time of each, its centre in ms, `[B, T]`; evenly spaced, none past the end."""
    embeddings = on_its_device(model).embed_audio(audio, model.sample_rate, shifts=model.shifts)
    frames_BTD = torch.stack([sound.frames_TD for sound in embeddings.per_sound])
    times_ms_BT = torch.stack([sound.times_ms_T for sound in embeddings.per_sound]).float()
    return frames_BTD.to(audio.device), times_ms_BT.to(audio.device)


def on_its_device(model: HearModel) -> Embedder:
    """The embedder, computing on the device to which the weights have been moved."""
    model.embedder.device = next(model.encoder.parameters()).device
    return model.embedder
