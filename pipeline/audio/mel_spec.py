"""MelSpec: what the numbers in a spectrogram mean; the presets, and a user's own in a TOML file."""

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
from pipeline.messages import closest_word

DECODING_VERSION = (
    "1: mean of the channels, soxr HQ"  # how pipeline.audio makes a wave; new when its samples change
)

LONGEST_CLIP_SECONDS = 600.0  # of a clip: 16 of them make the smallest shard

FLOAT32_EPSILON = 2.0**-23  # Kaldi's floor under the log

SHORTEST_CLIP_SECONDS = 0.1  # pipeline.audio refuses what is shorter; what it lets through must have a frame


@dataclass(frozen=True, kw_only=True, slots=True)
class MelSpec:
    """What the numbers in a spectrogram mean: everything that changes a value, and a name that does not.

    A wave is mono float32 in [-1, 1], unscaled (Kaldi's own programs use 16-bit integers: their values are
    `2 ln 32768` higher). No clip mean is subtracted. Values are natural logarithms of power; decibels are
    `10 / ln 10 = 4.3429` times as much. A value outside what is implemented is refused with ValueError.

    framing   kaldi     whole frames only; DC removal and pre-emphasis inside each frame
              centred   pre-emphasis over the whole wave, which costs it one sample; then frame t is centred on sample
                        t * hop and the wave goes on beyond its ends as its mirror image
    window    Hann; symmetric: its first and last samples are 0; periodic: the sample after its last would be
    filters   kaldi     triangles on the scale 1127 ln(1 + f/700), peak 1; no Nyquist bin
              slaney    triangles over Hz, even on Slaney's scale (linear to 1 kHz, then logarithmic), area 1 Hz
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
        for field in fields(self):
            known, value = get_args(field.type), getattr(self, field.name)
            if known and value not in known:
                raise ValueError(f"{field.name} must be one of {', '.join(known)}, got {value!r}")
        for name in POSITIVE_FIELDS:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.window_samples < 2 or self.fft_samples < self.window_samples or self.fft_samples % 2:
            told = f"window_samples {self.window_samples}, fft_samples {self.fft_samples}"
            raise ValueError(f"a window has 2 samples or more, its FFT as many or more, and even: got {told}")
        if not 0 <= self.low_hz < self.high_hz <= self.sample_rate_hz / 2:
            raise ValueError(
                f"{self.low_hz}-{self.high_hz} Hz is no range below {self.sample_rate_hz / 2} Hz"
            )
        if not 0 <= self.preemphasis < 1:
            raise ValueError(f"preemphasis must lie in [0, 1), got {self.preemphasis}")
        if self.remove_dc and self.framing != "kaldi":
            raise ValueError(
                f"remove_dc = true belongs to framing kaldi, with {self.framing} it must be false"
            )
        if self.mel_bands > self.fft_samples:
            raise ValueError(
                f"mel_bands {self.mel_bands} are more than an FFT of {self.fft_samples} can fill"
            )
        if self.clip_seconds > LONGEST_CLIP_SECONDS:
            raise ValueError(
                f"clip_seconds must be at most {LONGEST_CLIP_SECONDS:g}, got {self.clip_seconds:g}"
            )
        if self.frames < 1:
            raise ValueError(f"a clip of {self.clip_seconds} s is shorter than one window")
        if self.frames_of(math.ceil(SHORTEST_CLIP_SECONDS * self.sample_rate_hz)) < 1:
            raise ValueError(
                f"window_samples {self.window_samples} are more than {SHORTEST_CLIP_SECONDS} s, the shortest clip"
            )

    @property
    def clip_samples(self) -> int:
        """Samples of a full clip at `sample_rate_hz`."""
        return round(self.clip_seconds * self.sample_rate_hz)

    @property
    def frames(self) -> int:
        """Frames of a full clip."""
        return self.frames_of(self.clip_samples)

    def frames_of(self, samples: int) -> int:
        """Frames of so many samples: those that lie wholly inside, or those centred on one of them; 0 if none.

        Never 0 for `SHORTEST_SECONDS` or more.
        """
        if self.framing == "kaldi":
            return max(0, 1 + (samples - self.window_samples) // self.hop_samples)
        emphasised_samples = samples - (self.preemphasis > 0)
        return 1 + emphasised_samples // self.hop_samples if emphasised_samples > 0 else 0

    def samples_of(self, frames: int) -> int:
        """The fewest samples that have so many frames, of which there is at least one."""
        if self.framing == "kaldi":
            return (frames - 1) * self.hop_samples + self.window_samples
        return max(1, (frames - 1) * self.hop_samples) + (self.preemphasis > 0)

    @property
    def spec_id(self) -> str:
        """12 hex digits: equal for specs that give equal values, whatever their names."""
        values = {
            key: float(value) if isinstance(value, int | float) else value
            for key, value in self.to_json().items()
            if key != "name"
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def same_front_end(self, other: "MelSpec") -> bool:
        """Whether equal sounds have equal values in both; clips may be of any length."""
        return replace(other, clip_seconds=self.clip_seconds).spec_id == self.spec_id

    @property
    def floor_log(self) -> float:
        """The value of every band of digital silence, the least there is; exact in float32."""
        return float(np.float32(math.log(self.floor)))

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The spec that `to_json` wrote; InputError where this version cannot make those values."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise InputError(
                f"mel spec: unknown {', '.join(unknown)}; written by a newer version? Upgrade ajepa"
            )
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise InputError(f"mel spec {values.get('name')!r}: {error}") from None


POSITIVE_FIELDS = ("sample_rate_hz", "window_samples", "hop_samples", "mel_bands", "clip_seconds", "floor")

A_JEPA = MelSpec(
    name="a-jepa",
    sample_rate_hz=32_000,
    window_samples=800,
    hop_samples=320,
    fft_samples=1024,
    high_hz=16_000.0,
)

A_JEPA_16K = MelSpec(
    name="a-jepa-16k",
    sample_rate_hz=16_000,
    window_samples=400,
    hop_samples=160,
    fft_samples=512,
    high_hz=8_000.0,
)

AUDIO_JEPA = MelSpec(
    name="audio-jepa",
    sample_rate_hz=32_000,
    window_samples=3125,
    hop_samples=1250,
    fft_samples=4096,
    high_hz=16_000.0,
)

PANNS = MelSpec(  # PANNs' own values are decibels, 10 log10(max(power, 1e-10)): 4.3429 times these
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

CONVNEXT = replace(PANNS, name="convnext", mel_bands=224)  # below 1 kHz a band holds a single bin

PASST = replace(  # without PaSST's `(x + 4.5) / 5`: that is a model's business, after the store
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
    """The preset of that name; InputError names the nearest and all there are."""
    if name in MEL_PRESETS:
        return MEL_PRESETS[name]
    told = f"mel spec {name!r} is unknown; did you mean {closest_word(name, MEL_PRESETS)!r}?"
    raise InputError(f"{told} There are: {', '.join(MEL_PRESETS)}; or a file of your own, NAME.toml")


def resolve_mel_spec(name_or_path: str) -> MelSpec:
    """What a user means by `text`: a preset's name, or the path of a `.toml` file (`mel_spec_file`)."""
    return (
        read_mel_spec(Path(name_or_path)) if name_or_path.endswith(".toml") else preset_mel_spec(name_or_path)
    )


