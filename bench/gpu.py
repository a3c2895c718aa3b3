"""What a GPU must show, in one run of some minutes: that its numbers are right, how fast it is, and that it learns.

    just gpu [--minutes 6.5] [--sections tests speed learning] [--tiny]

Sections run in this order, each in a process of its own, for as long as its share of the time lasts; what is left of
a share goes to the next. Every line is flushed. What fails or takes too long is named, and the next thing begins.

tests     the tests that are marked gpu: a GPU's numbers beside those of the CPU, resuming after a kill, DALI's batches,
          the attention kernels, and that no step waits for the host
speed     steps with stored clips through DALI, beside the published step: see bench/gpu_speed.py
learning  the recipe `small` on a generated corpus, then `base-s` for the time that is left, beside random encoders

Where there is no GPU, or with --tiny, everything is done with tiny models on the CPU: a check of this script, no
measurement. The clips are generated while the tests run; --store names a store of the spec a-jepa to use instead.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ajepa.recipes.pretrain import Pretrain

ROOT = Path(__file__).parents[1]

# Of the whole time, when the section ends at the latest.
SECTION_ENDS = {"tests": 0.38, "speed": 0.74, "learning": 1.0}

# Files with tests that are marked gpu, in the order of their weight; others may import what a bare machine lacks.
GPU_TEST_FILES = (
    "tests/gpu/test_equal_to_cpu.py",
    "tests/gpu/test_step.py",
    "tests/pipeline/loading/test_transfer.py",
    "tests/pipeline/loading/test_dali.py",
    "tests/pipeline/audio/test_mel.py",
    "tests/ajepa/embed/test_export_graph.py",
    "tests/gpu/test_compiled.py",
)

CORPUS_CLIPS = {False: 800, True: 24}  # a quarter of them to measure on; True: tiny

STORES = {
    "a-jepa": "a-jepa.zarr",
    "audio-jepa": "audio-jepa.zarr",
}  # by mel spec, in the folder of a run of this script

READY_FILE = "stores-ready"  # is there once both stores are complete

WAIT_SECONDS = 0.2

STORE_SECONDS = 60.0  # that a section waits for the stores, which have had all the time of the tests

GRACE_SECONDS = 5.0  # that a section may take longer than it should, to end by itself


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every section knows: where stores and results lie, when it must end, and whether it is only a check.

    end_seconds  on the clock of `time.monotonic`, which all processes of a machine share
    """

    work: Path
    end_seconds: float
    tiny: bool
    store: Path | None = None

    @property
    def left_seconds(self) -> float:
        """The time until the section must end."""
        return self.end_seconds - time.monotonic()

    @property
    def device_name(self) -> str:
        return "cpu" if self.tiny else "cuda"

    def wait_for_store(self, mel: str, seconds: float = 0.0) -> Path | None:
        """The store of that mel spec; None where it is not there within `seconds`."""
        if self.store is not None:
            return self.store
        end = time.monotonic() + min(seconds, self.left_seconds)
        while not (self.work / READY_FILE).exists():
            if time.monotonic() >= end:
                return None
            time.sleep(WAIT_SECONDS)
        return self.work / STORES[mel]

    def arguments(self) -> list[str]:
        """The same for the command line of a process of this script."""
        options = ["--work", str(self.work), "--end", f"{self.end_seconds:.1f}"]
        if self.tiny:
            options.append("--tiny")
        if self.store is not None:
            options += ["--store", str(self.store)]
        return options


def print_line(text: str) -> None:
    """Print at once: the machine may be gone before a buffer is full."""
    print(text, flush=True)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def describe_machine(tiny: bool) -> str:
    """The processor, the GPU, and the versions that matter."""
    import torch

    from bench.machine import machine

    lines = [machine("ajepa", "torch", "numpy")]
    if not tiny:
        properties = torch.cuda.get_device_properties(0)
        cudnn = torch.backends.cudnn.version()
        lines.append(
            f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}, cuDNN {cudnn}"
        )
    return "\n".join(lines)


# The stores that speed and learning take their clips from.


