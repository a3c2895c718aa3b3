"""Damaged sounds by the thousand: `just fuzz 2000`. Every outcome is a clip or a reason, or it is told here.

The damage is seeded: `spoilt(seed, whole)` makes the same file again, in any process. Files that crash or hang a
decoder, or fail in a way that nobody foresaw, are kept with `--keep FOLDER`.
"""

import argparse
import collections
import dataclasses
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from sounds import ENCODERS, SUBTYPES, babble, encode, write

from pipeline.audio.decode import AudioPolicy, load_clip_audio, stream_wave
from pipeline.audio.sources import SoundLocator
from pipeline.build.workers import run_in_processes
from pipeline.errors import AudioError, UnexpectedAudioError

RATE_HZ = 48_000

# Codec and container of what else is damaged.
MORE = {
    ".flv": ("libmp3lame", "flv"),
    ".avi": ("libmp3lame", "avi"),
    ".mpg": ("mp2", "mpeg"),
    ".mov": ("pcm_s16le", "mov"),
    ".ac3": ("ac3", "ac3"),
    ".eac3": ("eac3", "eac3"),
    ".loas": ("aac", "latm"),
    ".nut": ("flac", "nut"),
    ".oga": ("flac", "ogg"),
    ".sox": ("pcm_s32le", "sox"),
    ".adpcm.wav": ("adpcm_ms", "wav"),
    ".wtv": ("mp2", "wtv"),
}

JOINED = (".ogg", ".opus", ".mp3", ".flac", ".aac", ".ts")  # also damaged as two files end to end

SUFFIXES = (*ENCODERS, *SUBTYPES, ".wav", *MORE, *(f".joined{suffix}" for suffix in JOINED))

TASK_CLIPS = 50

CLIP_SECONDS = 30.0

EXTREMES = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 2**63 - 1, 2**64 - 1)

UNEXPECTED = "unexpected"


def whole_files(folder: Path, *, seconds: float = 1.0) -> dict[str, bytes]:
    """The same sound in every container, by suffix."""
    sound_SC = np.stack([babble(seconds, RATE_HZ, seed=seed) for seed in range(2)], axis=1)
    whole = {}
    for suffix in (*ENCODERS, *SUBTYPES, ".wav"):
        whole[suffix] = write(folder / f"whole{suffix}", sound_SC, RATE_HZ).read_bytes()
    for suffix, (codec, kind) in MORE.items():
        encode(folder / f"whole{suffix}", sound_SC, RATE_HZ, codec, kind, {})
        whole[suffix] = (folder / f"whole{suffix}").read_bytes()
    for suffix in JOINED:
        whole[f".joined{suffix}"] = whole[suffix] * 2
    return whole


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


def set_length(content: bytearray, rng: np.random.Generator) -> bytearray:
    """A field of two, four or eight bytes, most often in the header, becomes a very small or very large number."""
    size = int(rng.choice([2, 4, 8]))
    end = min(len(content), 600) if rng.random() < 0.7 else len(content)
    place = int(rng.integers(end))
    number = EXTREMES[int(rng.integers(len(EXTREMES)))] % 2 ** (8 * size)
    order = "big" if rng.random() < 0.5 else "little"
    content[place : place + size] = number.to_bytes(size, order)[: len(content) - place]
    return content


def cut(content: bytearray, rng: np.random.Generator) -> bytearray:
    """The end."""
    return content[: int(rng.integers(len(content)))]


def behead(content: bytearray, rng: np.random.Generator) -> bytearray:
    """The beginning."""
    return content[int(rng.integers(len(content))) :]


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


def repeat(content: bytearray, rng: np.random.Generator) -> bytearray:
    """A block comes several times."""
    place, size = int(rng.integers(len(content))), int(rng.integers(1, 8_000))
    block = content[place : place + size]
    return content[:place] + block * int(rng.integers(2, 20)) + content[place + size :]


