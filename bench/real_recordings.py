"""Feature stores of real recordings for `just bench learning`, out of Debian packages: to pre-train on, and tasks.

    python -m bench.real_recordings OUT [--only NAME ...]

Needs Debian or Ubuntu with its package lists up to date (`apt-get update`); installs nothing. Packages (1.5 GB for
all) are fetched by `apt-get download` and unpacked below OUT/packages, once. Makes

    OUT/pretrain.zarr            2,018 clips mixed of 1,191 recordings (of 11,770), by `bench/recordings/mixtures.py`
    OUT/tasks/dev/NAME.zarr      tasks to choose recipes by, of `bench/recordings/tasks.py`
    OUT/tasks/heldout/NAME.zarr  tasks for the last look only
    OUT/PACKAGES.md              version, licence and use of each package

Splits of a task are named train and eval. The same packages give the same stores.
"""

import argparse
import csv
import hashlib
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

import polars as pl

from bench.recordings import mixtures
from bench.recordings.sounds import Sound
from bench.recordings.tasks import LICENCES, TASKS, Task
from pipeline.audio.mel_spec import resolve_mel_spec, with_clip_seconds
from pipeline.build.build import build_store
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.datasets.audioset import audioset_corpus
from pipeline.datasets.folder import folder_corpus
from pipeline.labels.label_sets import propagate_store_labels

SPEC = "a-jepa"
PRETRAIN = "pretrain"
FEWEST = 4  # sounds of a class in each split; a class with fewer is left out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=[PRETRAIN, *(task.name for task in TASKS)]
    )
    options = parser.parse_args()
    if options.only is None or PRETRAIN in options.only:
        make_pretraining_store(options.out)
    for task in TASKS:
        if options.only is None or task.name in options.only:
            make_task(task, options.out)
    (options.out / "PACKAGES.md").write_text(describe_packages(options.out), encoding="utf-8")


def unpack(package: str, packages: Path) -> Path:
    """Return the folder of an unpacked package, which is fetched if it is not there."""
    root = packages / package
    if root.exists():
        return root
    packages.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=packages) as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)  # apt's own user writes there
        subprocess.run(["apt-get", "--quiet", "download", package], cwd=folder, check=True)
        archive = next(folder.glob("*.deb"))
        subprocess.run(["dpkg-deb", "--extract", archive, folder / "root"], check=True)
        (folder / "root" / "VERSION").write_text(archive.name.split("_")[1], encoding="utf-8")
        (folder / "root").rename(root)
    return root


def make_pretraining_store(out: Path) -> None:
    """Mix the clips, build their store and propagate its labels."""
    folder = out / "sounds" / PRETRAIN
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    table = out / "sounds" / f"{PRETRAIN}.csv"
    lists = mixtures.write_corpus(lambda package: unpack(package, out / "packages"), folder, table)
    store = out / f"{PRETRAIN}.zarr"
    output = StoreOutput(path=store, spec=resolve_mel_spec(SPEC))
    manifest = build_store(audioset_corpus([folder / "audio"], lists), output, BuildOptions(workers=1))
    propagate_store_labels(store)
    print(f"{store}: {count_good(manifest)} good clips", flush=True)


def make_task(task: Task, out: Path) -> None:
    """Write the sounds and the table of a task, build its store, and say how many clips it has."""
    sounds = choose(task, task.find(lambda package: unpack(package, out / "packages")))

    # Sounds and table, in place of any older ones.
    folder = out / "sounds" / task.name
    shutil.rmtree(folder, ignore_errors=True)
    for sound in sounds:
        path = folder / sound.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sound.data)
    table = out / "sounds" / f"{task.name}.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "label", "split", "source", "package"))
        for sound in sounds:
            writer.writerow((sound.name, sound.label, split_of(task, sound), sound.source, sound.package))

    # The store.
    corpus = folder_corpus(folder, table, clip_seconds=task.clip_seconds)
    store = out / "tasks" / task.group / f"{task.name}.zarr"
    store.parent.mkdir(parents=True, exist_ok=True)
    spec = with_clip_seconds(resolve_mel_spec(SPEC), task.clip_seconds)
    manifest = build_store(corpus, StoreOutput(path=store, spec=spec), BuildOptions(workers=1))

    counts = Counter(split_of(task, sound) for sound in sounds)
    classes = len(corpus.classes.names)
    print(f"{store}: {count_good(manifest)} good clips of {dict(counts)}, {classes} classes", flush=True)


def count_good(manifest: pl.DataFrame) -> int:
    return manifest.filter(pl.col("status") == "good").height


def split_of(task: Task, sound: Sound) -> str:
    return "eval" if task.is_eval(sound.source) else "train"


def choose(task: Task, sounds: Iterable[Sound]) -> list[Sound]:
    """As many sounds of each class and split as the task wants, without copies, in the order of their names."""
    by_class: dict[str, dict[str, list[Sound]]] = defaultdict(lambda: {"train": [], "eval": []})
    seen: set[bytes | str] = set()
    for sound in sorted(sounds, key=lambda sound: digest(sound.name.encode())):
        keys: set[bytes | str] = {digest(sound.data), sound.name}
        if not keys & seen:
            seen |= keys
            by_class[sound.label][split_of(task, sound)].append(sound)
    chosen = [
        sound
        for splits in by_class.values()
        if min(map(len, splits.values())) >= FEWEST
        for sound in (*splits["train"][: task.most_train], *splits["eval"][: task.most_eval])
    ]
    return sorted(chosen, key=lambda sound: sound.name)


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def describe_packages(out: Path) -> str:
    """A table in Markdown: each package's version, licence, and how many recordings of it each store has."""
    recordings: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for table in sorted((out / "sounds").glob("*.csv")):
        with table.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                recordings[row["package"]][table.stem].add(row["path"])
    licences = LICENCES | mixtures.LICENCES
    lines = ["| package | version | licence of its sounds | recordings |", "| --- | --- | --- | --- |"]
    for package, stores in sorted(recordings.items()):
        version = unquote((out / "packages" / package / "VERSION").read_text(encoding="utf-8"))
        uses = ", ".join(f"{store} {len(paths)}" for store, paths in sorted(stores.items()))
        lines.append(f"| {package} | {version} | {licences[package]} | {uses} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
