"""A run's page shows everything that was measured and logged and loads nothing, for runs evaluated or not."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import tiny, tiny_finetune

from ajepa.evaluate.classifier_scores import held_out_task_data
from ajepa.evaluate.evaluate import evaluate_run
from ajepa.evaluate.result import EVALUATION_FILE, Evaluation, Score
from ajepa.evaluate.tasks import TASKS
from ajepa.finetune.finetune import finetune
from ajepa.model.masking import Fixed, RandomPatches
from ajepa.pretrain.pretrain import pretrain
from ajepa.recipes.supervised import cnn6_small_recipe
from ajepa.report.charts import (
    curves_over_steps,
    format_three_digits,
    round_axis_range,
    whole_number_ticks,
)
from ajepa.report.confusion import confused_pairs, confusion_counts
from ajepa.report.page import RUN_PAGE_SECTIONS, curves_section, logged_values_N, run_page_html
from ajepa.report.pictures import draw_run_report, probe_label
from ajepa.training.run import Run
from ajepa.training.trained_run import TrainedRun
from pipeline.errors import RunError
from pipeline.store.feature_store import FeatureStore


class Elements(HTMLParser):
    """Every element's name and attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.all if tag == name]


def shown_sections(*missing: str) -> list[str]:
    """The sections of a page in their order, without those that a kind of run does not have."""
    return [name for name in RUN_PAGE_SECTIONS if name not in missing]


@pytest.fixture(scope="module")
def run(store_path, tmp_path_factory) -> Run:
    """A short run with a look at its health and a probe under way."""
    path = tmp_path_factory.mktemp("runs") / "a"
    # A curriculum has a picture of five rows of masks, of which the tests of `ajepa-train masks` draw one.
    masks = Fixed(masking=RandomPatches())
    recipe = tiny(masks=masks, health_every=10, probe_every=15)
    return pretrain(store_path, recipe, path, device="cpu", say=lambda line: None)


@pytest.fixture(scope="module")
def pages(run, store_path) -> tuple[str, str]:
    """Before it was evaluated, and after."""
    store = FeatureStore.open(store_path)
    before = run_page_html(store, run)
    evaluate_run(store, run.path, device="cpu", probes=("linear", "knn"))
    return before, run_page_html(store, run)


def test_the_page_of_a_run_without_evaluation_names_the_command_for_it(pages):
    """Every section is there, with the command that fills the one that is empty."""
    elements = Elements(pages[0])
    assert [section["id"] for section in elements.of("section")] == shown_sections("confusions")
    assert "Not evaluated yet: ajepa-train evaluate" in elements.text


def test_the_scores_are_those_of_the_evaluation(pages, run, store_path):
    """Values with their intervals, a table for each label set, a row for each class that was measured."""
    evaluation, text = Evaluation.read_json(run.path / EVALUATION_FILE), Elements(pages[1]).text
    for score in evaluation.scores:
        estimate = score.metrics["map"]
        assert f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]" in text
    measured = [name for _, name in evaluation.classes if f">{name}</th>" in pages[1]]
    assert len(measured) == max(score.classes for score in evaluation.scores)


def test_the_page_opens_with_the_scores_beside_their_baselines(pages, run):
    """The encoder's score alone says nothing: the first numbers are those of its rivals and of chance, too."""
    evaluation = Evaluation.read_json(run.path / EVALUATION_FILE)
    page = pages[1]
    header = page[page.index("<header>") : page.index("</header>")]
    first = evaluation.scores[0]
    rivals = [s for s in evaluation.scores if (s.probe, s.label_set) == (first.probe, first.label_set)]
    assert [score.features for score in rivals] == ["encoder", "random init", "log-mel statistics"]
    for number in [*(score.primary_estimate.value for score in rivals), first.chance]:
        assert f"<b>{number:.3f}</b>" in header

    # A bar for every score, in each chart as long as its value: no axis is cut.
    widths = [float(rect["width"]) for rect in Elements(page).of("rect") if rect["class"].startswith("bar")]
    for label_set in evaluation.label_sets:
        values = [s.primary_estimate.value for s in by_probe(evaluation) if s.label_set == label_set]
        units = np.array([widths.pop(0) for _ in values]) / values
        assert np.allclose(units, units[0], rtol=0.01)
    assert not widths


