"""The doctor: checks of this machine, from versions and codecs to the build of a small store."""

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
from pipeline.store.cache import BYTES_PER_GB
from pipeline.store.feature_store import FeatureStore

MIN_FREE_DISK_GB = 10.0  # AudioSet-20k as float16 takes 5 GB

SHARED_MEMORY = Path("/dev/shm")

MIN_SHARED_MEMORY_GB = 0.5

# The tone that each codec must reproduce.
TONE_HZ = 440.0

TONE_SECONDS = 1.0

TOLERANCE_HZ = 3.0

# The trial store: tones, a semitone apart.
TRIAL_CLIPS = 48

TRIAL_SECONDS = 2.0

TRIAL_LOWEST_HZ = 200.0

DATA_PACKAGES = ("ajepa", "numpy", "polars", "pyarrow", "zarr", "soundfile", "av", "soxr", "torch")

INSTALL_COMMAND = "pip install --upgrade --force-reinstall ajepa"

# Every error that a check may raise because of the machine, not because of a bug.
CHECK_ERRORS = (ImportError, OSError, RuntimeError, ValueError, PackageNotFoundError, InputError)


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineCheck:
    """The result of one check; in state `slow`, it works but could be faster. `remedy` says what to do."""

    name: str
    state: Literal["ok", "slow", "broken"]
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.state:7}{self.name}: {self.message}"
        # Wrap at 80 columns; all lines but the first are indented.
        lines = textwrap.wrap(text, 79, subsequent_indent=" " * 9, break_on_hyphens=False)
        if self.remedy:
            lines.append(f"       -> {self.remedy}")
        return "\n".join(lines)


def run_machine_check(name: str, check: Callable[[], str], remedy: str) -> MachineCheck:
    """Run `check`; return its message, or its error together with the remedy."""
    try:
        return MachineCheck(name=name, state="ok", message=check())
    except CHECK_ERRORS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return MachineCheck(name=name, state="broken", message=lines[0], remedy=remedy)


def check_data_machine(store_folder: Path, trial_folder: Path) -> Iterator[MachineCheck]:
    """Yield the checks for building stores in `store_folder`; a small trial store is built in `trial_folder`."""
    # Later checks depend on earlier ones.
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
    """Return a text with the Python version, the system, its cores and its memory."""
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / BYTES_PER_GB
    # The cores that this process may use; in a container, fewer than the machine has.
    cores = len(os.sched_getaffinity(0))
    return f"Python {platform.python_version()}, {platform.platform()}, {cores} cores, {memory_gb:.0f} GB"


def package_versions(packages: Iterable[str]) -> str:
    """Return the installed versions; PackageNotFoundError names a package that is not installed."""
    return ", ".join(f"{package} {version(package)}" for package in packages)


def check_codecs(trial_folder: Path) -> str:
    """Write a tone as each kind of file and decode it again; RuntimeError if another tone is decoded."""
    wave_SC = _tone_SC(TONE_HZ, TONE_SECONDS, amplitude=0.5)
    for container in DEMO_CONTAINERS:
        path = trial_folder / f"tone-{container.name}.{container.extension}"
        write_audio_file(path, wave_SC, container, rate_hz=container.rates_hz[0])
        audio = load_clip_audio(SoundLocator.from_path(path), start_seconds=0.0, end_seconds=TONE_SECONDS)

        # The loudest frequency of the decoded sound must be the tone.
        power_N = np.abs(np.fft.rfft(audio.wave_S * np.hanning(len(audio.wave_S)))) ** 2
        loudest_hz = power_N.argmax() * audio.rate_hz / len(audio.wave_S)
        if abs(loudest_hz - TONE_HZ) > TOLERANCE_HZ:
            raise RuntimeError(
                f"{container.name}: a tone of {TONE_HZ:.0f} Hz comes back as {loudest_hz:.0f} Hz"
            )
    return f"{', '.join(container.name for container in DEMO_CONTAINERS)}: each decodes as it was written"


