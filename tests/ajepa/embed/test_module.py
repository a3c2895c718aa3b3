"""The encoder as a network for others: the vectors of `embed`, gradients when asked for, one way to freeze."""

import pytest
import torch
from sounds import babble
from tiny import tiny_views
from torch import nn

from ajepa.embed.embedder import Embedder
from ajepa.embed.pretrained import PretrainedEncoder
from ajepa.model.vit import Encoder
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.errors import RunError


def make_model(**options) -> Embedder:
    """An encoder of random weights of two blocks, two rows of patches and views of 64 frames."""
    spec = tiny_views().model.encoder
    weights = Encoder(spec, seed=3).state_dict()
    mel = preset_mel_spec("a-jepa")
    pretrained = PretrainedEncoder(spec=spec, mel=mel, mean=-5.0, std=3.0, weights=weights, origin={})
    return Embedder(pretrained, device="cpu", **options)


@pytest.mark.parametrize(
    ("pooling", "layer"), [("mean", "last"), ("moments", "concat-all"), ("moments", "mean-2")]
)
def test_a_module_has_the_vectors_of_embed(pooling, layer):
    """Normalisation, padding, frames, times and clip vectors are those of `embed`, for a sound of less than a view."""
    model = make_model(pooling=pooling, layer=layer)
    wave_S = torch.from_numpy(babble(0.5, 32_000))
    expected = model.embed(wave_S, rate_hz=32_000)[0]
    mel_BTF = model.module.log_mel(wave_S[None])
    assert mel_BTF.shape[1] < model.module.frames
    clip_BD = model.module.clip_vectors(mel_BTF)
    torch.testing.assert_close(clip_BD[0], expected.clip_D, rtol=1e-4, atol=1e-4)
    assert clip_BD.shape == (1, model.module.clip_width)

    found = model.module.frame_features(mel_BTF)
    count = len(expected.frames_TD)
    torch.testing.assert_close(found.frames_BCD[0, :count], expected.frames_TD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.times_ms_C[:count].double(), expected.times_ms_T)
    assert found.valid_BC.sum() == -(-mel_BTF.shape[1] // model.grid.patch_frames)
    tokens_BPD = model.module(mel_BTF)
    assert tokens_BPD.shape == (1, model.grid.tokens, model.module.token_width)


@pytest.mark.parametrize(
    ("pooling", "layer"), [("mean", "last"), ("frequency", "last"), ("moments", "concat-all")]
)
def test_sounds_of_any_length_have_the_vectors_of_embed(pooling, layer):
    """Clips of a store, in one batch: longer than a view, a little longer, shorter, and what lies after their ends."""
    model = make_model(pooling=pooling, layer=layer)
    wave_S = torch.from_numpy(babble(3.0, 32_000))
    lengths = (96_000, 22_000, 9_000)
    mels = [model.module.log_mel(wave_S[None, :samples])[0] for samples in lengths]
    mel_BTF = torch.full((3, len(mels[0]) + 5, 128), 9.0)
    for padded_TF, mel_TF in zip(mel_BTF, mels, strict=True):
        padded_TF[: len(mel_TF)] = mel_TF
    ends_B = torch.tensor([len(mel_TF) for mel_TF in mels])
    assert model.module.frames < ends_B[1]
    expected_BD = model.embed([wave_S[:samples] for samples in lengths], rate_hz=32_000).clips_BD
    clip_BD = model.module.clip_vectors(mel_BTF, ends_B)
    torch.testing.assert_close(clip_BD, expected_BD, rtol=1e-4, atol=1e-3)

    # Gradients flow through every window, and only to the frames of the sound.
    mel_BTF.requires_grad_()
    model.module.requires_grad_(True).clip_vectors(mel_BTF, ends_B).square().sum().backward()
    assert mel_BTF.grad[0, : ends_B[0]].abs().sum(1).all()
    assert not mel_BTF.grad[2, ends_B[2] :].any()
    assert model.module.clip_vectors(mel_BTF, torch.zeros(3, dtype=torch.int64)).isnan().all()


def test_what_follows_the_sound_does_not_matter():
    """`n_frames_B` says where a sound ends: a row of a store goes on with the floor."""
    module = make_model().module
    mel_BTF = torch.randn(2, 64, 128)
    longer_BTF = mel_BTF.clone()
    longer_BTF[:, 30:] = 9.0
    ends_B = torch.tensor([30, 30])
    expected_BD = module.clip_vectors(mel_BTF[:, :30])
    torch.testing.assert_close(module.clip_vectors(longer_BTF, ends_B), expected_BD)


def test_it_comes_frozen_and_learns_when_asked():
    """`requires_grad_(True).train()` and back, as of every module of PyTorch; the statistics are no parameters."""
    module = make_model().module
    assert not module.training
    assert not any(weight.requires_grad for weight in module.parameters())
    assert {"mean", "std"} <= set(module.state_dict())

    # Unfrozen: every weight that the vector depends on gets a gradient, and so does what comes before.
    network = nn.Sequential(module.requires_grad_(True).train())
    mel_BTF = torch.randn(2, 64, 128, requires_grad=True)
    network(mel_BTF).square().sum().backward()
    gradients = [
        weight.grad for name, weight in module.named_parameters() if "norm" not in name.split(".")[1]
    ]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    assert mel_BTF.grad is not None
    module.requires_grad_(False).eval()
    assert not module(torch.randn(2, 64, 128)).requires_grad


def test_a_view_of_another_shape_is_refused():
    """Bands of another mel spec, and sounds that are longer than a view, would be numbers without meaning."""
    module = make_model().module
    for shape in ((1, 64, 64), (1, 65, 128), (64, 128), (1, 0, 128)):
        with pytest.raises(
            RunError, match=r"expected \[B, at most 64 frames, 128 bands\]; cut longer sounds"
        ):
            module(torch.zeros(shape))
