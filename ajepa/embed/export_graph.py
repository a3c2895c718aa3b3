"""Resampler: audio at another rate as `pipeline.audio` has it, by a convolution: what a graph changes rates with.

FrontEnd: audio at any rate -> log-mel, as a network of convolutions: what a graph computes inside itself.

Graph: audio to embeddings as one network, for ONNX and torch.export: the log-mel is computed inside it.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ajepa.embed.embedder import Embedder
from ajepa.model.patches import valid_token_mask
from pipeline.audio.decode import resample_blocks
from pipeline.audio.mel import hann_window_N, mel_filters_NF
from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import RunError
from pipeline.files import replacing_file

FILTER_REACH_SAMPLES = 128  # of soxr's filter to either side, at the lower of two rates: past it 1e-7 is left

MAX_RESAMPLER_WEIGHTS = 2**24  # 64 MB

ONSET_SAMPLES = 64  # given at most that the beginning of a sound changes


class Resampler(nn.Module):
    """`samples` of audio from one rate to another, sample for sample what soxr gives: to 2e-6 of full scale.

    It answers single impulses, and its answers are the weights: soxr is linear, and the same again every `down`
    samples in, `up` samples out. But for a sound's beginning: of two filters in a row the second hears nothing of
    what the first makes before it, which changes some first samples by a hundredth of a step there.
    RunError where the rates have so little in common that this would be a very large network.
    """

    def __init__(self, from_hz: int, to_hz: int, samples: int) -> None:
        super().__init__()
        common = math.gcd(from_hz, to_hz)
        self.from_hz, self.to_hz, self.samples = from_hz, to_hz, samples
        self.up, self.down = to_hz // common, from_hz // common
        self.reach_samples = math.ceil(FILTER_REACH_SAMPLES * max(1, self.down / self.up))
        if self.up * (self.down + 2 * self.reach_samples) > MAX_RESAMPLER_WEIGHTS:
            raise RunError(
                f"audio at {from_hz} Hz for a mel spec at {to_hz} Hz: a graph for this ratio, "
                f"{self.up}/{self.down}, would be too large; choose --audio-hz {to_hz}"
            )
        self.register_buffer("kernels_L1K", self._filter_kernels())
        self.register_buffer("start_FE", self._onset_correction())

    kernels_L1K: Tensor
    start_FE: Tensor

    def forward(self, audio_BS: Tensor, samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """The audio of `samples` at the other rate, and how many of its samples are sound; zeros lie around it."""
        place_S = torch.arange(audio_BS.shape[1], device=audio_BS.device)
        heard_BS = torch.where(place_S < samples_B[:, None], audio_BS, 0.0)
        steady_BS = self._convolve_steady(heard_BS, round(self.samples * self.up / self.down))
        first, given = self.start_FE.shape
        start_BE = heard_BS[:, :first] @ self.start_FE[: heard_BS.shape[1]]
        resampled_BS = torch.cat((steady_BS[:, :given] + start_BE, steady_BS[:, given:]), dim=1)
        return resampled_BS, ((samples_B * self.up).double() / self.down).round().long()

    def _convolve_steady(self, audio_BS: Tensor, output_samples: int) -> Tensor:
        after = -(-output_samples // self.up) * self.down + self.reach_samples - audio_BS.shape[1]
        padded_BS = nn.functional.pad(audio_BS, (self.reach_samples, after))
        told_BLN = nn.functional.conv1d(padded_BS[:, None], self.kernels_L1K, stride=self.down)
        return told_BLN.transpose(1, 2).flatten(1)[:, :output_samples]

    def _filter_kernels(self) -> Tensor:
        """What each of `up` samples out takes of the samples in around it, `[up, 1, down + 2 reach]`."""
        groups = -(-self.reach_samples // self.down) + 1  # of `down` samples, before and after the impulse
        kernels_LK = torch.zeros(self.up, self.down + 2 * self.reach_samples)
        for place in range(self.down):
            impulse_S = np.zeros((2 * groups + 1) * self.down, np.float32)
            impulse_S[groups * self.down + place] = 1
            for group, answer_L in enumerate(self._soxr_response(impulse_S).split(self.up)):
                index = place + (groups - group) * self.down + self.reach_samples
                if 0 <= index < kernels_LK.shape[1]:
                    kernels_LK[:, index] = answer_L
        return kernels_LK[:, None]

    def _onset_correction(self) -> Tensor:
        """What the first samples out take of the first in beside that, `[reach, START_SAMPLES or fewer]`."""
        impulses_FS = np.eye(self.reach_samples, 2 * self.reach_samples + self.down, dtype=np.float32)
        given = min(ONSET_SAMPLES, round(self.samples * self.up / self.down))
        actual_FS = torch.stack([self._soxr_response(impulse_S) for impulse_S in impulses_FS])
        given = min(given, actual_FS.shape[1])
        return actual_FS[:, :given] - self._convolve_steady(torch.from_numpy(impulses_FS), given)

    def _soxr_response(self, wave_S: np.ndarray) -> Tensor:
        return torch.from_numpy(
            np.concatenate(list(resample_blocks(iter([wave_S]), self.from_hz, self.to_hz)))
        )


class FrontEnd(nn.Module):
    """`pipeline.mel.log_mel` of the first `frames` frames, for any mel spec, with nothing but products and sums.

    Spectra come from one convolution, whose kernels are the DFT and all that is linear before it. Sounds begin with
    their first sample and end with the last of their `samples_B`: what lies past it is not heard, and a centred
    frame meets a mirror there. Another rate than the spec's is changed first (`Resampler`).

    samples  of audio at `rate_hz` that fill so many frames
    """

    def __init__(self, spec: MelSpec, frames: int, rate_hz: int) -> None:
        super().__init__()
        self.spec, self.frames = spec, frames
        self.samples = -(-spec.samples_of(frames) * rate_hz // spec.sample_rate_hz)
        same = rate_hz == spec.sample_rate_hz
        self.resampler = None if same else Resampler(rate_hz, spec.sample_rate_hz, self.samples)
        filters_NF = mel_filters_NF(spec)
        touched_N = filters_NF.any(1)
        self.register_buffer(
            "kernels_K1N", spectrum_kernels(spec)[:, touched_N].flatten(0, 1)[:, None].float()
        )
        self.register_buffer("filters_NF", filters_NF[touched_N])

    kernels_K1N: Tensor
    filters_NF: Tensor

    def forward(self, audio_BS: Tensor, samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """`mel_BTF`, and how many of its frames are sound; those past them mean nothing."""
        samples_B = samples_B.clamp(0, self.samples)
        if self.resampler is not None:
            audio_BS, samples_B = self.resampler(audio_BS, samples_B)
        if self.spec.framing == "kaldi":
            frames_B = (1 + (samples_B - self.spec.window_samples) // self.spec.hop_samples).clamp(min=0)
        else:
            audio_BS, samples_B = self.apply_preemphasis(audio_BS, samples_B)
            frames_B = torch.where(samples_B > 0, 1 + samples_B // self.spec.hop_samples, 0)
            audio_BS = self.mirror_ends(audio_BS, samples_B)
        return self.compute_log_mel(audio_BS), frames_B.clamp(max=self.frames)

    def apply_preemphasis(self, audio_BS: Tensor, samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-emphasis over the whole wave, which costs it a sample."""
        if not self.spec.preemphasis:
            return audio_BS, samples_B
        return audio_BS[:, 1:] - self.spec.preemphasis * audio_BS[:, :-1], (samples_B - 1).clamp(min=0)

    def mirror_ends(self, audio_BS: Tensor, samples_B: Tensor) -> Tensor:
        """All frames' samples, with the wave's mirror image before it and past its end (`pipeline.mel.prolonged`)."""
        window, hop = self.spec.window_samples, self.spec.hop_samples
        place_N = torch.arange((self.frames - 1) * hop + window, device=audio_BS.device) - (window + 1) // 2
        period_B1 = (2 * (samples_B - 1)).clamp(min=1)[:, None]
        place_BN = place_N % period_B1
        return audio_BS.gather(1, torch.minimum(place_BN, period_B1 - place_BN))

    def compute_log_mel(self, audio_BS: Tensor) -> Tensor:
        """Of frames that lie side by side in the audio."""
        both_BKT = nn.functional.conv1d(audio_BS[:, None], self.kernels_K1N, stride=self.spec.hop_samples)
        power_BNT = both_BKT[:, :, : self.frames].square().unflatten(1, (2, -1)).sum(1)
        mel_BTF = power_BNT.transpose(1, 2) @ self.filters_NF
        if self.spec.flooring == "add":
            mel_BTF = mel_BTF + self.spec.floor
        return mel_BTF.clamp(min=self.spec.floor).log()


