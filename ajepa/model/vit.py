"""Encoder; predictor.

Vision transformers (arXiv 2010.11929) with what I-JEPA changes (arXiv 2301.08243): no class token, fixed
positions, and an encoder that takes any subset of the patches.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ajepa.model.patches import PatchGrid, patchify
from ajepa.model.transformer import (
    NORM_EPSILON,
    PositionName,
    TransformerSpec,
    initialise_weights,
    run_blocks,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSpec:
    """Shape of an encoder (`blocks.Stack`); the defaults are ViT-B, 85,253,376 parameters with 16 x 16 patches.

    band_norm  whether every mel band is standardised by itself (`Encoder.know_bands`): high bands, which are
               faint, then count as much as low ones
    """

    grid: PatchGrid
    width: int = 768
    depth: int = 12
    heads: int = 12
    positions: PositionName = "sincos"
    layer_scale: float = 0.0
    drop_path: float = 0.0
    band_norm: bool = False

    def __post_init__(self) -> None:
        transformer_spec_of(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictorSpec:
    """Shape of a predictor; the defaults are Audio-JEPA's, 11,238,912 parameters on a ViT-B."""

    width: int = 384
    depth: int = 6
    heads: int = 12
    positions: PositionName = "sincos"
    layer_scale: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        transformer_spec_of(self)


def transformer_spec_of(spec: EncoderSpec | PredictorSpec) -> TransformerSpec:
    """The blocks that a spec asks for; ValueError where they cannot be."""
    return TransformerSpec(
        width=spec.width,
        depth=spec.depth,
        heads=spec.heads,
        positions=spec.positions,
        layer_scale=spec.layer_scale,
        drop_path=spec.drop_path,
    )


def a_jepa_encoder(size: Literal["s", "b", "l"], grid: PatchGrid) -> EncoderSpec:
    """The three encoders of A-JEPA (arXiv 2311.15830): ViT-S, ViT-B and ViT-L."""
    width, depth, heads = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}[size]
    return EncoderSpec(grid=grid, width=width, depth=depth, heads=heads)


A_JEPA_PREDICTOR = PredictorSpec(width=512, depth=16, heads=16)  # the paper gives no heads: 32 values each


class Encoder(nn.Module):
    """Patches in, one vector per token out. Weights are a function of `spec` and `seed` alone.

    recompute  trade time for memory: see `blocks.through`
    """

    positions_PD: Tensor
    turns_2PE: Tensor | None
    bands_2F: Tensor | None

    def __init__(self, spec: EncoderSpec, *, seed: int = 0) -> None:
        super().__init__()
        self.spec, self.transformer_spec, self.recompute = spec, transformer_spec_of(spec), False
        self.embed = nn.Linear(spec.grid.patch_values, spec.width)
        bands_2F = torch.tensor([[0.0], [1.0]]).repeat(1, spec.grid.bands) if spec.band_norm else None
        self.register_buffer("bands_2F", bands_2F)
        self.register_buffer(
            "positions_PD", self.transformer_spec.additive_positions(spec.grid), persistent=False
        )
        self.register_buffer("turns_2PE", self.transformer_spec.rotary_angles(spec.grid), persistent=False)
        self.blocks = self.transformer_spec.build_blocks()
        self.norm = nn.LayerNorm(spec.width, eps=NORM_EPSILON)
        initialise_weights(self, seed)

    def set_band_statistics(self, mean_F: Tensor, std_F: Tensor) -> None:
        """Standardise every band with these from now on, where the spec says so; checkpoints hold them."""
        if self.bands_2F is not None:
            self.bands_2F.copy_(torch.stack((mean_F, std_F)))

    def input_patches(self, mel_BTF: Tensor) -> Tensor:
        """The patches as the first layer sees them, `BPN`."""
        if self.bands_2F is not None:
            mel_BTF = (mel_BTF - self.bands_2F[0]) / self.bands_2F[1]
        return patchify(mel_BTF, self.spec.grid)

    def forward(
        self,
        mel_BTF: Tensor,
        tokens_NK: Tensor | None = None,
        valid_BP: Tensor | None = None,
        keep_L2N: Tensor | None = None,
    ) -> Tensor:
        """Every token's vector as `BPD`, or with `tokens_NK` those tokens' alone as `NKD`.

        N is B, or a multiple of it: several sets of tokens for each clip, one after the other. Tokens not asked
        for are left out before the patch embedding: nothing of them can reach the output. No token attends to
        one that is not in `valid_BP` (N rows, if N is more), and what comes out *at* such a one means nothing.
        `mel_BTF` is normalised and exactly as large as the grid (ValueError); `keep_L2N` is drop path's. With every
        token, `valid_LBP` and `keep_L2NP` may stand for them: others in each block, for each token.
        """
        return self.norm(self.top_block_outputs(mel_BTF, 1, tokens_NK, valid_BP, keep_L2N)[0])

    def top_block_outputs(
        self,
        mel_BTF: Tensor,
        block_count: int,
        tokens_NK: Tensor | None = None,
        valid_BP: Tensor | None = None,
        keep_L2N: Tensor | None = None,
    ) -> list[Tensor]:
        """What the last `count` blocks say, lowest first, before the final norm."""
        x, positions, turns = (
            self.input_patches(mel_BTF),
            self.positions_PD,
            _rotations_of_all(self.turns_2PE),
        )
        if tokens_NK is not None:
            x, positions = gather_tokens(x, tokens_NK), positions[tokens_NK]
            turns = _rotations_at(self.turns_2PE, tokens_NK)
            valid_BP = None if valid_BP is None else valid_BP.gather(1, tokens_NK)
        x = self.embed(x) + positions
        return run_blocks(
            self.blocks, x, valid_BP, turns, keep_L2N, recompute=self.recompute, top_blocks=block_count
        )


