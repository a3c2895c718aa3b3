"""A store, seen: coverage, reasons, pictures."""

from pathlib import Path

import matplotlib
import numpy as np
import polars as pl
from matplotlib.figure import Figure

from pipeline.errors import StoreError
from pipeline.files import replacing
from pipeline.manifest import REASONS
from pipeline.store import FeatureStore

matplotlib.use("Agg")


def coverage(manifest: pl.DataFrame) -> str:
    """Per split: clips listed, good, odd but used, and failed by reason, as a table in text."""
    splits = manifest["split"].unique(maintain_order=True).to_list()
    good = pl.col("status") == "good"
    rows = [("clips listed", manifest), ("good", manifest.filter(good))]
    flags = manifest.filter(good)["flags"].explode().drop_nulls().unique().sort()
    rows += [(f"  {flag}", manifest.filter(good & pl.col("flags").list.contains(flag))) for flag in flags]
    rows += [("failed", manifest.filter(pl.col("status") == "failed"))]
    rows += [(f"  {reason}", manifest.filter(pl.col("reason") == reason)) for reason in REASONS]
    shown = [(name, frame) for name, frame in rows if frame.height or not name.startswith(" ")]
    lines = ["".join(["split".ljust(22), *(split.rjust(18) for split in splits)])]
    for name, frame in shown:
        counts = [frame.filter(pl.col("split") == split).height for split in splits]
        lines.append("".join([name.ljust(22), *(f"{count:>18,}" for count in counts)]))
    return "\n".join(lines)


def contact_sheet(store: FeatureStore, path: Path, *, clips: int = 12, seed: int = 0) -> None:
    """A PNG of some good clips' spectrograms with their ids and labels, axes in seconds and mel bands."""
    good_N = store.good_rows()
    if not len(good_N):
        raise StoreError(f"{store.path}: no good clip to show")
    rows_B = np.sort(np.random.default_rng(seed).choice(good_N, min(clips, len(good_N)), replace=False))
    mel_BTF = store.offset + store.scale * store.read(rows_B).astype(np.float32)
    across = min(3, len(rows_B))
    down = -(-len(rows_B) // across)
    figure = Figure(figsize=(4.6 * across, 2.3 * down), layout="constrained")
    low, high = np.quantile(mel_BTF, [0.02, 0.999])
    for place, (row, mel_TF) in enumerate(zip(rows_B, mel_BTF, strict=True)):
        axes = figure.add_subplot(down, across, place + 1)
        seconds = store.frames * store.spec.hop_samples / store.spec.sample_rate_hz
        image = axes.imshow(
            mel_TF.T,
            origin="lower",
            aspect="auto",
            extent=(0, seconds, 0, store.bands),
            vmin=low,
            vmax=high,
            cmap="magma",
        )
        axes.set_title(_title(store, int(row)), fontsize=8)
        axes.tick_params(labelsize=7)
        if place % across == 0:
            axes.set_ylabel("mel band", fontsize=8)
        if place + across >= len(rows_B):
            axes.set_xlabel("seconds", fontsize=8)
    figure.colorbar(image, ax=figure.axes, shrink=0.6, label="log mel power, nat")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=110, format="png")


def _title(store: FeatureStore, row: int) -> str:
    labels_C = store.labels_BC(np.array([row]))[0]
    names = ", ".join(store.classes.names[index] for index in np.flatnonzero(labels_C))
    return f"{store.manifest['clip_id'][row]}: {names[:48] or 'no label'}"
