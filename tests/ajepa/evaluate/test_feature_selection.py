"""Pooling and layer by probes on training clips: what is held back, what is chosen, and who uses the choice."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_views

import ajepa
from ajepa.embed.embedder import Embedder
from ajepa.embed.embedding_job import make_embedding_job
from ajepa.embed.export import export_encoder
from ajepa.embed.table import write_embedding_table
from ajepa.evaluate import feature_selection
from ajepa.evaluate.evaluate import evaluate_run
from ajepa.evaluate.feature_selection import SelectionClips, candidate_vectors, choose_features
from ajepa.evaluate.features import ClipViews, clip_vectors
from ajepa.model.pooling import EncoderLayer
from ajepa.model.vit import Encoder
from ajepa.pretrain.pretrain import pretrain
from ajepa.training.feature_choice import (
    FeatureCandidate,
    FeatureChoice,
    read_feature_choice,
    resolve_features,
)
from ajepa.training.run import Run
from pipeline.errors import BrokenClipError, RunError
from pipeline.store.splits import train_splits


@pytest.fixture(scope="module", autouse=True)
def few_clips_suffice():
    """The tests' store has 36 clips to train on: this many held back, and one of each class on both sides, will do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_selection, "MIN_HELD_CLIPS", 4)
        patch.setattr(feature_selection, "MIN_CLASS_CLIPS", 1)
        yield


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def run(store_path, tmp_path_factory, told) -> Run:
    """Two blocks, two steps, with probes: so it ends with a choice."""
    recipe = tiny_views(steps=2, probe_every=2, probe_clips=8, health_every=0)
    path = tmp_path_factory.mktemp("runs") / "run"
    return pretrain(store_path, recipe, path, device="cpu", say=told.append)


@pytest.fixture(scope="module")
def clips(store) -> SelectionClips:
    return SelectionClips.from_store(store, seed=0)


def make_choice(**scores: float) -> FeatureChoice:
    """A choice among mean of last (128 wide), moments of last (1,024) and moments of concat-all (5,120)."""
    settings = {
        "mean": ("mean", "last", 128),
        "moments": ("moments", "last", 1_024),
        "everything": ("moments", "concat-all", 5_120),
    }
    candidates = tuple(
        FeatureCandidate(
            pooling=settings[name][0],
            layer=EncoderLayer.from_name(settings[name][1]),
            width=settings[name][2],
            knn=score,
            linear=score,
        )
        for name, score in scores.items()
    )
    return FeatureChoice(
        step=7, store_id="a", metric="mAP", fit_clips=3, held_clips=1, classes=2, candidates=candidates
    )


def test_no_evaluation_clip_and_no_sound_of_both_sides(store, clips):
    """The choice must not know the clips that evaluate measures, nor measure pieces of what it was trained on."""
    rows_N = clips.rows_N
    assert set(rows_N) <= set(store.good_rows(train_splits(store)))
    assert 0 < clips.held_clips < len(rows_N)
    sources = store.manifest["source"].to_numpy()[rows_N].astype(str)
    assert not set(sources[clips.is_held_N]) & set(sources[~clips.is_held_N])
    assert clips.labels_NC.any(axis=1).all()
    for part_N in (clips.is_held_N, ~clips.is_held_N):
        assert (clips.labels_NC[part_N].sum(0) >= 1).all()


