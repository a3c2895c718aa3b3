"""Encoder and predictor: vision transformers over the patches of a spectrogram.

ViT (arXiv 2010.11929) with the changes of I-JEPA (arXiv 2301.08243): no class token, fixed position codes, an encoder
that takes any subset of the patches, and a narrow predictor whose predictions are its outputs at mask tokens.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ajepa.model.patches import PatchGrid, patchify
from ajepa.model.transformer import (
    NORM_EPSILON,
    InitName,
    PositionName,
    TransformerSpec,
    initialise_weights,
    run_blocks,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSpec:
    """Shape of an encoder (`TransformerSpec`); the defaults are ViT-B, 85,253,376 parameters with 16 x 16 patches.

    band_norm  whether each mel band is standardised separately (`Encoder.set_band_statistics`), so that high bands,
               which are faint, have the same weight as low bands
    init       distribution of the initial weights (`initialise_weights`)
    """

    grid: PatchGrid
    width: int = 768
    depth: int = 12
    heads: int = 12
    positions: PositionName = "sincos"
    layer_scale: float = 0.0
    drop_path: float = 0.0
    band_norm: bool = False
    init: InitName = "truncated"

    def __post_init__(self) -> None:
        transformer_spec_of(self)
        refuse_unknown_init(self.init)


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictorSpec:
    """Shape of a predictor (`TransformerSpec`); the defaults are Audio-JEPA's, 11,238,912 parameters on a ViT-B."""

    width: int = 384
    depth: int = 6
    heads: int = 12
    positions: PositionName = "sincos"
    layer_scale: float = 0.0
    drop_path: float = 0.0
    init: InitName = "truncated"

    def __post_init__(self) -> None:
        transformer_spec_of(self)
        refuse_unknown_init(self.init)


def refuse_unknown_init(init: str) -> None:
    """Raise ValueError for a distribution of initial weights that does not exist."""
    if init not in get_args(InitName):
        raise ValueError(f"init must be {' or '.join(get_args(InitName))}, got {init!r}")


def transformer_spec_of(spec: EncoderSpec | PredictorSpec) -> TransformerSpec:
    """Return the spec of the blocks; ValueError if the shape is impossible."""
    return TransformerSpec(
        width=spec.width,
        depth=spec.depth,
        heads=spec.heads,
        positions=spec.positions,
        layer_scale=spec.layer_scale,
        drop_path=spec.drop_path,
    )


def a_jepa_encoder(size: Literal["s", "b", "l"], grid: PatchGrid) -> EncoderSpec:
    """Return one of the three encoders of A-JEPA (arXiv 2311.15830): ViT-S, ViT-B and ViT-L."""
    width, depth, heads = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}[size]
    return EncoderSpec(grid=grid, width=width, depth=depth, heads=heads)


# A-JEPA (arXiv 2311.15830) states width and depth but not the number of heads; here each head has 32 values.
A_JEPA_PREDICTOR = PredictorSpec(width=512, depth=16, heads=16)