def spectrum_kernels(spec: MelSpec) -> Tensor:
    """`[2, bin, sample]`, float64: the real and imaginary parts of a raw frame's spectrum, Kaldi's steps included.

    Those are: less the frame's mean, pre-emphasis, window, DFT; a product of matrices, made from its left.
    """
    bin_K, sample_N = torch.arange(spec.fft_samples // 2 + 1).double(), torch.arange(spec.window_samples)
    angle_KN = bin_K[:, None] * sample_N * (2 * torch.pi / spec.fft_samples)
    window_N = hann_window_N(
        spec.window_samples, spec.window == "hann_periodic", torch.device("cpu")
    ).double()
    kernels_2KN = torch.stack((angle_KN.cos(), -angle_KN.sin())) * window_N
    if spec.framing == "kaldi":  # the window's first sample is 0: what precedes a frame does not matter
        kernels_2KN = kernels_2KN - spec.preemphasis * nn.functional.pad(kernels_2KN[..., 1:], (0, 1))
    return kernels_2KN - kernels_2KN.mean(-1, keepdim=True) if spec.remove_dc else kernels_2KN


ONNX_OPSET = 20  # the first with GELU; onnxruntime 1.17 and newer

GRAPH_RATE_HZ = 32_000  # of the audio that a graph takes, unless another is asked for

GRAPH_INPUTS, GRAPH_OUTPUTS = ("audio", "samples"), ("clip", "frames", "frame_count")

MAX_ONNX_BYTES = 1.9e9  # of an ONNX file: protobuf ends at 2 GiB


class AudioGraph(nn.Module):
    """One view of sound in, embeddings out, as `Embedder.embed_audio` has them; of any mel spec (`FrontEnd`).

    The window's length is fixed, for the encoder's positions are: `samples` of mono audio at `rate_hz`, of any
    batch. Shorter sounds are padded with anything; what is longer is cut into windows by the caller, and each is
    then a sound of its own, with an end at either side.

    facts  what a caller must know: model, rate, window, where columns lie
    """

    def __init__(self, embedder: Embedder, rate_hz: int = GRAPH_RATE_HZ) -> None:
        super().__init__()
        self.grid, self.pooling, self.layer = embedder.grid, embedder.pooling, embedder.layer
        self.front_end = FrontEnd(embedder.mel, embedder.grid.frames, rate_hz)
        self.rate_hz, self.samples = rate_hz, self.front_end.samples
        self.encoder, self.mean, self.std = embedder.encoder, embedder.model.mean, embedder.model.std
        self.metadata = {
            "model_id": embedder.model.model_id,
            "mel_spec": embedder.mel.name,
            "sample_rate_hz": rate_hz,
            "samples": self.samples,
            "column_ms": embedder.column_ms,
            "first_centre_ms": embedder.first_centre_ms,
        }
        self.to(embedder.device)

    def forward(self, audio_BS: Tensor, samples_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`clip_BD`, `frames_BCD` and how many frames of each are sound, of the first `samples_B` of each row.

        Of a sound shorter than one frame of its spectrogram there are none, and `clip_BD` is nan.
        """
        mel_BTF, n_frames_B = self.front_end(audio_BS, samples_B)
        frame_T = torch.arange(self.grid.frames, device=audio_BS.device)
        heard_BT1 = frame_T[:, None] < n_frames_B[:, None, None]
        mel_BTF = torch.where(heard_BT1, (mel_BTF - self.mean) / self.std, 0.0)
        valid_BP = valid_token_mask(n_frames_B, self.grid)
        tokens_BPD = self.layer.encode_tokens(self.encoder, mel_BTF, valid_BP)
        columns_BCRD = tokens_BPD.unflatten(1, (self.grid.cols, self.grid.rows))
        frames_BCD = columns_BCRD.flatten(2) if self.pooling == "frequency" else columns_BCRD.mean(2)
        valid_BC = valid_BP[:, :: self.grid.rows]
        frames_BCD = torch.where(valid_BC[..., None], frames_BCD, 0.0)
        count_B = valid_BC.sum(1)
        return frames_BCD.sum(1) / count_B[:, None], frames_BCD, count_B


def export_program(graph: AudioGraph) -> torch.export.ExportedProgram:
    """The graph as torch.export has it, of any batch."""
    graph = graph.eval()
    device = graph.front_end.filters_NF.device
    batch = torch.export.Dim("batch", min=1, max=65_536)
    example = (
        torch.zeros(2, graph.samples, device=device),
        torch.full((2,), graph.samples, dtype=torch.int64, device=device),
    )
    with torch.no_grad():
        return torch.export.export(graph, example, dynamic_shapes=({0: batch}, {0: batch}))


def write_program(graph: AudioGraph, out: Path) -> None:
    """A `.pt2` file for `torch.export.load`."""
    program = export_program(graph)
    with replacing_file(out) as scratch, scratch.open("wb") as handle:
        torch.export.save(program, handle)


def write_onnx(graph: AudioGraph, out: Path) -> None:
    """An ONNX file of opset OPSET: `audio` float32 [batch, samples] and `samples` int64 [batch] in, OUTPUTS out.

    The graph's facts are its metadata. RunError where onnx and onnxscript are not installed, or the file would be
    larger than ONNX allows.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (what torch.onnx writes with)
    except ModuleNotFoundError as error:
        raise RunError(f"--onnx needs {error.name}; run: pip install 'ajepa[export]'") from None
    held_bytes = sum(weight.nbytes for weight in graph.state_dict().values())
    if held_bytes > MAX_ONNX_BYTES:
        raise RunError(
            f"{out}: {held_bytes / 1e9:.1f} GB of weights do not fit an ONNX file; use --torch-export"
        )
    program = torch.onnx.export(
        export_program(graph),
        dynamo=True,
        opset_version=ONNX_OPSET,
        input_names=list(GRAPH_INPUTS),
        output_names=list(GRAPH_OUTPUTS),
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    for key, value in graph.metadata.items():
        proto.metadata_props.add(key=key, value=str(value))
    onnx.checker.check_model(proto)
    with replacing_file(out) as scratch:
        scratch.write_bytes(proto.SerializeToString())
