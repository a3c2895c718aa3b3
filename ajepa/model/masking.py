"""Masks: which patches the context encoder sees, and which patches the predictor has to predict.

A masking is one way to hide tokens: blocks as in I-JEPA (arXiv 2301.08243, section 3), time-frequency aware blocks as
in A-JEPA (arXiv 2311.15830), single patches as in Audio-JEPA (arXiv 2507.02915), or stretches of time. A mask
plan chooses the masking of each step of a run: always the same masking, or A-JEPA's curriculum from easy to hard.

All randomness comes from the generator in the arguments and all arrays are NumPy, so the masks are the same on every
device and on resume. Sizes are drawn once per call, for the whole batch; positions are drawn for each clip.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from ajepa.model.patches import PatchGrid
from pipeline.errors import RunError
from pipeline.messages import suggest_known

# Candidates per clip in `_draw_similar_layouts`; 16 would give one percentage point more context at twice the cost.
LAYOUT_STRATA = 8

# After this many rounds of candidates the floor counts as unreachable (RunError).
LAYOUT_ROUNDS = 100


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Masks:
    """The tokens that the context encoder sees, and the groups of tokens that the predictor predicts, of B clips.

    context_BK   int64, ascending, no duplicates
    targets_BGQ  int64, ascending within a group; groups may overlap each other but never the context
    """

    context_BK: np.ndarray
    targets_BGQ: np.ndarray


class MaskMaker(Protocol):
    """A way to hide tokens; the masks depend only on the generator, the grid and the batch size."""

    def sample(self, rng: np.random.Generator, grid: PatchGrid, *, batch: int) -> Masks: ...


class BlockShape(NamedTuple):
    """Height and width of a block, in patches."""

    rows: int
    cols: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSize:
    """Ranges of a block's area (share of the grid) and aspect (height by width; 1: the proportions of the grid)."""

    area_low: float
    area_high: float
    aspect_low: float = 0.75
    aspect_high: float = 1.5

    def __post_init__(self) -> None:
        if not (0 < self.area_low <= self.area_high <= 1 and 0 < self.aspect_low <= self.aspect_high):
            raise ValueError(
                f"a block needs 0 < area low <= high <= 1 and 0 < aspect low <= high, got {self}"
            )

    def draw_block_shape(self, rng: np.random.Generator, grid: PatchGrid) -> BlockShape:
        """Draw area and aspect, each uniform in its range, and fit a block of whole patches to them.

        If whole patches cannot match both, the area is matched as closely as possible and the aspect changes.
        """
        tokens = rng.uniform(self.area_low, self.area_high) * grid.tokens
        aspect = rng.uniform(self.aspect_low, self.aspect_high)

        # The rows follow from the aspect, then the columns from the area.
        rows = _clamp_patches(grid.rows * math.sqrt(tokens / grid.tokens * aspect), grid.rows)
        cols = _clamp_patches(tokens / rows, grid.cols)

        # If the columns are limited by the grid, more rows make up the missing area.
        return BlockShape(rows=_clamp_patches(tokens / cols, grid.rows), cols=cols)


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomBlocks:
    """`count` target blocks anywhere, and one large context block without the patches of the targets.

    The multi-block masks of I-JEPA (arXiv 2301.08243, section 3); A-JEPA's curriculum begins with them. Every position
    of a block inside the grid is equally likely. The context is at least `floor`, a share of the grid: positions that
    leave less are drawn again (with the default sizes in fewer than one clip of 10,000).
    """

    count: int = 4
    target: BlockSize = BlockSize(area_low=0.15, area_high=0.20)
    context: BlockSize = BlockSize(area_low=0.85, area_high=1.0, aspect_low=1.0, aspect_high=1.0)
    floor: float = 1 / 8

    def __post_init__(self) -> None:
        _check_block_masking(self.count, self.floor)

    def sample(self, rng: np.random.Generator, grid: PatchGrid, *, batch: int) -> Masks:
        """Draw the masks of `batch` clips; RunError if too few layouts leave `floor` as context."""
        target_shape = self.target.draw_block_shape(rng, grid)
        context_shape = self.context.draw_block_shape(rng, grid)

        def draw_layouts(clips: int) -> _MaskLayouts:
            target_NG = _draw_corners(rng, grid, target_shape, (clips, self.count))
            context_N1 = _draw_corners(rng, grid, context_shape, (clips, 1))

            # The context is the context block without the patches that a target covers.
            in_context_NRW = _covered_patches(context_N1, grid, context_shape)
            in_target_NRW = _covered_patches(target_NG, grid, target_shape)
            return _MaskLayouts(corner_NG=target_NG, open_NRW=in_context_NRW & ~in_target_NRW)

        return _draw_block_masks(rng, grid, target_shape, draw_layouts, batch=batch, floor=self.floor)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeFrequencyAware:
    """`count` small target blocks; the context loses every time column and every frequency row that they touch.

    A-JEPA's curriculum ends with these masks (arXiv 2311.15830). The paper does not state which patches its masks
    remove. Our interpretation: the context contains no patch at the same time or in the same band as a target, because
    neighbours in time and in frequency are highly correlated.
    The context is at least `floor`, a share of the grid. The default is (1 - 3/4)^2: three average targets that share
    no row and no column leave this share. Positions that leave less are drawn again (1 clip in 80), so all layouts
    that leave enough are equally likely.
    """

    count: int = 3
    target: BlockSize = BlockSize(area_low=0.05, area_high=0.075)
    floor: float = 1 / 16

    def __post_init__(self) -> None:
        _check_block_masking(self.count, self.floor)

    def sample(self, rng: np.random.Generator, grid: PatchGrid, *, batch: int) -> Masks:
        """Draw the masks of `batch` clips; RunError if too few layouts leave `floor` as context."""
        target_shape = self.target.draw_block_shape(rng, grid)

        def draw_layouts(clips: int) -> _MaskLayouts:
            target_NG = _draw_corners(rng, grid, target_shape, (clips, self.count))

            # The context is every patch whose row and column no target touches.
            rows_NGR, cols_NGW = _touched_rows_cols(target_NG, grid, target_shape)
            touched_NR = np.bitwise_or.reduce(rows_NGR, axis=1)
            touched_NW = np.bitwise_or.reduce(cols_NGW, axis=1)
            open_NRW = _all_columns(grid) & ~touched_NR[:, :, None] & ~touched_NW[:, None, :]
            return _MaskLayouts(corner_NG=target_NG, open_NRW=open_NRW)

        return _draw_block_masks(rng, grid, target_shape, draw_layouts, batch=batch, floor=self.floor)


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomPatches:
    """Hides single patches, each equally likely; the hidden share is uniform in [ratio_low, ratio_high].

    The masks of Audio-JEPA (arXiv 2507.02915). The targets are one group; the context is every patch that is not
    hidden. Only the share `target_share` of the hidden patches, drawn at random, are targets; the predictor
    does not process the others.
    """

    ratio_low: float = 0.4
    ratio_high: float = 0.6
    target_share: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.ratio_low <= self.ratio_high < 1 and 0 < self.target_share <= 1):
            raise ValueError(
                f"random patches need 0 < ratio_low <= ratio_high < 1 and 0 < target_share <= 1, got {self}"
            )

    def sample(self, rng: np.random.Generator, grid: PatchGrid, *, batch: int) -> Masks:
        """Draw the masks of `batch` clips."""
        # One hidden share for the whole batch, so that all its clips have the same number of context tokens.
        hidden = _clamp_patches(rng.uniform(self.ratio_low, self.ratio_high) * grid.tokens, grid.tokens - 1)

        # Draw the hidden patches of each clip: shuffle a row that contains one True per hidden patch.
        hidden_BP = np.broadcast_to(np.arange(grid.tokens) < hidden, (batch, grid.tokens))
        hidden_BP = rng.permuted(hidden_BP, axis=1)
        context_BK = _places_in_rows(~hidden_BP)
        target_BQ = _places_in_rows(hidden_BP)

        # Select at random the hidden patches that are targets.
        if self.target_share < 1:
            targets = _clamp_patches(self.target_share * hidden, hidden)
            target_BQ = np.sort(rng.permuted(target_BQ, axis=1)[:, :targets])
        return Masks(context_BK=context_BK, targets_BGQ=target_BQ[:, None])


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeSpans:
    """Hides `count` stretches of time in all bands: the predictor must bridge gaps in time.

    The share of the columns that a span covers is uniform in [share_low, share_high], drawn once per call. Spans never
    overlap, so the context (all other patches) has the same size in every clip. Spans may touch, and all placements
    are equally likely.
    """

    count: int = 3
    share_low: float = 0.125
    share_high: float = 0.2

    def __post_init__(self) -> None:
        if self.count < 1 or not (0 < self.share_low <= self.share_high < 1 / self.count):
            raise ValueError(
                f"spans need a count of 1 or more and 0 < share_low <= share_high < 1/count, got {self}"
            )

    def sample(self, rng: np.random.Generator, grid: PatchGrid, *, batch: int) -> Masks:
        """Draw the masks of `batch` clips; RunError if the spans fill the grid."""
        width = _clamp_patches(rng.uniform(self.share_low, self.share_high) * grid.cols, grid.cols)
        if self.count * width >= grid.cols:
            raise RunError(
                f"masks: {self.count} spans of {width} of {grid.cols} columns leave no context; lower the number "
                "of spans or their share"
            )

        # Draw distinct positions for spans of one column, then widen the spans: this way no two spans overlap.
        places = grid.cols - self.count * (width - 1)
        place_BG = np.sort(rng.random((batch, places)).argpartition(self.count - 1, axis=1)[:, : self.count])
        first_col_BG = place_BG + np.arange(self.count) * (width - 1)

        # Tokens are time-major: a span is one consecutive run of tokens.
        targets_BGQ = (first_col_BG * grid.rows)[:, :, None] + np.arange(width * grid.rows)
        open_BP = np.ones((batch, grid.tokens), bool)
        np.put_along_axis(open_BP, targets_BGQ.reshape(batch, -1), False, axis=1)
        return Masks(context_BK=_places_in_rows(open_BP), targets_BGQ=targets_BGQ)


