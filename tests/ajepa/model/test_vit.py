"""Encoder and predictor: sizes, initial weights, attention, and which tokens may influence which."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from ajepa.model.masking import RandomBlocks
from ajepa.model.patches import PatchGrid, patchify
from ajepa.model.transformer import (
    PositionName,
    TransformerSpec,
    choose_attention,
    fused_attention,
    written_out_attention,
)
from ajepa.model.views import InputScale
from ajepa.model.vit import A_JEPA_PREDICTOR, Encoder, EncoderSpec, Predictor, PredictorSpec, a_jepa_encoder
from pipeline.store.feature_store import pool_band_mean_and_std

GRID = PatchGrid(rows=4, cols=6, patch_frames=4, patch_bands=4)

SPEC = EncoderSpec(grid=GRID, width=32, depth=2, heads=4)

GUESS = PredictorSpec(width=16, depth=2, heads=2)

POSITIONS = get_args(PositionName)

for_every_position = pytest.mark.parametrize("positions", POSITIONS)


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def mel(clips: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(clips, GRID.frames, GRID.bands, generator=torch.Generator().manual_seed(seed))


def masks(clips: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = RandomBlocks().sample(np.random.default_rng(0), GRID, batch=clips)
    return torch.from_numpy(drawn.context_BK), torch.from_numpy(drawn.targets_BGQ)


def rough(module: nn.Module) -> nn.Module:
    """Give a module weights so large that every token matters to every other."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return module


def test_vit_b_and_its_predictor_are_the_size_audio_jepa_reports():
    """85,253,376 and 11,238,912 trainable values: one bias too many would show."""
    grid = PatchGrid.from_size(256, 128)
    with torch.device("meta"):
        assert size(Encoder(EncoderSpec(grid=grid))) == 85_253_376
        assert size(Predictor(PredictorSpec(), 768, grid)) == 11_238_912


@pytest.mark.parametrize(
    ("letter", "width", "depth", "heads", "millions"),
    [("s", 384, 12, 6, 21.39), ("b", 768, 12, 12, 85.25), ("l", 1024, 24, 16, 302.57)],
)
def test_the_encoders_of_a_jepa(letter, width, depth, heads, millions):
    """ViT-S, -B and -L; the length of the clip changes no weight."""
    spec = a_jepa_encoder(letter, PatchGrid.from_size(1024, 128))
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
    ("device", "dtype", "attention"),
    [
        ("cpu", torch.bfloat16, written_out_attention),
        ("cpu", torch.float32, fused_attention),
        ("cuda", torch.bfloat16, fused_attention),
        ("cuda", torch.float32, fused_attention),
    ],
)
def test_each_device_gets_the_attention_that_is_faster_there(device, dtype, attention):
    """The choice is a table of measurements, so it is pinned as one."""
    assert choose_attention(device, dtype) is attention


@pytest.mark.parametrize("attend", [written_out_attention, fused_attention])
def test_a_clip_without_one_valid_key_gives_numbers(attend):
    """The softmax of nothing is NaN, and one NaN in a batch is a lost run."""
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    assert attend(q, k, v, torch.zeros(1, 5, dtype=torch.bool)).isfinite().all()


@for_every_position
def test_every_visible_patch_reaches_all_of_the_context(positions):
    """The counterpart of test_no_leak.py, which a model that ignores its input would pass."""
    encoder, (context_BK, _) = rough(Encoder(replace(SPEC, positions=positions))), masks(clips=1)
    before_BKD = encoder(mel(1), context_BK)
    for token in context_BK[0].tolist():
        changed_BTF = mel(1).clone()
        col, row = divmod(token, GRID.rows)
        changed_BTF[:, 4 * col : 4 * col + 4, 4 * row : 4 * row + 4] += 1
        assert (encoder(changed_BTF, context_BK) != before_BKD).any(dim=-1).all()


@for_every_position
def test_all_tokens_by_number_are_all_tokens_by_default(positions):
    """Two paths through the encoder that must agree."""
    encoder = rough(Encoder(replace(SPEC, positions=positions)))
    all_BK = torch.arange(GRID.tokens).expand(3, -1)
    torch.testing.assert_close(encoder(mel(), all_BK), encoder(mel()))


@for_every_position
def test_the_order_of_the_tokens_only_orders_the_output(positions):
    """Positions belong to tokens, not to places in the sequence."""
    encoder, (context_BK, _) = rough(Encoder(replace(SPEC, positions=positions))), masks()
    torch.testing.assert_close(encoder(mel(), context_BK.flip(1)), encoder(mel(), context_BK).flip(1))


