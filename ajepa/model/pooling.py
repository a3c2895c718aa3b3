"""Pooling: from the tokens of a clip's views to one vector for the clip, over tokens that hold sound alone."""

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

DEFAULT_POOLING: PoolingName = "mean"  # what is used where nothing is said

VECTORS_PER_CLIP: dict[
    PoolingName, Callable[[int], int]
] = {  # as long as so many tokens' vectors, by the grid's rows
    "mean": lambda rows: 1,
    "frequency": lambda rows: rows,
    "moments": lambda rows: 2 * rows,
}

CONSTANT_DEVIATION = 1e-6  # a feature that varies less over all clips is the same in all

MIN_POOLED_VARIANCE = 1e-12  # of what is the same in all columns: the root of 0 has no finite gradient


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderLayer:
    """Which tokens are pooled: by default what the encoder says, its last block after its norm.

    blocks  above 0: the mean of its last so many blocks
    block   above 0: its block of that number, the first is 1

    What comes from a block is normalised over its features, as where it is a target (`jepa.JepaSpec`): blocks
    further up speak louder. RunError where both are asked for.
    """

    last_blocks: int = 0
    block_number: int = 0

    def __post_init__(self) -> None:
        if min(self.last_blocks, self.block_number) < 0 or (self.last_blocks and self.block_number):
            raise RunError(f"a layer is the last, the mean of the last blocks, or one block; got {self}")

    @classmethod
    def from_name(cls, name: str) -> "EncoderLayer":
        """`last`, `mean-K` (the last K blocks) or `block-N`; RunError for anything else."""
        if name == "last":
            return cls()
        told = re.fullmatch(r"(mean|block)-([1-9]\d*)", name)
        if told is None:
            raise RunError(f"layer {name!r}: expected last, mean-K (of the last K blocks) or block-N")
        number = int(told[2])
        return cls(last_blocks=number) if told[1] == "mean" else cls(block_number=number)

    def __str__(self) -> str:
        if self.last_blocks:
            return f"mean-{self.last_blocks}"
        return f"block-{self.block_number}" if self.block_number else "last"

    def encode_tokens(self, encoder: Encoder, mel_BTF: Tensor, valid_BP: Tensor | None = None) -> Tensor:
        """Every token's vector as `BPD` (`Encoder`); RunError where there are not so many blocks."""
        depth = encoder.spec.depth
        if max(self.last_blocks, self.block_number) > depth:
            raise RunError(f"layer {self}: the encoder has {depth} blocks; ask for no more")
        if not (self.last_blocks or self.block_number):
            return encoder(mel_BTF, valid_BP=valid_BP)
        told = encoder.top_block_outputs(
            mel_BTF, self.last_blocks or depth - self.block_number + 1, valid_BP=valid_BP
        )
        wanted = told if self.last_blocks else told[:1]
        return torch.stack([nnf.layer_norm(said, said.shape[-1:]) for said in wanted]).mean(0)


