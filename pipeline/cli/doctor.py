"""What this machine has and can do: versions, codecs, room, and a build of a small store, looked at one by one."""

import os
import platform
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.audio.decode import load
from pipeline.audio.mel_spec import mel_spec
from pipeline.audio.sources import Locator
from pipeline.build.build import build_store
from pipeline.build.plan import Build, Output
from pipeline.build.verify import faults_of
from pipeline.datasets.demo.audio_files import CONTAINER_TABLE, write
from pipeline.datasets.demo.synthesis import RATE_HZ
from pipeline.datasets.folder import folder
from pipeline.errors import InputError
from pipeline.store.feature_store import FeatureStore

GB = 1e9

ROOM_GB = 10.0  # on the disk: AudioSet-20k as float16 takes 5

SHM = Path("/dev/shm")

SHM_GB = 0.5

TONE_HZ, TONE_SECONDS, TOLERANCE_HZ = 440.0, 1.0, 3.0

TRIAL_SECONDS, TRIAL_CLIPS = 2.0, 48

PACKAGES = ("ajepa", "numpy", "polars", "pyarrow", "zarr", "soundfile", "av", "soxr", "torch")

INSTALL = "pip install --upgrade --force-reinstall ajepa"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at. `slow` works, but not as well as it might; `mend` is what to do then."""

    name: str
    state: Literal["ok", "slow", "broken"]
    told: str
    mend: str = ""

    def __str__(self) -> str:
        text = f"{self.state:7}{self.name}: {self.told}"
        lines = textwrap.wrap(text, 79, subsequent_indent=" " * 9, break_on_hyphens=False)
        return "\n".join([*lines, *([f"       -> {self.mend}"] if self.mend else [])])


def looked(name: str, look: Callable[[], str], mend: str) -> Finding:
    """What `look` tells, or how it failed and what mends that."""
    try:
        return Finding(name=name, state="ok", told=look())
    except (ImportError, OSError, RuntimeError, ValueError, PackageNotFoundError, InputError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Finding(name=name, state="broken", told=lines[0], mend=mend)


def data_findings(place: Path, trial: Path) -> Iterator[Finding]:
    """All that stage one needs; stores are to lie below `place`, a small one is built below `trial`."""
    yield looked("system", system, "Linux is needed, and Python 3.11 or newer")
    yield looked("packages", lambda: versions(PACKAGES), INSTALL)
    yield looked("codecs", lambda: heard(trial), INSTALL)
    yield room(place)
    yield looked("trial", lambda: built(trial), "set TMPDIR to a folder with 100 MB free, and try again")


def system() -> str:
    """The system, its cores and its memory."""
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    cores = len(os.sched_getaffinity(0))
    return f"Python {platform.python_version()}, {platform.platform()}, {cores} cores, {memory_gb:.0f} GB"


def versions(packages: Iterable[str]) -> str:
    """What is installed; PackageNotFoundError names what is not."""
    return ", ".join(f"{package} {version(package)}" for package in packages)


def heard(trial: Path) -> str:
    """A tone written as each kind of file and decoded again; RuntimeError names one that is another then."""
    wave_S = np.sin(2 * np.pi * TONE_HZ * np.arange(int(RATE_HZ * TONE_SECONDS)) / RATE_HZ) / 2
    for container in CONTAINER_TABLE:
        file = trial / f"tone-{container.name}.{container.extension}"
        write(file, wave_S[:, None].astype(np.float32), container, rate_hz=container.rates_hz[0])
        audio = load(Locator.of(file), start_seconds=0.0, end_seconds=TONE_SECONDS)
        power_N = np.abs(np.fft.rfft(audio.wave_S * np.hanning(len(audio.wave_S)))) ** 2
        loudest_hz = power_N.argmax() * audio.rate_hz / len(audio.wave_S)
        if abs(loudest_hz - TONE_HZ) > TOLERANCE_HZ:
            raise RuntimeError(
                f"{container.name}: a tone of {TONE_HZ:.0f} Hz comes back as {loudest_hz:.0f} Hz"
            )
    return f"{', '.join(container.name for container in CONTAINER_TABLE)}: each decodes as it was written"


def room(place: Path) -> Finding:
    """Free space where stores are to lie, and in shared memory."""
    disk_gb = shutil.disk_usage(place).free / GB
    told = f"{disk_gb:.1f} GB free in {place.resolve()}"
    short = disk_gb < ROOM_GB
    mend = "20 k clips take 5 GB, 2 M clips 533: look for another folder with --place FOLDER"
    if SHM.exists():
        shm_gb = shutil.disk_usage(SHM).free / GB
        told += f", {shm_gb:.1f} GB in {SHM}"
        if shm_gb < SHM_GB:
            short, mend = True, "in a container: docker run --shm-size 2g"
    return Finding(name="room", state="slow" if short else "ok", told=told, mend=mend if short else "")


def built(trial: Path) -> str:
    """A store of tones, built by two processes, verified, with a labelled split; RuntimeError where it is wrong."""
    store = trial_store(trial)
    if faults := list(faults_of(store)):
        raise RuntimeError(f"the store of the trial: {faults[0].text}")
    opened = FeatureStore.open(store)
    loudest_B = opened.read(opened.good_rows()).astype(np.float32).mean(1).argmax(1)
    if not (np.diff(loudest_B) >= 0).all() or loudest_B[0] == loudest_B[-1]:
        raise RuntimeError("the store of the trial: higher tones do not lie in higher mel bands")
    return f"{TRIAL_CLIPS} tones built, verified and read again"


def trial_store(trial: Path) -> Path:
    """The store of TRIAL_CLIPS rising tones below `trial`, split train and eval; built unless it is there."""
    out = trial / "trial.zarr"
    if out.exists():
        return out
    sounds = trial / "sounds"
    sounds.mkdir()
    seconds_S = np.arange(int(RATE_HZ * TRIAL_SECONDS)) / RATE_HZ
    rows = ["path,label,split"]
    for number in range(TRIAL_CLIPS):
        hz = 200 * 2 ** (number / 12)
        wave_S = 0.3 * np.sin(2 * np.pi * hz * seconds_S)
        name = f"tone-{number:02d}.wav"
        write(sounds / name, wave_S[:, None].astype(np.float32), CONTAINER_TABLE[0], rate_hz=RATE_HZ)
        rows.append(
            f"{name},{'high' if 2 * number >= TRIAL_CLIPS else 'low'},{'eval' if number % 4 == 3 else 'train'}"
        )
    table = trial / "table.csv"
    table.write_text("\n".join(rows) + "\n")
    build_store(folder(sounds, table), Output(path=out, spec=mel_spec("a-jepa")), Build(workers=2))
    return out


def told(findings: Iterable[Finding]) -> Iterator[str]:
    """A line for each finding as it is made; InputError at the end where something is broken."""
    broken = []
    for finding in findings:
        if finding.state == "broken":
            broken.append(finding.name)
        yield str(finding)
    if broken:
        raise InputError(f"broken: {', '.join(broken)}; each line above says what mends it")
