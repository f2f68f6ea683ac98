"""The metrics equal those of scikit-learn and seqeval."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisobert.tasks import metrics

sk = pytest.importorskip("sklearn.metrics", reason="the peer of the metrics is not installed: pip install scikit-learn")
seqeval = pytest.importorskip("seqeval.metrics", reason="the peer of the metrics is not installed: pip install seqeval")

pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)
tag = st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B", "B-A_b-c", "I-A_b-c"])
sentences = st.lists(st.lists(st.tuples(tag, tag), min_size=1, max_size=12), min_size=1, max_size=6)


@given(pairs)
def test_of_classes(drawn):
    truth, predicted = np.array(drawn).T
    confusion = metrics.confusion_matrix(truth, predicted, 4)
    assert (confusion == sk.confusion_matrix(truth, predicted, labels=range(4))).all()
    assert metrics.accuracy(truth, predicted) == sk.accuracy_score(truth, predicted)
    macro = sk.f1_score(truth, predicted, average="macro", zero_division=0)
    assert metrics.macro_f1(truth, predicted, 4) == pytest.approx(macro, abs=1e-12)
    theirs = sk.precision_recall_fscore_support(truth, predicted, labels=range(4), zero_division=0)
    np.testing.assert_allclose(np.array(metrics.per_class(truth, predicted, 4)), np.array(theirs).T, atol=1e-12)


@given(st.lists(st.tuples(*[st.booleans()] * 6), min_size=1, max_size=20))
def test_of_several_classes_a_text(drawn):
    truth, predicted = np.array(drawn)[:, :3], np.array(drawn)[:, 3:]
    micro, scores = metrics.of_sets(truth, predicted)
    assert micro.f1 == pytest.approx(sk.f1_score(truth, predicted, average="micro", zero_division=0), abs=1e-12)
    theirs = sk.precision_recall_fscore_support(truth, predicted, zero_division=0)
    np.testing.assert_allclose(np.array(scores), np.array(theirs).T, atol=1e-12)


def test_of_classes_without_examples():
    nothing = metrics.confusion_matrix([], [], 3)
    assert nothing.sum() == metrics.accuracy([], []) == metrics.macro_f1([], [], 3) == 0
    assert metrics.per_class([], [], 3) == [(0, 0, 0, 0)] * 3


def drawn_scores(seed, n, classes, ties):
    """(N,) classes, among which each occurs, and (N, C) probabilities."""
    draw = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(classes), draw.integers(0, classes, n)])
    scores = draw.integers(1, 4, (len(truth), classes)) if ties else draw.random((len(truth), classes))
    return truth, scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_of_curves(seed, ties):
    truth, probabilities = drawn_scores(seed, n=3 + 10 * seed, classes=2, ties=ties)
    ours, theirs = (
        metrics.roc_curve(truth == 1, probabilities[:, 1]),
        sk.roc_curve(truth, probabilities[:, 1], drop_intermediate=False),
    )
    np.testing.assert_allclose(ours, theirs[:2], atol=1e-12)
    ours, theirs = (
        metrics.pr_curve(truth == 1, probabilities[:, 1]),
        sk.precision_recall_curve(truth, probabilities[:, 1]),
    )
    np.testing.assert_allclose(ours, theirs[:2], atol=1e-12)
    auc = sk.roc_auc_score(truth, probabilities[:, 1])
    assert metrics.roc_auc(truth, probabilities) == pytest.approx(auc, abs=1e-12)
    truth, probabilities = drawn_scores(seed, n=3 + 10 * seed, classes=4, ties=ties)
    auc = sk.roc_auc_score(truth, probabilities, multi_class="ovr", average="macro")
    assert metrics.roc_auc(truth, probabilities) == pytest.approx(auc, abs=1e-12)


def test_of_a_curve_with_an_absent_class():
    truth, probabilities = drawn_scores(0, n=30, classes=3, ties=False)
    rest = np.flatnonzero(truth != 2)
    areas = [sk.roc_auc_score(truth[rest] == c, probabilities[rest, c]) for c in (0, 1)]
    assert metrics.roc_auc(truth[rest], probabilities[rest]) == pytest.approx(np.mean(areas), abs=1e-12)
    assert np.isnan(metrics.roc_auc([1, 1], [[0.5, 0.5], [0.1, 0.9]]))
    assert np.isnan(metrics.roc_auc(np.zeros(0, int), np.zeros((0, 3))))


@settings(max_examples=300)
@given(sentences)
def test_of_entities_to_the_last_digit(drawn):
    truth = [[a for a, _ in sentence] for sentence in drawn]
    predicted = [[b for _, b in sentence] for sentence in drawn]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # seqeval warns of divisions by zero
        theirs = [score(truth, predicted) for score in (seqeval.precision_score, seqeval.recall_score)]
        theirs.append(seqeval.f1_score(truth, predicted))
        report = seqeval.classification_report(truth, predicted, output_dict=True, zero_division=0)
    overall, types = metrics.entity_scores(truth, predicted)
    assert list(overall[:3]) == theirs
    per_type = {name: list(row.values()) for name, row in report.items() if not name.endswith(" avg")}
    assert {name: list(scores) for name, scores in types.items()} == per_type


def test_of_entities_where_there_are_none():
    assert metrics.entity_scores([["O", "O"]], [["O", "O"]]) == ((0, 0, 0, 0), {})
    assert metrics.entity_scores([], []) == ((0, 0, 0, 0), {})
    assert metrics.entity_scores([["B-A", "I-A"]], [["O", "O"]]) == ((0, 0, 0, 1), {"A": (0, 0, 0, 1)})


def test_an_inside_without_its_beginning_begins_an_entity():
    assert metrics.entities(["I-A", "I-B", "B-B", "I-B", "O", "I-A"]) == {
        ("A", 0, 1), ("B", 1, 2), ("B", 2, 4), ("A", 5, 6)
    }  # fmt: skip
