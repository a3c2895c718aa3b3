"""Masks, MaskMaker, and every way of hiding tokens.

All randomness comes from the generator handed in and all arrays are NumPy, so masks are the same on every
device and on resume. Sizes are drawn once per call, for the whole batch; places are drawn for each clip.

step -> MaskMaker; the plans that have a name.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ajepa.model.patches import PatchGrid
from pipeline.errors import RunError

LAYOUT_STRATA = (
    8  # candidates per clip in `_alike`; twice as many would win one more point of context for twice the work
)

LAYOUT_ROUNDS = 100  # of candidates, before a floor counts as out of reach


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Masks:
    """Which tokens the context encoder sees, and which the predictor must tell.

    context_BK   int64, ascending, no repeats
    targets_BGQ  int64, ascending within a group; groups may overlap each other, never the context
    """

    context_BK: np.ndarray
    targets_BGQ: np.ndarray


class MaskMaker(Protocol):
    """A way of hiding tokens; what it draws depends on the generator, the grid and the batch alone."""

    def sample(self, rng: np.random.Generator, grid: PatchGrid, *, batch: int) -> Masks: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSize:
    """The share of the grid a block covers, and its height by its width: 1 for the grid's proportions."""

    area_low: float
    area_high: float
    aspect_low: float = 0.75
    aspect_high: float = 1.5

    def __post_init__(self) -> None:
        if not (0 < self.area_low <= self.area_high <= 1 and 0 < self.aspect_low <= self.aspect_high):
            raise ValueError(
                f"a block needs 0 < area low <= high <= 1 and 0 < aspect low <= high, got {self}"
            )

    def draw_block_shape(self, rng: np.random.Generator, grid: PatchGrid) -> tuple[int, int]:
        """Rows and columns of a block: area and aspect uniform, then fitted to whole patches.

        Rows follow the aspect and columns then make up the area, so that on a coarse grid it is the shape
        that gives way. The last line refits the rows where the columns met the edge.
        """
        tokens = rng.uniform(self.area_low, self.area_high) * grid.tokens
        aspect = rng.uniform(self.aspect_low, self.aspect_high)
        rows = _clamp_patches(grid.rows * math.sqrt(tokens / grid.tokens * aspect), grid.rows)
        cols = _clamp_patches(tokens / rows, grid.cols)
        return _clamp_patches(tokens / cols, grid.rows), cols


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomPatches:
    """Single patches, each equally likely, a share of the grid uniform in [ratio_low, ratio_high].

    Audio-JEPA (arXiv 2507.02915). The targets are one group, the context is all the rest. `target_share` is the
    share of the hidden patches that are targets, drawn at random: the predictor is spared the others.
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
        hidden = _clamp_patches(rng.uniform(self.ratio_low, self.ratio_high) * grid.tokens, grid.tokens - 1)
        hidden_BP = np.broadcast_to(np.arange(grid.tokens) < hidden, (batch, grid.tokens))
        hidden_BP = rng.permuted(hidden_BP, axis=1)
        context_BK = (~hidden_BP).nonzero()[1].reshape(batch, -1)
        hidden_BH = hidden_BP.nonzero()[1].reshape(batch, -1)
        if self.target_share < 1:
            targets = _clamp_patches(self.target_share * hidden, hidden)
            hidden_BH = np.sort(rng.permuted(hidden_BH, axis=1)[:, :targets])
        return Masks(context_BK=context_BK, targets_BGQ=hidden_BH[:, None])


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomBlocks:
    """`count` target blocks anywhere, and one large context block less what they cover.

    The multi-block masks of I-JEPA (arXiv 2301.08243, section 3), where A-JEPA's curriculum begins. Every
    place of a block inside the grid is equally likely. The context is never less than `floor`, a share of the
    grid: places that leave less are drawn again (with these sizes fewer than one clip in 10,000).
    """

    count: int = 4
    target: BlockSize = BlockSize(area_low=0.15, area_high=0.20)
    context: BlockSize = BlockSize(area_low=0.85, area_high=1.0, aspect_low=1.0, aspect_high=1.0)
    floor: float = 1 / 8

    def __post_init__(self) -> None:
        _check_block_masking(self.count, self.floor)

    def sample(self, rng: np.random.Generator, grid: PatchGrid, *, batch: int) -> Masks:
        size, context_size = self.target.draw_block_shape(rng, grid), self.context.draw_block_shape(rng, grid)

        def draw_layouts(clips: int) -> _MaskLayouts:
            corner_NG = _draw_corners(rng, grid, size, (clips, self.count))
            context_N1 = _draw_corners(rng, grid, context_size, (clips, 1))
            open_NRC = _covered_patches(context_N1, grid, context_size) & ~_covered_patches(
                corner_NG, grid, size
            )
            return _MaskLayouts(corner_NG=corner_NG, open_NRC=open_NRC)

        layouts = _draw_similar_layouts(
            rng, draw_layouts, batch=batch, floor_tokens=_min_context_tokens(self.floor, grid)
        )
        return _masks_of_layouts(rng, grid, layouts, size)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeFrequencyAware:
    """`count` small target blocks; the context loses every time column and frequency row that they touch.

    Where A-JEPA's curriculum ends (arXiv 2311.15830). The paper does not print what its masks remove; this is
    our reading: neither the same moment nor the same band may help. The context is never less than `floor`,
    by default the (1 - 3/4)^2 of the grid that three average targets leave when they share no row and no
    column: places that leave less are drawn again (1 clip in 80), so every layout that is left is equally
    likely.
    """

    count: int = 3
    target: BlockSize = BlockSize(area_low=0.05, area_high=0.075)
    floor: float = 1 / 16

    def __post_init__(self) -> None:
        _check_block_masking(self.count, self.floor)

    def sample(self, rng: np.random.Generator, grid: PatchGrid, *, batch: int) -> Masks:
        size = self.target.draw_block_shape(rng, grid)

        def draw_layouts(clips: int) -> _MaskLayouts:
            corner_NG = _draw_corners(rng, grid, size, (clips, self.count))
            rows_NGR, cols_NGC = _touched_rows_cols(corner_NG, grid, size)
            touched_NR, touched_NC = (np.logical_or.reduce(lines, axis=1) for lines in (rows_NGR, cols_NGC))
            open_NRC = ~touched_NR[:, :, None] & ~touched_NC[:, None, :]
            return _MaskLayouts(corner_NG=corner_NG, open_NRC=open_NRC)

        layouts = _draw_similar_layouts(
            rng, draw_layouts, batch=batch, floor_tokens=_min_context_tokens(self.floor, grid)
        )
        return _masks_of_layouts(rng, grid, layouts, size)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeSpans:
    """`count` whole stretches of time, every band of them: sound must be carried across a gap.

    A span covers a share of the columns uniform in [share_low, share_high], drawn once per call. Spans never
    overlap, so the context, all the rest, is equally large in every clip; spans may touch, and every way of
    placing them is equally likely.
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
        width = _clamp_patches(rng.uniform(self.share_low, self.share_high) * grid.cols, grid.cols)
        if self.count * width >= grid.cols:
            raise RunError(
                f"masks: {self.count} spans of {width} of {grid.cols} columns leave no context; lower the number "
                "of spans or their share"
            )
        slots = grid.cols - self.count * (width - 1)  # a span shrunk to one column: then none can overlap
        slot_BG = np.sort(rng.random((batch, slots)).argpartition(self.count - 1, axis=1)[:, : self.count])
        first_BG = (slot_BG + np.arange(self.count) * (width - 1)) * grid.rows
        targets_BGQ = first_BG[:, :, None] + np.arange(width * grid.rows)  # tokens are time-major
        open_BP = np.ones((batch, grid.tokens), bool)
        np.put_along_axis(open_BP, targets_BGQ.reshape(batch, -1), False, axis=1)
        return Masks(context_BK=open_BP.nonzero()[1].reshape(batch, -1), targets_BGQ=targets_BGQ)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _MaskLayouts:
    """Where the targets of N clips begin (the token of their first corner), and what the context may use."""

    corner_NG: np.ndarray
    open_NRC: np.ndarray

    def free_tokens_N(self) -> np.ndarray:
        return np.count_nonzero(self.open_NRC, axis=(1, 2))

    def select_clips(self, chosen_N: np.ndarray) -> "_MaskLayouts":
        return _MaskLayouts(corner_NG=self.corner_NG[chosen_N], open_NRC=self.open_NRC[chosen_N])

    def concatenate(self, more: "_MaskLayouts") -> "_MaskLayouts":
        corner_NG = np.concatenate((self.corner_NG, more.corner_NG))
        return _MaskLayouts(corner_NG=corner_NG, open_NRC=np.concatenate((self.open_NRC, more.open_NRC)))


