"""Computes the figures of a report from probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minisobert.finetuning.loop import Outcome
from minisobert.tasks import metrics
from minisobert.tasks.dataset import Dataset, Example


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of one split. Numbers and pairs have figures alone.

    figures: those in metrics.json.
    per_class: the scores of each class, or of each entity type and of all entities.
    confusion: (C, C) counts by `classes`, of documents or of words; the B- and I- of a type are one class. With more
        than MANY classes, the commonest ones, and all others as the last. Empty if a text may have several classes.
    """

    figures: dict[str, float]
    per_class: dict[str, metrics.Scores]
    classes: tuple[str, ...]
    confusion: np.ndarray


# r2 comes last, since epochs and seeds are compared by the last figure. It is the error that training minimises, on a
# scale on which always giving the mean is 0. A rank correlation would not notice that all numbers are twice too large.
OF_NUMBERS = ("rmse", "mae", "spearman", "r2")
NO_CLASSES = (), np.zeros((0, 0), np.int64)


def evaluate(data: Dataset, examples: list[Example], probabilities: list[np.ndarray]) -> Evaluation:
    """The evaluation of the predictions for some examples. probabilities: (size, classes) for each example, or what
    else `Outcome.test` holds: numbers (1, 1), or ranks (2,) of pairs."""
    if data.number:
        return Evaluation(metrics.of_numbers(truth_of(data, examples), numbers(probabilities)), {}, *NO_CLASSES)
    if data.kind == "pair":  # (rank, first text) for each query, see retrieval.py
        return Evaluation(metrics.of_ranks(np.stack(probabilities)[:, 0]), {}, *NO_CLASSES)
    if data.several:
        return _several(data, examples, np.concatenate(probabilities))
    return (_sequence if data.kind == "sequence" else _token)(data, examples, probabilities)


def _sequence(data: Dataset, examples: list[Example], probabilities: list[np.ndarray]) -> Evaluation:
    p = np.concatenate(probabilities)  # (N, C)
    truth, found, classes = truth_of(data, examples), p.argmax(1), len(data.labels)
    figures = {"accuracy": metrics.accuracy(truth, found), "macro_f1": metrics.macro_f1(truth, found, classes)}
    # with thousands of classes it would take minutes; it is not finite if the split has a single class
    if classes <= metrics.MANY and np.isfinite(area := metrics.roc_auc(truth, p)):
        figures["roc_auc"] = area
    scores = dict(zip(data.labels, metrics.per_class(truth, found, classes)))
    return Evaluation(figures, scores, *confusion(data.labels, truth, found))


def _several(data: Dataset, examples: list[Example], p: np.ndarray) -> Evaluation:
    """p: (N, C). A text has the classes that are likelier than not; accuracy is the share of texts whose classes are
    all right."""
    truth, found = truth_of(data, examples), p >= 0.5
    micro, scores = metrics.of_sets(truth, found)
    occurs = (truth | found).any(0)
    figures = {
        "accuracy": float((truth == found).all(1).mean()),
        "micro_f1": micro.f1,
        "macro_f1": float(np.mean([s.f1 for s, there in zip(scores, occurs) if there] or [0.0])),
    }
    return Evaluation(figures, dict(zip(data.labels, scores)), *NO_CLASSES)


def truth_of(data: Dataset, examples: list[Example]) -> np.ndarray:
    """(N,) the class or the number of each text, or (N, C) bool if a text may have several classes."""
    if data.number:
        return np.array([e.value for e in examples])
    if not data.several:
        return np.array([e.label for e in examples])
    truth = np.zeros((len(examples), len(data.labels)), bool)
    for row, e in zip(truth, examples):
        row[list(e.tags)] = True
    return truth


def numbers(probabilities: list[np.ndarray]) -> np.ndarray:
    """(N,) the numbers that a network predicts for N texts."""
    return np.concatenate(probabilities)[:, 0]


def always_the_mean(data: Dataset) -> dict[str, float]:
    """The figures on test of always predicting the mean of train."""
    truth = truth_of(data, data.test)
    return metrics.of_numbers(truth, np.full(len(truth), truth_of(data, data.train).mean()))


def _token(data: Dataset, examples: list[Example], probabilities: list[np.ndarray]) -> Evaluation:
    truth = [names(data, e.tags) for e in examples]
    predicted = [names(data, p.argmax(1)) for p in probabilities]
    overall, types = metrics.entity_scores(truth, predicted)
    classes = tuple(dict.fromkeys(label.partition("-")[2] or "O" for label in data.labels))
    index = {name: i for i, name in enumerate(classes)}
    flat = ([index[tag.partition("-")[2] or "O"] for tags in each for tag in tags] for each in (truth, predicted))
    right = [a == b for each in zip(truth, predicted) for a, b in zip(*each)]
    figures = {
        "precision": overall.precision,
        "recall": overall.recall,
        "f1": overall.f1,
        "macro_f1": float(np.mean([scores.f1 for scores in types.values()] or [0.0])),
        "accuracy": float(np.mean(right)),
    }
    return Evaluation(figures, {**types, "all entities": overall}, *confusion(classes, *flat))


def confusion(classes: Sequence[str], truth, predicted) -> tuple[tuple[str, ...], np.ndarray]:
    """`classes` and `confusion` of an Evaluation."""
    n = len(classes)
    if n <= metrics.MANY:
        return tuple(classes), metrics.confusion_matrix(truth, predicted, n)
    shown = commonest(np.asarray(truth, np.int64), n)
    place = np.full(n, len(shown))
    place[shown] = np.arange(len(shown))
    matrix = metrics.confusion_matrix(place[truth], place[predicted], len(shown) + 1)
    return (*(classes[i] for i in shown), "(others)"), matrix


def commonest(truth: np.ndarray, classes: int) -> np.ndarray:
    """The MANY classes with the most examples, the commonest first."""
    return np.argsort(-np.bincount(truth, minlength=classes), kind="stable")[: metrics.MANY]


def names(data: Dataset, tags: Sequence[int] | np.ndarray) -> list[str]:
    return [data.labels[tag] for tag in tags]


def main_figure(data: Dataset) -> str:
    """The name of the figure by which epochs and seeds are compared."""
    return (OF_NUMBERS if data.number else data.task.figures)[-1]


def shown(name: str, value: float) -> str:
    """A figure as a report shows it. Errors are in the unit of the numbers and may be large; all others are shares."""
    return f"{value:.4g}" if name in ("rmse", "mae") else f"{value:.4f}"


def dev_score(data: Dataset, probabilities: list[np.ndarray]) -> float:
    return evaluate(data, data.dev, probabilities).figures[main_figure(data)]


def best(outcomes: list[Outcome]) -> Outcome:
    """The outcome that is best on dev: which seed's model is kept must not depend on test."""
    return max(outcomes, key=lambda outcome: outcome.score)


def mean_and_deviation(figures: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """{"mean": each figure's mean over the seeds, "std": its sample standard deviation, with two seeds or more}"""
    shared = [name for name in figures[0] if all(name in each for each in figures)]
    columns = {name: [each[name] for each in figures] for name in shared}
    result = {"mean": {name: float(np.mean(column)) for name, column in columns.items()}}
    if len(figures) > 1:
        result["std"] = {name: float(np.std(column, ddof=1)) for name, column in columns.items()}
    return result
