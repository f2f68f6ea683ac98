"""Plots of a report, as PNG (extra [plot])."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minisobert.plot import pyplot
from minisobert.tasks import metrics

LONGEST = 40  # characters of a class's name for which a plot has room
CURVES = 10  # that colours can tell apart


def confusion(path: Path, classes: Sequence[str], matrix: np.ndarray, title: str = "Confusion matrix") -> None:
    """A confusion matrix, coloured by the share of each row, so that rare classes show. The numbers are counts."""
    plt = pyplot()
    n = len(classes)
    size = max(4.0, 1.5 + 0.5 * n)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure, axes = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(matrix):
        axes.text(j, i, f"{matrix[i, j]:,}", ha="center", va="center", fontsize=9 if n < 8 else 6,
                  color="white" if share[i, j] > 0.5 else "black")  # fmt: skip
    names = [_name(name) for name in classes]
    axes.set_xticks(range(n), names, rotation=90 if n > 4 else 0)
    axes.set_yticks(range(n), names)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    _save(figure, path, bbox_inches="tight")  # the square leaves too little room for the labels
    plt.close(figure)


def curves(path: Path, labels: Sequence[str], truth: np.ndarray, probabilities: np.ndarray) -> None:
    """ROC and precision-recall curves of each class against the others, or of the second class if there are two. With
    more than CURVES classes, only those with the most examples are drawn. truth: (N,) the class of each text, or (N, C)
    bool."""
    plt = pyplot()
    figure, (roc, pr) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    of_class = truth.T if truth.ndim == 2 else truth == np.arange(len(labels))[:, None]  # (C, N) bool
    drawn = np.argsort(-of_class.sum(1), kind="stable")[:CURVES]
    for i, c in enumerate([1] if len(labels) == 2 and truth.ndim == 1 else sorted(drawn)):
        color = f"C{c if len(labels) <= CURVES else i}"
        positive = of_class[c]
        if not 0 < positive.sum() < len(truth):
            continue  # no curve without examples of both kinds
        false_rate, true_rate = metrics.roc_curve(positive, probabilities[:, c])
        precision, recall = metrics.pr_curve(positive, probabilities[:, c])
        area = metrics.area(false_rate, true_rate)
        roc.plot(false_rate, true_rate, color=color, label=f"{_name(labels[c])}: area {area:.3f}")
        pr.plot(recall, precision, color=color, label=_name(labels[c]))
        pr.axhline(positive.mean(), color=color, linewidth=0.8, linestyle=":")
    roc.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    roc.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
    pr.set(xlabel="recall", ylabel="precision", title="Precision and recall", ylim=(0, 1.02))
    for axes in (roc, pr):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:  # matplotlib warns of an empty legend
            axes.legend(frameon=False)
    _save(figure, path)
    plt.close(figure)


def scatter(path: Path, name: str, truth: np.ndarray, predicted: np.ndarray) -> None:
    """Predicted numbers over true ones; right predictions lie on the line. truth, predicted: (N,)."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5.5, 5), layout="constrained")
    ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
    axes.plot(ends, ends, color="black", linewidth=0.8, linestyle=":")
    # the more points there are, the fainter they are drawn, since many coincide, above all whole numbers
    axes.scatter(truth, predicted, s=14, alpha=max(0.05, min(0.6, 60 / len(truth) ** 0.5)), linewidths=0)
    axes.set(xlabel=f"true: {_name(name)}", ylabel="predicted", title="True and predicted numbers of test")
    axes.grid(alpha=0.3)
    _save(figure, path)
    plt.close(figure)


def _name(label: str) -> str:
    """The label as a plot can show it: shortened, and with escaped dollar signs, which would begin a formula."""
    return (label if len(label) <= LONGEST else label[: LONGEST - 1] + "…").replace("$", r"\$")


def _save(figure, path: Path, **options) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn for it
        figure.savefig(path, dpi=150, **options)
