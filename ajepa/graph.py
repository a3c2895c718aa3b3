"""Graph: audio to embeddings as one network, for ONNX and torch.export: the log-mel is computed inside it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ajepa.embed import Embedder
from ajepa.patches import valid_tokens
from pipeline.errors import RunError
from pipeline.files import replacing
from pipeline.mel import hann_N, mel_filters_NF
from pipeline.melspec import MelSpec

OPSET = 20  # the first with GELU; onnxruntime 1.17 and newer
INPUTS, OUTPUTS = ("audio", "samples"), ("clip", "frames", "frame_count")
LARGEST_BYTES = 1.9e9  # of an ONNX file: protobuf ends at 2 GiB


class AudioGraph(nn.Module):
    """One view of sound in, embeddings out, as `Embedder.embed_audio` has them.

    The window's length is fixed, for the encoder's positions are: `samples` of audio at the spec's rate, of any
    batch. Shorter sounds are padded with anything; what is longer is cut into windows by the caller. Spectra come
    from one convolution, whose kernels are Kaldi's frame operations and the DFT: all of them are linear.
    """

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        mel, grid = embedder.mel, embedder.grid
        if mel.framing != "kaldi":
            told = f"mel spec {mel.name} is {mel.framing}; a graph is made of Kaldi front ends alone"
            raise RunError(f"{told}: embed with ajepa.load instead")
        self.mel, self.grid, self.pooling, self.layer = mel, grid, embedder.pooling, embedder.layer
        self.samples = (grid.frames - 1) * mel.hop_samples + mel.window_samples
        self.encoder, self.mean, self.std = embedder.encoder, embedder.model.mean, embedder.model.std
        filters_NF = mel_filters_NF(mel)
        touched_N = filters_NF.any(1)
        self.register_buffer(
            "kernels_K1N", spectrum_kernels(mel)[:, touched_N].flatten(0, 1)[:, None].float()
        )
        self.register_buffer("filters_NF", filters_NF[touched_N])
        self.to(embedder.device)

    kernels_K1N: Tensor
    filters_NF: Tensor

    def forward(self, audio_BS: Tensor, samples_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`clip_BD`, `frames_BCD` and how many frames of each are sound, of the first `samples_B` of each row."""
        n_frames_B = (1 + (samples_B - self.mel.window_samples) // self.mel.hop_samples).clamp(
            0, self.grid.frames
        )
        mel_BTF = (self.log_mel(audio_BS) - self.mean) / self.std
        frame_T = torch.arange(self.grid.frames, device=audio_BS.device)
        mel_BTF = torch.where(frame_T[:, None] < n_frames_B[:, None, None], mel_BTF, 0.0)
        valid_BP = valid_tokens(n_frames_B, self.grid)
        tokens_BPD = self.layer.tokens(self.encoder, mel_BTF, valid_BP)
        columns_BCRD = tokens_BPD.unflatten(1, (self.grid.cols, self.grid.rows))
        frames_BCD = columns_BCRD.flatten(2) if self.pooling == "frequency" else columns_BCRD.mean(2)
        valid_BC = valid_BP[:, :: self.grid.rows]
        frames_BCD = torch.where(valid_BC[..., None], frames_BCD, 0.0)
        count_B = valid_BC.sum(1)
        return frames_BCD.sum(1) / count_B[:, None], frames_BCD, count_B

    def log_mel(self, audio_BS: Tensor) -> Tensor:
        """Log-mel of whole frames, as `pipeline.mel.log_mel` has it."""
        both_BKT = nn.functional.conv1d(audio_BS[:, None], self.kernels_K1N, stride=self.mel.hop_samples)
        power_BNT = both_BKT.square().unflatten(1, (2, -1)).sum(1)
        mel_BTF = power_BNT.transpose(1, 2) @ self.filters_NF
        if self.mel.flooring == "add":
            mel_BTF = mel_BTF + self.mel.floor
        return mel_BTF.clamp(min=self.mel.floor).log()


def spectrum_kernels(spec: MelSpec) -> Tensor:
    """`[2, bin, sample]`, float64: the real and imaginary parts of a raw frame's spectrum, Kaldi's steps included.

    Taken from right to left: less the frame's mean, pre-emphasis, window, DFT of the frame padded with zeros.
    """
    size = spec.window_samples
    steps_NN = torch.eye(size, dtype=torch.float64)
    if spec.remove_dc:
        steps_NN = steps_NN - 1 / size
    steps_NN = steps_NN - spec.preemphasis * torch.cat((torch.zeros_like(steps_NN[:1]), steps_NN[:-1]))
    window_N = hann_N(size, spec.window == "hann_periodic", torch.device("cpu")).double()
    steps_NN = window_N[:, None] * steps_NN  # its first sample is 0: what precedes a frame does not matter
    angle_KN = torch.arange(spec.fft_samples // 2 + 1, dtype=torch.float64)[:, None] * torch.arange(size)
    angle_KN = angle_KN * (2 * torch.pi / spec.fft_samples)
    return torch.stack((angle_KN.cos() @ steps_NN, -angle_KN.sin() @ steps_NN))


def exported(embedder: Embedder) -> torch.export.ExportedProgram:
    """The graph as torch.export has it, of any batch."""
    graph = AudioGraph(embedder).eval()
    batch = torch.export.Dim("batch", min=1, max=65_536)
    example = (
        torch.zeros(2, graph.samples, device=embedder.device),
        torch.full((2,), graph.samples, dtype=torch.int64, device=embedder.device),
    )
    with torch.no_grad():
        return torch.export.export(graph, example, dynamic_shapes=({0: batch}, {0: batch}))


def write_program(embedder: Embedder, out: Path) -> None:
    """A `.pt2` file for `torch.export.load`."""
    with replacing(out) as scratch, scratch.open("wb") as handle:
        torch.export.save(exported(embedder), handle)


def write_onnx(embedder: Embedder, out: Path) -> None:
    """An ONNX file of opset OPSET: `audio` float32 [batch, samples] and `samples` int64 [batch] in, OUTPUTS out.

    RunError where onnx and onnxscript are not installed, or the file would be larger than ONNX allows.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (what torch.onnx writes with)
    except ModuleNotFoundError as error:
        raise RunError(f"--onnx needs {error.name}; run: pip install 'ajepa[export]'") from None
    held_bytes = sum(weight.nbytes for weight in embedder.encoder.parameters())
    if held_bytes > LARGEST_BYTES:
        raise RunError(
            f"{out}: {held_bytes / 1e9:.1f} GB of weights do not fit an ONNX file; use --torch-export"
        )
    program = torch.onnx.export(
        exported(embedder),
        dynamo=True,
        opset_version=OPSET,
        input_names=list(INPUTS),
        output_names=list(OUTPUTS),
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    facts = {"model_id": embedder.model.model_id, "sample_rate_hz": embedder.sample_rate_hz}
    facts |= {"samples": AudioGraph(embedder).samples, "column_ms": embedder.column_ms}
    for key, value in {**facts, "first_centre_ms": embedder.first_centre_ms}.items():
        proto.metadata_props.add(key=key, value=str(value))
    onnx.checker.check_model(proto)
    with replacing(out) as scratch:
        scratch.write_bytes(proto.SerializeToString())
