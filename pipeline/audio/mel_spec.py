"""MelSpec: the meaning of the numbers in a spectrogram; the presets, and specs that users write as TOML files."""

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from pipeline.errors import InputError
from pipeline.messages import closest_word, suggest_known

# How `pipeline.audio.decode` turns a sound into a wave. It is part of every spec: change it when samples change.
DECODING_VERSION = "1: mean of the channels, soxr HQ"

LONGEST_CLIP_SECONDS = 600.0  # the smallest shard consists of 16 such clips

# `pipeline.audio.decode` refuses shorter clips, so a spec whose frames fit into this gives every clip a frame.
SHORTEST_CLIP_SECONDS = 0.1

FLOAT32_EPSILON = 2.0**-23  # Kaldi's floor under the logarithm

POSITIVE_FIELDS = ("sample_rate_hz", "window_samples", "hop_samples", "mel_bands", "clip_seconds", "floor")


@dataclass(frozen=True, kw_only=True, slots=True)
class MelSpec:
    """The meaning of the numbers in a spectrogram: every setting that changes a value, and a name.

    A wave is mono float32 in [-1, 1], unscaled (Kaldi's own programs use 16-bit integers: their values are
    `2 ln 32768` higher). No clip mean is subtracted. Values are natural logarithms of power; decibels are
    `10 / ln 10 = 4.3429` times as much. ValueError for a value that is not implemented.

    framing   kaldi     whole frames only; DC removal and pre-emphasis inside each frame
              centred   pre-emphasis over the whole wave, which shortens the wave by one sample; then frame t is
                        centred on sample t * hop, and the wave is mirrored at its ends
    window    Hann. symmetric: the first and the last sample are 0; periodic: the sample after the last would be 0
    filters   kaldi     triangles on the scale 1127 ln(1 + f/700), peak 1; no Nyquist bin
              slaney    triangles over Hz, evenly spaced on Slaney's scale (linear to 1 kHz, then log), area 1 Hz
    flooring  max       ln(max(power, floor))
              add       ln(power + floor)
    """

    name: str
    sample_rate_hz: int
    window_samples: int
    hop_samples: int
    fft_samples: int  # the windowed frame is padded with zeros to this length
    high_hz: float
    low_hz: float = 20.0
    mel_bands: int = 128
    clip_seconds: float = 10.0
    framing: Literal["kaldi", "centred"] = "kaldi"
    remove_dc: bool = True
    preemphasis: float = 0.97
    window: Literal["hann_symmetric", "hann_periodic"] = "hann_symmetric"
    filters: Literal["kaldi", "slaney"] = "kaldi"
    flooring: Literal["max", "add"] = "max"
    floor: float = FLOAT32_EPSILON
    decoding: str = DECODING_VERSION

    def __post_init__(self) -> None:
        self._check_each_field()
        self._check_fields_together()

    def _check_each_field(self) -> None:
        """Raise ValueError for a value that its field cannot have."""
        # Choices.
        for field in fields(self):
            known = get_args(field.type)
            value = getattr(self, field.name)
            if known and value not in known:
                raise ValueError(f"{field.name} must be one of {', '.join(known)}, got {value!r}")

        # Numbers and their ranges.
        for name in POSITIVE_FIELDS:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.preemphasis < 1:
            raise ValueError(f"preemphasis must lie in [0, 1), got {self.preemphasis}")
        if self.clip_seconds > LONGEST_CLIP_SECONDS:
            raise ValueError(
                f"clip_seconds must be at most {LONGEST_CLIP_SECONDS:g}, got {self.clip_seconds:g}"
            )

    def _check_fields_together(self) -> None:
        """Raise ValueError for values that exclude each other."""
        # Window and range of frequencies.
        nyquist_hz = self.sample_rate_hz / 2
        if self.window_samples < 2 or self.fft_samples < self.window_samples or self.fft_samples % 2:
            raise ValueError(
                "window_samples must be 2 or more, and fft_samples even and no less than window_samples; "
                f"got window_samples {self.window_samples}, fft_samples {self.fft_samples}"
            )
        if not 0 <= self.low_hz < self.high_hz <= nyquist_hz:
            raise ValueError(
                f"low_hz and high_hz must be a range within 0 to {nyquist_hz} Hz (half of sample_rate_hz), "
                f"got {self.low_hz} to {self.high_hz}"
            )

        # Options that require other options.
        if self.remove_dc and self.framing != "kaldi":
            raise ValueError(f"remove_dc must be false with framing {self.framing}, only kaldi removes DC")
        if self.mel_bands > self.fft_samples:
            raise ValueError(
                f"mel_bands must be at most fft_samples, {self.fft_samples}, got {self.mel_bands}"
            )

        # Every clip must have a frame.
        if self.frames < 1:
            raise ValueError(f"clip_seconds must be at least one window, got {self.clip_seconds}")
        if self.frames_of(math.ceil(SHORTEST_CLIP_SECONDS * self.sample_rate_hz)) < 1:
            raise ValueError(
                f"window_samples must fit into {SHORTEST_CLIP_SECONDS} s, the shortest clip that is used, "
                f"got {self.window_samples}"
            )

    @property
    def hop_seconds(self) -> float:
        """The time from one frame to the next."""
        return self.hop_samples / self.sample_rate_hz

    @property
    def clip_samples(self) -> int:
        """The number of samples of a full clip, at `sample_rate_hz`."""
        return round(self.clip_seconds * self.sample_rate_hz)

    @property
    def frames(self) -> int:
        """The number of frames of a full clip."""
        return self.frames_of(self.clip_samples)

    def frames_of(self, samples: int) -> int:
        """The number of frames of a wave: windows wholly inside (kaldi), or centred on one of the samples (centred).

        At least 1 for `SHORTEST_CLIP_SECONDS` or more.
        """
        if self.framing == "kaldi":
            return max(0, 1 + (samples - self.window_samples) // self.hop_samples)

        emphasised_samples = samples - (self.preemphasis > 0)
        if emphasised_samples <= 0:
            return 0
        return 1 + emphasised_samples // self.hop_samples

    def samples_of(self, frames: int) -> int:
        """The smallest number of samples that has `frames` frames; `frames` is 1 or more."""
        if self.framing == "kaldi":
            return (frames - 1) * self.hop_samples + self.window_samples
        return max(1, (frames - 1) * self.hop_samples) + (self.preemphasis > 0)

    @property
    def spec_id(self) -> str:
        """12 hex digits: equal for specs that give equal values, whatever their names."""
        # Numbers are compared as floats, so that 10 and 10.0 seconds are one spec.
        values = self.to_json()
        del values["name"]
        for key, value in values.items():
            if isinstance(value, int | float):
                values[key] = float(value)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def same_front_end(self, other: "MelSpec") -> bool:
        """Whether equal sounds have equal values in both specs; the lengths of their clips may differ."""
        return replace(other, clip_seconds=self.clip_seconds).spec_id == self.spec_id

    @property
    def floor_log(self) -> float:
        """The value of every band of digital silence, which is the lowest value; exact in float32."""
        return float(np.float32(math.log(self.floor)))

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The spec that `to_json` wrote; InputError if this version cannot compute it."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise InputError(
                f"mel spec: unknown {', '.join(unknown)}; written by a newer version? Upgrade ajepa"
            )
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise InputError(f"mel spec {values.get('name')!r}: {error}") from None


