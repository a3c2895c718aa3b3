"""An audit finds every planted fault, reports it once, and reports nothing on clean clips."""

import json
from dataclasses import asdict, replace

import numpy as np
import polars as pl
import pytest
from scipy.stats import chi2_contingency

from pipeline.audit.audit import (
    AuditedClips,
    StoreAudit,
    audit_clips,
    effective_class_count,
    gini_coefficient,
)
from pipeline.audit.class_pairs import (
    MAX_PAIRED_CLASSES,
    MAX_PAIRED_LABELS,
    count_together_KK,
    find_class_shifts,
    find_surprising_pairs,
    g2_threshold,
    log_likelihood_ratio,
)
from pipeline.audit.copies import clip_recordings
from pipeline.audit.findings import FINDING_LEVELS, collect_findings, format_audit, write_audit_json
from pipeline.audit.implied_labels import OntologySubset
from pipeline.errors import OntologyError
from pipeline.labels.ontology import ClassList, Ontology, OntologyNode, load_class_list, load_ontology
from pipeline.labels.propagation import propagate, rule_relation_CC
from pipeline.report.page_sections import audit_section

NAMES = ("Speech", "Male speech, man speaking", "Music", "Vehicle")

EVERY = load_class_list()

CLASSES = ClassList(mids=tuple(EVERY.mids[EVERY.names.index(name)] for name in NAMES), names=NAMES)

SPEECH, MALE, MUSIC, VEHICLE = range(4)

CLEAN_LABELS = ([0], [2], [3], [0, 2], [0, 3], [2, 3], [0, 2, 3], [0, 1, 2, 3])

SPLITS = ("train", "eval")

FEW = 2


def clean_clips() -> list[dict]:
    """32 clips without a fault: classes are equally frequent in both splits, and no pair exceeds chance."""
    return [
        {
            "clip_id": f"{split}{number:02}",
            "split": split,
            "source": f"{split}/{number}.wav",
            "status": "good",
            "reason": None,
            "flags": [],
            "digest": f"{split}{number}",
            "raw": list(CLEAN_LABELS[number % 8]),
            "outside": [],
        }
        for split in SPLITS
        for number in range(16)
    ]


def audited_clips(
    clips: list[dict], *, dataset: str | None = "audioset", classes=CLASSES, rules=(), **fields
) -> AuditedClips:
    """The clips in the form of a store; `fields` replace fields of the result."""
    types = {"flags": pl.List(pl.String), "raw": pl.List(pl.UInt16), "outside": pl.List(pl.String)}
    types |= {"reason": pl.String, "source": pl.String, "digest": pl.String}
    frame = pl.DataFrame(clips, schema_overrides=types)
    labels, provenance = frame.select("raw", "outside"), {"raw": "as listed"}
    for rule in rules:
        provenance[rule] = {"rule": rule, "ontology": load_ontology().digest, "splits": list(SPLITS)}
        labels = labels.with_columns(
            propagate(labels["raw"], rule_relation_CC(rule, classes=classes)).alias(rule)
        )
    known = {
        "manifest": frame.drop("raw", "outside"),
        "labels": labels,
        "provenance": provenance,
        "classes": classes,
        "recording": clip_recordings(frame, dataset),
        "excluded_N": np.zeros(len(clips), bool),
        "exclude_lists": (),
        "splits": SPLITS,
        "held_out_names": ("eval",),
        "ontologies": {},
    }
    return AuditedClips(**known | fields)


def findings_of(rows: AuditedClips) -> list[tuple[str, str]]:
    """The level and the sentence of every finding."""
    return [(f.level, f.what) for f in collect_findings(audit_clips(rows, few=FEW), "x.zarr")]


def test_clean_clips_give_no_finding():
    """Users would ignore an audit that always reports something."""
    assert findings_of(audited_clips(clean_clips(), rules=["unambiguous", "direct-parent"])) == []
    audit = audit_clips(audited_clips(clean_clips()), few=FEW)
    assert (audit.copies, audit.pairs.more, audit.pairs.less, audit.sides.shifts) == ((), (), (), ())
    assert audit.sides.shift == 0


def alter(number: int, **values):
    """A planted fault: gives clip `number` (16 to 31 are eval) other values."""

    def plant(clips):
        clips[number] |= values

    return plant