def graft(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Its own beginning once more, in the middle."""
    place = int(rng.integers(len(content)))
    return content[:place] + content[: int(rng.integers(1, 4_000))] + content[place:]


DAMAGES = (flip, flip_head, set_length, cut, behead, swap, replace, repeat, graft)


def spoilt(seed: int, whole: Mapping[str, bytes]) -> tuple[str, str, bytes]:
    """Suffix, kinds of damage, and the file that this seed makes."""
    rng = np.random.default_rng(seed)
    suffix = SUFFIXES[seed % len(SUFFIXES)]
    content, names = bytearray(whole[suffix]), []
    for _ in range(int(rng.integers(1, 4))):
        damage = DAMAGES[int(rng.integers(len(DAMAGES)))]
        if len(content) > 1:
            content = damage(content, rng) or bytearray(1)
            names.append(damage.__name__)
    return suffix, "+".join(names), bytes(content)


def outcome(path: Path, seed: int) -> str:
    """`good` or the reason; AssertionError where a clip is not what clips must be."""
    policy = AudioPolicy(accept_truncated=seed // len(SUFFIXES) % 2 == 0)
    start_seconds = float(seed % 3)
    locator = SoundLocator(path=str(path), source=path.name, exact=seed % 2 == 0)
    try:
        clip = load_clip_audio(
            locator, start_seconds=start_seconds, end_seconds=start_seconds + 1, policy=policy
        )
        assert np.isfinite(clip.wave_S).all()
        assert 0 < len(clip.wave_S) <= clip.rate_hz * 1.01 + 1
        assert np.isfinite(clip.resample_wave(32_000)).all()
        if seed % 5 == 0:
            limited = AudioPolicy(accept_truncated=True, keep_silent=True, max_seconds=600.0)
            for piece_S in stream_wave(locator, 32_000, policy=limited):
                assert np.isfinite(piece_S).all()
    except UnexpectedAudioError as error:
        return f"{UNEXPECTED} {error.fault}"
    except AudioError as error:
        text = str(error)
        assert "\n" not in text, text
        return error.reason
    return "good"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Seeds:
    """A task: some seeds, and what became of those that a process did not survive."""

    folder: Path
    seeds: range
    condemned: tuple[tuple[int, str, str], ...] = ()

    def with_failed_row(self, row: int, reason: str, detail: str) -> "Seeds":
        return dataclasses.replace(self, condemned=(*self.condemned, (row, reason, detail)))


def read_whole_files(folder: Path) -> dict[str, bytes]:
    """The undamaged files that `whole_files` has written to a folder."""
    whole = {
        suffix: (folder / f"whole{suffix}").read_bytes() for suffix in SUFFIXES if "joined" not in suffix
    }
    return whole | {f".joined{suffix}": whole[suffix] * 2 for suffix in JOINED}


def work(task: Seeds) -> Iterator[int | None]:
    """Spoil and load; one line an outcome is appended to a file of the task, so a death loses one clip."""
    whole = read_whole_files(task.folder)
    told = task.folder / f"{task.seeds.start}.txt"
    lost = {row: f"{reason} {detail}" for row, reason, detail in task.condemned}
    done = {line.split("\t")[0] for line in told.read_text().splitlines()} if told.exists() else set()
    for seed in task.seeds:
        if str(seed) in done:
            continue
        suffix, how, content = spoilt(seed, whole)
        yield seed
        began = time.monotonic()
        if seed in lost:
            found = lost[seed]
        else:
            path = task.folder / f"{seed}{suffix}"
            path.write_bytes(content)
            found = outcome(path, seed)
            path.unlink()
        seconds = time.monotonic() - began
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        with told.open("a") as file:
            file.write(f"{seed}\t{suffix}\t{how}\t{found}\t{seconds:.2f}\t{peak_mib}\n")


def run(count: int, folder: Path, *, first: int = 0, workers: int = 2) -> list[tuple[str, ...]]:
    """Seed, suffix, damage, outcome, seconds and peak memory of `count` damaged files, in guarded processes."""
    whole_files(folder)
    seeds = range(first, first + count)
    tasks = [Seeds(folder=folder, seeds=seeds[at : at + TASK_CLIPS]) for at in range(0, count, TASK_CLIPS)]
    for _ in run_in_processes(work, tasks, workers=workers, clip_limit_seconds=CLIP_SECONDS):
        pass
    files = [folder / f"{task.seeds.start}.txt" for task in tasks]
    return [tuple(line.split("\t")) for file in files for line in file.read_text().splitlines()]


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """How often each outcome came, by container; then every crash, hang and surprise by its seed."""
    counts = collections.Counter((suffix, found.split()[0]) for _, suffix, _, found, *_ in rows)
    words = sorted({found for _, found in counts}, key=lambda word: (word != "good", word))
    lines = [f"{'container':14}" + "".join(f"{word:>12}" for word in words)]
    lines += [f"{s:14}" + "".join(f"{counts[s, word]:12}" for word in words) for s in SUFFIXES]
    lines += [f"{'all':14}" + "".join(f"{sum(counts[s, word] for s in SUFFIXES):12}" for word in words)]
    slowest = max(rows, key=lambda row: float(row[4]))
    peak_mib = max(int(row[5]) for row in rows)
    lines.append(f"peak memory of a worker {peak_mib} MiB; slowest {slowest[4]} s (seed {slowest[0]})")
    lost = [row for row in rows if row[3].split()[0] in ("crashed", "timed_out", UNEXPECTED)]
    return "\n".join(lines + ["  ".join(row) for row in lost])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, help="damaged files to make and load")
    parser.add_argument("--first", type=int, default=0, help="first seed; another, other damage")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--keep", type=Path, help="folder for the files that crash, hang or surprise")
    wish = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(wish.count, Path(folder), first=wish.first, workers=wish.workers)
        print(table(rows))
        if wish.keep:
            wish.keep.mkdir(parents=True, exist_ok=True)
            whole = read_whole_files(Path(folder))
            for seed, suffix, _, found, *_ in rows:
                if found.split()[0] in ("crashed", "timed_out", UNEXPECTED):
                    (wish.keep / f"{seed}{suffix}").write_bytes(spoilt(int(seed), whole)[2])


if __name__ == "__main__":
    main()