# The front end of A-JEPA: Kaldi's fbank at 32 kHz, 25 ms windows every 10 ms.
A_JEPA = MelSpec(
    name="a-jepa",
    sample_rate_hz=32_000,
    window_samples=800,
    hop_samples=320,
    fft_samples=1024,
    high_hz=16_000.0,
)

# The same at 16 kHz.
A_JEPA_16K = MelSpec(
    name="a-jepa-16k",
    sample_rate_hz=16_000,
    window_samples=400,
    hop_samples=160,
    fft_samples=512,
    high_hz=8_000.0,
)

# Windows of 98 ms every 39 ms: 10 s are 254 frames.
AUDIO_JEPA = MelSpec(
    name="audio-jepa",
    sample_rate_hz=32_000,
    window_samples=3125,
    hop_samples=1250,
    fft_samples=4096,
    high_hz=16_000.0,
)

# PANNs' own values are decibels, 10 log10(max(power, 1e-10)): 4.3429 times these.
PANNS = MelSpec(
    name="panns",
    sample_rate_hz=32_000,
    window_samples=1024,
    hop_samples=320,
    fft_samples=1024,
    low_hz=50.0,
    high_hz=14_000.0,
    mel_bands=64,
    framing="centred",
    remove_dc=False,
    preemphasis=0.0,
    window="hann_periodic",
    filters="slaney",
    floor=1e-10,
)