def without_class(split: str, index: int, keep: int = 0):
    """A planted fault: removes a class from all but `keep` clips of a split."""

    def plant(clips):
        having = [clip for clip in clips if clip["split"] == split and index in clip["raw"]]
        for clip in having[keep:]:
            clip["raw"] = [i for i in clip["raw"] if i not in (index, MALE)] or [SPEECH]

    return plant


PLANTED = [
    (alter(0, clip_id="eval00"), "leak", "1 id in train and again in eval; labels differ in 0"),
    (alter(0, digest="eval8"), "leak", "1 clip of train with the exact audio of 1 clip of eval"),
    (alter(1, digest="eval0"), "leak", "exact audio of 1 clip of eval; labels differ in 1 of them"),
    (alter(0, digest="train8"), "check", "2 clips of train with only 1 exact sound among them"),
    (alter(0, clip_id="train08"), "check", "1 id more than once in train"),
    (alter(0, outside=["/m/odd"]), "check", "1 clip with labels outside the class list, 1 id in all"),
    (alter(16, raw=[]), "check", "1 clip of eval without a label"),
    (alter(0, raw=[]), "note", "1 clip of train without a label"),
    (alter(0, raw=[MALE]), "note", "1 clip without 1 label that raw ones imply by rule unambiguous"),
    (without_class("eval", MALE, 1), "check", "1 class with fewer than 2 clips in eval"),
    (without_class("train", MALE, 1), "note", "1 class with fewer than 2 clips in train"),
    (alter(0, status="failed", reason="duplicate"), "note", "1 row left out by the build"),
]


@pytest.mark.parametrize(("plant", "level", "sentence"), PLANTED)
def test_a_planted_fault_is_reported_and_nothing_else(plant, level, sentence):
    """Each planted fault gives exactly one finding."""
    clips = clean_clips()
    plant(clips)
    (found,) = findings_of(audited_clips(clips))
    assert found[0] == level
    assert sentence.replace("; labels differ in 0", "") in found[1]


def test_a_class_that_one_side_lacks_is_reported_for_the_split_and_for_the_side():
    """Without eval clips, average precision is undefined; without training clips, no model can learn the class."""
    clips = clean_clips()
    without_class("eval", MALE)(clips)
    assert findings_of(audited_clips(clips)) == [
        ("check", "1 of 4 classes without a clip in eval"),
        ("note", "1 class with clips to train on, and none in eval"),
    ]
    clips = clean_clips()
    without_class("train", MALE)(clips)
    assert findings_of(audited_clips(clips)) == [
        ("check", "1 class in eval, without a clip to train on"),
        ("note", "1 of 4 classes without a clip in train"),
    ]


def test_leaks_come_first():
    """Users who read only the first findings must see the leaks."""
    clips = clean_clips()
    alter(1, raw=[])(clips)
    alter(2, digest="train10")(clips)
    alter(3, digest="eval11")(clips)
    levels = [level for level, _ in findings_of(audited_clips(clips))]
    assert levels == sorted(levels, key=list(FINDING_LEVELS).index)
    assert levels[0] == "leak"


def test_the_command_against_a_leak_names_the_splits_that_were_audited():
    """Without --eval the command would audit other splits."""
    clips = clean_clips()
    alter(0, digest="eval8")(clips)
    leak = collect_findings(audit_clips(audited_clips(clips), few=FEW), "x.zarr")[0]
    assert leak.do == "ajepa-data audit-labels x.zarr --suggest leaks.txt"
    leak = collect_findings(audit_clips(audited_clips(clips, held_out_names=("train",)), few=FEW), "x.zarr")[
        0
    ]
    assert leak.do == "ajepa-data audit-labels x.zarr --eval train --suggest leaks.txt"


@pytest.mark.parametrize(
    "plant",
    [
        alter(0, digest="eval8", status="failed"),
        alter(0, clip_id="eval00", status="failed"),
        alter(0, digest=None),
    ],
)
def test_clips_that_are_not_in_use_do_not_leak(plant):
    """A duplicate row, which the build left out, is never drawn."""
    clips = clean_clips()
    plant(clips)
    assert findings_of(audited_clips(clips)) == []


