"""Sounds as a caller has them, files or arrays, turned into what is embedded: locators of files, mono float32 waves."""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.audio.sources import (
    ARCHIVE_KINDS,
    MEMBER_SEPARATOR,
    SOURCES_SCHEMA,
    SoundLocator,
    file_extension,
    find_sounds,
)
from pipeline.errors import InputError, RunError
from pipeline.messages import print_to_stderr
from pipeline.object_store import is_remote_url

# A file or folder; an array of samples; or a Hugging Face audio value with `array` and `sampling_rate`.
Sound = str | Path | np.ndarray | Tensor | Mapping[str, Any]

# The shorter axis of a two-dimensional array is its channels, if there are no more than these.
MAX_CHANNELS = 16

# Rates outside are taken for a mistake, such as kHz.
LOWEST_RATE_HZ = 1_000
HIGHEST_RATE_HZ = 768_000

# The value of full scale of integer samples; those of uint8 are around 128.
FULL_SCALE = {torch.int16: 2.0**15, torch.int32: 2.0**31, torch.uint8: 2.0**7}

MAX_REPR_LETTERS = 60  # of a value that is no sound, in a message


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ArraySound:
    """A mono wave, float32 on the CPU, and its rate."""

    wave_S: np.ndarray
    rate_hz: int


def read_sound_inputs(
    sounds: Sound | Sequence[Sound], rate_hz: float | None
) -> tuple[list[SoundLocator | ArraySound], list[str]]:
    """Return the sounds, each as a file or a wave, and a name of each for messages.

    A path or an array is one sound; a list or tuple of them is several; a folder is all the sounds in it, as on the
    command line. `rate_hz` is the rate of every array. InputError for a folder without a sound; RunError for a value
    that is no sound, an impossible shape, or a rate that is missing, superfluous or implausible.
    """
    items = list(sounds) if isinstance(sounds, list | tuple) else [sounds]
    if rate_hz is not None:
        check_rate_hz(rate_hz)
    inputs: list[SoundLocator | ArraySound] = []
    names: list[str] = []
    for number, item in enumerate(items):
        name = f"sounds[{number}]"
        if isinstance(item, str | Path) and Path(item).is_dir():
            found = list(sounds_at_location(str(item)))
            inputs += found
            names += [path_as_given(locator, str(item)) for locator in found]
            continue
        if isinstance(item, str | Path):
            inputs.append(SoundLocator.from_path(Path(item)))
            names.append(str(item))
            continue
        inputs.append(read_array(item, rate_hz, name))
        names.append(name)

    # A file knows its own rate.
    if rate_hz is not None and not any(isinstance(given, ArraySound) for given in inputs):
        raise RunError(
            f"rate_hz={rate_hz:g}: is for arrays, and all sounds are files, which state their own rate"
        )
    return inputs, names


def sounds_at_location(location: str) -> Iterator[SoundLocator]:
    """Yield the sounds at one location; raises InputError."""
    is_remote = is_remote_url(location)
    path = Path(location)
    if not is_remote and not path.exists():
        raise InputError(f"{location}: no such file or folder; expected sounds, or a store")

    # A single file is treated as a sound, whatever its extension.
    if not is_remote and path.is_file() and file_extension(location) not in ARCHIVE_KINDS:
        yield SoundLocator.from_path(path.absolute())
        return

    # List the sounds in folders and archives.
    found = find_sounds([location if is_remote else path.absolute()])
    for note in found.notes:
        print_to_stderr(note)
    if found.sounds.is_empty():
        raise InputError(f"{location}: holds no sound; expected audio files, or archives of them")
    for row in found.sounds.select(*SOURCES_SCHEMA).iter_rows(named=True):
        yield SoundLocator(**row)


def sound_path(locator: SoundLocator, file: str | None = None) -> str:
    """Return the path of a sound; for a sound in an archive ARCHIVE::MEMBER. `file` replaces the locator's path."""
    path = locator.path if file is None else file
    if locator.kind == "file":
        return path
    member = locator.source.rpartition(MEMBER_SEPARATOR)[2]
    return path + MEMBER_SEPARATOR + member


def path_as_given(locator: SoundLocator, location: str) -> str:
    """Return the path of a sound found at `location` as the caller would write it.

    It is the location itself, or a folder as it was given, joined with the path below it.
    """
    if is_remote_url(location):
        return sound_path(locator)
    place = str(Path(location).absolute())
    if locator.path == place:
        return sound_path(locator, location)
    return sound_path(locator, os.path.join(location, locator.path.removeprefix(f"{place}/")))


def directory_entry(path: str) -> str:
    """Return the same text for all paths that lead to one entry of a folder; links to files are entries themselves."""
    if is_remote_url(path):
        return path
    folder, name = os.path.split(path)
    return f"{real_folder(folder)}/{name}"


@functools.lru_cache(maxsize=1024)
def real_folder(folder: str) -> str:
    """Return a folder's path without links; remembered, as a folder has many sounds."""
    return os.path.realpath(folder)


