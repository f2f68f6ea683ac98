"""Curves of runs: `python -m minisobert.plot RUN [RUN …]` writes loss.png into the first RUN (extra [plot])."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from minisobert.cli import Parser, command
from minisobert.training.run import read_metrics


def pyplot():
    """matplotlib.pyplot for files, not for windows. Raises ValueError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'minisobert[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot(runs: list[Path], path: Path, entropy: float | None = None) -> None:
    """Training and held-out loss of the runs over tokens, as a PNG. entropy: in nats, drawn as a level beside them."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, run in enumerate(runs):
        color, name, lines = f"C{i}", Path(run).name, read_metrics(run)
        tokens = [line["positions"] / 1e6 for line in lines]
        losses = _numbers(line["loss"] for line in lines)
        smooth = moving_mean(losses, max(len(lines) // 50, 1))
        axes.plot(tokens, losses, color=color, alpha=0.25, linewidth=0.8)
        # a single step, of which no line can be drawn, is a dot
        axes.plot(tokens, smooth, "-" if len(lines) > 1 else ".", color=color, label=f"{name}: training")
        if held_out := [(x, line["validation_loss"]) for x, line in zip(tokens, lines) if "validation_loss" in line]:
            x, y = zip(*held_out)
            axes.plot(x, _numbers(y), "o-", color=color, markersize=4, linewidth=1, markerfacecolor="white",
                      label=f"{name}: held out")  # fmt: skip
    if entropy is not None:
        axes.axhline(entropy, color="black", linewidth=1, linestyle=":", label="unigram entropy of the corpus")
    axes.set(xlabel="million tokens", ylabel="masked-LM loss (nats)", title="Pre-training loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _numbers(values: Iterable[float | None]) -> list[float]:
    """With NaN, of which nothing is drawn, for what was not finite."""
    return [math.nan if value is None else value for value in values]


def moving_mean(values: list[float], width: int) -> list[float]:
    """The mean of each value and the width - 1 before it, as far as there are so many and they are not NaN."""
    windows = ([v for v in values[max(i - width + 1, 0) : i + 1] if v == v] for i in range(len(values)))
    return [sum(window) / len(window) if window else math.nan for window in windows]


@command("minisobert.plot")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="minisobert.plot", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a train.py run")
    parser.add_argument("--png", type=Path, help="file to write (default: loss.png in the first run)")
    options = parser.parse_args(argv)
    png = options.png or options.runs[0] / "loss.png"
    plot(options.runs, png)
    print(png)


if __name__ == "__main__":
    main()
