"""Plots of a report, as PNG (extra [plot])."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minisobert.plot import pyplot
from minisobert.tasks import metrics


def confusion(path: Path, classes: Sequence[str], matrix: np.ndarray) -> None:
    """Coloured by the share of each row, so that rare classes show; numbers are counts."""
    plt = pyplot()
    n = len(classes)
    size = max(4.0, 1.5 + 0.5 * n)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure, axes = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(matrix):
        axes.text(j, i, f"{matrix[i, j]:,}", ha="center", va="center", fontsize=9 if n < 8 else 6,
                  color="white" if share[i, j] > 0.5 else "black")  # fmt: skip
    axes.set_xticks(range(n), classes, rotation=90 if n > 4 else 0)
    axes.set_yticks(range(n), classes)
    axes.set(xlabel="predicted", ylabel="true", title="Confusion matrix")
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    figure.savefig(path, dpi=150, bbox_inches="tight")  # the square takes what room the labels would need
    plt.close(figure)


def curves(path: Path, labels: Sequence[str], truth: np.ndarray, probabilities: np.ndarray) -> None:
    """ROC and precision-recall curves of each class against the others, or of the second of two."""
    plt = pyplot()
    figure, (roc, pr) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for c in [1] if len(labels) == 2 else range(len(labels)):
        positive = truth == c
        if not 0 < positive.sum() < len(truth):
            continue  # no curve without examples of both kinds
        false_rate, true_rate = metrics.roc_curve(positive, probabilities[:, c])
        precision, recall = metrics.pr_curve(positive, probabilities[:, c])
        area = metrics.area(false_rate, true_rate)
        roc.plot(false_rate, true_rate, color=f"C{c}", label=f"{labels[c]}: area {area:.3f}")
        pr.plot(recall, precision, color=f"C{c}", label=labels[c])
        pr.axhline(positive.mean(), color=f"C{c}", linewidth=0.8, linestyle=":")
    roc.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    roc.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
    pr.set(xlabel="recall", ylabel="precision", title="Precision and recall", ylim=(0, 1.02))
    for axes in (roc, pr):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
