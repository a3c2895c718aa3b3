"""Multi-head self-attention: which keys count, how positions turn queries and keys, which kernel runs.

Transformer blocks: one of them, a stack of them, and what a stack may be told to do.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ajepa.model.patches import PatchGrid, rotary_positions, sincos_positions


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases everywhere."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x_BND: Tensor,
        valid_BN: Tensor | None = None,
        turns_2BNE: Tensor | None = None,
        last_tokens: int | None = None,
    ) -> Tensor:
        """No token attends to one that is not valid; `turns_2BNE` are the cosines and sines of `turned`.

        With `last` only so many tokens at the end ask, and come out; all are attended to.
        """
        q, k, v = (
            self._project_qkv(x_BND)
            if last_tokens is None
            else self._project_last_queries(x_BND, last_tokens)
        )
        if turns_2BNE is not None:
            q, k = rotate_pairs(q, turns_2BNE[:, :, -q.shape[2] :]), rotate_pairs(k, turns_2BNE)
        attend = choose_attention(q.device.type, q.dtype)
        return self.out(attend(q, k, v, valid_BN).transpose(1, 2).flatten(2))

    def _project_qkv(self, x_BND: Tensor) -> Iterable[Tensor]:
        return self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def _project_last_queries(self, x_BND: Tensor, last_tokens: int) -> Iterable[Tensor]:
        width = x_BND.shape[-1]
        (for_q, for_kv), (q_bias, kv_bias) = (x.split((width, 2 * width)) for x in self.qkv.parameters())
        q_BQD, kv_BND = F.linear(x_BND[:, -last_tokens:], for_q, q_bias), F.linear(x_BND, for_kv, kv_bias)
        k, v = kv_BND.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q_BQD.unflatten(-1, (self.heads, -1)).transpose(1, 2), k, v


def rotate_pairs(x_BHND: Tensor, turns_2BNE: Tensor) -> Tensor:
    """Each pair of values of a token turned by that token's angles: pair e is the values e and e + D/2.

    The product of a turned query and a turned key depends on the difference of their angles alone (RoFormer,
    arXiv 2104.09864). Computed in float32, returned in the type of `x`.
    """
    left, right = x_BHND.float().chunk(2, dim=-1)
    cos, sin = turns_2BNE[:, :, None]
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1).type_as(x_BHND)


AttentionOp = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def choose_attention(device: str, dtype: torch.dtype) -> AttentionOp:
    """The faster of two equal ways, as measured: written out for bf16 on CPUs, the fused kernel elsewhere.

    In bf16 on a CPU with AMX the fused kernel's backward took 31 % of a ViT-S step, and writing it out made the
    step 1.4x faster. In fp32 on an AVX2 CPU the fused kernel made it 1.02 to 1.15x faster (128 to 512 tokens).
    """
    return written_out_attention if (device, dtype) == ("cpu", torch.bfloat16) else fused_attention


def fused_attention(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, valid_BN: Tensor | None) -> Tensor:
    """`softmax(q k^T / sqrt(D)) v` over the valid keys, by the device's own kernel."""
    bias = None if valid_BN is None else _attention_bias(valid_BN, q_BHND.dtype)
    return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=bias)


def written_out_attention(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, valid_BN: Tensor | None) -> Tensor:
    """The same as two products and a softmax."""
    scores_BHNN = (q_BHND * q_BHND.shape[-1] ** -0.5) @ k_BHND.transpose(-2, -1)
    if valid_BN is not None:
        scores_BHNN += _attention_bias(valid_BN, scores_BHNN.dtype)
    return scores_BHNN.softmax(dim=-1) @ v_BHND


