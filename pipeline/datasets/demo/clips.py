"""The clips of the demo corpus: all of them planned first, then each rendered on its own.

The demo corpus's few broken and odd inputs: one of each kind, and what a build must make of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from pipeline.datasets.demo.audio_files import CONTAINERS_BY_NAME
from pipeline.datasets.demo.synthesis import SYNTHESIS_RATE_HZ, DemoSound, coloured_noise

T = TypeVar("T")

DEMO_CLIP_SECONDS = 10.0

CLIPS_PER_VARIANT = 33  # one clip in 33 is shorter than 10 s, and one in 33 has an id that begins with "-"

NOISE_BED_DBFS = (-72.0, -50.0)

CLIP_ID_ALPHABET = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSounds:
    """The sounds a split may draw from, and how many go into one clip (the chance of 1, of 2, ...)."""

    sounds_by_split: dict[str, tuple[DemoSound, ...]]
    extra_sound_chances: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoClip:
    """One row of the corpus: where it stands in the lists, what is heard in it, how its file is made.

    `kind` is "clip" or names what is odd or broken; `expected` is "good", "unlisted" or the reason it must fail
    with; `seconds` is how long the file sounds; `number` seeds its samples.
    """

    number: int
    split: str
    clip_id: str
    start_seconds: float
    seconds: float
    file: str  # relative to the corpus
    container: str
    rate_hz: int
    channels: int
    parts: tuple[str, ...]
    labels: tuple[str, ...]
    kind: str = "clip"
    expected: str = "good"

    @property
    def end_seconds(self) -> float:
        return self.start_seconds + self.seconds


def plan_demo_clips(
    rng: np.random.Generator, split_sounds: SplitSounds, *, split: str, numbers: range, used_ids: set[str]
) -> list[DemoClip]:
    """The clips with these numbers: classes and containers dealt from decks, so that all occur equally often.

    New ids are added to `taken`, in lower case: no two differ in case alone, which some file systems merge.
    """
    by_class: dict[str, list[DemoSound]] = {}
    for sound in split_sounds.sounds_by_split[split]:
        by_class.setdefault(sound.mids[0], []).append(sound)
    classes = draw_evenly(rng, sorted(by_class), len(numbers))
    containers = draw_evenly(
        rng, [each for each in CONTAINERS_BY_NAME.values() for _ in range(each.files_in_twenty)], len(numbers)
    )
    clips = []
    for number, mid, container in zip(numbers, classes, containers, strict=True):
        sounds = choose_clip_sounds(rng, split_sounds, mid=mid, split=split)
        clip_id = draw_clip_id(rng, used_ids, starts_with_dash=number % CLIPS_PER_VARIANT == 0)
        clips.append(
            DemoClip(
                number=number,
                split=split,
                clip_id=clip_id,
                start_seconds=float(rng.integers(1, 60) * 10 if rng.random() < 0.7 else rng.integers(1, 600)),
                seconds=round(rng.uniform(5.0, 9.8), 1)
                if number % CLIPS_PER_VARIANT == CLIPS_PER_VARIANT // 2
                else DEMO_CLIP_SECONDS,
                file=f"audio/{split}/{clip_id}.{container.extension}",
                container=container.name,
                rate_hz=int(rng.choice(container.rates_hz)),
                channels=2 if rng.random() < 0.4 else 1,
                parts=tuple(sound.name for sound in sounds),
                labels=tuple(dict.fromkeys(mid for sound in sounds for mid in sound.mids)),
            )
        )
    return clips


def choose_clip_sounds(
    rng: np.random.Generator, split_sounds: SplitSounds, *, mid: str, split: str
) -> list[DemoSound]:
    """One sound of the class dealt, then perhaps others, all different; one that stands alone stays alone."""
    sounds = split_sounds.sounds_by_split[split]
    own = [sound for sound in sounds if sound.mids[0] == mid]
    first = own[rng.integers(len(own))]
    others = [sound for sound in sounds if not sound.is_alone and sound.mids[0] != mid]
    more = (
        0
        if first.is_alone
        else int(rng.choice(len(split_sounds.extra_sound_chances), p=split_sounds.extra_sound_chances))
    )
    return [first, *(others[at] for at in rng.choice(len(others), more, replace=False))]


def draw_evenly(rng: np.random.Generator, choices: Sequence[T], count: int) -> Iterator[T]:
    """`count` cards from a deck that is shuffled anew whenever it is used up."""
    order = [at for _ in range(-(-count // len(choices))) for at in rng.permutation(len(choices))]
    return (choices[at] for at in order[:count])


def draw_clip_id(rng: np.random.Generator, used_ids: set[str], *, starts_with_dash: bool) -> str:
    """A YouTube-like id of 11 characters that is not taken yet."""
    while True:
        clip_id = "".join(rng.choice(CLIP_ID_ALPHABET, 11))
        clip_id = f"-{clip_id[1:]}" if starts_with_dash else clip_id
        if clip_id.lower() not in used_ids:
            used_ids.add(clip_id.lower())
            return clip_id


def render_clip(clip: DemoClip, sounds: Sequence[DemoSound], *, seed: int) -> np.ndarray:
    """The clip as float32 `wave_SN` (sample, channel) at 48 kHz; what stands out beyond 1 is the writer's to mend.

    Each sound gets its own level, onset, length and place between the channels; under it lies a bed of faint noise.
    The samples depend on `seed` and the clip's number only.
    """
    rng = np.random.default_rng([seed, clip.number])
    wave_SN = np.zeros((round(clip.seconds * SYNTHESIS_RATE_HZ), clip.channels), dtype=np.float32)
    if not any(sound.is_alone for sound in sounds):
        bed_S = coloured_noise(rng, len(wave_SN), db_per_octave=rng.uniform(-6.0, 0.0))
        wave_SN[:, 0] = bed_S * rms_of_dbfs(rng.uniform(*NOISE_BED_DBFS))
        wave_SN[:, -1] = np.roll(wave_SN[:, 0], len(bed_S) // 2)  # unlike the other side, at half the cost
    for sound in sounds:
        mix_in_sound(rng, wave_SN, sound)
    return wave_SN


def mix_in_sound(rng: np.random.Generator, wave_SN: np.ndarray, sound: DemoSound) -> None:
    """Add one sound in place: all along the clip, or for 2 s at least from a random onset on."""
    samples = len(wave_SN)
    if not sound.is_alone and rng.random() < 0.65:
        samples = int(rng.integers(2 * SYNTHESIS_RATE_HZ, samples))
    onset = rng.integers(len(wave_SN) - samples + 1)
    event_S = fade_both_ends(
        scale_to_level(sound.make_wave(rng, samples), rng.uniform(*sound.level_dbfs)),
        rng.uniform(0.005, 0.05),
    )
    for channel_S in wave_SN.T:
        channel_S[onset : onset + samples] += np.float32(rng.uniform(0.5, 1.0)) * event_S


def scale_to_level(wave_S: np.ndarray, loudest_dbfs: float) -> np.ndarray:
    """The wave scaled so that the loudest of its tenths of a second has this RMS."""
    tenth = SYNTHESIS_RATE_HZ // 10
    tenths_NS = wave_S[: len(wave_S) // tenth * tenth].reshape(-1, tenth)
    loudest = np.sqrt(np.square(tenths_NS).mean(axis=1).max())
    return wave_S * np.float32(rms_of_dbfs(loudest_dbfs) / loudest)


def fade_both_ends(wave_S: np.ndarray, seconds: float) -> np.ndarray:
    """The wave with both ends faded over this time."""
    ramp_N = np.linspace(0.0, 1.0, max(2, round(seconds * SYNTHESIS_RATE_HZ)), dtype=np.float32)
    wave_S[: len(ramp_N)] *= ramp_N
    wave_S[-len(ramp_N) :] *= ramp_N[::-1]
    return wave_S


def rms_of_dbfs(dbfs: float) -> np.float32:
    """The RMS that a level means: 0 dBFS is 1."""
    return np.float32(10 ** (dbfs / 20))


UNKNOWN_CLASS_MID = "/m/0unknown"

ERROR_PAGE_HTML = "<!DOCTYPE html>\n<html><body><h1>429 Too Many Requests</h1></body></html>\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipKind:
    """What is wrong, how it must come out (good, unlisted, or a reason to fail), and in which container it is."""

    name: str
    expected: str
    description: str
    container: str = ""
    extension: str = ""  # where it is not the container's own


TRUNCATED_WAV_TEXT = "a wav whose header declares 2.5 times what is there"

WEB_PAGE_TEXT = "the web page that a refused download leaves, named .m4a"

REPEATED_ID_TEXT = "an id for the second time in one list, with other labels: the first row counts"

ID_IN_BOTH_LISTS_TEXT = "an id of the eval list in the train list too: the eval row counts"

# Beside the good clips: these rows and files come on top of the number asked for.
BROKEN_FILE_KINDS = (
    ClipKind(name="empty_file", expected="unreadable", description="a file of 0 bytes", container="wav-16"),
    ClipKind(name="truncated_wav", expected="truncated", description=TRUNCATED_WAV_TEXT, container="wav-16"),
    ClipKind(name="html_as_m4a", expected="unreadable", description=WEB_PAGE_TEXT, container="m4a"),
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

REPEATED_ROW_KINDS = (
    ClipKind(name="duplicate_id", expected="duplicate", description=REPEATED_ID_TEXT),
    ClipKind(name="in_both_lists", expected="duplicate", description=ID_IN_BOTH_LISTS_TEXT),
)

# Among the good clips: usable, only odd.
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
    """The clip as one of this kind: in another container and under another name where the kind asks for it."""
    clip = replace(clip, kind=kind.name, expected=kind.expected)
    if not kind.container:
        return clip
    extension = kind.extension or CONTAINERS_BY_NAME[kind.container].extension
    file = str(PurePosixPath(clip.file).with_suffix(f".{extension}"))
    return replace(clip, container=kind.container, file=file)


def make_repeated_rows(train_clips: Sequence[DemoClip], eval_clips: Sequence[DemoClip]) -> list[DemoClip]:
    """The rows of the train list that name a clip which stands elsewhere already, in the order of EXTRA_ROWS."""
    twice = replace(train_clips[0], labels=train_clips[3].labels)
    both = replace(eval_clips[0], split=train_clips[0].split)
    return [with_clip_kind(clip, kind) for clip, kind in zip((twice, both), REPEATED_ROW_KINDS, strict=True)]


def make_odd_clips(train_clips: Sequence[DemoClip]) -> list[DemoClip]:
    """The clips, the second and third of them made odd as ODD_CLIPS says."""
    wrong, unknown = (
        with_clip_kind(clip, kind) for clip, kind in zip(train_clips[1:3], ODD_CLIP_KINDS, strict=True)
    )
    return [
        train_clips[0],
        wrong,
        replace(unknown, labels=(*unknown.labels, UNKNOWN_CLASS_MID)),
        *train_clips[3:],
    ]


def damage_wave(wave_SN: np.ndarray, kind: str) -> np.ndarray:
    """The samples as a clip of this kind has them."""
    if kind == "digital_silence":
        return np.zeros_like(wave_SN)
    return wave_SN


def damage_file(path: Path, kind: str) -> None:
    """Make a good file into one of this kind."""
    match kind:
        case "empty_file":
            path.write_bytes(b"")
        case "truncated_wav":
            path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 5])
        case "html_as_m4a":
            path.write_text(ERROR_PAGE_HTML, encoding="utf-8")
        case "missing_file":
            path.unlink()
        case "nan_float":
            content = bytearray(path.read_bytes())
            content[-40_000:-36_000] = np.full(1_000, np.nan, dtype="<f4").tobytes()
            path.write_bytes(content)
