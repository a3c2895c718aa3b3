"""The study of label propagation: what is trained on what, what is measured, what is done again."""

import json
from dataclasses import replace

import numpy as np
import pytest
from stores import build

from ajepa.evaluate.result import EVALUATION_FILE, Evaluation
from ajepa.finetune.hlp_result import POSTHOC_SCORES, PROPAGATED_LABELS, RAW_LABELS, HlpResult
from ajepa.finetune.hlp_study import (
    HLP_SCORES_FILE,
    HLP_STUDY_FILE,
    HlpStudy,
    added_classes_CC,
    labelled_eval_rows,
    run_hlp_study,
)
from ajepa.recipes.catalogue import finetune_recipe
from ajepa.training.run import Run
from pipeline.errors import RunError
from pipeline.labels.label_sets import propagate_store_labels
from pipeline.store.feature_store import FeatureStore

FEW = {"steps": 3, "clips_per_step": 4, "checkpoint_every": 3, "log_every": 1}


def recipe(name: str = "cnn6-small"):
    """The smallest run of a small recipe."""
    settings = finetune_recipe(name)
    return replace(
        settings, model=replace(settings.model, width=2) if name == "cnn6-small" else settings.model, **FEW
    )


def study_of(store: FeatureStore, **kind) -> HlpStudy:
    return HlpStudy(**{"recipes": {"cnn6": recipe()}, "stores": (store,), "seeds": 2} | kind)


def run(study: HlpStudy, out, lines: list | None = None) -> HlpResult:
    say = [].append if lines is None else lines.append
    return run_hlp_study(study, out, device="cpu", loader="plain", say=say)


@pytest.fixture(scope="module")
def finished_study(store, tmp_path_factory):
    """A study of one model and two seeds; FSD50K's part is played by the store itself."""
    out = tmp_path_factory.mktemp("study")
    study = study_of(store, fsd50k=(store,))
    return study, out, run(study, out)


def test_every_model_is_trained_on_both_label_sets_with_every_seed(finished_study):
    """And of each run the folder says so."""
    _, out, result = finished_study
    assert sorted(path.name for path in (out / "runs").iterdir()) == [
        f"cnn6-{labels}-seed{seed}" for labels in ("raw", "unambiguous") for seed in (0, 1)
    ]
    for labels in ("raw", "unambiguous"):
        identity = Run.open(out / "runs" / f"cnn6-{labels}-seed1").task_identity
        assert identity.label_set == labels
        assert len(identity.classes) == 527
    arms = [(training.arm, training.seed) for training in result.trainings]
    assert sorted(arms) == sorted(
        (arm, seed) for arm in (RAW_LABELS, PROPAGATED_LABELS, POSTHOC_SCORES) for seed in (0, 1)
    )


def test_scores_are_those_that_the_runs_found_themselves(finished_study):
    """The study measures as fine-tuning does: same clips, same views, same metric."""
    _, out, result = finished_study
    for arm, labels in ((RAW_LABELS, "raw"), (PROPAGATED_LABELS, "unambiguous")):
        evaluation = Evaluation.read_json(out / "runs" / f"cnn6-{labels}-seed0" / EVALUATION_FILE)
        score_of = {score.label_set: score for score in evaluation.scores}
        (training,) = (t for t in result.arm_trainings("cnn6", arm) if t.seed == 0)
        for name, label_set in ((RAW_LABELS, "raw"), (PROPAGATED_LABELS, "unambiguous")):
            assert training.score_against(name).map == pytest.approx(score_of[label_set].metrics["map"].value)
            assert (
                len([value for value in training.score_against(name).per_class if value is not None])
                == score_of[label_set].classes
            )


def test_transfer_is_measured_on_the_shared_classes(finished_study):
    """Here the other store has the very same classes: all are shared, and its raw labels are ours."""
    _, _, result = finished_study
    for training in result.trainings:
        assert training.score_against("FSD50K").map == pytest.approx(training.score_against(RAW_LABELS).map)