LayoutSampler = Callable[[int], _MaskLayouts]


def _draw_similar_layouts(
    rng: np.random.Generator, draw_layouts: LayoutSampler, *, batch: int, floor_tokens: int
) -> _MaskLayouts:
    """Independent legal layouts for a batch, of which every one leaves about as much context as the others.

    The clips of a batch need equally many context tokens. What is free in the worst case (context block less
    four targets side by side) is 22 % of the grid, the least of 64 clips 30 %, the average 45 %. So we draw
    STRATA times as many layouts as clips, sort them by what they leave, and keep one run of neighbours: 43 %.
    As each run is equally likely, so is each layout, whatever it leaves: the law of any one clip's layout is
    exactly that of `draw`.
    """
    layouts = _draw_legal_layouts(draw_layouts, wanted=LAYOUT_STRATA * batch, floor_tokens=floor_tokens)
    by_room_N = layouts.free_tokens_N().argsort(kind="stable")
    stratum_B = by_room_N.reshape(LAYOUT_STRATA, batch)[rng.integers(LAYOUT_STRATA)]
    return layouts.select_clips(rng.permutation(stratum_B))


def _draw_legal_layouts(draw_layouts: LayoutSampler, *, wanted: int, floor_tokens: int) -> _MaskLayouts:
    """The first `wanted` layouts that leave the floor free; RunError where such layouts are too rare."""
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
    rng: np.random.Generator, grid: PatchGrid, layouts: _MaskLayouts, size: tuple[int, int]
) -> Masks:
    """Targets as tokens, and as context the count that every clip can fill, the surplus dropped at random."""
    count = int(layouts.free_tokens_N().min())
    open_BP = layouts.open_NRC.transpose(0, 2, 1).reshape(-1, grid.tokens)
    lottery_BP = np.where(open_BP, rng.random(open_BP.shape), np.inf)
    context_BK = np.sort(lottery_BP.argpartition(count - 1, axis=1)[:, :count])
    within_CR = np.arange(size[1])[:, None] * grid.rows + np.arange(size[0])
    return Masks(context_BK=context_BK, targets_BGQ=layouts.corner_NG[:, :, None] + within_CR.ravel())


