"""MTEB's audio tasks: batches as they come from its loaders, and its own protocol where mteb is installed."""

import numpy as np
import pytest
import torch
from sounds import babble
from tiny import tiny

from ajepa.embed.pretrained import PretrainedEncoder
from ajepa.model.vit import Encoder
from ajepa.mteb_encoder import MtebEncoder
from pipeline.audio.mel_spec import A_JEPA
from pipeline.errors import RunError


@pytest.fixture(scope="module")
def encoder() -> MtebEncoder:
    spec = tiny().model.encoder
    weights = Encoder(spec, seed=1).state_dict()
    pretrained = PretrainedEncoder(spec=spec, mel=A_JEPA, mean=-7.0, std=4.0, weights=weights, origin={})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ajepa.embed.embedder.load_pretrained", lambda location, at: pretrained)
        return MtebEncoder("unused", device="cpu")


def audio_value(seconds: float, rate_hz: int, seed: int = 0) -> dict:
    return {"array": babble(seconds, rate_hz, seed=seed), "sampling_rate": rate_hz}


def test_batches_of_sounds_become_rows(encoder):
    """Of any rate and length, in their order, whatever else MTEB says of the task; a click is padded."""
    values = [audio_value(1.0, 16_000), audio_value(0.4, 44_100, seed=1), audio_value(0.01, 48_000)]
    batches = [{"audio": values[:2], "id": ["a", "b"]}, {"audio": values[2:], "id": ["c"]}]
    found_ND = encoder.encode(
        iter(batches), task_metadata=None, hf_split="test", hf_subset="default", batch_size=2
    )
    assert found_ND.dtype == np.float32
    assert found_ND.shape == (3, encoder.embedder.width)
    assert np.isfinite(found_ND).all()
    alone_D = encoder.embedder.embed(values[1]).clips_BD[0]
    np.testing.assert_allclose(found_ND[1], alone_D, rtol=1e-4, atol=1e-4)
    with pytest.raises(RunError, match="a batch of text: this encoder is for audio alone"):
        encoder.encode([{"text": ["a dog"]}])


def test_similarities_are_cosines(encoder):
    """All pairs, or pair by pair, of arrays and tensors."""
    one_ND = np.array([[3.0, 0.0], [0.0, 2.0]])
    other_ND = torch.tensor([[1.0, 1.0], [0.0, 5.0]])
    half = 0.5**0.5
    expected = torch.tensor([[half, 0.0], [half, 1.0]])
    torch.testing.assert_close(encoder.similarity(one_ND, other_ND), expected)
    torch.testing.assert_close(encoder.similarity_pairwise(one_ND, other_ND), torch.tensor([half, 1.0]))


def test_mteb_takes_it_for_an_encoder(encoder):
    """Its protocol, and its description of a model, if mteb is installed."""
    protocols = pytest.importorskip("mteb.models.models_protocols", reason="mteb is not installed")
    assert isinstance(encoder, protocols.EncoderProtocol)
    meta = encoder.mteb_model_meta
    assert meta.embed_dim == encoder.embedder.width
    assert meta.modalities == ["audio"]
