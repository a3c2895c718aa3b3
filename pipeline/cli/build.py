"""The commands of ajepa-data that build stores: one per data set, all with the same options for the build."""

from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import MEL_SPEC_NAMES, WorkerCount, complete_from, count_cores
from pipeline.errors import InputError
from pipeline.messages import print_to_stderr

if TYPE_CHECKING:  # at run time they would load every heavy library before --help
    import polars as pl

    from pipeline.build.plan import StoreOutput
    from pipeline.datasets.corpus import Corpus, CorpusRequest
    from pipeline.files import BuildPart

app = typer.Typer(rich_markup_mode=None)


def build_command(request_from_options: "Callable[..., CorpusRequest]") -> Callable[..., None]:
    """Add a build command: it has the name, docstring and options of `request_from_options`, and the shared options."""
    # The options of the data set come first, then the shared ones, those of `build_from_options`.
    dataset_signature = signature(request_from_options)
    dataset_parameters = dataset_signature.parameters
    shared_parameters = [
        parameter.replace(kind=parameter.POSITIONAL_OR_KEYWORD)
        for name, parameter in signature(build_from_options).parameters.items()
        if name != "request"
    ]

    # The command takes all options by name and passes each to its function.
    def build(**values: Any) -> None:
        dataset_values = {name: values.pop(name) for name in dataset_parameters}
        build_from_options(request_from_options(**dataset_values), **values)

    # Typer reads the options from the signature, where Python requires parameters without a default to come first.
    parameters = sorted(
        [*dataset_parameters.values(), *shared_parameters],
        key=lambda parameter: parameter.default is not parameter.empty,
    )
    build.__signature__ = dataset_signature.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=None
    )
    build.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    build.__name__ = request_from_options.__name__
    build.__doc__ = request_from_options.__doc__
    return app.command()(build)


def build_from_options(
    request: "CorpusRequest",
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
            autocompletion=complete_from(MEL_SPEC_NAMES),
        ),
    ] = ["a-jepa"],  # noqa: B006  (typer needs a list, and nothing changes it)
    dtype: Annotated[str, typer.Option(help="float16, or uint8: half the size, 0.12 nat steps.")] = "float16",
    workers: WorkerCount = None,
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
        bool, typer.Option("--accept-truncated", help="Keep clips whose files are cut short.")
    ] = False,
    keep_silent: Annotated[
        bool, typer.Option("--keep-silent", help="Keep clips that peak under -90 dBFS.")
    ] = False,
    max_seconds: Annotated[
        float, typer.Option(min=1, help="Longest sound accepted, in seconds; 43,200 is 12 h.")
    ] = 43_200.0,
    limit_seconds: Annotated[float, typer.Option(min=1, help="Seconds of wall time a clip may take.")] = 60.0,
    staging: Annotated[
        Path, typer.Option(help="Folder for NAME.zarr.staging, the local part of a store at a URL.")
    ] = Path("."),
    rescan: Annotated[bool, typer.Option("--rescan", help="Fill rows whose sound was missing.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build nothing; print expected size and time.")
    ] = False,
) -> None:
    """Build the stores that the options describe, or only predict their size and time, and print the result."""
    from pipeline.audio.decode import AudioPolicy
    from pipeline.build.build import decoded_stores
    from pipeline.build.dry_run import prepare_dry_run
    from pipeline.build.plan import BuildOptions, note_rows_beyond_clips
    from pipeline.build.planned_corpus import corpus_of_request
    from pipeline.files import BuildPart

    # Turn the options into objects, which check their values.
    build_part = BuildPart.parse(part)
    stores = [local_store_path(location, staging, build_part) for location in out]
    corpus = corpus_of_request(request, stores, rescan=rescan)
    outputs = outputs_from_options(corpus, out, spec, dtype=dtype, staging=staging, part=build_part)
    policy = AudioPolicy(accept_truncated=accept_truncated, keep_silent=keep_silent, max_seconds=max_seconds)
    options = BuildOptions(
        policy=policy,
        workers=count_cores() if workers is None else workers,
        clip_limit_seconds=limit_seconds,
        part=build_part,
        engine=engine,
        address=address,
    )
    if dry_run:
        describe_timing = prepare_dry_run(corpus, outputs, options)
        del corpus  # its tables take as much memory as PyTorch, which decoding needs
        print(describe_timing())
        return

    # Print notes before the build, which may take hours.
    for output in outputs:
        if output.remote:
            print_to_stderr(f"{output.remote}: tables, and shards until they are pushed, in {output.path}")
    for note in [*corpus.notes, *note_rows_beyond_clips(corpus, outputs)]:
        print_to_stderr(note)

    # The stores are finished without the corpus, whose tables take as much memory as the manifest.
    settings = corpus.dataset_settings
    with decoded_stores(corpus, outputs, options, progress=decoding_progress) as finish:
        del corpus
        finished = finish()
    for output, is_finished in zip(outputs, finished, strict=True):
        print_build_result(settings, output, part, is_finished=is_finished)


