"""EncoderModule: a pretrained encoder as a network for other models, from log-mel to tokens, normalised inside."""

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ajepa.embed.pretrained import PretrainedEncoder
from ajepa.embed.windows import column_ms, cut_windows, first_centre_ms
from ajepa.model.patches import repeat_last_frame, valid_token_mask
from ajepa.model.pooling import column_pooling, pool_columns, pool_tokens
from ajepa.model.vit import Encoder
from ajepa.training.feature_choice import VectorFeatures
from pipeline.audio.mel import log_mel
from pipeline.errors import RunError


class FrameFeatures(NamedTuple):
    """One vector for each time column of B views, `BCD`, and the middle of every column in milliseconds, `C`.

    valid_BC is False for the columns that begin after the end of a sound: their vectors mean nothing.
    """

    frames_BCD: Tensor
    times_ms_C: Tensor
    valid_BC: Tensor


class EncoderModule(nn.Module):
    """Log-mel in, tokens out: `model = ajepa.load(...).module`. Normalisation is inside, as buffers.

    It comes frozen, in eval mode. After `module.requires_grad_(True).train()` gradients flow into every weight;
    `module.requires_grad_(False).eval()` freezes it again. The weights are those of the embedder that it came from.

    A view is natural-log mel power, `[B, frames, bands]` with at most `frames` frames: rows of a store as
    `store.to_log_mel` gives them, or `log_mel` of a wave. Shorter views are padded; `n_frames_B` says how many frames
    of each are sound, by default all. Only `clip_vectors` also takes longer sounds, such as the clips of a store's
    dataset. The log-mel of a dataset is not normalised: the module does that. Layer, pooling and the `hop_columns`
    between the windows of a longer sound are those of the embedder.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, pretrained: PretrainedEncoder, encoder: Encoder, features: VectorFeatures, hop_columns: int
    ) -> None:
        super().__init__()
        self.hop_columns = hop_columns
        self.encoder = encoder
        self.mel = pretrained.mel
        self.grid = pretrained.spec.grid
        self.features = features
        device = next(encoder.parameters()).device
        self.register_buffer("mean", torch.tensor(pretrained.mean, device=device))
        self.register_buffer("std", torch.tensor(pretrained.std, device=device))
        self.eval()

    @property
    def frames(self) -> int:
        """The most frames of a view."""
        return self.grid.frames

    @property
    def token_width(self) -> int:
        """The number of values of a token."""
        spec = self.encoder.spec
        return spec.width * self.features.layer.vectors_per_token(spec.depth)

    @property
    def clip_width(self) -> int:
        """The number of values of the vector of a clip (`clip_vectors`)."""
        return self.features.width(self.encoder.spec)

    def log_mel(self, wave_BS: Tensor) -> Tensor:
        """The log-mel of mono waves at `mel.sample_rate_hz`, floats in [-1, 1], `BTF`. No gradient flows into waves."""
        return log_mel(wave_BS, self.mel)

    def forward(self, mel_BTF: Tensor, n_frames_B: Tensor | None = None) -> Tensor:
        """The vector of every patch, `[B, tokens, token_width]`: `rows` of a column, then the next column."""
        tokens_BPD, _ = self._encode(mel_BTF, n_frames_B)
        return tokens_BPD

    def frame_features(self, mel_BTF: Tensor, n_frames_B: Tensor | None = None) -> FrameFeatures:
        """One vector for each time column, and when it is."""
        tokens_BPD, valid_BP = self._encode(mel_BTF, n_frames_B)
        rows = self.grid.rows
        columns_BCD = pool_columns(tokens_BPD, rows, column_pooling(self.features.pooling))
        column_C = torch.arange(columns_BCD.shape[1], device=columns_BCD.device)
        times_ms_C = first_centre_ms(self.grid, self.mel) + column_ms(self.grid, self.mel) * column_C
        return FrameFeatures(columns_BCD, times_ms_C, valid_BP[:, ::rows])

    def clip_vectors(self, mel_BTF: Tensor, n_frames_B: Tensor | None = None) -> Tensor:
        """One vector for each sound of any length, `[B, clip_width]`, as `Embedder.embed` gives; gradients flow.

        Sounds of more frames than a view go through the encoder in overlapping windows, all in one pass. nan for a
        sound without a frame. RunError for another number of bands.
        """
        is_long = mel_BTF.ndim == 3 and mel_BTF.shape[1] > self.frames
        if is_long and mel_BTF.shape[2] == self.grid.bands:
            return self._long_clip_vectors(mel_BTF, n_frames_B)
        tokens_BPD, valid_BP = self._encode(mel_BTF, n_frames_B)
        clips = len(tokens_BPD)
        return self._pool(tokens_BPD, valid_BP, torch.arange(clips, device=tokens_BPD.device), clips)

    def _long_clip_vectors(self, mel_BTF: Tensor, n_frames_B: Tensor | None) -> Tensor:
        """The vectors of sounds that may be longer than a view, window by window."""
        clips, frames = mel_BTF.shape[:2]
        lengths = [frames] * clips if n_frames_B is None else n_frames_B.tolist()
        windows = [
            (clip, window)
            for clip, length in enumerate(lengths)
            for window in cut_windows([mel_BTF[clip, :length]], self.grid, self.hop_columns)
        ]
        if not windows:
            return mel_BTF.new_full((clips, self.clip_width), torch.nan, dtype=torch.float32)

        # The views, which end in zeros where the sound does.
        n_frames_N = torch.tensor([len(window.mel_TF) for _, window in windows])
        views = [nnf.pad(window.mel_TF, (0, 0, 0, self.frames - len(window.mel_TF))) for _, window in windows]
        tokens_NPD, valid_NP = self._encode(torch.stack(views), n_frames_N)

        # Of the columns that two windows share, each window counts those that it owns.
        column_C = torch.arange(self.grid.cols)
        owned_NC = torch.stack(
            [
                (window.first_column <= column_C + window.start_column)
                & (column_C + window.start_column < window.end_column)
                for _, window in windows
            ]
        )
        owned_NP = owned_NC.repeat_interleave(self.grid.rows, dim=1).to(valid_NP.device)
        clip_N = torch.tensor([clip for clip, _ in windows], device=tokens_NPD.device)
        return self._pool(tokens_NPD, valid_NP & owned_NP, clip_N, clips)

    def _pool(self, tokens_NPD: Tensor, valid_NP: Tensor, clip_N: Tensor, clips: int) -> Tensor:
        """One vector for each clip from the valid tokens of its views (`pool_tokens`)."""
        return pool_tokens(
            tokens_NPD, valid_NP, clip_N, clips=clips, rows=self.grid.rows, pooling=self.features.pooling
        )

    def _encode(self, mel_BTF: Tensor, n_frames_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """The tokens of views, `BPD`, and which of them are sound, `BP`; RunError for views of another shape."""
        # Check the views.
        frames, bands = mel_BTF.shape[-2:]
        if mel_BTF.ndim != 3 or bands != self.grid.bands or not 0 < frames <= self.frames:
            raise RunError(
                f"log-mel of shape {list(mel_BTF.shape)}: expected [B, at most {self.frames} frames, {self.grid.bands} "
                "bands]; cut longer sounds, or use clip_vectors or Embedder.embed"
            )
        if n_frames_B is None:
            n_frames_B = torch.full((len(mel_BTF),), frames)
        n_frames_B = n_frames_B.to(mel_BTF.device)

        # Normalise, and fill the end with the last frame of each sound.
        normalised_BTF = (mel_BTF.float() - self.mean) / self.std
        padded_BTF = nnf.pad(normalised_BTF, (0, 0, 0, self.frames - frames))
        filled_BTF = repeat_last_frame(padded_BTF, n_frames_B)
        valid_BP = valid_token_mask(n_frames_B, self.grid)
        mask_BP = None if bool(valid_BP.all()) else valid_BP
        return self.features.layer.encode_tokens(self.encoder, filled_BTF, mask_BP), valid_BP
