"""A recipe's masks over a clip, from its first step to its last; PNG files."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from ajepa.model.masking import Curriculum, Masks
from ajepa.model.patches import PatchGrid
from ajepa.pretrain.training_set import open_training_store
from ajepa.recipes.pretrain import Pretrain
from pipeline.audio.mel import log_mel
from pipeline.audio.mel_spec import MelSpec, preset_mel_spec
from pipeline.datasets.demo.synthesis import SYNTHESIS_RATE_HZ, crackling_static, siren_tone
from pipeline.errors import RunError
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import train_splits

matplotlib.use("Agg")

HIDDEN_COLOUR = "#14141e"

TARGET_COLOURS = ("#4cc9f0", "#f72585", "#ffd166", "#80ed99")

SHOWN_RUN_SHARES = (0.0, 0.05, 0.25, 0.5, 1.0)  # of the run; a plan that never changes is shown at its first

MAX_MASKED_CLIPS = 32  # of a batch, whose masks are equally large: what is shown is what a step would use


def draw_recipe_masks(recipe: Pretrain, png: Path, store: Path | str | None = None) -> Path:
    """Draw the masks of a recipe over a clip of the store, or without one over a formula's sound."""
    if png.suffix.lower() != ".png":
        raise RunError(f"--png {png}: expected a file name that ends in .png")
    if store is None:
        spec = preset_mel_spec(recipe.mel)
        figure = mask_figure(formula_sound_view(spec, recipe), recipe, spec)
    else:
        opened = open_training_store(store, recipe)
        mean, std = opened.mean_and_std(train_splits(opened))
        figure = mask_figure(busiest_stored_view(opened, recipe, mean, std), recipe, opened.spec)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120)
    return png


def mask_figure(mel_TF: np.ndarray, recipe: Pretrain, spec: MelSpec, *, draws: int = 3) -> Figure:
    """One clip, and what the context encoder sees of it at points of the run, `draws` masks each."""
    grid = recipe.model.encoder.grid
    points = SHOWN_RUN_SHARES if isinstance(recipe.masks, Curriculum) else SHOWN_RUN_SHARES[:1]
    figure = Figure(figsize=(3.0 * (draws + 1) + 0.6, 1.9 * len(points) + 0.6), layout="constrained")
    axes_RC = figure.subplots(len(points), draws + 1, squeeze=False)
    for axes_C, point in zip(axes_RC, points, strict=True):
        step = min(recipe.steps - 1, round(point * recipe.steps))
        show_spectrogram(axes_C[0], mel_TF)
        axes_C[0].set_title("the clip", fontsize=8)
        axes_C[0].set_ylabel(f"step {step:,}" if len(points) > 1 else "every step", fontsize=9)
        for draw, axes in enumerate(axes_C[1:]):
            rng = np.random.default_rng([recipe.seed, step, draw])
            maker = recipe.masks.mask_maker_at(step, rng)
            drawn = maker.sample(rng, grid, batch=min(MAX_MASKED_CLIPS, recipe.clips_per_step))
            show_spectrogram(axes, mel_TF, mask_colours_RC4(drawn, grid))
            seen = drawn.context_BK.shape[1] / grid.tokens
            axes.set_title(f"{type(maker).__name__}, context {seen:.0%}", fontsize=8)
    seconds = recipe.view_frames * spec.hop_samples / spec.sample_rate_hz
    figure.suptitle(
        f"{recipe.name}: {seconds:.2f} s of a clip, low bands below. Visible: the context; colours: targets;"
        " dark: hidden from both",
        fontsize=10,
    )
    return figure


def busiest_stored_view(store: FeatureStore, recipe: Pretrain, mean: float, std: float) -> np.ndarray:
    """The first view, normalised `[T, F]`, of the train clip among 32 in which most goes on."""
    rows_N = store.good_rows(train_splits(store))
    full_N = rows_N[store.n_frames_N[rows_N] == store.n_frames_N[rows_N].max()]
    frames = min(recipe.view_frames, store.frames)
    mel_BTF = store.offset + store.scale * store.read(full_N[:32])[:, :frames].astype(np.float32)
    mel_BTF = (mel_BTF - mean) / std
    busiest = mel_BTF.std(axis=1).mean(axis=1).argmax()
    return np.pad(mel_BTF[busiest], ((0, recipe.view_frames - frames), (0, 0)))


def formula_sound_view(spec: MelSpec, recipe: Pretrain) -> np.ndarray:
    """A siren through crackle in the recipe's features, normalised `[T, F]`; always the same."""
    rng, samples = np.random.default_rng(2), round(spec.clip_seconds * SYNTHESIS_RATE_HZ)
    wave_S = 0.1 * siren_tone(rng, samples) + 0.3 * crackling_static(rng, samples)
    at_N = np.arange(round(spec.clip_seconds * spec.sample_rate_hz)) * (
        SYNTHESIS_RATE_HZ / spec.sample_rate_hz
    )
    wave_S = np.interp(at_N, np.arange(samples), wave_S).astype(np.float32)
    mel_TF = log_mel(torch.from_numpy(wave_S)[None], spec)[0].numpy()[: recipe.view_frames]
    mel_TF = (mel_TF - mel_TF.mean()) / mel_TF.std()
    return np.pad(mel_TF, ((0, recipe.view_frames - len(mel_TF)), (0, 0)))


def show_spectrogram(axes: Axes, mel_TF: np.ndarray, overlay_RC4: np.ndarray | None = None) -> None:
    """A spectrogram, low bands below, with patch colours over it."""
    extent = (0, mel_TF.shape[0], 0, mel_TF.shape[1])
    axes.imshow(mel_TF.T, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=-2.5, vmax=2.5)
    if overlay_RC4 is not None:
        axes.imshow(overlay_RC4, origin="lower", aspect="auto", extent=extent, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def mask_colours_RC4(masks: Masks, grid: PatchGrid) -> np.ndarray:
    """Colours `[row, col, rgba]` of a batch's first clip's patches: context clear, targets tinted, the rest dark."""
    colour_P4 = np.tile(to_rgba(HIDDEN_COLOUR, 0.92), (grid.tokens, 1))
    for group, targets_Q in enumerate(masks.targets_BGQ[0]):
        colour_P4[targets_Q] = to_rgba(TARGET_COLOURS[group % len(TARGET_COLOURS)], 0.75)
    colour_P4[masks.context_BK[0]] = 0.0
    return colour_P4.reshape(grid.cols, grid.rows, 4).swapaxes(0, 1)  # tokens count rows first
