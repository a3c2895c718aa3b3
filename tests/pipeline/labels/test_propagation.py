"""The rules, the propagation of labels and scores, and the changes in all of AudioSet against the reference."""

import csv
import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hierarchical_label_propagation import HLP
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import OntologyError
from pipeline.labels.label_sets import index_class_ids
from pipeline.labels.ontology import ClassList, Ontology, OntologyNode, load_class_list, load_ontology
from pipeline.labels.propagation import (
    PROPAGATION_RULES,
    LabelCounts,
    LabelProvenance,
    SplitChange,
    propagate,
    propagate_scores,
    propagation_table,
    rule_relation_CC,
)

ORIGINALS = Path(__file__).parents[4] / "shared" / "audioset"

needs_originals = pytest.mark.skipif(
    not ORIGINALS.exists(), reason="the original AudioSet files are not here"
)

CLOSED_RULES = [rule for rule in PROPAGATION_RULES if rule != "direct-parent"]

CLASSES = load_class_list()

quick = settings(max_examples=60, deadline=None)


def lists_of(rows) -> pl.Series:
    """Rows of class indices as a column."""
    rows = [row.tolist() if isinstance(row, np.ndarray) else row for row in rows]
    return pl.Series(rows, dtype=pl.List(pl.UInt16))


def implied_names(name: str, rule: str = "unambiguous") -> set[str]:
    """The names of the classes that a rule adds to one."""
    adds_C = rule_relation_CC(rule)[CLASSES.names.index(name)]
    return {CLASSES.names[index] for index in np.flatnonzero(adds_C)}


@st.composite
def trees(draw) -> tuple[Ontology, ClassList]:
    """A small acyclic graph, some nodes of which are classes."""
    count = draw(st.integers(1, 9))
    links = [
        draw(st.sets(st.integers(node + 1, count - 1))) if node < count - 1 else set()
        for node in range(count)
    ]
    nodes = [
        OntologyNode(mid=f"n{node}", name=f"N{node}", child_mids=tuple(f"n{c}" for c in sorted(links[node])))
        for node in range(count)
    ]
    mids = draw(st.lists(st.sampled_from([node.mid for node in nodes]), min_size=1, unique=True))
    return Ontology(nodes=tuple(draw(st.permutations(nodes)))), ClassList(mids=tuple(mids), names=tuple(mids))


@st.composite
def labelled_rows(
    draw, rules=tuple(PROPAGATION_RULES)
) -> tuple[np.ndarray, list[list[int]], list[list[int]]]:
    """A relation on a random tree, and two columns of label lists for it."""
    ontology, classes = draw(trees())
    rows = st.lists(st.integers(0, len(classes) - 1), max_size=4)
    count = draw(st.integers(0, 5))
    columns = [draw(st.lists(rows, min_size=count, max_size=count)) for _ in range(2)]
    return rule_relation_CC(draw(st.sampled_from(rules)), ontology=ontology, classes=classes), *columns


def test_the_default_rule_is_the_authors_table():
    """All 527 x 527 entries of the table that the paper's authors publish: 731 pairs beside the diagonal."""
    theirs_CC = HLP().get_HLP_lookup_table().numpy()
    assert np.array_equal(rule_relation_CC() | np.eye(527, dtype=bool), theirs_CC)
    assert rule_relation_CC().sum() == 731


@needs_originals
def test_the_default_rule_gives_the_reference_pairs():
    """The same 731 pairs by class id, which do not depend on the order of the class list."""
    with (ORIGINALS / "hlp_reference_pairs.csv").open() as file:
        pairs = {(row["child_mid"], row["ancestor_mid"]) for row in csv.DictReader(file)}
    ours = {
        (CLASSES.mids[child], CLASSES.mids[ancestor]) for child, ancestor in np.argwhere(rule_relation_CC())
    }
    assert ours == pairs


@pytest.mark.parametrize(
    ("rule", "pairs"),
    [("unambiguous", 731), ("all-ancestors", 835), ("dominators", 739), ("direct-parent", 427)],
)
def test_each_rule_adds_its_number_of_pairs(rule, pairs):
    """The rules differ on AudioSet, and no class is ever added for itself."""
    assert rule_relation_CC(rule).sum() == pairs
    assert not rule_relation_CC(rule).diagonal().any()


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("Bell", {"Musical instrument", "Music"}),  # the other branch ends in a heading outside the classes
        ("Pop music", {"Music"}),  # "Music genre" between them is abstract
        ("Bark", {"Dog", "Domestic animals, pets", "Animal"}),
        ("Growling", set()),  # dog, cat, roaring cats or canidae
        ("Hiss", set()),  # cat, snake or steam
        ("Mantra", {"Chant"}),  # singing or vocal music: a chant may be either
        ("Toot", {"Vehicle horn, car horn, honking"}),
        ("Ding-dong", {"Doorbell"}),
        ("Speech", set()),
    ],
)
def test_a_class_climbs_until_its_parent_is_ambiguous(name, added):
    """The paper's rule in its named cases; a class below an ambiguous one climbs to it and stops."""
    assert implied_names(name) == added


