"""Curves of runs in one picture: `python -m minisobert.plot RUN [RUN …]` writes loss.png into the first RUN.

The large panel has the loss over tokens; below it are the loss over time and, where a price was given, over dollars,
the learning rate, the norm of the gradient and the speed. A panel without any figures is left out. It needs the
extra [plot].
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from minisobert.cli import Parser, command, printable
from minisobert.training import meter
from minisobert.training.run import read_metrics

# Okabe and Ito's colours, which colour-blind readers can tell apart. Grey replaces their yellow, which is illegible on
# white. A ninth run starts over, with dashes
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")
DASHES = ("-", (0, (5, 2)), (0, (1, 1)))
LONGEST = 40  # characters of a name that fit in a label
FEW = 2  # up to so many runs, the loss of each step is drawn behind the smoothed line
FONT = 9  # points
EXAMPLES = """\
python -m minisobert.plot runs/base
python -m minisobert.plot runs/base runs/large --png both.png
"""
TIMES = {"seconds": 1, "minutes": 60, "hours": 3_600, "days": 86_400}
DOLLAR = r"\$"  # without the backslash, two of them would enclose a formula


@dataclass
class Curves:
    """The curves of one run: arrays with a number for each step, NaN where there is none."""

    name: str
    color: str
    dashes: object
    tokens: np.ndarray  # row positions
    seconds: np.ndarray  # of training, without evaluations
    dollars: np.ndarray
    loss: np.ndarray
    smooth_loss: np.ndarray
    held_out: np.ndarray
    lr: np.ndarray
    grad_norm: np.ndarray
    speed: np.ndarray  # real tokens a second


def pyplot():
    """matplotlib.pyplot for files, not for windows. Raises ValueError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'minisobert[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot(runs: list[Path], path: Path, entropy: float | None = None) -> None:
    """Training and held-out loss of the runs over tokens, as a PNG. entropy: a level in nats to draw beside them."""
    plt, curves = pyplot(), read_curves(runs)
    figure = plt.figure(figsize=(8, 4.5), layout="constrained")
    _large(figure, curves, entropy)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_all(runs: list[Path], path: Path) -> None:
    """All panels of the runs, as a PNG."""
    plt, curves = pyplot(), read_curves(runs)
    figure = above = plt.figure(figsize=(12, 8), layout="constrained")
    panels = [
        ("seconds", "smooth_loss", "loss over time"), ("dollars", "smooth_loss", "loss over cost"),
        ("tokens", "lr", "learning rate"), ("tokens", "grad_norm", "norm of the gradient"),
        ("tokens", "speed", "tokens a second"),
    ]  # fmt: skip
    panels = [panel for panel in panels if any(_drawable(run, *panel[:2]) for run in curves)]
    if panels:
        above, below = figure.subfigures(2, 1, height_ratios=[5, 3])
        for axes, (x, y, title) in zip(np.atleast_1d(below.subplots(1, len(panels))), panels):
            _small(axes, curves, x, y, title)
    _large(above, curves)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def read_curves(runs: list[Path]) -> list[Curves]:
    """The curves of the runs, in the same order. Raises ValueError if a run has no metrics."""
    curves = []
    for i, (run, name) in enumerate(zip(runs, names(runs))):
        lines = read_metrics(run)
        column = {
            key: np.array([math.nan if line.get(key) is None else line[key] for line in lines], dtype=float)
            for key in ("positions", "loss", "validation_loss", "lr", "grad_norm", "tokens_per_second", "dollars")
        }
        smooth = {key: np.array(moving_mean(column[key].tolist(), max(len(lines) // 50, 1))) for key in column}
        if not (column["loss"] == column["loss"]).any():
            print(f"{run}: no step has a finite loss; its line is left out", file=sys.stderr)
        dollars = column["dollars"] if (column["dollars"] > 0).any() else np.full(len(lines), math.nan)
        curves.append(
            Curves(
                name, COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)], column["positions"],
                np.array(meter.elapsed(lines)), dollars, column["loss"], smooth["loss"], column["validation_loss"],
                column["lr"], smooth["grad_norm"], smooth["tokens_per_second"],
            )
        )  # fmt: skip
    return curves


def names(runs: list[Path]) -> list[str]:
    """A name for each run: the last folders of its path, as many as tell it from the other runs. Long names are cut in
    the middle."""
    paths, found, half = [Path(os.path.abspath(run)).parts for run in runs], [], LONGEST // 2
    for path in paths:
        others = {other for other in paths if other != path}
        depths = (n for n in range(1, len(path)) if all(other[-n:] != path[-n:] for other in others))
        name = printable("/".join(path[-next(depths, len(path)) :]))
        found.append(name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}")
    return found


def moving_mean(values: list[float], width: int) -> list[float]:
    """For each value, the mean of it and of the width - 1 values before it, without NaN and those before the first."""
    values = np.array(values, dtype=float)
    sums, counts = (np.concatenate([[0], np.cumsum(x)]) for x in (np.nan_to_num(values), ~np.isnan(values)))
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - width, 0)
    inside = counts[stop] - counts[start]
    return np.where(inside, (sums[stop] - sums[start]) / np.maximum(inside, 1), math.nan).tolist()


def _drawable(run: Curves, x: str, y: str) -> bool:
    return bool(np.isfinite(getattr(run, x) + getattr(run, y)).any())


def _line(axes, run: Curves, x: np.ndarray, y: np.ndarray, **how):
    """Draws a line, or a dot if there is only one number."""
    single = np.isfinite(x + y).sum() == 1
    axes.plot(x, y, marker="." if single else "", color=run.color, linestyle=run.dashes, **how)


def _large(figure, curves: list[Curves], entropy: float | None = None) -> None:
    axes, labels = figure.subplots(), []  # labels: (x, y, text, color) of the end of each line
    for run in curves:
        if len(curves) <= FEW:
            axes.plot(run.tokens, run.loss, color=run.color, alpha=0.2, linewidth=0.8)
        _line(axes, run, run.tokens, run.smooth_loss, linewidth=1.6)
        evaluated = np.isfinite(run.held_out)
        axes.plot(run.tokens[evaluated], run.held_out[evaluated], "o-", color=run.color, markersize=4.5, linewidth=0.8,
                  markerfacecolor="white")  # fmt: skip
        lines = {"training": run.smooth_loss, "held out": run.held_out}
        ends = [(np.flatnonzero(np.isfinite(y))[-1], name) for name, y in lines.items() if np.isfinite(y).any()]
        if len(curves) > 1:
            # one label per run: at the line that ends later, or at the held-out one if both end together
            ends = sorted(ends, key=lambda end: end[0])[-1:]
        for last, name in ends:
            x, y = run.tokens[last], lines[name][last]
            labels.append((x, y, f"{name if len(curves) == 1 else run.name} {y:.2f}", run.color))
    if entropy is not None:
        axes.axhline(entropy, color="black", linewidth=1, linestyle=":")
        right = max(run.tokens[-1] for run in curves)
        labels.append((right, entropy, f"unigram entropy\nof the corpus {entropy:.2f}", "black"))
    held_out = any(np.isfinite(run.held_out).any() for run in curves)
    _name(axes, "Loss" if len(curves) > 1 else f"Loss of {curves[0].name}", "masked-LM loss (nats)", 12)
    if held_out and len(curves) > 1:
        axes.text(1, 1.015, "line: training, smoothed    ○ held out", transform=axes.transAxes, ha="right", va="bottom",
                  fontsize=FONT)  # fmt: skip
    _scale(axes, "tokens", max(run.tokens[-1] for run in curves), ticks=8)
    _label(figure, axes, labels)


def _small(axes, curves: list[Curves], x: str, y: str, title: str) -> None:
    longest, values = 0.0, []
    for run in curves:
        if _drawable(run, x, y):
            across, up = getattr(run, x), getattr(run, y)
            longest = max(longest, float(np.nanmax(across)))
            values.extend(up[np.isfinite(up)])
            _line(axes, run, across, up, linewidth=1.2)
            if y == "smooth_loss":
                evaluated = np.isfinite(run.held_out)
                axes.plot(across[evaluated], run.held_out[evaluated], "o", color=run.color, markersize=3,
                          markerfacecolor="white")  # fmt: skip
    _name(axes, title, "", 10)
    _scale(axes, x, longest)
    if y == "speed":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
    if y == "grad_norm" and min(values) > 0 and max(values) > 30 * float(np.median(values)):
        axes.set_yscale("log")  # else a spike would flatten the rest


def _name(axes, title: str, below: str, size: int) -> None:
    axes.set_title(title, loc="left", fontsize=size, parse_math=False)
    axes.set_ylabel(below, fontsize=FONT)
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT)


