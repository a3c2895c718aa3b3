"""Multi-head self-attention: which keys count, how positions turn queries and keys, which kernel runs."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
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
        last: int | None = None,
    ) -> Tensor:
        """No token attends to one that is not valid; `turns_2BNE` are the cosines and sines of `turned`.

        With `last` only so many tokens at the end ask, and come out; all are attended to.
        """
        q, k, v = self._qkv(x_BND) if last is None else self._qkv_of_last(x_BND, last)
        if turns_2BNE is not None:
            q, k = turned(q, turns_2BNE[:, :, -q.shape[2] :]), turned(k, turns_2BNE)
        attend = attention_for(q.device.type, q.dtype)
        return self.out(attend(q, k, v, valid_BN).transpose(1, 2).flatten(2))

    def _qkv(self, x_BND: Tensor) -> Iterable[Tensor]:
        return self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def _qkv_of_last(self, x_BND: Tensor, last: int) -> Iterable[Tensor]:
        width = x_BND.shape[-1]
        (for_q, for_kv), (q_bias, kv_bias) = (x.split((width, 2 * width)) for x in self.qkv.parameters())
        q_BQD, kv_BND = F.linear(x_BND[:, -last:], for_q, q_bias), F.linear(x_BND, for_kv, kv_bias)
        k, v = kv_BND.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q_BQD.unflatten(-1, (self.heads, -1)).transpose(1, 2), k, v


def turned(x_BHND: Tensor, turns_2BNE: Tensor) -> Tensor:
    """Each pair of values of a token turned by that token's angles: pair e is the values e and e + D/2.

    The product of a turned query and a turned key depends on the difference of their angles alone (RoFormer,
    arXiv 2104.09864). Computed in float32, returned in the type of `x`.
    """
    left, right = x_BHND.float().chunk(2, dim=-1)
    cos, sin = turns_2BNE[:, :, None]
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1).type_as(x_BHND)


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