def by_probe(evaluation: Evaluation) -> list[Score]:
    """The scores in the order of the charts: all features of a probe together."""
    probes = list(dict.fromkeys(score.probe for score in evaluation.scores))
    return sorted(evaluation.scores, key=lambda score: probes.index(score.probe))


def test_the_probe_plot_has_the_encoder_before_training(pages, run):
    """Dashed, measured by the same probes: a curve that ends below it has learnt nothing."""
    lines = Elements(pages[0]).of("line")
    probes = [key for key in run.read_metrics()[-1] if key.startswith(("val_probe_linear", "val_probe_knn"))]
    assert len([line for line in lines if "base" in line["class"].split()]) == len(probes) > 0


@pytest.mark.parametrize(
    ("last", "ticks"), [(650, [0, 200, 400, 600]), (3, [0, 1, 2, 3]), (20, [0, 5, 10, 15, 20])]
)
def test_steps_are_marked_at_whole_numbers(last, ticks):
    """There is no step 162.5."""
    assert whole_number_ticks(float(last)) == ticks


def test_confusions_count_the_class_of_the_highest_score():
    """Two of three dogs are heard as such, the third as a cat; a clip of both labels is no confusion."""
    labels_NC = np.array([[1, 0], [1, 0], [1, 0], [1, 1], [0, 1]], bool)
    top_N = np.array([0, 0, 1, 1, 1])
    assert confusion_counts(labels_NC, top_N).tolist() == [[2, 2], [0, 2]]
    pairs = confused_pairs(labels_NC, top_N, ["dog", "cat"])
    assert pairs.count("taken for") == 1
    assert "dog taken for cat: <b>1</b>" in pairs


def test_the_page_plays_neighbours_if_it_is_asked_to(run, store_path):
    """Each clip of the neighbours has its id and its sound."""
    store = FeatureStore.open(store_path)
    page = run_page_html(store, run, with_sounds=True)
    cells = [d for d in Elements(page).of("div") if "alike" in d.get("class", "").split()]
    players = Elements(page).of("audio")
    assert len(players) == len(cells) > 0
    assert all(player["src"].startswith("data:audio/mpeg;base64,") for player in players)
    ids = [
        span["title"] for span in Elements(page).of("span") if span.get("class") == "id" and "title" in span
    ]
    assert set(ids) <= set(store.manifest["clip_id"])
    assert len(ids) == len(cells)


def test_every_eval_clip_has_a_dot_with_its_spectrogram(pages, store_path):
    """Pointing at a clip shows it; nothing has to be fetched for that."""
    store = FeatureStore.open(store_path)
    dots = [attributes for _, attributes in Elements(pages[1]).all if "data-mel" in attributes]
    assert len(dots) == len(store.good_rows(["eval"]))
    assert all(dot["data-mel"].startswith("data:image/png;base64,") for dot in dots)


def test_the_page_loads_nothing_from_outside(pages):
    """It is mailed, archived and opened without a network."""
    for page in pages:
        addresses = [
            a for _, attributes in Elements(page).all for a in (attributes.get("src"), attributes.get("href"))
        ]
        assert all(a.startswith(("data:", "#")) for a in addresses if a)
        assert not re.search(r"https?://", page)


def test_a_curve_leaves_out_the_steps_at_which_nothing_was_measured(run):
    """Health and probes are logged now and then: a line between zeros would be a lie."""
    ranks_N = logged_values_N(run.read_metrics(), "health_rank")
    assert np.isfinite(ranks_N).sum() == 3
    step_N = np.array([line["step"] for line in run.read_metrics()])
    assert step_N[np.isfinite(ranks_N)].tolist() == [10, 20, 30]
    (line,) = re.findall(
        r'<polyline points="([^"]*)"', curves_over_steps(step_N, [("rank", ranks_N)], "step")
    )
    assert len(line.split()) == 3


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.9, 0.989), (3e-5, 1e-3), (-2.2, 17.0), (5.0, 5.0)])
def test_an_axis_holds_its_values_between_round_numbers(low, high):
    """Five lines, of which the outer two enclose everything."""
    first, last = round_axis_range(low, high)
    assert first <= low + 1e-12
    assert last >= high - 1e-12
    assert all(len(format_three_digits(number)) <= 8 for number in np.linspace(first, last, 5))


