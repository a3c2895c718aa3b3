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

from pipeline.audio.decode import load_clip_audio
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.audio.sources import SoundLocator
from pipeline.build.build import build_store
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.build.verify import find_faults
from pipeline.datasets.demo.audio_files import DEMO_CONTAINERS, write_audio_file
from pipeline.datasets.demo.synthesis import SYNTHESIS_RATE_HZ
from pipeline.datasets.folder import folder_corpus
from pipeline.errors import InputError
from pipeline.store.feature_store import FeatureStore

BYTES_PER_GB = 1e9

MIN_FREE_DISK_GB = 10.0  # on the disk: AudioSet-20k as float16 takes 5

SHARED_MEMORY = Path("/dev/shm")

MIN_SHARED_MEMORY_GB = 0.5

TONE_HZ, TONE_SECONDS, TOLERANCE_HZ = 440.0, 1.0, 3.0

TRIAL_SECONDS, TRIAL_CLIPS = 2.0, 48

DATA_PACKAGES = ("ajepa", "numpy", "polars", "pyarrow", "zarr", "soundfile", "av", "soxr", "torch")

INSTALL_COMMAND = "pip install --upgrade --force-reinstall ajepa"


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineCheck:
    """One thing that was looked at. `slow` works, but not as well as it might; `mend` is what to do then."""

    name: str
    state: Literal["ok", "slow", "broken"]
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.state:7}{self.name}: {self.message}"
        lines = textwrap.wrap(text, 79, subsequent_indent=" " * 9, break_on_hyphens=False)
        return "\n".join([*lines, *([f"       -> {self.remedy}"] if self.remedy else [])])


