"""The training set: which clips of which stores come how often, and which settings are refused."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from sounds import babble, write
from tiny import tiny

from ajepa.pretrain.pretrain import pretrain
from ajepa.pretrain.training_set import TrainingSet
from ajepa.recipes.pretrain import smoke_recipe
from ajepa.training.run import Run
from ajepa.training.run_identity import BlockShuffleIdentity
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.audit.command import record_exclude_lists
from pipeline.build.build import build_store
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.datasets.audioset import audioset_corpus
from pipeline.datasets.folder import folder_corpus
from pipeline.errors import RunError
from pipeline.loading.sampling import FULL_SHUFFLE
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import describe_splits, probe_eval_splits, train_splits

CLIPS = 48


def order_of(trained_on: TrainingSet, **changes):
    recipe = tiny(**changes)
    return trained_on.clip_order(trained_on.open_stores(recipe), recipe)


def test_one_store_is_a_run_as_it_always_was(store_path):
    """Runs that are under way are carried on with: nothing is added to their identity, nothing is said."""
    trained_on = TrainingSet(stores=(store_path,))
    store = trained_on.open_stores(tiny())
    order = trained_on.clip_order(store, tiny())
    assert order.sampling is FULL_SHUFFLE
    assert set(trained_on.data_identity(store).to_json()) == {"store_id", "spec_id", "mel", "mean", "std"}
    assert list(trained_on.describe_order(store, order)) == []


@pytest.mark.parametrize(
    ("splits", "message_part"),
    [
        (["train", "val", "Test", "test_b"], "train, val (not Test, test_b)"),
        (["fold1", "fold2"], "fold1, fold2"),
    ],
)
def test_a_run_says_what_it_trains_on_and_what_it_keeps(splits, message_part):
    """What an audit calls held out is held out, whatever else it may be named than eval."""
    assert describe_splits(SimpleNamespace(split_names=tuple(splits))) == message_part


def test_a_store_of_which_nothing_is_to_train_on_is_refused_with_the_reason():
    """By its names; zero clips that do not fill a step would say nothing."""
    with pytest.raises(
        RunError, match=r"a\.zarr: no split to train on \(eval, test are for evaluation, by name\)"
    ):
        train_splits(SimpleNamespace(location="a.zarr", split_names=tuple(["test", "eval"])))


def test_a_store_of_which_every_clip_is_excluded_is_refused_with_the_reason(store_path, tmp_path):
    """Also whoever excluded them has to be told so."""
    copy = shutil.copytree(store_path, tmp_path / "copy.zarr")
    (tmp_path / "all.csv").write_text("clip_id\n" + "\n".join(FeatureStore.open(copy).manifest["clip_id"]))
    record_exclude_lists(FeatureStore.open(copy), [tmp_path / "all.csv"])
    with pytest.raises(RunError, match=r"copy\.zarr: no clip to train on is left in a_train \(not eval\)"):
        order_of(TrainingSet(stores=(copy,)))


def test_stores_without_weights_give_every_clip_once_an_epoch(store_path, other_store_path):
    """Each store's share is that of its clips; eval clips of neither are trained on."""
    order = order_of(TrainingSet(stores=(store_path, other_store_path)), clips_per_step=1)
    rows = [int(order.rows_at_step(step)[0]) for step in range(order.steps_per_epoch)]
    assert sorted(rows) == list(order.rows_N)
    assert not {row for row in rows if 36 <= row < CLIPS or row >= CLIPS + 18}


def test_weights_decide_a_stores_share_of_the_clips(store_path, other_store_path):
    """Three in ten of 20,000 clips are of the larger store, within four standard deviations."""
    order = order_of(
        TrainingSet(stores=(store_path, other_store_path), weights=(3.0, 7.0)), clips_per_step=20
    )
    rows_N = np.concatenate([order.rows_at_step(step) for step in range(1_000)])
    assert abs((rows_N < CLIPS).mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 20_000)


def test_a_run_on_two_stores_resumes_and_refuses_others(store_path, other_store_path, tmp_path):
    """Its identity holds both stores and their weights; a change of either is another run."""
    both = (store_path, other_store_path)
    lines: list[str] = []
    options = {"device": "cpu", "steps": 6, "loader": "plain"}
    mixed = TrainingSet(stores=both, weights=(0.7, 0.3))
    run = pretrain(mixed, tiny(), tmp_path / "run", say=lines.append, **options)
    assert lines[0].endswith("tiny.zarr: 34 clips, 70.0% of those trained on")
    assert lines[1].endswith("other.zarr: 16 clips, 30.0% of those trained on")
    assert len(run.identity.stores) == 2
    assert run.identity.store_weights == (0.7, 0.3)
    lines.clear()
    pretrain(mixed, tiny(), tmp_path / "run", say=lines.append, **options)
    assert lines == [f"{tmp_path / 'run'}: already at its last step, 6"]
    for other, message_part in [
        (TrainingSet(stores=both, weights=(0.6, 0.4)), "identity.store_weights.0: was 0.7, now 0.6"),
        (TrainingSet(stores=both), "identity.store_weights.0: was 0.7, now absent"),
        (TrainingSet(stores=both[::-1], weights=(0.7, 0.3)), "identity.store_id: was"),
        (TrainingSet(stores=both[:1]), "identity.stores.0: was"),
    ]:
        with pytest.raises(RunError, match=message_part):
            pretrain(other, tiny(), tmp_path / "run", **options)


