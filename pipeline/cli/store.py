"""The commands of ajepa-data that read a store: verify, audit-labels, bench, report, inspect."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.build import decoding_progress
from pipeline.cli.options import (
    CacheFolder,
    CacheSizeGb,
    StoreLocation,
    StorePath,
    WorkerCount,
    check_output_path,
    check_table_path,
    count_cores,
)
from pipeline.errors import InputError
from pipeline.files import DEFAULT_CACHE_GB

if TYPE_CHECKING:  # at run time it would load every heavy library before --help
    from pipeline.build.verify import StoreFault

app = typer.Typer()


@app.command()
def verify(
    store: StorePath,
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="Check only N random shards; with --against-audio, N random rows."),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Build broken shards again from their sounds.")
    ] = False,
    against_audio: Annotated[
        bool,
        typer.Option("--against-audio", help="Instead: decode rows again and compare them with the store."),
    ] = False,
    workers: WorkerCount = None,
) -> None:
    """Check every shard, checksum and row of a store.

    Prints one line for each fault; the exit status is then 1.

    Example: ajepa-data verify as20k.zarr --repair
    """
    if against_audio and repair:
        raise InputError("verify: --against-audio repairs nothing; give --repair without it")
    if against_audio:
        _verify_against_audio(store, sample)
    else:
        _verify_store(store, sample, repair=repair, workers=count_cores() if workers is None else workers)


def _verify_store(store: Path, sample: int | None, *, repair: bool, workers: int) -> None:
    """Print the faults of a store, and repair them if `repair`; InputError if faults remain or clips are lost."""
    from pipeline.build.verify import find_faults

    # Each call draws another sample, so that repeated calls check more of the store.
    faults = list(find_faults(store, sample, seed=time.time_ns(), progress=True))
    for fault in faults:
        print(fault.text)
    if not faults:
        print(f"{store}: every shard, row and checksum is correct")
    elif repair:
        _repair_store(store, faults, workers)
    else:
        raise InputError(
            f"{store}: {_fault_count_text(len(faults))}; mend with: ajepa-data verify {store} --repair"
        )


def _repair_store(store: Path, faults: "list[StoreFault]", workers: int) -> None:
    """Repair a store and print the result; InputError if faults remain or clips are lost."""
    from pipeline.build.repair import repair_store
    from pipeline.build.verify import find_faults

    lost_clips = repair_store(store, faults, workers=workers, progress=decoding_progress)

    # Only a second check of the whole store shows whether everything is repaired.
    remaining = list(find_faults(store, progress=True))
    for fault in remaining:
        print(f"still: {fault.text}")
    if remaining:
        raise InputError(f"{store}: left after the repair: {_fault_count_text(len(remaining))}")
    print(f"{store}: {_fault_count_text(len(faults))} mended")
    if lost_clips:
        raise InputError(
            f"{store}: {lost_clips} clips are lost: damaged here, and their sounds can no longer be found"
        )


def _fault_count_text(count: int) -> str:
    return f"{count} fault{'s' * (count != 1)}"


def _verify_against_audio(store: Path, sample: int | None) -> None:
    """Print the rows that differ from their sounds; InputError if a row differs, or if no sound was found."""
    from pipeline.build.recompute import VERSION_TOLERANCE_NAT, changed_versions, compare_with_audio

    # Print a line for each row that differs, or whose sound is missing.
    compared = 0
    faults = 0
    largest_difference_nat = 0.0
    for row in compare_with_audio(store, sample, seed=time.time_ns(), progress=True):
        if row.missing_sound:
            print(f"row {row.row} (clip {row.clip_id}): not compared, {row.missing_sound}")
            continue
        compared += 1
        if row.fault:
            faults += 1
            print(f"row {row.row} (clip {row.clip_id}): {row.fault}")
        else:
            largest_difference_nat = max(largest_difference_nat, row.difference_nat)

    # Other versions of the libraries explain small differences.
    changed = changed_versions(store)
    if changed:
        print(
            f"built with {'; '.join(changed)}: values may differ by {VERSION_TOLERANCE_NAT} nat and one stored step"
        )
    if faults:
        raise InputError(f"{store}: {faults} of {compared} rows differ from their sounds")
    if not compared:
        raise InputError(
            f"{store}: nothing could be compared, no sound was found; mount its audio folders and try again"
        )
    precision = f"up to {largest_difference_nat:.3g} nat apart" if largest_difference_nat else "bit for bit"
    print(f"{store}: {compared} rows agree with their sounds, {precision}")


@app.command()
def audit_labels(
    store: StorePath,
    json_: Annotated[Path | None, typer.Option("--json", help="File to write all findings to.")] = None,
    suggest: Annotated[
        Path | None, typer.Option(help="Exclude list to write: training clips that leak; text, or .csv.")
    ] = None,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Exclude list to record: ids, one a line; CSV; Parquet. Repeats."),
    ] = None,
    no_exclude: Annotated[
        bool, typer.Option("--no-exclude", help="Remove all recorded exclude lists.")
    ] = False,
    eval_: Annotated[
        list[str] | None,
        typer.Option(
            "--eval", metavar="TEXT", help="Evaluation split. Repeats. [default: those named eval or test]"
        ),
    ] = None,
    few: Annotated[int, typer.Option(min=1, help="Report classes with fewer clips than this.")] = 10,
    top: Annotated[int, typer.Option(min=1, max=1000, help="Surprises of each kind to show.")] = 10,
) -> None:
    """List faults of clips and labels.

    Leaks, copies, gaps, contradictions, shifts, and other surprises.

    Loaders draw no clip of a recorded exclude list. New lists replace those
    recorded before; a run that was trained with other lists cannot be resumed.

    Example: ajepa-data audit-labels as20k.zarr --suggest leaks.txt
    """
    from pipeline.audit.command import audit_store

    for line in audit_store(
        store,
        held_out_names=eval_ or (),
        exclude=exclude or (),
        no_exclude=no_exclude,
        json_path=json_,
        suggestion_path=suggest,
        few=few,
        top=top,
    ):
        print(line)


@app.command()
def bench(
    store: StorePath,
    batch: Annotated[int, typer.Option(min=1, help="Clips in a batch.")] = 64,
    device: Annotated[str, typer.Option(help="Device that batches go to: cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Time every stage from the disk to the batch.

    Measured on this machine in clips/s; the slowest stage is named.

    Example: ajepa-data bench as20k.zarr --device cuda
    """
    from tqdm import tqdm

    from pipeline.loading.benchmark import measure_loading
    from pipeline.store.feature_store import FeatureStore

    # Checksums are timed as a stage of their own, so the store reads without them. The bar shows stage and time.
    with tqdm(bar_format="{elapsed} {postfix}", leave=False, disable=None) as bar:
        speed = measure_loading(
            FeatureStore.open(store, check="never"),
            batch_clips=batch,
            device=device,
            say=lambda stage: bar.set_postfix_str(stage),
        )
    print(speed.format_table())


