"""Evaluations on disk: each has its own file, is read as written, and is not replaced by another protocol's."""

import json
from types import SimpleNamespace

import pytest
from evaluations import evaluation_protocol, probe_training
from identities import run_identity

from ajepa.evaluate.metrics import MetricEstimate
from ajepa.evaluate.result import EVALUATION_FILE, Evaluation, Score, refuse_overwriting, result_path
from pipeline.errors import RunError

ESTIMATE = MetricEstimate(value=0.5, low=0.4, high=0.6)

SCORE = Score(
    features="encoder",
    probe="knn",
    label_set="raw",
    kind="single",
    metrics={"accuracy": ESTIMATE, "f1": ESTIMATE},
    chance=0.25,
    classes=1,
    skipped=1,
    chosen=(0.1, 1.0),
    by_fold={"accuracy": (0.4, 0.6), "f1": (0.5, 0.5)},
    per_class_ap=(0.75, None),
    per_class_recall=(1.0, None),
)

EVALUATION = Evaluation(
    protocol=evaluation_protocol(folds=2, probes=probe_training()),
    classes=(("a", "A"), ("b", "B")),
    scores=(SCORE,),
)


def test_an_evaluation_is_read_as_it_was_saved(tmp_path):
    """Missing folders are created."""
    file = tmp_path / "some" / "folder" / "result.json"
    EVALUATION.save_json(file)
    assert Evaluation.read_json(file) == EVALUATION
    assert list(json.loads(file.read_text())) == ["format", "protocol", "classes", "scores"]


def test_the_table_shows_a_metric_that_a_score_lacks_as_a_dash():
    """One block per kind of labels: interval, chance, deviation over folds, two other metrics."""
    assert EVALUATION.format_table().splitlines() == [
        "5 eval clips of some.zarr, mean over 2 folds; run at step 6",
        "checkpoint last: the last step",
        "network computed in fp32, everything after it in fp32",
        "probes trained on 10 clips",
        "pooling mean, layer last",
        "[95 % of 50 resamples of the clips; of so few clips, and of scores near 0 or 1,",
        "such intervals say little]",
        "                                   raw",
        "                                   1 of 2 classes",
        "accuracy",
        "  encoder              kNN         0.500 [0.400 0.600]",
        "  chance                           0.250",
        "deviation over 2 folds",
        "  encoder              kNN         0.141",
        "macro F1 / mAP",
        "  encoder              kNN         0.500 / -",
    ]


def test_the_class_table_has_a_line_for_every_class(tmp_path):
    """A class without an eval clip has empty cells."""
    EVALUATION.write_class_table(tmp_path / "classes.csv")
    assert (tmp_path / "classes.csv").read_text().splitlines() == [
        'label_set,class,name,encoder knn,"recall, encoder knn"',
        "raw,a,A,0.750000,1.000000",
        "raw,b,B,,",
    ]


@pytest.mark.parametrize(
    ("finetuned", "own_store", "probed", "name"),
    [
        (False, True, True, "evaluation.json"),
        (False, False, True, "evaluation-there.json"),
        (True, True, False, "evaluation.json"),
        (True, False, False, "evaluation-there.json"),
        (True, True, True, "evaluation-probes.json"),
        (True, False, True, "evaluation-there-probes.json"),
    ],
)
def test_one_rule_says_where_a_result_is_kept(tmp_path, finetuned, own_store, probed, name):
    """The run's main evaluation on its own store is evaluation.json; all others have longer names."""
    run = SimpleNamespace(path=tmp_path, identity=run_identity(store_id="a"), is_finetuned=finetuned)
    store = SimpleNamespace(store_id="a" if own_store else "b", location="some/there.zarr")
    assert result_path(run, store, probed=probed) == tmp_path / name


def test_a_result_of_another_protocol_is_not_replaced(tmp_path):
    """A result of more probes or a later step may replace it, and a missing file is never refused."""
    file = tmp_path / EVALUATION_FILE
    other = evaluation_protocol(folds=2, probes=probe_training(pooling="moments"))
    refuse_overwriting(file, other)
    EVALUATION.save_json(file)
    refuse_overwriting(
        file, evaluation_protocol(folds=2, step=9, probes=probe_training(names=("knn", "linear")))
    )
    with pytest.raises(
        RunError, match=r"another protocol \(probes.pooling: mean, now moments\); save .* --out FILE"
    ):
        refuse_overwriting(file, other)


def test_a_result_of_an_older_format_is_not_read_but_may_be_replaced(tmp_path):
    """The error names the command that makes it again."""
    file = tmp_path / EVALUATION_FILE
    EVALUATION.save_json(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(RunError, match="run ajepa-train evaluate again"):
        Evaluation.read_json(file)
    refuse_overwriting(file, evaluation_protocol(store_id="abc"))


def test_a_protocol_that_lacks_a_key_is_refused_with_its_file(tmp_path):
    """Somebody edited the file; evaluating the run again replaces it."""
    file = tmp_path / EVALUATION_FILE
    EVALUATION.save_json(file)
    record = json.loads(file.read_text())
    del record["protocol"]["eval_clips"]
    file.write_text(json.dumps(record))
    with pytest.raises(
        RunError, match="its protocol lacks 'eval_clips'; delete the file and run ajepa-train evaluate"
    ):
        Evaluation.read_json(file)


def test_a_result_of_format_3_is_read_with_what_it_does_not_say_unknown(tmp_path):
    """It said neither its precision nor what chose its checkpoint; it is still compared, and still protected."""
    file = tmp_path / EVALUATION_FILE
    EVALUATION.save_json(file)
    record = json.loads(file.read_text())
    for key in ("precision", "chosen_by", "labels"):
        del record["protocol"][key]
    file.write_text(json.dumps(record | {"format": 3}))
    old = Evaluation.read_json(file)
    assert (old.protocol.precision, old.protocol.chosen_by) == (None, None)
    assert old.scores == EVALUATION.scores
    assert "checkpoint last, chosen by unknown: made before results said so" in old.format_table()
    with pytest.raises(RunError, match="another protocol"):
        refuse_overwriting(file, evaluation_protocol(store_id="abc"))
