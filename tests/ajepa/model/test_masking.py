"""Masks: which patches are hidden, where and how often, and which masking a step uses."""

import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pytest

from ajepa.model.masking import (
    MASK_PLANS,
    BlockSize,
    Curriculum,
    Fixed,
    MaskMaker,
    Masks,
    RandomBlocks,
    RandomPatches,
    TimeFrequencyAware,
    TimeSpans,
    _lowest_in_rows,
    mask_plan,
)
from ajepa.model.patches import PatchGrid
from pipeline.errors import RunError

LONG = PatchGrid(rows=8, cols=64)
SHORT = PatchGrid(rows=8, cols=16)

MAKERS = [RandomPatches(), RandomBlocks(), TimeFrequencyAware(), TimeSpans()]

BLOCKS = [RandomBlocks(), TimeFrequencyAware()]

on_both_grids = pytest.mark.parametrize("grid", [LONG, SHORT], ids=["64x8", "16x8"])

for_every_maker = pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: type(maker).__name__)

for_every_block_maker = pytest.mark.parametrize("maker", BLOCKS, ids=lambda maker: type(maker).__name__)


def many(maker: MaskMaker, grid: PatchGrid, *, steps: int, batch: int, seed: int = 0) -> list[Masks]:
    """Return the masks of so many steps, each from a generator of its own."""
    return [maker.sample(np.random.default_rng([seed, step]), grid, batch=batch) for step in range(steps)]


def fixed(area: float) -> BlockSize:
    """Return a size that does not vary, in the proportions of the grid."""
    return BlockSize(area_low=area, area_high=area, aspect_low=1.0, aspect_high=1.0)


def surprise(counts: np.ndarray) -> float:
    """Return how far counts are from uniform: chi-square less its mean, in its standard deviations."""
    expected = counts.mean()
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@on_both_grids
@for_every_maker
def test_context_and_targets_never_overlap(maker, grid):
    """A target that the context encoder sees would be copied, not predicted."""
    for masks in many(maker, grid, steps=30, batch=16):
        seen_BP = np.zeros((16, grid.tokens), bool)
        np.put_along_axis(seen_BP, masks.context_BK, True, axis=1)
        assert not np.take_along_axis(seen_BP, masks.targets_BGQ.reshape(16, -1), axis=1).any()


@on_both_grids
@for_every_maker
def test_tokens_are_in_the_grid_ascending_and_never_twice(maker, grid):
    """The model gathers by these indices; equal counts per clip follow from the arrays."""
    for masks in many(maker, grid, steps=10, batch=8):
        for tokens in (masks.context_BK, masks.targets_BGQ):
            assert tokens.dtype == np.int64
            assert tokens.shape[0] == 8
            assert tokens.min() >= 0
            assert tokens.max() < grid.tokens
            assert (np.diff(tokens, axis=-1) > 0).all()


