"""The study of label propagation: differences are paired, spreads are over seeds, gaining classes are apart."""

import json
import math

import pytest

from ajepa.finetune.hlp_result import (
    PROPAGATED_LABELS,
    RAW_LABELS,
    HlpResult,
    HlpScore,
    HlpTraining,
    SeedSpread,
)

NAMES = ("Animal", "Dog", "Vehicle", "Car")


def training(arm: str, seed: int, raw: list, propagated: list) -> HlpTraining:
    """A training of which the average precisions by raw and by propagated labels are known."""
    scores = []
    for labels, per_class in ((RAW_LABELS, raw), (PROPAGATED_LABELS, propagated)):
        measured = [value for value in per_class if value is not None]
        value = sum(measured) / len(measured)
        scores.append(HlpScore(labels=labels, map=value, chance=0.1, per_class=tuple(per_class)))
    return HlpTraining(model="cnn6", arm=arm, seed=seed, scores=tuple(scores))


def result(*, seeds: int = 3) -> HlpResult:
    """Seeds differ by 0.1; propagation adds 0.2 to Animal, 0.1 to Vehicle, nothing to Dog; Car is not measured."""
    trainings = []
    for seed in range(seeds):
        easy = 0.1 * seed
        for arm, more in (("raw", 0.0), ("propagated", 1.0), ("raw, scores propagated", 0.5)):
            per_class = [0.3 + easy + 0.2 * more, 0.5 + easy, 0.4 + easy + 0.1 * more * (seed + 1) / 2, None]
            trainings.append(training(arm, seed, [0.2 + easy, 0.4 + easy, None, None], per_class))
    return HlpResult(
        protocol={"seeds": list(range(seeds)), "train_clips": 10, "eval_clips": 5},
        classes=NAMES,
        clips_before=(2, 5, 1, 3),
        clips_after=(7, 5, 4, 6),
        trainings=tuple(reversed(trainings)),
    )


def test_a_difference_is_paired_by_seed():
    """Seeds differ more than arms: unpaired, the deviation would be 0.1 and hide everything."""
    difference = result().map_difference("cnn6", PROPAGATED_LABELS, PROPAGATED_LABELS)
    assert difference.values == pytest.approx([(0.2 + 0.1 * k / 2) / 3 for k in (1, 2, 3)])
    assert difference.deviation == pytest.approx(0.05 / 3)
    assert result().map_spread("cnn6", RAW_LABELS, PROPAGATED_LABELS).deviation == pytest.approx(0.1)
    assert difference.positive_count == 3
    assert result().map_difference("cnn6", PROPAGATED_LABELS, RAW_LABELS).values == (0, 0, 0)


def test_classes_that_gain_clips_are_separated_from_those_that_do_not():
    """Car gains clips too, but no clip measures it; Dog gains none."""
    study = result()
    assert [one.name for one in study.gaining_classes("cnn6")] == ["Animal", "Vehicle"]
    animal, vehicle = study.gaining_classes("cnn6")
    assert animal.difference.values == pytest.approx([0.2] * 3)
    assert (animal.clips_before, animal.clips_after) == (2, 7)
    assert vehicle.difference.values == pytest.approx([0.05, 0.1, 0.15])
    assert study.mean_difference("cnn6", gaining=True).values == pytest.approx([0.125, 0.15, 0.175])
    assert study.mean_difference("cnn6", gaining=False).values == pytest.approx([0] * 3)


def test_the_table_says_what_was_found():
    """Means, deviations, the seeds that agree, the classes behind it; in a terminal's width."""
    lines = result().format_table().splitlines()
    assert max(map(len, lines)) <= 80
    table = "\n".join(line.strip() for line in lines)
    assert "mAP, mean ± deviation over 3 seeds; 10 clips to train on, 5 measured" in table
    assert "0.500 ± 0.100" in table
    assert "+0.100 ± 0.017" in table
    assert "3 of 3" in table
    words = [" ".join(line.split()) for line in lines]
    assert "2 classes that gain clips to train on +0.150 ± 0.025" in words
    assert "1 classes that gain none +0.000 ± 0.000" in words
    assert "Animal 2 -> 7 0.400 0.600 +0.200 ± 0.000" in words


def test_one_seed_has_no_deviation():
    """Rather no number than a wrong one; in the file it is null."""
    study = result(seeds=1)
    assert math.isnan(study.map_spread("cnn6", RAW_LABELS, RAW_LABELS).deviation)
    assert " ± 0" not in study.format_table()
    record = json.loads(json.dumps(study.to_json(), allow_nan=False))
    assert record["summary"]["cnn6"]["map"]["raw"]["raw"]["deviation"] is None


def test_a_result_comes_back_from_its_file():
    """With the same table."""
    study = result()
    again = HlpResult.from_json(json.loads(json.dumps(study.to_json(), allow_nan=False)))
    assert again == study
    assert again.format_table() == study.format_table()


def test_a_spread_is_a_sample_deviation():
    """Of a few seeds: divided by one less than their number."""
    assert SeedSpread(values=(0.1, 0.3)).deviation == pytest.approx(0.1 * 2**0.5)
