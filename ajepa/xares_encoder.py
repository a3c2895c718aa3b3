"""An encoder for X-ARES: `AJEPA_MODEL=RUN python -m xares.run ajepa/xares_encoder.py TASKS...`.

https://github.com/jimbozhang/xares asks for the one class of this file whose name ends with "Encoder".
"""

import os

import torch
from torch import Tensor, nn

from ajepa.embed.embedder import load
from pipeline.errors import RunError

MODEL = "AJEPA_MODEL"  # environment variable: X-ARES makes encoders without arguments


class AjepaEncoder(nn.Module):
    """`[B, S]` audio at `sampling_rate` -> `[B, T, D]`, one vector every `hop_size_in_ms`; sounds of any length.

    X-ARES pads the sounds of a batch with zeros and means over all T, so a sound's vector would hang on its
    neighbours. Here zeros at a sound's end are taken for that padding: they are not encoded, and the frames there
    repeat the mean of those before, so that X-ARES's mean is that of the sound alone.
    """

    def __init__(self, model: str | None = None) -> None:
        super().__init__()
        place = model or os.environ.get(MODEL)
        if not place:
            raise RunError(f"{MODEL} is not set; expected a run, an export, or ORG/NAME on the hub")
        self.embedder = load(place, device="cpu")
        self.network = self.embedder.encoder
        self.sampling_rate = self.embedder.sample_rate_hz
        self.output_dim = self.embedder.width
        self.hop_size_in_ms = self.embedder.column_ms

    def forward(self, audio: Tensor) -> Tensor:
        """As the class says; `[S]` is taken for a batch of one."""
        audio_BS = audio[None] if audio.ndim == 1 else audio
        self.embedder.device = next(self.network.parameters()).device
        frames = max(1, self.frames_of(audio_BS.shape[1]))
        audio_BS = nn.functional.pad(audio_BS, (0, max(0, self.shortest_samples - audio_BS.shape[1])))
        ends_B = [sound_samples(wave_S, self.shortest_samples) for wave_S in audio_BS]
        told = self.embedder.embed_audio(audio_BS, self.sampling_rate, samples_B=ends_B)
        frames_BTD = torch.stack(
            [
                torch.cat((one.frames_TD, one.frames_TD.mean(0).expand(frames - len(one.frames_TD), -1)))
                for one in told.per_sound
            ]
        )
        return frames_BTD.to(audio.device)

    @property
    def shortest_samples(self) -> int:
        """Of a sound: one frame of its spectrogram; what is shorter goes on in silence."""
        return self.embedder.mel.window_samples

    def frames_of(self, samples: int) -> int:
        """How many columns have their centre within so many samples."""
        after_ms = samples / self.sampling_rate * 1e3 - self.embedder.first_centre_ms
        columns = -(-self.embedder.mel.frames_of(samples) // self.embedder.grid.patch_frames)
        return min(columns, int(after_ms // self.embedder.column_ms) + 1)


def sound_samples(wave_S: Tensor, least: int) -> int:
    """Up to its last sample that is not zero; at least `least`."""
    there = torch.nonzero(wave_S)
    return max(least, int(there[-1]) + 1 if len(there) else 0)