@for_every_maker
def test_masks_are_a_function_of_the_generator(maker):
    """A resumed run draws the same masks; another step and another clip get others."""
    first, again, other = (many(maker, SHORT, steps=1, batch=4, seed=seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first.context_BK, again.context_BK)
    assert np.array_equal(first.targets_BGQ, again.targets_BGQ)
    assert not np.array_equal(first.targets_BGQ, other.targets_BGQ)
    assert len({clip.tobytes() for clip in first.targets_BGQ}) > 1


@for_every_maker
def test_a_batch_of_one_is_a_batch(maker):
    """A small machine may have room for one clip."""
    (masks,) = many(maker, SHORT, steps=1, batch=1)
    assert masks.context_BK.size > 0
    assert masks.targets_BGQ.size > 0


@on_both_grids
def test_random_patches_hide_a_share_between_two_fifths_and_three(grid):
    """One ratio a step, U(0.4, 0.6); every other patch is context."""
    shares = []
    for masks in many(RandomPatches(), grid, steps=200, batch=2):
        assert masks.targets_BGQ.shape[1] == 1
        assert masks.context_BK.shape[1] + masks.targets_BGQ.shape[2] == grid.tokens
        shares.append(masks.targets_BGQ.shape[2] / grid.tokens)
    assert 0.395 < min(shares) < 0.41
    assert 0.59 < max(shares) < 0.605
    assert np.mean(shares) == pytest.approx(0.5, abs=0.02)


@on_both_grids
def test_random_patches_hide_every_patch_equally_often(grid):
    """Chi-square over all patches, the four corners included."""
    counts_P = np.zeros(grid.tokens)
    for masks in many(RandomPatches(), grid, steps=40, batch=64):
        counts_P += np.bincount(masks.targets_BGQ.ravel(), minlength=grid.tokens)
    assert surprise(counts_P) < 4


@on_both_grids
def test_a_share_of_the_hidden_patches_can_be_spared_the_predictor(grid):
    """Of 75 % hidden a third is to be told: what is no target is not seen either, and any patch may be one."""
    counts_P = np.zeros(grid.tokens)
    for masks in many(
        RandomPatches(ratio_low=0.75, ratio_high=0.75, target_share=1 / 3), grid, steps=80, batch=64
    ):
        assert masks.context_BK.shape[1] == masks.targets_BGQ.shape[2] == grid.tokens // 4
        assert (np.diff(masks.targets_BGQ, axis=2) > 0).all()
        counts_P += np.bincount(masks.targets_BGQ.ravel(), minlength=grid.tokens)
    assert surprise(counts_P) < 4


@on_both_grids
@for_every_block_maker
def test_a_target_is_a_whole_rectangle_and_all_of_a_batch_are_the_same_size(maker, grid):
    """Rows times columns, without gaps: the product of the lines it touches."""
    for masks in many(maker, grid, steps=20, batch=8):
        cols, rows = np.divmod(masks.targets_BGQ, grid.rows)
        heights, widths = np.ptp(rows, axis=2) + 1, np.ptp(cols, axis=2) + 1
        assert len(np.unique(heights)) == len(np.unique(widths)) == 1
        assert heights[0, 0] * widths[0, 0] == masks.targets_BGQ.shape[2]
        assert masks.targets_BGQ.shape[1] == maker.count


@on_both_grids
@for_every_block_maker
def test_targets_cover_the_area_of_their_spec(maker, grid):
    """Within 2 points of the range for each, of its middle on average: whole patches are coarse on 8 rows."""
    low, high = maker.target.area_low, maker.target.area_high
    areas = [m.targets_BGQ.shape[2] / grid.tokens for m in many(maker, grid, steps=400, batch=1)]
    assert low - 0.02 < min(areas)
    assert max(areas) < high + 0.02
    assert np.mean(areas) == pytest.approx((low + high) / 2, abs=0.02)


@on_both_grids
def test_spans_cover_the_share_of_time_of_their_spec(grid):
    """Three of 12.5 to 20 % each, every band, within 2 points; every other patch is context."""
    shares = []
    for masks in many(TimeSpans(), grid, steps=400, batch=2):
        _, count, tokens = masks.targets_BGQ.shape
        assert count == 3
        assert masks.context_BK.shape[1] + count * tokens == grid.tokens
        assert np.array_equal(np.unique(masks.targets_BGQ % grid.rows), np.arange(grid.rows))
        assert (np.ptp(masks.targets_BGQ // grid.rows, axis=2) + 1 == tokens // grid.rows).all()
        shares.append(tokens / grid.tokens)
    assert min(shares) > 0.105
    assert max(shares) < 0.22
    assert np.mean(shares) == pytest.approx(0.1625, abs=0.02)


def test_every_way_of_placing_spans_is_equally_likely():
    """Two spans of three columns among ten, counted: 15 pairs that do not overlap, touching ones included."""
    maker = TimeSpans(count=2, share_low=0.3, share_high=0.3)
    grid = PatchGrid(rows=2, cols=10)
    legal = {(first, second): 0 for first in range(8) for second in range(first + 3, 8)}
    for masks in many(maker, grid, steps=400, batch=8):
        for firsts in masks.targets_BGQ[:, :, 0] // grid.rows:
            legal[tuple(firsts.tolist())] += 1
    assert len(legal) == 15
    assert abs(surprise(np.array(list(legal.values())))) < 4


def test_spans_that_leave_no_context_are_refused_with_the_settings_to_change():
    """On four columns three spans of at least one leave one; on three they leave none."""
    assert many(TimeSpans(), PatchGrid(rows=2, cols=4), steps=1, batch=1)[0].context_BK.shape == (1, 2)
    with pytest.raises(RunError, match=r"masks: 3 spans of 1 of 3 columns leave no context; lower"):
        many(TimeSpans(), PatchGrid(rows=2, cols=3), steps=1, batch=1)


@on_both_grids
def test_the_context_block_covers_the_area_of_its_spec(grid):
    """The published sampler clamps its sides on a 64 x 8 grid and leaves 30 % instead of 85 to 100."""
    rng = np.random.default_rng(0)
    areas = [np.prod(RandomBlocks().context.draw_block_shape(rng, grid)) / grid.tokens for _ in range(400)]
    assert min(areas) >= 0.84
    assert max(areas) == 1.0
    assert np.mean(areas) == pytest.approx(0.925, abs=0.02)


@pytest.mark.parametrize(("grid", "cols"), [(LONG, 32), (SHORT, 8)], ids=["64x8", "16x8"])
def test_at_aspect_one_a_block_has_the_proportions_of_the_grid(grid, cols):
    """A quarter of the grid is half its rows and half its columns."""
    assert fixed(0.25).draw_block_shape(np.random.default_rng(0), grid) == (4, cols)


@pytest.mark.parametrize(("aspect", "sides"), [(9.0, (8, 4)), (1 / 9, (2, 16))])
def test_a_block_too_high_or_too_wide_keeps_its_area(aspect, sides):
    """Where one side meets the edge the other makes up for it."""
    size = BlockSize(area_low=0.25, area_high=0.25, aspect_low=aspect, aspect_high=aspect)
    assert size.draw_block_shape(np.random.default_rng(0), SHORT) == sides


@on_both_grids
@pytest.mark.parametrize("count", [1, 4])
def test_every_place_of_a_block_is_equally_likely(grid, count):
    """Chi-square over all places, last row and column included, though batches are chosen by what they leave."""
    maker = RandomBlocks(count=count, target=fixed(0.175), floor=0.01)
    rows, cols = maker.target.draw_block_shape(np.random.default_rng(0), grid)
    counts_CR = np.zeros((grid.cols - cols + 1, grid.rows - rows + 1))
    for masks in many(maker, grid, steps=500, batch=8):
        np.add.at(counts_CR, np.divmod(masks.targets_BGQ[:, :, 0].ravel(), grid.rows), 1)
    assert abs(surprise(counts_CR)) < 4


@on_both_grids
@for_every_block_maker
def test_no_patch_is_never_a_target_and_none_never_context(maker, grid):
    """The published sampler never touches the last row and the last column."""
    target_P, context_P = np.zeros(grid.tokens), np.zeros(grid.tokens)
    for masks in many(maker, grid, steps=150, batch=32):
        target_P += np.bincount(masks.targets_BGQ.ravel(), minlength=grid.tokens)
        context_P += np.bincount(masks.context_BK.ravel(), minlength=grid.tokens)
    assert target_P.min() > 0
    assert context_P.min() > 0


@on_both_grids
@for_every_block_maker
def test_a_patch_is_target_as_often_as_blocks_can_cover_it(grid, maker):
    """Every place of a block is equally likely: a patch is in as many of them as cover it, corners in the fewest."""
    size = fixed(maker.target.area_high)
    rows, cols = size.draw_block_shape(np.random.default_rng(0), grid)
    places_CR = np.zeros((grid.cols, grid.rows))
    for col, row in itertools.product(range(grid.cols - cols + 1), range(grid.rows - rows + 1)):
        places_CR[col : col + cols, row : row + rows] += 1
    law_P = places_CR.ravel() / ((grid.cols - cols + 1) * (grid.rows - rows + 1))
    hits_P = np.zeros(grid.tokens)
    blocks = 0
    for masks in many(replace(maker, count=1, target=size, floor=0.0), grid, steps=100, batch=64):
        hits_P += np.bincount(masks.targets_BGQ.ravel(), minlength=grid.tokens)
        blocks += len(masks.targets_BGQ)
    deviation_P = (hits_P - blocks * law_P) / np.sqrt(blocks * law_P * (1 - law_P) + 1e-9)
    assert abs(deviation_P).max() < 5
    assert law_P.min() > 0


@on_both_grids
def test_a_visible_patch_is_context_as_often_as_every_other_that_may_be(grid):
    """The context drops a random part of the patches that the targets leave free: chi-square over these patches."""
    maker = TimeFrequencyAware(count=1, target=fixed(0.06))
    counts_P, free_P = np.zeros(grid.tokens), np.zeros(grid.tokens)
    for masks in many(maker, grid, steps=100, batch=64):
        for clip in range(64):
            rows, cols = (np.unique(f(masks.targets_BGQ[clip], grid.rows)) for f in (np.mod, np.floor_divide))
            free_CR = np.ones((grid.cols, grid.rows), bool)
            free_CR[cols], free_CR[:, rows] = False, False
            free_P += free_CR.ravel() * (masks.context_BK.shape[1] / free_CR.sum())
        counts_P += np.bincount(masks.context_BK.ravel(), minlength=grid.tokens)
    chi_square = ((counts_P - free_P) ** 2 / free_P).sum()
    assert chi_square < grid.tokens + 4 * np.sqrt(2 * grid.tokens)


@on_both_grids
@for_every_block_maker
def test_the_context_favours_no_side_of_the_grid(maker, grid):
    """The law is the same seen in a mirror; cutting every clip to the shortest would lose the last columns."""
    share_P = np.zeros(grid.tokens)
    for masks in many(maker, grid, steps=300, batch=32):
        share_P += np.bincount(masks.context_BK.ravel(), minlength=grid.tokens) / (32 * 300)
    share_CR = share_P.reshape(grid.cols, grid.rows)
    middle = share_CR.mean()
    assert share_CR[: grid.cols // 2].mean() == pytest.approx(
        share_CR[grid.cols // 2 :].mean(), abs=0.03 * middle
    )
    assert share_CR[:, :4].mean() == pytest.approx(share_CR[:, 4:].mean(), abs=0.03 * middle)


@on_both_grids
@pytest.mark.parametrize(
    ("maker", "least", "mean"), [(RandomBlocks(), 1 / 8, 0.43), (TimeFrequencyAware(), 1 / 16, 0.18)]
)
def test_the_context_keeps_its_floor_and_most_of_the_free_patches(maker, grid, least, mean):
    """On average 45 % and 19 % of the grid are free. Batches lose little of it, and never fall under the floor."""
    shares = [m.context_BK.shape[1] / grid.tokens for m in many(maker, grid, steps=400, batch=32)]
    assert min(shares) >= least
    assert np.mean(shares) == pytest.approx(mean, abs=0.02)


@on_both_grids
def test_time_frequency_aware_context_shares_no_row_and_no_column_with_a_target(grid):
    """Neither the same moment nor the same band helps, and the floor makes no exception."""
    for masks in many(TimeFrequencyAware(), grid, steps=100, batch=16):
        for context_K, targets_GQ in zip(masks.context_BK, masks.targets_BGQ, strict=True):
            assert not set(context_K // grid.rows) & set(targets_GQ.ravel() // grid.rows)
            assert not set(context_K % grid.rows) & set(targets_GQ.ravel() % grid.rows)


@pytest.mark.parametrize("floor_tokens", [1, 6])
def test_every_legal_layout_is_equally_likely(floor_tokens):
    """All pairs of 1 x 2 blocks on a 5 x 4 grid, counted: those that leave the floor come up equally often."""
    grid = PatchGrid(rows=4, cols=5)
    places = list(itertools.product(range(4), range(4)))  # (column, row)
    legal = {}
    for (col, row), (other_col, other_row) in itertools.product(places, places):
        free_cols = 5 - len({col, col + 1, other_col, other_col + 1})
        if free_cols * (4 - len({row, other_row})) >= floor_tokens:
            legal[(col * 4 + row, other_col * 4 + other_row)] = 0
    maker = TimeFrequencyAware(count=2, target=fixed(0.1), floor=floor_tokens / grid.tokens)
    for masks in many(maker, grid, steps=1_000, batch=8):
        for corners in masks.targets_BGQ[:, :, 0]:
            legal[tuple(corners.tolist())] += 1
    assert len(legal) == {1: 256, 6: 88}[floor_tokens]
    assert abs(surprise(np.array(list(legal.values())))) < 4


def test_a_floor_out_of_reach_is_refused_with_the_settings_to_change():
    """No layout leaves nine tenths; the loop must end, and say why."""
    with pytest.raises(RunError, match=r"masks: 0 of 1600 layouts leave 116 context tokens.*lower the floor"):
        RandomBlocks(floor=0.9).sample(np.random.default_rng(0), SHORT, batch=2)


@pytest.mark.parametrize(
    "grid", [PatchGrid(rows=4, cols=8), PatchGrid(rows=14, cols=62), PatchGrid(rows=2, cols=4)]
)
@for_every_maker
def test_other_grids_work_too(maker, grid):
    """Other patches, clips and front ends: a block is at least one patch, the context at least one token."""
    for masks in many(maker, grid, steps=20, batch=4):
        assert masks.context_BK.shape[1] >= 1
        assert masks.targets_BGQ.shape[2] >= 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: RandomPatches(ratio_low=0.0),
        lambda: RandomPatches(target_share=0.0),
        lambda: RandomPatches(ratio_low=0.7),
        lambda: RandomBlocks(count=0),
        lambda: TimeFrequencyAware(floor=1.0),
        lambda: TimeSpans(count=0),
        lambda: TimeSpans(count=5),
        lambda: BlockSize(area_low=0.2, area_high=0.1),
        lambda: BlockSize(area_low=0.1, area_high=0.2, aspect_low=0.0),
    ],
)
def test_a_masking_that_cannot_be_is_refused(wrong):
    """At its construction, with the values in the message."""
    with pytest.raises(ValueError, match="need"):
        wrong()


A_JEPA = Curriculum(earlier=RandomBlocks(), later=TimeFrequencyAware(), steps=1_000)


def share_of_later(plan: Curriculum, step: int) -> float:
    """Return how often 4,000 draws at one step give the later masking."""
    rng = np.random.default_rng(step)
    return float(np.mean([plan.mask_maker_at(step, rng) is plan.later for _ in range(4_000)]))


@pytest.mark.parametrize(("step", "share"), [(0, 0.01), (250, 0.5), (500, 0.707), (810, 0.9), (1_000, 1.0)])
def test_the_later_masking_is_drawn_as_often_as_the_paper_says(step, share):
    """Bernoulli(f(s)): 4,000 draws put the observed share within 2.5 points of f."""
    assert share_of_later(A_JEPA, step) == pytest.approx(share, abs=0.025)


def test_the_inverse_curriculum_is_the_same_with_the_two_exchanged():
    """The ablation differs in the order of difficulty and in nothing else."""
    inverse = mask_plan("inverse", 1_000)
    for step in range(0, 1_000, 50):
        makers = {plan.mask_maker_at(step, np.random.default_rng(step)) for plan in (A_JEPA, inverse)}
        assert makers == {A_JEPA.earlier, A_JEPA.later}


def test_the_same_generator_gives_the_same_masking():
    """A resumed run draws what the uninterrupted one would have drawn."""
    first, again = (
        [A_JEPA.mask_maker_at(step, np.random.default_rng([7, step])) for step in range(200)]
        for _ in range(2)
    )
    assert first == again


def test_a_fixed_plan_leaves_the_generator_alone():
    """Its masks are those of the masking by itself."""
    rng = np.random.default_rng(0)
    assert Fixed(masking=RandomPatches()).mask_maker_at(3, rng) == RandomPatches()
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 10, "first_share": 1.5}])
def test_a_curriculum_that_cannot_be_is_refused(wrong):
    """At its construction, not at its first step."""
    with pytest.raises(ValueError, match="a curriculum needs"):
        Curriculum(earlier=RandomBlocks(), later=TimeFrequencyAware(), **wrong)