def test_the_order_of_the_clips_only_orders_the_output():
    """No clip sees another, in the encoder or in the predictor."""
    encoder = rough(Encoder(SPEC))
    predictor = rough(Predictor(GUESS, 32, GRID))
    context_BK, targets_BGQ = masks()

    def predict(order: list[int]) -> torch.Tensor:
        context_BKD = encoder(mel()[order], context_BK[order])
        return predictor(context_BKD, context_BK[order], targets_BGQ[order])

    torch.testing.assert_close(predict([2, 0, 1]), predict([0, 1, 2])[[2, 0, 1]])


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@for_every_position
def test_padding_reaches_no_valid_token(bf16, positions):
    """Padding may hold anything: valid tokens do not change by a bit."""
    encoder = rough(Encoder(replace(SPEC, positions=positions, layer_scale=0.5)))
    valid_BP = torch.arange(GRID.tokens).expand(3, -1) < torch.tensor([[24], [16], [4]])
    padding_BTF = ~valid_BP.view(3, GRID.cols, GRID.rows).repeat_interleave(4, 1).repeat_interleave(4, 2)
    changed_BTF = torch.where(padding_BTF, 100 * mel(seed=1), mel())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        before, after = (encoder(m, valid_BP=valid_BP)[valid_BP] for m in (mel(), changed_BTF))
    assert torch.equal(before, after)


@for_every_position
def test_a_padded_clip_has_the_tokens_of_the_short_clip(positions):
    """Padding to the length of the model changes nothing: the same weights on a shorter grid agree."""
    short = PatchGrid(rows=4, cols=3, patch_frames=4, patch_bands=4)
    spec = replace(SPEC, positions=positions)
    encoder = rough(Encoder(spec))
    small = Encoder(replace(spec, grid=short))
    small.load_state_dict(encoder.state_dict())
    valid_BP = (torch.arange(GRID.tokens) < short.tokens).expand(3, -1)
    padded_BPD = encoder(mel(), valid_BP=valid_BP)[:, : short.tokens]
    torch.testing.assert_close(padded_BPD, small(mel()[:, : short.frames]))


@for_every_position
def test_a_group_of_targets_is_predicted_by_itself(positions):
    """One target block learns nothing from where another lies."""
    predictor = rough(Predictor(replace(GUESS, positions=positions), 32, GRID))
    context_BK, targets_BGQ = masks()
    context_BKD = torch.randn(3, context_BK.shape[1], 32)
    together = predictor(context_BKD, context_BK, targets_BGQ)
    for group in range(targets_BGQ.shape[1]):
        alone = predictor(context_BKD, context_BK, targets_BGQ[:, group : group + 1])
        torch.testing.assert_close(together[:, group : group + 1], alone)