def run_machine_check(name: str, check: Callable[[], str], remedy: str) -> MachineCheck:
    """What `look` tells, or how it failed and what mends that."""
    try:
        return MachineCheck(name=name, state="ok", message=check())
    except (ImportError, OSError, RuntimeError, ValueError, PackageNotFoundError, InputError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return MachineCheck(name=name, state="broken", message=lines[0], remedy=remedy)


def check_data_machine(store_folder: Path, trial_folder: Path) -> Iterator[MachineCheck]:
    """All that stage one needs; stores are to lie below `place`, a small one is built below `trial`."""
    yield run_machine_check("system", describe_system, "Linux is needed, and Python 3.11 or newer")
    yield run_machine_check("packages", lambda: package_versions(DATA_PACKAGES), INSTALL_COMMAND)
    yield run_machine_check("codecs", lambda: check_codecs(trial_folder), INSTALL_COMMAND)
    yield check_free_space(store_folder)
    yield run_machine_check(
        "trial",
        lambda: check_trial_build(trial_folder),
        "set TMPDIR to a folder with 100 MB free, and try again",
    )


def describe_system() -> str:
    """The system, its cores and its memory."""
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / BYTES_PER_GB
    cores = len(os.sched_getaffinity(0))
    return f"Python {platform.python_version()}, {platform.platform()}, {cores} cores, {memory_gb:.0f} GB"


def package_versions(packages: Iterable[str]) -> str:
    """What is installed; PackageNotFoundError names what is not."""
    return ", ".join(f"{package} {version(package)}" for package in packages)


def check_codecs(trial_folder: Path) -> str:
    """A tone written as each kind of file and decoded again; RuntimeError names one that is another then."""
    wave_S = (
        np.sin(2 * np.pi * TONE_HZ * np.arange(int(SYNTHESIS_RATE_HZ * TONE_SECONDS)) / SYNTHESIS_RATE_HZ) / 2
    )
    for container in DEMO_CONTAINERS:
        file = trial_folder / f"tone-{container.name}.{container.extension}"
        write_audio_file(file, wave_S[:, None].astype(np.float32), container, rate_hz=container.rates_hz[0])
        audio = load_clip_audio(SoundLocator.from_path(file), start_seconds=0.0, end_seconds=TONE_SECONDS)
        power_N = np.abs(np.fft.rfft(audio.wave_S * np.hanning(len(audio.wave_S)))) ** 2
        loudest_hz = power_N.argmax() * audio.rate_hz / len(audio.wave_S)
        if abs(loudest_hz - TONE_HZ) > TOLERANCE_HZ:
            raise RuntimeError(
                f"{container.name}: a tone of {TONE_HZ:.0f} Hz comes back as {loudest_hz:.0f} Hz"
            )
    return f"{', '.join(container.name for container in DEMO_CONTAINERS)}: each decodes as it was written"


def check_free_space(store_folder: Path) -> MachineCheck:
    """Free space where stores are to lie, and in shared memory."""
    disk_gb = shutil.disk_usage(store_folder).free / BYTES_PER_GB
    report_checks = f"{disk_gb:.1f} GB free in {store_folder.resolve()}"
    short = disk_gb < MIN_FREE_DISK_GB
    mend = "20 k clips take 5 GB, 2 M clips 533: look for another folder with --place FOLDER"
    if SHARED_MEMORY.exists():
        shm_gb = shutil.disk_usage(SHARED_MEMORY).free / BYTES_PER_GB
        report_checks += f", {shm_gb:.1f} GB in {SHARED_MEMORY}"
        if shm_gb < MIN_SHARED_MEMORY_GB:
            short, mend = True, "in a container: docker run --shm-size 2g"
    return MachineCheck(
        name="room", state="slow" if short else "ok", message=report_checks, remedy=mend if short else ""
    )


def check_trial_build(trial_folder: Path) -> str:
    """A store of tones, built by two processes, verified, with a labelled split; RuntimeError where it is wrong."""
    store = build_trial_store(trial_folder)
    if faults := list(find_faults(store)):
        raise RuntimeError(f"the store of the trial: {faults[0].text}")
    opened = FeatureStore.open(store)
    loudest_B = opened.read(opened.good_rows()).astype(np.float32).mean(1).argmax(1)
    if not (np.diff(loudest_B) >= 0).all() or loudest_B[0] == loudest_B[-1]:
        raise RuntimeError("the store of the trial: higher tones do not lie in higher mel bands")
    return f"{TRIAL_CLIPS} tones built, verified and read again"


def build_trial_store(trial_folder: Path) -> Path:
    """The store of TRIAL_CLIPS rising tones below `trial`, split train and eval; built unless it is there."""
    out = trial_folder / "trial.zarr"
    if out.exists():
        return out
    sounds = trial_folder / "sounds"
    sounds.mkdir()
    seconds_S = np.arange(int(SYNTHESIS_RATE_HZ * TRIAL_SECONDS)) / SYNTHESIS_RATE_HZ
    rows = ["path,label,split"]
    for number in range(TRIAL_CLIPS):
        hz = 200 * 2 ** (number / 12)
        wave_S = 0.3 * np.sin(2 * np.pi * hz * seconds_S)
        name = f"tone-{number:02d}.wav"
        write_audio_file(
            sounds / name, wave_S[:, None].astype(np.float32), DEMO_CONTAINERS[0], rate_hz=SYNTHESIS_RATE_HZ
        )
        rows.append(
            f"{name},{'high' if 2 * number >= TRIAL_CLIPS else 'low'},{'eval' if number % 4 == 3 else 'train'}"
        )
    table = trial_folder / "table.csv"
    table.write_text("\n".join(rows) + "\n")
    build_store(
        folder_corpus(sounds, table),
        StoreOutput(path=out, spec=preset_mel_spec("a-jepa")),
        BuildOptions(workers=2),
    )
    return out


def told(findings: Iterable[MachineCheck]) -> Iterator[str]:
    """A line for each finding as it is made; InputError at the end where something is broken."""
    broken = []
    for finding in findings:
        if finding.state == "broken":
            broken.append(finding.name)
        yield str(finding)
    if broken:
        raise InputError(f"broken: {', '.join(broken)}; each line above says what mends it")
