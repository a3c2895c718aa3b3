"""The grid over a spectrogram: the place of each token, its values and its position."""

import pytest
import torch

from ajepa.model.patches import (
    PatchGrid,
    patchify,
    repeat_last_frame,
    sincos_positions,
    valid_token_mask,
)

GRID = PatchGrid(rows=3, cols=5, patch_frames=4, patch_bands=2)


@pytest.mark.parametrize(("frames", "rows", "cols"), [(1024, 8, 64), (256, 8, 16)])
def test_the_grids_of_the_two_papers(frames, rows, cols):
    """A-JEPA cuts 1024 x 128 into 64 x 8 patches, Audio-JEPA 256 x 128 into 16 x 8."""
    grid = PatchGrid.from_size(frames, 128)
    assert (grid.rows, grid.cols, grid.tokens) == (rows, cols, rows * cols)
    assert (grid.frames, grid.bands, grid.patch_values) == (frames, 128, 256)


def test_a_token_holds_the_patch_at_its_row_and_column():
    """Masks and positions are in rows and columns; with a transposed patch both would be wrong."""
    mel_BTF = torch.randn(2, GRID.frames, GRID.bands)
    patches_BPN = patchify(mel_BTF, GRID)
    for col in range(GRID.cols):
        for row in range(GRID.rows):
            patch = mel_BTF[:, 4 * col : 4 * col + 4, 2 * row : 2 * row + 2]
            assert torch.equal(patches_BPN[:, col * GRID.rows + row], patch.reshape(2, -1))


def test_a_prefix_of_the_tokens_is_a_prefix_of_the_sound():
    """Time-major order: the first columns of a long clip are the tokens of a short one."""
    mel_BTF = torch.randn(1, GRID.frames, GRID.bands)
    short = PatchGrid(rows=3, cols=2, patch_frames=4, patch_bands=2)
    assert torch.equal(
        patchify(mel_BTF, GRID)[:, : short.tokens], patchify(mel_BTF[:, : short.frames], short)
    )


def test_no_two_tokens_share_a_position():
    """Attention does not know order: two tokens with equal positions would be at the same place."""
    positions_PD = sincos_positions(PatchGrid.from_size(1024, 128), 192)
    assert torch.cdist(positions_PD, positions_PD).add(torch.eye(512)).min() > 0.5


def test_half_of_a_position_is_its_row_and_half_its_column():
    """Same band: same first half. Same moment: same second half."""
    rows_PD, cols_PD = sincos_positions(GRID, 32).view(GRID.cols, GRID.rows, 32).split(16, dim=-1)
    assert torch.equal(rows_PD, rows_PD[:1].expand_as(rows_PD))
    assert torch.equal(cols_PD, cols_PD[:, :1].expand_as(cols_PD))


def test_the_likeness_of_two_positions_depends_on_their_distance_alone():
    """The product of two sinusoidal codes is a function of the difference: a law that any slip breaks."""
    grid = PatchGrid(rows=6, cols=9)
    positions = sincos_positions(grid, 64).view(9, 6, 64)
    likeness = torch.einsum("crd,ksd->crks", positions, positions)
    torch.testing.assert_close(likeness[0, 0, :8, :5], likeness[1, 1, 1:, 1:])


@pytest.mark.parametrize(("n_frames", "cols"), [(0, 0), (1, 1), (4, 1), (5, 2), (19, 5), (20, 5)])
def test_a_column_is_valid_when_sound_begins_in_it(n_frames, cols):
    """A column half sound, half padding counts; one that starts in the padding does not."""
    valid_BP = valid_token_mask(torch.tensor([n_frames]), GRID)
    assert valid_BP[0].tolist() == [True] * (cols * GRID.rows) + [False] * ((GRID.cols - cols) * GRID.rows)


def test_a_clip_goes_on_as_its_last_frame():
    """Of each clip the valid frames stay; every later one, even nan, is its last; a second time changes nothing."""
    n_frames_B = torch.tensor([1, 7, 19, 20])
    mel_BTF = torch.randn(4, 20, 6)
    for mel_TF, frames in zip(mel_BTF, n_frames_B, strict=True):
        mel_TF[frames:] = torch.nan
    repeated_BTF = repeat_last_frame(mel_BTF, n_frames_B)
    for repeated_TF, mel_TF, frames in zip(repeated_BTF, mel_BTF, n_frames_B, strict=True):
        assert torch.equal(repeated_TF[:frames], mel_TF[:frames])
        assert torch.equal(repeated_TF[frames:], mel_TF[frames - 1].expand(20 - frames, -1))
    assert torch.equal(repeat_last_frame(repeated_BTF, n_frames_B), repeated_BTF)


def test_full_clips_are_not_copied():
    """Most batches are full: they pay nothing."""
    mel_BTF = torch.randn(2, 20, 6)
    assert repeat_last_frame(mel_BTF, torch.tensor([20, 25])) is mel_BTF


def test_a_spectrogram_must_be_as_large_as_its_grid():
    """A crop that is one frame off is a bug upstream, to be named rather than broadcast."""
    with pytest.raises(ValueError, match="takes 20 frames x 6 bands, got 21 x 6"):
        patchify(torch.zeros(1, 21, 6), GRID)


@pytest.mark.parametrize(("frames", "bands"), [(1000, 128), (1024, 100)])
def test_patches_must_tile_the_spectrogram(frames, bands):
    """1000 frames are 62 and a half patches: no frame is dropped without a word."""
    with pytest.raises(ValueError, match="cannot be cut into 16 x 16"):
        PatchGrid.from_size(frames, bands)


def test_positions_need_a_width_of_four_quarters():
    """Sine and cosine, of the row and of the column."""
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_positions(GRID, 6)


def test_an_empty_grid_is_refused():
    """Everything after it divides by its size."""
    with pytest.raises(ValueError, match="at least 1"):
        PatchGrid(rows=0, cols=4)
