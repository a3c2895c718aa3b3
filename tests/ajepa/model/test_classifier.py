"""The classifier on an encoder, for clips of any length, and its regularised masking."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from ajepa.model.classifier import (
    CLASSIFIER_KINDS,
    RegularisedMasking,
    VitClassifier,
    VitSpec,
    build_classifier,
    classifier_kind_name,
)
from ajepa.model.patches import PatchGrid
from ajepa.model.transformer import TransformerSpec, initialise_weights, run_blocks
from ajepa.model.vit import Encoder, EncoderSpec

ENCODER = EncoderSpec(grid=PatchGrid.from_size(64, 32), width=32, depth=3, heads=2)

OFF = RegularisedMasking(share=0.0)


def spec(frames: int = 64, *, masking: RegularisedMasking = OFF, **changes) -> VitSpec:
    return VitSpec(encoder=replace(ENCODER, grid=PatchGrid.from_size(frames, 32), **changes), masking=masking)


def clips(frames: int = 64, *, count: int = 3) -> torch.Tensor:
    return torch.randn(count, frames, 32, generator=torch.Generator().manual_seed(3))


WHOLE = torch.full((3,), 64)


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_weights_do_not_depend_on_the_length_that_was_pre_trained(positions):
    """An encoder of 64 frames classifies clips of 256 and of 16; on the same 64 frames both lengths agree."""
    short = Encoder(replace(ENCODER, positions=positions), seed=1).eval()
    for frames in (256, 16):
        model = build_classifier(spec(frames, positions=positions), 5, 0)
        model.encoder.load_state_dict(short.state_dict())
        assert model(clips(frames), torch.full((3,), frames), np.random.default_rng(0)).shape == (3, 5)
    longer = Encoder(replace(ENCODER, positions=positions, grid=PatchGrid.from_size(256, 32)), seed=2).eval()
    longer.load_state_dict(short.state_dict())
    padded = torch.nn.functional.pad(clips(), (0, 0, 0, 192))
    valid_BP = torch.arange(32).expand(3, -1) < 8
    torch.testing.assert_close(longer(padded, valid_BP=valid_BP)[:, :8], short(clips()))


def test_masking_at_0_is_plain_attention_to_the_bit():
    """And nothing is drawn, in training too: a recipe without masking keeps its random numbers."""
    model = VitClassifier(spec(), 5, seed=0)
    rng = np.random.default_rng(0)
    trained = model(clips(), WHOLE, rng)
    assert torch.equal(trained, model.eval()(clips(), WHOLE))
    plain = model.head(model.encoder(clips()).mean(dim=1))
    torch.testing.assert_close(trained, plain)
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


@pytest.mark.parametrize("reading", ["keys", "tokens"])
def test_masking_is_drawn_from_the_steps_generator_in_training_and_off_in_evaluation(reading):
    """The same generator gives the same logits; in evaluation randomness would blur the measurement."""
    model = VitClassifier(spec(masking=RegularisedMasking(share=0.3, reading=reading)), 5, seed=0)
    first, again, other = (model(clips(), WHOLE, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(ValueError, match="give `rng`"):
        model(clips(), WHOLE)
    plain = VitClassifier(spec(), 5, seed=0).eval()(clips(), WHOLE)
    assert torch.equal(model.eval()(clips(), WHOLE, np.random.default_rng(1)), plain)


def test_the_two_readings_differ_and_drop_path_joins_either():
    """Drop path has factors for each clip, masking for each token: neither may undo the other."""
    logits = []
    for reading in ("keys", "tokens"):
        masking = RegularisedMasking(share=0.3, reading=reading)
        for drop_path in (0.0, 0.5):
            model = VitClassifier(spec(masking=masking, drop_path=drop_path), 5, seed=0)
            logits.append(model(clips(), WHOLE, np.random.default_rng(4)))
            logits[-1].sum().backward()
            assert all(weight.grad is not None for weight in model.parameters())
    assert all(not torch.allclose(*pair) for pair in itertools.combinations(logits, 2))


@pytest.mark.parametrize(("pooling", "vectors"), [("mean", 1), ("frequency", 2), ("moments", 4)])
def test_the_head_sees_the_vector_that_the_pooling_gives(pooling, vectors):
    """Two rows of patches: one mean, two, or two with deviations; gradients stay finite where nothing varies."""
    model = VitClassifier(replace(spec(), pooling=pooling), 5, seed=0)
    assert model.head.in_features == vectors * 32
    short = torch.tensor([64, 16, 1])  # one column of patches, or a part of it, has no deviation
    logits_BC = model(clips(), short, np.random.default_rng(0))
    logits_BC.square().sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())
    assert model.encoder.blocks[0].mlp[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("training", [False, True])
def test_what_lies_past_a_clips_end_never_reaches_its_logits(training):
    """Neither by attention nor by the mean: padding may hold anything."""
    model = VitClassifier(spec(masking=RegularisedMasking(share=0.3)), 5, seed=0).train(training)
    n_frames_B, loud = torch.tensor([64, 30, 1]), clips()
    loud[1, 32:], loud[2, 16:] = 9e3, -9e3
    first, second = (model(mel, n_frames_B, np.random.default_rng(0)) for mel in (clips(), loud))
    assert torch.equal(first, second)


def test_a_column_that_a_clip_fills_in_part_ends_with_its_last_frame():
    """As a frozen encoder sees it, so that fine-tuning goes on from what was pre-trained and probed."""
    model, n_frames_B, shown = VitClassifier(spec(), 5, seed=0).eval(), torch.tensor([64, 30, 1]), clips()
    shown[1, 30:], shown[2, 1:] = shown[1, 29].clone(), shown[2, 0].clone()
    assert torch.equal(model(clips(), n_frames_B), model(shown, n_frames_B))


def test_layers_hold_every_weight_once_from_the_input_to_the_head():
    """A weight in no group would never be trained; a weight in two would be trained twice."""
    model = VitClassifier(spec(), 5, seed=0)
    layers = model.weights_by_depth()
    assert len(layers) == 3 + 2
    listed = [id(weight) for layer in layers for weight in layer]
    assert sorted(listed) == sorted(id(weight) for weight in model.parameters())
    assert layers[0][0] is model.encoder.embed.weight
    assert layers[-1][-1] is model.head.bias


def test_every_kind_of_classifier_is_found_by_its_spec():
    """The spec in a recipe alone says what is built, so no two kinds may share one."""
    assert classifier_kind_name(spec()) == "vit"
    assert len({kind.spec_type for kind in CLASSIFIER_KINDS.values()}) == len(CLASSIFIER_KINDS)


def test_weights_are_a_function_of_the_seed():
    """Two runs of one recipe begin alike."""
    first, again, other = (build_classifier(spec(), 5, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


STACK = TransformerSpec(width=32, depth=3, heads=2, positions="sincos", layer_scale=0.0, drop_path=0.0)


@pytest.fixture(scope="module")
def blocks():
    blocks = STACK.build_blocks()
    initialise_weights(blocks, seed=1)
    return blocks.double()


def tokens(clips: int = 2) -> torch.Tensor:
    return torch.randn(clips, 12, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def mask_one_token(token: int, layer: int) -> torch.Tensor:
    """Return a mask of three layers that hides one token of both clips in one layer."""
    masked_LBP = torch.zeros(3, 2, 12, dtype=torch.bool)
    masked_LBP[layer, :, token] = True
    return masked_LBP


@pytest.mark.parametrize("reading", ["keys", "tokens"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_masked_tokens_value_reaches_no_other_in_that_layer(blocks, reading, layer):
    """Whatever it is changed to, the others' outputs of that layer are the same to the bit; unmasked, they move."""
    masked_LBP = mask_one_token(5, layer)
    masking = RegularisedMasking(reading=reading)
    valid_BP = ~masked_LBP[layer]
    keep_L2BP = masking.branch_factors(masked_LBP, None)
    keep_2BP = None if keep_L2BP is None else keep_L2BP[layer].double()
    x_BPD = tokens()
    others = [place for place in range(12) if place != 5]
    changed_BPD = x_BPD.clone()
    changed_BPD[:, 5] = 7.0
    first, second = (blocks[layer](x, valid_BP, None, keep_2BP) for x in (x_BPD, changed_BPD))
    assert torch.equal(first[:, others], second[:, others])
    assert not torch.equal(first[:, 5], second[:, 5])
    unmasked = [blocks[layer](x)[:, others] for x in (x_BPD, changed_BPD)]
    assert not torch.allclose(*unmasked)


