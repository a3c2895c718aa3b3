"""Beside the literature: what is printed, and what is called comparable."""

import json
from dataclasses import replace

import pytest

from ajepa.bootstrap import Estimate
from ajepa.compare import Ours, block, cautions, compare, refusals
from ajepa.evaluation import Evaluation, Score
from ajepa.published import EVAL_CLIPS, TRAIN_CLIPS, published, task_of
from pipeline.datasets.speech_commands import WORDS
from pipeline.errors import RunError
from pipeline.ontology import load_class_list
from pipeline.vocabularies import fsd50k_classes

OURS = Ours(
    name="runs/a",
    task="audioset-2m",
    protocol="fine-tuned",
    metric="map",
    value=0.45,
    interval=(0.44, 0.46),
    label_set="raw",
    classes=527,
    train_clips=2_000_000,
    eval_clips=20_000,
)


def row(model: str, task: str, protocol: str = "fine-tuned"):
    return next(r for r in published() if (r.model, r.task, r.protocol) == (model, task, protocol))


def test_every_published_number_has_its_source_and_its_place_in_it():
    """A number that nobody can look up is a rumour."""
    assert len(published()) == len(set(published())) > 50
    for fact in published():
        assert fact.source
        assert fact.where
        assert 0 < fact.value < 1
        assert fact.task in EVAL_CLIPS
        assert fact.protocol in ("fine-tuned", "linear", "xares-mlp", "xares-knn")
        assert fact.metric == (
            "map" if fact.task in ("audioset-2m", "audioset-20k", "fsd50k") else "accuracy"
        )


def test_the_models_that_users_ask_about_are_there():
    """Those of the project's issue."""
    models = " ".join({fact.model for fact in published()})
    for name in (
        "A-JEPA",
        "Audio-MAE",
        "AST",
        "PaSST",
        "BEATs",
        "EAT",
        "SSLAM",
        "data2vec",
        "wav2vec 2.0",
        "Dasheng",
    ):
        assert name in models


def test_the_whole_official_split_with_the_same_protocol_is_comparable():
    """A-JEPA's own number is what a run of its recipe is to reach."""
    assert refusals(OURS, row("A-JEPA ViT-B", "audioset-2m")) == []
    assert cautions(OURS, row("A-JEPA ViT-B", "audioset-2m")) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"protocol": "linear"}, "protocol: that one is fine-tuned, this one linear probe"),
        ({"eval_clips": 401}, "clips: measured on 401, the official split has 20371"),
        ({"eval_clips": 30_000}, "clips: measured on 30000, the official split has 20371"),
        ({"label_set": "unambiguous"}, "labels: measured on unambiguous labels"),
        ({"classes": 50}, "classes: 50 are told apart here, 527 there"),
        ({"train_clips": 20_000}, f"training: on 20000 clips, audioset-2m has {TRAIN_CLIPS['audioset-2m']}"),
    ],
)
def test_what_makes_a_number_another_one_is_told(change, said):
    """Each by itself is reason enough."""
    (reason,) = refusals(replace(OURS, **change), row("A-JEPA ViT-B", "audioset-2m"))
    assert reason.startswith(said)


def test_two_frozen_probes_are_compared_with_care():
    """Same kind, other settings; against a fine-tuned network neither is."""
    ours = replace(
        OURS,
        task="esc50",
        protocol="linear",
        metric="accuracy",
        classes=50,
        eval_clips=2_000,
        train_clips=1_600,
    )
    for protocol, model in (("linear", "MSM-MAE"), ("xares-mlp", "Dasheng")):
        assert refusals(ours, row(model, "esc50", protocol)) == []
        assert any("other settings" in told for told in cautions(ours, row(model, "esc50", protocol)))
    assert refusals(ours, row("AST", "esc50"))
    assert refusals(replace(ours, protocol="knn"), row("Dasheng", "esc50", "xares-mlp"))


def test_what_had_labels_or_is_an_ensembles_is_compared_with_care():
    """Neither is a reason not to look, both are reasons to know."""
    assert cautions(OURS, row("AST", "audioset-2m")) == ["pre-training: that one was shown labels"]
    assert cautions(OURS, row("BEATs", "audioset-2m")) == ["BEATs: the paper's best, of one model or several"]


