"""The device that computes, and the precision that its hardware is fast in."""

import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from pipeline.errors import RunError

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]

PRECISION_NAMES: dict[torch.dtype, PrecisionName] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}

# The environment variable that says what `auto` means, so that unlike machines agree.
PRECISION_VARIABLE = "AJEPA_PRECISION"


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """The numbers that most of a step is computed in, and their description for the user.

    Weights and their updates are float32 in every precision.
    """

    dtype: torch.dtype
    description: str

    @property
    def name(self) -> PrecisionName:
        """The name of the numbers: fp32, bf16 or fp16."""
        return PRECISION_NAMES[self.dtype]

    @property
    def is_half(self) -> bool:
        """Whether autocast is on."""
        return self.dtype != torch.float32

    @property
    def has_scaled_loss(self) -> bool:
        """Whether gradients are too small for these numbers unless the loss is scaled up."""
        return self.dtype == torch.float16

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which a model computes in this precision; it changes nothing in fp32."""
        # A disabled autocast has no use for its type, but refuses float32 all the same.
        half_dtype = self.dtype if self.is_half else torch.bfloat16
        return torch.autocast(device.type, half_dtype, enabled=self.is_half)


def pick_precision(name: PrecisionName, device: torch.device) -> Precision:
    """The precision of that name. `auto` is AJEPA_PRECISION if it is set, else bf16 where the hardware has it.

    RunError for fp16 on a CPU, or for an unknown name.
    """
    # Find the name that counts, and where it comes from: an error says so.
    option = f"--precision {name}"
    if name == "auto" and PRECISION_VARIABLE in os.environ:
        name = os.environ[PRECISION_VARIABLE]  # type: ignore[assignment]  # checked below
        option = f"{PRECISION_VARIABLE}={name}"

    # Refuse what there is not, or not on this device.
    if name not in get_args(PrecisionName):
        raise RunError(f"{option}: expected {', '.join(get_args(PrecisionName))}")
    if name == "fp16" and device.type == "cpu":
        raise RunError(f"{option}: computes on CUDA devices only; on a CPU use auto, bf16 or fp32")

    # A named precision is used as it is, `auto` asks the hardware.
    if name == "fp32":
        return Precision(dtype=torch.float32, description="fp32, as asked")
    if name == "fp16":
        return Precision(dtype=torch.float16, description="fp16 autocast with a scaled loss, as asked")
    has_bf16, description = hardware_precision(device)
    if has_bf16:
        return Precision(dtype=torch.bfloat16, description=description)
    if name == "bf16":
        return Precision(dtype=torch.bfloat16, description="bf16 autocast, as asked; emulated and slow")
    return Precision(dtype=torch.float32, description=description)


FP32 = Precision(dtype=torch.float32, description="fp32")


def pick_measuring_precision(
    name: PrecisionName, device: torch.device, trained_in: PrecisionName | None
) -> Precision:
    """The precision that a run's network is measured in; heads, probes and metrics are fp32 in every one.

    `auto` is AJEPA_PRECISION if it is set, else what the run was trained in, where the hardware has that, else fp32;
    also fp32 where the run does not say what it was trained in.
    """
    if name == "auto" and PRECISION_VARIABLE not in os.environ:
        has_bf16, _ = hardware_precision(device)
        is_fast = {"bf16": has_bf16, "fp16": device.type == "cuda"}
        name = trained_in if trained_in is not None and is_fast.get(trained_in, False) else "fp32"
    return pick_precision(name, device)


def hardware_precision(device: torch.device) -> tuple[bool, str]:
    """Whether the hardware multiplies bf16 itself, and a description of the precision that follows from it."""
    # Older GPUs emulate bf16, which costs more than fp32.
    if device.type == "cuda":
        gpu_name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return True, f"bf16 autocast on {gpu_name}"
        return False, f"fp32: {gpu_name} has no bf16"

    # So does every CPU without one of these instruction sets.
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return True, "bf16 autocast on the CPU (AMX or AVX512-BF16)"
    return False, "fp32: this CPU has neither AMX nor AVX512-BF16"


def pick_device(name: str, gpu_index: int | None = None) -> torch.device:
    """The device of that name, `cpu`, `cuda`, or `auto`: CUDA where there is a GPU. RunError where CUDA is absent.

    `gpu_index`: the GPU of this process, where several processes of a machine take one each. It becomes torch's
    current device.
    """
    # Refuse what is not there.
    if name not in ("auto", "cpu", "cuda"):
        raise RunError(f"--device {name}: expected auto, cpu or cuda")
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise RunError(
            "--device cuda: torch finds no CUDA device here; check nvidia-smi, or use --device cpu"
        )

    # One process on the CPU, or on the first GPU.
    if name == "cpu" or not has_cuda:
        return torch.device("cpu")
    if gpu_index is None:
        return torch.device("cuda")

    # One of several processes, each on a GPU of its own.
    gpu_count = torch.cuda.device_count()
    if gpu_index >= gpu_count:
        raise RunError(
            f"this machine has {gpu_count} GPUs; give torchrun that number as --nproc-per-node, or a smaller one"
        )
    torch.cuda.set_device(gpu_index)
    return torch.device("cuda", gpu_index)