def test_the_other_rules_differ_where_parents_are_several():
    """A growl is always an animal's; that of a dog is only one possibility."""
    assert implied_names("Growling", "dominators") == {"Animal"}
    assert implied_names("Growling", "all-ancestors") >= {"Dog", "Cat", "Animal"}
    assert implied_names("Bark", "direct-parent") == {"Dog"}


@quick
@given(trees())
def test_the_rules_agree_with_walking_the_tree(tree):
    """The matrix products agree with a walk from parent to parent."""
    ontology, classes = tree
    parents_of = ontology.parent_mids()

    def nearest(mid):
        return {up for p in parents_of[mid] for up in ([p] if p in classes.mids else nearest(p))}

    def unambiguous(mid):
        return set() if len(nearest(mid)) != 1 else nearest(mid) | unambiguous(min(nearest(mid)))

    def all_ancestors(mid):
        return nearest(mid).union(*map(all_ancestors, nearest(mid)))

    def dominators(mid):
        return set.intersection(*({up} | dominators(up) for up in nearest(mid))) if nearest(mid) else set()

    walks = {
        "unambiguous": unambiguous,
        "all-ancestors": all_ancestors,
        "dominators": dominators,
        "direct-parent": nearest,
    }
    for rule, walk in walks.items():
        adds_CC = rule_relation_CC(rule, ontology=ontology, classes=classes)
        for index, mid in enumerate(classes.mids):
            assert {classes.mids[up] for up in np.flatnonzero(adds_CC[index])} == walk(mid)


@quick
@given(labelled_rows(rules=CLOSED_RULES))
def test_propagating_twice_changes_nothing(case):
    """A propagated label set stays the same when it is propagated again."""
    adds_CC, rows, _ = case
    once = propagate(lists_of(rows), adds_CC)
    assert propagate(once, adds_CC).equals(once)


@quick
@given(labelled_rows(), st.data())
def test_more_labels_never_give_fewer(case, data):
    """Monotone: a label that one rater adds takes none of another's away."""
    adds_CC, rows, _ = case
    fewer = [data.draw(st.lists(st.sampled_from(row), unique=True)) if row else [] for row in rows]
    from_fewer = propagate(lists_of(fewer), adds_CC).to_list()
    from_all = propagate(lists_of(rows), adds_CC).to_list()
    assert all(set(a) <= set(b) for a, b in zip(from_fewer, from_all, strict=True))


@quick
@given(labelled_rows())
def test_propagation_commutes_with_union(case):
    """Labels of two raters can be joined before or after; so more labels never give fewer (monotone)."""
    adds_CC, ours, theirs = case
    joined = propagate(lists_of([a + b for a, b in zip(ours, theirs, strict=True)]), adds_CC).to_list()
    apart = zip(propagate(lists_of(ours), adds_CC), propagate(lists_of(theirs), adds_CC), strict=True)
    assert joined == [sorted(set(a) | set(b)) for a, b in apart]


@quick
@given(labelled_rows())
def test_propagated_lists_are_sorted_unique_and_hold_the_raw_labels(case):
    """No label is lost or repeated; a clip without labels stays without labels."""
    adds_CC, rows, _ = case
    for raw, after in zip(rows, propagate(lists_of(rows), adds_CC).to_list(), strict=True):
        assert after == sorted(set(after))
        assert set(raw) <= set(after)
        assert bool(raw) == bool(after)


@quick
@given(labelled_rows(), st.integers(0, 2**32 - 1))
def test_scores_agree_with_labels_at_every_threshold(case, seed):
    """Thresholding propagated scores is propagating thresholded scores: labels and scores mean the same."""
    adds_CC = case[0]
    scores_BC = np.random.default_rng(seed).normal(size=(3, len(adds_CC))).round(1)
    best_BC = propagate_scores(scores_BC, adds_CC)
    for threshold in np.unique(scores_BC):
        rows = propagate(lists_of([np.flatnonzero(s >= threshold) for s in scores_BC]), adds_CC).to_list()
        assert rows == [np.flatnonzero(s >= threshold).tolist() for s in best_BC]


