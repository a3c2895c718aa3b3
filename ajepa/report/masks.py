"""Pictures of a recipe's masks over a clip, from the first step of the run to the last."""

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

# Shares of the run at which masks are shown; masks that never change are shown only at the first.
SHOWN_RUN_SHARES = (0.0, 0.05, 0.25, 0.5, 1.0)

MAX_MASKED_CLIPS = 32  # largest batch for which masks are drawn; a step of the run draws them for a batch too

COMPARED_CLIPS = 32  # number of clips of a store from which the picture's clip is chosen

NORMALISED_RANGE = (-2.5, 2.5)  # values of normalised log-mel with the darkest and the brightest colour

PNG_DPI = 120


def draw_recipe_masks(recipe: Pretrain, png: Path, store: Path | str | None = None) -> Path:
    """Draw a recipe's masks over a clip of the store, or, without a store, over a synthetic sound; returns `png`."""
    if png.suffix.lower() != ".png":
        raise RunError(f"--png {png}: expected a file name that ends in .png")
    if store is None:
        spec = preset_mel_spec(recipe.mel)
        mel_TF = formula_sound_view(spec, recipe)
    else:
        training_store = open_training_store(store, recipe)
        spec = training_store.spec
        mean, std = training_store.mean_and_std(train_splits(training_store))
        mel_TF = busiest_stored_view(training_store, recipe, mean, std)

    figure = mask_figure(mel_TF, recipe, spec)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=PNG_DPI)
    return png


def mask_figure(mel_TF: np.ndarray, recipe: Pretrain, spec: MelSpec, *, draws: int = 3) -> Figure:
    """Return a figure of a clip and of the context encoder's part of it: `draws` masks at each point of the run."""
    grid = recipe.sound_grid
    mel_TF = mel_TF[: grid.frames]
    batch = min(MAX_MASKED_CLIPS, recipe.clips_per_step)
    run_shares = SHOWN_RUN_SHARES if isinstance(recipe.masks, Curriculum) else SHOWN_RUN_SHARES[:1]

    # A row for each point of the run: the clip, then its masks.
    size_inches = (3.0 * (draws + 1) + 0.6, 1.9 * len(run_shares) + 0.6)
    figure = Figure(figsize=size_inches, layout="constrained")
    axes_RC = figure.subplots(len(run_shares), draws + 1, squeeze=False)
    for axes_C, run_share in zip(axes_RC, run_shares, strict=True):
        step = min(recipe.steps - 1, round(run_share * recipe.steps))
        show_spectrogram(axes_C[0], mel_TF)
        axes_C[0].set_title("the clip", fontsize=8)
        axes_C[0].set_ylabel(f"step {step:,}" if len(run_shares) > 1 else "every step", fontsize=9)

        # Several draws, because the masks of one step differ from clip to clip.
        for draw, axes in enumerate(axes_C[1:]):
            rng = np.random.default_rng([recipe.seed, step, draw])
            mask_maker = recipe.masks.mask_maker_at(step, rng)
            masks = mask_maker.sample(rng, grid, batch=batch)
            show_spectrogram(axes, mel_TF, mask_colours_RC4(masks, grid))
            context_share = masks.context_BK.shape[1] / grid.tokens
            axes.set_title(f"{type(mask_maker).__name__}, context {context_share:.0%}", fontsize=8)

    seconds = recipe.view_frames * spec.hop_samples / spec.sample_rate_hz
    figure.suptitle(
        f"{recipe.name}: {seconds:.2f} s of a clip, low bands below. "
        "Visible: the context; colours: targets; dark: hidden from both",
        fontsize=10,
    )
    return figure


def busiest_stored_view(store: FeatureStore, recipe: Pretrain, mean: float, std: float) -> np.ndarray:
    """Return the normalised view `[T, F]`, from frame 0, of the clip whose bands vary most over time.

    The clip is one of COMPARED_CLIPS train clips of full length.
    """
    # Only clips of full length, so that no part of the picture is padding.
    rows_N = store.good_rows(train_splits(store))
    full_N = rows_N[store.n_frames_N[rows_N] == store.n_frames_N[rows_N].max()]
    frames = min(recipe.view_frames, store.frames)
    mel_BTF = store.to_log_mel(store.read(full_N[:COMPARED_CLIPS])[:, :frames])
    mel_BTF = (mel_BTF - mean) / std

    # The clip with the largest deviation over time, as the mean over bands.
    busiest = mel_BTF.std(axis=1).mean(axis=1).argmax()
    return pad_to_frames(mel_BTF[busiest], recipe.view_frames)


def formula_sound_view(spec: MelSpec, recipe: Pretrain) -> np.ndarray:
    """Return a siren with crackle in the recipe's features, normalised `[T, F]`; it is always the same sound."""
    rng = np.random.default_rng(2)
    samples = round(spec.clip_seconds * SYNTHESIS_RATE_HZ)
    wave_S = 0.1 * siren_tone(rng, samples) + 0.3 * crackling_static(rng, samples)

    # Resample to the rate of the spec by interpolation, which is good enough for a picture.
    spec_samples = round(spec.clip_seconds * spec.sample_rate_hz)
    position_N = np.arange(spec_samples) * (SYNTHESIS_RATE_HZ / spec.sample_rate_hz)
    wave_S = np.interp(position_N, np.arange(samples), wave_S).astype(np.float32)

    mel_TF = log_mel(torch.from_numpy(wave_S)[None], spec)[0].numpy()[: recipe.view_frames]
    mel_TF = (mel_TF - mel_TF.mean()) / mel_TF.std()
    return pad_to_frames(mel_TF, recipe.view_frames)


def pad_to_frames(mel_TF: np.ndarray, frames: int) -> np.ndarray:
    """Return the spectrogram, padded with frames of 0 at its end to `frames` frames."""
    return np.pad(mel_TF, ((0, frames - len(mel_TF)), (0, 0)))


def show_spectrogram(axes: Axes, mel_TF: np.ndarray, overlay_RC4: np.ndarray | None = None) -> None:
    """Draw a normalised spectrogram, low bands below, and the patch colours of `overlay_RC4` over it."""
    low, high = NORMALISED_RANGE
    extent = (0, mel_TF.shape[0], 0, mel_TF.shape[1])
    axes.imshow(mel_TF.T, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=low, vmax=high)
    if overlay_RC4 is not None:
        axes.imshow(overlay_RC4, origin="lower", aspect="auto", extent=extent, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def mask_colours_RC4(masks: Masks, grid: PatchGrid) -> np.ndarray:
    """Return colours `[row, col, rgba]` of the first clip's patches: context clear, targets tinted, the rest dark."""
    # Every patch is dark first; targets and context are coloured below.
    colour_P4 = np.tile(to_rgba(HIDDEN_COLOUR, 0.92), (grid.tokens, 1))
    for group, targets_Q in enumerate(masks.targets_BGQ[0]):
        colour_P4[targets_Q] = to_rgba(TARGET_COLOURS[group % len(TARGET_COLOURS)], 0.75)
    colour_P4[masks.context_BK[0]] = 0.0

    # Tokens are numbered column by column, and upwards within a column.
    return colour_P4.reshape(grid.cols, grid.rows, 4).swapaxes(0, 1)
