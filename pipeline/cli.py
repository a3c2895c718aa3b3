"""ajepa-data: sound files in, a checked feature store out."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from pipeline.errors import InputError, Interrupted

RUN_AGAIN = 75  # EX_TEMPFAIL: interrupted with nothing lost; the same command carries on

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Sound files in, a checked store of log-mel spectrograms with repaired labels out.",
)

StorePath = Annotated[Path, typer.Argument(help="Feature store, NAME.zarr.", show_default=False)]


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
def build_audioset(
    audio: Annotated[
        list[Path], typer.Option(help="Folder of sound files, searched below. Repeats.", show_default=False)
    ],
    segments: Annotated[
        list[Path], typer.Option(help="Segments list; its name is the split. Repeats.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Store to create or continue, NAME.zarr.", show_default=False)],
    spec: Annotated[str, typer.Option(help="Mel spec: a-jepa, a-jepa-16k, audio-jepa.")] = "a-jepa",
    dtype: Annotated[str, typer.Option(help="float16, or uint8: half the size, 0.12 nat steps.")] = "float16",
    workers: Annotated[int, typer.Option(min=0, help="Decoding processes; 0: this one, unguarded.")] = 2,
    accept_truncated: Annotated[
        bool, typer.Option("--accept-truncated", help="Keep what is there of clips cut short.")
    ] = False,
    keep_silent: Annotated[
        bool, typer.Option("--keep-silent", help="Keep clips that peak under -90 dBFS.")
    ] = False,
    clip_seconds: Annotated[float, typer.Option(min=1, help="Seconds of wall time a clip may take.")] = 60.0,
) -> None:
    """Decode AudioSet's clips into a feature store; run again, it carries on.

    Example: ajepa-data build-audioset --audio clips/ --segments balanced_train_segments.csv --out as20k.zarr
    """
    from pipeline import build as stage
    from pipeline.audio import AudioPolicy
    from pipeline.datasets.audioset import audioset
    from pipeline.mel import mel_spec
    from pipeline.report import coverage

    wish = stage.Build(
        spec=mel_spec(spec),
        dtype=dtype,
        policy=AudioPolicy(accept_truncated=accept_truncated, keep_silent=keep_silent),
        workers=workers,
        clip_seconds=clip_seconds,
    )
    print(coverage(stage.build_store(audioset(audio, segments), out, wish, progress=_progress)))
    print(f"{out}: done. Next: ajepa-data propagate-labels {out}")


def _progress(clips: int, rows: Iterator[int]) -> Iterator[int]:
    from tqdm import tqdm

    seldom = 0.1 if sys.stderr.isatty() else 30  # a log wants a line now and then
    yield from tqdm(
        rows, total=clips, unit="clip", desc="decode", smoothing=0.05, dynamic_ncols=True, mininterval=seldom
    )


@app.command()
def propagate_labels(
    store: StorePath,
    rule: Annotated[
        str, typer.Option(help="unambiguous (the paper's), all-ancestors, dominators or direct-parent.")
    ] = "unambiguous",
) -> None:
    """Add each clip's implied classes as a label set beside the raw one (HLP, arXiv 2503.21826).

    Example: ajepa-data propagate-labels as20k.zarr
    """
    from pipeline import labels

    print(labels.table(labels.propagate_labels(store, rule=rule)))


@app.command()
def verify(store: StorePath) -> None:
    """Check every shard against the ledger, its checksums, the manifest and the statistics.

    Example: ajepa-data verify as20k.zarr
    """
    from pipeline.verify import faults_of

    faults = list(faults_of(store))
    for fault in faults:
        print(fault)
    if faults:
        raise InputError(
            f"{store}: {len(faults)} faults; delete what is named and build again: only that is redone"
        )
    print(f"{store}: every shard, row and checksum is as it should be")


@app.command()
def report(
    store: StorePath,
    html: Annotated[Path | None, typer.Option(help="Page to write: all of the store.")] = None,
    out: Annotated[Path | None, typer.Option(help="PNG file to write: spectrograms.")] = None,
    clips: Annotated[int, typer.Option(min=1, max=60, help="Spectrograms to show.")] = 12,
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
    opened = FeatureStore.open(store)
    print(coverage(opened.manifest))
    if html is not None:
        write_page(opened, html, clips=clips)
        print(html)
    if out is not None:
        contact_sheet(opened, out, clips=clips)
        print(out)


@app.command()
def inspect(
    store: StorePath,
    clip: Annotated[str | None, typer.Option(help="Id of a clip: all its rows are told.")] = None,
    row: Annotated[int | None, typer.Option(help="A row's number instead, or one of the clip's.")] = None,
    png: Annotated[Path | None, typer.Option(help="PNG file for the spectrogram.")] = None,
) -> None:
    """Tell what a store is, or everything about one clip of it.

    Example: ajepa-data inspect as20k.zarr --clip=-0RWZT-miFs --png clip.png
    """
    from pipeline import inspection
    from pipeline.store import FeatureStore

    opened = FeatureStore.open(store)
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
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        app()
    except InputError as error:
        _fail(f"error: {error}", 1)
    except OSError as error:  # a read-only folder, a full disk, a file where a folder should be
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
