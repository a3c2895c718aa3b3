"""Spectrograms as pictures, with axes in seconds and Hz; the choice of clips of a store to show, and their titles."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from pipeline.audio.mel_scales import band_centres_hz
from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import StoreError
from pipeline.files import replacing_file
from pipeline.labels.ontology import flatten_label_lists
from pipeline.report.html import COLOUR_MAP
from pipeline.store.feature_store import FeatureStore
from pipeline.store.summary import read_label_table

OCTAVE_TICKS_HZ = tuple(31.25 * 2**octave for octave in range(11))


def read_log_mel(store: FeatureStore, rows_B: np.ndarray) -> np.ndarray:
    """Log-mel of some good rows, natural logarithm of power, float32 `[B, T, F]`."""
    return store.to_log_mel(store.read(rows_B))


def colour_range(mel_BTF: np.ndarray) -> tuple[float, float]:
    """The values that the darkest and the brightest colour stand for, at least 1 nat apart."""
    # The quantiles leave out digital silence and single loud values.
    low, high = np.quantile(mel_BTF, [0.02, 0.999])
    return float(low), float(max(high, low + 1))


def time_axis_seconds(spec: MelSpec) -> float:
    """The length of the time axis: that of a full clip, or of its frames if these reach further."""
    return max(spec.clip_seconds, spec.frames * spec.hop_seconds)


def mel_band_ticks(spec: MelSpec, *, min_gap: float = 0.07) -> list[tuple[float, str]]:
    """Ticks at octaves of 1 kHz as (place, label), at least `min_gap` of the height apart.

    Band i extends from place i to i + 1.
    """
    centres_hz = band_centres_hz(spec)
    middle_F = np.arange(len(centres_hz)) + 0.5

    # From the top down: octaves are close together at the bottom, where some are left out.
    ticks: list[tuple[float, str]] = []
    for hz in reversed(OCTAVE_TICKS_HZ):
        place = float(np.interp(hz, centres_hz, middle_F))
        has_room = not ticks or ticks[-1][0] - place >= min_gap * len(centres_hz)
        if centres_hz[0] <= hz <= centres_hz[-1] and has_room:
            label = f"{hz:g}"
            if hz >= 1000:
                label = f"{hz / 1000:g}k"
            ticks.append((place, label))
    return ticks[::-1]


def pick_varied_rows(
    store: FeatureStore, labels: pl.DataFrame, clip_count: int, *, seed: int = 0
) -> np.ndarray:
    """Rows of good clips from as many classes as possible, ascending; StoreError if no clip is good."""
    good_N = store.good_rows()
    if not len(good_N):
        raise StoreError(
            f"{store.location}: no good clip to show that no list excludes; see why: "
            f"ajepa-data report {store.location} --html report.html"
        )
    rng = np.random.default_rng(seed)

    # Row and class of every label of a good row (axis L).
    is_good_N = np.zeros(store.header.layout.clips, bool)
    is_good_N[good_N] = True
    row_L, classes = flatten_label_lists(labels["raw"])
    is_good_L = is_good_N[row_L]
    class_L = classes.to_numpy(zero_copy_only=False)[is_good_L]
    row_L = row_L[is_good_L]

    # In random order, a row of every class that no chosen row has yet.
    chosen_rows: list[int] = []
    shown_classes: set[int] = set()
    for class_index in rng.permutation(np.unique(class_L)).tolist():
        if class_index in shown_classes:
            continue
        if len(chosen_rows) == clip_count:
            break
        chosen_rows.append(int(rng.choice(row_L[class_L == class_index])))
        shown_classes |= set(class_L[row_L == chosen_rows[-1]].tolist())

    # If there are fewer classes than clips to show, add any other rows.
    left_N = np.setdiff1d(good_N, chosen_rows)
    more_N = rng.choice(left_N, min(clip_count - len(chosen_rows), len(left_N)), replace=False)
    return np.sort(np.concatenate([np.array(chosen_rows, np.int64), more_N]))


def label_title(store: FeatureStore, labels: pl.DataFrame, row: int, *, max_letters: int = 48) -> str:
    """The names of a row's raw labels, cut to `max_letters`."""
    names = ", ".join(store.classes.names[index] for index in labels["raw"][row]) or "no label"
    if len(names) <= max_letters:
        return names
    return names[: max_letters - 1] + "…"


