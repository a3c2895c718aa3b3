"""Kill builds at random moments, run them again, and compare every byte with an undisturbed build.

just torture [KILLS] [--folder FOLDER] [--without-locks] [--s3]

Half of the signals come by the clock, half before or after a step to the disk; half are SIGKILL, half SIGTERM. With
`--without-locks`, the disk has no file locks: `flock` fails with ENOSYS. With `--s3`, stores are built into a bucket on
the loopback interface, and the staging folder is lost at half of the signals, as with the machine.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from corpus import write_corpus
from killed_build import outputs_in
from stores import assert_same_bytes

from pipeline.build.verify import find_faults
from pipeline.errors import RUN_AGAIN_STATUS

PROGRAM = [sys.executable, str(Path(__file__).with_name("killed_build.py"))]

NEVER = 10**9

NO_FLOCK = """
#include <errno.h>
int flock(int file, int operation) { errno = ENOSYS; return -1; }
"""


@dataclass(frozen=True, kw_only=True)
class Builder:
    """Builds the two stores of a corpus in a process that a signal may end."""

    corpus: Path
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def run(self, out: Path, url: str | None, *, number: int = 0, last: int = NEVER) -> subprocess.Popen:
        urls = [] if url is None else [url]
        command = [*PROGRAM, self.corpus, out, str(last), str(number), *urls]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def count_steps(self, out: Path, url: str | None) -> int:
        """Build without a signal; the number of steps."""
        output, errors = (process := self.run(out, url)).communicate()
        assert process.returncode == 0, errors.decode()[-2000:]
        return int(output)


def ends_whole(process: subprocess.Popen, *, number: int = 0, seconds: float | None = None) -> bool:
    """Wait for a build, and send it the signal after so many seconds; says whether it came to its end."""
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        _, errors = process.communicate()
    # SIGTERM itself ends a process that has not begun yet.
    ends = (0, -signal.SIGKILL, -signal.SIGTERM, RUN_AGAIN_STATUS)
    assert process.returncode in ends, (process.returncode, errors.decode()[-2000:])
    return process.returncode == 0


def torture(
    folder: Path,
    *,
    kills: int,
    seed: int,
    environment: Mapping[str, str] = os.environ,
    bucket: str | None = None,
) -> int:
    """Interrupt that many builds; raises AssertionError where a byte differs. Returns how many pairs came out whole.

    `bucket` is a URL below which stores are built, on a server that this process serves.
    """
    rng = np.random.default_rng(seed)
    builder = Builder(corpus=write_corpus(folder / "corpus", clips=48), environment=environment)
    (folder / "whole").mkdir()
    builder.count_steps(folder / "whole", None)

    # How long a build takes where it is interrupted, and how many steps it has there
    began = time.monotonic()
    (folder / "counted").mkdir()
    steps = builder.count_steps(folder / "counted", bucket and f"{bucket}/counted")
    seconds = time.monotonic() - began

    killed = compared = 0
    while killed < kills:
        out = folder / f"out-{compared}"
        url = bucket and f"{bucket}/out-{compared}"
        out.mkdir()
        finished = False
        while killed < kills and not finished:
            number = (signal.SIGKILL, signal.SIGTERM)[int(rng.integers(2))]
            if killed % 2:
                process = builder.run(out, url)
                finished = ends_whole(process, number=number, seconds=rng.uniform(0.3, 1.0) * seconds)
            else:
                finished = ends_whole(builder.run(out, url, number=number, last=int(rng.integers(steps))))
            killed += not finished
            if url and not finished and rng.integers(2):
                shutil.rmtree(out)
                out.mkdir()
        assert finished or ends_whole(builder.run(out, url))
        compare_stores(folder / "whole", out, url)
        shutil.rmtree(out)
        compared += 1
    return compared


def compare_stores(whole: Path, out: Path, url: str | None) -> None:
    """Raise AssertionError where the stores in `out`, or below a URL, are not those in `whole`, or have faults."""
    if url is not None:
        from bucket import download_all

        shutil.rmtree(out)
        download_all(url, out)
    for undisturbed, again in zip(outputs_in(whole), outputs_in(out), strict=True):
        assert_same_bytes(undisturbed.path, again.path)
        assert not list(find_faults(again.path))
    assert {path.name for path in out.iterdir()} == {output.path.name for output in outputs_in(out)}


def environment_without_locks(folder: Path) -> dict[str, str]:
    """The environment of processes whose `flock` fails, by a library that is compiled into `folder`."""
    source, library = folder / "no_flock.c", folder / "no_flock.so"
    source.write_text(NO_FLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return os.environ | {"LD_PRELOAD": str(library)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kills", nargs="?", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="where the stores are, such as a tmpfs")
    parser.add_argument("--without-locks", action="store_true")
    parser.add_argument("--s3", action="store_true")
    options = parser.parse_args()

    serving = nullcontext()
    bucket = None
    if options.s3:
        from bucket import BUCKET, serving_bucket

        serving, bucket = serving_bucket(), f"s3://{BUCKET}"
    with serving, tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        environment = environment_without_locks(folder) if options.without_locks else dict(os.environ)
        pairs = torture(
            folder, kills=options.kills, seed=int(time.time()), environment=environment, bucket=bucket
        )
    print(
        f"{options.kills} builds interrupted; {pairs} pairs of stores came out of them, every byte as undisturbed"
    )


if __name__ == "__main__":
    main()
