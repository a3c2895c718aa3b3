"""Batches for a training loop of one's own, by one call."""

import numpy as np
import pytest
import torch

import pipeline
from pipeline.errors import RunError


def test_batches_of_dali_come_from_one_call(store):
    """Normalised by the split, shuffled anew in every epoch, each clip once; equal to the plain loader's."""
    rows_N = store.good_rows("eval")
    with pipeline.open_batches(store, "eval", clips=4, epochs=2, labels="raw", frames=64) as batches:
        found = list(batches)
    assert len(found) == len(batches) == len(rows_N) * 2 // 4
    assert set(np.concatenate([batch.rows_B for batch in found])) <= set(rows_N.tolist())
    with pipeline.open_batches(
        store, ["eval"], clips=4, epochs=2, labels="raw", frames=64, loader="plain"
    ) as plain:
        for one, other in zip(found, plain, strict=True):
            assert torch.equal(one.mel_BTF, other.mel_BTF)
            assert torch.equal(one.labels_BC, other.labels_BC)
    with pytest.raises(RunError, match="clips fill no batch of 9999"):
        pipeline.open_batches(store, "eval", clips=9_999)
