"""The model as a whole: losses, teacher, padding, mask sets, and that it learns."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from ajepa.model.jepa import Jepa, JepaOutput, JepaSpec, TokenLossName, normalise_features, token_loss
from ajepa.model.masking import RandomBlocks, RandomPatches
from ajepa.model.patches import PatchGrid
from ajepa.model.vit import EncoderSpec, PredictorSpec

GRID = PatchGrid(rows=4, cols=6, patch_frames=4, patch_bands=4)

SPEC = JepaSpec(
    encoder=EncoderSpec(grid=GRID, width=32, depth=2, heads=4),
    predictor=PredictorSpec(width=16, depth=2, heads=2),
)

LOSSES = get_args(TokenLossName)

OPTIONS = {
    "as published": SPEC,
    "rope": replace(
        SPEC,
        encoder=replace(SPEC.encoder, positions="rope"),
        predictor=replace(SPEC.predictor, positions="rope"),
    ),
    "layer scale": replace(
        SPEC,
        encoder=replace(SPEC.encoder, layer_scale=0.1),
        predictor=replace(SPEC.predictor, layer_scale=0.1),
    ),
    "drop path": replace(
        SPEC,
        encoder=replace(SPEC.encoder, drop_path=0.5),
        predictor=replace(SPEC.predictor, drop_path=0.5),
    ),
    "two layers": replace(SPEC, target_layers=2),
    "by position": replace(SPEC, target_norm="position", target_layers=2, loss="squared_l2"),
    "xavier": replace(
        SPEC,
        encoder=replace(SPEC.encoder, init="xavier"),
        predictor=replace(SPEC.predictor, init="xavier"),
    ),
}

for_every_option = pytest.mark.parametrize("spec", OPTIONS.values(), ids=OPTIONS)


def batch(clips: int = 4, frames: int = GRID.frames) -> tuple[torch.Tensor, ...]:
    """Mel, context, targets and valid frames of a small batch, always the same."""
    masks = RandomBlocks().sample(np.random.default_rng(0), GRID, batch=clips)
    mel_BTF = torch.randn(clips, GRID.frames, GRID.bands, generator=torch.Generator().manual_seed(0))
    context_BK, targets_BGQ = torch.from_numpy(masks.context_BK), torch.from_numpy(masks.targets_BGQ)
    return mel_BTF, context_BK, targets_BGQ, torch.full((clips,), frames)


def figures(output: JepaOutput) -> torch.Tensor:
    """Return the loss and every sign of health as one vector."""
    names = [name for name in JepaOutput.__slots__ if name != "context_mean_ND"]
    return torch.stack([getattr(output, name) for name in names])


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        ("l2", 5 / 2),
        ("squared_l2", 25 / 4),
        ("cosine", 1 - 12 / 52**0.5 / 3),
    ],
)
def test_each_loss_is_what_its_formula_says(loss, value):
    """p = (4, 6, 0, 0) and t = (1, 2, 0, 0), or t = (0, 2, 2, 1) for the cosine: done by hand."""
    prediction, target = torch.tensor([4.0, 6.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 0.0, 0.0])
    if loss == "cosine":
        prediction, target = torch.tensor([4.0, 6.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 2.0, 1.0])
    assert token_loss(prediction, target, loss).item() == pytest.approx(value)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_perfect_prediction_costs_nothing_and_its_gradient_is_finite(loss):
    """The norm has a corner at zero: its gradient must not be NaN there."""
    target_BGQD = torch.randn(1, 1, 3, 8)
    prediction_BGQD = target_BGQD.clone().requires_grad_()
    loss_value = token_loss(prediction_BGQD, target_BGQD, loss).sum()
    loss_value.backward()
    assert loss_value.item() == pytest.approx(0, abs=1e-6)
    assert prediction_BGQD.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_predicting_nothing_scores_one(loss):
    """Targets have mean 0 and variance 1 over the width, so the scale of the loss means the same at any width."""
    for width in (8, 512):
        target_BGQD = normalise_features(5 + 3 * torch.randn(2, 2, 10, width))
        nothing_BGQ = token_loss(torch.zeros_like(target_BGQD), target_BGQD, loss)
        torch.testing.assert_close(nothing_BGQ, torch.ones(2, 2, 10), atol=1e-4, rtol=0)


def test_an_unknown_loss_is_refused_with_the_known_ones():
    """A misspelt recipe stops at once."""
    with pytest.raises(ValueError, match="one of l2, squared_l2, cosine, got 'l3'"):
        replace(SPEC, loss="l3")


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_reaches_encoder_and_predictor_and_not_the_teacher(loss):
    """Every weight of the two learns; the teacher only follows."""
    jepa = Jepa(replace(SPEC, loss=loss))
    jepa(*batch()).loss.backward()
    for part in (jepa.encoder, jepa.predictor):
        assert all(parameter.grad.abs().max() > 0 for parameter in part.parameters())
    assert all(
        parameter.grad is None and not parameter.requires_grad for parameter in jepa.target.parameters()
    )


def test_the_teacher_starts_as_the_encoder_and_stays_in_eval_mode():
    """A copy, not the same tensors; `train()` on the whole must leave its mode alone."""
    jepa = Jepa(SPEC).train()
    for weight, target in zip(jepa.encoder.parameters(), jepa.target.parameters(), strict=True):
        assert torch.equal(weight, target)
        assert weight.data_ptr() != target.data_ptr()
    assert jepa.encoder.training
    assert not jepa.target.training


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.996, 1.0])
def test_the_teacher_moves_by_its_momentum(momentum):
    """target = m target + (1 - m) encoder, exactly the encoder at 0 and not a bit at 1."""
    jepa = Jepa(SPEC)
    with torch.no_grad():
        for parameter in jepa.encoder.parameters():
            parameter.add_(1.0)
    before = [parameter.clone() for parameter in jepa.target.parameters()]
    jepa.update_target(momentum)
    for old, weight, new in zip(before, jepa.encoder.parameters(), jepa.target.parameters(), strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * weight)
        assert momentum != 0 or torch.equal(new, weight)
        assert momentum != 1 or torch.equal(new, old)


def test_the_teacher_follows_buffers_too():
    """An encoder that one day keeps running statistics must not leave the teacher with stale ones."""
    jepa = Jepa(SPEC)
    for encoder, value in ((jepa.encoder, 1.0), (jepa.target, 0.0)):
        encoder.register_buffer("mean_D", torch.full((3,), value))
    jepa.update_target(0.75)
    assert jepa.target.mean_D.tolist() == [0.25] * 3


def test_the_loss_is_the_mean_over_targets_of_the_distance_to_the_normalised_features():
    """The equation of the loss, computed step by step."""
    jepa, (mel_BTF, context_BK, targets_BGQ, n_frames_B) = Jepa(SPEC), batch()
    feature_BPD = jepa.target(mel_BTF)
    target_BPD = (feature_BPD - feature_BPD.mean(-1, keepdim=True)) / feature_BPD.std(-1, False, keepdim=True)
    prediction_BGQD = jepa.predictor(jepa.encoder(mel_BTF, context_BK), context_BK, targets_BGQ)
    target_BGQD = torch.stack([target_BPD[clip][tokens] for clip, tokens in enumerate(targets_BGQ)])
    by_hand = (prediction_BGQD - target_BGQD).square().mean(-1).sqrt().mean()
    torch.testing.assert_close(jepa(mel_BTF, context_BK, targets_BGQ, n_frames_B).loss, by_hand)


@for_every_option
def test_frames_past_the_end_of_a_clip_change_nothing(spec):
    """Loss, gradients and signs of health: bit for bit the same whatever the padding holds."""
    outcomes = []
    for noise in (0.0, 100.0):
        jepa, (mel_BTF, context_BK, targets_BGQ, _) = Jepa(spec), batch()
        mel_BTF[1, 8:] = noise
        mel_BTF[2, 16:] = noise
        n_frames_B = torch.tensor([24, 8, 14, 24])
        output = jepa(mel_BTF, context_BK, targets_BGQ, n_frames_B, np.random.default_rng(0))
        output.loss.backward()
        outcomes.append((figures(output), jepa.encoder.embed.weight.grad, jepa.predictor.out.weight.grad))
    for clean, noisy in zip(*outcomes, strict=True):
        assert torch.equal(clean, noisy)


def test_targets_on_padding_are_not_scored():
    """A clip of two columns has eight tokens; the targets among them count, once for each group they are in."""
    jepa, (mel_BTF, context_BK, targets_BGQ, _) = Jepa(SPEC), batch()
    output = jepa(mel_BTF, context_BK, targets_BGQ, torch.tensor([24, 8, 8, 8]))
    expected = targets_BGQ[0].numel() + int((targets_BGQ[1:] < 8).sum())
    assert 0 < output.scored.item() == expected < targets_BGQ.numel()


@pytest.mark.parametrize("spec", [spec for name, spec in OPTIONS.items() if name != "drop path"])
def test_where_all_is_valid_the_masks_are_skipped_and_nothing_changes(spec):
    """The fast path and the masked one agree: a fifth clip, which is empty, makes the model take the latter."""
    mel_BTF, context_BK, targets_BGQ, n_frames_B = batch()
    jepa = Jepa(spec)
    five_clips = [0, 1, 2, 3, 0]
    assert jepa.valid_mask_if_padded(n_frames_B, mel_BTF.device) is None
    n_frames_B = torch.cat((n_frames_B, torch.zeros(1, dtype=torch.int64)))
    masked = figures(jepa(mel_BTF[five_clips], context_BK[five_clips], targets_BGQ[five_clips], n_frames_B))
    torch.testing.assert_close(masked, figures(jepa(*batch())))


@for_every_option
def test_a_batch_without_sound_gives_zero_scored_and_no_nan(spec):
    """The caller refuses it by `scored`; a NaN would reach the weights first."""
    jepa = Jepa(spec)
    output = jepa(*batch(frames=0), np.random.default_rng(0))
    output.loss.backward()
    assert output.scored == 0
    assert output.loss == 0
    assert figures(output).isfinite().all()
    assert all(p.grad.isfinite().all() for p in jepa.parameters() if p.grad is not None)


def test_a_collapsed_teacher_shows():
    """The same vector for every patch has no spread: the loss alone would not show it."""
    jepa = Jepa(SPEC)
    assert jepa(*batch()).target_std > 0.1
    torch.nn.init.zeros_(jepa.target.norm.weight)
    output = jepa(*batch())
    assert output.target_std < 1e-6
    assert figures(output).isfinite().all()


def test_signs_of_health_carry_no_graph():
    """Logging them must not keep the graph of a step in memory; the input of the clip objective has one."""
    output = Jepa(SPEC)(*batch())
    with_graph = [name for name in JepaOutput.__slots__ if getattr(output, name).requires_grad]
    assert with_graph == ["loss", "context_mean_ND"]


@pytest.mark.parametrize("loss", LOSSES)
def test_it_learns_a_batch_by_heart(loss):
    """Ninety steps on eight fixed clips with a still teacher: from explaining nothing to explaining half."""
    jepa = Jepa(replace(SPEC, loss=loss), seed=1)
    mel_BTF, *_, n_frames_B = batch(8)
    masks = RandomPatches().sample(np.random.default_rng(0), GRID, batch=8)
    fixed = (mel_BTF, torch.from_numpy(masks.context_BK), torch.from_numpy(masks.targets_BGQ), n_frames_B)
    optimiser = torch.optim.AdamW([p for p in jepa.parameters() if p.requires_grad], lr=3e-3)
    first = jepa(*fixed)
    for _ in range(90):
        optimiser.zero_grad()
        jepa(*fixed).loss.backward()
        optimiser.step()
    last = jepa(*fixed)
    assert last.loss < 0.6 * first.loss
    assert last.explained > 0.5 > 0.05 > first.explained
    assert last.cosine > 0.7


def test_it_learns_with_a_moving_teacher_and_without_collapse():
    """The whole step as the loop runs it: the loss falls and the teacher still tells patches apart."""
    jepa = Jepa(SPEC, seed=1)
    fixed = batch(8)
    optimiser = torch.optim.AdamW([p for p in jepa.parameters() if p.requires_grad], lr=1e-3)
    outputs = []
    for step in range(60):
        optimiser.zero_grad()
        outputs.append(jepa(*fixed))
        outputs[-1].loss.backward()
        optimiser.step()
        jepa.update_target(0.996 + 0.004 * step / 60)
    assert outputs[-1].loss < 0.85 * outputs[0].loss
    assert outputs[-1].target_std > 0.5 * outputs[0].target_std


def two_sets(clips: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Return context and targets of two mask sets for each clip."""
    masks = RandomBlocks().sample(np.random.default_rng(3), GRID, batch=2 * clips)
    return torch.from_numpy(masks.context_BK), torch.from_numpy(masks.targets_BGQ)


