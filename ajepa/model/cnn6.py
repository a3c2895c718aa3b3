"""CNN6, the smallest network of PANNs (arXiv 1912.10211): four blocks of 5 x 5 convolutions."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from ajepa.model.randomness import apply_dropout, fork_seeded_rng, torch_generator

CNN6_BLOCKS = 4

# The output of the last block has so many times fewer frames and bands than the input.
CNN6_REDUCTION = 2**CNN6_BLOCKS


@dataclass(frozen=True, kw_only=True, slots=True)
class Cnn6Spec:
    """Shape of a CNN6; the defaults are the paper's, 4,837,455 parameters with 527 classes.

    width  channels of the first block; every later block has twice as many as the one before
    """

    frames: int = 1001
    bands: int = 64
    width: int = 64
    block_dropout: float = 0.2
    head_dropout: float = 0.5

    def __post_init__(self) -> None:
        if min(self.frames, self.bands) < CNN6_REDUCTION or self.width < 1:
            raise ValueError(
                f"a CNN6 needs {CNN6_REDUCTION} frames and bands or more and a width above 0, got {self}"
            )
        if not (0 <= self.block_dropout < 1 and 0 <= self.head_dropout < 1):
            raise ValueError(f"dropout must lie in [0, 1), got {self}")


class Cnn6(nn.Module):
    """The Classifier of a `Cnn6Spec`: bands normalised, four blocks, mean over bands, mean and maximum over time.

    In evaluation padding counts for nothing: it is 0 before every convolution, like everything beyond the edges, and
    in no mean and no maximum; a padded clip has the logits of the clip alone. In training the batch norms count it,
    as zeros.
    """

    def __init__(self, spec: Cnn6Spec, classes: int, seed: int) -> None:
        super().__init__()
        self.spec = spec
        widths = [1, *(spec.width << block for block in range(CNN6_BLOCKS))]
        with fork_seeded_rng(seed):
            self.norm = nn.BatchNorm1d(spec.bands)
            self.blocks = nn.ModuleList(convolution_block(*pair) for pair in pairwise(widths))
            self.hidden = nn.Linear(widths[-1], widths[-1])
            self.head = nn.Linear(widths[-1], classes)
            initialise_xavier(self)

    def forward(self, mel_BTF: Tensor, n_frames_B: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Logits, as `Classifier` promises; `rng` decides dropout."""
        spec = self.spec
        refuse_other_clip_size(mel_BTF, spec.frames, spec.bands)
        generator = torch_generator(rng, mel_BTF.device) if self.training else None

        # Every band normalised by itself, as one channel.
        x_BDTF = self.norm(mel_BTF.transpose(1, 2)).transpose(1, 2)[:, None]

        # Each block halves frames and bands.
        for block in self.blocks:
            x_BDTF = block(zero_invalid_frames(x_BDTF, n_frames_B))
            x_BDTF = apply_dropout(x_BDTF, spec.block_dropout, generator)
            n_frames_B = (n_frames_B // 2).clamp(min=1)

        # One vector a clip, a hidden layer, logits.
        x_BD = pool_mean_and_max(x_BDTF.mean(dim=-1), n_frames_B)
        x_BD = torch.relu(self.hidden(apply_dropout(x_BD, spec.head_dropout, generator)))
        logits_BC: Tensor = self.head(apply_dropout(x_BD, spec.head_dropout, generator)).float()
        return logits_BC

    def weights_by_depth(self) -> list[list[nn.Parameter]]:
        """Return the weights of the first norm, of each block, and of the two layers of the head."""
        groups: list[list[nn.Module]] = [
            [self.norm],
            *([block] for block in self.blocks),
            [self.hidden, self.head],
        ]
        return [[weight for module in group for weight in module.parameters()] for group in groups]


def convolution_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a block: 5 x 5 convolution, batch norm, ReLU, mean of every 2 x 2."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=5, padding=2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.AvgPool2d(2),
    )


def initialise_xavier(network: nn.Module) -> None:
    """Give a network PANNs' weights: matrices and filters uniform after Glorot, biases zero; norms keep theirs."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def refuse_other_clip_size(mel_BTF: Tensor, frames: int, bands: int) -> None:
    """Raise ValueError where clips are not as large as a spec says."""
    if mel_BTF.shape[1:] != (frames, bands):
        got_frames, got_bands = mel_BTF.shape[1:]
        raise ValueError(f"expected {frames} frames x {bands} bands, got {got_frames} x {got_bands}")


def zero_invalid_frames(x_BDTF: Tensor, n_frames_B: Tensor) -> Tensor:
    """Return the same with 0 past the valid frames of each clip."""
    frames = x_BDTF.shape[2]
    if int(n_frames_B.min()) >= frames:
        return x_BDTF
    valid_BT = (torch.arange(frames) < n_frames_B[:, None]).to(x_BDTF.device)
    return x_BDTF.masked_fill(~valid_BT[:, None, :, None], 0.0)


def pool_mean_and_max(x_BDT: Tensor, n_frames_B: Tensor) -> Tensor:
    """Return PANNs' pooling: mean plus maximum over the valid frames, of which each clip has one or more."""
    invalid_BT = (torch.arange(x_BDT.shape[2]) >= n_frames_B[:, None]).to(x_BDT.device)
    counts_B = (~invalid_BT).sum(dim=1)
    mean_BD = x_BDT.masked_fill(invalid_BT[:, None], 0.0).sum(dim=2) / counts_B[:, None]
    return mean_BD + x_BDT.masked_fill(invalid_BT[:, None], -torch.inf).amax(dim=2)
