"""Transformer blocks; encoder; predictor.

Vision transformers (arXiv 2010.11929) with what I-JEPA changes (arXiv 2301.08243): no class token, fixed
positions, and an encoder that takes any subset of the patches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ajepa.patches import PatchGrid, patchify, sincos_positions

NORM_EPSILON = 1e-6
INIT_STD = 0.02


def _check_shape(width: int, depth: int, heads: int) -> None:
    if min(width, depth, heads) < 1 or width % heads or width % 4:
        raise ValueError(
            "width must be a multiple of heads and, for 2-D positions, of 4; "
            f"got width {width}, depth {depth}, heads {heads}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSpec:
    """Shape of an encoder; the defaults are ViT-B, 85,253,376 parameters with 16 x 16 patches."""

    grid: PatchGrid
    width: int = 768
    depth: int = 12
    heads: int = 12

    def __post_init__(self) -> None:
        _check_shape(self.width, self.depth, self.heads)


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictorSpec:
    """Shape of a predictor; the defaults are Audio-JEPA's, 11,238,912 parameters on a ViT-B."""

    width: int = 384
    depth: int = 6
    heads: int = 12

    def __post_init__(self) -> None:
        _check_shape(self.width, self.depth, self.heads)


def encoder_spec(size: Literal["s", "b", "l"], grid: PatchGrid) -> EncoderSpec:
    """The three encoders of A-JEPA (arXiv 2311.15830): ViT-S, ViT-B and ViT-L."""
    width, depth, heads = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}[size]
    return EncoderSpec(grid=grid, width=width, depth=depth, heads=heads)


A_JEPA_PREDICTOR = PredictorSpec(width=512, depth=16, heads=16)  # the paper gives no heads: 32 values each


class Encoder(nn.Module):
    """Patches in, one vector per token out. Weights are a function of `spec` and `seed` alone."""

    positions_PD: Tensor

    def __init__(self, spec: EncoderSpec, *, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Linear(spec.grid.patch_values, spec.width)
        self.register_buffer("positions_PD", sincos_positions(spec.grid, spec.width), persistent=False)
        self.blocks = nn.ModuleList(Block(spec.width, spec.heads) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(spec.width, eps=NORM_EPSILON)
        initialise(self, seed)

    def forward(
        self, mel_BTF: Tensor, tokens_BK: Tensor | None = None, valid_BP: Tensor | None = None
    ) -> Tensor:
        """Every token's vector as `BPD`, or with `tokens_BK` those tokens' alone as `BKD`.

        Tokens not asked for are left out before the patch embedding: nothing of them can reach the output. No
        token attends to one that is not in `valid_BP`, and what comes out *at* such a one means nothing.
        `mel_BTF` is normalised and exactly as large as the grid (ValueError).
        """
        x, positions = patchify(mel_BTF, self.spec.grid), self.positions_PD
        if tokens_BK is not None:
            x, positions = pick(x, tokens_BK), positions[tokens_BK]
            valid_BP = None if valid_BP is None else valid_BP.gather(1, tokens_BK)
        x = self.embed(x) + positions
        for block in self.blocks:
            x = block(x, valid_BP)
        return self.norm(x)


class Predictor(nn.Module):
    """From the vectors of the context to a guess at those of hidden tokens, each group by itself."""

    positions_PD: Tensor

    def __init__(self, spec: PredictorSpec, encoder_width: int, grid: PatchGrid, *, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Linear(encoder_width, spec.width)
        self.mask_token_D = nn.Parameter(torch.zeros(spec.width))
        self.register_buffer("positions_PD", sincos_positions(grid, spec.width), persistent=False)
        self.blocks = nn.ModuleList(Block(spec.width, spec.heads) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(spec.width, eps=NORM_EPSILON)
        self.out = nn.Linear(spec.width, encoder_width)
        initialise(self, seed)

    def forward(
        self, context_BKD: Tensor, context_BK: Tensor, targets_BGQ: Tensor, valid_BP: Tensor | None = None
    ) -> Tensor:
        """Predictions `BGQD` for the tokens `targets_BGQ`, from `context_BKD` at the tokens `context_BK`.

        A target is a mask token at its position; it sees the context and the other targets of its group, of
        both only the valid ones.
        """
        clips, groups, queries = targets_BGQ.shape
        context = self.embed(context_BKD) + self.positions_PD[context_BK]
        targets = self.mask_token_D + self.positions_PD[targets_BGQ.flatten(0, 1)]
        x = torch.cat((context.repeat_interleave(groups, dim=0), targets), dim=1)
        valid = None
        if valid_BP is not None:
            tokens = torch.cat((context_BK[:, None].expand(-1, groups, -1), targets_BGQ), dim=2)
            valid = valid_BP.gather(1, tokens.flatten(1)).view(clips * groups, -1)
        for block in self.blocks:
            x = block(x, valid)
        return self.out(self.norm(x[:, -queries:])).unflatten(0, (clips, groups))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP four times as wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BND: Tensor, valid_BN: Tensor | None = None) -> Tensor:
        x_BND = x_BND + self.attention(self.attention_norm(x_BND), valid_BN)
        return x_BND + self.mlp(self.mlp_norm(x_BND))


class Attention(nn.Module):
    """Multi-head self-attention with biases everywhere."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, valid_BN: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attend = attention_for(q.device.type, q.dtype)
        return self.out(attend(q, k, v, valid_BN).transpose(1, 2).flatten(2))


AttentionOp = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attention_for(device: str, dtype: torch.dtype) -> AttentionOp:
    """The faster of two equal ways, as measured: written out for bf16 on CPUs, the fused kernel elsewhere.

    In bf16 on a CPU with AMX the fused kernel's backward took 31 % of a ViT-S step, and writing it out made the
    step 1.4x faster. In fp32 on an AVX2 CPU the fused kernel made it 1.02 to 1.15x faster (128 to 512 tokens).
    """
    return written_out_attention if (device, dtype) == ("cpu", torch.bfloat16) else fused_attention


def fused_attention(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, valid_BN: Tensor | None) -> Tensor:
    """`softmax(q k^T / sqrt(D)) v` over the valid keys, by the device's own kernel."""
    bias = None if valid_BN is None else _barred(valid_BN, q_BHND.dtype)
    return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=bias)


def written_out_attention(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, valid_BN: Tensor | None) -> Tensor:
    """The same as two products and a softmax."""
    scores_BHNN = (q_BHND * q_BHND.shape[-1] ** -0.5) @ k_BHND.transpose(-2, -1)
    if valid_BN is not None:
        scores_BHNN += _barred(valid_BN, scores_BHNN.dtype)
    return scores_BHNN.softmax(dim=-1) @ v_BHND


def _barred(valid_BN: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to the scores, `B11N`. Finite, so that a clip without a single valid key yields no NaN."""
    bias = torch.zeros(valid_BN.shape, dtype=dtype, device=valid_BN.device)
    return bias.masked_fill(~valid_BN, torch.finfo(dtype).min)[:, None, None]


def pick(x_BPD: Tensor, tokens_BK: Tensor) -> Tensor:
    """The vectors of the given tokens of each clip, as `BKD`."""
    clip_B1 = torch.arange(len(x_BPD), device=x_BPD.device)[:, None]
    return x_BPD[clip_B1, tokens_BK]


def initialise(module: nn.Module, seed: int) -> None:
    """ViT's weights: matrices and mask tokens truncated normal (std 0.02), biases zero, norms' scales one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.trunc_normal_(parameter, std=INIT_STD, generator=generator)
