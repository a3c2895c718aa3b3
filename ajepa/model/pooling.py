"""Pooling: one vector for each clip, from the valid tokens (not padding) of its views."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeGuard, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf

from ajepa.model.patches import repeat_last_frame, valid_token_mask
from ajepa.model.vit import Encoder
from pipeline.errors import RunError

PoolingName = Literal["mean", "frequency", "moments"]

DEFAULT_POOLING: PoolingName = "mean"


def is_pooling_name(name: str) -> TypeGuard[PoolingName]:
    """Whether a text is the name of a pooling."""
    return name in get_args(PoolingName)


# Length of a clip's vector divided by the encoder's width, as a function of the rows of the grid.
VECTORS_PER_CLIP: dict[PoolingName, Callable[[int], int]] = {
    "mean": lambda rows: 1,
    "frequency": lambda rows: rows,
    "moments": lambda rows: 2 * rows,
}

# A feature whose standard deviation over all clips is at most this counts as constant.
CONSTANT_DEVIATION = 1e-6

# Lower limit of the variance over columns: the square root has no finite gradient at 0.
MIN_POOLED_VARIANCE = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderLayer:
    """The layer of an encoder whose tokens are pooled. Default: the encoder's output (the last block, final norm).

    last_blocks   above 0: the last `last_blocks` blocks, as their mean or, if `concatenated`, side by side
    block_number  above 0: the output of the block with this number, counted from 1
    concatenated  True: a token is the outputs of several blocks side by side, the lowest first. With `last_blocks` 0
                  they are those of all blocks and, before them, the encoder's input: the embedded patches with their
                  positions

    The output of each block is normalised over its features, as for targets (`jepa.JepaSpec`), because later blocks
    have larger values; so is the encoder's input. Every pooling treats each feature separately, so concatenated blocks
    are pooled as if each block were pooled alone. RunError for fields that contradict each other.
    """

    last_blocks: int = 0
    block_number: int = 0
    concatenated: bool = False

    def __post_init__(self) -> None:
        has_several_meanings = self.block_number and (self.last_blocks or self.concatenated)
        if min(self.last_blocks, self.block_number) < 0 or has_several_meanings:
            raise RunError(f"a layer is the last, some of the last blocks, or one block; got {self}")

    @classmethod
    def from_name(cls, name: str) -> "EncoderLayer":
        """Return the layer of a name; else RunError.

        last        the encoder's output
        mean-K      the mean of the last K blocks
        block-N     the output of block N
        concat-K    the last K blocks side by side
        concat-all  the encoder's input and all blocks side by side
        """
        if name == "last":
            return cls()
        if name == "concat-all":
            return cls(concatenated=True)
        match = re.fullmatch(r"(mean|block|concat)-([1-9]\d*)", name)
        if match is None:
            raise RunError(
                f"layer {name!r}: expected last, mean-K or concat-K (of the last K blocks), concat-all or block-N"
            )
        number = int(match[2])
        if match[1] == "block":
            return cls(block_number=number)
        return cls(last_blocks=number, concatenated=match[1] == "concat")

    def __str__(self) -> str:
        if self.concatenated:
            return f"concat-{self.last_blocks or 'all'}"
        if self.last_blocks:
            return f"mean-{self.last_blocks}"
        if self.block_number:
            return f"block-{self.block_number}"
        return "last"

    def refuse_missing_blocks(self, depth: int) -> None:
        """Raise RunError if an encoder with `depth` blocks does not have this layer."""
        if max(self.last_blocks, self.block_number) > depth:
            raise RunError(f"layer {self}: the encoder has {depth} blocks; ask for no more")

    def vectors_per_token(self, depth: int) -> int:
        """Return the width of a token divided by the width of the encoder, which has `depth` blocks."""
        if not self.concatenated:
            return 1
        return self.last_blocks or depth + 1

    def encode_tokens(self, encoder: Encoder, mel_BTF: Tensor, valid_BP: Tensor | None = None) -> Tensor:
        """Return the vector of every token, `BPD` (`Encoder`); RunError if the encoder has too few blocks."""
        depth = encoder.spec.depth
        self.refuse_missing_blocks(depth)
        if self == LAST_LAYER:
            return encoder(mel_BTF, valid_BP=valid_BP)

        # The normalised outputs from the lowest block that is needed; a single block is the first of them.
        block_count = self.last_blocks or depth - self.block_number + 1
        outputs = encoder.top_block_outputs(mel_BTF, block_count, valid_BP=valid_BP)
        if self.block_number:
            outputs = outputs[:1]
        layers = [nnf.layer_norm(x_BPD, x_BPD.shape[-1:]) for x_BPD in outputs]
        if self.concatenated:
            return torch.cat(layers, dim=-1)
        return torch.stack(layers).mean(0)


LAST_LAYER = EncoderLayer()


class TokenLayer(Protocol):
    """Makes one vector of every token of a view: `EncoderLayer` is the usual one."""

    def encode_tokens(self, encoder: Encoder, mel_BTF: Tensor, valid_BP: Tensor | None = None) -> Tensor:
        """Return the vector of every token, `BPD`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipTokens:
    """The tokens of B clips, from N views that have valid frames.

    View n is view number `view_N[n]` of clip `clip_N[n]`. There are `clips` clips with at most `views` views each, and
    the grid has `rows` rows.
    """

    tokens_NPD: Tensor
    valid_NP: Tensor
    clip_N: Tensor
    view_N: Tensor
    clips: int
    views: int
    rows: int

    def pool_per_clip(self, pooling: PoolingName) -> Tensor:
        """Return one vector per clip (`pool_tokens`).

        Clips are pooled one by one: 128 views of 128 tokens of width 2,496 then take half as long by `moments`, because
        the copies of a clip's tokens are small. Views are in the order of their clips.
        """
        views_B = torch.bincount(self.clip_N, minlength=self.clips).tolist()
        vectors = [
            pool_tokens(
                tokens_VPD,
                valid_VP,
                torch.zeros(len(tokens_VPD), dtype=torch.int64),
                clips=1,
                rows=self.rows,
                pooling=pooling,
            )
            for tokens_VPD, valid_VP in zip(
                self.tokens_NPD.split(views_B), self.valid_NP.split(views_B), strict=True
            )
        ]
        return torch.cat(vectors)

    def segment_means(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the means of at most `count` segments of each clip, `BKRD`, and which segments are valid, bool `BK`.

        A segment is a run of consecutive time columns; the views of a clip are joined one after the other. Each row of
        the grid has its own mean. A segment without a valid column is not valid, and its means are nan.
        """
        # The number of columns in a segment, and the number of segments in a clip.
        columns = self.tokens_NPD.shape[1] // self.rows
        width = -(-self.views * columns // count)
        segments = -(-self.views * columns // width)

        # The segment number of each column of each view, counted over all clips.
        place_NL = self.view_N[:, None] * columns + torch.arange(columns)
        group_M = (self.clip_N[:, None] * segments + place_NL // width).flatten()

        # Each column is treated as a view with one column.
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
    """Return the mean of each grid row over the valid columns of a group, float32 `GRD`, and the column counts, `G`."""
    # Sums over the valid columns of each view, and their number; a column is valid in all its rows or in none.
    valid_NKRD = tokens_NPD.float().masked_fill(~valid_NP[..., None], 0.0).unflatten(1, (-1, rows))
    sums_NRD = valid_NKRD.sum(1)
    columns_N = valid_NP.unflatten(1, (-1, rows))[..., 0].sum(1).float()

    # The same sums and numbers for each group of views.
    sums_GRD = sums_NRD.new_zeros(groups, *sums_NRD.shape[1:]).index_add(0, group_N, sums_NRD)
    columns_G = columns_N.new_zeros(groups).index_add(0, group_N, columns_N)
    return sums_GRD / columns_G[:, None, None], columns_G


def pool_tokens(
    tokens_NPD: Tensor, valid_NP: Tensor, clip_N: Tensor, *, clips: int, rows: int, pooling: PoolingName
) -> Tensor:
    """Return one vector for each of `clips` clips, float32, from the tokens of N views; `clip_N[n]` is view n's clip.

    mean       mean over all valid tokens of all views of the clip, `[B, D]`
    frequency  mean over time for each of the grid's `rows` separately, concatenated from the lowest bands up,
               `[B, rows D]`: regions of the spectrum are not mixed (MSM-MAE, arXiv 2204.12260)
    moments    the vector of `frequency`, then the standard deviation over time of each row, `[B, 2 rows D]`; the
               deviations measure change over time, like those of bands in log-mel statistics

    The vector of a clip without a valid token is nan. Gradients are propagated.
    """
    if pooling not in get_args(PoolingName):
        raise RunError(f"pooling must be {' or '.join(get_args(PoolingName))}, got {pooling!r}")

    # The mean of each row. All rows have the same number of valid columns, so the mean of rows is the mean of tokens.
    mean_BRD, _ = group_row_means(tokens_NPD, valid_NP, clip_N, groups=clips, rows=rows)
    if pooling == "mean":
        return mean_BRD.mean(1)
    if pooling == "frequency":
        return mean_BRD.flatten(1)

    # Moments: the variance is the mean squared distance from the clip's row means.
    columns = tokens_NPD.shape[1] // rows
    centred_NPD = tokens_NPD.float() - mean_BRD[clip_N].repeat(1, columns, 1)
    variance_BRD, _ = group_row_means(centred_NPD.square(), valid_NP, clip_N, groups=clips, rows=rows)
    return torch.cat((mean_BRD, pooled_deviation(variance_BRD)), dim=1).flatten(1)


def pooled_deviation(variance_BRD: Tensor) -> Tensor:
    """Return the standard deviation over time for a variance, which rounding may have made negative; never quite 0."""
    return variance_BRD.clamp(min=MIN_POOLED_VARIANCE).sqrt()


def column_pooling(pooling: PoolingName) -> PoolingName:
    """Return the pooling of a single column: a column has no deviation over time."""
    return "frequency" if pooling == "moments" else pooling


def pool_columns(tokens_NPD: Tensor, rows: int, pooling: PoolingName) -> Tensor:
    """Return one vector for each time column of each view, `NCD`; a column is pooled like a clip of one column."""
    columns_MRD = tokens_NPD.unflatten(1, (-1, rows)).flatten(0, 1)
    clip_M = torch.arange(len(columns_MRD), device=columns_MRD.device)
    valid_MR = torch.ones(columns_MRD.shape[:2], dtype=torch.bool, device=columns_MRD.device)
    pooled_MD = pool_tokens(columns_MRD, valid_MR, clip_M, clips=len(columns_MRD), rows=rows, pooling=pooling)
    return pooled_MD.unflatten(0, (len(tokens_NPD), -1))


@torch.inference_mode()
def encode_views(
    encoder: Encoder, mel_BVTF: Tensor, n_frames_BV: Tensor, layer: TokenLayer = LAST_LAYER
) -> ClipTokens:
    """Return the tokens of all views of each clip, float32 on the CPU; views without a valid frame are left out.

    Under autocast the encoder computes in half precision; call everything after it outside.

    Frames past a clip's end are not read: its last frame is repeated (`repeat_last_frame`).
    """
    # Select the views that have valid frames, and their valid tokens.
    clip_N, view_N = torch.nonzero(n_frames_BV, as_tuple=True)
    n_frames_N = n_frames_BV[clip_N, view_N]
    mel_NTF = repeat_last_frame(mel_BVTF[clip_N, view_N], n_frames_N)
    valid_NP = valid_token_mask(n_frames_N, encoder.spec.grid)

    # Encode them on the encoder's device.
    device = next(encoder.parameters()).device
    tokens_NPD = layer.encode_tokens(encoder, mel_NTF.to(device), valid_NP.to(device))
    return ClipTokens(
        tokens_NPD=tokens_NPD.float().cpu(),
        valid_NP=valid_NP,
        clip_N=clip_N,
        view_N=view_N,
        clips=len(mel_BVTF),
        views=mel_BVTF.shape[1],
        rows=encoder.spec.grid.rows,
    )


def inverse_deviation_D(std_D: np.ndarray) -> np.ndarray:
    """Return the factors that scale centred features to standard deviation 1; the factor of a constant feature is 0."""
    return np.where(std_D > CONSTANT_DEVIATION, 1 / np.maximum(std_D, CONSTANT_DEVIATION), 0)