def outputs_from_options(
    corpus: "Corpus", out: list[str], spec: list[str], *, dtype: str, staging: Path, part: "BuildPart"
) -> "list[StoreOutput]":
    """Return the stores to build, one for each --out; their rows have the clip length of the corpus."""
    from pipeline.audio.mel_spec import resolve_mel_spec, with_clip_seconds
    from pipeline.build.plan import StoreOutput
    from pipeline.object_store import is_remote_url

    if len(out) != len(spec):
        raise InputError(f"{len(spec)} --spec and {len(out)} --out: every store needs one of each")
    outputs = []
    for location, spec_name in zip(out, spec, strict=True):
        mel_spec = resolve_mel_spec(spec_name)
        if corpus.clip_seconds is not None:
            mel_spec = with_clip_seconds(mel_spec, corpus.clip_seconds)

        # A store at a URL is built in a staging folder and pushed from there.
        path = local_store_path(location, staging, part)
        remote = location.rstrip("/") if is_remote_url(location) else None
        outputs.append(StoreOutput(path=path, spec=mel_spec, dtype=dtype, remote=remote))
    return outputs


def local_store_path(location: str, staging: Path, part: "BuildPart") -> Path:
    """Return the folder in which a store is built: the store itself, or the staging folder of a store at a URL."""
    from pipeline.build.remote_store import staging_folder
    from pipeline.object_store import is_remote_url

    return staging_folder(location, staging, part) if is_remote_url(location) else Path(location)


def print_build_result(
    settings: dict[str, Any], output: "StoreOutput", part: str, *, is_finished: bool
) -> None:
    """Print how many clips of a store are good, and the next command; or that other parts are still missing.

    `settings` are the `Corpus.dataset_settings`.
    """
    from pipeline.store.summary import (
        COVERAGE_COLUMNS,
        FAILED_FILE_COLUMNS,
        LENGTH_COLUMNS,
        coverage_table,
        failed_file_lines,
    )
    from pipeline.tables import read_table

    if not is_finished:
        print(f"{output.location}: part {part} is done; the store is finished when the other parts are")
        return
    columns = tuple(dict.fromkeys((*COVERAGE_COLUMNS, *LENGTH_COLUMNS)))
    manifest = read_table(output.path / "manifest.parquet", columns)[0]
    print(coverage_table(manifest))

    # The failed files; ids and files of millions of rows are read only if some of them are shown.
    failed_command = f"ajepa-data inspect {output.path} --failed"
    next_command = f"ajepa-data inspect {output.path}"
    if (manifest["status"] == "failed").any():
        clips = read_table(output.path / "manifest.parquet", FAILED_FILE_COLUMNS)[0]
        print("\n".join(failed_file_lines(clips, failed_command)))
        next_command = failed_command
    for note in (
        describe_left_out(settings, manifest, output.spec.clip_seconds),
        describe_nothing_to_measure(manifest),
    ):
        if note:
            print(note)

    # Only AudioSet has a class tree along which labels can be propagated.
    if settings["dataset"] == "audioset":
        if next_command == failed_command:
            print(f"each failed clip with its reason: {failed_command}")
        next_command = f"ajepa-data propagate-labels {output.path}"
    push_again = ", then the same build command, to push what changed" if output.remote else ""
    print(f"{output.location}: done. Next: {next_command}{push_again}")