# Mask plans choose the masking of each step.


class MaskPlan(Protocol):
    """Chooses the masking of a step. `rng` is the generator of that step; the masks are drawn from it afterwards."""

    def mask_maker_at(self, step: int, rng: np.random.Generator) -> MaskMaker: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """The same masking at every step; nothing is drawn from the generator."""

    masking: MaskMaker

    def mask_maker_at(self, step: int, rng: np.random.Generator) -> MaskMaker:
        """Return the masking, which is the same at every step."""
        return self.masking


@dataclass(frozen=True, kw_only=True, slots=True)
class Curriculum:
    """Changes from a first to a later masking: step `s` uses the later with probability `f(s)` (`curriculum_share`).

    The curriculum of A-JEPA (arXiv 2311.15830). `steps` is the length of the whole run, `first_share` is `f(0)`.
    """

    earlier: MaskMaker
    later: MaskMaker
    steps: int
    first_share: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.first_share <= 1:
            raise ValueError(f"a curriculum needs steps >= 1 and a first share in [0, 1], got {self}")

    def mask_maker_at(self, step: int, rng: np.random.Generator) -> MaskMaker:
        """Draw one of the two maskings; this takes one number from the generator."""
        share = curriculum_share(step, steps=self.steps, first=self.first_share)
        return self.later if rng.random() < share else self.earlier