def read_array(item: Any, rate_hz: float | None, name: str) -> ArraySound:
    """Return an array, tensor or Hugging Face audio value as a mono wave; RunError if it is none, or has no rate."""
    # A value of a `datasets.Audio` column has its own rate.
    if isinstance(item, Mapping) and {"array", "sampling_rate"} <= set(item):
        rate_hz = item["sampling_rate"]
        item = np.asarray(item["array"])
    if not isinstance(item, np.ndarray | Tensor):
        raise RunError(
            f"{name} is {type(item).__name__} {str(item)[:MAX_REPR_LETTERS]}: expected a path, a NumPy array or a "
            "tensor, or a list of them; the rate of arrays goes to rate_hz="
        )
    if rate_hz is None:
        raise RunError(f"{name} is an array: say its rate, such as embed(wave, rate_hz=44100)")
    wave_S = mono_wave_S(float_samples(item, name), name)
    return ArraySound(wave_S=wave_S, rate_hz=check_rate_hz(rate_hz))


def check_rate_hz(rate_hz: float) -> int:
    """Return a rate of any type as a whole number; RunError for one at which no sound is recorded."""
    if isinstance(rate_hz, bool) or not isinstance(rate_hz, int | float | np.integer | np.floating):
        raise RunError(f"audio at {rate_hz!r}: expected a rate in Hz, such as 44100")
    if LOWEST_RATE_HZ <= rate_hz <= HIGHEST_RATE_HZ and rate_hz == int(rate_hz):
        return int(rate_hz)
    hint = f"; {rate_hz:g} kHz is rate_hz={rate_hz * 1000:.0f}" if 1 < rate_hz < LOWEST_RATE_HZ else ""
    raise RunError(
        f"audio at {rate_hz:g} Hz: expected a whole number from {LOWEST_RATE_HZ:,} to {HIGHEST_RATE_HZ:,}{hint}"
    )


def float_samples(samples: np.ndarray | Tensor, name: str = "audio") -> Tensor:
    """Return samples as float32 on the CPU, integers scaled to [-1, 1); RunError for other types."""
    if not isinstance(samples, Tensor):
        if samples.dtype.kind not in "fiu":
            raise RunError(f"{name} of {samples.dtype}: expected float, int16, int32 or uint8 samples")
        samples = torch.from_numpy(np.ascontiguousarray(samples))
    if samples.is_floating_point():
        return samples.detach().to("cpu", torch.float32)

    # The full scale of other integers is not known.
    if samples.dtype not in FULL_SCALE:
        dtype = str(samples.dtype).removeprefix("torch.")
        raise RunError(
            f"{name} of {dtype}: expected floats in [-1, 1], int16, int32 or uint8; divide by the largest value"
        )
    middle = FULL_SCALE[samples.dtype] if samples.dtype == torch.uint8 else 0.0
    scaled = (samples.detach().to("cpu", torch.float64) - middle) / FULL_SCALE[samples.dtype]
    return scaled.float()


def mono_wave_S(samples: Tensor, name: str) -> np.ndarray:
    """Return one sound of shape [S], [channels, S] or [S, channels] mixed to mono; RunError for another shape.

    The shorter axis is the channels; there are at most MAX_CHANNELS.
    """
    shape = tuple(samples.shape)
    if samples.ndim == 1:
        return samples.numpy()
    channels = min(shape, default=0)
    if samples.ndim != 2 or channels > MAX_CHANNELS or shape[0] == shape[1]:
        raise RunError(
            f"{name} of shape {list(shape)}: expected one sound, [samples], [channels, samples] or [samples, channels] "
            f"with at most {MAX_CHANNELS} channels; give several sounds as a list"
        )
    if not samples.numel():
        # A mean of no channels would be nan.
        return samples.flatten().numpy()
    return samples.mean(0 if shape[0] == channels else 1).numpy()


def float_waves_BS(wave_BS: np.ndarray | Tensor) -> Tensor:
    """Return mono waves `[B, S]` or `[S]` as float32 `[B, S]` on the CPU; RunError for another shape or type.

    `[samples, channels]` is refused too.
    """
    waves_BS = float_samples(wave_BS)
    if waves_BS.ndim == 1:
        waves_BS = waves_BS[None]
    if waves_BS.ndim != 2:
        raise RunError(f"audio of shape {tuple(waves_BS.shape)}: expected [B, S] or [S], mono")

    # More sounds than any has samples: these are the channels of one sound.
    sounds, samples = waves_BS.shape
    if 0 < samples <= MAX_CHANNELS < sounds:
        raise RunError(
            f"audio of shape [{sounds}, {samples}]: is read as {sounds} sounds of {samples} samples, [B, S]; "
            "embed(audio, rate_hz=...) takes one sound of several channels, such as stereo"
        )
    return waves_BS


def cut_waves(wave_BS: Tensor, samples_B: Sequence[int] | None) -> list[np.ndarray]:
    """Return each wave cut to its length in samples, by default uncut; RunError if the lengths do not fit the waves."""
    waves, samples = wave_BS.shape
    lengths = [samples] * waves if samples_B is None else list(samples_B)
    if len(lengths) != waves or not all(0 <= length <= samples for length in lengths):
        raise RunError(
            f"samples_B {lengths[:8]}: expected a length for each of {waves} waves, of at most {samples} samples"
        )
    return [wave_S[:length].numpy() for wave_S, length in zip(wave_BS, lengths, strict=True)]
