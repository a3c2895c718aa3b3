"""ajepa-data, the command line of `pipeline`: its app, and the commands that are not in `build.py` or `store.py`."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from pipeline.cli import build, store
from pipeline.cli.options import (
    PROPAGATION_RULE_NAMES,
    StorePath,
    add_version_option,
    complete_from,
    require_local_store,
    run_command_line,
)
from pipeline.errors import InputError

# Without rich, which is slow to load, also for tab completion.
app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Turn sound files into a checked store of log-mel spectrograms with repaired labels.",
)

add_version_option(app)

app.add_typer(build.app)

app.add_typer(store.app)


@app.command()
def demo_corpus(
    out: Annotated[Path, typer.Argument(help="Folder to create.", show_default=False)],
    clips: Annotated[int, typer.Option(min=20, help="Clips to make, about 10 s each.")] = 400,
    source: Annotated[
        str, typer.Option(help="formula (made here) or debian (49 MB of recordings).")
    ] = "formula",
    seed: Annotated[int, typer.Option(help="Another seed gives other clips.")] = 0,
) -> None:
    """Make a small corpus in AudioSet's form. A few of its files are broken.

    Example: ajepa-data demo-corpus demo/corpus --clips 400
    """
    from pipeline.datasets.demo.corpus import make_demo_corpus

    print(make_demo_corpus(out, clips=clips, source=source, seed=seed))


@app.command()
def propagate_labels(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="A store; or segments lists and Parquet tables, which need --out.",
            show_default=False,
            callback=lambda paths: [require_local_store(path) for path in paths],
        ),
    ],
    rule: Annotated[
        str,
        typer.Option(
            help="unambiguous (the paper's), all-ancestors, dominators or direct-parent.",
            autocompletion=complete_from(PROPAGATION_RULE_NAMES),
        ),
    ] = "unambiguous",
    splits: Annotated[
        list[str] | None, typer.Option(help="Splits to propagate, such as train,eval; repeats. Default: all.")
    ] = None,
    ontology: Annotated[
        Path | None, typer.Option(help="Class tree in the form of ontology.json. Default: AudioSet's.")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Class list, form of class_labels_indices.csv. Default: the store's, or the 527."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Table to write if INPUTS are lists or tables: .parquet or .csv.")
    ] = None,
) -> None:
    """Add the classes that each clip's labels imply.

    The result is a new label set beside the raw one, by Hierarchical Label
    Propagation (arXiv 2503.21826).

    Example: ajepa-data propagate-labels as20k.zarr
    """
    from pipeline.labels.label_tables import propagate_inputs
    from pipeline.labels.propagation import propagation_table

    # --splits may be repeated, and may have several names separated by commas.
    split_names = [name.strip() for part in splits or () for name in part.split(",")] or None
    changes = propagate_inputs(inputs, rule, split_names, ontology=ontology, classes=classes, out=out)
    print(propagation_table(changes))


@app.command()
def finalize(store: StorePath) -> None:
    """Finish a store whose parts are all built. The last part does this itself.

    Example: ajepa-data finalize as2m.zarr
    """
    from pipeline.build.finish import finish_store, unbuilt_shards
    from pipeline.store.header import StoreHeader
    from pipeline.store.summary import COVERAGE_COLUMNS, coverage_table
    from pipeline.tables import read_table

    header = StoreHeader.read(store)
    if not finish_store(store, header):
        unbuilt = unbuilt_shards(store, header)
        raise InputError(
            f"{store}: {len(unbuilt)} of {header.layout.shard_count} shards are not built, the first is "
            f"{unbuilt[0]}; run the parts that are missing"
        )
    print(coverage_table(read_table(store / "manifest.parquet", COVERAGE_COLUMNS)[0]))


@app.command()
def doctor(
    place: Annotated[
        Path, typer.Option(help="Folder in which stores will be built.", exists=True, file_okay=False)
    ] = Path("."),
) -> None:
    """Check that this machine can build stores.

    Checks packages, codecs, free space and a small trial build, in about 10 s.
    Exits with status 1 if something is broken, and says how to mend it.

    Example: ajepa-data doctor --place stores/
    """
    from tempfile import TemporaryDirectory

    from pipeline.cli.doctor import check_data_machine, report_checks

    # Each line is printed as soon as its check is done.
    with TemporaryDirectory() as trial_folder:
        for line in report_checks(check_data_machine(place, Path(trial_folder))):
            print(line, flush=True)


def main() -> NoReturn:
    """Run ajepa-data and exit with its status."""
    run_command_line(app)