def test_a_block_shuffled_run_says_how_it_mixes_and_remembers_its_window(store_path, tmp_path):
    """Its order is another one: a run is not carried on with a full shuffle, nor with another window."""
    lines: list[str] = []
    options = {"device": "cpu", "steps": 3, "loader": "plain"}
    block = TrainingSet(stores=(store_path,), shuffle="block", window_blocks=2)
    run: Run = pretrain(block, tiny(), tmp_path / "run", say=lines.append, **options)
    assert lines[0].startswith(
        "block shuffle: 2 blocks of up to 16 clips at a time, 8 MB to keep in memory; a batch"
    )
    assert run.identity.block_shuffle == BlockShuffleIdentity(window_blocks=2)
    with pytest.raises(RunError, match=r"block_shuffle\.window_blocks: was 2, now 64"):
        pretrain(TrainingSet(stores=(store_path,), shuffle="block"), tiny(), tmp_path / "run", **options)


def test_blocks_are_the_shards_of_each_store(store_path, other_store_path):
    """Where one store ends and the next begins, a block ends."""
    trained_on = TrainingSet(stores=(store_path, other_store_path), shuffle="block")
    order = order_of(trained_on)
    assert order.sampling.blocks_N.tolist() == [0] * 14 + [1] * 16 + [2] * 4 + [3] * 14 + [4] * 2


@pytest.mark.parametrize(
    ("wrong", "message_part"),
    [
        ({"weights": (1.0,)}, "1 store weights for 2 stores"),
        (
            {"stores": ("a.zarr",), "weights": (1.0,)},
            "1 store weights for 1 stores; give one for each of two or more",
        ),
        ({"weights": (1.0, 0.0)}, "store weights 1, 0: expected numbers above 0"),
        ({"weights": (1.0, float("inf"))}, "store weights 1, inf: expected numbers above 0"),
        ({"weights": (1e308, 1e308)}, "expected numbers above 0 with a finite sum"),
        ({"weights": (1.0, 2.0), "shuffle": "block"}, "choose one"),
        ({"shuffle": "blocks"}, "shuffle must be full or block, got 'blocks'"),
        ({"window_blocks": 8}, "window 8 is of no use to a full shuffle; add --shuffle block"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong, message_part):
    """Before anything is opened."""
    with pytest.raises(RunError, match=message_part):
        TrainingSet(**{"stores": ("a.zarr", "b.zarr")} | wrong)


def test_a_store_without_a_clip_to_train_on_is_refused(store_path, corpus, tmp_path):
    """Its weight would fall to the others, unsaid."""
    measured = audioset_corpus([corpus / "audio"], [corpus / "eval_segments.csv"])
    build_store(
        measured,
        StoreOutput(path=tmp_path / "eval.zarr", spec=preset_mel_spec("a-jepa")),
        BuildOptions(workers=0),
    )
    trained_on = TrainingSet(stores=(store_path, tmp_path / "eval.zarr"), weights=(1.0, 1.0))
    with pytest.raises(
        RunError, match=r"eval\.zarr: no split to train on \(eval is for evaluation, by name\)"
    ):
        order_of(trained_on)
    with pytest.raises(
        RunError, match=r"eval\.zarr: no split to train on \(eval is for evaluation, by name\)"
    ):
        order_of(TrainingSet(stores=(tmp_path / "eval.zarr",)))


def test_clips_of_any_length_that_fill_a_view_are_trained_on(tmp_path):
    """A store of 1-s clips has the same features; of a longer view most would be padding."""
    (tmp_path / "sounds").mkdir()
    for number in range(9):
        write(tmp_path / "sounds" / f"{number}.wav", babble(1.0, 16_000, seed=number), 16_000)
    spec = replace(preset_mel_spec("a-jepa"), clip_seconds=1.0)
    corpus = folder_corpus(tmp_path / "sounds", clip_seconds=1.0)
    build_store(corpus, StoreOutput(path=tmp_path / "short.zarr", spec=spec), BuildOptions(workers=0))
    run = pretrain(
        tmp_path / "short.zarr", tiny(), tmp_path / "run", steps=1, device="cpu", say=lambda line: None
    )
    assert run.newest_step == 1
    with pytest.raises(
        RunError,
        match=r"clips of 1 s are shorter than a view of recipe smoke, 2\.58 s; build it with --clip-seconds 2\.6",
    ):
        TrainingSet(stores=(tmp_path / "short.zarr",)).open_stores(smoke_recipe())


@pytest.mark.parametrize(
    ("splits", "measured"),
    [
        (["eval", "test", "train"], ["eval"]),
        (["test", "train", "val"], ["test"]),
        (["train", "val"], ["val"]),
        (["dev", "train"], ["dev"]),
        (["a-test", "b-eval", "c"], None),
    ],
)
def test_probes_are_measured_on_eval_or_else_on_what_is_held_out(splits, measured):
    """Speech Commands has no eval, but a test; what is measured on is never trained on."""
    store = SimpleNamespace(split_names=tuple(splits))
    assert probe_eval_splits(store) == (measured or ["a-test", "b-eval"])
    assert not set(probe_eval_splits(store)) & set(train_splits(store))


def test_a_store_without_anything_to_measure_on_says_so():
    """Rather than measuring on what was trained on."""
    with pytest.raises(
        RunError, match=r"a\.zarr: no split to evaluate on, none of more, train .* --holdout 0\.2"
    ):
        probe_eval_splits(SimpleNamespace(location="a.zarr", split_names=tuple(["train", "more"])))
