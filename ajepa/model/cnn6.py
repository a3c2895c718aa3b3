"""CNN6, the smallest network of PANNs (arXiv 1912.10211): four blocks of 5 x 5 convolutions."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from ajepa.model.patches import has_no_padding
from ajepa.model.randomness import apply_dropout, fork_seeded_rng, torch_generator
from pipeline.loading.transfer import copy_to_device

CNN6_BLOCKS = 4

# The input has this many times the frames and bands of the last block's output.
CNN6_REDUCTION = 2**CNN6_BLOCKS


@dataclass(frozen=True, kw_only=True, slots=True)
class Cnn6Spec:
    """Shape of a CNN6; the defaults are the paper's, 4,837,455 parameters with 527 classes.

    width  channels of the first block; each later block has twice the channels of the previous block
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

    In evaluation padding has no influence: it is set to 0 before every convolution, like the values beyond the edges,
    and is excluded from means and maxima. A padded clip has the same logits as the clip without padding. In training
    the statistics of the batch norms include the padding, as zeros.
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
        """Return the logits (see `Classifier`); dropout draws from `rng`."""
        spec = self.spec
        refuse_other_clip_size(mel_BTF, spec.frames, spec.bands)
        generator = torch_generator(rng, mel_BTF.device) if self.training else None

        # Normalise each band separately; the spectrogram is one channel.
        x_BDTF = self.norm(mel_BTF.transpose(1, 2)).transpose(1, 2)[:, None]

        # Run the blocks; each block halves the frames and the bands.
        for block in self.blocks:
            x_BDTF = block(zero_invalid_frames(x_BDTF, n_frames_B))
            x_BDTF = apply_dropout(x_BDTF, spec.block_dropout, generator)
            n_frames_B = (n_frames_B // 2).clamp(min=1)

        # Pool to one vector per clip; then the hidden layer and the logits.
        with torch.autocast(mel_BTF.device.type, enabled=False):
            x_BD = pool_mean_and_max(x_BDTF.float().mean(dim=-1), n_frames_B)
            x_BD = torch.relu(self.hidden(apply_dropout(x_BD, spec.head_dropout, generator)))
            logits_BC: Tensor = self.head(apply_dropout(x_BD, spec.head_dropout, generator))
        return logits_BC

    def weights_by_depth(self) -> list[list[nn.Parameter]]:
        """Return the weights of the first norm, of each block, and of the two layers of the head, in this order."""
        groups: list[list[nn.Module]] = [
            [self.norm],
            *([block] for block in self.blocks),
            [self.hidden, self.head],
        ]
        return [[weight for module in group for weight in module.parameters()] for group in groups]


def convolution_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a block: 5 x 5 convolution, batch norm, ReLU, 2 x 2 average pooling."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=5, padding=2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.AvgPool2d(2),
    )


def initialise_xavier(network: nn.Module) -> None:
    """Initialise a network as PANNs does: Glorot-uniform matrices and filters, zero biases; norms are unchanged."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def refuse_other_clip_size(mel_BTF: Tensor, frames: int, bands: int) -> None:
    """Raise ValueError if the clips do not have the frames and bands of the spec."""
    if mel_BTF.shape[1:] != (frames, bands):
        got_frames, got_bands = mel_BTF.shape[1:]
        raise ValueError(f"expected {frames} frames x {bands} bands, got {got_frames} x {got_bands}")


def zero_invalid_frames(x_BDTF: Tensor, n_frames_B: Tensor) -> Tensor:
    """Return the tensor with the padding of each clip (its frames past the valid ones) set to 0."""
    frames = x_BDTF.shape[2]
    if has_no_padding(n_frames_B, frames):
        return x_BDTF
    valid_BT = copy_to_device(torch.arange(frames) < n_frames_B[:, None], x_BDTF.device)
    return x_BDTF.masked_fill(~valid_BT[:, None, :, None], 0.0)


def pool_mean_and_max(x_BDT: Tensor, n_frames_B: Tensor) -> Tensor:
    """Return the mean plus the maximum over the valid frames, as in PANNs; each clip needs at least one valid frame."""
    invalid_BT = copy_to_device(torch.arange(x_BDT.shape[2]) >= n_frames_B[:, None], x_BDT.device)
    counts_B = (~invalid_BT).sum(dim=1)
    mean_BD = x_BDT.masked_fill(invalid_BT[:, None], 0.0).sum(dim=2) / counts_B[:, None]
    return mean_BD + x_BDT.masked_fill(invalid_BT[:, None], -torch.inf).amax(dim=2)