@for_every_position
@pytest.mark.parametrize("padded", [False, True], ids=["all valid", "some barred"])
def test_a_block_gives_the_same_output_for_its_last_tokens_alone(positions, padded):
    """The predictor's last block skips outputs that nobody reads: values and gradients stay those of the whole."""
    stack = TransformerSpec(width=16, depth=1, heads=2, positions=positions, layer_scale=0.5, drop_path=0.0)
    block = rough(stack.build_blocks()[0])
    turns = stack.rotary_angles(GRID)
    arguments = (
        (torch.arange(GRID.tokens) < 20).expand(3, -1) if padded else None,
        None if turns is None else turns[:, None],
        torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]]),
    )
    outcomes = []
    for last_tokens in (None, 7):
        x_BND = torch.randn(3, GRID.tokens, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        block.zero_grad()
        output_BQD = block(x_BND, *arguments, last_tokens)[:, -7:]
        output_BQD.square().sum().backward()
        outcomes.append([output_BQD, x_BND.grad, *(weight.grad for weight in block.parameters())])
    assert outcomes[1][1][:, :-7].any()
    torch.testing.assert_close(*outcomes, atol=1e-3, rtol=1e-4)


@for_every_position
def test_the_predictor_ignores_context_that_is_padding(positions):
    """The vectors of padded tokens are meaningless and may not count."""
    predictor = rough(Predictor(replace(GUESS, positions=positions), 32, GRID))
    context_BK, targets_BGQ = masks()
    valid_BP = (torch.arange(GRID.tokens) < 16).expand(3, -1)
    context_BKD = torch.randn(3, context_BK.shape[1], 32)
    changed_BKD = torch.where((context_BK < 16)[..., None], context_BKD, torch.tensor(9.0))
    before, after = (
        predictor(x_BKD, context_BK, targets_BGQ, valid_BP)[targets_BGQ < 16]
        for x_BKD in (context_BKD, changed_BKD)
    )
    assert torch.equal(before, after)


@for_every_position
def test_a_prediction_depends_on_where_its_target_lies(positions):
    """The mask token is one vector; only the positions of targets differ."""
    predictor = rough(Predictor(replace(GUESS, positions=positions), 32, GRID))
    context_BK, targets_BGQ = masks()
    prediction_BGQD = predictor(torch.randn(3, context_BK.shape[1], 32), context_BK, targets_BGQ)
    assert (prediction_BGQD[:, :, 1:] - prediction_BGQD[:, :, :-1]).norm(dim=-1).min() > 1e-3


@pytest.mark.parametrize("wrong", [{"heads": 5}, {"width": 30, "heads": 3}, {"depth": 0}])
def test_a_shape_that_cannot_be_is_refused(wrong):
    """Heads divide the width, and so does 4, for sine and cosine of row and column."""
    for spec in (lambda: EncoderSpec(grid=GRID, **wrong), lambda: PredictorSpec(**wrong)):
        with pytest.raises(ValueError, match="width must be a multiple of heads"):
            spec()


def test_under_rope_only_distances_count():
    """The same patches one column later: the same vectors. Added positions depend on the place itself."""
    later_BTF = mel().roll(4, dims=1)
    tokens_BK = torch.arange(GRID.tokens - 2 * GRID.rows).expand(3, -1)
    for positions, same in (("rope", True), ("sincos", False)):
        encoder = rough(Encoder(replace(SPEC, positions=positions)))
        before, after = encoder(mel(), tokens_BK), encoder(later_BTF, tokens_BK + GRID.rows)
        assert torch.allclose(before, after, atol=1e-4) is same


def test_under_rope_rows_and_columns_differ():
    """Two grids with the same patches in the same order, one turned on its side: not the same sound."""
    spec = replace(SPEC, positions="rope")
    encoder = rough(Encoder(spec))
    aside = Encoder(replace(spec, grid=PatchGrid(rows=6, cols=4, patch_frames=4, patch_bands=4)))
    aside.load_state_dict(encoder.state_dict())
    patch_BPN = patchify(mel(1), GRID)

    def spectrogram(grid: PatchGrid) -> torch.Tensor:
        cut = patch_BPN.view(1, grid.cols, grid.rows, 4, 4).transpose(2, 3)
        return cut.reshape(1, grid.frames, grid.bands)

    upright_BPD, aside_BPD = encoder(spectrogram(GRID)), aside(spectrogram(aside.spec.grid))
    assert (upright_BPD - aside_BPD).abs().mean() > 1e-3


def test_options_that_are_off_add_no_weight_and_layer_scale_adds_two_vectors_a_block():
    """The sizes of the papers stand; a layer scale starts at its value, not at random."""
    plain, scaled = Encoder(SPEC), Encoder(replace(SPEC, layer_scale=1e-4))
    assert size(Encoder(replace(SPEC, positions="rope", drop_path=0.1))) == size(plain)
    assert size(scaled) == size(plain) + 2 * SPEC.depth * SPEC.width
    assert scaled.blocks[1].mlp_scale_D.eq(1e-4).all()
    assert torch.equal(scaled.blocks[1].mlp[2].weight, plain.blocks[1].mlp[2].weight)


def test_a_layer_scale_near_zero_makes_every_block_nearly_nothing():
    """It multiplies both branches: only the embedding is left."""
    encoder = rough(Encoder(replace(SPEC, layer_scale=1.0)))
    for block in encoder.blocks:
        nn.init.zeros_(block.attention_scale_D)
        nn.init.zeros_(block.mlp_scale_D)
    (last_BPD,) = encoder.top_block_outputs(mel(), 1)
    torch.testing.assert_close(last_BPD, encoder.embed(patchify(mel(), GRID)) + encoder.positions_PD)


def test_drop_path_keeps_the_mean_and_drops_later_blocks_more():
    """Whole branches of whole clips; the others are enlarged, so that evaluation without drop path is in scale."""
    stack = TransformerSpec(width=32, depth=3, heads=4, positions="sincos", layer_scale=0.0, drop_path=0.4)
    keep_L2B = stack.draw_drop_path(np.random.default_rng(0), 20_000)
    assert keep_L2B.shape == (3, 2, 20_000)
    torch.testing.assert_close(keep_L2B.mean(dim=2), torch.ones(3, 2), atol=0.03, rtol=0)
    dropped_L2 = keep_L2B.eq(0).float().mean(dim=2)
    torch.testing.assert_close(dropped_L2[:, 0], torch.tensor([0.0, 0.2, 0.4]), atol=0.02, rtol=0)
    rng = np.random.default_rng(0)
    assert replace(stack, drop_path=0.0).draw_drop_path(rng, 5) is None
    assert rng.random() == np.random.default_rng(0).random()


def test_a_clip_that_skips_every_branch_leaves_as_it_came():
    """Drop path is per clip: the others in the batch do not notice."""
    encoder = rough(Encoder(SPEC))
    keep_L2B = torch.ones(SPEC.depth, 2, 3)
    keep_L2B[:, :, 1] = 0
    dropped, plain = encoder(mel(), keep_L2N=keep_L2B), encoder(mel())
    assert torch.equal(dropped[[0, 2]], plain[[0, 2]])
    all_skipped = encoder(mel(), keep_L2N=torch.zeros(SPEC.depth, 2, 3))
    torch.testing.assert_close(dropped[1], all_skipped[1])
    assert not torch.allclose(dropped[1], plain[1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"positions": "learnt"}, "positions must be sincos or rope, got 'learnt'"),
        ({"width": 24, "heads": 4, "positions": "rope"}, "heads whose width is a multiple of 4"),
        ({"drop_path": 1.0}, r"drop_path must lie in \[0, 1\)"),
        ({"layer_scale": -1.0}, "layer_scale not be negative"),
    ],
)
def test_an_option_that_cannot_be_is_refused(wrong, message):
    """At the construction of the spec, for encoder and predictor alike."""
    for spec in (lambda: EncoderSpec(grid=GRID, **wrong), lambda: PredictorSpec(**wrong)):
        with pytest.raises(ValueError, match=message):
            spec()


