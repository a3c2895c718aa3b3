"""PaSST (arXiv 2110.05069): a vision transformer on overlapping patches, most of them left out in training."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ajepa.model.cnn6 import refuse_other_clip_size
from ajepa.model.randomness import fork_seeded_rng
from ajepa.model.transformer import NORM_EPSILON, TransformerBlock, initialise_weights, run_blocks
from pipeline.loading.transfer import copy_to_device

# Tokens besides the patches: the class token and DeiT's distillation token.
SPECIAL_TOKENS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PasstSpec:
    """Shape of a PaSST; the defaults are the paper's PaSST-S, 85,748,495 parameters with 527 classes.

    In training, structured patchout leaves out `drop_rows` of the 12 rows and `drop_cols` of the 99 columns of patches,
    drawn for each clip. Frames and bands at the end that do not fill a patch are not used.
    """

    frames: int = 1000
    bands: int = 128
    width: int = 768
    depth: int = 12
    heads: int = 12
    patch: int = 16
    stride: int = 10
    drop_rows: int = 4
    drop_cols: int = 40

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads, self.patch, self.stride) < 1 or self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, and nothing under 1, got {self}")
        if min(self.frames, self.bands) < self.patch:
            raise ValueError(f"not one patch of {self.patch} fits into {self.frames} x {self.bands}")
        if not (0 <= self.drop_rows < self.rows and 0 <= self.drop_cols < self.cols):
            raise ValueError(
                f"{self.drop_rows} rows and {self.drop_cols} columns cannot be left out of {self.rows} and {self.cols}"
            )

    @property
    def rows(self) -> int:
        """The number of patches along frequency."""
        return 1 + (self.bands - self.patch) // self.stride

    @property
    def cols(self) -> int:
        """The number of patches along time."""
        return 1 + (self.frames - self.patch) // self.stride


class Passt(nn.Module):
    """The Classifier of a `PasstSpec`: the mean of the two special tokens after the last block, a norm, a linear layer.

    The position code of a patch is the sum of a learnt vector for its row and a learnt vector for its column, so a
    shorter clip uses only the vectors of the first columns. No token attends to a patch that is partly outside the
    clip, except in the first column, which every clip has. A padded clip has the same logits as without padding.
    DeiT's second head, which PaSST contains but never uses (405,263 parameters), is omitted.
    """

    def __init__(self, spec: PasstSpec, classes: int, seed: int) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width

        # torch draws initial weights here, which `initialise_weights` replaces below.
        with fork_seeded_rng(seed):
            self.embed = nn.Linear(spec.patch**2, width)
            self.blocks = nn.ModuleList(TransformerBlock(width, spec.heads) for _ in range(spec.depth))
            self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)
            self.head_norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, classes)

        self.tokens_ND = nn.Parameter(torch.zeros(SPECIAL_TOKENS, width))
        self.token_positions_ND = nn.Parameter(torch.zeros(SPECIAL_TOKENS, width))
        self.row_positions_ND = nn.Parameter(torch.zeros(spec.rows, width))
        self.col_positions_ND = nn.Parameter(torch.zeros(spec.cols, width))
        initialise_weights(self, seed)

    def forward(self, mel_BTF: Tensor, n_frames_B: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Return the logits (see `Classifier`); patchout draws from `rng`.

        Clips may have fewer frames than the spec: they use the position codes of its first columns.
        """
        spec = self.spec
        refuse_other_clip_size(mel_BTF, min(mel_BTF.shape[1], spec.frames), spec.bands)

        # Cut overlapping patches, and draw the rows and columns that patchout keeps.
        patches_BTFN = (
            mel_BTF.unfold(1, spec.patch, spec.stride).unfold(2, spec.patch, spec.stride).flatten(3)
        )
        cols_BT, rows_BF = self._draw_patchout(n_frames_B, patches_BTFN.shape[1], rng)
        valid_BT = cols_BT < self._valid_columns(n_frames_B)[:, None]

        # Embed these patches and add their positions.
        cols_BT = copy_to_device(cols_BT, mel_BTF.device)
        rows_BF = copy_to_device(rows_BF, mel_BTF.device)
        clip_B11 = torch.arange(len(mel_BTF), device=mel_BTF.device)[:, None, None]
        x_BTFD = self.embed(patches_BTFN[clip_B11, cols_BT[:, :, None], rows_BF[:, None]])
        x_BTFD = x_BTFD + self.col_positions_ND[cols_BT][:, :, None] + self.row_positions_ND[rows_BF][:, None]

        # Put the two special tokens before the patches, and run the blocks.
        tokens_BND = (self.tokens_ND + self.token_positions_ND).expand(len(mel_BTF), -1, -1)
        x_BND = torch.cat((tokens_BND, x_BTFD.flatten(1, 2)), dim=1)
        valid_BN = passt_attention_mask(valid_BT, rows_BF.shape[1], mel_BTF.device)
        (x_BND,) = run_blocks(self.blocks, x_BND, valid_BN, None)

        # Compute the logits from the mean of the two special tokens.
        with torch.autocast(mel_BTF.device.type, enabled=False):
            x_BD = self.norm(x_BND[:, :SPECIAL_TOKENS].float()).mean(dim=1)
            logits_BC: Tensor = self.head(self.head_norm(x_BD))
        return logits_BC

    def weights_by_depth(self) -> list[list[nn.Parameter]]:
        """Return the weights of embedding, tokens and positions, then of each block, then of norms and head."""
        vectors = [self.tokens_ND, self.token_positions_ND, self.row_positions_ND, self.col_positions_ND]
        first = [*self.embed.parameters(), *vectors]
        last = [weight for part in (self.norm, self.head_norm, self.head) for weight in part.parameters()]
        return [first, *(list(block.parameters()) for block in self.blocks), last]

    def _draw_patchout(
        self, n_frames_B: Tensor, cols: int, rng: np.random.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Draw the columns (of `cols`) and the rows that each clip keeps, ascending; in evaluation all are kept."""
        spec = self.spec
        clips = len(n_frames_B)
        if not self.training or not (spec.drop_rows or spec.drop_cols):
            return torch.arange(cols).expand(clips, -1), torch.arange(spec.rows).expand(clips, -1)
        if rng is None:
            raise ValueError("patchout draws from the generator of the step: give `rng`")
        if spec.drop_cols >= cols:
            raise ValueError(f"of {cols} columns {spec.drop_cols} cannot be left out: lower drop_cols")

        # Random numbers for the columns, then for the rows; the order of the draws is fixed.
        col_lottery_BT = rng.random((clips, cols))
        row_lottery_BF = rng.random((clips, spec.rows))

        # Each clip keeps at least one valid column: one is drawn and gets the lowest number.
        winner_B = (rng.random((clips,)) * self._valid_columns(n_frames_B).numpy()).astype(np.int64)
        col_lottery_BT[np.arange(clips), winner_B] = -1

        cols_BT = indices_of_lowest(col_lottery_BT, cols - spec.drop_cols)
        rows_BF = indices_of_lowest(row_lottery_BF, spec.rows - spec.drop_rows)
        return cols_BT, rows_BF

    def _valid_columns(self, n_frames_B: Tensor) -> Tensor:
        """Return the number of columns that are inside each clip, at least 1."""
        return (1 + (n_frames_B - self.spec.patch) // self.spec.stride).clamp(min=1)


def indices_of_lowest(lottery_BN: np.ndarray, count: int) -> Tensor:
    """Return the indices of the `count` lowest numbers of each clip, ascending."""
    return torch.from_numpy(np.sort(np.argsort(lottery_BN, axis=1)[:, :count], axis=1))


def passt_attention_mask(valid_BT: Tensor, rows: int, device: torch.device) -> Tensor | None:
    """Return the attention mask `BN`: special tokens and patches of valid columns; None if all columns are valid."""
    if valid_BT.numpy().all():
        return None
    valid_BN = valid_BT.repeat_interleave(rows, dim=1)
    special_BN = torch.ones(len(valid_BT), SPECIAL_TOKENS, dtype=torch.bool)
    return copy_to_device(torch.cat((special_BN, valid_BN), dim=1), device)