LAST_LAYER = EncoderLayer()


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipTokens:
    """What an encoder says of B clips: the tokens of N views that hold sound, `clips` and `views` of each at most.

    View n is the `view_N[n]`th of clip `clip_N[n]`; the grid has `rows` rows.
    """

    tokens_NPD: Tensor
    valid_NP: Tensor
    clip_N: Tensor
    view_N: Tensor
    clips: int
    views: int
    rows: int

    def pool_per_clip(self, pooling: PoolingName) -> Tensor:
        """One vector per clip (`pool`)."""
        return pool_tokens(
            self.tokens_NPD,
            self.valid_NP,
            self.clip_N,
            clips=self.clips,
            rows=self.rows,
            pooling=pooling,
        )

    def segment_means(self, count: int) -> tuple[Tensor, Tensor]:
        """The time columns of all views merged into at most `count` stretches: means `BKRD` (nan where there is
        no valid column), and which stretches hold sound, `BK`."""
        columns = self.tokens_NPD.shape[1] // self.rows
        width = -(-self.views * columns // count)
        place_NL = self.view_N[:, None] * columns + torch.arange(columns)
        stretches = -(-self.views * columns // width)
        group_M = (self.clip_N[:, None] * stretches + place_NL // width).flatten()
        mean_GRD, held_G = group_row_means(
            self.tokens_NPD.unflatten(1, (columns, self.rows)).flatten(0, 1),
            self.valid_NP.unflatten(1, (columns, self.rows)).flatten(0, 1),
            group_M,
            groups=self.clips * stretches,
            rows=self.rows,
        )
        shape = (self.clips, stretches)
        return mean_GRD.unflatten(0, shape), held_G.unflatten(0, shape) > 0


def group_row_means(
    tokens_NPD: Tensor, valid_NP: Tensor, group_N: Tensor, *, groups: int, rows: int
) -> tuple[Tensor, Tensor]:
    """Of each group the mean of every row over its valid columns, float32 `GRD`, and how many these are, `G`."""
    kept_NKRD = tokens_NPD.float().masked_fill(~valid_NP[..., None], 0.0).unflatten(1, (-1, rows))
    sums_NRD, columns_N = kept_NKRD.sum(1), valid_NP.unflatten(1, (-1, rows))[..., 0].sum(1).float()
    sums_GRD = sums_NRD.new_zeros(groups, *sums_NRD.shape[1:]).index_add(0, group_N, sums_NRD)
    columns_G = columns_N.new_zeros(groups).index_add(0, group_N, columns_N)
    return sums_GRD / columns_G[:, None, None], columns_G


def pool_tokens(
    tokens_NPD: Tensor, valid_NP: Tensor, clip_N: Tensor, *, clips: int, rows: int, pooling: PoolingName
) -> Tensor:
    """One vector for each of `clips` clips, float32, from the tokens of N views; view n is of clip `clip_N[n]`.

    mean       over all valid tokens of all its views, `[B, D]`
    frequency  the same for each of the grid's `rows` by itself, one after the other from the lowest bands up,
               `[B, rows D]`: what is heard where in the spectrum is not mixed (MSM-MAE, arXiv 2204.12260)
    moments    that, and then the standard deviation over time of the same, `[B, 2 rows D]`: how much it
               changes, as log-mel statistics tell of a band

    A clip without a valid token becomes nan: it has no mean. Gradients pass.
    """
    if pooling not in get_args(PoolingName):
        raise RunError(f"pooling must be {' or '.join(get_args(PoolingName))}, got {pooling!r}")
    mean_BRD, _ = group_row_means(tokens_NPD, valid_NP, clip_N, groups=clips, rows=rows)
    if pooling == "mean":
        return mean_BRD.mean(1)
    if pooling == "frequency":
        return mean_BRD.flatten(1)
    columns = tokens_NPD.shape[1] // rows
    apart_NPD = tokens_NPD.float() - mean_BRD[clip_N].repeat(1, columns, 1)
    variance_BRD, _ = group_row_means(apart_NPD.square(), valid_NP, clip_N, groups=clips, rows=rows)
    return torch.cat((mean_BRD, variance_BRD.clamp(min=MIN_POOLED_VARIANCE).sqrt()), dim=1).flatten(1)


@torch.inference_mode()
def encode_views(
    encoder: Encoder, mel_BVTF: Tensor, n_frames_BV: Tensor, layer: EncoderLayer = LAST_LAYER
) -> ClipTokens:
    """The tokens of any number of views of each clip, on the CPU; a view past the clip's end is never encoded."""
    clip_N, view_N = torch.nonzero(n_frames_BV, as_tuple=True)
    valid_NP = valid_token_mask(n_frames_BV[clip_N, view_N], encoder.spec.grid)
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


def pool_views(
    encoder: Encoder,
    mel_BVTF: Tensor,
    n_frames_BV: Tensor,
    *,
    pooling: PoolingName = DEFAULT_POOLING,
    layer: EncoderLayer = LAST_LAYER,
) -> Tensor:
    """One vector per clip, on the CPU, from any number of views of each (`encoded`, `pool`)."""
    return encode_views(encoder, mel_BVTF, n_frames_BV, layer).pool_per_clip(pooling)


def inverse_deviation_D(std_D: np.ndarray) -> np.ndarray:
    """What a centred feature is multiplied by to have deviation 1; 0, not nan, where it is the same in all clips."""
    return np.where(std_D > CONSTANT_DEVIATION, 1 / np.maximum(std_D, CONSTANT_DEVIATION), 0)
