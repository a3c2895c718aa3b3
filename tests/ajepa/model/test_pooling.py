"""The vector of a clip: from tokens that hold sound alone, row by row, from any layer."""

import pytest
import torch
from tiny import tiny
from torch.nn import functional as nnf

from ajepa.model.patches import PatchGrid, repeat_last_frame, valid_token_mask
from ajepa.model.pooling import (
    DEFAULT_POOLING,
    LAST_LAYER,
    VECTORS_PER_CLIP,
    EncoderLayer,
    encode_views,
    pool_tokens,
)
from ajepa.model.vit import Encoder, EncoderSpec
from pipeline.errors import RunError

ROWS = 8


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """Three blocks, views of 64 frames: 4 columns of 8 tokens."""
    return Encoder(EncoderSpec(grid=PatchGrid.from_size(64, 128), width=32, depth=3, heads=2), seed=1).eval()


def pool_views(encoder, mel_BVTF, n_frames_BV, *, pooling=DEFAULT_POOLING, layer=LAST_LAYER) -> torch.Tensor:
    """Return one vector per clip, from any number of views of each."""
    return encode_views(encoder, mel_BVTF, n_frames_BV, layer).pool_per_clip(pooling)


def make_views(frames: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a clip of so many valid frames in each of its views, as `mel_BVTF` and `n_frames_BV`."""
    generator = torch.Generator().manual_seed(3)
    mel_BVTF = torch.randn(1, len(frames), 64, 128, generator=generator)
    return mel_BVTF, torch.tensor([frames])


def test_frequency_pooling_gives_each_row_of_patches_the_mean_over_its_valid_columns(encoder):
    """Token p lies in row p % 8: of 64 and 20 valid frames, 4 and 2 columns count, over both views alike."""
    mel_BVTF, n_frames_BV = make_views([64, 20])
    with torch.inference_mode():
        valid_BP = valid_token_mask(n_frames_BV[0], encoder.spec.grid)
        tokens_VPD = encoder(repeat_last_frame(mel_BVTF[0], n_frames_BV[0]), valid_BP=valid_BP)
    columns_KRD = torch.cat([tokens_VPD[0].reshape(4, ROWS, 32), tokens_VPD[1].reshape(4, ROWS, 32)[:2]])
    expected_D = torch.cat([columns_KRD[:, row].mean(0) for row in range(ROWS)])
    got_BD = pool_views(encoder, mel_BVTF, n_frames_BV, pooling="frequency")
    assert got_BD.shape == (1, ROWS * 32)
    torch.testing.assert_close(got_BD[0], expected_D)


def test_mean_pooling_is_the_mean_of_the_rows_of_frequency_pooling(encoder):
    """Every valid column holds every row, so both count each token alike."""
    mel_BVTF, n_frames_BV = make_views([64, 33, 0])
    rows_BRD = pool_views(encoder, mel_BVTF, n_frames_BV, pooling="frequency").unflatten(1, (ROWS, 32))
    torch.testing.assert_close(pool_views(encoder, mel_BVTF, n_frames_BV), rows_BRD.mean(1))


def test_moments_add_the_deviation_over_time_of_each_row(encoder):
    """Population deviation over the valid columns of both views alike, after the means of frequency pooling."""
    mel_BVTF, n_frames_BV = make_views([64, 20])
    with torch.inference_mode():
        valid_BP = valid_token_mask(n_frames_BV[0], encoder.spec.grid)
        tokens_VPD = encoder(repeat_last_frame(mel_BVTF[0], n_frames_BV[0]), valid_BP=valid_BP)
    columns_KRD = torch.cat([tokens_VPD[0].reshape(4, ROWS, 32), tokens_VPD[1].reshape(4, ROWS, 32)[:2]])
    mean_D, std_D = pool_views(encoder, mel_BVTF, n_frames_BV, pooling="moments")[0].chunk(2)
    assert torch.equal(mean_D, pool_views(encoder, mel_BVTF, n_frames_BV, pooling="frequency")[0])
    torch.testing.assert_close(std_D, columns_KRD.std(0, correction=0).flatten())


@pytest.mark.parametrize("pooling", ["mean", "frequency", "moments"])
@pytest.mark.parametrize("layer", ["last", "mean-2", "block-1", "concat-2", "concat-all"])
def test_frames_that_are_not_valid_reach_no_pooling_of_any_layer(encoder, pooling, layer):
    """Neither the rest of a column or of a view nor a view past the clip's end, not even as nan."""
    mel_BVTF, n_frames_BV = make_views([64, 20, 0])
    options = {"pooling": pooling, "layer": EncoderLayer.from_name(layer)}
    expected_BD = pool_views(encoder, mel_BVTF, n_frames_BV, **options)
    mel_BVTF[0, 1, 20:] = 9e3
    mel_BVTF[0, 2] = float("nan")
    assert torch.equal(pool_views(encoder, mel_BVTF, n_frames_BV, **options), expected_BD)


def test_tokens_that_are_not_valid_are_left_out_even_where_they_are_nan():
    """The output of an encoder at such a token means nothing, so it may be anything."""
    tokens_NPD = torch.arange(12.0).reshape(1, 6, 2)
    tokens_NPD[0, 4:] = float("nan")
    valid_NP = torch.tensor([[True, True, True, True, False, False]])
    one_clip = {"clip_N": torch.tensor([0]), "clips": 1, "rows": 2}
    mean_BD = pool_tokens(tokens_NPD, valid_NP, pooling="mean", **one_clip)
    rows_BD = pool_tokens(tokens_NPD, valid_NP, pooling="frequency", **one_clip)
    assert mean_BD.tolist() == [[3.0, 4.0]]
    assert rows_BD.tolist() == [[2.0, 3.0, 4.0, 5.0]]


def test_a_layer_is_the_last_norm_or_the_normalised_blocks_that_it_names(encoder):
    """Blocks count from 1; the mean is over the last ones; the last block has no final norm of its own."""
    mel_BTF = make_views([64])[0][:, 0]
    with torch.inference_mode():
        blocks = [nnf.layer_norm(output, (32,)) for output in encoder.top_block_outputs(mel_BTF, 3)]
        assert torch.equal(LAST_LAYER.encode_tokens(encoder, mel_BTF), encoder(mel_BTF))
        for number in (1, 2, 3):
            torch.testing.assert_close(
                EncoderLayer(block_number=number).encode_tokens(encoder, mel_BTF), blocks[number - 1]
            )
        torch.testing.assert_close(
            EncoderLayer(last_blocks=2).encode_tokens(encoder, mel_BTF), (blocks[1] + blocks[2]) / 2
        )


@pytest.mark.parametrize("pooling", ["mean", "frequency", "moments"])
def test_concatenated_blocks_are_pooled_each_alone(encoder, pooling):
    """Every row of the vector is that of each block, side by side, the lowest block first."""
    mel_BVTF, n_frames_BV = make_views([64, 20])

    def pool(layer: str) -> torch.Tensor:
        """Return the vector of the clip with one entry per row (and moment) and layer."""
        pooled_BD = pool_views(
            encoder, mel_BVTF, n_frames_BV, pooling=pooling, layer=EncoderLayer.from_name(layer)
        )
        vectors = VECTORS_PER_CLIP[pooling](ROWS)
        return pooled_BD[0].reshape(vectors, -1, 32)

    expected_NLD = torch.cat([pool("block-2"), pool("block-3")], dim=1)
    torch.testing.assert_close(pool("concat-2"), expected_NLD)
    assert EncoderLayer.from_name("concat-2").vectors_per_token(3) == 2


def test_all_layers_are_the_encoders_input_and_then_its_blocks(encoder):
    """The lowest is what the first block sees: patches, embedded, with their positions; all are normalised."""
    mel_BTF = make_views([64])[0][:, 0]
    layer = EncoderLayer.from_name("concat-all")
    with torch.inference_mode():
        input_BPD = encoder.embed(encoder.input_patches(mel_BTF)) + encoder.positions_PD
        blocks = [EncoderLayer(block_number=number).encode_tokens(encoder, mel_BTF) for number in (1, 2, 3)]
        expected_BPD = torch.cat([nnf.layer_norm(input_BPD, (32,)), *blocks], dim=-1)
        torch.testing.assert_close(layer.encode_tokens(encoder, mel_BTF), expected_BPD)
        assert torch.equal(
            EncoderLayer.from_name("concat-3").encode_tokens(encoder, mel_BTF), torch.cat(blocks, dim=-1)
        )
    assert expected_BPD.shape[-1] == 32 * layer.vectors_per_token(3)


@pytest.mark.parametrize("name", ["last", "mean-4", "block-11", "concat-4", "concat-all"])
def test_a_layer_prints_as_the_name_that_it_was_made_from(name):
    """The protocol of a result and the option that made it use the same word."""
    assert str(EncoderLayer.from_name(name)) == name


@pytest.mark.parametrize("name", ["first", "mean-0", "block", "mean-2 ", "block--1", "concat-0", "mean-all"])
def test_a_layer_that_there_is_not_is_refused(name):
    """In one line, with what there is."""
    with pytest.raises(RunError, match="expected last, mean-K"):
        EncoderLayer.from_name(name)


def test_more_blocks_than_there_are_and_an_unknown_pooling_are_refused(encoder):
    """Without an error, the result of another layer would stand under this name."""
    mel_BVTF, n_frames_BV = make_views([64])
    with pytest.raises(RunError, match="block-4: the encoder has 3 blocks"):
        pool_views(encoder, mel_BVTF, n_frames_BV, layer=EncoderLayer(block_number=4))
    with pytest.raises(RunError, match="concat-4: the encoder has 3 blocks"):
        pool_views(encoder, mel_BVTF, n_frames_BV, layer=EncoderLayer.from_name("concat-4"))
    with pytest.raises(RunError, match="some of the last blocks, or one block"):
        EncoderLayer(block_number=1, concatenated=True)
    with pytest.raises(RunError, match="mean or frequency or moments, got 'max'"):
        pool_views(encoder, mel_BVTF, n_frames_BV, pooling="max")


def test_gradients_pass_a_pooling():
    """Fine-tuning pools with the same function."""
    grid = tiny().model.encoder.grid
    tokens_NPD = torch.ones(2, grid.tokens, 4, requires_grad=True)
    valid_NP = valid_token_mask(torch.tensor([64, 20]), grid)
    pool_tokens(tokens_NPD, valid_NP, torch.arange(2), clips=2, rows=ROWS, pooling="mean").sum().backward()
    assert torch.equal(tokens_NPD.grad.abs().sum(-1) > 0, valid_NP)
