"""A trained run before its first step: the network that its seed draws, wherever a checkpoint can be chosen."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny, tiny_finetune
from torch import Tensor

import ajepa
from ajepa.embed.export import export_encoder
from ajepa.embed.pretrained import load_pretrained
from ajepa.evaluate.evaluate import evaluate_run
from ajepa.evaluate.features import RANDOM, TRAINED
from ajepa.evaluate.tasks import TASKS
from ajepa.finetune.finetune import finetune
from ajepa.model.classifier import build_classifier
from ajepa.model.jepa import Jepa
from ajepa.pretrain.pretrain import pretrain
from ajepa.recipes.catalogue import recipe_from_json
from ajepa.training.run import Run
from ajepa.training.trained_run import TrainedRun
from pipeline.errors import RunError

SEED = 3


@pytest.fixture(scope="module")
def run(store_path, tmp_path_factory) -> Run:
    """Two steps of pre-training with bands standardised one by one, by statistics that only checkpoints hold."""
    recipe = tiny(seed=SEED)
    encoder = replace(recipe.model.encoder, band_norm=True)
    recipe = replace(recipe, model=replace(recipe.model, encoder=encoder))
    path = tmp_path_factory.mktemp("runs") / "run"
    return pretrain(store_path, recipe, path, steps=2, device="cpu", say=lambda line: None)


def finetune_one_step(store_path, path, start: TrainedRun | None = None) -> Run:
    recipe = tiny_finetune(steps=1, seed=SEED)
    if start is not None:
        recipe = start.adapt_recipe(recipe)
    return finetune(store_path, TASKS["own"], recipe, path, start=start, device="cpu", say=lambda line: None)


def assert_equal(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def test_before_its_first_step_a_pretrained_run_is_what_its_seed_draws(run):
    """The random encoder beside the trained one: same shape, same statistics of the bands."""
    initial = TrainedRun.open(run.path, "init")
    trained = TrainedRun.open(run.path)
    expected = Jepa(initial.recipe.model, seed=SEED)
    expected.set_band_statistics(*trained.weights["bands_2F"])
    assert (initial.step, initial.part) == (0, "target")
    assert_equal(initial.encoder_weights(), expected.target.state_dict())
    assert trained.weights["bands_2F"][0].any()
    assert not torch.equal(trained.weights["embed.weight"], initial.weights["embed.weight"])


def test_the_initial_encoder_embeds_and_its_export_knows_it_too(run, tmp_path):
    """Whoever has the trained encoder has the random one, also where only an export is left."""
    model = ajepa.load(run.path, at="init", device="cpu")
    assert_equal(model.encoder.state_dict(), TrainedRun.open(run, "init").weights)
    assert model.pretrained.origin["step"] == 0
    export_encoder(run.path, tmp_path / "model")
    exported = load_pretrained(tmp_path / "model", "init")
    assert exported.model_id == model.pretrained.model_id != load_pretrained(tmp_path / "model").model_id
    assert exported.origin["step"] == 0


def test_an_export_without_a_seed_has_no_initial_encoder(run, tmp_path, monkeypatch):
    """Another seed would be another network."""
    unknown = replace(load_pretrained(run.path), origin={})
    monkeypatch.setattr("ajepa.embed.export.load_pretrained", lambda location, at: unknown)
    export_encoder("unused", tmp_path / "model")
    with pytest.raises(
        RunError, match="holds no recipe whose seed drew its first weights; leave out 'init'"
    ) as error:
        ajepa.load(tmp_path / "model", at="init")
    assert "\n" not in str(error.value)
    with pytest.raises(RunError, match="is no run, and only a run has several checkpoints"):
        ajepa.load(tmp_path / "model", at="best")


def test_the_initial_encoder_is_evaluated_as_the_random_one_beside_the_trained(store_path, run, tmp_path):
    """One network, whichever way it is asked for."""
    options = {"device": "cpu", "probes": ("knn",), "pooling": "moments"}
    beside = evaluate_run(store_path, run.path, out=tmp_path / "last.json", **options)
    initial = evaluate_run(store_path, run.path, checkpoint="init", out=tmp_path / "init.json", **options)
    assert (initial.protocol.step, initial.protocol.checkpoint) == (0, "init")
    for label_set in ("raw", "unambiguous"):
        expected = beside.find_score(RANDOM, "knn", label_set).metrics
        assert initial.find_score(TRAINED, "knn", label_set).metrics == expected
        assert beside.find_score(TRAINED, "knn", label_set).metrics != expected


def test_a_classifier_from_random_weights_has_them_before_its_first_step(store_path, tmp_path):
    """Head and encoder."""
    tuned = finetune_one_step(store_path, tmp_path / "run")
    initial = TrainedRun.open(tuned, "init")
    recipe = recipe_from_json(tuned.recipe)
    expected = build_classifier(recipe.model, len(tuned.task_identity.classes), SEED)
    assert_equal(initial.weights, expected.state_dict())
    assert_equal(initial.encoder_weights(), expected.encoder.state_dict())


def test_a_run_that_fine_tunes_the_initial_encoder_says_so_and_starts_from_it(store_path, run, tmp_path):
    """Random beside trained, fine-tuned alike; a run that started from another has no random start of its own."""
    start = TrainedRun.open(run, "init")
    tuned = finetune_one_step(store_path, tmp_path / "run", start)
    identity = tuned.task_identity.start
    assert identity == start.checkpoint_identity() == TrainedRun.open(run, "init").checkpoint_identity()
    assert identity.step == 0
    assert identity.sha256 != TrainedRun.open(run).checkpoint_identity().sha256
    assert torch.equal(TrainedRun.open(tuned).encoder_weights()["bands_2F"], start.weights["bands_2F"])
    with pytest.raises(RunError, match="started from another run's encoder; give that run"):
        TrainedRun.open(tuned, "init")
    export_encoder(tuned.path, tmp_path / "model")
    with pytest.raises(RunError, match="give the pre-trained run"):
        load_pretrained(tmp_path / "model", "init")
