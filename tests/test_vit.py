"""Encoder and predictor: size, initial weights, attention, and what may not reach what."""

import numpy as np
import pytest
import torch
from torch import nn

from ajepa.masking import RandomBlocks, RandomPatches, TimeFrequencyAware
from ajepa.patches import PatchGrid
from ajepa.vit import (
    A_JEPA_PREDICTOR,
    Encoder,
    EncoderSpec,
    Predictor,
    PredictorSpec,
    attention_for,
    encoder_spec,
    fused_attention,
    written_out_attention,
)

GRID = PatchGrid(rows=4, cols=6, patch_frames=4, patch_bands=4)
SPEC = EncoderSpec(grid=GRID, width=32, depth=2, heads=4)
GUESS = PredictorSpec(width=16, depth=2, heads=2)
MAKERS = [RandomPatches(), RandomBlocks(), TimeFrequencyAware()]


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def mel(clips: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(clips, GRID.frames, GRID.bands, generator=torch.Generator().manual_seed(seed))


def masks(maker=None, clips: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = (maker or RandomBlocks()).sample(np.random.default_rng(0), GRID, batch=clips)
    return torch.from_numpy(drawn.context_BK), torch.from_numpy(drawn.targets_BGQ)


def rough(module: nn.Module) -> nn.Module:
    """Weights large enough that every token matters to every other."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return module


def test_vit_b_and_its_predictor_are_the_size_audio_jepa_reports():
    """85,253,376 and 11,238,912 trainable values: one bias too many would show."""
    grid = PatchGrid.of(256, 128)
    with torch.device("meta"):
        assert size(Encoder(EncoderSpec(grid=grid))) == 85_253_376
        assert size(Predictor(PredictorSpec(), 768, grid)) == 11_238_912


@pytest.mark.parametrize(
    ("letter", "width", "depth", "heads", "millions"),
    [("s", 384, 12, 6, 21.39), ("b", 768, 12, 12, 85.25), ("l", 1024, 24, 16, 302.57)],
)
def test_the_encoders_of_a_jepa(letter, width, depth, heads, millions):
    """ViT-S, -B and -L; the length of the clip changes no weight."""
    spec = encoder_spec(letter, PatchGrid.of(1024, 128))
    assert (spec.width, spec.depth, spec.heads) == (width, depth, heads)
    with torch.device("meta"):
        assert size(Encoder(spec)) / 1e6 == pytest.approx(millions, abs=0.01)


def test_the_predictor_of_a_jepa():
    """512 wide, 16 layers."""
    assert (A_JEPA_PREDICTOR.width, A_JEPA_PREDICTOR.depth) == (512, 16)


def test_initialisation_ran():
    """Every matrix is normal with std 0.02, every bias zero, every norm's scale one. Audio-JEPA's never ran."""
    encoder = Encoder(EncoderSpec(grid=GRID, width=128, depth=2, heads=2))
    predictor = Predictor(PredictorSpec(width=128, depth=2, heads=2), 128, GRID)
    for module in [*encoder.modules(), *predictor.modules()]:
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert abs(module.weight.mean().item()) < 0.002
            assert not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert module.weight.eq(1).all()
            assert not module.bias.any()
            assert module.eps == 1e-6
    assert predictor.mask_token_D.std().item() == pytest.approx(0.02, rel=0.3)


def test_weights_are_a_function_of_the_seed():
    """Whatever the state of the global generator."""
    torch.manual_seed(1)
    first = Encoder(SPEC, seed=5).blocks[1].mlp[0].weight
    torch.manual_seed(2)
    assert torch.equal(first, Encoder(SPEC, seed=5).blocks[1].mlp[0].weight)
    assert not torch.equal(first, Encoder(SPEC, seed=6).blocks[1].mlp[0].weight)


def test_positions_are_not_trained_and_not_saved():
    """They follow from the grid: a checkpoint fits every length."""
    assert not [name for name in Encoder(SPEC).state_dict() if "positions" in name]


@pytest.mark.parametrize("padded", [False, True], ids=["all valid", "some barred"])
def test_written_out_attention_agrees_with_the_fused_kernel(padded):
    """Values and gradients, so that a model trained on one device is the same on another."""
    valid_BN = torch.tensor([[True] * 7, [True] * 4 + [False] * 3]) if padded else None
    outcomes = []
    for attend in (written_out_attention, fused_attention):
        generator = torch.Generator().manual_seed(0)
        qkv = [torch.randn(2, 3, 7, 8, generator=generator).requires_grad_() for _ in range(3)]
        mixed_BHND = attend(*qkv, valid_BN)
        mixed_BHND.square().sum().backward()
        outcomes.append([mixed_BHND, *(x.grad for x in qkv)])
    torch.testing.assert_close(*outcomes)


@pytest.mark.parametrize(
    ("device", "dtype", "way"),
    [
        ("cpu", torch.bfloat16, written_out_attention),
        ("cpu", torch.float32, fused_attention),
        ("cuda", torch.bfloat16, fused_attention),
        ("cuda", torch.float32, fused_attention),
    ],
)
def test_each_device_gets_the_attention_that_is_faster_there(device, dtype, way):
    """The choice is a table of measurements, so it is pinned as one."""
    assert attention_for(device, dtype) is way


@pytest.mark.parametrize("attend", [written_out_attention, fused_attention])
def test_a_clip_without_one_valid_key_gives_numbers(attend):
    """The softmax of nothing is NaN, and one NaN in a batch is a lost run."""
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    assert attend(q, k, v, torch.zeros(1, 5, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: type(maker).__name__)
def test_nothing_hidden_reaches_the_context(maker, bf16):
    """Every hidden patch is replaced by noise, and not one bit of what the context encoder says changes."""
    encoder, (context_BK, _) = rough(Encoder(SPEC)), masks(maker)
    hidden_BP = torch.ones(3, GRID.tokens, dtype=torch.bool).scatter(1, context_BK, False)
    hidden_BTF = hidden_BP.view(3, GRID.cols, GRID.rows).repeat_interleave(4, 1).repeat_interleave(4, 2)
    changed_BTF = torch.where(hidden_BTF, 100 * mel(seed=1), mel())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert torch.equal(encoder(mel(), context_BK), encoder(changed_BTF, context_BK))


def test_every_visible_patch_reaches_all_of_the_context():
    """The counterpart, without which the test above could pass on a model that looks at nothing."""
    encoder, (context_BK, _) = rough(Encoder(SPEC)), masks(clips=1)
    before_BKD = encoder(mel(1), context_BK)
    for token in context_BK[0].tolist():
        changed_BTF = mel(1).clone()
        col, row = divmod(token, GRID.rows)
        changed_BTF[:, 4 * col : 4 * col + 4, 4 * row : 4 * row + 4] += 1
        assert (encoder(changed_BTF, context_BK) != before_BKD).any(dim=-1).all()


def test_asking_for_all_tokens_is_asking_for_none_in_particular():
    """Two paths through the encoder that must agree."""
    encoder = rough(Encoder(SPEC))
    all_BK = torch.arange(GRID.tokens).expand(3, -1)
    torch.testing.assert_close(encoder(mel(), all_BK), encoder(mel()))


def test_the_order_of_the_tokens_only_orders_the_output():
    """Positions belong to tokens, not to places in the sequence."""
    encoder, (context_BK, _) = rough(Encoder(SPEC)), masks()
    torch.testing.assert_close(encoder(mel(), context_BK.flip(1)), encoder(mel(), context_BK).flip(1))


def test_the_order_of_the_clips_only_orders_the_output():
    """No clip sees another, in the encoder or in the predictor."""
    encoder, predictor, (context_BK, targets_BGQ) = (
        rough(Encoder(SPEC)),
        rough(Predictor(GUESS, 32, GRID)),
        masks(),
    )

    def guess(order: list[int]) -> torch.Tensor:
        context_BKD = encoder(mel()[order], context_BK[order])
        return predictor(context_BKD, context_BK[order], targets_BGQ[order])

    torch.testing.assert_close(guess([2, 0, 1]), guess([0, 1, 2])[[2, 0, 1]])


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_padding_reaches_no_valid_token(bf16):
    """What lies past the end of a clip may be anything: valid tokens do not change by a bit."""
    encoder = rough(Encoder(SPEC))
    valid_BP = torch.arange(GRID.tokens).expand(3, -1) < torch.tensor([[24], [16], [4]])
    padding_BTF = ~valid_BP.view(3, GRID.cols, GRID.rows).repeat_interleave(4, 1).repeat_interleave(4, 2)
    changed_BTF = torch.where(padding_BTF, 100 * mel(seed=1), mel())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        before, after = (encoder(m, valid_BP=valid_BP)[valid_BP] for m in (mel(), changed_BTF))
    assert torch.equal(before, after)


def test_a_padded_clip_is_described_as_the_short_clip_it_is():
    """Padding to the length of the model changes nothing: the same weights on a shorter grid agree."""
    short = PatchGrid(rows=4, cols=3, patch_frames=4, patch_bands=4)
    encoder, small = rough(Encoder(SPEC)), Encoder(EncoderSpec(grid=short, width=32, depth=2, heads=4))
    small.load_state_dict(encoder.state_dict())
    valid_BP = (torch.arange(GRID.tokens) < short.tokens).expand(3, -1)
    described = encoder(mel(), valid_BP=valid_BP)[:, : short.tokens]
    torch.testing.assert_close(described, small(mel()[:, : short.frames]))


def test_a_group_of_targets_is_predicted_by_itself():
    """One target block learns nothing from where another lies."""
    predictor, (context_BK, targets_BGQ) = rough(Predictor(GUESS, 32, GRID)), masks()
    context_BKD = torch.randn(3, context_BK.shape[1], 32)
    together = predictor(context_BKD, context_BK, targets_BGQ)
    for group in range(targets_BGQ.shape[1]):
        alone = predictor(context_BKD, context_BK, targets_BGQ[:, group : group + 1])
        torch.testing.assert_close(together[:, group : group + 1], alone)


def test_the_predictor_ignores_context_that_is_padding():
    """The vectors of padded tokens are meaningless and may not count."""
    predictor, (context_BK, targets_BGQ) = rough(Predictor(GUESS, 32, GRID)), masks()
    valid_BP = (torch.arange(GRID.tokens) < 16).expand(3, -1)
    context_BKD = torch.randn(3, context_BK.shape[1], 32)
    changed_BKD = torch.where((context_BK < 16)[..., None], context_BKD, torch.tensor(9.0))
    guesses = [
        predictor(x, context_BK, targets_BGQ, valid_BP)[targets_BGQ < 16] for x in (context_BKD, changed_BKD)
    ]
    assert torch.equal(*guesses)


def test_a_prediction_depends_on_where_its_target_lies():
    """The mask token is one vector; the position is all that tells targets apart."""
    predictor, (context_BK, targets_BGQ) = rough(Predictor(GUESS, 32, GRID)), masks()
    guess_BGQD = predictor(torch.randn(3, context_BK.shape[1], 32), context_BK, targets_BGQ)
    assert (guess_BGQD[:, :, 1:] - guess_BGQD[:, :, :-1]).norm(dim=-1).min() > 1e-3


@pytest.mark.parametrize("wrong", [{"heads": 5}, {"width": 30, "heads": 3}, {"depth": 0}])
def test_a_shape_that_cannot_be_is_refused(wrong):
    """Heads divide the width, and so does 4, for sine and cosine of row and column."""
    for spec in (lambda: EncoderSpec(grid=GRID, **wrong), lambda: PredictorSpec(**wrong)):
        with pytest.raises(ValueError, match="width must be a multiple of heads"):
            spec()