def test_pieces_that_a_table_names_apart_stay_together(store):
    """Ids of a table of one's own say nothing of the file that two clips were cut from."""

    class OneFile:
        """The store, as if all its clips came from two files."""

        manifest = store.manifest.with_columns(
            source=pl.Series(["a.wav", "b.wav"] * (store.manifest.height // 2 + 1))[: store.manifest.height]
        )

        def __getattr__(self, name):
            return getattr(store, name)

    clips = SelectionClips.from_store(OneFile(), seed=0)
    assert clips.is_held_N.all()
    assert clips.shortage is not None


def test_every_candidate_is_what_evaluate_would_measure(store, run, clips):
    """One pass of the encoder gives the vectors of each pooling of each layer."""
    few = clips.select_clips(np.arange(len(clips.rows_N)) < 20)
    spec = tiny_views().model.encoder
    encoder = Encoder(spec, seed=1).eval()
    views = ClipViews(store=store, frames=spec.grid.frames, mean=run.identity.mean, std=run.identity.std)
    _, vectors = candidate_vectors(views, few, encoder)
    names = {(pooling, str(layer)) for pooling, layer in vectors}
    assert names == {
        (pooling, layer)
        for pooling in ("mean", "moments")
        for layer in ("last", "mean-2", "concat-2", "concat-all")
    }
    for (pooling, layer), vectors_ND in vectors.items():
        expected_ND = clip_vectors(views, few.rows_N, encoder, pooling=pooling, layer=layer)
        np.testing.assert_allclose(vectors_ND, expected_ND, rtol=1e-4, atol=1e-4)


def test_a_wider_vector_must_be_worth_it():
    """Within a hundredth of the best score the narrowest is taken: the rest is chance, and costs disk and memory."""
    assert make_choice(mean=0.40, moments=0.55, everything=0.555).chosen.width == 1_024
    assert make_choice(mean=0.40, moments=0.55, everything=0.58).chosen.width == 5_120
    assert make_choice(mean=0.50, moments=0.50, everything=0.50).chosen.width == 128


def test_a_run_ends_with_its_choice_and_says_so(run, store_path, told):
    """It is stored once; the same command again leaves it alone, and makes it where a run has none."""
    choice = read_feature_choice(run.path)
    assert choice is not None
    assert choice.step == 2
    (line,) = (line for line in told if "from now on" in line)
    assert f"vectors are {choice.chosen.title} from now on: {choice.reason}" in line
    assert f"on {choice.held_clips} held-back training clips at step 2: mAP" in line

    # Made before, or lost: the same command makes the same file.
    file = run.path / "features.json"
    before = file.read_bytes()
    file.unlink()
    recipe = tiny_views(steps=2, probe_every=2, probe_clips=8, health_every=0)
    pretrain(store_path, recipe, run.path, device="cpu", say=lambda line: None)
    assert file.read_bytes() == before
    assert FeatureChoice.from_json(json.loads(before), "") == choice


def test_everybody_takes_the_choice(run, store, tmp_path, capsys):
    """Load, an export, a table and an evaluation, unless they are asked for others; the table says why."""
    choice = read_feature_choice(run.path)
    chosen = choice.chosen
    model = ajepa.load(run.path, device="cpu")
    assert (model.pooling, model.layer, model.width) == (chosen.pooling, chosen.layer, chosen.width)
    export_encoder(run.path, tmp_path / "export")
    exported = ajepa.load(tmp_path / "export", device="cpu")
    assert exported.pretrained.features == choice
    assert (exported.pooling, exported.layer) == (chosen.pooling, chosen.layer)
    assert choice.reason in (tmp_path / "export" / "README.md").read_text()
    assert capsys.readouterr().err == ""

    # A table: another reason for the same vectors carries it on.
    out = tmp_path / "emb.parquet"
    job = make_embedding_job([str(store.path)], model)
    job = replace(job, rows=job.rows[:3])
    write_embedding_table(model, job, out, say=lambda line: None)
    plan = json.loads(pq.read_schema(out).metadata[b"ajepa"])
    assert (plan["pooling"], plan["layer"]) == (chosen.pooling, str(chosen.layer))
    assert plan["chosen"] == choice.reason
    named = ajepa.load(run.path, device="cpu", pooling=chosen.pooling, layer=str(chosen.layer))
    assert named.features.reason == "as asked"
    lines = []
    write_embedding_table(named, job, out, say=lines.append)
    assert lines == [f"{out}: already complete, 3 rows"]

    evaluation = evaluate_run(
        store, run.path, device="cpu", probes=["knn"], out=tmp_path / "evaluation.json", train_clips=20
    )
    assert evaluation.protocol.probes.pooling == chosen.pooling
    assert evaluation.protocol.probes.layer == str(chosen.layer)


def test_a_run_without_a_choice_says_what_is_used_instead(run, capsys):
    """Made before, or without labels: rows apart with their deviation, of the mean of the last blocks."""
    pretrained = replace(ajepa.load(run.path, device="cpu").pretrained, features=None)
    model = Embedder(pretrained, device="cpu")
    assert (model.pooling, str(model.layer)) == ("moments", "mean-2")
    assert model.features.is_fallback
    (run.path / "features.json").rename(run.path / "away")
    try:
        ajepa.load(run.path, device="cpu")
    finally:
        (run.path / "away").rename(run.path / "features.json")
    expected = "vectors are moments of layer mean-2 (the fixed default: no probe has chosen)"
    assert expected in capsys.readouterr().err


def test_what_is_asked_for_is_used():
    """One of the two leaves the other as it was chosen."""
    spec = tiny_views().model.encoder
    choice = make_choice(mean=0.1, everything=0.5)
    both = resolve_features(spec, choice, "mean", "last")
    assert (both.pooling, str(both.layer), both.reason) == ("mean", "last", "as asked")
    one = resolve_features(spec, choice, pooling="mean")
    assert (one.pooling, str(one.layer)) == ("mean", "concat-all")
    assert one.reason.startswith("pooling as asked, layer best by kNN and linear probe on 1 held-back")
    with pytest.raises(RunError, match="the encoder has 2 blocks"):
        resolve_features(spec, choice, layer="block-3")
    with pytest.raises(RunError, match="pooling 'max' is unknown"):
        resolve_features(spec, choice, pooling="max")


def test_too_few_labels_choose_nothing(run, store, told):
    """Chance would choose; the line says what is missing."""
    lines = []
    assert choose_features(run, store, torch.device("cpu"), max_clips=5, say=lines.append) is None
    (line,) = lines
    assert "labelled training clips" in line
    assert (
        "of a class with 1 clips both held back and to train on; 4 are needed; the fixed default is used"
        in line
    )
    assert line.endswith("or choose with ajepa-train evaluate --pooling NAME --layer NAME")


def test_a_greater_share_is_held_back_only_where_a_quarter_is_too_few(store, clips, monkeypatch):
    """What suffices stays as it is; of few clips the same sounds and more are held back."""
    monkeypatch.setattr(feature_selection, "HELD_SHARES", (0.25,))
    quarter = SelectionClips.from_store(store, seed=0)
    np.testing.assert_array_equal(clips.rows_N, quarter.rows_N)
    np.testing.assert_array_equal(clips.is_held_N, quarter.is_held_N)
    monkeypatch.setattr(feature_selection, "HELD_SHARES", (0.25, 0.4))
    monkeypatch.setattr(feature_selection, "MIN_HELD_CLIPS", quarter.held_clips + 1)
    more = SelectionClips.from_store(store, seed=0)
    assert more.held_clips > quarter.held_clips
    assert set(quarter.rows_N[quarter.is_held_N]) <= set(more.rows_N[more.is_held_N])


def test_a_clip_that_cannot_be_read_is_left_out(store, run, clips, monkeypatch):
    """The training is over: one damaged clip must not cost the choice."""
    few = clips.select_clips(np.arange(len(clips.rows_N)) < 18)
    broken = int(few.rows_N[3])
    read_views = ClipViews.read_views

    def read_but_one(views, rows_B):
        if broken in rows_B:
            raise BrokenClipError(broken, "damaged")
        return read_views(views, rows_B)

    monkeypatch.setattr(feature_selection.ClipViews, "read_views", read_but_one)
    spec = tiny_views().model.encoder
    views = ClipViews(store=store, frames=spec.grid.frames, mean=run.identity.mean, std=run.identity.std)
    kept, vectors = candidate_vectors(views, few, Encoder(spec).eval())
    assert broken not in kept.rows_N
    assert len(kept.rows_N) == 17
    assert {len(vectors_ND) for vectors_ND in vectors.values()} == {17}


def test_vectors_that_would_fill_memory_are_no_candidates(monkeypatch):
    """ViT-B's moments of all blocks have 160,000 values; twenty thousand of them are 13 GB."""
    spec = replace(tiny_views().model.encoder, width=768, depth=12, heads=12)
    layer = EncoderLayer.from_name("concat-all")
    assert feature_selection.candidate_poolings(layer, spec) == ["mean"]
    assert feature_selection.candidate_poolings(EncoderLayer.from_name("last"), spec) == ["mean", "moments"]