@pytest.fixture(scope="module", params=["vit", "cnn6"])
def tuned(request, run, store_path, tmp_path_factory) -> Run:
    """A classifier with an encoder that was pre-trained, and one without any."""
    path = tmp_path_factory.mktemp("runs") / request.param
    recipe, start = replace(cnn6_small_recipe(), steps=4, clips_per_step=4, log_every=1), None
    if request.param == "vit":
        start = TrainedRun.open(run.path)
        recipe = start.adapt_recipe(tiny_finetune(steps=4))
    options = {"label_set": "unambiguous", "device": "cpu", "say": lambda line: None}
    return finetune(store_path, TASKS["own"], recipe, path, start=start, **options)


def test_the_page_of_a_fine_tuned_run_has_neither_masks_nor_predictions(tuned, store_path, tmp_path):
    """The rest is there: the task, the start, the scores on the way and at the end."""
    page = tmp_path / "page.html"
    assert draw_run_report(store_path, tuned.path, html=page) == [page]
    elements = Elements(page.read_text())
    shown = [section["id"] for section in elements.of("section")]
    assert shown == shown_sections("masks", "predictions")
    assert [link["href"] for link in elements.of("a")] == [f"#{name}" for name in shown]
    text = elements.text
    classes = len(tuned.task_identity.classes)
    assert f"own, {classes} classes, several to a clip, by unambiguous labels" in text
    origin = tuned.task_identity.start
    assert ("random weights" if origin is None else f"the encoder of step 30 ({origin.sha256[:12]})") in text
    assert f">{'vit' if origin else 'cnn6'}<" in page.read_text()
    assert "For baselines: ajepa-train evaluate" in text
    assert "Held-out clips while training, mAP" in text
    score = Evaluation.read_json(tuned.path / EVALUATION_FILE).scores[0]
    assert f"{score.primary_estimate.value:.3f} [" in text
    assert "Average precision of every class (classifier, own head)" in text
    assert "placed by t-SNE of the classifier's logits" in text
    dots = [attributes for _, attributes in elements.all if "data-mel" in attributes]
    assert len(dots) == len(held_out_rows(tuned, store_path))


def held_out_rows(tuned: Run, store_path: Path) -> np.ndarray:
    return held_out_task_data(tuned, FeatureStore.open(store_path)).eval_N


def test_pictures_of_a_fine_tuned_run_are_refused(tuned, store_path, tmp_path):
    """The error comes before anything is written."""
    with pytest.raises(
        RunError,
        match="was fine-tuned, and such a run has a page but no pictures; give --html, leave out --out",
    ):
        draw_run_report(store_path, tuned.path, tmp_path / "pictures")
    assert not list(tmp_path.iterdir())


def test_the_page_is_written_where_it_was_asked_for(run, store_path, tmp_path):
    """With pictures in another folder, where both are asked for."""
    written = draw_run_report(
        store_path, run.path, tmp_path / "pictures", html=tmp_path / "deep" / "page.html"
    )
    assert written[0] == tmp_path / "deep" / "page.html"
    assert all(Path(file).stat().st_size > 1000 for file in written)


def test_probes_on_eval_clips_of_an_older_run_have_a_chart_of_their_own():
    """A run that was carried on has both kinds of lines: one curve through them would be of two measures."""
    lines = [{"step": 1, "probe_knn_raw": 0.2}, {"step": 2, "val_probe_knn_raw": 0.3}]
    run = SimpleNamespace(read_metrics=lambda: lines)
    text = curves_section(SimpleNamespace(run=run, recipe=None, store=None))
    assert "Probes while training, on held-back clips, mAP" in text
    assert "Probes while training, on eval clips, mAP" in text
    assert probe_label("val_probe_knn_raw") == "knn, raw"
    assert probe_label("probe_knn_raw") == "knn, raw (eval clips)"
