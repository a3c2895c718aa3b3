"""The commands of ajepa-data that build stores: one a dataset, all with the same further options."""

import sys
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import complete_from, mel_spec_names
from pipeline.errors import InputError
from pipeline.messages import print_to_stderr

app = typer.Typer(rich_markup_mode=None)


def build_command(corpus_of: Callable[..., Any]) -> Callable[..., None]:
    """A build command: the parameters and the docstring of `corpus_of`, and the options of `run`."""
    own = signature(corpus_of)
    shared = [
        parameter.replace(kind=parameter.POSITIONAL_OR_KEYWORD)
        for name, parameter in signature(build_from_options).parameters.items()
        if name != "corpus"
    ]

    def build(**values: Any) -> None:
        asked = {name: values.pop(name) for name in own.parameters}
        build_from_options(corpus_of(**asked), **values)

    ordered = sorted(
        [*own.parameters.values(), *shared],
        key=lambda parameter: parameter.default is not parameter.empty,
    )
    build.__signature__ = own.replace(parameters=ordered, return_annotation=None)  # type: ignore[attr-defined]
    build.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    build.__name__, build.__doc__ = corpus_of.__name__, corpus_of.__doc__
    return app.command()(build)


def build_from_options(
    corpus: Any,
    *,
    out: Annotated[
        list[str],
        typer.Option(
            metavar="TEXT",
            help="Store to create or continue, NAME.zarr or s3://BUCKET/NAME.zarr.",
            show_default=False,
        ),
    ],
    spec: Annotated[
        list[str],
        typer.Option(
            metavar="TEXT",
            help="Mel spec: a name, or a TOML file. Repeats with --out: one decoding pass for all.",
            autocompletion=complete_from(mel_spec_names),
        ),
    ] = ["a-jepa"],  # noqa: B006  (typer wants a list, and nobody writes to it)
    dtype: Annotated[str, typer.Option(help="float16, or uint8: half the size, 0.12 nat steps.")] = "float16",
    workers: Annotated[int, typer.Option(min=0, help="Decoding processes; 0: this one, unguarded.")] = 2,
    part: Annotated[
        str, typer.Option(help="i/n: every n-th block of shards from i on; for job arrays.")
    ] = "0/1",
    engine: Annotated[
        str, typer.Option(help="local, or ray: a cluster, --workers tasks at a time.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, such as auto; none: Ray on this machine.")
    ] = None,
    accept_truncated: Annotated[
        bool, typer.Option("--accept-truncated", help="Keep what is there of clips cut short.")
    ] = False,
    keep_silent: Annotated[
        bool, typer.Option("--keep-silent", help="Keep clips that peak under -90 dBFS.")
    ] = False,
    max_seconds: Annotated[
        float, typer.Option(min=1, help="Refuse sounds longer than this; 43,200 is 12 h.")
    ] = 43_200.0,
    limit_seconds: Annotated[float, typer.Option(min=1, help="Seconds of wall time a clip may take.")] = 60.0,
    staging: Annotated[
        Path, typer.Option(help="Folder for the local side of a store at a URL, NAME.zarr.staging.")
    ] = Path("."),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be built, how large, how long.")
    ] = False,
) -> None:
    """Build, or foretell, what the options ask for, and print what came of it."""
    from pipeline.audio.decode import AudioPolicy
    from pipeline.build.build import build_stores
    from pipeline.build.dry_run import describe_dry_run
    from pipeline.build.plan import BuildOptions
    from pipeline.files import BuildPart

    outputs = outputs_from_options(
        corpus, out, spec, dtype=dtype, staging=staging, part=BuildPart.parse(part)
    )
    policy = AudioPolicy(accept_truncated=accept_truncated, keep_silent=keep_silent, max_seconds=max_seconds)
    build = BuildOptions(
        policy=policy,
        workers=workers,
        clip_limit_seconds=limit_seconds,
        part=BuildPart.parse(part),
        engine=engine,
        address=address,
    )
    if dry_run:
        print(describe_dry_run(corpus, outputs, build))
        return
    for output in outputs:
        if output.remote:
            print_to_stderr(f"{output.remote}: tables, and shards until they are pushed, in {output.path}")
    for note in corpus.notes:
        print_to_stderr(note)
    manifests = build_stores(corpus, outputs, build, progress=decoding_progress)
    for output, manifest in zip(outputs, manifests, strict=True):
        print_build_result(corpus, output, manifest, part)


def outputs_from_options(
    corpus: Any, out: list[str], spec: list[str], *, dtype: str, staging: Path, part: Any
) -> list[Any]:
    """The stores that are asked for, in rows as long as the corpus has them."""
    from pipeline.audio.mel_spec import resolve_mel_spec, with_clip_seconds
    from pipeline.build.plan import StoreOutput
    from pipeline.build.remote_store import staging_folder
    from pipeline.object_store import is_remote_url

    if len(out) != len(spec):
        raise InputError(f"{len(spec)} --spec and {len(out)} --out: every store needs one of each")
    outputs = []
    for place, name in zip(out, spec, strict=True):
        each = resolve_mel_spec(name)
        if corpus.clip_seconds is not None:
            each = with_clip_seconds(each, corpus.clip_seconds)
        remote = place.rstrip("/") if is_remote_url(place) else None
        path = staging_folder(remote, staging, part) if remote else Path(place)
        outputs.append(StoreOutput(path=path, spec=each, dtype=dtype, remote=remote))
    return outputs