def curriculum_share(step: int, *, steps: int, first: float = 0.01) -> float:
    """Return the probability of the later masking: `f(s) = min(1, sqrt(s (1 - c0^2) / S + c0^2))`, c0 = `first`.

    A-JEPA (arXiv 2311.15830). It grows fastest at the start: over a run two steps in three use the later masking.
    """
    return min(1.0, math.sqrt(step * (1 - first**2) / steps + first**2))


def a_jepa_curriculum(steps: int) -> Curriculum:
    """Return the curriculum from random blocks to time-frequency aware masks (arXiv 2311.15830)."""
    return Curriculum(earlier=RandomBlocks(), later=TimeFrequencyAware(), steps=steps)


def inverse_curriculum(steps: int) -> Curriculum:
    """Return A-JEPA's curriculum with its two maskings exchanged: the paper's ablation."""
    return Curriculum(earlier=TimeFrequencyAware(), later=RandomBlocks(), steps=steps)


MASK_PLANS: dict[str, Callable[[int], MaskPlan]] = {
    "curriculum": a_jepa_curriculum,
    "inverse": inverse_curriculum,
    "blocks": lambda steps: Fixed(masking=RandomBlocks()),
    "time-frequency": lambda steps: Fixed(masking=TimeFrequencyAware()),
    "patches": lambda steps: Fixed(masking=RandomPatches()),
    "spans": lambda steps: Fixed(masking=TimeSpans()),
}