class Encoder(nn.Module):
    """A vision transformer: patches in, one vector per token out. Initial weights depend only on `spec` and `seed`.

    recompute  whether the backward pass recomputes activations to save memory (`run_blocks`); off by default
    """

    positions_PD: Tensor
    turns_2PE: Tensor | None
    bands_2F: Tensor | None

    def __init__(self, spec: EncoderSpec, *, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.transformer_spec = transformer_spec_of(spec)
        self.recompute = False
        self.embed = nn.Linear(spec.grid.patch_values, spec.width)

        # Mean 0 and deviation 1 of every band, until `set_band_statistics` is called.
        bands_2F = torch.tensor([[0.0], [1.0]]).repeat(1, spec.grid.bands) if spec.band_norm else None
        self.register_buffer("bands_2F", bands_2F)

        # Positions are computed from the grid and not saved, so a checkpoint fits clips of any length.
        self.register_buffer(
            "positions_PD", self.transformer_spec.additive_positions(spec.grid), persistent=False
        )
        self.register_buffer("turns_2PE", self.transformer_spec.rotary_angles(spec.grid), persistent=False)

        self.blocks = self.transformer_spec.build_blocks()
        self.norm = nn.LayerNorm(spec.width, eps=NORM_EPSILON)
        initialise_weights(self, seed, spec.init)

    def set_band_statistics(self, mean_F: Tensor, std_F: Tensor) -> None:
        """Set the statistics that standardise each band, if the spec has `band_norm`; checkpoints contain them."""
        if self.bands_2F is not None:
            self.bands_2F.copy_(torch.stack((mean_F, std_F)))

    def input_patches(self, mel_BTF: Tensor) -> Tensor:
        """Return the input of the first layer: patches, standardised by band with `band_norm`, `BPN`."""
        if self.bands_2F is not None:
            mel_BTF = (mel_BTF - self.bands_2F[0]) / self.bands_2F[1]
        return patchify(mel_BTF, self.spec.grid.first_columns(mel_BTF.shape[1]))

    def forward(
        self,
        mel_BTF: Tensor,
        tokens_NK: Tensor | None = None,
        valid_BP: Tensor | None = None,
        keep_L2N: Tensor | None = None,
    ) -> Tensor:
        """Return the vector of every token, `BPD`, or with `tokens_NK` only the vectors of these tokens, `NKD`.

        N is B or a multiple of B: several sets of tokens for each clip, one after the other. All other tokens are
        left out before the patch embedding and cannot influence the output. No token attends to a token that is not
        valid in `valid_BP` (N rows if N > B); the output *at* a token that is not valid is meaningless. `mel_BTF` is
        normalised and has the size of the grid, or of its first columns (else ValueError): then P are their tokens.
        `keep_L2N` contains drop path's factors.
        Without `tokens_NK`, each block may have its own mask (`valid_LBP`), and each token its own factors
        (`keep_L2NP`).
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
        """Return the outputs of the last `block_count` blocks, lowest first, before the final norm.

        With one block more than there are, the first is the input of the lowest block: embedded patches with positions.
        """
        # Patches, their positions and the mask of valid tokens: of all tokens, or of those in `tokens_NK`.
        x = self.input_patches(mel_BTF)
        positions = self.positions_PD[: x.shape[1]]
        turns = _rotations_of_first(self.turns_2PE, x.shape[1])
        if tokens_NK is not None:
            x = gather_tokens(x, tokens_NK)
            positions = positions[tokens_NK]
            turns = _rotations_at(self.turns_2PE, tokens_NK)
            valid_BP = None if valid_BP is None else valid_BP.gather(1, tokens_NK)

        # Embed the patches, add the positions, and run the blocks.
        x = self.embed(x) + positions
        outputs = run_blocks(
            self.blocks, x, valid_BP, turns, keep_L2N, recompute=self.recompute, top_blocks=block_count
        )
        return [x, *outputs] if block_count > len(outputs) else outputs


class Predictor(nn.Module):
    """A narrow transformer: context vectors in, predictions for hidden tokens out, for each group separately.

    A prediction has as many values as the encoder is wide. `recompute` as in Encoder.
    """

    positions_PD: Tensor
    turns_2PE: Tensor | None

    def __init__(self, spec: PredictorSpec, encoder_width: int, grid: PatchGrid, *, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.transformer_spec = transformer_spec_of(spec)
        self.recompute = False
        self.embed = nn.Linear(encoder_width, spec.width)
        self.mask_token_D = nn.Parameter(torch.zeros(spec.width))

        # Positions are computed from the grid and not saved, as in the encoder.
        self.register_buffer("positions_PD", self.transformer_spec.additive_positions(grid), persistent=False)
        self.register_buffer("turns_2PE", self.transformer_spec.rotary_angles(grid), persistent=False)
        self.blocks = self.transformer_spec.build_blocks()
        self.norm = nn.LayerNorm(spec.width, eps=NORM_EPSILON)
        self.out = nn.Linear(spec.width, encoder_width)
        initialise_weights(self, seed, spec.init)

    def forward(
        self,
        context_NKD: Tensor,
        context_NK: Tensor,
        targets_NGQ: Tensor,
        valid_NP: Tensor | None = None,
        keep_L2M: Tensor | None = None,
    ) -> Tensor:
        """Return predictions `NGQD` for the tokens `targets_NGQ`, from `context_NKD` at the tokens `context_NK`.

        The input for a target is a mask token with the target's position; it attends to the valid tokens of the
        context and of its own group. `keep_L2M` contains drop path's factors, M = N G.
        """
        rows, groups, queries = targets_NGQ.shape

        # One sequence for each group: the context, then a mask token with the position of each target.
        context = self.embed(context_NKD) + self.positions_PD[context_NK]
        targets = self.mask_token_D + self.positions_PD[targets_NGQ.flatten(0, 1)]
        x = torch.cat((context.repeat_interleave(groups, dim=0), targets), dim=1)

        # The valid tokens of each sequence, and their rotary angles.
        valid = None
        turns = None
        if valid_NP is not None or self.turns_2PE is not None:
            tokens = torch.cat((context_NK[:, None].expand(-1, groups, -1), targets_NGQ), dim=2)
            turns = _rotations_at(self.turns_2PE, tokens.flatten(0, 1))
            if valid_NP is not None:
                valid = valid_NP.gather(1, tokens.flatten(1)).view(rows * groups, -1)

        # The last block computes only the targets, because the outputs at context tokens are not used.
        (x,) = run_blocks(
            self.blocks, x, valid, turns, keep_L2M, recompute=self.recompute, last_tokens=queries
        )
        return self.out(self.norm(x)).unflatten(0, (rows, groups))


def _rotations_of_first(turns_2PE: Tensor | None, tokens: int) -> Tensor | None:
    return None if turns_2PE is None else turns_2PE[:, None, :tokens]


def _rotations_at(turns_2PE: Tensor | None, tokens_NK: Tensor) -> Tensor | None:
    return None if turns_2PE is None else turns_2PE[:, tokens_NK]


def gather_tokens(x_BPD: Tensor, tokens_NK: Tensor) -> Tensor:
    """Return the vectors of the given tokens, `NKD`; N is a multiple of B, and the sets of a clip are adjacent."""
    sets = len(tokens_NK) // len(x_BPD)
    clip_N1 = torch.arange(len(tokens_NK), device=x_BPD.device)[:, None] // sets
    return x_BPD[clip_N1, tokens_NK]
