"""Accuracy, precision, recall, F1, ROC and PR curves, entity scores, and errors of numbers, in NumPy.

Classes are the integers 0 … C-1. The values equal scikit-learn's and seqeval's (tests compare them), with one
convention throughout: a ratio whose denominator is zero is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MANY = 30  # with more classes than this, pictures and tables show only the commonest ones


class Scores(NamedTuple):
    """The scores of one class or entity type, or of all entities together. support: how many there are in truth."""

    precision: float
    recall: float
    f1: float
    support: int


def confusion_matrix(truth, predicted, classes: int) -> np.ndarray:
    """(C, C) int64: how often class `row` was taken for class `column`. truth, predicted: (N,) int."""
    truth, predicted = np.asarray(truth, np.int64), np.asarray(predicted, np.int64)
    assert truth.shape == predicted.shape, f"{truth.shape} true classes, {predicted.shape} predictions"
    return np.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, classes)


def accuracy(truth, predicted) -> float:
    return _ratio((np.asarray(truth) == predicted).sum(), len(truth))


def per_class(truth, predicted, classes: int) -> list[Scores]:
    """Precision, recall and F1 of each class, from counts, so that thousands of classes need no matrix."""
    truth, predicted = np.asarray(truth, np.int64), np.asarray(predicted, np.int64)
    groups = truth[truth == predicted], predicted, truth
    return [_scores(*counts) for counts in zip(*(np.bincount(group, minlength=classes) for group in groups))]


def macro_f1(truth, predicted, classes: int) -> float:
    """The mean F1 of the classes that occur, in truth or among the predictions."""
    occurs = np.bincount(np.concatenate([truth, predicted]).astype(np.int64), minlength=classes)
    return float(np.mean([s.f1 for s, there in zip(per_class(truth, predicted, classes), occurs) if there] or [0.0]))


def of_sets(truth: np.ndarray, predicted: np.ndarray) -> tuple[Scores, list[Scores]]:
    """Scores over all classes of all texts (micro average), and of each class. truth, predicted: (N, C) bool."""
    counts = np.stack([(truth & predicted).sum(0), predicted.sum(0), truth.sum(0)])
    return _scores(*counts.sum(1)), [_scores(*of) for of in counts.T]


def roc_curve(positive, score) -> tuple[np.ndarray, np.ndarray]:
    """(false positive rate, true positive rate) at each threshold, the highest first, from (0, 0) to (1, 1).

    positive: (N,) bool; score: (N,), equal scores share one point. A rate is NaN if no example can count for it.
    """
    hits, taken = _cumulated(positive, score)
    hits, taken = np.concatenate([[0], hits]), np.concatenate([[0], taken])
    with np.errstate(invalid="ignore"):
        return (taken - hits) / (taken[-1] - hits[-1]), hits / hits[-1]


def pr_curve(positive, score) -> tuple[np.ndarray, np.ndarray]:
    """(precision, recall) at each threshold, the lowest first, to (1, 0). Arguments as in `roc_curve`."""
    hits, taken = _cumulated(positive, score)
    with np.errstate(invalid="ignore"):
        precision, recall = hits / taken, hits / hits[-1:]
    return np.append(precision[::-1], 1.0), np.append(recall[::-1], 0.0)


def roc_auc(truth, probabilities) -> float:
    """The area under the ROC curve, one class against the rest, averaged over the classes.

    truth: (N,) int; probabilities: (N, C). With two classes, it is the area of the second. A class that no example has,
    or all have, has no curve and is left out; NaN if none is left.
    """
    truth, probabilities = np.asarray(truth), np.asarray(probabilities)
    columns = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    curves = [roc_curve(truth == c, probabilities[:, c]) for c in columns if 0 < (truth == c).sum() < len(truth)]
    areas = [area(x, y) for x, y in curves]
    return float(np.mean(areas)) if areas else float("nan")


def area(x: np.ndarray, y: np.ndarray) -> float:
    """The area under a curve through (N,) points, by trapezoids."""
    return float((np.diff(x) * (y[1:] + y[:-1])).sum() / 2)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first, last + 1) of every entity in the BIO tags of one sentence.

    An I- that does not continue an entity of its type begins one, as in seqeval's default mode.
    """
    found, start, kind = set(), 0, None
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, this = tag.partition("-")
        if prefix == "I" and this == kind:
            continue
        if kind is not None:
            found.add((kind, start, i))
        start, kind = i, None if tag == "O" else this
    return found


def of_ranks(ranks: np.ndarray) -> dict[str, float]:
    """The figures of pairs. ranks: (n,) the rank at which each query finds its own text, from 1. recall_at_k: the share
    of queries that find it among the first k. mrr: the mean of 1 / rank."""
    recalls = {f"recall_at_{k}": float((ranks <= k).mean()) for k in (1, 10, 100)}
    return {**recalls, "mrr": float((1 / ranks).mean())}


def entity_scores(
    truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> tuple[Scores, dict[str, Scores]]:
    """The scores of all entities together (micro average), and of each type that occurs. An entity counts if its type
    and both its ends are right. truth, predicted: for each sentence, the BIO tags of its words."""
    assert [*map(len, truth)] == [*map(len, predicted)], "each word needs a true tag and a predicted one"
    true = {(i, *entity) for i, tags in enumerate(truth) for entity in entities(tags)}
    found = {(i, *entity) for i, tags in enumerate(predicted) for entity in entities(tags)}
    count = {kind: np.zeros(3, np.int64) for kind in sorted({entity[1] for entity in true | found})}
    for column, group in enumerate((true & found, found, true)):
        for entity in group:
            count[entity[1]][column] += 1
    return _scores(len(true & found), len(found), len(true)), {kind: _scores(*n) for kind, n in count.items()}


def of_numbers(truth, predicted) -> dict[str, float]:
    """Root mean squared error, mean absolute error, Spearman's rank correlation (equal numbers share their mean rank),
    and r2 = 1 - Σ (truth - predicted)² / Σ (truth - its mean)². If all true numbers are equal, r2 is 0; if all true or
    all predicted numbers are, the correlation is 0. truth, predicted: (N,)."""
    truth, predicted = np.asarray(truth, float), np.asarray(predicted, float)
    errors, spread = predicted - truth, truth - truth.mean()
    a, b = (each - each.mean() for each in (_ranks(truth), _ranks(predicted)))
    return {
        "rmse": float((errors**2).mean() ** 0.5),
        "mae": float(np.abs(errors).mean()),
        "spearman": _ratio(a @ b, ((a @ a) * (b @ b)) ** 0.5),
        "r2": 1 - float((errors @ errors) / (spread @ spread)) if truth.min() < truth.max() else 0.0,
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[index]


def _cumulated(positive, score) -> tuple[np.ndarray, np.ndarray]:
    """For each distinct score, the highest first: how many positives, and how many examples, have that score or a
    higher one."""
    positive, score = np.asarray(positive, bool), np.asarray(score)
    values, index = np.unique(-score, return_inverse=True)
    hits = np.bincount(index, weights=positive, minlength=len(values))
    return np.cumsum(hits), np.cumsum(np.bincount(index, minlength=len(values)))


def _scores(hits, found, true) -> Scores:
    precision, recall = _ratio(hits, found), _ratio(hits, true)
    return Scores(precision, recall, _ratio(2 * precision * recall, precision + recall), int(true))


def _ratio(part, whole) -> float:
    return float(part / whole) if whole else 0.0
