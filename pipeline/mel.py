"""MelSpec; waveform -> log-mel."""

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from pipeline.errors import InputError

DECODING = "1: mean of the channels, soxr HQ"  # how pipeline.audio makes a wave; new when its samples change
FLOAT32_EPSILON = 2.0**-23  # Kaldi's floor under the log

PIECE_SAMPLES = 2**18  # 256 frames of 1024 at a time: twice as many leave the cache, half cost more calls
BLOCK_BANDS = 16  # mel bands per dense product on a CPU: 8 to 128 measured, 16 fastest


@dataclass(frozen=True, kw_only=True, slots=True)
class MelSpec:
    """What the numbers in a spectrogram mean: everything that changes a value, and a name that does not.

    A wave is mono float32 in [-1, 1], unscaled (Kaldi's own programs use 16-bit integers: their values are
    `2 ln 32768` higher). No clip mean is subtracted; per-frame DC removal makes that a no-op anyway.
    A value outside what is implemented is refused with ValueError.
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
    framing: Literal["kaldi"] = "kaldi"  # whole frames only; DC removal and pre-emphasis inside each frame
    remove_dc: bool = True
    preemphasis: float = 0.97
    window: Literal["hann_symmetric"] = "hann_symmetric"
    filters: Literal["kaldi"] = "kaldi"  # triangles on the scale 1127 ln(1 + f/700), peak 1; no Nyquist bin
    flooring: Literal["max"] = "max"  # ln(max(power, floor))
    floor: float = FLOAT32_EPSILON
    decoding: str = DECODING

    def __post_init__(self) -> None:
        for field in ("sample_rate_hz", "window_samples", "hop_samples", "mel_bands", "floor"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be positive, got {getattr(self, field)}")
        if self.fft_samples < self.window_samples:
            raise ValueError(
                f"fft_samples {self.fft_samples} is shorter than the window, {self.window_samples}"
            )
        if not 0 <= self.low_hz < self.high_hz <= self.sample_rate_hz / 2:
            raise ValueError(
                f"{self.low_hz}-{self.high_hz} Hz is no range below {self.sample_rate_hz / 2} Hz"
            )
        if not 0 <= self.preemphasis < 1:
            raise ValueError(f"preemphasis must lie in [0, 1), got {self.preemphasis}")
        if self.frames < 1:
            raise ValueError(f"a clip of {self.clip_seconds} s is shorter than one window")
        for field, known in IMPLEMENTED.items():
            if getattr(self, field) not in known:
                raise ValueError(f"{field} must be one of {', '.join(known)}, got {getattr(self, field)!r}")

    @property
    def clip_samples(self) -> int:
        """Samples of a full clip at `sample_rate_hz`."""
        return round(self.clip_seconds * self.sample_rate_hz)

    @property
    def frames(self) -> int:
        """Frames of a full clip."""
        return self.frames_of(self.clip_samples)

    def frames_of(self, samples: int) -> int:
        """Frames that lie wholly inside `samples`; 0 where not even one does."""
        return max(0, 1 + (samples - self.window_samples) // self.hop_samples)

    @property
    def spec_id(self) -> str:
        """12 hex digits: equal for specs that give equal values, whatever their names."""
        values = {
            key: float(value) if isinstance(value, int | float) else value
            for key, value in self.to_json().items()
            if key != "name"
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def floor_log(self) -> float:
        """The value of every band of digital silence, the least there is; exact in float32."""
        return float(torch.tensor(math.log(self.floor), dtype=torch.float32))

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


IMPLEMENTED = {"framing": ["kaldi"], "window": ["hann_symmetric"], "filters": ["kaldi"], "flooring": ["max"]}

PRESETS: dict[str, MelSpec] = {
    spec.name: spec
    for spec in (
        MelSpec(
            name="a-jepa",
            sample_rate_hz=32_000,
            window_samples=800,
            hop_samples=320,
            fft_samples=1024,
            high_hz=16_000.0,
        ),
        MelSpec(
            name="a-jepa-16k",
            sample_rate_hz=16_000,
            window_samples=400,
            hop_samples=160,
            fft_samples=512,
            high_hz=8_000.0,
        ),
        MelSpec(
            name="audio-jepa",
            sample_rate_hz=32_000,
            window_samples=3125,
            hop_samples=1250,
            fft_samples=4096,
            high_hz=16_000.0,
        ),
    )
}


def mel_spec(name: str) -> MelSpec:
    """The preset of that name; InputError names the nearest and all there are."""
    if name in PRESETS:
        return PRESETS[name]
    nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
    raise InputError(
        f"mel spec {name!r} is unknown; did you mean {nearest!r}? There are: {', '.join(PRESETS)}"
    )


def log_mel(wave_BS: Tensor, spec: MelSpec) -> Tensor:
    """Log mel power as `mel_BTF`, float32 natural log, on the wave's device; T = `spec.frames_of(S)`.

    Kaldi's fbank (Povey et al. 2011) without dither, as `torchaudio.compliance.kaldi.fbank` computes it.
    The wave is float32 in [-1, 1]; what lies beyond is not clipped. No gradient flows. Neighbours in a batch
    do not matter.
    """
    clips, frames = len(wave_BS), spec.frames_of(wave_BS.shape[-1])
    mel_BTF = wave_BS.new_empty(clips, frames, spec.mel_bands)
    if mel_BTF.numel():  # what inference mode only fills is still usable under autograd
        with torch.inference_mode(), torch.autocast(wave_BS.device.type, enabled=False):
            frames_BTN = wave_BS.unfold(-1, spec.window_samples, spec.hop_samples)
            write_mel_power(mel_BTF, frames_BTN, spec)
            mel_BTF.clamp_(min=spec.floor).log_()
    return mel_BTF


def write_mel_power(mel_BTF: Tensor, frames_BTN: Tensor, spec: MelSpec) -> None:
    """Fill `mel_BTF` from raw frames, piece by piece: on a CPU what fits its cache."""
    clips, frames, _ = mel_BTF.shape
    some = min(frames, max(1, PIECE_SAMPLES // spec.fft_samples)) if mel_BTF.is_cpu else frames
    scratch = Scratch.of(some, spec, mel_BTF.device)
    for clip in range(clips):
        for frame in range(0, frames, some):
            piece_TN = frames_BTN[clip, frame : frame + some]
            ready_TN = prepared(piece_TN, spec, scratch)
            write_bands(mel_BTF[clip, frame : frame + some], ready_TN, spec, scratch)


class Scratch(NamedTuple):
    """Buffers for one piece of frames, used again for the next: fresh memory costs a tenth of the time."""

    centred_TN: Tensor
    ready_TN: Tensor  # zeros where no window reaches
    power_TN: Tensor

    @classmethod
    def of(cls, frames: int, spec: MelSpec, device: torch.device) -> Self:
        """Room for that many frames."""
        return cls(
            centred_TN=torch.empty(frames, spec.window_samples, dtype=torch.float32, device=device),
            ready_TN=torch.zeros(frames, spec.fft_samples, dtype=torch.float32, device=device),
            power_TN=torch.empty(frames, spec.fft_samples // 2 + 1, dtype=torch.float32, device=device),
        )


def prepared(frames_TN: Tensor, spec: MelSpec, scratch: Scratch) -> Tensor:
    """Frames without DC, pre-emphasised, windowed and padded to `fft_samples`.

    Rounded step by step as the reference does: beside a full-scale tone, values near the floor hang on the
    last bit of these samples. Filtering the whole wave once is 0.5 ms cheaper and up to 0.06 nat off there.
    """
    centred_TN, ready_TN, _ = (buffer[: len(frames_TN)] for buffer in scratch)
    if spec.remove_dc:
        frames_TN = torch.sub(frames_TN, frames_TN.mean(-1, keepdim=True), out=centred_TN)
    window_N = hann_N(spec.window_samples, frames_TN.device)
    inner_TN = ready_TN[:, 1 : spec.window_samples]  # the window is 0 at a frame's first sample
    torch.mul(frames_TN[:, :-1], spec.preemphasis, out=inner_TN)
    torch.sub(frames_TN[:, 1:], inner_TN, out=inner_TN)
    inner_TN *= window_N[1:]
    return ready_TN


def write_bands(mel_TF: Tensor, ready_TN: Tensor, spec: MelSpec, scratch: Scratch) -> None:
    """Power spectrum, then the filters."""
    squares_TN = torch.view_as_real(torch.fft.rfft(ready_TN)).flatten(-2).square_()
    # six times faster than .abs() ** 2 or .sum(-1)
    power_TN = torch.add(squares_TN[:, ::2], squares_TN[:, 1::2], out=scratch.power_TN[: len(mel_TF)])
    for block in filter_blocks(spec, mel_TF.device):
        torch.mm(power_TN[:, block.bins], block.weights_NF, out=mel_TF[:, block.bands])


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # an inference tensor in the cache would break a later caller under autograd
def hann_N(samples: int, device: torch.device) -> Tensor:
    """The symmetric Hann window: its first and last samples are 0."""
    return torch.hann_window(samples, periodic=False, dtype=torch.float32, device="cpu").to(device)


class FilterBlock(NamedTuple):
    """The filters of neighbouring bands, cut to the bins they touch: most of the full matrix is zero."""

    bins: slice
    bands: slice
    weights_NF: Tensor


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def filter_blocks(spec: MelSpec, device: torch.device) -> tuple[FilterBlock, ...]:
    """The filter bank as a few dense products; one on a GPU, where launches cost more than zeros."""
    filters_NF = mel_filters_NF(spec)
    size = BLOCK_BANDS if device.type == "cpu" else spec.mel_bands
    blocks = []
    for first in range(0, spec.mel_bands, size):
        bands = slice(first, min(first + size, spec.mel_bands))
        touched = filters_NF[:, bands].any(1).nonzero().flatten().tolist() or [0]
        low, high = touched[0], touched[-1] + 1
        weights_NF = filters_NF[low:high, bands].contiguous().to(device)
        blocks.append(FilterBlock(slice(low, high), bands, weights_NF))
    return tuple(blocks)


def mel_filters_NF(spec: MelSpec) -> Tensor:
    """Kaldi's triangles as weights of spectral power; rows are rfft bins, the last (Nyquist) unused.

    In float32 as the reference has them: in float64 the faint ends of the triangles would differ by 1 %.
    """
    bin_hz_N = counted(spec.fft_samples // 2) * (spec.sample_rate_hz / spec.fft_samples)
    bin_mel_N1 = 1127.0 * (1.0 + bin_hz_N / 700.0).log()[:, None]
    low_mel, high_mel = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (spec.low_hz, spec.high_hz))
    edges_mel = low_mel + counted(spec.mel_bands + 2) * ((high_mel - low_mel) / (spec.mel_bands + 1))
    left_F, centre_F, right_F = edges_mel[:-2], edges_mel[1:-1], edges_mel[2:]
    rising_NF = (bin_mel_N1 - left_F) / (centre_F - left_F)
    falling_NF = (right_F - bin_mel_N1) / (right_F - centre_F)
    triangles_NF = torch.minimum(rising_NF, falling_NF).clamp(min=0.0)
    return torch.nn.functional.pad(triangles_NF, (0, 0, 0, spec.fft_samples // 2 + 1 - len(triangles_NF)))


def counted(length: int) -> Tensor:
    """0, 1, 2, ... in float32 on the CPU, whatever torch's defaults are set to."""
    return torch.arange(length, dtype=torch.float32, device="cpu")
