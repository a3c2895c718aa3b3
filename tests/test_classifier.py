"""The classifier on an encoder: any length, valid tokens only, random in training alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ajepa.classifier import Vit, VitSpec
from ajepa.models import MODELS, built, model_name
from ajepa.patches import PatchGrid
from ajepa.regularised import RegularisedMasking
from ajepa.vit import Encoder, EncoderSpec

ENCODER = EncoderSpec(grid=PatchGrid.of(64, 32), width=32, depth=3, heads=2)
OFF = RegularisedMasking(share=0.0)


def spec(frames: int = 64, *, masking: RegularisedMasking = OFF, **changes) -> VitSpec:
    return VitSpec(encoder=replace(ENCODER, grid=PatchGrid.of(frames, 32), **changes), masking=masking)


def clips(frames: int = 64, *, count: int = 3) -> torch.Tensor:
    return torch.randn(count, frames, 32, generator=torch.Generator().manual_seed(3))


WHOLE = torch.full((3,), 64)


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_weights_do_not_depend_on_the_length_that_was_pre_trained(positions):
    """An encoder of 64 frames classifies clips of 256 and of 16; where both see, they see the same."""
    short = Encoder(replace(ENCODER, positions=positions), seed=1).eval()
    for frames in (256, 16):
        model = built(spec(frames, positions=positions), 5, 0)
        model.encoder.load_state_dict(short.state_dict())
        assert model(clips(frames), torch.full((3,), frames), np.random.default_rng(0)).shape == (3, 5)
    longer = Encoder(replace(ENCODER, positions=positions, grid=PatchGrid.of(256, 32)), seed=2).eval()
    longer.load_state_dict(short.state_dict())
    padded = torch.nn.functional.pad(clips(), (0, 0, 0, 192))
    valid_BP = torch.arange(32).expand(3, -1) < 8
    torch.testing.assert_close(longer(padded, valid_BP=valid_BP)[:, :8], short(clips()))


def test_masking_at_0_is_plain_attention_to_the_bit():
    """And draws nothing, in training too."""
    model = Vit(spec(), 5, seed=0)
    rng = np.random.default_rng(0)
    trained = model(clips(), WHOLE, rng)
    assert torch.equal(trained, model.eval()(clips(), WHOLE))
    plain = model.head(model.encoder(clips()).mean(dim=1))
    torch.testing.assert_close(trained, plain)
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


@pytest.mark.parametrize("reading", ["keys", "tokens"])
def test_masking_is_drawn_from_the_steps_generator_in_training_and_off_in_evaluation(reading):
    """The same generator, the same logits; another, others; none in evaluation, where it would blur a measure."""
    model = Vit(spec(masking=RegularisedMasking(share=0.3, reading=reading)), 5, seed=0)
    first, again, other = (model(clips(), WHOLE, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(ValueError, match="give `rng`"):
        model(clips(), WHOLE)
    plain = Vit(spec(), 5, seed=0).eval()(clips(), WHOLE)
    assert torch.equal(model.eval()(clips(), WHOLE, np.random.default_rng(1)), plain)


def test_the_two_readings_differ_and_drop_path_joins_either():
    """What is multiplied for each clip and what for each token must not undo one another."""
    logits = []
    for reading in ("keys", "tokens"):
        masking = RegularisedMasking(share=0.3, reading=reading)
        for drop_path in (0.0, 0.5):
            model = Vit(spec(masking=masking, drop_path=drop_path), 5, seed=0)
            logits.append(model(clips(), WHOLE, np.random.default_rng(4)))
            logits[-1].sum().backward()
            assert all(weight.grad is not None for weight in model.parameters())
    assert all(not torch.allclose(one, other) for i, one in enumerate(logits) for other in logits[:i])


@pytest.mark.parametrize(("pooling", "vectors"), [("mean", 1), ("frequency", 2), ("moments", 4)])
def test_the_head_sees_the_vector_that_the_pooling_gives(pooling, vectors):
    """Two rows of patches: their mean, each, or mean and deviation of each; trainable where nothing varies."""
    model = Vit(replace(spec(), pooling=pooling), 5, seed=0)
    assert model.head.in_features == vectors * 32
    short = torch.tensor([64, 16, 1])  # one column of patches, or a part of it, has no deviation
    logits_BC = model(clips(), short, np.random.default_rng(0))
    logits_BC.square().sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())
    assert model.encoder.blocks[0].mlp[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("training", [False, True])
def test_what_lies_past_a_clips_end_never_reaches_its_logits(training):
    """Neither by attention nor by the mean."""
    model = Vit(spec(masking=RegularisedMasking(share=0.3)), 5, seed=0).train(training)
    n_frames_B, loud = torch.tensor([64, 30, 1]), clips()
    loud[1, 32:], loud[2, 16:] = 9e3, -9e3
    first, second = (model(mel, n_frames_B, np.random.default_rng(0)) for mel in (clips(), loud))
    assert torch.equal(first, second)


def test_layers_hold_every_weight_once_from_the_input_to_the_head():
    """A weight that none holds would never be trained; one in two would be trained twice."""
    model = Vit(spec(), 5, seed=0)
    layers = model.layers()
    assert len(layers) == 3 + 2
    held = [id(weight) for layer in layers for weight in layer]
    assert sorted(held) == sorted(id(weight) for weight in model.parameters())
    assert layers[0][0] is model.encoder.embed.weight
    assert layers[-1][-1] is model.head.bias


def test_every_model_is_found_by_its_spec():
    assert model_name(spec()) == "vit"
    assert len({model.spec for model in MODELS.values()}) == len(MODELS)


def test_weights_are_a_function_of_the_seed():
    first, again, other = (built(spec(), 5, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
