"""Regularised masking: in each layer a random share of the tokens is kept from the others, in training only."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Reading = Literal["keys", "tokens"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RegularisedMasking:
    """What A-JEPA fine-tunes with (arXiv 2311.15830): "a regularized masking [...], instead of input dropping or zero".

    share    of each clip's valid tokens, drawn anew in each layer, rounded down; 0: none, and nothing is drawn
    reading  the abstract does not say what a masked token still does, so there are two ways to read it.
             `keys`: it is barred from being attended to, by every token, itself included; it asks the others as
             ever, so that its own output comes from them. Nothing of the input is dropped or zeroed.
             `tokens`: it takes no part in that layer's attention at all: neither is it attended to, nor does it
             attend; its vector passes on by the residual path and through the MLP
    """

    share: float = 0.1
    reading: Reading = "keys"

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"the share of tokens that are masked must lie in [0, 1), got {self.share}")
        if self.reading not in get_args(Reading):
            raise ValueError(f"reading must be {' or '.join(get_args(Reading))}, got {self.reading!r}")

    def draw(self, rng: np.random.Generator, valid_BP: Tensor, *, depth: int) -> Tensor | None:
        """Which tokens are masked in each layer, bool `LBP` beside `valid_BP`: equally many in every layer of a clip.

        None with share 0; then the generator is left alone. Of the valid tokens at least one is never masked.
        """
        if not self.share:
            return None
        clips, tokens = valid_BP.shape
        lottery_LBP = torch.from_numpy(rng.random((clips, depth, tokens))).transpose(0, 1)
        lottery_LBP = lottery_LBP.to(valid_BP.device).masked_fill(~valid_BP, torch.inf)
        place_LBP = lottery_LBP.argsort(dim=-1).argsort(dim=-1)  # a token's place in the draw: no ties
        return place_LBP < (self.share * valid_BP.sum(dim=1)).floor()[:, None]

    def keep(self, masked_LBP: Tensor, keep_L2B: Tensor | None) -> Tensor | None:
        """What each branch of each block is multiplied by, given what drop path says: under `tokens`, `L2BP`."""
        if self.reading == "keys":
            return keep_L2B
        depth, clips, _ = masked_LBP.shape
        kept = torch.ones(depth, 2, clips, device=masked_LBP.device) if keep_L2B is None else keep_L2B
        keep_L2BP = kept[..., None].repeat(1, 1, 1, masked_LBP.shape[-1])
        keep_L2BP[:, 0].masked_fill_(masked_LBP, 0.0)
        return keep_L2BP