def check_free_space(store_folder: Path) -> MachineCheck:
    """Check the free space in the folder of the stores, and in shared memory."""
    disk_gb = shutil.disk_usage(store_folder).free / BYTES_PER_GB
    message = f"{disk_gb:.1f} GB free in {store_folder.resolve()}"
    remedy = ""
    if disk_gb < MIN_FREE_DISK_GB:
        remedy = "20 k clips take 5 GB, 2 M clips 533: look for another folder with --place FOLDER"

    # Containers start with 64 MB of shared memory, too little for batches.
    if SHARED_MEMORY.exists():
        shared_memory_gb = shutil.disk_usage(SHARED_MEMORY).free / BYTES_PER_GB
        message += f", {shared_memory_gb:.1f} GB in {SHARED_MEMORY}"
        if shared_memory_gb < MIN_SHARED_MEMORY_GB:
            remedy = "in a container: docker run --shm-size 2g"
    return MachineCheck(name="room", state="slow" if remedy else "ok", message=message, remedy=remedy)


def check_trial_build(trial_folder: Path) -> str:
    """Build a store of tones, verify it and read it again; RuntimeError if it is not as expected."""
    store = build_trial_store(trial_folder)
    faults = list(find_faults(store))
    if faults:
        raise RuntimeError(f"the trial store: {faults[0].text}")

    # The tones rise from row to row, so their loudest bands must too.
    opened = FeatureStore.open(store)
    loudest_B = opened.read(opened.good_rows()).astype(np.float32).mean(1).argmax(1)
    if not (np.diff(loudest_B) >= 0).all() or loudest_B[0] == loudest_B[-1]:
        raise RuntimeError("the trial store: higher tones are not in higher mel bands")
    return f"{TRIAL_CLIPS} tones built, verified and read again"


def build_trial_store(trial_folder: Path) -> Path:
    """Return the path of a store of TRIAL_CLIPS rising tones, splits train and eval; it is built if it is missing."""
    store = trial_folder / "trial.zarr"
    if store.exists():
        return store

    # The sounds and their table: the lower half of the tones is one class, the upper half another.
    sounds_folder = trial_folder / "sounds"
    sounds_folder.mkdir()
    lines = ["path,label,split"]
    for number in range(TRIAL_CLIPS):
        name = f"tone-{number:02d}.wav"
        wave_SC = _tone_SC(TRIAL_LOWEST_HZ * 2 ** (number / 12), TRIAL_SECONDS, amplitude=0.3)
        write_audio_file(sounds_folder / name, wave_SC, DEMO_CONTAINERS[0], rate_hz=SYNTHESIS_RATE_HZ)
        label = "low" if 2 * number < TRIAL_CLIPS else "high"
        split = "eval" if number % 4 == 3 else "train"
        lines.append(f"{name},{label},{split}")
    table = trial_folder / "table.csv"
    table.write_text("\n".join(lines) + "\n")

    # Two processes, as a real build has several.
    build_store(
        folder_corpus(sounds_folder, table),
        StoreOutput(path=store, spec=preset_mel_spec("a-jepa")),
        BuildOptions(workers=2),
    )
    return store


def _tone_SC(hz: float, seconds: float, *, amplitude: float) -> np.ndarray:
    """Return a sine of one channel at SYNTHESIS_RATE_HZ, float32."""
    seconds_S = np.arange(int(SYNTHESIS_RATE_HZ * seconds)) / SYNTHESIS_RATE_HZ
    return (amplitude * np.sin(2 * np.pi * hz * seconds_S))[:, None].astype(np.float32)


def report_checks(checks: Iterable[MachineCheck]) -> Iterator[str]:
    """Yield the text of each check as soon as it is done; InputError at the end if any check is broken."""
    # Yield all lines before the error, so that one fault hides no other.
    broken = []
    for check in checks:
        if check.state == "broken":
            broken.append(check.name)
        yield str(check)
    if broken:
        raise InputError(f"broken: {', '.join(broken)}; the lines above say how to mend each of them")
