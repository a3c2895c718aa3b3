"""What computes: the device asked for, and the precision its hardware is fast in."""

import torch

from pipeline.errors import RunError


def precision(device: torch.device) -> tuple[bool, str]:
    """Whether to run in bf16 autocast (only where the hardware multiplies it), and that in words."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return True, f"bf16 autocast on {torch.cuda.get_device_name(device)}"
        return False, f"fp32: {torch.cuda.get_device_name(device)} has no bf16"
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return True, "bf16 autocast on the CPU (AMX or AVX512-BF16)"
    return False, "fp32: this CPU has neither AMX nor AVX512-BF16"


def pick_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `auto` (CUDA where there is one); RunError where CUDA is asked for and absent."""
    if name not in ("auto", "cpu", "cuda"):
        raise RunError(f"--device {name}: expected auto, cpu or cuda")
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise RunError(
            "--device cuda: torch finds no CUDA device here; check nvidia-smi, or use --device cpu"
        )
    return torch.device("cuda" if name == "cuda" or (name == "auto" and found) else "cpu")