def print_build_result(corpus: Any, output: Any, manifest: Any, part: str) -> None:
    """What became of a store, and what to do next."""
    from pipeline.store.summary import coverage_table

    if manifest is None:
        print(f"{output.place}: part {part} is done; the store is finished when the other parts are")
        return
    print(coverage_table(manifest))
    again = ", then the same build command, to push what changed" if output.remote else ""
    step = "propagate-labels" if corpus.asked["dataset"] == "audioset" else "inspect"
    print(f"{output.place}: done. Next: ajepa-data {step} {output.path}{again}")


def decoding_progress(clips: int, rows: Iterator[int]) -> Iterator[int]:
    """A bar on a terminal, a line now and then in a log."""
    from tqdm import tqdm

    seldom = 0.1 if sys.stderr.isatty() else 30
    yield from tqdm(
        rows, total=clips, unit="clip", desc="decode", smoothing=0.05, dynamic_ncols=True, mininterval=seldom
    )


@build_command
def build_audioset(
    audio: Annotated[
        list[str],
        typer.Option(
            metavar="TEXT",
            help="Folder of sounds or s3://BUCKET/PREFIX, searched below, or one archive. Repeats.",
            show_default=False,
        ),
    ],
    segments: Annotated[
        list[Path],
        typer.Option(
            metavar="TEXT", help="Segments list; its name is the split. Repeats.", show_default=False
        ),
    ],
    lenient: Annotated[
        bool, typer.Option("--lenient", help="Leave out damaged lines of the lists, and name them.")
    ] = False,
) -> Any:
    """Decode AudioSet's clips into feature stores. Run again, it carries on.

    Example: ajepa-data build-audioset --audio clips/ --segments balanced_train_segments.csv --out as20k.zarr
    """
    from pipeline.datasets.audioset import audioset_corpus

    return audioset_corpus(audio, segments, lenient=lenient)


@build_command
def build_folder(
    folder: Annotated[Path, typer.Option(help="Folder of sounds, searched below.", show_default=False)],
    table: Annotated[
        Path | None,
        typer.Option(help="CSV or Parquet: path, and maybe label, split, start, end, id."),
    ] = None,
    clip_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds of a clip; none: as the mel spec says.")
    ] = None,
    hop_seconds: Annotated[
        float | None, typer.Option(help="Cut longer sounds into a clip every so many seconds.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of clips of which the table says none.")] = "train",
    label_from: Annotated[
        str, typer.Option(help="none, or parent: label by the folder a sound is in.")
    ] = "none",
) -> Any:
    """Decode your own clips into feature stores. Run again, it carries on.

    Example: ajepa-data build-folder --folder sounds/ --table labels.csv --out mine.zarr
    """
    from pipeline.datasets.folder import folder_corpus as own

    return own(
        folder,
        table,
        clip_seconds=clip_seconds,
        hop_seconds=hop_seconds,
        split=split,
        label_from=label_from,
        progress=opening_progress,
    )


@build_command
def build_esc50(
    folder: Annotated[Path, typer.Option(help="ESC-50 as unpacked: audio/, meta/.", show_default=False)],
) -> Any:
    """Decode ESC-50 into feature stores. 5-s clips, a split for each fold.

    Example: ajepa-data build-esc50 --folder ESC-50-master --out esc50.zarr
    """
    from pipeline.datasets.esc50 import esc50_corpus

    return esc50_corpus(folder)


@build_command
def build_speech_commands(
    folder: Annotated[Path, typer.Option(help="Speech Commands as unpacked.", show_default=False)],
    version: Annotated[str, typer.Option(help="v1 (30 words) or v2 (35 words).")] = "v2",
) -> Any:
    """Decode Speech Commands into feature stores. 1-s clips, the standard splits.

    Example: ajepa-data build-speech-commands --folder speech_commands_v0.02 --out spc2.zarr
    """
    from pipeline.datasets.speech_commands import speech_commands_corpus

    return speech_commands_corpus(folder, version)


@build_command
def build_fsd50k(
    folder: Annotated[Path, typer.Option(help="FSD50K as unpacked: FSD50K.*/.", show_default=False)],
    clip_seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of a clip.")] = 10.0,
    cut: Annotated[bool, typer.Option("--cut", help="Cut longer sounds into several clips.")] = False,
) -> Any:
    """Decode FSD50K into feature stores. Splits train, val and eval.

    Example: ajepa-data build-fsd50k --folder FSD50K --cut --out fsd50k.zarr
    """
    from pipeline.datasets.fsd50k import fsd50k_corpus

    return fsd50k_corpus(folder, clip_seconds=clip_seconds, cut=cut, progress=opening_progress)


def opening_progress(files: int, stream: Iterator[Any]) -> Iterator[Any]:
    """The bar while sounds are opened to see how long they are."""
    from tqdm import tqdm

    yield from tqdm(stream, total=files, unit="file", desc="open", disable=None)