def test_under_keys_a_masked_token_still_attends_to_the_others_and_not_to_itself(blocks):
    """Its own output comes from the others: that is what is to be learnt."""
    masked_LBP = mask_one_token(5, 0)
    attention = blocks[0].attention
    normed_BPD = blocks[0].attention_norm(tokens())
    output_D = attention(normed_BPD, ~masked_LBP[0])[:, 5]
    for place, attended in ((5, False), (6, True)):
        # Change the value of one token; its query and key stay.
        values = attention.qkv(normed_BPD)
        changed = attention.qkv(normed_BPD.clone())
        changed[:, place, 64:] += 1.0
        first, second = (attend_by_hand(attention, qkv, ~masked_LBP[0])[:, 5] for qkv in (values, changed))
        torch.testing.assert_close(first, output_D)
        assert torch.equal(first, second) is not attended


def attend_by_hand(attention, qkv_BPN, valid_BP) -> torch.Tensor:
    """Return the output of an attention for queries, keys and values, by its definition."""
    q, k, v = qkv_BPN.unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~valid_BP[:, None, None], -torch.inf)
    return attention.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_under_tokens_a_masked_token_attends_to_none(blocks):
    """The other reading: it takes no part in the layer's attention, and passes on through the MLP alone."""
    masked_LBP = mask_one_token(5, 0)
    x_BPD = tokens()
    block = blocks[0]
    keep_L2BP = RegularisedMasking(reading="tokens").branch_factors(masked_LBP, None)
    output_BPD = block(x_BPD, ~masked_LBP[0], None, keep_L2BP[0].double())
    alone_BPD = x_BPD + block.mlp(block.mlp_norm(x_BPD))
    torch.testing.assert_close(output_BPD[:, 5], alone_BPD[:, 5])
    assert not torch.allclose(output_BPD[:, 6], alone_BPD[:, 6])


