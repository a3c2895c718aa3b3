"""Patches: the grid that cuts a spectrogram into tokens, the positions of tokens, and the mask of valid tokens."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.loading.transfer import copy_to_device


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchGrid:
    """The grid of patches of a spectrogram: `rows` frequency patches by `cols` time patches.

    Token `p` is patch `(row, col)` with `p = col * rows + row`: time-major, so that a prefix of the tokens is
    a prefix of the sound. Row 0 contains the lowest bands.
    """

    rows: int
    cols: int
    patch_frames: int = 16
    patch_bands: int = 16

    def __post_init__(self) -> None:
        if min(self.rows, self.cols, self.patch_frames, self.patch_bands) < 1:
            raise ValueError(f"every side of a patch grid must be at least 1, got {self}")

    @classmethod
    def from_size(cls, frames: int, bands: int, patch: int = 16) -> "PatchGrid":
        """Return the grid of square patches over `frames` x `bands`; ValueError if they do not fit exactly."""
        if frames % patch or bands % patch:
            raise ValueError(f"{frames} frames x {bands} bands cannot be cut into {patch} x {patch} patches")
        return cls(rows=bands // patch, cols=frames // patch, patch_frames=patch, patch_bands=patch)

    def first_columns(self, frames: int) -> "PatchGrid":
        """Return the grid of the columns in the first `frames` frames; this one where they are not whole columns of it.

        Its tokens have the same numbers as here: they are a prefix.
        """
        cols = frames // self.patch_frames
        if frames % self.patch_frames or not 0 < cols < self.cols:
            return self
        return replace(self, cols=cols)

    @property
    def tokens(self) -> int:
        return self.rows * self.cols

    @property
    def frames(self) -> int:
        return self.cols * self.patch_frames

    @property
    def first_frame_of_last_column(self) -> int:
        """A clip with more valid frames than this has a valid token in every column (`valid_token_mask`)."""
        return (self.cols - 1) * self.patch_frames

    @property
    def bands(self) -> int:
        return self.rows * self.patch_bands

    @property
    def patch_values(self) -> int:
        """The number of values in one patch."""
        return self.patch_frames * self.patch_bands


def patchify(mel_BTF: Tensor, grid: PatchGrid) -> Tensor:
    """Return the patches of spectrograms, `BPN`: the values of a patch frame by frame (N = patch_frames * patch_bands).

    ValueError if the spectrograms do not have exactly the frames and bands of the grid.
    """
    if mel_BTF.shape[1:] != (grid.frames, grid.bands):
        got_frames, got_bands = mel_BTF.shape[1:]
        raise ValueError(
            f"a {grid.cols} x {grid.rows} grid takes {grid.frames} frames x {grid.bands} bands, "
            f"got {got_frames} x {got_bands}"
        )
    # From [clip, column, frame, row, band] to rows before frames, so that the values of a patch are adjacent.
    cut = mel_BTF.unflatten(2, (grid.rows, grid.patch_bands)).unflatten(1, (grid.cols, grid.patch_frames))
    return cut.transpose(2, 3).reshape(mel_BTF.shape[0], grid.tokens, grid.patch_values)


def sincos_positions(grid: PatchGrid, width: int) -> Tensor:
    """Return fixed positions `PD`: the first half of the width encodes the frequency row, the second the time column.

    Each half is the encoding of Vaswani et al. (arXiv 1706.03762): sines, then cosines, with wavelengths from 2 pi up.
    """
    if width % 4:
        raise ValueError(f"2-D sin-cos positions need a width divisible by 4, got {width}")
    token_P = torch.arange(grid.tokens)
    row_PD = _sincos_code(token_P % grid.rows, width // 2)
    col_PD = _sincos_code(token_P // grid.rows, width // 2)
    return torch.cat((row_PD, col_PD), dim=-1).float()


def _sincos_code(coordinate_P: Tensor, width: int) -> Tensor:
    rate_N = 10_000.0 ** -torch.linspace(0, 1, width // 2 + 1, dtype=torch.float64)[:-1]
    angle_PN = coordinate_P[:, None] * rate_N
    return torch.cat((angle_PN.sin(), angle_PN.cos()), dim=-1)


def rotary_positions(grid: PatchGrid, head_width: int) -> Tensor:
    """Return cosine and sine of every token's angles, `2PE`: the first half encodes the row, the second the column.

    The rates fall from 1 to 1/100 radian per patch, which gives wavelengths from 6 to 600 patches. Grids are only some
    tens of patches wide: with the base 10,000 that is usual for text, half of the angles would be almost constant.
    """
    if head_width % 4:
        raise ValueError(f"2-D RoPE needs a head width divisible by 4, got {head_width}")
    rate_N = 100.0 ** -torch.linspace(0, 1, head_width // 4 + 1, dtype=torch.float64)[:-1]
    token_P = torch.arange(grid.tokens)
    row_P1 = (token_P % grid.rows)[:, None]
    col_P1 = (token_P // grid.rows)[:, None]
    angle_PE = torch.cat((row_P1 * rate_N, col_P1 * rate_N), dim=1)
    return torch.stack((angle_PE.cos(), angle_PE.sin())).float()


def valid_token_mask(n_frames_B: Tensor, grid: PatchGrid) -> Tensor:
    """Return which tokens are valid, as bool `BP`: their time column starts inside the clip's valid frames."""
    start_P = torch.arange(grid.tokens, device=n_frames_B.device) // grid.rows * grid.patch_frames
    return start_P < n_frames_B[:, None]


def has_no_padding(n_frames_B: Tensor, frames: int) -> bool:
    """Return whether every clip has at least so many valid frames; `n_frames_B` on the CPU costs no wait for a GPU."""
    return not len(n_frames_B) or int(n_frames_B.numpy(force=True).min()) >= frames


def repeat_last_frame(mel_BTF: Tensor, n_frames_B: Tensor) -> Tensor:
    """Return the spectrograms with the last valid frame of each clip in the place of all later frames.

    A sound seldom ends where a patch ends. Its last column then continues as the sound ended; zeros would be a jump to
    the mean level, which tells where the sound ends. Columns that start past the end stay invalid (`valid_token_mask`).
    Spectrograms without a later frame are returned as they are. Keep `n_frames_B` on the CPU, because looking for later
    frames would synchronise a GPU. The result for a clip without a valid frame is meaningless.
    """
    # A traced program cannot branch on values.
    frames = mel_BTF.shape[1]
    if not torch.compiler.is_exporting() and has_no_padding(n_frames_B, frames):
        return mel_BTF

    # The number of the frame that stands at each place.
    last_B11 = (copy_to_device(n_frames_B, mel_BTF.device) - 1).clamp(min=0)[:, None, None]
    source_BT1 = torch.arange(frames, device=mel_BTF.device)[:, None].minimum(last_B11)
    return mel_BTF.gather(1, source_BT1.expand(-1, -1, mel_BTF.shape[2]))
