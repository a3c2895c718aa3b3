"""The commands that look at a store: verify, audit-labels, bench, report, inspect."""

import time
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import build
from pipeline.cli.options import CacheFolder, CacheSizeGb, StoreLocation, StorePath, check_output_path
from pipeline.errors import InputError
from pipeline.files import DEFAULT_CACHE_GB

app = typer.Typer()


@app.command()
def verify(
    store: StorePath,
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="Only so many, drawn at random: shards to read, or rows --against-audio."),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make broken shards again from the sounds they came from.")
    ] = False,
    against_audio: Annotated[
        bool,
        typer.Option("--against-audio", help="Instead: decode rows again and compare them with the store."),
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Decoding processes of a repair.")] = 2,
) -> None:
    """Check every shard, checksum and row of a store.

    One line for each fault, and status 1.

    Example: ajepa-data verify as20k.zarr --repair
    """
    if against_audio and repair:
        raise InputError("verify: --against-audio only tells; give --repair by itself")
    if against_audio:
        _verify_against_audio(store, sample)
    else:
        _verify_store(store, sample, repair=repair, workers=workers)


def _verify_store(store: Path, sample: int | None, *, repair: bool, workers: int) -> None:
    from pipeline.build.repair import repair_store as mend
    from pipeline.build.verify import find_faults

    faults = list(find_faults(store, sample, seed=time.time_ns()))
    for fault in faults:
        print(fault.text)
    if faults and repair:
        lost = mend(store, faults, workers=workers, progress=build.decoding_progress)
        left = list(find_faults(store))
        for fault in left:
            print(f"still: {fault.text}")
        if left:
            raise InputError(f"{store}: left after the repair: {_fault_count_text(len(left))}")
        print(f"{store}: {_fault_count_text(len(faults))} mended")
        if lost:
            raise InputError(
                f"{store}: {lost} clips are lost: damaged here, and their sounds can no longer be had"
            )
    elif faults:
        raise InputError(
            f"{store}: {_fault_count_text(len(faults))}; mend with: ajepa-data verify {store} --repair"
        )
    else:
        print(f"{store}: every shard, row and checksum is as it should be")


def _fault_count_text(count: int) -> str:
    return f"{count} fault{'s' * (count != 1)}"


def _verify_against_audio(store: Path, sample: int | None) -> None:
    from pipeline.build.recompute import VERSION_TOLERANCE_NAT, changed_versions, compare_with_audio

    rows = faults = gone = 0
    apart_nat = 0.0
    for one in compare_with_audio(store, sample, seed=time.time_ns()):
        rows, faults, gone = rows + 1, faults + bool(one.fault), gone + bool(one.missing_sound)
        if one.fault or one.missing_sound:
            print(f"row {one.row} (clip {one.clip_id}): {one.fault or f'not compared, {one.missing_sound}'}")
        else:
            apart_nat = max(apart_nat, one.difference_nat)
    changed = changed_versions(store)
    if changed:
        print(
            f"built with {'; '.join(changed)}: values may differ by {VERSION_TOLERANCE_NAT} nat and one stored step"
        )
    if faults:
        raise InputError(f"{store}: {faults} of {rows - gone} rows are not what their sounds give")
    if gone == rows:
        raise InputError(f"{store}: nothing could be compared, no sound is there; mount its audio folders")
    told = f"up to {apart_nat:.3g} nat apart" if apart_nat else "bit for bit"
    print(f"{store}: {rows - gone} rows are what their sounds give, {told}")