def draw_contact_sheet(store: FeatureStore, path: Path, *, clip_count: int = 12) -> None:
    """Write a PNG of some good clips' spectrograms, three in a row, with their ids and labels."""
    labels = read_label_table(store)[0]
    rows_B = pick_varied_rows(store, labels, clip_count)
    columns = min(3, len(rows_B))
    draw_spectrograms(store, labels, rows_B, path, columns=columns, clip_inches=(4.6, 2.3))


def draw_clip_rows(store: FeatureStore, rows: Sequence[int], path: Path) -> None:
    """Write a PNG of some good rows, one below the other."""
    labels = read_label_table(store)[0]
    draw_spectrograms(store, labels, np.array(rows), path, columns=1, clip_inches=(10.0, 3.6))


def draw_spectrograms(
    store: FeatureStore,
    labels: pl.DataFrame,
    rows_B: np.ndarray,
    path: Path,
    *,
    columns: int,
    clip_inches: tuple[float, float],
) -> None:
    """Write a PNG of good rows in a grid, all on one colour scale; `clip_inches` is the size of one (width, height)."""
    mel_BTF = read_log_mel(store, rows_B)
    value_range = colour_range(mel_BTF)
    lines = -(-len(rows_B) // columns)
    figure = Figure(figsize=(clip_inches[0] * columns, clip_inches[1] * lines), layout="constrained")
    clip_ids = store.manifest_columns("clip_id")["clip_id"][rows_B]
    for place, (row, mel_TF) in enumerate(zip(rows_B.tolist(), mel_BTF, strict=True)):
        axes = figure.add_subplot(lines, columns, place + 1)
        image = plot_spectrogram(axes, store, row, mel_TF, value_range)

        # matplotlib would read the text between two dollar signs as a formula.
        title = f"{clip_ids[place]}: {label_title(store, labels, row)}"
        axes.set_title(title.replace("$", r"\$"), fontsize=8)

        # Axes are labelled at the left and at the bottom of the grid.
        if place % columns == 0:
            axes.set_ylabel("Hz", fontsize=8)
        if place + columns >= len(rows_B):
            axes.set_xlabel("seconds", fontsize=8)

    figure.colorbar(image, ax=figure.axes, shrink=0.8, label="log mel power, nat", pad=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as scratch:
        figure.savefig(scratch, dpi=110, format="png")


def plot_spectrogram(
    axes: Axes, store: FeatureStore, row: int, mel_TF: np.ndarray, value_range: tuple[float, float]
) -> AxesImage:
    """Draw one row into `axes` and return its image; frames beyond the clip's end are dimmed behind a line."""
    # The picture: band i extends from i to i + 1, a frame fills the time to the next frame.
    stored_seconds = store.frames * store.spec.hop_seconds
    valid_seconds = int(store.n_frames_N[row]) * store.spec.hop_seconds
    low, high = value_range
    image = axes.imshow(
        mel_TF.T,
        origin="lower",
        aspect="auto",
        extent=(0, stored_seconds, 0, store.bands),
        vmin=low,
        vmax=high,
        cmap=COLOUR_MAP,
    )

    # The end of a shorter clip.
    if valid_seconds < stored_seconds:
        axes.axvspan(valid_seconds, stored_seconds, color="white", alpha=0.35, linewidth=0)
        axes.axvline(valid_seconds, color="white", linewidth=1.5)

    # Axes in seconds and Hz.
    axes.set_xlim(0, time_axis_seconds(store.spec))
    places, labels = zip(*mel_band_ticks(store.spec), strict=True)
    axes.set_yticks(places, labels)
    axes.tick_params(labelsize=7)
    return image
