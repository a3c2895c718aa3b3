"""Results compared with the literature: the printed lines, and which numbers are called comparable."""

import csv
from dataclasses import replace

import polars as pl
import pytest
from evaluations import classifier_training, evaluation_protocol, probe_training

from ajepa.evaluate.compare import (
    PUBLISHED_TABLE,
    PublishedResult,
    compare_results,
    comparison_caveats,
    comparison_table,
    published_results,
    reasons_against,
)
from ajepa.evaluate.metrics import MetricEstimate
from ajepa.evaluate.own_results import (
    OFFICIAL_EVAL_CLIPS,
    OFFICIAL_TRAIN_CLIPS,
    OwnResult,
    classifier_result,
    match_public_task,
)
from ajepa.evaluate.protocol import ClassifierTraining, ProbeTraining
from ajepa.evaluate.result import Evaluation, Score
from ajepa.training.trained_run import CHOSEN_ON_EVAL_CLIPS
from pipeline.datasets.speech_commands import SPEECH_COMMANDS_WORDS
from pipeline.errors import RunError
from pipeline.labels.ontology import fsd50k_classes, load_class_list

OURS = OwnResult(
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


def published(model: str, task: str, protocol: str = "fine-tuned") -> PublishedResult:
    wanted = (model, task, protocol)
    return next(row for row in published_results() if (row.model, row.task, row.protocol) == wanted)


def test_every_published_number_has_its_source_and_its_place_in_it():
    """A number that nobody can look up is a rumour."""
    assert len(published_results()) == len(set(published_results())) > 50
    for record in csv.DictReader(PUBLISHED_TABLE.read_text(encoding="utf-8").splitlines()):
        assert record["source"]
        assert record["where"]
    for row in published_results():
        assert row.checked in ("source", "second hand", "no")
        assert 0 < row.value < 1
        assert row.task in OFFICIAL_EVAL_CLIPS
        assert row.protocol in ("fine-tuned", "linear", "xares-mlp", "xares-knn")
        assert row.metric == ("map" if row.task in ("audioset-2m", "audioset-20k", "fsd50k") else "accuracy")


def test_the_models_that_users_ask_about_are_in_the_table():
    """Each by its name in the literature."""
    models = " ".join({row.model for row in published_results()})
    for name in (
        "A-JEPA",
        "Audio-JEPA",
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
    assert reasons_against(OURS, published("A-JEPA ViT-B", "audioset-2m")) == []
    assert comparison_caveats(OURS, published("A-JEPA ViT-B", "audioset-2m")) == []


@pytest.mark.parametrize(
    ("change", "beginning"),
    [
        ({"protocol": "linear"}, "protocol: published fine-tuned, here linear probe"),
        ({"eval_clips": 401}, "clips: measured on 401, the official split has 20371"),
        ({"eval_clips": 30_000}, "clips: measured on 30000, the official split has 20371"),
        ({"label_set": "unambiguous"}, "labels: measured on unambiguous labels"),
        ({"classes": 50}, "classes: published 527, here 50"),
        (
            {"train_clips": 20_000},
            f"training: on 20000 clips, audioset-2m has {OFFICIAL_TRAIN_CLIPS['audioset-2m']}",
        ),
    ],
)
def test_every_reason_against_comparing_is_given(change, beginning):
    """A single reason is enough."""
    (reason,) = reasons_against(replace(OURS, **change), published("A-JEPA ViT-B", "audioset-2m"))
    assert reason.startswith(beginning)


def test_two_frozen_probes_are_compared_with_care():
    """They differ in settings only; a probe and a fine-tuned network are not compared."""
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
        assert reasons_against(ours, published(model, "esc50", protocol)) == []
        assert any(
            "other settings" in caveat
            for caveat in comparison_caveats(ours, published(model, "esc50", protocol))
        )
    assert reasons_against(ours, published("AST", "esc50"))
    assert reasons_against(replace(ours, protocol="knn"), published("Dasheng", "esc50", "xares-mlp"))


def test_what_had_labels_or_is_an_ensembles_is_compared_with_care():
    """Neither prevents the comparison, but the reader must know it."""
    assert comparison_caveats(OURS, published("AST", "audioset-2m")) == [
        "pre-training: the published network was pre-trained with labels"
    ]
    assert comparison_caveats(OURS, published("BEATs", "audioset-2m")) == [
        "BEATs: the paper's best, of one model or several"
    ]


def test_a_number_that_was_not_seen_at_its_source_is_compared_with_care():
    """The reader should look it up at the source before relying on it."""
    (caveat,) = comparison_caveats(OURS, published("A-JEPA ViT-L", "audioset-2m"))
    assert caveat.startswith("value: the published number comes from notes")


def test_a_result_on_other_clips_of_the_same_split_is_compared_with_care():
    """Clips vanish from AudioSet: Audio-MAE was measured on 19,148."""
    assert "clips: published on 19148, here on 20000" in comparison_caveats(
        OURS, published("Audio-MAE", "audioset-2m")
    )


@pytest.mark.parametrize(
    ("classes", "folds", "train_clips", "task"),
    [
        (load_class_list().mids, 0, 20_000, "audioset-20k"),
        (load_class_list().mids, 0, 1_900_000, "audioset-2m"),
        (fsd50k_classes().mids, 0, 30_000, "fsd50k"),
        (SPEECH_COMMANDS_WORDS["v1"], 0, 50_000, "speech-commands-v1"),
        (SPEECH_COMMANDS_WORDS["v2"], 0, 80_000, "speech-commands-v2"),
        ([f"class{i}" for i in range(50)], 5, 1_600, "esc50"),
        (["cat", "dog"], 0, 100, None),
    ],
)
def test_a_task_is_known_by_its_classes(classes, folds, train_clips, task):
    """The name of the store is not used."""
    assert match_public_task(classes, folds=folds, train_clips=train_clips) == task


def evaluation(
    classes: int | tuple[str, ...],
    metric: float,
    *,
    clips: int,
    kind: str = "multi",
    folds: int = 0,
    classifier: ClassifierTraining | None = None,
    probes: ProbeTraining | None = None,
    store_id: str = "own",
) -> Evaluation:
    """An evaluation in which only the first number, its folds and its protocol matter."""
    names = tuple(f"c{i}" for i in range(classes)) if isinstance(classes, int) else classes
    estimate = MetricEstimate(value=metric, low=metric - 0.015, high=metric + 0.015)
    first = "accuracy" if kind == "single" else "map"
    score = Score(
        features="encoder" if probes else "classifier",
        probe="linear" if probes else "head",
        label_set="raw",
        kind=kind,
        metrics={first: estimate},
        chance=0.01,
        classes=len(names),
        skipped=0,
        chosen=(),
        by_fold={first: tuple(metric + 0.01 * (i - (folds - 1) / 2) for i in range(folds))},
        per_class_ap=(0.1,) * len(names),
        per_class_recall=(),
    )
    scores = (score,)
    if probes:
        scores = (score, replace(score, probe="knn"), replace(score, features="random init"))
    protocol = evaluation_protocol(
        folds=folds, eval_clips=clips, classifier=classifier, probes=probes, store_id=store_id
    )
    return Evaluation(protocol=protocol, classes=tuple((mid, mid) for mid in names), scores=scores)


def trained(task: str, clips: int, classes: int, *, start: dict | None) -> ClassifierTraining:
    return classifier_training(task=task, train_clips=clips, class_count=classes, start=start)


def is_narrow(text: str, *names: object) -> bool:
    """Lines are at most 80 columns, but for paths."""
    return max(len(line) for line in text.splitlines() if not any(str(n) in line for n in names)) <= 80


def test_folds_that_were_fine_tuned_are_one_result(tmp_path):
    """Five runs of 400 clips each give one mean on 2,000 clips, with the deviation over folds."""
    classifier = trained("esc50", 1_600, 50, start={"step": 9})
    result = evaluation(50, 0.93, clips=2_000, kind="single", folds=5, classifier=classifier)
    result.save_json(tmp_path / "evaluation.json")
    text = compare_results([tmp_path])
    assert "this result             accuracy  0.930 [0.915 0.945] ± 0.016 over 5 folds" in text
    assert "A-JEPA ViT-B            accuracy  0.963  fine-tuned   yes" in text
    assert is_narrow(text, tmp_path)


def test_an_evaluation_of_frozen_features_is_shown_probe_by_probe(tmp_path):
    """Only the trained encoder's scores are shown; each reason is printed once, below its table."""
    result = evaluation(load_class_list().mids, 0.145, clips=401, probes=probe_training(train_clips=1_617))
    result.save_json(tmp_path / "evaluation.json")
    text = compare_results([tmp_path])
    assert text.count("this result") == 2
    assert "audioset-20k, raw labels, linear probe, 401 clips" in text
    assert "mAP       0.145 [0.130 0.160]" in text
    assert text.count("protocol: published fine-tuned, here linear probe") == 1
    assert " yes" not in text
    assert is_narrow(text, tmp_path)


def test_runs_of_both_kinds_stand_side_by_side(tmp_path):
    """A probe's number is not compared with a fine-tuned network's; a classifier without pre-training is marked."""
    audioset = load_class_list().mids
    paths = []
    classifier = trained("audioset", 20_000, 527, start=None)
    for name, result in (
        ("probed", evaluation(audioset, 0.145, clips=20_000, probes=probe_training(train_clips=20_000))),
        ("tuned", evaluation(audioset, 0.3, clips=20_000, classifier=classifier)),
    ):
        (tmp_path / name).mkdir()
        result.save_json(tmp_path / name / "evaluation.json")
        paths.append(tmp_path / name)
    linear, nearest, tuned = compare_results(paths).split("\n\n")
    assert "audioset-20k, raw labels, fine-tuned, 20000 clips" in tuned
    assert "with care" in tuned
    assert "pre-training: the network here had none" in tuned
    assert "raw labels, linear probe," in linear
    assert "raw labels, kNN," in nearest
    assert " yes" not in linear + nearest


def test_a_classifier_on_another_stores_clips_is_of_its_task_while_all_classes_are_there():
    """AudioSet's on all 527 classes of another copy is AudioSet; on some of its classes it is no task of the table."""
    classifier = trained("audioset", 2_000_000, 527, start={"step": 9})
    evaluations = (
        evaluation(names, 0.4, clips=19_000, classifier=classifier, store_id="other")
        for names in (load_class_list().mids, load_class_list().mids[:192])
    )
    whole, some = (classifier_result("a.json", each, each.scores[0], classifier) for each in evaluations)
    assert (whole.task, whole.protocol) == ("audioset-2m", "fine-tuned")
    assert (some.task, some.protocol) == (None, "elsewhere")


def test_a_run_that_does_not_say_on_how_many_clips_it_was_trained_is_not_comparable():
    """AudioSet has two training sets, and the run may be of either."""
    unknown = replace(OURS, train_clips=None)
    (reason,) = reasons_against(unknown, published("A-JEPA ViT-B", "audioset-2m"))
    assert reason.startswith("training: the run records no number of train clips")


def own_task(tmp_path, name: str, metric: float, *, clips: int = 24, **protocol):
    """The folder of a run that was probed on two classes of its own; its baselines are worse."""
    result = evaluation(2, metric, clips=clips, kind="single", probes=probe_training(train_clips=72))
    own, knn, random = result.scores
    scores = (
        own,
        knn,
        replace(random, metrics={"accuracy": MetricEstimate(value=0.3, low=0.2, high=0.4)}),
        replace(own, features="log-mel statistics"),
    )
    (tmp_path / name).mkdir()
    replace(result, protocol=replace(result.protocol, **protocol), scores=scores).save_json(
        tmp_path / name / "evaluation.json"
    )
    return tmp_path / name


def test_runs_on_the_same_clips_share_a_table_with_their_baselines(tmp_path):
    """A row for each run and kind of features, from the best down; that nothing is published is said once."""
    worse = own_task(tmp_path, "a", 0.5, step=10)
    better = own_task(tmp_path, "b", 0.75, step=20)
    text = compare_results([worse, better])
    linear, knn, nothing = text.split("\n\n")
    assert linear.splitlines()[:9] == [
        "24 clips of some.zarr, raw labels, linear probe, trained on 72 clips",
        "  accuracy                      features             run",
        f"  0.750 [0.735 0.765]           encoder              {better}",
        f"  0.750 [0.735 0.765]           log-mel statistics   {better}",
        f"  0.500 [0.485 0.515]           encoder              {worse}",
        f"  0.500 [0.485 0.515]           log-mel statistics   {worse}",
        f"  0.300 [0.200 0.400]           random init          {worse}",
        f"  0.300 [0.200 0.400]           random init          {better}",
        "  0.010                         chance",
    ]
    assert f"{worse}: step 10, pooling mean, layer last; checkpoint last: the last step" in " ".join(
        linear.split()
    )
    assert "kNN" in knn
    assert nothing == "no published result of what is measured here is listed in published_results.csv"
    assert compare_results([better, better, worse]).count(f"encoder              {better}") == 2


@pytest.mark.parametrize("change", [{"clips": 23}, {"store_id": "other"}, {"eval_splits": ("test",)}])
def test_runs_on_other_clips_do_not_share_a_table(tmp_path, change):
    """Their numbers differ by more than the runs."""
    text = compare_results([own_task(tmp_path, "a", 0.5), own_task(tmp_path, "b", 0.75, **change)])
    assert text.count("this result") == 4
    assert text.count("no published result") == 1


def test_published_results_follow_a_shared_table(tmp_path):
    """Once each; a reason that holds for one of the runs names it."""
    paths = []
    for name, start in (("a", None), ("b", {"step": 9})):
        classifier = trained("esc50", 1_600, 50, start=start)
        result = evaluation(50, 0.93, clips=2_000, kind="single", folds=5, classifier=classifier)
        (tmp_path / name).mkdir()
        result.save_json(tmp_path / name / "evaluation.json")
        paths.append(tmp_path / name)
    text = compare_results(paths)
    assert text.startswith("esc50: 2000 clips of some.zarr, raw labels, mean over 5 folds, fine-tuned,")
    assert f"0.930 [0.915 0.945] ± 0.016   classifier           {paths[0]}" in text
    assert text.count("A-JEPA ViT-B            accuracy  0.963  fine-tuned   with care") == 1
    assert f"pre-training: the network here had none ({paths[0]})" in " ".join(text.split())
    assert "no published result" not in text
    assert is_narrow(text, tmp_path)


def test_the_table_for_programs_has_columns_for_the_baselines(tmp_path):
    """The columns and rows of before come first."""
    table = comparison_table([own_task(tmp_path, "a", 0.5), own_task(tmp_path, "b", 0.75)])
    assert table.columns[:11] == [
        *("result", "model", "task", "label_set", "protocol", "metric", "value", "low", "high"),
        *("comparable", "reasons"),
    ]
    linear = table.filter(pl.col("protocol") == "linear")
    assert linear.select(
        "model", "value", "features", "random_init", "log_mel_statistics", "store"
    ).rows() == [
        ("this result", 0.5, "encoder", 0.3, 0.5, "some.zarr"),
        ("this result", 0.75, "encoder", 0.3, 0.75, "some.zarr"),
    ]


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[1]", "holds no scores"), ("{}", "holds no scores")]
)
def test_a_file_that_is_no_result_is_refused_in_one_line(tmp_path, text, message):
    """The message says which file to give instead."""
    (tmp_path / "some.json").write_text(text)
    with pytest.raises(RunError, match=message):
        compare_results([tmp_path / "some.json"])


def test_a_run_that_was_not_measured_is_refused(tmp_path):
    """The message names the command to run first."""
    with pytest.raises(RunError, match="run ajepa-train evaluate or finetune first"):
        compare_results([tmp_path])


def test_every_result_says_what_chose_its_checkpoint(tmp_path):
    """A best that was chosen on the measured clips is no yes; what older files do not say is unknown."""
    classifier = trained("esc50", 1_600, 50, start={"step": 9})
    result = evaluation(50, 0.93, clips=2_000, kind="single", folds=5, classifier=classifier)
    texts = {}
    for name, chosen_by in (
        ("held-back", "probes on 480 held-back clips of a_train"),
        ("eval", CHOSEN_ON_EVAL_CLIPS),
        ("unknown", None),
    ):
        protocol = replace(result.protocol, checkpoint="best", chosen_by=chosen_by)
        replace(result, protocol=protocol).save_json(tmp_path / f"{name}.json")
        texts[name] = compare_results([tmp_path / f"{name}.json"])
    assert "  checkpoint best, chosen by probes on 480 held-back clips of a_train" in texts["held-back"]
    assert "A-JEPA ViT-B            accuracy  0.963  fine-tuned   yes" in texts["held-back"]
    assert "it was chosen on clips of the splits that are measured" in " ".join(texts["eval"].split())
    assert "chosen by unknown" in texts["unknown"]
    for name in ("eval", "unknown"):
        assert "A-JEPA ViT-B            accuracy  0.963  fine-tuned   with care" in texts[name]
    assert all(is_narrow(text, tmp_path) for text in texts.values())
