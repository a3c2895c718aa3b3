"""Kill builds with SIGKILL at random moments, run them again, and compare every byte with an undisturbed build.

just torture [KILLS]      half of the kills by the clock, half before or after a step to the disk
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from corpus import write_corpus
from killed_build import outputs_in
from stores import assert_same_bytes

from pipeline.build.verify import find_faults

PROGRAM = [sys.executable, str(Path(__file__).with_name("killed_build.py"))]

NEVER = 10**9


def torture(folder: Path, *, kills: int, seed: int) -> int:
    """Kill that many builds; raises AssertionError where a byte differs. Returns how many stores came out whole."""
    rng = np.random.default_rng(seed)
    corpus = write_corpus(folder / "corpus", clips=48)
    (folder / "whole").mkdir()
    began = time.monotonic()
    steps = int(
        subprocess.run(
            [*PROGRAM, corpus, folder / "whole", str(NEVER)], check=True, capture_output=True
        ).stdout
    )
    seconds = time.monotonic() - began
    killed = compared = 0
    while killed < kills:
        out = folder / f"out-{compared}"
        out.mkdir()
        finished = False
        while killed < kills and not finished:
            by_clock = bool(killed % 2)
            last = NEVER if by_clock else int(rng.integers(steps))
            limit = rng.uniform(0.3, 1.0) * seconds if by_clock else None
            finished = runs_through(corpus, out, last, limit)
            killed += not finished
        assert finished or runs_through(corpus, out, NEVER, None)
        for whole, again in zip(outputs_in(folder / "whole"), outputs_in(out), strict=True):
            assert_same_bytes(whole.path, again.path)
            assert not list(find_faults(again.path))
        assert {path.name for path in out.iterdir()} == {output.path.name for output in outputs_in(out)}
        shutil.rmtree(out)
        compared += 1
    return compared


def runs_through(corpus: Path, out: Path, last: int, limit_seconds: float | None) -> bool:
    """Build with a kill before or after step `last`, or after so many seconds; whether it got to the end."""
    process = subprocess.Popen([*PROGRAM, corpus, out, str(last)], stdout=subprocess.DEVNULL)
    try:
        process.wait(limit_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.returncode in (0, -9), process.returncode
    return process.returncode == 0


if __name__ == "__main__":
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory() as scratch:
        stores = torture(Path(scratch), kills=kills, seed=int(time.time()))
    print(f"{kills} builds killed; {stores} pairs of stores came out of them, every byte as undisturbed")