def read_mel_spec(path: Path) -> MelSpec:
    """The spec that a TOML file describes; InputError names the file and what is wrong in it.

    Keys are the fields of MelSpec but `decoding`, which is this version's; `base = "a-jepa"` starts from a preset;
    the name, if not given, is the file's own. A preset's name is refused for other values than the preset's.
    """
    known = {field.name: field for field in fields(MelSpec) if field.name != "decoding"}
    values = _read_toml_table(path)
    try:
        told: dict[str, Any] = {"name": path.stem}
        if "base" in values:
            told = asdict(preset_mel_spec(_coerce_value("base", values.pop("base"), str))) | told
        for key, value in values.items():
            if key not in known:
                raise ValueError(
                    f"unknown key {key!r}; did you mean {closest_word(key, [*known, 'base'])!r}?"
                )
            told[key] = _coerce_value(key, value, known[key].type)
        missing = [key for key, field in known.items() if field.default is MISSING and key not in told]
        if missing:
            raise ValueError(f'lacks {", ".join(missing)}; or start from a preset: base = "{A_JEPA.name}"')
        spec = MelSpec(**told)
        if spec.name in MEL_PRESETS and spec.spec_id != MEL_PRESETS[spec.name].spec_id:
            raise ValueError(f"{spec.name!r} is the name of a preset with other values; choose another name")
    except (ValueError, InputError) as error:
        raise InputError(f"{path}: {error}") from None
    return spec


def with_clip_seconds(spec: MelSpec, seconds: float) -> MelSpec:
    """The same front end on clips of another length; InputError where that is no length."""
    try:
        return replace(spec, clip_seconds=float(seconds))
    except ValueError as error:
        raise InputError(f"mel spec {spec.name!r} on clips of {seconds} s: {error}") from None


def _read_toml_table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; expected a mel spec, TOML") from None
    except ValueError as error:  # of TOML's grammar, or of UTF-8
        raise InputError(f"{path}: is not TOML: {error}") from None


def _coerce_value(key: str, value: object, field_type: Any) -> Any:
    """A value as its field has it: whole numbers do for floats, truth values for nothing else."""
    if field_type is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    wanted = str if get_args(field_type) else field_type
    if type(value) is not wanted:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text in quotes"}
        raise ValueError(f"{key} must be {words[wanted]}, got {value!r}")
    return value