def prepare_stores(job: Job) -> int:
    """Generate a corpus, and build a store of each mel spec from it in one pass."""
    from pipeline.audio.mel_spec import preset_mel_spec
    from pipeline.build.build import build_stores
    from pipeline.build.plan import BuildOptions, StoreOutput
    from pipeline.datasets.audioset import audioset_corpus
    from pipeline.datasets.demo.corpus import make_demo_corpus
    from pipeline.labels.label_sets import propagate_store_labels

    # The corpus, which is the same on every machine.
    began = time.monotonic()
    folder = job.work / "corpus"
    make_demo_corpus(folder, clips=CORPUS_CLIPS[job.tiny], progress=False)
    segments = [folder / "balanced_train_segments.csv", folder / "eval_segments.csv"]
    corpus = audioset_corpus([folder / "audio"], segments)

    # Both stores.
    outputs = [StoreOutput(path=job.work / name, spec=preset_mel_spec(mel)) for mel, name in STORES.items()]
    workers = 0 if job.tiny else len(os.sched_getaffinity(0))
    build_stores(corpus, outputs, BuildOptions(workers=workers))
    propagate_store_labels(job.work / STORES["a-jepa"])
    (job.work / READY_FILE).touch()
    print_line(
        f"stores: {CORPUS_CLIPS[job.tiny]} clips in {time.monotonic() - began:.0f} s, beside the tests"
    )
    return 0


# The sections.


def run_tests(job: Job, *more_options: str) -> int:
    """Run the tests that are marked gpu; the status of pytest."""
    environment = dict(os.environ)
    if job.tiny:
        environment["AJEPA_GPU_TESTS"] = "cpu"
    options = ["-vv", "-m", "gpu", "-o", "addopts=--strict-markers --import-mode=importlib"]
    # A warning is no failure here: the machine's versions may be newer than those that the suite is kept clean with.
    options += ["--timeout=90", "-W", "default", "-p", "no:cacheprovider", "--tb=short", "--durations=5"]
    command = [sys.executable, "-u", "-m", "pytest", *options, *more_options, *GPU_TEST_FILES]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def run_speed(job: Job) -> int:
    """Measure row after row; one that fails or hangs is named, and the rest go on in another process."""
    from bench.gpu_speed import ROWS, row_seconds

    if job.wait_for_store("a-jepa", STORE_SECONDS) is None:
        print_line(
            "no stored clips in time: rows take noise that lies on the device, and their waiting says nothing"
        )
    status = 0
    first = 0
    while first < len(ROWS) and job.left_seconds > 0:
        note = job.work / "row-begun"
        note.write_text(f"{first} {time.monotonic()}")
        code = run_watched(
            [*own_command("speed-rows", job), "--first-row", str(first)],
            is_late=lambda note=note: job.left_seconds < 0 or is_row_late(note, row_seconds),
        )
        if code == 0:
            return status

        # The row that had begun failed. What comes after it is tried, if there is time.
        begun = int(note.read_text().split()[0])
        why = "out of time" if code is None else f"status {code}"
        print_line(f"FAILED {ROWS[begun]}: {why}")
        first = begun + 1
        status = 1
    return status


def is_row_late(note: Path, row_seconds: Callable[[int], float]) -> bool:
    """Whether the row that `note` names has been under way for longer than rows of its kind may take."""
    row, began = note.read_text().split()
    return time.monotonic() - float(began) > row_seconds(int(row))


def run_speed_rows(job: Job, first_row: int) -> int:
    """Measure the rows from `first_row` on, in this process."""
    from bench.gpu_speed import HEADING, ROWS, measure_row

    print_line(HEADING)
    for number in range(first_row, len(ROWS)):
        if job.left_seconds < 0:
            print_line(f"left out for want of time: {', '.join(map(str, ROWS[number:]))}")
            return 0
        (job.work / "row-begun").write_text(f"{number} {time.monotonic()}")
        measure_row(ROWS[number], job, say=print_line)
    return 0


def run_learning(job: Job) -> int:
    """Train and probe `small`, then `base-s` for the steps that fit into the time that is left."""
    from ajepa.recipes.catalogue import pretrain_recipe

    store = job.wait_for_store("a-jepa", STORE_SECONDS)
    if store is None:
        print_line("no stored clips to learn from")
        return 1
    if job.tiny:
        learn(pretrain_recipe("smoke").with_counts(steps=2, clips_per_step=4), store, job)
        return 0
    learn(pretrain_recipe("small"), store, job)

    # A few steps tell what one costs; the last third of the time is for the probes.
    recipe = pretrain_recipe("base-s")
    trial_steps = 60
    seconds = timed_pretrain(recipe.with_counts(steps=trial_steps), store, job.work / "trial", job)
    steps = int(0.6 * job.left_seconds / seconds * trial_steps)
    if steps > 2 * trial_steps:
        learn(recipe.with_counts(steps=steps), store, job)
    return 0


def timed_pretrain(recipe: "Pretrain", store: Path, run: Path, job: Job) -> float:
    """Train a run without probes on the way; the seconds that it took."""
    from dataclasses import replace

    from ajepa.pretrain.pretrain import pretrain

    began = time.monotonic()
    recipe = replace(recipe, probe_every=0, health_every=0)
    pretrain(store, recipe, run, device=job.device_name, say=lambda line: None)
    return time.monotonic() - began


