"""ConvNeXt on spectrograms (arXiv 2306.00830), built from timm's blocks; the only file that imports timm."""

from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ajepa.model.cnn6 import pool_mean_and_max, refuse_other_clip_size, zero_invalid_frames
from ajepa.model.randomness import draw_torch_seed, fork_seeded_rng
from pipeline.errors import RunError

ConvNextSize = Literal["atto", "femto", "pico", "nano", "tiny"]

# Zero frames that are added at the start and at the end: the paper's 1,000 frames become 252 columns.
STEM_PADDING_FRAMES = 4

# The input has this many times the frames and bands of the last stage's output.
CONVNEXT_REDUCTION = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvNextSpec:
    """Shape of a ConvNeXt; the defaults are the paper's, 28,222,767 parameters with 527 classes.

    Parameters of the smaller sizes with 224 bands and 527 classes: 3.5 M (atto), 5.0 M (femto), 8.8 M (pico),
    15.3 M (nano).
    """

    frames: int = 1001
    bands: int = 224
    size: ConvNextSize = "tiny"
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        if self.size not in get_args(ConvNextSize):
            raise ValueError(f"size must be one of {', '.join(get_args(ConvNextSize))}, got {self.size!r}")
        if self.bands < CONVNEXT_REDUCTION or self.frames + 2 * STEM_PADDING_FRAMES < CONVNEXT_REDUCTION:
            raise ValueError(f"a ConvNeXt needs 24 frames and {CONVNEXT_REDUCTION} bands or more, got {self}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), got {self.drop_path}")


class ConvNext(nn.Module):
    """The Classifier of a `ConvNextSpec`: bands normalised, four stages, mean over bands, mean and maximum over time.

    Padding has no influence, except on the statistics of the first norm in training: it is set to 0 before every
    filter that spans several columns, and is excluded from means and maxima. A padded clip has the same logits as the
    clip without padding.
    """

    def __init__(self, spec: ConvNextSpec, classes: int, seed: int) -> None:
        super().__init__()
        self.spec = spec
        self.norm = nn.BatchNorm1d(spec.bands)
        with fork_seeded_rng(seed):
            self.network = import_timm().create_model(
                f"convnext_{spec.size}", in_chans=1, num_classes=classes, drop_path_rate=spec.drop_path
            )

    def forward(self, mel_BTF: Tensor, n_frames_B: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Return the logits (see `Classifier`); drop path draws from `rng`."""
        spec = self.spec
        refuse_other_clip_size(mel_BTF, spec.frames, spec.bands)

        # Normalise each band separately; the spectrogram is one channel, with zero frames at both ends.
        x_BDTF = self.norm(mel_BTF.transpose(1, 2)).transpose(1, 2)[:, None]
        x_BDTF = zero_invalid_frames(x_BDTF, n_frames_B)
        x_BDTF = nnf.pad(x_BDTF, (0, 0, STEM_PADDING_FRAMES, STEM_PADDING_FRAMES))

        # timm's drop path draws from torch's global generators: seed them from the step's generator for this pass.
        random = self.training and spec.drop_path > 0
        with fork_seeded_rng(draw_torch_seed(rng), x_BDTF.device) if random else nullcontext():
            x_BD = self._run_stages(x_BDTF, n_frames_B + 2 * STEM_PADDING_FRAMES)
        with torch.autocast(mel_BTF.device.type, enabled=False):
            logits_BC: Tensor = self.network.head(x_BD[:, :, None, None])
        return logits_BC

    def _run_stages(self, x_BDTF: Tensor, n_frames_B: Tensor) -> Tensor:
        """Return one vector per clip, `BD`, from stem and stages; padding columns are set to 0 before every block."""
        x_BDTF = self.network.stem(x_BDTF)
        n_columns_B = n_frames_B // 4
        for stage in self.network.stages:
            if not isinstance(stage.downsample, nn.Identity):
                x_BDTF = stage.downsample(x_BDTF)
                n_columns_B = (n_columns_B // 2).clamp(min=1)
            for block in stage.blocks:
                x_BDTF = block(zero_invalid_frames(x_BDTF, n_columns_B))
        return pool_mean_and_max(x_BDTF.float().mean(dim=-1), n_columns_B)

    def weights_by_depth(self) -> list[list[nn.Parameter]]:
        """Return the weights of the first norm and the stem, of each block, and of the head.

        The downsampling layer before a stage is in the group of the stage's first block.
        """
        network = self.network
        groups: list[list[nn.Module]] = [[self.norm, network.stem]]
        for stage in network.stages:
            groups += [[stage.downsample, stage.blocks[0]], *([block] for block in stage.blocks[1:])]
        groups.append([network.head])
        return [[weight for module in group for weight in module.parameters()] for group in groups]


def import_timm() -> ModuleType:
    """Return the module `timm`; RunError if it is not installed."""
    try:
        import timm
    except ImportError:
        raise RunError("model convnext needs timm: pip install 'ajepa[supervised]'") from None
    return timm
