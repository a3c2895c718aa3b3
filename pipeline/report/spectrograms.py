"""Spectrograms as pictures, with axes in seconds and Hz."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from pipeline.audio.mel import mel_filters_NF
from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import StoreError
from pipeline.files import replacing_file
from pipeline.labels.ontology import flatten_label_lists
from pipeline.store.feature_store import FeatureStore
from pipeline.store.summary import read_label_table

FINE_FFT_SAMPLES = 2**16  # an FFT whose bins lie under 1 Hz apart: the filters' peaks can be read off

OCTAVE_TICKS_HZ = tuple(31.25 * 2**octave for octave in range(11))

COLOUR_MAP = "magma"


@lru_cache(maxsize=32)
def band_centres_hz(spec: MelSpec) -> tuple[float, ...]:
    """Where each band's filter peaks, to half a Hz; read off the filters themselves, on a finer grid."""
    fine = replace(spec, fft_samples=max(FINE_FFT_SAMPLES, spec.fft_samples))
    peaks_F = mel_filters_NF(fine).argmax(0)
    return tuple((peaks_F * (spec.sample_rate_hz / fine.fft_samples)).tolist())


def mel_band_ticks(spec: MelSpec, *, min_gap: float = 0.07) -> list[tuple[float, str]]:
    """Octaves of 1 kHz as (place, label), at least `gap` of the height apart; band i lies from i to i + 1."""
    centres_hz = band_centres_hz(spec)
    middles_F = np.arange(len(centres_hz)) + 0.5
    ticks: list[tuple[float, str]] = []
    for hz in reversed(OCTAVE_TICKS_HZ):
        place = float(np.interp(hz, centres_hz, middles_F))
        free = not ticks or ticks[-1][0] - place >= min_gap * len(centres_hz)
        if centres_hz[0] <= hz <= centres_hz[-1] and free:
            ticks.append((place, f"{hz / 1000:g}k" if hz >= 1000 else f"{hz:g}"))
    return ticks[::-1]


def read_log_mel(store: FeatureStore, rows_B: np.ndarray) -> np.ndarray:
    """Natural log of mel power of some good rows, float32 `[B, T, F]`."""
    return store.offset + store.scale * store.read(rows_B).astype(np.float32)


def colour_range(mel_BTF: np.ndarray) -> tuple[float, float]:
    """The values that the darkest and the brightest colour stand for."""
    low, high = np.quantile(mel_BTF, [0.02, 0.999])
    return float(low), float(max(high, low + 1))  # a constant has colours too


def frame_step_seconds(spec: MelSpec) -> float:
    """From one frame to the next."""
    return spec.hop_samples / spec.sample_rate_hz


def time_axis_seconds(spec: MelSpec) -> float:
    """A full clip: its last window ends a little before."""
    return max(spec.clip_seconds, spec.frames * frame_step_seconds(spec))


def pick_varied_rows(
    store: FeatureStore, labels: pl.DataFrame, clip_count: int, *, seed: int = 0
) -> np.ndarray:
    """Good rows from classes as different as there are, ascending; raises StoreError where none is good."""
    good_N, rng = store.good_rows(), np.random.default_rng(seed)
    if not len(good_N):
        raise StoreError(
            f"{store.location}: no good clip to show that no list excludes; see why: "
            f"ajepa-data report {store.location} --html report.html"
        )
    good_M = np.zeros(store.manifest.height, bool)
    good_M[good_N] = True
    rows_N, classes = flatten_label_lists(labels["raw"])
    class_N = classes.to_numpy(zero_copy_only=False)[good_M[rows_N]]
    rows_N, chosen, shown = rows_N[good_M[rows_N]], list[int](), set[int]()
    for number in rng.permutation(np.unique(class_N)).tolist():
        if number in shown:
            continue
        if len(chosen) == clip_count:
            break
        chosen.append(int(rng.choice(rows_N[class_N == number])))
        shown |= set(class_N[rows_N == chosen[-1]].tolist())
    left_N = np.setdiff1d(good_N, chosen)
    more_N = rng.choice(left_N, min(clip_count - len(chosen), len(left_N)), replace=False)
    return np.sort(np.concatenate([np.array(chosen, np.int64), more_N]))


def label_title(store: FeatureStore, labels: pl.DataFrame, row: int, *, max_letters: int = 48) -> str:
    """The names of a row's raw labels."""
    names = ", ".join(store.classes.names[index] for index in labels["raw"][row]) or "no label"
    return names if len(names) <= max_letters else names[: max_letters - 1] + "…"


def draw_contact_sheet(store: FeatureStore, path: Path, *, clip_count: int = 12) -> None:
    """A PNG of some good clips' spectrograms with their ids and labels."""
    labels = read_label_table(store)[0]
    rows_B = pick_varied_rows(store, labels, clip_count)
    across = min(3, len(rows_B))
    draw_spectrograms(store, labels, rows_B, path, columns=across, clip_inches=(4.6, 2.3))


def draw_clip_rows(store: FeatureStore, rows: Sequence[int], path: Path) -> None:
    """A PNG of some good rows, one below the other."""
    draw_spectrograms(
        store, read_label_table(store)[0], np.array(rows), path, columns=1, clip_inches=(10.0, 3.6)
    )


def draw_spectrograms(
    store: FeatureStore,
    labels: pl.DataFrame,
    rows_B: np.ndarray,
    path: Path,
    *,
    columns: int,
    clip_inches: tuple[float, float],
) -> None:
    """One colour scale for all; a line marks where a clip's own frames end."""
    mel_BTF = read_log_mel(store, rows_B)
    down, span = -(-len(rows_B) // columns), colour_range(mel_BTF)
    figure = Figure(figsize=(clip_inches[0] * columns, clip_inches[1] * down), layout="constrained")
    for place, (row, mel_TF) in enumerate(zip(rows_B.tolist(), mel_BTF, strict=True)):
        axes = figure.add_subplot(down, columns, place + 1)
        image = plot_spectrogram(axes, store, row, mel_TF, span)
        named = f"{store.manifest['clip_id'][row]}: {label_title(store, labels, row)}"
        axes.set_title(named.replace("$", r"\$"), fontsize=8)  # no formula
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
    """One row: what is not its own is dimmed."""
    whole, valid = (int(n) * frame_step_seconds(store.spec) for n in (store.frames, store.n_frames_N[row]))
    low, high = value_range
    image = axes.imshow(
        mel_TF.T,
        origin="lower",
        aspect="auto",
        extent=(0, whole, 0, store.bands),
        vmin=low,
        vmax=high,
        cmap=COLOUR_MAP,
    )
    if valid < whole:
        axes.axvspan(valid, whole, color="white", alpha=0.35, linewidth=0)
        axes.axvline(valid, color="white", linewidth=1.5)
    axes.set_xlim(0, time_axis_seconds(store.spec))
    places, names = zip(*mel_band_ticks(store.spec), strict=True)
    axes.set_yticks(places, names)
    axes.tick_params(labelsize=7)
    return image