def test_with_band_norm_an_encoder_standardises_every_band_by_itself():
    """A raw spectrogram gives the output of the standardised one without band norm; checkpoints hold the statistics."""
    mean_F, std_F = torch.linspace(-2, 3, GRID.bands), torch.linspace(0.5, 2, GRID.bands)
    plain, normed = Encoder(SPEC).eval(), Encoder(replace(SPEC, band_norm=True)).eval()
    raw_BTF = mel()
    # Until it has statistics, bands pass unchanged.
    assert torch.equal(normed(raw_BTF), plain(raw_BTF))
    normed.set_band_statistics(mean_F, std_F)
    torch.testing.assert_close(normed(raw_BTF), plain((raw_BTF - mean_F) / std_F))
    again = Encoder(replace(SPEC, band_norm=True), seed=1)
    again.load_state_dict(normed.state_dict())
    assert torch.equal(again.eval()(raw_BTF), normed(raw_BTF))


def test_what_float16_rounds_at_the_floor_moves_no_token():
    """Sounds of 16 kHz are at the floor above 8 kHz, but for a click: a band that hardly varies is not blown up."""
    half, floor = GRID.bands // 2, InputScale().floor
    std_F = np.repeat([2.0, 0.004], half)
    mean_F = np.repeat([-5.0, floor], half)
    stats = {"frames": 10, "mean_F": mean_F.tolist(), "std_F": std_F.tolist()}
    encoder = Encoder(replace(SPEC, band_norm=True)).eval()
    encoder.set_band_statistics(*(torch.from_numpy(x_F).float() for x_F in pool_band_mean_and_std([stats])))
    heard_BTF = torch.where(torch.arange(GRID.bands) < half, 2 * mel() - 5, torch.tensor(floor))
    with torch.inference_mode():
        torch.testing.assert_close(encoder(heard_BTF.half().float()), encoder(heard_BTF), rtol=0, atol=0.05)


def test_an_encoder_without_band_norm_ignores_band_statistics():
    """Its checkpoint holds none, and its output does not change."""
    encoder, unchanged = Encoder(SPEC).eval(), Encoder(SPEC).eval()
    encoder.set_band_statistics(torch.ones(GRID.bands), torch.full((GRID.bands,), 2.0))
    assert torch.equal(encoder(mel()), unchanged(mel()))
    assert "bands_2F" not in encoder.state_dict()