def test_logits_and_probabilities_rank_alike():
    """A maximum commutes with growing functions; the authors' product with a 0/1 table floors logits at 0."""
    logits_BC = torch.randn(8, 527, generator=torch.Generator().manual_seed(0))
    best_BC = propagate_scores(logits_BC, rule_relation_CC())
    assert torch.equal(propagate_scores(logits_BC.sigmoid(), rule_relation_CC()), best_BC.sigmoid())
    assert (best_BC < 0).any()


def test_scores_are_the_authors_where_theirs_are_right():
    """On probabilities, the maximum over pairs equals the authors' maximum over the whole table, in numpy and torch."""
    scores_BC = torch.rand(8, 527, generator=torch.Generator().manual_seed(1))
    ours_BC = propagate_scores(scores_BC, rule_relation_CC())
    assert torch.equal(ours_BC, HLP().propagate(scores_BC))
    assert np.array_equal(ours_BC.numpy(), propagate_scores(scores_BC.numpy(), rule_relation_CC()))


def test_labels_are_the_authors():
    """The label lists of 200 random clips agree with the authors' table, applied to the same clips as 0 and 1."""
    rng = np.random.default_rng(2)
    rows = [rng.choice(527, size=rng.integers(0, 6), replace=False) for _ in range(200)]
    dense_BC = torch.zeros(200, 527)
    for row, indices in enumerate(rows):
        dense_BC[row, torch.as_tensor(indices)] = 1
    theirs = [np.flatnonzero(row_C).tolist() for row_C in HLP().propagate(dense_BC).numpy()]
    assert propagate(lists_of(rows), rule_relation_CC()).to_list() == theirs


def test_scores_need_memory_for_the_pairs_only():
    """512 clips take some megabytes; a 527 x 527 table for each clip would take 570."""
    scores_BC, adds_CC = np.zeros((512, 527), np.float32), rule_relation_CC()
    tracemalloc.start()
    propagate_scores(scores_BC, adds_CC)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 10e6


def test_a_part_of_a_column_propagates_like_the_whole():
    """Arrow columns come as slices and in chunks; offsets must not leak between them."""
    labels = lists_of([[1], [], [2, 3], [4], [5]])
    whole = propagate(labels, rule_relation_CC())
    assert propagate(labels[1:4], rule_relation_CC()).equals(whole[1:4])
    chunked = labels[:2].append(labels[2:])
    assert propagate(chunked, rule_relation_CC()).equals(whole)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0], None], "row 1: a label is null"),
        ([[], [0, None], [1]], "row 1: a label is null"),
        ([[0], [], [3, 527]], "row 2: class index 527, expected 0 to 526"),
    ],
)
def test_a_null_or_an_unknown_index_is_refused(rows, message):
    """Neither is a label, and neither may be dropped without an error."""
    with pytest.raises(OntologyError, match=message):
        propagate(lists_of(rows), rule_relation_CC())


def test_scores_of_another_class_list_are_refused():
    """Scores of fifty classes are not scores of AudioSet's classes."""
    with pytest.raises(OntologyError, match="scores of 50 classes, expected 527"):
        propagate_scores(np.zeros((1, 50)), rule_relation_CC())


def test_an_unknown_rule_is_answered_with_the_nearest():
    """A typing error costs one line."""
    with pytest.raises(OntologyError, match=r"'unambigous'; did you mean 'unambiguous'\? There are: unamb"):
        rule_relation_CC("unambigous")


def test_a_class_outside_the_tree_is_named():
    """A class list from elsewhere would otherwise propagate to nothing."""
    with pytest.raises(OntologyError, match="1 of 2 classes are not in the ontology, such as dog"):
        rule_relation_CC(classes=ClassList(mids=("/m/09x0r", "dog"), names=("Speech", "Dog")))


def test_a_tree_of_ones_own_propagates(tmp_path):
    """Labels of any vocabulary with parents can be propagated; a child that is listed twice counts once."""
    path = tmp_path / "mine.json"
    links = {"root": ["mid", "mid"], "mid": ["leaf"], "leaf": []}
    facts = [{"id": mid, "name": mid, "child_ids": children} for mid, children in links.items()]
    path.write_text(json.dumps(facts))
    classes = ClassList(mids=("leaf", "root"), names=("Leaf", "Root"))
    adds_CC = rule_relation_CC(ontology=load_ontology(path), classes=classes)
    assert propagate(lists_of([[0]]), adds_CC).to_list() == [[0, 1]]


