"""An encoder for X-ARES: `AJEPA_MODEL=RUN python -m xares.run ajepa/xares_encoder.py TASKS...`.

`AJEPA_CHECKPOINT`, `AJEPA_POOLING` and `AJEPA_LAYER` choose among what `ajepa.load` offers.

https://github.com/jimbozhang/xares asks for the one class of this file whose name ends with "Encoder".
"""

import os
from typing import Any

import torch
from torch import Tensor, nn

from ajepa.embed.embedder import load
from pipeline.errors import RunError

MODEL = (
    "AJEPA_MODEL"  # the environment variable that names the model: X-ARES makes encoders without arguments
)

# The environment variables of the options of `ajepa.load`; those that are not set have its defaults.
OPTIONS = {"at": "AJEPA_CHECKPOINT", "pooling": "AJEPA_POOLING", "layer": "AJEPA_LAYER"}


class AjepaEncoder(nn.Module):
    """`[B, S]` audio at `sampling_rate` -> `[B, T, D]`, one vector every `hop_size_in_ms`; sounds of any length.

    X-ARES pads the sounds of a batch with zeros and takes the mean over all T, so that the vector of a sound would
    depend on the other sounds of its batch. This encoder takes zeros at the end of a sound for padding: it does not
    encode them, and fills their frames with the mean of the frames before. X-ARES's mean is then the sound's own.
    Pooled by `moments`, every frame is followed by the deviation over the whole sound, so that the mean over T has it.
    """

    def __init__(self, model: str | None = None) -> None:
        super().__init__()
        location = model or os.environ.get(MODEL)
        if not location:
            raise RunError(f"{MODEL} is not set; expected a run, an export, or ORG/NAME on the hub")
        options: dict[str, Any] = {
            option: os.environ[name] for option, name in OPTIONS.items() if name in os.environ
        }
        self.embedder = load(location, device="cpu", **options)
        self.network = self.embedder.encoder
        self.sampling_rate = self.embedder.sample_rate_hz
        self.output_dim = self.embedder.width
        self.hop_size_in_ms = self.embedder.column_ms

    def forward(self, audio: Tensor) -> Tensor:
        """Encode a batch as the class says; `[S]` is a batch of one."""
        # A batch of sounds, each at least one frame of its spectrogram long
        audio_BS = audio[None] if audio.ndim == 1 else audio
        self.embedder.device = next(self.network.parameters()).device
        frames = max(1, self.frames_of(audio_BS.shape[1]))
        audio_BS = nn.functional.pad(audio_BS, (0, max(0, self.shortest_samples - audio_BS.shape[1])))
        ends_B = [sound_samples(wave_S, self.shortest_samples) for wave_S in audio_BS]

        # Embed every sound up to its end
        embeddings = self.embedder.embed_audio(audio_BS, self.sampling_rate, samples_B=ends_B)

        # Fill the frames of the padding with the mean of the sound's own
        filled = []
        for sound in embeddings.per_sound:
            padding_TD = sound.frames_TD.mean(0).expand(frames - len(sound.frames_TD), -1)
            frames_TD = torch.cat((sound.frames_TD, padding_TD))

            # What the vector of the clip has more than a frame is the deviation.
            deviation_D = sound.clip_D[frames_TD.shape[1] :]
            filled.append(torch.cat((frames_TD, deviation_D.expand(frames, -1)), dim=1))
        return torch.stack(filled).to(audio.device)

    @property
    def shortest_samples(self) -> int:
        """The samples of one frame of a spectrogram; shorter sounds are padded with silence to it."""
        return self.embedder.mel.window_samples

    def frames_of(self, samples: int) -> int:
        """How many columns have their centre within that many samples."""
        since_first_centre_ms = samples / self.sampling_rate * 1e3 - self.embedder.first_centre_ms
        columns = -(-self.embedder.mel.frames_of(samples) // self.embedder.grid.patch_frames)
        return min(columns, int(since_first_centre_ms // self.embedder.column_ms) + 1)


def sound_samples(wave_S: Tensor, least: int) -> int:
    """The samples of a sound up to the last one that is not zero; at least `least`."""
    nonzero_N = torch.nonzero(wave_S)
    if not len(nonzero_N):
        return least
    return max(least, int(nonzero_N[-1]) + 1)