def test_an_excluded_clip_does_not_leak():
    """Excluding a leaking clip removes the leak."""
    clips = clean_clips()
    alter(0, digest="eval8")(clips)
    marked_N = np.arange(32) == 0
    found = findings_of(audited_clips(clips, excluded_N=marked_N, exclude_lists=(("a.txt", "0" * 64, 1),)))
    assert found == [("note", "1 clip excluded by a.txt")]


def test_kept_silences_are_not_copies_of_each_other():
    """All silent clips have the same digest."""
    clips = clean_clips()
    for number in (0, 5, 20):
        alter(number, digest="zeros", flags=["silent"])(clips)
    assert findings_of(audited_clips(clips)) == []


def test_pieces_of_one_recording_in_two_splits_leak_and_in_one_split_do_not():
    """Such a leak comes from a table that assigns splits by clip instead of by file."""
    clips = clean_clips()
    for number in (0, 1, 2):
        alter(number, source="long.wav")(clips)
    assert findings_of(audited_clips(clips, dataset="folder")) == []
    alter(16, source="long.wav")(clips)
    assert findings_of(audited_clips(clips, dataset="folder")) == [
        ("leak", "1 recording with clips in train and in eval")
    ]
    assert findings_of(audited_clips(clips, dataset="audioset")) == []  # there the video is what counts


def test_the_recording_of_a_missing_piece_is_its_id_without_the_place():
    """`name@1500` begins at 1.5 s of `name`."""
    frame = pl.DataFrame({"clip_id": ["a@0", "a@1500", "b@x"], "source": [None, None, "b.wav"]})
    assert clip_recordings(frame, "folder").to_list() == ["a", "a", "b.wav"]
    assert clip_recordings(frame, "audioset").to_list() == ["a@0", "a@1500", "b@x"]


def test_without_a_held_out_split_copies_are_checks_and_no_shift_is_measured():
    """The folds of ESC-50 are evaluated in turn, so none is held out by name."""
    clips = clean_clips()
    alter(0, digest="eval8")(clips)
    rows = audited_clips(clips, held_out_names=())
    assert audit_clips(rows).sides is None
    assert findings_of(rows) == [("check", "1 clip of train with the exact audio of 1 clip of eval")]


# Propagated label sets.


def with_other_labels(
    rows: AuditedClips, row: int, labels: list[int], rule: str = "unambiguous"
) -> AuditedClips:
    """The rows with other labels for one row in a propagated set."""
    lists = rows.labels[rule].to_list()
    lists[row] = labels
    column = pl.Series(rule, lists, dtype=rows.labels[rule].dtype)
    return replace(rows, labels=rows.labels.with_columns(column))


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([MALE, MUSIC, VEHICLE], "stale: 1 label of its rule missing"),
        ([SPEECH, MALE, VEHICLE], "stale: 1 label of its rule missing"),  # a raw one
        ([SPEECH, MALE], "stale: 2 labels of its rule missing"),
    ],
)
def test_a_propagated_set_that_is_not_what_its_rule_gives_is_a_fault(labels, sentence):
    """Users assume that a propagated set has every implied class."""
    rows = with_other_labels(audited_clips(clean_clips(), rules=["unambiguous"]), 7, labels)  # raw: all four
    ((level, said),) = findings_of(rows)
    assert level == "fault"
    assert sentence in said
    (finding,) = collect_findings(audit_clips(rows, few=FEW), "x.zarr")
    assert finding.do == "ajepa-data propagate-labels x.zarr --rule unambiguous"


def test_a_label_that_no_rule_gives_is_a_fault_too():
    """A label that is neither raw nor implied has another, unknown origin."""
    ((level, said),) = findings_of(
        with_other_labels(audited_clips(clean_clips(), rules=["unambiguous"]), 1, [MUSIC, VEHICLE])
    )
    assert level == "fault"
    assert said.endswith("is stale: 0 labels of its rule missing, 1 label beyond it")


def test_a_set_is_stale_also_if_the_clip_is_not_in_use():
    """The file is wrong even if no loader draws the clip."""
    clips = clean_clips()
    alter(1, status="failed")(clips)
    assert [
        level
        for level, _ in findings_of(with_other_labels(audited_clips(clips, rules=["unambiguous"]), 1, [MALE]))
    ] == ["fault"]


