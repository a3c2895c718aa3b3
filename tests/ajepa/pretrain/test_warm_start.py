"""A run that begins with another encoder's weights: which parts, what is refused, and that it stays exact."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny, tiny_views

from ajepa.embed.export import export_encoder
from ajepa.embed.pretrained import load_pretrained
from ajepa.evaluate.evaluate import evaluate_run
from ajepa.model.patches import PatchGrid
from ajepa.pretrain.pretrain import pretrain
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.run import Run
from ajepa.training.trained_run import TrainedRun
from pipeline.errors import RunError

TIMINGS = ("clips_per_s", "data_wait")


def train(store_path: Path, run_path: Path, recipe: Pretrain, lines: list | None = None, **options) -> Run:
    say = (lambda line: None) if lines is None else lines.append
    options = {"steps": 6, "loader": "plain", "precision": "fp32", **options}
    return pretrain(store_path, recipe, run_path, device="cpu", say=say, **options)


def same_weights(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def source(store_path, tmp_path_factory) -> Run:
    """Six steps with views, a clip objective and band statistics."""
    return train(store_path, tmp_path_factory.mktemp("source") / "run", tiny_views())


SECOND_STAGE = tiny_views(seed=7)


@pytest.fixture(scope="module")
def warm(store_path, tmp_path_factory, source) -> Run:
    """Six steps of another seed, from the source."""
    return train(store_path, tmp_path_factory.mktemp("warm") / "run", SECOND_STAGE, start=source.path)


def test_a_run_begins_with_every_part_of_a_run(source, warm):
    """Before its first step it is the source: student, teacher, predictor and projector, and the same embeddings."""
    begun = warm.load_checkpoint(at=0)
    trained = source.load_checkpoint()
    for part in ("encoder", "target", "predictor", "projector"):
        assert same_weights(begun.parts[part], trained.parts[part])
    assert not begun.parts["optimiser"]
    assert not same_weights(warm.load_checkpoint().parts["target"], trained.parts["target"])
    assert load_pretrained(warm.path, "init").model_id == load_pretrained(source.path).model_id


def test_the_record_says_where_the_weights_come_from(source, warm):
    """Years later too, and through every stage."""
    record = json.loads((warm.path / "recipe.json").read_text())
    identity = record["identity"]["warm_start"]
    assert identity["parts"] == ["encoder", "target", "predictor", "projector"]
    assert identity["step"] == 6
    provenance = record["warm_start"]
    assert (provenance["location"], provenance["checkpoint"]) == (str(source.path), "last")
    assert provenance["origin"]["identity"]["store_id"] == source.identity.store_id
    assert provenance["origin"]["recipe"]["seed"] == 0
    assert load_pretrained(warm.path).origin["warm_start"] == provenance


def test_a_warm_started_run_is_carried_on_exactly_without_its_source(
    store_path, tmp_path, source, warm, monkeypatch
):
    """It keeps the weights that it began with: killed before its first checkpoint, it begins with them again."""
    moved = tmp_path / "source"
    shutil.copytree(source.path, moved)
    whole = train(store_path, tmp_path / "whole", SECOND_STAGE, start=moved)
    with monkeypatch.context() as patch:
        log = Run.log_metrics

        def log_and_fail(run, line):
            log(run, line)
            if line["step"] == 3:
                raise KeyboardInterrupt

        patch.setattr(Run, "log_metrics", log_and_fail)
        with pytest.raises(KeyboardInterrupt):
            train(store_path, tmp_path / "run", SECOND_STAGE, start=moved)
    shutil.rmtree(moved)
    run = train(store_path, tmp_path / "run", SECOND_STAGE, start=moved)
    for other in (whole, warm):  # warm: from the original place
        one, two = (each.load_checkpoint().parts for each in (run, other))
        assert all(same_weights(one[part], two[part]) for part in one)
    assert [[line["loss"] for line in each.read_metrics()] for each in (run, whole)] == [
        [line["loss"] for line in warm.read_metrics()]
    ] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "began from .*run; give it again, as --from"),
        ({"start_checkpoint": 5}, "identity.warm_start.step: was 6, now 5"),
    ],
    ids=["no source", "another checkpoint"],
)
def test_a_warm_started_run_is_not_carried_on_with_another_source(store_path, source, warm, options, message):
    """Other weights are another run."""
    start = source.path if options else None
    with pytest.raises(RunError, match=message):
        train(store_path, warm.path, SECOND_STAGE, start=start, **options)


def test_a_run_that_began_from_random_weights_takes_no_source_later(store_path, source, tmp_path):
    """Its weights would be thrown away, or the source ignored."""
    train(store_path, tmp_path / "run", SECOND_STAGE, steps=1)
    with pytest.raises(RunError, match=r"identity.warm_start.parts.0: was absent, now encoder"):
        train(store_path, tmp_path / "run", SECOND_STAGE, steps=1, start=source.path)


def test_an_export_gives_its_encoder_to_student_and_teacher(store_path, source, tmp_path):
    """An export has no other part: predictor and projector are drawn by the seed of the new run."""
    export_encoder(source.path, tmp_path / "model")
    lines: list[str] = []
    run = train(store_path, tmp_path / "run", SECOND_STAGE, lines, start=tmp_path / "model", steps=1)
    begun = run.load_checkpoint(at=0).parts
    target = source.load_checkpoint().parts["target"]
    assert same_weights(begun["encoder"], target)
    assert same_weights(begun["target"], target)
    fresh = train(store_path, tmp_path / "fresh", SECOND_STAGE, steps=1).load_checkpoint()
    assert not same_weights(begun["predictor"], source.load_checkpoint().parts["predictor"])
    assert run.identity.warm_start.parts == ("encoder", "target")
    assert any("begins with encoder, target of" in line and "at step 6" in line for line in lines)
    assert fresh.parts.keys() == run.load_checkpoint().parts.keys()


def test_parts_that_do_not_fit_are_drawn_anew_and_named(store_path, source, tmp_path):
    """A second stage may have another predictor; which parts it began with is said."""
    predictor = replace(SECOND_STAGE.model.predictor, depth=2)
    clip = replace(SECOND_STAGE.model.clip, width=8)
    recipe = replace(SECOND_STAGE, model=replace(SECOND_STAGE.model, predictor=predictor, clip=clip))
    lines: list[str] = []
    run = train(store_path, tmp_path / "run", recipe, lines, start=source.path, steps=1)
    assert run.identity.warm_start.parts == ("encoder", "target")
    (line,) = (line for line in lines if "begins with" in line)
    assert (
        "drawn anew: predictor (depth: was 1, now 2), projector (was widths (48, 16), now widths (48, 8))"
        in line
    )


def test_views_of_another_length_take_the_same_encoder(store_path, source, tmp_path):
    """Positions are computed, not learnt: a longer clip is no other encoder."""
    grid = PatchGrid(rows=2, cols=32, patch_frames=4, patch_bands=64)
    model = replace(SECOND_STAGE.model, encoder=replace(SECOND_STAGE.model.encoder, grid=grid))
    run = train(store_path, tmp_path / "run", replace(SECOND_STAGE, model=model), start=source.path, steps=1)
    assert run.identity.warm_start.parts == ("encoder", "target", "predictor", "projector")


@pytest.mark.parametrize(
    ("start", "recipe", "message"),
    [
        (
            "source",
            tiny(),
            r"its encoder does not fit recipe tiny \(grid.rows: was 2, now 8; grid.patch_frames",
        ),
        ("nowhere", SECOND_STAGE, "nowhere: no such run or file"),
        ("run", SECOND_STAGE, "run: no such run or file"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_leaves_nothing(
    store_path, source, tmp_path, start, recipe, message
):
    """Weights of another shape would fail somewhere inside."""
    location = source.path if start == "source" else tmp_path / start
    with pytest.raises(RunError, match=message) as refused:
        train(store_path, tmp_path / "run", recipe, start=location)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_clips_are_normalised_as_the_sources_were(store_path, source, tmp_path, monkeypatch):
    """Other numbers would be another input to the same weights: at step 0 the encoder would not be the source's."""
    export_encoder(source.path, tmp_path / "model")
    foreign = replace(load_pretrained(tmp_path / "model"), mean=-5.0, std=2.0)
    monkeypatch.setattr("ajepa.pretrain.warm_start.load_pretrained", lambda location, at: foreign)
    run = train(store_path, tmp_path / "run", SECOND_STAGE, start=tmp_path / "model", steps=1)
    assert (run.identity.mean, run.identity.std) == (-5.0, 2.0)
    bands_2F = source.load_checkpoint().parts["target"]["bands_2F"]
    assert torch.equal(run.load_checkpoint().parts["target"]["bands_2F"], bands_2F)


def test_init_of_a_warm_started_run_is_its_warm_start_and_is_called_so(store_path, source, warm, tmp_path):
    """Beside it, the random encoder stays random: the gain of the first stage is not that of the second."""
    options = {"device": "cpu", "probes": ("knn",), "label_sets": ("raw",)}
    initial = evaluate_run(store_path, warm.path, checkpoint="init", out=tmp_path / "init.json", **options)
    last = evaluate_run(store_path, source.path, out=tmp_path / "last.json", **options)
    assert initial.protocol.checkpoint == f"init, the warm start from {source.path}"
    table = " ".join(initial.format_table().split())
    assert f"checkpoint init, the warm start from {source.path}: before step 1" in table
    maps = [each.find_score("encoder", "knn", "raw").metrics["map"].value for each in (initial, last)]
    assert maps[0] == maps[1]
    assert TrainedRun.open(warm, "init").step == 0
    export_encoder(warm.path, tmp_path / "model")
    with pytest.raises(RunError, match="holds no recipe whose seed drew its first weights"):
        load_pretrained(tmp_path / "model", "init")
