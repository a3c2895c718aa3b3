"""A build that kills itself at one of its steps: python killed_build.py CORPUS OUT STEP SIGNAL [URL]."""

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stores import corpus_in

from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build import remote_store
from pipeline.build.build import build_stores
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.cli.options import run_command_line
from pipeline.store.shards import ShardWriter

# Steps to the disk, and to the bucket.
STEPS = (
    (os, "fsync"),
    (Path, "replace"),
    (Path, "rename"),
    (Path, "unlink"),
    (ShardWriter, "append_clip"),
    (remote_store, "upload_file"),
    (remote_store, "remove_object"),
)


def outputs_in(folder: Path, url: str | None = None) -> list[StoreOutput]:
    """Two stores of one decoding pass; with a URL they are built below it, and the folder is for their staging."""
    outputs = [
        ("a-jepa.zarr", preset_mel_spec("a-jepa"), "float16"),
        ("audio-jepa.zarr", preset_mel_spec("audio-jepa"), "uint8"),
    ]
    return [
        StoreOutput(
            path=folder / name, spec=spec, dtype=dtype, remote=None if url is None else f"{url}/{name}"
        )
        for name, spec, dtype in outputs
    ]


def deadly(
    step: Callable[..., Any], counter: "itertools.count[int]", last: int, number: int
) -> Callable[..., Any]:
    """`step`, before or after which the process gets a signal when the counter says so."""

    def counted(*values: Any, **named: Any) -> Any:
        if next(counter) == last:
            os.kill(os.getpid(), number)
        result = step(*values, **named)
        if next(counter) == last:
            os.kill(os.getpid(), number)
        return result

    return counted


def main(corpus: Path, out: Path, last: int, number: int, url: str | None = None) -> None:
    """Build and print how many steps there were; with `last` under that number, the signal comes there."""
    counter = itertools.count()
    for owner, name in STEPS:
        setattr(owner, name, deadly(getattr(owner, name), counter, last, number))
    build_stores(corpus_in(corpus), outputs_in(out, url), BuildOptions(workers=0))
    print(next(counter))


if __name__ == "__main__":
    corpus, out, last, number, *urls = sys.argv[1:]
    # As a command: a signal that may be handled ends it with status 75.
    run_command_line(lambda: main(Path(corpus), Path(out), int(last), int(number), *urls))