# Below 1 kHz, each of these bands holds a single bin of the FFT.
CONVNEXT = replace(PANNS, name="convnext", mel_bands=224)

# PaSST's own values are `(x + 4.5) / 5` of these: normalisation belongs to the model.
PASST = replace(
    A_JEPA,
    name="passt",
    low_hz=0.0,
    high_hz=15_000.0,
    framing="centred",
    remove_dc=False,
    flooring="add",
    floor=1e-5,
)

MEL_PRESETS = {spec.name: spec for spec in (A_JEPA, A_JEPA_16K, AUDIO_JEPA, PANNS, CONVNEXT, PASST)}


def preset_mel_spec(name: str) -> MelSpec:
    """The preset of this name; for any other name InputError suggests the nearest preset and lists all."""
    if name not in MEL_PRESETS:
        suggestion = suggest_known(name, MEL_PRESETS)
        raise InputError(f"mel spec {name!r} is unknown; {suggestion}; or give a file of your own, NAME.toml")
    return MEL_PRESETS[name]


def resolve_mel_spec(name_or_path: str) -> MelSpec:
    """The spec that `--spec` names: a preset, or a file if the text ends in `.toml` (see `read_mel_spec`)."""
    if name_or_path.endswith(".toml"):
        return read_mel_spec(Path(name_or_path))
    return preset_mel_spec(name_or_path)


def read_mel_spec(path: Path) -> MelSpec:
    """The spec that a TOML file describes; InputError names the file and what is wrong in it.

    Keys are the fields of MelSpec except `decoding`, which is always this version's; `base = "a-jepa"` starts from
    a preset; the name defaults to the file's. A preset's name is refused for a spec with other values.
    """
    known = {field.name: field for field in fields(MelSpec) if field.name != "decoding"}
    values = _read_toml_table(path)
    try:
        # The starting point: the fields of a preset, or only a name.
        settings: dict[str, Any] = {"name": path.stem}
        if "base" in values:
            base_name = _coerce_value("base", values.pop("base"), str)
            settings = asdict(preset_mel_spec(base_name)) | settings

        # The fields of the file, each converted to its type.
        for key, value in values.items():
            if key not in known:
                nearest = closest_word(key, [*known, "base"])
                raise ValueError(f"unknown key {key!r}; did you mean {nearest!r}?")
            settings[key] = _coerce_value(key, value, known[key].type)
        missing = [key for key, field in known.items() if field.default is MISSING and key not in settings]
        if missing:
            raise ValueError(f'lacks {", ".join(missing)}; or start from a preset: base = "{A_JEPA.name}"')

        # Stores show the name of a spec: one name must not stand for two specs.
        spec = MelSpec(**settings)
        if spec.name in MEL_PRESETS and spec.spec_id != MEL_PRESETS[spec.name].spec_id:
            raise ValueError(f"{spec.name!r} is the name of a preset with other values; choose another name")
    except (ValueError, InputError) as error:
        raise InputError(f"{path}: {error}") from None
    return spec


def with_clip_seconds(spec: MelSpec, seconds: float) -> MelSpec:
    """The same front end on clips of another length; InputError for a length that no clip can have."""
    try:
        return replace(spec, clip_seconds=float(seconds))
    except ValueError as error:
        raise InputError(f"mel spec {spec.name!r} on clips of {seconds} s: {error}") from None


def _read_toml_table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; expected a mel spec, TOML") from None
    except ValueError as error:  # bad TOML, or bad UTF-8
        raise InputError(f"{path}: is not TOML: {error}") from None


def _coerce_value(key: str, value: object, field_type: Any) -> Any:
    """Convert a value of a TOML file to its field's type: a whole number may become a float, nothing else changes."""
    if field_type is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)

    # A field with a list of choices is text. Types are compared exactly: True is an instance of int, but not a number.
    value_type = str if get_args(field_type) else field_type
    if type(value) is not value_type:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text in quotes"}
        raise ValueError(f"{key} must be {words[value_type]}, got {value!r}")
    return value