@pytest.fixture(scope="module")
def audioset() -> LabelCounts:
    """Every clip of AudioSet, as label sets in random order, before and after propagation."""
    with gzip.open(ORIGINALS / "labelset_counts.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    splits = ("unbalanced", "balanced", "eval")
    sets = pl.Series(
        [[int(i) for i in row["label_indices"].split()] for row in rows], dtype=pl.List(pl.UInt16)
    )
    clips_SN = np.array([[int(row[split]) for row in rows] for split in splits])
    split_N, set_N = (np.repeat(axis, clips_SN.ravel()) for axis in np.indices(clips_SN.shape).reshape(2, -1))
    order = np.random.default_rng(0).permutation(len(set_N))
    counts = LabelCounts(splits, CLASSES)
    raw = sets.gather(set_N[order])
    counts.count_batch(split_N[order], raw, propagate(raw, rule_relation_CC()))
    return counts


def equals_reference(change: SplitChange) -> bool:
    """Whether every figure of the reference for this split is the change's."""
    reference = json.loads((ORIGINALS / "hlp_reference_stats.json").read_text())[change.split]
    fields = {key: key.replace("_raw", "_before").replace("_hlp", "_after") for key in reference}
    return {key: getattr(change, field) for key, field in fields.items()} == reference


@needs_originals
@pytest.mark.parametrize("name", ["unbalanced", "balanced", "eval", "train", "all"])
def test_the_figures_of_all_of_audioset_are_the_references(audioset, name):
    """2,084,320 clips: means, labels added, clips changed and classes gaining, all exactly."""
    parts = {"train": ("unbalanced", "balanced"), "all": audioset.splits}.get(name, (name,))
    assert equals_reference(audioset.change_of_splits(name, parts))


@needs_originals
@pytest.mark.parametrize("name", ["balanced", "eval"])
def test_the_figures_of_the_official_lists_are_the_references(name):
    """From the lists of ids, as Google published them, to the table of what changed."""
    path = ORIGINALS / ("eval_segments.csv" if name == "eval" else "balanced_train_segments.csv")
    lines = path.read_text().splitlines()[3:]
    mids = pl.Series([line.split('"')[1].split(",") for line in lines])
    raw, outside = index_class_ids(mids, CLASSES)
    counts = LabelCounts([name], CLASSES)
    counts.count_batch(np.zeros(len(raw), np.int64), raw, propagate(raw, rule_relation_CC()))
    assert equals_reference(counts.change_of_splits(name, [name]))
    assert outside.list.len().sum() == 0


@needs_originals
def test_each_class_gains_what_the_reference_says(audioset):
    """Not only the sums: the positives of all 527 classes, before and after."""
    with (ORIGINALS / "class_counts.csv").open() as file:
        rows = list(csv.DictReader(file))
    for when, ours_NC in (("raw", audioset.labels_before_NC), ("hlp", audioset.labels_after_NC)):
        reference_NC = [[int(row[f"{split}_{when}"]) for row in rows] for split in audioset.splits]
        assert np.array_equal(ours_NC, reference_NC)


def table_of_outside_ids(outside: list[list[str]]) -> str:
    """The table of what changed, for unlabelled clips with these ids outside the class list."""
    ontology = load_ontology()
    adds_CC = rule_relation_CC()
    unlabelled = pl.Series([[] for _ in outside], dtype=pl.List(pl.UInt16))
    counts = LabelCounts(["train"], CLASSES)
    counts.count_batch(
        np.zeros(len(outside), np.int64), unlabelled, unlabelled, pl.Series(outside, dtype=pl.List(pl.String))
    )
    return propagation_table(
        counts.summary(
            LabelProvenance.for_rule("unambiguous", ontology, CLASSES, adds_CC, ("train",)), ontology
        )
    )


def test_the_table_names_what_is_outside_the_class_list():
    """An id alone tells nobody that washing machines are not among the 527; the most frequent comes first."""
    lines = table_of_outside_ids([["/m/0174k2"], ["/m/0174k2", "/m/0bm0k"], ["/m/0"], []]).splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("ids outside the class list"))
    assert [line.rsplit(maxsplit=1) for line in lines[place + 1 :]] == [
        ["Washing machine (/m/0174k2)", "2"],
        ["/m/0, in no known list", "1"],
        ["Crash cymbal (/m/0bm0k)", "1"],
    ]


def test_the_table_is_silent_where_nothing_is_outside():
    """Without outside ids there is no heading; with many ids there are ten lines and a count."""
    assert "outside" not in table_of_outside_ids([[], []])
    assert table_of_outside_ids([[f"/m/{n}" for n in range(12)]]).endswith("and 2 more ids")