def test_without_a_share_nothing_is_drawn():
    """The generator stands where it stood: a masking that is off changes no later draw."""
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    valid_BP = torch.ones(2, 12, dtype=torch.bool)
    assert RegularisedMasking(share=0.0).draw_masked_tokens(rng, valid_BP, depth=3) is None
    assert rng.bit_generator.state == state


def test_a_tenth_of_the_valid_tokens_is_masked_in_every_layer_and_others_in_each():
    """Counts from arithmetic: rounded down, valid tokens only, and never all tokens of a clip."""
    valid_BP = torch.arange(40) < torch.tensor([40, 25, 9, 1])[:, None]
    masked_LBP = RegularisedMasking().draw_masked_tokens(np.random.default_rng(0), valid_BP, depth=6)
    assert masked_LBP.sum(dim=2).tolist() == [[4, 2, 0, 0]] * 6
    assert not (masked_LBP & ~valid_BP).any()
    assert len({tuple(layer[0].tolist()) for layer in masked_LBP}) == 6
    most_LBP = RegularisedMasking(share=0.999).draw_masked_tokens(np.random.default_rng(0), valid_BP, depth=6)
    assert most_LBP.sum(dim=2).tolist() == [[39, 24, 8, 0]] * 6


def test_every_token_is_masked_as_often():
    """The classifier would come to rely on a token that is never masked."""
    masking = RegularisedMasking(share=0.2)
    rng = np.random.default_rng(0)
    count_P = torch.zeros(20)
    for _ in range(200):
        masked_LBP = masking.draw_masked_tokens(rng, torch.ones(4, 20).bool(), depth=3)
        count_P += masked_LBP.sum(dim=(0, 1))
    assert (count_P / 2_400).tolist() == pytest.approx([0.2] * 20, abs=0.04)


def test_a_mask_for_every_block_is_each_blocks_own(blocks):
    """`run_blocks` hands every layer its own mask; also where activations are computed again."""
    masked_LBP = RegularisedMasking(share=0.3).draw_masked_tokens(
        np.random.default_rng(1), torch.ones(2, 12).bool(), depth=3
    )
    expected = tokens()
    for block, masked_BP in zip(blocks, masked_LBP, strict=True):
        expected = block(expected, ~masked_BP)
    for recompute in (False, True):
        assert torch.equal(run_blocks(blocks, tokens(), ~masked_LBP, None, recompute=recompute)[0], expected)


@pytest.mark.parametrize("wrong", [{"share": 1.0}, {"share": -0.1}, {"reading": "values"}])
def test_a_masking_that_cannot_be_is_refused(wrong):
    """At its construction, before the first batch."""
    with pytest.raises(ValueError, match="must"):
        RegularisedMasking(**wrong)