def mask_plan(name: str, steps: int) -> MaskPlan:
    """Return the plan with this name for a run of `steps` steps; RunError names the most similar name and all names."""
    if name not in MASK_PLANS:
        raise RunError(f"masks {name!r} are unknown; {suggest_known(name, MASK_PLANS)}")
    return MASK_PLANS[name](steps)


# Placement of blocks: layouts are drawn until every clip of a batch has a layout that leaves enough context.
#
# Sets of columns are bits: W words of 64 columns each, the first column in the lowest bit. Eight layouts are drawn for
# each one that is used, so this decides the cost of a step's masks: with bytes for patches it was three times higher.


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _MaskLayouts:
    """Positions of the target blocks of N clips, and the patches that remain for the context.

    corner_NG  int64: the first token of each target block (lowest row, earliest column)
    open_NRW   uint64, a set of columns for each row: the patches that the context may use
    """

    corner_NG: np.ndarray
    open_NRW: np.ndarray

    def free_tokens_N(self) -> np.ndarray:
        return np.bitwise_count(self.open_NRW).sum(axis=(1, 2), dtype=np.int64)

    def open_tokens_NP(self, grid: PatchGrid) -> np.ndarray:
        """Return bool `NP`: True for the tokens that the context may use."""
        bytes_NRA = self.open_NRW.astype("<u8", copy=False).view(np.uint8)
        open_NRC = np.unpackbits(bytes_NRA, axis=2, count=grid.cols, bitorder="little").view(bool)
        return open_NRC.transpose(0, 2, 1).reshape(-1, grid.tokens)

    def select_clips(self, chosen_N: np.ndarray) -> "_MaskLayouts":
        return _MaskLayouts(corner_NG=self.corner_NG[chosen_N], open_NRW=self.open_NRW[chosen_N])

    def concatenate(self, more: "_MaskLayouts") -> "_MaskLayouts":
        corner_NG = np.concatenate((self.corner_NG, more.corner_NG))
        return _MaskLayouts(corner_NG=corner_NG, open_NRW=np.concatenate((self.open_NRW, more.open_NRW)))


LayoutSampler = Callable[[int], _MaskLayouts]


