"""Audio to embeddings as one network with resampling and log-mel, for ONNX and torch.export; the only user of onnx."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ajepa.embed.embedder import WINDOW_OVERLAP, Embedder
from ajepa.embed.head import apply_activation
from ajepa.embed.windows import window_hop_columns
from ajepa.model.patches import repeat_last_frame, valid_token_mask
from ajepa.model.pooling import LAST_LAYER, VECTORS_PER_CLIP, PoolingName, column_pooling, pooled_deviation
from pipeline.audio.decode import resample_blocks
from pipeline.audio.mel import hann_window_N, mel_filters_NF
from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import RunError
from pipeline.files import replacing_file

# The default sample rate of a graph's input audio.
GRAPH_RATE_HZ = 32_000

GRAPH_INPUTS = ("audio", "samples")
GRAPH_OUTPUTS = ("clip", "frames", "frame_count")

# The further output of a fine-tuned model.
SCORES_OUTPUT = "scores"

# The name of the metadata, as JSON, in the archive of a `.pt2` file (`extra_files` of `torch.export.load`).
PROGRAM_METADATA = "metadata.json"

# The first opset with GELU: onnxruntime 1.17 and newer.
ONNX_OPSET = 20

# An ONNX file is one protobuf message, whose maximum size is 2 GiB.
MAX_ONNX_BYTES = 1.9e9

# Reach of soxr's filter to either side, in samples of the lower rate; only 1e-7 of the response is beyond it.
FILTER_REACH_SAMPLES = 128

# Maximum number of weights of a resampler; they take 64 MB.
MAX_RESAMPLER_WEIGHTS = 2**24

# soxr's response to the start of a sound differs from its steady response in at most this many output samples.
ONSET_SAMPLES = 64

# A float32 has 24 bits, of which TF32 keeps 11: x times this number, rounded, splits off the upper ones.
TF32_SPLITTER = 2.0**13 + 1


class AudioGraph(nn.Module):
    """A network from one window of audio to the embeddings of `Embedder.embed_audio`; for any mel spec.

    The input is a batch of any size of windows with `samples` samples of mono audio at `rate_hz`. The length is fixed,
    because the positions of the encoder are fixed. Shorter sounds may be padded with any values. The caller cuts longer
    sounds into windows; each window is then treated as a separate sound. The graph of a fine-tuned model also gives the
    scores of its classes.

    outputs   names of the outputs, in their order
    metadata  facts for the caller: model, pooling and layer, sample rate, window length, times of the columns, names of
              the classes. For windows of a longer sound: `hop_columns` between their starts, as in `Embedder.embed`;
              `column_samples` of audio in a column, `frame_samples` in a frame of the spectrogram,
              `first_frame_samples` before its first frame
    """

    head_weight_CD: Tensor
    head_bias_C: Tensor

    def __init__(self, embedder: Embedder, rate_hz: int = GRAPH_RATE_HZ) -> None:
        super().__init__()
        # Parts from audio to normalised log-mel.
        self.grid = embedder.grid
        self.front_end = FrontEnd(embedder.mel, embedder.grid.frames, rate_hz)
        self.rate_hz = rate_hz
        self.samples = self.front_end.samples
        self.mean = embedder.pretrained.mean
        self.std = embedder.pretrained.std

        # Parts from log-mel to vectors.
        self.encoder = embedder.encoder
        self.layer = embedder.layer
        self.pooling = embedder.pooling

        # The head of a fine-tuned model.
        self.head = embedder.pretrained.head
        self.outputs: tuple[str, ...] = GRAPH_OUTPUTS
        if self.head is not None:
            self.outputs = (*GRAPH_OUTPUTS, SCORES_OUTPUT)
            self.register_buffer("head_weight_CD", self.head.weight_CD.float())
            self.register_buffer("head_bias_C", self.head.bias_C.float())

        rate_ratio = rate_hz / embedder.mel.sample_rate_hz
        self.metadata = {
            "model_id": embedder.pretrained.model_id,
            "mel_spec": embedder.mel.name,
            "pooling": self.pooling,
            "layer": str(self.layer),
            "sample_rate_hz": rate_hz,
            "samples": self.samples,
            "column_ms": embedder.column_ms,
            "first_centre_ms": embedder.first_centre_ms,
            "hop_columns": window_hop_columns(self.grid, WINDOW_OVERLAP),
            "column_samples": self.grid.patch_frames * embedder.mel.hop_samples * rate_ratio,
            "frame_samples": embedder.mel.hop_samples * rate_ratio,
            "first_frame_samples": first_frame_samples(embedder.mel) * rate_ratio,
            "front_end_precision": "fp32, also where the hardware multiplies as TF32",
        }
        if self.head is not None:
            self.metadata |= {
                "class_names": json.dumps(self.head.class_names, ensure_ascii=False),
                "class_ids": json.dumps(self.head.class_ids, ensure_ascii=False),
                "activation": self.head.activation,
            }
        self.to(embedder.device)

    def forward(self, audio_BS: Tensor, samples_B: Tensor) -> tuple[Tensor, ...]:
        """Return `clip_BD`, `frames_BCD` and the number of valid frames, for the first `samples_B` samples of each row.

        A fine-tuned model also returns `scores_BC`. A sound shorter than one frame of its spectrogram has no frames,
        and its `clip_BD` and `scores_BC` are nan.
        """
        # Normalised log-mel; the last frame of a sound is repeated.
        mel_BTF, n_frames_B = self.front_end(audio_BS, samples_B)
        mel_BTF = repeat_last_frame((mel_BTF - self.mean) / self.std, n_frames_B)

        # Encode the tokens, and pool them column by column.
        valid_BP = valid_token_mask(n_frames_B, self.grid)
        tokens_BPD = self.layer.encode_tokens(self.encoder, mel_BTF, valid_BP)
        is_valid_BC1 = valid_BP[:, :: self.grid.rows, None]
        clip_BD, frames_BCD = self.pool_columns(tokens_BPD, is_valid_BC1, self.pooling)
        count_B = is_valid_BC1.sum(1)[:, 0]
        if self.head is None:
            return clip_BD, frames_BCD, count_B

        # Scores: the head reads the encoder's output, pooled in its own way.
        if self.layer != LAST_LAYER:
            tokens_BPD = LAST_LAYER.encode_tokens(self.encoder, mel_BTF, valid_BP)
        pooled_BD, _ = self.pool_columns(tokens_BPD, is_valid_BC1, self.head.pooling)
        logits_BC = nn.functional.linear(pooled_BD, self.head_weight_CD, self.head_bias_C)
        return clip_BD, frames_BCD, count_B, apply_activation(logits_BC, self.head.activation)

    def pool_columns(
        self, tokens_BPD: Tensor, is_valid_BC1: Tensor, pooling: PoolingName
    ) -> tuple[Tensor, Tensor]:
        """Return `clip_BD` and `frames_BCD`, whose invalid columns are 0."""
        columns_BCRD = tokens_BPD.unflatten(1, (self.grid.cols, self.grid.rows))
        frames_BCD = columns_BCRD.mean(2) if pooling == "mean" else columns_BCRD.flatten(2)

        # Clip vector: the mean over the columns that begin inside the sound, and their deviation if the pooling has it.
        frames_BCD = torch.where(is_valid_BC1, frames_BCD, 0.0)
        count_B1 = is_valid_BC1.sum(1)
        clip_BD = frames_BCD.sum(1) / count_B1
        if pooling == "moments":
            centred_BCD = torch.where(is_valid_BC1, frames_BCD - clip_BD[:, None], 0.0)
            deviation_BD = pooled_deviation(centred_BCD.square().sum(1) / count_B1)
            clip_BD = torch.cat((clip_BD, deviation_BD), dim=1)
        return clip_BD, frames_BCD

    def describe_interface(self) -> list[str]:
        """Return the lines of a table: every input and output with its type, its axes in plain names, and its meaning.

        An axis with a number is fixed, one with a name is free. The lines after the table say how long a window is,
        and how close the vectors of several windows come to those of the package.
        """
        width = self.layer.vectors_per_token(self.encoder.spec.depth) * self.encoder.spec.width
        clip_width = width * VECTORS_PER_CLIP[self.pooling](self.grid.rows)
        frame_width = width if self.pooling == "mean" else width * self.grid.rows
        column_ms = self.metadata["column_ms"]
        rows = [
            (
                "input audio",
                f"float32 [batch, samples = {self.samples}]",
                f"mono at {self.rate_hz} Hz in [-1, 1]; shorter sounds are padded with anything",
            ),
            ("input samples", "int64 [batch]", f"length of each sound in samples, at most {self.samples}"),
            (
                "output clip",
                f"float32 [batch, values = {clip_width}]",
                f"the vector of the sound: pooling `{self.pooling}`, layer `{self.layer}`",
            ),
            (
                "output frames",
                f"float32 [batch, columns = {self.grid.cols}, values = {frame_width}]",
                f"one vector every {column_ms:g} ms, the first at {self.metadata['first_centre_ms']:g} ms: pooling "
                f"`{column_pooling(self.pooling)}`, layer `{self.layer}`",
            ),
            ("output frame_count", "int64 [batch]", "how many of the columns hold sound; the rest are 0"),
        ]
        if self.head is not None:
            classes = len(self.head.class_ids)
            rows.append(
                (
                    "output scores",
                    f"float32 [batch, classes = {classes}]",
                    f"{self.head.activation}, in the order of `class_names` in the file's metadata",
                )
            )
        return [
            "| name | type and axes | meaning |",
            "| --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"A window is {self.samples / self.rate_hz:.3f} s, and no input may be longer. {self._describe_seams()}",
        ]

    def _describe_seams(self) -> str:
        """Return a sentence: whether the windows of a long sound give the vector of the package."""
        if self.front_end.is_local:
            return "A longer sound goes in as overlapping windows, which give the vector of the package."
        return (
            "A longer sound goes in as overlapping windows. They come close to the vector of the package, but not to "
            "the last digit: the graph resamples each window by itself, or mirrors it at its ends."
        )


def first_frame_samples(spec: MelSpec) -> int:
    """Return how many samples a sound has before each hop adds a frame to the first one (`MelSpec.samples_of`)."""
    return spec.window_samples if spec.framing == "kaldi" else int(spec.preemphasis > 0)


def write_onnx(graph: AudioGraph, out: Path) -> None:
    """Write an ONNX file of opset ONNX_OPSET with inputs GRAPH_INPUTS and outputs GRAPH_OUTPUTS.

    `audio` is float32 [batch, samples], `samples` int64 [batch]; the graph's metadata are written into the file. A
    fine-tuned model has the output SCORES_OUTPUT too.
    RunError if onnx or onnxscript is not installed, or if the file would be larger than ONNX allows.
    """
    # torch.onnx needs onnxscript.
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise RunError(f"--onnx needs {error.name}; run: pip install 'ajepa[export]'") from None
    weight_bytes = sum(weight.nbytes for weight in graph.state_dict().values())
    if weight_bytes > MAX_ONNX_BYTES:
        raise RunError(
            f"{out}: {weight_bytes / 1e9:.1f} GB of weights do not fit an ONNX file; use --torch-export"
        )

    # Convert the network to ONNX.
    program = torch.onnx.export(
        export_program(graph),
        dynamo=True,
        opset_version=ONNX_OPSET,
        input_names=list(GRAPH_INPUTS),
        output_names=list(graph.outputs),
        verbose=False,
    )
    assert program is not None

    # Add the metadata, check the model, and write the file in one step.
    proto = program.model_proto
    name_batch_axis(proto.graph)
    for key, value in graph.metadata.items():
        proto.metadata_props.add(key=key, value=str(value))
    onnx.checker.check_model(proto)
    with replacing_file(out) as scratch:
        scratch.write_bytes(proto.SerializeToString())


def name_batch_axis(onnx_graph: Any) -> None:
    """Call the free axis of an ONNX graph `batch`, instead of a symbol of the tracer, such as s29."""
    symbol = onnx_graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*onnx_graph.input, *onnx_graph.output, *onnx_graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            # Inner axes may be multiples of it.
            if dim.dim_param:
                dim.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", dim.dim_param)


def write_program(graph: AudioGraph, out: Path) -> None:
    """Write the graph as a `.pt2` file for `torch.export.load`; its PROGRAM_METADATA are those of an ONNX file."""
    program = export_program(graph)
    metadata = json.dumps({key: str(value) for key, value in graph.metadata.items()}, ensure_ascii=False)
    with replacing_file(out) as scratch, scratch.open("wb") as handle:
        torch.export.save(program, handle, extra_files={PROGRAM_METADATA: metadata})


def export_program(graph: AudioGraph) -> torch.export.ExportedProgram:
    """Return the graph as a program of torch.export, for batches of any size."""
    graph = graph.eval()
    device = graph.front_end.filters_NF.device
    batch = torch.export.Dim("batch", min=1, max=65_536)
    example = (
        torch.zeros(2, graph.samples, device=device),
        torch.full((2,), graph.samples, dtype=torch.int64, device=device),
    )
    with torch.no_grad():
        return torch.export.export(graph, example, dynamic_shapes=({0: batch}, {0: batch}))


def split_tf32(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return two parts of float32 numbers whose sum they are: the upper 11 bits, which TF32 keeps, and the rest."""
    shifted = x * TF32_SPLITTER
    upper = shifted - (shifted - x)
    return upper, x - upper


