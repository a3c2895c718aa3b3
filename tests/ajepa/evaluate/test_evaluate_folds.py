"""Probes on a task in folds, from the store to the table."""

import csv
import json

import numpy as np
import pytest
from matplotlib.image import imread
from sounds import write
from tiny import tiny

from ajepa.evaluate import probes
from ajepa.evaluate.evaluate import evaluate_run
from ajepa.evaluate.features import STATISTICS, TRAINED
from ajepa.evaluate.result import Evaluation
from ajepa.model.masking import Fixed, RandomPatches
from ajepa.model.pooling import EncoderLayer
from ajepa.pretrain.pretrain import pretrain
from ajepa.report.pictures import draw_run_report
from ajepa.training.run import Run
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build.build import build_store
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.datasets.esc50 import esc50_corpus
from pipeline.errors import RunError, StoreError
from pipeline.store.feature_store import FeatureStore

RATE_HZ, HZ = 16_000, {0: 300.0, 11: 1_200.0, 49: 5_000.0}

CATEGORIES = {0: "dog", 11: "sea_waves", 49: "hand_saw"}


@pytest.fixture(scope="module")
def esc50_path(tmp_path_factory):
    """36 noisy tones of three classes in three folds, as ESC-50 lies on a disk."""
    root, rng = tmp_path_factory.mktemp("folds"), np.random.default_rng(0)
    for folder in ("audio", "meta"):
        (root / "ESC-50" / folder).mkdir(parents=True)
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for number in range(36):
        fold, target = 1 + number % 3, tuple(HZ)[number // 3 % 3]
        name = f"{fold}-{100 + number}-A-{target}.wav"
        lines.append(f"{name},{fold},{target},{CATEGORIES[target]},False,{100 + number},A")
        time_S = np.arange(5 * RATE_HZ) / RATE_HZ
        wave_S = 0.2 * np.sin(2 * np.pi * HZ[target] * rng.uniform(0.9, 1.1) * time_S)
        wave_S += 0.1 * rng.standard_normal(len(wave_S))
        write(root / "ESC-50" / "audio" / name, wave_S.astype(np.float32), RATE_HZ)
    (root / "ESC-50" / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    build_store(
        esc50_corpus(root / "ESC-50"),
        StoreOutput(path=root / "esc50.zarr", spec=preset_mel_spec("a-jepa")),
        BuildOptions(workers=0),
    )
    return root / "esc50.zarr"


@pytest.fixture(scope="module", autouse=True)
def short_attentive_probes():
    """No test of this file needs a good attentive probe: 20 steps instead of 150 or more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "MAX_ATTENTIVE_STEPS", 20)
        yield


@pytest.fixture(scope="module")
def run(store_path, tmp_path_factory) -> Run:
    path = tmp_path_factory.mktemp("runs") / "run"
    masks = Fixed(masking=RandomPatches())  # their picture has one row, a curriculum's five
    return pretrain(store_path, tiny(masks=masks), path, steps=6, device="cpu", say=lambda line: None)


@pytest.fixture(scope="module")
def evaluation(esc50_path, run) -> Evaluation:
    return evaluate_run(esc50_path, run.path, device="cpu")


def test_each_clip_is_measured_once_and_metrics_are_means_over_folds(evaluation):
    """36 clips in three folds; single labels are found by themselves."""
    protocol = evaluation.protocol
    assert (protocol.folds, protocol.eval_clips, protocol.probes.train_clips) == (3, 36, 24)
    assert protocol.eval_splits == ("fold1", "fold2", "fold3")
    assert all(score.kind == "single" for score in evaluation.scores)
    linear = evaluation.find_score(TRAINED, "linear", "raw")
    assert set(linear.metrics) == {"accuracy", "f1", "map", "auc", "d_prime"}
    assert len(linear.chosen) == 3
    assert linear.chance == pytest.approx(1 / 3)
    assert np.mean(linear.by_fold["accuracy"]) == pytest.approx(linear.primary_estimate.value)
    assert linear.fold_deviation == pytest.approx(np.std(linear.by_fold["accuracy"], ddof=1))


def test_tones_are_told_apart_by_their_statistics(evaluation):
    """Three frequencies that no probe can miss: the whole path is right."""
    assert evaluation.find_score(STATISTICS, "linear", "raw").primary_estimate.value > 0.9
    assert evaluation.find_score(STATISTICS, "knn", "raw").primary_estimate.value > 0.9


def test_another_stores_result_stands_beside_the_runs_own(evaluation, esc50_path, run, tmp_path):
    """Neither overwrites the other, and each has its picture."""
    assert Evaluation.read_json(run.path / "evaluation-esc50.json").scores == evaluation.scores
    assert not (run.path / "evaluation.json").exists()
    store = FeatureStore.open(esc50_path)
    assert evaluation.protocol.store_id == store.store_id != run.identity.store_id
    assert evaluation.protocol.training_store_id == run.identity.store_id


def test_the_table_tells_accuracy_first_in_80_columns(evaluation):
    """With intervals, then F1 and mAP."""
    text = evaluation.format_table()
    assert text.startswith("36 eval clips of esc50.zarr, mean over 3 folds; run at step 6\n")
    assert text.index("accuracy") < text.index("deviation over 3 folds") < text.index("macro F1 / mAP")
    assert max(len(line) for line in text.splitlines()) <= 80


def test_every_class_has_its_line_in_the_csv(evaluation, tmp_path):
    """Named, with two columns for each probe on each kind of features: precision, and recall of single labels."""
    evaluation.write_class_table(tmp_path / "classes.csv")
    with (tmp_path / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["dog", "sea_waves", "hand_saw"]
    for score in evaluation.scores:
        column = [float(row[f"{score.features} {score.probe}"]) for row in rows]
        assert column == pytest.approx(list(score.per_class_ap), abs=1e-6)
        recalls = [float(row[f"recall, {score.features} {score.probe}"]) for row in rows]
        assert recalls == pytest.approx(list(score.per_class_recall), abs=1e-6)
        assert np.mean(recalls) == pytest.approx(
            score.primary_estimate.value
        )  # classes are of one size, in every fold


def test_what_is_asked_for_is_done_and_stamped(esc50_path, run, tmp_path):
    """Pooling, layer, probes and file; the grid and the weights are told, too."""
    options = {
        "pooling": "frequency",
        "layer": EncoderLayer(block_number=1),
        "probes": ("knn",),
        "out": tmp_path / "some.json",
    }
    evaluation = evaluate_run(esc50_path, run.path, device="cpu", kind="multi", checkpoint=5, **options)
    protocol = json.loads((tmp_path / "some.json").read_text())["protocol"]
    noted = protocol["probes"]
    assert (noted["pooling"], noted["layer"], noted["names"]) == ("frequency", "block-1", ["knn"])
    assert (protocol["checkpoint"], protocol["step"]) == ("5", 5)
    assert noted["grid"] == {"rows": 8, "cols": 4, "frames": 16, "bands": 16}
    assert len(protocol["weights_sha256"]) == 64
    assert noted["l2_grid"][0] == 1.0
    assert protocol["versions"]["torch"]
    assert {(score.probe, score.kind) for score in evaluation.scores} == {("knn", "multi")}


def test_probes_labels_and_kinds_that_do_not_fit_are_refused(esc50_path, store_path, run):
    """In one line, before anything is encoded."""
    with pytest.raises(RunError, match=r"probe 'svm' is unknown; .* There are: linear, knn, attentive"):
        evaluate_run(esc50_path, run.path, probes=("svm",))
    with pytest.raises(StoreError, match="no label set 'dominators'"):
        evaluate_run(esc50_path, run.path, label_sets=("dominators",))
    with pytest.raises(RunError, match="single labels were requested"):
        evaluate_run(store_path, run.path, kind="single")
    with pytest.raises(RunError, match="no checkpoint was probed, so none is the best"):
        evaluate_run(esc50_path, run.path, checkpoint="best")


def test_evaluations_of_both_stores_are_drawn(evaluation, store_path, run, tmp_path):
    """Bars with intervals; a probe that has no features of a kind is left out."""
    options = {"probes": ("linear", "attentive"), "label_sets": ("raw",)}
    evaluate_run(store_path, run.path, device="cpu", **options)
    names = [path.name for path in draw_run_report(store_path, run.path, tmp_path / "out")]
    assert names == ["curves.png", "masks.png", "probes-esc50.png", "probes.png"]
    for name in names[2:]:
        assert imread(tmp_path / "out" / name).std() > 0.1
    (run.path / "evaluation.json").unlink()
