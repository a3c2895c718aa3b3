"""Classifiers: the protocol that every kind fulfils, the encoder with a linear head, and the table of kinds.

The encoder's classifier is A-JEPA's for fine-tuning (arXiv 2311.15830): the mean of the tokens, a linear head, and
regularised masking in training. The other kinds (`cnn6`, `convnext`, `passt`) are trained from random weights.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ajepa.model.cnn6 import Cnn6, Cnn6Spec
from ajepa.model.convnext import ConvNext, ConvNextSpec
from ajepa.model.passt import Passt, PasstSpec
from ajepa.model.patches import has_no_padding, repeat_last_frame, valid_token_mask
from ajepa.model.pooling import DEFAULT_POOLING, VECTORS_PER_CLIP, PoolingName, pool_tokens
from ajepa.model.transformer import initialise_weights
from ajepa.model.vit import Encoder, EncoderSpec
from pipeline.errors import RunError
from pipeline.loading.transfer import copy_to_device

MaskReading = Literal["keys", "tokens"]

# Prefix of the names of the encoder's weights in a VitClassifier's state dict.
ENCODER_PREFIX = "encoder."


class ClassifierSpec(Protocol):
    """The shape of a classifier and the size of its input clips: a frozen dataclass, part of a recipe."""

    @property
    def frames(self) -> int: ...
    @property
    def bands(self) -> int: ...


class Classifier(Protocol):
    """A `torch.nn.Module` that classifies clips; its weights are a function of spec, classes and seed.

    All randomness of a forward pass (patchout, dropout, masking) comes from `rng`, in training mode only. Nothing is
    drawn from torch's global generators, because a resumed run could not restore their state.
    """

    @property
    def training(self) -> bool: ...

    def __call__(self, mel_BTF: Tensor, n_frames_B: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Return the logits `BC`, float32, of normalised `mel_BTF`; pooling and head are fp32 also under autocast.

        `mel_BTF` has the size in the spec. `n_frames_B` (int64, at least 1, on the CPU) is the number of valid frames
        of each clip; later frames are padding and must be 0. ValueError when training needs `rng` and it is None.
        """

    def weights_by_depth(self) -> list[list[nn.Parameter]]:
        """Return every weight once, in groups ordered from the input to the head; layer decay uses the groups."""

    def train(self, mode: bool = True) -> Any: ...
    def to(self, device: torch.device) -> Any: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RegularisedMasking:
    """Masks a random share of the tokens in the attention of each layer, in training only.

    A-JEPA fine-tunes with it (arXiv 2311.15830): "a regularized masking [...], instead of input dropping or zero".

    share    share of each clip's valid tokens that is masked, rounded down; drawn anew in each layer. With 0 no token
             is masked and nothing is drawn
    reading  interpretation of the abstract, which does not say whether a masked token still attends to other tokens.
             `keys`: no token attends to a masked token, and it does not attend to itself. It attends to the other
             tokens as usual, so its output is computed from them. Nothing of the input is dropped or zeroed.
             `tokens`: a masked token takes no part in that layer's attention: no token attends to it and it attends
             to no token. Its vector passes through the residual path and the MLP
    """

    share: float = 0.1
    reading: MaskReading = "keys"

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"the share of tokens that are masked must lie in [0, 1), got {self.share}")
        if self.reading not in get_args(MaskReading):
            raise ValueError(f"reading must be {' or '.join(get_args(MaskReading))}, got {self.reading!r}")

    def draw_masked_tokens(self, rng: np.random.Generator, valid_BP: Tensor, *, depth: int) -> Tensor | None:
        """Draw which tokens are masked in each layer, bool `LBP`; a clip has the same number of them in every layer.

        Only valid tokens are masked. In every layer at least one valid token of a clip stays unmasked. With share 0
        nothing is drawn, and the result is None.
        """
        if not self.share:
            return None
        clips, tokens = valid_BP.shape

        # One random number for each token in each layer; tokens that are not valid get infinity and are never masked.
        lottery_LBP = torch.from_numpy(rng.random((clips, depth, tokens))).transpose(0, 1)
        lottery_LBP = copy_to_device(lottery_LBP, valid_BP.device).masked_fill(~valid_BP, torch.inf)

        # The tokens with the lowest numbers are masked. Ranks are compared, because numbers may be equal.
        rank_LBP = lottery_LBP.argsort(dim=-1).argsort(dim=-1)
        return rank_LBP < (self.share * valid_BP.sum(dim=1)).floor()[:, None]

    def branch_factors(self, masked_LBP: Tensor, keep_L2B: Tensor | None) -> Tensor | None:
        """Return drop path's factors; with reading `tokens` they are combined with the masking, per token, `L2BP`."""
        if self.reading == "keys":
            return keep_L2B
        depth, clips, tokens = masked_LBP.shape
        if keep_L2B is None:
            keep_L2B = torch.ones(depth, 2, clips, device=masked_LBP.device)

        # The attention branch of a masked token is 0; its MLP branch is kept.
        keep_L2BP = keep_L2B[..., None].repeat(1, 1, 1, tokens)
        keep_L2BP[:, 0].masked_fill_(masked_LBP, 0.0)
        return keep_L2BP


DEFAULT_REGULARISED_MASKING = RegularisedMasking()


@dataclass(frozen=True, kw_only=True, slots=True)
class VitSpec:
    """Shape of an encoder with pooling and a linear head, and its regularised masking in training.

    pooling  how the vector of a clip is made from its valid tokens (`pooling.pool_tokens`); A-JEPA uses the mean
    """

    encoder: EncoderSpec
    masking: RegularisedMasking = DEFAULT_REGULARISED_MASKING
    pooling: PoolingName = DEFAULT_POOLING

    @property
    def frames(self) -> int:
        return self.encoder.grid.frames

    @property
    def bands(self) -> int:
        return self.encoder.grid.bands

    @property
    def clip_vector_width(self) -> int:
        """The number of values in the vector of a clip."""
        return self.encoder.width * VECTORS_PER_CLIP[self.pooling](self.encoder.grid.rows)


