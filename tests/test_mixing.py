"""How well a block shuffle mixes."""

import numpy as np
import pytest

from pipeline.mixing import mixing_of
from pipeline.sampling import BlockShuffle, shuffled

ROWS = 40 * 256


def mixing(window: int, *, clips: int = 64, block: int = 256):
    sampling = BlockShuffle(blocks_N=np.arange(ROWS) // block, window_blocks=window)
    return mixing_of(sampling, clips, 0, clip_bytes=1_000)


def test_the_figures_are_those_of_all_batches_counted_one_by_one():
    """40 blocks of 256, batches of 64 from 6 at a time: every pair of every batch, by the definition."""
    sampling = BlockShuffle(blocks_N=np.arange(ROWS) // 256, window_blocks=6)
    batches = (sampling.places(ROWS, 0, 0) // 256).reshape(-1, 64)
    pairs = np.mean([(row[:, None] == row)[np.triu_indices(64, 1)].mean() for row in batches])
    told = mixing(6)
    assert told.pairs == pytest.approx(pairs)
    assert told.blocks == pytest.approx(np.mean([len(set(row)) for row in batches]))


@pytest.mark.parametrize("window", [2, 5, 20])
def test_as_many_pairs_share_a_block_as_there_are_blocks_at_a_time(window):
    """One in `window`: what the window buys can be told beforehand."""
    assert mixing(window).pairs == pytest.approx(1 / window, rel=0.06)


def test_the_figures_of_a_full_shuffle_are_what_full_shuffles_have():
    """In closed form, against the mean over 400 batches."""
    told, batches = mixing(4), [shuffled(ROWS, seed)[:64] // 256 for seed in range(400)]
    assert told.full_blocks == pytest.approx(np.mean([len(set(row)) for row in batches]), rel=0.01)
    assert told.full_pairs == pytest.approx((256 - 1) / (ROWS - 1))


def test_a_window_over_all_blocks_mixes_as_a_full_shuffle_does():
    """So the figures can be compared."""
    told = mixing(64)
    assert told.window_blocks == 40
    assert told.blocks == pytest.approx(told.full_blocks, rel=0.02)
    assert told.pairs == pytest.approx(told.full_pairs, rel=0.03)
    assert told.worth == pytest.approx(told.full_worth, rel=0.02)


def test_a_batch_is_worth_at_least_the_blocks_that_it_draws_on():
    """From one block alone it is worth one clip, if all clips of a block are the same."""
    assert mixing(1, clips=64).worth < 2
    assert 3 < mixing(4).worth < 5
    assert mixing(1, block=1).worth == pytest.approx(64)


def test_a_step_of_one_clip_has_no_pairs():
    assert mixing(2, clips=1).pairs == 0


def test_the_sentence_tells_memory_and_figures():
    """Whoever chooses block shuffle sees what it costs and what it gives, beside what a full shuffle gives."""
    assert str(mixing(6)) == (
        "block shuffle: 6 blocks of up to 256 clips at a time, 2 MB to keep in memory; a batch of 64 draws on "
        "6.2 blocks (full shuffle: 32.1), 16.45% of its pairs share one (2.49%): worth at least 6 unlike clips (25)"
    )