def test_the_plans_of_the_ablation_have_names():
    """curriculum, inverse and the fixed ones, all for a run of any length."""
    assert mask_plan("curriculum", 1_000) == A_JEPA
    assert mask_plan("blocks", 5) == Fixed(masking=RandomBlocks())
    assert mask_plan("time-frequency", 5) == Fixed(masking=TimeFrequencyAware())
    assert mask_plan("patches", 5) == Fixed(masking=RandomPatches())
    assert mask_plan("spans", 5) == Fixed(masking=TimeSpans())
    assert {name for name in MASK_PLANS if isinstance(mask_plan(name, 7), Curriculum)} == {
        "curriculum",
        "inverse",
    }
    with pytest.raises(RunError, match="masks 'inverted' are unknown; did you mean 'inverse'"):
        mask_plan("inverted", 5)


def test_the_share_of_the_later_masking_begins_at_a_hundredth_and_averages_two_thirds():
    """f(0) = .01, f(S) = 1, and .667 of all steps: counted over a whole run, one draw a step."""
    assert share_of_later(A_JEPA, 0) == pytest.approx(0.01, abs=0.01)
    assert share_of_later(A_JEPA, 1_000) == 1.0
    plan = mask_plan("curriculum", 20_000)
    later = [
        plan.mask_maker_at(step, np.random.default_rng([0, step])) is plan.later for step in range(20_000)
    ]
    assert np.mean(later) == pytest.approx(0.667, abs=0.01)


