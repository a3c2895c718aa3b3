"""Propagating the labels of all of AudioSet, beside the authors' package on the same rows.

    just bench labels [--rows 2084320] [--share 8192] [--counts labelset_counts.csv.gz]

The rows are AudioSet's own label sets, in random order, where `--counts` tells how many clips have each (columns
`label_indices`, apart by blanks, `unbalanced`, `balanced`, `eval`); else as many drawn with a fixed seed: 1 to 6 of 527
classes, of frequencies that fall as 1 / rank. Ours runs over all rows; the authors' over a share of them, as a dense
tensor in batches, and is scaled up. Theirs is given the dtype and the batch that are fastest here, and the dense
tensors are made before its clock starts. Each line is a process of its own, and its peak of memory the kernel's VmHWM.
"""

import argparse
import csv
import gzip
import multiprocessing as mp
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from bench.machine import machine, memory_mb

ROUNDS = 5

ALL_ROWS = 2_084_320

CLASSES = 527

BATCHES = (4, 16, 64, 256)

TRIALS, TRIAL_ROWS = 3, 512  # of each way to run theirs

TARGET_SECONDS, TARGET_RATIO = 2, 50


class Timed(NamedTuple):
    """Seconds of each round, and the process's peak of memory."""

    seconds: list[float]
    peak_mb: float


def label_sets(rows: int, counts: Path | None) -> pl.Series:
    """The label sets of so many clips, as lists of class indices."""
    rng = np.random.default_rng(0)
    if counts is None:
        weights_C = 1 / np.arange(1, CLASSES + 1)
        kinds = [
            np.sort(rng.choice(CLASSES, size, replace=False, p=weights_C / weights_C.sum())).tolist()
            for size in rng.choice(np.arange(1, 7), 50_000, p=(0.42, 0.33, 0.14, 0.07, 0.03, 0.01))
        ]
        return pl.Series(kinds, dtype=pl.List(pl.UInt16)).gather(rng.integers(len(kinds), size=rows))
    with gzip.open(counts, "rt") as file:
        facts = list(csv.DictReader(file))
    kinds = [[int(index) for index in fact["label_indices"].split()] for fact in facts]
    clips = [sum(int(fact[split]) for split in ("unbalanced", "balanced", "eval")) for fact in facts]
    which_N = rng.permutation(np.repeat(np.arange(len(kinds)), clips))
    return pl.Series(kinds, dtype=pl.List(pl.UInt16)).gather(which_N[:rows])


def timed(work: Callable[[], object]) -> Timed:
    """Wall time, a first round left out."""
    seconds = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return Timed(seconds[1:], memory_mb())


def ours(rows: int, counts: Path | None) -> Timed:
    """Our `propagate` on the whole column."""
    from pipeline.labels.propagation import propagate, rule_relation_CC

    labels, adds_CC = label_sets(rows, counts), rule_relation_CC()
    return timed(lambda: propagate(labels, adds_CC))


def command(path: Path) -> Timed:
    """The whole of `ajepa-data propagate-labels` but the interpreter's start: read, propagate, count, write, flush."""
    from pipeline.labels.label_tables import propagate_inputs

    return timed(lambda: propagate_inputs([path], out=path.with_name("out.parquet")))


