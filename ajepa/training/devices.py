"""What computes: the device asked for, and the precision its hardware is fast in."""

import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from pipeline.errors import RunError

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]

PRECISION_VARIABLE = "AJEPA_PRECISION"  # of the environment: what `auto` means, so that unlike machines agree


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """The numbers that most of a step is computed in (weights and their updates are float32), and that in words."""

    dtype: torch.dtype
    description: str

    @property
    def is_half(self) -> bool:
        """Whether autocast is on."""
        return self.dtype != torch.float32

    @property
    def has_scaled_loss(self) -> bool:
        """Whether gradients are too small for these numbers unless the loss is scaled up."""
        return self.dtype == torch.float16

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(
            device.type, self.dtype if self.is_half else torch.bfloat16, enabled=self.is_half
        )


def pick_precision(name: PrecisionName, device: torch.device) -> Precision:
    """The precision of that name; `auto` is what AJEPA_PRECISION says, else bf16 where the hardware multiplies it.

    RunError for fp16 on a CPU, or an unknown name.
    """
    option = f"--precision {name}"
    if name == "auto" and PRECISION_VARIABLE in os.environ:
        name = os.environ[PRECISION_VARIABLE]  # type: ignore[assignment]  # checked below
        option = f"{PRECISION_VARIABLE}={name}"
    if name not in get_args(PrecisionName):
        raise RunError(f"{option}: expected {', '.join(get_args(PrecisionName))}")
    if name == "fp16" and device.type == "cpu":
        raise RunError(f"{option}: computes on CUDA devices only; on a CPU use auto, bf16 or fp32")
    if name == "fp32":
        return Precision(dtype=torch.float32, description="fp32, as asked")
    if name == "fp16":
        return Precision(dtype=torch.float16, description="fp16 autocast with a scaled loss, as asked")
    has_bf16, description = hardware_precision(device)
    if name == "bf16" and not has_bf16:
        return Precision(dtype=torch.bfloat16, description="bf16 autocast, as asked; emulated and slow")
    return Precision(dtype=torch.bfloat16 if has_bf16 else torch.float32, description=description)


def hardware_precision(device: torch.device) -> tuple[bool, str]:
    """Whether to run in bf16 autocast (only where the hardware multiplies it), and that in words."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return True, f"bf16 autocast on {torch.cuda.get_device_name(device)}"
        return False, f"fp32: {torch.cuda.get_device_name(device)} has no bf16"
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return True, "bf16 autocast on the CPU (AMX or AVX512-BF16)"
    return False, "fp32: this CPU has neither AMX nor AVX512-BF16"


def pick_device(name: str, gpu_index: int | None = None) -> torch.device:
    """`cpu`, `cuda` or `auto` (CUDA where there is one); RunError where CUDA is asked for and absent.

    `number`: which GPU, where several processes of this machine take one each; it becomes the current one.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise RunError(f"--device {name}: expected auto, cpu or cuda")
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise RunError(
            "--device cuda: torch finds no CUDA device here; check nvidia-smi, or use --device cpu"
        )
    if name == "cpu" or not found:
        return torch.device("cpu")
    if gpu_index is None:
        return torch.device("cuda")
    if gpu_index >= torch.cuda.device_count():
        raise RunError(
            f"{torch.cuda.device_count()} GPUs here; give torchrun as many --nproc-per-node, or fewer"
        )
    torch.cuda.set_device(gpu_index)
    return torch.device("cuda", gpu_index)