def _draw_block_masks(
    rng: np.random.Generator,
    grid: PatchGrid,
    shape: BlockShape,
    draw_layouts: LayoutSampler,
    *,
    batch: int,
    floor: float,
) -> Masks:
    """Draw the masks of `batch` clips from the layouts that leave at least the share `floor` of the grid as context."""
    floor_tokens = _min_context_tokens(floor, grid)
    layouts = _draw_similar_layouts(rng, draw_layouts, batch=batch, floor_tokens=floor_tokens)
    return _masks_of_layouts(rng, grid, layouts, shape)


def _draw_similar_layouts(
    rng: np.random.Generator, draw_layouts: LayoutSampler, *, batch: int, floor_tokens: int
) -> _MaskLayouts:
    """Draw legal layouts for a batch that all leave about the same amount of context.

    All clips of a batch must have the same number of context tokens, so the clip with the fewest free tokens limits
    all of them. I-JEPA's blocks leave 45 % of the grid free on average, 30 % in the lowest of 64 clips and 22 % in the
    worst case (four targets side by side). Therefore LAYOUT_STRATA times as many independent layouts as clips are drawn
    and sorted by the context that they leave, and one stratum of consecutive layouts is used: this leaves 43 %.
    Every stratum is equally likely, and therefore every layout. The distribution of a single clip's layout is exactly
    that of `draw_layouts`.
    """
    layouts = _draw_legal_layouts(draw_layouts, wanted=LAYOUT_STRATA * batch, floor_tokens=floor_tokens)

    # Sort the layouts by their free tokens, and take one stratum: a consecutive run with one layout for each clip.
    by_free_tokens_N = layouts.free_tokens_N().argsort(kind="stable")
    stratum_B = by_free_tokens_N.reshape(LAYOUT_STRATA, batch)[rng.integers(LAYOUT_STRATA)]

    # Shuffle the sorted layouts, so that no position in the batch always gets the layout with the least context.
    return layouts.select_clips(rng.permutation(stratum_B))


def _draw_legal_layouts(draw_layouts: LayoutSampler, *, wanted: int, floor_tokens: int) -> _MaskLayouts:
    """Return the first `wanted` drawn layouts that leave at least the floor free; RunError if they are too rare."""
    legal = draw_layouts(0)
    for _ in range(LAYOUT_ROUNDS):
        more = draw_layouts(wanted)
        legal = legal.concatenate(more.select_clips(more.free_tokens_N() >= floor_tokens))
        if len(legal.corner_NG) >= wanted:
            return legal.select_clips(np.arange(wanted))
    raise RunError(
        f"masks: {len(legal.corner_NG)} of {LAYOUT_ROUNDS * wanted} layouts leave {floor_tokens} context tokens or "
        f"more, expected 1 in {LAYOUT_ROUNDS}; lower the floor, the number of targets or their area"
    )


def _masks_of_layouts(
    rng: np.random.Generator, grid: PatchGrid, layouts: _MaskLayouts, shape: BlockShape
) -> Masks:
    """Return the masks of layouts. The clip with the fewest open patches sets the number of context tokens."""
    # Context: this number of open patches of each clip, chosen at random (those with the lowest random numbers).
    count = int(layouts.free_tokens_N().min())
    open_BP = layouts.open_tokens_NP(grid)
    lottery_BP = rng.random(open_BP.shape)
    lottery_BP[~open_BP] = np.inf
    context_BK = _lowest_in_rows(lottery_BP, count)

    # Targets: every token of a block, computed from the block's first token.
    within_CR = np.arange(shape.cols)[:, None] * grid.rows + np.arange(shape.rows)
    return Masks(context_BK=context_BK, targets_BGQ=layouts.corner_NG[:, :, None] + within_CR.ravel())


def _draw_corners(
    rng: np.random.Generator, grid: PatchGrid, shape: BlockShape, count: tuple[int, int]
) -> np.ndarray:
    """Draw the first tokens of blocks; every position that keeps the block inside the grid is equally likely."""
    row = rng.integers(grid.rows - shape.rows + 1, size=count)
    col = rng.integers(grid.cols - shape.cols + 1, size=count)
    return col * grid.rows + row