def _scale(axes, x: str, longest: float, ticks: int = 4) -> None:
    """Sets the unit of the x axis, and about so many ticks."""
    unit, factor = x, 1.0
    if x == "seconds":
        unit, factor = [(name, size) for name, size in TIMES.items() if longest >= 2 * size or size == 1][-1]
        unit = f"{unit} of training"
    axes.xaxis.set_major_locator(_locator(factor, ticks))
    axes.xaxis.set_major_formatter(lambda value, _: (DOLLAR if x == "dollars" else "") + short(value / factor))
    axes.set_xlabel(unit, fontsize=FONT)


def _locator(factor: float, ticks: int):
    """Ticks at round numbers of a unit, which is `factor` in what is drawn."""
    from matplotlib.ticker import MaxNLocator

    class Locator(MaxNLocator):
        def tick_values(self, low, high):
            return super().tick_values(low / factor, high / factor) * factor

    return Locator(nbins=ticks, steps=[1, 2, 2.5, 5, 10])


def short(number: float) -> str:
    """`1.5 k`, `20 M`, `27 B`: thousands, millions, billions."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g}"


def _label(figure, axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Writes each text at its point, the end of a line, moved up or down so that none covers another."""
    from matplotlib.patheffects import withStroke

    texts = [
        axes.annotate(
            text, (x, y), xytext=(12, 0), textcoords="offset points", va="center", fontsize=FONT, color=color,
            annotation_clip=False, parse_math=False, path_effects=[withStroke(linewidth=3.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "relpos": (0, 0.5), "shrinkA": 1},
        )
        for x, y, text, color in labels
    ]  # fmt: skip
    figure.canvas.draw()  # lays out the figure with the texts; only now are their sizes known
    boxes = [text.get_window_extent() for text in texts]
    boxes = [(box.x0, box.x1, (box.y0 + box.y1) / 2, 1.1 * box.height) for box in boxes]
    low, high = axes.get_window_extent().intervaly
    for text, box, y in zip(texts, boxes, spread(boxes, low, high)):
        text.set_position((12, (y - box[2]) * 72 / figure.dpi))


def spread(boxes: list[tuple[float, float, float, float]], low: float, high: float) -> list[float]:
    """The middles of boxes (left, right, middle, height), moved up or down a little until none covers another. They
    keep their order, and stay between low and high as far as possible."""
    middles = [middle for _, _, middle, _ in boxes]
    order = sorted(range(len(boxes)), key=middles.__getitem__)
    for _ in range(500):
        for i, j in combinations(order, 2):
            beside = boxes[i][1] < boxes[j][0] or boxes[j][1] < boxes[i][0]
            lack = (boxes[i][3] + boxes[j][3]) / 2 - (middles[j] - middles[i])
            if not beside and lack > 0:
                middles[i], middles[j] = middles[i] - lack / 2, middles[j] + lack / 2
        middles = [min(max(middle, low), high) for middle in middles]
    return middles


@command("minisobert.plot")
def main(argv: list[str] | None = None) -> None:
    parser = Parser("minisobert.plot", __doc__.split("\n\n")[1], EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a train.py run")
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="picture to write (default: loss.png in the first folder)"
    )
    options = parser.parse_args(argv)
    png = options.png or options.runs[0] / "loss.png"
    plot_all(options.runs, png)
    print(png)


if __name__ == "__main__":
    main()