class VitClassifier(nn.Module):
    """The Classifier of a `VitSpec`. Its weights do not depend on the length of the grid."""

    def __init__(self, spec: VitSpec, classes: int, seed: int) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec.encoder, seed=seed)
        self.head = nn.Linear(spec.clip_vector_width, classes)
        initialise_weights(self.head, seed + 1)

    def forward(self, mel_BTF: Tensor, n_frames_B: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Return the logits (see `Classifier`); drop path and regularised masking draw from `rng`.

        A column that a clip fills only in part is filled with the clip's last frame, in training and in evaluation: so
        do frozen encoders, from which this one starts and whose features a probed head is fitted to.
        """
        grid = self.spec.encoder.grid
        valid_BP = valid_token_mask(n_frames_B, grid)
        all_valid = has_no_padding(n_frames_B, grid.first_frame_of_last_column + 1)
        valid_BP = copy_to_device(valid_BP, mel_BTF.device)

        # The attention mask; None if every token may be attended to, because attention without a mask is faster.
        attended, keep = self._draw_masking(rng, valid_BP)
        if attended is None and not all_valid:
            attended = valid_BP

        # Encode the tokens, pool them to one vector per clip, and compute the logits.
        token_BPD = self.encoder(repeat_last_frame(mel_BTF, n_frames_B), valid_BP=attended, keep_L2N=keep)
        clips = len(mel_BTF)
        clip_B = torch.arange(clips, device=mel_BTF.device)
        clip_BD = pool_tokens(
            token_BPD, valid_BP, clip_B, clips=clips, rows=grid.rows, pooling=self.spec.pooling
        )
        with torch.autocast(mel_BTF.device.type, enabled=False):
            logits_BC: Tensor = self.head(clip_BD)
        return logits_BC

    def weights_by_depth(self) -> list[list[nn.Parameter]]:
        """Return the weights of the patch embedding, of each block, and of the norm with the head."""
        encoder = self.encoder
        groups: list[list[nn.Module]] = [[encoder.embed], *([block] for block in encoder.blocks)]
        groups.append([encoder.norm, self.head])
        return [[weight for module in group for weight in module.parameters()] for group in groups]

    def _draw_masking(
        self, rng: np.random.Generator | None, valid_BP: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Draw the attention mask of each block (`LBP`; None: masking is off), and the factors of the branches."""
        transformer = self.encoder.transformer_spec
        masking = self.spec.masking
        if not self.training or not (transformer.drop_path or masking.share):
            return None, None
        if rng is None:
            raise ValueError(
                "drop path and regularised masking draw from the generator of the step: give `rng`"
            )

        # The order of the draws is fixed: drop path first, then the masking.
        keep = transformer.draw_drop_path(rng, len(valid_BP))
        keep = None if keep is None else copy_to_device(keep, valid_BP.device)
        masked_LBP = masking.draw_masked_tokens(rng, valid_BP, depth=transformer.depth)
        if masked_LBP is None:
            return None, keep
        return valid_BP & ~masked_LBP, masking.branch_factors(masked_LBP, keep)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierKind:
    """A kind of classifier: `build(spec, classes, seed)` makes a classifier from a spec of type `spec_type`.

    size_fields     the recipe fields that reduce the size of the model, for messages
    has_batch_norm  whether, in training, the output for a clip depends on the other clips of the forward pass
    """

    spec_type: type
    build: Callable[[Any, int, int], Classifier]
    size_fields: str
    has_batch_norm: bool = False


CLASSIFIER_KINDS: dict[str, ClassifierKind] = {
    "vit": ClassifierKind(
        spec_type=VitSpec, build=VitClassifier, size_fields="model.encoder.width, model.encoder.depth"
    ),
    "cnn6": ClassifierKind(spec_type=Cnn6Spec, build=Cnn6, size_fields="model.width", has_batch_norm=True),
    "convnext": ClassifierKind(
        spec_type=ConvNextSpec, build=ConvNext, size_fields="model.size", has_batch_norm=True
    ),
    "passt": ClassifierKind(spec_type=PasstSpec, build=Passt, size_fields="model.width, model.depth"),
}


def classifier_kind_name(spec: ClassifierSpec) -> str:
    """Return the name of the kind of classifier that the spec belongs to (a key of `CLASSIFIER_KINDS`)."""
    return next(name for name, kind in CLASSIFIER_KINDS.items() if isinstance(spec, kind.spec_type))


def build_classifier(spec: ClassifierSpec, classes: int, seed: int) -> Classifier:
    """Return the classifier of a spec; its initial weights are drawn from `seed`."""
    return CLASSIFIER_KINDS[classifier_kind_name(spec)].build(spec, classes, seed)


def spec_for_frames(spec: ClassifierSpec, frames: int) -> ClassifierSpec:
    """Return the spec for clips of `frames` frames; RunError if the clips are too short for the model.

    For a vit the frames are rounded up to whole patches.
    """
    if isinstance(spec, VitSpec):
        grid = spec.encoder.grid
        cols = -(-frames // grid.patch_frames)
        return replace(spec, encoder=replace(spec.encoder, grid=replace(grid, cols=cols)))

    # Every other spec has a field `frames`.
    try:
        return replace(spec, frames=frames)  # type: ignore[type-var]
    except ValueError as error:
        raise RunError(f"clips of {frames} frames are too short for this model: {error}") from None
