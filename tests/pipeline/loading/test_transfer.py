"""Copies for which nobody waits hold the values of their time, wherever they come from."""

import numpy as np
import pytest
import torch

from pipeline.loading.transfer import HostCopy, copy_to_device, pin_for_device

CPU = torch.device("cpu")

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")

DEVICES = [
    pytest.param("cpu"),
    pytest.param("cuda", marks=[pytest.mark.gpu, CUDA]),
]


@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_to_the_host_has_the_values_of_when_it_was_begun(device):
    """Weights go on changing while their checkpoint is on its way."""
    value_N = torch.arange(4.0, device=device)
    copy = HostCopy(value_N)
    value_N += 1
    assert copy.wait().tolist() == [0, 1, 2, 3]
    assert copy.wait().device == CPU
    assert value_N.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "values", [np.arange(6).reshape(2, 3), torch.arange(6).view(2, 3)[:, 1:]], ids=["array", "view"]
)
def test_a_copy_to_the_device_has_the_same_values(device, values):
    """Arrays and parts of tensors too."""
    copied = copy_to_device(values, torch.device(device))
    assert copied.device.type == device
    assert copied.cpu().tolist() == values.tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_pinned_is_not_pinned_again(device):
    """A thread pins the draws of a step, so that the step itself only queues their copy."""
    pinned = pin_for_device(torch.arange(3), torch.device(device))
    assert pinned.is_pinned() == (device == "cuda")
    assert pin_for_device(pinned[1:], torch.device(device)).data_ptr() == pinned[1:].data_ptr()