@app.command()
def report(
    store: StoreLocation,
    html: Annotated[
        Path | None,
        typer.Option(help="HTML page to write, about the whole store.", callback=check_output_path),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="PNG file to write, with spectrograms.", callback=check_output_path)
    ] = None,
    clips: Annotated[int, typer.Option(min=1, max=60, help="Spectrograms to show.")] = 12,
    sounds: Annotated[bool, typer.Option("--sounds", help="The page also plays these clips.")] = False,
    cache: CacheFolder = None,
    cache_gb: CacheSizeGb = DEFAULT_CACHE_GB,
) -> None:
    """Show a store as a table, a page or a picture.

    Example: ajepa-data report as20k.zarr --html report.html
    """
    from pipeline.report.spectrograms import draw_contact_sheet
    from pipeline.report.store_page import write_store_page
    from pipeline.store.feature_store import FeatureStore
    from pipeline.store.summary import COVERAGE_COLUMNS, coverage_table

    if html is None and out is None:
        raise InputError(
            "report: nothing to write; give --html FILE for a page, --out FILE for a PNG, or both"
        )
    opened = FeatureStore.open(store, cache=cache, cache_gb=cache_gb)

    # Always print the table.
    print(coverage_table(opened.manifest_columns(*COVERAGE_COLUMNS), opened.excluded_N))
    if html is not None:
        write_store_page(opened, html, clip_count=clips, with_sounds=sounds)
        print(html)
    if out is not None:
        draw_contact_sheet(opened, out, clip_count=clips)
        print(out)


@app.command()
def inspect(
    store: StoreLocation,
    clip: Annotated[
        str | None, typer.Option(help="Id of a clip, or its file; all its rows are described.")
    ] = None,
    row: Annotated[int | None, typer.Option(help="Number of a row; with --clip, a row of that clip.")] = None,
    png: Annotated[Path | None, typer.Option(help="PNG file to write, with the spectrogram.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="List the failed clips, each with why.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="With --failed: table to write; .csv, .parquet or .jsonl.", callback=check_table_path
        ),
    ] = None,
    cache: CacheFolder = None,
    cache_gb: CacheSizeGb = DEFAULT_CACHE_GB,
) -> None:
    """Describe a store, or one clip of it.

    Example: ajepa-data inspect as20k.zarr --clip=-0RWZT-miFs --png clip.png
    """
    from pipeline.report.describe import (
        describe_rows,
        describe_store,
        failed_clip_lines,
        failed_clips,
        select_clip_rows,
        write_rows_picture,
    )
    from pipeline.store.feature_store import FeatureStore

    if failed and (clip is not None or row is not None or png is not None):
        raise InputError("inspect: --failed lists all failed clips; leave --clip, --row and --png out")
    if out is not None and not failed:
        raise InputError("inspect: --out is for the table of --failed; add --failed")
    opened = FeatureStore.open(store, cache=cache, cache_gb=cache_gb)
    if failed:
        clips = failed_clips(opened)
        if out is not None:
            from pipeline.table_files import write_table_file

            write_table_file(out, clips)
            print(out)
            return
        for line in failed_clip_lines(clips):
            print(line)
        if clips.is_empty():
            print(f"{store}: no clip failed")
        return

    # Without a clip or a row, describe the store as a whole.
    if clip is None and row is None:
        if png is not None:
            raise InputError(f"{store}: --png needs a clip; add --clip ID or --row N")
        print(describe_store(opened))
        return

    # For a clip or a row, print every fact, and draw the picture if it is requested.
    rows = select_clip_rows(opened, clip, row)
    print(describe_rows(opened, rows))
    if png is not None:
        write_rows_picture(opened, rows, png)
        print(png)