def describe_nothing_to_measure(manifest: "pl.DataFrame") -> str | None:
    """Return a sentence about evaluation splits without a good clip; None if there are none, or one has a good clip."""
    from pipeline.store.splits import evaluation_split_names

    splits = evaluation_split_names(manifest["split"].unique().sort().to_list())
    is_good_there = manifest["split"].is_in(splits) & (manifest["status"] == "good")
    if not splits or is_good_there.any():
        return None
    return f"no good clip in {' or '.join(splits)}: ajepa-train evaluate has nothing to measure on"


def describe_left_out(settings: dict[str, Any], manifest: "pl.DataFrame", clip_seconds: float) -> str | None:
    """Return how much of long sounds is in no clip, and the option that keeps it; None if nothing, or nothing can."""
    from pipeline.messages import count_phrase, describe_seconds
    from pipeline.store.summary import left_out_lengths

    # AudioSet's sounds may be whole videos, of which only a segment counts; other datasets have short clips.
    keeping_options = {
        "folder": f"--clip-seconds {clip_seconds:g} --hop-seconds {clip_seconds:g}",
        "fsd50k": "--cut",
    }
    option = keeping_options.get(settings["dataset"])
    is_cut = settings.get("hop_seconds") is not None or settings.get("cut")
    sounds, seconds = left_out_lengths(manifest, clip_seconds)
    if not sounds or option is None or is_cut:
        return None
    verb = "is" if sounds == 1 else "are"
    return (
        f"{count_phrase(sounds, 'sound')} {verb} longer than {clip_seconds:g} s: "
        f"{describe_seconds(seconds)} are left out; {option} keeps them"
    )


def decoding_progress(clips: int, rows: Iterator[int]) -> Iterator[int]:
    """Yield the rows, with a progress bar on a terminal, or a line after 5 s and then every 30 s in a log."""
    from pipeline.progress import track_progress

    yield from track_progress(rows, clips, label="decode", unit="clip", smoothing=0.05)


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
) -> "CorpusRequest":
    """Decode AudioSet's clips into feature stores. Run it again to continue.

    Example: ajepa-data build-audioset --audio clips/ --segments balanced_train_segments.csv --out as20k.zarr
    """
    from pipeline.datasets.audioset import audioset_corpus, audioset_settings
    from pipeline.datasets.corpus import CorpusRequest

    return CorpusRequest(
        settings=audioset_settings(audio, segments, lenient=lenient),
        make=lambda: audioset_corpus(audio, segments, lenient=lenient),
    )


@build_command
def build_folder(
    folder: Annotated[Path, typer.Option(help="Folder of sounds, searched below.", show_default=False)],
    table: Annotated[
        Path | None,
        typer.Option(help="CSV or Parquet: path; optional label, split, start, end, id, group."),
    ] = None,
    clip_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds of a clip; none: mel spec's.")
    ] = None,
    hop_seconds: Annotated[
        float | None, typer.Option(help="Cut longer sounds every so many seconds.")
    ] = None,
    keep_tail: Annotated[
        bool, typer.Option("--keep-tail", help="Keep ends under half a clip, from 0.5 s on.")
    ] = False,
    split: Annotated[str, typer.Option(help="Split of clips without one.")] = "train",
    label_from: Annotated[str, typer.Option(help="none, or parent: by folder.")] = "none",
    holdout: Annotated[
        float | None, typer.Option(help="Share of the sounds held out as split eval.", show_default=False)
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Held out together: file, folder, or a column.", show_default=False)
    ] = None,
    split_column: Annotated[
        str | None, typer.Option(help="Column with splits or folds.  [default: split]")
    ] = None,
) -> "CorpusRequest":
    """Decode your own clips into feature stores. Run it again to continue.

    Example: ajepa-data build-folder --folder sounds --holdout 0.2 --out mine.zarr
    """
    from pipeline.datasets.corpus import CorpusRequest
    from pipeline.datasets.folder import folder_corpus, folder_settings

    options = (
        *(folder, table, clip_seconds, hop_seconds, split, label_from, holdout, group, split_column),
        keep_tail,
    )
    return CorpusRequest(
        settings=folder_settings(*options), make=lambda: folder_corpus(*options, progress=opening_progress)
    )


