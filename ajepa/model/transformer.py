"""The transformer blocks of encoders and predictors: their spec, the block, its attention, and the stack of blocks.

Pre-norm blocks as in ViT (arXiv 2010.11929). Drop path is drawn before the forward pass and is an argument. So a pass
over a part of a batch, or a recomputation for the backward pass, drops the same branches.
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

NORM_EPSILON = 1e-6

INIT_STD = 0.02

PositionName = Literal["sincos", "rope"]

InitName = Literal["truncated", "xavier"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSpec:
    """Shape and options of the blocks of an encoder or predictor.

    positions    position encoding. `sincos`: a fixed code is added to each token, as in both papers. `rope`: queries
                 and keys are rotated by row and column, so attention depends on distances (arXiv 2104.09864, in 2-D)
    layer_scale  initial value of a learnt vector that multiplies each branch (arXiv 2103.17239); 0: no layer scale
    drop_path    probability that a clip skips a branch of the last block, in training. It grows linearly from 0 in
                 the first block (arXiv 1603.09382)
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
        """Return the blocks; call `initialise_weights` afterwards to set their weights."""
        return nn.ModuleList(
            TransformerBlock(self.width, self.heads, self.layer_scale) for _ in range(self.depth)
        )

    def additive_positions(self, grid: PatchGrid) -> Tensor:
        """Return the position code that is added to the tokens, float32 `PD`; zeros with `rope`."""
        # Adding zeros makes the sum float32, as adding the code does.
        if self.positions == "rope":
            return torch.zeros(grid.tokens, self.width)
        return sincos_positions(grid, self.width)

    def rotary_angles(self, grid: PatchGrid) -> Tensor | None:
        """Return cosine and sine of the rotation angles of queries and keys, `2PE`; None without `rope`."""
        return rotary_positions(grid, self.width // self.heads) if self.positions == "rope" else None

    def draw_drop_path(self, rng: np.random.Generator, clips: int) -> Tensor | None:
        """Draw a factor for each branch of each block and each clip, `L2B`; it multiplies the branch.

        A factor is 0, or 1 / (probability that the branch is kept). Without drop path nothing is drawn, and the result
        is None.
        """
        if not self.drop_path:
            return None
        drop_L11 = np.linspace(0.0, self.drop_path, self.depth)[:, None, None]
        # Clips are the first axis of the draw: a part of a batch can draw its share (`randomness.MicroBatchRng`).
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
        """Return the block's output for each token, or only for the last `last_tokens` tokens, which attend to all.

        Arguments as in `SelfAttention.forward`; `keep_2B` (or `2BN`) contains drop path's factors of the two branches.
        """
        attention_keep_B, mlp_keep_B = (None, None) if keep_2B is None else keep_2B

        # Attention branch.
        mixed_BND = self.attention(self.attention_norm(x_BND), valid_BN, turns_2BNE, last_tokens)
        if last_tokens is not None:
            x_BND = x_BND[:, -last_tokens:]
        x_BND = x_BND + scale_branch(mixed_BND, self.attention_scale_D, attention_keep_B)

        # MLP branch.
        return x_BND + scale_branch(self.mlp(self.mlp_norm(x_BND)), self.mlp_scale_D, mlp_keep_B)


def scale_branch(branch_BND: Tensor, scale_D: Tensor | None, keep_B: Tensor | None) -> Tensor:
    """Return a branch times its layer scale and drop path's factor of each clip, or of each token (`keep_BN`)."""
    if scale_D is not None:
        branch_BND = branch_BND * scale_D
    if keep_B is None:
        return branch_BND
    return branch_BND * keep_B.reshape(*keep_B.shape, *[1] * (3 - keep_B.ndim))


class SelfAttention(nn.Module):
    """Multi-head self-attention; all projections have biases."""

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
        """Return the attention's output for each token, or only for the last `last_tokens` tokens.

        No token attends to a token that is not valid. `turns_2BNE` contains the cosines and sines for `rotate_pairs`.
        With `last_tokens`, queries are computed only for the last `last_tokens` tokens; they attend to all tokens.
        """
        # Project the input to queries, keys and values, each `BHND`.
        if last_tokens is None:
            q, k, v = self._project_qkv(x_BND)
        else:
            q, k, v = self._project_last_queries(x_BND, last_tokens)

        # Rotary positions: rotate the keys of all tokens, and the queries, which may belong to the last tokens only.
        if turns_2BNE is not None:
            q = rotate_pairs(q, turns_2BNE[:, :, -q.shape[2] :])
            k = rotate_pairs(k, turns_2BNE)

        # Attend, and concatenate the heads.
        attend = choose_attention(q.device.type, q.dtype)
        return self.out(attend(q, k, v, valid_BN).transpose(1, 2).flatten(2))

    def _project_qkv(self, x_BND: Tensor) -> Iterable[Tensor]:
        return self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def _project_last_queries(self, x_BND: Tensor, last_tokens: int) -> Iterable[Tensor]:
        # One linear layer computes all three: split its rows into those of the queries and those of keys and values.
        width = x_BND.shape[-1]
        q_weight, kv_weight = self.qkv.weight.split((width, 2 * width))
        q_bias, kv_bias = self.qkv.bias.split((width, 2 * width))

        q_BQD = F.linear(x_BND[:, -last_tokens:], q_weight, q_bias)
        kv_BND = F.linear(x_BND, kv_weight, kv_bias)
        k, v = kv_BND.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q_BQD.unflatten(-1, (self.heads, -1)).transpose(1, 2), k, v


def rotate_pairs(x_BHND: Tensor, turns_2BNE: Tensor) -> Tensor:
    """Rotate each pair of values of a token by the token's angles; pair e is the values e and e + D/2.

    The dot product of a rotated query and a rotated key depends only on the difference of their angles (RoFormer,
    arXiv 2104.09864). The rotation is computed in float32; the result has the dtype of `x_BHND`.
    """
    left, right = x_BHND.float().chunk(2, dim=-1)
    cos, sin = turns_2BNE[:, :, None]
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1).type_as(x_BHND)


