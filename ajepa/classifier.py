"""Classifier: clips in, one logit per class out; and the one that is an encoder with a head."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ajepa.blocks import initialise
from ajepa.patches import valid_tokens
from ajepa.pooling import POOLING, VECTORS, PoolingName, pool
from ajepa.regularised import RegularisedMasking
from ajepa.vit import Encoder, EncoderSpec

REGULARISED = RegularisedMasking()
ENCODER = "encoder."  # what the names of the encoder's weights begin with in a Vit's


class ClassifierSpec(Protocol):
    """What shapes a classifier: a frozen dataclass, part of a recipe; how large the clips are that it is shown."""

    @property
    def frames(self) -> int: ...
    @property
    def bands(self) -> int: ...


class Classifier(Protocol):
    """A `torch.nn.Module` that tells classes apart; its weights are a function of spec, classes and seed.

    What is random about a forward pass (patchout, dropout, masking) comes from `rng`, in training mode only:
    torch's global generators are never drawn from, for a resumed run could not go back in them.
    """

    @property
    def training(self) -> bool: ...

    def __call__(self, mel_BTF: Tensor, n_frames_B: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Logits `BC`, float32, of normalised `mel_BTF` as large as the spec says, zeros past `n_frames_B`.

        `n_frames_B` (int64, at least 1) lies on the CPU. ValueError where training needs `rng` and has none.
        """

    def layers(self) -> list[list[nn.Parameter]]:
        """Every weight once, by depth: what sees the input first, the head last; for rates that fall with depth."""

    def train(self, mode: bool = True) -> Any: ...
    def to(self, device: torch.device) -> Any: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class VitSpec:
    """An encoder, one vector of its valid tokens, a linear head; with regularised masking in training.

    pooling  the vector: their mean as in A-JEPA, or another of `pooling.pool`
    """

    encoder: EncoderSpec
    masking: RegularisedMasking = REGULARISED
    pooling: PoolingName = POOLING

    @property
    def frames(self) -> int:
        return self.encoder.grid.frames

    @property
    def bands(self) -> int:
        return self.encoder.grid.bands

    @property
    def pooled(self) -> int:
        """Values of the vector of a clip."""
        return self.encoder.width * VECTORS[self.pooling](self.encoder.grid.rows)


class Vit(nn.Module):
    """The Classifier of a `VitSpec`. Its weights do not depend on the length of the grid."""

    def __init__(self, spec: VitSpec, classes: int, seed: int) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec.encoder, seed=seed)
        self.head = nn.Linear(spec.pooled, classes)
        initialise(self.head, seed + 1)

    def forward(self, mel_BTF: Tensor, n_frames_B: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """As the Protocol says."""
        valid_BP = valid_tokens(n_frames_B, self.spec.encoder.grid)
        all_valid, valid_BP = bool(valid_BP.all()), valid_BP.to(mel_BTF.device)
        attended, keep = self._drawn(rng, valid_BP)
        if attended is None and not all_valid:
            attended = valid_BP
        token_BPD = self.encoder(mel_BTF, valid_BP=attended, keep_L2N=keep)
        clips, rows = len(mel_BTF), self.spec.encoder.grid.rows
        clip_B = torch.arange(clips, device=mel_BTF.device)
        clip_BD = pool(token_BPD, valid_BP, clip_B, clips=clips, rows=rows, pooling=self.spec.pooling)
        logits_BC: Tensor = self.head(clip_BD).float()
        return logits_BC

    def layers(self) -> list[list[nn.Parameter]]:
        """The patch embedding, each block, and norm and head."""
        encoder = self.encoder
        groups: list[list[nn.Module]] = [[encoder.embed], *([block] for block in encoder.blocks)]
        groups.append([encoder.norm, self.head])
        return [[weight for module in group for weight in module.parameters()] for group in groups]

    def _drawn(
        self, rng: np.random.Generator | None, valid_BP: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which tokens are attended to in each block (`LBP`; None: masking is off), and what is kept of branches."""
        stack, masking = self.encoder.stack, self.spec.masking
        if not self.training or not (stack.drop_path or masking.share):
            return None, None
        if rng is None:
            raise ValueError(
                "drop path and regularised masking draw from the generator of the step: give `rng`"
            )
        keep = stack.draw_keep(rng, len(valid_BP))
        keep = None if keep is None else keep.to(valid_BP.device)
        masked_LBP = masking.draw(rng, valid_BP, depth=stack.depth)
        if masked_LBP is None:
            return None, keep
        return valid_BP & ~masked_LBP, masking.keep(masked_LBP, keep)