def _attention_bias(valid_BN: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to the scores, `B11N`. Finite, so that a clip without a single valid key yields no NaN."""
    bias = torch.zeros(valid_BN.shape, dtype=dtype, device=valid_BN.device)
    return bias.masked_fill(~valid_BN, torch.finfo(dtype).min)[:, None, None]


NORM_EPSILON = 1e-6

INIT_STD = 0.02

PositionName = Literal["sincos", "rope"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSpec:
    """Shape and options of the blocks of an encoder or predictor.

    positions    `sincos`: a fixed code is added to each token (both papers); `rope`: queries and keys are
                 turned by row and column, so that attention knows distances (arXiv 2104.09864, in 2-D)
    layer_scale  each branch is multiplied by a learnt vector that starts at this value (arXiv 2103.17239);
                 0: no such vector
    drop_path    how often a clip skips a branch of the last block in training; the first block's are never
                 skipped, those between linearly more often (arXiv 1603.09382)
    """

    width: int
    depth: int
    heads: int
    positions: PositionName
    layer_scale: float
    drop_path: float

    def __post_init__(self) -> None:
        shape = f"got width {self.width}, depth {self.depth}, heads {self.heads}"
        if min(self.width, self.depth, self.heads) < 1 or self.width % self.heads or self.width % 4:
            raise ValueError(f"width must be a multiple of heads and, for 2-D positions, of 4; {shape}")
        if self.positions not in get_args(PositionName):
            raise ValueError(
                f"positions must be {' or '.join(get_args(PositionName))}, got {self.positions!r}"
            )
        if self.positions == "rope" and self.width // self.heads % 4:
            raise ValueError(f"2-D RoPE needs heads whose width is a multiple of 4; {shape}")
        if not (0 <= self.drop_path < 1 and self.layer_scale >= 0):
            raise ValueError(
                "drop_path must lie in [0, 1) and layer_scale not be negative, "
                f"got {self.drop_path} and {self.layer_scale}"
            )

    def build_blocks(self) -> nn.ModuleList:
        """The blocks; `initialise` gives them their weights."""
        return nn.ModuleList(
            TransformerBlock(self.width, self.heads, self.layer_scale) for _ in range(self.depth)
        )

    def additive_positions(self, grid: PatchGrid) -> Tensor:
        """What is added to the tokens, float32 `PD`: under `rope` zeros, which still make the sum float32."""
        if self.positions == "rope":
            return torch.zeros(grid.tokens, self.width)
        return sincos_positions(grid, self.width)

    def rotary_angles(self, grid: PatchGrid) -> Tensor | None:
        """Cosine and sine of the angles by which queries and keys are turned, `2PE`; None without `rope`."""
        return rotary_positions(grid, self.width // self.heads) if self.positions == "rope" else None

    def draw_drop_path(self, rng: np.random.Generator, clips: int) -> Tensor | None:
        """What each branch of each block is multiplied by for each clip, `L2B`: 0, or 1 over how often it stays.

        None without drop path; then the generator is left alone.
        """
        if not self.drop_path:
            return None
        drop_L11 = np.linspace(0.0, self.drop_path, self.depth)[:, None, None]
        stays_L2B = np.moveaxis(rng.random((clips, self.depth, 2)), 0, 2) >= drop_L11
        return torch.from_numpy((stays_L2B / (1 - drop_L11)).astype(np.float32))


class TransformerBlock(nn.Module):
    """A pre-norm transformer block: attention, then an MLP four times as wide."""

    attention_scale_D: Tensor | None
    mlp_scale_D: Tensor | None

    def __init__(self, width: int, heads: int, layer_scale: float = 0.0) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        for name in ("attention_scale_D", "mlp_scale_D"):
            scale_D = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None
            self.register_parameter(name, scale_D)

    def forward(
        self,
        x_BND: Tensor,
        valid_BN: Tensor | None = None,
        turns_2BNE: Tensor | None = None,
        keep_2B: Tensor | None = None,
        last_tokens: int | None = None,
    ) -> Tensor:
        """What becomes of each token; with `last`, of so many at the end, to which all the others still speak."""
        attention_keep_B, mlp_keep_B = (None, None) if keep_2B is None else keep_2B
        mixed_BND = self.attention(self.attention_norm(x_BND), valid_BN, turns_2BNE, last_tokens)
        if last_tokens is not None:
            x_BND = x_BND[:, -last_tokens:]
        x_BND = x_BND + scale_branch(mixed_BND, self.attention_scale_D, attention_keep_B)
        return x_BND + scale_branch(self.mlp(self.mlp_norm(x_BND)), self.mlp_scale_D, mlp_keep_B)


def scale_branch(branch_BND: Tensor, scale_D: Tensor | None, keep_B: Tensor | None) -> Tensor:
    """A branch times its layer scale, and times what is left of it for each clip, or each token (`keep_BN`)."""
    if scale_D is not None:
        branch_BND = branch_BND * scale_D
    return (
        branch_BND if keep_B is None else branch_BND * keep_B.reshape(*keep_B.shape, *[1] * (3 - keep_B.ndim))
    )


def run_blocks(
    blocks: nn.ModuleList,
    x_BND: Tensor,
    valid_BN: Tensor | None,
    turns_2BNE: Tensor | None,
    keep_L2B: Tensor | None = None,
    *,
    recompute: bool = False,
    top_blocks: int = 1,
    last_tokens: int | None = None,
) -> list[Tensor]:
    """What the last `top` blocks say, lowest first; with `last` the last block of so many tokens at the end alone.

    `valid_LBN` instead of `valid_BN` has another for each block, `keep_L2BN` instead of `keep_L2B` for each token.
    With `recompute` a block's activations are thrown away and computed again in the backward pass, to the bit:
    all that is random was drawn before and handed in.
    """
    outputs: list[Tensor] = []
    for layer, block in enumerate(blocks):
        keep, asked = (
            None if keep_L2B is None else keep_L2B[layer],
            last_tokens if block is blocks[-1] else None,
        )
        valid = valid_BN if valid_BN is None or valid_BN.ndim == 2 else valid_BN[layer]
        told = (x_BND, valid, turns_2BNE, keep, asked)
        if recompute and torch.is_grad_enabled():
            x_BND = checkpoint(block, *told, use_reentrant=False, preserve_rng_state=False)
        else:
            x_BND = block(*told)
        outputs = [*outputs, x_BND][-top_blocks:]
    return outputs


def compile_blocks(blocks: Iterable[nn.Module], *, dynamic: bool) -> None:
    """Have torch compile each block; equal blocks share one compilation. `dynamic`: for any token count."""
    for block in blocks:
        block.compile(dynamic=dynamic)


def initialise_weights(module: nn.Module, seed: int) -> None:
    """ViT's weights: matrices and mask tokens truncated normal (std 0.02), biases zero, norms' scales one.

    Layer scales keep the value that they were made with.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif not name.endswith("scale_D"):
            nn.init.trunc_normal_(parameter, std=INIT_STD, generator=generator)