def learn(recipe: "Pretrain", store: Path, job: Job) -> None:
    """Train a recipe, and print the probes of its encoder beside those of a random one."""
    from ajepa.evaluate.evaluate import evaluate_run
    from ajepa.model.pooling import EncoderLayer

    # Train.
    run = job.work / f"learning-{recipe.name}"
    seconds = timed_pretrain(recipe, store, run, job)
    print_line(
        f"{recipe.name}: {recipe.steps} steps of {recipe.clips_per_step} clips in {seconds:.0f} s, "
        f"{recipe.steps / seconds:.1f} steps/s with everything"
    )

    # Measure.
    began = time.monotonic()
    evaluation = evaluate_run(
        store,
        run,
        device=job.device_name,
        pooling="moments",
        layer=EncoderLayer.from_name("concat-all"),
        probes=("knn",) if job.tiny else ("linear", "knn"),
    )
    print_line(evaluation.format_table())
    print_line(f"measured in {time.monotonic() - began:.0f} s")


# What a process of this script may be asked to do.
TASKS: dict[str, Callable[[Job], int]] = {
    "prepare": prepare_stores,
    "tests": run_tests,
    "learning": run_learning,
}


# Processes, and their time.


def own_command(section: str, job: Job) -> list[str]:
    """The command that runs one section of this script in a process of its own."""
    return [sys.executable, "-u", "-m", "bench.gpu", "--only", section, *job.arguments()]


def start_process(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, so that it can be ended with all that it starts."""
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its group; nothing happens if it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_watched(command: Sequence[str], is_late: Callable[[], bool]) -> int | None:
    """Run a command until it ends, and return its status; None where it had to be ended because it was late."""
    process = start_process(command)
    try:
        while process.poll() is None:
            if is_late():
                return None
            time.sleep(WAIT_SECONDS)
        return process.returncode
    finally:
        end_process(process)


def run_section(name: str, job: Job) -> int | None:
    """Run one section until it must end; its status, None where it had to be ended."""
    # Rows have processes of their own, which this one watches.
    if name == "speed":
        return run_speed(job)
    return run_watched(own_command(name, job), is_late=lambda: job.left_seconds < -GRACE_SECONDS)


def run_sections(names: Sequence[str], minutes: float, *, work: Path, tiny: bool, store: Path | None) -> int:
    """Run the sections one after the other, each up to its share of the time; 1 if one of them failed."""
    start = time.monotonic()
    whole = Job(work=work, end_seconds=start + 60 * minutes, tiny=tiny, store=store)

    # The clips are made on the processors while the tests use the GPU.
    preparing = None
    if store is None and set(names) & {"speed", "learning"}:
        preparing = start_process(own_command("prepare", whole))
    failures = []
    try:
        for name in names:
            end_seconds = start + 60 * minutes * SECTION_ENDS[name]
            job = Job(work=work, end_seconds=end_seconds, tiny=tiny, store=store)
            print_line(f"\n== {name}, until {60 * minutes * SECTION_ENDS[name]:.0f} s ==")
            status = run_section(name, job)
            verdict = (
                "cut, out of time"
                if status is None
                else "done"
                if status == 0
                else f"FAILED, status {status}"
            )
            print_line(f"== {name}: {verdict}, at {time.monotonic() - start:.0f} s ==")
            if status != 0:
                failures.append(name)
    finally:
        if preparing is not None:
            end_process(preparing)
    print_line(
        f"\nall done in {time.monotonic() - start:.0f} s; not whole: {', '.join(failures) or 'nothing'}"
    )
    return int(bool(failures))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=6.5)
    parser.add_argument("--sections", nargs="*", choices=list(SECTION_ENDS), default=list(SECTION_ENDS))
    parser.add_argument(
        "--tiny", action="store_true", help="tiny models on the CPU, as where there is no GPU"
    )
    parser.add_argument("--store", type=Path, help="an a-jepa store to use instead of generated clips")
    # What one process of this script tells another.
    parser.add_argument("--only", choices=[*TASKS, "speed-rows"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--first-row", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)

    # One section, in this process.
    if options.only:
        job = Job(work=options.work, end_seconds=options.end, tiny=options.tiny, store=options.store)
        task = TASKS.get(options.only) or partial(run_speed_rows, first_row=options.first_row)
        return task(job)

    # All of them.
    tiny = options.tiny or not has_gpu()
    print_line(describe_machine(tiny))
    if tiny:
        print_line("tiny models on the CPU: a check of this script, no measurement")
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as scratch:
        return run_sections(
            options.sections, options.minutes, work=Path(scratch), tiny=tiny, store=options.store
        )


if __name__ == "__main__":
    sys.exit(main())