def _draw_corners(
    rng: np.random.Generator, grid: PatchGrid, size: tuple[int, int], shape: tuple[int, int]
) -> np.ndarray:
    """First tokens of blocks: every place in the grid is equally likely, last row and column included."""
    row = rng.integers(grid.rows - size[0] + 1, size=shape)
    col = rng.integers(grid.cols - size[1] + 1, size=shape)
    return col * grid.rows + row


def _touched_rows_cols(
    corner_NG: np.ndarray, grid: PatchGrid, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The frequency rows (bool NGR) and the time columns (bool NGC) that each block touches."""
    col, row = (first[:, :, None] for first in np.divmod(corner_NG, grid.rows))
    rows, cols = np.arange(grid.rows), np.arange(grid.cols)
    return (rows >= row) & (rows < row + size[0]), (cols >= col) & (cols < col + size[1])


def _covered_patches(corner_NG: np.ndarray, grid: PatchGrid, size: tuple[int, int]) -> np.ndarray:
    """The patches that lie in at least one of a clip's blocks, as bool [clip, row, column]."""
    rows_NGR, cols_NGC = _touched_rows_cols(corner_NG, grid, size)
    return (rows_NGR[:, :, :, None] & cols_NGC[:, :, None, :]).any(axis=1)  # time innermost: 3 times as fast


def _clamp_patches(patches: float, limit: int) -> int:
    return min(limit, max(1, round(patches)))


def _min_context_tokens(floor: float, grid: PatchGrid) -> int:
    return max(1, math.ceil(round(floor * grid.tokens, 6)))  # 7 % of 100 is 7, not 8


def _check_block_masking(count: int, floor: float) -> None:
    if count < 1 or not 0 <= floor < 1:
        raise ValueError(f"masks need at least one target and a floor in [0, 1), got {count} and {floor}")


def curriculum_share(step: int, *, steps: int, first: float = 0.01) -> float:
    """How often the later masking is drawn: `f(s) = min(1, sqrt(s (1 - c0^2) / S + c0^2))`, c0 = `first`.

    A-JEPA (arXiv 2311.15830). It grows fast and early: over a run two steps in three are the later masking.
    """
    return min(1.0, math.sqrt(step * (1 - first**2) / steps + first**2))


class MaskPlan(Protocol):
    """Which masking a step uses. `rng` is the generator of that step; the same one then draws the masks."""

    def mask_maker_at(self, step: int, rng: np.random.Generator) -> MaskMaker: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """The same masking at every step; draws nothing from the generator."""

    masking: MaskMaker

    def mask_maker_at(self, step: int, rng: np.random.Generator) -> MaskMaker:
        return self.masking


@dataclass(frozen=True, kw_only=True, slots=True)
class Curriculum:
    """From one masking to another: at step `s` the later one with probability `f(s)`.

    `f` is `schedules.curriculum_share`, `steps` the length of the whole run.
    """

    earlier: MaskMaker
    later: MaskMaker
    steps: int
    first_share: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.first_share <= 1:
            raise ValueError(f"a curriculum needs steps >= 1 and a first share in [0, 1], got {self}")

    def mask_maker_at(self, step: int, rng: np.random.Generator) -> MaskMaker:
        share = curriculum_share(step, steps=self.steps, first=self.first_share)
        return self.later if rng.random() < share else self.earlier


def a_jepa_curriculum(steps: int) -> Curriculum:
    """Random blocks that give way to time-frequency aware masks (arXiv 2311.15830)."""
    return Curriculum(earlier=RandomBlocks(), later=TimeFrequencyAware(), steps=steps)


def inverse_curriculum(steps: int) -> Curriculum:
    """The same with the two exchanged: the paper's ablation."""
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
    """The plan of that name for a run of `steps`; RunError names the nearest and all there are."""
    if name in MASK_PLANS:
        return MASK_PLANS[name](steps)
    nearest = difflib.get_close_matches(name, MASK_PLANS, n=1, cutoff=0.0)[0]
    raise RunError(
        f"masks {name!r} are unknown; did you mean {nearest!r}? There are: {', '.join(MASK_PLANS)}"
    )
