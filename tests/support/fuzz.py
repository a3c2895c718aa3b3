"""Damaged files by the thousand: `python tests/fuzz.py 2000`. Every outcome is a clip, a reason, or counted here.

The damage is seeded: `spoilt(seed, whole)` makes the same file again, in any process.
"""

import argparse
import collections
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from sounds import ENCODERS, SUBTYPES, babble, write

from pipeline.audio.decode import AudioPolicy, load_clip_audio
from pipeline.audio.sources import SoundLocator
from pipeline.build.workers import run_in_processes
from pipeline.errors import AudioError

sys.path.insert(0, str(Path(__file__).parents[2]))

RATE_HZ = 48_000

SUFFIXES = (*ENCODERS, *SUBTYPES, ".wav")

TASK_CLIPS = 50

CLIP_SECONDS = 20.0


def whole_files(folder: Path, *, seconds: float = 1.0) -> dict[str, bytes]:
    """The same sound in every container, by suffix."""
    sound_SC = np.stack([babble(seconds, RATE_HZ, seed=seed) for seed in range(2)], axis=1)
    return {s: write(folder / f"whole{s}", sound_SC, RATE_HZ).read_bytes() for s in SUFFIXES}


def flip(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Some bytes anywhere."""
    for place in rng.integers(0, len(content), int(rng.integers(1, 40))):
        content[place] = rng.integers(256)
    return content


def flip_head(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Some bytes of the header, where sizes and counts are."""
    for place in rng.integers(0, min(len(content), 400), int(rng.integers(1, 6))):
        content[place] = rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))])
    return content


def cut(content: bytearray, rng: np.random.Generator) -> bytearray:
    """The end."""
    return content[: int(rng.integers(len(content)))]


def swap(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Two blocks change places."""
    size = int(rng.integers(1, max(2, len(content) // 4)))
    first, second = sorted(rng.integers(0, len(content) - size, 2).tolist())
    if first + size > second:
        return content[second:] + content[:second]
    one, other = content[first : first + size], content[second : second + size]
    return content[:first] + other + content[first + size : second] + one + content[second + size :]


def replace(content: bytearray, rng: np.random.Generator) -> bytearray:
    """A block becomes another number of zeros or of anything."""
    place, size = int(rng.integers(len(content))), int(rng.integers(1, 2_000))
    new = bytes(int(rng.integers(2_000))) if rng.random() < 0.5 else rng.bytes(int(rng.integers(2_000)))
    return content[:place] + new + content[place + size :]


def graft(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Its own beginning once more, in the middle."""
    place = int(rng.integers(len(content)))
    return content[:place] + content[: int(rng.integers(1, 4_000))] + content[place:]


DAMAGES = (flip, flip_head, cut, swap, replace, graft)


def spoilt(seed: int, whole: Mapping[str, bytes]) -> tuple[str, str, bytes]:
    """Suffix, kinds of damage, and the file that this seed makes."""
    rng = np.random.default_rng(seed)
    suffix = SUFFIXES[seed % len(SUFFIXES)]
    content, names = bytearray(whole[suffix]), []
    for _ in range(int(rng.integers(1, 3))):
        damage = DAMAGES[int(rng.integers(len(DAMAGES)))]
        content = damage(content, rng) or bytearray(1)
        names.append(damage.__name__)
    return suffix, "+".join(names), bytes(content)


def outcome(path: Path, seed: int) -> str:
    """`good` or the reason; AssertionError where a clip is not what clips must be."""
    policy = AudioPolicy(accept_truncated=seed // len(SUFFIXES) % 2 == 0)
    start_seconds = float(seed % 3)
    try:
        clip = load_clip_audio(
            SoundLocator.from_path(path),
            start_seconds=start_seconds,
            end_seconds=start_seconds + 1,
            policy=policy,
        )
    except AudioError as error:
        text = str(error)
        assert "\n" not in text, text
        return error.reason
    assert np.isfinite(clip.wave_S).all()
    assert 0 < len(clip.wave_S) <= clip.rate_hz * 1.01 + 1
    assert np.isfinite(clip.resample_wave(32_000)).all()
    return "good"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Seeds:
    """A task: some seeds, and what became of those that a process did not survive."""

    folder: Path
    seeds: range
    condemned: tuple[tuple[int, str, str], ...] = ()

    def with_failed_row(self, row: int, reason: str, detail: str) -> "Seeds":
        return dataclasses.replace(self, condemned=(*self.condemned, (row, reason, detail)))


def work(task: Seeds) -> Iterator[int | None]:
    """Spoil and load; one line an outcome is appended to a file of the task, so a death loses one clip."""
    whole = {suffix: (task.folder / f"whole{suffix}").read_bytes() for suffix in SUFFIXES}
    told = task.folder / f"{task.seeds.start}.txt"
    lost = {row: f"{reason} {detail}" for row, reason, detail in task.condemned}
    done = {line.split("\t")[0] for line in told.read_text().splitlines()} if told.exists() else set()
    for seed in task.seeds:
        if str(seed) in done:
            continue
        suffix, how, content = spoilt(seed, whole)
        yield seed
        if seed in lost:
            found = lost[seed]
        else:
            path = task.folder / f"{seed}{suffix}"
            path.write_bytes(content)
            found = outcome(path, seed)
            path.unlink()
        with told.open("a") as file:
            file.write(f"{seed}\t{suffix}\t{how}\t{found}\n")


def run(count: int, folder: Path, *, first: int = 0, workers: int = 2) -> list[tuple[str, ...]]:
    """Seed, suffix, damage and outcome of `count` damaged files, in guarded processes."""
    whole_files(folder)
    seeds = range(first, first + count)
    tasks = [Seeds(folder=folder, seeds=seeds[at : at + TASK_CLIPS]) for at in range(0, count, TASK_CLIPS)]
    for _ in run_in_processes(work, tasks, workers=workers, clip_limit_seconds=CLIP_SECONDS):
        pass
    files = [folder / f"{task.seeds.start}.txt" for task in tasks]
    return [tuple(line.split("\t")) for file in files for line in file.read_text().splitlines()]


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """How often each outcome came, by container; then every crash and every hang by its seed."""
    counts = collections.Counter((suffix, found.split()[0]) for _, suffix, _, found in rows)
    words = sorted({found for _, found in counts}, key=lambda word: (word != "good", word))
    lines = [f"{'container':12}" + "".join(f"{word:>12}" for word in words)]
    lines += [f"{s:12}" + "".join(f"{counts[s, word]:12}" for word in words) for s in SUFFIXES]
    lines += [f"{'all':12}" + "".join(f"{sum(counts[s, word] for s in SUFFIXES):12}" for word in words)]
    lost = [row for row in rows if row[3].split()[0] in ("crashed", "timed_out")]
    return "\n".join(lines + ["  ".join(row) for row in lost])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, help="damaged files to make and load")
    parser.add_argument("--first", type=int, default=0, help="first seed; another, other damage")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    wish = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(table(run(wish.count, Path(folder), first=wish.first, workers=wish.workers)))


if __name__ == "__main__":
    main()