@build_command
def build_hub(
    dataset: Annotated[
        str, typer.Argument(help="ORG/NAME on the hub, or a folder of it.", show_default=False)
    ],
    config: Annotated[str | None, typer.Option(help="Configuration: a folder at its top.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub.")] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of labels. [default: class labels]")
    ] = None,
    clip_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds of a clip; none: mel spec's.")
    ] = None,
) -> "CorpusRequest":
    """Decode a Hugging Face dataset into feature stores. Run it again to continue.

    A folder: Parquet files with a column of sounds, or what save_to_disk wrote.

    Example: ajepa-data build-hub ashraq/esc50 --out esc50.zarr
    """
    from pipeline.datasets.corpus import CorpusRequest
    from pipeline.datasets.hub import hub_corpus, hub_settings

    options = (dataset, config, revision, label_column, clip_seconds)
    return CorpusRequest(settings=hub_settings(*options), make=lambda: hub_corpus(*options))


@build_command
def build_esc50(
    folder: Annotated[Path, typer.Option(help="ESC-50 as unpacked: audio/, meta/.", show_default=False)],
) -> "CorpusRequest":
    """Decode ESC-50 into feature stores. 5-s clips, a split for each fold.

    Example: ajepa-data build-esc50 --folder ESC-50-master --out esc50.zarr
    """
    from pipeline.datasets.corpus import CorpusRequest
    from pipeline.datasets.esc50 import esc50_corpus, esc50_settings

    return CorpusRequest(settings=esc50_settings(folder), make=lambda: esc50_corpus(folder))


@build_command
def build_speech_commands(
    folder: Annotated[Path, typer.Option(help="Speech Commands as unpacked.", show_default=False)],
    version: Annotated[str, typer.Option(help="v1 (30 words) or v2 (35 words).")] = "v2",
) -> "CorpusRequest":
    """Decode Speech Commands into feature stores. 1-s clips, the standard splits.

    Example: ajepa-data build-speech-commands --folder speech_commands_v0.02 --out spc2.zarr
    """
    from pipeline.datasets.corpus import CorpusRequest
    from pipeline.datasets.speech_commands import speech_commands_corpus, speech_commands_settings

    return CorpusRequest(
        settings=speech_commands_settings(folder, version),
        make=lambda: speech_commands_corpus(folder, version),
    )


@build_command
def build_fsd50k(
    folder: Annotated[Path, typer.Option(help="FSD50K as unpacked: FSD50K.*/.", show_default=False)],
    clip_seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of a clip.")] = 10.0,
    cut: Annotated[bool, typer.Option("--cut", help="Cut longer sounds into several clips.")] = False,
) -> "CorpusRequest":
    """Decode FSD50K into feature stores. Splits train, val and eval.

    Example: ajepa-data build-fsd50k --folder FSD50K --cut --out fsd50k.zarr
    """
    from pipeline.datasets.corpus import CorpusRequest
    from pipeline.datasets.fsd50k import fsd50k_corpus, fsd50k_settings

    return CorpusRequest(
        settings=fsd50k_settings(folder, clip_seconds, cut=cut),
        make=lambda: fsd50k_corpus(folder, clip_seconds, cut, progress=opening_progress),
    )


def opening_progress(files: int, stream: Iterator[Any]) -> Iterator[Any]:
    """Yield the sounds of a stream, which opens each to find its length; with a progress bar, or lines in a log."""
    from pipeline.progress import track_progress

    yield from track_progress(stream, files, label="open", unit="file")
