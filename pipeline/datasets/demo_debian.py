"""The demo corpus's real recordings: fetched from the Debian archive, dealt to the splits, made into sounds."""

import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.datasets.demo_files import read
from pipeline.datasets.demo_recordings import LICENCES, MIDS, Recording
from pipeline.datasets.demo_sounds import RATE_HZ, Sound, add
from pipeline.errors import InputError

SPLITS = ("balanced_train", "eval")
EVAL_SHARE = 0.25


def fetch(folder: Path, *, quiet: bool | None) -> None:
    """Download the packages (49 MB) with apt and unpack each into `folder`/its name, without installing it."""
    for command in ("apt-get", "dpkg-deb"):
        if not shutil.which(command):
            raise InputError(
                f"{command}: not on this machine; --source debian needs Debian or Ubuntu, "
                "--source formula downloads nothing"
            )
    folder.mkdir(parents=True)
    for package in tqdm(LICENCES, desc="fetch packages", unit="package", disable=quiet):
        run(["apt-get", "download", "--quiet", package], folder)
        (file,) = folder.glob(f"{package}_*.deb")
        run(["dpkg-deb", "--extract", str(file), package], folder)
        file.unlink()


def run(command: list[str], folder: Path) -> None:
    """Run a command in a folder; where it fails its last line of complaint becomes the error."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        complaint = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise InputError(
            f"{' '.join(command)}: {complaint} (try apt-get update, or --source formula, which downloads nothing)"
        )


def keep_licences(packages: Path, folder: Path) -> None:
    """Copy each package's own statement of who made what."""
    folder.mkdir()
    for package in LICENCES:
        shutil.copyfile(
            packages / package / "usr/share/doc" / package / "copyright", folder / f"{package}.txt"
        )


def split_recordings(
    rng: np.random.Generator, recordings: Sequence[Recording]
) -> dict[str, tuple[Recording, ...]]:
    """The recordings of each split: about a quarter of every class for eval, at least one, the rest to train on.

    A recording that is the only one of all its classes serves in both splits, so that no class is missing from
    one; every other recording is in one split only.
    """
    carriers = Counter(name for recording in recordings for name in recording.classes)
    by_class: defaultdict[str, list[Recording]] = defaultdict(list)
    for recording in recordings:
        by_class[recording.classes[0]].append(recording)
    split: dict[str, list[Recording]] = {name: [] for name in SPLITS}
    for group in by_class.values():
        shuffled = [group[at] for at in rng.permutation(len(group))]
        evals = max(1, round(EVAL_SHARE * len(group))) if len(group) > 1 else 0
        alone = all(carriers[name] == 1 for name in group[0].classes)
        split["eval"] += group if alone else shuffled[:evals]
        split["balanced_train"] += group if alone else shuffled[evals:]
    return {name: tuple(chosen) for name, chosen in split.items()}


def sound(recording: Recording, folder: Path) -> Sound:
    """The recording, read from its unpacked package, as something that can be heard in a clip."""
    path = folder / recording.package / recording.path
    if not path.exists():
        raise InputError(
            f"{path}: not in this release of {recording.package}, which Debian 12 has; use --source formula"
        )
    mids = tuple(MIDS[name] for name in recording.classes)
    make = partial(repeat_with_gaps, read(path))
    return Sound(name=f"{recording.package}/{recording.path}", mids=mids, make=make)


def repeat_with_gaps(wave_S: np.ndarray, rng: np.random.Generator, samples: int) -> np.ndarray:
    """As many samples of a recording: a short one again and again with pauses, of a long one the beginning."""
    repeated_S = np.zeros(samples, dtype=np.float32)
    at = 0
    while at < samples:
        add(repeated_S, wave_S, at)
        at += len(wave_S) + int(RATE_HZ * rng.uniform(0.1, 1.5))
    return repeated_S
