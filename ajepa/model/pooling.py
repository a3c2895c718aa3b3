"""Pooling: one vector for a clip, from the tokens of its views that hold sound."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf

from ajepa.model.patches import valid_token_mask
from ajepa.model.vit import Encoder
from pipeline.errors import RunError

PoolingName = Literal["mean", "frequency", "moments"]

DEFAULT_POOLING: PoolingName = "mean"

# The vector of a clip is as long as so many vectors of tokens, given the grid's rows.
VECTORS_PER_CLIP: dict[PoolingName, Callable[[int], int]] = {
    "mean": lambda rows: 1,
    "frequency": lambda rows: rows,
    "moments": lambda rows: 2 * rows,
}

# A feature whose deviation over all clips is no larger is the same in all of them.
CONSTANT_DEVIATION = 1e-6

# The least variance over columns: the root of 0 has no finite gradient.
MIN_POOLED_VARIANCE = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderLayer:
    """The layer of an encoder whose tokens are pooled: by default its output, the last block after the final norm.

    last_blocks   above 0: the mean of so many blocks, the last ones
    block_number  above 0: the output of the block with that number; the first is 1

    The output of a block is normalised over its features, as where it is a target (`jepa.JepaSpec`): later blocks have
    larger values. RunError where both are given.
    """

    last_blocks: int = 0
    block_number: int = 0

    def __post_init__(self) -> None:
        if min(self.last_blocks, self.block_number) < 0 or (self.last_blocks and self.block_number):
            raise RunError(f"a layer is the last, the mean of the last blocks, or one block; got {self}")

    @classmethod
    def from_name(cls, name: str) -> "EncoderLayer":
        """Return the layer of a name: `last`, `mean-K` (the last K blocks) or `block-N`; RunError for any other."""
        if name == "last":
            return cls()
        match = re.fullmatch(r"(mean|block)-([1-9]\d*)", name)
        if match is None:
            raise RunError(f"layer {name!r}: expected last, mean-K (of the last K blocks) or block-N")
        number = int(match[2])
        return cls(last_blocks=number) if match[1] == "mean" else cls(block_number=number)

    def __str__(self) -> str:
        if self.last_blocks:
            return f"mean-{self.last_blocks}"
        if self.block_number:
            return f"block-{self.block_number}"
        return "last"

    def encode_tokens(self, encoder: Encoder, mel_BTF: Tensor, valid_BP: Tensor | None = None) -> Tensor:
        """Return every token's vector as `BPD` (`Encoder`); RunError where there are not so many blocks."""
        depth = encoder.spec.depth
        if max(self.last_blocks, self.block_number) > depth:
            raise RunError(f"layer {self}: the encoder has {depth} blocks; ask for no more")
        if not (self.last_blocks or self.block_number):
            return encoder(mel_BTF, valid_BP=valid_BP)

        # The blocks from the lowest one on, of which a single one is the first.
        block_count = self.last_blocks or depth - self.block_number + 1
        outputs = encoder.top_block_outputs(mel_BTF, block_count, valid_BP=valid_BP)
        if self.block_number:
            outputs = outputs[:1]
        return torch.stack([nnf.layer_norm(x_BPD, x_BPD.shape[-1:]) for x_BPD in outputs]).mean(0)