def test_a_set_is_judged_in_the_splits_it_was_made_for():
    """In other splits the set has the raw labels."""
    clips = clean_clips()
    alter(17, raw=[MALE])(clips)
    rows = with_other_labels(audited_clips(clips, rules=["unambiguous"]), 17, [MALE])
    provenance = rows.provenance["unambiguous"]
    assert "fault" in [level for level, _ in findings_of(rows)]
    some = rows.provenance | {"unambiguous": provenance | {"splits": ["train"]}}
    assert [level for level, _ in findings_of(replace(rows, provenance=some))] == ["note"]


def test_a_set_of_another_ontology_is_not_called_stale():
    """A set of a missing ontology cannot be checked, and the finding says so."""
    rows = with_other_labels(audited_clips(clean_clips(), rules=["unambiguous"]), 1, [MALE])
    other = {"unambiguous": rows.provenance["unambiguous"] | {"ontology": "other"}}
    ((level, said),) = findings_of(replace(rows, provenance=rows.provenance | other))
    assert level == "check"
    assert "cannot be checked: it was made with ontology other, which is missing" in said


def test_a_set_is_judged_by_the_ontology_it_was_made_with():
    """The user's ontology in the store also decides which labels raw labels imply."""
    vehicle, music = CLASSES.mids[VEHICLE], CLASSES.mids[MUSIC]
    nodes = [
        OntologyNode(mid=mid, name=name)
        for mid, name in zip(CLASSES.mids, NAMES, strict=True)
        if mid != vehicle
    ]
    own = Ontology(nodes=(*nodes, OntologyNode(mid=vehicle, name="Vehicle", child_mids=(music,))))
    rows = audited_clips(clean_clips(), rules=["unambiguous"])
    column = propagate(rows.labels["raw"], rule_relation_CC(ontology=own, classes=CLASSES)).alias(
        "unambiguous"
    )
    source = rows.provenance["unambiguous"] | {"ontology": own.digest}
    audited = replace(
        rows, labels=rows.labels.with_columns(column), provenance={"raw": "as listed", "unambiguous": source}
    )
    found = findings_of(replace(audited, ontologies={"unambiguous": own}))
    assert found == [("note", "8 clips without 8 labels that raw ones imply by rule unambiguous")]
    assert (
        findings_of(with_other_labels(replace(audited, ontologies={"unambiguous": own}), 1, [MUSIC]))[0][0]
        == "fault"
    )


@pytest.mark.parametrize("rule", ["unambiguous", "all-ancestors", "dominators", "direct-parent"])
def test_a_set_made_by_its_rule_is_never_stale(rule):
    """Tested on random labels of all 527 classes; the raw set lacks exactly the labels that the rule adds."""
    rng = np.random.default_rng(0)
    clips = clean_clips()
    for clip in clips:
        clip["raw"] = sorted(rng.choice(527, rng.integers(0, 9), replace=False).tolist())
    rows = audited_clips(clips, classes=EVERY, rules=[rule])
    raw, propagated = audit_clips(rows).contradictions
    assert not propagated.is_stale
    if rule == "unambiguous":
        added = rows.labels[rule].list.len().sum() - rows.labels["raw"].list.len().sum()
        assert raw.labels_lacking == added > 0
        assert raw.pairs_in_all >= len(raw.pairs) > 0


def test_classes_that_no_ontology_knows_are_not_judged():
    """ESC-50 has classes of its own, which no ontology contains."""
    own = ClassList(mids=("dog", "cat", "cow", "hen"), names=("dog", "cat", "cow", "hen"))
    rows = audited_clips(clean_clips(), classes=own)
    assert findings_of(rows) == []
    assert audit_clips(rows).contradictions[0].why_not == "the ontology has none of its classes"


def test_the_known_part_of_a_mixed_class_list_is_judged():
    """Two of AudioSet's classes among a user's own."""
    mixed = ClassList(mids=("own", CLASSES.mids[MALE], "other", CLASSES.mids[SPEECH]), names=tuple("abcd"))
    tree = OntologySubset.of_classes(load_ontology(), mixed)
    assert tree.implied_pairs("unambiguous").tolist() == [[1, 3]]
    assert tree.related_pairs().tolist() == [[1, 3]]


def test_an_index_that_no_class_has_is_an_error_with_its_row():
    """Such an index would count as a class of the next clip."""
    clips = clean_clips()
    alter(3, raw=[4])(clips)
    with pytest.raises(OntologyError, match="row 3: class index 4, expected 0 to 3"):
        audit_clips(audited_clips(clips))


