"""The clips of the demo corpus: all clips are planned first, then each is rendered; a few are odd or broken.

Each `ClipKind` describes one kind of odd or broken clip, with the result that a build must give for it. The corpus has
one clip of each kind.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from pipeline.datasets.demo.audio_files import CONTAINERS_BY_NAME, DemoContainer
from pipeline.datasets.demo.synthesis import SYNTHESIS_RATE_HZ, DemoSound, coloured_noise

T = TypeVar("T")

DEMO_CLIP_SECONDS = 10.0

CLIPS_PER_VARIANT = 33  # one clip in 33 is shorter than 10 s, and one in 33 has an id that begins with "-"

NOISE_BED_DBFS = (-72.0, -50.0)

MIN_EVENT_SECONDS = 2

CLIP_ID_ALPHABET = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))

UNKNOWN_CLASS_MID = "/m/0unknown"

ERROR_PAGE_HTML = "<!DOCTYPE html>\n<html><body><h1>429 Too Many Requests</h1></body></html>\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSounds:
    """The sounds of each split, and the probabilities of the number of extra sounds in a clip."""

    sounds_by_split: dict[str, tuple[DemoSound, ...]]
    extra_sound_chances: tuple[float, ...]  # probability of no extra sound, of one, of two, ...


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoClip:
    """One row of the corpus: its entry in the lists, its sounds, and the properties of its file."""

    number: int  # seed of the samples, together with the seed of the corpus
    split: str
    clip_id: str
    start_seconds: float
    seconds: float  # of sound in the file
    file: str  # relative to the corpus
    container: str
    rate_hz: int
    channels: int
    parts: tuple[str, ...]  # names of sounds
    labels: tuple[str, ...]
    kind: str = "clip"  # or the name of a `ClipKind`
    expected: str = "good"  # or "unlisted", or the failure reason that the build must give

    @property
    def end_seconds(self) -> float:
        return self.start_seconds + self.seconds


def plan_demo_clips(
    rng: np.random.Generator, split_sounds: SplitSounds, *, split: str, numbers: range, used_ids: set[str]
) -> list[DemoClip]:
    """Return clips with these numbers; classes occur equally often, containers as often as `files_in_twenty` states.

    New ids are added to `used_ids` in lower case, so that no two ids differ only in case: some file systems would treat
    these as the same name.
    """
    # The class and the container of each clip.
    mids = sorted({sound.mids[0] for sound in split_sounds.sounds_by_split[split]})
    mid_of_clips = draw_evenly(rng, mids, len(numbers))
    deck = [container for container in CONTAINERS_BY_NAME.values() for _ in range(container.files_in_twenty)]
    container_of_clips = draw_evenly(rng, deck, len(numbers))
    return [
        plan_demo_clip(
            rng, split_sounds, split=split, number=number, mid=mid, container=container, used_ids=used_ids
        )
        for number, mid, container in zip(numbers, mid_of_clips, container_of_clips, strict=True)
    ]


def plan_demo_clip(
    rng: np.random.Generator,
    split_sounds: SplitSounds,
    *,
    split: str,
    number: int,
    mid: str,
    container: DemoContainer,
    used_ids: set[str],
) -> DemoClip:
    """Draw a clip of this class in this container. The order of the draws decides the content of every corpus."""
    # The sounds, and the id in the lists.
    sounds = choose_clip_sounds(rng, split_sounds, mid=mid, split=split)
    clip_id = draw_clip_id(rng, used_ids, starts_with_dash=number % CLIPS_PER_VARIANT == 0)

    # Most segments of AudioSet start at a multiple of 10 s; few are shorter than 10 s.
    starts_at_multiple = rng.random() < 0.7
    start_seconds = rng.integers(1, 60) * 10 if starts_at_multiple else rng.integers(1, 600)
    seconds = DEMO_CLIP_SECONDS
    if number % CLIPS_PER_VARIANT == CLIPS_PER_VARIANT // 2:
        seconds = round(rng.uniform(5.0, 9.8), 1)

    return DemoClip(
        number=number,
        split=split,
        clip_id=clip_id,
        start_seconds=float(start_seconds),
        seconds=seconds,
        file=f"audio/{split}/{clip_id}.{container.extension}",
        container=container.name,
        rate_hz=int(rng.choice(container.rates_hz)),
        channels=2 if rng.random() < 0.4 else 1,
        parts=tuple(sound.name for sound in sounds),
        labels=tuple(dict.fromkeys(mid for sound in sounds for mid in sound.mids)),
    )


def choose_clip_sounds(
    rng: np.random.Generator, split_sounds: SplitSounds, *, mid: str, split: str
) -> list[DemoSound]:
    """Draw one sound of the class and perhaps extra sounds of other classes; a sound that must be alone gets none."""
    sounds = split_sounds.sounds_by_split[split]
    sounds_of_class = [sound for sound in sounds if sound.mids[0] == mid]
    other_sounds = [sound for sound in sounds if not sound.is_alone and sound.mids[0] != mid]
    first = sounds_of_class[rng.integers(len(sounds_of_class))]

    # Extra sounds, each at most once.
    extra_count = 0
    if not first.is_alone:
        chances = split_sounds.extra_sound_chances
        extra_count = int(rng.choice(len(chances), p=chances))
    extra_indices = rng.choice(len(other_sounds), extra_count, replace=False)
    return [first, *(other_sounds[index] for index in extra_indices)]


def draw_evenly(rng: np.random.Generator, choices: Sequence[T], count: int) -> Iterator[T]:
    """Return `count` choices; all choices are used once in random order before any is used again."""
    decks = -(-count // len(choices))
    order = [index for _ in range(decks) for index in rng.permutation(len(choices))]
    return (choices[index] for index in order[:count])


def draw_clip_id(rng: np.random.Generator, used_ids: set[str], *, starts_with_dash: bool) -> str:
    """Draw an id of 11 characters, like YouTube's, that is not in `used_ids`, and add it to `used_ids`."""
    while True:
        clip_id = "".join(rng.choice(CLIP_ID_ALPHABET, 11))
        if starts_with_dash:
            clip_id = f"-{clip_id[1:]}"
        if clip_id.lower() not in used_ids:
            used_ids.add(clip_id.lower())
            return clip_id