def theirs(rows: int, share: int, counts: Path | None) -> tuple[Timed, str]:
    """The authors' `HLP().propagate` on the first `share` rows, and how it was fastest; checks that both agree."""
    import torch
    from hierarchical_label_propagation import HLP

    from pipeline.labels.propagation import propagate, rule_relation_CC

    labels, hlp = label_sets(rows, counts)[:share], HLP()
    row_N = np.repeat(np.arange(share), labels.list.len().to_numpy())
    dense_NC = torch.zeros(share, CLASSES, dtype=torch.bool)
    dense_NC[torch.from_numpy(row_N), torch.from_numpy(labels.explode().to_numpy().astype(np.int64))] = True

    def run(dtype: torch.dtype, batch: int, count: int) -> list[torch.Tensor]:
        return [hlp.propagate(dense_BC) for dense_BC in dense_NC[:count].to(dtype).split(batch)]

    def speed(way: tuple[torch.dtype, int]) -> float:
        took = []
        for _ in range(TRIALS):
            began = time.perf_counter()
            run(*way, TRIAL_ROWS)
            took.append(time.perf_counter() - began)
        return min(took)

    ways = [(dtype, batch) for dtype in (torch.float32, torch.bool) for batch in BATCHES]
    dtype, batch = min(ways, key=speed)
    done_NC = torch.cat(run(dtype, batch, share)).bool().numpy()
    agreed = [np.flatnonzero(row_C).tolist() for row_C in done_NC]
    assert propagate(labels, rule_relation_CC()).to_list() == agreed
    return timed(lambda: run(dtype, batch, share)), f"{str(dtype).removeprefix('torch.')}, batches of {batch}"


def write_inputs(folder: Path, rows: int, counts: Path | None) -> list[Path]:
    """The rows as an official list, of made-up ids, and as a table of indices."""
    from pipeline.labels.ontology import load_class_list

    labels = label_sets(rows, counts)
    ids = (pl.Series("clip_id", range(rows)) + 10**10).cast(pl.String)
    pl.DataFrame([ids, labels.alias("raw")]).write_parquet(folder / "all.parquet")
    mids = pl.Series(load_class_list().mids)
    of_row = pl.DataFrame({"row": range(rows), "mid": labels}).explode("mid")
    joined = of_row.with_columns(mids.gather(of_row["mid"]).alias("mid")).group_by("row", maintain_order=True)
    text = ids + ', 30.000, 40.000, "' + joined.agg(pl.col("mid").str.join(","))["mid"] + '"'
    text.to_frame("# a list").write_csv(folder / "all.csv", quote_style="never")
    return [folder / "all.csv", folder / "all.parquet"]


def alone(work: Callable[[], object]) -> object:
    """In a fresh process, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
        return pool.submit(work).result()


def line(name: str, run: Timed, note: str) -> str:
    """One line of the table."""
    spread = f"{min(run.seconds):.2f} to {max(run.seconds):.2f}"
    return f"{name:<44}{statistics.median(run.seconds):>9.2f} s   ({spread}){run.peak_mb:>9.0f} MB   {note}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=ALL_ROWS)
    parser.add_argument("--share", type=int, default=8_192, help="rows that the authors' package is timed on")
    parser.add_argument("--counts", type=Path, help="how many clips have each label set")
    asked = parser.parse_args()
    print(machine("ajepa", "numpy", "polars", "pyarrow", "torch", "hierarchical_label_propagation"))
    kind = "AudioSet's own label sets" if asked.counts else "made up"
    print(f"{asked.rows:,} rows ({kind}); medians of {ROUNDS} rounds after one untimed, the peak of memory")
    mine = alone(partial(ours, asked.rows, asked.counts))
    assert isinstance(mine, Timed)
    print(line("propagate", mine, f"under {TARGET_SECONDS} s wanted"), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-labels-") as scratch:
        for path in write_inputs(Path(scratch), asked.rows, asked.counts):
            run = alone(partial(command, path))
            assert isinstance(run, Timed)
            size = f"from {path.stat().st_size / 1e6:.0f} MB"
            print(line(f"propagate-labels {path.name} --out out.parquet", run, size), flush=True)
    found = alone(partial(theirs, asked.rows, asked.share, asked.counts))
    assert isinstance(found, tuple)
    peer, way = found
    scaled = peer._replace(seconds=[took * asked.rows / asked.share for took in peer.seconds])
    note = f"{way}; scaled from {asked.share:,} rows ({statistics.median(peer.seconds):.2f} s)"
    print(line("hierarchical_label_propagation", scaled, note))
    ratio = statistics.median(scaled.seconds) / statistics.median(mine.seconds)
    print(f"ours is {ratio:,.0f}x as fast ({TARGET_RATIO}x wanted)")


if __name__ == "__main__":
    main()