def test_propagated_scores_differ_from_raw_ones_only_above_what_is_implied(finished_study, store):
    """A class that nothing implies keeps its average precision."""
    _, _, result = finished_study
    adds_CC = added_classes_CC(store, "unambiguous")
    implied_C = adds_CC.any(axis=0)
    raw, posthoc = (
        result.arm_trainings("cnn6", arm)[0].score_against(RAW_LABELS).per_class
        for arm in (RAW_LABELS, POSTHOC_SCORES)
    )
    assert [a for a, gains in zip(raw, implied_C, strict=True) if not gains] == [
        b for b, gains in zip(posthoc, implied_C, strict=True) if not gains
    ]
    assert implied_C.any()
    assert len(labelled_eval_rows(store)) > 0


def test_the_counts_are_of_the_clips_trained_on(finished_study, store):
    """What propagation adds there decides which classes gain."""
    _, _, result = finished_study
    train_N = store.good_rows([s for s in store.manifest["split"].unique() if s != "eval"])
    assert result.protocol["train_clips"] == int(store.labels_BC(train_N).any(axis=1).sum())
    assert list(result.clips_after) == store.labels_BC(train_N, "unambiguous").sum(axis=0).tolist()
    assert any(result.has_more_clips(index) for index in range(527))
    assert not any(a < b for a, b in zip(result.clips_after, result.clips_before, strict=True))


def test_a_study_run_again_trains_and_measures_nothing(finished_study, monkeypatch):
    """And ends with the same result, byte for byte."""
    study, out, result = finished_study
    before = (out / HLP_STUDY_FILE).read_bytes()
    times = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/checkpoints/*/*")}
    monkeypatch.setattr("ajepa.finetune.hlp_study.measure_trainings", None)
    lines = []
    assert run(study, out, lines) == result
    assert (out / HLP_STUDY_FILE).read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/checkpoints/*/*")} == times
    assert sum("already at its last step" in line for line in lines) == 4
    assert HlpResult.from_json(json.loads(before)) == result


def test_one_more_seed_trains_only_that(finished_study):
    """Two runs more, and the old ones as they were."""
    study, out, result = finished_study
    lines = []
    more = run(replace(study, seeds=3), out, lines)
    assert sum("already at its last step" in line for line in lines) == 4
    assert [t for t in more.trainings if t.seed < 2] == list(result.trainings)


def test_other_labels_to_transfer_to_are_measured_anew(finished_study):
    """Scores that were of something else are not shown as of this."""
    study, out, _ = finished_study
    assert run(replace(study, fsd50k=(), seeds=1), out).label_kinds == [RAW_LABELS, PROPAGATED_LABELS]
    record = json.loads((out / "runs" / "cnn6-raw-seed0" / HLP_SCORES_FILE).read_text())
    assert record["of"]["fsd50k"] == []


def test_each_model_takes_the_store_of_its_mel_spec(store, corpus, tmp_path):
    """One decoding pass writes both; a recipe that finds none says which it needs."""
    out = tmp_path / "panns.zarr"
    build(corpus, out, spec="panns")
    propagate_store_labels(out)
    panns = FeatureStore.open(out)
    recipes = {"cnn6-panns": replace(recipe(), mel="panns", model=replace(recipe().model, bands=64))}
    with pytest.raises(RunError, match=r"recipe cnn6-small needs mel spec panns, there is .*\(a-jepa\)"):
        study_of(store, recipes=recipes)
    study = study_of(store, recipes=recipes | {"cnn6": recipe()}, stores=(store, panns), seeds=1)
    result = run(study, tmp_path / "study")
    assert result.model_names == ["cnn6-panns", "cnn6"]
    assert all(np.isfinite(training.score_against(RAW_LABELS).map) for training in result.trainings)


def test_stores_that_do_not_fit_are_named(store, other_store_path, uint8_store_path):
    """Before anything is trained."""
    with pytest.raises(RunError, match="its clips are not those of"):
        study_of(store, stores=(store, FeatureStore.open(other_store_path)))
    with pytest.raises(RunError, match="has no label set unambiguous, it has raw; make it with"):
        study_of(FeatureStore.open(uint8_store_path))


def test_several_processes_are_refused(store, tmp_path, monkeypatch):
    """Each would write what the others write."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RunError, match="start it without torchrun"):
        run(study_of(store), tmp_path / "study")
    assert not (tmp_path / "study").exists()