# Statistics.


def entries_of(has_BC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and class of every label, by row, then class."""
    return tuple(np.nonzero(has_BC))


def test_g2_is_the_log_likelihood_ratio_of_the_table():
    """As scipy computes it, for tables with and without empty cells."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        table_22 = rng.integers(0, 40, (2, 2)) + np.array([[0, 1], [1, 1]])
        both, one, other = table_22[0, 0], table_22[0].sum(), table_22[:, 0].sum()
        expected = chi2_contingency(table_22, correction=False, lambda_="log-likelihood").statistic
        got = log_likelihood_ratio(np.array([both]), np.array([one]), np.array([other]), int(table_22.sum()))
        assert got[0] == pytest.approx(expected, abs=1e-9)


def test_pairs_are_counted_as_a_matrix_product_counts_them():
    """Counting pairs must agree with a matrix product."""
    has_BC = np.random.default_rng(1).random((300, 12)) < 0.3
    counts = has_BC.T.astype(int) @ has_BC
    assert (count_together_KK(*entries_of(has_BC), 12) == np.triu(counts, 1)).all()


def test_independent_classes_show_no_surprise_and_planted_ones_do():
    """Pairs above and below chance are found; related classes are never reported, however often they occur together."""
    rng = np.random.default_rng(2)
    has_BC = rng.random((4_000, 8)) < np.linspace(0.1, 0.4, 8)
    has_BC[:, 7] = True  # so that no clip is without a label
    names = [f"c{index}" for index in range(8)]
    none = np.zeros((0, 2), int)
    clean_pairs = find_surprising_pairs(*entries_of(has_BC), names, none, top=5)
    assert (clean_pairs.more, clean_pairs.less) == ((), ())
    has_BC[:, 1] = np.where(rng.random(4_000) < 0.7, has_BC[:, 0], has_BC[:, 1])
    has_BC[:, 3] &= ~has_BC[:, 2]
    found = find_surprising_pairs(*entries_of(has_BC), names, none, top=5)
    assert [(p.one, p.other) for p in found.more] == [("c0", "c1")]
    assert [(p.one, p.other, p.clips) for p in found.less] == [("c2", "c3", 0)]
    clips_C = has_BC.sum(0)
    assert found.less[0].expected == pytest.approx(clips_C[2] * clips_C[3] / 4_000)
    related = find_surprising_pairs(*entries_of(has_BC), names, np.array([[0, 1], [2, 3]]), top=5)
    assert (related.more, related.less) == ((), ())


def test_of_sixty_five_thousand_classes_only_the_busiest_are_paired():
    """The table of pairs is square: all of them would not fit into memory."""
    rng = np.random.default_rng(3)
    row_N = np.repeat(np.arange(50_000), 3)
    class_N = np.sort(rng.integers(0, 65_536, (50_000, 3)), 1)
    class_N[:, 0], class_N[:, 1] = np.where(rng.random((50_000, 1)) < 0.02, [[0, 1]], class_N[:, :2]).T
    fresh_N = np.diff(row_N * 65_536 + np.sort(class_N, 1).ravel(), prepend=-1) > 0
    flat_N = np.sort(class_N, 1).ravel()[fresh_N]
    names = [str(index) for index in range(65_536)]
    found = find_surprising_pairs(row_N[fresh_N], flat_N, names, np.array([[0, 40_000]]), top=3)
    assert found.classes == MAX_PAIRED_CLASSES
    assert [(p.one, p.other) for p in found.more] == [("0", "1")]


def test_a_clip_with_every_label_is_left_out_of_the_pairs_and_counted():
    """A thousand labels would be half a million pairs."""
    has_BC = np.eye(100, dtype=bool)
    has_BC[0] = np.arange(100) <= MAX_PAIRED_LABELS
    found = find_surprising_pairs(
        *entries_of(has_BC), [str(i) for i in range(100)], np.zeros((0, 2), int), top=3
    )
    assert found.clips_left_out == 1
    assert found.more == ()


def test_crowded_clips_do_not_make_classes_look_apart():
    """If such clips counted for single classes but not for pairs, every pair would seem too rare."""
    has_BC = np.random.default_rng(0).random((600, MAX_PAIRED_LABELS + 1)) < 0.2
    has_BC[:200] = True
    row_N, class_N = np.nonzero(has_BC)
    names = [str(number) for number in range(MAX_PAIRED_LABELS + 1)]
    pairs = find_surprising_pairs(row_N, class_N, names, np.zeros((0, 2), int), top=10)
    assert (pairs.less_in_all, pairs.clips_left_out) == (0, 200)


def test_shifted_classes_are_found_and_equal_ones_are_not():
    """Shifts are sorted by evidence: the same ratio is stronger with more clips."""
    train_C = np.array([5_000, 2_000, 500, 3])
    held_out_C = np.array([500, 50, 50, 0])
    shifts, total = find_class_shifts(train_C, held_out_C, 10_000, 1_000, list("abcd"), top=5)
    assert total == 1
    assert (shifts[0].name, shifts[0].trained, shifts[0].held_out) == ("b", 0.2, 0.05)
    assert find_class_shifts(train_C, held_out_C * 0, 10_000, 0, list("abcd"), top=5) == ((), 0)


def test_the_more_draws_the_more_a_surprise_must_surprise():
    """chi-squared at 5 %: 3.84 for one draw."""
    assert g2_threshold(1) == pytest.approx(3.841, abs=1e-3)
    assert g2_threshold(138_601) > 25


@pytest.mark.parametrize(
    ("clips_C", "effective", "gini"),
    [([5, 5, 5, 5], 4.0, 0.0), ([0, 0, 7, 0], 1.0, 0.75), ([0, 0, 0, 0], 0.0, 0.0), ([1, 1, 0, 0], 2.0, 0.5)],
)
def test_the_evenness_of_classes_has_its_textbook_values(clips_C, effective, gini):
    """Cases: all classes equal, only one class, no class, half of the classes."""
    assert effective_class_count(np.array(clips_C)) == pytest.approx(effective)
    assert gini_coefficient(np.array(clips_C)) == pytest.approx(gini)


# The audit as text, as JSON and as HTML.


@pytest.fixture(scope="module")
def eventful() -> StoreAudit:
    """An audit with one of every finding."""
    clips = clean_clips() * 40
    for number, clip in enumerate(clips):
        clips[number] = clip | {"clip_id": f"<{number}>", "digest": str(number)}
    for number, (plant, _, _) in enumerate(PLANTED):
        block = [dict(clip) for clip in clips[32 * number : 32 * number + 32]]
        plant(block)
        clips[32 * number : 32 * number + 32] = block
    for number in range(1, 200, 2):
        clips[number + 600] = clips[number + 600] | {"raw": [MUSIC, VEHICLE], "split": "train"}
    alter(0, digest="8", raw=[MALE])(clips)
    return audit_clips(audited_clips(clips), few=FEW, top=1)


def test_the_text_has_every_finding_and_every_split(eventful):
    """No line is wider than a terminal, except commands, which must stay copyable."""
    text = format_audit(eventful, "x.zarr")
    for finding in collect_findings(eventful, "x.zarr"):
        assert finding.what.split(";")[0][:60] in text
    for split in eventful.splits:
        assert split.split in text
        assert f"{split.in_use:,}" in text
    assert eventful.pairs.more
    assert "occur together more often than by chance" in text
    assert all(len(line) <= 80 or "ajepa-data" in line for line in text.splitlines())
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_the_json_has_every_figure(eventful, tmp_path):
    """A script reads it instead of the table."""
    write_audit_json(eventful, "x.zarr", tmp_path / "new" / "a.json")
    record = json.loads((tmp_path / "new" / "a.json").read_text())
    assert record.pop("findings")[0]["level"] == collect_findings(eventful, "x.zarr")[0].level
    assert record == json.loads(json.dumps(asdict(eventful)))


def test_the_html_section_is_escaped_and_has_every_finding(eventful):
    """Ids come from files."""
    text = audit_section(eventful, "<b>.zarr")
    assert "<b>.zarr" not in text
    assert "&lt;" in text
    for finding in collect_findings(eventful, "x"):
        assert f'class="level {finding.level}"' in text
    assert text.count("<li>") == len(collect_findings(eventful, "x"))
    assert "Nothing is wrong" in audit_section(audit_clips(audited_clips(clean_clips()), few=FEW), "x")
