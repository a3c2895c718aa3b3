"""Graph: audio to embeddings as one network, for ONNX and torch.export: the log-mel is computed inside it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ajepa.embed import Embedder
from ajepa.front_end import FrontEnd
from ajepa.patches import valid_tokens
from pipeline.errors import RunError
from pipeline.files import replacing

OPSET = 20  # the first with GELU; onnxruntime 1.17 and newer
RATE_HZ = 32_000  # of the audio that a graph takes, unless another is asked for
INPUTS, OUTPUTS = ("audio", "samples"), ("clip", "frames", "frame_count")
LARGEST_BYTES = 1.9e9  # of an ONNX file: protobuf ends at 2 GiB


class AudioGraph(nn.Module):
    """One view of sound in, embeddings out, as `Embedder.embed_audio` has them; of any mel spec (`FrontEnd`).

    The window's length is fixed, for the encoder's positions are: `samples` of mono audio at `rate_hz`, of any
    batch. Shorter sounds are padded with anything; what is longer is cut into windows by the caller, and each is
    then a sound of its own, with an end at either side.

    facts  what a caller must know: model, rate, window, where columns lie
    """

    def __init__(self, embedder: Embedder, rate_hz: int = RATE_HZ) -> None:
        super().__init__()
        self.grid, self.pooling, self.layer = embedder.grid, embedder.pooling, embedder.layer
        self.front_end = FrontEnd(embedder.mel, embedder.grid.frames, rate_hz)
        self.rate_hz, self.samples = rate_hz, self.front_end.samples
        self.encoder, self.mean, self.std = embedder.encoder, embedder.model.mean, embedder.model.std
        self.facts = {
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
        valid_BP = valid_tokens(n_frames_B, self.grid)
        tokens_BPD = self.layer.tokens(self.encoder, mel_BTF, valid_BP)
        columns_BCRD = tokens_BPD.unflatten(1, (self.grid.cols, self.grid.rows))
        frames_BCD = columns_BCRD.flatten(2) if self.pooling == "frequency" else columns_BCRD.mean(2)
        valid_BC = valid_BP[:, :: self.grid.rows]
        frames_BCD = torch.where(valid_BC[..., None], frames_BCD, 0.0)
        count_B = valid_BC.sum(1)
        return frames_BCD.sum(1) / count_B[:, None], frames_BCD, count_B


def exported(graph: AudioGraph) -> torch.export.ExportedProgram:
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
    program = exported(graph)
    with replacing(out) as scratch, scratch.open("wb") as handle:
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
    if held_bytes > LARGEST_BYTES:
        raise RunError(
            f"{out}: {held_bytes / 1e9:.1f} GB of weights do not fit an ONNX file; use --torch-export"
        )
    program = torch.onnx.export(
        exported(graph),
        dynamo=True,
        opset_version=OPSET,
        input_names=list(INPUTS),
        output_names=list(OUTPUTS),
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    for key, value in graph.facts.items():
        proto.metadata_props.add(key=key, value=str(value))
    onnx.checker.check_model(proto)
    with replacing(out) as scratch:
        scratch.write_bytes(proto.SerializeToString())