def test_a_result_on_other_clips_of_the_same_split_is_compared_with_care():
    """Clips vanish from AudioSet: Audio-MAE was measured on 19,148."""
    assert "clips: that one was measured on 19148, this one on 20000" in cautions(
        OURS, row("Audio-MAE", "audioset-2m")
    )


@pytest.mark.parametrize(
    ("classes", "folds", "train_clips", "task"),
    [
        (load_class_list().mids, 0, 20_000, "audioset-20k"),
        (load_class_list().mids, 0, 1_900_000, "audioset-2m"),
        (fsd50k_classes().mids, 0, 30_000, "fsd50k"),
        (WORDS["v1"], 0, 50_000, "speech-commands-v1"),
        (WORDS["v2"], 0, 80_000, "speech-commands-v2"),
        ([f"class{i}" for i in range(50)], 5, 1_600, "esc50"),
        (["cat", "dog"], 0, 100, None),
    ],
)
def test_a_task_is_known_by_its_classes(classes, folds, train_clips, task):
    """A store's name says nothing."""
    assert task_of(classes, folds=folds, train_clips=train_clips) == task


def fine_tuned(task: str, value: float, clips: int) -> dict:
    score = {
        "label_set": "raw",
        "metric": "accuracy",
        "value": value,
        "chance": 0.02,
        "classes": 50,
        "skipped": 0,
    }
    return {
        "protocol": {"task": task, "train_clips": 1_600, "eval_clips": clips},
        "scores": [score | {"per_class": {}}],
    }


def test_folds_that_were_fine_tuned_are_one_result(tmp_path):
    """Five runs of 400 clips: their mean, on 2,000."""
    for fold in range(1, 6):
        (tmp_path / f"fold{fold}").mkdir()
        (tmp_path / f"fold{fold}" / "evaluation.json").write_text(
            json.dumps(fine_tuned("esc50", 0.9 + fold / 100, 400))
        )
    text = compare([tmp_path])
    assert "this result             accuracy  0.930" in text
    assert "A-JEPA ViT-B            accuracy  0.963  fine-tuned   yes" in text
    assert max(len(line) for line in text.splitlines() if line != str(tmp_path)) <= 80


def test_an_evaluation_of_frozen_features_is_shown_probe_by_probe(tmp_path):
    """The trained encoder's alone; each reason is told once, below its table."""
    estimate = Estimate(value=0.145, low=0.13, high=0.16)
    classes = tuple((mid, mid) for mid in load_class_list().mids)
    one = Score(
        features="encoder",
        probe="linear",
        label_set="raw",
        kind="multi",
        metrics={"map": estimate},
        chance=0.01,
        classes=527,
        skipped=0,
        chosen=(0.1,),
        per_class_ap=(0.1,) * 527,
    )
    scores = (one, replace(one, probe="knn"), replace(one, features="random init"))
    protocol = {"folds": 0, "train_clips": 1_617, "eval_clips": 401}
    Evaluation(protocol=protocol, classes=classes, scores=scores).save(tmp_path / "evaluation.json")
    text = compare([tmp_path])
    assert text.count("this result") == 2
    assert "audioset-20k, raw labels, linear probe, 401 clips" in text
    assert "mAP       0.145 [0.130 0.160]" in text
    assert text.count("protocol: that one is fine-tuned, this one linear probe") == 1
    assert " yes" not in text
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 80


def test_a_task_of_ones_own_has_nothing_beside_it():
    """And says so."""
    assert "nothing is published of it" in "\n".join(block(replace(OURS, task=None)))


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is not JSON"), ("[1]", "holds no scores"), ("{}", "holds no scores")]
)
def test_a_file_that_is_no_result_is_refused_in_one_line(tmp_path, text, said):
    """With what to give instead."""
    (tmp_path / "some.json").write_text(text)
    with pytest.raises(RunError, match=said):
        compare([tmp_path / "some.json"])


def test_a_run_that_was_not_measured_is_refused(tmp_path):
    """With the command that is missing."""
    with pytest.raises(RunError, match="run ajepa-train evaluate or finetune first"):
        compare([tmp_path])