# SHA-256 of context and targets, made by the code that this format of a run began with.
DIGESTS = {
    ("RandomPatches", 16): "b1242c4ef4276459",
    ("RandomPatches", 64): "5998e2313b39d570",
    ("RandomPatches", 130): "2a8f16004072037d",
    ("RandomBlocks", 16): "571bdf3f5e930a28",
    ("RandomBlocks", 64): "faaf7c52b27b0cd1",
    ("RandomBlocks", 130): "0b195bd66f11a04a",
    ("TimeFrequencyAware", 16): "040900a376b595c2",
    ("TimeFrequencyAware", 64): "be84ff8bf9c6d367",
    ("TimeFrequencyAware", 130): "c05c21181060d1e5",
    ("TimeSpans", 16): "295623a4e0e9b72f",
    ("TimeSpans", 64): "7415b8b33cebacc0",
    ("TimeSpans", 130): "5d740f455fe36f15",
}


@pytest.mark.parametrize(("name", "cols"), DIGESTS, ids=lambda value: str(value))
def test_masks_stay_what_they_were(name, cols):
    """A run is carried on exactly after an update: faster code draws the same masks to the bit."""
    maker = {type(maker).__name__: maker for maker in MAKERS}[name]
    digest = hashlib.sha256()
    rng = np.random.default_rng(3)
    for _ in range(3):
        masks = maker.sample(rng, PatchGrid(rows=4, cols=cols), batch=9)
        digest.update(masks.context_BK.tobytes() + masks.targets_BGQ.tobytes())
    digest.update(np.float64(rng.random()).tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[name, cols]


def test_equal_numbers_do_not_add_tokens():
    """Two lottery numbers may be equal, once in some ten billion clips: the count of tokens must not change."""
    number_BP = np.array([[0.3, 0.1, 0.3, 0.2], [0.4, 0.3, 0.2, 0.1]])
    assert _lowest_in_rows(number_BP, 3).shape == (2, 3)
    assert _lowest_in_rows(number_BP, 2).tolist() == [[1, 3], [2, 3]]
