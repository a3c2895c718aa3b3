"""The device of the tests that need a GPU."""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def gpu() -> str:
    """`cuda`; with AJEPA_GPU_TESTS=cpu the CPU stands in for it, to see that these tests run at all."""
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("AJEPA_GPU_TESTS") == "cpu":
        return "cpu"
    pytest.skip("PyTorch finds no CUDA device")
