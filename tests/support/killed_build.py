"""A build in this process that kills itself at one of its steps to the disk: python killed_build.py CORPUS OUT STEP."""

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stores import corpus_in

from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build.build import build_stores
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.store.shards import ShardWriter

STEPS = ((os, "fsync"), (Path, "replace"), (Path, "rename"), (Path, "unlink"), (ShardWriter, "append_clip"))


def outputs_in(folder: Path) -> list[StoreOutput]:
    """Two stores of one decoding pass."""
    return [
        StoreOutput(path=folder / "a-jepa.zarr", spec=preset_mel_spec("a-jepa")),
        StoreOutput(path=folder / "audio-jepa.zarr", spec=preset_mel_spec("audio-jepa"), dtype="uint8"),
    ]


def deadly(step: Callable[..., Any], counter: "itertools.count[int]", last: int) -> Callable[..., Any]:
    """`step`, before or after which the process dies when the counter says so."""

    def counted(*values: Any, **named: Any) -> Any:
        if next(counter) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        result = step(*values, **named)
        if next(counter) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return counted


def main(corpus: Path, out: Path, last: int) -> None:
    """Build and print how many steps there were; with `last` under that number, die there."""
    counter = itertools.count()
    for owner, name in STEPS:
        setattr(owner, name, deadly(getattr(owner, name), counter, last))
    build_stores(corpus_in(corpus), outputs_in(out), BuildOptions(workers=0))
    print(next(counter))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