@for_every_option
def test_two_mask_sets_of_a_clip_are_the_mean_of_one_and_the_other(spec):
    """Loss and gradients; the teacher runs once."""
    jepa = Jepa(spec).eval()
    mel_BTF, *_, n_frames_B = batch()
    context_NK, targets_NGQ = two_sets()
    passes = []
    jepa.target.norm.register_forward_hook(lambda *arguments: passes.append(arguments))
    both = jepa(mel_BTF, context_NK, targets_NGQ, n_frames_B)
    both.loss.backward()
    assert len(passes) == (spec.target_layers == 1)
    gradient = jepa.encoder.embed.weight.grad.clone()
    jepa.zero_grad()
    each = [jepa(mel_BTF, context_NK[first::2], targets_NGQ[first::2], n_frames_B) for first in (0, 1)]
    mean = (each[0].loss + each[1].loss) / 2
    mean.backward()
    torch.testing.assert_close(both.loss, mean)
    torch.testing.assert_close(gradient, jepa.encoder.embed.weight.grad)
    assert both.scored == 2 * each[0].scored


def test_every_mask_set_has_the_padding_of_its_own_clip():
    """Sets lie clip by clip: a mistake in their order would score the padding of another clip."""
    jepa = Jepa(SPEC)
    mel_BTF, *_ = batch()
    context_NK, targets_NGQ = two_sets()
    output = jepa(mel_BTF, context_NK, targets_NGQ, torch.tensor([24, 8, 24, 24]))
    others = torch.cat((targets_NGQ[:2], targets_NGQ[4:])).numel()
    assert output.scored.item() == others + int((targets_NGQ[2:4] < 8).sum())


