"""ajepa-data: sound files in, a checked feature store out."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from pipeline import build_commands
from pipeline.errors import InputError, Interrupted
from pipeline.files import CACHE_GB, FULL

RUN_AGAIN = 75  # EX_TEMPFAIL: interrupted with nothing lost; the same command carries on

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Sound files in, a checked store of log-mel spectrograms with repaired labels out.",
)

app.add_typer(build_commands.app)


def _local(store: Path) -> Path:
    if str(store).startswith(("s3:/", "gs:/", "http:/", "https:/")):
        raise InputError(
            f"{store}: lies on an object store; copy it to a disk first, or give its staging folder"
        )
    return store


StorePath = Annotated[
    Path, typer.Argument(help="Feature store, NAME.zarr.", show_default=False, callback=_local)
]

StorePlace = Annotated[str, typer.Argument(help="Feature store, NAME.zarr or s3://...", show_default=False)]
Cache = Annotated[
    Path | None, typer.Option(help="Folder for what was last read of a store at s3://.", show_default=False)
]
CacheGb = Annotated[float, typer.Option(min=0.001, help="Most that --cache may take, in 10^9 bytes.")]


@app.command()
def demo_corpus(
    out: Annotated[Path, typer.Argument(help="Folder to create.", show_default=False)],
    clips: Annotated[int, typer.Option(min=20, help="Clips to make, about 10 s each.")] = 400,
    source: Annotated[
        str, typer.Option(help="formula (made here) or debian (49 MB of recordings).")
    ] = "formula",
    seed: Annotated[int, typer.Option(help="Another seed, other clips.")] = 0,
) -> None:
    """Make a small corpus in AudioSet's shape, a few broken files included.

    Example: ajepa-data demo-corpus demo/corpus --clips 400
    """
    from pipeline.datasets.demo import make_demo_corpus

    print(make_demo_corpus(out, clips=clips, source=source, seed=seed))


@app.command()
def propagate_labels(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="A store; or segments lists and Parquet tables, which need --out.",
            show_default=False,
            callback=lambda paths: [_local(path) for path in paths],
        ),
    ],
    rule: Annotated[
        str, typer.Option(help="unambiguous (the paper's), all-ancestors, dominators or direct-parent.")
    ] = "unambiguous",
    splits: Annotated[
        list[str] | None, typer.Option(help="Only these, such as train,eval; repeats. Default: all.")
    ] = None,
    ontology: Annotated[
        Path | None, typer.Option(help="Class tree in the form of ontology.json. Default: AudioSet's.")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Class list, form of class_labels_indices.csv. Default: the store's, or the 527."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Parquet file to write, where INPUTS are lists or tables.")
    ] = None,
) -> None:
    """Add each clip's implied classes as a label set beside the raw one (HLP, arXiv 2503.21826).

    Example: ajepa-data propagate-labels as20k.zarr
    """
    from pipeline import label_tables, tally

    asked = [split.strip() for part in splits for split in part.split(",")] if splits else None
    done = label_tables.propagate_inputs(inputs, rule, asked, ontology=ontology, classes=classes, out=out)
    print(tally.table(done))


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
    """Check every shard against the ledger, its checksums, the manifest and the statistics.

    Example: ajepa-data verify as20k.zarr --repair
    """
    if against_audio and repair:
        raise InputError("verify: --against-audio only tells; give --repair by itself")
    if against_audio:
        _verify_against_audio(store, sample)
    else:
        _verify(store, sample, repair=repair, workers=workers)


def _verify(store: Path, sample: int | None, *, repair: bool, workers: int) -> None:
    from pipeline.repair import repair as mend
    from pipeline.verify import faults_of

    faults = list(faults_of(store, sample, seed=time.time_ns()))
    for fault in faults:
        print(fault.text)
    if faults and repair:
        lost = mend(store, faults, workers=workers, progress=build_commands.progress)
        left = list(faults_of(store))
        for fault in left:
            print(f"still: {fault.text}")
        if left:
            raise InputError(f"{store}: {len(left)} faults are left after the repair")
        print(f"{store}: {len(faults)} faults mended")
        if lost:
            raise InputError(
                f"{store}: {lost} clips are lost: damaged here, and their sounds can no longer be had"
            )
    elif faults:
        raise InputError(f"{store}: {len(faults)} faults; mend them with: ajepa-data verify {store} --repair")
    else:
        print(f"{store}: every shard, row and checksum is as it should be")


def _verify_against_audio(store: Path, sample: int | None) -> None:
    from pipeline.parity import TOLERANCE_NAT, changed_versions, compared

    rows = faults = gone = 0
    apart_nat = 0.0
    for one in compared(store, sample, seed=time.time_ns()):
        rows, faults, gone = rows + 1, faults + bool(one.fault), gone + bool(one.gone)
        if one.fault or one.gone:
            print(f"row {one.row} (clip {one.clip_id}): {one.fault or f'not compared, {one.gone}'}")
        else:
            apart_nat = max(apart_nat, one.apart_nat)
    changed = changed_versions(store)
    if changed:
        print(
            f"built with {'; '.join(changed)}: values may differ by {TOLERANCE_NAT} nat and one stored step"
        )
    if faults:
        raise InputError(f"{store}: {faults} of {rows - gone} rows are not what their sounds give")
    if gone == rows:
        raise InputError(f"{store}: nothing could be compared, no sound is there; mount its audio folders")
    told = f"up to {apart_nat:.3g} nat apart" if apart_nat else "bit for bit"
    print(f"{store}: {rows - gone} rows are what their sounds give, {told}")


@app.command()
def finalize(store: StorePath) -> None:
    """Finish a store whose parts are all built; the last part to end does so by itself.

    Example: ajepa-data finalize as2m.zarr
    """
    from pipeline.finalise import finalise, open_shards
    from pipeline.header import Header
    from pipeline.report import coverage

    manifest = finalise(store, header := Header.read(store))
    if manifest is None:
        some = open_shards(store, header)
        raise InputError(
            f"{store}: {len(some)} of {header.layout.shards} shards are not built, the first is {some[0]}; "
            "run the parts that are missing"
        )
    print(coverage(manifest))


@app.command()
def report(
    store: StorePlace,
    html: Annotated[Path | None, typer.Option(help="Page to write: all of the store.")] = None,
    out: Annotated[Path | None, typer.Option(help="PNG file to write: spectrograms.")] = None,
    clips: Annotated[int, typer.Option(min=1, max=60, help="Spectrograms to show.")] = 12,
    cache: Cache = None,
    cache_gb: CacheGb = CACHE_GB,
) -> None:
    """Show coverage and reasons as a table, and the store as a page, a picture, or both.

    Example: ajepa-data report as20k.zarr --html report.html
    """
    from pipeline.page import write_page
    from pipeline.pictures import contact_sheet
    from pipeline.report import coverage
    from pipeline.store import FeatureStore

    if html is None and out is None:
        raise InputError(
            "report: nothing to write; give --html FILE for a page, --out FILE for a PNG, or both"
        )
    opened = FeatureStore.open(store, cache=cache, cache_gb=cache_gb)
    print(coverage(opened.manifest))
    if html is not None:
        write_page(opened, html, clips=clips)
        print(html)
    if out is not None:
        contact_sheet(opened, out, clips=clips)
        print(out)


@app.command()
def inspect(
    store: StorePlace,
    clip: Annotated[str | None, typer.Option(help="Id of a clip: all its rows are told.")] = None,
    row: Annotated[int | None, typer.Option(help="A row's number instead, or one of the clip's.")] = None,
    png: Annotated[Path | None, typer.Option(help="PNG file for the spectrogram.")] = None,
    cache: Cache = None,
    cache_gb: CacheGb = CACHE_GB,
) -> None:
    """Tell what a store is, or everything about one clip of it.

    Example: ajepa-data inspect as20k.zarr --clip=-0RWZT-miFs --png clip.png
    """
    from pipeline import inspection
    from pipeline.store import FeatureStore

    opened = FeatureStore.open(store, cache=cache, cache_gb=cache_gb)
    if clip is None and row is None:
        if png is not None:
            raise InputError(f"{store}: --png needs a clip; add --clip ID or --row N")
        print(inspection.summary(opened))
        return
    rows = inspection.rows_asked(opened, clip, row)
    print(inspection.told(opened, rows))
    if png is not None:
        inspection.picture(opened, rows, png)
        print(png)


def main() -> NoReturn:
    """Run ajepa-data."""
    run_app(app)


def run_app(app: typer.Typer) -> NoReturn:
    """Run a command line: our own errors become one line and exit status 1, an interruption one and status 75."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # USR1: a batch system's warning
        signal.signal(number, _interrupt)
    try:
        app()
    except InputError as error:
        _fail(f"error: {error}", 1)
    except BrokenPipeError:  # whoever reads what is printed, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:  # a read-only folder, a full disk, a file where a folder should be
        if error.errno in FULL:
            _fail("error: no space left on the disk; free some and run the same command again", 1)
        if error.filename is None:
            raise
        _fail(f"error: {error.filename}: {error.strerror}; check the path and its permissions", 1)
    except Interrupted:
        _fail("interrupted; nothing is lost: the same command carries on", RUN_AGAIN)
    raise SystemExit(0)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise Interrupted


def _fail(message: str, status: int) -> NoReturn:
    typer.secho(message, fg="red", err=True)
    raise SystemExit(status) from None