def render_clip(clip: DemoClip, sounds: Sequence[DemoSound], *, seed: int) -> np.ndarray:
    """Return the clip as float32 `wave_SN` (sample, channel) at 48 kHz; values may exceed 1 until it is written.

    Each sound gets its own level, onset, length and balance between the channels, over faint background noise. The
    samples depend only on `seed` and the number of the clip.
    """
    rng = np.random.default_rng([seed, clip.number])
    wave_SN = np.zeros((round(clip.seconds * SYNTHESIS_RATE_HZ), clip.channels), dtype=np.float32)

    # The background noise. The second channel is the first one shifted, which differs from it at half the cost.
    if not any(sound.is_alone for sound in sounds):
        bed_S = coloured_noise(rng, len(wave_SN), db_per_octave=rng.uniform(-6.0, 0.0))
        wave_SN[:, 0] = bed_S * rms_of_dbfs(rng.uniform(*NOISE_BED_DBFS))
        wave_SN[:, -1] = np.roll(wave_SN[:, 0], len(bed_S) // 2)

    # The sounds, one after another, with draws from the same generator.
    for sound in sounds:
        mix_in_sound(rng, wave_SN, sound)
    return wave_SN


def mix_in_sound(rng: np.random.Generator, wave_SN: np.ndarray, sound: DemoSound) -> None:
    """Add one sound in place: over the whole clip, or for at least 2 s from a random onset."""
    # The length and the onset of the sound.
    samples = len(wave_SN)
    if not sound.is_alone and rng.random() < 0.65:
        samples = int(rng.integers(MIN_EVENT_SECONDS * SYNTHESIS_RATE_HZ, samples))
    onset = rng.integers(len(wave_SN) - samples + 1)

    # The wave at a random level, with faded ends, louder in one channel than in the other.
    event_S = sound.make_wave(rng, samples)
    event_S = scale_to_level(event_S, rng.uniform(*sound.level_dbfs))
    event_S = fade_both_ends(event_S, rng.uniform(0.005, 0.05))
    for channel_S in wave_SN.T:
        channel_S[onset : onset + samples] += np.float32(rng.uniform(0.5, 1.0)) * event_S


def scale_to_level(wave_S: np.ndarray, loudest_dbfs: float) -> np.ndarray:
    """Return the wave, scaled so that its loudest tenth of a second has this RMS."""
    tenth_samples = SYNTHESIS_RATE_HZ // 10
    tenths_NS = wave_S[: len(wave_S) // tenth_samples * tenth_samples].reshape(-1, tenth_samples)
    loudest_rms = np.sqrt(np.square(tenths_NS).mean(axis=1).max())
    return wave_S * np.float32(rms_of_dbfs(loudest_dbfs) / loudest_rms)


def fade_both_ends(wave_S: np.ndarray, seconds: float) -> np.ndarray:
    """Fade both ends of the wave in place over this time, and return the wave."""
    ramp_N = np.linspace(0.0, 1.0, max(2, round(seconds * SYNTHESIS_RATE_HZ)), dtype=np.float32)
    wave_S[: len(ramp_N)] *= ramp_N
    wave_S[-len(ramp_N) :] *= ramp_N[::-1]
    return wave_S


def rms_of_dbfs(dbfs: float) -> np.float32:
    """Return the RMS of a level; 0 dBFS is an RMS of 1."""
    return np.float32(10 ** (dbfs / 20))


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipKind:
    """One kind of odd or broken clip."""

    name: str
    expected: str  # see `DemoClip.expected`
    description: str  # description of the fault, for the README of the corpus
    container: str = ""  # empty: any
    extension: str = ""  # extension of the file; empty: the container's own


# These rows and files are added to the requested number of good clips.
BROKEN_FILE_KINDS = (
    ClipKind(name="empty_file", expected="unreadable", description="a file of 0 bytes", container="wav-16"),
    ClipKind(
        name="truncated_wav",
        expected="truncated",
        description="a wav whose header declares 2.5 times what is there",
        container="wav-16",
    ),
    ClipKind(
        name="html_as_m4a",
        expected="unreadable",
        description="the web page that a refused download leaves, named .m4a",
        container="m4a",
    ),
    ClipKind(name="missing_file", expected="missing", description="a row without a file", container="flac"),
    ClipKind(name="digital_silence", expected="silent", description="ten seconds of zeros", container="flac"),
    ClipKind(
        name="nan_float",
        expected="non_finite",
        description="a float wav with NaN in it",
        container="wav-float",
    ),
    ClipKind(
        name="unlisted_file", expected="unlisted", description="a file that no list names", container="flac"
    ),
)

# These rows are added too, but they have no file of their own.
REPEATED_ROW_KINDS = (
    ClipKind(
        name="duplicate_id",
        expected="duplicate",
        description="an id for the second time in one list, with other labels: the first row counts",
    ),
    ClipKind(
        name="in_both_lists",
        expected="duplicate",
        description="an id of the eval list in the train list too: the eval row counts",
    ),
)

# These clips are among the good clips: unusual but usable.
ODD_CLIP_KINDS = (
    ClipKind(
        name="wrong_extension",
        expected="good",
        description="a flac named .wav",
        container="flac",
        extension="wav",
    ),
    ClipKind(
        name="unknown_label",
        expected="good",
        description=f"a label outside the class list, {UNKNOWN_CLASS_MID}",
    ),
)


def with_clip_kind(clip: DemoClip, kind: ClipKind) -> DemoClip:
    """Return the clip changed to this kind, in another container and with another file name if the kind has these."""
    clip = replace(clip, kind=kind.name, expected=kind.expected)
    if not kind.container:
        return clip
    extension = kind.extension or CONTAINERS_BY_NAME[kind.container].extension
    file = str(PurePosixPath(clip.file).with_suffix(f".{extension}"))
    return replace(clip, container=kind.container, file=file)


def make_odd_clips(train_clips: Sequence[DemoClip]) -> list[DemoClip]:
    """Return the clips, with the second and the third changed to the kinds of ODD_CLIP_KINDS."""
    wrong_extension, unknown_label = (
        with_clip_kind(clip, kind) for clip, kind in zip(train_clips[1:3], ODD_CLIP_KINDS, strict=True)
    )
    unknown_label = replace(unknown_label, labels=(*unknown_label.labels, UNKNOWN_CLASS_MID))
    return [train_clips[0], wrong_extension, unknown_label, *train_clips[3:]]


def make_repeated_rows(train_clips: Sequence[DemoClip], eval_clips: Sequence[DemoClip]) -> list[DemoClip]:
    """Return rows of the train list whose ids are already in a list, in the order of REPEATED_ROW_KINDS."""
    duplicate_id = replace(train_clips[0], labels=train_clips[3].labels)
    in_both_lists = replace(eval_clips[0], split=train_clips[0].split)
    return [
        with_clip_kind(clip, kind)
        for clip, kind in zip((duplicate_id, in_both_lists), REPEATED_ROW_KINDS, strict=True)
    ]


def damage_wave(wave_SN: np.ndarray, kind: str) -> np.ndarray:
    """Return the samples, damaged as this kind requires."""
    if kind == "digital_silence":
        return np.zeros_like(wave_SN)
    return wave_SN


def damage_file(path: Path, kind: str) -> None:
    """Turn a good file into a file of this kind."""
    match kind:
        case "empty_file":
            path.write_bytes(b"")
        case "truncated_wav":
            # Cut the file; its header still declares the whole length.
            path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 5])
        case "html_as_m4a":
            path.write_text(ERROR_PAGE_HTML, encoding="utf-8")
        case "missing_file":
            path.unlink()
        case "nan_float":
            # Overwrite a thousand samples near the end.
            content = bytearray(path.read_bytes())
            content[-40_000:-36_000] = np.full(1_000, np.nan, dtype="<f4").tobytes()
            path.write_bytes(content)