def _touched_rows_cols(
    corner_NG: np.ndarray, grid: PatchGrid, shape: BlockShape
) -> tuple[np.ndarray, np.ndarray]:
    """Return what each block touches: rows, as uint64 `NGR` of no or all bits, and columns, as a set `NGW`."""
    first_col_NG, first_row_NG = np.divmod(corner_NG, grid.rows)

    # The rows and the columns of a block follow from its first ones: look them up.
    row_R = np.arange(grid.rows)
    first_F1 = row_R[: grid.rows - shape.rows + 1, None]
    is_touched_FR = (row_R >= first_F1) & (row_R < first_F1 + shape.rows)
    all_bits = np.uint64(2**64 - 1)
    rows_FR = np.where(is_touched_FR, all_bits, np.uint64(0))
    cols_FW = np.stack(
        [_column_bits(grid, first, first + shape.cols) for first in range(grid.cols - shape.cols + 1)]
    )
    return rows_FR[first_row_NG], cols_FW[first_col_NG]


def _covered_patches(corner_NG: np.ndarray, grid: PatchGrid, shape: BlockShape) -> np.ndarray:
    """Return the patches that at least one block of a clip covers: a set of columns for each row, uint64 `NRW`."""
    rows_NGR, cols_NGW = _touched_rows_cols(corner_NG, grid, shape)
    covered_NRW = np.zeros((len(corner_NG), grid.rows, cols_NGW.shape[2]), np.uint64)
    for block in range(corner_NG.shape[1]):
        covered_NRW |= rows_NGR[:, block, :, None] & cols_NGW[:, block, None, :]
    return covered_NRW


def _column_bits(grid: PatchGrid, first: int, end: int) -> np.ndarray:
    """Return the columns [first, end) of the grid as bits, uint64 `W`."""
    bits = (1 << end) - (1 << first)
    words = -(-grid.cols // 64)
    return np.array([bits >> (64 * word) & (2**64 - 1) for word in range(words)], np.uint64)


def _all_columns(grid: PatchGrid) -> np.ndarray:
    return _column_bits(grid, 0, grid.cols)


def _places_in_rows(is_chosen_BP: np.ndarray) -> np.ndarray:
    """Return where each row is True, ascending, int64 `BK`; all rows are True equally often."""
    batch, tokens = is_chosen_BP.shape
    place_BK = np.flatnonzero(is_chosen_BP).reshape(batch, -1)
    return place_BK - np.arange(batch)[:, None] * tokens


def _lowest_in_rows(number_BP: np.ndarray, count: int) -> np.ndarray:
    """Return the places of the `count` lowest numbers of each row, ascending, int64 `BK`."""
    # Comparing with the highest of them is three times as fast as finding their places, but equal numbers are too many.
    highest_B1 = np.partition(number_BP, count - 1, axis=1)[:, count - 1 : count]
    is_low_BP = number_BP <= highest_B1
    if np.count_nonzero(is_low_BP) == count * len(number_BP):
        return _places_in_rows(is_low_BP)
    return np.sort(number_BP.argpartition(count - 1, axis=1)[:, :count])


def _clamp_patches(patches: float, limit: int) -> int:
    """Round to whole patches, between 1 and `limit`."""
    return min(limit, max(1, round(patches)))


def _min_context_tokens(floor: float, grid: PatchGrid) -> int:
    """Return the smallest number of tokens that is at least the share `floor` of the grid, and at least 1."""
    # Round before the ceiling: 0.07 * 100 is slightly above 7 in floating point, but seven tokens are enough.
    return max(1, math.ceil(round(floor * grid.tokens, 6)))


def _check_block_masking(count: int, floor: float) -> None:
    if count < 1 or not 0 <= floor < 1:
        raise ValueError(f"masks need at least one target and a floor in [0, 1), got {count} and {floor}")