def split_kernels(kernels_KN: Tensor) -> Tensor:
    """Return kernels for `convolve_fp32`, `[K, 3, N]`: upper part, lower part, and the upper part again."""
    upper_KN, lower_KN = split_tf32(kernels_KN)
    return torch.stack((upper_KN, lower_KN, upper_KN), dim=1)


def convolve_fp32(audio_BS: Tensor, kernels_K3N: Tensor, stride: int) -> Tensor:
    """Return the convolution of audio with kernels of `split_kernels`, `BKT`, in the precision of fp32 on any device.

    GPUs multiply float32 as TF32, with 11 of 24 bits, in convolutions of PyTorch and onnxruntime unless they are told
    not to. A 1-kHz tone over noise of -80 dB then had a log-mel wrong by 3.3 nat. A graph cannot carry that setting,
    but both factors can be split into parts that TF32 keeps. The products of the upper parts are exact and are summed
    by themselves; the mixed ones correct them; those of the lower parts are below the last bit.
    """
    upper_BS, lower_BS = split_tf32(audio_BS)
    mixed_B2S = torch.stack((upper_BS, lower_BS), dim=1)
    upper_BKT = nn.functional.conv1d(upper_BS[:, None], kernels_K3N[:, :1], stride=stride)
    return upper_BKT + nn.functional.conv1d(mixed_B2S, kernels_K3N[:, 1:], stride=stride)