@app.command()
def audit_labels(
    store: StorePath,
    json_: Annotated[Path | None, typer.Option("--json", help="File for everything that was found.")] = None,
    suggest: Annotated[
        Path | None, typer.Option(help="Exclude list to write: training clips that leak; text, or .csv.")
    ] = None,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Exclude list to record: ids, one a line; CSV; Parquet. Repeats."),
    ] = None,
    no_exclude: Annotated[
        bool, typer.Option("--no-exclude", help="Take back every exclude list that is recorded.")
    ] = False,
    eval_: Annotated[
        list[str] | None,
        typer.Option(
            "--eval", metavar="TEXT", help="Split to measure on. Repeats. [default: those named eval or test]"
        ),
    ] = None,
    few: Annotated[int, typer.Option(min=1, help="Clips, under which a class is told.")] = 10,
    top: Annotated[int, typer.Option(min=1, max=1000, help="Surprises of a kind to show.")] = 10,
) -> None:
    """Tell what is wrong about clips and labels.

    Leaks, copies, gaps, contradictions, shifts, and what else may surprise.

    An exclude list replaces those recorded before: loaders then draw none of
    its clips, and a run trained with other lists will not carry on.

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
    device: Annotated[str, typer.Option(help="Where batches are to be: cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Time every stage from the disk to the batch.

    On this machine, in clips/s; the one that holds up the others is named.

    Example: ajepa-data bench as20k.zarr --device cuda
    """
    from tqdm import tqdm

    from pipeline.loading.benchmark import measure_loading
    from pipeline.store.feature_store import FeatureStore

    with tqdm(bar_format="{elapsed} {postfix}", leave=False, disable=None) as bar:
        pace = measure_loading(
            FeatureStore.open(store, check="never"),
            batch_clips=batch,
            device=device,
            say=lambda stage: bar.set_postfix_str(stage),
        )
    print(pace.format_table())


@app.command()
def report(
    store: StoreLocation,
    html: Annotated[
        Path | None, typer.Option(help="Page to write: all of the store.", callback=check_output_path)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="PNG file to write: spectrograms.", callback=check_output_path)
    ] = None,
    clips: Annotated[int, typer.Option(min=1, max=60, help="Spectrograms to show.")] = 12,
    cache: CacheFolder = None,
    cache_gb: CacheSizeGb = DEFAULT_CACHE_GB,
) -> None:
    """Show a store as a table, a page or a picture.

    Example: ajepa-data report as20k.zarr --html report.html
    """
    from pipeline.report.spectrograms import draw_contact_sheet
    from pipeline.report.store_page import write_store_page
    from pipeline.store.feature_store import FeatureStore
    from pipeline.store.summary import coverage_table

    if html is None and out is None:
        raise InputError(
            "report: nothing to write; give --html FILE for a page, --out FILE for a PNG, or both"
        )
    opened = FeatureStore.open(store, cache=cache, cache_gb=cache_gb)
    print(coverage_table(opened.manifest, opened.exclusions.excluded_mask_N(opened.manifest)))
    if html is not None:
        write_store_page(opened, html, clip_count=clips)
        print(html)
    if out is not None:
        draw_contact_sheet(opened, out, clip_count=clips)
        print(out)


@app.command()
def inspect(
    store: StoreLocation,
    clip: Annotated[str | None, typer.Option(help="Id of a clip: all its rows are told.")] = None,
    row: Annotated[int | None, typer.Option(help="A row's number instead, or one of the clip's.")] = None,
    png: Annotated[Path | None, typer.Option(help="PNG file for the spectrogram.")] = None,
    cache: CacheFolder = None,
    cache_gb: CacheSizeGb = DEFAULT_CACHE_GB,
) -> None:
    """Tell what a store is, or all about one clip.

    Example: ajepa-data inspect as20k.zarr --clip=-0RWZT-miFs --png clip.png
    """
    from pipeline.report import describe as inspection
    from pipeline.store.feature_store import FeatureStore

    opened = FeatureStore.open(store, cache=cache, cache_gb=cache_gb)
    if clip is None and row is None:
        if png is not None:
            raise InputError(f"{store}: --png needs a clip; add --clip ID or --row N")
        print(inspection.describe_store(opened))
        return
    rows = inspection.select_clip_rows(opened, clip, row)
    print(inspection.describe_rows(opened, rows))
    if png is not None:
        inspection.write_rows_picture(opened, rows, png)
        print(png)