AttentionOp = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def choose_attention(device: str, dtype: torch.dtype) -> AttentionOp:
    """Return the faster of two equivalent functions: written-out attention for bf16 on CPUs, else the fused kernel.

    Measured: in bf16 on a CPU with AMX, the backward pass of the fused kernel took 31 % of a ViT-S step, and
    written-out attention made the step 1.4x faster. In fp32 on an AVX2 CPU the fused kernel made the step 1.02 to
    1.15x faster (128 to 512 tokens).
    """
    return written_out_attention if (device, dtype) == ("cpu", torch.bfloat16) else fused_attention


def fused_attention(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, valid_BN: Tensor | None) -> Tensor:
    """Return `softmax(q k^T / sqrt(D)) v` over the valid keys, computed by torch's fused kernel of the device."""
    bias = None if valid_BN is None else _attention_bias(valid_BN, q_BHND.dtype)
    return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=bias)


def written_out_attention(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, valid_BN: Tensor | None) -> Tensor:
    """Return the same as `fused_attention`, computed by two matrix products and a softmax."""
    scores_BHNN = (q_BHND * q_BHND.shape[-1] ** -0.5) @ k_BHND.transpose(-2, -1)
    if valid_BN is not None:
        scores_BHNN += _attention_bias(valid_BN, scores_BHNN.dtype)
    return scores_BHNN.softmax(dim=-1) @ v_BHND


def _attention_bias(valid_BN: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bias for the attention scores, `B11N`, that excludes the keys that are not valid."""
    # The bias is finite, so that a clip without a valid key gives no NaN.
    bias = torch.zeros(valid_BN.shape, dtype=dtype, device=valid_BN.device)
    return bias.masked_fill(~valid_BN, torch.finfo(dtype).min)[:, None, None]


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
    """Return the outputs of the last `top_blocks` blocks, lowest first.

    With `last_tokens`, the last block computes outputs only for the last `last_tokens` tokens. A mask `valid_LBN` in
    place of `valid_BN` gives each block its own mask; factors `keep_L2BN` in place of `keep_L2B` give each token its
    own factor. With `recompute`, the activations inside a block are dropped and computed again in the backward pass.
    They are identical to the bit, because all random numbers are arguments.
    """
    outputs: list[Tensor] = []
    for layer, block in enumerate(blocks):
        # Select this block's mask and factors.
        valid = valid_BN if valid_BN is None or valid_BN.ndim == 2 else valid_BN[layer]
        keep = None if keep_L2B is None else keep_L2B[layer]
        block_last_tokens = last_tokens if block is blocks[-1] else None
        arguments = (x_BND, valid, turns_2BNE, keep, block_last_tokens)

        # Without a backward pass nothing needs recomputation.
        if recompute and torch.is_grad_enabled():
            x_BND = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            x_BND = block(*arguments)
        outputs = [*outputs, x_BND][-top_blocks:]
    return outputs


def compile_blocks(blocks: Iterable[nn.Module], *, dynamic: bool) -> None:
    """Compile each block with torch; equal blocks share one compilation. `dynamic`: for any number of tokens."""
    for block in blocks:
        block.compile(dynamic=dynamic)


def initialise_weights(module: nn.Module, seed: int, init: InitName = "truncated") -> None:
    """Initialise a module: biases 0, norms' scales 1, mask tokens normal (std 0.02), and matrices as `init` says.

    truncated  truncated normal, std 0.02, as ViT
    xavier     normal, variance 2 / (inputs + outputs), as I-JEPA's code and MAE do for matrices (Glorot and Bengio,
               AISTATS 2010); queries, keys and values are three matrices. At widths of some hundred these weights
               are several times larger, and short runs learn faster

    Layer scales keep the initial value from the spec.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif init == "xavier" and parameter.ndim == 2:
            outputs, inputs = parameter.shape
            if name.endswith("qkv.weight"):
                outputs //= 3
            nn.init.normal_(parameter, std=(2 / (inputs + outputs)) ** 0.5, generator=generator)
        elif not name.endswith("scale_D"):
            nn.init.trunc_normal_(parameter, std=INIT_STD, generator=generator)