class Predictor(nn.Module):
    """From the vectors of the context to a guess at those of hidden tokens, each group by itself.

    With `clip_head` also to a guess at the whole clip. A guess has `target_width` values, by default those of the
    encoder. `recompute` as in Encoder.
    """

    positions_PD: Tensor
    turns_2PE: Tensor | None

    def __init__(
        self,
        spec: PredictorSpec,
        encoder_width: int,
        grid: PatchGrid,
        *,
        seed: int = 0,
        clip_head: bool = False,
        target_width: int | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.transformer_spec, self.recompute = spec, transformer_spec_of(spec), False
        self.embed = nn.Linear(encoder_width, spec.width)
        self.mask_token_D = nn.Parameter(torch.zeros(spec.width))
        self.register_buffer("positions_PD", self.transformer_spec.additive_positions(grid), persistent=False)
        self.register_buffer("turns_2PE", self.transformer_spec.rotary_angles(grid), persistent=False)
        self.blocks = self.transformer_spec.build_blocks()
        self.norm = nn.LayerNorm(spec.width, eps=NORM_EPSILON)
        target_width = target_width or encoder_width
        self.out = nn.Linear(spec.width, target_width)
        self.clip_head = nn.Linear(encoder_width, target_width) if clip_head else None
        initialise_weights(self, seed)

    def forward(
        self,
        context_NKD: Tensor,
        context_NK: Tensor,
        targets_NGQ: Tensor,
        valid_NP: Tensor | None = None,
        keep_L2M: Tensor | None = None,
    ) -> Tensor:
        """Predictions `NGQD` for the tokens `targets_NGQ`, from `context_NKD` at the tokens `context_NK`.

        A target is a mask token at its position; it sees the context and the other targets of its group, of
        both only the valid ones. `keep_L2M` is drop path's, for M = N G.
        """
        rows, groups, queries = targets_NGQ.shape
        context = self.embed(context_NKD) + self.positions_PD[context_NK]
        targets = self.mask_token_D + self.positions_PD[targets_NGQ.flatten(0, 1)]
        x = torch.cat((context.repeat_interleave(groups, dim=0), targets), dim=1)
        valid, turns = None, None
        if valid_NP is not None or self.turns_2PE is not None:
            tokens = torch.cat((context_NK[:, None].expand(-1, groups, -1), targets_NGQ), dim=2)
            turns = _rotations_at(self.turns_2PE, tokens.flatten(0, 1))
            if valid_NP is not None:
                valid = valid_NP.gather(1, tokens.flatten(1)).view(rows * groups, -1)
        (x,) = run_blocks(
            self.blocks, x, valid, turns, keep_L2M, recompute=self.recompute, last_tokens=queries
        )
        return self.out(self.norm(x)).unflatten(0, (rows, groups))


def _rotations_of_all(turns_2PE: Tensor | None) -> Tensor | None:
    return None if turns_2PE is None else turns_2PE[:, None]


def _rotations_at(turns_2PE: Tensor | None, tokens_NK: Tensor) -> Tensor | None:
    return None if turns_2PE is None else turns_2PE[:, tokens_NK]


def gather_tokens(x_BPD: Tensor, tokens_NK: Tensor) -> Tensor:
    """The vectors of the given tokens of each clip, as `NKD`; N a multiple of B, the sets of one clip together."""
    sets = len(tokens_NK) // len(x_BPD)
    clip_N1 = torch.arange(len(tokens_NK), device=x_BPD.device)[:, None] // sets
    return x_BPD[clip_N1, tokens_NK]