LAST_LAYER = EncoderLayer()


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipTokens:
    """The tokens of B clips, from N views that hold sound.

    View n is the `view_N[n]`th of clip `clip_N[n]`. There are `clips` clips with at most `views` views each, and the
    grid has `rows` rows.
    """

    tokens_NPD: Tensor
    valid_NP: Tensor
    clip_N: Tensor
    view_N: Tensor
    clips: int
    views: int
    rows: int

    def pool_per_clip(self, pooling: PoolingName) -> Tensor:
        """Return one vector per clip (`pool_tokens`)."""
        return pool_tokens(
            self.tokens_NPD,
            self.valid_NP,
            self.clip_N,
            clips=self.clips,
            rows=self.rows,
            pooling=pooling,
        )

    def segment_means(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the means of at most `count` segments of each clip, `BKRD`, and which segments hold sound, bool `BK`.

        A segment is a run of time columns, over the views one after the other; each row of the grid has its own mean,
        nan where the segment has no valid column.
        """
        # So many columns make a segment, and so many segments a clip.
        columns = self.tokens_NPD.shape[1] // self.rows
        width = -(-self.views * columns // count)
        segments = -(-self.views * columns // width)

        # The segment of each column of each view, numbered over all clips.
        place_NL = self.view_N[:, None] * columns + torch.arange(columns)
        group_M = (self.clip_N[:, None] * segments + place_NL // width).flatten()

        # A column of a view is pooled as a view of one column.
        mean_GRD, columns_G = group_row_means(
            self.tokens_NPD.unflatten(1, (columns, self.rows)).flatten(0, 1),
            self.valid_NP.unflatten(1, (columns, self.rows)).flatten(0, 1),
            group_M,
            groups=self.clips * segments,
            rows=self.rows,
        )
        shape = (self.clips, segments)
        return mean_GRD.unflatten(0, shape), columns_G.unflatten(0, shape) > 0


def group_row_means(
    tokens_NPD: Tensor, valid_NP: Tensor, group_N: Tensor, *, groups: int, rows: int
) -> tuple[Tensor, Tensor]:
    """Return the mean of every row over a group's valid columns, float32 `GRD`, and the count of these columns, `G`."""
    # Sums over the valid columns of each view, and how many there are: a column is valid in all its rows or in none.
    valid_NKRD = tokens_NPD.float().masked_fill(~valid_NP[..., None], 0.0).unflatten(1, (-1, rows))
    sums_NRD = valid_NKRD.sum(1)
    columns_N = valid_NP.unflatten(1, (-1, rows))[..., 0].sum(1).float()

    # The same of each group of views.
    sums_GRD = sums_NRD.new_zeros(groups, *sums_NRD.shape[1:]).index_add(0, group_N, sums_NRD)
    columns_G = columns_N.new_zeros(groups).index_add(0, group_N, columns_N)
    return sums_GRD / columns_G[:, None, None], columns_G


def pool_tokens(
    tokens_NPD: Tensor, valid_NP: Tensor, clip_N: Tensor, *, clips: int, rows: int, pooling: PoolingName
) -> Tensor:
    """Return one vector for each of `clips` clips, float32, from the tokens of N views; view n is of clip `clip_N[n]`.

    mean       over all valid tokens of all its views, `[B, D]`
    frequency  the same for each of the grid's `rows` by itself, one after the other from the lowest bands up,
               `[B, rows D]`: regions of the spectrum are not mixed (MSM-MAE, arXiv 2204.12260)
    moments    the same, and then the standard deviation over time of each row, `[B, 2 rows D]`: how much it
               changes, like the deviations of bands in log-mel statistics

    A clip without a valid token becomes nan: it has no mean. Gradients pass.
    """
    if pooling not in get_args(PoolingName):
        raise RunError(f"pooling must be {' or '.join(get_args(PoolingName))}, got {pooling!r}")

    # The mean of each row; rows have equally many valid columns, so that their mean is the mean of all tokens.
    mean_BRD, _ = group_row_means(tokens_NPD, valid_NP, clip_N, groups=clips, rows=rows)
    if pooling == "mean":
        return mean_BRD.mean(1)
    if pooling == "frequency":
        return mean_BRD.flatten(1)

    # Moments: the mean square of the distances from a clip's means is the variance.
    columns = tokens_NPD.shape[1] // rows
    centred_NPD = tokens_NPD.float() - mean_BRD[clip_N].repeat(1, columns, 1)
    variance_BRD, _ = group_row_means(centred_NPD.square(), valid_NP, clip_N, groups=clips, rows=rows)
    std_BRD = variance_BRD.clamp(min=MIN_POOLED_VARIANCE).sqrt()
    return torch.cat((mean_BRD, std_BRD), dim=1).flatten(1)


@torch.inference_mode()
def encode_views(
    encoder: Encoder, mel_BVTF: Tensor, n_frames_BV: Tensor, layer: EncoderLayer = LAST_LAYER
) -> ClipTokens:
    """Return the tokens of any number of views of each clip, on the CPU; views past a clip's end are left out."""
    # The views that hold sound, and their valid tokens.
    clip_N, view_N = torch.nonzero(n_frames_BV, as_tuple=True)
    valid_NP = valid_token_mask(n_frames_BV[clip_N, view_N], encoder.spec.grid)

    # Encode them on the encoder's device.
    device = next(encoder.parameters()).device
    tokens_NPD = layer.encode_tokens(encoder, mel_BVTF[clip_N, view_N].to(device), valid_NP.to(device))
    return ClipTokens(
        tokens_NPD=tokens_NPD.cpu(),
        valid_NP=valid_NP,
        clip_N=clip_N,
        view_N=view_N,
        clips=len(mel_BVTF),
        views=mel_BVTF.shape[1],
        rows=encoder.spec.grid.rows,
    )


def inverse_deviation_D(std_D: np.ndarray) -> np.ndarray:
    """Return the factors that give centred features deviation 1; 0, not nan, for features that are constant."""
    return np.where(std_D > CONSTANT_DEVIATION, 1 / np.maximum(std_D, CONSTANT_DEVIATION), 0)