@for_every_option
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_recomputed_activations_change_not_one_bit(spec, bf16):
    """Checkpointing trades time for memory and nothing else: loss, health and every gradient are the same."""
    outcomes = []
    for jepa in (Jepa(spec), Jepa(spec).enable_recompute()):
        mel_BTF, *masks, n_frames_B = batch()
        n_frames_B[1] = 9
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = jepa(mel_BTF, *masks, n_frames_B, np.random.default_rng(0))
        output.loss.backward()
        outcomes.append([figures(output), *(p.grad for p in jepa.parameters() if p.grad is not None)])
    assert len(outcomes[0]) > 20
    assert all(torch.equal(first, second) for first, second in zip(*outcomes, strict=True))


def test_recomputation_keeps_less_for_the_backward_pass():
    """Bytes that autograd saves, counted: recomputation must have an effect, and not only do no harm."""
    saved_bytes = []
    for jepa in (Jepa(SPEC), Jepa(SPEC).enable_recompute()):
        bytes_of_storage = {}

        def pack(x, bytes_of_storage=bytes_of_storage):
            bytes_of_storage[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            jepa(*batch())
        saved_bytes.append(sum(bytes_of_storage.values()))
    assert saved_bytes[1] < 0.5 * saved_bytes[0]


def test_drop_path_drops_in_training_only_and_needs_its_generator():
    """From the generator of the step: the same step on resume drops the same branches."""
    jepa = Jepa(OPTIONS["drop path"])
    fixed = batch()
    first, again, other = (jepa(*fixed, np.random.default_rng(seed)).loss for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(ValueError, match="drop path draws from the generator of the step"):
        jepa(*fixed)
    torch.testing.assert_close(jepa.eval()(*fixed).loss, Jepa(SPEC)(*fixed).loss)


def test_the_target_of_several_layers_is_the_mean_of_each_normalised():
    """By hand, from the blocks' own outputs; a layer ten times as loud counts no more."""
    jepa, (mel_BTF, *_) = Jepa(replace(SPEC, target_layers=2)), batch()
    layers = []
    for block in jepa.target.blocks:
        block.register_forward_hook(lambda block, inputs, output: layers.append(output))
    feature_BPD = jepa.target_features(mel_BTF)
    by_hand = [(x - x.mean(-1, keepdim=True)) / x.std(-1, False, keepdim=True) for x in layers]
    torch.testing.assert_close(feature_BPD, torch.stack(by_hand).mean(0), atol=2e-4, rtol=1e-3)


def test_targets_by_position_say_how_a_clip_differs_from_the_others():
    """By hand, with a short clip: a position's mean is over the clips that have sound there."""
    jepa, (mel_BTF, *_) = Jepa(OPTIONS["by position"]), batch()
    n_frames_B = torch.tensor([24, 24, 12, 24])
    valid_BP = jepa.valid_mask_if_padded(n_frames_B, mel_BTF.device)
    targets = jepa.compute_targets(mel_BTF, valid_BP)
    feature_BPD = jepa.target_features(mel_BTF, valid_BP)
    by_hand = torch.zeros_like(feature_BPD)
    for token in range(GRID.tokens):
        clips = valid_BP[:, token]
        by_hand[clips, token] = feature_BPD[clips, token] - feature_BPD[clips, token].mean(0)
    by_hand /= by_hand[valid_BP].square().mean(0).sqrt()
    torch.testing.assert_close(targets.target_BPD[valid_BP], by_hand[valid_BP], atol=1e-5, rtol=1e-4)
    assert torch.equal(targets.feature_BPD, feature_BPD)


def test_parts_of_a_batch_are_centred_by_the_whole_of_it():
    """Two ranks that add their sums have the targets that one process has."""
    jepa, (mel_BTF, *_) = Jepa(OPTIONS["by position"]), batch()
    valid_BP = jepa.valid_mask_if_padded(torch.tensor([24, 8, 12, 24]), mel_BTF.device)
    feature_BPD = jepa.target_features(mel_BTF, valid_BP)
    whole = jepa.normalise_targets(feature_BPD, valid_BP).target_BPD

    def sums_of_half(half: slice) -> list[torch.Tensor]:
        """Return the sums that the other rank would add, each computed with this rank's answer to the one before."""
        kept = []
        valid_BP1 = valid_BP[..., None].float()
        sum_PE = torch.cat(((feature_BPD * valid_BP1)[half].sum(0), valid_BP1[half].sum(0)), dim=1)
        kept.append(sum_PE)
        all_PE = torch.cat(((feature_BPD * valid_BP1).sum(0), valid_BP1.sum(0)), dim=1)
        centred_BPD = feature_BPD - all_PE[:, :-1] / all_PE[:, -1:].clamp(min=1)
        kept.append((centred_BPD * valid_BP1)[half].square().sum((0, 1)))
        return kept

    sums_of_other = iter(sums_of_half(slice(2, 4)))
    part = jepa.normalise_targets(feature_BPD[:2], valid_BP[:2], lambda sums: sums + next(sums_of_other))
    torch.testing.assert_close(part.target_BPD[valid_BP[:2]], whole[:2][valid_BP[:2]])


def test_several_views_are_encoded_and_tokens_are_predicted_in_the_first():
    """The loss is that of the first views alone; the mean context tokens are those of all, in order."""
    jepa, (mel_BTF, context_BK, targets_BGQ, n_frames_B) = Jepa(SPEC), batch()
    others = torch.randn(4, GRID.frames, GRID.bands, generator=torch.Generator().manual_seed(1))
    mel_VTF = torch.stack((mel_BTF, others), dim=1).flatten(0, 1)
    context_VK = context_BK.repeat_interleave(2, dim=0)
    short_B = torch.tensor([24, 8, 24, 24])
    n_frames_V = torch.stack((short_B, n_frames_B), dim=1).flatten()
    targets = jepa.compute_targets(mel_BTF, jepa.valid_mask_if_padded(short_B, mel_BTF.device))
    output = jepa(mel_VTF, context_VK, targets_BGQ, n_frames_V, targets=targets)
    alone = jepa(mel_BTF, context_BK, targets_BGQ, short_B)
    torch.testing.assert_close(figures(output), figures(alone))
    torch.testing.assert_close(output.context_mean_ND[::2], alone.context_mean_ND)
    other_output = jepa(others, context_BK, targets_BGQ, n_frames_B)
    torch.testing.assert_close(output.context_mean_ND[1::2], other_output.context_mean_ND)
    scored, has_sound_N = jepa.find_scored(context_VK, targets_BGQ, n_frames_V)
    assert scored == output.scored
    assert torch.equal(has_sound_N, output.context_mean_ND.abs().sum(1) > 0)


def test_the_mean_context_token_is_over_sound_alone():
    """Padding in the context would make the vector of a short clip one of silence."""
    jepa, (mel_BTF, context_BK, targets_BGQ, n_frames_B) = Jepa(SPEC), batch()
    n_frames_B[2] = 12
    valid_BP = jepa.valid_mask_if_padded(n_frames_B, mel_BTF.device)
    context_BKD = jepa.encoder(mel_BTF, context_BK, valid_BP)
    by_hand = [context_BKD[clip][valid_BP[clip][context_BK[clip]]].mean(0) for clip in range(4)]
    output = jepa(mel_BTF, context_BK, targets_BGQ, n_frames_B)
    torch.testing.assert_close(output.context_mean_ND, torch.stack(by_hand))
    without_gradient = jepa.context_means(mel_BTF, context_BK, n_frames_B, None)
    assert torch.equal(without_gradient, output.context_mean_ND)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target_layers": 3}, "target_layers must lie in 1 to 2, the depth of the teacher"),
        ({"target_norm": "batch"}, "target_norm must be token or position, got 'batch'"),
        ({"token_weight": 0.0}, "token_weight must be above 0"),
    ],
)
def test_an_option_that_cannot_be_is_refused(wrong, message):
    """At the construction of the spec, with the range that is allowed."""
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **wrong)