def multiply_fp32(x_BTN: Tensor, y_NM: Tensor) -> Tensor:
    """Return the matrix product in the precision of fp32 on any device, as `convolve_fp32` does."""
    upper_BTN, lower_BTN = split_tf32(x_BTN)
    upper_NM, lower_NM = split_tf32(y_NM)
    return upper_BTN @ upper_NM + (upper_BTN @ lower_NM + lower_BTN @ upper_NM)


class FrontEnd(nn.Module):
    """Computes the first `frames` frames of `pipeline.audio.mel.log_mel` for any mel spec, without an FFT.

    Spectra are computed by one convolution, whose kernels combine the DFT and all linear steps before it. A sound ends
    after `samples_B` samples: later samples have no influence, and centred frames use the sound's mirror image beyond
    the end. Audio at another rate than the spec's is resampled first (`Resampler`).

    samples  number of audio samples at `rate_hz` that fill `frames` frames
    """

    kernels_K3N: Tensor
    filters_NF: Tensor

    def __init__(self, spec: MelSpec, frames: int, rate_hz: int) -> None:
        super().__init__()
        self.spec = spec
        self.frames = frames
        self.samples = -(-spec.samples_of(frames) * rate_hz // spec.sample_rate_hz)
        self.resampler: Resampler | None = None
        if rate_hz != spec.sample_rate_hz:
            self.resampler = Resampler(rate_hz, spec.sample_rate_hz, self.samples)

        # Only the bins that a mel filter uses are computed: first all real parts, then all imaginary parts.
        filters_NF = mel_filters_NF(spec)
        used_N = filters_NF.any(1)
        kernels_KN = spectrum_kernels(spec)[:, used_N].flatten(0, 1)
        self.register_buffer("kernels_K3N", split_kernels(kernels_KN.float()))
        self.register_buffer("filters_NF", filters_NF[used_N])

    @property
    def is_local(self) -> bool:
        """Whether a frame depends on its own samples only, not on where the window begins or ends."""
        return self.resampler is None and self.spec.framing == "kaldi"

    def forward(self, audio_BS: Tensor, samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return `mel_BTF` and the number of its valid frames; the values of later frames are meaningless."""
        samples_B = samples_B.clamp(0, self.samples)
        if self.resampler is not None:
            audio_BS, samples_B = self.resampler(audio_BS, samples_B)

        # Kaldi's frames are inside the sound; centred frames extend past its ends.
        if self.spec.framing == "kaldi":
            frames_B = (1 + (samples_B - self.spec.window_samples) // self.spec.hop_samples).clamp(min=0)
        else:
            audio_BS, samples_B = self.apply_preemphasis(audio_BS, samples_B)
            frames_B = torch.where(samples_B > 0, 1 + samples_B // self.spec.hop_samples, 0)
            audio_BS = self.mirror_ends(audio_BS, samples_B)
        return self.compute_log_mel(audio_BS), frames_B.clamp(max=self.frames)

    def apply_preemphasis(self, audio_BS: Tensor, samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the wave after pre-emphasis (one sample shorter) and its length; unchanged if the spec has none."""
        if not self.spec.preemphasis:
            return audio_BS, samples_B
        emphasised_BS = audio_BS[:, 1:] - self.spec.preemphasis * audio_BS[:, :-1]
        return emphasised_BS, (samples_B - 1).clamp(min=0)

    def mirror_ends(self, audio_BS: Tensor, samples_B: Tensor) -> Tensor:
        """Return the wave extended by its mirror image at both ends, for centred frames (`mel.emphasise_and_pad`)."""
        # The index in the wave of each output sample; negative before the start of the wave.
        window = self.spec.window_samples
        samples = (self.frames - 1) * self.spec.hop_samples + window
        place_N = torch.arange(samples, device=audio_BS.device) - (window + 1) // 2

        # A mirrored wave is periodic: once forwards and once backwards.
        period_B1 = (2 * (samples_B - 1)).clamp(min=1)[:, None]
        place_BN = place_N % period_B1
        return audio_BS.gather(1, torch.minimum(place_BN, period_B1 - place_BN))

    def compute_log_mel(self, audio_BS: Tensor) -> Tensor:
        """Return the log-mel of frames that start one hop apart in the audio."""
        parts_BKT = convolve_fp32(audio_BS, self.kernels_K3N, stride=self.spec.hop_samples)
        power_BNT = parts_BKT[:, :, : self.frames].square().unflatten(1, (2, -1)).sum(1)
        mel_BTF = multiply_fp32(power_BNT.transpose(1, 2), self.filters_NF)
        if self.spec.flooring == "add":
            mel_BTF = mel_BTF + self.spec.floor
        return mel_BTF.clamp(min=self.spec.floor).log()


def spectrum_kernels(spec: MelSpec) -> Tensor:
    """Return the kernels of the real and imaginary parts of a raw frame's spectrum, `[2, bin, sample]`, float64.

    They combine all linear steps of a frame: subtraction of the mean, pre-emphasis, window, DFT. The steps are matrix
    products, multiplied from the left: the last step comes first.
    """
    # Window and DFT.
    bin_K = torch.arange(spec.fft_samples // 2 + 1).double()
    sample_N = torch.arange(spec.window_samples)
    angle_KN = bin_K[:, None] * sample_N * (2 * torch.pi / spec.fft_samples)
    is_periodic = spec.window == "hann_periodic"
    window_N = hann_window_N(spec.window_samples, is_periodic, torch.device("cpu")).double()
    kernels_2KN = torch.stack((angle_KN.cos(), -angle_KN.sin())) * window_N

    # Kaldi's pre-emphasis within the frame. The window's first value is 0, so the first sample needs no special case.
    if spec.framing == "kaldi":
        kernels_2KN = kernels_2KN - spec.preemphasis * nn.functional.pad(kernels_2KN[..., 1:], (0, 1))

    # Subtraction of the frame's mean.
    if spec.remove_dc:
        kernels_2KN = kernels_2KN - kernels_2KN.mean(-1, keepdim=True)
    return kernels_2KN


class Resampler(nn.Module):
    """A convolution that resamples `samples` samples of audio as soxr does, to within 2e-6 of full scale per sample.

    soxr is linear and periodic: a shift of the input by `down` samples shifts the output by `up` samples. So its
    responses to single impulses are the weights of the convolution. Only the start of a sound differs. soxr has two
    filters in sequence, and the second does not get the output of the first from before the start. If a sound starts
    with a step, this changes the first output samples by a hundredth of the step; a correction is added.
    RunError if the network would be very large because the rates have only a small common divisor.
    """

    kernels_L3K: Tensor
    start_FE: Tensor

    def __init__(self, from_hz: int, to_hz: int, samples: int) -> None:
        super().__init__()
        self.from_hz = from_hz
        self.to_hz = to_hz
        self.samples = samples

        # `up` kernels, each over `down` input samples and the filter's reach on either side.
        common = math.gcd(from_hz, to_hz)
        self.up = to_hz // common
        self.down = from_hz // common
        self.reach_samples = math.ceil(FILTER_REACH_SAMPLES * max(1, self.down / self.up))
        if self.up * (self.down + 2 * self.reach_samples) > MAX_RESAMPLER_WEIGHTS:
            raise RunError(
                f"audio at {from_hz} Hz for a mel spec at {to_hz} Hz: a graph for this ratio, "
                f"{self.up}/{self.down}, would be too large; choose --audio-hz {to_hz}"
            )
        self.register_buffer("kernels_L3K", split_kernels(self._filter_kernels()))
        self.register_buffer("start_FE", self._onset_correction())

    def forward(self, audio_BS: Tensor, samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the resampled audio and its number of valid samples; the audio counts as 0 outside the sound."""
        # Set the samples after the end of each sound to 0.
        place_S = torch.arange(audio_BS.shape[1], device=audio_BS.device)
        sound_BS = torch.where(place_S < samples_B[:, None], audio_BS, 0.0)

        # The steady response, plus the correction of the first samples.
        steady_BS = self._convolve_steady(sound_BS, round(self.samples * self.up / self.down))
        inputs, outputs = self.start_FE.shape
        onset_BE = multiply_fp32(sound_BS[:, :inputs], self.start_FE[: sound_BS.shape[1]])
        resampled_BS = torch.cat((steady_BS[:, :outputs] + onset_BE, steady_BS[:, outputs:]), dim=1)
        return resampled_BS, ((samples_B * self.up).double() / self.down).round().long()

    def _convolve_steady(self, audio_BS: Tensor, output_samples: int) -> Tensor:
        """Return soxr's steady response, which holds far from the start of a sound."""
        after = -(-output_samples // self.up) * self.down + self.reach_samples - audio_BS.shape[1]
        padded_BS = nn.functional.pad(audio_BS, (self.reach_samples, after))
        phases_BLN = convolve_fp32(padded_BS, self.kernels_L3K, stride=self.down)
        return phases_BLN.transpose(1, 2).flatten(1)[:, :output_samples]

    def _filter_kernels(self) -> Tensor:
        """Return the weights of the input samples for each of `up` output samples, `[up, down + 2 reach]`."""
        # The number of groups of `down` input samples before and after the impulse.
        groups = -(-self.reach_samples // self.down) + 1
        kernels_LK = torch.zeros(self.up, self.down + 2 * self.reach_samples)
        for place in range(self.down):
            impulse_S = np.zeros((2 * groups + 1) * self.down, np.float32)
            impulse_S[groups * self.down + place] = 1

            # For a later group of output samples, the impulse is further back in the input.
            for group, response_L in enumerate(self._soxr_response(impulse_S).split(self.up)):
                index = place + (groups - group) * self.down + self.reach_samples
                if 0 <= index < kernels_LK.shape[1]:
                    kernels_LK[:, index] = response_L
        return kernels_LK

    def _onset_correction(self) -> Tensor:
        """Return the correction at the start: soxr's minus the steady response, `[reach, ONSET_SAMPLES or fewer]`."""
        impulses_FS = np.eye(self.reach_samples, 2 * self.reach_samples + self.down, dtype=np.float32)
        actual_FS = torch.stack([self._soxr_response(impulse_S) for impulse_S in impulses_FS])
        all_outputs = round(self.samples * self.up / self.down)
        outputs = min(ONSET_SAMPLES, all_outputs, actual_FS.shape[1])
        return actual_FS[:, :outputs] - self._convolve_steady(torch.from_numpy(impulses_FS), outputs)

    def _soxr_response(self, wave_S: np.ndarray) -> Tensor:
        blocks = list(resample_blocks(iter([wave_S]), self.from_hz, self.to_hz))
        return torch.from_numpy(np.concatenate(blocks))
