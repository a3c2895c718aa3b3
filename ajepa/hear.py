"""HEAR 2021's common API: `hear-validator ajepa.hear -m RUN`, and heareval with `ajepa.hear` as its module.

https://hearbenchmark.com/hear-api.html
"""

import torch
from torch import Tensor, nn

from ajepa.embed.embedder import Embedder, load

RATES_HZ = (16_000, 22_050, 44_100, 48_000)  # that the API allows; from another, sounds are resampled by us

SPACING_MS = 50.0  # most that it suggests between timestamps


class HearModel(nn.Module):
    """An encoder with the attributes that HEAR asks for. Moved to a device, it computes there."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder, self.encoder = embedder, embedder.encoder
        enough = [rate for rate in RATES_HZ if rate >= embedder.sample_rate_hz]
        self.sample_rate = min(enough, default=max(RATES_HZ))
        self.scene_embedding_size = self.timestamp_embedding_size = embedder.width

    @property
    def shifts(self) -> int:
        """How often a sound goes through so that timestamps are at most 50 ms apart, where columns allow it."""
        patch = self.embedder.grid.patch_frames
        divisors = [shifts for shifts in range(1, patch + 1) if patch % shifts == 0]
        near = [shifts for shifts in divisors if self.embedder.column_ms / shifts <= SPACING_MS]
        return min(near, default=patch)


def load_model(model_file_path: str = "") -> HearModel:
    """Of a run folder, an exported folder or file, or ORG/NAME on the hub; on the CPU, until it is moved."""
    return HearModel(load(model_file_path, device="cpu"))


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """One vector a sound, float32 `[B, D]`, on the audio's device; `audio` is `[B, S]` at `model.sample_rate`."""
    told = on_its_device(model).embed_audio(audio, model.sample_rate)
    return told.clips_BD.to(audio.device)


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Vectors `[B, T, D]` and the centres `[B, T]`, in ms, of what each tells; evenly spaced, none past the end."""
    told = on_its_device(model).embed_audio(audio, model.sample_rate, shifts=model.shifts)
    frames_BTD = torch.stack([one.frames_TD for one in told.per_sound])
    times_ms_BT = torch.stack([one.times_ms_T for one in told.per_sound]).float()
    return frames_BTD.to(audio.device), times_ms_BT.to(audio.device)


def on_its_device(model: HearModel) -> Embedder:
    """The embedder, told where the weights have been moved to."""
    model.embedder.device = next(model.encoder.parameters()).device
    return model.embedder
